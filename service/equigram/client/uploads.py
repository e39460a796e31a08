"""Images and labels on their way to a service: files as they are, folders as an archive that is always the same."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from equigram.api.models import ServiceView, UploadAnswer
from equigram.client.connection import Connection
from equigram.errors import AuthenticationError, DataError, DataNotFoundError, EquigramError, LimitError, ServiceError
from equigram.events import Listener, Progress

PIECE = 2**20
"""Bytes that are read at once."""

_SUFFIXES = (".npz", ".npy", ".zip")


def send(connection: Connection, path: Path, listener: Listener) -> str:
    """Send a file or folder, and return the URL that names it in a job.

    Raises:
      DataError: it is nothing that can be sent, or it changes meanwhile.
      LimitError: it is larger than the service takes.
      ServiceError: it arrived damaged.
    """
    with _as_file(path) as (file, name):
        view = connection.get("/service", ServiceView)
        size = file.stat().st_size
        if view.scope != "write":
            raise AuthenticationError(f"{connection.url}: the token {view.name!r} only reads; uploads need another one")
        if size > view.upload_bytes:
            raise LimitError(
                f"{path} takes {size:,} bytes, but {connection.url} takes {view.upload_bytes:,} at most; put it where "
                f"its jobs may read: {', '.join(view.readable) or 'nowhere yet, ask who runs it'}"
            )
        digest = hashlib.sha256()

        def content() -> Iterator[bytes]:
            nonlocal digest
            digest, sent = hashlib.sha256(), 0
            with file.open("rb") as opened:
                while piece := opened.read(PIECE):
                    sent += len(piece)
                    if sent > size:
                        break
                    digest.update(piece)
                    listener(Progress(f"uploading {path.name}: bytes", sent, size))
                    yield piece
            if sent != size:
                raise DataError(f"{path} changed from {size:,} bytes while it was sent; wait until it is whole")

        headers = {"X-Filename": name, "Content-Type": "application/octet-stream", "Content-Length": str(size)}
        answer = connection.post("/uploads", UploadAnswer, headers=headers, body=content)
    if answer.sha256 != digest.hexdigest():
        raise ServiceError(
            f"{path} has SHA-256 {digest.hexdigest()}, but {connection.url} received {answer.sha256}; send it again"
        )
    return answer.url


@contextlib.contextmanager
def _as_file(path: Path) -> Iterator[tuple[Path, str]]:
    """The file to send for ``path``, and what to call it."""
    try:
        if path.is_dir():
            with tempfile.TemporaryDirectory(prefix="equigram-") as folder:
                archive = Path(folder) / "images.zip"
                _pack(path, archive)
                yield archive, archive.name
        elif not path.exists():
            raise DataNotFoundError(f"{path}: there is nothing to upload; check the name")
        elif path.suffix.lower() not in _SUFFIXES:
            raise DataError(f"{path} is no {', '.join(_SUFFIXES)} file and no folder; save it as one of these")
        else:
            yield path, f"{'labels' if path.suffix.lower() == '.npy' else 'images'}{path.suffix.lower()}"
    except EquigramError:
        raise
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read or packed: {error.strerror or error}") from None


def _pack(folder: Path, archive: Path) -> None:
    """Put a folder of images into an archive: the same bytes for the same files, whatever their dates and order.

    Hidden files and folders are left out, as they are where images are loaded.

    Raises:
      DataError: there are no files, or they are a zarr.
    """
    files = sorted(
        Path(root, name).relative_to(folder)
        for root, folders, names in _visible(folder)
        for name in names
        if Path(root, name).is_file()
    )
    if folder.suffix == ".zarr" or Path("zarr.json") in files:
        raise DataError(
            f"{folder} is a zarr, which is not uploaded; save it as .npz, or put it where the service reads"
        )
    if not files:
        raise DataNotFoundError(f"{folder} has no files to upload; name a folder of images")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
        for file in files:
            entry = zipfile.ZipInfo(file.as_posix())  # dated 1980
            entry.file_size = (folder / file).stat().st_size
            with (folder / file).open("rb") as source, packed.open(entry, "w") as target:
                while piece := source.read(PIECE):
                    target.write(piece)


def _visible(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Folders and files below ``folder``, without hidden ones."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        yield root, folders, [name for name in files if not name.startswith(".")]
