"""``jax.numpy`` for the dual kernels of the activations: arcs that vectorise, and an exact ``sinh``."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, TypeAlias

import jax.numpy as jnp

Array: TypeAlias = Any
"""A JAX array."""

ARCSINE: dict[str, tuple[float, ...]] = {
    "float32": (
        0.03369084720283012, 0.017149238357677253, 0.03110066273549457, 0.04459940152851218, 0.07500094543497424,
        0.16666666337430908,
    ),
    "float64": (
        0.028757851367421566, -0.014851887071247204, 0.01740087944269402, 0.005457506718640358, 0.01032281435018578,
        0.011479177415184906, 0.013971212973552933, 0.017352392720869973, 0.02237217294214989, 0.030381944138531247,
        0.04464285714635543, 0.07499999999998433, 0.16666666666666669,
    ),
}  # fmt: skip
"""``R`` with ``arcsin w = w + w³ R(w²)`` for ``w² <= 1/4``, to 4e-9 and 2e-17, the highest power first."""

SINH_DEGREE = {"float32": 9, "float64": 19}
"""Of the Taylor series of ``sinh k`` for ``|k| <= 1``."""


def _arcsine(w: Array, square: Array) -> Array:
    """``arcsin w`` for ``0 <= w <= 1/2``."""
    series = 0.0
    for coefficient in ARCSINE[w.dtype.name]:
        series = series * square + coefficient
    return w + w * square * series


def arccos(c: Array) -> Array:
    """``arccos c``. XLA's own, through ``arctan2``, does not vectorise on CPUs: 20 times slower."""
    a = abs(c)
    large = a > 0.5
    square = jnp.where(large, (1 - a) / 2, a * a)
    arc = _arcsine(jnp.where(large, jnp.sqrt(square), a), square)
    arc = jnp.where(large, 2 * arc, math.pi / 2 - arc)
    return jnp.where(c < 0, math.pi - arc, arc)


def arctan2(y: Array, x: Array) -> Array:
    """The angle of a point of the unit circle with ``x >= 0``; see :func:`arccos`."""
    a = abs(y)
    large = a > 0.5
    square = jnp.where(large, x * x / (2 * (1 + a)), a * a)
    arc = _arcsine(jnp.where(large, jnp.sqrt(square), a), square)
    arc = jnp.where(large, math.pi / 2 - 2 * arc, arc)
    return jnp.where(y < 0, -arc, arc)


def sinh(k: Array) -> Array:
    """``sinh k`` for ``|k| <= 1``, to the last digit, where XLA's loses two."""
    square = k * k
    series = 0.0
    for odd in reversed(range(1, SINH_DEGREE[k.dtype.name] + 1, 2)):
        series = series * square + 1 / math.factorial(odd)
    return k * series


FUNCTIONS = SimpleNamespace(**{**vars(jnp), "arccos": arccos, "arctan2": arctan2, "sinh": sinh})
"""``jax.numpy`` with these functions, defined on all that the dual kernels ask for."""
