"""How good predictions are: accuracy, mean squared error, confusion matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from equigram.errors import DataError, SpecError


def accuracy(predictions: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]) -> float:
    """Share of images whose largest prediction is at their label, in 0 … 1; a tie counts for the first class.

    Args:
      predictions: (m, k) floats, one column per class.
      labels: (m,) integers in 0 … k - 1.

    Raises:
      SpecError: the shapes disagree.
      DataError: there are no images, a prediction is not finite, or a label is no column.
    """
    _check_classes(predictions, labels)
    return float(np.mean(predictions.argmax(axis=1) == labels))


def confusion_matrix(predictions: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Counts of images: (k, k) int64, entry (i, j) for those of class i predicted as class j.

    Args:
      predictions: (m, k) floats, one column per class.
      labels: (m,) integers in 0 … k - 1.

    Raises:
      SpecError: the shapes disagree.
      DataError: there are no images, a prediction is not finite, or a label is no column.
    """
    _check_classes(predictions, labels)
    counts = np.zeros((predictions.shape[1],) * 2, dtype=np.int64)
    np.add.at(counts, (labels, predictions.argmax(axis=1)), 1)
    return counts


def mean_squared_error(predictions: NDArray[np.floating[Any]], values: NDArray[np.floating[Any]]) -> float:
    """Mean of (prediction - value)² over all images and columns, in squared units of the targets.

    Args:
      predictions: (m, k) floats.
      values: (m, k) floats, the true targets.

    Raises:
      SpecError: the shapes disagree.
      DataError: there are no images, or something is not finite.
    """
    if predictions.ndim != 2 or predictions.shape != values.shape:
        raise SpecError(
            f"predictions {predictions.shape} and true values {values.shape} must have one shape (m, k); "
            "pass the same images and columns in both"
        )
    _check_values(predictions, "prediction")
    _check_values(values, "true value")
    return float(np.mean(np.square(predictions.astype(np.float64) - values)))


def _check_classes(predictions: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]) -> None:
    if predictions.ndim != 2 or labels.shape != predictions.shape[:1]:
        raise SpecError(
            f"predictions {predictions.shape} and labels {labels.shape} must have shapes (m, k) and (m,); "
            "pass the labels of the predicted images"
        )
    _check_values(predictions, "prediction")
    wrong = np.flatnonzero((labels < 0) | (labels >= predictions.shape[1]))
    if wrong.size:
        raise DataError(
            f"image {wrong[0]} has label {labels[wrong[0]]}, but the predictions have classes 0 to "
            f"{predictions.shape[1] - 1}; give the test images the classes of the training images"
        )


def _check_values(values: NDArray[np.floating[Any]], name: str) -> None:
    if not values.size:
        raise DataError(f"there is no {name} in an array of shape {values.shape}; give at least one test image")
    wrong = np.argwhere(~np.isfinite(values))
    if wrong.size:
        row, column = wrong[0]
        raise DataError(
            f"the {name} of image {row}, column {column} is {values[row, column]}; it must be finite: "
            "verify the run store, then predict again"
        )
