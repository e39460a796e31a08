"""The kernels against exact answers, against the literal recursion, and against what the mathematics demands."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from equikernel import (
    Custom,
    EngineError,
    GroupCNN,
    ImageError,
    MemoryLimitError,
    NetworkError,
    NonFiniteKernelError,
)
from equikernel.groups import GRID_GROUPS, keeps_rectangles, symmetries
from equikernel.kernel import Kernel, KernelFunction
from equikernel.layers import Padding

Array = NDArray[np.float64]

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "cn_recursion.json").read_text())
TOLERANCE = {"float64": 1e-12, "float32": 5e-6}
PADDINGS = ("SAME", "VALID", "CIRCULAR")


def images(count: int, side: int = 6, channels: int = 2, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(count, side, side, channels))


def assert_kernels_close(kernel: Kernel, expected: Kernel, dtype: str, scale: Kernel | None = None) -> None:
    """Equal to the tolerance of ``dtype``, relative to the entries, or to ``√(K(f,f) K(f',f'))`` where they cancel."""
    for name, values, exact in zip(Kernel._fields, kernel, expected, strict=True):
        size = np.abs(exact) if scale is None else getattr(scale, name)
        error = np.abs(values - exact) / np.where(size > 0, size, 1)
        worst = np.unravel_index(int(error.argmax()), error.shape)
        assert error[worst] <= TOLERANCE[dtype], f"{name}{list(map(int, worst))}: {values[worst]} != {exact[worst]}"


def self_scale(kernel: Kernel) -> Kernel:
    return Kernel(*(np.sqrt(np.outer(np.diag(values), np.diag(values))) for values in kernel))


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: str(case["network"]))
@pytest.mark.parametrize(("engine", "dtype"), [("reference", "float64"), ("cpu", "float64"), ("cpu", "float32")])
def test_exact_answers(case: dict[str, Any], engine: str, dtype: str) -> None:
    fields = dict(case["network"])
    group, filter_size = f"C{fields.pop('n')}", fields.pop("filt", 3)
    net = GroupCNN(group=group, filter_size=filter_size, **fields)
    kernel = net.kernel(VECTORS["x1"], VECTORS["x2"], engine=engine, dtype=dtype)
    assert_kernels_close(kernel, Kernel(np.array(case["nngp"]), np.array(case["ntk"])), dtype)


networks = st.builds(
    GroupCNN,
    group=st.sampled_from(GRID_GROUPS),
    depth=st.integers(1, 4),
    filter_size=st.sampled_from([3, 5]),
    padding=st.sampled_from(PADDINGS),
    activation=st.sampled_from(["relu", "erf"]),
    w_std=st.floats(0.5, 2.0),
    b_std=st.sampled_from([0.0, 0.3]),
    head=st.lists(st.sampled_from(["relu", "erf"]), max_size=2).map(tuple),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    net=networks,
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    channels=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["float64", "float32"]),
)
def test_cpu_engine_equals_the_literal_recursion(
    net: GroupCNN, height: int, width: int, channels: int, seed: int, dtype: str
) -> None:
    width = height if not keeps_rectangles(net.group) else width
    try:
        net.check_images(height, width, net.group)
    except NetworkError:
        assume(False)
    x = np.random.default_rng(seed).normal(size=(3, height, width, channels)).astype(dtype)
    expected = net.kernel(x, engine="reference")
    assert_kernels_close(net.kernel(x, engine="cpu", dtype=dtype), expected, dtype, scale=self_scale(expected))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("group", "padding", "filter_size", "activation"),
    [
        *itertools.product(["C1", "C4"], PADDINGS, [3], ["relu"]),
        *itertools.product(["C4"], PADDINGS, [3], ["erf"]),
        *itertools.product(["C2"], ["SAME"], [5], ["relu", "erf"]),
        ("C4", "CIRCULAR", 5, "relu"),
        ("D2", "SAME", 3, "relu"),
    ],
)
def test_branch_point(group: str, padding: str, filter_size: int, activation: str, dtype: str) -> None:
    """Identical, rotated, proportional, constant and zero images: c = ±1 and q = 0, where √ε lurks."""
    f = images(1, side=5, channels=1)[0]
    stripes = np.tile(f[:1], (5, 1, 1))
    special = [
        f,
        f,
        f[:, ::-1],
        3.7 * f,
        -0.3 * f,
        0 * f,
        np.full_like(f, 0.8),
        np.full_like(f, -1.3),
        np.rot90(f),
        np.rot90(f, 2),
    ]
    x = np.array([*special, stripes, 2 * stripes]).astype(dtype)
    depth = 1 if padding == "VALID" else 3
    net = GroupCNN(group=group, depth=depth, filter_size=filter_size, padding=padding, activation=activation)
    expected = net.kernel(x, engine="reference")
    assert_kernels_close(net.kernel(x, engine="cpu", dtype=dtype), expected, dtype, scale=self_scale(expected))


@pytest.mark.parametrize(("side", "filter_size"), [(1, 3), (2, 3), (4, 5), (5, 1), (8, 1)])
@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_where_nothing_averages_float32_results_are_exact_all_the_same(
    side: int, filter_size: int, activation: str
) -> None:
    f = images(1, side=side, channels=1)[0]
    special = [f, np.rot90(f), f / 2, -2 * f, np.full_like(f, 0.5), np.full_like(f, -2.0)]
    net = GroupCNN(depth=4, filter_size=filter_size, activation=activation, w_std=1.4142, b_std=1.0)
    x = np.array(special, np.float32)
    expected = net.kernel(x, engine="reference")
    assert_kernels_close(net.kernel(x, engine="cpu"), expected, "float32", scale=self_scale(expected))


@pytest.mark.parametrize(("group", "filter_size", "side"), [("C4", 3, 5), ("C4", 3, 7), ("C2", 3, 5), ("C1", 1, 5)])
def test_cancellation_in_the_pooling_does_not_hide_equal_images_from_the_head(
    group: str, filter_size: int, side: int
) -> None:
    """Pooled erf kernels nearly cancel; an image and its rotation still meet the branch point of the head."""
    net = GroupCNN(group=group, depth=1, filter_size=filter_size, activation="erf", head=("relu",))
    for seed in range(15):
        f = images(1, side, channels=1, seed=seed)
        x = np.concatenate([f, np.rot90(f, axes=(1, 2)), np.rot90(f, 2, axes=(1, 2))])
        expected = net.kernel(x, engine="reference")
        assert_kernels_close(net.kernel(x, engine="cpu", dtype="float64"), expected, "float64")
        if group == "C4":
            assert np.ptp(expected.ntk) <= 1e-12 * expected.ntk.max()


@pytest.mark.parametrize("side", [5, 7, 9, 11])
def test_constant_images_of_opposite_sign_share_nothing_through_relu(side: int) -> None:
    """Sums of many equal terms must not push c away from -1."""
    x = np.stack([np.full((side, side, 3), 0.8), np.full((side, side, 3), -1.3)])
    net = GroupCNN(group="C1", depth=1, filter_size=side, padding="CIRCULAR")
    for engine in ("reference", "cpu"):
        kernel = net.kernel(x, engine=engine, dtype="float64")
        assert kernel.nngp[0, 1] == 0
        assert kernel.ntk[0, 1] == 0


@pytest.mark.parametrize(
    ("group", "engine"), [("C4", "reference"), ("D1", "reference"), *((g, "cpu") for g in ("C4", "D1", "D2", "D4"))]
)
@pytest.mark.parametrize("padding", PADDINGS)
def test_rotating_or_mirroring_an_image_leaves_the_gram_unchanged(group: str, padding: str, engine: str) -> None:
    """The first image: over those of the second the orbit reduction averages by construction."""
    x, y = images(3, seed=1), images(2, seed=2)
    net = GroupCNN(group=group, depth=2, padding=padding, b_std=0.1, head=("relu",))
    kernel = net.kernel(x, y, engine=engine, dtype="float64")
    for element in symmetries(group)[1:]:
        moved = net.kernel(element.on_images(x), y, engine=engine, dtype="float64")
        assert_kernels_close(moved, kernel, "float64")


@pytest.mark.parametrize("group", GRID_GROUPS)
def test_what_is_not_in_the_group_changes_the_gram(group: str) -> None:
    x, y = images(3, seed=1), images(2, seed=2)
    net = GroupCNN(group=group, depth=2)
    for element in set(symmetries("D4")) - set(symmetries(group)):
        assert not np.allclose(net.kernel(element.on_images(x), y).ntk, net.kernel(x, y).ntk, rtol=1e-3)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("group", GRID_GROUPS[1:])
def test_group_kernel_is_the_mean_of_plain_kernels_over_rotated_and_mirrored_images(group: str, padding: str) -> None:
    x, y = images(2, seed=3), images(3, seed=4)
    fields: dict[str, Any] = {"depth": 2, "padding": padding, "w_std": 1.3, "b_std": 0.2}
    plain = [
        GroupCNN(group="C1", **fields).kernel(x, element.on_images(y), engine="reference")
        for element in symmetries(group)
    ]
    mean = Kernel(*(np.mean(values, axis=0) for values in zip(*plain, strict=True)))
    assert_kernels_close(GroupCNN(group=group, **fields).kernel(x, y, engine="reference"), mean, "float64")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("head", [(), ("relu",)])
def test_gram_matrix_is_symmetric_and_positive_semidefinite(head: tuple[str, ...], dtype: str) -> None:
    x = np.concatenate([images(8, side=8), np.rot90(images(4, side=8), axes=(1, 2))])
    kernel = GroupCNN(group="C4", head=head).kernel(x, dtype=dtype)
    for values in kernel:
        assert values.dtype == dtype
        np.testing.assert_array_equal(values, values.T)
        eigenvalues = np.linalg.eigvalsh(values.astype(np.float64))
        assert eigenvalues[0] >= -1e-6 * eigenvalues[-1]


def test_all_groups_come_from_one_pass() -> None:
    x, y = images(3), images(2, seed=1)
    net = GroupCNN(group="C4", depth=2, head=("relu",))
    together = net.kernel(x, y, groups=["C1", "D4", "C2", "D1", "C4", "C2"])
    assert list(together) == ["C1", "D4", "C2", "D1", "C4"]
    for group, kernel in together.items():
        alone = net.model_copy(update={"group": group}).kernel(x, y)
        np.testing.assert_array_equal(kernel.nngp, alone.nngp)
        np.testing.assert_array_equal(kernel.ntk, alone.ntk)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("group", ["C4", "D4"])
def test_bits_depend_neither_on_the_other_images_nor_on_threads(group: str, padding: str, dtype: str) -> None:
    x = images(7, side=9)
    net = GroupCNN(group=group, depth=2, padding=padding, head=("relu", "gelu", "erf"))
    whole = net.kernel(x, dtype=dtype)
    for threads in (1, 3):
        np.testing.assert_array_equal(net.kernel(x, dtype=dtype, threads=threads).ntk, whole.ntk)
        function = KernelFunction(net, (group,), dtype=dtype, threads=threads)
        top, bottom = function.prepare(x[:3]), function.prepare(x[3:])
        np.testing.assert_array_equal(function(top)[group].ntk, whole.ntk[:3, :3])
        np.testing.assert_array_equal(function(top, bottom)[group].ntk, whole.ntk[:3, 3:])
        np.testing.assert_array_equal(function(top, bottom)[group].nngp, whole.nngp[:3, 3:])
    for i in range(len(x)):
        one = net.kernel(x[i : i + 1], x, dtype=dtype)
        np.testing.assert_array_equal(one.ntk[:, i:], whole.ntk[i : i + 1, i:])
        np.testing.assert_array_equal(net.kernel(x[i : i + 1], x[-1:], dtype=dtype).nngp, whole.nngp[i : i + 1, -1:])


@pytest.mark.parametrize("side", [1, 7, 15])
@pytest.mark.parametrize("activation", [Custom(np.tanh, 33), "hermite(3)", "gelu"], ids=["custom", "hermite", "gelu"])
def test_bits_of_every_activation_are_those_of_the_pair_alone(activation: Any, side: int) -> None:
    x = images(20, side=side)
    net = GroupCNN(group="C1", depth=1, activation=activation, w_std=1.2)
    whole = net.kernel(x[:1], x, dtype="float64")
    for begin in (19, 16, 7):
        np.testing.assert_array_equal(net.kernel(x[:1], x[begin:], dtype="float64").ntk, whole.ntk[:, begin:])
    limit = 2 * net.explain(x.shape[1:], dtype="float64").pair_bytes
    np.testing.assert_array_equal(net.kernel(x[:1], x, dtype="float64", memory_limit=limit).ntk, whole.ntk)


LONG_CALL = """
import _thread, signal, threading, time
import numpy as np
from equikernel import GroupCNN

signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been ignored by what started the tests
net = GroupCNN(group="D4", depth={depth})
net.kernel(np.ones((1, 8, 8, 3)))
begun = threading.Timer(1.0, _thread.interrupt_main)
begun.start()
start = time.perf_counter()
try:
    net.kernel(np.ones(({count}, {side}, {side}, 3)), threads={threads})
except KeyboardInterrupt:
    print("interrupted", time.perf_counter() - start < 10)
"""


@pytest.mark.parametrize(
    ("count", "side", "depth", "threads"),
    [(2000, 32, 3, 2), (1, 160, 50, 1)],
    ids=["pairs, two threads", "one pair, one thread"],
)
def test_a_call_of_many_minutes_can_be_interrupted(count: int, side: int, depth: int, threads: int) -> None:
    program = LONG_CALL.format(count=count, side=side, depth=depth, threads=threads)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted True\n", "")


def test_two_sets_equal_one_set_with_itself() -> None:
    x = images(5)
    net = GroupCNN(group="C4", depth=2)
    one, two = net.kernel(x, dtype="float64"), net.kernel(x, x, dtype="float64")
    assert_kernels_close(two, one, "float64")


@pytest.mark.parametrize("height", [3, 40])
def test_wide_and_tall_images(height: int) -> None:
    """Rows of more offsets than fit side by side, and of odd lengths."""
    x = np.random.default_rng(0).normal(size=(2, height, 43 - height, 1))
    net = GroupCNN(group="C2", depth=2)
    assert_kernels_close(net.kernel(x, dtype="float64"), net.kernel(x, engine="reference"), "float64")


def test_many_offsets_side_by_side_in_several_blocks() -> None:
    x = np.random.default_rng(0).normal(size=(1, 1, 300, 1))
    net = GroupCNN(group="C2", depth=2)
    assert_kernels_close(net.kernel(x, dtype="float64"), net.kernel(x, engine="reference"), "float64")


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
def test_errors_of_float32_do_not_add_up_through_layers(padding: Padding) -> None:
    """Also of an image with itself; the promise is 2e-6, and the NTK with CIRCULAR padding is the hardest."""
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3))
    net = GroupCNN(group="C1", depth=40, w_std=2**0.5, padding=padding)
    for rounded, exact in zip(net.kernel(x), net.kernel(x, dtype="float64"), strict=True):
        np.testing.assert_allclose(rounded, exact, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, ">f8", bool])
def test_any_real_dtype_is_an_image(dtype: Any) -> None:
    x = np.random.default_rng(0).integers(0, 2, size=(2, 4, 4, 1)).astype(dtype)
    net = GroupCNN(depth=1)
    np.testing.assert_array_equal(net.kernel(x).ntk, net.kernel(x.astype(np.float64)).ntk)
    assert_kernels_close(net.kernel(x, dtype="float64"), net.kernel(x, engine="reference"), "float64")


def test_the_input_is_left_alone() -> None:
    x = images(2)
    before = x.copy()
    GroupCNN().kernel(x)
    np.testing.assert_array_equal(x, before)


def test_reference_accepts_any_dtype_and_computes_in_float64() -> None:
    kernel = GroupCNN(depth=1).kernel(images(2), engine="reference", dtype="float16")
    assert kernel.nngp.dtype == np.float64


@pytest.mark.parametrize(
    ("x1", "x2", "message"),
    [
        (np.zeros((2, 3, 3)), None, r"x1 has shape \(2, 3, 3\); images are \(n, height, width, channels\)"),
        (np.zeros((0, 3, 3, 1)), None, "holds no pixels"),
        ([[1, 2], [3]], None, r"x1 is no array \(.*\); images are \(n, height, width, channels\)"),
        (
            np.full((2, 3, 3, 1), [[[[0]]], [[[np.nan]]]]),
            None,
            r"x1\[1\] has NaN or infinite pixels, the first at \[0, 0, 0\]",
        ),
        (
            np.zeros((2, 3, 4, 1)),
            None,
            "images are 3x4 pixels, but C4 turns them by other than half turns and needs square",
        ),
        (np.zeros((2, 3, 3, 1)), np.zeros((2, 4, 4, 1)), "x1 has images of 3x3x1, x2 of 4x4x1"),
        (np.zeros((2, 3, 3, 1), dtype=complex), None, "x1 has dtype complex128"),
        (np.full((1, 3, 3, 1), 1e30), None, r"the largest pixel of x1\[0\] is 1e\+30"),
        (np.full((1, 3, 3, 1), 1e-30), None, r"the largest pixel of x1\[0\] is 1e-30"),
    ],
)
def test_unusable_images(x1: Array, x2: Array | None, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        GroupCNN(depth=1).kernel(x1, x2)


def test_unusable_engine_dtype_and_network() -> None:
    x = images(1, side=6)
    with pytest.raises(EngineError, match=r"engine 'cpuu' does not exist; choose .*did you mean 'cpu'"):
        GroupCNN().kernel(x, engine="cpuu")
    for dtype in ("float16", None):
        with pytest.raises(EngineError, match=f"dtype {dtype!r} does not exist"):
            GroupCNN().kernel(x, dtype=dtype)
    for threads in (0, 1.5, "2", True):
        with pytest.raises(EngineError, match=f"threads = {threads!r}; give a whole number, 1 or more"):
            GroupCNN().kernel(x, threads=cast("Any", threads))
    with pytest.raises(NetworkError, match="VALID padding eats the image: 3 convolutions of size 3 remove 6 of 6"):
        GroupCNN(padding="VALID").kernel(x)
    with pytest.raises(NetworkError, match="CIRCULAR padding: a filter of 7 pixels wraps around the 6 there"):
        GroupCNN(padding="CIRCULAR", filter_size=7).kernel(x)
    with pytest.raises(NetworkError, match="filter_size: 4 is even"):
        GroupCNN(filter_size=4)


def test_masked_images_are_refused() -> None:
    x = images(1)
    with pytest.raises(ImageError, match="x1 is a masked array, and kernels know no missing pixels"):
        GroupCNN().kernel(np.ma.masked_array(x, mask=x > 0))


def test_unusable_groups() -> None:
    with pytest.raises(NetworkError, match="groups = 4 is no list of names; choose of C1, C2, C4, D1, D2, D4"):
        GroupCNN().kernel(images(1), groups=cast("Any", 4))
    for group, message in (
        ("D3", "'D3' is not allowed; choose of C1, C2, C4, D1, D2, D4"),
        ("c4", "did you mean 'C4'"),
    ):
        with pytest.raises(NetworkError, match=message):
            GroupCNN().kernel(images(1), groups=["C1", group])
    with pytest.raises(NetworkError, match="groups: the list is empty; choose of C1,"):
        GroupCNN().kernel(images(1), groups=[])


def test_the_reference_refuses_what_no_memory_holds() -> None:
    message = r"the engine 'reference' needs \d+\.\d TiB for a pair of 999x999x1 images, and may use \d+\.\d GiB"
    with pytest.raises(MemoryLimitError, match=message):
        GroupCNN(depth=1).kernel(np.ones((1, 999, 999, 1)), engine="reference")


def test_a_kernel_that_overflows_is_refused() -> None:
    message = r"the C4 nngp of x1\[0\] and x1\[0\] is inf: the values leave the range of float32"
    with pytest.raises(NonFiniteKernelError, match=message):
        GroupCNN(depth=1, head=("relu",), w_std=1e6).kernel(1e9 * images(2))


@pytest.mark.parametrize("engine", ["cpu", "xla", "general", "reference"])
def test_a_variance_out_of_range_is_refused(engine: str) -> None:
    """Not rounded away: too large, or so small that float32 would lose its digits."""
    x = images(2, side=7)
    x[1] *= 1e3
    deep = GroupCNN(group="C1", depth=30, w_std=1e6)
    with pytest.raises(
        ImageError, match=r"the kernel of x2\[\d\] with itself is .*e\+\d+ at convolution \d+, out of the "
    ):
        deep.kernel(1e-110 * x, x, engine=engine, dtype="float64")
    narrow = GroupCNN(group="C1", depth=30, w_std=1e-6)
    with pytest.raises(
        ImageError, match=r"the kernel of x1\[0\] with itself is .*e-\d+ at convolution \d+, out of the "
    ):
        narrow.kernel(x, engine=engine)


def test_a_kernel_below_the_range_of_the_result_is_refused() -> None:
    message = (
        r"the kernel of x1\[0\] with itself is at most .*e-\d+ after the head, below the range of float32, 1.2e-38"
    )
    net = GroupCNN(group="C1", depth=2, w_std=1e-3, head=["relu"] * 6)
    with pytest.raises(ImageError, match=message):
        net.kernel(images(1))
    assert 0 < net.kernel(images(1), dtype="float64").nngp[0, 0] < 1e-38
    assert net.kernel(0 * images(1)).ntk[0, 0] == 0
