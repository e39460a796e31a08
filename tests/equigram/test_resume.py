"""Runs that are killed: the same command goes on from the store, and ends with the same bits."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from equigram.plan import Part, Tile
from equigram.spec import JobSpec
from equigram.store import GramStore

EQUIGRAM = Path(sys.executable).with_name("equigram")
SECONDS = 120.0
"""How long to wait for anything at most."""

PARTS: tuple[Part, ...] = ("gram", "cross")

SLOW = {"depth": 100, "w_std": 1.4142}
"""Enough work in a tile to be caught in the middle of the run."""


@pytest.fixture
def slow_job(job: Callable[..., JobSpec], tmp_path: Path) -> Path:
    """A job file of 20 tiles, each of which takes a good part of a second."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 12, 12, 1), dtype=np.uint8)
    np.savez(
        tmp_path / "slow.npz", x_train=images, y_train=np.arange(20) % 2, x_test=images[:4], y_test=np.arange(4) % 2
    )
    spec = job(
        data={"train": str(tmp_path / "slow.npz")}, network=SLOW, gram={"groups": ["C1", "C4"]}, workers={"count": 2}
    )
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    return path


@pytest.fixture
def started() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts `equigram run` in a process group of its own; whatever is left of it is killed in the end."""
    processes: list[subprocess.Popen[str]] = []

    def start(path: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [EQUIGRAM, "run", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        kill_session(process)


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {SECONDS:.0f} s"
        time.sleep(0.05)


def session(leader: int) -> list[int]:
    """The processes of a session: the command, Ray's daemons and the workers."""
    members = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                members.append(int(folder.name))
    return members


def kill_session(process: subprocess.Popen[str]) -> None:
    """`kill -9` of everything the command has started."""

    def gone() -> bool:
        left = session(process.pid)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    wait_for("the end of all processes", gone)
    process.communicate(timeout=SECONDS)


def tiles_stored(store: str) -> int:
    return len(GramStore(store).finished_tiles()) if GramStore.exists(store) else 0


def chunk_files(store: GramStore, tiles: set[Tile]) -> dict[str, int]:
    """When each chunk of ``tiles`` was written."""
    return {
        str(path): path.stat().st_mtime_ns
        for tile in tiles
        for row, col in store.info.tiling.chunks(tile)
        for path in Path(store.url).glob(f"{tile.part}/*/*/c/{row}/{col}")
    }


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a session in /proc")
def test_everything_killed_at_once_and_run_again(
    slow_job: Path,
    started: Callable[[Path], subprocess.Popen[str]],
    create: Callable[[JobSpec], GramStore],
    compute: Callable[..., None],
) -> None:
    spec = JobSpec.load(slow_job)
    process = started(slow_job)
    wait_for("tile 4", lambda: tiles_stored(spec.store) >= 4 or process.poll() is not None)
    assert process.poll() is None, process.communicate()[1]
    kill_session(process)
    store = GramStore.open(spec.store)
    finished = store.finished_tiles()
    assert 4 <= len(finished) < len(store.info.tiling)
    before = chunk_files(store, finished)

    again = subprocess.run([EQUIGRAM, "run", slow_job], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert again.returncode == 0, again.stderr
    assert chunk_files(store, finished) == before, "finished tiles were computed again"

    uninterrupted = create(spec.model_copy(update={"store": f"{spec.store}-whole"}))
    compute(uninterrupted)
    for part, group, kernel in itertools.product(PARTS, ("C1", "C4"), ("nngp", "ntk")):
        np.testing.assert_array_equal(
            GramStore.open(spec.store).matrix(part, group, kernel), uninterrupted.matrix(part, group, kernel)
        )


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a session in /proc")
def test_a_worker_killed_in_the_middle_of_a_tile(
    slow_job: Path, started: Callable[[Path], subprocess.Popen[str]]
) -> None:
    spec = JobSpec.load(slow_job)
    process = started(slow_job)

    def workers() -> list[int]:
        titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in session(process.pid)}
        return [pid for pid, title in titles.items() if title.startswith(b"ray::TileWorker")]

    wait_for("a stored tile", lambda: tiles_stored(spec.store) >= 1 or process.poll() is not None)
    assert process.poll() is None, process.communicate()[1]
    victims = workers()
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    assert "another one takes over" in errors
    store = GramStore.open(spec.store)
    assert len(store.finished_tiles()) == len(store.info.tiling)


def test_interrupted_from_the_keyboard(slow_job: Path, started: Callable[[Path], subprocess.Popen[str]]) -> None:
    spec = JobSpec.load(slow_job)
    process = started(slow_job)
    wait_for("a stored tile", lambda: tiles_stored(spec.store) >= 1 or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, errors
    assert "interrupted; finished tiles are kept, and the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert tiles_stored(spec.store) >= 1
