"""How good predictions are, and how sure: accuracies, errors, likelihoods, calibrated probabilities."""

from __future__ import annotations

import math
from statistics import NormalDist
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


def accuracy_interval(
    predictions: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], confidence: float = 0.95
) -> tuple[float, float]:
    """Bounds of the accuracy on images like these, by Wilson's score interval for a binomial proportion.

    Args:
      predictions: (m, k) floats, one column per class.
      labels: (m,) integers in 0 … k - 1.
      confidence: the share of such intervals that hold the accuracy, between 0 and 1.

    Raises:
      SpecError: the shapes disagree.
      DataError: there are no images, a prediction is not finite, or a label is no column.
    """
    # scipy.stats has it, too, but takes a second to import.
    share, n = accuracy(predictions, labels), len(labels)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, (middle - half) / (1 + z**2 / n)), min(1.0, (middle + half) / (1 + z**2 / n))


def balanced_accuracy(predictions: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]) -> float:
    """Mean over the classes that occur of the share of their images that are predicted right, in 0 … 1.

    Args:
      predictions: (m, k) floats, one column per class.
      labels: (m,) integers in 0 … k - 1.

    Raises:
      SpecError: the shapes disagree.
      DataError: there are no images, a prediction is not finite, or a label is no column.
    """
    counts = confusion_matrix(predictions, labels)
    images = counts.sum(axis=1)
    there = images > 0
    return float(np.mean(np.diagonal(counts)[there] / images[there]))


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


def negative_log_likelihood(
    predictions: NDArray[np.floating[Any]], variances: NDArray[np.floating[Any]], values: NDArray[np.floating[Any]]
) -> float:
    """Mean of ``½ log(2π σ²) + (value - prediction)² / (2 σ²)`` over all images and columns, in nats.

    Args:
      predictions: (m, k) floats.
      variances: σ², (m,) floats above 0, the same for all columns of an image; with the noise, if there is any.
      values: (m, k) floats, the true targets.

    Raises:
      SpecError: the shapes disagree.
      DataError: there are no images, something is not finite, or a variance is not above 0.
    """
    mean_squared_error(predictions, values)  # checks both
    if variances.shape != predictions.shape[:1]:
        raise SpecError(f"variances {variances.shape} do not fit predictions {predictions.shape}; pass one per image")
    wrong = np.flatnonzero(~(np.isfinite(variances) & (variances > 0)))
    if wrong.size:
        raise DataError(
            f"the variance of image {wrong[0]} is {variances[wrong[0]]:g}; it must be above 0: add the variance of "
            "the noise, which is the ridge"
        )
    spread = variances.astype(np.float64)[:, None]
    squares = np.square(predictions.astype(np.float64) - values)
    return float(np.mean(0.5 * np.log(2 * np.pi * spread) + squares / (2 * spread)))


def log_loss(predictions: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], beta: float = 1.0) -> float:
    """Mean of -log of the probability of the true class by ``softmax(β predictions)``, in nats.

    Args:
      predictions: (m, k) floats, one column per class.
      labels: (m,) integers in 0 … k - 1.
      beta: from :func:`inverse_temperature`.

    Raises:
      SpecError: the shapes disagree.
      DataError: there are no images, a prediction is not finite, or a label is no column.
    """
    from scipy.special import log_softmax

    _check_classes(predictions, labels)
    logs = log_softmax(beta * predictions.astype(np.float64), axis=1)
    return -float(logs[np.arange(len(labels)), labels].mean())


def inverse_temperature(predictions: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]) -> float:
    """β for which ``softmax(β predictions)`` gives the labels the largest likelihood (Guo et al. 2017).

    Args:
      predictions: (n, k) floats for images whose labels were not used to predict them: predictions that leave the
        image out.
      labels: (n,) integers in 0 … k - 1.

    Returns:
      0.01 to 100: separable classes would have an infinite one.

    Raises:
      SpecError: the shapes disagree.
      DataError: there are no images, a prediction is not finite, or a label is no column.
    """
    from scipy.optimize import minimize_scalar

    def loss(exponent: float) -> float:
        return log_loss(predictions, labels, 10.0**exponent)

    return float(10.0 ** minimize_scalar(loss, bounds=(-2.0, 2.0), method="bounded").x)


def probabilities(predictions: NDArray[np.floating[Any]], beta: float) -> NDArray[np.float64]:
    """``softmax(β predictions)``: (m, k) float64, each row of sum 1.

    Args:
      predictions: (m, k) floats, one column per class.
      beta: from :func:`inverse_temperature`.
    """
    from scipy.special import softmax

    return np.asarray(softmax(beta * predictions.astype(np.float64), axis=1))


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
