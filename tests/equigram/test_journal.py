"""The journal of a driver, and who reads it while it is written."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equigram.api import journal as module
from equigram.api.folder import Folder
from equigram.api.journal import Journal, JournalReader
from equigram.errors import StoreError
from equigram.events import Note, Progress, TileFinished, WorkerStarted
from equigram.plan import Tile


def note(number: int) -> Note:
    return Note(f"{number} \u2028 – a line separator is no end of a line")


def numbers(entries: list[Any]) -> list[int]:
    for entry in entries:
        assert json.loads(entry.text)["text"] == note(entry.number).text
    return [entry.number for entry in entries]


class Memory(Folder):
    """A folder in memory that may fail."""

    def __init__(self) -> None:
        self.url, self.files, self.fails = "memory", dict[str, bytes](), False

    def read(self, name: str) -> bytes | None:
        return self.files.get(name)

    def write(self, name: str, content: bytes) -> None:
        if self.fails:
            raise StoreError("the disk is full")
        self.files[name] = content


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["event", "write", "read", "fail", "mend"]), max_size=60),
    st.integers(1, 4),
)
def test_a_reader_hears_every_event_once_and_in_order_however_writes_reads_and_faults_follow(
    steps: list[str], part: int
) -> None:
    folder, heard, told = Memory(), list[int](), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART_EVENTS", part)
        patch.setattr(module, "KEPT_PARTS", 10**6)
        journal, reader = Journal(folder), JournalReader(folder)
        for step in [*steps, "mend", "write", "read"]:
            match step:
                case "event":
                    journal(note(told))
                    told += 1
                case "write":
                    journal._write()
                case "read":
                    heard += numbers(reader.read())
                case _:
                    folder.fails = step == "fail"
    assert heard == list(range(told))


def test_a_late_reader_begins_with_the_last_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_EVENTS", 10)
    monkeypatch.setattr(module, "KEPT_PARTS", 2)
    folder = Memory()
    with Journal(folder) as journal:
        for number in range(57):
            journal(note(number))
    reader = JournalReader(folder)
    assert [entry.number for entry in reader.read()] == [*range(30), *range(30, 57)]  # notes are told again
    assert reader.read() == []


def test_a_late_reader_hears_of_the_beginning_and_of_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_EVENTS", 10)
    monkeypatch.setattr(module, "KEPT_PARTS", 2)
    folder = Memory()
    with Journal(folder) as journal:
        early = JournalReader(folder)
        early.read()
        journal(WorkerStarted(0, "here, process 8", "zen4"))
        for row in range(100):
            journal(TileFinished(Tile("gram", row, row), 0, 1, 0.1, "zen4", 0.0, 0.0, 0.1, 0.0))
        journal(Note("late"))
    reader = JournalReader(folder)
    entries = reader.read()
    assert [entry.number for entry in entries] == [0, *range(80, 102)]
    assert json.loads(entries[0].text)["place"] == "here, process 8"
    assert reader.began == early.began


def test_only_the_last_progress_of_a_kind_is_kept_between_two_writings(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "attempt"))
    reader = JournalReader(folder)
    assert not reader.begun()
    with Journal(folder) as journal:
        assert reader.begun()
        for done in range(1000):
            journal(Progress("images", done, 1000))
            journal(Progress("pairs", 2 * done, 2000))
    last = [json.loads(entry.text) for entry in reader.read()]
    assert [event["done"] for event in last if event["what"] == "images"][-1] == 999
    assert [event["done"] for event in last if event["what"] == "pairs"][-1] == 1998
    assert len(last) < 20


def test_many_threads_may_tell_events_while_one_reads(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "attempt"))
    heard: list[int] = []
    reader = JournalReader(folder)
    with Journal(folder) as journal:

        def tell() -> None:
            for _ in range(400):
                journal(Note("something"))

        threads = [threading.Thread(target=tell) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            heard += [entry.number for entry in reader.read()]
        for thread in threads:
            thread.join()
    heard += [entry.number for entry in reader.read()]
    assert heard == list(range(1600))
