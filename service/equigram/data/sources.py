"""Labelled images in a folder or an array file, under one interface."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from equigram.data.arrays import ArrayFile, Indices, StoredArray, open_arrays
from equigram.data.files import Header, Pixels, quiet_pillow, read_header, read_pixels
from equigram.data.locations import ImageFile, Listing, Location, list_images, locate
from equigram.data.preprocessing import Preprocessing, scaled
from equigram.errors import DataError

Progress: TypeAlias = Callable[[str, int, int], None]
Role: TypeAlias = Literal["train", "test", "new"]
Labels: TypeAlias = NDArray[Any]
"""``(n,)`` class values (integers, booleans or text), or ``(n, k)`` float64 targets."""

Item = TypeVar("Item")
Result = TypeVar("Result")

TEST_NAMES = (("x_test", "y_test"), ("test_images", "test_labels"))
PLAIN_NAMES = (("x", "y"), ("images", "labels"))
NAMES: dict[Role, tuple[tuple[str, str], ...]] = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels"), *PLAIN_NAMES),
    "test": (*TEST_NAMES, *PLAIN_NAMES),
    "new": (*PLAIN_NAMES, *TEST_NAMES),
}
"""Names of the images and labels in an .npz or zarr group; the first that is there is used."""

MAX_CHANNELS = 16
"""Arrays with more are taken for a wrong layout."""


class Source(Protocol):
    """Images in a fixed order, with labels or without."""

    url: str
    is_files: bool
    """Image files, rather than an array."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where an image came from, within the source."""

    def labels(self) -> Labels | None:
        """One label per image; none if the source has none."""

    def notes(self) -> list[str]:
        """What a person should be told about the source."""

    def headers(self, indices: Indices, what: str, progress: Progress | None) -> list[Header]:
        """What is known of the images without reading their pixels."""

    def read(
        self, indices: Indices, preprocessing: Preprocessing, what: str, progress: Progress | None
    ) -> tuple[Pixels, int]:
        """The images ``(len(indices), height, width, channels)``, not normalised, and how many had transparency."""


class FolderSource:
    """Image files; the folder that each lies in is its class."""

    is_files = True

    def __init__(self, location: Location, files: Sequence[ImageFile], ignored: Sequence[str], *, labelled: bool):
        self.url = location.url
        self._location = location
        self._files = files
        self._ignored = ignored
        self._labelled = labelled

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._files[index].name

    def labels(self) -> Labels | None:
        return np.array([file.label for file in self._files], dtype=np.str_) if self._labelled else None

    def notes(self) -> list[str]:
        if not self._ignored:
            return []
        return [f"ignored {len(self._ignored)} files of {self.url} that are not PNG, JPEG or TIFF: {some(self._ignored)}"]

    def headers(self, indices: Indices, what: str, progress: Progress | None) -> list[Header]:
        def header(index: int) -> Header:
            file = self._files[index]
            with self._location.open(file.path) as stream:
                return read_header(stream, self._where(file))

        return _in_threads(header, indices.tolist(), what, progress)

    def read(
        self, indices: Indices, preprocessing: Preprocessing, what: str, progress: Progress | None
    ) -> tuple[Pixels, int]:
        images = _empty(len(indices), preprocessing)

        def read(place: int) -> bool:
            file = self._files[indices[place]]
            pixels, transparent = read_pixels(self._location.fs.cat_file(file.path), self._where(file))
            images[place] = preprocessing.apply(pixels, self._where(file))
            return transparent

        return images, sum(_in_threads(read, range(len(indices)), what, progress))

    def _where(self, file: ImageFile) -> str:
        return self.url if self._location.kind == "image" else f"{file.name} in {self.url}"


class ArraySource:
    """An array of images, and one of labels."""

    is_files = False

    def __init__(self, file: ArrayFile, name: str, labels: StoredArray | None, unused: Sequence[str]):
        self.url = file.location.url
        self.array_name = name
        self.file = file
        self._images = file.arrays[name]
        self._labels = labels
        self._unused = unused
        self._header = _array_header(self._images)

    def __len__(self) -> int:
        return self._images.shape[0]

    def name(self, index: int) -> str:
        return f"{self.array_name or self.file.location.name}[{index}]"

    def labels(self) -> Labels | None:
        return None if self._labels is None else _read_labels(self._labels, self._images)

    def notes(self) -> list[str]:
        return [f"arrays of {self.url} that are not used: {some(self._unused)}"] if self._unused else []

    def headers(self, indices: Indices, what: str, progress: Progress | None) -> list[Header]:
        return [self._header] * len(indices)

    def read(
        self, indices: Indices, preprocessing: Preprocessing, what: str, progress: Progress | None
    ) -> tuple[Pixels, int]:
        images = _empty(len(indices), preprocessing)
        stored = self._images.rows(indices)
        if stored.ndim == 3:
            stored = stored[..., None]

        def read(place: int) -> None:
            where = f"{self.name(int(indices[place]))} in {self.url}"
            images[place] = preprocessing.apply(scaled(stored[place], where), where)

        _in_threads(read, range(len(indices)), what, progress)
        return images, 0


def open_source(url: str, role: Role, labels_url: str | None = None) -> Source:
    """Find the images at ``url`` for a role: ``train``, ``test``, or ``new`` ones to predict.

    Raises:
      DataNotFoundError: nothing is there.
      DataError: it cannot be used for this role.
    """
    location = locate(url)
    if location.kind in ("npy", "npz", "zarr"):
        return _array_source(open_arrays(location), role, labels_url)
    if labels_url is not None:
        raise DataError(
            f"data.{role}_labels = {labels_url} labels an array, but {url} is a folder, whose class folders are its "
            f"labels; remove data.{role}_labels"
        )
    if location.kind == "image":
        if role != "new":
            raise DataError(f"{url} is a single image; name a folder of class folders")
        return FolderSource(location, [ImageFile(location.name, location.path, None, None)], (), labelled=False)
    listing = list_images(location)
    if role != "new":
        _check_class_folders(listing, url)
    if not listing.files:
        raise DataError(_no_images(url, url, listing.ignored))
    return FolderSource(location, listing.files, listing.ignored, labelled=role != "new")


def own_test_source(source: Source) -> ArraySource | None:
    """The test images that lie in the same file as the training images, if any."""
    if not isinstance(source, ArraySource):
        return None
    for images, labels in TEST_NAMES:
        if images in source.file.arrays:
            return ArraySource(source.file, images, source.file.arrays.get(labels), ())
    return None


def some(names: Iterable[object], most: int = 5) -> str:
    """The first few of ``names`` for a message, and how many more there are."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _check_class_folders(listing: Listing, url: str) -> None:
    beside = [file.name for file in listing.files if file.label is None]
    if beside and listing.classes:
        raise DataError(
            f"{some(beside)} in {url} lie beside the class folders {some(listing.classes)}, so their class is not "
            "known; move them into class folders"
        )
    if beside:
        raise DataError(
            f"{url} holds {len(beside)} images but no class folders; put the images of each class in a folder of its name"
        )
    filled = {file.label for file in listing.files}
    for name in listing.classes:
        if name not in filled:
            inside = [file for file in listing.ignored if file.startswith(f"{name}/")]
            raise DataError(_no_images(f"the class folder {name!r} of {url}", "it", inside))


def _no_images(what: str, remove: str, ignored: Sequence[str]) -> str:
    there = f", but {some(ignored)}" if ignored else ""
    return f"{what} holds no PNG, JPEG or TIFF image{there}; add images or remove {remove}"


def _array_source(file: ArrayFile, role: Role, labels_url: str | None) -> ArraySource:
    url = file.location.url
    names = [("", "")] if "" in file.arrays else NAMES[role]
    pair = next((pair for pair in names if pair[0] in file.arrays), None)
    if pair is None:
        raise DataError(
            f"{url} holds {some(sorted(file.arrays), 12) or 'no arrays'}, but none of "
            f"{', '.join(images for images, _ in names)}; save the images under one of these names"
        )
    images, labels_name = pair
    labels = file.arrays.get(labels_name) if labels_name else None
    if labels_url is not None:
        if labels is not None:
            raise DataError(
                f"{url} holds labels, {labels_name}, and data.{role}_labels = {labels_url} names others; "
                f"remove data.{role}_labels"
            )
        labels = open_arrays(locate(labels_url)).arrays.get("") if _is_array(labels_url) else None
        if labels is None:
            raise DataError(f"{labels_url} is not a single array of labels; save them as .npy")
    used = {images, labels_name}
    return ArraySource(file, images, labels, sorted(set(file.arrays) - used))


def _is_array(url: str) -> bool:
    return locate(url).kind in ("npy", "zarr")


def _array_header(images: StoredArray) -> Header:
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


def _read_labels(labels: StoredArray, images: StoredArray) -> Labels:
    shape, kind = labels.shape, labels.dtype.kind
    if not shape or shape[0] != images.shape[0]:
        raise DataError(
            f"{labels.where} holds {shape[0] if shape else 1} labels, but {images.where} holds {images.shape[0]} images; "
            "there must be one label per image"
        )
    if kind not in "biuUf":
        raise DataError(
            f"{labels.where} has dtype {labels.dtype}, but labels are integers or text for classes, floats for regression"
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
            f"{labels.where} holds {targets[row].tolist()} for image {row}; every target must be a finite number: remove "
            "the image or fill the target in"
        )
    return targets


def _empty(count: int, preprocessing: Preprocessing) -> Pixels:
    return np.empty((count, preprocessing.height, preprocessing.width, preprocessing.channels), dtype=np.float32)


def _in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], what: str, progress: Progress | None
) -> list[Result]:
    """``function`` of each item, on all cores; the error of the first item that fails, in their order."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    results = []
    with quiet_pillow(), ThreadPoolExecutor(cores, "equigram-images") as pool:
        try:
            for done, result in enumerate(pool.map(function, items), 1):
                results.append(result)
                if progress is not None:
                    progress(what, done, len(items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results
