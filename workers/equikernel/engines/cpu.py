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
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from equikernel.activations import BRANCH_POINT, Custom, Erf, Gelu, Homogeneous, Polynomial, Wave
from equikernel.engines import planes
from equikernel.engines.decoupled import image_constants, refuse_overflow, working_dtype
from equikernel.engines.rows import NTK_LINE
from equikernel.errors import ImageError
from equikernel.groups import Symmetry, symmetries, union
from equikernel.layers import Branch, Convolution, Nonlinearity
from equikernel.recursion import Pooled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from equikernel.activations import Activation
    from equikernel.layers import Step
    from equikernel.network import Architecture

Piece: TypeAlias = tuple[int, int, int]
"""``(place of the element, start, stop)`` of pairs with one first image."""

PADDINGS = {"SAME": planes.SAME, "VALID": planes.VALID, "CIRCULAR": planes.CIRCULAR}

LONGEST_ROW = 640
"""Entries of a long row at most, so that the planes and images of one block of offsets stay in the L2 cache."""

ROW_OVERHEAD = 64
"""Cost of starting a row, in entries."""

TASKS_PER_THREAD = 8
"""Pieces that the work of a call is cut into, per thread, so that all threads end together."""

ENTRY_SECONDS = 2e-9
"""Rough time of one thread for one entry of one plane and layer."""

PIECE_SECONDS = 0.3
"""Time that a piece takes at most, roughly, unless it is a single pair: an interrupted call ends after so long."""


class Operation(NamedTuple):
    """What :class:`equikernel.engines.planes.Program` holds of one operation on a row."""

    kind: np.uint64
    place: int = 0
    terms: int = 0
    middle: float = 0.0
    factor: float = 1.0


@dataclass(frozen=True)
class Prepared:
    """Images and their copies under each symmetry, packed for the inner loops.

    ``packed[element]``: ``(n, C + factors, H, W)`` in the dtype of the computation: the pixels, then the factors of
    each activation, functions of the preactivation variances.
    """

    packed: dict[Symmetry, NDArray[Any]]
    channels: int
    bound: NDArray[np.float64]
    """``(mean over t of √K(t,t))²`` at the end, ``(n,)``."""


class CpuEngine:
    """Pooled kernels of ``groups`` in ``dtype``, with ``threads`` threads."""

    name = "cpu"

    def __init__(self, network: Architecture, groups: tuple[str, ...], dtype: np.dtype[Any], threads: int) -> None:
        self.network = network
        self.groups = groups
        self.dtype = dtype
        self.threads = threads
        self.gap = max(step.radii[1] for step in network.convolutions)
        # How close to ±1 a correlation is taken as ±1; sums over larger filters round more.
        self.branch = BRANCH_POINT * max(1, *(max(step.radii) for step in network.convolutions))

    def prepare(self, images: NDArray[Any], first: int = 0) -> Prepared:
        """Compute the factors of ``(n, H, W, C)`` images and pack all copies.

        Raises:
          ImageError: a row does not fit the scratch memory, or an image's kernel with itself overflows the dtype.
          NetworkError: an activation has no second moment.
        """
        widest = int(NTK_LINE) - planes.LANES - 4 * self.gap
        if max(images.shape[1:3]) > widest:
            raise ImageError(
                f"images are {images.shape[1]}x{images.shape[2]} pixels; the cpu engine takes up to {widest} per side"
            )
        dtype = working_dtype(self.network, images.shape[1], images.shape[2], self.dtype)
        constants, bound = image_constants(self.network, images)
        layers = [np.stack(factors, axis=1).astype(dtype) for factors in constants]
        packed = np.concatenate([images.transpose(0, 3, 1, 2).astype(dtype, copy=False), *layers], axis=1)
        refuse_overflow(packed, dtype, first)
        copies = {
            element: np.ascontiguousarray(element.on_images(packed, axes=(2, 3))) for element in union(self.groups)
        }
        return Prepared(copies, images.shape[3], bound)

    def pooled_bound(self, block: Prepared) -> NDArray[np.float64]:
        """``(mean over t of √K(t,t))²`` after the last step, ``(n,)``."""
        return block.bound

    def epsilon(self, block: Prepared) -> float:
        """The machine epsilon of the computation."""
        return float(np.finfo(next(iter(block.packed.values())).dtype).eps)

    def image_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of one prepared image in all copies, and of what preparing it takes."""
        itemsize = working_dtype(self.network, height, width, self.dtype).itemsize
        factors = self._factor_planes()
        return height * width * ((channels + factors) * itemsize * (len(union(self.groups)) + 2) + 8 * factors)

    def pair_bytes(self, height: int, width: int) -> int:
        """Bytes of the scratch memory of all threads, for images of up to four channels."""
        itemsize = working_dtype(self.network, height, width, self.dtype).itemsize
        program = self._program(4, np.dtype(np.float32))
        row = width + 2 * self.gap
        longest = offsets_per_block(width, row) * row + planes.LANES
        rows = height + int(program.radius_y.sum() + program.radius_y.max()) + 1
        images = 2 * int(program.planes) * height
        return self.threads * longest * itemsize * (images + 2 * rows + 2 * int(program.slots) * height)

    def _factor_planes(self) -> int:
        """Factors of all activations of an image."""
        return sum(len(activation.factors(np.ones(1))) for activation in self.network.activations)

    def _program(self, channels: int, dtype: np.dtype[Any]) -> planes.Program:
        """The network for images of ``channels`` channels, in the precision of the computation."""
        convolutions, operations, ends = _lowered(self.network.steps, channels)
        taps = [(2 * step.radii[0] + 1) * (2 * step.radii[1] + 1) for step in convolutions]
        scale = [step.w2 / count for step, count in zip(convolutions, taps, strict=True)]
        scale[0] /= channels

        def whole(values: Sequence[int | np.uint64]) -> NDArray[np.uint64]:
            return np.array(values, np.uint64)

        columns = zip(*operations, strict=True)
        kind, place, terms, middle, factor = (list(column) for column in columns)
        slots = [int(p) + 1 for k, p in zip(kind, place, strict=True) if k == planes.SAVE]
        return planes.Program(
            whole([step.radii[0] for step in convolutions]),
            whole([step.radii[1] for step in convolutions]),
            np.array(scale, dtype),
            np.array([step.b2 for step in convolutions], dtype),
            whole(ends),
            whole(kind),
            whole(place),
            whole(terms),
            np.array(middle, dtype),
            np.array(factor, dtype),
            np.uint64(max(slots, default=0)),
            np.uint64(channels + self._factor_planes()),
        )

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
        by_time = int(
            PIECE_SECONDS / (ENTRY_SECONDS * len(self.network.convolutions) * float(shape[0] * shape[1]) ** 2)
        )
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
        u = np.uint64
        height, width = packed1.shape[2:]
        margin_y, margin_x = self.network.margin
        offsets_y, offsets_x = _useful_offsets(height, margin_y), _useful_offsets(width, margin_x)
        branch = packed1.dtype.type(self.branch * np.finfo(packed1.dtype).eps)
        block = offsets_per_block(len(offsets_x), width + 2 * self.gap)
        sums_k, sums_theta = np.empty(len(others)), np.empty(len(others))
        planes.pooled_pairs(
            self._program(channels, packed1.dtype), packed1.reshape(-1), u(index), packed2.reshape(-1),
            others.astype(u), u(height), u(width), u(channels), u(self.gap), PADDINGS[self.network.padding], offsets_y,
            offsets_x, u(block), u(margin_x), branch, sums_k, sums_theta,
        )  # fmt: skip
        pixel_pairs = ((height - 2 * margin_y) * (width - 2 * margin_x)) ** 2
        return sums_k / pixel_pairs, sums_theta / pixel_pairs


def _lowered(steps: tuple[Step, ...], place: int) -> tuple[list[Convolution], list[Operation], list[int]]:
    """The convolutions, the operations on a row, and where those after each convolution end.

    Args:
      steps: of the network.
      place: the plane of the first factor.
    """
    convolutions: list[Convolution] = []
    operations: list[Operation] = []
    ends: list[int] = []

    def run(steps: tuple[Step, ...], slot: int) -> None:
        nonlocal place
        for step in steps:
            fresh = bool(convolutions) and len(operations) == (ends[-1] if ends else 0)
            if isinstance(step, Convolution):
                if fresh:
                    operations.append(Operation(planes.IDENTITY))
                if convolutions:
                    ends.append(len(operations))
                convolutions.append(step)
            elif isinstance(step, Nonlinearity):
                operations.append(_operation(step.activation, place))
                place += len(step.activation.factors(np.ones(1)))
            elif isinstance(step, Branch):
                if fresh:
                    operations.append(Operation(planes.IDENTITY))
                operations.append(Operation(planes.SAVE, slot))
                run(step.steps, slot + 1)
                if len(operations) == ends[-1]:
                    operations.append(Operation(planes.IDENTITY))
                operations.append(Operation(planes.ADD, slot))

    run(steps, 0)
    if len(operations) == (ends[-1] if ends else 0) or operations[-1].kind == planes.ADD:
        operations.append(Operation(planes.IDENTITY))
    return convolutions, operations, [*ends, len(operations)]


def _operation(activation: Activation, place: int) -> Operation:
    match activation:
        case Homogeneous(_, _, 0.0):
            return Operation(planes.IDENTITY)
        case Homogeneous():
            factor, shift = activation.arc_cosine
            return Operation(planes.ARC_COSINE, place, 0, np.pi / 2 + shift, factor)
        case Erf():
            return Operation(planes.ERF, place, factor=2 / np.pi)
        case Gelu():
            return Operation(planes.GELU, place)
        case Wave(name):
            return Operation(planes.SIN if name == "sin" else planes.COS, place)
        case Polynomial(_, degree):
            return Operation(planes.ODD if degree % 2 else planes.EVEN, place)
        case Custom(_, nodes):
            return Operation(planes.SERIES, place, nodes)
    raise NotImplementedError(f"the activation {activation} has no row loop")


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
