"""The records of jobs, in a folder and in object storage."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from equigram.api.folder import Folder
from equigram.api.models import ErrorDetail
from equigram.api.records import Outcome, Record, Records, Share, Wish, spec_to_run, uploaded
from equigram.errors import SpecError, StoreError
from equigram.spec import JobSpec

NOW = "2026-01-01T00:00:00+00:00"


def record(name: str = "a") -> Record:
    spec = JobSpec.parse({"store": name, "data": {"train": "images"}})
    return Record(id=name, nonce="01234567", spec=spec.to_store(), owner="ann", priority=3, submitted=NOW)


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "root")
    bucket: str = request.getfixturevalue("bucket")
    return f"{bucket}/root"


def test_a_record_is_kept_once_and_read_as_it_was_written(root: str) -> None:
    records = Records(root)
    assert records.ids() == []
    assert records.record("a") is None
    assert records.submit(record())
    assert not records.submit(record())
    assert records.ids() == ["a"]
    assert records.record("a") == record()
    assert records.wish(record()) == Wish(state="run", attempt=1, since=NOW)
    wish = Wish(state="cancelled", attempt=2, since=NOW)
    records.want(record(), wish)
    assert Records(root).wish(record()) == wish
    records.give(record(), Share(begin=0.25, end=0.5))
    assert records.share(record()) == Share(begin=0.25, end=0.5)
    outcome = Outcome(state="failed", ended=NOW, error=ErrorDetail(type="DataError", message="no images"))
    assert records.outcome(record(), 2) is None
    records.end(record(), 2, outcome)
    assert records.outcome(record(), 2) == outcome
    again = record().model_copy(update={"nonce": "76543210"})
    assert (records.wish(again).attempt, records.outcome(again, 2)) == (1, None)  # of another job of that name


def test_of_many_who_submit_the_same_name_one_is_first(root: str) -> None:
    first: list[bool] = []
    threads = [threading.Thread(target=lambda: first.append(Records(root).submit(record()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(first) == [False] * 7 + [True]


def test_a_deleted_job_leaves_nothing(root: str) -> None:
    records = Records(root)
    records.submit(record("a"))
    records.submit(record("b"))
    Folder(root).write("a/zarr.json", b"{}")
    records.figures(record()).write("spectrum.png", b"a picture")
    records.delete("a")
    assert (records.ids(), records.runs(), records.half_deleted()) == (["b"], [], [])
    assert records.figures(record()).names() == []
    records.delete("a")


def test_a_deletion_that_was_interrupted_leaves_no_job_but_the_way_to_finish_it(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(root)
    records.submit(record())
    Folder(root).write("a/zarr.json", b"{}")
    with monkeypatch.context() as patch:
        patch.setattr(records._runs, "delete", lambda name: (_ for _ in ()).throw(StoreError("killed")))
        with pytest.raises(StoreError, match="killed"):
            records.delete("a")
    assert records.record("a") is None
    assert records.half_deleted() == ["a"]
    records.delete("a")
    assert (records.ids(), records.runs(), records.half_deleted()) == ([], [], [])


def test_a_file_can_be_moved_in_and_read(root: str, tmp_path: Path) -> None:
    uploads = Records(root).uploads()
    file = uploads.scratch()
    file.write_bytes(b"images")
    uploads.put("x.npz", file)
    assert (uploads.read("x.npz"), uploads.names(), file.exists()) == (b"images", ["x.npz"], False)


def test_what_a_killed_service_has_left_of_an_upload_is_deleted(tmp_path: Path) -> None:
    uploads = Records(str(tmp_path)).uploads()
    left = uploads.scratch()
    left.write_bytes(b"half")
    uploads.write("x.npz", b"whole")
    uploads.sweep()
    assert not left.exists()
    assert uploads.names() == ["x.npz"]


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    records = Records(str(tmp_path))
    records.submit(record())
    (tmp_path / ".equigram/jobs/a/job.json").write_text("{")
    with pytest.raises(StoreError, match=r"jobs/a/job\.json is damaged, or of another version"):
        records.record("a")


def test_storage_that_fails_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError, match="cannot write probe: Not a directory"):
        Records(str(tmp_path / "file")).check()
    with pytest.raises(SpecError, match="cannot open this kind of URL"):
        Records("nowhere://bucket")


def test_an_upload_has_a_url_that_the_driver_can_read() -> None:
    name = "0" * 64
    assert uploaded(f"upload:{name}.npz", "s3://b/root/") == f"s3://b/root/.equigram/uploads/{name}.npz"
    assert uploaded(f"upload:{name}.zip", "/root") == f"zip://::/root/.equigram/uploads/{name}.zip"
    for other in ("images", "s3://b/images", "upload:short.npz", f"upload:{name}.exe"):
        assert uploaded(other, "/root") == other


def test_a_driver_runs_the_job_below_the_root_on_its_cluster(job: Callable[..., Any]) -> None:
    spec = spec_to_run(record("mine"), "s3://b/root")
    assert spec.store == "s3://b/root/mine"
    assert spec.resources.address == "auto"
    assert spec.data.train == "images"
