"""Arrays in .npy, .npz and zarr files, described without reading them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from equigram.data.locations import Location, reaching
from equigram.errors import DataError, DataNotFoundError, EquigramError, ResourceError
from equigram.memory import available_memory, format_bytes

Indices = NDArray[np.intp]


@dataclass(frozen=True)
class StoredArray:
    """One array of a file."""

    where: str
    """What it is called in errors."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    whole: bool
    """Whether it must be read as a whole to get some of its rows."""
    read: Callable[[Indices], NDArray[Any]]
    """The rows asked for, in that order."""

    def rows(self, indices: Indices) -> NDArray[Any]:
        """The rows ``indices``, ``(len(indices), *shape[1:])``, in that order.

        Raises:
          DataError: the file is damaged.
          ResourceError: reading needs more memory than there is.
        """
        length = max(1, self.shape[0])
        needed = self.dtype.itemsize * int(np.prod(self.shape, dtype=object)) * (len(indices) / length + self.whole)
        available = available_memory()
        if needed > available:
            raise ResourceError(
                f"{self.where} needs {format_bytes(needed)} of memory to be read, and {format_bytes(available)} is "
                "available; store it as zarr, of which only the chosen images are read, or use a larger machine"
            )
        return self.read(indices)


@dataclass(frozen=True)
class ArrayFile:
    """The arrays of one file by name; a file of a single nameless array has the name ``""``."""

    location: Location
    arrays: Mapping[str, StoredArray]


def open_arrays(location: Location) -> ArrayFile:
    """Describe the arrays of an .npy, .npz or zarr.

    Raises:
      DataNotFoundError: nothing is there.
      DataError: it is something else, damaged, or holds Python objects.
    """
    with reaching(location.url):
        if location.kind == "zarr":
            return ArrayFile(location, _zarr_arrays(location))
        if location.kind == "npy":
            return ArrayFile(location, {"": _npy_array(location)})
        return ArrayFile(location, _npz_arrays(location))


def _npy_array(location: Location) -> StoredArray:
    def read(indices: Indices) -> NDArray[Any]:
        with reaching(location.url), location.open() as file, _intact(location.url):
            return _read_npy(file)[indices]

    with location.open() as file, _intact(location.url):
        return _described(file, location.url, read)


def _npz_arrays(location: Location) -> dict[str, StoredArray]:
    def reader(member: str) -> Callable[[Indices], NDArray[Any]]:
        def read(indices: Indices) -> NDArray[Any]:
            with (
                reaching(location.url),
                location.open() as file,
                _intact(location.url),
                zipfile.ZipFile(file) as archive,
                archive.open(member) as stream,
            ):
                return _read_npy(stream)[indices]

        return read

    arrays = {}
    with location.open() as file, _intact(location.url), zipfile.ZipFile(file) as archive:
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            with archive.open(member) as stream:
                arrays[name] = _described(stream, f"{name} in {location.url}", reader(member))
    return arrays


def _described(file: IO[bytes], where: str, read: Callable[[Indices], NDArray[Any]]) -> StoredArray:
    """The array whose .npy header is at the start of ``file``."""
    shape, dtype = _npy_header(file)
    if dtype.hasobject:
        raise DataError(
            f"{where} holds Python objects (dtype {dtype}), which would have to be unpickled; save it as an array of "
            "numbers"
        )
    return StoredArray(where, shape, dtype, whole=True, read=read)


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _read_npy(file: IO[bytes]) -> NDArray[Any]:
    array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


@contextmanager
def _intact(url: str) -> Iterator[None]:
    """Whatever numpy or zipfile say of a file that does not hold what it should, as one error."""
    try:
        yield
    except (EquigramError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{url} is truncated, damaged or no such file ({reason}); save it again") from None


def _zarr_arrays(location: Location) -> dict[str, StoredArray]:
    import zarr
    import zarr.errors
    from zarr.storage import FsspecStore, LocalStore

    store = (
        LocalStore(location.path, read_only=True)
        if location.is_local
        else FsspecStore.from_url(location.url, read_only=True)
    )

    def described(array: zarr.Array[Any], where: str) -> StoredArray:
        def read(indices: Indices) -> NDArray[Any]:
            with reaching(location.url):
                return np.asarray(array.oindex[indices])

        return StoredArray(where, array.shape, np.dtype(array.dtype), whole=False, read=read)

    try:
        node = zarr.open(store, mode="r")
    except (FileNotFoundError, zarr.errors.NodeNotFoundError):
        raise DataNotFoundError(f"{location.url} holds no zarr array or group; check the path inside the zarr") from None
    if isinstance(node, zarr.Group):
        return {name: described(array, f"{name} in {location.url}") for name, array in sorted(node.arrays())}
    return {"": described(node, location.url)}
