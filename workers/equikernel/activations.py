"""Each activation σ once: its function, and its two dual kernels on NumPy or JAX arrays.

For ``(u, v) ~ N(0, [[q1, k], [k, q2]])`` the dual kernels are ``E[σ(u) σ(v)]``, the NNGP after the activation, and
``K̇ = E[σ'(u) σ'(v)]``, the factor that multiplies the NTK. They are computed in two steps, the same in every engine:
:meth:`Activation.factors` of the variance of each image alone, and :meth:`Activation.combine` of covariance and
factors for each pair. The engines that write their own code evaluate ``combine`` for each; this is their judge.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from equikernel.errors import NetworkError, is_whole, suggestion

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = Any
"""A NumPy or JAX array."""

EPS = float(np.finfo(np.float64).eps)

BRANCH_POINT = 4
"""A correlation with ``1 - |c| < BRANCH_POINT · eps`` is taken as ``±1``: there a rounding error ε becomes √ε in K̇."""

LARGEST_DEGREE = 6
"""The largest degree of ``hermite`` and ``monomial``."""


MOST_NODES = 100
"""Terms of the series of a custom activation at most."""

RATIO = 2.0
"""Ratio of the variances at which a custom activation is checked: its powers that are nearest to those of images."""

ROUNDING = 1e-12
"""Part of ``E[σ²]`` below which what a series lacks is a rounding error."""

STEP = 0.08
"""Distance, in standard deviations, of the points of the two grids with which Hermite coefficients are integrated."""

OFFSET = 0.5 - 1 / math.sqrt(12)
"""Where these grids begin, to both sides of 0, in steps: a zero of the Bernoulli polynomial ``t² - t + 1/6``, so that
the trapezoidal rule has no error of second order from a kink at 0."""

POINTS_AT_ONCE = 32
"""Points at which the function is evaluated at the same time."""

ROOTS_AT_ONCE = 64
"""Variances whose coefficients come from one matrix product: whole vectors, too few for several threads."""

POINTS = (2**14, 2**17, 2**21)
"""Points of finer and finer grids on which the second moments of a custom activation and its slope are integrated."""

WIDEST, INNER = 12.0, 8.0
"""Standard deviations to both sides that all grids span, and from within which second moments must come."""

SETTLED = 0.02
"""Largest relative difference between the second moments on two grids."""

JUMP = 1.5
"""Growth of ``E[σ'²]`` on a finer grid that a kink explains, and a jump of σ exceeds."""

MISSING_VALUE, MISSING_SLOPE = 0.01, 0.1
"""Largest parts of ``E[σ²]`` and of ``E[σ'²]`` that a Hermite series may lack, without a warning :data:`EXACT`."""

EXACT = 0.01
"""Part of ``E[σ'²]`` from which on a series that lacks it is worth a warning."""


class AccuracyWarning(UserWarning):
    """A kernel is computed by a series that converges slowly, and is less exact than others."""


class Activation:
    """An activation σ with its dual kernels; ``str()`` gives its name in job files.

    Attributes:
      flops: floating-point operations of the dual kernels of one entry, roughly.
      planes: how many :meth:`factors` there are.
    """

    flops: int
    planes: int

    def __call__(self, x: Array, xp: Any = np) -> Array:
        """``σ(x)``, entry by entry; ``xp`` is ``numpy`` or ``jax.numpy``."""
        raise NotImplementedError

    def factors(self, q: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """What the dual kernels need of each variance alone: ``√q``, ``1/√q`` (0 where ``q = 0``), and more."""
        root = np.sqrt(q)
        return root, np.divide(1, root, out=np.zeros_like(root), where=root > 0)

    def combine(
        self, k: Array, x: tuple[Array, ...], y: tuple[Array, ...], eps: Any, xp: Any = np
    ) -> tuple[Array, Array]:
        """``(E[σ(u)σ(v)], K̇)`` of covariances ``k``.

        Args:
          k: covariance, any shape.
          x, y: the :meth:`factors` of both variances, of shapes that broadcast with ``k``.
          eps: relative rounding error of ``k``: the machine epsilon of its precision, or more after cancellation.
          xp: ``numpy`` or ``jax.numpy``.
        """
        raise NotImplementedError

    def dual(
        self, k: NDArray[np.float64], q1: NDArray[np.float64], q2: NDArray[np.float64], eps: Any = EPS
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """``(E[σ(u)σ(v)], K̇)`` of covariances ``k`` and variances ``q1``, ``q2``, shapes that broadcast; float64."""
        nngp, derivative = self.combine(k, self.factors(q1), self.factors(q2), eps)
        return nngp, derivative

    def moment(self, q: NDArray[np.float64]) -> NDArray[np.float64]:
        """``E[σ(u)²]`` for ``u ~ N(0, q)``: the variances after the activation."""
        factors = self.factors(q)
        moment: NDArray[np.float64] = self.combine(q, factors, factors, EPS)[0]
        return moment


def correlation(k: Array, root1: Array, root2: Array, eps: Any, xp: Any = np) -> Array:
    """``c = k / √(q1 q2)`` in ``[-1, 1]``, exactly ``±1`` near the branch point, and 0 where ``q1 q2 = 0``.

    Args:
      k, root1, root2: covariance, and square roots of the variances, any shapes that broadcast.
      eps: relative rounding error of ``k``.
      xp: ``numpy`` or ``jax.numpy``.
    """
    scale = root1 * root2
    c = xp.where(scale > 0, k / xp.where(scale > 0, scale, 1), 0)
    return xp.where(1 - abs(c) < BRANCH_POINT * eps, xp.sign(c), c)


@dataclass(frozen=True)
class Homogeneous(Activation):
    """``σ(u) = α u + β |u|``: ReLU, its leaky forms, the absolute value and the identity (Cho and Saul 2009).

    ``E[σσ] = α² k + β² √(q1 q2) (2/π) (√(1-c²) + c arcsin c)`` and ``K̇ = α² + β² (2/π) arcsin c``.
    """

    name: str
    alpha: float
    beta: float
    planes = 2

    @property
    def flops(self) -> int:  # type: ignore[override]
        """Two polynomials and a square root; nothing for the identity."""
        return 40 if self.beta else 0

    def __str__(self) -> str:
        return self.name

    def __call__(self, x: Array, xp: Any = np) -> Array:
        """``α x + β |x|``."""
        if self.name == "relu":
            return xp.maximum(x, 0)
        return self.alpha * x + self.beta * abs(x) if self.beta else x

    def combine(
        self, k: Array, x: tuple[Array, ...], y: tuple[Array, ...], eps: Any, xp: Any = np
    ) -> tuple[Array, Array]:
        """``E[σσ]`` and ``K̇``, in the form of one arc cosine, which keeps a ReLU exactly 0 at ``c = -1``."""
        if not self.beta:
            return k, xp.ones_like(k)
        c = correlation(k, x[0], y[0], eps, xp)
        factor, shift = self.arc_cosine
        angle = math.pi - xp.arccos(c) + shift
        nngp = factor * x[0] * y[0] * (xp.sqrt((1 - c) * (1 + c)) + angle * c)
        return nngp, factor * angle

    @property
    def has_one_sign(self) -> bool:
        """Whether ``σ`` is nowhere negative, or nowhere positive."""
        return abs(self.beta) >= abs(self.alpha)

    @property
    def arc_cosine(self) -> tuple[float, float]:
        """``(f, s)`` with ``K̇ = f (π - arccos c + s)`` and ``E[σσ] = f √(q1 q2) (√(1-c²) + c (π - arccos c + s))``."""
        factor = 2 * self.beta**2 / math.pi
        return factor, 0.0 if self.alpha == self.beta else self.alpha**2 / factor - math.pi / 2

    @property
    def arcsine(self) -> tuple[float, float]:
        """``(s, m)`` with ``K̇ = s A`` and ``E[σσ] = s √(q1 q2) (√(1-c²)/π + c A)``, where ``A = m + arcsin(c)/π``."""
        return 2 * self.beta**2, 0.5 + self.arc_cosine[1] / math.pi


@dataclass(frozen=True)
class Erf(Activation):
    """``σ(u) = erf u`` (Williams 1997).

    With ``z = 2k / √((1+2q1)(1+2q2))``: ``E[σσ] = (2/π) arcsin z`` and
    ``K̇ = (4/π) / √((1+2q1)(1+2q2) - 4k²)``. For large variances ``z`` comes close to 1; ``1 - z²`` is then summed from
    positive terms, with ``1 - c²`` of the correlation ``c``, instead of being a difference of large numbers.
    """

    flops = 45
    planes = 3

    def __str__(self) -> str:
        return "erf"

    def __call__(self, x: Array, xp: Any = np) -> Array:
        """``erf x``."""
        return _erf(x, xp)

    def factors(self, q: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """``√q``, ``1/√q`` and ``1/√(1+2q)``."""
        return *super().factors(q), 1 / np.sqrt(1 + 2 * q)

    def combine(
        self, k: Array, x: tuple[Array, ...], y: tuple[Array, ...], eps: Any, xp: Any = np
    ) -> tuple[Array, Array]:
        """``E[σσ]`` and ``K̇``."""
        rest = _one_minus_square(correlation(k, x[0], y[0], eps, xp), x[2], y[2])
        both = x[2] * y[2]
        return 2 / math.pi * xp.arctan2(2 * k * both, xp.sqrt(rest)), 4 / math.pi * both / xp.sqrt(rest)


@dataclass(frozen=True)
class Gelu(Activation):
    """``σ(u) = u Φ(u)``, Φ the normal distribution function (Hendrycks and Gimpel 2016).

    With ``g = 1/√(1+q)``, ``z = k g1 g2``, ``P = E[ΦΦ] = 1/4 + arcsin(z)/2π`` and
    ``R = E[Φ'Φ'] = g1 g2 / (2π √(1-z²))``, integration by parts gives
    ``E[σσ] = k P + R (q1 q2 (1 - c²) + (g1² + g2²) k²)``, and ``K̇ = ∂E[σσ]/∂k`` (Price 1958) is
    ``P + k R (g1² + g2² + g1² g2² / (1-z²))``: nothing cancels for large variances.
    """

    flops = 65
    planes = 3

    def __str__(self) -> str:
        return "gelu"

    def __call__(self, x: Array, xp: Any = np) -> Array:
        """``x Φ(x)``."""
        return x * (1 + _erf(x / math.sqrt(2), xp)) / 2

    def factors(self, q: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """``√q``, ``1/√q`` and ``1/√(1+q)``."""
        return *super().factors(q), 1 / np.sqrt(1 + q)

    def combine(
        self, k: Array, x: tuple[Array, ...], y: tuple[Array, ...], eps: Any, xp: Any = np
    ) -> tuple[Array, Array]:
        """``E[σσ]`` and ``K̇``."""
        c = correlation(k, x[0], y[0], eps, xp)
        rest = _one_minus_square(c, x[2], y[2])
        both = x[2] * y[2]
        p = 0.25 + xp.arctan2(k * both, xp.sqrt(rest)) / (2 * math.pi)
        r = both / (2 * math.pi * xp.sqrt(rest))
        squares, variances = x[2] ** 2 + y[2] ** 2, x[0] * y[0]
        nngp = k * p + (r * variances) * (variances * ((1 - c) * (1 + c))) + (r * k) * (squares * k)
        return nngp, p + (k * r) * (squares + both**2 / rest)


@dataclass(frozen=True)
class Wave(Activation):
    """``σ(u) = sin u`` or ``cos u``.

    ``E[sin sin] = e^{-(q1+q2)/2} sinh k`` and ``E[cos cos] = e^{-(q1+q2)/2} cosh k``; each is the other's ``K̇``. The
    exponents ``±k - (q1+q2)/2 = -(√q1 - √q2)²/2 - √(q1 q2) (1 ∓ c)`` have only negative terms.
    """

    name: str
    flops = 70
    planes = 3

    def __str__(self) -> str:
        return self.name

    def __call__(self, x: Array, xp: Any = np) -> Array:
        """``sin x`` or ``cos x``."""
        return xp.sin(x) if self.name == "sin" else xp.cos(x)

    def factors(self, q: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """``√q``, ``1/√q`` and ``e^{-q/2}``."""
        return *super().factors(q), np.exp(-q / 2)

    def combine(
        self, k: Array, x: tuple[Array, ...], y: tuple[Array, ...], eps: Any, xp: Any = np
    ) -> tuple[Array, Array]:
        """``E[σσ]`` and ``K̇``."""
        c = correlation(k, x[0], y[0], eps, xp)
        both, apart = x[0] * y[0], (x[0] - y[0]) ** 2 / 2
        near, far = xp.exp(-apart - both * (1 - c)), xp.exp(-apart - both * (1 + c))
        even = (near + far) / 2
        small = abs(k) < 1  # there the difference of the exponentials would cancel
        odd = xp.where(small, xp.sinh(xp.where(small, k, 0)) * x[2] * y[2], (near - far) / 2)
        return (odd, even) if self.name == "sin" else (even, odd)


@dataclass(frozen=True)
class Polynomial(Activation):
    """``monomial(n)``, ``u^n``, or ``hermite(n)``, the normalised probabilists' polynomial ``He_n(u) / √n!``.

    With the coefficients ``b_m(q) = E[σ(√q z) h_m(z)]``, ``z ~ N(0, 1)``, of the normalised Hermite polynomials
    ``h_m``: ``E[σσ] = Σ_m c^m b_m(q1) b_m(q2)`` and ``K̇ = ∂E[σσ]/∂k``. Only every second one is not zero.
    """

    name: str
    degree: int
    flops = 35
    planes = 6

    def __str__(self) -> str:
        return f"{self.name}({self.degree})"

    def __call__(self, x: Array, xp: Any = np) -> Array:
        """The polynomial at ``x``."""
        if self.name == "monomial":
            return x**self.degree
        before, here = xp.ones_like(x), x
        for m in range(1, self.degree):
            before, here = here, (x * here - math.sqrt(m) * before) / math.sqrt(m + 1)
        return here

    def factors(self, q: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """``√q``, ``1/√q`` and the coefficients ``b_0, b_2, b_4, b_6`` or ``b_1, b_3, b_5, b_7``."""
        root, inverse = super().factors(q)
        return (
            root,
            inverse,
            *hermite_coefficients(self, root, LARGEST_DEGREE + 2)[0][self.degree % 2 :: 2],
        )

    def combine(
        self, k: Array, x: tuple[Array, ...], y: tuple[Array, ...], eps: Any, xp: Any = np
    ) -> tuple[Array, Array]:
        """``E[σσ]`` and ``K̇``, by Horner's scheme in ``c²``."""
        c = correlation(k, x[0], y[0], eps, xp)
        square = c * c
        nngp = derivative = xp.zeros_like(c)
        for b1, b2 in zip(reversed(x[2:]), reversed(y[2:]), strict=True):
            derivative = derivative * square + nngp
            nngp = nngp * square + b1 * b2
        inverse = x[1] * y[1]
        if self.degree % 2:
            return c * nngp, inverse * (nngp + 2 * square * derivative)
        return nngp, inverse * (2 * c * derivative)


@dataclass(frozen=True)
class Custom(Activation):
    """A user's own activation, by a Hermite series whose coefficients are integrated numerically.

    >>> GroupCNN(activation=Custom(jnp.tanh))

    With the coefficients ``b_m(q) = E[σ(√q z) h_m(z)]``, ``z ~ N(0, 1)``, of the normalised Hermite polynomials
    ``h_m``: ``E[σσ] = Σ_m c^m b_m(q1) b_m(q2)`` and ``K̇ = ∂E[σσ]/∂k`` (Price 1958). What the terms of higher order
    lack in ``E[σ²]`` goes to the last even and the last odd one, so that an image with itself has ``E[σ²]`` exactly;
    elsewhere the error is less than what was lacking. The kernel is positive semi-definite exactly.

    Args:
      function: ``σ``, on arrays entry by entry. Kernels call it on float64 arrays, finite networks on JAX arrays, so
        it is best written with ``jax.numpy``.
      nodes: terms of the Hermite series. A kernel costs in proportion to them. The error falls exponentially with their
        number for smooth functions of moderate variance; that of K̇ only as their power -1/2 where σ has a kink.

    Warns:
      AccuracyWarning: (from kernels) the terms lack more than a hundredth of ``E[σ'²]``.
    """

    function: Callable[[Any], Any]
    nodes: int = 32
    _checked: set[int] = field(default_factory=set, init=False, repr=False, compare=False)
    """The powers of :data:`RATIO` that were checked, as variances."""

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise NetworkError(f"Custom needs a function of one array; {self.function!r} is none")
        if not (is_whole(self.nodes) and 2 <= self.nodes <= MOST_NODES):
            raise NetworkError(f"Custom: {self.nodes!r} nodes; use a whole number from 2 to {MOST_NODES}")

    def __str__(self) -> str:
        return f"custom {getattr(self.function, '__name__', repr(self.function))}"

    @property
    def flops(self) -> int:  # type: ignore[override]
        """Two steps of Horner's scheme per term."""
        return 8 + 5 * self.nodes

    @property
    def planes(self) -> int:  # type: ignore[override]
        """Two, and a coefficient per term."""
        return 2 + self.nodes

    def __call__(self, x: Array, xp: Any = np) -> Array:
        """``σ(x)``.

        Raises:
          NetworkError: the function fails.
        """
        try:
            if xp is not np:
                return self.function(x)
            if "jax" not in sys.modules:
                return np.asarray(self.function(x))
            import jax

            with jax.enable_x64(True):
                return np.asarray(self.function(x))
        except Exception as error:
            reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
            remedy = "" if xp is np else "; finite networks need a function written with jax.numpy"
            raise NetworkError(f"{self}: the function fails with {reason}{remedy}") from error

    def factors(self, q: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """``√q``, ``1/√q`` and the coefficients of the series.

        Raises:
          NetworkError: ``E[σ(u)²]`` or ``E[σ'(u)²]`` is not finite, or the series lacks much of it; or ``σ`` does not
            act entry by entry.
        """
        if not self._checked:
            self._check_form()
        powers = np.unique(np.rint(np.log(q[q > 0]) / math.log(RATIO))).astype(int).tolist()
        lacking = {}
        for power in [power for power in reversed(powers) if power not in self._checked]:
            lacking[power] = self._check(RATIO**power)
            self._checked.add(power)
        worst = max(lacking, key=lambda power: lacking[power], default=0)
        if lacking.get(worst, 0.0) > EXACT:
            warnings.warn(
                f"{self}: a series of {self.nodes} terms lacks {lacking[worst]:.1%} of E[σ'(u)²] for u ~ N(0, "
                f"{RATIO**worst:.3g}), because σ has a kink or is steep, and so much may K̇ be wrong at c = ±1; more "
                "nodes lack less, named activations nothing",
                AccuracyWarning,
                stacklevel=2,
            )
        root, inverse = super().factors(q)
        return root, inverse, *self._series(root)

    def _series(self, root: NDArray[np.float64]) -> NDArray[np.float64]:
        """The coefficients, of which the last two hold what those of higher order lack: ``(nodes, ...)``."""
        coefficients, square = hermite_coefficients(self, root, self.nodes)
        lacking = square - sum(coefficients**2)  # one after the other: np.sum's order depends on the shape
        lacking = np.where(lacking > ROUNDING * square, lacking, 0)
        # Shared as the last terms are, so that an odd or even function stays one.
        last = coefficients[-2:]
        size = sum(last**2)
        share = np.divide(last**2, size, out=np.full_like(last, 0.5), where=size > 0)
        coefficients[-2:] = np.copysign(np.sqrt(last**2 + share * lacking), last)
        return coefficients

    def combine(
        self, k: Array, x: tuple[Array, ...], y: tuple[Array, ...], eps: Any, xp: Any = np
    ) -> tuple[Array, Array]:
        """``E[σσ]`` and ``K̇``, by Horner's scheme."""
        c = correlation(k, x[0], y[0], eps, xp)
        nngp = derivative = xp.zeros_like(c)
        for b1, b2 in zip(reversed(x[2:]), reversed(y[2:]), strict=True):
            derivative = derivative * c + nngp
            nngp = nngp * c + b1 * b2
        return nngp, derivative * (x[1] * y[1])

    def _check_form(self) -> None:
        """Refuse a function that does not act entry by entry."""
        probe = np.linspace(-1, 1, 6).reshape(2, 3)
        values = self(probe)
        if np.shape(values) != probe.shape or np.asarray(values).dtype.kind != "f":
            raise NetworkError(
                f"{self}: on a float array of shape {probe.shape} the function returns shape {np.shape(values)} and "
                f"dtype {np.asarray(values).dtype}; it must act on arrays entry by entry and return real numbers"
            )
        first = self(probe[:, :1])
        if not np.allclose(values[:, :1], first, rtol=1e-3, atol=1e-6, equal_nan=True):
            raise NetworkError(
                f"{self}: of the columns {probe.round(1).T.tolist()} the function makes "
                f"{np.round(values, 3).T.tolist()}, and of the first one alone {np.round(first, 3).T.tolist()}; it "
                "must act on arrays entry by entry"
            )

    def _check(self, q: float) -> float:
        """Which part of ``E[σ'²]`` the series lacks at variance ``q``.

        Raises:
          NetworkError: the function has no second moments there, or the series lacks much of them.
        """
        where = f"u ~ N(0, {q:.3g})"
        remedy = "use a function that is defined everywhere and grows more slowly, or smaller variances (w_std, images)"
        with np.errstate(all="ignore"):
            moments = [self._moments(q, points) for points in POINTS[:2]]
            if not self._agree(moments):
                moments.append(self._moments(q, POINTS[2]))
            few, many = moments[-2:]
            if not self._agree([few, many]):
                raise NetworkError(
                    f"{self}: E[σ(u)²] is not finite for {where}: integrated on finer grids it is {few.square:.6g}, "
                    f"then {many.square:.6g}; {remedy}"
                )
            if not many.square - many.inner <= SETTLED * many.square:
                raise NetworkError(
                    f"{self}: E[σ(u)²] is not finite for {where}, or comes from where u is beyond {INNER:g} standard "
                    f"deviations: {many.inner:.6g} within, {many.square:.6g} within {WIDEST:g}; {remedy}"
                )
            slope = many.slope
            if slope > JUMP * few.slope + many.rounding:
                slope = self._moments(q, POINTS[2]).slope
                if slope > JUMP * many.slope:
                    raise NetworkError(
                        f"{self}: E[σ'(u)²] is not finite for {where}: by differences over smaller and smaller steps "
                        f"it is {many.slope:.6g}, then {slope:.6g}, so the NTK has no limit; use a continuous "
                        "function, or a less steep one"
                    )
            coefficients, square = (part[..., 0] for part in hermite_coefficients(self, np.sqrt([q]), MOST_NODES))
        resolved = abs(float(square) - many.square) <= MISSING_VALUE * many.square

        def lacks(terms: int) -> tuple[float, float]:
            """The parts of ``E[σ²]`` and of ``E[σ'²]`` that so many terms lack; rounding errors are none."""
            held = coefficients[:terms] ** 2
            value = 1 - float(np.sum(held)) / many.square if many.square else 0.0
            steep = q * slope - float(np.sum(np.arange(len(held)) * held))
            return abs(value), max(abs(steep) - q * many.rounding, 0.0) / (q * slope) if q * slope else 0.0

        def enough(terms: int) -> bool:
            value, steep = lacks(terms)
            return resolved and value <= MISSING_VALUE and steep <= MISSING_SLOPE

        value, steep = lacks(self.nodes)
        if not enough(self.nodes):
            more = next((f"nodes={terms}, " for terms in range(self.nodes + 1, MOST_NODES + 1) if enough(terms)), "")
            raise NetworkError(
                f"{self}: a series of {self.nodes} terms lacks {value:.1%} of E[σ(u)²] and {steep:.1%} of E[σ'(u)²] "
                f"for {where}; use {more}other variances (w_std, images), or a named activation"
            )
        return steep

    @staticmethod
    def _agree(moments: list[_Moments]) -> bool:
        few, many = moments
        return bool(np.isfinite([few, many]).all() and abs(many.square - few.square) <= SETTLED * many.square)

    def _moments(self, q: float, points: int) -> _Moments:
        """The second moments at variance ``q``, integrated over the points of a grid."""
        step = 2 * WIDEST / points
        square = inner = slope = 0.0
        for start in range(0, points, POINTS[0]):
            # 0 is no point, because σ may jump or be infinite there; the last one is the first of the next slice.
            z = (np.arange(start, start + POINTS[0] + 1) - points / 2 + 0.37) * step
            values = np.asarray(self(math.sqrt(q) * z))
            shares = np.exp(-(z[:-1] ** 2) / 2) * values[:-1] ** 2
            square += float(np.sum(shares))
            inner += float(np.sum(shares[abs(z[:-1]) < INNER]))
            slope += float(np.sum(np.exp(-((z[1:] + z[:-1]) ** 2) / 8) * np.diff(values) ** 2))
        weight = step / math.sqrt(2 * math.pi)
        square, inner = weight * square, weight * inner
        if q == 0:
            return _Moments(square, inner, 0.0, 0.0)
        return _Moments(square, inner, weight * slope / (step**2 * q), 100 * EPS**2 * square / (step**2 * q))


class _Moments(NamedTuple):
    """``E[σ(u)²]``, its part from within :data:`INNER`, and ``E[σ'(u)²]`` by differences, with its rounding error."""

    square: float
    inner: float
    slope: float
    rounding: float


def hermite_coefficients(
    function: Activation, root: NDArray[np.float64], count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``b_m = E[σ(√q z) h_m(z)]`` for ``m < count``, ``(count, ...)``, and ``E[σ²]``, of any ``√q``.

    What is rounding error alone, as every second one of an odd σ, is 0: products of it would be denormal in float32,
    with which some processors take a hundred times as long. Matrix products are of one size, whatever the number of
    ``√q``: their bits would depend on it.
    """
    z, basis, weights = quadrature(count)
    products = max(1, -(-root.size // ROOTS_AT_ONCE))
    flat = np.resize(root, products * ROOTS_AT_ONCE)
    coefficients, square = np.zeros((products, count, ROOTS_AT_ONCE)), np.zeros((products, 1, ROOTS_AT_ONCE))
    for start in range(0, len(z), POINTS_AT_ONCE):
        here = slice(start, start + POINTS_AT_ONCE)
        values = function(z[here, None] * flat).reshape(-1, products, ROOTS_AT_ONCE).swapaxes(0, 1)
        coefficients += basis[here].T @ values
        square += weights[None, here] @ values**2
    coefficients[abs(coefficients) < 10 * EPS * np.sqrt(square)] = 0

    def of_roots(values: NDArray[np.float64]) -> NDArray[np.float64]:
        rows = values.shape[1]
        return values.swapaxes(0, 1).reshape(rows, -1)[:, : root.size].reshape(rows, *root.shape)

    return of_roots(coefficients), of_roots(square)[0]


@cache
def quadrature(terms: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Points ``z_i`` with the weights ``w_i`` of N(0, 1), and ``w_i h_m(z_i)``, ``(points, terms)``.

    The trapezoidal rule, on two grids that mirror each other: for smooth functions its error falls exponentially with
    the step, as that of Gauss-Hermite quadrature does with the nodes, and with a kink it is far smaller.
    """
    side = (np.arange(int(WIDEST / STEP)) + np.array([[OFFSET], [1 - OFFSET]])).T.reshape(-1) * STEP
    z = np.stack([-side, side], axis=-1).reshape(-1)
    weights = np.exp(-(z**2) / 2) * (STEP / 2 / math.sqrt(2 * math.pi))
    basis = np.empty((len(z), terms))
    root = np.sqrt(weights)
    before, here = np.zeros(len(z)), root.copy()
    for m in range(terms):
        basis[:, m] = root * here
        before, here = here, (z * here - math.sqrt(m) * before) / math.sqrt(m + 1)
    return z, basis, weights


def _one_minus_square(c: Array, e1: Array, e2: Array) -> Array:
    """``1 - z²`` of ``z = c √((1-e1²)(1-e2²))``, summed from positive terms."""
    return e1**2 + (1 - e1**2) * (e2**2 + (1 - e2**2) * (1 - c) * (1 + c))


def _erf(x: Array, xp: Any) -> Array:
    if xp is np:
        from scipy.special import erf

        return erf(x)
    import jax

    return jax.lax.erf(x)


RELU, IDENTITY = Homogeneous("relu", 0.5, 0.5), Homogeneous("identity", 1.0, 0.0)

NAMED: dict[str, Activation] = {
    "relu": RELU,
    "abs": Homogeneous("abs", 0.0, 1.0),
    "erf": Erf(),
    "gelu": Gelu(),
    "sin": Wave("sin"),
    "cos": Wave("cos"),
    "identity": IDENTITY,
}
"""The activations without arguments."""

CHOICES = "relu, leaky_relu(a), abs, erf, gelu, sin, cos, identity, monomial(n) or hermite(n)"


def parse(text: str) -> Activation:
    """The activation called ``text``: a name, or a name with one argument, ``leaky_relu(0.1)``, ``hermite(3)``.

    Raises:
      ValueError: there is none, with what is allowed.
    """
    if text in NAMED:
        return NAMED[text]
    match = re.fullmatch(r"\s*(\w+)\s*\(\s*([^()\s]*)\s*\)\s*", text)
    if match is None or match[1] not in ("leaky_relu", "monomial", "hermite"):
        hint = suggestion(text, [*NAMED, "leaky_relu(a)", "monomial(n)", "hermite(n)"])
        raise ValueError(f"{text!r} is not allowed; choose {CHOICES}{hint}")
    name, argument = match.groups()
    if name == "leaky_relu":
        try:
            slope = float(argument)
        except ValueError:
            slope = math.nan
        if not -1e6 <= slope <= 1e6:
            raise ValueError(f"{text!r} is not allowed; the slope below zero is a number, as in leaky_relu(0.1)")
        return Homogeneous(f"leaky_relu({slope!r})", (1 + slope) / 2, (1 - slope) / 2) if slope else RELU
    if not re.fullmatch(r"[1-9]\d?", argument) or int(argument) > LARGEST_DEGREE:
        raise ValueError(
            f"{text!r} is not allowed; the degree is a whole number from 1 to {LARGEST_DEGREE}, as in {name}(3)"
        )
    return Polynomial(name, int(argument))
