"""Where data lies: any fsspec URL, what kind of thing is there, and the image files of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, Literal

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from equigram.data.files import SUFFIXES
from equigram.errors import DataError, DataNotFoundError, EquigramError

Kind = Literal["folder", "image", "npy", "npz", "zarr"]

_ZARR_MARKERS = ("zarr.json", ".zarray", ".zgroup")
_HEADER_BYTES = 65536


@dataclass(frozen=True)
class Location:
    """Something that exists at a URL."""

    url: str
    kind: Kind
    fs: Any
    """The fsspec file system."""
    path: str
    """The path in that file system."""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    @property
    def is_local(self) -> bool:
        """Whether it is on a file system of this machine."""
        return isinstance(self.fs, LocalFileSystem)

    def open(self, path: str | None = None) -> IO[bytes]:
        """Open ``path``, or the location itself, to read parts of it."""
        file: IO[bytes] = self.fs.open(path or self.path, "rb", block_size=_HEADER_BYTES)
        return file


@dataclass(frozen=True)
class ImageFile:
    """An image file in a folder."""

    name: str
    """Path relative to the folder."""
    path: str
    """Path in the file system."""
    size: int | None
    """Bytes; unknown on some servers."""
    label: str | None
    """The class folder it lies in; none if it lies beside them."""


@dataclass(frozen=True)
class Listing:
    """The images of a folder, sorted by class folder, then by name; hidden files and folders are left out."""

    files: tuple[ImageFile, ...]
    classes: tuple[str, ...]
    """The folders in it, also empty ones."""
    ignored: tuple[str, ...]
    """Other files."""


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turns whatever a file system raises into one sentence that names the URL."""
    try:
        yield
    except EquigramError:
        raise
    except FileNotFoundError:
        raise _nothing_at(url) from None
    except PermissionError:
        raise DataError(
            f"{url} may not be read: permission denied; check its permissions or your credentials"
        ) from None
    except ImportError as error:
        raise DataError(f"{url} needs a package that is not installed ({error}); install it with pip") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise DataError(
            f"{url} cannot be read ({type(error).__name__}{': ' if reason else ''}{reason}); check the URL, the "
            "network and your credentials"
        ) from None


def locate(url: str) -> Location:
    """Find out what is at ``url``.

    Raises:
      DataNotFoundError: nothing is there.
      DataError: it cannot be reached, or is of no known kind.
    """
    protocol = url.split("://", 1)[0] if "://" in url else ""
    with reaching(url):
        try:
            fs, path = url_to_fs(url)
        except ValueError:
            raise DataError(
                f"{url} starts with {protocol!r}, a protocol that is not known; use a path, or a URL such as s3://bucket/folder"
            ) from None
        fs.invalidate_cache()
        suffix = PurePosixPath(path.rstrip("/")).suffix.lower()
        if suffix in (".npy", ".npz"):
            if not fs.isfile(path):
                raise _absence(fs, path, url)
            return Location(url, "npy" if suffix == ".npy" else "npz", fs, path)
        inside = f"{path.rstrip('/')}/" if path else ""
        if any(fs.isfile(inside + marker) for marker in _ZARR_MARKERS):
            return Location(url, "zarr", fs, path)
        if fs.isdir(path):
            return Location(url, "folder", fs, path)
        if not fs.exists(path):
            raise _absence(fs, path, url)
    if suffix in SUFFIXES:
        return Location(url, "image", fs, path)
    remedy = f"unpack it, or name what is in it as zip://::{url}" if suffix == ".zip" else "name one of these"
    raise DataError(f"{url} is neither a folder nor an .npz, .npy or zarr; {remedy}")


def list_images(folder: Location) -> Listing:
    """The images of a folder: of its class folders, and directly in it.

    Raises:
      DataError: a class folder holds a folder, or the listing fails.
    """
    files, classes, ignored = [], [], []
    with reaching(folder.url):
        for name, path, size, is_folder in _children(folder, folder.path):
            if not is_folder:
                if _is_image(name):
                    files.append(ImageFile(name, path, size, None))
                else:
                    ignored.append(name)
                continue
            classes.append(name)
            for inner, inner_path, inner_size, inner_is_folder in _children(folder, path):
                relative = f"{name}/{inner}"
                if inner_is_folder:
                    raise DataError(
                        f"{relative} in {folder.url} is a folder inside the class folder {name!r}, which holds images "
                        f"only; move its images to {name!r}, or name {folder.url.rstrip('/')}/{name} as the source"
                    )
                if _is_image(inner):
                    files.append(ImageFile(relative, inner_path, inner_size, name))
                else:
                    ignored.append(relative)
    files.sort(key=lambda file: (file.label or "", file.name))
    return Listing(tuple(files), tuple(sorted(classes)), tuple(sorted(ignored)))


def files(location: Location) -> list[tuple[str, int | None, str]]:
    """``(relative path, bytes, path in the file system)`` of every file read from ``location``, sorted."""
    if location.kind == "folder":
        return sorted((file.name, file.size, file.path) for file in list_images(location).files)
    with reaching(location.url):
        if location.kind == "zarr":
            found = location.fs.find(location.path, detail=True)
            start = len(location.path.rstrip("/"))
            return sorted((path[start:].lstrip("/"), info["size"], path) for path, info in found.items())
        return [(location.name, location.fs.size(location.path), location.path)]


def _children(folder: Location, path: str) -> list[tuple[str, str, int | None, bool]]:
    """``(name, path, bytes, is a folder)`` of what lies directly in ``path``, but for hidden things."""
    children = []
    for info in folder.fs.ls(path, detail=True):
        inner = info["name"].rstrip("/")
        name = inner.rsplit("/", 1)[-1]
        # Some object stores list the folder itself; __MACOSX is what the Finder adds to zip archives.
        if inner.strip("/") == path.strip("/") or name.startswith(".") or name == "__MACOSX":
            continue
        is_folder = info["type"] == "directory" or (info["type"] != "file" and folder.fs.isdir(inner))
        children.append((name, inner, info.get("size"), is_folder))
    return sorted(children)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _absence(fs: Any, path: str, url: str) -> Exception:
    """What to raise where a file system says that nothing is there: HTTP says so of a silent server, too."""
    try:
        fs.info(path)
    except Exception as error:
        if not isinstance(error, FileNotFoundError):
            return error
        if isinstance(error.__cause__, Exception) and not isinstance(error.__cause__, FileNotFoundError):
            return error.__cause__
    return _nothing_at(url)


def _nothing_at(url: str) -> DataNotFoundError:
    return DataNotFoundError(f"{url} does not exist; check the path, and where relative paths start")
