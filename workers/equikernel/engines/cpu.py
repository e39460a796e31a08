"""The CPU engine: orbit reduction and offset decoupling, in Numba, on all cores.

Orbit reduction: the pooled kernel of ``G`` is the mean of plain CNN kernels over rotated and mirrored
images, ``K_G(f, f') = 1/|G| Σ_{d ∈ G} K_{C_1}(f, ρ(d) f')``, and likewise Θ, because square filters are mapped to
themselves. So one pass over the elements of the largest group holds the kernels of all its subgroups.
"""

from __future__ import annotations

from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from threading import Event
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from equikernel.activations import BRANCH_POINT, DUALS
from equikernel.engines import planes
from equikernel.errors import ImageError
from equikernel.groups import Symmetry, symmetries, union
from equikernel.recursion import Pooled

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from equikernel.network import Architecture

Piece: TypeAlias = tuple[int, int, int]
"""``(place of the element, start, stop)`` of pairs with one first image."""

PADDINGS = {"SAME": planes.SAME, "VALID": planes.VALID, "CIRCULAR": planes.CIRCULAR}
ACTIVATIONS = {"relu": (planes.RELU, 1 / (2 * np.pi)), "erf": (planes.ERF, 2 / np.pi)}

LONGEST_ROW = 640
"""Entries of a long row at most, so that the planes and images of one block of offsets stay in the L2 cache."""

ROW_OVERHEAD = 64
"""Cost of starting a row, in entries."""

FLOAT64_PIXELS = 36
"""Images of up to so many pixels, and networks of 1x1 filters, are computed in float64 for any dtype of the result:
nothing averages there, so float32 would lose up to half of its digits near ``c = ±1``."""

TASKS_PER_THREAD = 8
"""Pieces that the work of a call is cut into, per thread, so that all threads end together."""

ENTRY_SECONDS = 2e-9
"""Rough time of one thread for one entry of one plane and layer."""

PIECE_SECONDS = 0.3
"""Time that a piece takes at most, roughly, unless it is a single pair: an interrupted call ends after so long."""


@dataclass(frozen=True)
class Prepared:
    """Images and their copies under each symmetry, packed for the inner loops.

    ``packed[element]``: ``(n, C + 2 depth, H, W)`` in the dtype of the computation: the pixels, then for each
    convolution ``√q`` (for erf ``1/√(1+2q)``) and ``1/√q`` of its preactivation variances ``q``.
    """

    packed: dict[Symmetry, NDArray[Any]]
    channels: int
    bound: NDArray[np.float64]
    """``(mean over t of √K(t,t))²`` after the last activation, ``(n,)``."""


class CpuEngine:
    """Pooled kernels of ``groups`` in ``dtype``, with ``threads`` threads."""

    def __init__(self, network: Architecture, groups: tuple[str, ...], dtype: np.dtype[Any], threads: int) -> None:
        self.network = network
        self.groups = groups
        self.dtype = dtype
        self.threads = threads

    def prepare(self, images: NDArray[Any]) -> Prepared:
        """Compute the preactivation variances of ``(n, H, W, C)`` images and pack all copies.

        Raises:
          ImageError: a row does not fit the scratch memory, or an image's kernel with itself overflows the dtype.
        """
        widest = int(planes.NTK_LINE) - planes.LANES - 4 * self.network.radius
        if max(images.shape[1:3]) > widest:
            raise ImageError(
                f"images are {images.shape[1]}x{images.shape[2]} pixels; the cpu engine takes up to {widest} per side"
            )
        delicate = images.shape[1] * images.shape[2] <= FLOAT64_PIXELS or self.network.filter_size == 1
        dtype = np.dtype(np.float64) if delicate else self.dtype
        pixels = images.transpose(0, 3, 1, 2).astype(dtype, copy=False)
        factors = [pixels]
        q = np.square(images, dtype=np.float64).sum(axis=3) / images.shape[3]
        dual = DUALS[self.network.activation]
        for _ in range(self.network.depth):
            q = self.network.w_std**2 * self._box_mean(q) + self.network.b_std**2
            root = np.sqrt(q)
            inverse = np.divide(1, root, out=np.zeros_like(root), where=root > 0)
            scale = 1 / np.sqrt(1 + 2 * q) if self.network.activation == "erf" else root
            factors += [scale[:, None].astype(dtype), inverse[:, None].astype(dtype)]
            q = dual(q, q, q)[0]
        packed = np.concatenate(factors, axis=1)
        if not np.isfinite(packed).all():
            index = int(np.argmin(np.isfinite(packed).all(axis=(1, 2, 3))))
            raise ImageError(
                f"the kernel of image {index} with itself leaves the range of {dtype.name}; rescale the "
                "images, change w_std or depth, or use float64"
            )
        copies = {
            element: np.ascontiguousarray(element.on_images(packed, axes=(2, 3))) for element in union(self.groups)
        }
        inner = slice(self.network.margin, -self.network.margin or None)
        return Prepared(copies, images.shape[3], np.sqrt(q[:, inner, inner]).mean(axis=(1, 2)) ** 2)

    def pooled_bound(self, block: Prepared) -> NDArray[np.float64]:
        """``(mean over t of √K(t,t))²`` after the last activation, ``(n,)``."""
        return block.bound

    def epsilon(self, block: Prepared) -> float:
        """The machine epsilon of the computation."""
        return float(np.finfo(next(iter(block.packed.values())).dtype).eps)

    def pairs(
        self, block1: Prepared, block2: Prepared, rows: NDArray[np.intp], cols: NDArray[np.intp]
    ) -> dict[str, Pooled]:
        """Pooled kernels ``(p,)`` float64 of the pairs ``(block1[rows[p]], block2[cols[p]])``, by group."""
        elements = union(self.groups)
        k = np.empty((len(elements), len(rows)))
        theta = np.empty_like(k)
        pieces = self._pieces(rows, len(elements), block1.packed[elements[0]].shape[2:])

        def run(piece: Piece) -> None:
            which, start, stop = piece
            result = self._one_against(
                block1.packed[elements[0]],
                int(rows[start]),
                block2.packed[elements[which]],
                cols[start:stop],
                block1.channels,
            )
            k[which, start:stop], theta[which, start:stop] = result

        _in_threads(run, pieces, self.threads)
        results = {}
        for group in self.groups:
            members = [elements.index(element) for element in symmetries(group)]
            results[group] = Pooled(k[members].mean(axis=0), theta[members].mean(axis=0))
        return results

    def _pieces(self, rows: NDArray[np.intp], elements: int, shape: tuple[int, int]) -> list[Piece]:
        """Cut the pairs into pieces of bounded time, a few for each thread."""
        by_threads = -(-len(rows) * elements // (self.threads * TASKS_PER_THREAD))
        by_time = int(PIECE_SECONDS / (ENTRY_SECONDS * self.network.depth * float(shape[0] * shape[1]) ** 2))
        most = max(1, min(by_threads, by_time))
        bounds = [0, *(np.flatnonzero(np.diff(rows)) + 1).tolist(), len(rows)]
        return [
            (which, start, min(start + most, end))
            for begin, end in pairwise(bounds)
            for start in range(begin, end, most)
            for which in range(elements)
        ]

    def _one_against(
        self, packed1: NDArray[Any], index: int, packed2: NDArray[Any], others: NDArray[np.intp], channels: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Plain CNN kernels after pooling of one image against several: ``(len(others),)`` each."""
        network, u = self.network, np.uint64
        scalar = packed1.dtype.type
        # How close to ±1 a correlation is taken as ±1; sums over larger filters round more.
        branch = BRANCH_POINT * max(1, network.radius) * float(np.finfo(packed1.dtype).eps)
        height, width = packed1.shape[2:]
        activation, factor = ACTIVATIONS[network.activation]
        offsets_x = _useful_offsets(width, network.margin)
        sums_k, sums_theta = np.empty(len(others)), np.empty(len(others))
        planes.pooled_pairs(
            packed1.reshape(-1), u(index), packed2.reshape(-1), others.astype(u), u(height), u(width), u(channels),
            u(network.depth), u(network.radius), PADDINGS[network.padding], activation,
            _useful_offsets(height, network.margin), offsets_x,
            u(offsets_per_block(len(offsets_x), width + 2 * network.radius)), u(network.margin),
            scalar(network.w_std**2), scalar(network.b_std**2), scalar(factor), scalar(branch),
            sums_k, sums_theta,
        )  # fmt: skip
        pixel_pairs = ((height - 2 * network.margin) * (width - 2 * network.margin)) ** 2
        return sums_k / pixel_pairs, sums_theta / pixel_pairs

    def _box_mean(self, q: NDArray[np.float64]) -> NDArray[np.float64]:
        """The mean of ``(n, H, W)`` over the filter support, beyond the border zeros or the opposite side.

        For VALID padding the border keeps the zero-padded values, which no surviving pixel reads.
        """
        radius = self.network.radius
        mode = "wrap" if self.network.padding == "CIRCULAR" else "constant"
        padded = np.pad(q, ((0, 0), (radius, radius), (radius, radius)), mode=mode)  # type: ignore[call-overload]
        side = self.network.filter_size
        rows = sum(padded[:, v : v + q.shape[1]] for v in range(side))
        total: NDArray[np.float64] = sum(rows[:, :, v : v + q.shape[2]] for v in range(side))
        return total / side**2


def _in_threads(run: Callable[[Piece], None], pieces: list[Piece], threads: int) -> None:
    """Run all pieces. Interrupted, or when one fails, no further piece is begun."""
    threads = min(threads, len(pieces))
    if threads <= 1:
        for piece in pieces:
            run(piece)
        return
    waiting = iter(pieces)  # the threads share it: a step of a list's iterator is atomic
    stop = Event()

    def work() -> None:
        for piece in waiting:
            if stop.is_set():
                return
            run(piece)

    with ThreadPoolExecutor(threads, "equikernel") as pool:
        busy = {pool.submit(work) for _ in range(threads)}
        try:
            while busy:  # with a timeout, so that Ctrl-C is heard whichever thread the signal reaches
                done, busy = wait(busy, timeout=0.2, return_when=FIRST_EXCEPTION)
                for worker in done:
                    worker.result()
        except BaseException:
            stop.set()
            raise


def offsets_per_block(offsets: int, row: int) -> int:
    """How many of ``offsets`` horizontal offsets, of ``row`` entries each, share a long row at the lowest cost."""

    def cost(block: int) -> int:
        padded = -(-block * row // planes.LANES) * planes.LANES
        return -(-offsets // block) * (padded + ROW_OVERHEAD)

    return min(range(1, max(1, min(offsets, LONGEST_ROW // row)) + 1), key=cost)


def _useful_offsets(side: int, margin: int) -> NDArray[np.uint64]:
    """Offsets modulo ``side`` with a segment longer than ``2 margin``: those with pixel pairs left by VALID padding."""
    return np.array([d for d in range(side) if max(side - d, d) > 2 * margin], dtype=np.uint64)
