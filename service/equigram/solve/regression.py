"""Kernel regression with a Gram matrix in memory: μ(x) = ȳ + Θ(x, X) (Θ(X, X) + λ s I)⁻¹ (Y - ȳ).

``X`` are the n training images, ``Y`` their targets with mean ``ȳ``, ``s`` the mean diagonal of Θ(X, X). The ridge λ is
in units of s, so one value means the same for every group and kernel, and scaling a kernel changes no prediction.
Everything is solved in float64 by a Cholesky factorisation of A = Θ(X, X) / s + λ I, one for each λ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from equigram.errors import DataError, SolverError, SpecError

Floats = NDArray[np.floating[Any]]
Float64s = NDArray[np.float64]

_BLOCK = 2**20
"""Matrix entries converted to float64 at a time (8 MiB)."""

_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class Targets:
    """What is regressed on: centred columns, and what was subtracted from them."""

    values: Float64s
    """(n, k): the targets minus ``offset``, so that every column has mean 0."""
    offset: Float64s
    """(k,): mean of each column over the training images; predictions get it back."""
    classes: tuple[str, ...] | None
    """Class names of the columns; None for real targets."""


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
    """Estimate (LAPACK ``pocon``) of the condition number of Θ(X, X) + λ s I in the 1-norm."""
    warning: str | None
    """One sentence where ``condition`` exceeds 1 / eps of the dtype the Gram matrix came in, else None.

    Then rounding of the stored entries can change the coefficients at will. Predictions suffer less, but compare
    them with those of a larger ridge.
    """

    def predict(self, cross: Floats) -> Float64s:
        """μ(x) = Θ(x, X) α + offset: (m, k) float64.

        Args:
          cross: Θ(x, X): (m, n) float32 or float64, one row per image x; columns as the rows of the train Gram.

        Raises:
          SpecError: ``cross`` has other columns than training images.
          SolverError: an entry of ``cross`` or a prediction is not finite.
        """
        _check_dtype(cross, "cross Gram matrix")
        n, k = self.coefficients.shape
        if cross.ndim != 2 or cross.shape[1] != n:
            raise SpecError(
                f"the cross Gram matrix has shape {cross.shape}, but the solution has {n} training images; "
                f"pass (m, {n}): a row per predicted image, a column per training image"
            )
        _check_finite(cross, "cross Gram matrix", "predicted image {0} with training image {1}")
        predictions = np.empty((len(cross), k))
        for rows in _row_blocks(*cross.shape):
            with np.errstate(over="ignore", invalid="ignore"):
                predictions[rows] = cross[rows].astype(np.float64) @ self.coefficients + self.offset
        if not np.isfinite(predictions).all():
            raise SolverError(
                f"the predictions overflow float64: the cross Gram matrix reaches {np.abs(cross).max():.3g}, the "
                f"coefficients {np.abs(self.coefficients).max():.3g}; take a ridge above {self.ridge:g}"
            )
        return predictions


def class_targets(labels: NDArray[np.integer[Any]], classes: Sequence[str]) -> Targets:
    """Targets of a classification: one-hot columns, each minus its mean over the training images.

    Args:
      labels: (n,) integers in 0 … len(classes) - 1. A class may have no image; its column is then 0.
      classes: names of the classes. The predicted class is the column with the largest prediction.

    Raises:
      SpecError: ``labels`` is not an (n,) integer array.
      DataError: there is no image, a label is no class, or all images are of one class.
    """
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise SpecError(
            f"class labels have shape {labels.shape} and dtype {labels.dtype}; they must be (n,) integers, "
            "or use real_targets for real values"
        )
    if not labels.size:
        raise DataError("there are no training labels; give at least one image of two classes")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if wrong.size:
        raise DataError(
            f"training image {wrong[0]} has label {labels[wrong[0]]}, but there are {len(classes)} classes, 0 to "
            f"{len(classes) - 1}; correct the label or name its class"
        )
    if (labels == labels[0]).all():
        raise DataError(
            f"all {len(labels)} training images are of class {classes[labels[0]]!r}, and there is nothing to tell "
            "apart; give images of at least two classes"
        )
    one_hot = np.zeros((len(labels), len(classes)))
    one_hot[np.arange(len(labels)), labels] = 1
    return _centred(one_hot, tuple(classes))


def real_targets(values: Floats) -> Targets:
    """Targets of a regression: each column minus its mean over the training images.

    Args:
      values: (n, k) real numbers in any unit. A constant column is predicted as its constant.

    Raises:
      SpecError: ``values`` is not an (n, k) array of real numbers.
      DataError: there is no image or column, or a value is not finite.
    """
    if values.ndim != 2 or values.dtype.kind not in "iuf":
        raise SpecError(
            f"real targets have shape {values.shape} and dtype {values.dtype}; they must be (n, k) real numbers, "
            "one row per training image"
        )
    if not values.size:
        raise DataError(f"real targets have shape {values.shape}; give at least one image and one column")
    wrong = np.argwhere(~np.isfinite(values))
    if wrong.size:
        row, column = wrong[0]
        raise DataError(
            f"the target of training image {row}, column {column} is {values[row, column]}; it must be finite: "
            "correct it or leave the image out"
        )
    return _centred(values.astype(np.float64), None)


def nested_subset(
    labels: NDArray[np.generic], per_class: int, classes: Sequence[str] | None = None
) -> NDArray[np.int64]:
    """The training images of one point of a learning curve: a larger ``per_class`` keeps all of a smaller one.

    Args:
      labels: (n,) integers for classes: the first ``per_class`` images of each class. Otherwise real targets, (n,)
        or (n, k) floats: the first ``per_class`` images of all.
      per_class: images, at least 1.
      classes: names of the classes, each of which must have images; without them the labels that occur.

    Returns:
      Indices of the images, increasing, (count,) int64.

    Raises:
      SpecError: ``per_class`` is below 1, or there are fewer images.
      DataError: a label is no class.
    """
    if per_class < 1:
        raise SpecError(f"{per_class} training images are asked for; ask for at least 1")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        if len(labels) < per_class:
            raise SpecError(
                f"there are {len(labels)} training images, but {per_class} are asked for; ask for at most {len(labels)}"
            )
        return np.arange(per_class)
    names = {label: str(label) for label in np.unique(labels).tolist()}
    if classes is not None:
        unknown = [label for label in names if not 0 <= label < len(classes)]
        if unknown:
            raise DataError(f"label {unknown[0]} is no class: there are {len(classes)} classes; name its class")
        names = dict(enumerate(classes))
    if not labels.size:
        raise DataError("there are no training labels; give at least one image")
    members = {label: np.flatnonzero(labels == label) for label in names}
    for label, images in members.items():
        if len(images) < per_class:
            raise SpecError(
                f"class {names[label]!r} has {len(images)} training images, but {per_class} per class are asked for; "
                f"ask for at most {len(images)} or add images"
            )
    return np.sort(np.concatenate([images[:per_class] for images in members.values()]))


def memory_needed(n: int) -> int:
    """Bytes that :func:`solve` needs for n training images: the Gram matrix (as float64), one copy, some blocks."""
    return 2 * 8 * n * n + 6 * 8 * max(_BLOCK, n)


def solve(gram: Floats, targets: Targets, ridge: Sequence[float]) -> list[Solution]:
    """Kernel regression for each ridge value, in their order.

    The two triangles are averaged, and everything after reading ``gram`` is float64. ``gram`` is not modified; memory
    beyond it is one n² float64 array, see :func:`memory_needed`.

    Args:
      gram: Θ(X, X): (n, n) float32 or float64, symmetric up to √eps of its dtype, times √(Θ(x, x) Θ(x', x')).
      targets: from :func:`class_targets` or :func:`real_targets`.
      ridge: λ ≥ 0, in units of the mean diagonal of ``gram``.

    Raises:
      SpecError: a shape, dtype or ridge value is wrong.
      SolverError: ``gram`` is not finite, not symmetric, has a negative or only zero diagonal or an entry above
        √(Θ(x, x) Θ(x', x')), or with a ridge value is not positive definite to float64 rounding (the message names a
        ridge that is enough).
    """
    _check_dtype(gram, "train Gram matrix")
    n = len(targets.values)
    if gram.shape != (n, n):
        raise SpecError(
            f"the train Gram matrix has shape {gram.shape}, but there are targets of {n} training images; "
            f"pass the ({n}, {n}) matrix of these images"
        )
    for value in ridge:
        if not (value >= 0 and math.isfinite(value)):
            raise SpecError(f"ridge {value:g} is not allowed; it must be finite and 0 or more")
    if not ridge:
        raise SpecError("there is no ridge value; give at least one, for example 1e-4")
    scale = _checked_scale(gram)
    return [_solve_one(gram, scale, targets, float(value)) for value in ridge]


def _solve_one(gram: Floats, scale: float, targets: Targets, ridge: float) -> Solution:
    factor, condition = _factorise(gram, scale, ridge)
    if condition is None:
        del factor
        raise _not_positive_definite(gram, scale, ridge)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled, _ = lapack.dpotrs(factor, targets.values, lower=1)
        coefficients = np.ascontiguousarray(scaled / scale)
    if not np.isfinite(coefficients).all():
        raise SolverError(
            f"the coefficients overflow float64: the mean diagonal of the train Gram matrix is {scale:.3g} and the "
            f"targets reach {np.abs(targets.values).max():.3g}; scale the kernel or the targets towards 1"
        )
    residual = np.concatenate([block @ scaled for _, block in _scaled_blocks(gram, scale, ridge)]) - targets.values
    size = float(np.linalg.norm(targets.values))
    limit = 1 / float(np.finfo(gram.dtype).eps)
    return Solution(
        ridge=ridge,
        scale=scale,
        coefficients=coefficients,
        offset=targets.offset,
        residual=float(np.linalg.norm(residual)) / size if size else 0.0,
        condition=condition,
        warning=(
            f"with ridge {ridge:g} the condition number {condition:.1e} exceeds {limit:.1e}, what {gram.dtype} entries "
            f"determine; compare with a larger ridge{_advice_on_dtype(gram)}"
            if condition > limit
            else None
        ),
    )


def _factorise(gram: Floats, scale: float, ridge: float) -> tuple[Float64s, float | None]:
    """Cholesky factor of A = gram / scale + ridge I, lower triangle of an (n, n) array, and A's condition number.

    The condition number is None where A is not positive definite to float64 rounding: the factorisation fails, or
    survives by chance with a condition number beyond 1 / eps.
    """
    matrix = np.empty(gram.shape, dtype=np.float64)
    norm = 0.0
    for rows, block in _scaled_blocks(gram, scale, ridge):
        matrix[rows] = block
        norm = max(norm, float(np.abs(block, out=block).sum(axis=1).max()))
    # The transpose of this symmetric matrix is what LAPACK overwrites without a copy.
    factor, failed = lapack.dpotrf(matrix.T, lower=1, clean=0, overwrite_a=1)
    if failed:
        return factor, None
    inverse_condition, _ = lapack.dpocon(factor, norm, uplo=b"L")
    return factor, 1 / inverse_condition if inverse_condition >= _EPS else None


def _not_positive_definite(gram: Floats, scale: float, ridge: float) -> SolverError:
    """Raise the ridge until A is positive definite, then find A's smallest eigenvalue by inverse iteration."""
    n = len(gram)
    exponent = math.floor(math.log10(max(ridge, float(np.finfo(gram.dtype).eps)))) + 1
    while True:
        enough = float(f"1e{exponent}")
        factor, condition = _factorise(gram, scale, enough)
        if condition is not None:
            break
        del factor
        exponent += 1
    vector = np.random.default_rng(0).standard_normal((n, 1))
    smallest = 0.0
    for _ in range(50):
        vector /= np.linalg.norm(vector)
        step, _ = lapack.dpotrs(factor, vector, lower=1)
        smallest = 1 / float(vector[:, 0] @ step[:, 0]) - enough
        vector = step
    remedy = f"take a ridge of {enough:g} or more{_advice_on_dtype(gram)}"
    if enough > 1e-2:
        remedy = f"no rounding error is that large: verify the run store, or take a ridge of {enough:g} or more"
    return SolverError(
        f"the train Gram matrix of {n} images plus ridge {ridge:g} is not positive definite: the smallest eigenvalue "
        f"without ridge is about {smallest:.1e} of the mean diagonal {scale:.3g}{_cause(gram)}; {remedy}"
    )


def _cause(gram: Floats) -> str:
    """Names a training image whose kernel is 0, or two whose kernels are proportional, if there are any."""
    diagonal = np.diagonal(gram).astype(np.float64)
    if not diagonal.all():
        return f" (training image {np.argmin(diagonal)} is 0 to this kernel)"
    size = np.sqrt(diagonal)
    rounding = 8 * float(np.finfo(gram.dtype).eps)
    for rows in _row_blocks(*gram.shape):
        correlation = gram[rows] / size[rows, None] / size
        correlation[np.arange(len(correlation)), np.arange(len(gram))[rows]] = -1
        first, second = np.unravel_index(correlation.argmax(), correlation.shape)
        if correlation[first, second] > 1 - rounding:
            return f" (training images {rows.start + first} and {second} are the same to this kernel)"
    return ""


def _advice_on_dtype(gram: Floats) -> str:
    return ", or compute the matrix in float64 (gram.dtype)" if gram.dtype == np.float32 else ""


def _centred(values: Float64s, classes: tuple[str, ...] | None) -> Targets:
    with np.errstate(over="ignore", invalid="ignore"):
        offset = values.mean(axis=0)
        centred = values - offset
    if not np.isfinite(centred).all():
        raise DataError(f"the targets reach {np.abs(values).max():.3g}, and their mean overflows float64; scale them")
    return Targets(values=centred, offset=offset, classes=classes)


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _scaled_blocks(gram: Floats, scale: float, ridge: float) -> Iterator[tuple[slice, Float64s]]:
    """Rows of A = (gram + gramᵀ) / (2 scale) + ridge I as float64, a block at a time."""
    for rows in _row_blocks(*gram.shape):
        block = gram[rows].astype(np.float64)
        block /= scale
        block += gram[:, rows].T.astype(np.float64) / scale
        block /= 2
        diagonal = np.arange(rows.start, rows.stop)
        block[diagonal - rows.start, diagonal] += ridge
        yield rows, block


def _check_dtype(matrix: Floats, name: str) -> None:
    if matrix.dtype not in (np.float32, np.float64):
        raise SpecError(f"the {name} has dtype {matrix.dtype}; it must be float32 or float64")


def _check_finite(matrix: Floats, name: str, images: str) -> None:
    for rows in _row_blocks(*matrix.shape):
        wrong = np.argwhere(~np.isfinite(matrix[rows]))
        if wrong.size:
            row, column = rows.start + wrong[0, 0], wrong[0, 1]
            raise SolverError(
                f"the {name} holds {matrix[row, column]} at ({row}, {column}), {images.format(row, column)}; it must "
                "be finite: verify the run store, which recomputes damaged tiles"
            )


def _checked_scale(gram: Floats) -> float:
    """Mean diagonal of ``gram``, once every pair of images has a finite and symmetric value that a kernel can have."""
    _check_finite(gram, "train Gram matrix", "training image {0} with {1}")
    diagonal = np.diagonal(gram).astype(np.float64)
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
    rounding = math.sqrt(float(np.finfo(gram.dtype).eps))
    size = np.sqrt(diagonal)
    for rows in _row_blocks(*gram.shape):
        block = gram[rows].astype(np.float64)
        bound = size[rows, None] * size
        wrong = np.argwhere(np.abs(block) > (1 + rounding) * bound)
        if wrong.size:
            row, column = rows.start + wrong[0, 0], wrong[0, 1]
            raise SolverError(
                f"the train Gram matrix holds {gram[row, column]:.6g} at ({row}, {column}), but a kernel is at most "
                f"√(Θ(x, x) Θ(x', x')) = {size[row] * size[column]:.6g} there: verify the run store"
            )
        block -= gram[:, rows].T
        wrong = np.argwhere(np.abs(block) > rounding * bound)
        if wrong.size:
            row, column = rows.start + wrong[0, 0], wrong[0, 1]
            raise SolverError(
                f"the train Gram matrix is not symmetric: {gram[row, column]:.6g} at ({row}, {column}), but "
                f"{gram[column, row]:.6g} at ({column}, {row}), more than {gram.dtype} rounding apart: "
                "verify the run store"
            )
    return scale
