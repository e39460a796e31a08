"""The general engine: any group, stride, pooling, padding and activation, with dense covariances in JAX, in float64.

Of the kernels ``K[r, r'](t, t')`` between two group elements a group convolution needs the mean over ``q`` of
``K[rq, r'q]`` only. So the difference ``d = r' r⁻¹`` never changes, and for each ``d`` the network is a recursion of
its own on ``K[r, d r]``, for all ``r``. Elements ``s`` on the pixel grid permute the taps of the filters, so
``K[rs, d r s] = K[r, d r]``: one ``r`` of each coset ``r S`` is enough, where ``S`` are the elements on the grid.

- A group on the grid is its own ``S``. There is one coset, and in the coordinates of ``ρ(d) f'`` the recursion is that
  of a plain CNN: ``|G|`` dense kernels, not ``|G|²``.
- Off the grid the filter of ``r`` is ``R_r[a, v]``, the taps ``ρ(r) v`` spread over the pixels ``a`` around them:
  ``K[r, d r](t, t') = 1/|S| Σ_v Σ_{a, b} R_r[a, v] R_{dr}[b, v] K̄[d](t + a, t' + b)``, with ``K̄[d]`` the mean over cosets.

Arrays are ``K[i, p, y, x, y', x']``, for coset ``i`` and pair ``p``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from equikernel.activations import EPS
from equikernel.engines.arcs import FUNCTIONS
from equikernel.geometry import windows
from equikernel.groups import Symmetry, on_grid, reach, symmetries, union
from equikernel.layers import Branch, Convolution, Nonlinearity, Pooling
from equikernel.recursion import Pooled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from equikernel.activations import Activation
    from equikernel.layers import Padding, Step
    from equikernel.network import Architecture

Array: TypeAlias = Any
"""A JAX array, float64."""

Factors: TypeAlias = tuple[Any, ...]
"""Those of an activation, for each image and coset: ``(n, cosets, H, W)`` each."""

ENTRIES = {"cpu": 2**20, "gpu": 2**26}
"""Entries of a covariance of the pairs that are computed at once."""


@dataclass(frozen=True)
class Prepared:
    """Images ``(n, H, W, C)`` float64, with the factors of each nonlinearity in turn."""

    images: NDArray[np.float64]
    factors: list[Factors]
    bound: NDArray[np.float64]
    """``(mean over t of √K(t,t))²`` at the end, ``(n,)``."""


class GeneralEngine:
    """Pooled kernels of ``groups``, on JAX's default device, with ``memory`` bytes."""

    name = "general"

    def __init__(self, network: Architecture, groups: tuple[str, ...], memory: int) -> None:
        self.network = network
        self.groups = groups
        self.memory = memory
        self.group = groups[0]
        """The only one, unless all are on the grid."""
        self.grid = on_grid(self.group)
        self.elements = union(groups)
        self.cosets = _cosets(self.group)
        radii = [max(step.radii) for step in network.convolutions]
        # How close to ±1 a correlation is taken as ±1; sums over larger filters round more.
        self.eps = EPS * max(1, *radii)

    def prepare(self, images: NDArray[Any]) -> Prepared:
        """Images ``(n, H, W, C)`` with the factors of their variances, from the whole of ``K(f, f)``.

        Raises:
          NetworkError: an activation has no second moment.
        """
        x = images.astype(np.float64)
        block = self._at_once(len(x), *x.shape[1:3])
        parts = [self._variances(x[i : i + block]) for i in range(0, len(x), block)]
        ...
