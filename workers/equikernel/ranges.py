"""The range of a precision: variances that are too large or too small to compute with are refused, not rounded away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from equikernel.errors import ImageError

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
