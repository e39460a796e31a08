"""The inner loops: that they are compiled to packed instructions, and their polynomials are as exact as they say."""

from __future__ import annotations

import math
import platform
import re

import numpy as np
import pytest
from numba import njit, types

from equikernel import GroupCNN, ImageError
from equikernel.engines import planes
from equikernel.engines.cpu import LONGEST_ROW, offsets_per_block

FLAT = types.Array(types.float32, 1, "C")
U = types.uint64
LOOPS = {
    "relu_float32": (FLAT, U, U, FLAT, U, U, FLAT, U, U, FLAT, types.float32),
    "erf_row": (FLAT, U, U, FLAT, U, U, FLAT, U, U, FLAT, types.float32),
    "vertical": (FLAT, U, U, U, U, U, U, U, types.float32, types.float32, FLAT, U, types.boolean),
    "horizontal": (FLAT, U, U, U, FLAT, U),
    "input_line": (FLAT, U, FLAT, U, U, U, U, U, FLAT),
}
PACKED = {
    "relu_float32": "sqrtps",
    "erf_row": "sqrtps",
    "vertical": "addps",
    "horizontal": "addps",
    "input_line": "mulps",
}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="looks for x86-64 instructions")
@pytest.mark.parametrize("name", LOOPS)
def test_inner_loops_use_packed_instructions(name: str) -> None:
    """A loop that LLVM silently does not vectorise costs a factor of four."""
    options = {**planes.EXACT, "cache": False}
    compiled = njit(LOOPS[name], **options)(getattr(planes, name).py_func)
    (assembly,) = compiled.inspect_asm().values()
    assert re.search(rf"\bv?{PACKED[name]}\b.*%[yz]mm|\b{PACKED[name]}\b", assembly), f"no packed {PACKED[name]}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-7), (np.float64, 1e-15)])
def test_relu_row_is_the_arc_cosine_kernel(dtype: type[np.floating], tolerance: float) -> None:
    """With q = 1 the row holds (√(1-c²) + (π - arccos c) c) / 2π and (π - arccos c) / 2π."""
    c = np.concatenate([np.linspace(-1, 1, 2049), [0.0, -0.0]]).astype(dtype)
    ones, mask = np.ones(len(c), dtype), np.full(len(c), 1 / (2 * math.pi), dtype)
    line = np.zeros(planes.LINE, dtype)
    line[: len(c)] = c
    line[int(planes.NTK_LINE) : int(planes.NTK_LINE) + len(c)] = 1

    @njit
    def row(line, length, ones, mask, branch):  # type: ignore[no-untyped-def]
        zero = np.uint64(0)
        planes.relu_row(line, zero, length, ones, zero, zero, ones, zero, zero, mask, branch)  # type: ignore[no-untyped-call]

    row(line, np.uint64(len(c)), ones, mask, dtype(4 * np.finfo(dtype).eps))
    exact = c.astype(np.longdouble)
    angle = np.longdouble(np.pi) - np.arccos(exact)
    nngp = (np.sqrt(1 - exact**2) + angle * exact) / (2 * np.longdouble(np.pi))
    start = int(planes.NTK_LINE)
    np.testing.assert_allclose(line[: len(c)], nngp.astype(dtype), atol=tolerance, rtol=0)
    np.testing.assert_allclose(line[start : start + len(c)], angle / (2 * np.longdouble(np.pi)), atol=tolerance, rtol=0)


@pytest.mark.parametrize("offsets", [1, 2, 7, 32, 300])
@pytest.mark.parametrize("row", [3, 34, 100, 639, 5000])
def test_blocks_of_offsets_fit_a_long_row(offsets: int, row: int) -> None:
    block = offsets_per_block(offsets, row)
    assert 1 <= block <= offsets
    assert block == 1 or block * row <= LONGEST_ROW


def test_a_long_row_fits_the_scratch_line() -> None:
    assert int(planes.NTK_LINE) > LONGEST_ROW + planes.LANES
    with pytest.raises(ImageError, match=r"images are 1x17000 pixels; the cpu engine takes up to \d+ per side"):
        GroupCNN(group="C1").kernel(np.zeros((1, 1, 17000, 1)))
