"""What images must be: finite numbers in the range of the precision. Others are refused, naming the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from equikernel.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike, NDArray

CHECKED_AT_ONCE = 2**20
"""Pixels that are looked at at once for bad values."""


class Labels(NamedTuple):
    """What errors call the images of an array: ``x1[3]``."""

    name: str
    first: int = 0
    """The number of the first image."""

    def of(self, index: int) -> str:
        """The name of the image at ``index``."""
        return f"{self.name}[{self.first + index}]"

    def after(self, count: int) -> Labels:
        """The labels of the images without the first ``count``."""
        return Labels(self.name, self.first + count)


def as_images(images: ArrayLike, name: str) -> NDArray[Any]:
    """An array of shape ``(n, H, W, C)`` of real numbers.

    Raises:
      ImageError: ``images``, called ``name``, are none.
    """
    try:
        array = np.asarray(images)
    except ValueError as error:
        raise ImageError(f"{name} is no array ({error}); images are (n, height, width, channels)") from None
    if isinstance(images, np.ma.MaskedArray):
        raise ImageError(
            f"{name} is a masked array, and kernels know no missing pixels; fill them, or leave images out"
        )
    if array.dtype.kind not in "fiub":
        raise ImageError(f"{name} has dtype {array.dtype}; images are real numbers, float32 or float64")
    if array.ndim != 4:
        raise ImageError(
            f"{name} has shape {array.shape}; images are (n, height, width, channels), "
            "for grey images with channels = 1, for a single image with n = 1"
        )
    if 0 in array.shape:
        raise ImageError(f"{name} has shape {array.shape}, so it holds no pixels; give at least one image")
    return array


def check_finite(images: NDArray[Any], labels: Labels) -> None:
    """Raise :class:`ImageError` unless ``(n, H, W, C)`` images are finite."""
    for start, piece in _pieces(images):
        finite = np.isfinite(piece)
        if not finite.all():
            image, *pixel = map(int, np.unravel_index(int(np.argmin(finite)), piece.shape))
            raise ImageError(
                f"{labels.of(start + image)} has NaN or infinite pixels, the first at {pixel} (row, column, channel); "
                "remove or repair that image"
            )


def check_pixels(images: NDArray[Any], dtype: np.dtype[Any], labels: Labels) -> None:
    """Raise :class:`ImageError` unless ``(n, H, W, C)`` images are finite and in the range of ``dtype``."""
    check_finite(images, labels)
    low, high = (1e-15, 1e15) if dtype.itemsize == 4 else (1e-120, 1e120)
    for start, piece in _pieces(images):
        largest = np.maximum(piece.max(axis=(1, 2, 3)), -piece.min(axis=(1, 2, 3)).astype(np.float64))
        bad = ((largest > high) | (largest < low)) & (largest > 0)
        if bad.any():
            index = int(np.argmax(bad))
            raise ImageError(
                f"the largest pixel of {labels.of(start + index)} is {largest[index]:.3g}; {dtype.name} kernels "
                f"need it between {low:g} and {high:g} (or an image of zeros); rescale the images"
            )


def _pieces(images: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Some images at a time, each time after how many."""
    step = max(1, CHECKED_AT_ONCE // images[0].size)
    for start in range(0, len(images), step):
        yield start, images[start : start + step]


def in_range(q: NDArray[np.float64], dtype: np.dtype[Any], labels: Labels, place: str) -> NDArray[np.float64]:
    """The variances ``q`` of images, with 0 for those too small to matter beside the others of their image.

    Then products of two variances or of their inverse roots, and sums over filters, stay normal numbers of ``dtype``.

    Args:
      q: ``K(t, t)`` after a layer, ``(n, ...)`` by image.
      dtype: precision of the computation.
      labels: of the images.
      place: the layer, for errors.

    Raises:
      ImageError: the largest variance of an image is not 0 and outside the range of ``dtype``.
    """
    info = np.finfo(dtype)
    negligible, high = 10 * float(info.tiny), float(info.max) * float(info.eps)
    low = negligible / float(info.eps) ** 2
    largest = q.reshape(len(q), -1).max(axis=1)
    bad = ~((largest == 0) | ((largest >= low) & (largest <= high)))
    if bad.any():
        index = int(np.argmax(bad))
        wider = ", or use float64" if dtype.itemsize == 4 else ""
        raise ImageError(
            f"the kernel of {labels.of(index)} with itself is {largest[index]:.3g} at {place}, out of the range of "
            f"{dtype.name} kernels, {low:.0e} to {high:.0e}; rescale the images, change w_std, b_std or depth{wider}"
        )
    return np.where(q < negligible, 0, q)
