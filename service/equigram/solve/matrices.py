"""Gram matrices in memory: what they must be, and passes over them in float64, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from equigram.errors import SolverError, SpecError

Floats = NDArray[np.floating[Any]]
Float64s = NDArray[np.float64]

BLOCK = 2**20
"""Matrix entries converted to float64 at a time (8 MiB)."""

EDGE = 256
"""Edge of the blocks in which triangles are worked on: half a MiB of float64."""

NAME = "train Gram matrix"
IMAGES = "training image {0} with {1}"
"""What a train Gram matrix and its entries are called in errors."""


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows of a ``(rows, columns)`` matrix with about :data:`BLOCK` entries each."""
    step = max(1, BLOCK // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def check_dtype(matrix: Floats, name: str) -> None:
    """Raise :class:`SpecError` unless a matrix is float32 or float64."""
    if matrix.dtype not in (np.float32, np.float64):
        raise SpecError(f"the {name} has dtype {matrix.dtype}; it must be float32 or float64")


def check_finite(matrix: Floats, name: str, images: str) -> None:
    """Raise :class:`SolverError` if an entry is not finite; ``images`` says which ones row {0} and column {1} are."""
    for rows in row_blocks(*matrix.shape):
        wrong = np.argwhere(~np.isfinite(matrix[rows]))
        if wrong.size:
            row, column = rows.start + wrong[0, 0], wrong[0, 1]
            raise _not_finite(name, matrix[row, column], row, column, images)


def _not_finite(name: str, value: float, row: int, column: int, images: str) -> SolverError:
    return SolverError(
        f"the {name} holds {value} at ({row}, {column}), {images.format(row, column)}; it must be finite: verify the "
        "run store, which recomputes damaged tiles"
    )


def mean_diagonal(diagonal: Floats) -> float:
    """Mean of the diagonal (n,) of a Gram matrix.

    Raises:
      SolverError: the diagonal is not finite, negative somewhere, or 0 everywhere.
    """
    wrong = np.flatnonzero(~np.isfinite(diagonal))
    if wrong.size:
        raise _not_finite(NAME, diagonal[wrong[0]], int(wrong[0]), int(wrong[0]), IMAGES)
    diagonal = diagonal.astype(np.float64)
    if diagonal.min() < 0:
        image = int(diagonal.argmin())
        raise SolverError(
            f"the train Gram matrix holds {diagonal[image]:.3g} at ({image}, {image}), training image {image} with "
            "itself; a kernel is 0 or more there: verify the run store"
        )
    scale = float((diagonal / len(diagonal)).sum())
    if scale == 0:
        raise SolverError(
            f"the diagonal of the train Gram matrix is 0 for all {len(diagonal)} images, and so are all predictions; "
            "the images are blank or the network has weight 0: check data.train and network"
        )
    return scale


def symmetrise(gram: Floats, scale: float, out: Float64s) -> Float64s:
    """Write the upper triangle of A = (Θ + Θᵀ) / (2 s), with the diagonal, into ``out``.

    Args:
      gram: Θ, (n, n) float32 or float64.
      scale: s, from :func:`mean_diagonal`.
      out: (n, n) float64.

    Returns:
      (n,) float64: the sums of the magnitudes in the rows of A.

    Raises:
      SolverError: an entry is not finite, above √(Θ(x, x) Θ(x', x')), or unlike its transpose.
    """
    rounding = math.sqrt(float(np.finfo(gram.dtype).eps))
    size = np.sqrt(np.diagonal(gram).astype(np.float64))
    sums = np.zeros(len(gram))
    for rows, cols in triangle(len(gram)):
        above, below = gram[rows, cols].astype(np.float64), gram[cols, rows].T.astype(np.float64)
        bound = size[rows, None] * size[cols]
        with np.errstate(invalid="ignore"):
            difference = np.abs(above - below)
            # Also wrong where something is NaN.
            wrong = not (difference <= rounding * bound).all() or not (np.abs(above) <= (1 + rounding) * bound).all()
        if wrong or not (np.abs(below) <= (1 + rounding) * bound).all():
            raise _no_kernel(gram)
        above /= scale
        below /= scale
        above += below
        above /= 2
        out[rows, cols] = above
        np.abs(above, out=above)
        sums[rows] += above.sum(axis=1)
        if rows != cols:
            sums[cols] += above.sum(axis=0)
    return sums


def triangle(n: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows and columns that cover the upper triangle of an (n, n) matrix, small enough for a cache."""
    for top in range(0, n, EDGE):
        for left in range(top, n, EDGE):
            yield slice(top, min(top + EDGE, n)), slice(left, min(left + EDGE, n))


def _no_kernel(gram: Floats) -> SolverError:
    """What is wrong with a matrix that is not of a kernel."""
    check_finite(gram, NAME, IMAGES)
    rounding = math.sqrt(float(np.finfo(gram.dtype).eps))
    size = np.sqrt(np.diagonal(gram).astype(np.float64))
    for rows in row_blocks(*gram.shape):
        block = gram[rows].astype(np.float64)
        bound = size[rows, None] * size
        wrong = np.argwhere(np.abs(block) > (1 + rounding) * bound)
        if wrong.size:
            row, column = rows.start + wrong[0, 0], wrong[0, 1]
            return SolverError(
                f"the train Gram matrix holds {gram[row, column]:.6g} at ({row}, {column}), but a kernel is at most "
                f"√(Θ(x, x) Θ(x', x')) = {size[row] * size[column]:.6g} there: verify the run store"
            )
        block -= gram[:, rows].T
        wrong = np.argwhere(np.abs(block) > rounding * bound)
        if wrong.size:
            row, column = rows.start + wrong[0, 0], wrong[0, 1]
            return SolverError(
                f"the train Gram matrix is not symmetric: {gram[row, column]:.6g} at ({row}, {column}), but "
                f"{gram[column, row]:.6g} at ({column}, {row}), more than {gram.dtype} rounding apart: "
                "verify the run store"
            )
    return SolverError("the train Gram matrix is not that of a kernel: verify the run store")


def ritz_values(vectors: Float64s, images: Float64s) -> Float64s:
    """Eigenvalues of a symmetric matrix in the span of vectors (n, k), from its products with these; increasing.

    They lie between the smallest and the largest eigenvalue of the matrix.
    """
    squares, directions = scipy.linalg.eigh(vectors.T @ vectors)
    keep = squares > len(vectors) * float(np.finfo(np.float64).eps) * squares[-1]
    directions = directions[:, keep] / np.sqrt(squares[keep])
    inner = directions.T @ (vectors.T @ images) @ directions
    return np.asarray(scipy.linalg.eigvalsh((inner + inner.T) / 2))
