"""Plain CNN kernels by offset decoupling, compiled by XLA: the inner loops of the JAX engine.

A convolution moves ``t`` and ``t'`` by the same tap, so for each offset ``δ = t' - t`` (modulo the image) the network
is a recursion on one *plane* over ``t``. Where padding is not circular, the plane of ``δ`` consists of up to two
segments per axis, which meet where ``t`` or ``t + δ`` leaves the image; no filter reaches from one into the other.

Planes are ``(H, W, B)``: ``B`` horizontal offsets times pairs of images, innermost, so that shifts along rows and
columns move whole vectors. A loop goes over the vertical offsets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp

from equikernel.engines.decoupled import rounding
from equikernel.engines.functions import FUNCTIONS
from equikernel.geometry import margin
from equikernel.layers import Branch, Convolution, Nonlinearity, convolutions

if TYPE_CHECKING:
    from collections.abc import Callable

    from equikernel.activations import Activation
    from equikernel.layers import Padding, Step

Array: TypeAlias = Any
"""A JAX array."""


@lru_cache(maxsize=128)
def plane_sums(steps: tuple[Step, ...], padding: Padding, channels: int, platform: str) -> Callable[..., Array]:
    """The compiled function of a network; XLA compiles it anew for each shape and dtype of its arguments.

    It takes

        x, y: ``(P, planes, H, W)``, packed images of ``P`` pairs.
        down: ``(n,)``, all vertical offsets.
        across: ``(D,)``, horizontal offsets.
        begin, end: those of ``down`` that are computed.
        true: True; see :meth:`_Network.apart`.

    and returns the sums of K and Θ over all pixel pairs with these offsets, ``(2, D, P)`` float64.
    """
    radii = [step.radii for step in convolutions(steps)]
    circular = padding == "CIRCULAR"

    def sums(x: Array, y: Array, down: Array, across: Array, begin: Array, end: Array, true: Array) -> Array:
        pairs, planes, height, width = x.shape
        x, y = (images.transpose(1, 2, 3, 0)[:, :, :, None] for images in (x, y))
        x = jnp.broadcast_to(x, (planes, height, width, len(across), pairs)).reshape(planes, height, width, -1)
        # The second image moved by each horizontal offset, and twice below itself: then moves down are slices.
        y = y[:, :, (jnp.arange(width)[:, None] + across) % width, 0].reshape(x.shape)
        network = _Network(
            channels,
            x,
            jnp.concatenate([y, y], axis=1),
            circular,
            {r: _links(down, height, r).transpose(2, 0, 1)[..., None, None].astype(x.dtype) for r, _ in radii},
            {r: jnp.repeat(_links(across, width, r), pairs, axis=2)[:, None].astype(x.dtype) for _, r in radii},
            float(jnp.finfo(x.dtype).eps) * rounding(steps),
            platform,
            true,
        )
        margin_y, margin_x = margin(steps, padding)
        rows = _inside(down, height, margin_y).T[..., None, None]
        columns = _inside(across, width, margin_x)[..., None]

        def add(index: Array, total: Array) -> Array:
            kernels = network.kernels(steps, down[index], index)
            return total + jnp.stack([(kernel * rows[index]).sum(axis=0) for kernel in kernels])

        total = jax.lax.fori_loop(begin, end, add, jnp.zeros((2, *x.shape[2:]), jnp.float64))
        return (total.reshape(2, width, len(across), pairs) * columns).sum(axis=1)

    return jax.jit(sums)  # type: ignore[no-any-return]


def _links(offsets: Array, side: int, radius: int) -> Array:
    """Whether ``t + v`` lies in the segment of ``t``, for ``|v| <= radius``: ``(2 radius + 1, side, n)``."""
    t = jnp.arange(side)[:, None]
    other = t + jnp.arange(-radius, radius + 1)[:, None, None]
    seam = side - offsets
    return (other >= 0) & (other < side) & ((t < seam) == (other < seam))


def _inside(offsets: Array, side: int, margin: int) -> Array:
    """1 where ``t`` lies further than ``margin`` from the ends of its segment, else 0: ``(side, n)`` float64."""
    links = _links(offsets, side, margin)
    return (links[0] & links[-1]).astype(jnp.float64)


@dataclass(frozen=True)
class _Network:
    """The recursion on planes.

    Attributes:
      channels: of the images.
      x, y: both images in the layout of the planes, ``(planes, H, W, B)`` and ``(planes, 2H, W, B)``: the pixels, then
        the factors of each nonlinearity.
      circular: whether filters see the opposite side beyond the border.
      rows, columns: by radius, :func:`_links` for each vertical offset, ``(n, 2 radius + 1, H, 1, 1)``, and for the
        horizontal ones ``(2 radius + 1, 1, W, B)``.
      eps: relative rounding error of covariances.
      platform, true: see :meth:`apart`.
    """

    channels: int
    x: Array
    y: Array
    circular: bool
    rows: dict[int, Array]
    columns: dict[int, Array]
    eps: float
    platform: str
    true: Array

    def kernels(self, steps: tuple[Step, ...], offset: Array, index: Array) -> tuple[Array, Array]:
        """K and Θ after all steps, ``(H, W, B)``, for a vertical offset, which is number ``index``."""
        place = self.channels

        def through(steps: tuple[Step, ...], *planes: Array) -> tuple[Array, ...]:
            nonlocal place
            for step in steps:
                match step:
                    case Convolution():
                        planes = self.convolution(step, index, *planes)
                    case Nonlinearity(activation):
                        planes = self.nonlinearity(activation, place, offset, *planes)
                        place += activation.planes
                    case Branch(_, inner):
                        planes = self.apart(_sum, planes, through(inner, *planes))
            return planes

        k, theta = through(steps, self.input_kernel(offset))
        return k, theta

    def input_kernel(self, offset: Array) -> Array:
        """``K⁰(t, t + δ) = f(t)·f'(t + δ) / C``."""

        def products(x: Array, y: Array) -> Array:
            def add(c: Array, total: Array) -> Array:
                return total + x[c] * _moved(y, c, offset)

            return jax.lax.fori_loop(0, self.channels, add, jnp.zeros(x.shape[1:], x.dtype)) / self.channels

        return self.apart(products, self.x, self.y)

    def convolution(self, step: Convolution, index: Array, *planes: Array) -> tuple[Array, ...]:
        """K and Θ after a convolution; of K⁰ alone both, which are the same."""
        radius_y, radius_x = step.radii
        scale = step.w2 / ((2 * radius_y + 1) * (2 * radius_x + 1))

        def vertical(links: Array, *planes: Array) -> tuple[Array, ...]:
            return tuple(self.box_sum(plane, 0, links) for plane in planes)

        def horizontal(links: Array, *planes: Array) -> tuple[Array, ...]:
            k, *theta = (scale * self.box_sum(plane, 1, links) for plane in planes)
            k += step.b2
            return k, *(k + average for average in theta)

        if radius_y:
            planes = self.apart(vertical, self.rows[radius_y][index], *planes)
        planes = self.apart(horizontal, self.columns[radius_x], *planes)
        return planes[0], planes[-1]

    def box_sum(self, plane: Array, axis: int, links: Array) -> Array:
        """``Σ_v K(t + v)`` along one axis, as far as ``t + v`` is linked with ``t``."""
        side, radius = plane.shape[axis], len(links) // 2
        if radius == 0:
            return plane
        if self.circular:
            before = jax.lax.slice_in_dim(plane, side - radius, side, axis=axis)
            after = jax.lax.slice_in_dim(plane, 0, radius, axis=axis)
        else:
            before = after = jnp.zeros_like(plane, shape=(*plane.shape[:axis], radius, *plane.shape[axis + 1 :]))
        longer = jnp.concatenate([before, plane, after], axis=axis)
        terms = (jax.lax.slice_in_dim(longer, v, v + side, axis=axis) for v in range(len(links)))
        return sum(terms if self.circular else (term * link for term, link in zip(terms, links, strict=True)))

    def nonlinearity(
        self, activation: Activation, place: int, offset: Array, k: Array, theta: Array
    ) -> tuple[Array, ...]:
        """K and Θ after an activation whose factors begin at ``place``."""
        factors = range(place, place + activation.planes)

        def dual(k: Array, theta: Array, x: Array, y: Array) -> tuple[Array, Array]:
            x_factors, y_factors = tuple(x[f] for f in factors), tuple(_moved(y, f, offset) for f in factors)
            k, derivative = activation.combine(k, x_factors, y_factors, self.eps, FUNCTIONS)
            return k, derivative * theta

        return self.apart(dual, k, theta, self.x, self.y)  # type: ignore[no-any-return]

    def apart(self, function: Callable[..., Any], *arrays: Array) -> Any:
        """``function(*arrays)``, computed once and stored before anything reads it.

        Otherwise XLA would fuse a step into the shifted terms of the next box sum, and compute it once for each: on a
        CPU 20 times slower. There it ignores optimization barriers; what it cannot merge is a conditional.
        """
        if self.platform != "cpu":
            return jax.lax.optimization_barrier(function(*arrays))

        def never(*arrays: Array) -> Any:
            return jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(function, *arrays))

        return jax.lax.cond(self.true, function, never, *arrays)


def _sum(planes: tuple[Array, ...], others: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(a + b for a, b in zip(planes, others, strict=True))


def _moved(y: Array, plane: Any, offset: Array) -> Array:
    """A plane of the second image at ``t + δ``, for a vertical offset: ``(H, W, B)``."""
    height = y.shape[1] // 2
    return jax.lax.dynamic_slice(y, (plane, offset, 0, 0), (1, height, *y.shape[2:]))[0]
