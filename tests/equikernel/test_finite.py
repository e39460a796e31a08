"""Finite-width networks: literal, equivariant, and with the kernels as their limit."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from equikernel import GroupCNN, ImageError, NetworkError, finite, groups

PADDINGS = ["SAME", "VALID", "CIRCULAR"]

Array = NDArray[np.float64]


def positive_images(n: int, size: int, seed: int) -> Array:
    return np.random.default_rng(seed).uniform(size=(n, size, size, 2))


def literal_output(net: GroupCNN, params: finite.Params, image: Array) -> float:
    """The sums over v, q and c as in the docstring of :mod:`equikernel.finite`, pixel by pixel."""
    elements, table = groups.symmetries(net.group), groups.multiplication_table(net.group)
    n, radius, side = len(elements), net.radius, range(-net.radius, net.radius + 1)

    def pixel(x: Array, y: int, z: int) -> Any:
        size = x.shape[1]
        if net.padding == "CIRCULAR":
            return x[:, y % size, z % size]
        inside = 0 <= y < size and 0 <= z < size
        return x[:, y, z] if inside else np.zeros_like(x[:, 0, 0])

    x = image[None]
    for layer in params[: net.depth]:
        weights, bias = np.asarray(layer.weights), np.asarray(layer.bias)
        _, _, m, c_in, c_out = weights.shape
        border = radius if net.padding == "VALID" else 0
        size = x.shape[1] - 2 * border
        out = np.zeros((n, size, size, c_out))
        for r, ty, tx in np.ndindex(n, size, size):
            for q in range(m):
                for vy in side:
                    for vx in side:
                        dy, dx = elements[r].on_offset((vy, vx))
                        seen = pixel(x, ty + border + dy, tx + border + dx)[table[r, q] if m > 1 else 0]
                        out[r, ty, tx] += seen @ weights[vy + radius, vx + radius, q]
        z = net.w_std / np.sqrt(net.filter_size**2 * m * c_in) * out + net.b_std * bias
        x = np.maximum(z, 0)
    h = x.mean(axis=(0, 1, 2))
    for dense in params[net.depth : -1]:
        h = np.maximum(
            net.w_std / np.sqrt(len(h)) * h @ np.asarray(dense.weights) + net.b_std * np.asarray(dense.bias), 0
        )
    readout = params[-1]
    return float(
        (net.w_std / np.sqrt(len(h)) * h @ np.asarray(readout.weights) + net.b_std * np.asarray(readout.bias))[0]
    )


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


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("group", groups.GRID_GROUPS)
def test_the_symmetries_of_its_group_are_the_ones_that_a_network_does_not_see(
    group: str, padding: str, size: int
) -> None:
    output = output_of_moved_images(GroupCNN(group=group, depth=2, padding=padding, b_std=0.3, head=("erf",)), size)
    change = np.abs(output / output[0] - 1).max(axis=1)
    for element, seen in zip(groups.symmetries("D4"), change, strict=True):
        assert seen < 5e-5 if element in groups.symmetries(group) else seen > 1e-4, element


def jacobian(net: GroupCNN, params: finite.Params, x: Array) -> Array:
    """``∂f/∂θ``: ``(n, parameters)``."""
    leaves = jax.tree.leaves(jax.jit(jax.jacrev(lambda params: finite.apply(net, params, x)))(params))
    return np.concatenate([np.asarray(leaf).reshape(len(x), -1) for leaf in leaves], axis=1)


def test_the_empirical_ntk_is_the_sum_over_all_parameters() -> None:
    net = GroupCNN(group="C2", depth=2, b_std=0.3, w_std=1.2, head=("erf",))
    x1, x2, key = positive_images(2, 5, seed=1), positive_images(3, 5, seed=2), jax.random.key(4)
    with jax.enable_x64(True):
        nngp, ntk = finite.empirical_kernels(net, 4, key, x1, x2, samples=2)
        for sample, sample_key in enumerate(jax.random.split(key, 2)):
            params = finite.init(net, 4, sample_key, 2)
            j1, j2 = jacobian(net, params, x1), jacobian(net, params, x2)
            h1, h2 = (np.asarray(finite.features(net, params, x)) for x in (x1, x2))
            assert_allclose(ntk[sample], j1 @ j2.T, rtol=1e-12)
            assert_allclose(nngp[sample], 1.2**2 * h1 @ h2.T / 4 + 0.3**2, rtol=1e-12)


def test_without_second_images_the_kernels_are_those_of_the_first_with_themselves() -> None:
    net, x, key = GroupCNN(group="C1", depth=1), positive_images(2, 5, seed=1), jax.random.key(0)
    alone = finite.empirical_kernels(net, 4, key, x, samples=2)
    twice = finite.empirical_kernels(net, 4, key, x, x, samples=2)
    assert_allclose(alone, twice, rtol=1e-5)
    assert alone[0].shape == (2, 2, 2)


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


def test_sampled_deep_networks_tend_to_the_kernel() -> None:
    """At width 64 the bias of two convolutions and a dense layer is below the standard error of 100 networks."""
    net = GroupCNN(group="C4", depth=2, padding="VALID", w_std=1.2, b_std=0.3, head=("erf",))
    x1, x2 = positive_images(2, 6, seed=1), positive_images(1, 6, seed=2)
    limit = net.kernel(x1, x2, engine="reference")
    nngp, ntk = finite.empirical_kernels(net, 64, jax.random.key(1), x1, x2, samples=100)
    assert np.abs(z_scores(nngp, limit.nngp)).max() < 4
    assert np.abs(z_scores(ntk, limit.ntk)).max() < 4
    assert_allclose(nngp.mean(axis=0), limit.nngp, rtol=0.05)
    assert_allclose(ntk.mean(axis=0), limit.ntk, rtol=0.1)


def test_unusable_requests_say_what_to_do() -> None:
    net = GroupCNN(group="C4", depth=2, padding="VALID")
    key = jax.random.key(0)
    params = finite.init(net, 4, key, 2)
    with pytest.raises(
        ImageError, match=r"images have shape \(1, 5, 5, 3\), but the parameters are for \(n, H, W, 2\)"
    ):
        finite.apply(net, params, np.ones((1, 5, 5, 3)))
    with pytest.raises(NetworkError, match="VALID padding eats the image"):
        finite.apply(net, params, np.ones((1, 4, 4, 2)))
    with pytest.raises(ImageError, match="needs square ones"):
        finite.apply(net, params, np.ones((1, 5, 6, 2)))
    with pytest.raises(NetworkError, match="width 0"):
        finite.init(net, 0, key, 2)
    with pytest.raises(ImageError, match=r"x2 has shape \(5, 5, 2\)"):
        finite.empirical_kernels(net, 4, key, np.ones((1, 5, 5, 2)), np.ones((5, 5, 2)))
    with pytest.raises(ImageError, match=r"x1 has images of shape \(5, 5, 2\), but x2 of \(6, 6, 2\)"):
        finite.empirical_kernels(net, 4, key, np.ones((1, 5, 5, 2)), np.ones((1, 6, 6, 2)))
