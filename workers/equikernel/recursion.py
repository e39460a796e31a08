r"""The literal recursions of arXiv 2406.06504 over ``(r, r', t, t')``: the judge of every fast engine.

Notation: ``K[p, r, r', y, x, y', x']`` is the kernel of image pair ``p`` between the group elements ``(t, r)`` and
``(t', r')`` with ``t = (y, x)``; ``q[p, r, y, x]`` its diagonal for one image of the pair. ``S`` is the square filter
support, ``ρ(r)`` the rotation or reflection ``r``. Everything is float64 and slow on purpose: ``O(|G|² (HW)² |S|)`` per
layer.
"""

from __future__ import annotations

import os
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from equikernel.activations import DUALS
from equikernel.errors import ImageError
from equikernel.groups import multiplication_table, symmetries

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from equikernel.network import Architecture

    Array = NDArray[np.float64]

ARRAYS_AT_ONCE = 8
"""Arrays of the size of a covariance that the recursion holds at the same time."""

PAIRS_BYTES = 2**27
"""Largest covariance array, in bytes, of the pairs that are computed at once."""


class Pooled(NamedTuple):
    """Kernels after group pooling, ``(n1, n2)`` float64 each, before any dense layer."""

    nngp: Array
    ntk: Array


def _pad(k: Array, radius: int, padding: str, axes: Sequence[int]) -> Array:
    """Zeros (SAME), the opposite border (CIRCULAR) or nothing (VALID) around the pixel axes."""
    if padding == "VALID":
        return k
    widths = [(radius, radius) if axis in axes else (0, 0) for axis in range(k.ndim)]
    return np.pad(k, widths, mode="wrap" if padding == "CIRCULAR" else "constant")


def _support(radius: int) -> list[tuple[int, int]]:
    """The filter taps ``v ∈ S`` as pixel offsets from the centre."""
    side = range(-radius, radius + 1)
    return list(product(side, side))


def _window(offset: tuple[int, int], radius: int, height: int, width: int) -> tuple[slice, slice]:
    """The pixels ``t + offset`` of a padded image, for every output pixel ``t``."""
    top, left = offset[0] + radius, offset[1] + radius
    return slice(top, top + height), slice(left, left + width)


def input_kernel(x1: Array, x2: Array) -> Array:
    """``K⁰(t, t') = f(t)·f'(t') / C`` for pairs of images ``(p, H, W, C)``, as ``(p, H, W, H, W)``."""
    kernel: Array = np.einsum("pijc,pklc->pijkl", x1 / x1.shape[-1], x2, optimize=True)
    return kernel


def input_diagonal(x: Array) -> Array:
    """``K⁰(t, t)``: ``(p, H, W)``."""
    diagonal: Array = np.einsum("pijc,pijc->pij", x / x.shape[-1], x)
    return diagonal


def lifting(k: Array, group: str, radius: int, padding: str) -> Array:
    """``A(K)(tr, t'r') = 1/|S| Σ_v K⁰(t + ρ(r)v, t' + ρ(r')v)``: from ``(p, H, W, H, W)`` to all ``(r, r')``."""
    n = len(symmetries(group))
    everywhere = np.broadcast_to(k[:, None, None], (len(k), n, n, *k.shape[1:]))
    return _average(everywhere, group, radius, padding)


def group_convolution(k: Array, group: str, radius: int, padding: str) -> Array:
    """``A(K)(tr, t'r') = 1/(|G||S|) Σ_q Σ_v K[rq, r'q](t + ρ(r)v, t' + ρ(r')v)``."""
    over_group = np.zeros_like(k)
    table = multiplication_table(group)
    for rq in table.T:
        over_group += k[:, rq[:, None], rq[None, :]]
    return _average(over_group / len(table), group, radius, padding)


def _average(k: Array, group: str, radius: int, padding: str) -> Array:
    """``1/|S| Σ_v K[r, r'](t + ρ(r)v, t' + ρ(r')v)``."""
    padded = _pad(k, radius, padding, axes=(3, 4, 5, 6))
    height, width = padded.shape[3] - 2 * radius, padded.shape[4] - 2 * radius
    out: Array = np.empty((*k.shape[:3], height, width, height, width))
    for (i, r), (j, s) in product(enumerate(symmetries(group)), repeat=2):
        out[:, i, j] = _mean(
            padded[
                (
                    slice(None), i, j,
                    *_window(r.on_offset(v), radius, height, width),
                    *_window(s.on_offset(v), radius, height, width),
                )
            ]
            for v in _support(radius)
        )  # fmt: skip
    return out


def diagonal_convolution(q: Array, group: str, radius: int, padding: str) -> Array:
    """The convolutions above on the diagonal ``g = g'``: ``1/(|G||S|) Σ_q Σ_v q[rq](t + ρ(r)v)``, ``(p, n, H, W)``.

    For the lifting layer pass ``K⁰(t, t)`` repeated over the group.
    """
    padded = _pad(q.mean(axis=1), radius, padding, axes=(1, 2))
    height, width = padded.shape[1] - 2 * radius, padded.shape[2] - 2 * radius
    rotated = [
        _mean(padded[(slice(None), *_window(r.on_offset(v), radius, height, width))] for v in _support(radius))
        for r in symmetries(group)
    ]
    return np.stack(rotated, axis=1)


def _mean(terms: Iterable[Array]) -> Array:
    """The mean of arrays of one shape, summed with compensation (Neumaier 1974).

    Plain sums of many equal terms, as constant images have, would put ``c`` further from ``±1`` than the branch point
    allows for.
    """
    count, total, lost = 0, np.zeros(()), np.zeros(())
    for term in terms:
        count += 1
        following = total + term
        lost = lost + np.where(np.abs(total) >= np.abs(term), (total - following) + term, (term - following) + total)
        total = following
    return (total + lost) / count


def group_pooling(k: Array) -> Array:
    """The mean over all ``g, g'``: ``(p,)``."""
    pooled: Array = k.mean(axis=(1, 2, 3, 4, 5, 6))
    return pooled


def preactivation_variances(network: Architecture, group: str, x: Array) -> list[Array]:
    """``K_{g,g}(f, f)`` before each activation, one ``(p, n, H, W)`` array per convolution."""
    dual = DUALS[network.activation]
    w2, b2 = network.w_std**2, network.b_std**2
    q = np.repeat(input_diagonal(x)[:, None], len(symmetries(group)), axis=1)
    variances = []
    for _ in range(network.depth):
        q = w2 * diagonal_convolution(q, group, network.radius, network.padding) + b2
        variances.append(q)
        q = dual(q, q, q)[0]
    return variances


def pooled_pairs(network: Architecture, group: str, x1: Array, x2: Array) -> tuple[Array, Array]:
    """Pooled NNGP and NTK, ``(p,)`` each, of the pairs ``(x1[p], x2[p])``; images ``(p, H, W, C)`` float64."""
    dual = DUALS[network.activation]
    w2, b2 = network.w_std**2, network.b_std**2
    variances1 = preactivation_variances(network, group, x1)
    variances2 = preactivation_variances(network, group, x2)
    k = input_kernel(x1, x2)
    theta = np.zeros_like(k)
    convolution = lifting
    for q1, q2 in zip(variances1, variances2, strict=True):
        k = w2 * convolution(k, group, network.radius, network.padding) + b2
        theta = k + w2 * convolution(theta, group, network.radius, network.padding)
        k, derivative = dual(k, q1[:, :, None, :, :, None, None], q2[:, None, :, None, None, :, :])
        theta = derivative * theta
        convolution = group_convolution
    return group_pooling(k), group_pooling(theta)


class ReferenceEngine:
    """The literal recursion as an engine: any group, any images, float64, for judging the others."""

    def __init__(self, network: Architecture, groups: tuple[str, ...]) -> None:
        self.network = network
        self.groups = groups

    def prepare(self, images: NDArray[np.floating]) -> Array:
        """Images ``(n, H, W, C)`` as the engine wants them.

        Raises:
          ImageError: a single pair needs more memory than the machine has.
        """
        height, width = images.shape[1:3]
        largest = max(self.groups, key=lambda group: len(symmetries(group)))
        needed = ARRAYS_AT_ONCE * self._covariance_bytes(largest, height, width)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > memory:
            raise ImageError(
                f"the literal recursion of {largest} needs {needed / 2**30:.1f} GiB for a pair of {height}x{width} "
                f"images, and this machine has {memory / 2**30:.1f} GiB; use the engine 'cpu', or smaller images"
            )
        return np.asarray(images, dtype=np.float64)

    def epsilon(self, block: Array) -> float:
        """The machine epsilon of float64."""
        return float(np.finfo(block.dtype).eps)

    def pooled_bound(self, block: Array) -> Array:
        """``(mean over t of √K(t,t))²`` after the last activation, ``(n,)``."""
        q = preactivation_variances(self.network, "C1", block)[-1]
        bound: Array = np.sqrt(DUALS[self.network.activation](q, q, q)[0]).mean(axis=(1, 2, 3)) ** 2
        return bound

    @staticmethod
    def _covariance_bytes(group: str, height: int, width: int) -> int:
        """Bytes of ``K[r, r', t, t']`` of one pair."""
        return 8 * len(symmetries(group)) ** 2 * (height * width) ** 2

    def pairs(self, block1: Array, block2: Array, rows: NDArray[np.intp], cols: NDArray[np.intp]) -> dict[str, Pooled]:
        """Pooled kernels of the pairs ``(block1[rows[p]], block2[cols[p]])``: ``(p,)`` float64 per group."""
        results = {}
        for group in self.groups:
            step = max(1, PAIRS_BYTES // self._covariance_bytes(group, *block1.shape[1:3]))
            parts = [
                pooled_pairs(self.network, group, block1[rows[p : p + step]], block2[cols[p : p + step]])
                for p in range(0, len(rows), step)
            ]
            nngp, ntk = (np.concatenate(values) if parts else np.empty(0) for values in zip(*parts, strict=True))
            results[group] = Pooled(nngp, ntk)
        return results
