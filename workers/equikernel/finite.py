r"""Finite-width group CNNs in JAX, and their empirical NNGP and NTK: the networks whose limit the kernels are.

``z_r(t)`` are the features at pixel ``t`` and rotation or reflection ``r``, and ``x`` those of the layer before; ``S``
is the filter support; ``R_r[a, v]`` spreads the tap ``ρ(r)v`` over pixels ``a``, a permutation where ``r`` maps pixels
to pixels; the parameters ``κ`` and ``β`` are standard normal.

- lifting: ``z_r(t) = w / √(|S| C) Σ_a Σ_v R_r[a, v] Σ_c κ[v, c] f_c(t + a) + b β``
- group convolution: ``z_r(t) = w / √(|G| |S| width) Σ_q Σ_a Σ_v R_r[a, v] Σ_c κ[v, q, c] x_{rq, c}(t + a) + b β``
- activation, average pooling, residual branches: as their names say
- group pooling: the mean over ``r`` and ``t``
- dense: ``w / √width Σ_c κ[c] h_c + b β``

The precision is JAX's default: float32, or float64 inside ``with jax.enable_x64(True):``.

>>> params = init(net, width=128, key=jax.random.key(0), channels=3)
>>> outputs = apply(net, params, images)                                                # (n,)
>>> nngp, ntk = empirical_kernels(net, 128, jax.random.key(0), images, samples=100)     # (100, n, n)
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equikernel import groups
from equikernel.errors import ImageError, NetworkError, is_whole
from equikernel.geometry import windows
from equikernel.images import Labels, as_images, check_finite
from equikernel.layers import Branch, Convolution, Nonlinearity, Pooling
from equikernel.network import GroupCNN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike, NDArray

    from equikernel.layers import Step


class Layer(NamedTuple):
    """The parameters of one layer, standard normal at initialisation; the scales are applied in the forward pass.

    ``weights``: ``(k_y, k_x, m, c_in, c_out)`` for a convolution, with ``m = 1`` element of the input in the lifting
    layer and ``m = |G|`` after it; ``(c_in, c_out)`` for a dense layer. ``bias``: ``(c_out,)``, shared by all pixels
    and elements.
    """

    weights: jax.Array
    bias: jax.Array


GRADIENT_BYTES = 2**30
"""Bytes of gradients that :func:`empirical_kernels` holds at once, of one network at several images, in float32."""

Params = tuple[Layer, ...]
"""One :class:`Layer` per convolution, per dense layer of the head, and the read-out."""


def init(net: GroupCNN, width: int, key: jax.Array, channels: int) -> Params:
    """Random parameters of ``net`` with ``width`` channels in every hidden layer.

    Args:
      net: the network.
      width: channels of each hidden layer, at every rotation.
      key: a JAX random key.
      channels: channels of the images.

    Raises:
      NetworkError: ``width`` or ``channels`` is no whole number, or below 1, or ``key`` is no key.
    """
    _check_network(net)
    _check_count("width", width)
    _check_count("channels", channels)
    _check_key(key)
    shapes = _shapes(net, width, channels)
    sizes = [size for shape in shapes for size in (math.prod(shape), shape[-1])]
    # One draw for all layers: XLA takes about half a second to compile each.
    values = iter(jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1]))
    return tuple(Layer(next(values).reshape(shape), next(values)) for shape in shapes)


def random_key(seed: int, *numbers: int) -> jax.Array:
    """A JAX random key for a seed and, independent of all others, for each choice of further numbers."""
    return functools.reduce(jax.random.fold_in, numbers, jax.random.key(seed))


def _shapes(net: GroupCNN, width: int, channels: int) -> list[tuple[int, ...]]:
    """The shape of the weights of each layer."""
    inputs, shapes = (1, channels), []
    for step in net.convolutions:
        shapes.append((2 * step.radii[0] + 1, 2 * step.radii[1] + 1, *inputs, width))
        inputs = groups.order(net.group), width
    return [*shapes, *[(width, width)] * len(net.head), (width, 1)]


def _check_network(net: GroupCNN) -> None:
    if not isinstance(net, GroupCNN):
        raise NetworkError(f"the network is {net!r}; give a GroupCNN, as in GroupCNN(group='C4')")


def _check_params(net: GroupCNN, params: Params) -> None:
    """Raise :class:`NetworkError` unless ``params`` are of this network, of any width and number of channels."""
    _check_network(net)
    if not (params and isinstance(params, (tuple, list)) and all(isinstance(layer, Layer) for layer in params)):
        raise NetworkError(f"the parameters are a {type(params).__name__}, not those that init makes; call init")
    *_, channels, width = params[0].weights.shape
    expected = _shapes(net, width, channels)
    if len(params) != len(expected):
        raise NetworkError(
            f"the parameters have {len(params)} layers, and the network {len(expected)} (convolutions, head and "
            "read-out); call init with this network"
        )
    for index, (layer, shape) in enumerate(zip(params, expected, strict=True)):
        if layer.weights.shape != shape:
            raise NetworkError(
                f"the weights of layer {index} have shape {layer.weights.shape}, and the network needs {shape}; call "
                "init with this network"
            )


def _check_key(key: Any) -> None:
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    old = isinstance(key, jax.Array) and key.dtype == jnp.uint32
    if not ((typed and key.shape == ()) or (old and key.shape == (2,))):
        raise NetworkError(f"key = {key!r} is no JAX random key, or several; give one, as jax.random.key(0)")


def _check_count(name: str, value: Any) -> None:
    if not is_whole(value) or value < 1:
        raise NetworkError(f"{name} = {value!r}; give a whole number, 1 or more")


def apply(net: GroupCNN, params: Params, images: ArrayLike) -> jax.Array:
    """Outputs ``(n,)`` of the network on ``(n, H, W, C)`` images, in the dtype of ``params``.

    Raises:
      ImageError, NetworkError: the images are not ``(n, H, W, C)`` real and finite numbers (inside ``jax.jit`` no
        values are looked at), or do not fit the network or its parameters, or these are of another network.
    """
    h = features(net, params, images)
    return _dense(net, params[-1], h)[:, 0]


def features(net: GroupCNN, params: Params, images: ArrayLike) -> jax.Array:
    """The input of the read-out, ``(n, width)``: what is left of ``(n, H, W, C)`` images after pooling and head.

    Raises:
      ImageError, NetworkError: as :func:`apply`.
    """
    _check_params(net, params)
    if not isinstance(images, jax.core.Tracer):
        images = as_images(images, "images")
        check_finite(images, Labels("images"))
    weights = params[0].weights
    x = jnp.asarray(images, weights.dtype)
    if x.ndim != 4 or x.shape[3] != weights.shape[3]:
        raise ImageError(
            f"images have shape {x.shape}, but the parameters are for (n, H, W, {weights.shape[3]}); "
            f"reshape the images, or call init with their number of channels"
        )
    net.check_images(x.shape[1], x.shape[2], net.group)
    layers = iter(params)
    x = _through(net, net.steps, layers, x[:, :, :, None, :]).mean(axis=(1, 2, 3))
    for activation in net.head_activations:
        x = activation(_dense(net, next(layers), x), jnp)
    return x


def _through(net: GroupCNN, steps: tuple[Step, ...], layers: Iterator[Layer], x: jax.Array) -> jax.Array:
    """Features ``(n, H', W', |G|, c)`` after ``steps`` of features ``(n, H, W, m, c_in)``."""
    for step in steps:
        match step:
            case Convolution():
                x = _group_convolution(net, step, next(layers), x)
            case Nonlinearity(activation):
                x = activation(x, jnp)
            case Pooling(_, size):
                n, height, width, *rest = x.shape
                x = x.reshape(n, height // size, size, width // size, size, *rest).mean(axis=(2, 4))
            case Branch(_, inner):
                x = x + _through(net, inner, layers, x)
    return x


def _group_convolution(net: GroupCNN, step: Convolution, layer: Layer, x: jax.Array) -> jax.Array:
    """From ``(n, H, W, m, c_in)`` to ``(n, H', W', |G|, c_out)``; one input element means lifting.

    Not the filters are turned but what they see: wide layers have far more weights than features. The rest is one
    matrix product per layer, whose gradients are several times faster on CPU than those of XLA's convolution.
    """
    k_y, k_x, m, c_in, c_out = layer.weights.shape
    reach = groups.reach(net.group, step.radii)
    rows, cols = (2 * radius + 1 for radius in reach)
    splats = groups.splat_matrices(net.group, step.radii).reshape(-1, rows, cols, k_y * k_x).swapaxes(1, 2)
    patches = _patches(net, step, reach, x)
    seen = []
    for splat, rq in zip(splats, groups.multiplication_table(net.group), strict=True):
        # Tap q of the filter of element r reads the input at element rq.
        turned = patches if m == 1 else jnp.concatenate([patches[..., q : q + 1, :] for q in rq], axis=4)
        weights = jnp.asarray(splat.reshape(-1, k_y * k_x), x.dtype)
        seen.append(jnp.einsum("nyxamc,av->nyxvmc", turned, weights))
    features = jnp.stack(seen, axis=3)
    z = features.reshape(*features.shape[:4], -1) @ layer.weights.reshape(-1, c_out)
    return math.sqrt(step.w2 / (k_y * k_x * m * c_in)) * z + math.sqrt(step.b2) * layer.bias


def _patches(net: GroupCNN, step: Convolution, reach: groups.Offset, x: jax.Array) -> jax.Array:
    """``x(t + a)`` for all pixels ``a`` within ``reach``: from ``(n, H, W, m, c)`` to ``(n, H', W', a, m, c)``.

    ``a`` runs over columns, and for each over rows.
    """
    x = x[:, :, :, None]
    for axis, radius in zip((1, 2), reach, strict=True):
        window = windows(x.shape[axis], radius, step.stride, net.padding)
        border = 0 if net.padding == "VALID" else radius
        widths = [(border, border) if one == axis else (0, 0) for one in range(x.ndim)]
        padded = jnp.pad(x, widths, mode="wrap" if net.padding == "CIRCULAR" else "constant")
        first = window.first + border
        extent = (window.outputs - 1) * step.stride + 1
        x = jnp.concatenate(
            [
                jax.lax.slice_in_dim(padded, first + a, first + a + extent, step.stride, axis=axis)
                for a in range(-radius, radius + 1)
            ],
            axis=3,
        )
    return x


def _dense(net: GroupCNN, layer: Layer, x: jax.Array) -> jax.Array:
    """From ``(n, c_in)`` to ``(n, c_out)``."""
    return net.w_std / np.sqrt(len(layer.weights)) * (x @ layer.weights) + net.b_std * layer.bias


def empirical_kernels(
    net: GroupCNN, width: int, key: jax.Array, x1: ArrayLike, x2: ArrayLike | None = None, samples: int = 1
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The NNGP and NTK of ``samples`` random networks of finite ``width``, one by one.

    ``NNGP = w² h(x1)·h(x2) / width + b²`` with the input ``h`` of the read-out: the covariance of the output over the
    parameters of the read-out. ``NTK = Σ_θ ∂f(x1)/∂θ ∂f(x2)/∂θ`` over all parameters. Their means over the samples
    tend to ``net.kernel(x1, x2)``: the spread of one sample is of order ``1/√width``, and from two hidden layers on
    (those of the head included) the mean is biased by order ``1/width``.

    Args:
      net: the network.
      width: channels of each hidden layer.
      key: a JAX random key, split into one per sample.
      x1: ``(n1, H, W, C)`` images.
      x2: ``(n2, H, W, C)`` images; ``None`` means ``x1``.
      samples: how many networks; they run one after the other, so memory does not grow with their number. It holds
        gradients of one network at up to :data:`GRADIENT_BYTES` of images, at least at one.

    Returns:
      ``(nngp, ntk)``: ``(samples, n1, n2)`` each, float32, or float64 inside ``jax.enable_x64(True)``; symmetric to the
      bit when ``x2`` is ``None``.

    Raises:
      ImageError, NetworkError: the images are not ``(n, H, W, C)`` real and finite numbers or do not fit the network,
        or ``width`` or ``samples`` is no whole number, or below 1, or ``key`` is no key.
    """
    first = as_images(x1, "x1")
    second = first if x2 is None else as_images(x2, "x2")
    check_finite(first, Labels("x1"))
    check_finite(second, Labels("x2"))
    _check_count("samples", samples)
    _check_count("width", width)
    _check_key(key)
    if first.shape[1:] != second.shape[1:]:
        raise ImageError(
            f"x1 has images of shape {first.shape[1:]}, but x2 of {second.shape[1:]}; kernels need equal shapes"
        )

    per_gradient = 4 * sum(math.prod(shape) + shape[-1] for shape in _shapes(net, width, first.shape[3]))
    step, keys = max(1, GRADIENT_BYTES // per_gradient), jax.random.split(key, samples)
    with jax.default_matmul_precision("highest"):
        if x2 is None and len(first) <= step:
            nngp, ntk = map(np.asarray, _kernels_of_all(net, width, keys, first, None))
        else:
            parts = [
                _kernels_of_all(net, width, keys, first[start : start + step], second)
                for start in range(0, len(first), step)
            ]
            nngp, ntk = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    if x2 is None:  # equal but for rounding
        nngp, ntk = ((kernel + kernel.swapaxes(1, 2)) / 2 for kernel in (nngp, ntk))
    return nngp, ntk


@functools.partial(jax.jit, static_argnames=("net", "width"))
def _kernels_of_all(
    net: GroupCNN, width: int, keys: jax.Array, x1: jax.Array, x2: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """NNGP and NTK, ``(samples, n1, n2)`` each, of one random network for each of the ``keys``."""
    return jax.lax.map(lambda key: _kernels_of_one(net, width, key, x1, x2), keys)  # type: ignore[no-any-return]


def _kernels_of_one(
    net: GroupCNN, width: int, key: jax.Array, x1: jax.Array, x2: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """NNGP and NTK, ``(n1, n2)`` each, of one random network; memory holds the gradients of ``x1``."""
    params = init(net, width, key, x1.shape[3])

    def output(params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = features(net, params, image[None])
        return _dense(net, params[-1], h)[0, 0], h[0]

    def gradient(image: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        gradients, h = jax.grad(output, has_aux=True)(params, image)
        return [jnp.ravel(leaf) for leaf in jax.tree.leaves(gradients)], h

    def column(image: jax.Array) -> tuple[jax.Array, jax.Array]:
        gradients2, h2 = gradient(image)
        return sum(g1 @ g2 for g1, g2 in zip(gradients1, gradients2, strict=True)), h2

    gradients1, h1 = jax.lax.map(gradient, jnp.asarray(x1, params[0].bias.dtype))
    if x2 is None:
        h2, ntk = h1, sum(g @ g.T for g in gradients1)
    else:
        columns, h2 = jax.lax.map(column, jnp.asarray(x2, params[0].bias.dtype))
        ntk = columns.T
    return net.w_std**2 / width * h1 @ h2.T + net.b_std**2, ntk
