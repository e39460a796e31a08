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

from equikernel.engines.decoupled import factor_planes, pack, pack_bytes, useful_offsets, working_dtype
from equikernel.engines.device import device_memory, platform, power_of_two
from equikernel.engines.xla_planes import Array, plane_sums
from equikernel.groups import union
from equikernel.layers import Branch
from equikernel.pooled import Pooled, Prepared, by_group

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from equikernel.images import Labels
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


@dataclass(frozen=True, kw_only=True)
class Images(Prepared):
    """Images as the planes want them.

    ``packed``: ``(n, C + factors, H, W)`` in the dtype of the computation: the pixels, then the factors of each
    activation, functions of the preactivation variances.
    """

    packed: NDArray[Any]
    channels: int


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
    """Pooled kernels of ``groups`` in ``dtype``, on JAX's default device, with ``memory`` bytes for working memory."""

    name = "xla"

    def __init__(self, network: Architecture, groups: tuple[str, ...], dtype: np.dtype[Any], memory: int) -> None:
        self.network = network
        self.groups = groups
        self.dtype = dtype
        self.memory = memory

    def prepare(self, images: NDArray[Any], labels: Labels) -> Images:
        """Pack ``(n, H, W, C)`` images with the factors of the activations; raises as :func:`pack`."""
        dtype = working_dtype(self.network, images.shape[1], images.shape[2], self.dtype)
        packed, bound = pack(self.network, images, dtype, labels)
        return Images(bound=bound, epsilon=float(np.finfo(dtype).eps), packed=packed, channels=images.shape[3])

    def image_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of one prepared image."""
        itemsize = working_dtype(self.network, height, width, self.dtype).itemsize
        return height * width * (channels + factor_planes(self.network)) * itemsize

    def pair_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of the planes of one horizontal offset."""
        return max(self._plane_bytes(height, width, channels), pack_bytes(self.network, height, width, channels))

    def working_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of the planes that are computed at once, when there are many pairs."""
        plane = self._plane_bytes(height, width, channels)
        planes = planes_at_once(height * width, plane, self._memory(), platform())
        return max(planes * plane, self.pair_bytes(height, width, channels))

    def pairs(
        self, block1: Images, block2: Images, rows: NDArray[np.intp], cols: NDArray[np.intp]
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
        return by_group(self.groups, elements, totals)

    def _parts(self, block1: Images, block2: Images, rows: NDArray[np.intp], cols: NDArray[np.intp]) -> Iterator[Part]:
        """All calls that the pairs take."""
        steps, padding = self.network.steps, self.network.padding
        height, width = block1.packed.shape[2:]
        down, across = (
            np.sort(useful_offsets(side, margin).numbers)
            for side, margin in zip((height, width), self.network.margin, strict=True)
        )
        blocks = block_shape(
            (len(rows), len(across)),
            pixels=height * width,
            plane_bytes=self._plane_bytes(height, width, block1.channels),
            steps=len(self.network.convolutions) + len(self.network.activations),
            memory=self._memory(),
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

    def _memory(self) -> int:
        """Bytes for work in progress."""
        return min(self.memory, device_memory())

    def _plane_bytes(self, height: int, width: int, channels: int) -> int:
        """Working memory for a plane of one pair and offset."""
        itemsize = working_dtype(self.network, height, width, self.dtype).itemsize
        images = 3 * (channels + factor_planes(self.network))  # the second twice, below itself
        return height * width * itemsize * (images + PLANES + 2 * _branches_within(self.network.steps))


def planes_at_once(pixels: int, plane_bytes: int, memory: int, platform: str) -> int:
    """The planes, of ``pixels`` entries, that are fastest and fit in ``memory``; at least one."""
    return max(1, min(max(ENTRIES[platform] // pixels, FEWEST_OFFSETS), memory // plane_bytes))


def block_shape(
    counts: tuple[int, int], *, pixels: int, plane_bytes: int, steps: int, memory: int, platform: str
) -> Blocks:
    """The fastest blocks that fit, of few different shapes, because each shape is compiled.

    Args:
      counts: pairs and horizontal offsets that there are.
      pixels: entries of a plane.
      plane_bytes: memory per plane.
      steps: of the network.
      memory: bytes that there are.
      platform: ``"cpu"`` or ``"gpu"``.
    """
    pairs, offsets = counts
    planes = planes_at_once(pixels, plane_bytes, memory, platform)
    across = -(-offsets // -(-offsets // planes))
    together = power_of_two(max(1, min(planes // across, 2 * pairs - 1)))
    return Blocks(together, across, max(1, ENTRY_STEPS[platform] // (pixels * across * together * steps)))


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
