"""The benchmark of the kernels, where the floor is not known, and where the processor is taken for another one."""

from __future__ import annotations

import math

import bench
import floor
import numpy as np
import pytest

from equikernel import GroupCNN
from equikernel.engines.cpu import CpuEngine


def test_where_instructions_are_not_counted_there_is_no_share_of_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    case = bench.Case(8, 1)
    assert all(math.isnan(least) for least in case.floors().values())
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
