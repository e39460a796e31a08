"""Kernel regression, against scikit-learn and SciPy."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.kernel_ridge import KernelRidge

from equigram.errors import DataError, SolverError, SpecError
from equigram.solve import (
    ArrayOperator,
    Solution,
    Targets,
    class_targets,
    memory_needed,
    nested_subset,
    real_targets,
    solve,
    solve_iteratively,
)
from equigram.solve.regression import solve_each

Float64s = NDArray[np.float64]

seeds = st.integers(0, 2**32 - 1)


def gaussian(x: Float64s, y: Float64s) -> Float64s:
    """A kernel with values up to 3: (len(x), len(y))."""
    squares = np.square(x[:, None] - y[None]).sum(axis=-1)
    return np.asarray(3 * np.exp(-squares / (2 * x.shape[1])))


def problem(seed: int = 0, n: int = 40, m: int = 7, k: int = 2) -> tuple[Float64s, Float64s, Float64s]:
    """Train Gram (n, n), cross Gram (m, n) and real targets (n, k)."""
    rng = np.random.default_rng(seed)
    train, test = rng.standard_normal((n, 4)), rng.standard_normal((m, 4))
    return gaussian(train, train), gaussian(test, train), rng.standard_normal((n, k))


def predict(gram: Float64s, cross: Float64s, values: Float64s, ridge: float = 1e-3) -> Float64s:
    return solve(gram, real_targets(values), [ridge])[0].predict(cross)


def three(*rows: tuple[float, float, float]) -> Float64s:
    return np.array(rows, dtype=np.float64)


THREE = Targets(values=np.array([[-1.0], [0.0], [1.0]]), offset=np.zeros(1), classes=None)


# The solution


def test_variances_are_those_of_the_gaussian_process() -> None:
    gram, cross, values = problem()
    itself, s = np.full(len(cross), 3.0), float(gram.diagonal().mean())
    blocks = [(cross[:3], itself[:3]), (cross[3:], itself[3:])]
    for ridge, solution in zip(
        (0.0, 1e-2, 1.0), solve_each(gram, real_targets(values), [0.0, 1e-2, 1.0], queries=lambda: blocks), strict=True
    ):
        assert isinstance(solution, Solution)
        inverse = np.linalg.inv(gram + ridge * s * np.eye(len(gram)))
        assert solution.variances is not None
        np.testing.assert_allclose(solution.variances, itself - ((cross @ inverse) * cross).sum(axis=1), rtol=1e-8)
        assert solution.noisy_variances() == pytest.approx(solution.amplitude * (solution.variances + ridge * s))


def test_the_condition_of_equal_images_is_seen() -> None:
    """Their difference is orthogonal to the vector with which LAPACK's estimate begins, and to equal targets."""
    gram, _, values = problem()
    gram[5], gram[:, 5], gram[5, 5] = gram[2], gram[:, 2], gram[2, 2]
    values[5] = values[2]
    scaled = gram / gram.diagonal().mean() + 1e-8 * np.eye(len(gram))
    true = np.linalg.cond(scaled, 1)
    (solution,) = solve(gram, real_targets(values), [1e-8])
    assert true / 5 < solution.condition < 1.01 * true
    (solution,) = solve(gram.astype(np.float32), real_targets(values), [1e-8])
    assert solution.warning is not None
    found = solve_iteratively(ArrayOperator(gram), real_targets(values), 1e-8)
    assert np.linalg.cond(scaled) / 20 < found.condition < 1.01 * np.linalg.cond(scaled)


def test_the_amplitude_makes_the_targets_most_likely() -> None:
    gram, _, values = problem()
    targets = real_targets(values)
    (solution,) = solve(gram, targets, [1e-2])
    covariance = gram + 1e-2 * gram.diagonal().mean() * np.eye(len(gram))

    def likelihood(amplitude: float) -> float:
        normal = scipy.stats.multivariate_normal(np.zeros(len(gram)), amplitude * covariance)
        return float(normal.logpdf(targets.values.T).sum())

    best = scipy.optimize.minimize_scalar(lambda log: -likelihood(np.exp(log)), bounds=(-9, 9), method="bounded")
    assert solution.amplitude == pytest.approx(np.exp(best.x), rel=1e-4)


def test_queries_with_values_that_are_not_finite_are_refused() -> None:
    gram, cross, values = problem()
    cross[1, 4] = np.nan
    solution = next(solve_each(gram, real_targets(values), [0.1], queries=lambda: [(cross, np.ones(len(cross)))]))
    assert isinstance(solution, SolverError)
    assert "queried image 1 with training image 4" in str(solution)


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-8), (np.float32, 1e-8)])
def test_predictions_equal_scikit_learns_kernel_ridge(ridge: float, dtype: Any, tolerance: float) -> None:
    gram, cross, values = problem()
    gram, cross = gram.astype(dtype), cross.astype(dtype)
    targets = real_targets(values)
    scale = float(np.mean(np.diagonal(gram), dtype=np.float64))
    theirs = KernelRidge(kernel="precomputed", alpha=ridge * scale).fit(gram.astype(np.float64), targets.values)
    ours = solve(gram, targets, [ridge])[0]
    assert ours.scale == pytest.approx(scale, rel=1e-14)
    np.testing.assert_allclose(
        ours.predict(cross), theirs.predict(cross.astype(np.float64)) + targets.offset, rtol=tolerance, atol=tolerance
    )


def test_coefficients_and_residual_equal_scipys_solution() -> None:
    gram, _, values = problem()
    solution = solve(gram, real_targets(values), [1e-2])[0]
    system = gram + 1e-2 * np.mean(np.diagonal(gram)) * np.eye(len(gram))
    centred = values - values.mean(axis=0)
    np.testing.assert_allclose(solution.coefficients, scipy.linalg.solve(system, centred, assume_a="pos"), rtol=1e-9)
    assert solution.coefficients.dtype == np.float64
    assert solution.residual < 1e-13
    residual = np.linalg.norm(system @ solution.coefficients - centred) / np.linalg.norm(centred)
    assert solution.residual == pytest.approx(residual, abs=1e-14)


def test_condition_is_that_of_the_regularised_matrix_in_the_1_norm() -> None:
    gram, _, values = problem()
    solution = solve(gram, real_targets(values), [1e-3])[0]
    exact = np.linalg.cond(gram + 1e-3 * solution.scale * np.eye(len(gram)), 1)
    assert exact / 3 < solution.condition < exact * 1.001


def test_a_path_of_ridge_values_gives_a_solution_each_in_order() -> None:
    gram, cross, values = problem()
    path = solve(gram, real_targets(values), [1e-2, 1e-4, 1])
    assert [solution.ridge for solution in path] == [1e-2, 1e-4, 1]
    for solution in path:
        np.testing.assert_array_equal(solution.predict(cross), predict(gram, cross, values, solution.ridge))


def test_without_ridge_the_training_targets_are_met() -> None:
    gram, _, values = problem()
    np.testing.assert_allclose(predict(gram, gram, values, ridge=0), values, atol=1e-8)


def test_a_huge_ridge_predicts_the_mean() -> None:
    gram, cross, values = problem()
    np.testing.assert_allclose(predict(gram, cross, values, 1e12), np.tile(values.mean(axis=0), (7, 1)), atol=1e-9)


def test_the_gram_matrix_is_not_modified() -> None:
    gram, _, values = problem()
    gram.setflags(write=False)
    copy = gram.copy()
    solve(gram, real_targets(values), [1e-3, 1e-2])
    np.testing.assert_array_equal(gram, copy)


@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_stays_within_what_is_announced(order: Any) -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2500, 30))
    gram = np.asarray(features @ features.T + 30 * np.eye(2500), order=order)
    targets = real_targets(features[:, :1])
    tracemalloc.start()
    try:
        solve(gram, targets, [1e-3, 1e-2])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert gram.nbytes < peak < memory_needed(2500) - gram.nbytes


def test_blocks_of_rows_do_not_change_the_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    gram, cross, values = problem()
    whole = predict(gram, cross, values)
    monkeypatch.setattr("equigram.solve.matrices.BLOCK", 3 * len(gram))
    np.testing.assert_allclose(predict(gram, cross, values), whole, rtol=1e-9)


def test_a_blank_image_with_ridge_changes_no_other_prediction_but_through_the_scale() -> None:
    gram, cross, values = problem(n=20)
    values[3] = values[np.arange(20) != 3].mean(axis=0)
    gram[3] = gram[:, 3] = cross[:, 3] = 0
    rest = np.arange(20) != 3
    without = predict(gram[np.ix_(rest, rest)], cross[:, rest], values[rest], 1e-2 * 19 / 20)
    np.testing.assert_allclose(predict(gram, cross, values, 1e-2), without, rtol=1e-10)


def test_identical_images_with_conflicting_labels_are_averaged() -> None:
    targets = class_targets(np.array([0, 1, 1]), ["a", "b"])
    gram = three((1, 1, 0), (1, 1, 0), (0, 0, 1))
    prediction = solve(gram, targets, [1e-6])[0].predict(gram)
    np.testing.assert_allclose(prediction, np.array([[0.5, 0.5], [0.5, 0.5], [0.0, 1.0]]), atol=1e-5)


def test_rounding_between_the_triangles_is_averaged() -> None:
    gram, cross, values = problem()
    upper = gram * (1 + 1e-10 * np.triu(np.ones_like(gram), 1))
    np.testing.assert_allclose(predict(upper, cross, values), predict(upper.T, cross, values), rtol=1e-12)


def test_a_solution_survives_pickling() -> None:
    gram, cross, values = problem()
    solution = solve(gram, real_targets(values), [1e-3])[0]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(solution)).predict(cross), solution.predict(cross))


def test_no_predicted_images_give_no_predictions() -> None:
    gram, cross, values = problem()
    assert predict(gram, cross[:0], values).shape == (0, 2)


def test_importing_the_solver_loads_no_engine() -> None:
    code = "import equigram.solve, equigram.plot, sys; print({'jax', 'ray', 'numba', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# Laws


@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_the_order_of_training_images_changes_nothing(seed: int) -> None:
    gram, cross, values = problem(seed)
    order = np.random.default_rng(seed).permutation(len(gram))
    permuted = predict(gram[np.ix_(order, order)], cross[:, order], values[order])
    np.testing.assert_allclose(permuted, predict(gram, cross, values), rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, shift=st.floats(-1e3, 1e3))
def test_adding_a_constant_to_the_targets_shifts_the_predictions_by_it(seed: int, shift: float) -> None:
    gram, cross, values = problem(seed)
    np.testing.assert_allclose(
        predict(gram, cross, values + shift), predict(gram, cross, values) + shift, rtol=1e-9, atol=1e-8
    )


@settings(deadline=None, max_examples=30)
@given(seed=seeds, exponent=st.floats(-150, 150))
def test_scaling_the_kernel_changes_nothing(seed: int, exponent: float) -> None:
    gram, cross, values = problem(seed)
    factor = 10.0**exponent
    np.testing.assert_allclose(
        predict(factor * gram, factor * cross, values), predict(gram, cross, values), rtol=1e-9, atol=1e-9
    )


@settings(deadline=None, max_examples=20)
@given(seed=seeds, dtype=st.sampled_from([np.float32, np.float64]), twins=st.integers(2, 30))
def test_the_ridge_that_an_error_names_is_enough(seed: int, dtype: Any, twins: int) -> None:
    gram, _, values = problem(seed)
    copies = np.minimum(np.arange(40), 40 - twins)
    gram = gram[np.ix_(copies, copies)].astype(dtype)
    with pytest.raises(SolverError, match="are the same to this kernel") as caught:
        solve(gram, real_targets(values), [0])
    named = float(str(caught.value).split("take a ridge of ")[1].split(" ")[0])
    assert 0 < named < 1e-4
    solve(gram, real_targets(values), [named])


# Targets


def test_class_targets_are_one_hot_columns_minus_their_mean() -> None:
    targets = class_targets(np.array([2, 0, 2, 2]), ["a", "b", "c"])
    one_hot = np.array([[0, 0, 1], [1, 0, 0], [0, 0, 1], [0, 0, 1]])
    np.testing.assert_array_equal(targets.offset, [0.25, 0, 0.75])
    np.testing.assert_array_equal(targets.values, one_hot - targets.offset)
    assert targets.classes == ("a", "b", "c")


def test_more_classes_than_images_are_fine() -> None:
    targets = class_targets(np.array([4, 1]), [str(label) for label in range(6)])
    solution = solve(np.eye(2), targets, [1e-3])[0]
    np.testing.assert_array_equal(solution.predict(np.eye(2)).argmax(axis=1), [4, 1])


def test_a_constant_real_target_is_predicted_as_its_constant() -> None:
    gram, cross, _ = problem()
    solution = solve(gram, real_targets(np.full((40, 1), 0.5)), [1e-3])[0]
    assert solution.residual == 0
    np.testing.assert_array_equal(solution.predict(cross), np.full((7, 1), 0.5))


@pytest.mark.parametrize(
    ("labels", "error", "text"),
    [
        (
            np.array([1, 1, 1]),
            DataError,
            "all 3 training images are of class 'b', and there is nothing to tell apart; give images of at least two "
            "classes",
        ),
        (
            np.array([0, 2]),
            DataError,
            "training image 1 has label 2, but there are 2 classes, 0 to 1; correct the label or name its class",
        ),
        (np.array([0, -1]), DataError, "training image 1 has label -1, but there are 2 classes"),
        (np.array([], dtype=np.int64), DataError, "there are no training labels; give at least one image"),
        (
            np.array([0.0, 1.0]),
            SpecError,
            "class labels have shape (2,) and dtype float64; they must be (n,) integers, or use real_targets",
        ),
        (np.array([[0, 1]]), SpecError, "class labels have shape (1, 2) and dtype int64"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(labels: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        class_targets(labels, ["a", "b"])
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        (np.zeros(3), SpecError, "real targets have shape (3,) and dtype float64; they must be (n, k) real numbers"),
        (np.zeros((3, 1), dtype=complex), SpecError, "real targets have shape (3, 1) and dtype complex128"),
        (np.zeros((3, 0)), DataError, "real targets have shape (3, 0); give at least one image and one column"),
        (
            np.array([[1.0, 2.0], [3.0, np.nan]]),
            DataError,
            "the target of training image 1, column 1 is nan; it must be finite: correct it or leave the image out",
        ),
        (
            np.full((3, 1), 1e308),
            DataError,
            "the targets reach 1e+308, and their mean overflows float64; scale them",
        ),
    ],
)
def test_real_targets_that_cannot_be_used_are_refused(values: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        real_targets(values)
    assert str(caught.value).startswith(text)


# Refusals of the solver


@pytest.mark.parametrize(
    ("gram", "text"),
    [
        (
            three((1, np.nan, 0), (np.nan, 1, 0), (0, 0, 1)),
            "the train Gram matrix holds nan at (0, 1), training image 0 with 1; it must be finite: verify the run "
            "store, which recomputes damaged tiles",
        ),
        (three((1, 0, 0), (0, 1, 0), (0, 0, np.inf)), "the train Gram matrix holds inf at (2, 2), training image 2"),
        (
            three((1, 0.2, 0), (0.3, 1, 0), (0, 0, 1)),
            "the train Gram matrix is not symmetric: 0.2 at (0, 1), but 0.3 at (1, 0), more than float64 rounding "
            "apart: verify the run store",
        ),
        (
            three((1, 0, 0), (0, -0.5, 0), (0, 0, 1)),
            "the train Gram matrix holds -0.5 at (1, 1), training image 1 with itself; a kernel is 0 or more there: "
            "verify the run store",
        ),
        (
            three((1, 0, -2.5), (0, 4, 0), (-2.5, 0, 1)),
            "the train Gram matrix holds -2.5 at (0, 2), but a kernel is at most √(Θ(x, x) Θ(x', x')) = 1 there: "
            "verify the run store",
        ),
        (
            np.zeros((3, 3)),
            "the diagonal of the train Gram matrix is 0 for all 3 images, and so are all predictions; the images are "
            "blank or the network has weight 0: check data.train and network",
        ),
    ],
    ids=["nan", "infinite", "asymmetric", "negative diagonal", "beyond Cauchy-Schwarz", "zero diagonal"],
)
def test_a_matrix_that_is_no_kernels_is_refused(gram: Float64s, text: str) -> None:
    with pytest.raises(SolverError) as caught:
        solve(gram, THREE, [1e-3])
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("gram", "ridge", "texts"),
    [
        (
            three((1, 1, 0), (1, 1, 0), (0, 0, 1)),
            0,
            [
                "the train Gram matrix of 3 images plus ridge 0 is not positive definite: the smallest eigenvalue ",
                " of the mean diagonal 1 (training images 0 and 1 are the same to this kernel); take a ridge of 1e-15 "
                "or more",
            ],
        ),
        (
            three((1, 1, 0), (1, 1, 0), (0, 0, 1)).astype(np.float32),
            0,
            ["images 0 and 1 are the same to this kernel); take a ridge of 1e-06 or more, or leave one of them out"],
        ),
        (
            three((0, 0, 0), (0, 3, 1), (0, 1, 3)),
            0,
            ["of the mean diagonal 2 (training image 0 is 0 to this kernel); take a ridge of 1e-15 or more"],
        ),
        (
            three((1, 0.9, -0.9), (0.9, 1, 0.9), (-0.9, 0.9, 1)),
            1e-3,
            [
                "plus ridge 0.001 is not positive definite: the smallest eigenvalue without ridge is about -8.0e-01 of "
                "the mean diagonal 1; no rounding error is that large: verify the run store, or take a ridge of 1 or "
                "more",
            ],
        ),
    ],
    ids=["identical images", "float32", "blank image", "indefinite"],
)
def test_a_singular_matrix_is_refused_with_a_ridge_that_is_enough(gram: Any, ridge: float, texts: list[str]) -> None:
    with pytest.raises(SolverError) as caught:
        solve(gram, THREE, [ridge])
    for text in texts:
        assert text in str(caught.value)


def test_the_smallest_eigenvalue_of_an_error_is_right() -> None:
    gram, _, values = problem(n=40)
    vectors = np.linalg.eigh(gram)[1]
    gram -= (1e-3 + vectors[:, 0] @ gram @ vectors[:, 0]) * np.outer(vectors[:, 0], vectors[:, 0])
    named = f"about {np.linalg.eigvalsh(gram)[0] / np.mean(np.diagonal(gram)):.1e} of the mean diagonal"
    with pytest.raises(SolverError) as caught:
        solve(gram, real_targets(values), [0])
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("gram", "ridge", "text"),
    [
        (
            np.eye(4),
            [1.0],
            "the train Gram matrix has shape (4, 4), but there are targets of 3 training images; pass the (3, 3) "
            "matrix of these images",
        ),
        (np.ones((3, 2)), [1.0], "the train Gram matrix has shape (3, 2)"),
        (np.eye(3, dtype=np.int64), [1.0], "the train Gram matrix has dtype int64; it must be float32 or float64"),
        (np.eye(3), [1.0, -1e-3], "ridge -0.001 is not allowed; it must be finite and 0 or more"),
        (np.eye(3), [float("nan")], "ridge nan is not allowed"),
        (np.eye(3), [float("inf")], "ridge inf is not allowed"),
        (np.eye(3), [], "there is no ridge value; give at least one, for example 1e-4"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(gram: Any, ridge: list[float], text: str) -> None:
    with pytest.raises(SpecError) as caught:
        solve(gram, THREE, ridge)
    assert str(caught.value).startswith(text)


def test_coefficients_that_overflow_are_refused() -> None:
    with pytest.raises(SolverError, match=r"the coefficients overflow float64: the mean diagonal .* is 1e-310"):
        solve(1e-310 * np.eye(3), THREE, [0.0])


def solution_of_three() -> Solution:
    return solve(np.eye(3), THREE, [0.5])[0]


@pytest.mark.parametrize(
    ("cross", "error", "text"),
    [
        (
            np.ones((2, 4)),
            SpecError,
            "the cross Gram matrix has shape (2, 4), but the solution has 3 training images; pass (m, 3): a row per "
            "predicted image, a column per training image",
        ),
        (np.ones(3), SpecError, "the cross Gram matrix has shape (3,)"),
        (np.ones((2, 3), dtype=np.float16), SpecError, "the cross Gram matrix has dtype float16"),
        (
            np.array([[0, 0, 0], [0, np.nan, 0]]),
            SolverError,
            "the cross Gram matrix holds nan at (1, 1), predicted image 1 with training image 1; it must be finite",
        ),
        (
            np.array([[1.7e308, 0, -1.7e308], [0, 0, 0]]),
            SolverError,
            "the predictions overflow float64: the cross Gram matrix reaches 1.7e+308, the coefficients 0.667; take a "
            "ridge above 0.5",
        ),
    ],
)
def test_a_cross_matrix_that_cannot_be_used_is_refused(cross: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        solution_of_three().predict(cross)
    assert str(caught.value).startswith(text)


def test_a_condition_number_beyond_the_stored_precision_is_flagged() -> None:
    nearly = three((1, 1 - 1e-7, 0), (1 - 1e-7, 1, 0), (0, 0, 1))
    single = solve(nearly.astype(np.float32), THREE, [1e-9])[0]
    assert single.warning is not None
    assert single.warning == (
        f"with ridge 1e-09 the condition number {single.condition:.1e} exceeds 8.4e+06, what float32 entries "
        "determine; compare with a larger ridge, or compute the matrix in float64 (gram.dtype)"
    )
    assert solve(nearly, THREE, [1e-9])[0].warning is None
    assert solve(nearly.astype(np.float32), THREE, [1e-4])[0].warning is None


# Learning curves


def test_a_nested_subset_is_the_first_images_of_each_class_in_stored_order() -> None:
    labels = np.array([1, 1, 0, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal(nested_subset(labels, 1), [0, 2, 3])
    np.testing.assert_array_equal(nested_subset(labels, 2, ["a", "b", "c"]), [0, 1, 2, 3, 4, 6])


def test_larger_subsets_contain_smaller_ones() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 10))
    subsets = [set(nested_subset(labels, count).tolist()) for count in range(1, 11)]
    assert all(small < large for small, large in itertools.pairwise(subsets))


def test_a_subset_of_real_targets_is_the_first_images() -> None:
    np.testing.assert_array_equal(nested_subset(np.zeros((5, 2)), 3), [0, 1, 2])
    np.testing.assert_array_equal(nested_subset(np.zeros(5), 5), np.arange(5))


@pytest.mark.parametrize(
    ("labels", "count", "classes", "error", "text"),
    [
        (
            [0, 1, 1],
            2,
            ["LYM", "TUM"],
            SpecError,
            "class 'LYM' has 1 training images, but 2 per class are asked for; ask for at most 1 or add images",
        ),
        ([0, 1, 1], 2, None, SpecError, "class '0' has 1 training images, but 2 per class"),
        ([0, 1, 1], 1, ["a", "b", "c"], SpecError, "class 'c' has 0 training images, but 1 per class"),
        ([0, 2], 1, ["a", "b"], DataError, "label 2 is no class: there are 2 classes; name its class"),
        ([0, 1], 0, None, SpecError, "0 training images are asked for; ask for at least 1"),
        ([0.5, 1.5], 3, None, SpecError, "there are 2 training images, but 3 are asked for; ask for at most 2"),
    ],
)
def test_a_subset_that_does_not_exist_is_refused(
    labels: list[float], count: int, classes: list[str] | None, error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        nested_subset(np.array(labels), count, classes)
    assert str(caught.value).startswith(text)


# Metrics
