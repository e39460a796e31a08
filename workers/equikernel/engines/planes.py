"""Plain CNN kernels by offset decoupling, compiled with Numba: the inner loops of the CPU engine.

A convolution moves ``t`` and ``t'`` by the same tap, so the offset ``δ = t' - t`` (modulo the image) never changes:
for each offset the whole network is a recursion on one ``H x W`` *plane*: box filter, activation, box filter, …, sum.
With SAME and VALID padding the plane of ``δ`` holds two true offsets per axis, ``δ`` and ``δ - H``; they meet at a
*seam* that no filter may cross. See ``docs/kernels.md``.

Layout. The planes of ``count`` neighbouring horizontal offsets lie side by side in one *long row*, so that the inner
loops are long and vectorise. Each plane row is stored with its two segments apart by ``radius`` zero entries (for
CIRCULAR padding: between halos of ``radius`` wrapped entries), so that horizontal sums need no seams at all. Stored
are rows after the horizontal half of the box filter; the vertical half, the activation and the next horizontal half
happen on one row at a time in ``line``, which stays in the L1 cache. The most frequent vertical half, of
radius 1 and before an arc cosine, shares a loop with the correlations. The planes of the next layer overwrite those of
the last one, ``radius`` rows lower.

What keeps LLVM vectorising (a test inspects the machine code): flat arrays, unsigned indices, no slices inside, short
loops with few pointers, one array ``line`` for both K and Θ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from equikernel.engines.rows import (
    EXACT,
    NTK_LINE,
    U,
    arc_cosine_row,
    convolved_correlation_row,
    correlation_row,
    erf_row,
    gelu_row,
    identity_row,
    polynomial_row,
    series_row,
    wave_row,
)

ZERO, ONE = U(0), U(1)

SAME, VALID, CIRCULAR = range(3)
IDENTITY, ARC_COSINE, ERF, GELU, SIN, COS, EVEN, ODD, SERIES, SAVE, ADD = map(U, range(11))

LINE = 2 * int(NTK_LINE)
"""Entries of the ``line`` scratch array."""

LANES = 32
"""Long rows are padded with zeros to a multiple of this: vectors of up to 16 entries, unrolled, leave no remainder."""

ALIGNED, CACHE_LINE = 16, 64
"""Entries and bytes that rows are aligned to."""

REORDERED = {**EXACT, "fastmath": {"contract", "reassoc", "nsz"}}


@njit(**EXACT)
def expand_first(packed, first, rows, width, radius, offsets, begin, count, circular, length, target):
    """Write planes of the first image, which is read at ``t``, in the long-row layout.

    Args:
      packed, first: flat array and index of the first of ``rows`` image rows of ``width`` entries.
      offsets, begin, count: the horizontal offsets side by side, ``offsets[begin : begin + count]``.
      circular: halos of wrapped entries instead of zeros between segments.
      target: flat array of ``rows`` long rows of ``length`` entries, zeros after the last offset.
    """
    for row in range(rows):
        start = first + U(row) * width
        write = U(row) * length
        for b in range(count):
            if circular:
                read = (width - radius % width) % width
                for _ in range(width + radius + radius):
                    target[write] = packed[start + read]
                    write += ONE
                    read = read + ONE if read + ONE < width else ZERO
            else:
                run = width - offsets[begin + U(b)]
                for j in range(width):
                    gap = radius if U(j) >= run else ZERO
                    target[write + U(j) + gap] = packed[start + U(j)]
                for j in range(radius):
                    target[write + run + U(j)] = 0
                    target[write + width + radius + U(j)] = 0
                write += width + radius + radius
        for p in range(write, U(row) * length + length):
            target[U(p)] = 0


@njit(**EXACT)
def expand_second(packed, first, rows, width, radius, offsets, begin, count, circular, length, twice, target):
    """The same for the second image, read at ``t + δ``.

    Between its segments, where the first image has zeros, stand any of its entries, so that each offset is one copy
    from ``twice``: room for two copies of a row, each with a gap.
    """
    whole = width + radius + radius
    for row in range(rows):
        start = first + U(row) * width
        if circular:
            read = (width - radius % width) % width
            for j in range(width + whole):
                twice[U(j)] = packed[start + read]
                read = read + ONE if read + ONE < width else ZERO
        else:
            for j in range(width):
                twice[U(j)] = packed[start + U(j)]
                twice[U(j) + width + radius] = packed[start + U(j)]
            for j in range(radius):
                twice[width + U(j)] = 0
                twice[width + width + radius + U(j)] = 0
        write = U(row) * length
        for b in range(count):
            offset = offsets[begin + U(b)]
            for j in range(whole):
                target[write + U(j)] = twice[offset + U(j)]
            write += whole


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
    """The horizontal half of the box filter: ``planes[row + p] = Σ_{|v| <= radius} line[start + p + v]``."""
    if radius == ZERO:
        for p in range(length):
            planes[row + U(p)] = line[start + U(p)]
        return
    for p in range(length):
        q = start + U(p)
        planes[row + U(p)] = line[q - ONE] + line[q] + line[q + ONE]
    for v in range(U(2), radius + ONE):
        before, after = start - U(v), start + U(v)
        for p in range(length):
            planes[row + U(p)] += line[before + U(p)] + line[after + U(p)]


@njit(**EXACT)
def vertical(planes, zeros, row, stride, below, above, length, radius, scale, rest, bias, line, start, second):
    """The vertical half: ``line[start + p] = (scale + rest) · Σ_v planes[row + v·stride + p] + bias``.

    ``below`` and ``above`` are how many rows lie on the same side of the seam before and after this one; the rows
    beyond are the row ``zeros``. The result is for K; for Θ (``second``) K's, ``NTK_LINE`` entries before, is added,
    and ``rest`` is left out.
    """
    knl = start - NTK_LINE
    before = row - stride if below > ZERO and radius > ZERO else zeros
    after = row + stride if above > ZERO and radius > ZERO else zeros
    if radius <= ONE and second:
        for p in range(length):
            total = planes[before + U(p)] + planes[row + U(p)] + planes[after + U(p)]
            line[start + U(p)] = total * scale + line[knl + U(p)]
        return
    if radius <= ONE:
        for p in range(length):
            total = planes[before + U(p)] + planes[row + U(p)] + planes[after + U(p)]
            line[start + U(p)] = total * scale + (total * rest + bias)
        return
    for p in range(length):
        line[start + U(p)] = planes[before + U(p)] + planes[row + U(p)] + planes[after + U(p)]
    for v in range(U(2), radius + ONE):
        before = row - U(v) * stride if below >= U(v) else zeros
        after = row + U(v) * stride if above >= U(v) else zeros
        for p in range(length):
            line[start + U(p)] += planes[before + U(p)] + planes[after + U(p)]
    if second:
        for p in range(length):
            line[start + U(p)] = line[start + U(p)] * scale + line[knl + U(p)]
    else:
        for p in range(length):
            line[start + U(p)] = line[start + U(p)] * scale + (line[start + U(p)] * rest + bias)


@njit(**EXACT)
def copy(line, source, target, length):
    """``line[target + p] = line[source + p]``."""
    for p in range(length):
        line[target + U(p)] = line[source + U(p)]


@njit(**EXACT)
def save_row(line, start, length, saved, row):
    """``saved[row + p] = line[start + p]``."""
    for p in range(length):
        saved[row + U(p)] = line[start + U(p)]


@njit(**EXACT)
def add_row(line, start, length, saved, row):
    """``line[start + p] += saved[row + p]``."""
    for p in range(length):
        line[start + U(p)] += saved[row + U(p)]


@njit(**REORDERED)
def total(line, start, length):
    """The sum of one row, in float64."""
    result = 0.0
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
def aligned_start(gap):
    """Where a row begins in ``line``, after ``gap`` zeros or more, so that its vectors do not straddle cache lines."""
    return (gap + U(ALIGNED - 1)) // U(ALIGNED) * U(ALIGNED)


@njit(**EXACT)
def aligned(count, dtype):
    """Room for ``count`` entries that begins at a cache line."""
    array = np.empty(count + U(CACHE_LINE), dtype)
    skipped = U(-array.ctypes.data % CACHE_LINE) // U(array.itemsize)
    return array[skipped : skipped + count]


class Program(NamedTuple):
    """A network as flat arrays: its convolutions in turn, and for each the operations on a row that follow it.

    Attributes:
      radius_y, radius_x: of each convolution, ``(convolutions,)`` uint64.
      scale, rest, bias: ``w² / taps``, what its rounding cut off, and ``b²`` of each convolution. Without the rest,
        each layer would move ``c`` by the same error in the same direction.
      end: where the operations of each convolution end in the arrays that follow, ``(convolutions,)`` uint64.
      kind: :data:`IDENTITY` … :data:`ADD` of each operation, ``(operations,)`` uint64. After a convolution comes an
        activation, if only the identity, which clears the gaps; and at the end, to clear what VALID padding removes.
      place: plane of the first factor of an activation; slot of a :data:`SAVE` or :data:`ADD`, which are the beginning
        and the end of a residual branch.
      terms: of a :data:`SERIES`.
      middle: of an :data:`ARC_COSINE`, see :func:`equikernel.engines.rows.arc_cosine_row`.
      factor: constant factor of an activation.
      slots: arrays that :data:`SAVE` needs.
      planes: channels and factors of an image.
      shift, halo: sum of ``radius_y``, the rows by which planes are moved in the end, and the largest of them.
    """

    radius_y: Any
    radius_x: Any
    scale: Any
    rest: Any
    bias: Any
    end: Any
    kind: Any
    place: Any
    terms: Any
    middle: Any
    factor: Any
    slots: Any
    planes: Any
    shift: Any
    halo: Any


class Scratch(NamedTuple):
    """Working memory of one thread.

    Attributes:
      knl, ntk: planes of K and Θ after the horizontal half of a filter, with room for the shift of each layer; the last
        row of each holds zeros.
      saved: planes of K and Θ at the beginning of residual branches.
      line: one row of K and Θ, :data:`LINE` entries, zeros around the used part.
      correlation, nngp, slope: one row each, for a series.
      masks: one row per operation, its factor where an entry counts; in the last, where VALID padding leaves one.
    """

    knl: Any
    ntk: Any
    saved: Any
    line: Any
    correlation: Any
    nngp: Any
    slope: Any
    masks: Any


@njit(**EXACT, inline="always")
def activate(
    kind, terms, middle, line, start, length, x, x_first, y, y_first, plane, masks, here, branch,
    correlation, nngp, slope,
):  # fmt: skip
    """K and Θ of one row through the activation ``kind``; see :mod:`equikernel.engines.rows`."""
    if kind == ARC_COSINE:
        correlation_row(line, start, length, x, x_first + plane, y, y_first + plane, branch)
        arc_cosine_row(line, start, length, x, x_first, y, y_first, masks, here, middle)
    elif kind == ERF:
        erf_row(line, start, length, x, x_first, y, y_first, plane, masks, here, branch)
    elif kind == GELU:
        gelu_row(line, start, length, x, x_first, y, y_first, plane, masks, here, branch)
    elif kind == SIN or kind == COS:  # noqa: SIM109
        wave_row(line, start, length, x, x_first, y, y_first, plane, masks, here, branch, kind == COS)
    elif kind == EVEN or kind == ODD:  # noqa: SIM109
        polynomial_row(line, start, length, x, x_first, y, y_first, plane, masks, here, branch, kind == ODD)
    elif kind == SERIES:
        series_row(
            line, start, length, x, x_first, y, y_first, plane, masks, here, branch, terms, correlation, nngp, slope
        )
    else:
        identity_row(line, start, length, masks, here)


@njit(**EXACT)
def pooled_plane(
    program, scratch, x, y, offset_y, height, width, channels, gap, padding, count, length, longest, branch
):  # fmt: skip
    """``(Σ K, Σ Θ)`` after the last layer over the plane rows of ``count`` horizontal offsets.

    Args:
      program, scratch: the network, and working memory.
      x, y: the two images in the long-row layout: planes of pixels, then of factors.
      offset_y: the vertical offset.
      gap: entries between segments: the largest horizontal radius.
      count, length: horizontal offsets side by side, and entries of a long row.
      longest: entries between the rows of ``masks``.
      branch: correlations with ``1 - |c| < branch`` are taken as ``±1``.
    """
    # Taken out of the tuples once: each access counts references, which a row would feel.
    knl, ntk, saved, line, correlation, nngp, slope, masks = scratch
    radius_y, radius_x, scales, rests, biases, ends, kinds, places, terms, middle, _, _, _, shift, _ = program
    start = aligned_start(gap)
    nothing = scales.dtype.type(0)
    layers = U(len(ends))
    zeros = U(len(knl)) - length
    plane = height * length
    circular = padding == CIRCULAR
    seam = height - offset_y
    top = shift * length  # row 0 of the first layer; each further layer lies lower by a vertical radius

    for i in range(height):
        other = U(i) + offset_y
        other = other - height if other >= height else other
        input_line(x, U(i) * length, y, other * length, channels, plane, length, start, line)
        horizontal(line, start, length, radius_x[ZERO], knl, top + U(i) * length)
    if circular:
        wrap_rows(knl, top, height, length, radius_y[ZERO])

    sum_k, sum_theta = 0.0, 0.0
    spoilt = ZERO
    begin = ZERO
    for index in range(layers):
        layer = U(index)
        last = layer + ONE == layers
        end = ends[layer]
        radius = radius_y[layer]
        lower = top - radius * length
        next_radius = ZERO if last else radius_x[layer + ONE]
        scale, rest, bias = scales[layer], rests[layer], biases[layer]
        if padding == VALID:
            spoilt += radius
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
            following = begin
            if radius == ONE and kinds[begin] == ARC_COSINE:
                before = here - length if below > ZERO else zeros
                after = here + length if above > ZERO else zeros
                x_first, y_first = places[begin] * plane + row * length, places[begin] * plane + other * length
                convolved_correlation_row(
                    knl, knl if layer == ZERO else ntk, here, before, after, scale, rest,
                    nothing if layer == ZERO else scale, bias, line, start, length, x, x_first + plane, y,
                    y_first + plane, branch,
                )  # fmt: skip
                arc_cosine_row(
                    line, start, length, x, x_first, y, y_first, masks, begin * longest, middle[begin]
                )  # fmt: skip
                following += ONE
            else:
                vertical(knl, zeros, here, length, below, above, length, radius, scale, rest, bias, line, start, False)
                if layer == ZERO:
                    copy(line, start, NTK_LINE + start, length)
                else:
                    theta = NTK_LINE + start
                    vertical(
                        ntk, zeros, here, length, below, above, length, radius, scale, rest, bias, line, theta, True
                    )
            for operation in range(following, end):
                o = U(operation)
                kind = kinds[o]
                if kind >= SAVE:
                    slot = (places[o] * U(2) * height + row) * length
                    if kind == SAVE:
                        save_row(line, start, length, saved, slot)
                        save_row(line, NTK_LINE + start, length, saved, slot + plane)
                    else:
                        add_row(line, start, length, saved, slot)
                        add_row(line, NTK_LINE + start, length, saved, slot + plane)
                else:
                    first = places[o] * plane
                    activate(
                        kind, terms[o], middle[o], line, start, length, x, first + row * length,
                        y, first + other * length, plane, masks, o * longest, branch, correlation, nngp, slope,
                    )  # fmt: skip
            if last:
                sum_k += total(line, start, length)
                sum_theta += total(line, NTK_LINE + start, length)
            else:
                if circular:
                    wrap_line(line, start, count, width, gap)
                    wrap_line(line, NTK_LINE + start, count, width, gap)
                horizontal(line, start, length, next_radius, knl, lower + row * length)
                horizontal(line, NTK_LINE + start, length, next_radius, ntk, lower + row * length)
        begin = end
        top = lower
        if circular and not last:
            wrap_rows(knl, top, height, length, radius_y[layer + ONE])
            wrap_rows(ntk, top, height, length, radius_y[layer + ONE])
    return sum_k, sum_theta


@njit(**EXACT)
def pooled_pairs(
    program, packed1, index, packed2, others, height, width, channels, gap, padding, offsets_y, offsets_x, block,
    margin, branch, stop, sums_k, sums_theta,
):  # fmt: skip
    """Sums over all pixel pairs of K and Θ of one image against several: ``sums_k``, ``sums_theta`` ``(len(others),)``.

    Args:
      program: the network.
      packed1, packed2: flat arrays of images, each ``program.planes`` planes (see :func:`pooled_plane`).
      index, others: image of the first array; images of the second.
      gap: entries between segments.
      offsets_y, offsets_x: the offsets with pixel pairs that survive the padding.
      block: horizontal offsets side by side.
      margin: pixels that VALID padding takes off the left and right border in the end.
      branch: correlations with ``1 - |c| < branch`` are taken as ``±1``.
      stop: ``(1,)`` bool; when another thread sets it, the sums are left unfinished after one plane.
    """
    if len(others) == 0:
        return
    circular = padding == CIRCULAR
    dtype = packed1.dtype
    image = program.planes * height * width
    longest = padded(block * (width + gap + gap))
    x = aligned(program.planes * height * longest, dtype)
    y = aligned(program.planes * height * longest, dtype)
    rows = height + program.shift + program.halo + ONE  # the last one holds zeros
    operations = U(len(program.kind))
    scratch = Scratch(
        aligned(rows * longest, dtype), aligned(rows * longest, dtype),
        aligned(U(2) * program.slots * height * longest, dtype), aligned(U(LINE), dtype),
        aligned(longest, dtype), aligned(longest, dtype), aligned(longest, dtype), aligned(operations * longest, dtype),
    )  # fmt: skip
    twice = aligned(U(2) * (width + gap), dtype)
    scratch.knl[:] = 0
    scratch.ntk[:] = 0
    y[:] = 0
    for j in range(len(others)):
        sums_k[j] = 0.0
        sums_theta[j] = 0.0
    for first in range(ZERO, U(len(offsets_x)), block):
        begin = U(first)
        count = min(block, U(len(offsets_x)) - begin)
        length = padded(count * (width + gap + gap))
        scratch.line[:] = 0
        expand_first(
            packed1, index * image, program.planes * height, width, gap, offsets_x, begin, count, circular, length, x
        )  # fmt: skip
        for operation in range(operations):
            mask = scratch.masks[U(operation) * longest : (U(operation) + ONE) * longest]
            border = margin if U(operation) + ONE == operations else ZERO
            column_mask(width, gap, offsets_x, begin, count, circular, border, program.factor[U(operation)], mask)
        for j in range(len(others)):
            expand_second(
                packed2, others[j] * image, program.planes * height, width, gap, offsets_x, begin, count, circular,
                length, twice, y,
            )  # fmt: skip
            for offset_y in offsets_y:
                if stop[0]:
                    return
                sum_k, sum_theta = pooled_plane(
                    program, scratch, x, y, offset_y, height, width, channels, gap, padding, count, length, longest,
                    branch,
                )  # fmt: skip
                sums_k[j] += sum_k
                sums_theta[j] += sum_theta
