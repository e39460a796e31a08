"""The CPU engine: orbit reduction and offset decoupling, in Numba, on all cores.

Orbit reduction: the pooled kernel of ``G`` is the mean of plain CNN kernels over rotated and mirrored
images, ``K_G(f, f') = 1/|G| Σ_{d ∈ G} K_{C_1}(f, ρ(d) f')``, and likewise Θ, because the elements map
the filters to themselves. So one pass over the elements of several groups holds the kernels of all of them.
"""

from __future__ import annotations

from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from equikernel.activations import BRANCH_POINT, Custom, Erf, Gelu, Homogeneous, Polynomial, Wave
from equikernel.engines import planes
from equikernel.engines.decoupled import factor_planes, pack, pack_bytes, useful_offsets, working_dtype
from equikernel.engines.rows import NTK_LINE
from equikernel.errors import ImageError
from equikernel.groups import Symmetry, union
from equikernel.layers import Branch, Convolution, Nonlinearity
from equikernel.pooled import Pooled, Prepared, by_group

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from equikernel.activations import Activation
    from equikernel.images import Labels
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


class Operation(NamedTuple):
    """What :class:`equikernel.engines.planes.Program` holds of one operation on a row."""

    kind: np.uint64
    place: int = 0
    terms: int = 0
    middle: float = 0.0
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Images(Prepared):
    """Images and their copies under each symmetry, packed for the inner loops.

    ``packed[element]``: ``(n, C + factors, H, W)`` in the dtype of the computation: the pixels, then the factors of
    each activation, functions of the preactivation variances.
    """

    packed: dict[Symmetry, NDArray[Any]]
    channels: int


class CpuEngine:
    """Pooled kernels of ``groups`` in ``dtype``, with ``threads`` threads, or fewer where ``memory`` is short."""

    name = "cpu"

    def __init__(
        self, network: Architecture, groups: tuple[str, ...], dtype: np.dtype[Any], threads: int, memory: int
    ) -> None:
        self.network = network
        self.groups = groups
        self.dtype = dtype
        self.threads = threads
        self.memory = memory
        self.gap = max(step.radii[1] for step in network.convolutions)
        # How close to ±1 a correlation is taken as ±1; sums over larger filters round more.
        self.branch = BRANCH_POINT * max(1, *(max(step.radii) for step in network.convolutions))

    def prepare(self, images: NDArray[Any], labels: Labels) -> Images:
        """Compute the factors of ``(n, H, W, C)`` images and pack all copies.

        Raises:
          ImageError: a row does not fit the scratch memory, or as :func:`pack`.
          NetworkError: as :func:`pack`.
        """
        widest = int(NTK_LINE) - planes.LANES - planes.ALIGNED - 4 * self.gap
        if max(images.shape[1:3]) > widest:
            raise ImageError(
                f"images are {images.shape[1]}x{images.shape[2]} pixels; with such filters the engine 'cpu' takes up "
                f"to {widest} per side; use engine='xla'"
            )
        dtype = working_dtype(self.network, images.shape[1], images.shape[2], self.dtype)
        packed, bound = pack(self.network, images, dtype, labels)
        copies = {
            element: np.ascontiguousarray(element.on_images(packed, axes=(2, 3))) for element in union(self.groups)
        }
        return Images(bound=bound, epsilon=float(np.finfo(dtype).eps), packed=copies, channels=images.shape[3])

    def image_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of one prepared image in all copies."""
        itemsize = working_dtype(self.network, height, width, self.dtype).itemsize
        return height * width * (channels + factor_planes(self.network)) * itemsize * len(union(self.groups))

    def pair_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of the scratch memory of one thread."""
        itemsize = working_dtype(self.network, height, width, self.dtype).itemsize
        program = self._program(channels, np.dtype(np.float32))
        row = width + 2 * self.gap
        longest = offsets_per_block(width, row) * row + planes.LANES
        rows = height + int(program.shift + program.halo) + 1
        images = 2 * int(program.planes) * height
        long_rows = images + 2 * rows + 2 * int(program.slots) * height + 3 + len(program.kind)
        scratch = itemsize * (longest * long_rows + planes.LINE + 2 * row)
        return max(scratch, pack_bytes(self.network, height, width, channels))

    def working_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of the scratch memory of all threads that there are memory for."""
        return self._fitting_threads(height, width, channels) * self.pair_bytes(height, width, channels)

    def _fitting_threads(self, height: int, width: int, channels: int) -> int:
        """How many threads have enough memory; at least one."""
        return max(1, min(self.threads, self.memory // self.pair_bytes(height, width, channels)))

    def _program(self, channels: int, dtype: np.dtype[Any]) -> planes.Program:
        """The network for images of ``channels`` channels, in the precision of the computation."""
        convolutions, operations, ends = _lowered(self.network.steps, channels)
        taps = [(2 * step.radii[0] + 1) * (2 * step.radii[1] + 1) for step in convolutions]
        scale = np.array([step.w2 / count for step, count in zip(convolutions, taps, strict=True)])
        scale[0] /= channels
        rounded = scale.astype(dtype)

        def whole(values: Sequence[int | np.uint64]) -> NDArray[np.uint64]:
            return np.array(values, np.uint64)

        columns = zip(*operations, strict=True)
        kind, place, terms, middle, factor = (list(column) for column in columns)
        slots = [int(p) + 1 for k, p in zip(kind, place, strict=True) if k == planes.SAVE]
        radii = [step.radii[0] for step in convolutions]
        return planes.Program(
            whole(radii),
            whole([step.radii[1] for step in convolutions]),
            rounded,
            (scale - rounded).astype(dtype),
            np.array([step.b2 for step in convolutions], dtype),
            whole(ends),
            whole(kind),
            whole(place),
            whole(terms),
            np.array(middle, dtype),
            np.array(factor, dtype),
            np.uint64(max(slots, default=0)),
            np.uint64(channels + factor_planes(self.network)),
            np.uint64(sum(radii)),
            np.uint64(max(radii)),
        )

    def pairs(
        self, block1: Images, block2: Images, rows: NDArray[np.intp], cols: NDArray[np.intp]
    ) -> dict[str, Pooled]:
        """Pooled kernels ``(p,)`` float64 of the pairs ``(block1[rows[p]], block2[cols[p]])``, by group."""
        elements = union(self.groups)
        packed1, channels = block1.packed[elements[0]], block1.channels
        totals = np.empty((len(elements), 2, len(rows)))
        height, width = packed1.shape[2:]
        threads = self._fitting_threads(height, width, channels)

        def run(piece: Piece, stop: NDArray[np.bool_]) -> None:
            which, begin, end = piece
            packed2 = block2.packed[elements[which]]
            totals[which, :, begin:end] = self._one_against(
                packed1, int(rows[begin]), packed2, cols[begin:end], channels, stop
            )

        run((0, 0, 0), np.zeros(1, np.bool_))  # no pairs: compiled here, where Ctrl-C is heard
        _in_threads(run, self._pieces(rows, len(elements), threads), threads)
        return by_group(self.groups, elements, totals)

    @staticmethod
    def _pieces(rows: NDArray[np.intp], elements: int, threads: int) -> list[Piece]:
        """Cut the pairs into pieces, a few for each thread."""
        most = -(-len(rows) * elements // (threads * TASKS_PER_THREAD))
        bounds = [0, *(np.flatnonzero(np.diff(rows)) + 1).tolist(), len(rows)]
        return [
            (which, start, min(start + most, end))
            for begin, end in pairwise(bounds)
            for start in range(begin, end, most)
            for which in range(elements)
        ]

    def _one_against(
        self,
        packed1: NDArray[Any],
        index: int,
        packed2: NDArray[Any],
        others: NDArray[np.intp],
        channels: int,
        stop: NDArray[np.bool_],
    ) -> NDArray[np.float64]:
        """Plain CNN kernels after pooling of one image against several, ``(2, len(others))``; any when stopped."""
        u = np.uint64
        height, width = packed1.shape[2:]
        margin_y, margin_x = self.network.margin
        offsets_y, offsets_x = useful_offsets(height, margin_y).astype(u), useful_offsets(width, margin_x).astype(u)
        branch = packed1.dtype.type(self.branch * np.finfo(packed1.dtype).eps)
        block = offsets_per_block(len(offsets_x), width + 2 * self.gap)
        sums = np.empty((2, len(others)))
        planes.pooled_pairs(
            self._program(channels, packed1.dtype), packed1.reshape(-1), u(index), packed2.reshape(-1),
            others.astype(u), u(height), u(width), u(channels), u(self.gap), PADDINGS[self.network.padding], offsets_y,
            offsets_x, u(block), u(margin_x), branch, stop, sums[0], sums[1],
        )  # fmt: skip
        sums /= ((height - 2 * margin_y) * (width - 2 * margin_x)) ** 2
        return sums


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
                place += step.activation.planes
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
            _, shift = activation.arc_cosine
            return Operation(planes.ARC_COSINE, place, middle=0.5 + shift / np.pi, factor=2 * activation.beta**2)
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


def _in_threads(run: Callable[[Piece, NDArray[np.bool_]], None], pieces: list[Piece], threads: int) -> None:
    """Run all pieces, in threads of their own also if there is one, so that this one hears Ctrl-C.

    Interrupted, or when a piece fails, the others stop after one plane.
    """
    waiting = iter(pieces)  # the threads share it: a step of a list's iterator is atomic
    stop = np.zeros(1, np.bool_)

    def work() -> None:
        for piece in waiting:
            if stop[0]:
                return
            run(piece, stop)

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


def offsets_per_block(offsets: int, row: int) -> int:
    """How many of ``offsets`` horizontal offsets, of ``row`` entries each, share a long row at the lowest cost."""

    def cost(block: int) -> int:
        padded = -(-block * row // planes.LANES) * planes.LANES
        return -(-offsets // block) * (padded + ROW_OVERHEAD)

    return min(range(1, max(1, min(offsets, LONGEST_ROW // row)) + 1), key=cost)
