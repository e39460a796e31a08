"""A job's images and labels: which are chosen, and how they are brought to one form."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from equigram.data.arrays import Indices, Labels
from equigram.data.files import Header, Pixels
from equigram.data.locations import files, locate, reaching
from equigram.data.preprocessing import Preprocessing
from equigram.data.selection import choose_test, choose_train, like_train, to_classes
from equigram.data.sources import ArraySource, Progress, Role, Source, open_source, own_test_source, source_notes
from equigram.errors import DataError, ResourceError
from equigram.spec import DataSpec
from equikernel.memory import available_memory, format_bytes

READ_FILES = 64
"""Files of a source whose content is compared when a run goes on."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images, and their labels if there are any."""

    images: Pixels
    """(n, H, W, C) float32, as the kernels see them: resized and normalised."""
    labels: NDArray[np.int64] | NDArray[np.float64] | None
    """(n,) int64 indices into the classes, (n, k) float64 regression targets, or none."""
    names: tuple[str, ...]
    """Where each image came from: its path relative to the source, or ``train_images[17]``."""

    def joined(self, more: Split) -> Split:
        """These images, and more of the same shape and kind of labels behind them."""
        labels = None
        if self.labels is not None and more.labels is not None:
            labels = np.concatenate([self.labels, more.labels])
        return Split(np.concatenate([self.images, more.images]), labels, self.names + more.names)


@dataclass(frozen=True, eq=False)
class Dataset:
    """What a job computes with."""

    train: Split
    """Class by class, in the order of ``classes``; within each class (without classes: overall) in an order drawn by
    the seed, so that its first k images are a random subset for every k."""
    test: Split | None
    """In the order of the source."""
    classes: tuple[str, ...] | None
    """Class names, sorted (integer labels by value); none for regression or without labels."""
    preprocessing: Preprocessing
    """What was done to the images."""
    notes: tuple[str, ...]
    """What a person should be told."""


@dataclass(frozen=True)
class Survey:
    """Number, shape and labels of a job's images, known before they are decoded."""

    train: int
    """Training images."""
    test: int
    """Test images; 0 without any."""
    height: int
    """Rows of every image as the kernels see it, in pixels."""
    width: int
    """Columns, in pixels."""
    channels: int
    """Channels."""
    labels: NDArray[np.int64] | NDArray[np.float64] | None = field(compare=False)
    """Of the training images, as in :class:`Split`."""
    classes: tuple[str, ...] | None
    """As in :class:`Dataset`."""
    found: _Found | None = field(default=None, compare=False, repr=False)
    """What :func:`load_dataset` need not look for again."""


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Images of a source, and what is known before their pixels are read."""

    source: Source
    indices: Indices
    labels: Labels | None
    role: str
    headers: Sequence[Header]

    @classmethod
    def look(
        cls, source: Source, indices: Indices, labels: Labels | None, role: str, progress: Progress | None
    ) -> _Chosen:
        """Read the headers of the images ``indices`` of a source whose images have ``labels``."""
        headers = source.headers(indices, f"checking {role} images", progress)
        return cls(source, indices, None if labels is None else labels[indices], role, headers)

    def read(self, preprocessing: Preprocessing, progress: Progress | None) -> tuple[Pixels, int]:
        """The images, not normalised, and how many had transparency."""
        return self.source.read(self.indices, preprocessing, f"reading {self.role} images", progress)

    def where(self, place: int) -> str:
        """What an image is called in errors."""
        return f"{self.source.name(int(self.indices[place]))} in {self.source.url}"

    def names(self) -> tuple[str, ...]:
        """Where each image came from."""
        return tuple(self.source.name(index) for index in self.indices.tolist())


@dataclass(frozen=True, eq=False)
class _Found:
    """Everything about a job's images but their pixels."""

    train: _Chosen
    test: _Chosen | None
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing

    @property
    def parts(self) -> tuple[_Chosen, ...]:
        return (self.train,) if self.test is None else (self.train, self.test)


def load_dataset(
    spec: DataSpec, *, square: bool, progress: Progress | None = None, surveyed: Survey | None = None
) -> Dataset:
    """Read the images and labels of a job.

    Pixels stored as integers are scaled to 0..1 (uint8 by 255, uint16 by 65535), floats are taken as they are; then
    ``spec.normalize`` applies. Only the chosen images are decoded, after a look at all their headers.

    Args:
      spec: what to read and choose.
      square: whether images must be square, as groups with quarter turns need.
      progress: called with what is being done, how many images are done, and of how many.
      surveyed: what :func:`survey` has found with the same arguments, whose headers are not read again.

    Returns:
      The images as (n, H, W, C) float32 with everything needed to treat new ones alike.

    Raises:
      DataNotFoundError: a source is not there.
      DataError: a source, image or label cannot be used; the message names it and the remedy.
      ResourceError: the images need more memory than there is.
    """
    found = surveyed.found if surveyed is not None and surveyed.found is not None else _look(spec, square, progress)
    images, transparent = found.train.read(found.preprocessing, progress)
    preprocessing, constant = found.preprocessing.fitted(images, per_channel=spec.normalize == "per_channel")
    preprocessing.normalise(images)
    test = None
    if found.test is not None:
        test_images, more = found.test.read(preprocessing, progress)
        preprocessing.check_scale(test_images, found.test.source.url, integer=found.test.headers[0].integer)
        preprocessing.normalise(test_images)
        test = Split(test_images, found.test.labels, found.test.names())
        transparent += more
    return Dataset(
        train=Split(images, found.train.labels, found.train.names()),
        test=test,
        classes=found.classes,
        preprocessing=preprocessing,
        notes=(
            *source_notes([part.source for part in found.parts]),
            *_label_notes(found.train.labels, found.classes),
            *_pixel_notes(found.parts, preprocessing, transparent, constant),
        ),
    )


def survey(spec: DataSpec, *, square: bool, progress: Progress | None = None) -> Survey:
    """The number, shape and labels of the images that :func:`load_dataset` gives, from their headers only.

    Takes the same arguments and raises the same errors, but for those that only pixels tell.
    """
    found = _look(spec, square, progress)
    plan = found.preprocessing
    test = 0 if found.test is None else len(found.test.indices)
    labels, classes = found.train.labels, found.classes
    return Survey(len(found.train.indices), test, plan.height, plan.width, plan.channels, labels, classes, found)


def load_images(url: str, preprocessing: Preprocessing, *, progress: Progress | None = None) -> Split:
    """Read new images, to predict their labels, and treat them as the training images were treated.

    Args:
      url: a folder of images or of class folders (whose names are not used), one image file, an .npy, or an .npz or
        zarr with ``x``, ``images``, ``x_test`` or ``test_images``.
      preprocessing: of the training images.
      progress: called with what is being done, how many images are done, and of how many.

    Returns:
      All images in the order of the source, (n, H, W, C) float32; no labels.

    Raises:
      DataNotFoundError: nothing is there.
      DataError: an image cannot be used, or has another size or number of channels than the training images.
      ResourceError: the images need more memory than there is.
    """
    return _treated(open_source(url, "new"), None, "new", preprocessing, progress)


def load_more(
    url: str,
    labels_url: str | None,
    role: Role,
    preprocessing: Preprocessing,
    labels: Labels | None,
    classes: tuple[str, ...] | None,
    *,
    progress: Progress | None = None,
) -> Split:
    """Read more training or test images with their labels, and treat them as the training images were treated.

    Args:
      url, labels_url: as ``train`` and ``train_labels`` of a job, or ``test`` and ``test_labels``.
      role: which.
      preprocessing, labels, classes: of the training images that are there.
      progress: called with what is being done, how many images are done, and of how many.

    Returns:
      All images in the order of the source, (n, H, W, C) float32, and their labels.

    Raises:
      DataNotFoundError: nothing is there.
      DataError: an image cannot be used, or is unlike the training images, or a label is.
      ResourceError: the images need more memory than there is.
    """
    source = open_source(url, role, labels_url)
    mapped = like_train(source.labels(), source.url, labels, classes, "the store", "added")
    return _treated(source, mapped, role, preprocessing, progress)


def _treated(
    source: Source, labels: Labels | None, role: str, preprocessing: Preprocessing, progress: Progress | None
) -> Split:
    """All images of a source as the training images were treated."""
    chosen = _Chosen.look(source, np.arange(len(source)), labels, role, progress)
    for place, header in enumerate(chosen.headers):
        preprocessing.check(
            header, chosen.where(place), "every training image", is_file=source.is_files,
            remedy="bring new images to the form of the training images",
        )  # fmt: skip
    _check_memory(preprocessing, len(source))
    images, _ = chosen.read(preprocessing, progress)
    preprocessing.check_scale(images, source.url, integer=chosen.headers[0].integer)
    preprocessing.normalise(images)
    return Split(images, chosen.labels, chosen.names())


def fingerprint(spec: DataSpec) -> dict[str, int | str]:
    """What tells whether the files that ``spec`` names have changed: ``{"data.train files": 900, ...}``.

    Of each source the number of files, their bytes, a SHA-256 over their relative paths and sizes, and one over the
    content of :data:`READ_FILES` of them, evenly spread, so all of an .npy or .npz. They stay the same when a source
    moves as a whole.

    Raises:
      DataNotFoundError: a source is gone.
      DataError: a source cannot be listed or read.
    """
    facts: dict[str, int | str] = {}
    for role in ("train", "train_labels", "test", "test_labels"):
        url = getattr(spec, role)
        if url is None:
            continue
        location = locate(url)
        found = files(location)
        names, content = hashlib.sha256(), hashlib.sha256()
        for name, size, _ in found:
            names.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        for index in np.unique(np.linspace(0, len(found) - 1, min(len(found), READ_FILES)).astype(int)).tolist():
            name, _, path = found[index]
            with reaching(f"{name} in {url}"), location.open(path) as stream:
                while part := stream.read(2**20):
                    content.update(part)
        facts[f"data.{role} files"] = len(found)
        facts[f"data.{role} bytes"] = sum(size or 0 for _, size, _ in found)
        facts[f"data.{role} names and sizes"] = names.hexdigest()
        facts[f"data.{role} content"] = content.hexdigest()
    return facts


def _look(spec: DataSpec, square: bool, progress: Progress | None) -> _Found:
    """Find, choose and check a job's images by their headers."""
    source = open_source(spec.train, "train", spec.train_labels)
    test_source = open_source(spec.test, "test", spec.test_labels) if spec.test is not None else None
    if test_source is None and spec.test_fraction is None:
        test_source = own_test_source(source)
    if test_source is None and spec.test_fraction is None and spec.test_per_class is not None:
        raise DataError(
            f"data.test_per_class = {spec.test_per_class}, but there are no test images; set data.test or "
            "data.test_fraction, or remove it"
        )
    if test_source is not None:
        _check_different(source, test_source)

    labels, classes = to_classes(source.labels())
    indices, test_indices = choose_train(spec, source, labels, classes)
    if test_source is None:
        test_source, test_labels = source, labels
    else:
        test_labels = like_train(test_source.labels(), test_source.url, labels, classes, source.url)
        test_indices = np.arange(len(test_source))
    test_indices = choose_test(spec, test_source, test_labels, classes, test_indices)

    train = _Chosen.look(source, indices, labels, "training", progress)
    test = _Chosen.look(test_source, test_indices, test_labels, "test", progress) if len(test_indices) else None
    parts = (train,) if test is None else (train, test)
    preprocessing = _planned(spec, parts, square=square)
    _check_memory(preprocessing, sum(len(part.indices) for part in parts))
    return _Found(train, test, classes, preprocessing)


def _check_different(train: Source, test: Source) -> None:
    if train.url.rstrip("/") != test.url.rstrip("/"):
        return
    if isinstance(train, ArraySource) and isinstance(test, ArraySource) and train.array_name != test.array_name:
        return
    raise DataError(
        f"data.test = {test.url} holds the training images themselves; set data.test_fraction to hold some of them out"
    )


def _planned(spec: DataSpec, parts: Sequence[_Chosen], *, square: bool) -> Preprocessing:
    """The treatment of all images, which are checked against it, but for the scale of their pixels."""
    first = parts[0].headers[0]
    channels = {"gray": 1, "rgb": 3}.get(spec.color, first.channels)
    if spec.color == "auto" and parts[0].source.is_files:
        channels = max(header.channels for part in parts if part.source.is_files for header in part.headers)
    plan = Preprocessing.plan(first, size=spec.size, crop=spec.crop, color=spec.color, channels=channels)
    for part in parts:
        for place, header in enumerate(part.headers):
            plan.check(header, part.where(place), parts[0].where(0), is_file=part.source.is_files)
    if square and plan.height != plan.width:
        raise DataError(
            f"{parts[0].where(0)} is {plan.width} pixels wide and {plan.height} high, but quarter turns need square "
            "images; set data.crop: center, or use the groups C1, C2, D1 and D2 only"
        )
    return plan


def _check_memory(preprocessing: Preprocessing, count: int) -> None:
    shape = (count, preprocessing.height, preprocessing.width, preprocessing.channels)
    needed, available = 4 * int(np.prod(shape, dtype=object)), available_memory()
    if needed > available:
        raise ResourceError(
            f"{count} images as float32 {shape} need {format_bytes(needed)} of memory, and {format_bytes(available)} "
            "is available; set data.size or data.per_class lower, or use a larger machine"
        )


def _label_notes(labels: Labels | None, classes: tuple[str, ...] | None) -> list[str]:
    if classes is not None and len(classes) == 1:
        return [f"all images are of the one class {classes[0]!r}: there is nothing to tell apart"]
    if classes is None and labels is not None and (labels == np.round(labels)).all():
        return ["the labels are whole numbers stored as floats, so this is regression; store integers for classes"]
    return []


def _pixel_notes(
    parts: Sequence[_Chosen], preprocessing: Preprocessing, transparent: int, constant: Sequence[int]
) -> list[str]:
    headers = [header for part in parts if part.source.is_files for header in part.headers]
    grey = sum(header.channels == 1 for header in headers)
    reduced = sum(header.reduced for header in headers)
    partial = sum(header.partial for header in headers)
    notes = []
    if grey and preprocessing.channels == 3:
        notes.append(f"{grey} of {len(headers)} images are grey; all are stored as RGB")
    if grey < len(headers) and preprocessing.channels == 1:
        notes.append(f"{len(headers) - grey} of {len(headers)} images have colour; all are stored as grey")
    if transparent:
        notes.append(f"{transparent} of {len(headers)} images are partly transparent; they are put on white")
    if reduced:
        notes.append(f"{reduced} of {len(headers)} images have 16 bits per colour channel, of which 8 are read")
    if partial:
        notes.append(f"{partial} of {len(headers)} images have channels beyond grey or RGB, which are left out")
    notes.extend(
        f"channel {channel} is constant over the training images: only its mean is removed" for channel in constant
    )
    return notes
