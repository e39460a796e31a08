"""The code for vectors: its dual kernels, that it computes with vectors only, and on narrower ones than there are."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from floor import without_avx512
from hypothesis import given, settings
from hypothesis import strategies as st

from equikernel import Activation as Nonlinear
from equikernel import Conv, Custom, GroupCNN, NetworkError, Residual
from equikernel.activations import NAMED, RELU, Activation, Homogeneous, parse
from equikernel.engines import duals
from equikernel.engines.cpu import CpuEngine
from equikernel.engines.decoupled import Offsets, nonnegative_inputs, useful_offsets
from equikernel.engines.duals import Factors
from equikernel.engines.vectors import CACHE_LINE, Module, Target, aligned, host
from equikernel.images import Labels

X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="looks for x86-64 instructions")


def narrower() -> list[Target]:
    """The processor of this machine with all vectors it has, and with less."""
    targets = [host()]
    if platform.machine() in ("x86_64", "AMD64"):
        targets += [without_avx512()] if host().vector_bytes == 64 else []
        targets.append(Target("x86-64", "", 16))
    return targets


@X86
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [*NAMED, "hermite(5)", "custom"])
def test_the_code_computes_with_whole_vectors(name: str, dtype: str) -> None:
    """A scalar root, or halved vectors, would cost a factor of two to sixteen, and nothing else would show it."""
    activation = Custom(lambda x: np.tanh(x / 4), 12) if name == "custom" else name
    engine = CpuEngine(GroupCNN(depth=3, activation=activation), ("C1",), np.dtype(dtype), 1, 10**9)
    assembly = engine.program(16, 16, 3).compiled.assembly
    width = {64: "zmm", 32: "ymm", 16: "xmm"}[host().vector_bytes]
    arithmetic = re.findall(r"\tv?(?:mul|add|sub|fn?m\w+|sqrt)(p[sd]|s[sd])\t.*%([xyz]mm)", assembly)
    packed = [(kind, register) for kind, register in arithmetic if kind[0] == "p"]
    assert len(packed) > 20
    narrow = {(kind, register) for kind, register in packed if register != width}
    assert narrow <= ({("pd", "ymm"), ("pd", "xmm")} if dtype == "float32" else set())  # the sums, in float64
    assert len(arithmetic) - len(packed) < len(packed) / 5  # what is the same in all lanes LLVM computes once
    assert not re.search(r"\tv?sqrts[sd]\t", assembly)


def test_layers_that_are_alike_share_code() -> None:
    """Else a deep network would take long to compile, and its code would not stay in the cache."""
    sizes = {}
    for depth in (10, 40):
        engine = CpuEngine(GroupCNN(depth=depth), ("C1",), np.dtype(np.float32), 1, 10**9)
        sizes[depth] = len(engine.program(16, 16, 3).compiled.assembly)
    assert sizes[40] < 1.5 * sizes[10]


def one_vector(
    activation: Activation,
    k: Any,
    q1: Any,
    q2: Any,
    dtype: type[np.floating],
    target: Target,
    *,
    nonnegative: bool = False,
) -> tuple[Any, Any]:
    """K and K̇ of covariances ``k`` and variances ``q1``, ``q2``, ``(n,)`` each, in vectors of ``target``."""
    module = Module(np.dtype(dtype), target)
    f = module.function("duals", "ppppi")
    values, derivatives, x, y, count = f.parameters
    planes = len(activation.factors(np.ones(1)))
    with f.loop(count) as i:
        # One entry at a time, so that the first image may have another pixel for each.
        here = i * f.lanes
        factors = Factors(x + i, y + here, len(k), len(k) * f.lanes, aligned=True)
        k_in, theta = f.load(values + here), f.vector(1)
        branch = 4 * float(np.finfo(dtype).eps)
        nngp, slope = duals.emit(f, activation, k_in, theta, factors, branch, nonnegative=nonnegative)
        f.store(nngp, values + here)
        f.store(slope, derivatives + here)
    f.end()
    compiled = module.compile("duals")

    def lanes(array: Any) -> Any:
        wide = aligned(np.size(array) * f.lanes, dtype)
        wide[:] = np.repeat(np.asarray(array, dtype).ravel(), f.lanes)
        return wide

    kernel, derivative = lanes(k), aligned(len(k) * f.lanes, dtype)
    first = np.ascontiguousarray(np.concatenate(activation.factors(q1)), dtype)
    second = lanes(np.concatenate(activation.factors(q2)))
    assert len(first) == planes * len(k)
    compiled.call(*(a.ctypes.data for a in (kernel, derivative, first, second)), len(k))
    by_lane = [array.reshape(len(k), f.lanes) for array in (kernel, derivative)]
    for array in by_lane:
        np.testing.assert_array_equal(array, np.repeat(array[:, :1], f.lanes, axis=1))
    return by_lane[0][:, 0], by_lane[1][:, 0]


@pytest.mark.parametrize("target", narrower(), ids=lambda target: f"{target.vector_bytes} bytes")
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1.5e-7), (np.float64, 4e-16)])
def test_relu_is_the_arc_cosine_kernel(dtype: type[np.floating], tolerance: float, target: Target) -> None:
    """With q = 1: (√(1-c²) + (π - arccos c) c) / 2π and (π - arccos c) / 2π, exactly 1/2 and 0 at the ends."""
    c = np.concatenate([np.linspace(-1, 1, 2049), [0.0, -0.0]]).astype(dtype)
    nngp, derivative = one_vector(RELU, c, np.ones(len(c)), np.ones(len(c)), dtype, target)
    exact = c.astype(np.longdouble)
    angle = np.longdouble(np.pi) - np.arccos(exact)
    arc_cosine = (np.sqrt(1 - exact**2) + angle * exact) / (2 * np.longdouble(np.pi))
    np.testing.assert_allclose(nngp, arc_cosine.astype(dtype), atol=tolerance, rtol=0)
    np.testing.assert_allclose(derivative, angle / (2 * np.longdouble(np.pi)), atol=tolerance, rtol=0)
    assert nngp[2048] == derivative[2048] == 0.5
    assert nngp[0] == derivative[0] == 0


@pytest.mark.parametrize("target", narrower(), ids=lambda target: f"{target.vector_bytes} bytes")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu(0.1)", "leaky_relu(-2)", "abs"])
def test_the_sign_of_a_correlation_that_is_not_negative_may_be_left_out(
    activation: str, dtype: type[np.floating], target: Target
) -> None:
    """Also where rounding errors have made it negative."""
    eps = np.finfo(dtype).eps
    c = np.concatenate([np.linspace(0, 1, 2049), [-0.0, -eps / 8, -100 * eps, 1 + eps]]).astype(dtype)
    ones = np.ones(len(c))
    usual = one_vector(parse(activation), c, ones, ones, dtype, target)
    found = one_vector(parse(activation), c, ones, ones, dtype, target, nonnegative=True)
    for values, expected in zip(found, usual, strict=True):
        np.testing.assert_allclose(values, expected, atol=8 * eps * expected.max(), rtol=0)
        assert values[2048] == values[-1] == expected[2048]


def test_which_covariances_cannot_be_negative() -> None:
    deep, residual = GroupCNN(depth=3), GroupCNN(layers=[Conv(3), Residual([Conv(3), Conv(1)]), Conv(3)])
    assert nonnegative_inputs(deep.steps) == (False, True, True)
    assert nonnegative_inputs(residual.steps) == (False, True, True)
    mixed = [Conv(3, activation=name) for name in ("leaky_relu(0.1)", "relu", "leaky_relu(-2)", "identity", "gelu")]
    assert nonnegative_inputs(GroupCNN(layers=[*mixed, Conv(3)]).steps) == (False, False, True, True, False)
    # The sum with what went past the branch has its sign, too.
    past = [Conv(3, activation="identity"), Residual([Nonlinear("relu"), Conv(3)]), Nonlinear("relu"), Conv(3)]
    assert nonnegative_inputs(GroupCNN(layers=past).steps) == (False, False, True)


@pytest.mark.parametrize("name", ["relu", "leaky_relu(0.1)", "leaky_relu(-0.5)", "leaky_relu(-2)", "abs", "identity"])
def test_dual_kernels_are_not_negative_where_that_is_relied_on(name: str) -> None:
    activation = parse(name)
    assert isinstance(activation, Homogeneous)
    c, ones = np.linspace(-1, 1, 1001), np.ones(1001)
    nngp, _ = activation.dual(c, ones, ones)
    assert nngp[c >= 0].min() >= 0
    assert (nngp.min() >= 0) == activation.has_one_sign


@pytest.mark.parametrize("target", narrower(), ids=lambda target: f"{target.vector_bytes} bytes")
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 3e-6), (np.float64, 3e-14)])
@pytest.mark.parametrize("name", [*NAMED, "leaky_relu(0.1)", "leaky_relu(-2)", "hermite(5)", "monomial(2)", "custom"])
def test_each_activation_has_its_dual_kernel(
    name: str, dtype: type[np.floating], tolerance: float, target: Target
) -> None:
    """Relative to √(E[σ(u)²] E[σ(v)²]), and for K̇ to the largest one, also for ``c = ±1`` and ``q = 0``."""
    activation = Custom(lambda x: np.tanh(x / 4), 40) if name == "custom" else parse(name)
    rng = np.random.default_rng(0)
    q1, q2 = np.exp(rng.uniform(-6, 1.5, (2, 2000)))
    c = np.concatenate([rng.uniform(-1, 1, 1800), 1 - np.logspace(-3, -16, 100), np.logspace(-3, -16, 100) - 1])
    q1[:20] = 0
    q2[10:30] = 0
    q1, q2 = q1.astype(dtype).astype(np.float64), q2.astype(dtype).astype(np.float64)
    k = (c * np.sqrt(q1 * q2)).astype(dtype)
    nngp, derivative = one_vector(activation, k, q1, q2, dtype, target)
    exact, slope = activation.dual(k.astype(np.float64), q1, q2, np.finfo(dtype).eps)
    scale = np.sqrt(activation.moment(q1) * activation.moment(q2))
    moderate = np.abs(c) < 0.99  # nearer to ±1, rounding k alone moves K̇ by its root
    np.testing.assert_array_less(np.abs(nngp - exact), tolerance * scale + np.finfo(dtype).tiny)
    np.testing.assert_array_less(np.abs(derivative - slope)[moderate], (10 * tolerance * np.abs(slope).max()))


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 0.02, 1.0, 300.0, 1e9])
@pytest.mark.parametrize("target", narrower(), ids=lambda target: f"{target.vector_bytes} bytes")
def test_the_arc_cosine_kernel_takes_any_scale(scale: float, target: Target) -> None:
    activation = Homogeneous("scaled", 0.0, (scale / 2) ** 0.5)
    c = np.linspace(-1, 1, 513).astype(np.float32)
    nngp, derivative = one_vector(activation, c, np.ones(len(c)), np.ones(len(c)), np.float32, target)
    exact, slope = activation.dual(c.astype(np.float64), np.ones(len(c)), np.ones(len(c)), 1e-7)
    np.testing.assert_allclose(nngp, exact, atol=3e-7 * scale)
    np.testing.assert_allclose(derivative, slope, atol=3e-7 * scale)


NETWORKS = {
    "SAME": GroupCNN(depth=2),
    "VALID": GroupCNN(depth=2, padding="VALID"),
    "CIRCULAR": GroupCNN(depth=2, padding="CIRCULAR"),
    "5x5": GroupCNN(depth=2, filter_size=5, b_std=0.2),
    "1x1": GroupCNN(depth=2, filter_size=1),
    "residual": GroupCNN(layers=(Conv(3), Residual([Conv(3, activation="erf"), Conv(3)]), Conv(3))),
}


@pytest.mark.parametrize("target", narrower()[1:], ids=lambda target: f"{target.vector_bytes} bytes")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("side", [7, 8, 17])
def test_narrower_vectors_give_the_same_kernels(name: str, side: int, target: Target) -> None:
    """Machines without AVX-512 or AVX2 are rarely at hand; their code is here, on fewer lanes."""
    images = np.random.default_rng(0).normal(size=(3, side, side, 2)).astype(np.float32)
    rows, cols = np.triu_indices(3)
    for dtype, tolerance in ((np.float32, 5e-6), (np.float64, 1e-12)):
        results = []
        for candidate in (host(), target):
            engine = CpuEngine(NETWORKS[name], ("C4",), np.dtype(dtype), 1, 10**9, candidate)
            prepared = engine.prepare(images, Labels("images", 0))
            results.append(np.stack(engine.pairs(prepared, prepared, rows, cols)["C4"]))
        np.testing.assert_allclose(results[1], results[0], rtol=tolerance)


@given(st.integers(1, 80), st.integers(0, 40))
@settings(deadline=None)
def test_offsets_are_those_with_pixels_that_valid_padding_leaves(side: int, margin: int) -> None:
    if 2 * margin >= side:
        return
    found = sorted(useful_offsets(side, margin).numbers)
    assert found == [d for d in range(side) if max(side - d, d) > 2 * margin]
    assert useful_offsets(8, 2) == Offsets(5, 7, 8)


@pytest.mark.parametrize("count", [1, 15, 16, 1000])
def test_memory_for_vectors_begins_at_a_cache_line(count: int) -> None:
    array = aligned(count, np.float32)
    assert array.ctypes.data % CACHE_LINE == 0
    assert len(array) == count
    assert not array.any()


def test_the_first_kernel_of_a_process_takes_no_time_to_speak_of() -> None:
    """There is no cache on disk, to share or to go stale, so compiling must be quick. It takes 0.2 s."""
    code = (
        "import sys, time, numpy as np; from equikernel import GroupCNN; x = np.ones((2, 8, 8, 3)); "
        "start = time.process_time(); GroupCNN(depth=3).kernel(x, engine='cpu'); "
        "print(time.process_time() - start, 'numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    seconds, numba = done.stdout.split()
    assert float(seconds) < 4  # of processor time, with the imports of the engine: on any machine
    assert numba == "False"


@pytest.mark.parametrize(("side", "w_std", "b_std", "activation"), [
    (7, 1.0, 0.0, "relu"), (7, 1.0, 0.1, "relu"), (7, 2**0.5, 0.0, "relu"), (8, 1.0, 0.1, "abs"),
    (7, 1.1, 0.0, "leaky_relu(0.3)"),
])  # fmt: skip
def test_images_with_themselves_are_at_the_branch_point(side: int, w_std: float, b_std: float, activation: str) -> None:
    """There a rounding error of ``c`` that is not recognised costs half of the digits of the NTK."""
    x = np.random.default_rng(0).standard_normal((24, side, side, 2))
    net = GroupCNN(group="C1", w_std=w_std, b_std=b_std, activation=activation)
    exact, ours = (net.kernel(x, engine=engine, dtype="float64") for engine in ("reference", "cpu"))
    np.testing.assert_allclose(np.diag(ours.ntk), np.diag(exact.ntk), rtol=1e-13)


def test_weights_out_of_range_are_refused() -> None:
    net = GroupCNN(group="C1", layers=[Conv(3, w_std=1e-22), Conv(3)])
    x = 1e14 * np.random.default_rng(0).standard_normal((2, 8, 8, 1))
    with pytest.raises(NetworkError, match=r"convolution 1: the weights, .* = 1.11e-45, leave the range of float32"):
        net.kernel(x, engine="cpu")
    exact = net.kernel(x, engine="reference")
    np.testing.assert_allclose(net.kernel(x, engine="cpu", dtype="float64").ntk, exact.ntk, rtol=1e-12)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_may_fork_while_another_thread_compiles() -> None:
    code = """
import os, threading, numpy as np
from equikernel import GroupCNN

x = np.ones((1, 5, 5, 1))
GroupCNN(group="C1", depth=1).kernel(x, engine="cpu")  # imports what is imported when it is needed

def compile_many():
    for depth in range(1, 16):
        GroupCNN(group="C1", depth=depth).kernel(x, engine="cpu", threads=1)

thread = threading.Thread(target=compile_many)
thread.start()
for number in range(4):
    child = os.fork()
    if child == 0:
        GroupCNN(group="C1", depth=20 + number).kernel(x, engine="cpu", threads=1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
thread.join()
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "done\n"


GUARDED = """
import ctypes, json, mmap, sys
import numpy as np
from equikernel import Conv, GroupCNN, Residual
from equikernel.engines import cpu
from equikernel.engines.vectors import Target
from equikernel.images import Labels

PAGE = mmap.PAGESIZE
protect = ctypes.CDLL(None, use_errno=True).mprotect
protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
target, kept, at_the_end = Target(*json.loads(sys.argv[1])), [], False

def guarded(count, dtype):
    size = count * np.dtype(dtype).itemsize
    inner = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, inner + 2 * PAGE)
    kept.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + inner):
        assert protect(page, PAGE, 0) == 0
    return np.frombuffer(memory, dtype, count, PAGE + (inner - size if at_the_end else 0))

def copy(array, room):
    found = guarded(array.size + room, array.dtype)[: array.size].reshape(array.shape)
    found[...] = array
    return found

def aligned(count, dtype):
    entries = 64 // np.dtype(dtype).itemsize
    return guarded(-(-count // entries) * entries, dtype)

cpu.aligned = aligned
nets = [
    dict(depth=2), dict(depth=2, padding="VALID"), dict(depth=2, padding="CIRCULAR"), dict(depth=1, filter_size=5),
    dict(layers=[Conv((1, 5)), Residual([Conv((3, 1)), Conv(3)])], activation="gelu"), dict(depth=2, activation="sin"),
]
for fields in nets:
    for dtype in (np.float32, np.float64):
        for shape in ((5, 7, 1), (6, 16, 2), (5, 32, 1), (7, 33, 3), (5, 48, 1), (33, 5, 1)):
            net = GroupCNN(group="C2", **fields)
            engine = cpu.CpuEngine(net, ("C2",), np.dtype(dtype), 1, 2**30, target)
            x = np.random.default_rng(0).normal(size=(3, *shape)).astype(dtype)
            images = engine.prepare(x, Labels("x"))
            usual = engine.pairs(images, images, *np.triu_indices(3))["C2"]
            room = engine.target.lanes(np.dtype(dtype))
            for at_the_end in (False, True):
                for element, packed in images.packed.items():
                    images.packed[element] = copy(packed, room)
                found = engine.pairs(images, images, *np.triu_indices(3))["C2"]
                assert all(np.array_equal(a, b) for a, b in zip(found, usual)), (fields, shape)
            kept.clear()
print("touched nothing else")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library for pages that nobody may touch")
@pytest.mark.parametrize("target", narrower(), ids=lambda target: f"{target.vector_bytes} bytes")
def test_the_code_touches_only_its_memory(target: Target) -> None:
    """Images and scratch memory lie between pages that end the process; uninitialized memory would show as well.

    At the beginning of what is allowed, then at its end.
    """
    fields = json.dumps([target.cpu, target.features, target.vector_bytes])
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, fields], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout == "touched nothing else\n", f"exit code {done.returncode}: {done.stderr}"
