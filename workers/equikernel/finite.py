r"""Finite-width group CNNs in JAX, and their empirical NNGP and NTK: the networks whose limit the kernels are.

``z_r(t)`` are the features at pixel ``t`` and rotation or reflection ``r``, and ``x = σ(z)``; ``S`` is the square
filter support; ``ρ(r)`` acts on pixels as ``r``; the parameters ``κ`` and ``β`` are standard normal.

- lifting: ``z_r(t) = w / √(|S| C) Σ_v Σ_c κ[v, c] f_c(t + ρ(r)v) + b β``
- group convolution: ``z_r(t) = w / √(|G| |S| width) Σ_q Σ_v Σ_c κ[v, q, c] x_{rq, c}(t + ρ(r)v) + b β``
- group pooling: the mean over ``r`` and ``t``
- dense: ``w / √width Σ_c κ[c] h_c + b β``

The precision is JAX's default: float32, or float64 inside ``with jax.enable_x64(True):``.

>>> params = init(net, width=128, key=jax.random.key(0), channels=3)
>>> outputs = apply(net, params, images)                                                # (n,)
>>> nngp, ntk = empirical_kernels(net, 128, jax.random.key(0), images, samples=100)     # (100, n, n)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equikernel import groups
from equikernel.errors import ImageError, NetworkError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from equikernel.network import GroupCNN

ACTIVATIONS = {"relu": jax.nn.relu, "erf": jax.lax.erf}


class Layer(NamedTuple):
    """The parameters of one layer, standard normal at initialisation; the scales are applied in the forward pass.

    ``weights``: ``(k, k, m, c_in, c_out)`` for a convolution, with ``m = 1`` element of the input in the lifting layer
    and ``m = |G|`` after it; ``(c_in, c_out)`` for a dense layer. ``bias``: ``(c_out,)``, shared by all pixels and
    elements.
    """

    weights: jax.Array
    bias: jax.Array


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
      NetworkError: ``width`` or ``channels`` is below 1.
    """
    if width < 1 or channels < 1:
        raise NetworkError(
            f"a network of width {width} on images of {channels} channels has no parameters; use 1 or more"
        )
    n, k = len(groups.symmetries(net.group)), net.filter_size
    shapes: list[tuple[int, ...]] = [(k, k, 1, channels, width)]
    shapes += [(k, k, n, width, width)] * (net.depth - 1)
    shapes += [(width, width)] * len(net.head)
    shapes += [(width, 1)]
    sizes = [size for shape in shapes for size in (math.prod(shape), shape[-1])]
    # One draw for all layers: XLA takes about half a second to compile each.
    values = iter(jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1]))
    return tuple(Layer(next(values).reshape(shape), next(values)) for shape in shapes)


def apply(net: GroupCNN, params: Params, images: ArrayLike) -> jax.Array:
    """Outputs ``(n,)`` of the network on ``(n, H, W, C)`` images, in the dtype of ``params``.

    Raises:
      ImageError, NetworkError: the images are not ``(n, H, W, C)`` or do not fit the network or its parameters.
    """
    return _dense(net, params[-1], features(net, params, images))[:, 0]


def features(net: GroupCNN, params: Params, images: ArrayLike) -> jax.Array:
    """The input of the read-out, ``(n, width)``: what is left of ``(n, H, W, C)`` images after pooling and head.

    Raises:
      ImageError, NetworkError: as :func:`apply`.
    """
    weights = params[0].weights
    x = jnp.asarray(images, weights.dtype)
    if x.ndim != 4 or x.shape[3] != weights.shape[3]:
        raise ImageError(
            f"images have shape {x.shape}, but the parameters are for (n, H, W, {weights.shape[3]}); "
            f"reshape the images, or call init with their number of channels"
        )
    net.check_images(x.shape[1], x.shape[2], net.group)
    x = x[:, :, :, None, :]
    for layer in params[: net.depth]:
        x = ACTIVATIONS[net.activation](_group_convolution(net, layer, x))
    x = x.mean(axis=(1, 2, 3))
    for activation, layer in zip(net.head, params[net.depth : -1], strict=True):
        x = ACTIVATIONS[activation](_dense(net, layer, x))
    return x


def _group_convolution(net: GroupCNN, layer: Layer, x: jax.Array) -> jax.Array:
    """From ``(n, H, W, |G|, c_in)`` to ``(n, H', W', |G|, c_out)``; one input element means lifting."""
    k, _, m, c_in, c_out = layer.weights.shape
    elements = groups.symmetries(net.group)
    # The filter of element r is moved by r, and its tap q reads the input at element rq.
    moved = []
    for element, rq in zip(elements, groups.multiplication_table(net.group), strict=True):
        weights = jnp.flip(layer.weights, 1) if element.mirrored else layer.weights
        weights = jnp.rot90(weights, element.turns, axes=(0, 1))
        moved.append(weights if m == 1 else weights[:, :, np.argsort(rq)])
    filters = jnp.stack(moved, axis=4).reshape(k * k * m * c_in, len(elements) * c_out)
    z = _patches(net, x.reshape(*x.shape[:3], m * c_in)) @ filters
    z = z.reshape(*z.shape[:3], len(elements), c_out)
    return net.w_std / np.sqrt(k * k * m * c_in) * z + net.b_std * layer.bias


def _patches(net: GroupCNN, x: jax.Array) -> jax.Array:
    """``x(t + v)`` for all ``v ∈ S`` side by side: from ``(n, H, W, c)`` to ``(n, H', W', k² c)``.

    One matrix product per layer: on CPU, its gradients are several times faster than those of XLA's convolution.
    """
    if net.padding != "VALID":
        border = (net.radius, net.radius)
        x = jnp.pad(x, ((0, 0), border, border, (0, 0)), mode="wrap" if net.padding == "CIRCULAR" else "constant")
    height, width = x.shape[1] - 2 * net.radius, x.shape[2] - 2 * net.radius
    taps = range(net.filter_size)
    return jnp.concatenate([x[:, i : i + height, j : j + width] for i in taps for j in taps], axis=3)


def _dense(net: GroupCNN, layer: Layer, x: jax.Array) -> jax.Array:
    """From ``(n, c_in)`` to ``(n, c_out)``."""
    return net.w_std / np.sqrt(len(layer.weights)) * (x @ layer.weights) + net.b_std * layer.bias


def empirical_kernels(
    net: GroupCNN, width: int, key: jax.Array, x1: ArrayLike, x2: ArrayLike | None = None, samples: int = 1
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The NNGP and NTK of ``samples`` random networks of finite ``width``, one by one.

    ``NNGP = w² h(x1)·h(x2) / width + b²`` with the input ``h`` of the read-out: the covariance of the output over the
    parameters of the read-out. ``NTK = Σ_θ ∂f(x1)/∂θ ∂f(x2)/∂θ`` over all parameters. Their means over the samples
    tend to ``net.kernel(x1, x2)``: the spread of one sample is of order ``1/√width``, and from depth 2 on the mean is
    biased by order ``1/width``.

    Args:
      net: the network.
      width: channels of each hidden layer.
      key: a JAX random key, split into one per sample.
      x1: ``(n1, H, W, C)`` images.
      x2: ``(n2, H, W, C)`` images; ``None`` means ``x1``.
      samples: how many networks; they run one after the other, so memory does not grow with their number. It holds
        ``n1 + n2`` gradients, each as large as the parameters.

    Returns:
      ``(nngp, ntk)``: ``(samples, n1, n2)`` each, float32, or float64 inside ``jax.enable_x64(True)``.

    Raises:
      ImageError, NetworkError: the images are not ``(n, H, W, C)`` or do not fit the network, or a width below 1.
    """
    images = _as_images(x1, "x1")
    rows = columns = slice(0, len(images))
    if x2 is not None:
        others = _as_images(x2, "x2")
        if images.shape[1:] != others.shape[1:]:
            raise ImageError(
                f"x1 has images of shape {images.shape[1:]}, but x2 of {others.shape[1:]}; kernels need equal shapes"
            )
        columns = slice(len(images), len(images) + len(others))
        images = np.concatenate([images, others])

    def one_network(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = init(net, width, key, images.shape[3])
        h, gradients = _features_and_gradients(net, params, images)
        nngp = net.w_std**2 / width * h[rows] @ h[columns].T + net.b_std**2
        return nngp, sum(gradient[rows] @ gradient[columns].T for gradient in gradients)

    with jax.default_matmul_precision("highest"):
        nngp, ntk = jax.jit(lambda keys: jax.lax.map(one_network, keys))(jax.random.split(key, samples))
    return np.asarray(nngp), np.asarray(ntk)


def _as_images(images: ArrayLike, name: str) -> NDArray[Any]:
    array = np.asarray(images)
    if array.ndim != 4:
        raise ImageError(f"{name} has shape {array.shape}; it must be (images, height, width, channels)")
    return array


def _features_and_gradients(net: GroupCNN, params: Params, images: NDArray[Any]) -> tuple[jax.Array, list[jax.Array]]:
    """At each image: the features ``(n, width)``, and ``∂f/∂θ`` as one ``(n, size)`` array per array of parameters."""

    def output(params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = features(net, params, image[None])
        return _dense(net, params[-1], h)[0, 0], h[0]

    gradients, h = jax.vmap(jax.grad(output, has_aux=True), in_axes=(None, 0))(params, images)
    return h, [gradient.reshape(len(images), -1) for gradient in jax.tree.leaves(gradients)]
