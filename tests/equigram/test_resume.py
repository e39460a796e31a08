"""A run that is killed or interrupted: the same command goes on from what is stored, and ends with the same bits."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.testing import assert_array_equal

from equigram.plan import Tile
from equigram.spec import JobSpec
from equigram.store import GramStore
from equikernel.groups import GridGroupName as GroupName

LIMIT = 90.0
"""Seconds that anything may take here before it counts as hanging."""


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Of a command whose cluster, killed or not, leaves nothing behind."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield os.environ | {"RAY_TMPDIR": folder, "COLUMNS": "200"}


@pytest.fixture
def slow(job: Callable[..., JobSpec], tmp_path: Path) -> JobSpec:
    """A job of 12 tiles and some seconds, in ``job.yaml``."""
    path = tmp_path / "few.npz"
    images = np.random.default_rng(0).integers(0, 256, (9, 10, 10)).astype(np.uint8)
    labels = np.arange(9) % 3
    np.savez(path, x_train=images[:6], y_train=labels[:6], x_test=images[6:], y_test=labels[6:])
    gram = {"groups": ["C1", "C4"], "tile": 2, "engine": "reference"}
    spec = job(data={"train": str(path)}, gram=gram, solve=None, resources={"workers": 1})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    return spec


def start(folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """``equigram run job.yaml``, in a process group of its own as a shell would start it."""
    return subprocess.Popen(
        [Path(sys.executable).with_name("equigram"), "run", "job.yaml"],
        cwd=folder, env=environment, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for background commands
    )  # fmt: skip


def family(process: int) -> list[int]:
    """Handles (pidfd) of a process and of all that descend from it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])

    def descends(one: int) -> bool:
        return one == process or (one in parents and descends(parents[one]))

    handles = []
    for one in filter(descends, parents):
        with contextlib.suppress(ProcessLookupError):
            handles.append(os.pidfd_open(one))
    return handles


def strike(process: subprocess.Popen[str], store: str, number: signal.Signals) -> set[Tile]:
    """Send a signal to a run when tiles are stored; the finished ones when all its processes have ended."""
    give_up = time.monotonic() + LIMIT
    while not (GramStore.exists(store) and len(GramStore(store).finished_tiles()) >= 2):
        assert time.monotonic() < give_up, "no tile is ever stored"
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"the run ended early: {process.wait(timeout=0.02)} {process.communicate()}")
    handles = family(process.pid)
    assert len(handles) > 5
    if number == signal.SIGTERM:
        process.send_signal(number)  # as batch systems and containers do
    else:
        os.killpg(process.pid, number)  # as a terminal does
    for handle in handles:
        assert select.select([handle], [], [], LIMIT)[0], "a process of the run does not end"
        os.close(handle)
    return set(GramStore(store).finished_tiles())


def marks(store: GramStore, tiles: set[Tile]) -> dict[Path, tuple[int, int]]:
    """The chunks of tiles, with what changes when they are written."""
    gram = store.info.spec.gram
    paths = [
        Path(store.url, tile.part, group, kernel, "c", str(row), str(col))
        for tile in tiles
        for row, col in store.info.tiling.chunks(tile)
        for group in gram.groups
        for kernel in gram.kernels
    ]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(
    slow: JobSpec, tmp_path: Path, environment: dict[str, str]
) -> None:
    with start(tmp_path, environment) as killed:
        done = strike(killed, slow.store, signal.SIGKILL)
    store = GramStore.open(slow.store)
    before = marks(store, done)
    assert 2 <= len(done) < len(store.info.tiling)

    with start(tmp_path, environment) as again:
        out, err = again.communicate(timeout=LIMIT)
    assert again.returncode == 0, err
    assert "all done" in out
    assert f"{len(done)} of {len(store.info.tiling)} tiles are in the store already" in err
    assert not [noise for noise in ("Token", "raylet", "Ray", "Traceback", "Warning") if noise in out + err]
    assert marks(store, done) == before

    train, test = store.images("train"), store.images("test")
    groups: tuple[GroupName, ...] = ("C1", "C4")
    for group in groups:
        network = slow.network_for(group)
        gram, cross = network.kernel(train, engine="reference"), network.kernel(test, train, engine="reference")
        for kernel in ("nngp", "ntk"):
            assert_array_equal(store.matrix("gram", group, kernel), getattr(gram, kernel).astype(np.float32))
            assert_array_equal(store.matrix("cross", group, kernel), getattr(cross, kernel).astype(np.float32))


def processes(environment: dict[str, str], name: str) -> list[int]:
    """Processes of the cluster of a run that have a name."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            command = place.read_text(errors="replace")
            if environment["RAY_TMPDIR"] in command and name in command:
                found.append(int(place.parent.name))
    return found


@pytest.mark.parametrize(
    ("number", "said", "code"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
def test_an_interrupted_run_says_so_and_keeps_its_tiles(
    slow: JobSpec, tmp_path: Path, environment: dict[str, str], number: signal.Signals, said: str, code: int
) -> None:
    with start(tmp_path, environment) as process:
        done = strike(process, slow.store, number)
        out, err = process.communicate(timeout=LIMIT)
    assert len(done) >= 2
    assert (process.returncode, out) == (code, "")
    assert err.splitlines()[-1] == f"{said}; finished tiles are kept, and the same command goes on from there"
    assert not [noise for noise in ("Traceback", "***", "@ ") if noise in err]
    assert not list(Path(environment["RAY_TMPDIR"]).iterdir())


@pytest.mark.parametrize("beginning", ["gcs_server", "raylet/raylet"])
def test_a_run_that_is_terminated_while_its_cluster_starts_says_so_and_leaves_nothing(
    slow: JobSpec, tmp_path: Path, environment: dict[str, str], beginning: str
) -> None:
    with start(tmp_path, environment) as process:
        give_up = time.monotonic() + LIMIT
        while not processes(environment, beginning):
            assert time.monotonic() < give_up, "the cluster never starts"
            time.sleep(0.02)
        process.terminate()
        out, err = process.communicate(timeout=LIMIT)
        while processes(environment, ""):
            assert time.monotonic() < give_up, "processes of the cluster are left"
            time.sleep(0.1)
    assert (process.returncode, out) == (143, "")
    assert err.splitlines()[-1] == "terminated; finished tiles are kept, and the same command goes on from there"
    assert "Traceback" not in err
    assert not list(Path(environment["RAY_TMPDIR"]).iterdir())


def test_a_cluster_that_dies_ends_the_run_in_words(slow: JobSpec, tmp_path: Path, environment: dict[str, str]) -> None:
    with start(tmp_path, environment) as process:
        give_up = time.monotonic() + LIMIT
        while not (GramStore.exists(slow.store) and len(GramStore(slow.store).finished_tiles()) >= 1):
            assert time.monotonic() < give_up, "no tile is ever stored"
            time.sleep(0.05)
        nodes = processes(environment, "raylet/raylet")
        for node in nodes:
            os.kill(node, signal.SIGKILL)
        out, err = process.communicate(timeout=LIMIT)
    assert nodes
    assert (process.returncode, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert err.endswith("finished tiles are kept: run again\n")
    assert "Traceback" not in err
