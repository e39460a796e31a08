"""Networks of any kind on dense covariances, compiled step by step: the inner loops of the general engine.

Arrays are ``K[i, p, y, x, y', x']``: the kernel of pair ``p`` between the group elements ``(t, r_i)`` and
``(t', d r_i)``, with ``t = (y, x)``, for a fixed ``d`` and one ``r_i`` of each coset; see
:mod:`equikernel.engines.general`.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from equikernel.engines.functions import FUNCTIONS
from equikernel.geometry import windows
from equikernel.groups import on_grid, reach, symmetries
from equikernel.layers import Branch, Convolution, Nonlinearity, Pooling

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from equikernel.activations import Activation
    from equikernel.groups import Offset, Symmetry
    from equikernel.layers import Padding, Step
    from equikernel.network import Architecture

Array: TypeAlias = Any
"""A JAX array, float64."""

Factors: TypeAlias = tuple[Any, ...]
"""Those of an activation, for each coset and image: ``(cosets, p, H, W)`` each."""


Function = TypeVar("Function", bound="Callable[..., Any]")


def compiled(*static: str) -> Callable[[Function], Function]:
    """Have XLA compile a function, once for each value of its ``static`` arguments and shape of the others."""

    def compile_function(function: Function) -> Function:
        return jax.jit(function, static_argnames=static)  # type: ignore[no-any-return]

    return compile_function


@cache
def cosets(group: str) -> dict[Symmetry, int]:
    """The number of the coset ``r S`` of each element, with ``S`` the elements of ``group`` on the pixel grid."""
    shared = [element for element in symmetries(group) if element.on_grid]
    found: dict[Symmetry, int] = {}
    for element in symmetries(group):
        number = len(found) // len(shared)
        found |= {element * s: number for s in shared if element not in found}
    return found


@cache
def representatives(group: str) -> tuple[Symmetry, ...]:
    """One element of each coset, in their order; the identity first."""
    first = {number: element for element, number in reversed(cosets(group).items())}
    return tuple(first[number] for number in sorted(first))


@compiled()
def input_kernel(x: Array, y: Array) -> Array:
    """``K⁰(t, t') = f(t)·f'(t') / C`` of pairs of images ``(p, H, W, C)``: ``(1, p, H, W, H, W)``."""
    return jnp.einsum("pijc,pklc->pijkl", x / x.shape[-1], y, precision="highest")[None]


@compiled()
def diagonal(k: Array) -> Array:
    """``K[i, p, t, t]``: ``(cosets, p, H, W)``."""
    return jnp.einsum("ipyxyx->ipyx", k)


@compiled()
def mean_over_second(k: Array) -> Array:
    """The mean over ``t'``: ``(cosets, p, H, W)``."""
    return k.mean(axis=(4, 5))


class DenseNetwork:
    """The recursion of a network over a group.

    Args:
      network: any.
      group: any; on the grid the cosets are one, and ``d`` is taken as the identity: rotate the image instead.
      eps: relative rounding error of covariances.
    """

    def __init__(self, network: Architecture, group: str, eps: float) -> None:
        self.network = network
        self.group = group
        self.eps = eps
        self.grid = on_grid(group)

    def kernels(
        self,
        kernels: list[Array],
        d: Symmetry,
        factors: Callable[[Nonlinearity, Array], tuple[Factors, Factors]],
        *,
        ntk: bool,
    ) -> list[Array]:
        """K and Θ after all steps, or K alone.

        Args:
          kernels: :func:`input_kernel`, alone. It is taken out of the list, to be freed.
          d: the difference of the two group elements.
          factors: those of both images, called with each nonlinearity and the covariances before it in turn.
          ntk: whether Θ is wanted.
        """
        lifting = True

        def through(steps: tuple[Step, ...], kernels: list[Array]) -> list[Array]:
            nonlocal lifting
            for step in steps:
                match step:
                    case Convolution():
                        kernels = [self._filter_average(step, kernels.pop(0), d) for _ in range(len(kernels))]
                        kernels = _weighted(kernels, step.w2, step.b2)
                        if lifting and ntk:  # Θ⁰ = 0
                            kernels *= 2
                        lifting = False
                    case Nonlinearity(activation):
                        x, y = factors(step, kernels[0])
                        kernels = _dual(kernels, x, y, activation=activation, eps=self.eps)
                    case Pooling(_, size):
                        kernels = _block_mean(kernels, size=size)
                    case Branch(_, inner):
                        kernels = _sum(kernels, through(inner, list(kernels)))
                jax.block_until_ready(kernels)
            return kernels

        return through(self.network.steps, kernels)

    def _filter_average(self, step: Convolution, k: Array, d: Symmetry) -> Array:
        """The mean over group and filter, ``(cosets, p, H', W', H', W')``."""
        padding = self.network.padding
        if self.grid:
            for axis, radius in enumerate(step.radii):
                k = _box_mean(k, axis=axis, radius=radius, stride=step.stride, padding=padding)
            return k
        k = _coset_mean(k)
        radii = reach(self.group, step.radii)
        return _splat_mean(k, *_taps(self.group, d, step.radii), radii=radii, stride=step.stride, padding=padding)


@cache
def _taps(group: str, d: Symmetry, radii: Offset) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.int32]]:
    """The pixels that the filters of ``r`` and ``d r`` see, for one ``r`` of each coset.

    Returns:
      ``(a, b)``, ``(cosets, taps, 4)``; their weights ``R_r[a, v] R_dr[b, v] / |S|``, ``(cosets, taps)``; and how many
      of the taps count, ``(cosets,)``.
    """
    y, x = radii
    base = list(product(range(-y, y + 1), range(-x, x + 1)))
    rows = [
        [((*a, *b), wa * wb / len(base)) for v in base for a, wa in r.splat(v) for b, wb in (d * r).splat(v)]
        for r in representatives(group)
    ]
    counts = np.array([len(row) for row in rows], np.int32)
    offsets = np.zeros((len(rows), counts.max(), 4), np.int32)
    weights = np.zeros(offsets.shape[:2])
    for i, row in enumerate(rows):
        offsets[i, : len(row)] = [offset for offset, _ in row]
        weights[i, : len(row)] = [weight for _, weight in row]
    return offsets, weights, counts


@compiled()
def _coset_mean(k: Array) -> Array:
    """``1/|G| Σ_q K[rq, d r q]``: ``(p, H, W, H, W)``."""
    return k.mean(axis=0)


@compiled("axis", "radius", "stride", "padding")
def _box_mean(k: Array, *, axis: int, radius: int, stride: int, padding: Padding) -> Array:
    """The mean over the filter along one axis of both images, 0 rows and 1 columns."""
    window = windows(k.shape[2 + axis], radius, stride, padding)
    axes = (2 + axis, 4 + axis)
    border = 0 if padding == "VALID" else radius
    k = _padded(k, axes, border, padding)
    total = 0.0
    for v in range(-radius, radius + 1):
        seen = k
        start = border + window.first + v
        for side in axes:
            seen = jax.lax.slice_in_dim(seen, start, start + (window.outputs - 1) * stride + 1, stride, axis=side)
        total = total + seen
    return total / (2 * radius + 1)


@compiled("radii", "stride", "padding")
def _splat_mean(
    k: Array, offsets: Array, weights: Array, counts: Array, *, radii: Offset, stride: int, padding: Padding
) -> Array:
    """``Σ_{a, b} weight[a, b] K(t + a, t' + b)`` with the :func:`_taps` of each coset.

    Sums are compensated (Knuth's two-sum): else the many terms would put ``c`` further from ``±1`` than the branch
    point allows for.
    """
    sides = [windows(side, radius, stride, padding) for side, radius in zip(k.shape[1:3], radii, strict=True)] * 2
    borders = [0 if padding == "VALID" else radius for radius in radii] * 2
    for axis, border in enumerate(borders[:2]):
        k = _padded(k, (1 + axis, 3 + axis), border, padding)
    first = jnp.array([side.first + border for side, border in zip(sides, borders, strict=True)])
    extent = [(side.outputs - 1) * stride + 1 for side in sides]
    outputs = (len(k), *(side.outputs for side in sides))

    def coset(taps: tuple[Array, Array, Array]) -> Array:
        offsets, weights, count = taps

        def add(tap: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            total, lost = sums
            seen = jax.lax.dynamic_slice(k, (0, *(first + offsets[tap])), (len(k), *extent))
            term = weights[tap] * seen[:, ::stride, ::stride, ::stride, ::stride]
            following = total + term
            part = following - total
            return following, lost + ((total - (following - part)) + (term - part))

        total, lost = jax.lax.fori_loop(0, count, add, (jnp.zeros(outputs), jnp.zeros(outputs)))
        return total + lost

    return jax.lax.map(coset, (offsets, weights, counts))


def _padded(k: Array, axes: tuple[int, int], border: int, padding: Padding) -> Array:
    """``border`` zeros, or entries of the opposite side, at both ends of ``axes``."""
    if border == 0:
        return k
    widths = [(border, border) if axis in axes else (0, 0) for axis in range(k.ndim)]
    return jnp.pad(k, widths, mode="wrap" if padding == "CIRCULAR" else "constant")


@compiled()
def _weighted(kernels: list[Array], w2: float, b2: float) -> list[Array]:
    """``K ← w² K + b²``, ``Θ ← K + w² Θ``."""
    k, *theta = kernels
    k = w2 * k + b2
    return [k, *(k + w2 * average for average in theta)]


@compiled("activation", "eps")
def _dual(kernels: list[Array], x: Factors, y: Factors, *, activation: Activation, eps: float) -> list[Array]:
    """``K ← E[σσ]``, ``Θ ← K̇ Θ``."""
    first = tuple(factor[:, :, :, :, None, None] for factor in x)
    second = tuple(factor[:, :, None, None] for factor in y)
    k, *theta = kernels
    k, derivative = activation.combine(k, first, second, eps, FUNCTIONS)
    return [k, *(derivative * kernel for kernel in theta)]


@compiled("size")
def _block_mean(kernels: list[Array], *, size: int) -> list[Array]:
    """The mean over blocks of ``size x size`` pixels of both images."""

    def mean(k: Array) -> Array:
        height, width = k.shape[2] // size, k.shape[3] // size
        split = k.reshape(*k.shape[:2], height, size, width, size, height, size, width, size)
        return split.mean(axis=(3, 5, 7, 9))

    return [mean(k) for k in kernels]


@compiled()
def _sum(kernels: list[Array], others: list[Array]) -> list[Array]:
    return [a + b for a, b in zip(kernels, others, strict=True)]
