"""Metrics of predictions, against scikit-learn and SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score
from sklearn.metrics import log_loss as log_loss_of_scikit_learn

from equigram.errors import DataError, SpecError
from equigram.solve import (
    accuracy,
    accuracy_interval,
    balanced_accuracy,
    confusion_matrix,
    inverse_temperature,
    log_loss,
    mean_squared_error,
    negative_log_likelihood,
    probabilities,
)

Float64s = NDArray[np.float64]

SCORES = np.array([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.0, 0.1, 0.9]])


def test_accuracy_is_the_share_of_largest_predictions_at_the_label() -> None:
    assert accuracy(SCORES, np.array([0, 1, 0, 1])) == 0.75


def test_the_confusion_matrix_counts_true_classes_in_rows() -> None:
    np.testing.assert_array_equal(confusion_matrix(SCORES, np.array([0, 1, 0, 1])), [[2, 0, 0], [0, 1, 1], [0, 0, 0]])


def test_the_mean_squared_error_is_over_images_and_columns() -> None:
    assert mean_squared_error(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 0.0], [3.0, 0.0]])) == 5.0


@pytest.mark.parametrize(
    "metric", [accuracy, accuracy_interval, balanced_accuracy, confusion_matrix, inverse_temperature, log_loss]
)
@pytest.mark.parametrize(
    ("scores", "labels", "error", "text"),
    [
        (SCORES, [0, 1], SpecError, "predictions (4, 3) and labels (2,) must have shapes (m, k) and (m,)"),
        (SCORES, [0, 1, 2, 3], DataError, "image 3 has label 3, but the predictions have classes 0 to 2"),
        (SCORES[:0], [], DataError, "there is no prediction in an array of shape (0, 3)"),
        (SCORES * np.nan, [0, 1, 2, 2], DataError, "the prediction of image 0, column 0 is nan; it must be finite"),
    ],
)
def test_metrics_of_classes_refuse_what_they_cannot_count(
    metric: Any, scores: Float64s, labels: list[int], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        metric(scores, np.array(labels, dtype=np.int64))
    assert str(caught.value).startswith(text)


def test_the_mean_squared_error_refuses_other_shapes_and_nan() -> None:
    with pytest.raises(SpecError, match=r"predictions \(4, 3\) and true values \(4, 2\) must have one shape"):
        mean_squared_error(SCORES, SCORES[:, :2])
    with pytest.raises(DataError, match="the true value of image 0, column 0 is nan"):
        mean_squared_error(SCORES, SCORES * np.nan)


@pytest.mark.parametrize(("right", "count"), [(0, 7), (3, 4), (100, 100), (512, 1000)])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_interval_of_the_accuracy_is_wilsons(right: int, count: int, confidence: float) -> None:
    scores, labels = np.eye(2)[np.zeros(count, dtype=int)], (np.arange(count) >= right).astype(int)
    expected = scipy.stats.binomtest(right, count).proportion_ci(confidence, method="wilson")
    assert_allclose(accuracy_interval(scores, labels, confidence), expected, atol=1e-15)


def test_the_interval_of_the_accuracy_holds_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    labels, held = np.zeros(200, dtype=np.int64), 0
    for _ in range(400):
        right = rng.random(200) < 0.9
        low, high = accuracy_interval(np.stack([right, ~right], axis=1).astype(float), labels)
        held += low <= 0.9 <= high
    assert 0.92 * 400 < held < 0.98 * 400


def test_the_balanced_accuracy_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.choice(4, size=60, p=[0.7, 0.2, 0.1, 0]), rng.random((60, 4))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = balanced_accuracy_score(labels, scores.argmax(axis=1))
    assert_allclose(balanced_accuracy(scores, labels), expected)


def test_the_negative_log_likelihood_is_that_of_a_normal_distribution() -> None:
    rng = np.random.default_rng(0)
    values, predictions, variances = rng.normal(size=(5, 2)), rng.normal(size=(5, 2)), rng.random(5) + 0.1
    expected = -scipy.stats.norm(predictions, np.sqrt(variances)[:, None]).logpdf(values).mean()
    assert_allclose(negative_log_likelihood(predictions, variances, values), expected)


def test_the_negative_log_likelihood_refuses_variances_that_are_none() -> None:
    with pytest.raises(SpecError, match=r"variances \(3,\) do not fit predictions \(4, 3\)"):
        negative_log_likelihood(SCORES, np.ones(3), SCORES)
    with pytest.raises(DataError, match=r"the variance of image 1 is 0; it must be above 0: add the variance"):
        negative_log_likelihood(SCORES, np.array([1.0, 0.0, 1.0, np.nan]), SCORES)


def test_the_temperature_is_found_again() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    beta = inverse_temperature(logits / 5, labels)
    assert 4.5 < beta < 5.5
    chances = probabilities(logits / 5, beta)
    assert_allclose(chances.sum(axis=1), 1)
    losses = [log_loss(logits / 5, labels, beta * factor) for factor in (0.8, 1.0, 1.25)]
    assert losses[1] == min(losses)
    assert losses[1] == pytest.approx(log_loss_of_scikit_learn(labels, chances))


def test_the_log_loss_is_finite_where_a_probability_is_not_above_zero() -> None:
    assert log_loss(np.array([[2000.0, 0.0]]), np.array([1])) == 2000.0


def test_separable_classes_have_a_finite_temperature() -> None:
    assert 10 < inverse_temperature(np.eye(3), np.arange(3)) <= 100
