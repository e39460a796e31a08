r"""The literal recursions of arXiv 2406.06504 over ``(r, r', t, t')``: the judge of every fast engine.

Notation: ``K[p, r, r', y, x, y', x']`` is the kernel of image pair ``p`` between the group elements ``(t, r)`` and
``(t', r')`` with ``t = (y, x)``; ``q[p, r, y, x]`` its diagonal for one image of the pair. ``S`` is the filter support,
``ρ(r)`` the rotation or reflection ``r``; off the pixel grid ``R_r[a, v]`` spreads the tap ``ρ(r)v`` over the pixels
``a`` around it (:meth:`equikernel.groups.Symmetry.splat`). Everything is float64 and slow on purpose:
``O(|G|² (HW)² |S|)`` per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from equikernel.geometry import entries, padded_size, size_after, windows
from equikernel.groups import multiplication_table, order, reach, symmetries
from equikernel.images import Labels, in_range
from equikernel.layers import Branch, Convolution, Nonlinearity, Pooling
from equikernel.pooled import Pooled, Prepared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from equikernel.geometry import Size
    from equikernel.groups import Offset
    from equikernel.layers import Step
    from equikernel.network import Architecture

    Array = NDArray[np.float64]

DUAL, SUMS = 13, 7
"""Covariances at the same time in a nonlinearity besides K and Θ, and in a sum over the taps of a filter."""

FIXED = 2**14
"""Bytes of everything that is no array."""

PAIRS_BYTES = 2**21
"""Largest covariances, in bytes, of the pairs that are computed at once."""


def input_kernel(x1: Array, x2: Array, group: str) -> Array:
    """``K⁰(t, t') = f(t)·f'(t') / C`` of pairs of images ``(p, H, W, C)``, the same for all ``(r, r')``."""
    kernel: Array = np.einsum("pijc,pklc->pijkl", x1 / x1.shape[-1], x2, optimize=True)
    n = order(group)
    return np.broadcast_to(kernel[:, None, None], (len(kernel), n, n, *kernel.shape[1:]))


def group_average(k: Array, group: str) -> Array:
    """``1/|G| Σ_q K[rq, r'q]``."""
    table = multiplication_table(group)
    total: Array = np.zeros_like(k)
    for rq in table.T:
        total += k[:, rq[:, None], rq[None, :]]
    return total / len(table)


def filter_average(k: Array, group: str, step: Convolution, padding: str) -> Array:
    """``1/|S| Σ_v Σ_{a,b} R_r[a, v] R_r'[b, v] K[r, r'](t + a, t' + b)``; on the grid ``a = ρ(r)v``, ``b = ρ(r')v``."""
    border = reach(group, step.radii) if padding != "VALID" else (0, 0)
    widths = [(0, 0)] * 3 + [(radius, radius) for radius in border * 2]
    padded = np.pad(k, widths, mode="wrap" if padding == "CIRCULAR" else "constant")
    sides = [
        windows(side, radius, step.stride, padding)  # type: ignore[arg-type]
        for side, radius in zip(k.shape[3:5], reach(group, step.radii), strict=True)
    ]

    @cache
    def seen(offset: Offset) -> tuple[slice, slice]:
        """The pixels ``t + offset`` for every output pixel ``t``."""
        starts = [side.first + a + b for side, a, b in zip(sides, offset, border, strict=True)]
        top, left = (
            slice(start, start + (side.outputs - 1) * step.stride + 1, step.stride)
            for start, side in zip(starts, sides, strict=True)
        )
        return top, left

    y, x = step.radii
    taps = list(product(range(-y, y + 1), range(-x, x + 1)))
    height, width = (side.outputs for side in sides)
    out: Array = np.empty((*k.shape[:3], height, width, height, width))
    for (i, r), (j, s) in product(enumerate(symmetries(group)), repeat=2):
        terms = (
            (wa * wb, padded[(slice(None), i, j, *seen(a), *seen(b))])
            for v in taps
            for a, wa in r.splat(v)
            for b, wb in s.splat(v)
        )
        out[:, i, j] = _sum(terms, out[:, i, j].shape) / len(taps)
    return out


def block_average(k: Array, size: int) -> Array:
    """The mean over blocks of ``size x size`` pixels of both images."""
    height, width = k.shape[3] // size, k.shape[4] // size
    split = k.reshape(*k.shape[:3], height, size, width, size, height, size, width, size)
    mean: Array = split.mean(axis=(4, 6, 8, 10))
    return mean


def _sum(terms: Iterable[tuple[float, Array]], shape: tuple[int, ...]) -> Array:
    """The weighted sum of arrays of one shape, with compensation (Neumaier 1974; errors as in Knuth's TwoSum).

    Plain sums of many equal terms, as constant images have, would put ``c`` further from ``±1`` than the branch point
    allows for.
    """
    total, lost, following, added, term = (np.zeros(shape) for _ in range(5))
    for weight, array in terms:
        np.multiply(weight, array, out=term)
        np.add(total, term, out=following)
        np.subtract(following, total, out=added)
        term -= added
        np.subtract(following, added, out=added)
        total -= added
        lost += np.add(total, term, out=term)  # what rounding lost of both
        total, following = following, total
    total += lost
    return total


def diagonal(k: Array) -> Array:
    """``q[p, r, y, x] = K[p, r, r, y, x, y, x]``."""
    q: Array = np.einsum("prrijij->prij", k).copy()
    return q


def propagate(
    network: Architecture,
    group: str,
    k: Array,
    variances: Iterator[tuple[Array, Array]],
    record: Callable[[Array, Array], None] = lambda k, theta: None,
) -> tuple[Array, Array]:
    """K and Θ after all steps of the network.

    Args:
      network, group: the network.
      k: :func:`input_kernel`.
      variances: ``(q1, q2)`` at each nonlinearity in turn, from :func:`variances`.
      record: called with K and Θ after each step.
    """

    def run(steps: tuple[Step, ...], k: Array, theta: Array, *, lifting: bool = False) -> tuple[Array, Array]:
        for step in steps:
            match step:
                case Convolution() if lifting:  # the input knows no group, and Θ⁰ = 0
                    theta = k = step.w2 * filter_average(k, group, step, network.padding) + step.b2
                    lifting = False
                case Convolution():
                    k, theta = (
                        step.w2 * filter_average(group_average(kernel, group), group, step, network.padding)
                        for kernel in (k, theta)
                    )
                    k += step.b2
                    theta += k
                case Nonlinearity(activation):
                    q1, q2 = next(variances)
                    k, derivative = activation.dual(k, _first(q1), _second(q2))
                    theta = derivative * theta
                case Pooling(_, size):
                    k, theta = block_average(k, size), block_average(theta, size)
                case Branch(_, inner):
                    branch = run(inner, k, theta)
                    k, theta = k + branch[0], theta + branch[1]
            record(k, theta)
        return k, theta

    return run(network.steps, k, np.zeros_like(k), lifting=True)


def variances(network: Architecture, group: str, x: Array, labels: Labels) -> tuple[list[Array], Array]:
    """``K(f, f)`` on the diagonal before each nonlinearity, and at the end: ``(n, |G|, H', W')`` each.

    From the whole of ``K(f, f)``: pooling between layers, and filters rotated off the grid, mix its diagonal with the
    rest.

    Raises:
      ImageError: they leave the range of float64.
    """
    found: list[Array] = []

    def run(steps: tuple[Step, ...], k: Array, *, lifting: bool = False) -> Array:
        for step in steps:
            match step:
                case Convolution():
                    here = k if lifting else group_average(k, group)
                    k = step.w2 * filter_average(here, group, step, network.padding) + step.b2
                    lifting = False
                case Nonlinearity(activation):
                    q = in_range(diagonal(k), k.dtype, labels, step.place)
                    found.append(q)
                    k = activation.dual(k, _first(q), _second(q))[0]
                case Pooling(_, size):
                    k = block_average(k, size)
                case Branch(_, inner):
                    k = k + run(inner, k)
        return k

    last = diagonal(run(network.steps, input_kernel(x, x, group), lifting=True))
    return found, in_range(last, last.dtype, labels, "the end")


def _first(q: Array) -> Array:
    return q[:, :, None, :, :, None, None]


def _second(q: Array) -> Array:
    return q[:, None, :, None, None, :, :]


@dataclass(frozen=True, kw_only=True)
class Images(Prepared):
    """Images ``(n, H, W, C)`` float64, with the variances of each group's network, per image."""

    images: Array
    variances: dict[str, list[Array]]


class ReferenceEngine:
    """The literal recursion as an engine: any network, any images, float64, for judging the others."""

    name = "reference"

    def __init__(self, network: Architecture, groups: tuple[str, ...], memory: int) -> None:
        self.network = network
        self.groups = groups
        self.memory = memory

    def prepare(self, images: NDArray[Any], labels: Labels) -> Images:
        """Images ``(n, H, W, C)`` with their variances.

        Raises:
          ImageError: the variances of an image leave the range of float64.
        """
        x = np.asarray(images, dtype=np.float64)
        found, bounds = {}, []
        for group in self.groups:
            step = self._at_once(group, *x.shape[1:])
            parts = [variances(self.network, group, x[i : i + step], labels.after(i)) for i in range(0, len(x), step)]
            found[group] = [np.concatenate(layer) for layer in zip(*(part[0] for part in parts), strict=True)]
            last = np.concatenate([part[1] for part in parts])
            bounds.append(np.sqrt(last).mean(axis=(1, 2, 3)) ** 2)
        return Images(bound=np.max(bounds, axis=0), epsilon=float(np.finfo(x.dtype).eps), images=x, variances=found)

    def pair_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes that one pair needs at most."""
        return FIXED + max(self._pair_bytes(group, height, width, channels) for group in self.groups)

    def working_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes that the pairs that are computed at once need."""
        return FIXED + max(
            self._at_once(group, height, width, channels) * self._pair_bytes(group, height, width, channels)
            for group in self.groups
        )

    def image_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of one prepared image, and of what preparing it takes."""
        layers = 1 + len(self.network.activations)
        return 8 * height * width * (channels + 2 * layers * sum(map(order, self.groups)))

    def _pair_bytes(self, group: str, height: int, width: int, channels: int) -> int:
        planes = 1 + sum(activation.planes for activation in self.network.activations)
        images = 6 * height * width * (channels + order(group) * planes)
        covariances, _ = self._largest(self.network.steps, (height, width), group)
        return int(8 * (images + covariances))

    def _largest(self, steps: tuple[Step, ...], size: Size, group: str) -> tuple[float, Size]:
        """The most entries at the same time during ``steps`` on images of ``size``, and the size after them."""
        n, padding, most = order(group) ** 2, self.network.padding, 0.0
        for step in steps:
            before, after = n * entries(size), size_after(step, size, group, padding)
            match step:
                case Convolution():
                    # K and Θ, their mean over the group, that padded, both results, and the sums of one component.
                    padded = n * entries(padded_size(step, size, group, padding))
                    needed = 3 * before + padded + (3 + SUMS / n) * n * entries(after)
                case Nonlinearity():
                    needed = (2 + DUAL) * before
                case Pooling():
                    needed = 4 * before
                case Branch(_, inner):
                    needed = 4 * before + self._largest(inner, size, group)[0]
            most, size = max(most, needed), after
        return most, size

    def _at_once(self, group: str, height: int, width: int, channels: int) -> int:
        """Pairs that are computed at once."""
        few = PAIRS_BYTES // (8 * order(group) ** 2 * entries((height, width)))
        return int(max(1, min(few, self.memory // self._pair_bytes(group, height, width, channels))))

    def pairs(
        self, block1: Images, block2: Images, rows: NDArray[np.intp], cols: NDArray[np.intp]
    ) -> dict[str, Pooled]:
        """Pooled kernels of the pairs ``(block1[rows[p]], block2[cols[p]])``: ``(p,)`` float64 per group."""
        results = {}
        for group in self.groups:
            step = self._at_once(group, *block1.images.shape[1:])
            parts = []
            for p in range(0, len(rows), step):
                i, j = rows[p : p + step], cols[p : p + step]
                q = zip(block1.variances[group], block2.variances[group], strict=True)
                k = input_kernel(block1.images[i], block2.images[j], group)
                final = propagate(self.network, group, k, ((q1[i], q2[j]) for q1, q2 in q))
                parts.append([values.mean(axis=(1, 2, 3, 4, 5, 6)) for values in final])
            results[group] = Pooled(*(np.concatenate(values) for values in zip(*parts, strict=True)))
        return results
