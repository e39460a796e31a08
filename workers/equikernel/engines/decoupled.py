"""What the engines ``"cpu"`` and ``"xla"`` share: the constants of each image in a network whose offsets decouple.

Without strides and pooling between layers, and for groups on the pixel grid, ``K(t, t)`` of an image obeys a recursion
of its own, on one plane: the mean over the filter support, then the second moment of the activation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from equikernel.activations import EPS
from equikernel.errors import ImageError
from equikernel.layers import Branch, Convolution, Nonlinearity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equikernel.layers import Step
    from equikernel.network import Architecture

    Array = NDArray[np.float64]

FLOAT64_PIXELS = 36
"""Images of up to so many pixels, and networks of 1x1 filters, are computed in float64 for any dtype of the result:
nothing averages there, so float32 would lose up to half of its digits near ``c = ±1``."""


def working_dtype(network: Architecture, height: int, width: int, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The precision to compute in, for results of ``dtype``."""
    averages = any(max(step.radii) > 0 for step in network.convolutions)
    return np.dtype(np.float64) if height * width <= FLOAT64_PIXELS or not averages else dtype


def image_constants(network: Architecture, images: NDArray[Any]) -> tuple[list[tuple[Array, ...]], Array]:
    """The factors of each nonlinearity and the bound of the pooled kernel.

    Args:
      network: without strides or pooling.
      images: ``(n, H, W, C)``.

    Returns:
      For each nonlinearity in turn :meth:`Activation.factors` of the preactivation variances, ``(n, H, W)`` each, and
      ``(mean over t of √K(t,t))²`` at the end, ``(n,)``. With VALID padding the pixels that it removes hold values of
      zero padding, which no other pixel needs.
    """
    found: list[tuple[Array, ...]] = []

    def run(steps: tuple[Step, ...], q: Array) -> Array:
        for step in steps:
            match step:
                case Convolution():
                    q = step.w2 * _box_mean(q, step.radii, network.padding) + step.b2
                case Nonlinearity(activation):
                    factors = activation.factors(q)
                    found.append(factors)
                    q = activation.combine(q, factors, factors, EPS)[0]
                case Branch(_, inner):
                    q = q + run(inner, q)
        return q

    last = run(network.steps, np.square(images, dtype=np.float64).sum(axis=3) / images.shape[3])
    y, x = network.margin
    inside = last[:, y : -y or None, x : -x or None]
    return found, np.sqrt(np.maximum(inside, 0)).mean(axis=(1, 2)) ** 2


def refuse_overflow(factors: NDArray[Any], dtype: np.dtype[Any], first: int) -> None:
    """Raise :class:`ImageError` where the constants ``(n, ...)`` of an image, in ``dtype``, are not finite."""
    finite = np.isfinite(factors).all(axis=tuple(range(1, factors.ndim)))
    if not finite.all():
        raise ImageError(
            f"the kernel of image {first + int(np.argmin(finite))} with itself leaves the range of {dtype.name}; "
            "rescale the images, change w_std or depth, or use float64"
        )


def _box_mean(q: Array, radii: tuple[int, int], padding: str) -> Array:
    """The mean of ``(n, H, W)`` over the filter support; beyond the border are zeros, or the opposite side."""
    y, x = radii
    mode = "wrap" if padding == "CIRCULAR" else "constant"
    padded = np.pad(q, ((0, 0), (y, y), (x, x)), mode=mode)  # type: ignore[call-overload]
    rows = sum(padded[:, v : v + q.shape[1]] for v in range(2 * y + 1))
    total: Array = sum(rows[:, :, v : v + q.shape[2]] for v in range(2 * x + 1))
    return total / ((2 * y + 1) * (2 * x + 1))
