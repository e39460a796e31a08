"""What is particular to the JAX engine: blocks of bounded memory and time, few compilations, its own functions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from equikernel import Activation, Conv, GroupCNN, Residual
from equikernel.engines import functions, xla
from equikernel.engines.device import platform
from equikernel.engines.xla import XlaEngine, block_shape
from equikernel.engines.xla_planes import plane_sums
from equikernel.images import Labels
from equikernel.kernel import Kernel

NETWORKS = {
    "SAME": GroupCNN(group="C4", depth=2, b_std=0.2),
    "VALID": GroupCNN(group="D1", depth=2, padding="VALID", activation="gelu"),
    "CIRCULAR": GroupCNN(group="C2", layers=[Conv((3, 5)), Residual([Conv(3)])], padding="CIRCULAR"),
}


def images(count: int, side: int = 9, channels: int = 2, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(count, side, side, channels))


def assert_equal(kernel: Kernel, other: Kernel, rtol: float) -> None:
    for values, exact in zip(kernel, other, strict=True):
        np.testing.assert_allclose(values, exact, rtol=rtol)


@pytest.mark.parametrize("padding", NETWORKS)
def test_cutting_the_offsets_changes_nothing(padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for three horizontal offsets of one pair, and one vertical offset per call."""
    x, net = images(2), NETWORKS[padding]
    exact = net.kernel(x, engine="reference")
    monkeypatch.setattr(xla, "ENTRY_STEPS", {"cpu": 1, "gpu": 1})
    monkeypatch.setattr(xla, "FEWEST_OFFSETS", 3)
    monkeypatch.setattr(xla, "ENTRIES", {"cpu": 1, "gpu": 1})
    assert_equal(net.kernel(x, engine="xla", dtype="float64"), exact, rtol=1e-12)


def test_blocks_use_the_memory_and_no_more() -> None:
    for memory in (10_000, 100_000, 10**6, 10**7, 10**8):
        for pixels, offsets in ((36, 6), (1024, 32), (50_176, 224)):
            for pairs in (1, 2, 3, 36, 1000):
                blocks = block_shape(
                    (pairs, offsets), pixels=pixels, plane_bytes=100 * pixels, steps=6, memory=memory, platform="cpu"
                )
                used = 100 * pixels * blocks.pairs * blocks.across
                assert used <= memory or blocks[:2] == (1, 1)
                assert blocks.pairs < 2 * pairs
                assert blocks.across <= offsets
                assert blocks.pairs == 1 or blocks.across == offsets
                assert blocks.down >= 1


def test_blocks_have_few_shapes() -> None:
    shapes = {
        block_shape((pairs, 32), pixels=1024, plane_bytes=102_400, steps=6, memory=10**9, platform="cpu")[:2]
        for pairs in range(1, 1000)
    }
    assert shapes == {(1, 32), (2, 32), (4, 32)}


def test_a_network_is_compiled_once_for_all_calls_of_a_shape() -> None:
    fields: dict[str, Any] = {"group": "C4", "depth": 1, "w_std": 1.25}
    for count in (3, 3):
        GroupCNN(**fields).kernel(images(count), engine="xla")
    net = GroupCNN(**fields)
    net.kernel(images(3), images(2, seed=1), engine="xla")  # six pairs again
    compiled = plane_sums(net.steps, net.padding, 2, platform())
    assert compiled._cache_size() == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "net",
    [
        GroupCNN(group="C1", depth=3),
        GroupCNN(group="C1", depth=2, filter_size=5, padding="VALID", activation="gelu"),
        GroupCNN(group="C1", layers=[Conv(3, activation="identity"), Residual([Activation("hermite(4)"), Conv(3)])]),
    ],
    ids=["relu", "gelu", "residual"],
)
def test_the_compiled_code_needs_the_memory_that_is_declared(net: GroupCNN) -> None:
    if platform() != "cpu":  # asked here, not when tests are collected: it starts JAX, and then processes must not fork
        pytest.skip("on a GPU the compiler decides what is stored")
    engine = XlaEngine(net, ("C1",), np.dtype(np.float32), 10**9)
    packed = engine.prepare(images(2, side=24, channels=4), Labels("x")).packed
    across = np.arange(16)
    with jax.enable_x64(True):
        lowered = plane_sums(net.steps, net.padding, 4, "cpu").lower(  # type: ignore[attr-defined]
            packed, packed, np.arange(24), across, 0, 24, True
        )
        used = lowered.compile().memory_analysis()
    measured = used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes
    declared = engine._plane_bytes(24, 24, 4) * len(packed) * len(across)
    assert measured <= declared <= 2 * measured


@pytest.mark.parametrize("activation", ["relu", "erf", "sin"])
def test_float32_keeps_its_digits_on_larger_images(activation: str) -> None:
    """Also for an image with itself and with its multiple, where every plane meets the branch point."""
    x = images(2, side=20)
    x = np.concatenate([x, 2 * x[:1]])
    net = GroupCNN(group="C1", depth=2, activation=activation)
    exact = net.kernel(x.astype(np.float32), engine="xla", dtype="float64")
    assert_equal(net.kernel(x, engine="xla", dtype="float32"), exact, rtol=5e-6)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 3e-7), ("float64", 5e-16)])
def test_functions_are_exact_to_rounding(dtype: str, error: float) -> None:
    angle = np.concatenate([np.linspace(0, np.pi, 1001), np.geomspace(1e-6, 1e-2, 100)])
    c, k = np.cos(angle).astype(dtype), np.linspace(-1, 1, 1001).astype(dtype)
    y = np.sin(np.linspace(-np.pi / 2, np.pi / 2, 1001)).astype(dtype)
    x = np.sqrt(1 - y.astype(np.float64) ** 2).astype(dtype)
    with jax.enable_x64(True):
        for found, exact in (
            (functions.arccos(jnp.asarray(c)), np.arccos(c.astype(np.float64))),
            (functions.arctan2(jnp.asarray(y), jnp.asarray(x)), np.arctan2(y.astype(np.float64), x)),
            (functions.sinh(jnp.asarray(k)), np.sinh(k.astype(np.float64))),
        ):
            assert found.dtype == dtype
            np.testing.assert_allclose(np.asarray(found), exact, rtol=0, atol=error)


def test_a_device_that_is_not_there_is_said() -> None:
    """In a process of its own: JAX chooses its devices once."""
    code = (
        "import numpy as np; from equikernel import *\n"
        "try: GroupCNN(depth=1).kernel(np.ones((1, 5, 5, 1)), engine='xla')\n"
        "except EngineError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert re.match(r"the engine 'xla' has no device: JAX is to compute on 'cuda' \(JAX_PLATFORMS\) and", done.stdout)
