"""The GPU engine: the source of its kernels run on the CPU in lockstep; ``make gpu-code`` compiles it."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import gpu as bench
import numpy as np
import pytest
from lockstep import Lockstep
from numpy.typing import NDArray
from test_engines import DECOUPLED, TOLERANCE, assert_close, expected, special_images

from equikernel import Activation, Conv, EngineError, GroupCNN, MemoryLimitError, Residual
from equikernel import kernel as kernels
from equikernel.engines import gpu, gpu_source
from equikernel.engines.gpu import GpuEngine
from equikernel.engines.gpu_source import choose_columns, kernel_source, layout, why_not
from equikernel.kernel import Kernel, KernelFunction, choose_engine
from equikernel.worker import TileWorker, processor_kind

RESNET = (
    Conv(3, activation="identity"),
    Residual([Activation("gelu"), Conv(3, w_std=1.2), Residual([Conv((5, 3))]), Conv(1)]),
    Activation("relu"),
    Conv((1, 5), b_std=0.4, activation="sin"),
)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Lockstep:
    """A device in place of a GPU."""
    lockstep = Lockstep()
    on_this(lockstep, monkeypatch)
    return lockstep


def on_this(device: Lockstep, monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(name: str, network: Any, groups: Any, dtype: Any, threads: int, memory: int) -> Any:
        return GpuEngine(network, groups, dtype, memory // 2, device) if name == "gpu" else others(
            name, network, groups, dtype, threads, memory
        )  # fmt: skip

    others = kernels._engine
    monkeypatch.setattr(kernels, "_engine", engine)


def images(count: int, shape: tuple[int, int, int], seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(count, *shape))


def check(net: GroupCNN, shape: tuple[int, int, int], dtype: str = "float64", count: int = 2) -> None:
    x = images(count, shape)
    assert_close(net.kernel(x, engine="gpu", dtype=dtype), net.kernel(x, engine="reference"), dtype)


@pytest.mark.parametrize("shared", [0, 10**6], ids=["global memory", "shared memory"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", DECOUPLED)
def test_the_fused_kernel_is_the_literal_recursion(
    name: str, dtype: str, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_this(Lockstep(shared), monkeypatch)
    net, shape = DECOUPLED[name]
    kernel = net.kernel(special_images(shape), engine="gpu", dtype=dtype)
    assert kernel.engine == "gpu"
    assert kernel.nngp.dtype == kernel.ntk.dtype == dtype
    assert_close(kernel, expected(name), dtype)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR"])
@pytest.mark.parametrize("columns", [1, 2, 3, 5, 11])
def test_columns_may_be_dealt_to_lanes_in_any_way(
    padding: Any, columns: int, device: Lockstep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters that reach beyond the neighbouring lane among them, and a single lane."""
    width = columns * -(-6 // columns) if padding == "CIRCULAR" else 11
    monkeypatch.setattr(gpu_source, "choose_columns", lambda *_: columns)
    kernel_source.cache_clear()
    net = GroupCNN(group="C1", layers=[Conv((3, 5)), Conv(1), Conv((5, 3), activation="erf")], padding=padding)
    check(net, (8, width, 2))
    kernel_source.cache_clear()


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR"])
def test_vertical_offsets_may_be_cut_into_chunks_of_unequal_size(
    padding: Any, device: Lockstep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_source, "STEPS", 40)
    monkeypatch.setattr(gpu_source, "WARPS", 3)
    kernel_source.cache_clear()
    net = GroupCNN(group="C2", depth=2, padding=padding)
    plan = layout(net.steps, padding, (11, 9, 1), "float64")
    assert plan.chunks > 1
    assert plan.chunk * plan.chunks > len(plan.down)
    check(net, (11, 9, 1))
    kernel_source.cache_clear()


@pytest.mark.parametrize("activation", ["relu", "leaky_relu(-0.3)", "abs", "erf", "gelu", "sin", "cos", "hermite(3)"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_activation(activation: str, dtype: str, device: Lockstep) -> None:
    check(GroupCNN(group="C1", depth=2, activation=activation, w_std=1.3, b_std=0.2), (7, 8, 2), dtype)


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
@pytest.mark.parametrize("width", [9, 11])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_what_does_not_count_may_be_infinite(dtype: str, width: int, padding: Any, device: Lockstep) -> None:
    """Between two planes, and in lanes that no row needs, covariances may belong to no images, and grow."""
    x = images(2, (6, width, 1))
    x[:, 2] *= 255
    x[:, :, 0] *= 255
    net = GroupCNN(group="C1", depth=12, activation="gelu", padding=padding)
    assert_close(net.kernel(x, engine="gpu", dtype=dtype), net.kernel(x, engine="cpu", dtype="float64"), dtype)


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
def test_branches_with_filters_of_any_shape(padding: Any, device: Lockstep) -> None:
    check(GroupCNN(group="D2", layers=RESNET, padding=padding, b_std=0.1), (7, 6, 2))


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_network_deeper_than_the_image_is_high(padding: Any, dtype: str, device: Lockstep) -> None:
    """Several planes are in the pipeline at once."""
    x = images(2, (7, 6, 1))
    net = GroupCNN(group="C2", depth=21, padding=padding, w_std=2**0.5)
    assert_close(net.kernel(x, engine="gpu", dtype=dtype), net.kernel(x, engine="cpu", dtype="float64"), dtype)


def test_float32_keeps_its_digits_with_depth(device: Lockstep) -> None:
    """What is rounded off the scale of one layer, the next gives back."""
    x = images(2, (12, 12, 2)).astype(np.float32)
    x = np.concatenate([x, 2 * x[:1]])
    net = GroupCNN(group="C1", depth=21, w_std=2**0.5)
    exact = net.kernel(x, engine="cpu", dtype="float64")
    for values, truth in zip(net.kernel(x, engine="gpu"), exact, strict=True):
        np.testing.assert_allclose(values, truth, rtol=1e-6)


def test_several_groups_come_from_one_pass(device: Lockstep) -> None:
    x = images(2, (6, 6, 2))
    net = GroupCNN(group="C4", depth=2, padding="CIRCULAR", activation="leaky_relu(0.2)", head=("relu",))
    for group, kernel in net.kernel(x, engine="gpu", dtype="float64", groups=("C1", "C4", "D1")).items():
        exact = net.model_copy(update={"group": group}).kernel(x, engine="reference")
        assert_close(kernel, exact, "float64")


def test_the_bits_of_a_pair_do_not_depend_on_what_else_is_computed(
    device: Lockstep, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, net = images(9, (7, 9, 1)), GroupCNN(group="C2", depth=2)
    whole = net.kernel(x, engine="gpu")
    launched = len(device.launches)
    monkeypatch.setattr(gpu, "SCRATCH", 500)  # a few pairs at a time
    monkeypatch.setattr(device, "rate", 1.0)  # and one block per launch
    cut = net.kernel(x, engine="gpu")
    assert len(device.launches) > 40 * launched
    alone = net.kernel(x[3:4], x[5:6], engine="gpu")
    for values, same, one in zip(whole, cut, alone, strict=True):
        np.testing.assert_array_equal(values, same)
        assert values[3, 5] == one[0, 0]


def test_a_row_that_no_warp_holds_is_refused() -> None:
    net = GroupCNN(group="C1", depth=2)
    assert not why_not(net.steps, net.padding, 224, "float32")
    assert why_not(net.steps, net.padding, 300, "float32") == "rows of 300 pixels are too wide, the most is 256"
    prime = why_not(net.steps, "CIRCULAR", 251, "float32")
    assert prime.startswith("rows of 251 pixels do not divide into at most 32 equal parts of up to 8, as CIRCULAR")
    assert not why_not(net.steps, "CIRCULAR", 248, "float32")
    deep = GroupCNN(group="C1", depth=200)
    assert "keeps 1596 numbers per thread, and" in why_not(deep.steps, deep.padding, 64, "float32")


def test_the_columns_of_a_lane_are_chosen_by_what_they_cost() -> None:
    shallow, deep = GroupCNN(depth=3).steps, GroupCNN(depth=21).steps
    assert choose_columns(shallow, "SAME", 32, "float32") == 4
    assert choose_columns(shallow, "SAME", 32, "float64") == 2
    assert choose_columns(deep, "SAME", 32, "float32") <= 2
    assert [32 * choose_columns(shallow, "SAME", width, "float32") >= width for width in (64, 96, 224)] == [True] * 3


def test_a_network_has_one_source_for_all_groups_and_calls() -> None:
    shapes = {
        kernel_source(net.steps, net.padding, (9, 9, 3), "float32", False).text
        for net in (GroupCNN(group="C1"), GroupCNN(group="D4"))
    }
    assert len(shapes) == 1


def test_networks_with_other_numbers_have_other_sources() -> None:
    networks = (
        *(GroupCNN(activation="leaky_relu(0.2)", w_std=w_std, b_std=b_std) for w_std in (1, 1.5) for b_std in (0, 0.3)),
        GroupCNN(activation="leaky_relu(0.3)"),
    )
    sources = {kernel_source(net.steps, net.padding, (9, 9, 3), "float32", False).text for net in networks}
    assert len(sources) == len(networks)


@dataclass(frozen=True)
class Tile:
    row: int
    col: int
    part: str = "gram"


class Store:
    """Blocks of two images, and the tiles that were written."""

    def __init__(self) -> None:
        self.tiles: dict[Tile, dict[str, Kernel]] = {}

    def block(self, split: Any, index: int) -> NDArray[np.float64]:
        return images(2, (7, 7, 1), seed=index)

    def describe_image(self, split: Any, block: int, offset: int) -> str:
        return f"image {offset} of block {block}"

    def write_tile(self, tile: Tile, kernels: dict[str, Kernel]) -> None:
        self.tiles[tile] = kernels


def test_a_worker_whose_gpu_is_full_forgets_its_blocks(device: Lockstep, monkeypatch: pytest.MonkeyPatch) -> None:
    store, net = Store(), GroupCNN(group="C1", depth=1)
    worker = TileWorker(store, net, ("C1",), "gpu", "float32", 1, (7, 7))
    worker.compute(Tile(0, 1))
    assert len(worker._blocks) == 2
    refused = iter([True])

    def put(array: NDArray[Any]) -> NDArray[Any]:
        if array.ndim == 2 and next(refused, False):
            raise MemoryLimitError("the GPU is full")
        return array.copy()

    monkeypatch.setattr(device, "put", put)
    worker.compute(Tile(1, 2))
    assert list(worker._blocks) == [("train", 2)]
    exact = net.kernel(store.block("train", 1), store.block("train", 2), engine="gpu")
    np.testing.assert_array_equal(store.tiles[Tile(1, 2)]["C1"].ntk, exact.ntk)


def test_a_worker_whose_gpu_has_no_room_for_sums_forgets_its_blocks(
    device: Lockstep, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, net = Store(), GroupCNN(group="C1", depth=1)
    worker = TileWorker(store, net, ("C1",), "gpu", "float32", 1, (7, 7))
    worker.compute(Tile(0, 1))
    empty, refused = device.empty, iter([True])

    def room(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        if next(refused, False):
            raise MemoryLimitError("the GPU is full")
        return empty(shape, dtype)

    monkeypatch.setattr(device, "empty", room)
    worker.compute(Tile(1, 2))
    assert not worker._blocks
    exact = net.kernel(store.block("train", 1), store.block("train", 2), engine="gpu")
    np.testing.assert_array_equal(store.tiles[Tile(1, 2)]["C1"].ntk, exact.ntk)
    monkeypatch.setattr(device, "empty", lambda *_: (_ for _ in ()).throw(MemoryLimitError("the GPU is full")))
    with pytest.raises(MemoryLimitError, match=r"tile .*image 0 of block 0: the GPU is full"):
        worker.compute(Tile(0, 3))


def test_a_tile_is_finished_while_the_next_one_is_computed(device: Lockstep, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    worker = TileWorker(store, GroupCNN(group="C1", depth=1), ("C1",), "gpu", "float32", 1, (7, 7))
    begin, other = KernelFunction.begin, threading.Barrier(2)

    def begin_and_wait(function: KernelFunction, *blocks: Any) -> Any:
        end = begin(function, *blocks)

        def end_later() -> Any:
            other.wait(timeout=60)  # until the other tile comes here, too
            return end()

        return end_later

    monkeypatch.setattr(KernelFunction, "begin", begin_and_wait)
    threads = [threading.Thread(target=worker.compute, args=(Tile(row, 1),)) for row in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    assert set(store.tiles) == {Tile(0, 1), Tile(1, 1)}


def test_images_are_prepared_while_another_tile_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    worker = TileWorker(store, GroupCNN(group="C1", depth=1), ("C1",), "cpu", "float32", 1, (7, 7))
    begin, prepare, prepared = KernelFunction.begin, KernelFunction.prepare, threading.Event()

    def prepare_and_tell(function: KernelFunction, images: Any, *names: Any) -> Any:
        if np.array_equal(images, store.block("train", 2)):
            prepared.set()
        return prepare(function, images, *names)

    def begin_late(function: KernelFunction, *blocks: Any) -> Any:
        assert prepared.wait(timeout=60)
        return begin(function, *blocks)

    monkeypatch.setattr(KernelFunction, "prepare", prepare_and_tell)
    monkeypatch.setattr(KernelFunction, "begin", begin_late)
    threads = [threading.Thread(target=worker.compute, args=(tile,)) for tile in (Tile(0, 1), Tile(1, 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    assert set(store.tiles) == {Tile(0, 1), Tile(1, 2)}


@pytest.mark.parametrize(
    ("missing", "jax", "engine", "reason"),
    [
        ("", True, "gpu", "there is a GPU"),
        ("numba-cuda is not installed", True, "xla", "a GPU; not 'gpu', because numba-cuda is not installed"),
        ("numba-cuda is not installed", False, "cpu", "there is no GPU"),
    ],
)
def test_the_engine_is_chosen_by_what_the_machine_has(
    missing: str, jax: bool, engine: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "why_no_gpu", lambda: missing)
    monkeypatch.setattr(kernels, "jax_has_gpu", lambda: jax)
    name, why = choose_engine(GroupCNN(), ("C4",), "auto")
    assert name == engine
    assert why.endswith(reason)


@pytest.mark.parametrize(
    ("init", "count", "found"), [(0, 2, True), (0, 0, False), (100, 1, False), (RuntimeError("no driver"), 0, False)]
)
def test_the_driver_is_asked_for_gpus(init: Any, count: int, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def initialise(flags: int) -> tuple[int]:
        if isinstance(init, Exception):
            raise init
        return (init,)

    driver = SimpleNamespace(cuInit=initialise, cuDeviceGetCount=lambda: (0, count))
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    assert kernels._driver_finds_gpu() == found


@pytest.mark.parametrize("jax", [True, False])
def test_auto_takes_another_engine_for_images_that_are_too_wide(
    device: Lockstep, monkeypatch: pytest.MonkeyPatch, jax: bool
) -> None:
    monkeypatch.setattr(kernels, "jax_has_gpu", lambda: jax)
    monkeypatch.setattr(kernels, "choose_engine", lambda *_: ("gpu", "it is chosen"))
    monkeypatch.setattr(kernels, "_free_memory", lambda _: 10**10)
    net = GroupCNN(group="C1", depth=1)
    assert net.explain((4, 250, 1)).engine == "gpu"
    with pytest.raises(EngineError, match=r"'gpu' cannot do this network: rows of 300 .* 256; use engine='auto'"):
        net.explain((4, 300, 1), engine="gpu")
    monkeypatch.setattr(kernels, "choose_engine", lambda *args: (("gpu" if args[2] == "auto" else args[2]), "so"))
    explanation = net.explain((4, 300, 1))
    assert explanation.engine == ("xla" if jax else "cpu")
    why = "there is a GPU; not 'gpu', because rows of 300 pixels are too wide, the most is 256"
    assert explanation.reason.endswith(why if jax else f"{why}, and not 'xla', because JAX has no GPU")
    images = np.random.default_rng(0).normal(size=(2, 2, 300, 1))
    function = KernelFunction(net, ("C1",), "auto")  # as workers have it
    ours = function(function.prepare(images))["C1"]
    assert function.engine.name == explanation.engine
    worker = TileWorker(Store(), net, ("C1",), "auto", "float32", 1, (2, 300))
    assert worker.processor == processor_kind("xla" if jax else "cpu")
    np.testing.assert_allclose(np.triu(ours.ntk), np.triu(net.kernel(images, engine="cpu").ntk), rtol=1e-5)


def test_without_a_gpu_the_engine_says_what_is_missing() -> None:
    if not kernels.why_no_gpu():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match=r"the engine 'gpu' has no device: .*; use engine='xla' or 'cpu'"):
        KernelFunction(GroupCNN(), ("C4",), "gpu")


def test_the_benchmark_finds_what_is_wrong(device: Lockstep, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: bench.SMALL[name] for name in ("one pixel", "VALID leaky_relu(0.2)")}
    assert bench.compare(few, "reference") == []
    assert bench.compare(bench.BRIGHT, "cpu", 255) == []
    pairs = GpuEngine.pairs

    def almost(engine: GpuEngine, *arguments: Any) -> Any:
        found = pairs(engine, *arguments)
        return {group: type(kernels)(*(1.0001 * each for each in kernels)) for group, kernels in found.items()}

    monkeypatch.setattr(GpuEngine, "pairs", almost)
    wrong = bench.compare(few, "reference")
    assert len(wrong) == 4
    assert "VALID leaky_relu(0.2), float32: 1.0e-04 from 'reference', allowed 5e-06" in wrong


def test_the_benchmark_ends_with_1_where_the_engine_is_wrong_and_with_2_where_it_is_not(
    device: Lockstep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(bench, "why_no_gpu", lambda: "there is none")
    assert bench.main() == 2
    assert "cannot be checked or measured on this machine: there is none." in capsys.readouterr().out
    monkeypatch.setattr(bench, "why_no_gpu", str)
    monkeypatch.setitem(sys.modules, "equikernel.engines.gpu_device", SimpleNamespace(device=lambda: device))
    for name in ("LARGE", "BRIGHT"):
        monkeypatch.setattr(bench, name, {})
    monkeypatch.setattr(bench, "SMALL", {"one pixel": bench.SMALL["one pixel"]})
    monkeypatch.setattr(bench, "repeated", list)
    measured: list[Any] = []
    monkeypatch.setattr(bench, "measure", lambda *arguments: measured.append(arguments))
    assert bench.main() == 0
    assert "0 of 3 comparisons are wrong" in capsys.readouterr().out
    assert measured == [("lockstep", (3, 21))]
    monkeypatch.setattr(bench, "repeated", lambda: ["the bits depend on something"])
    assert bench.main() == 1
    assert "WRONG: the bits depend on something\n1 of 3 comparisons are wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 67.0),
        ("NVIDIA H200", 67.0),
        ("NVIDIA H100 PCIe", 51.0),
        ("NVIDIA L40", 90.5),
        ("NVIDIA L4", 30.3),
        ("NVIDIA A100-SXM4-40GB", 19.5),
        ("NVIDIA RTX A1000", 0.0),
    ],
)
def test_the_floor_is_of_the_gpu_with_that_name(kind: str, peak: float) -> None:
    floor = bench.Case(32, 3, "SAME", "float32").floor(kind)
    operations = 2 * 32**4 * 3 * bench.ARITHMETIC["float32"]
    assert floor == pytest.approx(operations / (1e12 * peak) if peak else 0.0)
