"""What is regressed on: the targets of a classification or a regression, and nested subsets of the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equigram.errors import DataError, SpecError
from equigram.solve.matrices import Float64s, Floats


@dataclass(frozen=True, eq=False)
class Targets:
    """What is regressed on: centred columns, and what was subtracted from them."""

    values: Float64s
    """(n, k): the targets minus ``offset``, so that every column has mean 0."""
    offset: Float64s
    """(k,): mean of each column over the training images; predictions get it back."""
    classes: tuple[str, ...] | None
    """Class names of the columns; None for real targets."""


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


def _centred(values: Float64s, classes: tuple[str, ...] | None) -> Targets:
    with np.errstate(over="ignore", invalid="ignore"):
        offset = values.mean(axis=0)
        centred = values - offset
    if not np.isfinite(centred).all():
        raise DataError(f"the targets reach {np.abs(values).max():.3g}, and their mean overflows float64; scale them")
    return Targets(values=centred, offset=offset, classes=classes)
