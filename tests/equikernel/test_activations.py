"""The dual kernels of every activation against quadrature of their definition."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from equikernel import AccuracyWarning, Custom, GroupCNN, NetworkError, finite
from equikernel.activations import LARGEST_DEGREE, NAMED, Activation, parse

Array = NDArray[np.float64]
Function = Callable[[Array], Array]

NAMES = [*NAMED, "leaky_relu(0.1)", "leaky_relu(-2)"]
NAMES += [f"{name}({degree})" for name in ("monomial", "hermite") for degree in range(1, LARGEST_DEGREE + 1)]
FAR = 13.0
"""Standard deviations after which a normal density is nothing."""


def panels(*breaks: float) -> tuple[Array, Array]:
    """Gauss-Legendre nodes and weights on the intervals between ``breaks``."""
    z, w = np.polynomial.legendre.leggauss(60)
    ends = np.array(sorted({*breaks, -FAR, FAR}))
    half, middle = np.diff(ends) / 2, (ends[1:] + ends[:-1]) / 2
    return (middle[:, None] + half[:, None] * z).ravel(), (half[:, None] * w).ravel()


def density(z: Array) -> Array:
    return np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def expectation(f: Function, q1: float, q2: float, c: float) -> float:
    """``E[f(u) f(v)]`` for variances ``q1``, ``q2`` and correlation ``c``, for ``f`` with a kink or jump at 0."""
    s = math.sqrt((1 - c) * (1 + c))
    widths = [w * s for w in (1, 3, 10, 30, 100) if 0 < w * s < FAR]
    z1, weights = panels(0, *widths, *(-width for width in widths))
    if s == 0:
        inner = f(math.sqrt(q2) * c * z1)
    else:
        kink = np.clip(-c * z1 / s, -FAR, FAR)[:, None]
        nodes, w = np.polynomial.legendre.leggauss(60)
        inner = np.zeros_like(z1)
        for low, high in ((-FAR, kink), (kink, FAR)):
            half = (high - low) / 2
            z2 = (high + low) / 2 + half * nodes
            inner += np.sum(half * w * density(z2) * f(math.sqrt(q2) * (c * z1[:, None] + s * z2)), axis=1)
    return float(np.sum(weights * density(z1) * f(math.sqrt(q1) * z1) * inner))


def slope(activation: Activation) -> Function:
    """``σ'`` by central differences."""
    step = 1e-6
    return lambda x: (activation(x + step) - activation(x - step)) / (2 * step)


def dual(activation: Activation, q1: float, q2: float, c: float) -> tuple[float, float]:
    nngp, derivative = activation.dual(np.array(c * math.sqrt(q1 * q2)), np.array(q1), np.array(q2))
    return float(nngp), float(derivative)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("q1", "q2", "c"),
    [(1.0, 1.0, 0.3), (2.0, 0.5, -0.9), (0.01, 0.3, 0.0), (3.0, 3.0, 0.999), (1.0, 2.0, -0.999999)],
)
def test_the_dual_kernels_are_the_expectations(name: str, q1: float, q2: float, c: float) -> None:
    activation = parse(name)
    nngp, derivative = dual(activation, q1, q2, c)
    size = math.sqrt(expectation(activation, q1, q1, 1.0) * expectation(activation, q2, q2, 1.0))
    steepness = math.sqrt(expectation(slope(activation), q1, q1, 1.0) * expectation(slope(activation), q2, q2, 1.0))
    assert abs(nngp - expectation(activation, q1, q2, c)) < 1e-11 * size
    assert abs(derivative - expectation(slope(activation), q1, q2, c)) < 1e-8 * steepness


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", NAMES)
def test_at_the_branch_point_the_dual_kernels_are_those_of_one_variable(name: str, sign: int) -> None:
    """``c = ±1``, also where rounding has moved ``k`` a little away from it."""
    activation = parse(name)
    for rounding in (0.0, 2e-16, -2e-16):
        nngp, derivative = dual(activation, 1.5, 0.7, sign * (1 + rounding))
        size = math.sqrt(expectation(activation, 1.5, 1.5, 1.0) * expectation(activation, 0.7, 0.7, 1.0))
        assert abs(nngp - expectation(activation, 1.5, 0.7, sign)) < 1e-12 * size
        assert abs(derivative - expectation(slope(activation), 1.5, 0.7, sign)) < 1e-8 * max(1, size)


@pytest.mark.parametrize("name", NAMES)
def test_a_variable_without_variance_is_a_constant(name: str) -> None:
    activation = parse(name)
    nngp, derivative = dual(activation, 0.0, 0.7, 0.0)
    assert math.isfinite(derivative)
    mean, weights = panels(0.0)
    expected = float(activation(np.zeros(1))[0] * np.sum(weights * density(mean) * activation(math.sqrt(0.7) * mean)))
    assert abs(nngp - expected) < 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_for_large_and_small_variances(name: str) -> None:
    """``E[σ(u)²]`` between small variances, where σ is its Taylor series, and large ones, against one dimension."""
    activation = parse(name)
    for q in (1e-12, 1e-6, 1e2, 1e4):
        z, weights = panels(0.0, *(sign * width / math.sqrt(q) for sign in (-1, 1) for width in (1, 10) if q > 1))
        exact = float(np.sum(weights * density(z) * activation(math.sqrt(q) * z) ** 2))
        if name not in ("sin", "cos") or q < 10:  # faster waves than the nodes can follow
            assert abs(float(activation.moment(np.array(q))) / exact - 1) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_numpy_and_jax_have_the_same_function_and_dual_kernels(name: str) -> None:
    activation = parse(name)
    x = np.linspace(-3, 3, 13)
    q1, q2 = np.full(5, 0.5), np.full(5, 1.5)
    k = np.array([-1, -0.5, 0, 0.9, 1]) * math.sqrt(0.75)
    x_factors, y_factors = activation.factors(q1), activation.factors(q2)
    with jax.enable_x64(True):
        there = activation(jnp.asarray(x), jnp)
        combined = activation.combine(
            jnp.asarray(k), tuple(map(jnp.asarray, x_factors)), tuple(map(jnp.asarray, y_factors)), 2.2e-16, jnp
        )
    np.testing.assert_allclose(there, activation(x), rtol=1e-13, atol=1e-15)
    for ours, theirs in zip(activation.dual(k, q1, q2), combined, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("function", [np.tanh, jnp.tanh, jax.jit(jnp.tanh)])
def test_a_custom_smooth_activation_converges_to_its_expectation(function: Any) -> None:
    """Also with a function that JAX would compute in float32."""
    activation = Custom(function, nodes=80)
    for q1, q2, c in ((0.5, 0.3, 0.4), (1.0, 0.2, -0.99), (0.7, 0.7, 1.0)):
        nngp, derivative = dual(activation, q1, q2, c)
        assert abs(nngp - expectation(np.tanh, q1, q2, c)) < 1e-10
        assert abs(derivative - expectation(lambda x: 1 - np.tanh(x) ** 2, q1, q2, c)) < 1e-8


def test_a_custom_activation_is_the_built_in_one_where_the_series_ends() -> None:
    x = np.random.default_rng(0).normal(size=(3, 5, 5, 1))
    own = GroupCNN(group="C2", depth=2, activation=Custom(lambda x: x**3, 8), head=(Custom(lambda x: x**2),))
    named = GroupCNN(group="C2", depth=2, activation="monomial(3)", head=("monomial(2)",))
    for ours, theirs in zip(own.kernel(x, dtype="float64"), named.kernel(x, dtype="float64"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11)


def test_a_custom_gram_matrix_is_positive_semidefinite_however_rough_the_activation() -> None:
    x = np.random.default_rng(0).normal(size=(6, 5, 5, 1))
    net = GroupCNN(group="C1", depth=2, activation=Custom(lambda x: np.abs(x) + 0.3, 30))
    with pytest.warns(AccuracyWarning, match=r"a series of 30 terms lacks \d\.\d% of E\[σ'\(u\)²\] for u ~ N\(0, "):
        kernel = net.kernel(x, dtype="float64")
    for values in kernel:
        eigenvalues = np.linalg.eigvalsh(values)
        assert eigenvalues[0] >= -1e-14 * eigenvalues[-1]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: np.exp(x**2 / 2), "E[σ(u)²] is not finite for u ~ N(0, "),
        (lambda x: 1 / x, "E[σ(u)²] is not finite"),
        (lambda x: 1 / (x - 0.3), "E[σ(u)²] is not finite"),
        (np.tan, "E[σ(u)²] is not finite"),
        (lambda x: np.exp(x**2 / 4.2), "or comes from where u is beyond 8 standard deviations"),
        (lambda x: np.where(x > 0, np.nan, x), "integrated on finer grids it is nan, then nan"),
        (lambda x: np.sqrt(np.abs(x)), "a series of 32 terms lacks"),
        (lambda x: np.tanh(6 * x), "of E[σ'(u)²] for u ~ N(0, 1); use nodes="),
        (lambda x: np.tanh(300 * x), "of E[σ'(u)²] for u ~ N(0, 1); use other variances (w_std, images), or a named"),
        (lambda x: x @ x, "the function fails with ValueError: matmul: "),
        (lambda x: math.tanh(x), "the function fails with TypeError: "),
        (np.sign, "E[σ'(u)²] is not finite for u ~ N(0, "),
        (lambda x: np.abs(x) ** -0.25, "so the NTK has no limit; use a continuous function"),
        (lambda x: x - x.mean(), "and of the first one alone [[-0.6, 0.6]]; it must act on arrays entry by entry"),
        (lambda x: x.sum(), "returns shape () and dtype float64; it must act on arrays entry by entry"),
        (lambda x: x.astype(int), "and dtype int64; it must act on arrays entry by entry and return real numbers"),
    ],
)
def test_a_custom_activation_without_kernels_is_refused(function: Any, message: str) -> None:
    with pytest.raises(NetworkError, match=re.escape(message)):
        GroupCNN(group="C1", depth=1, activation=Custom(function)).kernel(np.ones((1, 4, 4, 1)))


def test_the_nodes_that_a_refusal_names_are_enough() -> None:
    def steep(x: Any) -> Any:
        return np.tanh(6 * x)

    with pytest.raises(NetworkError) as refused:
        GroupCNN(group="C1", depth=1, activation=Custom(steep)).kernel(np.ones((1, 4, 4, 1)))
    (nodes,) = re.findall(r"use nodes=(\d+)", str(refused.value))
    with pytest.warns(AccuracyWarning):
        GroupCNN(group="C1", depth=1, activation=Custom(steep, int(nodes))).kernel(np.ones((1, 4, 4, 1)))


@pytest.mark.parametrize("name", ["relu", "abs", "leaky_relu(0.1)"])
def test_a_custom_kink_has_the_exact_nngp_on_the_diagonal_and_nearly_the_ntk(name: str) -> None:
    x = np.random.default_rng(0).normal(size=(4, 6, 6, 1))
    net = GroupCNN(group="C4", depth=3, w_std=1.4, activation=name)
    with pytest.warns(AccuracyWarning, match="because σ has a kink"):
        own = net.model_copy(update={"activation": Custom(parse(name))}).kernel(x, dtype="float64")
    exact = net.kernel(x, dtype="float64")
    np.testing.assert_allclose(own.nngp, exact.nngp, rtol=1e-4)
    np.testing.assert_allclose(own.ntk, exact.ntk, rtol=0.03)
    one = Custom(parse(name))
    with pytest.warns(AccuracyWarning):
        moment, _ = dual(one, 1.7, 1.7, 1.0)
    assert moment == pytest.approx(float(parse(name).moment(np.array(1.7))), rel=1e-6)


@pytest.mark.parametrize(
    ("own", "name", "scale"),
    [(lambda x: np.cos(x), "cos", 1e-7), (lambda x: np.sin(x), "sin", 1e-3), (lambda x: np.cos(x), "cos", 0.0)],
)
def test_small_and_vanishing_variances_of_a_custom_activation(own: Any, name: str, scale: float) -> None:
    x = scale * np.random.default_rng(0).normal(size=(3, 5, 5, 1))
    x[0] = 0
    for engine in ("cpu", "xla", "general", "reference"):
        kernel = GroupCNN(depth=2, activation=Custom(own)).kernel(x, engine=engine, dtype="float64")
        exact = GroupCNN(depth=2, activation=name).kernel(x, engine=engine, dtype="float64")
        for ours, theirs in zip(kernel, exact, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-14)


def test_dim_images_are_checked_beside_bright_ones() -> None:
    def bent(x: Any) -> Any:
        return x + 1e-3 * np.tanh(1e4 * x)

    image = np.random.default_rng(0).normal(size=(1, 5, 5, 1))
    for images in (1e-3 * image, np.concatenate([30 * image, 1e-3 * image])):
        with pytest.raises(NetworkError, match=r"of E\[σ'\(u\)²\] for u ~ N\(0, "):
            GroupCNN(group="C1", depth=1, activation=Custom(bent)).kernel(images, dtype="float64")


def test_a_constant_is_an_activation_and_zeros_are_images() -> None:
    functions: list[Callable[[Any], Any]] = [lambda x: 0 * x + 1, lambda x: np.logaddexp(0, x)]
    for function in functions:
        kernel = GroupCNN(depth=1, activation=Custom(function)).kernel(np.zeros((2, 5, 5, 1)), dtype="float64")
        np.testing.assert_allclose(kernel.nngp, float(function(np.zeros(1))[0]) ** 2)


def test_a_finite_network_needs_a_custom_activation_written_with_jax() -> None:
    net = GroupCNN(group="C1", depth=1, activation=Custom(np.tanh))
    with pytest.raises(NetworkError, match=r"fails with TracerArrayConversionError.*written with jax\.numpy"):
        finite.empirical_kernels(net, 4, jax.random.key(0), np.ones((1, 4, 4, 1)))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_cancels_in_float32_whatever_the_variances(name: str, sign: int) -> None:
    """Relative to ``√(E[σ(u)²] E[σ(v)²])``, and K̇ likewise: differences of large numbers would lose all digits."""
    activation = parse(name)
    c = sign * np.array([0.0, 0.3, 0.6, 0.9, 1.0])
    for q1, q2 in ((1e-4, 1e-4), (1.0, 30.0), (1e3, 1e3), (1e4, 2e4)):
        if name in ("sin", "cos") and q1 > 100:
            continue  # e^-q
        k, first, second = c * math.sqrt(q1 * q2), np.full(5, q1), np.full(5, q2)
        x, y = (tuple(f.astype(np.float32) for f in activation.factors(q)) for q in (first, second))
        single = activation.combine(k.astype(np.float32), x, y, np.finfo(np.float32).eps)
        for values, exact, one, two in zip(
            single,
            activation.dual(k, first, second),
            activation.dual(first, first, first),
            activation.dual(second, second, second),
            strict=True,
        ):
            scale = np.sqrt(one * two)
            assert np.max(np.abs(values - exact)) <= 2e-6 * max(float(scale[0]), 1e-30)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tanh", "'tanh' is not allowed; choose relu, leaky_relu(a), abs, "),
        ("reul", "did you mean 'relu'?"),
        ("leaky_relu", "'leaky_relu' is not allowed"),
        ("leaky_relu(x)", "'leaky_relu(x)' is not allowed; the slope below zero is a number, as in leaky_relu(0.1)"),
        ("leaky_relu(nan)", "the slope below zero is a number"),
        ("hermite(7)", "'hermite(7)' is not allowed; the degree is a whole number from 1 to 6, as in hermite(3)"),
        ("monomial(0)", "the degree is a whole number from 1 to 6"),
        ("relu(1)", "'relu(1)' is not allowed"),
        (3, "activation: 3 is not allowed; choose relu, leaky_relu(a), abs, "),
        (np.tanh, "or equikernel.Custom(function) in Python"),
    ],
)
def test_an_unknown_activation_is_refused_in_words(name: Any, message: str) -> None:
    with pytest.raises(NetworkError, match=re.escape(message)):
        GroupCNN(activation=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3,), "Custom needs a function of one array; 3 is none"), ((np.tanh, 1), "1 nodes; use a whole")],
)
def test_an_unusable_custom_activation_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        Custom(*arguments)


def test_coefficients_of_an_odd_function_are_exactly_zero_where_they_should_be() -> None:
    """Rounding errors there would make a float32 kernel thirty times slower: their products are denormal numbers."""
    coefficients = np.array(Custom(np.tanh, 60).factors(np.array([1e-6, 0.1, 1.0, 4.0]))[2:])
    assert (coefficients[::2] == 0).all()
    assert (coefficients[1:16:2, 1:] != 0).all()


def gentle(u: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.tanh(u / 4) + 0.1)


@pytest.mark.parametrize(
    "activation", [Custom(gentle, 33), Custom(gentle, 12), parse("monomial(3)"), parse("hermite(4)")], ids=str
)
def test_factors_of_a_variance_have_the_same_bits_whatever_comes_with_it(activation: Activation) -> None:
    """A matrix product of another size sums in another order."""
    q = np.random.default_rng(0).uniform(0.1, 3, 500)
    whole = np.array(activation.factors(q))
    for some in (slice(0), slice(1), slice(3), slice(7, 40), slice(100, 400), slice(None, None, 3)):
        np.testing.assert_array_equal(np.array(activation.factors(q[some])), whole[:, some])
    np.testing.assert_array_equal(np.array(activation.factors(q.reshape(2, 50, 5))), whole.reshape(-1, 2, 50, 5))
