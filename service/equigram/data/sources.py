"""Labelled images in a folder or an array file, under one interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol, TypeAlias, TypeVar

import numpy as np

from equigram.data.arrays import ArrayFile, Indices, Labels, StoredArray, image_header, open_arrays, read_labels
from equigram.data.files import Header, Pixels, quiet_pillow, read_header, read_pixels
from equigram.data.locations import ImageFile, Listing, Location, list_images, locate, reaching
from equigram.data.preprocessing import Preprocessing, scaled
from equigram.errors import DataError
from equikernel.kernel import available_cores

Progress: TypeAlias = Callable[[str, int, int], None]
Role: TypeAlias = Literal["train", "test", "new"]

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
        self.ignored = ignored
        self._labelled = labelled

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The path of an image within the folder."""
        return self._files[index].name

    def labels(self) -> Labels | None:
        """The class folder of each image."""
        return np.array([file.label for file in self._files], dtype=np.str_) if self._labelled else None

    def headers(self, indices: Indices, what: str, progress: Progress | None) -> list[Header]:
        """Read the header of each file."""

        def header(index: int) -> Header:
            file = self._files[index]
            where = self._where(file)
            with reaching(where):
                stream = self._location.open(file.path)
            with stream:
                return read_header(stream, where)

        return _in_threads(header, indices.tolist(), what, progress)

    def read(
        self, indices: Indices, preprocessing: Preprocessing, what: str, progress: Progress | None
    ) -> tuple[Pixels, int]:
        """Decode each file."""
        images = _empty(len(indices), preprocessing)

        def read(place: int) -> bool:
            file = self._files[indices[place]]
            where = self._where(file)
            with reaching(where):
                content = self._location.fs.cat_file(file.path)
            pixels, transparent = read_pixels(content, where)
            images[place] = preprocessing.apply(pixels, where)
            return transparent

        return images, sum(_in_threads(read, range(len(indices)), what, progress))

    def _where(self, file: ImageFile) -> str:
        return self.url if self._location.kind == "image" else f"{file.name} in {self.url}"


class ArraySource:
    """An array of images, and one of labels."""

    is_files = False

    def __init__(self, file: ArrayFile, name: str, labels: StoredArray | None, labels_name: str):
        self.url = file.location.url
        self.array_name = name
        self.file = file
        self._images = file.arrays[name]
        self._labels = labels
        self.used = {name, labels_name}
        self._header = image_header(self._images)

    def __len__(self) -> int:
        return self._images.shape[0]

    def name(self, index: int) -> str:
        """The array and the place of an image in it."""
        return f"{self.array_name or self.file.location.name}[{index}]"

    def labels(self) -> Labels | None:
        """The rows of the array of labels, checked."""
        return None if self._labels is None else read_labels(self._labels, self._images)

    def headers(self, indices: Indices, what: str, progress: Progress | None) -> list[Header]:
        """The same for each image: that of the array."""
        return [self._header] * len(indices)

    def read(
        self, indices: Indices, preprocessing: Preprocessing, what: str, progress: Progress | None
    ) -> tuple[Pixels, int]:
        """Read the chosen rows and treat each."""
        images = _empty(len(indices), preprocessing)
        stored = self._images.rows(indices)
        if stored.ndim == 3:
            stored = stored[..., None]

        for place, index in enumerate(indices.tolist()):
            where = f"{self.name(index)} in {self.url}"
            images[place] = preprocessing.apply(scaled(stored[place], where), where)
            if progress is not None:
                progress(what, place + 1, len(indices))
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
            return ArraySource(source.file, images, source.file.arrays.get(labels), labels)
    return None


def source_notes(sources: Sequence[Source]) -> list[str]:
    """What is in ``sources`` and was not used, for a person to know."""
    notes = {}
    for source in sources:
        if isinstance(source, FolderSource) and source.ignored:
            what = f"{len(source.ignored)} files of {source.url} that are not PNG, JPEG or TIFF"
            notes[source.url] = f"ignored {what}: {some(source.ignored)}"
        if isinstance(source, ArraySource):
            same = [other for other in sources if isinstance(other, ArraySource) and other.url == source.url]
            unused = set(source.file.arrays).difference(*(other.used for other in same))
            if unused:
                notes[source.url] = f"not used of {source.url}: {some(sorted(unused))}"
    return list(notes.values())


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
            f"{url} holds {len(beside)} images but no class folders; put those of each class in a folder of its name"
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
        location = locate(labels_url)
        labels = open_arrays(location).arrays.get("") if location.kind in ("npy", "zarr") else None
        if labels is None:
            raise DataError(f"{labels_url} is not a single array of labels; save them as .npy")
    return ArraySource(file, images, labels, labels_name)


def _empty(count: int, preprocessing: Preprocessing) -> Pixels:
    return np.empty((count, preprocessing.height, preprocessing.width, preprocessing.channels), dtype=np.float32)


def _in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], what: str, progress: Progress | None
) -> list[Result]:
    """``function`` of each item, on all cores; the error of the first item that fails, in their order."""
    results = []
    with quiet_pillow(), ThreadPoolExecutor(available_cores(), "equigram-images") as pool:
        try:
            for done, result in enumerate(pool.map(function, items), 1):
                results.append(result)
                if progress is not None:
                    progress(what, done, len(items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results
