"""What is done to pixels before the kernels see them: channels, crop, size, scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from equigram.data.files import Header, Pixels
from equigram.errors import DataError

LUMA = (0.299, 0.587, 0.114)
"""ITU-R 601: the share of red, green and blue in grey."""

_CONSTANT = 1e-6
"""A channel whose standard deviation is below this share of its largest value is rounding, not an image."""


@dataclass(frozen=True)
class Preprocessing:
    """The treatment of the training images, frozen so that test and new images get the same."""

    size: int | None
    """Side in pixels to which images are resized; without it they must come as ``height x width``."""
    crop: str | None
    """``"center"``: cut to the central square first."""
    color: str
    """``"auto"``, ``"gray"`` or ``"rgb"``, as asked for."""
    height: int
    """Rows of every image, in pixels."""
    width: int
    """Columns of every image, in pixels."""
    channels: int
    """Channels of every image."""
    integer: bool
    """Whether the training pixels were stored as integers, which are scaled to 0..1."""
    low: float
    """Smallest training pixel before mean and std: 0 for integers."""
    high: float
    """Largest training pixel before mean and std: 1 for integers."""
    mean: tuple[float, ...]
    """Per channel, subtracted."""
    std: tuple[float, ...]
    """Per channel, divided by; 1 for a constant channel."""

    @classmethod
    def plan(cls, header: Header, *, size: int | None, crop: str | None, color: str, channels: int) -> Preprocessing:
        """The treatment that brings images like ``header`` to one shape, before the scale is known."""
        side = min(header.height, header.width)
        height, width = (side, side) if crop else (header.height, header.width)
        return cls(
            size=size,
            crop=crop,
            color=color,
            height=size or height,
            width=size or width,
            channels=channels,
            integer=header.integer,
            low=0.0,
            high=1.0,
            mean=(0.0,) * channels,
            std=(1.0,) * channels,
        )

    def check(self, header: Header, where: str, reference: str, *, is_file: bool, remedy: str | None = None) -> None:
        """Refuse an image that cannot be brought to the shape of the others.

        Args:
          header: of the image.
          where: what it is called.
          reference: what the images that it must match are called.
          is_file: an image file, whose grey becomes colour where the others have it; arrays keep their channels.
          remedy: what to do about it; by default, what to change in the job.

        Raises:
          DataError: it is not square where it is resized, differs in size, or in channels.
        """
        side = min(header.height, header.width)
        height, width = (side, side) if self.crop else (header.height, header.width)
        if self.size is not None and height != width:
            raise DataError(
                f"{where} is {_dimensions(header)} and cannot be resized to {self.size} x {self.size} without "
                f"distortion; {remedy or 'set data.crop: center to cut the central square, or crop the images'}"
            )
        if self.size is None and (height, width) != (self.height, self.width):
            raise DataError(
                f"{where} is {_dimensions(header)}{' (cropped to a square)' if self.crop else ''}, but {reference} is "
                f"{self.width} wide and {self.height} high; {remedy or 'set data.size to resize all images'}"
            )
        self._check_channels(header.channels, where, reference, is_file, remedy)

    def _check_channels(self, channels: int, where: str, reference: str, is_file: bool, remedy: str | None) -> None:
        if channels == self.channels:
            return
        if self.color != "auto" and channels not in (1, 3):
            raise DataError(
                f"{where} has {channels} channels, and data.color: {self.color} converts images of 1 or 3; "
                f"{remedy or 'set data.color: auto to keep the channels'}"
            )
        if (channels, self.channels) == (1, 3) and (is_file or self.color == "rgb"):
            return
        if (channels, self.channels) == (3, 1) and self.color == "gray":
            return
        remedy = remedy or {
            (1, 3): "store grey images as RGB, or set data.color: rgb",
            (3, 1): "store them as grey, or set data.color: gray",
        }.get((channels, self.channels), "all images need the same channels")
        raise DataError(f"{where} has {channels} channels, but {reference} has {self.channels}; {remedy}")

    def check_scale(self, images: Pixels, where: str, *, integer: bool) -> None:
        """Refuse images ``(n, H, W, C)`` that are plainly not on the scale of the training pixels.

        Raises:
          DataError: floats outside 0..1 beside training integers, or integers beside training floats outside 0..1.
        """
        if integer and not self.integer and (self.low < 0 or self.high > 1):
            raise DataError(
                f"{where} holds integer pixels, which are scaled to 0..1, but the training images are floats from "
                f"{self.low:g} to {self.high:g}; store both in the same way"
            )
        if integer or not self.integer:
            return
        low, high = float(images.min()), float(images.max())
        if low < 0 or high > 1:
            raise DataError(
                f"{where} holds float pixels from {low:g} to {high:g}, but the training images are integers, scaled to "
                "0..1; bring the floats to 0..1, or store them as uint8 or uint16"
            )

    def apply(self, pixels: Pixels, where: str) -> Pixels:
        """Bring one image ``(H, W, C)`` to ``(height, width, channels)`` float32, not yet normalised."""
        pixels = to_channels(pixels, self.channels)
        if self.crop:
            pixels = center_square(pixels)
        if self.size is not None:
            pixels = resize(pixels, self.size)
        if pixels.shape != (self.height, self.width, self.channels):
            raise DataError(
                f"{where} is {pixels.shape[1]} wide and {pixels.shape[0]} high once it is turned upright, not "
                f"{self.width} and {self.height} as its header says; save it again"
            )
        return pixels

    def normalise(self, images: Pixels) -> None:
        """Subtract the mean and divide by the std of each channel, in place, in float64."""
        mean, std = np.array(self.mean), np.array(self.std)
        for image in images:
            image[...] = (image - mean) / std

    def fitted(self, images: Pixels, *, per_channel: bool) -> tuple[Preprocessing, tuple[int, ...]]:
        """The same with the range, mean and std of the training images ``(n, H, W, C)``.

        Returns:
          The complete treatment, and the channels that are constant, of which only the mean is removed.
        """
        result = self if self.integer else replace(self, low=float(images.min()), high=float(images.max()))
        if not per_channel:
            return result, ()
        count = len(images) * self.height * self.width
        total, squares = np.zeros(self.channels), np.zeros(self.channels)
        for image in images:
            total += image.sum(axis=(0, 1), dtype=np.float64)
        mean = total / count
        for image in images:
            squares += ((image - mean) ** 2).sum(axis=(0, 1))
        std = np.sqrt(squares / count)
        largest = np.maximum(images.max(axis=(0, 1, 2)), -images.min(axis=(0, 1, 2)))
        constant = std <= _CONSTANT * largest
        std[constant] = 1
        result = replace(result, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
        return result, tuple(np.flatnonzero(constant).tolist())

    def to_json(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """The inverse of :meth:`to_json`.

        Raises:
          DataError: fields are missing or unknown.
        """
        expected = set(cls.__dataclass_fields__)
        if set(fields) != expected:
            different = sorted(expected ^ set(fields))
            raise DataError(
                f"the stored preprocessing has the fields {sorted(fields)}, which differ from those of this version in "
                f"{different}; use the version of equigram that wrote it"
            )
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**values)


def scaled(pixels: NDArray[Any], where: str) -> Pixels:
    """Stored pixels as float32: uint8 divided by 255, uint16 by 65535, floats as they are.

    Raises:
      DataError: a pixel is NaN or infinite.
    """
    if pixels.dtype.kind == "u":
        return pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
    with np.errstate(over="ignore"):
        values = pixels.astype(np.float32)
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0][:2]
        raise DataError(
            f"{where} holds {pixels[row, column].ravel()} at row {row}, column {column}; every pixel must be a finite "
            "float32 number: mask or remove the image"
        )
    return values


def to_channels(pixels: Pixels, channels: int) -> Pixels:
    """``(H, W, C)`` with one grey channel repeated, or three colours weighted to grey as in ITU-R 601."""
    if pixels.shape[2] == channels:
        return pixels
    if channels == 1:
        grey: Pixels = (pixels @ np.array(LUMA)).astype(np.float32)
        return grey[:, :, None]
    return np.repeat(pixels, channels, axis=2)


def center_square(pixels: Pixels) -> Pixels:
    """The central square of ``(H, W, C)``; of an odd rest, the larger part is cut at the bottom or right."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def resize(pixels: Pixels, size: int) -> Pixels:
    """``(H, W, C)`` resized to ``(size, size, C)`` by a triangle filter as wide as the shrinkage: no aliasing."""
    if pixels.shape[:2] == (size, size):
        return pixels
    channels = [
        np.asarray(Image.fromarray(np.ascontiguousarray(channel)).resize((size, size), Image.Resampling.BILINEAR))
        for channel in np.moveaxis(pixels, 2, 0)
    ]
    return np.stack(channels, axis=2)


def _dimensions(header: Header) -> str:
    return f"{header.width} pixels wide and {header.height} high"
