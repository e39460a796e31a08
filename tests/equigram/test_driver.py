"""Tiles on Ray: the same bits whoever computes them and whatever dies, and one sentence where it cannot work."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.testing import assert_array_equal

import equigram.dispatch
import equigram.driver
from equigram.dispatch import TILES_IN_FLIGHT, Dispatcher, Executor
from equigram.driver import OnRay, check_address, check_room, fitting_workers, on_a_worker, target_workers
from equigram.errors import ClusterError, ResourceError, StoreError, TileFailedError
from equigram.events import Event, Listener, TileCopied, TileFailed, WorkerLost, nobody
from equigram.local import InProcess
from equigram.plan import Part, Tile
from equigram.spec import JobSpec, ResourceSpec
from equigram.store import GramStore
from equigram.verify import verify
from equikernel import EquikernelError, worker
from equikernel.kernel import Kernel, available_cores
from equikernel.network import Architecture
from equikernel.worker import TileReport, TileWorker

Job = Callable[..., JobSpec]
Create = Callable[[JobSpec], GramStore]

PLAIN: dict[str, Any] = {"gram": {"groups": ["C1"], "tile": 4, "engine": "reference"}, "data": {"size": 4}}
"""A job whose workers have nothing to compile."""

VICTIM = Tile("gram", 0, 2)

MEMORY = 2**28
"""Bytes of a worker."""


class Events(list[Event]):
    """A listener that remembers."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    def of(self, *kinds: type[Event]) -> list[Any]:
        return [event for event in self if isinstance(event, kinds)]

    @property
    def trouble(self) -> list[Any]:
        return self.of(WorkerLost, TileFailed, TileCopied)


@pytest.fixture(params=["in this process", "on Ray"])
def executor(request: pytest.FixtureRequest) -> Callable[..., Executor]:
    """Makes the executors that there are, of stores and numbers of workers."""
    if request.param == "on Ray":
        request.getfixturevalue("cluster")
        return on_ray

    def here(store: GramStore, count: int = 1) -> Executor:
        spec = store.info.spec
        groups, size = spec.gram.groups, store.info.image_shape[:2]
        return InProcess(TileWorker(store, spec.network, groups, spec.engine_for(groups), spec.gram.dtype, 1, size))

    return here


def on_ray(store: GramStore, count: int = 1) -> Executor:
    class Counted(OnRay):
        def capacity(self) -> int:
            return count

    return Counted(store, store.info.spec, store.info.spec.gram.groups, MEMORY)


def run_all(
    executor: Executor, store: GramStore, listener: Listener = print, hung_after: float = 600
) -> list[TileReport]:
    return list(Dispatcher(store.info.tiling.strips(), executor, listener, hung_after).run())


def assert_holds_the_kernels(store: GramStore) -> None:
    """Every matrix of a store has the bits of ``GroupCNN.kernel``."""
    spec = store.info.spec
    train, test = store.images("train"), store.images("test")
    options: dict[str, Any] = {"engine": spec.gram.engine, "dtype": spec.gram.dtype}
    for group in spec.gram.groups:
        network = spec.network_for(group)
        kernels: dict[Part, Kernel] = {
            "gram": network.kernel(train, **options),
            "cross": network.kernel(test, train, **options),
        }
        for part, kernel in kernels.items():
            for name in spec.gram.kernels:
                expected = getattr(kernel, name).astype(spec.gram.dtype)
                assert_array_equal(store.matrix(part, group, name), expected, strict=True)


# Bits


@pytest.mark.parametrize(
    ("gram", "network", "count"),
    [({"tile": 3}, {}, 2), ({"tile": 7, "dtype": "float64"}, {"head": ["relu"], "b_std": 0.1}, 1)],
    ids=["float32", "float64-with-a-head"],
)
def test_the_bits_are_those_of_the_kernel_whatever_the_executor_tiles_and_workers(
    executor: Callable[..., Executor],
    job: Job,
    create: Create,
    gram: dict[str, Any],
    network: dict[str, Any],
    count: int,
) -> None:
    store = create(job(gram={"groups": ["C1", "C4"], **gram}, network=network))
    reports = run_all(executor(store, count), store)
    tiling = store.info.tiling
    assert Counter(report.tile for report in reports) == Counter(tiling.tiles())
    assert [report.pairs for report in reports] == [tiling.pairs(report.tile) for report in reports]
    assert_holds_the_kernels(store)


# What may die


def test_a_worker_that_is_killed_costs_nothing_but_its_tile(
    cluster: None, job: Job, create: Create, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other worker may have done all the rest before Ray hears of the death: it must copy no tile counted here.
    monkeypatch.setattr(Dispatcher, "_stragglers", lambda self, now: iter(()))
    meeting = tmp_path / "meeting"
    os.mkfifo(meeting)

    class Waiting(GramStore):
        def write_tile(self, tile: Tile, kernels: Any) -> None:
            if tile == VICTIM and meeting.exists():
                meeting.write_text(str(os.getpid()))
                signal.pause()
            super().write_tile(tile, kernels)

    def kill() -> None:
        process = int(meeting.read_text())
        meeting.unlink()
        os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    store = create(job(**PLAIN))
    events = Events()
    reports = run_all(on_ray(Waiting(store.url), count=2), store, events)
    killer.join()
    (lost,) = events.of(WorkerLost)
    assert VICTIM in [event.tile for event in events.of(TileFailed)]
    assert len(events.of(TileFailed)) == lost.tiles <= TILES_IN_FLIGHT
    assert {event.reason[:15] for event in events.of(TileFailed)} == {"its worker died"}
    assert Counter(report.tile for report in reports) == Counter(store.info.tiling.tiles())
    assert_holds_the_kernels(store)


def test_a_tile_that_kills_its_worker_again_and_again_ends_the_run(
    cluster: None, job: Job, create: Create, without_pauses: None
) -> None:
    class Deadly(GramStore):
        def write_tile(self, tile: Tile, kernels: Any) -> None:
            if tile == VICTIM:
                os.kill(os.getpid(), signal.SIGKILL)
            super().write_tile(tile, kernels)

    store = create(job(**PLAIN))
    events = Events()
    with pytest.raises(
        TileFailedError, match=r"tile gram\[0, 2\] failed 3 times, .* its worker died .*finished tiles are kept"
    ):
        run_all(on_ray(Deadly(store.url)), store, events)
    assert [event.failures for event in events.of(TileFailed) if event.tile == VICTIM] == [1, 2]
    assert len(events.of(WorkerLost)) == 3
    assert VICTIM not in store.finished_tiles()
    assert len(store.finished_tiles()) > 0


def test_an_error_that_comes_again_and_again_ends_the_run(
    executor: Callable[..., Executor], job: Job, create: Create, without_pauses: None
) -> None:
    class Broken(GramStore):
        def write_tile(self, tile: Tile, kernels: Any) -> None:
            if tile == VICTIM:
                raise RuntimeError("the moon\nis full")
            super().write_tile(tile, kernels)

    store = create(job(**PLAIN))
    events = Events()
    with pytest.raises(
        TileFailedError, match=r"tile gram\[0, 2\] failed 3 times, .* RuntimeError: the moon is full; fi"
    ):
        run_all(executor(Broken(store.url)), store, events)
    assert [event.failures for event in events.of(TileFailed)] == [1, 2]
    assert len(events.of(WorkerLost)) == 3


def test_a_worker_that_hangs_is_replaced(cluster: None, job: Job, create: Create, tmp_path: Path) -> None:
    once = tmp_path / "once"
    once.touch()

    class Hanging(GramStore):
        def write_tile(self, tile: Tile, kernels: Any) -> None:
            if tile == VICTIM and once.exists():
                once.unlink()
                os.kill(os.getpid(), signal.SIGSTOP)
            super().write_tile(tile, kernels)

    store = create(job(**PLAIN))
    events = Events()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equigram.dispatch, "LOOK_SECONDS", 0.5)
        reports = run_all(on_ray(Hanging(store.url)), store, events, hung_after=10)
    assert {event.reason[:19] for event in events.of(WorkerLost)} == {"it gave no sign for"}
    assert Counter(report.tile for report in reports) == Counter(store.info.tiling.tiles())
    assert_holds_the_kernels(store)


def test_workers_that_cannot_start_end_the_run(cluster: None, job: Job, create: Create) -> None:
    class Unknown(GramStore):
        def __reduce__(self) -> Any:
            return __import__, ("a_package_of_this_machine",)

    store = create(job(**PLAIN))
    with pytest.raises(ClusterError, match=r"workers do not start: ModuleNotFoundError: .*every node .* same equigram"):
        run_all(on_ray(Unknown(store.url)), store)


def test_an_image_that_overflows_is_named_without_another_attempt(
    executor: Callable[..., Executor], job: Job, create: Create, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).normal(size=(9, 4, 4, 1))
    images[6] *= 1e14
    np.savez(tmp_path / "floats.npz", x_train=images, y_train=np.arange(9) % 3)
    store = create(job(data={"train": tmp_path / "floats.npz", "normalize": "none"}, network={"w_std": 1000.0}))
    place = store.names("train").index("x_train[6]")
    events = Events()
    message = rf"tile gram\[.*\], training image {place} \(x_train\[6\]\): .*leave the range"
    with pytest.raises(EquikernelError, match=message):
        run_all(executor(store), store, events)
    assert events.trouble == []


def test_workers_that_find_no_room_do_not_hold_up_the_others(cluster: None, job: Job, create: Create) -> None:
    store = create(job(**PLAIN))
    assert len(run_all(on_ray(store, count=available_cores() + 1), store)) == len(store.info.tiling)


def test_a_run_that_is_given_up_leaves_its_room_and_one_without_room_ends(
    cluster: None, job: Job, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    store = create(job(**PLAIN))
    reports = Dispatcher(store.info.tiling.strips(), on_ray(store), print, 600).run()
    next(reports)
    reports.close()

    class Guest:
        def here(self) -> bool:
            return True

    guest = ray.remote(Guest).options(num_cpus=available_cores()).remote()
    assert ray.get(guest.here.remote(), timeout=60)
    monkeypatch.setattr(equigram.dispatch, "CAPACITY_SECONDS", 0.5)
    with pytest.raises(ClusterError, match=r"none of 1 workers could start .* no room left.*Finished tiles are kept"):
        run_all(on_ray(store), store)
    ray.kill(guest)


# The worker, without a cluster


class Storage:
    """Storage that fails some times before it works."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.written: list[Tile] = []

    def block(self, split: str, index: int) -> Any:
        return np.ones((2, 4, 4, 1))

    def describe_image(self, split: str, block: int, offset: int) -> str:
        return "an image"

    def write_tile(self, tile: Tile, kernels: Any) -> None:
        if self.failures:
            self.failures -= 1
            raise StoreError("the storage is having a nap")
        self.written.append(tile)


@pytest.fixture
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "STORAGE_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(equigram.dispatch, "pause", lambda failures: 0.0)


def computing(storage: Storage) -> TileReport:
    return TileWorker(storage, Architecture(depth=1), ("C1",), "reference", "float64", 1, (4, 4)).compute(VICTIM)


def test_a_worker_is_patient_with_its_storage(without_pauses: None) -> None:
    storage = Storage(failures=2)
    assert computing(storage).pairs == 4
    assert storage.written == [VICTIM]


def test_patience_ends_with_what_the_storage_said(without_pauses: None) -> None:
    with pytest.raises(StoreError, match="having a nap"):
        computing(Storage(failures=3))


# Where workers run


def test_as_many_workers_as_the_cluster_holds(cluster: None) -> None:
    cores = available_cores()
    assert fitting_workers(ResourceSpec(), MEMORY) == cores
    assert fitting_workers(ResourceSpec(cpus_per_worker=cores), MEMORY) == 1
    assert target_workers(ResourceSpec(), MEMORY) == cores
    assert target_workers(ResourceSpec(workers=1), MEMORY) == 1
    assert target_workers(ResourceSpec(workers=10_000), MEMORY) == cores
    assert target_workers(ResourceSpec(workers=10_000, address="auto"), MEMORY) == 10_000
    assert target_workers(ResourceSpec(gpus_per_worker=64, address="auto"), MEMORY) == 1
    check_room(ResourceSpec(), MEMORY)


@pytest.mark.parametrize(
    ("resources", "memory", "message"),
    [
        (
            ResourceSpec(cpus_per_worker=999),
            MEMORY,
            f"cpus_per_worker = 999, .* fits on no node .* largest have {available_cores()} C",
        ),
        (ResourceSpec(gpus_per_worker=7), MEMORY, r"resources.gpus_per_worker = 7 .* have \d+ CPUs, \d+ GPUs and"),
        (ResourceSpec(), 2**50, r"and 1024\.0 TiB of memory fits on no node .* GPUs and [\d.]+ [GT]iB; ask"),
        (
            ResourceSpec(node_labels={"zone": "moon"}),
            MEMORY,
            r"none of the 1 nodes .* has the labels resources.node_labels = {'zone': 'moon'}; start some with `ray",
        ),
    ],
)
def test_a_worker_that_fits_on_no_node_is_refused_with_both_numbers(
    cluster: None, resources: ResourceSpec, memory: int, message: str
) -> None:
    assert fitting_workers(resources, memory) == 0
    with pytest.raises(ResourceError, match=message):
        check_room(resources, memory)
    check_room(resources.model_copy(update={"wait": 60}), memory)


def test_more_cores_than_this_machine_has_are_refused_before_a_cluster_is_started() -> None:
    words = f"resources.cpus_per_worker = 999 does not fit on this machine, which has {available_cores()} "
    with pytest.raises(ResourceError, match=words):
        check_address(ResourceSpec(cpus_per_worker=999))
    words = r"resources.gpus_per_worker = 0.5, but no GPU is found on this machine; install numba-cuda"
    with pytest.raises(ResourceError, match=words):
        check_address(ResourceSpec(gpus_per_worker=0.5))
    check_address(ResourceSpec())


def test_a_cluster_that_is_to_be_found_but_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equigram.driver, "ANSWER_SECONDS", 3.0)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        ClusterError, match=r"is 'auto', but no Ray cluster answers on this machine or at RAY_ADDRESS; st"
    ):
        check_address(ResourceSpec(address="auto"))


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_address_where_nobody_listens_is_refused(listener: socket.socket, address: str) -> None:
    port = listener.getsockname()[1]
    listener.close()
    with pytest.raises(
        ClusterError, match=f"no Ray cluster answers at .*{port}' .Connection refused.; start one with `ray"
    ):
        check_address(ResourceSpec(address=address.format(port)))


def test_a_listener_that_does_not_answer_as_ray_does_is_refused(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equigram.driver, "ANSWER_SECONDS", 0.5)
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(
        ClusterError, match=f"'{address}' accepts connections, but does not answer as Ray .* 0.5 s; start"
    ):
        check_address(ResourceSpec(address=address))


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that was there before the run, which asks for a token: one node with a core."""

    address: str
    environment: dict[str, str]
    folder: str

    def start_node(self, *options: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", "--num-cpus=1"]
        subprocess.run(
            [*command, *options], env=self.environment, cwd="/", check=True, timeout=120,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def processes(self, name: str = "") -> set[int]:
        """Those of the nodes that hold ``name`` in their command lines."""
        found = set()
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                command = (place / "cmdline").read_text(errors="replace")
                if self.folder in command and name in command:
                    found.add(int(place.name))
        return found

    def start_run(self, folder: Path, slow: float = 0.0, **resources: object) -> subprocess.Popen[str]:
        """Compute the store ``run`` in ``folder``, each tile in ``slow`` seconds at least.

        Prints the tiles, the workers that start and end, and at last the number of workers.
        """
        return subprocess.Popen(
            [sys.executable, "-c", ON_A_CLUSTER, json.dumps({"address": self.address, **resources}), str(slow)],
            env=self.environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip


ON_A_CLUSTER = """
import json, sys, time
from equigram.dispatch import Dispatcher
from equigram.driver import OnRay, check_address, check_room, ray_session
from equigram.spec import JobSpec
from equigram.store import GramStore

slow = float(sys.argv[2])

class Slow(GramStore):
    def write_tile(self, *arguments):
        time.sleep(slow)
        super().write_tile(*arguments)

def tell(event):
    if slow and type(event).__name__.startswith("Worker"):
        print(type(event).__name__, flush=True)

store = Slow("run")
fields = store.info.spec.model_dump()
spec = JobSpec.parse({**fields, "resources": json.loads(sys.argv[1])})
check_address(spec.resources)
with ray_session(spec.resources):
    check_room(spec.resources, 2**28)
    executor = OnRay(store, spec, spec.gram.groups, 2**28)
    strips, resources = store.info.tiling.strips(), spec.resources
    for report in Dispatcher(strips, executor, tell, resources.hung_after, resources.wait).run():
        print(report.tile, flush=True)
    print(executor.capacity())
"""


@pytest.fixture(scope="module")
def existing() -> Iterator[Cluster]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    with tempfile.TemporaryDirectory(prefix="equigram-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(f"127.0.0.1:{port}", environment, folder)
        try:
            cluster.start_node("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}")
            yield cluster
        finally:
            for process in cluster.processes():
                os.kill(process, signal.SIGKILL)


def test_a_cluster_that_is_there_already_is_used(existing: Cluster, job: Job, create: Create, tmp_path: Path) -> None:
    store = create(job(**PLAIN))
    with existing.start_run(tmp_path) as run:
        out, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (0, "")
    *tiles, workers = out.splitlines()
    assert Counter(tiles) == Counter(map(str, store.info.tiling.tiles()))
    assert workers == "1"
    assert_holds_the_kernels(store)


STARTED_LATE = """
import contextlib, os, pathlib
from ray._private import services
from equigram.driver import ray_session
from equigram.spec import ResourceSpec

def raylets():
    count = 0
    for path in pathlib.Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            status = path.read_text()
            count += "Name:\\traylet\\n" in status and f"PPid:\\t{os.getpid()}\\n" in status
    return count

def late(*_):
    services.get_node = original
    print(raylets())
    raise Exception("The current node timed out during startup.")

original, services.get_node = services.get_node, late
with ray_session(ResourceSpec()):
    print(raylets())
"""


class Stopped(BaseException):
    """What a handler of a signal raises."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_ray_has_started_and_a_second_one_does_not(number: int) -> None:
    def stop(*_: object) -> None:
        raise Stopped

    reached: list[int] = []

    def starting(times: int) -> None:
        with equigram.driver._signals_wait():
            for _ in range(times):
                signal.raise_signal(number)
            reached.append(times)

    before = signal.signal(number, stop)
    try:
        starting(0)
        for times in (1, 2):
            with pytest.raises(Stopped):
                starting(times)
        assert reached == [0, 1]
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)


def test_a_local_cluster_that_starts_too_late_is_started_once_more_and_leaves_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTED_LATE], capture_output=True, text=True, check=False, timeout=150
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["1", "1"]


def test_a_plan_measures_on_the_cluster(existing: Cluster, job: Job, tmp_path: Path) -> None:
    spec = job(**PLAIN | {"resources": {"workers": "auto"}})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))

    def plan(*options: str) -> tuple[int, str]:
        command = [str(Path(sys.executable).with_name("equigram")), "plan", "job.yaml", *options]
        done = subprocess.run(
            command, cwd=tmp_path, env=existing.environment, capture_output=True, text=True, check=False, timeout=120
        )
        return done.returncode, done.stdout + done.stderr

    code, words = plan("--address", existing.address)
    assert code == 0, words
    assert "measured on the cluster" in words
    assert re.search(r"workers +1, each 1 CPU", words), words
    elsewhere = job(**PLAIN | {"resources": {"workers": "auto", "node_labels": {"zone": "mars"}}})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(elsewhere.model_dump(mode="json")))
    code, words = plan("--address", existing.address)
    assert (code, "Traceback" in words) == (2, False), words
    assert "has the labels resources.node_labels = {'zone': 'mars'}" in " ".join(words.split())


@pytest.mark.usefixtures("cluster")
def test_what_a_worker_is_asked_is_answered_there_and_its_errors_are_told_here() -> None:
    here = os.getpid()
    assert on_a_worker(ResourceSpec(), os.getpid) != here

    def fail() -> None:
        raise ResourceError("no such thing")

    with pytest.raises(ResourceError, match="no such thing"):
        on_a_worker(ResourceSpec(), fail)
    with pytest.raises(ClusterError, match=r"the cost of a pair could not be measured on the cluster: .*died"):
        on_a_worker(ResourceSpec(), lambda: os._exit(1))


@pytest.mark.usefixtures("cluster")
def test_a_measurement_does_not_wait_for_room_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equigram.driver, "CAPACITY_SECONDS", 0.5)
    with pytest.raises(ClusterError, match=r"could not be measured within 1 s: the cluster has no room left"):
        on_a_worker(ResourceSpec(cpus_per_worker=1000, wait=1.0), os.getpid)


def test_a_cluster_with_another_token_is_refused(existing: Cluster) -> None:
    with pytest.raises(ClusterError, match=r"refuses the token of this process; set RAY_AUTH_MODE=token, and the"):
        check_address(ResourceSpec(address=existing.address))


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_nodes_with_gpus_are_waited_for_used_when_they_join_and_not_missed_when_they_leave(
    existing: Cluster, job: Job, create: Create, tmp_path: Path
) -> None:
    store = create(job(gram={"groups": ["C1"], "tile": 1, "engine": "xla"}, network={"depth": 1}, data={"size": 4}))
    head = existing.processes("raylet/raylet")
    node = (f"--address={existing.address}", "--num-gpus=1", "--num-cpus=2", "--labels=zone=moon")
    options: dict[str, Any] = {"gpus_per_worker": 0.5, "node_labels": {"zone": "moon"}}
    with existing.start_run(tmp_path, **options) as refused:
        assert "none of the 1 nodes of the Ray cluster has the labels" in refused.communicate(timeout=60)[1]
    with existing.start_run(tmp_path, slow=1.0, wait=100, **options) as run:
        assert run.stdout is not None
        time.sleep(2)
        assert run.poll() is None
        existing.start_node(*node)
        told = [run.stdout.readline().strip() for _ in range(4)]
        assert "WorkerStarted" in told  # of the two that share the GPU
        first = existing.processes("raylet/raylet") - head
        existing.start_node(*node)
        while told.count("WorkerStarted") < 3:
            assert told[-1], "the run ended before the second node was used"
            told.append(run.stdout.readline().strip())
        for process in first:
            os.kill(process, signal.SIGKILL)
        out, err = run.communicate(timeout=200)
    for process in existing.processes("raylet/raylet") - head:
        os.kill(process, signal.SIGKILL)
    assert (run.returncode, err) == (0, "")
    *told, _ = [*told, *out.splitlines()]
    count = Counter(told)
    assert count.pop("WorkerStarted") >= 3
    assert 2 <= count.pop("WorkerLost") <= 4  # Ray may place new ones on the dead node before it has noticed
    assert count == Counter(map(str, store.info.tiling.tiles()))
    report = verify(GramStore.open(store.url), nobody, samples=3)
    assert (report.findings, report.missing) == ((), 0)


@pytest.mark.soak
def test_a_node_that_leaves_takes_only_the_tiles_in_its_hands(
    existing: Cluster, job: Job, create: Create, tmp_path: Path
) -> None:
    first = existing.processes("raylet/raylet")
    existing.start_node(f"--address={existing.address}")
    store = create(job(gram={"groups": ["C4"], "tile": 2, "engine": "reference"}))
    with existing.start_run(tmp_path) as run:
        assert run.stdout is not None
        told = [run.stdout.readline() for _ in range(10)]
        for process in existing.processes("raylet/raylet") - first:
            os.kill(process, signal.SIGKILL)
        out, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (0, "")
    *told, count = "".join([*told, out]).splitlines()
    assert count == "2"
    notes = [line for line in told if "a worker died at tile" in line]
    assert len(notes) <= 1  # none where it died between two tiles
    assert set(told) - set(notes) == set(map(str, store.info.tiling.tiles()))
    assert_holds_the_kernels(store)
