"""Kernel regression with a Gram matrix in memory: μ(x) = ȳ + Θ(x, X) (Θ(X, X) + λ s I)⁻¹ (Y - ȳ).

``X`` are the n training images, ``Y`` their targets with mean ``ȳ``, ``s`` the mean diagonal of Θ(X, X). The ridge λ is
in units of s, so one value means the same for every group and kernel, and scaling a kernel changes no prediction.
Everything is solved in float64 by a Cholesky factorisation of A = Θ(X, X) / s + λ I, one for each λ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import blas, eigh, lapack

from equigram.errors import SolverError, SpecError
from equigram.solve.matrices import (
    BLOCK,
    Float64s,
    Floats,
    check_dtype,
    check_finite,
    mean_diagonal,
    row_blocks,
    symmetrise,
    triangle,
)
from equigram.solve.metrics import mean_squared_error
from equigram.solve.targets import Targets

EPS = float(np.finfo(np.float64).eps)

USABLE = 0.1
"""Relative residual above which coefficients are no solution."""

SOUND = 1e-6
"""Relative residual up to which nothing is said about it."""

PROBES, ITERATIONS = 4, 3
"""Vectors and steps of the inverse iteration that estimates condition numbers."""

Queries = Callable[[], Iterable[tuple[Floats, Floats]]]
"""Gives images whose variances are wanted, in blocks: Θ(x, X), (m, n), and Θ(x, x), (m,)."""


@dataclass(frozen=True, eq=False)
class Solution:
    """The regression for one ridge value."""

    ridge: float
    """λ, in units of ``scale``."""
    scale: float
    """s: mean diagonal of the train Gram matrix."""
    coefficients: Float64s
    """α = (Θ(X, X) + λ s I)⁻¹ Y: (n, k)."""
    offset: Float64s
    """(k,): what predictions get back, see :class:`Targets`."""
    residual: float
    """‖(Θ(X, X) + λ s I) α - Y‖ / ‖Y‖ in Frobenius norms, the rounding error of the solution; 0 where Y is 0."""
    condition: float
    """Estimate of the condition number of Θ(X, X) + λ s I: in the 1-norm for a factorisation in memory, else in the
    2-norm, from below where there is no eigendecomposition."""
    warning: str | None
    """One sentence where ``condition`` exceeds 1 / eps of the dtype the Gram matrix came in, or ``residual`` is above
    :data:`SOUND`, else None.

    Then rounding of the stored entries can change the coefficients at will. Predictions suffer less, but compare
    them with those of a larger ridge.
    """
    dtype: str
    """Of the Gram matrix; what is solved is float64."""
    amplitude: float
    """a² = tr(Yᵀ α) / (n k), with which a Gaussian process of covariance a² (Θ(X, X) + λ s I) makes Y most likely.

    Predictions do not depend on it, and variances are in units of it.
    """
    converged: bool = True
    """Whether conjugate gradients reached their tolerance; true for a factorisation."""
    left_out: Float64s | None = None
    """(n, k): predictions of each training image by the regression on all others, where they were asked for."""
    variances: Float64s | None = None
    """(m,): ``Θ(x, x) - Θ(x, X) (Θ(X, X) + λ s I)⁻¹ Θ(X, x)`` of queried images, 0 or more, where they were asked for.

    It is the variance of the Gaussian process with covariance Θ for every column, without the noise λ s.
    """

    def noisy_variances(self) -> Float64s | None:
        """a² (``variances`` + λ s): (m,), in squared units of the targets; ``None`` where there are no variances."""
        return None if self.variances is None else self.amplitude * (self.variances + self.ridge * self.scale)

    def predict(self, cross: Floats) -> Float64s:
        """μ(x) = Θ(x, X) α + offset: (m, k) float64.

        Args:
          cross: Θ(x, X): (m, n) float32 or float64, one row per image x; columns as the rows of the train Gram.

        Raises:
          SpecError: ``cross`` has other columns than training images.
          SolverError: an entry of ``cross`` or a prediction is not finite.
        """
        check_dtype(cross, "cross Gram matrix")
        n, k = self.coefficients.shape
        if cross.ndim != 2 or cross.shape[1] != n:
            raise SpecError(
                f"the cross Gram matrix has shape {cross.shape}, but the solution has {n} training images; "
                f"pass (m, {n}): a row per predicted image, a column per training image"
            )
        check_finite(cross, "cross Gram matrix", "predicted image {0} with training image {1}")
        predictions = np.empty((len(cross), k))
        for rows in row_blocks(*cross.shape):
            with np.errstate(over="ignore", invalid="ignore"):
                predictions[rows] = cross[rows].astype(np.float64) @ self.coefficients + self.offset
        if not np.isfinite(predictions).all():
            raise SolverError(
                f"the predictions overflow float64: the cross Gram matrix reaches {np.abs(cross).max():.3g}, the "
                f"coefficients {np.abs(self.coefficients).max():.3g}; take a ridge above {self.ridge:g}"
            )
        return predictions


def memory_needed(n: int) -> int:
    """Bytes that :func:`solve` needs for n training images: the Gram matrix (as float64), one copy, some blocks."""
    return 2 * 8 * n * n + 6 * 8 * max(BLOCK, n)


def solve(gram: Floats, targets: Targets, ridge: Sequence[float], *, leave_one_out: bool = False) -> list[Solution]:
    """Kernel regression for each ridge value, in their order.

    The two triangles are averaged, and everything after reading ``gram`` is float64. ``gram`` is not modified; memory
    beyond it is one n² float64 array, see :func:`memory_needed`.

    Args:
      gram: Θ(X, X): (n, n) float32 or float64, symmetric up to √eps of its dtype, times √(Θ(x, x) Θ(x', x')).
      targets: from :func:`class_targets` or :func:`real_targets`.
      ridge: λ ≥ 0, in units of the mean diagonal of ``gram``.
      leave_one_out: also predict each training image from the others; three times the work.

    Raises:
      SpecError: a shape, dtype or ridge value is wrong.
      SolverError: ``gram`` is not finite, not symmetric, has a negative or only zero diagonal or an entry above
        √(Θ(x, x) Θ(x', x')), or with a ridge value is not positive definite to float64 rounding (the message names a
        ridge that is enough).
    """
    solutions = []
    for solution in solve_each(gram, targets, ridge, leave_one_out=leave_one_out):
        if isinstance(solution, SolverError):
            raise solution
        solutions.append(solution)
    return solutions


def solve_each(
    gram: Floats,
    targets: Targets,
    ridge: Sequence[float],
    *,
    leave_one_out: bool = False,
    queries: Queries | None = None,
) -> Iterator[Solution | SolverError]:
    """What :func:`solve` returns, one at a time; for a ridge value without solution, what it would raise.

    With ``queries``, which is called for each ridge value, the solutions have their variances.
    """
    check_problem(gram, targets, ridge)
    system = System(gram)
    for value in map(float, ridge):
        try:
            yield _solve_one(gram, system, targets, value, leave_one_out=leave_one_out, queries=queries)
        except SolverError as error:
            yield error


def check_problem(gram: Floats, targets: Targets, ridge: Sequence[float]) -> None:
    """Raise :class:`SpecError` where Gram matrix, targets and ridge values do not fit together."""
    check_dtype(gram, "train Gram matrix")
    n = len(targets.values)
    if gram.shape != (n, n):
        raise SpecError(
            f"the train Gram matrix has shape {gram.shape}, but there are targets of {n} training images; "
            f"pass the ({n}, {n}) matrix of these images"
        )
    check_ridge(ridge)


def check_ridge(ridge: Sequence[float]) -> None:
    """Raise :class:`SpecError` unless there are ridge values, all of them finite and 0 or more."""
    for value in ridge:
        if not (value >= 0 and math.isfinite(value)):
            raise SpecError(f"ridge {value:g} is not allowed; it must be finite and 0 or more")
    if not ridge:
        raise SpecError("there is no ridge value; give at least one, for example 1e-4")


def _solve_one(
    gram: Floats, system: System, targets: Targets, ridge: float, *, leave_one_out: bool, queries: Queries | None
) -> Solution:
    condition = system.factorise(ridge)
    if condition is None:
        raise _not_positive_definite(gram, system, ridge)
    scaled = system.solve(targets.values)
    variances = None if queries is None else _variances(system, queries)
    return finish(
        gram.dtype,
        system.scale,
        targets,
        ridge,
        scaled,
        residual=system.apply(scaled) + ridge * scaled - targets.values,
        condition=condition,
        left_out=(
            left_out_predictions(targets, scaled, system.solve(np.ones((len(gram), 1))), system.inverse_diagonal())
            if leave_one_out
            else None
        ),
        variances=variances,
    )


def _variances(system: System, queries: Queries) -> Float64s:
    """Variances of queried images, with the last factor."""
    found = []
    for cross, self_kernels in queries():
        check_finite(cross, "cross Gram matrix", "queried image {0} with training image {1}")
        found += [self_kernels[rows] - system.explained(cross[rows]) for rows in row_blocks(*cross.shape)]
    return np.maximum(np.concatenate(found), 0.0)


def finish(
    dtype: np.dtype[Any],
    scale: float,
    targets: Targets,
    ridge: float,
    scaled: Float64s,
    *,
    residual: Float64s,
    condition: float,
    left_out: Float64s | None = None,
    variances: Float64s | None = None,
) -> Solution:
    """A solution from the coefficients ``(n, k)`` of Θ(X, X) / s + λ I and what these leave of the targets.

    Raises:
      SolverError: the coefficients overflow, or leave more than :data:`USABLE` of the targets.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        coefficients = np.ascontiguousarray(scaled / scale)
    if not np.isfinite(coefficients).all():
        raise SolverError(
            f"the coefficients overflow float64: the mean diagonal of the train Gram matrix is {scale:.3g} and the "
            f"targets reach {np.abs(targets.values).max():.3g}; scale the kernel or the targets towards 1"
        )
    size, limit = float(np.linalg.norm(targets.values)), 1 / float(np.finfo(dtype).eps)
    relative = float(np.linalg.norm(residual)) / size if size else 0.0
    if not relative <= USABLE:
        raise SolverError(
            f"with ridge {ridge:g} rounding leaves a residual of {relative:.1e}; the condition number is about "
            f"{condition:.1e}: take a larger ridge{advice_on_dtype(dtype)}"
        )
    warning = None
    if condition > limit:
        warning = (
            f"with ridge {ridge:g} the condition number {condition:.1e} exceeds {limit:.1e}, what {dtype} entries "
            f"determine; compare with a larger ridge{advice_on_dtype(dtype)}"
        )
    elif relative > SOUND:
        warning = (
            f"with ridge {ridge:g} rounding leaves a residual of {relative:.1e}, with a condition number of "
            f"{condition:.1e}; compare with a larger ridge"
        )
    return Solution(
        ridge=ridge,
        scale=scale,
        coefficients=coefficients,
        offset=targets.offset,
        residual=relative,
        condition=condition,
        warning=warning,
        dtype=str(dtype),
        amplitude=float(np.mean(targets.values * coefficients)),
        left_out=left_out,
        variances=variances,
    )


def left_out_error(solution: Solution, targets: Targets) -> float | None:
    """Mean squared error of the predictions of images that were left out; ``None`` where none were."""
    return None if solution.left_out is None else mean_squared_error(solution.left_out, targets.values + targets.offset)


def best_of(solutions: Iterable[Solution | SolverError], targets: Targets) -> Solution:
    """The solution with the smallest error on images that were left out, or the first where none were.

    Raises:
      SolverError: there is no solution; the first reason.
    """
    each = list(solutions)
    solved = [one for one in each if isinstance(one, Solution)]
    if not solved:
        raise next(one for one in each if isinstance(one, SolverError))
    return min(solved, key=lambda one: left_out_error(one, targets) or 0.0)


def left_out_predictions(
    targets: Targets, inverse_targets: Float64s, inverse_ones: Float64s, inverse_diagonal: Float64s
) -> Float64s | None:
    """Predictions of each training image by a regression on all others, in closed form.

    With B = (Θ(X, X) / s + λ I)⁻¹ and the targets Y of mean ȳ, the others have the mean ``ȳ - (Y_i - ȳ) / (n - 1)``,
    and their regression misses Y_i by ``([B (Y - ȳ)]_i + (Y_i - ȳ) / (n - 1) [B 1]_i) / B_ii``. The ridge stays λ s.

    Args:
      targets: Y - ȳ, (n, k), and ȳ.
      inverse_targets: B (Y - ȳ), (n, k).
      inverse_ones: B 1, (n, 1).
      inverse_diagonal: B_ii, (n,).

    Returns:
      (n, k) float64; ``None`` for a single image, which has no others.
    """
    n = len(targets.values)
    if n == 1:
        return None
    missed = (inverse_targets + targets.values / (n - 1) * inverse_ones) / inverse_diagonal[:, None]
    return np.asarray(targets.values + targets.offset - missed)


class System:
    """A = Θ(X, X) / s, its two triangles averaged, in one (n, n) float64 array that also holds factors of A + λ I.

    Args:
      gram: Θ(X, X), (n, n) float32 or float64.

    Raises:
      SolverError: it is not finite, not symmetric, or has entries that no kernel has.
    """

    def __init__(self, gram: Floats) -> None:
        self.scale = mean_diagonal(np.diagonal(gram))
        # LAPACK's order of entries. The upper triangle holds A; the lower one, with the diagonal, factors of A + λ I.
        self._matrix = np.empty(gram.shape, dtype=np.float64, order="F")
        self._sums = symmetrise(gram, self.scale, self._matrix)
        self._diagonal = np.diagonal(self._matrix).copy()

    def factorise(self, ridge: float) -> float | None:
        """Cholesky factor of A + ridge I; returns an estimate of its condition number in the 1-norm.

        That is ``None`` where it is not positive definite to float64 rounding: the factorisation fails, or survives by
        chance with a condition number beyond 1 / eps.
        """
        for rows, cols in triangle(len(self._matrix)):
            above = self._matrix[rows, cols]
            self._matrix[cols, rows] = above.T if rows != cols else np.triu(above) + np.triu(above, 1).T
        np.fill_diagonal(self._matrix, self._diagonal + ridge)
        _, failed = lapack.dpotrf(self._matrix, lower=1, clean=0, overwrite_a=1)
        if failed:
            return None
        size = float(self._sums.max()) + ridge
        inverse_condition, _ = lapack.dpocon(self._matrix, size, uplo=b"L")
        if inverse_condition < EPS:
            return None
        condition = max(1 / float(inverse_condition), size * self._inverse_norm())
        return condition if condition * EPS <= 1 else None

    def _inverse_norm(self) -> float:
        """The norm of (A + λ I)⁻¹, from below, by inverse iteration from random vectors, with the last factor.

        LAPACK's estimate begins with equal entries, and does not see that two images are the same.
        """
        vectors, norm = np.random.default_rng(0).standard_normal((len(self._matrix), PROBES)), 0.0
        for _ in range(ITERATIONS):
            vectors /= np.linalg.norm(vectors, axis=0)
            vectors = self.solve(vectors)
            norm = float(np.linalg.norm(vectors, axis=0).max())
        return norm

    def solve(self, values: Float64s) -> Float64s:
        """(A + λ I)⁻¹ ``values``, (n, k), with the last factor."""
        solution, _ = lapack.dpotrs(self._matrix, values, lower=1)
        return np.asarray(solution)

    def explained(self, cross: Floats) -> Float64s:
        """Θ(x, X) (Θ(X, X) + λ s I)⁻¹ Θ(X, x), (m,), of the rows of Θ(x, X), (m, n), with the last factor."""
        half = blas.dtrsm(1.0, self._matrix, cross.T.astype(np.float64, order="F"), lower=1, overwrite_b=1)
        return np.asarray(np.square(half).sum(axis=0) / self.scale)

    def inverse_diagonal(self) -> Float64s:
        """The diagonal (n,) of (A + λ I)⁻¹; needs the last factor, and spends it."""
        lapack.dpotri(self._matrix, lower=1, overwrite_c=1)
        return np.diagonal(self._matrix).copy()

    def apply(self, values: Float64s) -> Float64s:
        """A ``values``, (n, k)."""
        factor = np.diagonal(self._matrix).copy()
        np.fill_diagonal(self._matrix, self._diagonal)
        product = blas.dsymm(1.0, self._matrix, values, lower=0)
        np.fill_diagonal(self._matrix, factor)
        return np.asarray(product)

    def eigenvalues(self) -> tuple[Float64s, Float64s]:
        """Eigenvalues (n,), increasing, and eigenvectors (n, n), in columns, of A; spends it."""
        np.fill_diagonal(self._matrix, self._diagonal)
        values, vectors = eigh(self._matrix, lower=False, overwrite_a=True, check_finite=False, driver="evd")
        return values, vectors


def _not_positive_definite(gram: Floats, system: System, ridge: float) -> SolverError:
    """Raise the ridge until A is positive definite, then find A's smallest eigenvalue by inverse iteration."""
    exponent = math.floor(math.log10(max(ridge, float(np.finfo(gram.dtype).eps)))) + 1
    while True:
        enough = float(f"1e{exponent}")
        condition = system.factorise(enough)
        if condition is not None and condition * EPS < 0.5:  # near 1 hardly a digit is right
            break
        exponent += 1
    vector = np.random.default_rng(0).standard_normal((len(gram), 1))
    smallest = 0.0
    for _ in range(50):
        vector /= np.linalg.norm(vector)
        step = system.solve(vector)
        smallest = 1 / float(vector[:, 0] @ step[:, 0]) - enough
        vector = step
    return not_positive_definite(gram, system.scale, ridge, smallest, enough)


def not_positive_definite(gram: Floats, scale: float, ridge: float, smallest: float, enough: float) -> SolverError:
    """What to raise where a ridge value is too small.

    Args:
      gram: Θ(X, X), (n, n).
      scale: its mean diagonal.
      ridge: the ridge value.
      smallest: the smallest eigenvalue of Θ(X, X) / s.
      enough: a ridge value that is enough.
    """
    remedy = f"take a ridge of {enough:g} or more{advice_on_dtype(gram.dtype)}"
    if enough > 1e-2:
        remedy = f"no rounding error is that large: verify the run store, or take a ridge of {enough:g} or more"
    cause, images = _cause(gram)
    if enough <= 1e-2 and len(images) == 2:
        remedy = f"take a ridge of {enough:g} or more, or leave one of them out"
    elif enough <= 1e-2 and images:
        remedy = f"take a ridge of {enough:g} or more, or leave it out"
    return SolverError(
        f"the train Gram matrix of {len(gram)} images plus ridge {ridge:g} is not positive definite: the smallest "
        f"eigenvalue without ridge is about {smallest:.1e} of the mean diagonal {scale:.3g}{cause}; {remedy}",
        images,
    )


def _cause(gram: Floats) -> tuple[str, tuple[int, ...]]:
    """Names a training image whose kernel is 0, or two whose kernels are proportional, if there are any."""
    diagonal = np.diagonal(gram).astype(np.float64)
    if not diagonal.all():
        image = int(np.argmin(diagonal))
        return f" (training image {image} is 0 to this kernel)", (image,)
    size = np.sqrt(diagonal)
    rounding = 8 * float(np.finfo(gram.dtype).eps)
    for rows in row_blocks(*gram.shape):
        correlation = gram[rows] / size[rows, None] / size
        correlation[np.arange(len(correlation)), np.arange(len(gram))[rows]] = -1
        first, second = np.unravel_index(correlation.argmax(), correlation.shape)
        if correlation[first, second] > 1 - rounding:
            images = rows.start + int(first), int(second)
            return f" (training images {images[0]} and {images[1]} are the same to this kernel)", images
    return "", ()


def advice_on_dtype(dtype: np.dtype[Any]) -> str:
    """What else helps where the entries of a matrix are rounded too much."""
    return ", or compute the matrix in float64 (gram.dtype)" if dtype == np.float32 else ""
