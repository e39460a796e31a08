"""The tile worker: holds one device, keeps image blocks, evaluates tiles and hands them to the store.

It knows neither Ray nor zarr: the driver makes it an actor, and the store comes in as an object.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import llvmlite.binding

from equikernel.errors import EquikernelError
from equikernel.kernel import Block, Kernel, KernelFunction

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equikernel.network import Architecture

CACHED_BLOCKS = 8
"""Prepared image blocks that a worker keeps."""

STORAGE_PAUSES = (1.0, 4.0)
"""Seconds to wait before trying again when the storage failed."""

T = TypeVar("T")


class TileLike(Protocol):
    """A block of the train matrix (``part == "gram"``) or of the test matrix (``"cross"``)."""

    @property
    def part(self) -> str: ...  # noqa: D102
    @property
    def row(self) -> int: ...  # noqa: D102
    @property
    def col(self) -> int: ...  # noqa: D102


class TileStore(Protocol):
    """What a worker needs of the run store."""

    def block(self, split: Any, index: int) -> NDArray[Any]:
        """Images ``(b, H, W, C)`` of one block of a split."""

    def describe_image(self, split: Any, block: int, offset: int) -> str:
        """What to call an image of a block in errors."""

    def write_tile(self, tile: Any, kernels: dict[str, Kernel]) -> None:
        """Store a finished tile."""


@dataclass(frozen=True)
class TileReport:
    """What a worker says of a finished tile.

    Attributes:
      tile: the tile.
      pairs: image pairs computed.
      seconds: time for reading, computing and writing.
      processor: the kind of processor that computed it.
    """

    tile: Any
    pairs: int
    seconds: float
    processor: str


class TileWorker:
    """Computes tiles of one run.

    Args:
      store: where images come from and tiles go.
      network, groups, engine, dtype, threads: as in :class:`equikernel.kernel.KernelFunction`.
    """

    def __init__(
        self, store: TileStore, network: Architecture, groups: tuple[str, ...], engine: str, dtype: str, threads: int
    ) -> None:
        self._store = store
        self._function = KernelFunction(network, groups, engine, dtype, threads)
        self._blocks: OrderedDict[tuple[str, int], Block] = OrderedDict()

    def ready(self) -> bool:
        """Whether the worker has started: answers when it has."""
        return True

    def compute(self, tile: TileLike) -> TileReport:
        """Compute a tile and store it.

        Raises:
          EquikernelError: of the same class as the kernel's own, naming the tile and the image.
          OSError: what the store raises, after :data:`STORAGE_PAUSES`.
        """
        start = time.perf_counter()
        sides = [("test" if tile.part == "cross" else "train", tile.row), ("train", tile.col)]
        try:
            row = self._block(*sides[0])
            if sides[0] == sides[1]:
                pairs = row.count * (row.count + 1) // 2
                kernels = self._function(row)
            else:
                col = self._block(*sides[1])
                pairs = row.count * col.count
                kernels = self._function(row, col)
        except EquikernelError as error:
            for split, index in sides:
                self._blame(tile, split, index)
            raise type(error)(f"tile {tile}: {error}") from None
        _patiently(lambda: self._store.write_tile(tile, kernels))
        return TileReport(tile, pairs, time.perf_counter() - start, processor_kind())

    def _block(self, split: str, index: int) -> Block:
        key = (split, index)
        if key not in self._blocks:
            self._blocks[key] = self._function.prepare(_patiently(lambda: self._store.block(split, index)))
        self._blocks.move_to_end(key)
        while len(self._blocks) > CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        return self._blocks[key]

    def _blame(self, tile: TileLike, split: str, index: int) -> None:
        """Raise an error that names the first image of a block that has no kernel with itself, if there is one.

        A kernel that is finite for an image and itself is finite between such images.
        """
        for offset, image in enumerate(self._store.block(split, index)):
            try:
                self._function(self._function.prepare(image[None], "the image"))
            except EquikernelError as error:
                name = self._store.describe_image(split, index, offset)
                raise type(error)(f"tile {tile}, {name}: {error}") from None


def _patiently(action: Callable[[], T]) -> T:
    """What ``action`` returns, tried again after a while where the storage fails."""
    for pause in STORAGE_PAUSES:
        try:
            return action()
        except OSError:
            time.sleep(pause)
    return action()


def processor_kind() -> str:
    """The kind of processor: within one kind and version, tiles have the same bits."""
    return str(llvmlite.binding.get_host_cpu_name())


def measure_pair_seconds(
    network: Architecture,
    groups: tuple[str, ...],
    engine: str,
    dtype: str,
    threads: int,
    images: NDArray[Any],
) -> float:
    """Seconds that one pair of ``images`` ``(n, H, W, C)`` takes with ``threads`` threads, after compiling.

    The first and the last image are used over and over: the cost of a pair does not depend on what is in the images.
    """
    function = KernelFunction(network, groups, engine, dtype, threads)
    one = function.prepare(images[-1:])
    count = threads
    while True:
        many = function.prepare(images[:1].repeat(count, axis=0))
        seconds = math.inf
        for _ in range(2):  # the first time, code for this number of pairs may be compiled
            start = time.perf_counter()
            function(many, one)
            seconds = min(seconds, time.perf_counter() - start)
        if seconds > 0.05 or count > 10_000:
            return seconds / count
        count *= 4
