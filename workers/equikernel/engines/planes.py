"""Plain CNN kernels by offset decoupling, compiled with Numba: the inner loops of the CPU engine.

A convolution moves ``t`` and ``t'`` by the same tap, so the offset ``δ = t' - t`` (modulo the image) never changes:
for each offset the whole network is a recursion on one ``H x W`` *plane*: box filter, activation, box filter, …, sum.
With SAME and VALID padding the plane of ``δ`` holds two true offsets per axis, ``δ`` and ``δ - H``; they meet at a
*seam* that no filter may cross. See ``docs/kernels.md``.

Layout. The planes of ``count`` neighbouring horizontal offsets lie side by side in one *long row*, so that the inner
loops are long and vectorise. Each plane row is stored with its two segments apart by ``radius`` zero entries (for
CIRCULAR padding: between halos of ``radius`` wrapped entries), so that horizontal sums need no seams at all. Stored
are rows after the horizontal half of the box filter; the vertical half, the activation and the next horizontal half
happen on one row at a time in ``line``, which stays in the L1 cache. The planes of the next layer overwrite those of
the last one, ``radius`` rows lower.

What keeps LLVM vectorising (a test inspects the machine code): flat arrays, unsigned indices, no slices inside, short
loops with few pointers, one array ``line`` for both K and Θ.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

U = np.uint64
ZERO, ONE = U(0), U(1)

SAME, VALID, CIRCULAR = range(3)
RELU, ERF = range(2)

NTK_LINE = U(16384 + 528)
"""Where Θ starts in ``line``; K starts at 0. Not a multiple of 4 KiB apart, which would stall loads behind stores."""

LINE = 2 * int(NTK_LINE)
"""Entries of the ``line`` scratch array."""

LANES = 32
"""Long rows are padded with zeros to a multiple of this: vectors of up to 16 entries, unrolled, leave no remainder."""

EXACT = {"nogil": True, "error_model": "numpy", "cache": True, "boundscheck": False, "fastmath": {"contract"}}
REORDERED = {**EXACT, "fastmath": {"contract", "reassoc", "nsz"}}


@njit(**EXACT)
def expand(packed, first, rows, width, radius, offsets, begin, count, circular, second, length, target):
    """Write image planes in the long-row layout.

    Args:
      packed, first: flat array and index of the first of ``rows`` image rows of ``width`` entries.
      offsets, begin, count: the horizontal offsets side by side, ``offsets[begin : begin + count]``.
      circular: halos of wrapped entries instead of zeros between segments.
      second: whether this is the second image, read at ``t + δ``, or the first, read at ``t``.
      target: flat array of ``rows`` long rows of ``length`` entries, zeros after the last offset.
    """
    for row in range(rows):
        start = first + U(row) * width
        write = U(row) * length
        for b in range(count):
            offset = offsets[begin + U(b)]
            shift = offset if second else ZERO
            if circular:
                read = (shift + width - radius) % width
                left = width + radius + radius
                while left > ZERO:
                    run = min(left, width - read)
                    for j in range(run):
                        target[write + U(j)] = packed[start + read + U(j)]
                    write += run
                    left -= run
                    read = ZERO
            else:
                run = width - offset
                for j in range(run):
                    target[write + U(j)] = packed[start + shift + U(j)]
                write += run
                for j in range(radius):
                    target[write + U(j)] = 0
                write += radius
                read = start if second else start + run
                for j in range(offset):
                    target[write + U(j)] = packed[read + U(j)]
                write += offset
                for j in range(radius):
                    target[write + U(j)] = 0
                write += radius
        for p in range(write, U(row) * length + length):
            target[U(p)] = 0


@njit(**EXACT)
def column_mask(width, radius, offsets, begin, count, circular, margin, value, mask):
    """``value`` where a long row holds entries further than ``margin`` from the ends of their segment, else 0."""
    mask[:] = 0
    write = ZERO
    for b in range(count):
        offset = offsets[begin + U(b)]
        if circular:
            for j in range(width + radius + radius):
                mask[write + U(j)] = value if radius <= U(j) < width + radius else 0
            write += width + radius + radius
        else:
            for length in (width - offset, offset):
                for j in range(length):
                    mask[write + U(j)] = value if margin <= U(j) and U(j) + margin < length else 0
                write += length + radius


@njit(**EXACT)
def input_line(x, x_row, y, y_row, channels, plane, length, radius, line):
    """``K⁰``, not yet divided by the number of channels, of one row into ``line``."""
    for p in range(length):
        line[radius + U(p)] = x[x_row + U(p)] * y[y_row + U(p)]
    for _ in range(ONE, channels):
        x_row += plane
        y_row += plane
        for p in range(length):
            line[radius + U(p)] += x[x_row + U(p)] * y[y_row + U(p)]


@njit(**EXACT)
def horizontal(line, start, length, radius, planes, row):
    """The horizontal half of the box filter: ``planes[row + p] = Σ_{|v| <= radius} line[start + radius + p + v]``."""
    if radius == ONE:
        for p in range(length):
            q = start + U(p)
            planes[row + U(p)] = line[q] + line[q + ONE] + line[q + U(2)]
        return
    for p in range(length):
        planes[row + U(p)] = line[start + U(p)]
    for v in range(ONE, radius + radius + ONE):
        q = start + U(v)
        for p in range(length):
            planes[row + U(p)] += line[q + U(p)]


@njit(**EXACT)
def vertical(planes, zeros, row, stride, below, above, length, radius, scale, bias, line, start, second):
    """The vertical half: ``line[start + p] = scale · Σ_v planes[row + v·stride + p] + bias``.

    ``below`` and ``above`` are how many rows lie on the same side of the seam before and after this one; the rows
    beyond are the row ``zeros``. The result is for K; for Θ (``second``) K's, ``NTK_LINE`` entries before, is added.
    """
    if radius == ONE:
        before = row - stride if below > ZERO else zeros
        after = row + stride if above > ZERO else zeros
        if second:
            knl = start - NTK_LINE
            for p in range(length):
                total = planes[before + U(p)] + planes[row + U(p)] + planes[after + U(p)]
                line[start + U(p)] = total * scale + line[knl + U(p)]
        else:
            for p in range(length):
                total = planes[before + U(p)] + planes[row + U(p)] + planes[after + U(p)]
                line[start + U(p)] = total * scale + bias
        return
    for p in range(length):
        line[start + U(p)] = planes[row + U(p)]
    for v in range(ONE, min(radius, below) + ONE):
        other = row - U(v) * stride
        for p in range(length):
            line[start + U(p)] += planes[other + U(p)]
    for v in range(ONE, min(radius, above) + ONE):
        other = row + U(v) * stride
        for p in range(length):
            line[start + U(p)] += planes[other + U(p)]
    if second:
        knl = start - NTK_LINE
        for p in range(length):
            line[start + U(p)] = line[start + U(p)] * scale + line[knl + U(p)]
    else:
        for p in range(length):
            line[start + U(p)] = line[start + U(p)] * scale + bias


@njit(**EXACT)
def copy(line, source, target, length):
    """``line[target + p] = line[source + p]``."""
    for p in range(length):
        line[target + U(p)] = line[source + U(p)]


@njit(**EXACT)
def relu_float32(line, start, length, x, x_root, x_inverse, y, y_root, y_inverse, mask, branch):
    """K and Θ of one row through ReLU: ``arccos a = √(1-a) P(a)`` to 3e-8, ``√(1-a²) = √(1-a) Q(a)`` to 3e-8."""
    one, zero, pi = np.float32(1), np.float32(0), np.float32(math.pi)
    for i in range(length):
        p = U(i)
        c = line[start + p] * (x[x_inverse + p] * y[y_inverse + p])
        a = abs(c)
        positive = c >= zero
        gap = one - a
        apart = gap >= branch
        c = c if apart else one  # for c = -1 the angle is zero anyway
        root = math.sqrt(gap if apart else zero)
        arc = np.float32(-0.001211737769810765)
        arc = arc * a + np.float32(0.006491521428436943)
        arc = arc * a + np.float32(-0.016841052415648962)
        arc = arc * a + np.float32(0.030722122418260587)
        arc = arc * a + np.float32(-0.050114303104553254)
        arc = arc * a + np.float32(0.08896885320062521)
        arc = arc * a + np.float32(-0.21459815556457223)
        arc = arc * a + np.float32(1.570796298215578)
        sine = np.float32(0.001350497625810776)
        sine = sine * a + np.float32(-0.007282173243122015)
        sine = sine * a + np.float32(0.019134855550510317)
        sine = sine * a + np.float32(-0.03583095964805238)
        sine = sine * a + np.float32(0.06175806488564121)
        sine = sine * a + np.float32(-0.12491270664306565)
        sine = sine * a + np.float32(0.4999959701462716)
        sine = sine * a + np.float32(1.0000000312900168)
        arc *= root
        angle = pi - arc if positive else arc
        scale = mask[p]
        line[start + p] = (x[x_root + p] * y[y_root + p]) * (scale * (root * sine + angle * c))
        line[NTK_LINE + start + p] *= scale * angle


@njit(**EXACT)
def relu_float64(line, start, length, x, x_root, x_inverse, y, y_root, y_inverse, mask, branch):
    """K and Θ of one row through ReLU, arccos from ``arcsin w = w + w³ R(w²)``, ``w <= 1/2``, to 2e-17."""
    for i in range(length):
        p = U(i)
        c = line[start + p] * (x[x_inverse + p] * y[y_inverse + p])
        a = abs(c)
        positive = c >= 0.0
        gap = 1.0 - a
        apart = gap >= branch
        c = c if apart else 1.0  # for c = -1 the angle is zero anyway
        gap = gap if apart else 0.0
        large = a > 0.5
        square = 0.5 * gap if large else a * a
        w = math.sqrt(square) if large else a
        arc = w + w * square * arcsine_series(square)
        angle = arc + arc if large else 0.5 * math.pi - arc
        angle = math.pi - angle if positive else angle
        scale = mask[p]
        line[start + p] = (x[x_root + p] * y[y_root + p]) * (scale * (math.sqrt(gap * (1.0 + a)) + angle * c))
        line[NTK_LINE + start + p] *= scale * angle


@njit(**EXACT)
def erf_row(line, start, length, x, x_scale, x_inverse, y, y_scale, y_inverse, mask, branch):
    """K and Θ of one row through erf; the mask holds ``2/π``, the scales ``e = 1/√(1+2q)``.

    ``1 - z² = e₁² + (1 - e₁²)(e₂² + (1 - e₂²)(1 - c²))`` has only positive terms.
    """
    one = mask.dtype.type(1)
    zero = mask.dtype.type(0)
    half = mask.dtype.type(0.5)
    right_angle = mask.dtype.type(0.5 * math.pi)
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
        scale = mask[p]
        line[start + p] = scale * (arc if z >= zero else -arc)
        line[NTK_LINE + start + p] *= (scale + scale) * (e1 * e2 / math.sqrt(rest))


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


def relu_row(line, start, length, x, x_root, x_inverse, y, y_root, y_inverse, mask, branch):
    """K and Θ of one row through ReLU, in the precision of ``line``."""
    raise NotImplementedError("compiled code only")


@overload(relu_row)
def _relu_row(line, start, length, x, x_root, x_inverse, y, y_root, y_inverse, mask, branch):
    chosen = relu_float32 if line.dtype == types.float32 else relu_float64

    def row(line, start, length, x, x_root, x_inverse, y, y_root, y_inverse, mask, branch):
        chosen(line, start, length, x, x_root, x_inverse, y, y_root, y_inverse, mask, branch)

    return row


@njit(**REORDERED)
def total(line, start, length):
    """The sum of one row, in the dtype of the row."""
    result = line[start] * 0
    for p in range(length):
        result += line[start + U(p)]
    return result


@njit(**EXACT)
def wrap_line(line, start, count, width, radius):
    """Fill the halos of one long row for CIRCULAR padding."""
    for b in range(count):
        first = start + U(b) * (width + radius + radius)
        for j in range(radius):
            line[first + U(j)] = line[first + width + U(j)]
            line[first + width + radius + U(j)] = line[first + radius + U(j)]


@njit(**EXACT)
def wrap_rows(planes, top, height, stride, radius):
    """Fill the halo rows above and below a plane whose first row starts at ``top``, for CIRCULAR padding."""
    for v in range(radius):
        for p in range(stride):
            planes[top - (U(v) + ONE) * stride + U(p)] = planes[top + (height - ONE - U(v)) * stride + U(p)]
            planes[top + (height + U(v)) * stride + U(p)] = planes[top + U(v) * stride + U(p)]


@njit(**EXACT)
def padded(length):
    """``length`` rounded up to whole :data:`LANES`."""
    return (length + U(LANES - 1)) // U(LANES) * U(LANES)


@njit(**EXACT)
def pooled_plane(
    x, y, offset_y, height, width, channels, depth, radius, padding, activation, count, length, w2, b2, mask, last_mask,
    branch, knl, ntk, zeros, line,
):  # fmt: skip
    """``(Σ K, Σ Θ)`` after the last activation over the plane rows of ``count`` horizontal offsets.

    Args:
      x, y: the two images in the long-row layout: ``channels`` planes of pixels, then per convolution ``√q`` (for erf
        ``1/√(1+2q)``) and ``1/√q`` of its preactivation variances ``q``.
      offset_y: the vertical offset.
      count, length: horizontal offsets side by side, and entries of a long row.
      branch: correlations with ``1 - |c| < branch`` are taken as ``±1``.
      mask, last_mask: the constant factor of the activation where an entry counts, 0 in gaps and where VALID padding
        has removed it; the second for the last layer.
      knl, ntk: scratch for the planes of K and Θ, see :func:`scratch_rows`; row ``zeros`` of each holds zeros.
      line: scratch for one row, :data:`LINE` entries, zeros around the used part.
    """
    plane = height * length
    circular = padding == CIRCULAR
    top = (radius * (depth + ONE)) * length  # row 0 of the first layer; each layer lies radius rows lower
    seam = height - offset_y
    taps = (radius + radius + ONE) * (radius + radius + ONE)
    scale = w2 / mask.dtype.type(taps)
    first_scale = w2 / mask.dtype.type(taps * channels)

    for i in range(height):
        other = U(i) + offset_y
        other = other - height if other >= height else other
        input_line(x, U(i) * length, y, other * length, channels, plane, length, radius, line)
        horizontal(line, ZERO, length, radius, knl, top + U(i) * length)
    if circular:
        wrap_rows(knl, top, height, length, radius)

    sum_k, sum_theta = 0.0, 0.0
    for layer in range(depth):
        last = U(layer) + ONE == depth
        lower = top - radius * length
        root = (channels + U(layer) + U(layer)) * plane
        inverse = root + plane
        spoilt = radius * (U(layer) + ONE) if padding == VALID else ZERO
        for i in range(height):
            row = U(i)
            other = row + offset_y
            if other < height:
                below, above = row, seam - ONE - row
            else:
                other -= height
                below, above = row - seam, height - ONE - row
            if circular:
                below, above = radius, radius
            elif below < spoilt or above < spoilt:
                continue
            here = top + row * length
            if layer == 0:
                vertical(knl, zeros, here, length, below, above, length, radius, first_scale, b2, line, radius, False)
                copy(line, radius, NTK_LINE + radius, length)
            else:
                vertical(knl, zeros, here, length, below, above, length, radius, scale, b2, line, radius, False)
                second = NTK_LINE + radius
                vertical(ntk, zeros, here, length, below, above, length, radius, scale, b2, line, second, True)
            x_row, y_row = row * length, other * length
            chosen = last_mask if last else mask
            x_root, x_inverse, y_root, y_inverse = root + x_row, inverse + x_row, root + y_row, inverse + y_row
            if activation == RELU:
                relu_row(line, radius, length, x, x_root, x_inverse, y, y_root, y_inverse, chosen, branch)
            else:
                erf_row(line, radius, length, x, x_root, x_inverse, y, y_root, y_inverse, chosen, branch)
            if last:
                sum_k += total(line, radius, length)
                sum_theta += total(line, NTK_LINE + radius, length)
            else:
                if circular:
                    wrap_line(line, radius, count, width, radius)
                    wrap_line(line, NTK_LINE + radius, count, width, radius)
                horizontal(line, ZERO, length, radius, knl, lower + row * length)
                horizontal(line, NTK_LINE, length, radius, ntk, lower + row * length)
        top = lower
        if circular and not last:
            wrap_rows(knl, top, height, length, radius)
            wrap_rows(ntk, top, height, length, radius)
    return sum_k, sum_theta


@njit(**EXACT)
def pooled_pairs(
    packed1, index, packed2, others, height, width, channels, depth, radius, padding, activation, offsets_y, offsets_x,
    block, margin, w2, b2, factor, branch, sums_k, sums_theta,
):  # fmt: skip
    """Sums over all pixel pairs of K and Θ of one image against several: ``sums_k``, ``sums_theta`` ``(len(others),)``.

    Args:
      packed1, packed2: flat arrays of images, each ``channels + 2 depth`` planes (see :func:`pooled_plane`).
      index, others: image of the first array; images of the second.
      offsets_y, offsets_x: the offsets with pixel pairs that survive the padding.
      block: horizontal offsets side by side.
      margin: pixels that VALID padding takes off each border in the end.
      factor: constant factor of the activation, 1/2π for ReLU, 2/π for erf.
      branch: correlations with ``1 - |c| < branch`` are taken as ``±1``.
    """
    circular = padding == CIRCULAR
    planes = channels + depth + depth
    longest = padded(block * (width + radius + radius))
    x = np.empty(planes * height * longest, packed1.dtype)
    y = np.empty(planes * height * longest, packed1.dtype)
    mask = np.empty(longest, packed1.dtype)
    last_mask = np.empty(longest, packed1.dtype)
    rows = height + radius * (depth + U(2)) + ONE
    knl = np.zeros(rows * longest, packed1.dtype)
    ntk = np.zeros(rows * longest, packed1.dtype)
    line = np.zeros(LINE, packed1.dtype)
    image = planes * height * width
    for j in range(len(others)):
        sums_k[j] = 0.0
        sums_theta[j] = 0.0
    for first in range(ZERO, U(len(offsets_x)), block):
        begin = U(first)
        count = min(block, U(len(offsets_x)) - begin)
        length = padded(count * (width + radius + radius))
        line[:] = 0
        zeros = (rows - ONE) * longest
        expand(
            packed1, index * image, planes * height, width, radius, offsets_x, begin, count, circular, False, length, x
        )
        column_mask(width, radius, offsets_x, begin, count, circular, ZERO, factor, mask)
        column_mask(width, radius, offsets_x, begin, count, circular, margin, factor, last_mask)
        for j in range(len(others)):
            expand(
                packed2, others[j] * image, planes * height, width, radius, offsets_x, begin, count, circular, True,
                length, y,
            )  # fmt: skip
            for offset_y in offsets_y:
                sum_k, sum_theta = pooled_plane(
                    x, y, offset_y, height, width, channels, depth, radius, padding, activation, count, length, w2,
                    b2, mask, last_mask, branch, knl, ntk, zeros, line,
                )  # fmt: skip
                sums_k[j] += sum_k
                sums_theta[j] += sum_theta
