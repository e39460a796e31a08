"""The dual kernels of the activations on vectors: :meth:`equikernel.activations.Activation.combine`, lane by lane.

Polynomials stand in place of the functions that no processor has. Their coefficients are minimax, lowest power first;
the errors that are named are absolute. Those without a precision are of float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from equikernel.activations import Custom, Erf, Gelu, Homogeneous, Polynomial, Wave
from equikernel.engines.series import ARCSINE, SINH_DEGREE
from equikernel.engines.vectors import Variable

if TYPE_CHECKING:
    from equikernel.activations import Activation
    from equikernel.engines.vectors import Function, Index, Pointer, Vector

ARCCOS = (
    0.4501585618231829, 0.03749905994726785, 0.008582258608728197, 0.0018933626821563995, 0.002201892174112486,
    -0.0011662072082362037, 0.0008310439454806346,
)  # fmt: skip
"""``arccos(a)/π = √(1-a) P(1-a)`` for ``0 <= a <= 1``, to 3e-8."""

ARCCOS_REST = (
    0.3001039766122802, 0.015026999239690145, 0.002297812583172526, 0.0008358024921071757, -0.0001777696578709429,
    0.00022305684076417553,
)  # fmt: skip
"""``(√(1-a²) - a arccos a)/π = (1-a)^{3/2} R(1-a)`` for ``0 <= a <= 1``, to 8e-9."""

ARCCOS_OF_ROOT = {
    "float32": (
        0.7010455589630862, -0.9079020886274437, 1.1403578041050177, -0.9819366368510832, 0.39695944430076485,
    ),
    "float64": (
        0.7070667482317042, -0.9987527878084531, 1.726761701650023, -3.1310673931372763, 5.487562840599326,
        -8.615207621243549, 11.257983598543607, -11.39329769199248, 8.217146475107674, -3.7181911258998963,
        0.788426788794175,
    ),
}  # fmt: skip
"""``arccos(a)/π = √(1-a) U(√(1+a)/π)`` for ``0 <= a <= 1``, to 3.4e-8 and 1.2e-16: half the terms, for another root."""

EXPONENTIAL_TERMS = {"float32": 8, "float64": 14}
"""Terms of the series of ``e^r`` for ``|r| <= log(2)/2``."""

LOG_2 = {
    "float32": (0.693145751953125, 1.42860682030941723212e-06),
    "float64": (0.6931471803691238, 1.9082149292705877e-10),
}
"""The logarithm of 2 in two parts, the first with so few digits that small multiples are exact."""

TERMS_AT_ONCE = 16
"""Terms of a Hermite series that are written out; more make a loop."""

Kernels: TypeAlias = "tuple[Vector, Vector]"


@dataclass(frozen=True)
class Factors:
    """Where the factors of one activation are, :meth:`Activation.factors`, for the pixels of both images.

    Attributes:
      x, y: the first factor of a pixel of the first image, and those of the pixels of the second in each lane.
      x_plane, y_plane: entries from one factor to the next.
      aligned: whether ``y`` is.
    """

    x: Pointer
    y: Pointer
    x_plane: int
    y_plane: int
    aligned: bool

    def __call__(self, function: Function, number: int | Index) -> Kernels:
        """One factor of each image."""
        x, y = self.x + number * self.x_plane, self.y + number * self.y_plane
        return function.broadcast(x), function.load(y, aligned=self.aligned)

    def after(self, planes: int) -> Factors:
        """The factors that many planes further on."""
        return replace(self, x=self.x + planes * self.x_plane, y=self.y + planes * self.y_plane)

    def product(self, function: Function, number: int | Index) -> Vector:
        """The product of one factor of both images."""
        x, y = self(function, number)
        return x * y


def begin_arc_cosine(f: Function, c: Vector, scale: float, branch: float, *, nonnegative: bool) -> list[Vector]:
    """What :func:`arc_cosine` begins with: ``1 - |c|``, roots, and ``c`` if its sign counts.

    Args:
      f: the function under construction.
      c: correlations, which are taken as ``±1`` from ``1 - branch`` on.
      scale: of the result of :func:`arc_cosine`.
      branch: see above.
      nonnegative: whether ``c >= 0``, but for rounding errors.
    """
    gap = _gap(f, c if nonnegative else abs(c), branch)
    begun = [gap, f.sqrt(gap)]
    if not _slow_roots(f):
        unit = (scale / math.pi) ** 2 if is_moderate(scale) else 1 / math.pi**2
        begun.append(f.sqrt_of_moderate(f.fused(gap, -unit, 2 * unit)))
    return begun if nonnegative else [c, *begun]


def arc_cosine(f: Function, begun: list[Vector], middle: float, scale: float, *, nonnegative: bool) -> Kernels:
    """``scale · (√(1-c²)/π + c A, A)`` with ``A = middle + arcsin(c)/π``.

    Divided by π because then ``A`` is exactly 1 for a ReLU at ``c = 1``: a rounding error there would grow with every
    layer. With ``a = |c|``, ``α = arccos(a)/π`` and ``g = √(1-a²)/π - a α``, which take one root of ``1 - a``,

        c >= 0:  A = middle + 1/2 - α  and  √(1-c²)/π + c A = g + a (middle + 1/2),
        c < 0:   A = middle - 1/2 + α  and  √(1-c²)/π + c A = g - a (middle - 1/2),

    or with another root, of ``1 + a``, only ``α`` is a polynomial, of fewer terms: with ``P = 1/2 - α ± middle``,

        A = ± P  and  √(1-c²)/π + c A = √(1-a) √(1+a)/π + a P.

    The scale is part of all constants.

    Args:
      f: the function under construction.
      begun: what :func:`begin_arc_cosine` returned for ``c`` and the same scale.
      middle: see above.
      scale: of the result.
      nonnegative: whether ``c >= 0``, but for rounding errors.
    """
    unit = scale if is_moderate(scale) else 1.0
    upper, lower = unit * (middle + 0.5), unit * (middle - 0.5)
    gap, root, *other = begun if nonnegative else begun[1:]

    def by_sign(above: Any, below: Any) -> Any:
        return above if nonnegative else f.where(begun[0] >= 0, above, below)

    if not other:
        angle = root * f.polynomial(gap, [unit * p for p in ARCCOS])
        rest = root * gap * f.polynomial(gap, [unit * p for p in ARCCOS_REST])
        nngp = rest + by_sign(f.fused(gap, -upper, upper), f.fused(gap, lower, -lower) if lower else 0)
        angle = by_sign(upper - angle, lower + angle if lower else angle)
    else:
        powers = enumerate(ARCCOS_OF_ROOT[f.dtype.name])
        arc = f.polynomial(other[0], [unit ** (1 - n) * p for n, p in powers])
        p = f.fused(-root, arc, by_sign(upper, 0.0 - lower))
        nngp = f.fused(-gap, p, f.fused(root, other[0], p))
        angle = abs(p) if lower >= 0 and not nonnegative else by_sign(p, -p)
    return (nngp, angle) if unit == scale else (scale * nngp, scale * angle)


def is_moderate(scale: float) -> bool:
    """Whether the powers of a scale that :func:`arc_cosine` takes are in the range of float32."""
    return 1e-4 <= scale <= 1e4


def _slow_roots(f: Function) -> bool:
    """Whether a root takes as long as a dozen other operations: in AVX-512 the divider is half as wide as the rest."""
    return f.dtype == np.float32 and f.module.target.vector_bytes == 64


def emit(
    f: Function,
    activation: Activation,
    k: Vector,
    theta: Vector,
    factors: Factors,
    branch: float,
    *,
    nonnegative: bool,
) -> Kernels:
    """K and Θ after an activation.

    Args:
      f: the function under construction.
      activation: which.
      k, theta: the kernels before.
      factors: of the activation.
      branch: correlations with ``1 - |c| < branch`` are taken as ``±1``.
      nonnegative: whether ``k >= 0``, but for rounding errors.
    """
    match activation:
        case Homogeneous(_, _, 0.0):
            return k, theta
        case Homogeneous():
            c = k * factors.product(f, 1)
            scale, middle = activation.arcsine
            begun = begin_arc_cosine(f, c, scale, branch, nonnegative=nonnegative)
            nngp, angle = arc_cosine(f, begun, middle, scale, nonnegative=nonnegative)
            return factors.product(f, 0) * nngp, theta * angle
        case Erf():
            return _erf(f, k, theta, factors, branch)
        case Gelu():
            return _gelu(f, k, theta, factors, branch)
        case Wave(name):
            return _wave(f, k, theta, factors, branch, cosine=name == "cos")
        case Polynomial(_, degree):
            return _polynomial(f, k, theta, factors, branch, odd=degree % 2 == 1)
        case Custom(_, nodes):
            return _series(f, k, theta, factors, branch, nodes)
    raise NotImplementedError(f"the activation {activation} has no code for vectors")


def _gap(f: Function, a: Vector, branch: float) -> Vector:
    """``1 - a`` for ``a = |c|``, and 0 near ``c = ±1``."""
    return f.where(a <= 1 - branch, 1 - a, 0)


def _clamped(f: Function, c: Vector, branch: float) -> Vector:
    """``c``, or ``±1`` near it and beyond."""
    return f.where(abs(c) <= 1 - branch, c, f.where(c >= 0, 1, -1))


def _arcsine(f: Function, z: Vector, rest: Vector) -> Vector:
    """``arcsin z``, given ``rest = 1 - z²``."""
    a = abs(z)
    large = a >= 0.5
    square = f.where(large, 0.5 * rest / (1 + a), a * a)
    w = f.where(large, f.sqrt(square), a)
    arc = w + w * square * f.polynomial(square, ARCSINE[f.dtype.name][::-1])
    arc = f.where(large, math.pi / 2 - (arc + arc), arc)
    return f.where(z >= 0, arc, -arc)


def _erf(f: Function, k: Vector, theta: Vector, factors: Factors, branch: float) -> Kernels:
    """``(2/π) arcsin z`` with ``z = 2 k e e'``, and its derivative; the third factors are ``e = 1/√(1+2q)``."""
    a = abs(k * factors.product(f, 1))
    gap = _gap(f, a, branch)
    e1, e2 = factors(f, 2)
    both = e1 * e2
    z = 2 * (k * both)
    e1, e2 = e1 * e1, e2 * e2
    rest = e1 + (1 - e1) * (e2 + (1 - e2) * (gap * (1 + a)))
    return 2 / math.pi * _arcsine(f, z, rest), theta * (4 / math.pi * (both / f.sqrt(rest)))


def _gelu(f: Function, k: Vector, theta: Vector, factors: Factors, branch: float) -> Kernels:
    """The third factors are ``g = 1/√(1+q)``."""
    a = abs(k * factors.product(f, 1))
    gap = _gap(f, a, branch)
    g1, g2 = factors(f, 2)
    both = g1 * g2
    z = k * both
    g1, g2 = g1 * g1, g2 * g2
    sine_squared = gap * (1 + a)
    rest = g1 + (1 - g1) * (g2 + (1 - g2) * sine_squared)
    per_turn = 0.5 / math.pi
    probability = 0.25 + per_turn * _arcsine(f, z, rest)
    density = both / f.sqrt(rest)
    squares = g1 + g2
    variances = factors.product(f, 0)
    bracket = (density * variances) * (variances * sine_squared) + (density * k) * (squares * k)
    slope = probability + (per_turn * density) * (k * (squares + density * density))
    return k * probability + per_turn * bracket, theta * slope


def _wave(f: Function, k: Vector, theta: Vector, factors: Factors, branch: float, *, cosine: bool) -> Kernels:
    """``sin``, or ``cos``; the third factors are ``e^{-q/2}``."""
    c = k * factors.product(f, 1)
    a = abs(c)
    gap = _gap(f, a, branch)
    r1, r2 = factors(f, 0)
    product, apart = r1 * r2, r1 - r2
    apart = 0.5 * apart * apart
    larger, smaller = _exponential(f, -apart - product * gap), _exponential(f, -apart - product * (1 + a))
    even, odd = 0.5 * (larger + smaller), 0.5 * (larger - smaller)
    odd = f.where(c >= 0, odd, -odd)
    square = k * k
    series = f.horner(square, [1 / math.factorial(n) for n in range(1, SINH_DEGREE[f.dtype.name] + 1, 2)])
    odd = f.where(square < 1, k * series * factors.product(f, 2), odd)
    return (even, theta * odd) if cosine else (odd, theta * even)


def _exponential(f: Function, x: Vector) -> Vector:
    """``e^x`` for ``x <= 0``, and at least 1e-37 or 1e-300: ``x = n log 2 + r``, and the series of ``e^r``."""
    least, mantissa = (-85, 23) if f.dtype == np.float32 else (-690, 52)
    first, second = LOG_2[f.dtype.name]
    x = f.maximum(x, least)
    shifted = x * (1 / math.log(2)) + 1.5 * 2.0**mantissa
    n = shifted - 1.5 * 2.0**mantissa
    r = x - n * first
    r = r - n * second
    series = f.horner(r, [1 / math.factorial(m) for m in range(EXPONENTIAL_TERMS[f.dtype.name])])
    return series * f.power_of_two(shifted)


def _polynomial(f: Function, k: Vector, theta: Vector, factors: Factors, branch: float, *, odd: bool) -> Kernels:
    """An even or odd polynomial: four coefficients, of every second power of ``c``, the factors from the third on."""
    inverse = factors.product(f, 1)
    c = _clamped(f, k * inverse, branch)
    square = c * c
    nngp = factors.product(f, 5)
    slope = nngp
    for number in (4, 3):
        nngp = nngp * square + factors.product(f, number)
        slope = slope * square + nngp
    nngp = nngp * square + factors.product(f, 2)
    slope = slope + slope
    if odd:
        return c * nngp, theta * (inverse * (nngp + square * slope))
    return nngp, theta * (inverse * (c * slope))


def _series(f: Function, k: Vector, theta: Vector, factors: Factors, branch: float, terms: int) -> Kernels:
    """A Hermite series: ``Σ c^m x_m y_m`` and its derivative, by Horner's scheme; the factors from the third on."""
    inverse = factors.product(f, 1)
    c = _clamped(f, k * inverse, branch)
    nngp, slope = factors.product(f, 2 + terms - 1), f.vector(0)
    left = terms - 1

    def step(number: int | Index, nngp: Vector, slope: Vector) -> Kernels:
        return nngp * c + factors.product(f, number), slope * c + nngp

    for _ in range(left % TERMS_AT_ONCE):
        left -= 1
        nngp, slope = step(2 + left, nngp, slope)
    if left:
        sums = Variable(f, nngp), Variable(f, slope)
        with f.loop(left // TERMS_AT_ONCE) as block:
            nngp, slope = (variable.get() for variable in sums)
            for n in range(TERMS_AT_ONCE):
                nngp, slope = step(2 + left - 1 - n - block * TERMS_AT_ONCE, nngp, slope)
            for variable, value in zip(sums, (nngp, slope), strict=True):
                variable.set(value)
        nngp, slope = (variable.get() for variable in sums)
    return nngp, theta * (slope * inverse)
