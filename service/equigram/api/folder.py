"""Small files below a URL, each of which is written as a whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from equigram.errors import SpecError, StoreError
from equigram.storage import ask, children, reason

ANSWER_SECONDS = 60.0
"""How long the storage may take over one request."""


class Folder:
    """A folder on any fsspec file system; it need not exist before something is written.

    Args:
      url: where it is.

    Raises (from every method):
      StoreError: the storage does not answer, is full or is read-only.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        try:
            self._fs, path = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise SpecError(f"{url}: cannot open this kind of URL: {error}") from None
        self.url = url
        self._path = str(path).rstrip("/")
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"

    def at(self, name: str) -> str:
        """The URL of something in it."""
        return f"{self.url.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes | None:
        """A whole file; ``None`` where there is none."""
        with self._explained(f"read {name}"):
            try:
                return bytes(self._call("cat_file", f"{self._path}/{name}"))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder of that name."""
        with self._explained(f"look for {name}"):
            return bool(self._call("exists", f"{self._path}/{name}"))

    def write(self, name: str, content: bytes) -> None:
        """Write a file, or replace it: nobody ever sees a part of it."""
        with self._explained(f"write {name}"):
            if not self.is_local:
                self._call("pipe_file", f"{self._path}/{name}", content)
                return
            with self._beside(name) as partial:
                partial.write_bytes(content)
                partial.replace(Path(self._path, name))

    def create(self, name: str, content: bytes) -> bool:
        """Write a file if there is none of that name, and tell whether there was none."""
        with self._explained(f"write {name}"):
            try:
                if not self.is_local:
                    self._call("pipe_file", f"{self._path}/{name}", content, mode="create")
                    return True
                with self._beside(name) as partial:
                    partial.write_bytes(content)
                    os.link(partial, Path(self._path, name))
            except FileExistsError:
                return False
        return True

    def put(self, name: str, file: Path) -> None:
        """Move a file of this machine here."""
        with self._explained(f"write {name}"):
            if not self.is_local:
                self._fs.put_file(str(file), f"{self._path}/{name}")
                file.unlink()
                return
            with self._beside(name) as partial:
                shutil.move(file, partial)  # perhaps from another file system
                partial.replace(Path(self._path, name))

    def scratch(self) -> Path:
        """The name of a new file of this machine, from where :meth:`put` is quick."""
        folder = Path(self._path) if self.is_local else Path(tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f".{uuid.uuid4().hex}.partial"

    def sweep(self) -> None:
        """Delete what writers that are gone have left half written on this machine; nobody may write meanwhile."""
        if self.is_local:
            for partial in Path(self._path).glob(".*.partial"):
                partial.unlink(missing_ok=True)

    def names(self, inside: str = "") -> list[str]:
        """Names of the files and folders in it, or in a folder of it, sorted."""
        path = f"{self._path}/{inside}".rstrip("/")
        with self._explained("list its files"):
            try:
                return sorted(set(children(self._fs, path, seconds=ANSWER_SECONDS)))
            except NotADirectoryError:
                return []

    def delete(self, name: str) -> None:
        """Delete a file or folder, if there is one."""
        with self._explained(f"delete {name}"), contextlib.suppress(FileNotFoundError):
            if self._call("exists", f"{self._path}/{name}"):
                self._call("rm", f"{self._path}/{name}", recursive=True)

    @contextlib.contextmanager
    def _beside(self, name: str) -> Iterator[Path]:
        """A place for a file beside that of another one; what is there is gone afterwards."""
        target = Path(self._path, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    def _call(self, operation: str, *arguments: Any, **options: Any) -> Any:
        """A request to the file system, for :data:`ANSWER_SECONDS` at most where that is remote."""
        return ask(self._fs, operation, *arguments, seconds=ANSWER_SECONDS, **options)

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise
        except Exception as error:
            why = reason(error, seconds=ANSWER_SECONDS)
            raise StoreError(f"{self.url}: cannot {doing}: {why}") from error
