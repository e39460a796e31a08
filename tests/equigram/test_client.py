"""The client against a service that misbehaves as no real one can be made to, and what it does by itself."""

import asyncio
import csv
import hashlib
import io
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import basic_indices
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from equigram import Client, JobSpec, errors
from equigram.api.models import ErrorDetail
from equigram.client import RemoteMatrix, connection, matrix
from equigram.client.connection import known_error
from equigram.client.matrix import read_npy
from equigram.client.settings import Settings
from equigram.client.stream import as_event, messages
from equigram.errors import (
    AuthenticationError,
    ConflictError,
    DataError,
    JobCancelledError,
    JobFailedError,
    JobNotFoundError,
    LimitError,
    ServiceError,
    SpecError,
    WaitTimeoutError,
)
from equigram.events import Event, Note, TileFinished
from equikernel.errors import ImageError

TOKEN = "s3cret-Token"
GRAM = np.arange(49, dtype=np.float32).reshape(7, 7)
GRAM += GRAM.T

SUMMARY = {
    "id": "mine",
    "state": "done",
    "owner": None,
    "priority": 0,
    "submitted": "2026-01-31T12:00:00Z",
    "started": None,
    "ended": None,
    "groups": ["C1", "C4"],
    "kernels": ["nngp", "ntk"],
    "train": 7,
    "test": 0,
    "counts": {"tiles": 4, "finished": 2, "pairs": 28, "finished_pairs": 14},
    "progress": {"stage": "computing tiles", "done": 14, "total": 28},
    "error": None,
    "headline": "accuracy 0.91",
}
DETAIL = SUMMARY | {
    "spec": {"data": {"train": "x.npz"}},
    "attempt": 1,
    "store": "file:///runs/mine",
    "share": None,
    "tile": 2,
    "blocks": [4, 0],
    "passes": 1,
    "image_shape": [8, 8, 1],
    "classes": ["a", "b"],
    "pairs_per_second": None,
    "seconds_left": None,
    "workers": [],
    "notes": [],
    "solved": [{"group": "C4", "kernel": "ntk"}],
    "figures": ["spectrum"],
}
VIEW = {
    "version": "0.1.0",
    "root": "/runs",
    "scope": "write",
    "name": "ada",
    "concurrency": 1,
    "upload_bytes": 100_000,
    "readable": ["s3://images"],
    "nodes": [],
    "trouble": None,
}
PREDICTIONS = [
    {"index": i, "name": f"{i}.png", "true": "a", "predicted": "b", "values": [0.1, 0.9], "margin": -0.8}
    for i in range(5)
]


def npy(values: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, values, version=(1, 0))
    return file.getvalue()


def event(number: str, kind: str, **data: Any) -> bytes:
    """A message of a stream."""
    begin = f"id: {number}\n" if number else ""
    return f"{begin}event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def refuse(status: int, kind: str, message: str, **headers: str) -> Response:
    body = json.dumps({"error": {"type": kind, "message": message}})
    return Response(body, status, headers, media_type="application/json")


def stream(
    *pieces: bytes, lost: bool = False, stays: bool = False, media_type: str = "text/event-stream", length: str = ""
) -> Response:
    """An answer in pieces, after which the connection is ``lost``, or ``stays`` open."""

    async def content() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
        if lost:
            raise ConnectionAbortedError
        if stays:
            await asyncio.Event().wait()

    return StreamingResponse(content(), media_type=media_type, headers={"Content-Length": length} if length else None)


PROXY = "<html><body>Bad gateway</body></html>"


@dataclass
class Service:
    """A service that answers as it is told, and otherwise as a friendly one with a single job.

    Attributes:
      url: of it.
      faults: answers of a path, each given once.
      asked: method, path and query of each request.
      requests: headers and body of each.
    """

    url: str
    faults: dict[str, list[Response]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        path = request.url.path
        self.asked.append(f"{request.method} {path}")
        self.requests.append((dict(request.headers), body))
        if self.faults.get(path):
            return self.faults[path].pop(0)
        query = request.query_params
        answers: dict[str, Callable[[], Any]] = {
            "GET /service": lambda: VIEW,
            "GET /jobs": lambda: [SUMMARY],
            "POST /jobs": lambda: DETAIL,
            "GET /jobs/mine": lambda: DETAIL,
            "POST /jobs/mine/cancel": lambda: DETAIL | {"state": "cancelled"},
            "GET /jobs/mine/result": lambda: {
                "id": "mine", "classes": ["a", "b"], "scores": [], "confusion": {"C4 ntk": [[1, 2], [0, 4]]}
            },
            "GET /jobs/mine/predictions": lambda: {
                "group": "C4", "kernel": "ntk", "ridge": 1e-4, "classes": ["a", "b"], "total": len(PREDICTIONS),
                "predictions": PREDICTIONS[int(query["offset"]) :][: min(int(query["limit"]), 2)],
            },
            "GET /jobs/mine/events": lambda: stream(event("", "state", state="done", id="mine")),
            "GET /jobs/mine/log": lambda: Response("began\x1b[31m\nended\n", media_type="text/plain"),
            "DELETE /jobs/mine": lambda: Response(status_code=204),
            "POST /uploads": lambda: {
                "url": f"upload:{hashlib.sha256(body).hexdigest()}{Path(request.headers['x-filename']).suffix}",
                "bytes": len(body),
                "sha256": hashlib.sha256(body).hexdigest(),
            },
            "GET /jobs/mine/gram/C4/ntk": lambda: Response(
                npy(GRAM[tuple(slice(*map(int, query[axis].split(":"))) for axis in ("rows", "cols"))])
            ),
            "GET /jobs/mine/figures/spectrum.png": lambda: Response(b"png"),
            "GET /jobs/mine/figures/spectrum.svg": lambda: Response(b"svg"),
        }  # fmt: skip
        answer = answers.get(self.asked[-1])
        if answer is None:
            return refuse(404, "JobNotFoundError", f"there is no {path}")
        found = answer()
        headers = {"X-Total-Count": str(len(found))} if isinstance(found, list) else {}
        return (
            found
            if isinstance(found, Response)
            else Response(json.dumps(found), media_type="application/json", headers=headers)
        )


@pytest.fixture(scope="module")
def served() -> Iterator[Service]:
    app = FastAPI()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        service = Service(f"http://127.0.0.1:{listening.getsockname()[1]}")

        @app.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
        async def answer(request: Request) -> Response:
            return await service(request)

        config = uvicorn.Config(app, log_level="critical", ws="none", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield service
        server.should_exit = True
        thread.join(timeout=30)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of whoever runs the tests, and no long pauses."""
    for name in ("EQUIGRAM_SERVER", "EQUIGRAM_TOKEN", "EQUIGRAM_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(connection, "PAUSES", (0.01,) * 3)


@pytest.fixture
def service(served: Service) -> Service:
    served.faults, served.asked, served.requests = {}, [], []
    return served


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.url, TOKEN) as client:
        yield client


def configure(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "config" / "equigram" / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


# Settings


def test_arguments_come_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Settings.find() == Settings("http://127.0.0.1:8786")
    configure(tmp_path, "server: https://file.example/\ntoken: of-file")
    assert (Settings.find().url, Settings.find().token) == ("https://file.example", "of-file")
    monkeypatch.setenv("EQUIGRAM_SERVER", "https://environment.example")
    monkeypatch.setenv("EQUIGRAM_TOKEN", "of-environment")
    assert (Settings.find().url, Settings.find().token) == ("https://environment.example", "of-environment")
    found = Settings.find("https://argument.example", "of-argument")
    assert (found.url, found.token) == ("https://argument.example", "of-argument")


def test_the_token_of_the_file_goes_to_no_other_server(tmp_path: Path) -> None:
    configure(tmp_path, "server: https://file.example\ntoken: of-file")
    assert Settings.find("https://other.example").token is None
    assert Settings.find("https://file.example/").token == "of-file"


def test_another_file_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIGRAM_CONFIG", str(tmp_path / "other.yaml"))
    with pytest.raises(SpecError, match=r"other.yaml: cannot be read: No such file"):
        Settings.find()
    (tmp_path / "other.yaml").write_text("server: https://other.example")
    assert Settings.find().url == "https://other.example"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("token: 123456", "token is no text; write it in quotes"),
        ("token: *s3cret", r"line 1, column 8: cannot be read as YAML; it has lines"),
        ("tokn: s3cret", "there is no 'tokn'; fields are server and token; did you mean 'token'"),
        ("s3cret", "this is no section"),
        ("token: s3cret tok", "the token, that of .*config.yaml, is empty or has spaces"),
        ("server: ftp://s3rver", "'ftp://s3rver' is no URL of a service"),
        ("server: https://ada:s3cret@host", "the service at host has a name or password in it"),
    ],
)
def test_a_wrong_file_is_refused_without_showing_secrets(tmp_path: Path, text: str, message: str) -> None:
    configure(tmp_path, text)
    with pytest.raises(SpecError, match=message) as refused:
        Settings.find()
    assert "s3cret" not in str(refused.value)
    assert "123456" not in str(refused.value)


@pytest.mark.skipif(os.name != "posix", reason="permissions of files are those of POSIX")
def test_a_token_that_others_may_read_is_worth_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    configure(tmp_path, "server: https://host\ntoken: s3cret", 0o644)
    Settings.find()
    assert "others may read it; `chmod 600" in caplog.text
    caplog.clear()
    configure(tmp_path, "server: http://host\ntoken: s3cret")
    Settings.find()
    assert "goes to http://host unencrypted" in caplog.text
    assert "s3cret" not in caplog.text


# Errors


def test_errors_of_the_service_are_raised_as_what_they_are(service: Service, client: Client) -> None:
    with pytest.raises(JobNotFoundError, match="there is no /jobs/other"):
        client.job("other")
    service.faults["/jobs/mine"] = [refuse(409, "ConflictError", "it runs")]
    with pytest.raises(ConflictError, match="it runs"):
        client.job("mine")
    assert len(service.asked) == 2


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("SpecError", SpecError),
        ("DamagedTileError", errors.StoreError),
        ("ImageError", ImageError),
        ("SystemExit", ServiceError),
        ("Tile", ServiceError),
        ("__import__", ServiceError),
    ],
)
def test_only_errors_of_equigram_are_raised_by_name(kind: str, expected: type[Exception]) -> None:
    error = known_error(ErrorDetail(type=kind, message="why"))
    assert type(error) is expected
    assert str(error).endswith("why")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_token_is_sent_and_shown_nowhere(
    service: Service, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    job = client.job("mine")
    assert service.requests[0][0]["authorization"] == f"Bearer {TOKEN}"
    service.faults["/service"] = [refuse(401, "AuthenticationError", "the token is not known")]
    with pytest.raises(AuthenticationError, match=r"not known \(the token was the one that the program gave\)") as end:
        client.service()
    service.faults["/service"] = [Response(PROXY, 500, media_type="text/html")]
    with pytest.raises(ServiceError) as other:
        client.service()
    texts = [repr(client), repr(job), repr(client._connection), repr(Settings.find(None, TOKEN)), caplog.text]
    assert TOKEN not in "".join([*texts, str(end.value), str(other.value), job._repr_html_()])


def test_without_a_token_none_is_sent_and_the_refusal_says_so(service: Service) -> None:
    service.faults["/service"] = [refuse(401, "AuthenticationError", "a token is needed")]
    with Client(service.url) as client, pytest.raises(AuthenticationError, match="no token was sent; set EQUIGRAM_TOK"):
        client.service()
    assert "authorization" not in service.requests[0][0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Response(PROXY, 200, media_type="text/html"), "status 200 and text/html, not as a service of equigram"),
        (Response(PROXY, 404, media_type="text/html"), "status 404 and text/html, not as a service of equigram"),
        (Response("{}", media_type="application/json"), r"\(version: Field required\)"),
        (Response(status_code=302, headers={"Location": "https://login"}), "it redirects to https://login"),
    ],
)
def test_what_is_no_service_is_named(service: Service, client: Client, answer: Response, message: str) -> None:
    service.faults["/service"] = [answer]
    with pytest.raises(ServiceError, match=message) as refused:
        client.service()
    assert f"{service.url}/service" in str(refused.value)
    assert len(service.asked) == 1


# Tries


@pytest.mark.parametrize(
    "fault",
    [
        lambda: stream(b"{", lost=True, media_type="application/json"),
        lambda: stream(b"{", lost=True, media_type="application/json", length="900"),
        lambda: refuse(503, "ServiceError", "it starts", **{"Retry-After": "0"}),
        lambda: refuse(429, "LimitError", "too many requests", **{"Retry-After": "0"}),
        lambda: Response(PROXY, 502, media_type="text/html"),
    ],
)
def test_what_may_pass_is_tried_again_and_told_once(
    service: Service, client: Client, caplog: pytest.LogCaptureFixture, fault: Callable[[], Response]
) -> None:
    service.faults["/jobs"] = [fault(), fault()]
    assert client.submit({"data": {"train": "s3://images"}}).id == "mine"
    assert service.asked == ["POST /jobs"] * 3
    assert len({headers["idempotency-key"] for headers, _ in service.requests}) == 1
    assert [record.levelname for record in caplog.records if record.name == "equigram"] == ["WARNING"]
    assert "trying again for" in caplog.text


def test_after_some_tries_the_last_reason_is_raised(service: Service, client: Client) -> None:
    service.faults["/service"] = [refuse(503, "ServiceError", "it starts") for _ in range(9)]
    with pytest.raises(ServiceError, match="it starts"):
        client.service()
    assert len(service.asked) == 4


def test_a_pause_that_is_too_long_is_not_waited_for(service: Service, client: Client) -> None:
    service.faults["/service"] = [refuse(429, "LimitError", "come back tomorrow", **{"Retry-After": "86400"})]
    with pytest.raises(LimitError, match="tomorrow"):
        client.service()


def test_a_service_that_is_not_there_is_named_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with Client(url) as client, pytest.raises(ServiceError, match=f"^{url} does not answer: Connection refused; start"):
        client.service()


def test_a_silent_service_is_not_waited_for_forever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with Client(url, timeout=0.1) as client, pytest.raises(ServiceError, match=r"nothing comes within 0\.1 s"):
            client.service()
        with mock.patch.object(connection, "PATIENCE", 0.05), Client(url, timeout=0.1) as client:
            with mock.patch("time.sleep") as pause, pytest.raises(ServiceError):
                client.service()
            assert pause.call_count == 1


def test_asking_twice_for_what_the_first_time_did_is_no_error(service: Service, client: Client) -> None:
    job = client.job("mine")
    service.faults["/jobs/mine"] = [Response(PROXY, 502), refuse(404, "JobNotFoundError", "gone")]
    job.delete()
    service.faults["/jobs/mine"] = [refuse(404, "JobNotFoundError", "gone")]
    with pytest.raises(JobNotFoundError):
        job.delete()
    service.faults["/jobs/mine/resume"] = [refuse(409, "ConflictError", "it is done")]
    with pytest.raises(ConflictError, match="it is done"):
        job.resume()
    service.faults["/jobs/mine/resume"] = [refuse(409, "ConflictError", "it runs")]
    service.faults["/jobs/mine"] = [Response(json.dumps(DETAIL | {"state": "running"}))]
    assert job.resume().state == "running"
    assert job.cancel().state == "cancelled"


# Submission


def test_a_job_is_checked_before_anything_is_sent(service: Service, client: Client, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("{store: mine, data: {train: x.npz, sized: 3}}")
    with pytest.raises(SpecError, match=r"job.yaml: data.sized"):
        client.submit(tmp_path / "job.yaml")
    secret = {"store": "mine", "data": {"train": "s3://x"}, "storage_options": {"s3": {"secret": "hidden"}}}
    with pytest.raises(SpecError, match="storage_options is the service's to set, and not sent; leave it out"):
        client.submit(secret)
    with pytest.raises(SpecError, match="the key 'two words' is not"):
        client.submit({"data": {"train": "s3://x"}}, key="two words")
    assert service.asked == []


def test_only_what_is_set_is_sent(service: Service, client: Client) -> None:
    client.submit({"data": {"train": "s3://x"}, "gram": {"groups": "C4"}}, priority=3, key="mine")
    client.submit(JobSpec(store="mine", data={"train": "s3://x"}, network={"depth": 2}))
    bodies = [json.loads(body) for _, body in service.requests]
    assert bodies == [
        {"spec": {"data": {"train": "s3://x"}, "gram": {"groups": ["C4"]}}, "priority": 3},
        {"spec": {"store": "mine", "data": {"train": "s3://x"}, "network": {"depth": 2}}, "priority": 0},
    ]
    assert [headers.get("idempotency-key") for headers, _ in service.requests] == ["mine", None]


def test_files_that_are_here_are_uploaded_once(service: Service, client: Client, npz: Path) -> None:
    client.submit({"store": "mine", "data": {"train": str(npz), "test": str(npz), "train_labels": "not-here.npy"}})
    assert service.asked == ["GET /service", "POST /uploads", "POST /jobs"]
    headers, body = service.requests[1]
    assert (headers["x-filename"], body) == ("images.npz", npz.read_bytes())
    url = f"upload:{hashlib.sha256(body).hexdigest()}.npz"
    sent = json.loads(service.requests[2][1])["spec"]["data"]
    assert sent == {"train": url, "test": url, "train_labels": "not-here.npy"}
    client.submit({"store": "mine", "data": {"train": str(npz)}}, upload=False)
    assert json.loads(service.requests[3][1])["spec"]["data"] == {"train": str(npz)}


def test_a_folder_is_the_same_archive_whatever_its_dates(service: Service, client: Client, class_folders: Path) -> None:
    (class_folders / ".hidden").write_text("secret")
    (class_folders / ".git").mkdir()
    (class_folders / ".git" / "config").write_text("secret")
    url = client.upload(class_folders)
    for path in class_folders.rglob("*.png"):
        os.utime(path, (0, 0))
    service.faults["/uploads"] = [Response(PROXY, 503)]
    assert client.upload(class_folders) == url
    assert url.endswith(".zip")
    packed = zipfile.ZipFile(io.BytesIO(service.requests[-1][1]))
    assert packed.testzip() is None
    assert packed.namelist() == sorted(str(path.relative_to(class_folders)) for path in class_folders.rglob("*.png"))
    assert b"secret" not in service.requests[-1][1]


def test_what_cannot_be_uploaded_is_refused(service: Service, client: Client, tmp_path: Path) -> None:
    for name in ("photo.png", "large.npz"):
        (tmp_path / name).write_bytes(bytes(100_001))
    (tmp_path / "empty").mkdir()
    (tmp_path / "v3").mkdir()
    (tmp_path / "v3" / "zarr.json").touch()
    for name, kind, message in (
        ("photo.png", DataError, r"is no .npz, .npy, .zip file and no folder"),
        ("large.npz", LimitError, r"takes 100,001 bytes, but .* takes 100,000 at most; put it where .*s3://images"),
        ("empty", DataError, "has no files to upload"),
        ("v3", DataError, "is a zarr"),
        ("nothing.npz", DataError, "there is nothing to upload"),
    ):
        with pytest.raises(kind, match=message):
            client.upload(tmp_path / name)
    (tmp_path / "some.npy").write_bytes(b"1")
    service.faults["/uploads"] = [Response(json.dumps({"url": "upload:0.npy", "bytes": 1, "sha256": "0"}))]
    with pytest.raises(ServiceError, match="received 0; send it again"):
        client.upload(tmp_path / "some.npy")
    service.faults["/service"] = [Response(json.dumps(VIEW | {"scope": "read"}))]
    with pytest.raises(AuthenticationError, match="the token 'ada' only reads"):
        client.upload(tmp_path / "some.npy")


# Events


def test_events_go_on_after_a_lost_connection(service: Service, client: Client) -> None:
    running = event("", "state", state="running", id="mine")
    service.faults["/jobs/mine/events"] = [
        stream(running, event("1.0", "Note", text="a"), b"id: 1.1\nevent: No", lost=True),
        stream(running, b": ping\n\n", event("1.1", "Note", text="b\u2028c")),  # ends although the job runs
        refuse(503, "ServiceError", "restarting"),
    ]
    told = list(client.job("mine").events())
    assert [(one.id, one.kind) for one in told] == [(None, "state"), ("1.0", "Note"), ("1.1", "Note"), (None, "state")]
    assert told[2].data["text"] == "b\u2028c"
    asked = [headers.get("last-event-id") for headers, _ in service.requests[1:]]
    assert asked == [None, "1.0", "1.1", "1.1"]


def test_a_stream_that_never_gets_anywhere_ends(service: Service, client: Client) -> None:
    service.faults["/jobs/mine/events"] = [stream(event("", "state", state="queued", id="mine")) for _ in range(9)]
    with pytest.raises(ServiceError, match="ends the events of a job that goes on"):
        list(client.job("mine").events())
    service.faults["/jobs/mine/events"] = [Response(PROXY, media_type="text/html")]
    with pytest.raises(ServiceError, match="status 200 and text/html, not as a service"):
        list(client.job("mine").events())


@given(st.lists(st.integers(1, 7), min_size=60, max_size=60))
def test_messages_do_not_depend_on_where_the_stream_is_cut(sizes: list[int]) -> None:
    content = 'id: 1.1\r\nevent: Note\r\ndata: {\r\ndata: "text":"é"}\r\n\r\n: ping\n\ndata:{}\n\n'.encode()
    pieces, begin = [], 0
    for size in sizes:
        pieces.append(content[begin : begin + size])
        begin += size
    found = [one for one in messages([*pieces, content[begin:]]) if one is not None]
    assert found == [("1.1", "Note", {"text": "é"}), (None, "message", {})]


def test_events_are_those_of_the_driver() -> None:
    data = {"tile": "cross[2, 0]", "worker": 1, "pairs": 4, "seconds": 0.5, "processor": "x", "time": "now"}
    data |= {f"{what}_seconds": 0.125 for what in ("read", "prepare", "kernel", "write")}
    (told,) = messages([event("1.2", "TileFinished", **data)])
    assert told is not None
    found = as_event(told)
    assert isinstance(found, TileFinished)
    assert found.to_json() == {"event": "TileFinished"} | {name: data[name] for name in data if name != "time"}
    assert as_event(told._replace(kind="FromTheFuture")) is None
    assert as_event(told._replace(data={"tile": "cross[2, 0]"})) is None


def test_waiting_ends_with_the_job(service: Service, client: Client) -> None:
    heard: list[Event] = []
    job = client.job("mine")
    assert job.wait(listener=heard.append).headline == "accuracy 0.91"
    assert heard == [Note("mine is done")]
    failed = DETAIL | {"state": "failed", "error": {"type": "DataError", "message": "no images"}}
    for detail, kind, message in (
        (failed, JobFailedError, "mine failed: no images; what it had finished is kept"),
        (DETAIL | {"state": "cancelled"}, JobCancelledError, "mine is cancelled"),
        (DETAIL | {"state": "incomplete"}, JobCancelledError, "mine is incomplete"),
        (DETAIL | {"state": "running"}, WaitTimeoutError, "mine is running after 0 s; it goes on"),
    ):
        service.faults["/jobs/mine"] = [Response(json.dumps(detail))]
        with pytest.raises(kind, match=message):
            job.wait(timeout=0 if kind is WaitTimeoutError else None)


# Matrices


@given(st.data(), st.integers(0, 9), st.integers(0, 9), st.integers(1, 4), st.integers(4, 200), st.integers(0, 100))
@settings(deadline=None)
def test_a_remote_matrix_is_indexed_like_an_array(
    data: st.DataObject, rows: int, cols: int, edge: int, limit: int, gap: int
) -> None:
    values = np.arange(rows * cols, dtype=np.float32).reshape(rows, cols)

    def fetch(down: range, across: range) -> NDArray[Any]:
        assert 0 < len(down) * len(across) * 4 <= limit
        return values[down.start : down.stop, across.start : across.stop]

    there = RemoteMatrix("gram", values.shape, np.float32, edge, fetch)
    key = data.draw(basic_indices(values.shape, allow_ellipsis=True))
    places = st.lists(st.integers(-rows, rows - 1), max_size=6) if rows else st.just([])
    some = np.array(data.draw(places), np.intp)
    with mock.patch.object(matrix, "LIMIT", limit), mock.patch.object(matrix, "GAP", gap):
        assert_array_equal(there[key], values[key])
        assert_array_equal(there[some, ::-2], values[some, ::-2])
        assert_array_equal(there[some.tolist()], values[some])
        assert_array_equal(np.asarray(there), values)
        mask = np.arange(rows) % 2 == 0
        assert_array_equal(there[mask], values[mask])


def test_only_what_is_needed_travels() -> None:
    asked: list[tuple[range, range]] = []

    def fetch(rows: range, cols: range) -> NDArray[Any]:
        asked.append((rows, cols))
        return np.zeros((len(rows), len(cols)), np.float32)

    there = RemoteMatrix("gram", (100_000, 100_000), np.float32, 512, fetch)
    assert there[5, 7] == 0
    assert there[::50_000, :].shape == (2, 100_000)
    assert there[:100:2, 10:30:2].shape == (50, 10)
    assert asked == [
        (range(5, 6), range(7, 8)),
        (range(1), range(100_000)),
        (range(50_000, 50_001), range(100_000)),
        (range(99), range(10, 29)),
    ]
    asked.clear()
    with mock.patch.object(matrix, "LIMIT", 2**24):
        assert there[:700, :10_000].shape == (700, 10_000)
    assert [(rows, len(cols)) for rows, cols in asked] == [
        (range(512), 8192),
        (range(512), 1808),
        (range(512, 700), 10_000),
    ]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (7, "rows 7 was asked for, but there are 7"),
        ((0, -8), "columns -8 was asked for, but there are 7"),
        ((0, 0, 0), "has rows and columns, and 3 indices were given"),
        ((..., ...), "two ellipses"),
        ("C4", "'C4' names no rows"),
        (True, "True names no rows"),
        (None, "None names no rows"),
        (([0], [0]), r"take matrix\[rows\]\[:, columns\]"),
        ([0.5], "float64 values are no rows"),
        ([9], "rows 9 was asked for"),
    ],
)
def test_a_wrong_index_is_refused_before_anything_travels(
    service: Service, client: Client, key: Any, message: str
) -> None:
    there = client.job("mine").gram("C4", "ntk")
    with pytest.raises(IndexError, match=message):
        there[key]
    assert len(service.asked) == 1


def test_a_matrix_comes_over_the_network(client: Client, tmp_path: Path) -> None:
    there = client.job("mine").gram("C4", "ntk")
    assert (there.shape, there.dtype, len(there), there.ndim) == ((7, 7), np.dtype(np.float32), 7, 2)
    assert_array_equal(there[-2:, 1], GRAM[-2:, 1])
    assert_array_equal(np.load(there.save(tmp_path / "gram.npy"), allow_pickle=False), GRAM)
    assert np.asarray(there, dtype=np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="leave out copy=False"):
        np.asarray(there, copy=False)
    with pytest.raises(SpecError, match="group 'C8' is not in mine; choose C1 or C4"):
        client.job("mine").gram("C8", "ntk")


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>", npy(GRAM)[:-1], npy(GRAM) + b"1", npy(GRAM.astype(np.float64)), npy(GRAM[:6]), b"object"],
)
def test_what_is_not_the_matrix_is_refused(content: bytes) -> None:
    if content == b"object":
        file = io.BytesIO()
        np.lib.format.write_array(file, np.array([[{}]]), allow_pickle=True)
        content = file.getvalue()
    with pytest.raises(ServiceError, match=r"^there is"):
        read_npy(content, GRAM.shape, GRAM.dtype, "there")


# Files and notebooks


def test_results_are_saved_whole_or_not_at_all(service: Service, client: Client, tmp_path: Path) -> None:
    job = client.job("mine")
    service.faults["/jobs/mine/figures/spectrum.svg"] = [refuse(404, "JobNotFoundError", "gone")]
    with pytest.raises(JobNotFoundError):
        job.save(tmp_path / "results", gram=True, groups=["C4"], kernels=["ntk"])
    assert list(tmp_path.iterdir()) == []
    paths = job.save(tmp_path / "results", gram=True, groups=["C4"], kernels=["ntk"])
    names = ["gram-C4-ntk.npy", "predictions-C4-ntk.csv", "result.json", "spectrum.png", "spectrum.svg"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == names
    rows = list(csv.DictReader((tmp_path / "results" / names[1]).read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 5
    assert rows[3] | {"predicted": "b"} == rows[3]
    assert list(rows[0]) == ["index", "image", "true", "predicted", "margin", "a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    with pytest.raises(SpecError, match="--group 'D4' is not in this job; choose C1 or C4"):
        job.save(tmp_path / "results", groups=["D4"])


def test_a_service_cannot_write_outside_the_folder(service: Service, client: Client, tmp_path: Path) -> None:
    detail = DETAIL | {"solved": [], "figures": ["../../outside"]}
    service.faults["/jobs/mine"] = [Response(json.dumps(detail)) for _ in range(2)]
    with pytest.raises(ServiceError, match=r"names a file '../../outside.png', which is not written here"):
        client.job("mine").save(tmp_path / "results")
    assert list(tmp_path.iterdir()) == []


def test_notebooks_show_a_job_escaped(service: Service, client: Client) -> None:
    service.faults["/jobs/mine"] = [Response(json.dumps(DETAIL | {"headline": "<script>", "state": "running"}))]
    job = client.job("mine")
    assert repr(job) == "Job('mine', running, computing tiles 14 of 28, <script>)"
    assert "<script>" not in job._repr_html_()
    assert '<progress value="14" max="28">' in job._repr_html_()


# Commands, without what computes

BLOCKED = """
import sys
class Absent:
    names = {"ray", "jax", "jaxlib", "numba", "llvmlite", "zarr", "numcodecs", "fsspec", "scipy", "matplotlib", "PIL",
             "prometheus_client", "google_crc32c", "fastapi", "starlette", "uvicorn", "neural_tangents"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import equigram.client, equikernel.network
equigram.Client, equigram.Job, equigram.JobSpec
import equigram.client.connection
equigram.client.connection.PAUSES = (0.01,)
from equigram.cli import main
main()
"""


@pytest.fixture
def light(service: Service, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command where only the client is installed."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", BLOCKED, *arguments],
            cwd=tmp_path,
            env=os.environ | {"EQUIGRAM_SERVER": service.url, "COLUMNS": "120", "NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=60,
        )

    return run


def test_the_client_needs_nothing_that_computes(
    service: Service, light: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, npz: Path
) -> None:
    (tmp_path / "job.yaml").write_text(f"data: {{train: {npz}}}")
    service.faults["/jobs"] = [Response(PROXY, 503)]
    done = light("submit", "job.yaml", "--wait")
    assert (done.returncode, done.stdout) == (0, "mine\n"), done.stderr
    assert "note: " in done.stderr
    assert "trying again for" in done.stderr
    assert "mine is done: accuracy 0.91; next: equigram fetch mine" in done.stderr
    done = light("run", "job.yaml")
    assert done.returncode == 2
    (tmp_path / "job.yaml").write_text(f"{{store: run, data: {{train: {npz}}}}}")
    done = light("run", "job.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: `equigram run` computes, and needs packages that are not installed (")
    assert done.stderr.endswith("); install them with pip install 'equigram[workers]'\n")
    assert done.stderr.count("\n") == 1


def test_commands_end_with_the_fate_of_the_job(
    service: Service, light: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    cancelled = json.dumps(DETAIL | {"state": "cancelled"})
    service.faults["/jobs/mine"] = [Response(json.dumps(DETAIL)), Response(cancelled)]
    done = light("watch", "mine")
    assert (done.returncode, done.stdout) == (3, "")
    assert "error: mine is cancelled; what it had finished is kept" in done.stderr
    done = light("logs", "other")
    assert (done.returncode, done.stderr) == (2, "error: there is no /jobs/other\n")
    done = light("logs", "mine")
    assert (done.returncode, done.stdout) == (0, "began\nended\n")
    service.faults["/jobs"] = [refuse(401, "AuthenticationError", "the token is not known")]
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    done = light("jobs", "--token-file", "token")
    assert done.returncode == 4
    assert service.requests[-1][0]["authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in done.stderr
    done = light("delete", "mine")
    assert done.returncode == 2
    assert "add --yes" in done.stderr
    assert light("delete", "mine", "--yes").returncode == 0


def test_jobs_are_listed_for_people_and_for_programs(light: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = light("jobs")
    assert "mine done 50% 7 + 0 2026-01-31 12:00 accuracy 0.91" in " ".join(done.stdout.split())
    done = light("jobs", "--json")
    assert json.loads(done.stdout) == [SUMMARY | {"progress": SUMMARY["progress"] | {"detail": ""}}]  # type: ignore[operator]
    assert "did you mean 'running'" in light("jobs", "--state", "runing").stderr


def test_what_is_fetched_is_printed(light: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    done = light("fetch", "mine")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "mine/predictions-C4-ntk.csv"), done.stderr
    assert json.loads((tmp_path / "mine" / "result.json").read_text())["confusion"] == {"C4 ntk": [[1, 2], [0, 4]]}


def test_a_person_can_stop_watching(service: Service, tmp_path: Path) -> None:
    service.faults["/jobs/mine/events"] = [stream(event("", "state", state="running", id="mine"), stays=True)]
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED, "watch", "mine", "--server", service.url],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stderr is not None
        assert watching.stderr.readline() == "note: mine is running\n"
        watching.send_signal(signal.SIGINT)
        assert watching.stderr.read().endswith("no longer watching; mine goes on: equigram watch mine\n")
        assert watching.wait(timeout=30) == 130
    assert service.asked == ["GET /jobs/mine", "GET /jobs/mine/events"]


def test_waiting_ends_in_time(service: Service, client: Client) -> None:
    service.faults["/jobs/mine/events"] = [stream(event("", "state", state="running", id="mine"), stays=True)]
    job = client.job("mine")
    service.faults["/jobs/mine"] = [Response(json.dumps(DETAIL | {"state": "running"}))]
    with pytest.raises(WaitTimeoutError):
        job.wait(timeout=0.2)
