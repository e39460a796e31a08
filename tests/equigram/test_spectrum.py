"""Eigendecompositions of Gram matrices: ridge paths, gradient flow and posteriors, against neural-tangents."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from equigram.errors import SolverError, SpecError
from equigram.solve import (
    Targets,
    class_targets,
    eigendecompose,
    flow_covariance,
    posterior_variance,
    real_targets,
    solve,
    solve_path,
)
from equikernel.tangents import neural_tangents, stax

Float64s = NDArray[np.float64]

RIDGES = (1e-4, 1e-2, 1.0)
TIMES = (0.0, 0.3, 30.0, 1e4)
N, M = 24, 7


def gram_and_targets(seed: int, n: int = N) -> tuple[Float64s, Float64s]:
    """A Gram matrix (n, n) of a kernel between 0 and 3, and targets (n, 2)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 4))
    squares = np.square(x[:, None] - x[None]).sum(axis=-1)
    return np.asarray(3 * np.exp(-squares / 8)), rng.standard_normal((n, 2))


@functools.cache
def network() -> dict[Any, Any]:
    """The kernels of a fully connected network with two hidden layers, float64, and neural-tangents' predictions."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        train, test, targets = (rng.standard_normal(shape) for shape in ((N, 5), (M, 5), (N, 3)))
        targets -= targets.mean(axis=0)
        hidden = (stax.Dense(1, W_std=1.4, b_std=0.3), stax.Relu())
        _, _, kernel_fn = stax.serial(*hidden, *hidden, stax.Dense(1, W_std=1.4))
        gram, cross, inner = (
            kernel_fn(*pair, ("nngp", "ntk")) for pair in ((train, None), (test, train), (test, None))
        )
        found: dict[Any, Any] = {
            f"{name}_{kernel}": np.asarray(getattr(matrices, kernel))
            for name, matrices in (("gram", gram), ("cross", cross), ("inner", inner))
            for kernel in ("nngp", "ntk")
        }
        found["targets"] = targets
        for ridge in (0.0, 1e-2):
            predict = neural_tangents.predict.gradient_descent_mse_ensemble(kernel_fn, train, targets, diag_reg=ridge)
            for time in (*TIMES, None):
                scale = np.trace(found["gram_ntk"]) / N
                # Its loss is the mean over images and outputs, and its times are not in units of the mean diagonal.
                theirs = None if time is None else time * targets.size / scale
                out = predict(t=theirs, x_test=test, get=("nngp", "ntk"), compute_cov=True)
                key = (ridge, math.inf if time is None else time)
                found[key] = {
                    name: (np.asarray(one.mean), np.asarray(one.covariance))
                    for name, one in (("ntk", out.ntk), ("nngp", out.nngp))
                }
    return found


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
@pytest.mark.parametrize("time", [*TIMES, math.inf])
def test_training_over_time_is_that_of_neural_tangents(time: float, ridge: float) -> None:
    them = network()
    spectrum, targets = eigendecompose(them["gram_ntk"]), real_targets(them["targets"])
    mean, covariance = them[ridge, time]["ntk"]
    assert_allclose(them["cross_ntk"] @ spectrum.coefficients(targets, ridge, time), mean, rtol=1e-8, atol=1e-10)
    matrices = them["cross_ntk"], them["gram_nngp"], them["cross_nngp"]
    (ours,) = flow_covariance(spectrum, *matrices, them["inner_nngp"], [time], ridge)
    assert_allclose(ours, covariance, rtol=1e-8, atol=1e-9)
    (variances,) = flow_covariance(spectrum, *matrices, np.diagonal(them["inner_nngp"]), [time], ridge)
    assert_allclose(variances, np.diagonal(covariance), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_the_posterior_is_that_of_neural_tangents(ridge: float) -> None:
    them = network()
    spectrum, targets = eigendecompose(them["gram_nngp"]), real_targets(them["targets"])
    mean, covariance = them[ridge, math.inf]["nngp"]
    assert_allclose(them["cross_nngp"] @ spectrum.coefficients(targets, ridge), mean, rtol=1e-8, atol=1e-10)
    self_kernels = np.diagonal(them["inner_nngp"])
    variance = posterior_variance(spectrum, them["cross_nngp"], self_kernels, ridge)
    assert_allclose(variance, np.diagonal(covariance), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_ridge_path_from_one_eigendecomposition_is_that_of_one_factorisation_each(dtype: Any) -> None:
    gram, values = gram_and_targets(1)
    targets = real_targets(values)
    paths = zip(
        solve_path(gram.astype(dtype), targets, RIDGES),
        solve(gram.astype(dtype), targets, RIDGES, leave_one_out=True),
        strict=True,
    )
    for ours, theirs in paths:
        assert_allclose(ours.coefficients, theirs.coefficients, rtol=1e-8, atol=1e-10)
        assert ours.left_out is not None
        assert theirs.left_out is not None
        assert_allclose(ours.left_out, theirs.left_out, rtol=1e-8, atol=1e-10)
        assert (ours.ridge, ours.scale) == (theirs.ridge, theirs.scale)
        assert ours.residual < 1e-12


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), ridge=st.sampled_from(RIDGES), classes=st.booleans())
def test_leaving_one_out_in_closed_form_is_leaving_it_out(seed: int, ridge: float, classes: bool) -> None:
    gram, values = gram_and_targets(seed, n=9)
    labels = np.arange(9) % 3
    (solution,) = solve(
        gram, class_targets(labels, "abc") if classes else real_targets(values), [ridge], leave_one_out=True
    )
    if classes:
        values = np.eye(3)[labels]
    assert solution.left_out is not None
    for image in range(9):
        rest = np.delete(np.arange(9), image)
        offset = values[rest].mean(axis=0)
        matrix = gram[np.ix_(rest, rest)] + ridge * solution.scale * np.eye(8)
        expected = offset + gram[image, rest] @ np.linalg.solve(matrix, values[rest] - offset)
        assert_allclose(solution.left_out[image], expected, rtol=1e-7, atol=1e-9)


def test_a_single_image_cannot_be_left_out() -> None:
    for one in (
        solve(np.eye(1), real_targets(np.ones((1, 1))), [0.1], leave_one_out=True),
        solve_path(np.eye(1), real_targets(np.ones((1, 1))), [0.1]),
    ):
        assert one[0].left_out is None


def test_training_starts_at_the_mean_and_ends_at_the_regression() -> None:
    gram, values = gram_and_targets(2)
    targets, spectrum = real_targets(values), eigendecompose(gram)
    assert_allclose(spectrum.fit(targets, time=0), np.tile(values.mean(axis=0), (N, 1)))
    assert_allclose(spectrum.fit(targets), values, atol=1e-9)
    for ridge in RIDGES:
        (solution,) = solve(gram, targets, [ridge])
        assert_allclose(spectrum.coefficients(targets, ridge), solution.coefficients, rtol=1e-8, atol=1e-10)
        assert_allclose(spectrum.fit(targets, ridge), solution.predict(gram), rtol=1e-8, atol=1e-9)


def test_each_mode_is_learned_at_its_own_speed() -> None:
    gram, _ = gram_and_targets(3)
    spectrum = eigendecompose(gram)
    for mode in (0, N // 2, N - 1):
        targets = Targets(values=spectrum.vectors[:, [mode]], offset=np.zeros(1), classes=None)
        assert_allclose(spectrum.alignment(targets), np.eye(N)[mode], atol=1e-12)
        learned = spectrum.vectors.T @ spectrum.fit(targets, time=2.0)
        expected = 1 - math.exp(-2.0 * spectrum.values[mode])
        assert_allclose(learned[:, 0], expected * np.eye(N)[mode], atol=1e-12)


def test_constant_targets_are_aligned_with_nothing() -> None:
    gram, _ = gram_and_targets(4)
    assert not eigendecompose(gram).alignment(real_targets(np.full((N, 1), 3.0))).any()


def test_the_variance_falls_with_more_images_and_is_0_at_a_training_image() -> None:
    gram, _ = gram_and_targets(5)
    few, all_of = eigendecompose(gram[:10, :10]), eigendecompose(gram)
    diagonal = np.diagonal(gram)
    prior = posterior_variance(few, gram[20:, :10], diagonal[20:], ridge=1e6)
    some = posterior_variance(few, gram[20:, :10], diagonal[20:], ridge=1e-9)
    none = posterior_variance(all_of, gram[20:], diagonal[20:], ridge=1e-9)
    assert_allclose(prior, 3, rtol=1e-4)
    assert (some < prior).all()
    assert (none < 1e-5).all()


def test_a_singular_matrix_is_refused_with_a_ridge_that_is_enough() -> None:
    gram, values = gram_and_targets(6)
    gram[:, 3], gram[3] = gram[:, 8], gram[8]
    gram[3, 3] = gram[8, 8]
    targets, spectrum = real_targets(values), eigendecompose(gram)
    with pytest.raises(
        SolverError, match=r"plus ridge 0 is not positive definite.*images 3 and 8 are the same"
    ) as error:
        solve_path(gram, targets, [0.0])
    enough = float(str(error.value).split("take a ridge of ")[1].split(" ")[0])
    solve_path(gram, targets, [enough])
    with pytest.raises(SolverError, match=r"not positive definite.*a larger ridge, or a finite time"):
        spectrum.coefficients(targets)
    assert np.isfinite(spectrum.coefficients(targets, time=100)).all()
    with pytest.raises(SolverError, match="not positive definite"):
        posterior_variance(spectrum, gram, np.diagonal(gram), 0.0)
    with pytest.raises(SolverError, match=r"at time ∞ .* not positive definite"):
        flow_covariance(spectrum, gram, gram, gram, gram, [1.0, math.inf])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ridge": -1.0}, "ridge -1 is not allowed"),
        ({"ridge": math.nan}, "ridge nan is not allowed"),
        ({"ridge": math.inf}, "ridge inf is not allowed"),
        ({"time": -1.0}, "time -1 is not allowed"),
        ({"time": math.nan}, "time nan is not allowed"),
    ],
)
def test_values_that_mean_nothing_are_refused(options: dict[str, float], text: str) -> None:
    gram, values = gram_and_targets(7)
    with pytest.raises(SpecError, match=text):
        eigendecompose(gram).coefficients(real_targets(values), **options)


def test_matrices_that_do_not_fit_are_refused() -> None:
    gram, values = gram_and_targets(8)
    spectrum = eigendecompose(gram)
    with pytest.raises(SpecError, match=r"shape \(24, 23\); it must be \(n, n\)"):
        eigendecompose(gram[:, 1:])
    with pytest.raises(SpecError, match="targets of 23 images, and eigenvectors of 24"):
        spectrum.coefficients(real_targets(values[1:]))
    with pytest.raises(SpecError, match=r"shape \(24, 3\), and there are 24 training images"):
        posterior_variance(spectrum, gram[:, :3], np.ones(24), 0.1)
    with pytest.raises(SpecError, match=r"the cross NNGP has shape \(24, 3\), and the others need \(24, 24\)"):
        flow_covariance(spectrum, gram, gram, gram[:, :3], np.ones(24), [1.0])
    with pytest.raises(SolverError, match=r"holds nan at \(0, 0\), images 0 and 0"):
        flow_covariance(spectrum, gram, gram * np.nan, gram, np.ones(24), [1.0])
