"""Kernel regression by a Cholesky factorisation of a matrix that no memory holds, tile by tile in the run store.

A = Θ(X, X) / s + λ I is factorised as L Lᵀ in panels of as many columns of tiles as the memory holds, from the left to
the right: a panel of A is read, what the finished columns of L contribute is taken off, and the panel is factorised and
written, in float64 throughout. The tiles of L in the store say how far it is; a panel that was interrupted is done
again. It takes n³ / 3 multiplications and, with p panels, reads about p / 6 · 8 n² bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import blas, lapack

from equigram.errors import ResourceError, SolverError
from equigram.solve.matrices import Float64s, ritz_values
from equigram.solve.operators import StoredOperator
from equigram.solve.regression import EPS, Solution, advice_on_dtype, check_ridge, finish
from equigram.store import READERS
from equikernel.memory import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from equigram.solve.targets import Targets
    from equigram.store import GramStore

PROBES, STEPS = 4, 3
"""Vectors and steps of the power iterations that estimate the condition number."""


def least_memory(count: int, edge: int, columns: int) -> int:
    """Bytes that :func:`solve_tiled` needs at least, for a panel of one column of tiles.

    Args:
      count: training images.
      edge: of the tiles.
      columns: of the targets.
    """
    return 8 * count * (edge + 4 * (columns + PROBES)) + 8 * edge * edge * (2 * READERS + 4)


def solve_tiled(
    store: GramStore,
    group: str,
    kernel: str,
    targets: Targets,
    ridge: float,
    *,
    memory: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    solved: tuple[Float64s, float] | None = None,
) -> Solution:
    """Kernel regression with a stored matrix, by a factorisation in panels; interrupted, it goes on from the last one.

    Args:
      store: a run whose train matrices are complete; the factor is kept in it.
      group, kernel: which matrix.
      targets: of its images.
      ridge: λ ≥ 0, in units of the mean diagonal.
      memory: bytes that it may use.
      progress: called with the columns of tiles that are factorised, and their number.
      solved: the coefficients times the scale, and the condition number, where this was solved before.

    Raises:
      SpecError: the ridge is negative or not finite.
      ResourceError: the memory does not hold a single column of tiles.
      SolverError: the matrix with the ridge is not positive definite to float64 rounding.
      IncompleteRunError, DamagedTileError: a tile is missing or damaged.
      DamagedArrayError: a tile of the factor is damaged; it is deleted, and made anew the next time.
    """
    check_ridge([ridge])
    tiling = store.info.tiling
    columns = targets.values.shape[1]
    least = least_memory(tiling.train, tiling.edge, columns)
    if memory < least:
        raise ResourceError(
            f"the factorisation of a matrix of {tiling.train:,} images in tiles of {tiling.edge} needs "
            f"{format_bytes(least)} of memory, and may use {format_bytes(memory)}; allow more, or solve iteratively"
        )
    operator = StoredOperator(store, group, kernel)
    if solved is None:
        factor = _Factor(store, group, kernel, operator.scale, ridge)
        factor.compute(_panel_width(memory - least, tiling.train, tiling.edge), progress)
        scaled, condition = factor.solve(targets.values), _condition(operator, factor, ridge)
        if condition * EPS > 1:
            store.discard_factor(group, kernel)
            raise SolverError(
                f"the train Gram matrix of {tiling.train:,} images plus ridge {ridge:g} is not positive definite to "
                f"float64 rounding: its condition number is {condition:.1e}; take a larger ridge"
                f"{advice_on_dtype(operator.dtype)}"
            )
    else:
        scaled, condition = solved
    residual = targets.values - operator.multiply(scaled) - ridge * scaled
    return finish(
        operator.dtype,
        operator.scale,
        targets,
        ridge,
        scaled,
        residual=residual,
        condition=condition,
    )


def _panel_width(room: int, count: int, edge: int) -> int:
    """Columns of tiles in a panel, if there is room for more than one: it, and a copy of its square."""
    width = 1
    while (width + 1) * edge <= count and 8 * width * edge * (count + width * edge) <= room:
        width += 1
    return width


class _Factor:
    """L of Θ(X, X) / s + λ I, in the store."""

    def __init__(self, store: GramStore, group: str, kernel: str, scale: float, ridge: float) -> None:
        self._store, self._names, self._scale, self._ridge = store, (group, kernel), scale, ridge
        self._tiling = store.info.tiling
        self._blocks = self._tiling.train_blocks
        self._done = store.begin_factor(group, kernel, {"ridge": ridge, "scale": scale})

    def compute(self, width: int, progress: Callable[[int, int], None]) -> None:
        """Factorise what is not yet, in panels of ``width`` columns of tiles."""
        for first in range(self._done, self._blocks, width):
            progress(first, self._blocks)
            self._compute_panel(range(first, min(first + width, self._blocks)))
        progress(self._blocks, self._blocks)

    def _compute_panel(self, cols: range) -> None:
        rows = range(cols.start, self._blocks)
        top, left = self._start(rows.start), self._start(cols.start)
        panel = np.zeros((self._tiling.train - top, self._start(cols.stop) - left))

        def part(row: int) -> Float64s:
            """The rows of the panel that belong to a row of tiles."""
            images = self._tiling.train_images(row)
            return panel[images.start - top : images.stop - top]

        places = [(row, col) for row in rows for col in cols if row >= col]
        for (row, col), tile in zip(places, self._store.read_blocks("gram", *self._names, places), strict=True):
            images = self._tiling.train_images(col)
            part(row)[:, images.start - left : images.stop - left] = tile.astype(np.float64) / self._scale
        diagonal = np.arange(panel.shape[1])
        panel[diagonal, diagonal] += self._ridge
        before = [(row, col) for col in range(cols.start) for row in rows]
        tiles = self._store.read_factor(*self._names, before)
        for _ in range(cols.start):
            beside = np.concatenate([next(tiles) for _ in cols])  # the rows of this panel in a finished column
            for row in cols:
                images = self._tiling.train_images(row)
                part(row)[...] -= beside[images.start - top : images.stop - top] @ beside.T
            for row in rows[len(cols) :]:
                part(row)[...] -= next(tiles) @ beside.T
        square = np.asfortranarray(panel[: panel.shape[1]])
        lower, failed = lapack.dpotrf(square, lower=1, clean=1, overwrite_a=1)
        if failed:
            raise self._not_positive_definite(left + failed - 1)
        for row in rows:
            if row in cols:
                images = self._tiling.train_images(row)
                values = lower[images.start - top : images.stop - top]
            else:
                values = blas.dtrsm(1.0, lower, part(row), side=1, lower=1, trans_a=1)
            for col in cols:
                if row >= col:
                    images = self._tiling.train_images(col)
                    tile = values[:, images.start - left : images.stop - left]
                    self._store.write_factor(*self._names, row, col, tile)

    def solve(self, values: Float64s) -> Float64s:
        """(L Lᵀ)⁻¹ ``values``, (n, k); reads the factor twice."""
        solution = values.copy()
        columns = [[(row, col) for row in range(col, self._blocks)] for col in range(self._blocks)]
        tiles = self._store.read_factor(*self._names, [place for column in columns for place in column])
        for column in columns:
            for row, col in column:
                tile, rows, cols = next(tiles), self._tiling.train_images(row), self._tiling.train_images(col)
                if row == col:
                    solution[cols] = blas.dtrsm(1.0, tile, solution[cols], lower=1)
                else:
                    solution[rows] -= tile @ solution[cols]
        back = [column[::-1] for column in columns[::-1]]
        tiles = self._store.read_factor(*self._names, [place for column in back for place in column])
        for column in back:
            for row, col in column:
                tile, rows, cols = next(tiles), self._tiling.train_images(row), self._tiling.train_images(col)
                if row == col:
                    solution[cols] = blas.dtrsm(1.0, tile, solution[cols], lower=1, trans_a=1)
                else:
                    solution[cols] -= tile.T @ solution[rows]
        return solution

    def _start(self, block: int) -> int:
        """The first image of a block, or their number behind the last block."""
        return min(block * self._tiling.edge, self._tiling.train)

    def _not_positive_definite(self, image: int) -> SolverError:
        self._store.discard_factor(*self._names)
        advice = advice_on_dtype(np.dtype(self._store.info.spec.gram.dtype))
        which = self._store.describe_image("train", *divmod(image, self._tiling.edge))
        return SolverError(
            f"the train Gram matrix of {self._tiling.train:,} images plus ridge {self._ridge:g} is not positive "
            f"definite to float64 rounding, which shows at {which}; take a larger ridge{advice}"
        )


def _condition(operator: StoredOperator, factor: _Factor, ridge: float) -> float:
    """The condition number of A + λ I, from below, by power iterations with it and its inverse."""
    ends = []
    for apply in (operator.multiply, factor.solve):
        vectors = np.random.default_rng(0).standard_normal((operator.count, PROBES))
        for _ in range(STEPS):
            vectors, _ = np.linalg.qr(vectors)
            images = apply(vectors)
            largest = float(ritz_values(vectors, images)[-1])
            vectors = images
        ends.append(largest)
    return (ends[0] + ridge) * ends[1]
