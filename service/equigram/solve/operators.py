"""Train Gram matrices that are only multiplied with: in memory, in the run store, or on the workers of a Ray cluster.

All of them stand for A = Θ(X, X) / s, with s the mean diagonal, and multiply in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from equigram.solve.matrices import Float64s, Floats, mean_diagonal, triangle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from equigram.store import GramStore


class Operator(Protocol):
    """A = Θ(X, X) / s of n images."""

    @property
    def count(self) -> int:
        """N."""

    @property
    def scale(self) -> float:
        """s: the mean diagonal of Θ(X, X)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """What Θ(X, X) is stored in."""

    def multiply(self, values: Float64s) -> Float64s:
        """A ``values``: (n, k) float64 from (n, k) float64."""


class ArrayOperator:
    """A Gram matrix in memory, in its own dtype.

    Args:
      gram: Θ(X, X): (n, n) float32 or float64, symmetric; only its upper triangle is used.

    Raises:
      SolverError: its diagonal is not finite, negative somewhere, or 0 everywhere.
    """

    def __init__(self, gram: Floats) -> None:
        self._gram, self.count, self.dtype = gram, len(gram), gram.dtype
        self.scale = mean_diagonal(np.diagonal(gram))

    def multiply(self, values: Float64s) -> Float64s:
        """A ``values``, (n, k)."""
        product = np.zeros(values.shape)
        for rows, cols in triangle(self.count):
            _add_block(product, values, rows, cols, self._gram[rows, cols])
        return product / self.scale


class StoredOperator:
    """A Gram matrix in a run store, read anew for each product but for the tiles that memory has room for.

    Only the tiles of one triangle are read. A pass over a matrix of 30,000 images in float32 reads 1.8 GB.

    Args:
      store: a run whose train matrices are complete.
      group, kernel: which of them.
      memory: bytes of tiles to keep.
      places: the tiles (row, col) of the upper triangle that there are; the others count as 0. ``None`` means all.
      scale: s, where it is known.

    Raises (also :meth:`multiply`):
      IncompleteRunError, DamagedTileError: a tile is missing or damaged.
      SolverError: the diagonal is negative somewhere, or 0 everywhere.
    """

    def __init__(
        self,
        store: GramStore,
        group: str,
        kernel: str,
        memory: int = 0,
        places: Sequence[tuple[int, int]] | None = None,
        scale: float | None = None,
    ) -> None:
        self._store, self._names, self._tiling = store, (group, kernel), store.info.tiling
        self.count, self.dtype = store.info.train, np.dtype(store.info.spec.gram.dtype)
        places = upper_triangle(store) if places is None else places
        room = memory // tile_bytes(store)
        self._kept_places, self._places = places[:room], places[room:]
        self._kept: list[Floats] = []
        self.scale = stored_scale(store, group, kernel) if scale is None else scale

    def multiply(self, values: Float64s) -> Float64s:
        """A ``values``, (n, k); reads the tiles."""
        product = np.zeros(values.shape)
        if len(self._kept) < len(self._kept_places):
            self._kept = list(self._store.read_blocks("gram", *self._names, self._kept_places))
        for place, block in zip(self._kept_places, self._kept, strict=True):
            self._add(product, values, place, block)
        blocks = self._store.read_blocks("gram", *self._names, self._places)
        for place, block in zip(self._places, blocks, strict=True):
            self._add(product, values, place, block)
        return product / self.scale

    def _add(self, product: Float64s, values: Float64s, place: tuple[int, int], block: Floats) -> None:
        rows, cols = map(self._tiling.train_images, place)
        _add_block(product, values, rows, cols, block)


class SubsetOperator:
    """The Gram matrix of some of the images of another one, whose whole matrix is multiplied with.

    Args:
      whole: of all images.
      chosen: which, (count,) increasing.
      scale: the mean diagonal of these.
    """

    def __init__(self, whole: Operator, chosen: NDArray[np.integer[Any]], scale: float) -> None:
        self._whole, self._chosen = whole, chosen
        self.count, self.dtype, self.scale = len(chosen), whole.dtype, scale

    def multiply(self, values: Float64s) -> Float64s:
        """A ``values``, (n, k)."""
        padded = np.zeros((self._whole.count, values.shape[1]))
        padded[self._chosen] = values
        return np.asarray(self._whole.multiply(padded)[self._chosen] * (self._whole.scale / self.scale))


def upper_triangle(store: GramStore) -> list[tuple[int, int]]:
    """The tiles (row, col) of a train matrix on and above the diagonal."""
    blocks = store.info.tiling.train_blocks
    return [(row, col) for row in range(blocks) for col in range(row, blocks)]


def tile_bytes(store: GramStore) -> int:
    """Bytes of a tile in memory."""
    return int(store.info.tile**2 * np.dtype(store.info.spec.gram.dtype).itemsize)


def stored_scale(store: GramStore, group: str, kernel: str) -> float:
    """The mean diagonal of a stored train matrix.

    Raises:
      IncompleteRunError, DamagedTileError: a tile is missing or damaged.
      SolverError: the diagonal is negative somewhere, or 0 everywhere.
    """
    return mean_diagonal(store.diagonal(group, kernel))


def _add_block(product: Float64s, values: Float64s, rows: slice, cols: slice, block: Floats) -> None:
    """Add what a block of the upper triangle, and its transpose, contribute to a product."""
    block = block.astype(np.float64)
    if rows == cols:
        block = np.triu(block) + np.triu(block, 1).T
    product[rows] += block @ values[cols]
    if rows != cols:
        product[cols] += block.T @ values[rows]
