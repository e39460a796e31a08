"""The service under load and faults: a real client against a real service, on one machine.

    make load

Prints what was measured beside what is wanted, and ends with 1 where something that was answered is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from equigram.api.cluster import LocalCluster
from equigram.api.drive import success
from equigram.api.journal import LIVE_SECONDS
from equigram.api.records import Record, Records, now
from equigram.api.watch import POLL_SECONDS
from equigram.run import run
from equigram.spec import JobSpec
from equigram.store import GramStore

PATIENCE = 300.0


class Service:
    """A service in a process of its own, over one root."""

    def __init__(self, folder: Path) -> None:
        self.root, self.data, self._state = folder / "root", folder / "data", folder / "state"
        self.data.mkdir()
        self._log = folder / "service.log"
        self._process: subprocess.Popen[str] | None = None
        self._port, self.url = 0, ""

    def start(self) -> None:
        """Start it, at the same place as before."""
        command = [sys.executable, "-m", "equigram.cli", "serve", str(self.root), "--port", str(self._port)]
        command += ["--read", str(self.data), "--max-jobs", "2000"]
        with self._log.open("a") as log:
            environment = os.environ | {"XDG_STATE_HOME": str(self._state), "COLUMNS": "200"}
            self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        match = re.search(r"at (http://127\.0\.0\.1:(\d+))", self._process.stdout.readline())
        assert match, self._log.read_text()
        self.url, self._port = match[1], int(match[2])

    def wait_until_ready(self) -> None:
        """Wait until it has found its cluster and its jobs."""
        until(lambda: httpx.get(f"{self.url}/readyz").status_code == 200, "the service is not ready")

    def kill(self) -> None:
        """End it without a word."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def cpu_seconds(self) -> float:
        """Processor time that it has taken."""
        assert self._process is not None
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        """End it, and its cluster."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()
        os.environ["XDG_STATE_HOME"] = str(self._state)
        LocalCluster(str(self.root)).stop()


def until(done: Callable[[], object], what: str) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(httpx.TransportError):
            if done():
                return
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.1)


def images(folder: Path, count: int, size: int) -> str:
    """A file of random images of three classes."""
    path, rng = folder / f"{count}x{size}.npz", np.random.default_rng(0)
    pixels, labels = rng.integers(0, 255, (count, size, size), dtype=np.uint8), np.arange(count) % 3
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels[:6], y_test=labels[:6])
    return str(path)


def job(service: Service, name: str, count: int, size: int, tile: int) -> dict[str, Any]:
    """A job on random images."""
    gram = {"groups": ["C1"], "kernels": ["ntk"], "tile": tile}
    return {
        "store": name,
        "data": {"train": images(service.data, count, size)},
        "network": {"depth": 2},
        "gram": gram,
        "solve": {"ridge": 0.01},
    }


def submit(service: Service, spec: dict[str, Any]) -> httpx.Response:
    """Submit a job."""
    return httpx.post(f"{service.url}/jobs", json={"spec": spec}, timeout=60)


def detail(service: Service, name: str) -> dict[str, Any]:
    """What the service says of a job."""
    return dict(httpx.get(f"{service.url}/jobs/{name}", timeout=60).json())


# ---------------------------------------------------------------------- watchers


async def _hear(url: str, delays: list[float]) -> None:
    """Read all events of a job until it has ended, and note how long each took to come."""
    async with httpx.AsyncClient(timeout=None) as client, client.stream("GET", url) as answer:
        joined = time.time()
        async for line in answer.aiter_lines():
            if line.startswith("data: ") and '"time"' in line:
                sent = datetime.fromisoformat(json.loads(line[6:])["time"]).timestamp()
                if sent > joined:
                    delays.append(time.time() - sent)


async def _read(url: str) -> None:
    """Read all events of a job until it has ended, and do nothing with them."""
    async with httpx.AsyncClient(timeout=None) as client, client.stream("GET", url) as answer:
        async for _ in answer.aiter_raw():
            pass


def watchers(url: str, count: int, *, hear: bool) -> None:
    """Watch a job with many connections; prints the delays of events as JSON. In a process of its own.

    Those that do not hear stand for watchers on other machines: they leave the processors to the job.
    """

    async def all_of_them() -> list[float]:
        delays: list[float] = []
        await asyncio.gather(*(_hear(url, delays) if hear else _read(url) for _ in range(count)))
        return delays

    if not hear:
        os.nice(19)
    delays = np.array(asyncio.run(all_of_them()))
    quantiles = np.quantile(delays, [0.5, 0.95, 0.99]) if len(delays) else np.full(3, np.nan)
    print(json.dumps({"events": len(delays), "quantiles": quantiles.tolist()}), flush=True)


def watched_job(service: Service, name: str, count: int, *, hear: bool = False) -> tuple[float, float, dict[str, Any]]:
    """Run a job with so many watchers; seconds of its tiles, processor seconds of the service, and the delays."""
    before, heard = service.cpu_seconds(), {}
    assert submit(service, job(service, name, 800, 16, 24)).status_code == 201
    if count:
        command = [sys.executable, __file__, "--watch", f"{service.url}/jobs/{name}/events?follow=false"]
        command += ["--count", str(count), *(["--hear"] if hear else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        heard = json.loads(done.stdout)
    while detail(service, name)["state"] != "done":
        time.sleep(3)
    records = Records(str(service.root))
    record = records.record(name)
    assert record is not None
    folder = records.attempt(record, 1)
    parts = [folder.read(part) or b"" for part in folder.names() if part.endswith(".jsonl")]
    ends = [json.loads(line) for part in parts for line in part.splitlines() if b'"ComputationEnded"' in line]
    return float(ends[-1]["seconds"]), service.cpu_seconds() - before, heard


def measure_watchers(service: Service, count: int, rounds: int) -> None:
    """Delay of events for many watchers, and what they cost the job."""
    watched_job(service, "first", 0)  # compiles
    _, _, heard = watched_job(service, "heard", count, hear=True)
    median, late, latest = heard["quantiles"]
    beside = 1000 * (late - LIVE_SECONDS - POLL_SECONDS)
    say(f"events heard by {count} watchers", f"{heard['events']:,}")
    say("delay of an event, median", f"{median:.3f} s, with up to {LIVE_SECONDS:g} + {POLL_SECONDS:g} s of polling")
    say("delay of an event, 95th percentile", f"{late:.3f} s: {beside:+.0f} ms beside polling; wanted: +100")
    say("delay of an event, 99th percentile", f"{latest:.3f} s")
    ratios, cost = [], []
    for number in range(rounds):
        alone, cpu_alone, _ = watched_job(service, f"alone{number}", 0)
        watched, cpu, _ = watched_job(service, f"watched{number}", count)
        ratios.append(watched / alone)
        cost.append((cpu - cpu_alone) / (watched * (psutil.cpu_count() or 1)))
    say("time of the job, watched ÷ alone", f"{', '.join(f'{one:.3f}' for one in ratios)}; wanted: 1.02")
    say("processors taken by the service for them", f"{np.median(cost):.1%} of the machine")


# ---------------------------------------------------------------------- lists and submissions


def many_jobs(service: Service, count: int) -> None:
    """A root with many finished jobs: one that was run, and copies of it."""
    spec = job(service, "original", 12, 8, 8)
    store = run(JobSpec.parse({**spec, "store": str(service.root / "original"), "resources": {"workers": 0}})).store
    records, fields = Records(str(service.root)), JobSpec.parse(spec).to_store()
    for number in range(count):
        name = f"copy{number:04}"
        shutil.copytree(service.root / "original", service.root / name)
        record = Record(
            id=name, nonce="00000000", spec={**fields, "store": name}, owner="local", priority=0, submitted=now()
        )
        records.submit(record)
        records.end(record, 1, success(store))


def measure_lists(service: Service, count: int) -> None:
    """The time to find and to list many jobs."""
    began = time.monotonic()
    until(
        lambda: len(httpx.get(f"{service.url}/jobs?limit=10000", timeout=60).json()) > count, "the jobs are not found"
    )
    say(f"a new service finds {count:,} finished jobs", f"{time.monotonic() - began:.1f} s")
    with httpx.Client(base_url=service.url, timeout=60) as client:
        times = []
        for _ in range(20):
            began = time.perf_counter()
            assert len(client.get("/jobs?limit=10000").json()) > count
            times.append(time.perf_counter() - began)
    say(f"{count:,} jobs listed", f"{1000 * np.median(times):.0f} ms, {1000 * max(times):.0f} at most; wanted: 300")


def measure_submissions(service: Service, count: int) -> None:
    """Many submissions at the same moment: all are kept, or refused with a sentence."""
    barrier = threading.Barrier(count)

    def one(number: int) -> int:
        spec = job(service, f"burst{number}", 12, 8, 8)
        barrier.wait()
        return submit(service, spec).status_code

    began = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        codes = list(pool.map(one, range(count)))
    say(
        f"{count} submissions at once",
        f"{codes.count(201)} kept in {time.monotonic() - began:.1f} s; others: {set(codes) - {201}}",
    )
    kept = {one["id"] for one in httpx.get(f"{service.url}/jobs?limit=10000", timeout=60).json()}
    check(all(f"burst{number}" in kept for number, code in enumerate(codes) if code == 201), "a submission was lost")
    for number in range(count):
        httpx.post(f"{service.url}/jobs/burst{number}/cancel", timeout=60)


# ---------------------------------------------------------------------- kills


def kills(service: Service, rounds: int, seed: int) -> None:
    """``kill -9`` of the service during each kind of request, at random moments: what was answered is there."""
    rng = random.Random(seed)
    for number in range(rounds):
        for kind in ("submit", "cancel", "resume", "delete", "upload", "gram", "list", "result"):
            _kill_during(service, kind, f"{kind}{number}", rng.uniform(0, 0.08))
    say("killed during each kind of request", f"{8 * rounds} times; nothing that was answered was lost")


def _kill_during(service: Service, kind: str, name: str, moment: float) -> None:
    spec = job(service, name, 12, 8, 8)
    with httpx.Client(base_url=service.url, timeout=60) as client:
        if kind in ("cancel", "resume"):
            assert client.post("/jobs", json={"spec": spec}).status_code == 201
        if kind == "resume":
            client.post(f"/jobs/{name}/cancel")
            until(lambda: client.get(f"/jobs/{name}").json()["state"] == "cancelled", f"{name} is not cancelled")
        if kind == "delete":
            name = rng_copy(service)
        answers: list[httpx.Response] = []
        content = Path(images(service.data, 12, 8)).read_bytes() + name.encode()

        def ask() -> None:
            with contextlib.suppress(httpx.TransportError):
                match kind:
                    case "submit":
                        answers.append(client.post("/jobs", json={"spec": spec}))
                    case "cancel" | "resume":
                        answers.append(client.post(f"/jobs/{name}/{kind}"))
                    case "delete":
                        answers.append(client.delete(f"/jobs/{name}"))
                    case "upload":
                        answers.append(client.post("/uploads", content=content, headers={"X-Filename": "x.npz"}))
                    case "gram":
                        answers.append(client.get("/jobs/copy0000/gram/C1/ntk"))
                    case "list":
                        answers.append(client.get("/jobs"))
                    case _:
                        answers.append(client.get("/jobs/copy0000/result"))

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(moment)
        service.kill()
        asking.join()
    service.start()
    service.wait_until_ready()
    code = answers[0].status_code if answers else None
    there = httpx.get(f"{service.url}/jobs/{name}", timeout=60).status_code == 200
    stored = (service.root / name).exists()
    match kind:
        case "submit":
            check(there or code is None, f"{name} was accepted and is gone")
            check(submit(service, spec).status_code == (200 if there else 201), f"{name} cannot be submitted again")
        case "cancel":
            check(there, f"{name} is gone")
            if code == 200:
                until(lambda: detail(service, name)["state"] in ("cancelled", "done"), f"{name} goes on")
        case "resume":
            check(there, f"{name} is gone")
            if code == 200:
                check(detail(service, name)["state"] != "cancelled", f"{name} does not go on")
        case "delete":
            check(there == stored or not there, f"{name} is half deleted and listed")
            until(lambda: there or not (service.root / name).exists(), f"{name} was deleted and is still stored")
            if there:
                check(httpx.delete(f"{service.url}/jobs/{name}", timeout=60).status_code == 204, f"{name} stays")
        case "upload":
            kept = list((service.root / ".equigram/uploads").glob("*.npz"))
            check(all(len(file.name) == 64 + 4 for file in kept), "half an upload is kept")
        case _:
            check(GramStore.open(str(service.root / "copy0000")).matrix("gram", "C1", "ntk").shape == (12, 12), "lost")
    for one in httpx.get(f"{service.url}/jobs?state=queued,starting,running", timeout=60).json():
        httpx.post(f"{service.url}/jobs/{one['id']}/cancel", timeout=60)


def rng_copy(service: Service) -> str:
    """A finished job that is still there."""
    return str(next(path.name for path in sorted(service.root.glob("copy*"), reverse=True)))


FAILURES: list[str] = []


def check(holds: bool, otherwise: str) -> None:
    """Remember what does not hold."""
    if not holds:
        FAILURES.append(otherwise)
        print(f"WRONG: {otherwise}", flush=True)


def say(what: str, found: str) -> None:
    """A line of the table."""
    print(f"{what:<44} {found}", flush=True)


@contextlib.contextmanager
def served() -> Iterator[Service]:
    """A service over a new root."""
    with tempfile.TemporaryDirectory(prefix="equigram-load-", ignore_cleanup_errors=True) as folder:
        service = Service(Path(folder))
        try:
            yield service
        finally:
            service.close()


def main() -> int:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--watchers", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--hear", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.watch:
        watchers(given.watch, given.count, hear=given.hear)
        return 0
    with served() as service:
        service.start()
        service.wait_until_ready()
        measure_watchers(service, given.watchers, given.rounds)
        service.kill()
        many_jobs(service, given.jobs)
        service.start()
        measure_lists(service, given.jobs)
        service.wait_until_ready()
        measure_submissions(service, 50)
        kills(service, given.rounds, given.seed)
    return 1 if FAILURES else 0


if __name__ == "__main__":
    sys.exit(main())
