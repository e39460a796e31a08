"""The inner loops: that they are compiled to packed instructions, and their polynomials are as exact as they say."""

from __future__ import annotations

import platform
import re
from typing import Any

import numpy as np
import pytest
from numba import njit, types
from numba.core.ir import Expr

from equikernel import Custom, GroupCNN, ImageError
from equikernel.activations import NAMED, RELU, Activation, parse
from equikernel.engines import planes, rows
from equikernel.engines.cpu import LONGEST_ROW, _operation, offsets_per_block

FLAT = types.Array(types.float32, 1, "C")
U = types.uint64
U_FLAT = types.Array(U, 1, "C")
ROW = (FLAT, U, U, FLAT, U, FLAT, U, U, FLAT, U, types.float32)
CORRELATION = (FLAT, U, U, FLAT, U, FLAT, U, types.float32)
LOOPS = {
    "correlation_row": CORRELATION,
    "convolved_correlation_row": (FLAT, FLAT, U, U, U, *[types.float32] * 4, *CORRELATION),
    "arc_cosine_row": (FLAT, U, U, FLAT, U, FLAT, U, FLAT, U, types.float32),
    "erf_row": ROW,
    "gelu_row": ROW,
    "wave_row": (*ROW, types.boolean),
    "polynomial_row": (*ROW, types.boolean),
    "series_step": (U, FLAT, U, FLAT, U, FLAT, FLAT, FLAT),
    "series_steps": (U, FLAT, U, FLAT, U, U, FLAT, FLAT, FLAT),
    "vertical": (FLAT, U, U, U, U, U, U, U, *[types.float32] * 3, FLAT, U, types.boolean),
    "horizontal": (FLAT, U, U, U, FLAT, U),
    "input_line": (FLAT, U, FLAT, U, U, U, U, U, FLAT),
}
PACKED = {
    "correlation_row": "mulps",
    "convolved_correlation_row": "mulps",
    "arc_cosine_row": "sqrtps",
    "erf_row": "sqrtps",
    "gelu_row": "sqrtps",
    "wave_row": "mulps",
    "polynomial_row": "mulps",
    "series_step": "mulps",
    "series_steps": "mulps",
    "vertical": "addps",
    "horizontal": "addps",
    "input_line": "mulps",
}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="looks for x86-64 instructions")
@pytest.mark.parametrize("name", LOOPS)
def test_inner_loops_use_packed_instructions(name: str) -> None:
    """A loop that LLVM silently does not vectorise costs a factor of four."""
    options = {**rows.EXACT, "cache": False}
    compiled = njit(LOOPS[name], **options)(getattr(planes if hasattr(planes, name) else rows, name).py_func)
    (assembly,) = compiled.inspect_asm().values()
    assert re.search(rf"\bv?{PACKED[name]}\b.*%[yz]mm|\b{PACKED[name]}\b", assembly), f"no packed {PACKED[name]}"
    assert "cvtps2pd" not in assembly, "converts to float64"


def test_rows_of_float32_are_not_computed_in_float64() -> None:
    """One factor of the wrong type would do that, at half the speed, and nothing else would show it."""
    program = types.NamedTuple((U_FLAT, U_FLAT, FLAT, FLAT, FLAT, *[U_FLAT] * 4, FLAT, FLAT, *[U] * 4), planes.Program)
    scratch = types.NamedUniTuple(FLAT, 8, planes.Scratch)
    signature = (program, scratch, FLAT, FLAT, U, U, U, U, U, types.int64, U, U, U, types.float32)
    compiled = njit(signature, **{**rows.EXACT, "cache": False})(planes.pooled_plane.py_func)
    annotation = compiled.overloads[signature].type_annotation
    calls = [
        (annotation.typemap[call.func.name], called.args)
        for call, called in annotation.calltypes.items()
        if isinstance(call, Expr) and call.op == "call"
    ]
    loops = [(called, arguments) for called, arguments in calls if isinstance(called, types.Dispatcher)]
    assert len(loops) > 20
    assert [called for called, arguments in loops if types.float64 in arguments] == []


def one_row(activation: Activation, k: Any, q1: Any, q2: Any, dtype: type[np.floating]) -> tuple[Any, Any]:
    """K and K̇ of covariances ``k`` and variances ``q1``, ``q2``, ``(n,)`` each, through the row loop in ``dtype``."""
    operation, count = _operation(activation, 0), np.uint64(len(k))
    x, y = (np.concatenate(activation.factors(q)).astype(dtype) for q in (q1, q2))
    mask, zero = np.full(len(k), operation.factor, dtype), np.uint64(0)
    correlation, nngp, slope = (np.empty(len(k), dtype) for _ in range(3))
    line = np.zeros(planes.LINE, dtype)
    line[: len(k)] = k
    line[int(rows.NTK_LINE) : int(rows.NTK_LINE) + len(k)] = 1
    planes.activate(
        np.uint64(operation.kind), np.uint64(operation.terms), dtype(operation.middle), line, zero, count, x, zero, y,
        zero, count, mask, zero, dtype(4 * np.finfo(dtype).eps), correlation, nngp, slope,
    )  # fmt: skip
    return line[: len(k)], line[int(rows.NTK_LINE) : int(rows.NTK_LINE) + len(k)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-7), (np.float64, 1e-15)])
def test_the_row_of_relu_is_the_arc_cosine_kernel(dtype: type[np.floating], tolerance: float) -> None:
    """With q = 1 the row holds (√(1-c²) + (π - arccos c) c) / 2π and (π - arccos c) / 2π."""
    c = np.concatenate([np.linspace(-1, 1, 2049), [0.0, -0.0]]).astype(dtype)
    nngp, derivative = one_row(RELU, c, np.ones(len(c)), np.ones(len(c)), dtype)
    exact = c.astype(np.longdouble)
    angle = np.longdouble(np.pi) - np.arccos(exact)
    arc_cosine = (np.sqrt(1 - exact**2) + angle * exact) / (2 * np.longdouble(np.pi))
    np.testing.assert_allclose(nngp, arc_cosine.astype(dtype), atol=tolerance, rtol=0)
    np.testing.assert_allclose(derivative, angle / (2 * np.longdouble(np.pi)), atol=tolerance, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 3e-6), (np.float64, 3e-14)])
@pytest.mark.parametrize("name", [*NAMED, "leaky_relu(0.1)", "leaky_relu(-2)", "hermite(5)", "monomial(2)", "custom"])
def test_the_row_of_each_activation_is_its_dual_kernel(name: str, dtype: type[np.floating], tolerance: float) -> None:
    """Relative to √(E[σ(u)²] E[σ(v)²]), and for K̇ to the largest one, also for ``c = ±1`` and ``q = 0``."""
    activation = Custom(lambda x: np.tanh(x / 4), 12) if name == "custom" else parse(name)
    rng = np.random.default_rng(0)
    q1, q2 = np.exp(rng.uniform(-6, 1.5, (2, 2000)))
    c = np.concatenate([rng.uniform(-1, 1, 1800), 1 - np.logspace(-3, -16, 100), np.logspace(-3, -16, 100) - 1])
    q1[:20] = 0
    q2[10:30] = 0
    q1, q2 = q1.astype(dtype).astype(np.float64), q2.astype(dtype).astype(np.float64)
    k = (c * np.sqrt(q1 * q2)).astype(dtype)
    nngp, derivative = one_row(activation, k, q1, q2, dtype)
    exact, slope = activation.dual(k.astype(np.float64), q1, q2, np.finfo(dtype).eps)
    scale = np.sqrt(activation.moment(q1) * activation.moment(q2))
    moderate = np.abs(c) < 0.99  # nearer to ±1, rounding k alone moves K̇ by its root
    np.testing.assert_array_less(np.abs(nngp - exact), tolerance * scale + np.finfo(dtype).tiny)
    np.testing.assert_array_less(np.abs(derivative - slope)[moderate], (10 * tolerance * np.abs(slope).max()))


@pytest.mark.parametrize("offsets", [1, 2, 7, 32, 300])
@pytest.mark.parametrize("row", [3, 34, 100, 639, 5000])
def test_blocks_of_offsets_fit_a_long_row(offsets: int, row: int) -> None:
    block = offsets_per_block(offsets, row)
    assert 1 <= block <= offsets
    assert block == 1 or block * row <= LONGEST_ROW


def test_a_long_row_fits_the_scratch_line() -> None:
    assert int(rows.NTK_LINE) > LONGEST_ROW + planes.LANES
    net = GroupCNN(group="C1", depth=1, filter_size=601)
    with pytest.raises(
        ImageError, match=r"images are 1x16000 pixels; with such filters the engine 'cpu' takes up to \d+ "
    ):
        net.kernel(np.zeros((1, 1, 16_000, 1)))
