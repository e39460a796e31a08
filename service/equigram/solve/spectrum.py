"""What one eigendecomposition of the train Gram matrix tells: any number of ridge values, and training over time.

With Θ(X, X) / s = V diag(e) Vᵀ, where s is the mean diagonal, the squared loss ``½ Σ (f(x) - y)²`` plus the ridge
penalty, and gradient flow of rate η from an infinitely wide network at initialisation, the mean prediction is

    μ_t(x) = ȳ + Θ(x, X) V g_t(e) Vᵀ (Y - ȳ) / s,    g_t(e) = (1 - exp(-(e + λ) t)) / (e + λ)

(Jacot et al. 2018; Lee et al. 2019, equations 13 to 16). Times t are in units of 1 / (η s), so that they mean the same
for every group and kernel: the mode of the eigenvalue e is learned like 1 - exp(-(e + λ) t). At t = ∞ this is kernel
regression with the ridge λ s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from equigram.errors import SolverError, SpecError
from equigram.solve.matrices import Float64s, Floats, check_dtype, check_finite, row_blocks
from equigram.solve.regression import (
    EPS,
    Solution,
    System,
    check_problem,
    finish,
    left_out_predictions,
    not_positive_definite,
)
from equigram.solve.targets import Targets


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Θ(X, X) / s = V diag(e) Vᵀ of n training images."""

    values: Float64s
    """e: (n,), increasing; their mean is 1."""
    vectors: Float64s
    """V: (n, n), an eigenvector in each column."""
    scale: float
    """s: the mean diagonal of Θ(X, X)."""
    dtype: np.dtype[Any]
    """What Θ(X, X) was stored in."""

    def condition(self, ridge: float = 0.0) -> float:
        """The condition number of Θ(X, X) + λ s I in the 2-norm; infinite where it is not positive definite."""
        smallest, largest = float(self.values[0]) + ridge, float(self.values[-1]) + ridge
        return largest / smallest if smallest > EPS * largest else math.inf

    def coefficients(self, targets: Targets, ridge: float = 0.0, time: float = math.inf) -> Float64s:
        """α with μ_t(x) = ȳ + Θ(x, X) α: (n, k) float64.

        Args:
          targets: of the n training images.
          ridge: λ.
          time: t, in units of 1 / (η s); may be infinite.

        Raises:
          SpecError: the ridge or the time is negative or NaN, or the targets are of other images.
          SolverError: t is infinite, and Θ(X, X) + λ s I is not positive definite; or α overflows.
        """
        modes = self._modes(targets, ridge, time)
        with np.errstate(over="ignore", invalid="ignore"):
            alpha: Float64s = self.vectors @ (_learned(self.values + ridge, time)[:, None] * modes) / self.scale
        if not np.isfinite(alpha).all():
            raise SolverError(f"the coefficients at time {time:g} overflow float64; scale the kernel or the targets")
        return alpha

    def fit(self, targets: Targets, ridge: float = 0.0, time: float = math.inf) -> Float64s:
        """μ_t of the training images: (n, k) float64; arguments and errors as :meth:`coefficients`."""
        modes = self._modes(targets, ridge, time)
        learned = self.values * _learned(self.values + ridge, time)
        return np.asarray(self.vectors @ (learned[:, None] * modes) + targets.offset)

    def alignment(self, targets: Targets) -> Float64s:
        """The share of ‖Y - ȳ‖² along each eigenvector: (n,) float64, of sum 1; 0 where the targets are constant."""
        squares = np.square(self.vectors.T @ targets.values).sum(axis=1)
        total = float(squares.sum())
        return np.asarray(squares / total if total else squares)

    def _modes(self, targets: Targets, ridge: float, time: float) -> Float64s:
        """Vᵀ (Y - ȳ): (n, k)."""
        n = len(self.values)
        if len(targets.values) != n:
            raise SpecError(f"there are targets of {len(targets.values)} images, and eigenvectors of {n}; pass {n}")
        _check_numbers(ridge, time)
        if math.isinf(time) and math.isinf(self.condition(ridge)):
            raise SolverError(
                f"the train Gram matrix of {n} images plus ridge {ridge:g} is not positive definite: its smallest "
                f"eigenvalue is {self.values[0]:.1e} of the mean diagonal; take a larger ridge, or a finite time"
            )
        return np.asarray(self.vectors.T @ targets.values)


def memory_for_spectrum(n: int) -> int:
    """Bytes that :func:`eigendecompose` needs for n images: the Gram matrix (as float64), eigenvectors, work space."""
    return 5 * 8 * n * n


def eigendecompose(gram: Floats) -> Spectrum:
    """Eigenvalues and eigenvectors of a train Gram matrix, in float64.

    Args:
      gram: Θ(X, X): (n, n) float32 or float64, symmetric up to √eps of its dtype, times √(Θ(x, x) Θ(x', x')).

    Raises:
      SpecError: the shape or dtype is wrong.
      SolverError: it is not the Gram matrix of a kernel, as :func:`equigram.solve.solve`.
    """
    check_dtype(gram, "train Gram matrix")
    if gram.ndim != 2 or gram.shape != (len(gram), len(gram)) or not gram.size:
        raise SpecError(f"the train Gram matrix has shape {gram.shape}; it must be (n, n), with n of 1 or more")
    system = System(gram)
    values, vectors = system.eigenvalues()
    return Spectrum(values, vectors, system.scale, gram.dtype)


def solve_path(
    gram: Floats, targets: Targets, ridge: Sequence[float], spectrum: Spectrum | None = None
) -> list[Solution]:
    """What :func:`equigram.solve.solve` returns with ``leave_one_out``, all from one eigendecomposition.

    That costs as much as about six Cholesky factorisations with their inverses, and each ridge value nothing then.

    Args:
      gram, targets, ridge: as there.
      spectrum: of ``gram``, where it is known.

    Raises:
      SpecError, SolverError: as there.
    """
    solutions = []
    for solution in solve_path_each(gram, targets, ridge, spectrum):
        if isinstance(solution, SolverError):
            raise solution
        solutions.append(solution)
    return solutions


def solve_path_each(
    gram: Floats, targets: Targets, ridge: Sequence[float], spectrum: Spectrum | None = None
) -> Iterator[Solution | SolverError]:
    """What :func:`solve_path` returns, one at a time; for a ridge value without solution, what it would raise."""
    check_problem(gram, targets, ridge)
    spectrum = eigendecompose(gram) if spectrum is None else spectrum
    squares = np.square(spectrum.vectors)
    modes, ones = spectrum.vectors.T @ targets.values, spectrum.vectors.T @ np.ones((len(gram), 1))
    for one in map(float, ridge):
        try:
            yield _on_path(gram, targets, one, spectrum, squares, modes, ones)
        except SolverError as error:
            yield error


def _on_path(
    gram: Floats,
    targets: Targets,
    ridge: float,
    spectrum: Spectrum,
    squares: Float64s,
    modes: Float64s,
    ones: Float64s,
) -> Solution:
    """A solution, from the squared eigenvectors and what targets and ones are along the eigenvectors."""
    values, vectors, condition = spectrum.values, spectrum.vectors, spectrum.condition(ridge)
    if math.isinf(condition):
        least = max(-2 * values[0], 2 * EPS * values[-1], float(np.finfo(gram.dtype).eps))
        enough = 10.0 ** math.ceil(math.log10(least))
        raise not_positive_definite(gram, spectrum.scale, ridge, float(values[0]), enough)
    inverse = 1 / (values + ridge)
    scaled = vectors @ (inverse[:, None] * modes)
    return finish(
        gram.dtype,
        spectrum.scale,
        targets,
        ridge,
        scaled,
        residual=_product(gram, scaled) / spectrum.scale + ridge * scaled - targets.values,
        condition=condition,
        left_out=left_out_predictions(targets, scaled, vectors @ (inverse[:, None] * ones), squares @ inverse),
    )


def posterior_variance(spectrum: Spectrum, cross: Floats, self_kernels: Floats, ridge: float) -> Float64s:
    """Variance of the Gaussian process with this kernel, given the training targets with noise of variance λ s.

    ``K(x, x) - K(x, X) (K(X, X) + λ s I)⁻¹ K(X, x)``, for every output; its mean is kernel regression. With the NNGP
    this is Bayesian inference with an infinitely wide network.

    Args:
      spectrum: of K(X, X).
      cross: K(x, X): (m, n).
      self_kernels: K(x, x): (m,).
      ridge: λ.

    Returns:
      (m,) float64, without the noise; not below 0.

    Raises:
      SpecError, SolverError: the shapes do not fit, or K(X, X) + λ s I is not positive definite.
    """
    _check_cross(spectrum, cross, "cross Gram matrix")
    _check_numbers(ridge)
    if self_kernels.shape != (len(cross),) or not np.isfinite(self_kernels).all():
        raise SpecError(
            f"the self-kernels have shape {self_kernels.shape}, and there are {len(cross)} images; pass a finite "
            "number for each"
        )
    if math.isinf(spectrum.condition(ridge)):
        raise SolverError(
            f"the train Gram matrix plus ridge {ridge:g} is not positive definite: its smallest eigenvalue is "
            f"{spectrum.values[0]:.1e} of the mean diagonal; take a larger ridge"
        )
    weights = 1 / ((spectrum.values + ridge) * spectrum.scale)
    explained = np.empty(len(cross))
    for rows in row_blocks(*cross.shape):
        explained[rows] = np.square(cross[rows].astype(np.float64) @ spectrum.vectors) @ weights
    return np.asarray(np.maximum(self_kernels - explained, 0.0))


def flow_covariance(
    spectrum: Spectrum,
    cross: Floats,
    nngp: Floats,
    cross_nngp: Floats,
    test_nngp: Floats,
    times: Sequence[float],
    ridge: float = 0.0,
) -> Float64s:
    """Covariance of the outputs of networks that are trained by gradient flow, over their random initialisations.

    With ``T_t = Θ(x, X) V g_t(e) Vᵀ / s`` and the NNGP K it is
    ``K(x, x') - T_t K(X, x') - K(x, X) T_tᵀ + T_t K(X, X) T_tᵀ`` (Lee et al. 2019, equation 16).

    Args:
      spectrum: of the NTK Θ(X, X).
      cross: Θ(x, X): (m, n).
      nngp: K(X, X): (n, n).
      cross_nngp: K(x, X): (m, n).
      test_nngp: K(x, x'): (m, m); or its diagonal (m,), for the variances alone.
      times: t, in units of 1 / (η s); may be infinite.
      ridge: λ.

    Returns:
      (times, m, m) float64, or the variances (times, m).

    Raises:
      SpecError, SolverError: the shapes do not fit, or a time is infinite and Θ(X, X) + λ s I not positive definite.
    """
    n, m = len(spectrum.values), len(cross)
    _check_numbers(ridge, *times)
    for matrix, shape, name in (
        (cross, (m, n), "cross NTK"),
        (nngp, (n, n), "train NNGP"),
        (cross_nngp, (m, n), "cross NNGP"),
        (test_nngp, (m,) if test_nngp.ndim == 1 else (m, m), "test NNGP"),
    ):
        if matrix.shape != shape:
            raise SpecError(f"the {name} has shape {matrix.shape}, and the others need {shape}")
        if matrix.ndim == 2:
            check_finite(matrix, name, "images {0} and {1}")
        elif not np.isfinite(matrix).all():
            raise SolverError(f"the {name} is not finite")
    modes = cross.astype(np.float64) @ spectrum.vectors / spectrum.scale
    between = spectrum.vectors.T @ nngp.astype(np.float64) @ spectrum.vectors
    crossed = cross_nngp.astype(np.float64) @ spectrum.vectors
    found = []
    for time in times:
        if math.isinf(time) and math.isinf(spectrum.condition(ridge)):
            raise SolverError(
                f"at time ∞ the train NTK plus ridge {ridge:g} is not positive definite; take a larger ridge"
            )
        weights = modes * _learned(spectrum.values + ridge, time)
        if test_nngp.ndim == 1:
            change = ((weights @ between) * weights).sum(axis=1) - 2 * (weights * crossed).sum(axis=1)
        else:
            half = weights @ crossed.T
            change = weights @ between @ weights.T - half - half.T
        found.append(test_nngp + change)
    return np.array(found)


def _check_numbers(ridge: float, *times: float) -> None:
    """Raise :class:`SpecError` unless the ridge is finite, and all are 0 or more."""
    for name, value, allowed in (("ridge", ridge, ridge < math.inf), *(("time", time, True) for time in times)):
        if not (value >= 0 and allowed):
            raise SpecError(f"{name} {value:g} is not allowed; it must be 0 or more")


def _learned(rates: Float64s, time: float) -> Float64s:
    """g_t: (1 - exp(-rate t)) / rate; t where rounding has left a rate that is not positive."""
    safe = np.where(rates > 0, rates, 1.0)
    with np.errstate(over="ignore"):
        return np.where(rates > 0, -np.expm1(-safe * time) / safe, time)


def _check_cross(spectrum: Spectrum, cross: Floats, name: str) -> None:
    check_dtype(cross, name)
    if cross.ndim != 2 or cross.shape[1] != len(spectrum.values):
        n = len(spectrum.values)
        raise SpecError(f"the {name} has shape {cross.shape}, and there are {n} training images; pass (m, {n})")
    check_finite(cross, name, "predicted image {0} with training image {1}")


def _product(gram: Floats, values: Float64s) -> Float64s:
    """``(gram + gramᵀ) / 2 @ values`` in float64, a block of rows at a time."""
    product = np.zeros(values.shape)
    for rows in row_blocks(*gram.shape):
        block = gram[rows].astype(np.float64)
        product[rows] += block @ values
        product += block.T @ values[rows]
    return product / 2
