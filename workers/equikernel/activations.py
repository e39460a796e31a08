"""Each activation σ once: its finite-width function and its two dual kernels on arrays.

For ``(u, v) ~ N(0, [[q1, k], [k, q2]])`` the dual kernels are ``E[σ(u) σ(v)]``, the NNGP after the activation, and
``K̇ = E[σ'(u) σ'(v)]``, the factor that multiplies the NTK. The fast engines evaluate the same formulas entry by
entry; these are their judge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)

BRANCH_POINT = 4
"""A correlation with ``1 - |c| < BRANCH_POINT · eps`` is taken as ``±1``: there a rounding error ε becomes √ε in K̇."""


def correlation(k: Array, q1: Array, q2: Array, eps: float | Array) -> Array:
    """``c = k / √(q1 q2)`` in ``[-1, 1]``, exactly ``±1`` near the branch point, and 0 where ``q1 q2 = 0``.

    Args:
      k, q1, q2: covariance and variances, any shapes that broadcast.
      eps: relative rounding error of ``k``: the machine epsilon of its precision, or more after cancellation.
    """
    scale = np.sqrt(q1) * np.sqrt(q2)
    c = np.divide(k, scale, out=np.zeros(np.broadcast_shapes(k.shape, scale.shape)), where=scale > 0)
    snapped: Array = np.where(1 - np.abs(c) < BRANCH_POINT * eps, np.sign(c), c)
    return snapped


def relu(k: Array, q1: Array, q2: Array, eps: float | Array = EPS) -> tuple[Array, Array]:
    """Dual kernels of ``max(u, 0)``: the arc-cosine kernels of degree 1 and 0 (Cho and Saul 2009).

    ``E[σσ] = √(q1 q2) (√(1-c²) + (π - arccos c) c) / 2π`` and ``K̇ = (π - arccos c) / 2π``.
    """
    c = correlation(k, q1, q2, eps)
    angle = np.pi - np.arccos(c)
    nngp = np.sqrt(q1) * np.sqrt(q2) * (np.sqrt((1 - c) * (1 + c)) + angle * c) / (2 * np.pi)
    return nngp, angle / (2 * np.pi)


def erf(k: Array, q1: Array, q2: Array, eps: float | Array = EPS) -> tuple[Array, Array]:
    """Dual kernels of ``erf(u)`` (Williams 1997).

    With ``z = 2k / √((1+2q1)(1+2q2))``: ``E[σσ] = (2/π) arcsin z`` and
    ``K̇ = (4/π) / √((1+2q1)(1+2q2) - 4k²)``. For large variances ``z`` comes close to 1; ``1 - z²`` is then summed from
    positive terms, with ``1 - c²`` of the correlation ``c``, instead of being a difference of large numbers.
    """
    c = correlation(k, q1, q2, eps)
    e1, e2 = 1 / (1 + 2 * q1), 1 / (1 + 2 * q2)
    z = 2 * k * np.sqrt(e1) * np.sqrt(e2)
    rest = e1 + (1 - e1) * (e2 + (1 - e2) * (1 - c) * (1 + c))
    return 2 / np.pi * np.arctan2(z, np.sqrt(rest)), 4 / np.pi * np.sqrt(e1) * np.sqrt(e2) / np.sqrt(rest)


DUALS = {"relu": relu, "erf": erf}
"""Activation name to its dual kernels ``(k, q1, q2, eps) -> (nngp, K̇)``."""
