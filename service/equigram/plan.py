"""Tiles: how the Gram matrices are cut, which tiles are missing, and what a run will cost. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equigram.spec import Pass

Part = Literal["gram", "cross"]
SplitName = Literal["train", "test"]

TILE_SECONDS = 15.0
"""Time that one tile takes at most, as predicted from the cost of a pair."""

TILES_PER_WORKER = 8
"""Tiles per worker at least, so that all workers end together."""

MORE_TILES_PER_WORKER = 64
"""Tiles per worker where they are worth it: the end, when some workers have nothing to do, is then half a percent."""

WORTH_SECONDS = 1.0
"""Time that a tile takes at least, where there could be fewer."""

DRIVER_SECONDS = 0.004
"""Time between two tiles at least, where there could be fewer: the driver is then busy for less than half of it."""

STRIP = 4
"""Tiles of a strip: neighbours in a column, which share the images along it."""

SMALLEST_TILE, LARGEST_TILE = 8, 1024
"""Edge of a tile at most: 4 MiB per chunk in float32."""


@dataclass(frozen=True, order=True)
class Tile:
    """A block of one of the two matrices, the unit of work, of writing and of resuming; its only identity.

    Attributes:
      part: ``"gram"``, the ``(n, n)`` train matrix, of which ``row <= col`` are computed, or ``"cross"``, ``(m, n)``.
      row, col: block indices; the tile holds images ``row · edge`` to ``(row + 1) · edge`` against likewise ``col``.
    """

    part: Part
    row: int
    col: int

    def __str__(self) -> str:
        return f"{self.part}[{self.row}, {self.col}]"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The tile of such a text; ``None`` where it is none.

        >>> Tile.parse("gram[0, 1]")
        Tile(part='gram', row=0, col=1)
        """
        match = re.fullmatch(r"(gram|cross)\[(\d+), (\d+)\]", text)
        return None if match is None else cls("gram" if match[1] == "gram" else "cross", int(match[2]), int(match[3]))


@dataclass(frozen=True)
class Tiling:
    """The tiles of ``n`` training and ``m`` test images with tiles of ``edge`` images.

    >>> [str(tile) for tile in Tiling(train=3, test=1, edge=2).tiles()]
    ['gram[0, 0]', 'gram[0, 1]', 'gram[1, 1]', 'cross[0, 0]', 'cross[0, 1]']
    """

    train: int
    test: int
    edge: int

    @property
    def train_blocks(self) -> int:
        """Blocks along the training images."""
        return -(-self.train // self.edge)

    @property
    def test_blocks(self) -> int:
        """Blocks along the test images."""
        return -(-self.test // self.edge)

    def tiles(self) -> Iterator[Tile]:
        """All tiles, lazily: the upper triangle of the train matrix row by row, then the test matrix."""
        for row in range(self.train_blocks):
            for col in range(row, self.train_blocks):
                yield Tile("gram", row, col)
        for row in range(self.test_blocks):
            for col in range(self.train_blocks):
                yield Tile("cross", row, col)

    def __len__(self) -> int:
        return self.train_blocks * (self.train_blocks + 1) // 2 + self.test_blocks * self.train_blocks

    def rows(self, tile: Tile) -> range:
        """The images along the rows of a tile: test images for ``cross``, else training images."""
        return _block(tile.row, self.edge, self.test if tile.part == "cross" else self.train)

    def cols(self, tile: Tile) -> range:
        """The training images along the columns of a tile."""
        return _block(tile.col, self.edge, self.train)

    def train_images(self, block: int) -> slice:
        """The training images of a block."""
        return slice(block * self.edge, min((block + 1) * self.edge, self.train))

    def pairs(self, tile: Tile) -> int:
        """Image pairs that are computed for a tile; on the diagonal each pair once."""
        rows, cols = len(self.rows(tile)), len(self.cols(tile))
        return rows * (rows + 1) // 2 if is_diagonal(tile) else rows * cols

    @property
    def total_pairs(self) -> int:
        """Image pairs of all tiles together."""
        return self.train * (self.train + 1) // 2 + self.test * self.train

    def chunks(self, tile: Tile) -> tuple[tuple[int, int], ...]:
        """The chunks of its matrix that a tile fills: itself and, off the diagonal of ``gram``, its transpose."""
        if tile.part == "cross" or is_diagonal(tile):
            return ((tile.row, tile.col),)
        return (tile.row, tile.col), (tile.col, tile.row)

    def shape(self, part: Part) -> tuple[int, int]:
        """Rows and columns of a matrix, in images."""
        return self.test if part == "cross" else self.train, self.train

    def blocks(self, part: Part) -> tuple[int, int]:
        """Rows and columns of a matrix, in tiles."""
        return self.test_blocks if part == "cross" else self.train_blocks, self.train_blocks

    def strips(self, done: Collection[Tile] = ()) -> Iterator[list[Tile]]:
        """The tiles that are not in ``done``, lazily, in the order of computation: strips of a column of tiles.

        Whoever computes a strip needs the images of its column once, and those of few rows for many strips.

        >>> [[str(tile) for tile in strip] for strip in Tiling(train=3, test=0, edge=1).strips()]
        [['gram[0, 0]'], ['gram[0, 1]', 'gram[1, 1]'], ['gram[0, 2]', 'gram[1, 2]', 'gram[2, 2]']]
        """
        parts: tuple[Part, Part] = ("gram", "cross")
        for part in parts:
            rows, cols = self.blocks(part)
            for top in range(0, rows, STRIP):
                for col in range(top if part == "gram" else 0, cols):
                    bottom = min(top + STRIP, col + 1 if part == "gram" else rows, rows)
                    strip = [tile for row in range(top, bottom) if (tile := Tile(part, row, col)) not in done]
                    if strip:
                        yield strip

    def partial(self, split: SplitName) -> Iterator[Tile]:
        """The tiles of which the last, partial block of a split is a side; none where that block is full."""
        if (self.test if split == "test" else self.train) % self.edge:
            last = (self.test_blocks if split == "test" else self.train_blocks) - 1
            for tile in self.tiles():
                if split == "test":
                    touched = tile.part == "cross" and tile.row == last
                else:
                    touched = tile.col == last or (tile.part == "gram" and tile.row == last)
                if touched:
                    yield tile

    def missing(self, done: Collection[Tile]) -> Iterator[Tile]:
        """The tiles that are not in ``done``, lazily and in order."""
        return (tile for tile in self.tiles() if tile not in done)


class TileSet(Set[Tile]):
    """Some tiles of a tiling, at a byte for each that there is: 10⁸ tiles take 200 MB.

    Args:
      tiling: the tiling.
      filled: for each matrix whether ``(row, col)`` is there: for the train matrix a tile needs both of its chunks.
    """

    def __init__(self, tiling: Tiling, filled: Mapping[Part, NDArray[np.bool_]]) -> None:
        self._tiling = tiling
        self._held = {part: mask & mask.T if part == "gram" else mask for part, mask in filled.items()}

    @classmethod
    def _from_iterable(cls, tiles: Iterable[Tile]) -> Set[Tile]:  # type: ignore[override]
        return frozenset(tiles)

    def __contains__(self, tile: object) -> bool:
        mask = self._held.get(tile.part) if isinstance(tile, Tile) else None
        return mask is not None and isinstance(tile, Tile) and bool(mask[tile.row, tile.col])

    def __iter__(self) -> Iterator[Tile]:
        for part, mask in self._held.items():
            for row, held in enumerate(mask):
                first = row if part == "gram" else 0
                for col in np.flatnonzero(held[first:]):
                    yield Tile(part, row, first + int(col))

    def __len__(self) -> int:
        return sum(self._count(part) for part in self._held)

    def _count(self, part: Part) -> int:
        mask = self._held[part]
        every = int(np.count_nonzero(mask))
        return (every + int(np.count_nonzero(mask.diagonal()))) // 2 if part == "gram" else every

    @property
    def pairs(self) -> int:
        """Image pairs that are computed for these tiles."""
        total = 0
        for part, mask in self._held.items():
            rows, cols = (
                np.array([len(_block(index, self._tiling.edge, count)) for index in range(blocks)], dtype=np.int64)
                for blocks, count in zip(mask.shape, self._tiling.shape(part), strict=True)
            )
            every = sum(int(cols[held].sum()) * int(row) for row, held in zip(rows, mask, strict=True))
            # Of the train matrix both triangles were counted, and one of the diagonal is still lacking.
            total += (every + int(rows[mask.diagonal()].sum())) // 2 if part == "gram" else every
        return total

    @property
    def chunks(self) -> int:
        """Chunks of one train and one test matrix that these tiles fill."""
        return sum(int(np.count_nonzero(mask)) for mask in self._held.values())


def is_diagonal(tile: Tile) -> bool:
    """Whether a tile lies on the diagonal of the train matrix."""
    return tile.part == "gram" and tile.row == tile.col


def row_split(part: Part) -> SplitName:
    """The images along the rows of a matrix; along its columns are always the training images."""
    return "test" if part == "cross" else "train"


def tile_of(part: Part, row: int, col: int) -> Tile:
    """The tile that fills a chunk."""
    return Tile(part, row, col) if part == "cross" else Tile(part, min(row, col), max(row, col))


def _block(index: int, edge: int, count: int) -> range:
    return range(index * edge, min((index + 1) * edge, count))


def choose_edge(train: int, test: int, seconds_per_pair: float, workers: int) -> int:
    """The edge of a tile: at most :data:`TILE_SECONDS` of work, and :data:`TILES_PER_WORKER` tiles for each worker.

    There are :data:`MORE_TILES_PER_WORKER` tiles for each if a tile then takes :data:`WORTH_SECONDS` and they leave the
    driver :data:`DRIVER_SECONDS` each; else so many that it does and they do.

    Args:
      train, test: numbers of images.
      seconds_per_pair: measured cost of one pair on one worker, for all groups and kernels together.
      workers: workers that share the tiles.

    Returns:
      A multiple of 8 from :data:`SMALLEST_TILE` to :data:`LARGEST_TILE`, or ``max(train, test)`` where that is smaller.
    """
    by_time = (TILE_SECONDS / max(seconds_per_pair, 1e-9)) ** 0.5
    pairs = Tiling(train, test, edge=1).total_pairs
    by_balance = (pairs / (workers * TILES_PER_WORKER)) ** 0.5
    by_worth = (max(WORTH_SECONDS, workers * DRIVER_SECONDS) / max(seconds_per_pair, 1e-9)) ** 0.5
    finer = max((pairs / (workers * MORE_TILES_PER_WORKER)) ** 0.5, by_worth)
    edge = max(SMALLEST_TILE, min(LARGEST_TILE, int(min(by_time, by_balance, finer)) // 8 * 8))
    return min(edge, max(train, test))


@dataclass(frozen=True)
class Plan:
    """What a run will cost, worked out before anything starts. Bytes and seconds are predictions.

    Attributes:
      costs: seconds of a pair on one worker, in each pass.
      missing, missing_pairs: in all passes.
      workers: 0 where this process computes.
      parallel: pairs that are computed at the same time.
      work: seconds that the missing pairs take on one worker.
    """

    tiling: Tiling
    costs: dict[Pass, float]
    missing: int
    missing_pairs: int
    matrices: int
    dtype: str
    workers: int
    parallel: int
    work: float
    store_bytes: int
    worker_bytes: int
    solver_bytes: int

    @property
    def seconds(self) -> float:
        """Predicted time for the missing tiles on all workers."""
        return self.work / self.parallel


def chunk_bytes(edge: int, itemsize: int) -> int:
    """Bytes of a stored chunk, also of a partial one at the edge of a matrix: its values and four of checksum."""
    return edge**2 * itemsize + 4


def matrix_bytes(tiling: Tiling, matrices: int, itemsize: int, done: TileSet | None = None) -> int:
    """Bytes that ``matrices`` train and test matrices each take in the store, without the tiles ``done``."""
    chunks = tiling.train_blocks**2 + tiling.test_blocks * tiling.train_blocks
    return matrices * chunk_bytes(tiling.edge, itemsize) * (chunks - (done.chunks if done is not None else 0))


def image_bytes(tiling: Tiling, values: int) -> int:
    """Bytes of all images of ``values`` float32 each, before compression."""
    return 4 * values * (tiling.train + tiling.test)


def worker_bytes(
    edge: int, image: int, pixels: int, cached_blocks: int, elements: int, groups: int, itemsize: int
) -> int:
    """Bytes a worker holds at most: prepared image blocks, and what a pair takes while a tile is computed.

    That is two indices, both kernels in float64 for every element and group, and in the end in the dtype of the run;
    meanwhile the tile before is written, and the images of the next one are read.

    Args:
      edge: of a tile, in images.
      image, pixels: bytes of a prepared image, and of one as it is stored.
      cached_blocks: prepared blocks of ``edge`` images that are kept; one more is in the making.
      elements, groups: relative rotations and reflections of two images, and groups that share them.
      itemsize: bytes of a stored value.
    """
    pair = 16 + 16 * elements + (16 + 2 * itemsize) * groups + 2 * itemsize
    return (cached_blocks + 1) * edge * image + (pair + 2 * itemsize * groups) * edge**2 + 2 * edge * pixels
