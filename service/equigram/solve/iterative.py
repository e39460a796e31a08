"""Kernel regression without a factorisation: preconditioned block conjugate gradients, for matrices of any size.

Solved is (A + λ I) X = Y for all columns of Y at once, A = Θ(X, X) / s, by block conjugate gradients that orthogonalise
the residuals in every step (Dubrulle 2001, BCGrQ), so that dependent columns, such as those of centred one-hot targets,
do no harm. The preconditioner is a randomised Nyström approximation of A (Frangella, Tropp and Udell 2023): with
A ≈ U diag(l) Uᵀ of rank r,

    P = U (diag(l) + λ I) Uᵀ / (l_r + λ) + (I - U Uᵀ),

which is applied as P^(-1/2) from both sides. A is only multiplied with: r columns once, then k in each step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from equigram.errors import SolverError, SpecError
from equigram.solve.matrices import Float64s, ritz_values
from equigram.solve.operators import Operator
from equigram.solve.regression import EPS, USABLE, Solution, advice_on_dtype, check_ridge, finish
from equigram.solve.targets import Targets

RANK = 512
"""Columns of the Nyström sketch; at most a quarter of the matrix."""

TOLERANCE = 1e-8
"""Relative residual at which to stop."""

STEPS = 1000
"""Steps after which to give up."""

RESTARTS = 3
"""Times that rounding may have spoilt the residual that the steps carry along; then it is computed anew."""

Progress = Callable[[int, float], None]


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """P of the module's documentation."""

    vectors: Float64s
    """U: (n, r), orthonormal."""
    values: Float64s
    """l: (r,), decreasing, 0 or more; approximate eigenvalues of A from below."""
    weights: Float64s
    """Eigenvalues (r,) of P along U, 1 or more; they are 1 elsewhere."""

    @classmethod
    def sketch(cls, operator: Operator, ridge: float, rank: int, seed: int = 0) -> Preconditioner:
        """The Nyström approximation of an operator, from its product with ``rank`` random columns.

        Args:
          operator: A.
          ridge: λ.
          rank: r; a quarter of n at most.
          seed: of the columns.
        """
        rank = max(1, min(rank, operator.count // 4))
        test, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((operator.count, rank)))
        image = operator.multiply(test)
        if not np.isfinite(image).all():
            raise SolverError("the train Gram matrix has entries that are not finite; verify the run store")
        shift = np.sqrt(operator.count) * EPS * float(np.linalg.norm(image))
        image += shift * test
        inner, directions = scipy.linalg.eigh((test.T @ image + image.T @ test) / 2)
        del test
        keep = inner > rank * EPS * abs(inner[-1])  # rounding may have made A slightly indefinite
        half = image @ (directions[:, keep] / np.sqrt(inner[keep]))
        del image
        vectors, singular, _ = scipy.linalg.svd(half, full_matrices=False, overwrite_a=True, check_finite=False)
        values = np.maximum(np.square(singular) - shift, 0.0)
        return cls(vectors, values, np.ones(len(values))).with_ridge(ridge)

    def with_ridge(self, ridge: float) -> Preconditioner:
        """The same approximation of A, for another λ: what it costs is the product, which does not depend on λ."""
        floor = max(float(self.values[-1]) + ridge, EPS * float(self.values[0]))
        return dataclasses.replace(self, weights=np.maximum((self.values + ridge) / floor, 1.0))

    def apply(self, values: Float64s, power: float) -> Float64s:
        """P^power ``values``, (n, k)."""
        change = (self.weights**power - 1)[:, None] * (self.vectors.T @ values)
        return np.asarray(values + self.vectors @ change)


def solve_iteratively(
    operator: Operator,
    targets: Targets,
    ridge: float,
    *,
    tolerance: float = TOLERANCE,
    steps: int = STEPS,
    rank: int = RANK,
    sketch: Preconditioner | None = None,
    start: Float64s | None = None,
    progress: Progress = lambda step, residual: None,
    keep: Callable[[Float64s], None] = lambda scaled: None,
) -> Solution:
    """Kernel regression by preconditioned block conjugate gradients.

    Where the tolerance is not reached, the solution is not ``converged`` and says so in its ``warning``, and its
    ``residual`` says how far it is; beyond :data:`USABLE` there is none. The condition number is estimated from below,
    by Rayleigh quotients of the sketch and of the solution.

    Args:
      operator: A = Θ(X, X) / s of n images.
      targets: of these.
      ridge: λ ≥ 0, in units of s.
      tolerance: of ‖(A + λ I) X - Y‖ / ‖Y‖ in Frobenius norms.
      steps: after which to give up.
      rank: of the preconditioner; more make fewer steps. It takes 3 n r float64.
      sketch: a preconditioner of this operator for any ridge, instead of a new one.
      start: X to begin with, (n, k), such as ``keep`` was given.
      progress: called after each step with its number and the relative residual.
      keep: called after each step with X, to be copied if it is to be kept.

    Raises:
      SpecError: the targets are of other images, or a number is out of range.
      SolverError: A + λ I is not positive definite, something overflows, or what is left after all steps is not usable.
    """
    values = targets.values
    if len(values) != operator.count:
        raise SpecError(f"there are targets of {len(values)} images, and a matrix of {operator.count}")
    check_ridge([ridge])
    if not 0 < tolerance < 1 or steps < 1 or rank < 1:
        raise SpecError(
            f"tolerance {tolerance:g}, {steps} steps and rank {rank} are asked for; the tolerance must be between 0 "
            "and 1, and there must be at least one step and one column"
        )
    if start is not None and start.shape != values.shape:
        raise SpecError(f"the start has shape {start.shape}, and the targets {values.shape}; pass one of that shape")
    size, taken = float(np.linalg.norm(values)), 0
    # One more column, of noise: where the targets have nothing along an eigenvector, it shows the eigenvalue.
    columns = values.shape[1]
    probe = np.random.default_rng(1).standard_normal((len(values), 1))
    values = np.hstack([values, probe * (size or 1.0) / np.linalg.norm(probe)])
    scaled = np.zeros(values.shape)
    if start is not None:
        scaled[:, :columns] = start
    preconditioner = Preconditioner.sketch(operator, ridge, rank) if sketch is None else sketch.with_ridge(ridge)
    residual = values if start is None else values - _product(operator, ridge, scaled)
    for _ in range(RESTARTS):
        if np.linalg.norm(residual[:, :columns]) <= tolerance * size or taken >= steps:
            break
        for relative in _steps(operator, ridge, preconditioner, scaled, residual, size, columns):
            taken += 1
            progress(taken, relative)
            keep(scaled[:, :columns])
            if relative <= tolerance or taken >= steps:
                break
        residual = values - _product(operator, ridge, scaled)  # what the steps carry along is rounded
    condition = _condition(preconditioner, ridge, scaled, values - residual)
    scaled, residual = np.ascontiguousarray(scaled[:, :columns]), residual[:, :columns]
    relative, warning = float(np.linalg.norm(residual)) / size if size else 0.0, None
    if not relative <= tolerance:
        more = "take more steps (solve.steps), a higher rank (solve.rank) or a larger ridge"
        if taken < steps:
            more = f"rounding allows no less: take a larger tolerance or ridge{advice_on_dtype(operator.dtype)}"
        warning = (
            f"with ridge {ridge:g} conjugate gradients stopped after {taken} steps at a residual of {relative:.1e}, "
            f"above the tolerance {tolerance:g}; the condition number is {condition:.1e} or more; {more}"
        )
        if not relative <= USABLE:
            raise SolverError(warning)
    solution = finish(operator.dtype, operator.scale, targets, ridge, scaled, residual=residual, condition=condition)
    return solution if warning is None else dataclasses.replace(solution, warning=warning, converged=False)


def _steps(
    operator: Operator,
    ridge: float,
    preconditioner: Preconditioner,
    scaled: Float64s,
    residual: Float64s,
    size: float,
    columns: int,
) -> Iterator[float]:
    """Endless steps that improve ``scaled`` in place, from its residual.

    Yields ‖residual‖ / ``size`` of the first ``columns`` after each.
    """
    # In the preconditioned system the residual is always basis @ factor, with orthonormal columns.
    basis, factor = np.linalg.qr(preconditioner.apply(residual, -0.5))
    search = basis
    while True:
        direction = preconditioner.apply(search, -0.5)
        image = preconditioner.apply(_product(operator, ridge, direction), -0.5)
        curvature = search.T @ image
        try:
            inverse = scipy.linalg.cho_factor((curvature + curvature.T) / 2)
        except (scipy.linalg.LinAlgError, ValueError):
            raise _not_positive_definite(operator, ridge, direction) from None
        scaled += direction @ scipy.linalg.cho_solve(inverse, factor)
        basis, change = np.linalg.qr(basis - scipy.linalg.cho_solve(inverse, image.T).T)
        search = basis + search @ change.T
        factor = change @ factor
        yield float(np.linalg.norm(preconditioner.apply(basis @ factor[:, :columns], 0.5))) / size


def _product(operator: Operator, ridge: float, values: Float64s) -> Float64s:
    """(A + λ I) ``values``."""
    return operator.multiply(values) + ridge * values


def _condition(preconditioner: Preconditioner, ridge: float, scaled: Float64s, product: Float64s) -> float:
    """The condition number of A + λ I, from below: the solution is made of the smallest eigenvalues most of all."""
    largest, smallest = float(preconditioner.values[0]) + ridge, float(preconditioner.values[-1]) + ridge
    if scaled.any():
        smallest = max(min(smallest, float(ritz_values(scaled, product)[0])), ridge)
    return largest / smallest if smallest > 0 else math.inf


def _not_positive_definite(operator: Operator, ridge: float, direction: Float64s) -> SolverError:
    """What to raise where (A + λ I) is not positive in the span of some directions (n, k)."""
    if not np.isfinite(direction).all():
        return SolverError(
            f"conjugate gradients overflow float64 with ridge {ridge:g}; take a larger ridge, or scale the targets"
        )
    basis, _ = np.linalg.qr(direction)
    smallest = float(ritz_values(basis, operator.multiply(basis))[0])
    enough = float(f"1e{math.ceil(math.log10(max(-2 * smallest, float(np.finfo(operator.dtype).eps))))}")
    return SolverError(
        f"the train Gram matrix of {operator.count} images plus ridge {ridge:g} is not positive definite: its smallest "
        f"eigenvalue without ridge is at most {smallest:.1e} of the mean diagonal {operator.scale:.3g}; take a larger "
        f"ridge, such as {enough:g}, and more if that is not enough{advice_on_dtype(operator.dtype)}"
    )
