"""Group convolutions as layers of neural-tangents: limits, finite networks, and neural-tangents' own tools on them."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from equikernel import Activation, AvgPool, Conv, GroupCNN, ImageError, NetworkError, Residual
from equikernel.groups import symmetries
from equikernel.tangents import GroupConv, GroupPool, Lift, neural_tangents, stax

Array = NDArray[Any]


def images(n: int, seed: int, height: int = 5, width: int = 5) -> Array:
    return np.random.default_rng(seed).uniform(size=(n, height, width, 2)).astype(np.float32)


X1, X2 = images(3, seed=1), images(2, seed=2)
READOUT = stax.Dense(1)
SMALL: Any = "same"


def wrong(value: object) -> Any:
    """An argument of a wrong type."""
    return value


def network(group: str, width: int = 1, padding: Any = "SAME", **std: float) -> Any:
    """Two convolutions with ReLU and erf, group pooling, a dense layer with ReLU, and the read-out."""
    return stax.serial(
        Lift(group, width, padding=padding, W_std=1.3, b_std=0.2),
        stax.Relu(),
        GroupConv(group, width, padding=padding, W_std=1.3, b_std=0.2),
        stax.Erf(),
        GroupPool(),
        stax.Dense(width, W_std=1.3, b_std=0.2),
        stax.Relu(),
        stax.Dense(1, W_std=1.3, b_std=0.2),
    )


def both(layers: Any, x1: Array, x2: Array | None = None) -> tuple[Array, Array]:
    """NNGP and NTK, compiled."""
    nngp, ntk = jax.jit(lambda x1, x2: layers[2](x1, x2, ("nngp", "ntk")))(x1, x1 if x2 is None else x2)
    return np.asarray(nngp), np.asarray(ntk)


def layers_of(group: str, padding: str) -> GroupCNN:
    """The same network."""
    layers = [Conv(3), Conv(3, activation="erf")]
    return GroupCNN(group=group, layers=layers, padding=padding, w_std=1.3, b_std=0.2, head=("relu",))


@pytest.mark.parametrize(
    ("group", "padding"),
    [("C2", "VALID"), ("C4", "CIRCULAR"), ("D4", "SAME"), ("C3", "SAME")],
)
def test_the_kernels_are_those_of_the_literal_recursion(group: str, padding: str) -> None:
    nngp, ntk = both(network(group, padding=padding), X1, X2)
    exact = layers_of(group, padding).kernel(X1, X2, engine="reference")
    assert_allclose(nngp, exact.nngp, rtol=1e-5)
    assert_allclose(ntk, exact.ntk, rtol=1e-5)


def test_in_double_precision_they_are_so_to_ten_digits() -> None:
    with jax.enable_x64(True):
        kernel = both(network("D1"), X1.astype(np.float64), X2.astype(np.float64))
        exact = layers_of("D1", "SAME").kernel(X1, X2, engine="reference")
        assert_allclose(kernel[0], exact.nngp, rtol=1e-10)
        assert_allclose(kernel[1], exact.ntk, rtol=1e-10)


def test_rectangular_filters_and_images() -> None:
    x = images(2, seed=3, height=4, width=7)
    layers = stax.serial(
        Lift("D2", 1, (1, 3)), stax.Relu(), GroupConv("D2", 1, (3, 5)), stax.Relu(), GroupPool(), READOUT
    )
    exact = GroupCNN(group="D2", layers=[Conv((1, 3)), Conv((3, 5))]).kernel(x, engine="reference")
    assert_allclose(both(layers, x), exact, rtol=1e-5)


@pytest.mark.parametrize("padding", ["VALID", "CIRCULAR"])
def test_over_c1_they_are_the_convolutions_of_stax(padding: Any) -> None:
    ours = stax.serial(Lift("C1", 1, padding=padding), stax.Relu(), GroupConv("C1", 1, padding=padding), GroupPool())
    conv = stax.Conv(1, (3, 3), padding=padding)
    assert_allclose(
        both(ours, X1, X2), both(stax.serial(conv, stax.Relu(), conv, stax.GlobalAvgPool()), X1, X2), rtol=1e-5
    )


def test_the_pooling_of_stax_takes_a_window_for_the_group_axis_too() -> None:
    x = images(2, seed=4, height=6, width=6)
    pool = stax.AvgPool((2, 2, 1), (2, 2, 1))
    layers = stax.serial(Lift("C4", 1), stax.Relu(), pool, GroupConv("C4", 1), GroupPool(), READOUT)
    exact = GroupCNN(layers=[Conv(3), AvgPool(2), Conv(3, activation="identity")]).kernel(x, engine="reference")
    assert_allclose(both(layers, x), exact, rtol=1e-5)


def test_nan_pixels_give_nan_kernels_as_in_stax() -> None:
    x = X1.copy()
    x[1, 0, 0, 0] = np.nan
    nngp, ntk = both(stax.serial(Lift("C2", 1), stax.Relu(), GroupConv("C2", 1), GroupPool()), x)
    expected = np.array([[False, True, False], [True, True, True], [False, True, False]])
    np.testing.assert_array_equal(np.isnan(nngp), expected)
    np.testing.assert_array_equal(np.isnan(ntk), expected)


def test_the_conventions_of_kernel_functions_hold() -> None:
    """``get``, ``x2=None``, a whole kernel, the diagonal of the batch or all of it, one layer alone."""
    layers = stax.serial(Lift("C2", 1), stax.Relu(), GroupConv("C2", 1), GroupPool())
    nngp, ntk = both(layers, X1)
    whole = jax.jit(lambda x: layers[2](x, None, None, diagonal_batch=False))(X1)
    assert_allclose(whole.nngp, nngp, rtol=1e-5)
    assert_allclose(whole.ntk, ntk, rtol=1e-5)
    assert_allclose(whole.cov1, nngp, rtol=1e-5)
    assert whole.shape1 == (3, 1)
    lifted = Lift("C4", 1)[2](X1, X2, None)
    assert lifted.nngp.shape == (3, 2, 5, 5, 5, 5, 4, 4)
    assert lifted.shape1 == (3, 5, 5, 4, 1)
    assert lifted.is_gaussian
    assert_allclose(lifted.ntk, lifted.nngp, rtol=1e-6)  # Θ⁰ = 0


@pytest.mark.filterwarnings("ignore:`FanIn` layers assume independent inputs")
def test_residual_branches_of_stax_compose() -> None:
    branch = stax.serial(stax.Relu(), GroupConv("C4", 1))
    block = stax.serial(stax.FanOut(2), stax.parallel(stax.Identity(), branch), stax.FanInSum())
    layers = [Conv(3, activation="identity"), Residual([Activation("relu"), Conv(3)]), Activation("relu")]
    exact = GroupCNN(group="C4", layers=layers).kernel(X1, X2, engine="reference")
    ours = stax.serial(Lift("C4", 1), block, stax.Relu(), GroupPool(), READOUT)
    assert_allclose(both(ours, X1, X2), exact, rtol=1e-5)


def test_kernels_with_reversed_axes_are_understood() -> None:
    """``stax.Conv`` hands them on; one with a filter of one pixel turns them back."""
    conv, one, after = stax.Conv(1, (1, 3), padding="SAME"), stax.Conv(1, (1, 1)), (Lift("C1", 1, (3, 1)), GroupPool())
    assert_allclose(
        both(stax.serial(conv, *after), X1, X2)[0], both(stax.serial(conv, one, *after), X1, X2)[0], rtol=1e-5
    )


@functools.cache
def finite(group: str, width: int) -> tuple[Any, Any, Any]:
    layers = (
        Lift(group, width),
        stax.Relu(),
        GroupConv(group, width),
        stax.Relu(),
        GroupPool(),
        stax.Dense(1, b_std=0.3),
    )
    triple: tuple[Any, Any, Any] = stax.serial(*layers)
    return triple


@pytest.mark.parametrize(("group", "implementation"), [("C4", "JACOBIAN_CONTRACTION"), ("C3", "NTK_VECTOR_PRODUCTS")])
@pytest.mark.filterwarnings("ignore:size requires ndarray:DeprecationWarning")
def test_empirical_kernels_of_neural_tangents_converge_to_the_limit(group: str, implementation: str) -> None:
    init_fn, apply_fn, kernel_fn = finite(group, 32)
    ntk_fn = neural_tangents.empirical_ntk_fn(
        apply_fn, implementation=neural_tangents.NtkImplementation[implementation]
    )
    sample = jax.jit(lambda key: ntk_fn(X1, X2, init_fn(key, X1.shape)[1]))
    samples = np.stack([sample(key) for key in jax.random.split(jax.random.key(0), 64)])
    error = samples.std(axis=0) / 8
    limit = both((init_fn, apply_fn, kernel_fn), X1, X2)[1]
    assert (error < 0.07 * limit).all()
    assert (np.abs(samples.mean(axis=0) - limit) < 4 * error + 0.04 * limit).all()


def test_monte_carlo_batches_and_predictions_of_neural_tangents_work() -> None:
    layers = finite("C2", 32)
    init_fn, apply_fn, kernel_fn = layers
    x = images(4, seed=4)
    nngp, ntk = both(layers, x)
    sampled_fn = neural_tangents.monte_carlo_kernel_fn(init_fn, apply_fn, jax.random.key(0), 60)
    assert_allclose(sampled_fn(x, None, "nngp"), nngp, rtol=0.25)
    batched = neural_tangents.batch(kernel_fn, batch_size=2)
    assert_allclose(batched(x, None, "ntk"), ntk, rtol=1e-5)
    targets = np.array([[1.0], [-1.0], [0.5], [0.0]], np.float32)
    predict = neural_tangents.predict.gradient_descent_mse(ntk, targets, diag_reg=1e-5)
    assert_allclose(predict(t=None, fx_train_0=0.0), targets, atol=0.05)


@pytest.mark.parametrize("group", ["C4", "D2"])
def test_finite_networks_do_not_see_the_symmetries_of_their_group(group: str) -> None:
    init_fn, apply_fn, _ = finite(group, 8)
    shape, params = init_fn(jax.random.key(1), X1.shape)
    assert shape == (3, 1)
    output = apply_fn(params, X1)
    assert output.shape == (3, 1)
    for element in symmetries("D4"):
        change = np.abs(apply_fn(params, element.on_images(X1)) / output - 1).max()
        assert change < 1e-4 if element in symmetries(group) else change > 1e-4, element


def test_the_shape_of_any_batch_can_be_asked_for() -> None:
    shape, _ = stax.serial(Lift("C8", 7, padding="VALID"), stax.Relu())[0](jax.random.key(0), (-1, 8, 8, 3))
    assert shape == (-1, 4, 4, 8, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lift("S4", 1), "Lift: 'S4' is no group; use C_n or D_n with n from 1 to 360, as in 'C4'"),
        (lambda: GroupConv("C4", 1, (2, 2)), "GroupConv: filter_shape (2, 2) has no centre pixel to rotate about"),
        (lambda: GroupConv("C4", 1, (3, 5)), "GroupConv: C4 turns filters of (3, 5); use square ones"),
        (lambda: Lift("C4", 1, padding=SMALL), "Lift: padding 'same' does not exist; choose SAME, VALID, CIRCULAR"),
        (lambda: Lift(wrong(4), 1), "Lift: 4 is no group"),
        (lambda: Lift("C4", 0), "Lift: out_chan = 0; a layer has a whole number of channels, 1 or more"),
        (lambda: Lift("C4", wrong(2.5)), "Lift: out_chan = 2.5; a layer has a whole number of channels"),
        (lambda: Lift("C4", 1, wrong(3)), "Lift: filter_shape = 3; give rows and columns, as in (3, 3)"),
        (lambda: Lift("C4", 1, wrong((3.0, 3.0))), "Lift: filter_shape = (3.0, 3.0); give rows and columns"),
        (
            lambda: GroupConv("C4", 1, W_std=True),
            "GroupConv: W_std = True; a standard deviation is a number, 0 or more",
        ),
        (lambda: GroupConv("C4", 1, W_std=-1), "GroupConv: W_std = -1; a standard deviation is a number, 0 or more"),
        (lambda: GroupConv("C4", 1, b_std=float("nan")), "GroupConv: b_std = nan; a standard deviation is a number"),
        (lambda: GroupConv("C4", 1, W_std=wrong("1")), "GroupConv: W_std = '1'; a standard deviation is a number"),
    ],
)
def test_unusable_layers_say_what_to_do(make: Any, message: str) -> None:
    with pytest.raises(NetworkError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("layers", "x", "message"),
    [
        ((GroupConv("C4", 1),), X1, "GroupConv: the input has shape (3, 5, 5, 2); it takes features (N, H, W, 4, C)"),
        (
            (Lift("C2", 1), GroupConv("C4", 1)),
            X1,
            "the input has shape (3, 5, 5, 2, 1); it takes features (N, H, W, 4, C)",
        ),
        ((GroupPool(),), X1, "GroupPool: the input has shape (3, 5, 5, 2); it takes features (N, H, W, |G|, C)"),
        ((Lift("C4", 1), Lift("C4", 1)), X1, "Lift: the input has shape (3, 5, 5, 4, 1); it takes images (N, H, W, C)"),
        ((Lift("C4", 1),), X1[:, :4], "Lift: the input is 4x5 pixels, and C4 needs square images; crop them"),
        (
            (Lift("C4", 1, (7, 7), padding="VALID"),),
            X1,
            "Lift: with VALID padding a filter of 7 pixels does not fit in 5",
        ),
    ],
)
def test_unusable_inputs_say_what_to_do(layers: Any, x: Array, message: str) -> None:
    init_fn, _, kernel_fn = stax.serial(*layers)
    with pytest.raises((ImageError, NetworkError), match=re.escape(message)):
        init_fn(jax.random.key(0), x.shape)
    with pytest.raises((ImageError, NetworkError), match=re.escape(message)):
        kernel_fn(x, None, "nngp")


def test_parameters_and_images_that_do_not_fit_are_refused() -> None:
    init_fn, apply_fn, kernel_fn = Lift("C4", 3)
    _, params = init_fn(jax.random.key(0), X1.shape)
    for x in (X1[..., :1], np.concatenate([X1, X1], axis=3)):  # one channel would be broadcast
        message = f"the weights have shape (9, 1, 2, 3), and an input of shape {x.shape} needs (9, 1, {x.shape[3]}, 3)"
        with pytest.raises(ImageError, match=re.escape(message)):
            apply_fn(params, x)
    _, others = GroupConv("C8", 3)[0](jax.random.key(0), (1, 5, 5, 8, 3))
    with pytest.raises(
        ImageError, match=re.escape("shape (9, 8, 3, 3), and an input of shape (3, 5, 5, 4, 3) needs (9, 4")
    ):
        GroupConv("C4", 3)[1](others, apply_fn(params, X1))
    with pytest.raises(
        ImageError, match=re.escape("x1 has shape (3, 5, 5, 2), x2 (3, 4, 4, 2); the mean over filters")
    ):
        kernel_fn(X1, X1[:, :4, :4], "ntk")
    with pytest.raises(ImageError, match="Lift: the input is a list; it takes one array"):
        apply_fn(params, X1.tolist())
    with pytest.raises(ImageError, match="Lift: the input has dtype complex64; it takes real numbers"):
        apply_fn(params, X1 * np.complex64(1j))


@pytest.mark.parametrize("dtype", [np.uint8, np.float16])
def test_images_of_other_dtypes_are_converted(dtype: Any) -> None:
    """Also off the grid, where the rotated filters are no integers."""
    init_fn, apply_fn, kernel_fn = Lift("C8", 2)
    x = np.random.default_rng(0).integers(0, 200, X1.shape).astype(dtype)
    floats = x.astype(np.float32)
    _, params = init_fn(jax.random.key(0), x.shape)
    np.testing.assert_array_equal(apply_fn(params, x), apply_fn(params, floats))
    np.testing.assert_array_equal(kernel_fn(x, None, "nngp"), kernel_fn(floats, None, "nngp"))


def test_masks_are_refused() -> None:
    for make in (lambda: Lift("C4", 1), lambda: stax.serial(stax.Dense(3), Lift("C4", 1))):
        init_fn, apply_fn, kernel_fn = make()
        with pytest.raises(NetworkError, match="Lift supports no masks"):
            kernel_fn(X1, None, "nngp", mask_constant=0.5)
        with pytest.raises(NetworkError, match="Lift supports no masks"):
            apply_fn(init_fn(jax.random.key(0), X1.shape)[1], X1, mask_constant=0.5)


def test_another_order_of_axes_is_refused() -> None:
    with pytest.raises(
        ImageError, match="Lift: the batch is axis 0 and the channels axis 1 of 4; it takes the channels"
    ):
        Lift("C1", 1)[2](np.moveaxis(X1, 3, 1), None, "nngp", channel_axis=1)
