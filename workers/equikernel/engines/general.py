"""The general engine: any group, stride, pooling, padding and activation, with dense covariances in JAX, in float64.

Of the kernels ``K[r, r'](t, t')`` between two group elements, a group convolution needs only the mean over ``q`` of
``K[rq, r'q]``. So the difference ``d = r' r⁻¹`` never changes, and for each ``d`` the network is a recursion of its own
on ``K[r, d r]``, for all ``r``. Elements ``s`` on the pixel grid permute the taps of the filters, so
``K[rs, d r s] = K[r, d r]``: one ``r`` of each coset ``r S`` is enough, with ``S`` the elements on the grid.

- A group on the grid is its own ``S``. There is one coset, and in the coordinates of ``ρ(d) f'`` the recursion is that
  of a plain CNN: ``|G|`` dense kernels, not ``|G|²``.
- Off the grid the filter of ``r`` is ``R_r[a, v]``, the taps ``ρ(r) v`` spread over the pixels ``a`` around them:
  ``K[r, dr](t, t') = 1/|S| Σ_v Σ_{a, b} R_r[a, v] R_dr[b, v] K̄[d](t + a, t' + b)``, ``K̄[d]`` the mean over the cosets.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from equikernel.activations import EPS
from equikernel.engines.decoupled import factor_planes
from equikernel.engines.dense import (
    Array,
    DenseNetwork,
    Factors,
    cosets,
    diagonal,
    input_kernel,
    mean_over_second,
    representatives,
)
from equikernel.engines.device import device_memory, platform, power_of_two
from equikernel.geometry import entries, padded_size, size_after
from equikernel.groups import Symmetry, on_grid, union
from equikernel.images import Labels, in_range
from equikernel.layers import Branch, Convolution, Nonlinearity, Pooling
from equikernel.pooled import Pooled, Prepared, by_group

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from equikernel.geometry import Size
    from equikernel.layers import Step
    from equikernel.network import Architecture

ENTRIES = {"cpu": 2**17, "gpu": 2**26}
"""Entries of the covariances of the pairs that are computed at once."""

DUAL, SUMS = 8, 4
"""Covariances at the same time in a nonlinearity, and in the sums over a filter besides its input and output."""

IDENTITY = Symmetry(False, 0)


@dataclass(frozen=True, kw_only=True)
class Images(Prepared):
    """Images ``(n, H, W, C)`` float64, with the factors of each nonlinearity, ``(cosets, n, H', W')`` each."""

    images: NDArray[np.float64]
    factors: list[Factors]


class GeneralEngine:
    """Pooled kernels of ``groups``, on JAX's default device, with ``memory`` bytes at most for work in progress."""

    name = "general"

    def __init__(self, network: Architecture, groups: tuple[str, ...], memory: int) -> None:
        self.network = network
        self.groups = groups
        self.memory = memory
        self.grid = all(map(on_grid, groups))
        self.cosets = cosets(groups[0])
        self.count = len(representatives(groups[0]))
        # How close to ±1 a correlation is taken as ±1; sums over larger filters round more.
        eps = EPS * max(1, *(max(step.radii) for step in network.convolutions))
        self.dense = DenseNetwork(network, groups[0], eps)

    def prepare(self, images: NDArray[Any], labels: Labels) -> Images:
        """Images ``(n, H, W, C)`` with the factors of their variances.

        Raises:
          ImageError: the variances of an image leave the range of float64.
          NetworkError: an activation has no second moment.
        """
        x = np.asarray(images, np.float64)
        parts = []
        for here, index in self._blocks(len(x), x):
            factors, last = self._variances(x[index], labels.after(int(here[0])))
            parts.append(([tuple(part[:, : len(here)] for part in layer) for layer in factors], last[:, : len(here)]))
        layers = zip(*(factors for factors, _ in parts), strict=True)
        factors = [tuple(np.concatenate(part, axis=1) for part in zip(*layer, strict=True)) for layer in layers]
        last = np.concatenate([last for _, last in parts], axis=1)
        bound = np.sqrt(last).mean(axis=(0, 2, 3)) ** 2
        return Images(bound=bound, epsilon=EPS, images=x, factors=factors)

    def _variances(self, x: NDArray[np.float64], labels: Labels) -> tuple[list[Factors], NDArray[np.float64]]:
        """The factors before each nonlinearity and ``K(t, t)`` at the end, from the whole of ``K(f, f)``.

        Pooling between layers, and filters rotated off the grid, mix the diagonal with the rest.
        """
        found: list[Factors] = []

        def variances(k: Array, place: str) -> NDArray[np.float64]:
            q = np.asarray(diagonal(k)).swapaxes(0, 1)
            return in_range(q, q.dtype, labels, place).swapaxes(0, 1)

        def factors(step: Nonlinearity, k: Array) -> tuple[Factors, Factors]:
            found.append(step.activation.factors(variances(k, step.place)))
            return found[-1], found[-1]

        with jax.enable_x64(True):
            (k,) = self.dense.kernels([input_kernel(x, x)], IDENTITY, factors, ntk=False)
            return found, variances(k, "the end")

    def pairs(
        self, block1: Images, block2: Images, rows: NDArray[np.intp], cols: NDArray[np.intp]
    ) -> dict[str, Pooled]:
        """Pooled kernels ``(p,)`` float64 of the pairs ``(block1[rows[p]], block2[cols[p]])``, by group."""
        elements = union(self.groups)
        totals = np.empty((len(elements), 2, len(rows)))
        for place, element in enumerate(elements):
            for here, index in self._blocks(len(rows), block1.images):
                pooled = self._pooled(block1, block2, rows[index], cols[index], element)
                totals[place][:, here] = pooled[:, : len(here)]
        return by_group(self.groups, elements, totals)

    def _pooled(
        self, block1: Images, block2: Images, rows: NDArray[np.intp], cols: NDArray[np.intp], d: Symmetry
    ) -> NDArray[np.float64]:
        """Means of ``K[r, d r]`` and ``Θ[r, d r]`` over ``r`` and all pixels: ``(2, p)``."""
        x, y = block1.images[rows], block2.images[cols]
        if self.grid:
            y = d.on_images(y)
            seconds = [tuple(d.on_images(part[:, cols], (2, 3)) for part in layer) for layer in block2.factors]
            difference = IDENTITY
        else:
            moved = [self.cosets[d * r] for r in representatives(self.groups[0])]
            seconds = [tuple(part[moved][:, cols] for part in layer) for layer in block2.factors]
            difference = d
        firsts = (tuple(part[:, rows] for part in layer) for layer in block1.factors)
        both = zip(firsts, seconds, strict=True)
        with jax.enable_x64(True):
            kernels = self.dense.kernels([input_kernel(x, y)], difference, lambda *_: next(both), ntk=True)
            return np.array([np.asarray(mean_over_second(kernel)).mean(axis=(0, 2, 3)) for kernel in kernels])

    def image_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of one prepared image, and of what preparing it takes, at most."""
        return 8 * height * width * (channels + 2 * self.count * (1 + factor_planes(self.network)))

    def pair_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of the images and covariances that exist at the same time for one pair, at most."""
        images = 4 * height * width * (channels + self.count * factor_planes(self.network))
        return 8 * (images + self._largest(self.network.steps, (height, width), lifting=True)[0])

    def working_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of the pairs that are computed at once, when there are many."""
        return self._at_once(height, width, channels) * self.pair_bytes(height, width, channels)

    def _at_once(self, height: int, width: int, channels: int, count: int = sys.maxsize) -> int:
        """How many of ``count`` pairs are computed at once: as many as are fast and fit, a power of two."""
        fast = ENTRIES[platform()] // (self.count * entries((height, width)))
        fit = min(self.memory, device_memory()) // self.pair_bytes(height, width, channels)
        return power_of_two(max(1, min(fast, fit, 2 * count - 1)))

    def _blocks(self, count: int, images: NDArray[np.float64]) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """Cut ``count`` pairs, or images, into blocks: the places in each, and the same repeated to full length.

        Of few different numbers, because each is compiled.
        """
        _, height, width, channels = images.shape
        size = self._at_once(height, width, channels, count)
        for start in range(0, count, size):
            here = np.arange(start, min(start + size, count))
            yield here, np.resize(here, size)

    def _largest(self, steps: tuple[Step, ...], size: Size, *, lifting: bool = False) -> tuple[int, Size]:
        """The most entries at the same time during ``steps`` on images of ``size``, and the size after them."""
        group, padding, most = self.groups[0], self.network.padding, 0
        for step in steps:
            before, after = self.count * entries(size), size_after(step, size, group, padding)
            match step:
                case Convolution():
                    padded = entries(padded_size(step, size, group, padding))
                    needed = before * (3 if lifting else 4) + padded
                    if not self.grid:  # also the mean over the cosets, and compensated sums
                        needed += padded + (self.count + SUMS) * entries(after)
                    lifting = False
                case Nonlinearity():
                    needed = DUAL * before
                case Pooling():
                    needed = 4 * before
                case Branch(_, inner):
                    needed = 2 * before + self._largest(inner, size)[0]
            most, size = max(most, needed), after
        return most, size
