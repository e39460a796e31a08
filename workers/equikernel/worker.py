"""The tile worker: holds one device, keeps image blocks, evaluates tiles and hands them to the store.

It knows neither Ray nor zarr: the driver makes it an actor, and the store comes in as an object.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar

from equikernel.engines.vectors import host
from equikernel.errors import EquikernelError, MemoryLimitError
from equikernel.kernel import Block, Kernel, KernelFunction, why_no_gpu

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equikernel.network import Architecture

CACHED_BLOCKS = 8
"""Prepared image blocks that a worker keeps."""

STORAGE_PAUSES = (1.0, 4.0)
"""Seconds to wait before trying again when the storage failed."""

T = TypeVar("T")

Sides: TypeAlias = tuple[tuple[str, int], tuple[str, int]]


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


class Spent(NamedTuple):
    """Seconds that a worker spends on a tile, without waiting for another tile of the same worker.

    It reads, prepares and writes while it computes another tile.
    """

    read: float
    """Loads blocks of images."""
    prepare: float
    """Checks and rotates them, and computes what each image needs on its own."""
    kernels: float
    """Computes pairs; with dense layers in the head, also the kernels of images with themselves, once for a block."""
    write: float
    """Stores the tile."""


@dataclass(frozen=True)
class TileReport:
    """What a worker says of a finished tile.

    Attributes:
      tile: the tile.
      pairs: image pairs computed.
      spent: time that it took.
      processor: the kind of processor that computed it.
    """

    tile: Any
    pairs: int
    spent: Spent
    processor: str


class TileWorker:
    """Computes tiles of one run; several threads may, one of which computes while others read, prepare and write.

    Args:
      store: where images come from and tiles go.
      network, groups, engine, dtype, threads: as in :class:`equikernel.kernel.KernelFunction`.
      size: rows and columns of the images.

    Raises:
      EquikernelError: the engine does not exist here, or cannot do this network for such images.

    Attributes:
      processor: the kind of processor that it computes on.
    """

    def __init__(
        self,
        store: TileStore,
        network: Architecture,
        groups: tuple[str, ...],
        engine: str,
        dtype: str,
        threads: int,
        size: tuple[int, int],
    ) -> None:
        self._store = store
        self._function = KernelFunction(network, groups, engine, dtype, threads)
        self._function.check_shape(*size)  # may take another engine
        self.processor = processor_kind(self._function.engine.name)
        self._blocks: OrderedDict[tuple[str, int], Block] = OrderedDict()
        self._preparing = threading.Lock()
        self._computing = threading.Lock()

    def compute(self, tile: TileLike, read: Callable[[str, int], NDArray[Any]] | None = None) -> TileReport:
        """Compute a tile and store it.

        Args:
          tile: which.
          read: returns the images of a block of a split, as :meth:`TileStore.block` does, which it replaces.

        Raises:
          EquikernelError: of the same class as the kernel's own, naming the tile and the image.
          OSError: what the store raises, after :data:`STORAGE_PAUSES`.
        """
        sides = tile_sides(tile)
        clock = _Clock()
        with clock.adding_to("read"):
            images = {side: _patiently(side, read or self._store.block) for side in self._unknown(sides)}
        try:
            with self._preparing:  # while another tile is computed
                row, col = (self._block(side, images, read or self._store.block, clock) for side in sides)
            pairs = row.count * (row.count + 1) // 2 if row is col else row.count * col.count
            end = self._begin(clock, row) if row is col else self._begin(clock, row, col)
            with clock.adding_to("kernels"):  # while the device computes another tile
                kernels = end()
        except EquikernelError as error:
            with self._computing:
                for split, index in sides:
                    self._blame(tile, split, index)
            raise type(error)(f"tile {tile}: {error}") from None
        with clock.adding_to("write"):
            _patiently((tile, kernels), self._store.write_tile)
        return TileReport(tile, pairs, Spent(**clock.seconds), self.processor)

    def _unknown(self, sides: Sides) -> list[tuple[str, int]]:
        """The blocks that are not prepared yet, each once."""
        return [side for side in dict.fromkeys(sides) if side not in self._blocks]

    def _block(
        self,
        side: tuple[str, int],
        images: Mapping[tuple[str, int], NDArray[Any]],
        read: Callable[[str, int], NDArray[Any]],
        clock: _Clock,
    ) -> Block:
        if side not in self._blocks:
            with clock.adding_to("read"):
                found = images[side] if side in images else _patiently(side, read)  # forgotten since
            with clock.adding_to("prepare"):
                self._blocks[side] = self._prepare(found)
        self._blocks.move_to_end(side)
        while len(self._blocks) > CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        return self._blocks[side]

    def _prepare(self, images: NDArray[Any]) -> Block:
        try:
            return self._function.prepare(images)
        except MemoryLimitError:
            self._blocks.clear()  # a GPU may have no room for so many
            with self._computing:  # nor for these beside a tile that is computed
                return self._function.prepare(images)

    def _begin(self, clock: _Clock, *blocks: Block) -> Callable[[], dict[str, Kernel]]:
        try:
            with self._computing, clock.adding_to("kernels"):
                return self._function.begin(*blocks)
        except MemoryLimitError:
            with self._preparing:
                self._blocks.clear()  # a GPU may have no room for the sums beside so many
            with self._computing, clock.adding_to("kernels"):
                return self._function.begin(*blocks)

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


class _Clock:
    """Adds up the time that is spent on a tile."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(Spent._fields, 0.0)

    @contextlib.contextmanager
    def adding_to(self, what: str) -> Iterator[None]:
        """Add the time of a ``with`` block to one field of :class:`Spent`."""
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start


def tile_sides(tile: TileLike) -> Sides:
    """The split and the block of the images along the rows and the columns of a tile."""
    return ("test" if tile.part == "cross" else "train", tile.row), ("train", tile.col)


def _patiently(arguments: tuple[Any, ...], action: Callable[..., T]) -> T:
    """What ``action`` returns, tried again after a while where the storage fails."""
    for pause in STORAGE_PAUSES:
        try:
            return action(*arguments)
        except OSError:
            time.sleep(pause)
    return action(*arguments)


def processor_kind(engine: str = "cpu") -> str:
    """The kind of processor on which an engine computes: within one kind and version, tiles have the same bits."""
    if engine == "gpu" and not why_no_gpu():
        from equikernel.engines.gpu_device import device

        return device().kind
    if engine in ("gpu", "xla", "general"):
        from equikernel.engines.device import device_kind

        if gpu := device_kind():
            return gpu
    return host().kind


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
