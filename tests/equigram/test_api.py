"""The service over HTTP, with a real server and real stores; only where drivers run is scripted."""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import httpx
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from equigram.api import watch
from equigram.api.app import make_app
from equigram.api.cluster import Status
from equigram.api.drive import success
from equigram.api.folder import Folder
from equigram.api.guard import HEADERS
from equigram.api.job import Limits, driver_name
from equigram.api.journal import Journal
from equigram.api.models import ErrorDetail, NodeView
from equigram.api.records import Outcome, Record, Records, Wish, now
from equigram.api.security import Readable, Tokens
from equigram.errors import ClusterError, JobNotFoundError
from equigram.events import (
    ComputationStarted,
    Note,
    Progress,
    TileFailed,
    TileFinished,
    TileStarted,
    WorkerLost,
    WorkerStarted,
)
from equigram.plan import Tile
from equigram.run import run
from equigram.spec import JobSpec
from equigram.store import GramStore

WRITE, READ = "a-token-that-may-write", "a-token-that-may-read"
PATIENCE = 30.0


class Script:
    """Drivers that do what a test says."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.known: dict[str, Status] = {}
        self.down = False

    def __call__(self) -> Script:
        return self

    def submit(self, name: str, arguments: list[str]) -> None:
        self._answer()
        if name not in self.known:  # Ray keeps the names of those that have ended
            self.started.append(re.sub(r"^equigram-(.+)-[0-9a-f]{8}-(\d+)$", r"\1 \2", name))
            self.known[name] = "running"

    def statuses(self) -> dict[str, Status]:
        self._answer()
        return dict(self.known)

    def stop(self, name: str) -> None:
        self._answer()
        self.stopped.append(re.sub(r"^equigram-(.+)-[0-9a-f]{8}-(\d+)$", r"\1 \2", name))
        self.known[name] = "ended"

    def log(self, name: str) -> str:
        self._answer()
        if name not in self.known:
            raise JobNotFoundError(f"Ray has no log of {name}")
        return "one\ntwo\nthree\n"

    def nodes(self) -> list[NodeView]:
        return [NodeView(name="here", alive=True, cpus=8, gpus=0, memory=2**30)]

    def _answer(self) -> None:
        if self.down:
            raise ClusterError("the Ray cluster does not answer")


class Served:
    """A service that listens, and what it runs on."""

    def __init__(self, root: Path, url: str, script: Script, client: httpx.Client) -> None:
        self.root, self.url, self.script, self.client = root, url, script, client
        self.records = Records(str(root))

    def submit(self, name: str | None = "a", status: int = 201, **sections: Any) -> dict[str, Any]:
        spec = {"data": {"train": f"{self.root.parent}/data/x.npz"}, **sections} | ({"store": name} if name else {})
        answer = self.client.post("/jobs", json={"spec": spec})
        assert answer.status_code == status, answer.text
        return dict(answer.json())

    def job(self, name: str = "a") -> dict[str, Any]:
        answer = self.client.get(f"/jobs/{name}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait_for(self, state: str, name: str = "a") -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while (found := self.job(name))["state"] != state:
            assert time.monotonic() < deadline, f"{name} is {found['state']}, and not {state}: {found['error']}"
            time.sleep(0.02)
        return found

    def record(self, name: str = "a") -> Record:
        found = self.records.record(name)
        assert found is not None
        return found

    def attempt(self, name: str = "a", attempt: int = 1) -> Folder:
        return self.records.attempt(self.record(name), attempt)

    def end(self, outcome: Outcome, name: str = "a", attempt: int = 1) -> None:
        """Have a driver end."""
        self.records.end(self.record(name), attempt, outcome)
        self.lose(name, attempt)

    def lose(self, name: str = "a", attempt: int = 1) -> None:
        """Have a driver end without a word."""
        self.script.known[driver_name(self.record(name), attempt)] = "ended"


def until(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look more often than people need."""
    for name, seconds in (("POLL", 0.02), ("RAY", 0.02), ("SCAN", 0.1), ("GRACE", 0.3)):
        monkeypatch.setattr(watch, f"{name}_SECONDS", seconds)


Serve = Callable[..., contextlib.AbstractContextManager[Served]]


@pytest.fixture
def serve(tmp_path: Path, quick: None, listen: Callable[..., Any]) -> Serve:
    """Serves a root; again over the same one, it is as if the service was started again."""

    @contextlib.contextmanager
    def begin(
        script: Script | None = None,
        tokens: str = "",
        **limits: Any,
    ) -> Iterator[Served]:
        root, script = tmp_path / "root", script or Script()
        readable = Readable([f"{tmp_path}/data"])
        app = make_app(Records(str(root)), script, Tokens(tokens, "test"), readable, replace(Limits(), **limits), [])
        headers = {"authorization": f"Bearer {WRITE}"} if tokens else {}
        with listen(app) as url, httpx.Client(base_url=url, headers=headers, timeout=PATIENCE) as client:
            yield Served(root, url, script, client)

    return begin


@pytest.fixture
def served(serve: Serve) -> Iterator[Served]:
    with serve() as one:
        yield one


@pytest.fixture
def finished(serve: Serve, npz: Path, tmp_path: Path) -> Iterator[Served]:
    """With a job ``a`` of C1 and C4 on 10 training and 5 test images that is done."""
    with serve() as one:
        (tmp_path / "data").mkdir()
        (tmp_path / "data/x.npz").write_bytes(npz.read_bytes())
        gram = {"groups": ["C1", "C4"], "tile": 4}
        one.submit(network={"depth": 2}, gram=gram)
        one.wait_for("starting")
        spec = JobSpec.parse(
            {
                "store": str(one.root / "a"),
                "data": {"train": str(tmp_path / "data/x.npz")},
                "network": {"depth": 2},
                "gram": gram,
                "resources": {"workers": 0},
            }
        )
        with Journal(one.attempt()) as journal:
            store = run(spec, journal).store
        one.records.figures(one.record()).write("spectrum.png", b"a picture")
        one.end(success(store))
        one.wait_for("done")
        yield one


def error(answer: httpx.Response) -> tuple[int, str, str]:
    detail = answer.json()["error"]
    return answer.status_code, detail["type"], detail["message"]


# ---------------------------------------------------------------------- jobs


def test_a_job_is_queued_started_watched_and_done(served: Served) -> None:
    job = served.submit()
    assert (job["id"], job["owner"], job["attempt"]) == ("a", "local", 1)
    assert job["state"] in ("queued", "starting")
    served.wait_for("starting")
    assert served.script.started == ["a 1"]
    with Journal(served.attempt()) as journal:
        journal(Note("a sentence"))
        journal(Progress("images", 3, 10))
        job = served.wait_for("running")
        while not (job["notes"] and job["progress"]):
            job = served.job()
        assert (job["notes"], job["progress"]["stage"]) == (["a sentence"], "images")
        assert job["share"] == 1
    served.end(Outcome(state="done", ended=now(), headline="accuracy 90.0%"))
    assert served.wait_for("done")["headline"] == "accuracy 90.0%"


def test_the_same_job_again_is_the_same_job_and_another_of_its_name_is_refused(served: Served) -> None:
    first = served.submit()
    assert served.submit(status=200)["submitted"] == first["submitted"]
    kind = served.submit(status=409, gram={"groups": ["C1"]})["error"]
    assert kind["type"] == "ConflictError"
    assert "there is another job a, with another gram.groups" in kind["message"]


def test_a_job_that_has_ended_is_solved_again_as_another_one_of_its_name_asks(finished: Served) -> None:
    gram = {"groups": ["C1", "C4"], "tile": 4}
    job = finished.submit(network={"depth": 2}, gram=gram, solve={"ridge": 0.5}, status=200)
    assert (job["state"] in ("queued", "starting"), job["attempt"], job["spec"]["solve"]["ridge"]) == (True, 1, [0.5])
    assert finished.submit(network={"depth": 2}, gram=gram, status=409)["error"]["type"] == "ConflictError"
    finished.wait_for("starting")
    finished.end(Outcome(state="failed", ended=now()))
    finished.wait_for("failed")
    said = finished.submit(network={"depth": 1}, gram=gram, status=409)["error"]["message"]
    assert "another network.depth, solve.ridge" in said


def test_a_job_that_failed_before_it_stored_anything_can_be_corrected(served: Served) -> None:
    served.submit()
    served.wait_for("starting")
    served.end(Outcome(state="failed", ended=now()))
    served.wait_for("failed")
    assert served.submit(status=200, gram={"groups": ["C1"]})["groups"] == ["C1"]
    served.wait_for("starting")
    assert served.script.started == ["a 1", "a 1"]


def test_a_key_names_a_job_that_has_no_store(served: Served) -> None:
    spec = {"spec": {"data": {"train": f"{served.root.parent}/data"}}}
    first = served.client.post("/jobs", json=spec, headers={"Idempotency-Key": "k"})
    again = served.client.post("/jobs", json=spec, headers={"Idempotency-Key": "k"})
    other = served.client.post("/jobs", json=spec, headers={"Idempotency-Key": "l"})
    none = served.client.post("/jobs", json=spec)
    assert [one.status_code for one in (first, again, other, none)] == [201, 200, 201, 201]
    assert first.json()["id"] == again.json()["id"]
    assert len({one.json()["id"] for one in (first, other, none)}) == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "a: data: this field is required"),
        ({"data": {"train": "x"}, "gram": {"groups": ["C0"]}}, "gram.groups"),
        ({"data": {"train": "x"}}, "data.train = 'x': this service lets jobs read"),
        ({"data": {"train": "/etc/passwd"}}, "data.train = '/etc/passwd': this service lets jobs read"),
        ({"data": {"train": f"upload:{'0' * 64}.npz"}}, "nothing of that name was uploaded here"),
        ({"data": {"train": "upload:../../x"}}, "nothing of that name was uploaded here"),
        ({"data": {"train": "DATA"}, "store": "/etc"}, "store = '/etc' is not below the root"),
        ({"data": {"train": "DATA"}, "store": "s3://b/x"}, "store = 's3://b/x' is not below the root"),
        ({"data": {"train": "DATA"}, "store": "../x"}, "store = '../x' is not below the root"),
        ({"data": {"train": "DATA"}, "store": ".equigram"}, "cannot name a job"),
        ({"data": {"train": "DATA"}, "resources": {"address": "1.2.3.4:6379"}}, "a service has its own cluster"),
        ({"data": {"train": "DATA"}, "resources": {"workers": 0}}, "a service computes with workers"),
        (
            {"data": {"train": "DATA"}, "storage_options": {"s3": {"secret": "hush"}}},
            "a service opens its storage itself",
        ),
        ({"data": {"train": "DATA/\\ud800"}}, "the job cannot be written as text"),
        ({"data": {"train": "DATA"}, "solve": {"ridge": [0.1, 0.1]}}, "0.1 is named twice"),
        ({"data": {"train": "DATA" + "/x" * 5000}}, "data.train"),
        ({"data": {"train": "DATA"}, "storage_options": "hush"}, "a service opens its storage itself"),
    ],
)
def test_a_job_that_cannot_be_is_one_sentence(served: Served, spec: dict[str, Any], message: str) -> None:
    text = (
        json.dumps({"spec": {"store": "a", **spec}})
        .replace("\\\\ud8", "\\ud8")
        .replace("DATA", f"{served.root.parent}/data")
    )
    status, kind, said = error(served.client.post("/jobs", content=text, headers={"content-type": "application/json"}))
    assert status == 422
    assert kind in ("SpecError", "ForbiddenUrlError")
    assert message in said
    assert "hush" not in said
    assert served.client.get("/jobs").json() == []


def test_a_cancelled_job_ends_keeps_its_place_and_goes_on(served: Served) -> None:
    served.submit()
    served.wait_for("starting")
    assert served.client.post("/jobs/a/cancel").status_code == 200
    served.wait_for("cancelled")
    assert served.script.stopped == ["a 1"]
    assert error(served.client.post("/jobs/a/cancel"))[:2] == (409, "ConflictError")
    assert served.client.post("/jobs/a/resume").json()["attempt"] == 2
    served.wait_for("starting")
    assert served.script.started == ["a 1", "a 2"]
    assert error(served.client.post("/jobs/a/resume"))[:2] == (409, "ConflictError")


def test_a_queued_job_can_be_cancelled_before_it_starts(serve: Serve) -> None:
    with serve(concurrency=1) as served:
        served.submit("a")
        served.wait_for("starting")
        served.submit("b")
        assert served.job("b")["state"] == "queued"
        assert served.client.post("/jobs/b/cancel").json()["state"] == "cancelled"
        served.end(Outcome(state="done", ended=now()))
        served.wait_for("done")
        assert served.script.started == ["a 1"]


def test_a_failed_job_says_why_and_the_same_job_submitted_again_goes_on(served: Served) -> None:
    served.submit()
    served.wait_for("starting")
    why = ErrorDetail(type="DataError", message="there are no images")
    served.end(Outcome(state="failed", ended=now(), error=why))
    assert served.wait_for("failed")["error"] == why.model_dump()
    assert served.submit(status=200)["attempt"] == 2


def test_a_lost_driver_is_followed_by_another_and_after_three_in_a_row_the_job_fails(served: Served) -> None:
    served.submit()
    for attempt in (1, 2, 3):
        until(lambda: f"a {attempt}" in served.script.started)  # noqa: B023
        served.lose("a", attempt)
    said = served.wait_for("failed")["error"]
    assert said["type"] == "JobFailedError"
    assert "3 drivers of a in a row were killed" in said["message"]


def test_jobs_wait_for_each_other_and_share_the_cluster_by_priority(serve: Serve) -> None:
    with serve(concurrency=2) as served:
        for name in ("a", "b", "c"):
            served.submit(name)
        spec = {"store": "d", "data": {"train": f"{served.root.parent}/data"}}
        served.client.post("/jobs", json={"spec": spec, "priority": 10})
        served.wait_for("starting", "b")
        assert [served.job(name)["state"] for name in "cd"] == ["queued"] * 2
        served.end(Outcome(state="done", ended=now()), "a")
        served.wait_for("starting", "d")
        assert served.job("c")["state"] == "queued"
        deadline = time.monotonic() + PATIENCE
        while (share := served.records.share(served.record("d"))) is None or share.begin == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert share.end - share.begin == pytest.approx(2 / 3)


def test_a_deleted_job_is_gone_and_a_running_one_is_not_deleted(finished: Served) -> None:
    assert finished.client.delete("/jobs/a").status_code == 204
    assert error(finished.client.get("/jobs/a"))[:2] == (404, "JobNotFoundError")
    assert not (finished.root / "a").exists()
    finished.submit("b")
    finished.wait_for("starting", "b")
    assert error(finished.client.delete("/jobs/b"))[:2] == (409, "ConflictError")


def test_runs_that_were_not_submitted_are_found_and_can_be_resumed(
    served: Served, job: Callable[..., JobSpec], create: Any, compute: Any, npz: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.npz").write_bytes(npz.read_bytes())
    data = {"train": str(tmp_path / "data/x.npz")}
    store = create(job(store=served.root / "theirs", data=data))
    deadline = time.monotonic() + PATIENCE
    while not served.client.get("/jobs").json():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    found = served.job("theirs")
    assert (found["state"], found["owner"], found["train"]) == ("incomplete", None, 10)
    assert found["counts"]["finished"] == 0
    compute(store)
    answer = served.client.post("/jobs/theirs/resume")
    assert answer.status_code == 422  # its `workers: 0` is the command line's
    assert "resources.workers = 0" in answer.text


# ---------------------------------------------------------------------- a service that dies


def test_a_service_that_is_started_again_finds_everything(serve: Serve) -> None:
    script = Script()
    with serve(script, concurrency=2) as served:
        for name in ("done", "failed", "cancelled", "running", "queued"):
            served.submit(name)
            if name in ("done", "failed", "cancelled"):
                served.wait_for("starting", name)
            if name == "done":
                served.end(Outcome(state="done", ended=now()), name)
            elif name == "failed":
                error = ErrorDetail(type="DataError", message="no images")
                served.end(Outcome(state="failed", ended=now(), error=error), name)
            elif name == "cancelled":
                served.client.post(f"/jobs/{name}/cancel")
            if name in ("done", "failed", "cancelled"):
                served.wait_for(name, name)
        served.submit("filler")
        served.wait_for("starting", "running")
    with Journal(served.attempt("running")) as journal:
        journal(Note("while nobody looked"))
    with serve(script, concurrency=2) as served:
        for name in ("done", "failed", "cancelled", "running"):
            served.wait_for(name, name)
        assert served.job("running")["notes"] == ["while nobody looked"]
    assert len(script.started) == len(set(script.started))


def test_a_driver_that_ended_while_the_service_was_down_is_known_by_what_it_wrote(serve: Serve) -> None:
    script = Script()
    with serve(script) as served:
        served.submit()
        served.wait_for("starting")
    served.end(Outcome(state="done", ended=now()))
    script.known.clear()  # the cluster was thrown away, too
    with serve(script) as served:
        served.wait_for("done")
    assert script.started == ["a 1"]


def test_a_cluster_that_was_lost_is_followed_by_another_driver(serve: Serve) -> None:
    script = Script()
    with serve(script) as served:
        served.submit()
        served.wait_for("starting")
        with Journal(served.attempt()):
            pass
    script.known.clear()
    with serve(script) as served:
        deadline = time.monotonic() + PATIENCE
        while len(script.started) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert script.started == ["a 1", "a 2"]


def test_a_cluster_that_does_not_answer_is_said_and_nothing_is_lost(served: Served) -> None:
    served.submit()
    served.wait_for("starting")
    served.script.down = True
    deadline = time.monotonic() + PATIENCE
    while (ready := served.client.get("/readyz")).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "cluster" not in ready.text
    assert served.client.get("/service").json()["trouble"] == "the Ray cluster does not answer"
    assert served.client.get("/healthz").status_code == 200
    served.submit("b")
    assert error(served.client.get("/jobs/a/log"))[:2] == (503, "ClusterError")
    served.script.down = False
    served.wait_for("starting", "b")
    assert served.job("a")["attempt"] == 1
    assert served.client.get("/jobs/a/log", params={"lines": 2}).text == "two\nthree\n"


def test_many_submissions_at_once_are_all_kept(served: Served) -> None:
    def submit(number: int) -> int:
        spec = {"store": f"job{number % 40}", "data": {"train": f"{served.root.parent}/data"}}
        with httpx.Client(base_url=served.url, timeout=PATIENCE) as client:
            return client.post("/jobs", json={"spec": spec}).status_code

    with ThreadPoolExecutor(50) as pool:
        codes = list(pool.map(submit, range(50)))
    assert sorted(codes) == [200] * 10 + [201] * 40
    assert len(served.client.get("/jobs").json()) == 40
    assert sorted(served.records.ids()) == sorted(f"job{number}" for number in range(40))


# ---------------------------------------------------------------------- moments at which something may happen


def test_a_job_with_the_name_of_a_deleted_one_starts_afresh(finished: Served) -> None:
    assert finished.client.delete("/jobs/a").status_code == 204
    finished.submit("a", gram={"groups": ["C4"]})
    job = finished.wait_for("starting")
    assert (job["attempt"], job["figures"], job["headline"], job["started"]) == (1, [], None, None)
    assert finished.script.started == ["a 1", "a 1"]


def test_a_driver_that_ray_took_without_answering_is_stopped_when_its_job_is_cancelled(served: Served) -> None:
    take = served.script.submit

    def take_and_fail(name: str, arguments: list[str]) -> None:
        take(name, arguments)
        raise ClusterError("no answer")

    served.script.submit = take_and_fail  # type: ignore[method-assign]
    served.submit()
    until(lambda: served.script.started)
    served.client.post("/jobs/a/cancel")
    until(lambda: served.script.stopped)
    served.wait_for("cancelled")


def test_a_cancellation_outlives_the_service(serve: Serve) -> None:
    script = Script()
    with serve(script) as served:
        served.submit()
        served.wait_for("starting")
        script.down = True  # it cannot be told to stop
        assert served.client.post("/jobs/a/cancel").status_code == 200
    script.down = False
    with serve(script) as served:
        until(lambda: script.stopped == ["a 1"])
        served.wait_for("cancelled")


def test_a_job_that_is_cancelled_and_resumed_at_once_has_one_driver_at_a_time(served: Served) -> None:
    served.submit()
    served.wait_for("starting")
    served.client.post("/jobs/a/cancel")
    served.wait_for("cancelled")
    name = driver_name(served.record(), 1)
    served.script.known[name] = "running"  # Ray takes its time
    served.script.stopped.clear()
    served.client.post("/jobs/a/resume")
    until(lambda: served.script.stopped)  # it is told again, and ends
    until(lambda: "a 2" in served.script.started)
    assert served.script.known[name] == "ended"


def test_a_job_whose_driver_still_runs_is_not_deleted(served: Served) -> None:
    served.submit()
    served.wait_for("starting")
    served.client.post("/jobs/a/cancel")
    served.wait_for("cancelled")
    served.script.stop = lambda name: None  # type: ignore[method-assign]
    served.script.known[driver_name(served.record(), 1)] = "running"
    assert error(served.client.delete("/jobs/a"))[:2] == (409, "ConflictError")


def test_one_job_that_cannot_be_read_keeps_no_other_one_from_running(serve: Serve) -> None:
    with serve(concurrency=8) as served:
        served.submit("a")
        served.wait_for("starting")
        served.attempt().write("outcome.json", b"{")
        served.submit("b")
        served.wait_for("starting", "b")
        assert served.job("a")["state"] == "starting"


def test_a_folder_that_is_no_run_is_neither_taken_nor_deleted(served: Served) -> None:
    (served.root / "precious").mkdir(parents=True)
    (served.root / "precious/thesis.txt").write_text("mine")
    said = served.submit("precious", status=409)["error"]
    assert "already holds something that is not an equigram run" in said["message"]
    assert error(served.client.delete("/jobs/precious"))[:2] == (404, "JobNotFoundError")
    assert (served.root / "precious/thesis.txt").read_text() == "mine"


def test_a_run_of_the_same_job_is_taken_over_and_another_one_is_not(
    served: Served, job: Callable[..., JobSpec], create: Any, npz: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.npz").write_bytes(npz.read_bytes())
    create(job(store=served.root / "theirs", data={"train": str(tmp_path / "data/x.npz")}))
    until(lambda: served.client.get("/jobs").json())
    said = served.submit("theirs", status=409, network={"depth": 3})["error"]
    assert "network.depth is 2 in the store and 3 in the job" in said["message"]
    served.submit("theirs", network={"depth": 2}, gram={"groups": ["C1"], "tile": 4})
    assert served.wait_for("starting", "theirs")["owner"] == "local"


def test_the_limit_of_jobs_holds_for_many_at_once_and_for_resumed_ones(serve: Serve) -> None:
    with serve(jobs=5) as served:

        def submit(number: int) -> int:
            spec = {"store": f"job{number}", "data": {"train": f"{served.root.parent}/data"}}
            with httpx.Client(base_url=served.url, timeout=PATIENCE) as client:
                return client.post("/jobs", json={"spec": spec}).status_code

        with ThreadPoolExecutor(20) as pool:
            codes = list(pool.map(submit, range(20)))
        assert sorted(codes) == [201] * 5 + [429] * 15
        first, *_ = served.records.ids()
        served.client.post(f"/jobs/{first}/cancel")
        served.wait_for("cancelled", first)
        served.submit("another")
        assert error(served.client.post(f"/jobs/{first}/resume"))[1] == "LimitError"


def test_what_another_service_wants_of_a_job_is_seen(served: Served) -> None:
    served.submit()
    served.wait_for("starting")
    wish = Wish(state="cancelled", attempt=1, since=now())
    Records(str(served.root)).want(served.record(), wish)
    until(lambda: served.script.stopped == ["a 1"])
    served.wait_for("cancelled")


# ---------------------------------------------------------------------- events


def stream(served: Served, job: str = "a", **options: Any) -> list[tuple[str, str, dict[str, Any]]]:
    """All messages of a job until it has ended: id, kind and data."""
    found, fields = [], {"id": "", "event": "", "data": ""}
    with served.client.stream("GET", f"/jobs/{job}/events", params={"follow": "false"}, **options) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields["event"]:
                found.append((fields["id"], fields["event"], json.loads(fields["data"])))
                fields = {"id": "", "event": "", "data": ""}
    return found


STORY = [
    Note("begins"),
    ComputationStarted(12, 12, 105, 105, 1, "here", 7),
    WorkerStarted(0, "here, process 8", "zen4"),
    TileStarted(Tile("gram", 0, 1), 0),
    TileFailed(Tile("gram", 0, 1), 0, "it raised", 1, 1.0),
    TileStarted(Tile("gram", 0, 2), 0),
    WorkerLost(0, "it was killed", 1),
    WorkerStarted(1, "here, process 9", "zen4"),
    TileStarted(Tile("cross", 0, 0), 1),
    TileFinished(Tile("gram", 1, 1), 1, 10, 0.5, "zen4", 0.1, 0.1, 0.2, 0.1),
    Progress("pairs", 10, 105),
]


def test_events_are_told_from_the_beginning_and_while_they_happen(served: Served) -> None:
    served.submit()
    served.wait_for("starting")
    with ThreadPoolExecutor(1) as pool, Journal(served.attempt()) as journal:
        journal(Note("before anybody watches"))
        served.wait_for("running")
        watching = pool.submit(stream, served)
        until(lambda: "equigram_service_watchers 1.0" in served.client.get("/metrics").text)
        journal(Note("while somebody watches"))
        journal.__exit__()
        served.end(Outcome(state="done", ended=now()))
        heard = watching.result(timeout=PATIENCE)
    assert [(place, kind) for place, kind, _ in heard] == [
        ("", "state"), ("1.0", "Note"), ("1.1", "Note"), ("", "state"),
    ]  # fmt: skip
    assert [data["state"] for _, kind, data in heard if kind == "state"] == ["running", "done"]
    assert [data["text"] for _, kind, data in heard if kind == "Note"] == [
        "before anybody watches", "while somebody watches",
    ]  # fmt: skip
    assert [place for place, _, _ in stream(served, headers={"Last-Event-ID": "1.0"})] == ["", "1.1"]


def test_events_of_a_job_that_ended_before_the_service_was_started_are_read_again(serve: Serve) -> None:
    with serve() as served:
        served.submit()
        served.wait_for("starting")
        with Journal(served.attempt()) as journal:
            for event in STORY:
                journal(event)
        served.end(Outcome(state="done", ended=now()))
        served.wait_for("done")
        before = stream(served)
    with serve() as served:
        served.wait_for("done")
        assert stream(served) == before
    assert [kind for _, kind, _ in before] == ["state", *(type(event).__name__ for event in STORY)]


# ---------------------------------------------------------------------- what is in a store


def test_tiles_are_shown_as_they_are_stored_computed_and_failed(
    served: Served, job: Callable[..., JobSpec], create: Any, compute: Any
) -> None:
    served.submit()
    served.wait_for("starting")
    store = create(job(store=served.root / "a"))
    compute(store, [Tile("gram", 2, 2)])
    with Journal(served.attempt()) as journal:
        for event in STORY:
            journal(event)
        deadline = time.monotonic() + PATIENCE
        while served.job()["counts"] is None or served.job()["counts"]["finished"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        gram, cross = (served.client.get("/jobs/a/tiles", params={"part": part}) for part in ("gram", "cross"))
    assert (gram.headers["x-rows"], gram.headers["x-cols"]) == ("3", "3")
    assert_array_equal(np.frombuffer(gram.content, np.uint8).reshape(3, 3), [[0, 3, 0], [3, 2, 0], [0, 0, 2]])
    assert_array_equal(np.frombuffer(cross.content, np.uint8).reshape(2, 3), [[1, 0, 0], [0, 0, 0]])
    workers = served.job()["workers"]
    assert [(one["number"], one["tiles"], one["lost"]) for one in workers] == [(0, 0, "it was killed"), (1, 1, None)]


def test_slices_of_matrices_are_npy_files(finished: Served) -> None:
    store = GramStore.open(str(finished.root / "a"))
    for part in ("gram", "cross"):
        whole = store.matrix(part, "C4", "ntk")
        answer = finished.client.get(f"/jobs/a/{part}/C4/ntk")
        assert_array_equal(np.load(io.BytesIO(answer.content), allow_pickle=False), whole)
        answer = finished.client.get(f"/jobs/a/{part}/C4/ntk", params={"rows": "1:4", "cols": "2:"})
        assert_array_equal(np.load(io.BytesIO(answer.content), allow_pickle=False), whole[1:4, 2:])


@pytest.mark.parametrize(
    ("path", "code", "kind", "message"),
    [
        ("gram/C4/ntk?rows=0:11", 422, "SpecError", "rows = '0:11': write first:end within 0:10"),
        ("gram/C4/ntk?rows=3:3", 422, "SpecError", "rows = '3:3'"),
        ("gram/C4/ntk?cols=a", 422, "SpecError", "cols = 'a'"),
        ("gram/C8/ntk", 404, "JobNotFoundError", "there is no matrix gram C8 ntk"),
        ("gram/C4/rbf", 422, "SpecError", "kernel"),
        ("images/train/10.png", 404, "JobNotFoundError", "there is no train image 10; there are 10"),
        ("images/other/1.png", 422, "SpecError", "split"),
        ("figures/none.png", 404, "JobNotFoundError", "a has no figure none.png"),
        ("figures/..%2Fjob.json", 422, "SpecError", "path.kernel"),
        ("figures/job.json", 422, "SpecError", "figure"),
        ("predictions?group=C8", 404, "JobNotFoundError", "C8 any kernel is not solved; C1 nngp"),
        ("nothing", 404, "JobNotFoundError", "Not Found"),
    ],
)
def test_what_is_not_there_is_one_sentence(finished: Served, path: str, code: int, kind: str, message: str) -> None:
    status, found, said = error(finished.client.get(f"/jobs/a/{path}"))
    assert (status, found) == (code, kind)
    assert message in said


def test_a_slice_that_is_too_large_is_refused(serve: Serve, finished: Served) -> None:
    with serve(finished.script, gram_bytes=100) as served:
        served.wait_for("done")
        status, kind, said = error(served.client.get("/jobs/a/gram/C4/ntk"))
    assert (status, kind) == (413, "LimitError")
    assert "rows 0:10 and cols 0:10 take 400" in said


def test_pictures_show_matrices_and_images(finished: Served) -> None:
    answer = finished.client.get("/jobs/a/gram/C4/ntk/picture.png", params={"rows": "2:8", "pixels": 4})
    image = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert image.shape == (4, 4, 4)
    assert (image[..., 3] == 255).all()
    whole = GramStore.open(str(finished.root / "a")).matrix("gram", "C4", "ntk")
    shown = whole[np.ix_([2, 4, 5, 7], [0, 3, 6, 9])]
    assert float(answer.headers["x-minimum"]) == pytest.approx(float(shown.min()))
    assert float(answer.headers["x-maximum"]) == pytest.approx(float(shown.max()))
    (finished.root / "a/gram/C4/ntk/c/0/0").unlink()
    answer = finished.client.get("/jobs/a/gram/C4/ntk/picture.png")
    clear = np.asarray(Image.open(io.BytesIO(answer.content)))[..., 3] == 0
    assert_array_equal(clear, (np.arange(10) < 4)[:, None] & (np.arange(10) < 4))
    picture = finished.client.get("/jobs/a/images/test/3.png")
    stored = np.load(finished.root.parent / "data/x.npz")["x_test"][3]
    assert_array_equal(np.asarray(Image.open(io.BytesIO(picture.content)))[::12, ::12], stored)
    assert finished.client.get("/jobs/a/figures/spectrum.png").content == b"a picture"


def test_results_and_predictions_are_those_of_the_store(finished: Served) -> None:
    detail = finished.job()
    assert detail["figures"] == ["spectrum"]
    assert len(detail["solved"]) == 4
    assert detail["headline"].startswith("accuracy ")
    result = finished.client.get("/jobs/a/result").json()
    assert result["scores"][0]["chosen"]
    assert np.sum(result["confusion"]["C4 ntk"]) == 5
    answer = finished.client.get("/jobs/a/predictions", params={"group": "C1", "kernel": "nngp"}).json()
    arrays, fields = GramStore.open(str(finished.root / "a")).solution("C1", "nngp")
    values = arrays["predictions"][fields["chosen"]]
    assert_array_equal([one["values"] for one in answer["predictions"]], values)
    assert [one["index"] for one in answer["predictions"]] == list(range(5))
    params: dict[str, Any] = {"group": "C1", "kernel": "nngp", "sort": "confused"}
    confused = finished.client.get("/jobs/a/predictions", params=params).json()["predictions"]
    margins = [one["margin"] for one in confused]
    assert margins == sorted(margins)
    assert all((one["margin"] > 0) == (one["true"] == one["predicted"]) for one in confused)
    page = finished.client.get("/jobs/a/predictions", params={**params, "offset": 2, "limit": 2}).json()["predictions"]
    assert page == confused[2:4]


# ---------------------------------------------------------------------- uploads


def test_an_upload_is_kept_by_its_content_and_a_job_may_read_it(served: Served, npz: Path) -> None:
    content = npz.read_bytes()
    answers = [
        served.client.post("/uploads", content=content, headers={"X-Filename": name}) for name in ("a.npz", "b.npz")
    ]
    assert [one.status_code for one in answers] == [201, 201]
    assert answers[0].json() == answers[1].json()
    served.submit(data={"train": answers[0].json()["url"]})
    names = served.records.uploads().names()
    assert names == [answers[0].json()["url"].removeprefix("upload:")]


def archive(*names: str) -> bytes:
    file = io.BytesIO()
    with ZipFile(file, "w") as zipped:
        for name in names:
            zipped.writestr(name, b"x")
    return file.getvalue()


def pickled(kind: str = "npy") -> bytes:
    file, objects = io.BytesIO(), np.array([{}], dtype=object)
    if kind == "npz":
        np.savez(file, x=objects)
    else:
        np.save(file, objects, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "code", "message"),
    [
        ("x.npz", b"no archive", 422, "the upload is no .npz file that can be read"),
        (
            "x.npy",
            pickled(),
            422,
            "that can be read: Array can't be memory-mapped: Python objects",
        ),
        ("x.npy", b"PK\x03\x04 and no archive", 422, "the upload is no .npy file that can be read: the magic string"),
        ("x.npy", archive("a.npy"), 422, "the upload is no .npy file that can be read: the magic string"),
        ("x.npz", archive("a.png"), 422, "'a.png' in it is no array"),
        ("x.npz", pickled("npz"), 422, "the upload holds Python objects, in 'x.npy'"),
        ("x.zip", archive("a/1.png", "a/2.png", "a/3.png"), 413, "the upload holds 3 files"),
        ("x.exe", b"", 422, "x-filename"),
        ("x.npy", bytes(3000), 413, "the body of the request has 3,000 bytes, and 2,000 bytes are allowed"),
    ],
)
def test_an_upload_that_cannot_be_used_is_refused_and_not_kept(
    serve: Serve, name: str, content: bytes, code: int, message: str
) -> None:
    with serve(upload_bytes=2000, upload_files=2) as served:
        status, _, said = error(served.client.post("/uploads", content=content, headers={"X-Filename": name}))
        assert status == code
        assert message in said
        assert served.records.uploads().names() == []


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(serve: Serve) -> None:
    with serve(upload_bytes=2000, body_bytes=500) as served:
        for path, kind in (("/uploads", "application/octet-stream"), ("/jobs", "application/json")):
            chunks = (b" " * 1000 for _ in range(10**4))
            headers = {"X-Filename": "x.npy", "content-type": kind}
            assert error(served.client.post(path, content=chunks, headers=headers))[:2] == (413, "LimitError")


# ---------------------------------------------------------------------- who may do what


CHANGES = [("POST", "/jobs"), ("POST", "/jobs/a/cancel"), ("POST", "/jobs/a/resume"), ("DELETE", "/jobs/a"),
           ("POST", "/uploads")]  # fmt: skip
READS = ["/jobs", "/jobs/a", "/jobs/a/events", "/service", "/metrics", "/openapi.json", "/jobs/a/result"]


def test_everything_but_the_page_and_health_needs_a_token(serve: Serve) -> None:
    with serve(tokens=f"ann write {WRITE}\nbob read {READ}") as served, httpx.Client(base_url=served.url) as client:
        for path in READS:
            assert error(client.get(path))[:2] == (401, "AuthenticationError"), path
            answer = client.get(path, headers={"Authorization": "Bearer wrong"})
            assert error(answer)[:2] == (401, "AuthenticationError")
            assert answer.headers["www-authenticate"] == "Bearer"
        for method, path in CHANGES:
            assert error(client.request(method, path))[:2] == (401, "AuthenticationError"), path
            answer = client.request(method, path, headers={"Authorization": f"Bearer {READ}"})
            assert error(answer)[:2] == (403, "AuthenticationError"), path
            assert "bob has the scope read" in answer.text
        for path in ("/", "/healthz", "/readyz"):
            assert client.get(path).status_code != 401
        assert client.get("/jobs", headers={"Authorization": f"Bearer {READ}"}).json() == []
        assert served.submit()["owner"] == "ann"
        assert served.client.get("/service").json()["scope"] == "write"


def test_other_sites_and_other_names_are_refused(served: Served) -> None:
    spec = {"spec": {"store": "a", "data": {"train": f"{served.root.parent}/data"}}}
    for headers in (
        {"Origin": "http://["},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert error(served.client.post("/jobs", json=spec, headers=headers))[0] == 403
    for host in ("evil.example", "evil.example:80", "", "127.0.0.1.evil.example", "[bad"):
        assert error(served.client.get("/jobs", headers={"Host": host}))[:2] == (400, "SpecError")
    own = {"Origin": served.url, "Sec-Fetch-Site": "same-origin"}
    assert served.client.post("/jobs", json=spec, headers=own).status_code == 201


def test_every_answer_keeps_other_sites_out(finished: Served) -> None:
    for path in ("/", "/jobs", "/jobs/a", "/nothing", "/jobs/a/images/train/0.png", "/openapi.json"):
        headers = finished.client.get(path).headers
        assert {name: headers[name] for name in HEADERS} == HEADERS
        assert "access-control-allow-origin" not in headers


def test_a_token_has_only_so_many_jobs(serve: Serve) -> None:
    with serve(jobs=2) as served:
        served.submit("a")
        served.submit("b")
        status, kind, said = error(
            served.client.post("/jobs", json={"spec": {"store": "c", "data": {"train": f"{served.root.parent}/data"}}})
        )
        assert (status, kind) == (429, "LimitError")
        assert "local has 2 jobs that have not ended, and 2 are allowed" in said
        served.submit("a", status=200)


def test_changing_requests_are_audited_and_secrets_are_nowhere(
    serve: Serve, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level("INFO")
    secret = "a-secret-that-nobody-may-see"
    with serve(tokens=f"ann write {WRITE}\nbob read {READ}") as served:
        spec = {"store": "a", "data": {"train": f"{tmp_path}/data"}, "storage_options": {"s3": {"secret": secret}}}
        answer = served.client.post("/jobs", json={"spec": spec})
        assert answer.status_code == 422
        served.submit()
        served.client.get("/jobs")
        served.client.post("/jobs/a/cancel", headers={"Authorization": f"Bearer {READ}"})
    lines = [record for record in caplog.records if record.name == "equigram.audit"]
    assert [(one.user, one.method, one.path, one.status) for one in lines] == [  # type: ignore[attr-defined]
        ("ann", "POST", "/jobs", 422), ("ann", "POST", "/jobs", 201), ("bob", "POST", "/jobs/a/cancel", 403),
    ]  # fmt: skip
    written = (
        caplog.text
        + answer.text
        + "".join(file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file())
    )
    assert secret not in written
    assert WRITE not in written


def test_metrics_count_requests_and_jobs(finished: Served) -> None:
    text = finished.client.get("/metrics").text
    assert 'equigram_service_jobs{state="done"} 1.0' in text
    assert 'equigram_service_requests_total{method="POST",route="/jobs",status="201"} 1.0' in text


def test_the_description_of_the_service_has_every_route_and_an_example(served: Served) -> None:
    schema = served.client.get("/openapi.json").json()
    assert {"/jobs", "/jobs/{name}/events", "/jobs/{name}/{part}/{group}/{kernel}", "/uploads"} <= schema[
        "paths"
    ].keys()
    assert schema["components"]["schemas"]["Submission"]["examples"]
    assert all(
        operation.get("description") or operation.get("summary")
        for path in schema["paths"].values()
        for operation in path.values()
    )


def test_a_list_is_paged_and_filtered(served: Served) -> None:
    for name in "abc":
        served.submit(name)
    answer = served.client.get("/jobs", params={"limit": 2})
    assert [job["id"] for job in answer.json()] == ["c", "b"]
    assert answer.headers["x-total-count"] == "3"
    assert [job["id"] for job in served.client.get("/jobs", params={"offset": 2}).json()] == ["a"]
    assert served.client.get("/jobs", params={"state": "done,failed"}).json() == []


def test_a_damaged_record_harms_no_other_job(serve: Serve) -> None:
    with serve() as served:
        served.submit("a")
        served.submit("b")
    Folder(str(served.root)).write(".equigram/jobs/a/job.json", b"{")
    with serve() as served:
        deadline = time.monotonic() + PATIENCE
        while [job["id"] for job in served.client.get("/jobs").json()] != ["b"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
