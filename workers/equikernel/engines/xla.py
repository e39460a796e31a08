"""The JAX engine: orbit reduction and offset decoupling on CPUs and GPUs.

Orbit reduction: the pooled kernel of ``G`` is the mean of plain CNN kernels over rotated and mirrored images,
``K_G(f, f') = 1/|G| Σ_{d ∈ G} K_{C_1}(f, ρ(d) f')``, and likewise Θ. The plain CNN kernels are computed offset by
offset, see :mod:`equikernel.engines.xla_planes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from equikernel.engines.decoupled import image_constants, refuse_overflow, working_dtype
from equikernel.engines.device import device_memory, platform
from equikernel.engines.xla_planes import Array, plane_sums
from equikernel.groups import symmetries, union
from equikernel.layers import Branch
from equikernel.recursion import Pooled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from equikernel.layers import Step
    from equikernel.network import Architecture

ENTRIES = {"cpu": 2**17, "gpu": 2**23}
"""Entries of the planes that are computed at once: on CPUs they stay in the caches of a few cores."""

ENTRY_STEPS = {"cpu": 2**25, "gpu": 2**31}
"""Entries times steps of the network of one call, at most tenths of a second: after so long an interrupt is heard."""

FEWEST_OFFSETS = 8
"""Horizontal offsets side by side at least, memory permitting, to fill the vectors of a processor."""

PLANES = 18
"""Planes at the same time, besides those of the images and of residual branches."""


@dataclass(frozen=True)
class Prepared:
    """Images as the planes want them.

    ``packed``: ``(n, C + factors, H, W)`` in the dtype of the computation: the pixels, then the factors of each
    activation, functions of the preactivation variances.
    """

    packed: NDArray[Any]
    channels: int
    bound: NDArray[np.float64]
    """``(mean over t of √K(t,t))²`` at the end, ``(n,)``."""


class Blocks(NamedTuple):
    """What one call computes: ``pairs`` x ``across`` planes at once, for up to ``down`` vertical offsets in turn."""

    pairs: int
    across: int
    down: int


class Part(NamedTuple):
    """One call: the place of the element, the pairs, how many horizontal offsets count, and the sums to come."""

    element: int
    pairs: slice
    offsets: int
    sums: Array


class XlaEngine:
    """Pooled kernels of ``groups`` in ``dtype``, on JAX's default device, with ``memory`` bytes."""

    name = "xla"

    def __init__(self, network: Architecture, groups: tuple[str, ...], dtype: np.dtype[Any], memory: int) -> None:
        self.network = network
        self.groups = groups
        self.dtype = dtype
        self.memory = memory

    def prepare(self, images: NDArray[Any], first: int = 0) -> Prepared:
        """Pack ``(n, H, W, C)`` images with the factors of the activations.

        Raises:
          ImageError: an image's kernel with itself overflows the dtype.
          NetworkError: an activation has no second moment.
        """
        dtype = working_dtype(self.network, images.shape[1], images.shape[2], self.dtype)
        constants, bound = image_constants(self.network, images)
        layers = [np.stack(factors, axis=1).astype(dtype) for factors in constants]
        packed = np.concatenate([images.transpose(0, 3, 1, 2).astype(dtype, copy=False), *layers], axis=1)
        refuse_overflow(packed, dtype, first)
        return Prepared(packed, images.shape[3], bound)

    def pooled_bound(self, block: Prepared) -> NDArray[np.float64]:
        """``(mean over t of √K(t,t))²`` after the last step, ``(n,)``."""
        return block.bound

    def epsilon(self, block: Prepared) -> float:
        """The machine epsilon of the computation."""
        return float(np.finfo(block.packed.dtype).eps)

    def image_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of one prepared image, and of what preparing it takes."""
        itemsize = working_dtype(self.network, height, width, self.dtype).itemsize
        factors = self._factor_planes()
        return height * width * (2 * (channels + factors) * itemsize + 8 * factors)

    def pair_bytes(self, height: int, width: int) -> int:
        """Bytes of the planes of one horizontal offset, for images of up to four channels."""
        itemsize = working_dtype(self.network, height, width, self.dtype).itemsize
        return height * width * self._entry_bytes(4 + self._factor_planes(), itemsize)

    def pairs(
        self, block1: Prepared, block2: Prepared, rows: NDArray[np.intp], cols: NDArray[np.intp]
    ) -> dict[str, Pooled]:
        """Pooled kernels ``(p,)`` float64 of the pairs ``(block1[rows[p]], block2[cols[p]])``, by group."""
        elements = union(self.groups)
        totals = np.zeros((len(elements), 2, len(rows)))
        with jax.enable_x64(True):
            for part in _one_ahead(self._parts(block1, block2, rows, cols)):
                sums = np.asarray(part.sums)[:, : part.offsets, : part.pairs.stop - part.pairs.start]
                totals[part.element, :, part.pairs] += sums.sum(axis=1)
        sides = zip(block1.packed.shape[2:], self.network.margin, strict=True)
        totals /= float(np.prod([side - 2 * margin for side, margin in sides])) ** 2
        results = {}
        for group in self.groups:
            members = [elements.index(element) for element in symmetries(group)]
            results[group] = Pooled(*totals[members].mean(axis=0))
        return results

    def _parts(
        self, block1: Prepared, block2: Prepared, rows: NDArray[np.intp], cols: NDArray[np.intp]
    ) -> Iterator[Part]:
        """All calls that the pairs take."""
        steps, padding = self.network.steps, self.network.padding
        _, planes, height, width = block1.packed.shape
        down, across = (
            useful_offsets(side, margin) for side, margin in zip((height, width), self.network.margin, strict=True)
        )
        blocks = block_shape(
            (len(rows), len(across)),
            pixels=height * width,
            entry_bytes=self._entry_bytes(planes, block1.packed.itemsize),
            steps=len(self.network.convolutions) + len(self.network.activations),
            memory=min(self.memory, device_memory()),
            platform=platform(),
        )
        compiled = plane_sums(steps, padding, block1.channels, platform())
        for place, element in enumerate(union(self.groups)):
            for start in range(0, len(rows), blocks.pairs):
                pairs = slice(start, min(start + blocks.pairs, len(rows)))
                x = block1.packed[_filled(rows[pairs], blocks.pairs)]
                y = block2.packed[_filled(cols[pairs], blocks.pairs)]
                y = np.ascontiguousarray(element.on_images(y, axes=(2, 3)))
                for left in range(0, len(across), blocks.across):
                    offsets = across[left : left + blocks.across]
                    filled = _filled(offsets, blocks.across)
                    for top in range(0, len(down), blocks.down):
                        bottom = min(top + blocks.down, len(down))
                        yield Part(place, pairs, len(offsets), compiled(x, y, down, filled, top, bottom, True))

    def _factor_planes(self) -> int:
        """Factors of all activations of an image."""
        return sum(len(activation.factors(np.ones(1))) for activation in self.network.activations)

    def _entry_bytes(self, image_planes: int, itemsize: int) -> int:
        """Working memory per entry of a plane."""
        images = 3 * image_planes  # the second twice, below itself
        return itemsize * (images + PLANES + 2 * _branches_within(self.network.steps))


def block_shape(
    counts: tuple[int, int], *, pixels: int, entry_bytes: int, steps: int, memory: int, platform: str
) -> Blocks:
    """The fastest blocks that fit, of few different shapes, because each shape is compiled.

    Args:
      counts: pairs and horizontal offsets that there are.
      pixels: entries of a plane.
      entry_bytes: memory per entry.
      steps: of the network.
      memory: bytes that there are.
      platform: ``"cpu"`` or ``"gpu"``.
    """
    pairs, offsets = counts
    planes = max(1, min(max(ENTRIES[platform] // pixels, FEWEST_OFFSETS), memory // (entry_bytes * pixels)))
    across = -(-offsets // -(-offsets // planes))
    together = _power_of_two(max(1, min(planes // across, 2 * pairs - 1)))
    return Blocks(together, across, max(1, ENTRY_STEPS[platform] // (pixels * across * together * steps)))


def _power_of_two(limit: int) -> int:
    """The largest power of two up to ``limit``."""
    return 1 << (limit.bit_length() - 1)


def _one_ahead(parts: Iterator[Part]) -> Iterator[Part]:
    """The same parts, each one only after the next is on its way, so that the device need not wait."""
    before = next(parts)
    for part in parts:
        yield before
        before = part
    yield before


def _filled(index: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    """``index``, and its first entry again up to the length ``count``."""
    return np.concatenate([index, np.full(count - len(index), index[0])])


def _branches_within(steps: tuple[Step, ...]) -> int:
    """How many residual branches lie within each other."""
    return max((1 + _branches_within(step.steps) for step in steps if isinstance(step, Branch)), default=0)


def useful_offsets(side: int, margin: int) -> NDArray[np.intp]:
    """Offsets modulo ``side`` with a segment longer than ``2 margin``: those with pixel pairs left by VALID padding."""
    return np.array([d for d in range(side) if max(side - d, d) > 2 * margin])
