"""What is kept of what happens: a log, metrics, and the history in the store, which outlives the process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
import zarr

import equigram.listeners
from equigram.errors import ResourceError, StoreError
from equigram.events import (
    ComputationEnded,
    ComputationStarted,
    Event,
    Note,
    Progress,
    TileCopied,
    TileFailed,
    TileFinished,
    TileStarted,
    WorkerLost,
    WorkerStarted,
    tell,
)
from equigram.listeners import EventLog, History, Metrics
from equigram.plan import Tile
from equigram.run import run
from equigram.screen import summary
from equigram.spec import JobSpec
from equigram.store import GramStore

Job = Callable[..., JobSpec]
Create = Callable[[JobSpec], GramStore]

PLAIN: dict[str, Any] = {"gram": {"groups": ["C1"], "tile": 4, "engine": "reference"}, "data": {"size": 4}}

TILE = Tile("gram", 0, 1)

STORY: list[Event] = [
    ComputationStarted(tiles=12, missing_tiles=3, pairs=105, missing_pairs=20, workers=2, host="here", process=7),
    WorkerStarted(0, "here, process 8", "znver4"),
    WorkerStarted(1, "there, process 9", "znver4"),
    TileStarted(TILE, 0),
    Progress("pairs", 85, 105),
    WorkerLost(0, "it was killed", tiles=1),
    TileFailed(TILE, 0, "its worker died", failures=1, pause=1.0),
    TileStarted(TILE, 1),
    TileCopied(TILE, 2),
    TileFinished(TILE, 1, 16, 2.5, "znver4", 0.25, 0.125, 2.0, 0.125),
    Note("a sentence — with a dash"),
    ComputationEnded(tiles=1, pairs=16, seconds=9.0, error=None),
]


def unheard(event: Event) -> None:
    """A listener that should hear nothing."""
    pytest.fail(f"heard {event}")


def told(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events without their times."""
    return [{name: value for name, value in event.items() if name != "time"} for event in events]


EXPECTED = [event.to_json() for event in STORY if not isinstance(event, Progress)]


def test_a_log_has_a_line_for_each_event_the_moment_it_happens(tmp_path: Path) -> None:
    with EventLog(tmp_path / "log.jsonl") as log:
        for event in STORY[:4]:
            log(event)
        assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    with EventLog(tmp_path / "log.jsonl") as log:
        for event in STORY[4:]:
            log(event)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert told(lines) == EXPECTED
    assert lines[3]["tile"] == "gram[0, 1]"
    assert all(line["time"].endswith("+00:00") for line in lines)


def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"the event log .*/nowhere/log cannot be written: No such file"):
        EventLog(tmp_path / "nowhere" / "log")


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_the_history_is_in_the_store_and_in_order(
    place: str, job: Job, create: Create, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equigram.listeners, "FLUSH_SECONDS", -1.0)
    where = [] if place == "folder" else [f"{request.getfixturevalue('bucket')}/run"]
    store = create(job(*where, **PLAIN))
    assert list(store.history()) == []
    history = History(store, unheard)
    for event in STORY:
        history(event)
    kept = list(GramStore.open(store.url).history())
    assert told(kept) == EXPECTED
    assert [event["time"] for event in kept] == sorted(event["time"] for event in kept)
    assert len(store.history_files()) == len(EXPECTED)


def test_the_history_does_not_disturb_readers_of_zarr(job: Job, create: Create) -> None:
    store = create(job(**PLAIN))
    history = History(store, unheard)
    history(STORY[0])
    root = zarr.open_group(store.url, mode="r")
    assert {name for name, _ in root.groups()} >= {"images", "gram", "history"}
    history(STORY[-1])
    with pytest.warns(zarr.errors.ZarrUserWarning) as warned:
        dict(root.members(max_depth=None))
    assert len(warned) == 1


def test_a_history_that_cannot_be_written_is_told_once_and_costs_nothing(job: Job, create: Create) -> None:
    class Full(GramStore):
        def write_history(self, name: str, lines: Any) -> None:
            raise StoreError("no space left")

    notes: list[Event] = []
    history = History(Full(create(job(**PLAIN)).url), notes.append)
    history(STORY[0])
    history(STORY[-1])
    assert notes == [Note("the history of the run is not written: no space left")]


def test_a_line_that_was_cut_off_is_passed_over(job: Job, create: Create) -> None:
    store = create(job(**PLAIN))
    folder = Path(store.url, "history/events")
    folder.mkdir()
    (folder / "1-here-7-000000.jsonl").write_text('{"event": "Note", "text": "whole"}\n{"event": "No')
    assert list(store.history()) == [{"event": "Note", "text": "whole"}]


def test_a_run_tells_what_it_did_and_status_sums_it_up(job: Job) -> None:
    events: list[Event] = []
    store = run(job(**PLAIN), events.append).store
    kinds = Counter(type(event).__name__ for event in events if not isinstance(event, (Note, Progress)))
    assert kinds == {
        "ComputationStarted": 1, "WorkerStarted": 1, "TileStarted": 12, "TileFinished": 12, "ComputationEnded": 1
    }  # fmt: skip
    kept = list(store.history())
    assert Counter(event["event"] for event in kept) == kinds
    assert kept[-1]["error"] is None
    for event in events:
        if isinstance(event, TileFinished):
            parts = (event.read_seconds, event.prepare_seconds, event.kernel_seconds, event.write_seconds)
            assert min(event.kernel_seconds, event.write_seconds) > 0
            assert sum(parts) == pytest.approx(event.seconds)
    assert summary(kept).startswith("1 computation, last event 20")
    assert len(store.info.processors) == len(store.info.all_versions) == 1
    assert summary([]) == "no tile was computed yet"
    words = summary([{"time": "2026-01-31T12:00:00.000+00:00", **event} for event in EXPECTED])
    assert words == (
        "1 computation, last event 2026-01-31 12:00 UTC; 2.5 s of workers, 80% in kernels; 1 worker lost; "
        "1 tile tried again; 1 late tile computed twice"
    )


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_metrics_are_served_for_prometheus() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with Metrics(port) as metrics:
        for event in STORY[:-1]:
            metrics(event)
        values = scrape(port)
        assert values["equigram_tiles_total"] == 1
        assert values["equigram_pairs_total"] == 16
        assert values["equigram_missing_tiles"] == 2
        assert values["equigram_workers"] == 1
        assert values["equigram_workers_lost_total"] == 1
        assert values["equigram_tile_failures_total"] == 1
        assert values["equigram_tile_copies_total"] == 1
        assert values["equigram_tile_seconds_sum"] == 2.5
        metrics(STORY[-1])
        assert scrape(port)["equigram_workers"] == 0
        with pytest.raises(
            ResourceError, match=rf"metrics cannot be served at 127.0.0.1:{port}: Address already in use"
        ):
            Metrics(port)


# Two drivers


def test_a_driver_that_is_at_work_is_told_of_and_one_that_is_gone_is_not(job: Job, create: Create) -> None:
    spec = job(**PLAIN)
    store = create(spec)

    def notes() -> list[str]:
        events: list[Event] = []
        run(spec, events.append)
        store.discard_tile(TILE)
        return [event.text for event in events if isinstance(event, Note) and "another driver" in event.text]

    begun = json.dumps({"event": "ComputationStarted"})
    store.write_history(f"20260101T000000.0Z-{socket.gethostname()}-999999999-000000", [begun])
    assert notes() == []
    store.write_history("20260101T000000.0Z-else-where-1-000000", [begun])
    assert notes()[0].startswith(
        "another driver (process 1 on else-where) was computing this store a moment ago; if it"
    )
    store.write_history("20260101T000000.0Z-else-where-1-000001", [json.dumps({"event": "ComputationEnded"})])
    assert notes() == []


def test_two_drivers_at_once_make_the_bits_of_one(job: Job, tmp_path: Path, create: Create) -> None:
    spec = job(gram={"groups": ["C4"], "tile": 2, "engine": "reference"}, solve=None)
    alone = create(job(tmp_path / "alone", gram={"groups": ["C4"], "tile": 2, "engine": "reference"}, solve=None))
    run(alone.info.spec)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    create(spec)
    command = [str(Path(sys.executable).with_name("equigram")), "run", "job.yaml"]
    drivers = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for driver in drivers:
        out, err = driver.communicate(timeout=120)
        assert driver.returncode == 0, err
        assert "all done" in out
    store = GramStore.open(spec.store)
    for kernel in ("nngp", "ntk"):
        assert (store.matrix("gram", "C4", kernel) == alone.matrix("gram", "C4", kernel)).all()


def test_the_history_of_a_killed_driver_is_there(job: Job, tmp_path: Path, create: Create) -> None:
    spec = job(gram={"groups": ["C4"], "tile": 2, "engine": "reference"}, solve=None)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    store = create(spec)
    command = [str(Path(sys.executable).with_name("equigram")), "run", "job.yaml", "--log", "log.jsonl"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        give_up = time.monotonic() + 90
        while len(store.finished_tiles()) < 2:
            assert time.monotonic() < give_up
            time.sleep(0.02)
        os.kill(driver.pid, signal.SIGKILL)
    assert [event["event"] for event in store.history()] == ["ComputationStarted"]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "TileFinished" for event in log) >= 2


def test_one_listener_for_several() -> None:
    first: list[Event] = []
    second: list[Event] = []
    tell(first.append, second.append)(STORY[0])
    assert first == second == STORY[:1]
