"""Finite-width networks: literal, equivariant, and with the kernels as their limit."""

from __future__ import annotations

import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from equikernel import (
    Activation,
    AvgPool,
    Conv,
    Custom,
    GroupCNN,
    ImageError,
    NetworkError,
    Residual,
    finite,
    groups,
)
from equikernel.geometry import windows
from equikernel.layers import Branch, Convolution, Nonlinearity, Pooling, Step

PADDINGS = ["SAME", "VALID", "CIRCULAR"]

Array = NDArray[np.float64]


def positive_images(n: int, size: int, seed: int) -> Array:
    return np.random.default_rng(seed).uniform(size=(n, size, size, 2))


def literal_output(net: GroupCNN, params: finite.Params, image: Array) -> float:
    """The sums over v, q and c as in the docstring of :mod:`equikernel.finite`, pixel by pixel."""
    elements, table = groups.symmetries(net.group), groups.multiplication_table(net.group)
    layers = iter(params)

    def pixel(x: Array, y: int, z: int) -> Any:
        height, width = x.shape[1:3]
        if net.padding == "CIRCULAR":
            return x[:, y % height, z % width]
        inside = 0 <= y < height and 0 <= z < width
        return x[:, y, z] if inside else np.zeros_like(x[:, 0, 0])

    def convolution(step: Convolution, x: Array) -> Array:
        layer = next(layers)
        weights, bias = np.asarray(layer.weights), np.asarray(layer.bias)
        m, c_in, c_out = weights.shape[2:]
        reach = groups.reach(net.group, step.radii)
        rows, cols = (windows(side, r, step.stride, net.padding) for side, r in zip(x.shape[1:3], reach, strict=True))
        out = np.zeros((len(elements), rows.outputs, cols.outputs, c_out))
        for r, i, j in np.ndindex(*out.shape[:3]):
            for vy, vx in np.ndindex(*weights.shape[:2]):
                for (dy, dx), weight in elements[r].splat((vy - step.radii[0], vx - step.radii[1])):
                    there = pixel(x, rows.first + i * step.stride + dy, cols.first + j * step.stride + dx)
                    for q in range(m):
                        out[r, i, j] += weight * (there[table[r, q] if m > 1 else 0] @ weights[vy, vx, q])
        scale = np.sqrt(step.w2 / (weights.shape[0] * weights.shape[1] * m * c_in))
        return np.asarray(scale * out + np.sqrt(step.b2) * bias)

    def through(steps: tuple[Step, ...], x: Array) -> Array:
        for step in steps:
            match step:
                case Convolution():
                    x = convolution(step, x)
                case Nonlinearity(activation):
                    x = activation(x)
                case Pooling(_, size):
                    blocks = [x[:, i::size, j::size] for i in range(size) for j in range(size)]
                    x = np.mean(blocks, axis=0)
                case Branch(_, inner):
                    x = x + through(inner, x)
        return x

    h = through(net.steps, image[None]).mean(axis=(0, 1, 2))
    for activation in (*net.head_activations, None):
        dense = next(layers)
        h = net.w_std / np.sqrt(len(h)) * h @ np.asarray(dense.weights) + net.b_std * np.asarray(dense.bias)
        h = h if activation is None else activation(h)
    return float(h[0])


LAYERS = (
    Conv((3, 3), stride=2, activation="identity"),
    Residual([Activation("gelu"), Conv(3, b_std=0.7)]),
    AvgPool(2),
    Conv(1, w_std=2),
)


@pytest.mark.parametrize(
    "net",
    [
        GroupCNN(group="C3", depth=2, padding="CIRCULAR", b_std=0.4),
        GroupCNN(group="C8", depth=1, padding="VALID", w_std=1.3),
        GroupCNN(group="D3", depth=2, activation="erf"),
        GroupCNN(group="C4", layers=LAYERS, b_std=0.4, head=("sin",)),
        GroupCNN(group="D2", layers=[Conv((1, 5)), Conv((3, 1), activation="abs")], padding="VALID"),
        GroupCNN(group="C1", layers=[Conv(3), AvgPool(7)], activation=Custom(jnp.tanh)),
    ],
)
def test_rotations_off_the_grid_and_layers_of_all_kinds_are_the_literal_sums(net: GroupCNN) -> None:
    image = np.random.default_rng(1).normal(size=(7, 7, 2))
    with jax.enable_x64(True):
        params = finite.init(net, 3, jax.random.key(2), 2)
        output = np.asarray(jax.jit(lambda params: finite.apply(net, params, image[None]))(params))
        assert_allclose(output, [literal_output(net, params, image)], rtol=1e-12)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("group", ["C1", "C2", "C4"])
def test_the_network_is_the_literal_sum_over_the_group(group: str, padding: str) -> None:
    net = GroupCNN(group=group, depth=2, padding=padding, w_std=1.3, b_std=0.4, head=("relu",))
    image = np.random.default_rng(1).normal(size=(5, 5, 2))
    with jax.enable_x64(True):
        params = finite.init(net, 3, jax.random.key(2), 2)
        output = np.asarray(jax.jit(lambda params: finite.apply(net, params, image[None]))(params))
    assert_allclose(output, [literal_output(net, params, image)], rtol=1e-12)


def output_of_moved_images(net: GroupCNN, size: int) -> NDArray[Any]:
    """Outputs ``(8, 2)`` for two images after 0 to 3 quarter turns, then likewise for their mirror images."""
    images = positive_images(2, size, seed=1)
    moved = np.concatenate([element.on_images(images) for element in groups.symmetries("D4")])
    params = finite.init(net, 8, jax.random.key(0), 2)
    return np.asarray(jax.jit(lambda params, x: finite.apply(net, params, x))(params, moved)).reshape(8, 2)


@pytest.mark.parametrize(
    ("group", "padding", "size"),
    [
        *zip(["C4", "C4", "D2", "D2"], ["SAME", "CIRCULAR", "CIRCULAR", "SAME"], [6, 7, 6, 7], strict=True),
        ("C1", "SAME", 7),
        ("C2", "VALID", 6),
        ("D1", "CIRCULAR", 6),
        ("D4", "VALID", 6),
    ],
)
def test_the_symmetries_of_its_group_are_the_ones_that_a_network_does_not_see(
    group: str, padding: str, size: int
) -> None:
    output = output_of_moved_images(GroupCNN(group=group, depth=2, padding=padding, b_std=0.3, head=("erf",)), size)
    change = np.abs(output / output[0] - 1).max(axis=1)
    for element, seen in zip(groups.symmetries("D4"), change, strict=True):
        assert seen < 5e-5 if element in groups.symmetries(group) else seen > 1e-4, element


@pytest.mark.parametrize(
    ("net", "size"),
    [
        (GroupCNN(group="D4", layers=LAYERS, b_std=0.3), 7),
        (GroupCNN(group="C4", layers=[Conv(3, stride=2), Conv(1)], padding="VALID"), 7),
        (GroupCNN(group="C8", depth=2, b_std=0.3), 6),
        (GroupCNN(group="C6", depth=2, padding="CIRCULAR"), 6),
        (GroupCNN(group="D3", depth=2, b_std=0.3), 6),
    ],
)
def test_strides_pooling_and_other_rotations_keep_the_symmetries_on_the_grid(net: GroupCNN, size: int) -> None:
    output = output_of_moved_images(net, size)
    change = np.abs(output / output[0] - 1).max(axis=1)
    for element, seen in zip(groups.symmetries("D4"), change, strict=True):
        assert seen < 5e-5 if element in groups.symmetries(net.group) else seen > 1e-4, element


def test_off_the_grid_a_network_is_invariant_up_to_interpolation() -> None:
    """Smooth images turned by 45 degrees change the output of a C8 network less than that of a C4 network."""
    rng = np.random.default_rng(3)
    waves = [(rng.uniform(0.15, 0.4), rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi)) for _ in range(6)]

    def smooth(angle: float) -> Array:
        y, x = (np.mgrid[:17, :17] - 8.0) * 1.0
        across = [f * (np.cos(a + angle) * x + np.sin(a + angle) * y) + phase for f, a, phase in waves]
        fade = np.exp(-(x**2 + y**2) / 18)
        return np.asarray((sum(map(np.sin, across)) * fade)[None, :, :, None])

    pair = np.concatenate([smooth(0.0), smooth(np.pi / 4)])
    change = {}
    for group in ("C4", "C8"):
        net = GroupCNN(group=group, depth=2)
        params = finite.init(net, 16, jax.random.key(5), 1)
        output = np.asarray(jax.jit(lambda params, net=net: finite.features(net, params, pair))(params))
        change[group] = np.linalg.norm(output[1] - output[0]) / np.linalg.norm(output[0])
    assert change["C8"] < 0.8 * change["C4"]


def test_the_empirical_ntk_is_the_sum_over_all_parameters() -> None:
    net = GroupCNN(group="C2", depth=2, b_std=0.3, w_std=1.2, head=("erf",))
    x1, x2, key = positive_images(2, 5, seed=1), positive_images(3, 5, seed=2), jax.random.key(4)
    x = np.concatenate([x1, x2])
    with jax.enable_x64(True):
        nngp, ntk = finite.empirical_kernels(net, 4, key, x1, x2, samples=2)
        jacobian = jax.jit(jax.jacrev(lambda params: finite.apply(net, params, x)))
        features = jax.jit(lambda params: finite.features(net, params, x))
        for sample, sample_key in enumerate(jax.random.split(key, 2)):
            params = finite.init(net, 4, sample_key, 2)
            leaves = jax.tree.leaves(jacobian(params))
            j1, j2 = np.split(np.concatenate([np.reshape(leaf, (len(x), -1)) for leaf in leaves], axis=1), [2])
            h1, h2 = np.split(np.asarray(features(params)), [2])
            assert_allclose(ntk[sample], j1 @ j2.T, rtol=1e-12)
            assert_allclose(nngp[sample], 1.2**2 * h1 @ h2.T / 4 + 0.3**2, rtol=1e-12)


def test_without_second_images_the_kernels_are_those_of_the_first_with_themselves() -> None:
    net, x, key = GroupCNN(group="C1", depth=1), positive_images(2, 5, seed=1), jax.random.key(0)
    alone = finite.empirical_kernels(net, 4, key, x, samples=2)
    twice = finite.empirical_kernels(net, 4, key, x, x, samples=2)
    assert_allclose(alone, twice, rtol=1e-5)
    assert alone[0].shape == (2, 2, 2)


def test_gradients_that_memory_does_not_hold_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, key = GroupCNN(group="C2", depth=1, b_std=0.3), positive_images(3, 4, seed=1), jax.random.key(0)
    alone, both = finite.empirical_kernels(net, 4, key, x), finite.empirical_kernels(net, 4, key, x, x[:2])
    parameters = jax.tree.leaves(finite.init(net, 4, key, 2))
    monkeypatch.setattr(finite, "GRADIENT_BYTES", 8 * sum(leaf.size for leaf in parameters))  # of two images
    assert_allclose(finite.empirical_kernels(net, 4, key, x), alone, rtol=1e-5)
    assert_allclose(finite.empirical_kernels(net, 4, key, x, x[:2]), both, rtol=1e-5)


def test_the_precision_is_that_of_jax() -> None:
    net, x, key = GroupCNN(group="C1", depth=1), positive_images(2, 5, seed=1), jax.random.key(0)
    assert finite.empirical_kernels(net, 4, key, x)[1].dtype == np.float32
    with jax.enable_x64(True):
        assert finite.empirical_kernels(net, 4, key, x)[1].dtype == np.float64


def z_scores(samples: NDArray[Any], expected: NDArray[Any]) -> Array:
    mean, spread = samples.mean(axis=0, dtype=np.float64), samples.std(axis=0, ddof=1, dtype=np.float64)
    return np.asarray((mean - expected) / (spread / np.sqrt(len(samples))))


def test_sampled_networks_confirm_that_the_first_layer_counts_once() -> None:
    """One convolution has no bias at any width, so the z-scores are those of the definition itself.

    The paper's code starts with Θ⁰ = K⁰ instead of 0. With one layer, w = 1 and b = 0 the read-out gives
    ``ntk = nngp + mean of K̇ K``, and the code gives ``nngp + 2 · mean of K̇ K``.
    """
    net = GroupCNN(group="C4", depth=1)
    x1, x2 = positive_images(2, 6, seed=1), positive_images(2, 6, seed=2)
    limit = net.kernel(x1, x2, engine="reference")
    nngp, ntk = finite.empirical_kernels(net, 64, jax.random.key(0), x1, x2, samples=200)
    assert np.abs(z_scores(nngp, limit.nngp)).max() < 4
    assert np.abs(z_scores(ntk, limit.ntk)).max() < 4
    counted_twice = limit.nngp + 2 * (limit.ntk - limit.nngp)
    assert np.abs(z_scores(ntk, counted_twice)).min() > 15


CONVERGING = {
    "C4": GroupCNN(group="C4", depth=2, padding="VALID", w_std=1.2, b_std=0.3, head=("erf",)),
    "D4 leaky": GroupCNN(group="D4", depth=2, activation="leaky_relu(0.2)", w_std=1.4),
    "C3 sin": GroupCNN(group="C3", depth=2, padding="CIRCULAR", activation="sin", w_std=1.4),
    "C8 gelu": GroupCNN(group="C8", depth=2, activation="gelu", w_std=1.4, b_std=0.2),
    "D3": GroupCNN(group="D3", depth=1, w_std=1.4, head=("relu",)),
    "layers": GroupCNN(group="C2", layers=LAYERS, activation=Custom(jnp.tanh), b_std=0.3),
}


@pytest.mark.parametrize("name", CONVERGING)
def test_sampled_networks_converge_to_the_kernel(name: str) -> None:
    """Bias O(1/width), spread 1/√width; extrapolated from two widths by Richardson, the mean is the limit."""
    net = CONVERGING[name]
    side = 7 if net.layers else 5 if net.padding != "SAME" else 3 if net.group in ("C8", "D3", "D4") else 4
    x = positive_images(2, side, seed=1)
    limit = np.array(net.kernel(x, engine="reference"))
    narrow, wide, samples = 8, 32, 160
    at_narrow, at_wide = (
        np.stack(finite.empirical_kernels(net, width, jax.random.key(width), x, samples=samples), axis=1)
        for width in (narrow, wide)
    )
    ratio = wide / narrow
    estimate = (ratio * at_wide.mean(axis=0) - at_narrow.mean(axis=0)) / (ratio - 1)
    variance = (ratio**2 * at_wide.var(axis=0) + at_narrow.var(axis=0)) / (ratio - 1) ** 2 / samples
    assert (np.sqrt(variance) < 0.08 * limit).all()
    assert (np.abs(estimate - limit) < 4 * np.sqrt(variance) + 0.02 * limit).all()
    spread = at_narrow.std(axis=0) / at_wide.std(axis=0)
    assert ((spread > 0.7 * np.sqrt(ratio)) & (spread < 1.5 * np.sqrt(ratio))).all()


def test_the_bias_falls_as_one_over_width_and_the_spread_as_its_root() -> None:
    """Both fitted over a decade of widths, for NNGP and NTK of a network whose bias is large: 2/width or so."""
    net = GroupCNN(group="C4", depth=1, activation="erf", head=("monomial(2)",))
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 1))
    widths, samples = np.array([4, 8, 16, 40]), 20_000
    kernels = [finite.empirical_kernels(net, width, jax.random.key(width), x, samples=samples) for width in widths]
    for limit, sampled in zip(net.kernel(x, engine="reference"), zip(*kernels, strict=True), strict=True):
        relative = np.array([one[:, 0, 0] for one in sampled]) / limit[0, 0]
        bias, spread = relative.mean(axis=1) - 1, relative.std(axis=1)
        error = spread / np.sqrt(samples)
        assert (bias > 4 * error).all()
        slope, covariance = np.polyfit(np.log(widths), np.log(bias), 1, w=bias / error, cov="unscaled")
        assert np.sqrt(covariance[0, 0]) < 0.1
        assert abs(slope[0] + 1) < 3 * np.sqrt(covariance[0, 0])
        assert abs(np.polyfit(np.log(widths), np.log(spread), 1)[0] + 0.5) < 0.3  # heavy tails at small width


def test_unusable_requests_say_what_to_do() -> None:
    net = GroupCNN(group="C4", depth=2, padding="VALID")
    key = jax.random.key(0)
    params = finite.init(net, 4, key, 2)
    with pytest.raises(NetworkError, match="the network is 'C4'; give a GroupCNN"):
        finite.init(cast("Any", "C4"), 4, key, 2)
    with pytest.raises(
        ImageError, match=r"images have shape \(1, 5, 5, 3\), but the parameters are for \(n, H, W, 2\)"
    ):
        finite.apply(net, params, np.ones((1, 5, 5, 3)))
    with pytest.raises(NetworkError, match="VALID padding eats the image"):
        finite.apply(net, params, np.ones((1, 4, 4, 2)))
    with pytest.raises(ImageError, match="needs square ones"):
        finite.apply(net, params, np.ones((1, 5, 6, 2)))
    with pytest.raises(ImageError, match=r"x2 has shape \(5, 5, 2\)"):
        finite.empirical_kernels(net, 4, key, np.ones((1, 5, 5, 2)), np.ones((5, 5, 2)))
    with pytest.raises(ImageError, match=r"x1 has images of shape \(5, 5, 2\), but x2 of \(6, 6, 2\)"):
        finite.empirical_kernels(net, 4, key, np.ones((1, 5, 5, 2)), np.ones((1, 6, 6, 2)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 3}, "the parameters have 3 layers, and the network 4 (convolutions, head and read-out); call init"),
        ({"depth": 2, "head": "relu"}, "the parameters have 3 layers, and the network 4"),
        (
            {"depth": 2, "group": "C2"},
            "weights of layer 1 have shape (3, 3, 4, 4, 4), and the network needs (3, 3, 2, 4, 4)",
        ),
        (
            {"depth": 2, "filter_size": 5},
            "weights of layer 0 have shape (3, 3, 1, 2, 4), and the network needs (5, 5, 1,",
        ),
    ],
)
def test_parameters_of_another_network_are_refused(fields: dict[str, Any], message: str) -> None:
    params = finite.init(GroupCNN(depth=2), 4, jax.random.key(0), 2)
    with pytest.raises(NetworkError, match=re.escape(message)):
        finite.apply(GroupCNN(**fields), params, np.ones((1, 5, 5, 2)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "width = 0; give a whole number, 1 or more"),
        ({"width": 2.5}, "width = 2.5; give a whole number"),
        ({"width": True}, "width = True; give a whole number"),
        ({"samples": 0}, "samples = 0; give a whole number"),
        ({"key": 0}, "key = 0 is no JAX random key, or several; give one, as jax.random.key(0)"),
        ({"key": jax.random.split(jax.random.key(0), 2)}, "is no JAX random key, or several; give one"),
        ({"key": jax.numpy.zeros(2)}, "is no JAX random key, or several; give one"),
    ],
)
def test_numbers_that_make_no_network_are_refused(fields: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"width": 4, "key": jax.random.key(0), **fields}
    with pytest.raises(NetworkError, match=re.escape(message)):
        finite.empirical_kernels(GroupCNN(depth=1), x1=np.ones((1, 5, 5, 2)), **arguments)
    if "samples" not in fields:
        with pytest.raises(NetworkError, match=re.escape(message)):
            finite.init(GroupCNN(depth=1), channels=2, **arguments)


@pytest.mark.parametrize("params", [(), None, [np.zeros(3)], "weights"])
def test_what_is_no_parameters_is_refused(params: Any) -> None:
    with pytest.raises(NetworkError, match=f"the parameters are a {type(params).__name__}, not those that init makes"):
        finite.apply(GroupCNN(depth=1), params, np.ones((1, 5, 5, 2)))


def test_bad_pixels_are_refused_and_integers_converted() -> None:
    net, key = GroupCNN(depth=1), jax.random.key(0)
    params = finite.init(net, 4, key, 2)
    x = np.random.default_rng(0).integers(0, 200, (2, 5, 5, 2)).astype(np.uint8)
    np.testing.assert_array_equal(finite.apply(net, params, x), finite.apply(net, params, x.astype(np.float32)))
    np.testing.assert_array_equal(jax.jit(lambda x: finite.apply(net, params, x))(x).shape, (2,))
    bad = x.astype(np.float32)
    bad[1, 2, 3, 1] = np.nan
    with pytest.raises(ImageError, match=r"images\[1\] has NaN or infinite pixels, the first at \[2, 3, 1\]"):
        finite.apply(net, params, bad)
    with pytest.raises(ImageError, match=r"x2\[1\] has NaN or infinite pixels"):
        finite.empirical_kernels(net, 4, key, x, bad)
