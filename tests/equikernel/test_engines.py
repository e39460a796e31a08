"""Every engine against the literal recursion: networks, groups, paddings, precisions and image shapes."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from equikernel import (
    Activation,
    AvgPool,
    Conv,
    Custom,
    EngineError,
    GroupCNN,
    ImageError,
    MemoryLimitError,
    Residual,
)
from equikernel.kernel import Kernel

Array = NDArray[np.float64]

TOLERANCE = {"float64": 1e-12, "float32": 5e-6}
ENGINES = [("cpu", "float64"), ("cpu", "float32"), ("xla", "float64"), ("xla", "float32"), ("general", "float64")]

RESNET = (
    Conv(3, activation="identity"),
    Residual([Activation("gelu"), Conv(3), Residual([Conv(1)]), Conv(3)]),
    Conv(1, activation="sin"),
)
PRE_ACTIVATION = (
    Conv(3, activation="identity"),
    Residual([Activation("relu"), Conv(3)]),
    Residual([Activation("relu"), Conv(3)]),
)

PRE_ACTIVATION_1X1 = (Conv(3, activation="identity"), Residual([Activation("cos"), Conv(1)]))

DECOUPLED: dict[str, tuple[GroupCNN, tuple[int, int, int]]] = {
    "one pixel": (GroupCNN(group="C4", depth=2, b_std=0.3), (1, 1, 3)),
    "three pixels": (GroupCNN(group="D4", depth=3), (3, 3, 1)),
    "even side": (GroupCNN(group="C4", depth=2, padding="CIRCULAR", activation="leaky_relu(0.2)"), (6, 6, 2)),
    "odd side": (GroupCNN(group="D4", depth=2, padding="VALID", activation="gelu", w_std=1.5), (7, 7, 1)),
    "rectangle": (GroupCNN(group="D2", depth=2, activation="sin", head=("abs",)), (4, 9, 2)),
    "tall rectangle": (GroupCNN(group="D1", layers=[Conv((5, 3)), Conv((1, 3))], padding="CIRCULAR"), (9, 5, 1)),
    "wide filters": (GroupCNN(group="C2", layers=[Conv((3, 5)), Conv((1, 7))], padding="VALID"), (4, 13, 1)),
    "64 channels": (GroupCNN(group="C1", depth=2, activation="erf", b_std=0.1), (7, 7, 64)),
    "residual": (GroupCNN(group="C4", layers=RESNET, b_std=0.2), (7, 7, 2)),
    "pre-activation": (GroupCNN(group="C2", layers=PRE_ACTIVATION, padding="CIRCULAR"), (5, 8, 2)),
    "residual of one pixel": (
        GroupCNN(group="C4", layers=PRE_ACTIVATION_1X1, padding="VALID"),
        (7, 7, 1),
    ),
    "polynomials": (
        GroupCNN(group="C1", layers=[Conv(3, activation="hermite(4)"), Conv(3, activation="monomial(3)")]),
        (7, 7, 1),
    ),
    "custom": (
        GroupCNN(group="C1", depth=2, activation=Custom(lambda x: np.tanh(x / 4), 20), head=("cos",)),
        (7, 7, 2),
    ),
    "linear": (GroupCNN(group="C4", depth=3, activation="identity"), (6, 6, 2)),
}

DENSE: dict[str, tuple[GroupCNN, tuple[int, int, int]]] = {
    "stride": (GroupCNN(group="C4", layers=[Conv(3, stride=2), Conv(3)], b_std=0.3), (7, 7, 2)),
    "stride without padding": (GroupCNN(group="D4", layers=[Conv(3, stride=2), Conv(1)], padding="VALID"), (7, 7, 1)),
    "pooling": (GroupCNN(group="D2", layers=[Conv(3), AvgPool(2), Conv((1, 3), activation="erf")]), (4, 8, 2)),
    "strided residual": (
        GroupCNN(group="C2", layers=(Conv(3, stride=2), Residual([Conv(3), Conv(3)]), AvgPool(2)), head="erf"),
        (7, 7, 1),
    ),
    "C3": (GroupCNN(group="C3", depth=2, b_std=0.1), (5, 5, 2)),
    "C8": (GroupCNN(group="C8", depth=2, padding="CIRCULAR", activation="gelu"), (5, 5, 1)),
    "D3": (GroupCNN(group="D3", depth=1, padding="VALID", head=("erf",)), (6, 6, 1)),
}  # fmt: skip


DENSE_TOO = ("three pixels", "rectangle", "odd side", "residual", "custom", "linear")
"""Networks that the general engine computes besides."""


def special_images(shape: tuple[int, int, int]) -> Array:
    """Noise, and its multiple, half turn and negative, a constant and a zero image: where ``c = ±1`` and ``q = 0``."""
    x = np.random.default_rng(0).normal(size=(2, *shape))
    return np.concatenate([x, [3 * x[0], x[0, ::-1, ::-1], -x[1], np.full(shape, 0.7), np.zeros(shape)]])


@functools.cache
def expected(name: str) -> Kernel:
    net, shape = {**DECOUPLED, **DENSE}[name]
    return net.kernel(special_images(shape), engine="reference")


def assert_close(kernel: Kernel, exact: Kernel, dtype: str) -> None:
    """Equal to the tolerance of ``dtype``, relative to ``√(K(f,f) K(f',f'))``."""
    for name, values, truth in zip(Kernel._fields, kernel, exact, strict=True):
        diagonal = np.sqrt(np.maximum(np.diag(truth), 0))
        scale = np.outer(diagonal, diagonal)
        error = np.abs(values - truth) / np.where(scale > 0, scale, 1)
        worst = np.unravel_index(int(error.argmax()), error.shape)
        assert error[worst] <= TOLERANCE[dtype], f"{name}{list(map(int, worst))}: {values[worst]} != {truth[worst]}"


@pytest.mark.parametrize(
    ("engine", "dtype", "name"),
    [(*engine, name) for engine in ENGINES for name in (DECOUPLED if engine[0] != "general" else DENSE_TOO)],
)
def test_every_engine_is_the_literal_recursion(engine: str, dtype: str, name: str) -> None:
    net, shape = DECOUPLED[name]
    kernel = net.kernel(special_images(shape), engine=engine, dtype=dtype)
    assert kernel.engine == engine
    assert kernel.nngp.dtype == kernel.ntk.dtype == dtype
    assert_close(kernel, expected(name), dtype)
    for values in kernel:
        np.testing.assert_array_equal(values, values.T)


@pytest.mark.parametrize("name", DENSE)
def test_what_does_not_decouple_goes_to_the_general_engine_by_itself(name: str) -> None:
    net, shape = DENSE[name]
    kernel = net.kernel(special_images(shape), dtype="float64")
    assert kernel.engine == "general"
    assert_close(kernel, expected(name), "float64")


@pytest.mark.parametrize("engine", ["cpu", "xla", "general"])
def test_one_image_against_two(engine: str) -> None:
    x = special_images((6, 6, 2))
    net = GroupCNN(group="C4", depth=2, padding="CIRCULAR", activation="leaky_relu(0.2)")
    kernel = net.kernel(x[:1], x[1:3], engine=engine, dtype="float64")
    whole = expected("even side")
    np.testing.assert_allclose(kernel.nngp, whole.nngp[:1, 1:3], rtol=1e-12)
    np.testing.assert_allclose(kernel.ntk, whole.ntk[:1, 1:3], rtol=1e-12)


@pytest.mark.parametrize("engine", ["cpu", "xla", "general"])
def test_several_groups_come_from_one_pass(engine: str) -> None:
    x = np.random.default_rng(1).normal(size=(2, 6, 6, 2))
    net = GroupCNN(group="C4", depth=2, padding="CIRCULAR", activation="leaky_relu(0.2)", head=("relu",))
    kernels = net.kernel(x, engine=engine, dtype="float64", groups=("C1", "C4", "D1"))
    for group, kernel in kernels.items():
        exact = net.model_copy(update={"group": group}).kernel(x, engine="reference")
        assert_close(kernel, exact, "float64")
        assert kernel.engine == engine


@pytest.mark.parametrize("engine", ["cpu", "xla", "general", "reference"])
def test_a_small_memory_limit_cuts_the_work_and_changes_nothing(engine: str) -> None:
    x = np.random.default_rng(2).normal(size=(9, 6, 6, 2))
    net = GroupCNN(group="C4", depth=2, padding="CIRCULAR", activation="leaky_relu(0.2)")
    function_bytes = net.explain((6, 6, 2), engine=engine, dtype="float64").pair_bytes
    cut = net.kernel(x, engine=engine, dtype="float64", memory_limit=function_bytes + 40_000, threads=1)
    whole = net.kernel(x, engine=engine, dtype="float64")
    cross = net.kernel(x[:2], x, engine=engine, dtype="float64", memory_limit=function_bytes + 40_000, threads=1)
    for values, exact, across in zip(cut, whole, cross, strict=True):
        np.testing.assert_allclose(values, exact, rtol=1e-13)
        np.testing.assert_array_equal(values, values.T)
        np.testing.assert_allclose(across, exact[:2], rtol=1e-13)


MEASURE = """
import re, sys
from pathlib import Path
import numpy as np
from equikernel import GroupCNN

def memory(which):
    return 1024 * int(re.search(which + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

engine, (rows, count, side, channels, limit) = sys.argv[1], map(int, sys.argv[2:])
net = GroupCNN(group="C4", depth=1, head=("relu",))
x = np.ones((count, side, side, channels), np.float32)
net.kernel(x[:rows], x[:2] if engine == "cpu" else x, engine=engine, memory_limit=limit)  # compiles
Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is used
before = memory("VmRSS")
kernel = net.kernel(x[:rows], x, engine=engine, memory_limit=limit)
print(memory("VmHWM") - before - kernel.nngp.nbytes - kernel.ntk.nbytes)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks of memory are measured on Linux")
@pytest.mark.parametrize(
    ("engine", "rows", "count", "side", "channels", "limit"),
    [
        ("cpu", 300, 600, 2, 1, 14_000_000),
        ("cpu", 1, 300, 16, 64, 30_000_000),
        ("xla", 9, 60, 8, 64, 16_000_000),
        ("general", 9, 40, 8, 64, 16_000_000),
        ("reference", 3, 6, 6, 64, 16_000_000),
    ],
    ids=["many pairs", "many channels", "xla", "general", "reference"],
)
def test_the_memory_stays_within_its_limit(
    engine: str, rows: int, count: int, side: int, channels: int, limit: int
) -> None:
    arguments = [engine, *map(str, (rows, count, side, channels, limit))]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True, timeout=100
    )
    assert int(done.stdout) <= limit


@pytest.mark.parametrize(
    ("net", "side"),
    [
        (GroupCNN(group="C1", depth=2), 12),
        (GroupCNN(group="C1", depth=2, filter_size=9, padding="CIRCULAR"), 10),
        (GroupCNN(group="C8", depth=2, filter_size=5), 5),
        (GroupCNN(group="C4", depth=2, activation="gelu"), 8),
        (GroupCNN(group="C1", depth=2, activation=Custom(np.tanh, 60)), 5),
        (GroupCNN(group="C4", depth=2, activation="sin"), 8),
        (GroupCNN(group="C1", layers=[Conv(3), Residual([Conv(3), Residual([Conv(3)]), Conv(3)])]), 14),
        (GroupCNN(group="C2", layers=[Conv(3), AvgPool(2), Conv(3)], head=("relu", "gelu")), 10),
    ],
    ids=str,
)
def test_the_literal_recursion_needs_no_more_memory_than_it_says(net: GroupCNN, side: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, side, side, 1))
    limit = net.explain((side, side, 1), engine="reference").pair_bytes
    net.kernel(x[:1], x[1:], engine="reference", memory_limit=limit)
    tracemalloc.start()
    net.kernel(x[:1], x[1:], engine="reference", memory_limit=limit)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most <= limit
    with pytest.raises(MemoryLimitError):
        net.kernel(x[:1], x[1:], engine="reference", memory_limit=limit - 1)


def test_errors_name_the_image_also_where_the_work_is_cut() -> None:
    x = np.random.default_rng(2).normal(size=(9, 7, 7, 2)).astype(np.float32)
    net = GroupCNN(group="C1", depth=1, w_std=1e6)
    limit = net.explain((7, 7, 2)).pair_bytes + 20_000
    x[7] *= 1e14
    with pytest.raises(ImageError, match=r"the kernel of x1\[7\] with itself is .*e\+\d+ at convolution 1"):
        net.kernel(x, memory_limit=limit, threads=2)
    x[8, 2, 3, 1] = np.nan
    with pytest.raises(ImageError, match=r"x1\[8\] has NaN or infinite pixels, the first at \[2, 3, 1\] \(row"):
        net.kernel(x, memory_limit=limit, threads=2)
    with pytest.raises(ImageError, match=r"x2\[8\] has NaN"):
        net.kernel(x[:2], x, memory_limit=limit, threads=2)


@pytest.mark.parametrize("engine", ["cpu", "xla"])
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"group": "C3"}, "C3 does not map the pixel grid to itself"),
        ({"layers": [Conv(3, stride=2)]}, r"the stride of layers\[0\] does not keep the offset"),
        ({"layers": [Conv(3), AvgPool(2)]}, r"the pooling layers\[1\] does not keep the offset"),
    ],
)
def test_a_fast_engine_refuses_what_does_not_decouple(engine: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(EngineError, match=f"the engine '{engine}' cannot do this network: {reason}.*use 'general'"):
        GroupCNN(**fields).kernel(np.ones((1, 4, 4, 1)), engine=engine)
