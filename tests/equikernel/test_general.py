"""What is particular to the general engine: groups off the grid, strides and pooling, and memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from equikernel import Activation, AvgPool, Conv, GroupCNN, MemoryLimitError, Residual
from equikernel.cost import components_off_grid, pixels_seen
from equikernel.engines import dense
from equikernel.engines.dense import _taps, cosets, representatives
from equikernel.groups import on_grid, order, symmetries
from equikernel.kernel import Kernel

POOLED = GroupCNN(
    group="C4",
    layers=[
        Conv(3, activation="identity"),
        AvgPool(2),
        Residual([Activation("relu"), Conv(3), Conv(1)]),
        Conv(3, stride=2),
    ],
    b_std=0.2,
)


def images(count: int, side: int = 4, channels: int = 1, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(count, side, side, channels))


def assert_close(kernel: Kernel, exact: Kernel, tolerance: float = 1e-12) -> None:
    """Relative to ``√(K(f,f) K(f',f'))``."""
    for values, truth in zip(kernel, exact, strict=True):
        diagonal = np.sqrt(np.diag(truth))
        scale = np.outer(diagonal, diagonal)
        np.testing.assert_array_less(np.abs(values - truth), tolerance * np.where(scale > 0, scale, 1))


@pytest.mark.parametrize("group", ["C3", "C6", "C8", "D3", "D8"])
def test_off_the_grid_it_is_the_literal_recursion(group: str) -> None:
    x = images(2)
    net = GroupCNN(group=group, depth=2, b_std=0.1)
    assert_close(net.kernel(x, engine="general", dtype="float64"), net.kernel(x, engine="reference"))


@pytest.mark.parametrize("group", ["C3", "C5", "C6", "C8", "C12", "D3", "D6", "D8", "D12", "D15"])
def test_components_are_one_for_each_difference_and_coset(group: str) -> None:
    assert not on_grid(group)
    assert set(cosets(group)) == set(symmetries(group))
    assert order(group) * len(representatives(group)) == components_off_grid(group)


@pytest.mark.parametrize(("group", "radius"), [("C3", 1), ("C8", 1), ("C16", 1), ("D8", 1), ("C6", 2)])
def test_the_cost_counts_the_pixels_that_the_filters_see(group: str, radius: int) -> None:
    counts = [_taps(group, d, (radius, radius))[2].mean() for d in symmetries(group)]
    assert pixels_seen(group, (radius, radius)) == pytest.approx(np.mean(counts))


def test_rotations_beyond_the_grid_keep_quarter_turns() -> None:
    x = images(3, side=5)
    net = GroupCNN(group="C8", depth=2)
    kernel = net.kernel(x[:1], x[1:], engine="general", dtype="float64")
    turned = net.kernel(np.rot90(x[:1], axes=(1, 2)), x[1:], engine="general", dtype="float64")
    np.testing.assert_allclose(turned, kernel, rtol=1e-12)


def test_reflections_beyond_the_grid_keep_the_mirror_image() -> None:
    x = images(3)
    net = GroupCNN(group="D3", depth=2)
    kernel = net.kernel(x[:1], x[1:], engine="general", dtype="float64")
    mirrored = net.kernel(x[:1, :, ::-1], x[1:], engine="general", dtype="float64")
    np.testing.assert_allclose(mirrored, kernel, rtol=1e-12)


def test_a_stride_and_pooling_keep_the_symmetry() -> None:
    x = images(3, side=10)
    kernel = POOLED.kernel(x[:1], x[1:], engine="general", dtype="float64")
    turned = POOLED.kernel(np.rot90(x[:1], axes=(1, 2)), x[1:], engine="general", dtype="float64")
    np.testing.assert_allclose(turned, kernel, rtol=1e-12)


def test_pooling_residuals_and_strides_are_the_literal_recursion() -> None:
    x = images(2, side=10)
    net = POOLED.model_copy(update={"group": "C1"})
    assert_close(net.kernel(x, engine="general", dtype="float64"), net.kernel(x, engine="reference"))


@pytest.mark.parametrize(
    ("group", "filter_size", "side", "activation"),
    [("C4", 3, 5, "relu"), ("C4", 3, 5, "erf"), ("C1", 5, 6, "relu"), ("C8", 3, 4, "erf"), ("D3", 3, 4, "relu")],
)
def test_branch_point(group: str, filter_size: int, side: int, activation: str) -> None:
    """Identical, rotated, proportional, constant and zero images: ``c = ±1`` and ``q = 0``, where √ε lurks."""
    f = images(1, side=side)[0]
    special = np.array([f, f, 3.7 * f, -0.3 * f, np.rot90(f), f[:, ::-1], np.full_like(f, 0.8), -1.3 + 0 * f, 0 * f])
    net = GroupCNN(group=group, depth=2, filter_size=filter_size, activation=activation)
    assert_close(net.kernel(special, engine="general", dtype="float64"), net.kernel(special, engine="reference"))


def test_one_pair_at_a_time_gives_the_same() -> None:
    x = images(3, side=10)
    least = POOLED.explain((10, 10, 1), engine="general").pair_bytes
    cut = POOLED.kernel(x, engine="general", dtype="float64", memory_limit=least + 10_000)
    assert_close(cut, POOLED.kernel(x, engine="general", dtype="float64"), tolerance=1e-14)


def test_less_memory_than_one_pair_takes_is_refused() -> None:
    least = POOLED.explain((10, 10, 1), engine="general").pair_bytes
    with pytest.raises(MemoryLimitError, match=r"the engine 'general' needs .* for a pair of 10x10x1 images"):
        POOLED.kernel(images(1, side=10), engine="general", memory_limit=least - 1)


def test_more_images_are_not_compiled_anew() -> None:
    net = GroupCNN(group="C4", depth=1, activation="leaky_relu(0.3)")
    net.kernel(images(9, side=8), engine="general")
    before = dense._dual._cache_size()  # type: ignore[attr-defined]
    net.kernel(images(12, side=8), images(15, side=8, seed=1), engine="general")
    assert dense._dual._cache_size() == before  # type: ignore[attr-defined]


MEASURE = """
import re, sys
from pathlib import Path
import numpy as np
from equikernel import AvgPool, Conv, GroupCNN

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

net = GroupCNN(group="C2", layers=[Conv(3), AvgPool(2), Conv(3)], activation="gelu")
net.kernel(np.ones((1, 8, 8, 1)), engine="general")
before = peak()
net.kernel(np.random.default_rng(0).normal(size=(1, 48, 48, 1)), engine="general")
print(peak() - before, net.explain((48, 48, 1), engine="general").pair_bytes)
assert "neural_tangents" not in sys.modules
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the memory is read from /proc")
def test_a_pair_takes_the_memory_that_is_declared() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=120)
    measured, declared = map(int, done.stdout.split())
    assert measured <= declared <= 2 * measured
