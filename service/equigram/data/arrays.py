"""Arrays in .npy, .npz and zarr files, described without reading them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from equigram.data.files import Header
from equigram.data.locations import Location, reaching
from equigram.errors import DataError, DataNotFoundError, EquigramError, ResourceError
from equikernel.memory import available_memory, format_bytes

Indices: TypeAlias = NDArray[np.intp]
Labels: TypeAlias = NDArray[Any]
"""``(n,)`` class values (integers, booleans or text), or ``(n, k)`` float64 targets."""

MAX_CHANNELS = 16
"""Arrays with more are taken for a wrong layout."""


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


def image_header(images: StoredArray) -> Header:
    """What every image of an array ``(n, H, W)`` or ``(n, H, W, C)`` is like.

    Raises:
      DataError: it has another shape, no pixels, or a dtype whose range is not known.
    """
    shape, dtype = images.shape, images.dtype
    if len(shape) not in (3, 4):
        raise DataError(
            f"{images.where} has shape {shape}, but images are (n, height, width) or (n, height, width, channels); "
            "reshape it, for one image with x[None]"
        )
    if 0 in shape:
        raise DataError(f"{images.where} has shape {shape}: it holds no pixels; save at least one image")
    if len(shape) == 4 and shape[1] in (1, 3, 4) and shape[3] > 4:
        raise DataError(
            f"{images.where} has shape {shape}, which looks like (n, channels, height, width), but images are "
            "(n, height, width, channels); save x.transpose(0, 2, 3, 1)"
        )
    channels = shape[3] if len(shape) == 4 else 1
    if channels > MAX_CHANNELS:
        raise DataError(
            f"{images.where} has shape {shape}: {channels} channels, and at most {MAX_CHANNELS} are taken; save the "
            "images as (n, height, width, channels)"
        )
    if dtype.kind != "f" and not (dtype.kind == "u" and dtype.itemsize <= 2):
        raise DataError(
            f"{images.where} has dtype {dtype}, but images are uint8 (0..255), uint16 (0..65535) or floats; convert it "
            "with astype"
        )
    return Header(shape[1], shape[2], channels, integer=dtype.kind == "u")


def read_labels(labels: StoredArray, images: StoredArray) -> Labels:
    """The labels of an array of images.

    Raises:
      DataError: there are not as many as images, or they are neither classes nor finite targets.
    """
    shape, kind = labels.shape, labels.dtype.kind
    if not shape or shape[0] != images.shape[0]:
        raise DataError(
            f"{labels.where} holds {shape[0] if shape else 1} labels, but {images.where} holds {images.shape[0]} "
            "images; there must be one label per image"
        )
    if kind not in "biuUf":
        raise DataError(
            f"{labels.where} has dtype {labels.dtype}, but labels are integers or text for classes and floats for "
            "regression; convert them with astype"
        )
    if len(shape) > 2 or (kind != "f" and shape[1:] not in ((), (1,))) or 0 in shape:
        raise DataError(
            f"{labels.where} has dtype {labels.dtype} and shape {shape}, but class labels are (n,) or (n, 1) and "
            "regression targets float (n,) or (n, k); of one-hot labels save argmax(axis=1), of several targets floats"
        )
    values = labels.rows(np.arange(shape[0]))
    if kind != "f":
        return values.reshape(-1)
    targets = values.reshape(shape[0], -1).astype(np.float64)
    if not np.isfinite(targets).all():
        row = int(np.argwhere(~np.isfinite(targets))[0, 0])
        raise DataError(
            f"{labels.where} holds {targets[row].tolist()} for image {row}; every target must be a finite number: "
            "remove the image or fill the target in"
        )
    return targets


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
        raise DataError(
            f"{url} is truncated, damaged or not what its suffix says ({reason}); save it again, or copy it to this "
            "machine"
        ) from None


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
        raise DataNotFoundError(
            f"{location.url} holds no zarr array or group; check the path inside the zarr"
        ) from None
    if isinstance(node, zarr.Group):
        return {name: described(array, f"{name} in {location.url}") for name, array in sorted(node.arrays())}
    return {"": described(node, location.url)}
