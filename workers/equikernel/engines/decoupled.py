"""What the engines "cpu", "gpu" and "xla" share: the constants of each image in a network whose offsets decouple.

Without strides and pooling between layers, and for groups on the pixel grid, ``K(t, t)`` of an image obeys a recursion
of its own, on one plane: the mean over the filter support, then the second moment of the activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from equikernel.activations import EPS, Homogeneous
from equikernel.errors import ImageError
from equikernel.images import Labels, in_range
from equikernel.layers import Branch, Convolution, Nonlinearity, convolutions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from equikernel.layers import Step
    from equikernel.network import Architecture

    Array = NDArray[np.float64]

FLOAT64_PIXELS = 36
"""Images of up to so many pixels, and networks of 1x1 filters, are computed in float64 for any dtype of the result:
nothing averages there, so float32 would lose up to half of its digits near ``c = ±1``."""

PIECE = 2**16
"""Values of as many packed images as are computed at once, unless one image has more."""

TEMPORARIES = 6
"""Float64 arrays of the size of a piece, at most, at the same time."""


def working_dtype(network: Architecture, height: int, width: int, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The precision to compute in, for results of ``dtype``."""
    averages = any(max(step.radii) > 0 for step in network.convolutions)
    return np.dtype(np.float64) if height * width <= FLOAT64_PIXELS or not averages else dtype


@dataclass(frozen=True)
class Offsets:
    """Neighbouring offsets between pixels, modulo the ``side`` of an image."""

    first: int
    count: int
    side: int

    @property
    def numbers(self) -> NDArray[np.int64]:
        """All of them, ``(count,)``, beginning with the first."""
        return (self.first + np.arange(self.count, dtype=np.int64)) % self.side


def useful_offsets(side: int, margin: int) -> Offsets:
    """Offsets with a segment longer than ``2 margin``: those with pixel pairs left by VALID padding.

    They are all from ``-n`` to ``n``, with ``n = side - 2 margin - 1``.
    """
    most = side - 2 * margin - 1
    return Offsets((-most) % side, 2 * most + 1, side) if 2 * most + 1 < side else Offsets(0, side, side)


def rounding(steps: tuple[Step, ...]) -> int:
    """How many machine epsilons the relative rounding error of a covariance is, roughly: larger filters sum more."""
    return max(1, *(max(step.radii) for step in convolutions(steps)))


def nonnegative_inputs(steps: tuple[Step, ...]) -> tuple[bool, ...]:
    """Of each nonlinearity, whether the covariances that it is applied to cannot be negative.

    Those of pixels may be. After ``σ >= 0`` none is, and homogeneous activations leave it so: the coefficients of their
    dual kernels, series in ``c``, are squares.
    """
    found = []

    def run(steps: tuple[Step, ...], before: bool) -> bool:
        for step in steps:
            match step:
                case Nonlinearity(activation):
                    found.append(before)
                    before = isinstance(activation, Homogeneous) and (before or activation.has_one_sign)
                case Branch():
                    before = run(step.steps, before) and before
        return before

    run(steps, before=False)
    return tuple(found)


def factor_planes(network: Architecture) -> int:
    """Factors of all activations before the pooling, planes of each image."""
    return sum(activation.planes for activation in network.activations)


def pack(
    network: Architecture,
    images: NDArray[Any],
    dtype: np.dtype[Any],
    labels: Labels,
    scales: Mapping[int, tuple[float, float]] | None = None,
) -> tuple[NDArray[Any], Array]:
    """Images with the factors of the activations.

    Args:
      network: without strides or pooling.
      images: ``(n, H, W, C)``, of real numbers.
      dtype: precision of the computation.
      labels: of the images.
      scales: by the plane of their first factor, ``(a, b)`` of nonlinearities that get ``√(a q)`` and ``√(b/q)`` in
        place of their first two factors, rounded once: near ``c = ±1`` each digit counts.

    Returns:
      ``(n, C + factors, H, W)`` in ``dtype``: the pixels, then for each nonlinearity :meth:`Activation.factors` of the
      preactivation variances; and ``(mean over t of √K(t,t))²`` at the end, ``(n,)`` float64. With VALID padding the
      pixels that it removes hold values of zero padding, which no other pixel needs.

    Raises:
      ImageError: the kernel of an image with itself leaves the range of the dtype.
      NetworkError: an activation has no second moment.
    """
    count, height, width, channels = images.shape
    packed = np.empty((count, channels + factor_planes(network), height, width), dtype)
    bound = np.empty(count)
    step = max(1, PIECE // packed[0].size)
    for start in range(0, count, step):
        here = slice(start, start + step)
        packed[here, :channels] = images[here].transpose(0, 3, 1, 2)
        plane = channels
        factors, bound[here] = _constants(network, packed[here, :channels], labels.after(start), scales or {})
        for factor in factors:
            packed[here, plane] = factor
            plane += 1
        finite = np.isfinite(packed[here]).all(axis=(1, 2, 3))
        if not finite.all():
            raise ImageError(
                f"the kernel of {labels.of(start + int(np.argmin(finite)))} with itself leaves the range of "
                f"{dtype.name}; rescale the images, change w_std or depth, or use float64"
            )
    return packed, bound


def pack_bytes(network: Architecture, height: int, width: int, channels: int) -> int:
    """Bytes that :func:`pack` takes besides its result."""
    image = height * width * (channels + factor_planes(network))
    return 8 * TEMPORARIES * max(PIECE, image)


def _constants(
    network: Architecture, pixels: NDArray[Any], labels: Labels, scales: Mapping[int, tuple[float, float]]
) -> tuple[list[Array], Array]:
    """The factors of all nonlinearities, ``(n, H, W)`` each, and the bound at the end, of images ``(n, C, H, W)``."""
    found: list[Array] = []

    def run(steps: tuple[Step, ...], q: Array) -> Array:
        for step in steps:
            match step:
                case Convolution():
                    q = step.w2 * _box_mean(q, step.radii, network.padding) + step.b2
                case Nonlinearity(activation):
                    factors = activation.factors(q)
                    scaled = scales.get(pixels.shape[1] + len(found))
                    found.extend(_scaled_roots(q, *scaled) if scaled else factors)
                    q = activation.combine(q, factors, factors, EPS)[0]
                case Branch(_, inner):
                    q = q + run(inner, q)
            q = in_range(q, pixels.dtype, labels, step.place)
        return q

    q = np.zeros((len(pixels), *pixels.shape[2:]))
    for channel in range(pixels.shape[1]):
        q += np.square(pixels[:, channel], dtype=np.float64)
    last = run(network.steps, q / pixels.shape[1])
    y, x = network.margin
    inside = last[:, y : -y or None, x : -x or None]
    return found, np.array([np.sqrt(image).mean() for image in inside]) ** 2


def _scaled_roots(q: Array, a: float, b: float) -> tuple[Array, Array]:
    """``√(a q)`` and ``√(b/q)``, 0 where ``q = 0``."""
    return np.sqrt(a * q), np.sqrt(np.divide(b, q, out=np.zeros_like(q), where=q > 0))


def _box_mean(q: Array, radii: tuple[int, int], padding: str) -> Array:
    """The mean of ``(n, H, W)`` over the filter support; beyond the border are zeros, or the opposite side."""
    y, x = radii
    mode = "wrap" if padding == "CIRCULAR" else "constant"
    padded = np.pad(q, ((0, 0), (y, y), (x, x)), mode=mode)  # type: ignore[call-overload]
    rows = sum(padded[:, v : v + q.shape[1]] for v in range(2 * y + 1))
    total: Array = sum(rows[:, :, v : v + q.shape[2]] for v in range(2 * x + 1))
    return total / ((2 * y + 1) * (2 * x + 1))
