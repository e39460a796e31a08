"""The dual kernels of the activations on one row of K and Θ, compiled with Numba to packed instructions.

A row of an activation is :meth:`equikernel.activations.Activation.combine` entry by entry, with polynomials in place of
the functions that do not vectorise; the rest are its parts. The rows take

    line, start, length: the row of K begins at ``line[start]``, that of Θ ``NTK_LINE`` entries later; both are updated.
    x, x_first, y, y_first, plane: flat arrays; the row of the first factor of each image begins at ``x[x_first]`` and
        ``y[y_first]``, those of the others (:meth:`Activation.factors`) ``plane`` entries apart.
    mask, here: the constant factor of the activation where an entry counts, 0 in gaps, from ``mask[here]`` on.
    branch: correlations with ``1 - |c| < branch`` are taken as ``±1``.

What keeps LLVM vectorising (a test inspects the machine code): flat arrays, unsigned indices, no slices inside, short
loops with few pointers, one array ``line`` for both K and Θ.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, types
from numba.extending import intrinsic, overload

U = np.uint64

NTK_LINE = U(16384 + 528)
"""Where Θ starts in ``line``; K starts at 0. Not a multiple of 4 KiB apart, which would stall loads behind stores."""

EXACT = {"nogil": True, "error_model": "numpy", "cache": True, "boundscheck": False, "fastmath": {"contract"}}


@njit(**EXACT)
def identity_row(line, start, length, mask, here):
    """K and Θ where an entry counts, 0 in gaps."""
    for i in range(length):
        line[start + U(i)] *= mask[here + U(i)]
    for i in range(length):
        line[NTK_LINE + start + U(i)] *= mask[here + U(i)]


@njit(**EXACT)
def arc_cosine_float32(c, middle):
    """``(√(1-c²)/π + c A, A)`` with ``A = middle + arcsin(c)/π``, for ``|c| <= 1``.

    With ``a = |c|`` and ``u = √(1+a)/π``: ``arccos(a)/π = √(1-a) P(u)``, to 2e-9. Divided by π because then ``A`` is
    exactly 1 for a ReLU at ``c = 1``: a rounding error there would grow with every layer. ``P`` is summed in two
    halves, so that fewer operations wait for one another.
    """
    one, half, per_turn = np.float32(1), np.float32(0.5), np.float32(1 / math.pi**2)
    a = abs(c)
    square = a * per_turn + per_turn
    u = math.sqrt(square)
    odd = np.float32(-0.4329620134510771)
    odd = odd * square + np.float32(-1.6179905884407964)
    odd = odd * square + np.float32(-0.9539313136819774)
    even = np.float32(1.228232042651189)
    even = even * square + np.float32(1.3827923071018757)
    even = even * square + np.float32(0.7045281017157408)
    root = math.sqrt(one - a)
    angle = middle + math.copysign(half - root * (odd * u + even), c)
    return root * u + angle * c, angle


@njit(**EXACT)
def arc_cosine_float64(c, middle):
    """As in float32, with arccos from ``arcsin w = w + w³ R(w²)``, ``w <= 1/2``, to 2e-17."""
    per_turn = 1 / math.pi
    a = abs(c)
    gap = 1.0 - a
    large = a > 0.5
    square = 0.5 * gap if large else a * a
    w = math.sqrt(square) if large else a
    w *= per_turn
    arc = w + w * square * arcsine_series(square)
    arcsine = 0.5 - (arc + arc) if large else arc
    angle = middle + math.copysign(arcsine, c)
    return per_turn * math.sqrt(gap * (1.0 + a)) + angle * c, angle


def arc_cosine(c, middle):
    """``(√(1-c²)/π + c A, A)`` in the precision of ``c``."""
    raise NotImplementedError("compiled code only")


@overload(arc_cosine)
def _arc_cosine(c, middle):
    if c == types.float32:
        return lambda c, middle: arc_cosine_float32(c, middle)
    return lambda c, middle: arc_cosine_float64(c, middle)


@njit(**EXACT)
def clamped(c, branch):
    """``c``, or ``±1`` near it and beyond."""
    one = type(branch)(1)
    a = abs(c)
    return math.copysign(a if one - a >= branch else one, c)


@njit(**EXACT)
def correlation_row(line, start, length, x, x_inverse, y, y_inverse, branch):
    """The correlations ``c`` in place of K."""
    for i in range(length):
        p = U(i)
        line[start + p] = clamped(line[start + p] * (x[x_inverse + p] * y[y_inverse + p]), branch)


@njit(**EXACT)
def convolved_correlation_row(
    knl, ntk, row, before, after, weight, rest, ntk_weight, bias, line, start, length, x, x_inverse, y, y_inverse,
    branch,
):  # fmt: skip
    """The vertical half of a box filter of radius 1, then :func:`correlation_row`: one loop instead of three.

    Args:
      knl, ntk: planes of K and Θ; their rows begin at ``before``, ``row`` and ``after``.
      weight, rest, ntk_weight, bias: ``K = (weight + rest) · Σ knl + bias``, ``Θ = K + ntk_weight · Σ ntk``.
    """
    for i in range(length):
        p = U(i)
        total = knl[before + p] + knl[row + p] + knl[after + p]
        k = total * weight + (total * rest + bias)
        line[start + p] = clamped(k * (x[x_inverse + p] * y[y_inverse + p]), branch)
        line[NTK_LINE + start + p] = (ntk[before + p] + ntk[row + p] + ntk[after + p]) * ntk_weight + k


@njit(**EXACT)
def arc_cosine_row(line, start, length, x, x_first, y, y_first, mask, here, middle):
    """K and Θ of one row through ``α u + β |u|``, from the correlations in place of K; the mask holds ``2β²``.

    A loop of its own, without the correlations: a processor looks ahead a fixed number of instructions, and overlaps
    more entries where each takes fewer.
    """
    for i in range(length):
        p = U(i)
        nngp, angle = arc_cosine(line[start + p], middle)
        scale = mask[here + p]
        line[start + p] = (x[x_first + p] * y[y_first + p]) * (scale * nngp)
        line[NTK_LINE + start + p] *= scale * angle


@njit(**EXACT)
def erf_row(line, start, length, x, x_first, y, y_first, plane, mask, here, branch):
    """K and Θ of one row through erf; the mask holds ``2/π``, the third factors are ``e = 1/√(1+2q)``."""
    one = mask.dtype.type(1)
    zero = mask.dtype.type(0)
    half = mask.dtype.type(0.5)
    right_angle = mask.dtype.type(0.5 * math.pi)
    x_inverse, y_inverse = x_first + plane, y_first + plane
    x_scale, y_scale = x_inverse + plane, y_inverse + plane
    for i in range(length):
        p = U(i)
        k = line[start + p]
        a = abs(k * (x[x_inverse + p] * y[y_inverse + p]))
        gap = one - a
        gap = gap if gap >= branch else zero
        e1, e2 = x[x_scale + p], y[y_scale + p]
        z = k * (e1 * e2)
        z += z
        e1_squared, e2_squared = e1 * e1, e2 * e2
        rest = e1_squared + (one - e1_squared) * (e2_squared + (one - e2_squared) * (gap * (one + a)))
        a = abs(z)
        large = a > half
        square = half * rest / (one + a) if large else a * a
        w = math.sqrt(square) if large else a
        arc = w + w * square * arcsine_series(square)
        arc = right_angle - (arc + arc) if large else arc
        scale = mask[here + p]
        line[start + p] = scale * (arc if z >= zero else -arc)
        line[NTK_LINE + start + p] *= (scale + scale) * (e1 * e2 / math.sqrt(rest))


@njit(**EXACT)
def gelu_row(line, start, length, x, x_first, y, y_first, plane, mask, here, branch):
    """K and Θ of one row through GELU, whose third factors are ``g = 1/√(1+q)``."""
    one = mask.dtype.type(1)
    zero = mask.dtype.type(0)
    half = mask.dtype.type(0.5)
    quarter = mask.dtype.type(0.25)
    right_angle = mask.dtype.type(0.5 * math.pi)
    per_turn = mask.dtype.type(0.5 / math.pi)
    x_inverse, y_inverse = x_first + plane, y_first + plane
    x_scale, y_scale = x_inverse + plane, y_inverse + plane
    for i in range(length):
        p = U(i)
        k = line[start + p]
        c = k * (x[x_inverse + p] * y[y_inverse + p])
        a = abs(c)
        gap = one - a
        gap = gap if gap >= branch else zero
        g1, g2 = x[x_scale + p], y[y_scale + p]
        both = g1 * g2
        z = k * both
        g1_squared, g2_squared = g1 * g1, g2 * g2
        sine_squared = gap * (one + a)
        rest = g1_squared + (one - g1_squared) * (g2_squared + (one - g2_squared) * sine_squared)
        a = abs(z)
        large = a > half
        square = half * rest / (one + a) if large else a * a
        w = math.sqrt(square) if large else a
        arc = w + w * square * arcsine_series(square)
        arc = right_angle - (arc + arc) if large else arc
        probability = quarter + per_turn * (arc if z >= zero else -arc)
        density = both / math.sqrt(rest)
        squares = g1_squared + g2_squared
        variances = x[x_first + p] * y[y_first + p]
        bracket = (density * variances) * (variances * sine_squared) + (density * k) * (squares * k)
        scale = mask[here + p]
        line[start + p] = scale * (k * probability + per_turn * bracket)
        line[NTK_LINE + start + p] *= scale * (probability + (per_turn * density) * (k * (squares + density * density)))


@njit(**EXACT)
def wave_row(line, start, length, x, x_first, y, y_first, plane, mask, here, branch, cosine):
    """K and Θ of one row through sin, or cos if ``cosine``; the third factors are ``e^{-q/2}``."""
    one = mask.dtype.type(1)
    zero = mask.dtype.type(0)
    half = mask.dtype.type(0.5)
    x_inverse, y_inverse = x_first + plane, y_first + plane
    x_decay, y_decay = x_inverse + plane, y_inverse + plane
    for i in range(length):
        p = U(i)
        k = line[start + p]
        c = k * (x[x_inverse + p] * y[y_inverse + p])
        a = abs(c)
        gap = one - a
        gap = gap if gap >= branch else zero
        r1, r2 = x[x_first + p], y[y_first + p]
        product, apart = r1 * r2, r1 - r2
        apart = half * apart * apart
        larger, smaller = exponential(-apart - product * gap), exponential(-apart - product * (one + a))
        even = half * (larger + smaller)
        odd = half * (larger - smaller)
        odd = odd if c >= zero else -odd
        square = k * k
        series = k * sinh_series(square) * (x[x_decay + p] * y[y_decay + p])
        odd = series if square < one else odd
        scale = mask[here + p]
        line[start + p] = scale * (even if cosine else odd)
        line[NTK_LINE + start + p] *= scale * (odd if cosine else even)


@njit(**EXACT)
def polynomial_row(line, start, length, x, x_first, y, y_first, plane, mask, here, branch, odd):
    """K and Θ of one row through an even or ``odd`` polynomial: four coefficients, of every second power of ``c``."""
    x_inverse, y_inverse = x_first + plane, y_first + plane
    x0, y0 = x_inverse + plane, y_inverse + plane
    x1, y1 = x0 + plane, y0 + plane
    x2, y2 = x1 + plane, y1 + plane
    x3, y3 = x2 + plane, y2 + plane
    for i in range(length):
        p = U(i)
        inverse = x[x_inverse + p] * y[y_inverse + p]
        c = clamped(line[start + p] * inverse, branch)
        square = c * c
        slope = nngp = x[x3 + p] * y[y3 + p]
        nngp = nngp * square + x[x2 + p] * y[y2 + p]
        slope = slope * square + nngp
        nngp = nngp * square + x[x1 + p] * y[y1 + p]
        slope = slope * square + nngp
        nngp = nngp * square + x[x0 + p] * y[y0 + p]
        slope += slope
        scale = mask[here + p]
        line[start + p] = scale * (c * nngp if odd else nngp)
        line[NTK_LINE + start + p] *= (scale * inverse) * (nngp + square * slope if odd else c * slope)


@njit(**EXACT)
def series_row(
    line, start, length, x, x_first, y, y_first, plane, mask, here, branch, terms, correlation, nngp, slope
):  # fmt: skip
    """K and Θ of one row through a Hermite series of ``terms`` terms, the factors from the third on.

    ``correlation``, ``nngp`` and ``slope`` are scratch rows: ``c``, and the sums of Horner's scheme for K and K̇.
    """
    zero = mask.dtype.type(0)
    x_inverse, y_inverse = x_first + plane, y_first + plane
    x_term, y_term = x_inverse + plane * terms, y_inverse + plane * terms
    for i in range(length):
        p = U(i)
        correlation[p] = clamped(line[start + p] * (x[x_inverse + p] * y[y_inverse + p]), branch)
        nngp[p] = x[x_term + p] * y[y_term + p]
        slope[p] = zero
    left = terms - U(1)
    while left % U(4) > U(0):
        x_term -= plane
        y_term -= plane
        series_step(length, x, x_term, y, y_term, correlation, nngp, slope)
        left -= U(1)
    while left > U(0):
        series_steps(length, x, x_term, y, y_term, plane, correlation, nngp, slope)
        x_term -= U(4) * plane
        y_term -= U(4) * plane
        left -= U(4)
    for i in range(length):
        p = U(i)
        scale = mask[here + p]
        line[start + p] = scale * nngp[p]
        line[NTK_LINE + start + p] *= scale * (slope[p] * (x[x_inverse + p] * y[y_inverse + p]))


@njit(**EXACT)
def series_step(length, x, x_term, y, y_term, correlation, nngp, slope):
    """One step of Horner's scheme for a row of K and K̇."""
    for i in range(length):
        p = U(i)
        c, sum_k = correlation[p], nngp[p]
        slope[p] = slope[p] * c + sum_k
        nngp[p] = sum_k * c + x[x_term + p] * y[y_term + p]


@njit(**EXACT)
def series_steps(length, x, x_term, y, y_term, plane, correlation, nngp, slope):
    """Four steps of Horner's scheme, with the terms before ``x_term`` and ``y_term``."""
    x1, y1 = x_term - plane, y_term - plane
    x2, y2 = x1 - plane, y1 - plane
    x3, y3 = x2 - plane, y2 - plane
    x4, y4 = x3 - plane, y3 - plane
    for i in range(length):
        p = U(i)
        c, k, k_dot = correlation[p], nngp[p], slope[p]
        k_dot = k_dot * c + k
        k = k * c + x[x1 + p] * y[y1 + p]
        k_dot = k_dot * c + k
        k = k * c + x[x2 + p] * y[y2 + p]
        k_dot = k_dot * c + k
        k = k * c + x[x3 + p] * y[y3 + p]
        slope[p] = k_dot * c + k
        nngp[p] = k * c + x[x4 + p] * y[y4 + p]


@njit(**EXACT)
def arcsine_float32(x):
    """``R(x)`` with ``arcsin w = w + w³ R(w²)`` for ``w² <= 1/4``, to 4e-9."""
    r = np.float32(0.03369084720283012)
    r = r * x + np.float32(0.017149238357677253)
    r = r * x + np.float32(0.03110066273549457)
    r = r * x + np.float32(0.04459940152851218)
    r = r * x + np.float32(0.07500094543497424)
    return r * x + np.float32(0.16666666337430908)


@njit(**EXACT)
def arcsine_float64(x):
    """``R(x)`` with ``arcsin w = w + w³ R(w²)`` for ``w² <= 1/4``, to 2e-17."""
    r = 0.028757851367421566
    r = r * x - 0.014851887071247204
    r = r * x + 0.01740087944269402
    r = r * x + 0.005457506718640358
    r = r * x + 0.01032281435018578
    r = r * x + 0.011479177415184906
    r = r * x + 0.013971212973552933
    r = r * x + 0.017352392720869973
    r = r * x + 0.02237217294214989
    r = r * x + 0.030381944138531247
    r = r * x + 0.04464285714635543
    r = r * x + 0.07499999999998433
    return r * x + 0.16666666666666669


def arcsine_series(x):
    """The series of the precision of ``x``."""
    raise NotImplementedError("compiled code only")


@overload(arcsine_series)
def _arcsine_series(x):
    if x == types.float32:
        return lambda x: arcsine_float32(x)
    return lambda x: arcsine_float64(x)


@intrinsic
def power_of_two(typing_context, shifted):
    """``2^n`` of a float ``1.5 · 2^m + n`` with ``m`` bits of mantissa, of which ``n`` are the last."""
    bits, mantissa, bias = (32, 23, 127) if shifted == types.float32 else (64, 52, 1023)

    def generate(context, builder, signature, arguments):
        from llvmlite import ir

        integer = ir.IntType(bits)
        value = builder.bitcast(arguments[0], integer)
        value = builder.shl(value, ir.Constant(integer, mantissa))
        value = builder.add(value, ir.Constant(integer, bias << mantissa))
        return builder.bitcast(value, context.get_value_type(signature.return_type))

    return shifted(shifted), generate


@njit(**EXACT)
def exponential_float32(x):
    """``e^x`` for ``x <= 0``, to 1e-7, and at least 1e-37: ``x = n log 2 + r``, and the series of ``e^r``."""
    x = max(x, np.float32(-85))
    shifted = x * np.float32(1 / math.log(2)) + np.float32(1.5 * 2**23)
    n = shifted - np.float32(1.5 * 2**23)
    r = x - n * np.float32(0.693145751953125)
    r = r - n * np.float32(1.42860682030941723212e-06)
    s = np.float32(1 / 5040)
    s = s * r + np.float32(1 / 720)
    s = s * r + np.float32(1 / 120)
    s = s * r + np.float32(1 / 24)
    s = s * r + np.float32(1 / 6)
    s = s * r + np.float32(0.5)
    s = s * r + np.float32(1)
    s = s * r + np.float32(1)
    return s * power_of_two(shifted)


@njit(**EXACT)
def exponential_float64(x):
    """``e^x`` for ``x <= 0``, to 2e-16, and at least 1e-300: ``x = n log 2 + r``, and the series of ``e^r``."""
    x = max(x, -690.0)
    shifted = x * (1 / math.log(2)) + 1.5 * 2.0**52
    n = shifted - 1.5 * 2.0**52
    r = x - n * 0.6931471803691238
    r = r - n * 1.9082149292705877e-10
    s = 1 / 6227020800
    s = s * r + 1 / 479001600
    s = s * r + 1 / 39916800
    s = s * r + 1 / 3628800
    s = s * r + 1 / 362880
    s = s * r + 1 / 40320
    s = s * r + 1 / 5040
    s = s * r + 1 / 720
    s = s * r + 1 / 120
    s = s * r + 1 / 24
    s = s * r + 1 / 6
    s = s * r + 0.5
    s = s * r + 1
    s = s * r + 1
    return s * power_of_two(shifted)


@njit(**EXACT)
def sinh_float32(square):
    """``sinh k / k`` for ``k² <= 1``, to 1e-8."""
    s = np.float32(1 / 362880)
    s = s * square + np.float32(1 / 5040)
    s = s * square + np.float32(1 / 120)
    s = s * square + np.float32(1 / 6)
    return s * square + np.float32(1)


@njit(**EXACT)
def sinh_float64(square):
    """``sinh k / k`` for ``k² <= 1``, to 2e-17."""
    s = 1 / 121645100408832000
    s = s * square + 1 / 355687428096000
    s = s * square + 1 / 1307674368000
    s = s * square + 1 / 6227020800
    s = s * square + 1 / 39916800
    s = s * square + 1 / 362880
    s = s * square + 1 / 5040
    s = s * square + 1 / 120
    s = s * square + 1 / 6
    return s * square + 1


def exponential(x):
    """``e^x`` for ``x <= 0``, in the precision of ``x``."""
    raise NotImplementedError("compiled code only")


def sinh_series(square):
    """``sinh k / k`` of ``k² <= 1``, in the precision of ``k²``."""
    raise NotImplementedError("compiled code only")


@overload(exponential)
def _exponential(x):
    if x == types.float32:
        return lambda x: exponential_float32(x)
    return lambda x: exponential_float64(x)


@overload(sinh_series)
def _sinh_series(square):
    if square == types.float32:
        return lambda square: sinh_float32(square)
    return lambda square: sinh_float64(square)
