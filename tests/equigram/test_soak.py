"""Hundreds of faults, one after the other: whatever dies, stops, lies or is slow, the same bits come out in the end.

``make soak`` runs this; ``SOAK_FAULTS`` sets the number of faults, 200 if it does not.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import yaml
from numpy.testing import assert_array_equal

from equigram.dispatch import TILES_IN_FLIGHT
from equigram.run import run
from equigram.spec import JobSpec
from equigram.store import GramStore

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]

Job = Callable[..., JobSpec]

FAULTS = int(os.environ.get("SOAK_FAULTS", "200"))
WORKERS = 2
LIMIT = 180.0
"""Seconds after which a run that does not end counts as hanging."""


def images(folder: Path) -> str:
    """28 training and 8 test images of 8x8 pixels."""
    rng = np.random.default_rng(0)
    path = folder / "soak.npz"
    np.savez(
        path, x_train=rng.integers(0, 256, (28, 8, 8)).astype(np.uint8), y_train=np.arange(28) % 4,
        x_test=rng.integers(0, 256, (8, 8, 8)).astype(np.uint8), y_test=np.arange(8) % 4,
    )  # fmt: skip
    return str(path)


@pytest.fixture
def soaked(job: Job, tmp_path: Path) -> Callable[..., JobSpec]:
    """Makes jobs of 161 tiles that take about a tenth of a second each."""
    data = images(tmp_path)

    def make(store: object, **sections: Any) -> JobSpec:
        gram = {"groups": ["C4"], "tile": 2, "engine": "reference"}
        resources = {"workers": WORKERS, "hung_after": 5} | sections.pop("resources", {})
        return job(store, data={"train": data}, gram=gram, solve=None, resources=resources, **sections)

    return make


@pytest.fixture
def undisturbed(soaked: Callable[..., JobSpec], tmp_path: Path) -> GramStore:
    """What should come out."""
    return run(soaked(tmp_path / "undisturbed", resources={"workers": 0})).store


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="equigram-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield os.environ | {"RAY_TMPDIR": folder}
        for process, command in processes():
            if folder in command:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


def processes() -> Iterator[tuple[int, str]]:
    """All processes and their command lines."""
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            yield int(place.name), (place / "cmdline").read_text(errors="replace").replace("\0", " ")


def start(folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("equigram")), "run", "job.yaml", "--log", "log.jsonl"]
    return subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def descendants(process: int) -> list[tuple[int, str]]:
    """The processes of a run, with their command lines."""
    parents = {}
    for one, _ in processes():
        with contextlib.suppress(OSError):
            parents[one] = int(Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[1])

    def descends(one: int) -> bool:
        return one == process or (one in parents and descends(parents[one]))

    return [(one, command) for one, command in processes() if descends(one)]


def strike(driver: subprocess.Popen[str], rng: random.Random) -> str:
    """Do something bad to a run; what it was."""
    what = rng.choice(["kill a worker"] * 4 + ["stop a worker"] * 2 + ["kill the node", "kill the driver"])
    family = descendants(driver.pid)
    names = {"kill a worker": "TileActor", "stop a worker": "TileActor", "kill the node": "raylet/raylet"}
    victims = [one for one, command in family if names.get(what, "equigram run") in command]
    if not victims:
        return ""
    with contextlib.suppress(ProcessLookupError):
        os.kill(rng.choice(victims), signal.SIGSTOP if what == "stop a worker" else signal.SIGKILL)
    if what == "kill the driver":  # and what its terminal would take along
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
    return what


def compare(store: GramStore, undisturbed: GramStore) -> None:
    for part in ("gram", "cross"):
        for kernel in ("nngp", "ntk"):
            assert_array_equal(store.matrix(part, "C4", kernel), undisturbed.matrix(part, "C4", kernel))


def test_processes_that_die_or_stop(
    soaked: Callable[..., JobSpec], undisturbed: GramStore, tmp_path: Path, environment: dict[str, str]
) -> None:
    rng = random.Random(0)
    spec = soaked(tmp_path / "run")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    done: Counter[str] = Counter()
    rounds = missing = 0
    while done.total() < FAULTS or not rounds:
        with start(tmp_path, environment) as driver:
            give_up = time.monotonic() + LIMIT
            while driver.poll() is None:
                assert time.monotonic() < give_up, f"a run hangs after {done}"
                time.sleep(rng.uniform(0.5, 3.0))
                ready = done.total() < FAULTS and GramStore.exists(spec.store)
                if ready and (what := strike(driver, rng)):
                    done[what] += 1
            assert driver.stderr is not None
            words = driver.stderr.read()
        assert "Traceback" not in words, words
        if driver.returncode:
            assert driver.returncode == -signal.SIGKILL or "finished tiles are kept" in words, words
            continue
        rounds += 1
        store = GramStore.open(spec.store)
        compare(store, undisturbed)
        if done.total() < FAULTS:
            for tile in rng.sample(sorted(store.finished_tiles()), 120):
                store.discard_tile(tile)
            missing += 120
    events = Counter(json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines())
    again = events["TileStarted"] + events["TileCopied"] - len(undisturbed.info.tiling) - missing
    sys.stdout.write(f"{done.total()} faults ({dict(done)}), {rounds} finished runs; {again} tiles begun once more\n")
    assert 0 <= again <= done.total() * WORKERS * TILES_IN_FLIGHT


class Weather:
    """An S3 server's bad days: a proxy in front of it that fails, stalls and hangs up, if it is told to."""

    def __init__(self, upstream: str, seed: int) -> None:
        host, _, port = upstream.removeprefix("http://").partition(":")
        self.rng, self.bad, self.faults, self.lock = random.Random(seed), 0.0, Counter[str](), threading.Lock()
        self.down_until = 0.0
        weather = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with weather.lock:
                    bad = weather.rng.random() < weather.bad
                    kinds = ["500", "503", "slow", "hang up", "after the fact", "down"]
                    fault = weather.rng.choices(kinds, [5, 5, 5, 5, 5, 1])[0] if bad else ""
                    if time.monotonic() < weather.down_until:
                        fault = "hang up"  # as if the server were killed and started again
                    elif fault:
                        weather.faults[fault] += 1
                    if fault == "down":
                        weather.down_until, fault = time.monotonic() + 3, "hang up"
                if fault in ("500", "503"):
                    self.reply(int(fault), b"", {})
                    return
                if fault == "hang up":
                    self.close_connection = True
                    self.connection.close()
                    return
                if fault == "slow":
                    time.sleep(2)
                connection = http.client.HTTPConnection(host, int(port), timeout=60)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                content = response.read()
                if fault == "after the fact":  # it was done, but nobody hears of it
                    self.close_connection = True
                    self.connection.close()
                    return
                self.reply(response.status, content, dict(response.getheaders()))

            def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                length = headers.get("Content-Length", headers.get("content-length", "0"))
                self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def test_object_storage_that_fails_stalls_and_hangs_up(
    soaked: Callable[..., JobSpec], undisturbed: GramStore, object_storage: str, bucket: str, tmp_path: Path,
    environment: dict[str, str],
) -> None:  # fmt: skip
    weather = Weather(object_storage, seed=1)
    spec = soaked(f"{bucket}/run")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    environment |= {"AWS_ENDPOINT_URL": weather.url}
    rng, runs = random.Random(1), 0
    while weather.faults.total() < FAULTS or not runs:
        weather.bad = rng.choice([0.02, 0.1, 0.3]) if weather.faults.total() < FAULTS else 0.0
        with start(tmp_path, environment) as driver:
            _, words = driver.communicate(timeout=900)
        assert "Traceback" not in words, words
        if driver.returncode:
            assert driver.returncode == 1, words
            assert re.search(r"error: .*(nothing finished is lost|tiles are kept|failed 3 times)", words), words
            continue
        runs += 1
        weather.bad = 0.0
        fsspec.filesystem("s3").invalidate_cache()
        store = GramStore.open(spec.store)
        compare(store, undisturbed)
        for tile in rng.sample(sorted(store.finished_tiles()), 100):
            store.discard_tile(tile)
    sys.stdout.write(f"{weather.faults.total()} faults ({dict(weather.faults)}) in {runs} finished runs\n")
    weather.server.shutdown()
    weather.server.server_close()


def test_a_disk_that_fills(
    soaked: Callable[..., JobSpec], undisturbed: GramStore, tmp_path: Path, environment: dict[str, str],
    tmpfs: Callable[[str], Path],
) -> None:  # fmt: skip
    rng, disk = random.Random(2), tmpfs("size=8m")
    spec = soaked(disk / "run")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    stopped = rounds = 0
    while stopped < max(FAULTS // 20, 2):
        with start(tmp_path, environment) as driver:
            while driver.poll() is None and not GramStore.exists(spec.store):
                time.sleep(0.1)
            time.sleep(rng.uniform(0, 8))
            hog = disk / "hog"
            with contextlib.suppress(OSError), hog.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**12))
            _, words = driver.communicate(timeout=LIMIT)
        assert "Traceback" not in words, words
        if driver.returncode:
            assert driver.returncode == 1, words
            assert "No space left on device" in words, words
            stopped += 1
        hog.unlink()
        run(spec.model_copy(update={"resources": spec.resources.model_copy(update={"workers": 0})}))
        store = GramStore.open(spec.store)
        compare(store, undisturbed)
        assert not list(Path(spec.store).rglob("*.partial"))
        rounds += 1
        for tile in rng.sample(sorted(store.finished_tiles()), 120):
            store.discard_tile(tile)
    sys.stdout.write(f"the disk was full in {stopped} of {rounds} runs\n")
