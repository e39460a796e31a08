"""The benchmark of the kernels, where the floor is not known, and where the processor is taken for another one."""

from __future__ import annotations

import math
from collections import Counter

import bench
import floor
import numpy as np
import pytest

from equikernel import Conv, GroupCNN
from equikernel.engines.cpu import CpuEngine
from equikernel.engines.vectors import host


def test_where_instructions_are_not_counted_there_is_no_share_of_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    case = bench.Case(8, 1)
    assert math.isnan(case.least("float32"))
    assert bench.percent(math.nan) == ""
    assert bench.percent(0.77) == "77%"


@pytest.mark.skipif(not floor.is_counted(), reason="only x86-64 has AVX2")
def test_engine_and_floor_may_be_kept_from_avx512() -> None:
    def engine() -> CpuEngine:
        return CpuEngine(GroupCNN(depth=1), ("C1",), np.dtype("float32"), 1, 2**30)

    usual = engine().target.vector_bytes
    with floor.restricted_to_avx2():
        assert engine().target.vector_bytes == 32
        assert floor.floor(GroupCNN(depth=1), 1, rounds=1).lanes == 8
        assert "zmm" not in engine().program(8, 8, 1).compiled.assembly
    assert engine().target.vector_bytes == usual


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(
    ("ratio", "share", "fast"), [(41, 0.36, True), (39, 0.9, False), (90, 0.34, False), (41, math.nan, False)]
)
def test_a_commit_passes_with_a_ratio_and_where_instructions_are_counted_a_share(
    ratio: float, share: float, fast: bool, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "is_counted", lambda: counted)
    assert bench.is_fast(ratio, share) == (fast if counted else ratio >= 40)


def test_entries_are_those_that_the_kernel_depends_on() -> None:
    assert floor.entries(GroupCNN(depth=2), 8) == [8**4] * 3
    sides, rest = (8, 6, 4), 4
    by_hand = [
        sum(abs(a - b) < rest for a in range(side) for b in range(side)) ** 2 for side in sides
    ]  # of pixels in a row, then in a column
    assert floor.entries(GroupCNN(depth=2, padding="VALID"), 8) == by_hand
    flat = GroupCNN(layers=[Conv((1, 5))], padding="VALID")
    assert floor.entries(flat, 8) == [8**2 * sum(abs(a - b) < 4 for a in range(8) for b in range(8)), 8**2 * 4**2]


@pytest.mark.skipif(not floor.is_counted(), reason="counts instructions of x86-64")
@pytest.mark.parametrize("name", floor.targets())
@pytest.mark.parametrize(
    "net", [GroupCNN(depth=2, filter_size=7), GroupCNN(layers=[Conv((1, 5))] * 2)], ids=["7x7", "1x5"]
)
def test_the_floor_is_known_for_long_filters(name: str, net: GroupCNN) -> None:
    for dtype in ("float32", "float64"):
        measured = floor.floor(net, 3, dtype, floor.targets()[name], rounds=1)
        assert all(0 < nanoseconds < 1000 for nanoseconds in measured.nanoseconds)


@pytest.mark.skipif(not floor.is_counted(), reason="counts instructions of x86-64")
def test_a_loop_that_registers_do_not_hold_gives_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    some, single, target = Counter({"fused": 99, "root": 1}), np.dtype("float32"), host()
    assert floor._peak(some, single, target, 1) > 0
    monkeypatch.setattr(floor, "CHAINS", ((60, 1),))
    assert math.isnan(floor._peak(some, single, target, 1))


@pytest.mark.skipif(not floor.is_counted(), reason="counts instructions of x86-64")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", floor.targets())
def test_the_floor_times_the_instructions_that_the_engine_has(name: str, dtype: str) -> None:
    """Some loop has exactly those that were counted, on registers; and the engine's own loops have as many."""
    net, target = GroupCNN(depth=3), floor.targets()[name]
    measured = floor.floor(net, 3, dtype, target, rounds=1)
    assert all(0 < nanoseconds < 1000 for nanoseconds in measured.nanoseconds)
    assert measured.milliseconds(64) == pytest.approx(16 * measured.milliseconds(32))
    code = CpuEngine(net, ("C4",), np.dtype(dtype), 1, 2**30, target).program(32, 32, 3).compiled
    engine = [loop.arithmetic.total() for loop in floor.loops(code.assembly) if loop.arithmetic["root"]]
    assert len(engine) == 3
    for count, own in zip(measured.instructions[1:], engine, strict=True):
        assert count["root"]
        assert abs(count.total() - own) <= 1
