"""The CPU engine: orbit reduction and offset decoupling, in vectors, on all cores.

Orbit reduction: the pooled kernel of ``G`` is the mean of plain CNN kernels over rotated and mirrored
images, ``K_G(f, f') = 1/|G| Σ_{d ∈ G} K_{C_1}(f, ρ(d) f')``, and likewise Θ, because the elements map
the filters to themselves. So one pass over the elements of several groups holds the kernels of all of them.
"""

from __future__ import annotations

from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from equikernel.activations import BRANCH_POINT
from equikernel.engines.decoupled import factor_planes, pack, pack_bytes, rounding, working_dtype
from equikernel.engines.planes import Layout, Program, check_weights, factor_scales, layers_of, program
from equikernel.engines.vectors import Target, aligned, host
from equikernel.groups import Symmetry, union
from equikernel.pooled import Pooled, Prepared, by_group

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from equikernel.images import Labels
    from equikernel.network import Architecture

Piece: TypeAlias = tuple[int, int, int]
"""``(place of the element, start, stop)`` of pairs with one first image."""

TASKS_PER_THREAD = 8
"""Pieces that the work of a call is cut into, per thread, so that all threads end together."""

MOST_OTHERS = 256
"""Second images of a piece at most, which bounds the memory of the sums over each horizontal offset."""


@dataclass(frozen=True, kw_only=True)
class Images(Prepared):
    """Images and their copies under each symmetry, packed for the inner loops.

    ``packed[element]``: ``(n, C + factors, H, W)`` in the dtype of the computation: the pixels, then the factors of
    each activation, functions of the preactivation variances. Behind the last one lies room for a vector.
    """

    packed: dict[Symmetry, NDArray[Any]]
    channels: int


class CpuEngine:
    """Pooled kernels of ``groups`` in ``dtype``, with ``threads`` threads, or fewer where ``memory`` is short."""

    name = "cpu"

    def __init__(
        self,
        network: Architecture,
        groups: tuple[str, ...],
        dtype: np.dtype[Any],
        threads: int,
        memory: int,
        target: Target | None = None,
    ) -> None:
        self.network = network
        self.groups = groups
        self.dtype = dtype
        self.threads = threads
        self.memory = memory
        self.target = target or host()
        self.branch = BRANCH_POINT * rounding(network.steps)

    def prepare(self, images: NDArray[Any], labels: Labels) -> Images:
        """Compute the factors of ``(n, H, W, C)`` images and pack all copies.

        Raises:
          ImageError: as :func:`pack`.
          NetworkError: as :func:`pack` and :func:`check_weights`.
        """
        _, height, width, channels = images.shape
        dtype = working_dtype(self.network, height, width, self.dtype)
        layers = layers_of(self.network.steps, channels)
        check_weights(layers, dtype)
        packed, bound = pack(self.network, images, dtype, labels, factor_scales(layers, dtype))
        copies = {}
        for element in union(self.groups):
            copies[element] = np.empty(packed.size + self.target.lanes(dtype), dtype)[: packed.size].reshape(
                packed.shape
            )
            copies[element][...] = element.on_images(packed, axes=(2, 3))
        return Images(bound=bound, epsilon=float(np.finfo(dtype).eps), packed=copies, channels=channels)

    def image_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of one prepared image in all copies."""
        itemsize = working_dtype(self.network, height, width, self.dtype).itemsize
        return height * width * (channels + factor_planes(self.network)) * itemsize * len(union(self.groups))

    def pair_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of the scratch memory of one thread."""
        dtype = working_dtype(self.network, height, width, self.dtype)
        layout = self._layout(height, width, channels, dtype)
        return max(dtype.itemsize * layout.entries, pack_bytes(self.network, height, width, channels))

    def working_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of the scratch memory of all threads that there are memory for."""
        return self._fitting_threads(height, width, channels) * self.pair_bytes(height, width, channels)

    def _fitting_threads(self, height: int, width: int, channels: int) -> int:
        """How many threads have enough memory; at least one."""
        return max(1, min(self.threads, self.memory // self.pair_bytes(height, width, channels)))

    def _layout(self, height: int, width: int, channels: int, dtype: np.dtype[Any]) -> Layout:
        """The scratch memory for images of that shape."""
        planes = channels + factor_planes(self.network)
        layers = layers_of(self.network.steps, channels)
        return Layout(
            height, width, self.target.lanes(dtype), layers, self.network.padding, self.network.margin, planes,
            dtype.itemsize,
        )  # fmt: skip

    def program(self, height: int, width: int, channels: int) -> Program:
        """The code for images of that shape; compiled the first time."""
        dtype = working_dtype(self.network, height, width, self.dtype)
        branch = float(self.branch * np.finfo(dtype).eps)
        return program(self._layout(height, width, channels, dtype), dtype, self.target, branch)

    def pairs(
        self, block1: Images, block2: Images, rows: NDArray[np.intp], cols: NDArray[np.intp]
    ) -> dict[str, Pooled]:
        """Pooled kernels ``(p,)`` float64 of the pairs ``(block1[rows[p]], block2[cols[p]])``, by group."""
        elements = union(self.groups)
        packed1, channels = block1.packed[elements[0]], block1.channels
        totals = np.empty((len(elements), 2, len(rows)))
        height, width = packed1.shape[2:]
        threads = self._fitting_threads(height, width, channels)
        code = self.program(height, width, channels)
        down = code.layout.down.numbers

        def run(piece: Piece, scratch: NDArray[Any], stop: NDArray[np.bool_]) -> None:
            which, begin, end = piece
            packed2 = block2.packed[elements[which]]
            totals[which, :, begin:end] = self._one_against(
                code, packed1[rows[begin]], packed2, cols[begin:end], down, scratch, stop
            )

        _in_threads(
            run,
            self._pieces(rows, len(elements), threads),
            threads,
            lambda: aligned(code.layout.entries, packed1.dtype),
        )
        return by_group(self.groups, elements, totals)

    @staticmethod
    def _pieces(rows: NDArray[np.intp], elements: int, threads: int) -> list[Piece]:
        """Cut the pairs into pieces, a few for each thread."""
        most = min(-(-len(rows) * elements // (threads * TASKS_PER_THREAD)), MOST_OTHERS)
        bounds = [0, *(np.flatnonzero(np.diff(rows)) + 1).tolist(), len(rows)]
        return [
            (which, start, min(start + most, end))
            for begin, end in pairwise(bounds)
            for start in range(begin, end, most)
            for which in range(elements)
        ]

    @staticmethod
    def _one_against(
        code: Program,
        image: NDArray[Any],
        packed2: NDArray[Any],
        others: NDArray[np.intp],
        down: NDArray[np.int64],
        scratch: NDArray[Any],
        stop: NDArray[np.bool_],
    ) -> NDArray[np.float64]:
        """Plain CNN kernels after pooling of one image against several, ``(2, len(others))``; any when stopped."""
        layout = code.layout
        (height, width), (margin_y, margin_x) = image.shape[1:], layout.margins
        begins = others.astype(np.int64) * packed2[0].size
        sums = aligned(layout.blocks(len(others)) * 2 * layout.lanes, np.float64)
        code.compiled.call(
            image.ctypes.data, packed2.ctypes.data, begins.ctypes.data, len(others), down.ctypes.data, len(down),
            scratch.ctypes.data, sums.ctypes.data, stop.ctypes.data,
        )  # fmt: skip
        by_lane = sums.reshape(-1, 2, layout.lanes).swapaxes(0, 1).reshape(2, -1)
        if layout.expanded:
            by_offset = by_lane[:, : len(others) * layout.across.count].reshape(2, len(others), layout.across.count)
        else:
            by_offset = by_lane.reshape(2, len(others), -1)[:, :, : layout.across.count]
        pixels = (height - 2 * margin_y) * (width - 2 * margin_x)
        means: NDArray[np.float64] = np.ascontiguousarray(by_offset).sum(axis=2) / pixels**2
        return means


def _in_threads(
    run: Callable[[Piece, NDArray[Any], NDArray[np.bool_]], None],
    pieces: list[Piece],
    threads: int,
    scratch: Callable[[], NDArray[Any]],
) -> None:
    """Run all pieces, in threads of their own also if there is one, so that this one hears Ctrl-C.

    Interrupted, or when a piece fails, the others stop after one plane.
    """
    waiting = iter(pieces)  # the threads share it: a step of a list's iterator is atomic
    stop = np.zeros(1, np.bool_)

    def work() -> None:
        memory = scratch()
        for piece in waiting:
            if stop[0]:
                return
            run(piece, memory, stop)

    with ThreadPoolExecutor(threads, "equikernel") as pool:
        busy = {pool.submit(work) for _ in range(threads)}
        try:
            while busy:  # with a timeout, so that Ctrl-C is heard whichever thread the signal reaches
                done, busy = wait(busy, timeout=0.2, return_when=FIRST_EXCEPTION)
                for worker in done:
                    worker.result()
        except BaseException:
            stop[0] = True
            raise
