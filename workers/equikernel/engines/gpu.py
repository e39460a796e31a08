"""The GPU engine: orbit reduction and offset decoupling, fused into one kernel per network.

Orbit reduction: the pooled kernel of ``G`` is the mean of plain CNN kernels over rotated and mirrored images,
``K_G(f, f') = 1/|G| Σ_{d ∈ G} K_{C_1}(f, ρ(d) f')``, and likewise Θ. :mod:`equikernel.engines.gpu_source` writes the
kernel, :mod:`equikernel.engines.gpu_device` runs it.

Prepared images, with their copies under each symmetry, stay on the GPU. The pairs of a call are cut into batches that
wait in two streams, so that one begins while the last blocks of the other end; the host waits for what was sent long
ago, and for the sums of all pairs at the end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from equikernel.engines.decoupled import pack, pack_bytes, working_dtype
from equikernel.engines.gpu_source import FINISHED, WARP, Layout, Source, kernel_source, layout
from equikernel.engines.planes import check_weights, layers_of
from equikernel.groups import union
from equikernel.pooled import Pooled, Prepared, by_group

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equikernel.groups import Symmetry
    from equikernel.images import Labels
    from equikernel.network import Architecture

BATCH_SECONDS = 0.05
"""Time that a batch takes, roughly: after a few of them an interrupt is heard."""

WAITING = 4
"""Batches that wait for the device, or are computed, at most."""

WARPS = 16
"""Warps for which a processor has to hold images in its shared memory, or they are left in its cache."""

SCRATCH = 2**26
"""Bytes for the sums of the tasks of a batch at most, but for a single pair."""


class Device(Protocol):
    """What holds the images and runs kernels.

    Attributes:
      kind: of the processor.
      shared: bytes that the threads of a block share at most.
      rate: instructions of a warp per second that it can issue.
    """

    kind: str
    shared: int
    rate: float

    def free(self) -> int:
        """Bytes of memory that can be taken."""

    def put(self, array: NDArray[Any]) -> Any:
        """A copy of an array on the device.

        Raises:
          MemoryLimitError: it does not fit.
        """

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array on the device."""

    def get(self, array: Any) -> NDArray[Any]:
        """A copy of an array on the host."""

    def stream(self) -> Any:
        """A queue of kernels, which are run one after the other."""

    def compile(self, source: Source, dtype: str) -> Any:
        """The functions of a source in the given precision."""

    def launch(self, program: Any, name: str, blocks: int, threads: int, stream: Any, *arguments: Any) -> None:
        """Put a function of a program into a stream."""

    def mark(self, stream: Any) -> Any:
        """What there is in a stream now."""

    def wait(self, mark: Any) -> None:
        """Until everything before the mark has run."""


@dataclass(frozen=True, kw_only=True)
class Images(Prepared):
    """Images and their copies under each symmetry, on the device.

    ``packed[element]``: ``(n, planes · H · stride)`` in the dtype of the computation: the pixels, then the factors of
    each activation, functions of the preactivation variances. Each row is followed by its beginning.
    """

    packed: dict[Symmetry, Any]
    shape: tuple[int, int, int]
    dtype: str


class GpuEngine:
    """Pooled kernels of ``groups`` in ``dtype`` on a device, with ``memory`` bytes for working memory."""

    name = "gpu"

    def __init__(
        self, network: Architecture, groups: tuple[str, ...], dtype: np.dtype[Any], memory: int, device: Device
    ) -> None:
        self.network = network
        self.groups = groups
        self.dtype = dtype
        self.memory = memory
        self.device = device

    def prepare(self, images: NDArray[Any], labels: Labels) -> Images:
        """Compute the factors of ``(n, H, W, C)`` images, and send all copies to the device.

        Raises:
          ImageError, NetworkError: as :func:`pack`, and :func:`check_weights`.
          MemoryLimitError: the device has no room for them.
        """
        _, height, width, channels = images.shape
        dtype = working_dtype(self.network, height, width, self.dtype)
        plan = self._layout(height, width, channels)
        check_weights(layers_of(self.network.steps, channels), dtype)
        packed, bound = pack(self.network, images, dtype, labels)
        copies = {}
        for element in union(self.groups):
            turned = element.on_images(packed, axes=(2, 3))
            longer = np.pad(turned, ((0, 0), (0, 0), (0, 0), (0, plan.stride - width)), mode="wrap")
            copies[element] = self.device.put(longer.reshape(len(images), plan.image))
        return Images(
            bound=bound,
            epsilon=float(np.finfo(dtype).eps),
            packed=copies,
            shape=(height, width, channels),
            dtype=dtype.name,
        )

    def image_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of one prepared image in all copies."""
        itemsize = working_dtype(self.network, height, width, self.dtype).itemsize
        return self._layout(height, width, channels).image * itemsize * len(union(self.groups))

    def pair_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of the sums of all tasks of a pair; or of what images are prepared with, if that is more."""
        sums = 2 * 16 * self._layout(height, width, channels).tasks
        return max(sums, pack_bytes(self.network, height, width, channels))

    def working_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of the sums of the batches in both streams."""
        return max(self.pair_bytes(height, width, channels), min(2 * SCRATCH, self.memory))

    def pairs(
        self, block1: Images, block2: Images, rows: NDArray[np.intp], cols: NDArray[np.intp]
    ) -> dict[str, Pooled]:
        """Pooled kernels ``(p,)`` float64 of the pairs ``(block1[rows[p]], block2[cols[p]])``, by group."""
        elements, device = union(self.groups), self.device
        source = self._source(block1)
        program, plan = device.compile(source, block1.dtype), source.layout
        per_launch = max(1, int(BATCH_SECONDS * device.rate * plan.blocks / source.instructions))
        most = max(1, min(self.memory, 2 * SCRATCH) // (2 * 16 * plan.tasks))
        batch = max(1, min(most, per_launch // plan.blocks, len(rows)))
        row_images, col_images, across, down = (
            device.put(np.asarray(index, np.int32)) for index in (rows, cols, plan.across, plan.down)
        )
        totals = device.empty((2 * len(elements), len(rows)), np.float64)
        streams = [(device.stream(), device.empty((batch * plan.tasks, 2), np.float64)) for _ in range(2)]
        waiting: deque[Any] = deque()
        batches = [(place, start) for place in range(len(elements)) for start in range(0, len(rows), batch)]
        for turn, (place, start) in enumerate(batches):
            stream, sums = streams[turn % 2]
            count = min(batch, len(rows) - start)
            images = block1.packed[elements[0]], block2.packed[elements[place]]
            inputs = *images, row_images, col_images, across, down
            for begin in range(0, count * plan.blocks, per_launch):
                blocks = min(per_launch, count * plan.blocks - begin)
                device.launch(program, "kernel", blocks, plan.warps * WARP, stream, *inputs, start, begin, sums)
                waiting.append(device.mark(stream))
                if len(waiting) > WAITING:
                    device.wait(waiting.popleft())
            blocks = -(-count // FINISHED)
            device.launch(program, "finish", blocks, FINISHED, stream, sums, place, start, count, totals)
        for stream, _ in streams:
            device.wait(device.mark(stream))
        height, width, _ = block1.shape
        margin_y, margin_x = self.network.margin
        means = device.get(totals) / float((height - 2 * margin_y) * (width - 2 * margin_x)) ** 2
        return by_group(self.groups, elements, means.reshape(len(elements), 2, len(rows)))

    def _source(self, images: Images) -> Source:
        """The kernel for such images."""
        height, width, channels = images.shape
        plan = self._layout(height, width, channels)
        together = self.device.shared // (2 * plan.image * np.dtype(images.dtype).itemsize)
        return kernel_source(
            self.network.steps, self.network.padding, images.shape, images.dtype, together * plan.warps >= WARPS
        )

    def _layout(self, height: int, width: int, channels: int) -> Layout:
        dtype = working_dtype(self.network, height, width, self.dtype).name
        return layout(self.network.steps, self.network.padding, (height, width, channels), dtype)
