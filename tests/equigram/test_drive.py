"""The driver of a job: what it is allowed to read, and how it says that it ended."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from fsspec.config import conf

from equigram.api import drive
from equigram.api.drive import NO_REDIRECTS, headline
from equigram.api.records import Record, Records
from equigram.data import survey
from equigram.errors import DataError
from equigram.solve.stage import Result
from equigram.spec import DataSpec, JobSpec
from equigram.storage import configure

NOW = "2026-01-01T00:00:00+00:00"


@pytest.fixture
def unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of file systems are as before after a test."""
    for protocol in ("http", "https"):
        monkeypatch.setitem(conf, protocol, {})


@pytest.fixture
def redirecting(tmp_path: Path) -> Iterator[str]:
    """A server whose ``/images.npz`` is an array, and that sends everybody who asks for another one there."""
    np.savez(tmp_path / "images.npz", x_train=np.ones((4, 4, 4), np.uint8), y_train=[0, 0, 1, 1])
    content = (tmp_path / "images.npz").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            if self.path != "/images.npz":
                self.send_response(302)
                self.send_header("Location", "/images.npz")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first, last = (int(asked[1]), int(asked[2])) if asked else (0, len(content) - 1)
            part = content[first : last + 1]
            self.send_response(206 if asked else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.end_headers()
            if with_body:
                self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("unchanged")
def test_a_job_is_not_sent_from_a_server_that_it_may_read_to_another_one(redirecting: str) -> None:
    assert survey(DataSpec(train=f"{redirecting}/other.npz"), square=False).train == 4
    configure(NO_REDIRECTS)
    assert survey(DataSpec(train=f"{redirecting}/images.npz"), square=False).train == 4
    with pytest.raises(DataError):
        survey(DataSpec(train=f"{redirecting}/another.npz"), square=False)


def test_a_driver_of_a_job_that_was_deleted_ends_without_a_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["--max-images", "9", "--max-pixels", "9"]
    assert drive.main([str(tmp_path / "root"), "a", "01234567", "1", *limits]) == 1
    assert "has no job a any more" in capsys.readouterr().err
    records = Records(str(tmp_path / "root"))
    spec = JobSpec.parse({"store": "a", "data": {"train": "images"}}).to_store()
    records.submit(Record(id="a", nonce="76543210", spec=spec, owner="ann", priority=0, submitted=NOW))
    assert drive.main([str(tmp_path / "root"), "a", "01234567", "1", *limits]) == 1  # of another job of that name


def result(group: str, *, accuracy: float | None = None, mse: float | None = None, size: int | None = None) -> Result:
    return Result(group, "ntk", size, 10, 0.1, accuracy, mse, 1e-9, 10.0, None, chosen=True)


def test_the_headline_is_the_best_result_with_all_images() -> None:
    results = [result("C1", accuracy=0.8, mse=0.3), result("C4", accuracy=0.9, mse=0.2)]
    assert headline([*results, result("C8", accuracy=1.0, mse=0.0, size=3)]) == "accuracy 90.0% (C4 ntk)"
    assert headline([result("C1", mse=0.3), result("C4", mse=0.25)]) == "mean squared error 0.25 (C4 ntk)"
    assert headline([result("C1")]) is None
