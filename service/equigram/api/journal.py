"""What happens in an attempt at a job, kept where the service can read it while it happens.

A driver appends its events to a journal, in parts of :data:`PART_EVENTS`: ``events-000000.jsonl`` and so on are
finished; ``live.jsonl`` is the part in the making, written as a whole every :data:`LIVE_SECONDS`. Each part begins with
a line that tells its number, that of its first event, when the journal began, and the last notes and news of workers
of the parts before, so that a reader never needs more than the last parts.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from equigram.errors import StoreError
from equigram.events import Event, Progress
from equigram.listeners import line

if TYPE_CHECKING:
    from equigram.api.folder import Folder

LIVE_SECONDS = 0.5
"""Time between two writings of what is new: so old is an event at most when it can be read."""

PART_EVENTS = 500
"""Events of a part."""

KEPT_PARTS = 10
"""Parts that a reader goes back at most."""

KEPT_KINDS = ("Note", "ComputationStarted", "WorkerStarted", "WorkerLost", "WorkerReleased")
"""Events of former parts that a part tells again."""

KEPT_EVENTS = 200
"""How many of them."""


class Journal:
    """A listener that keeps all events of an attempt; storage that fails loses events and not the run.

    Between two writings only the last :class:`Progress` of a kind is kept.

    Args:
      folder: that of the attempt.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._part, self._first, self._began = 0, 0, datetime.now(UTC).isoformat(timespec="milliseconds")
        self._kept: deque[tuple[int, str]] = deque(maxlen=KEPT_EVENTS)
        """Number and line of the events of former parts that are told again."""
        self._lines: list[str] = []
        """Those of the present part, all of which have their numbers."""
        self._new: list[str] = []
        self._progress: dict[str, int] = {}
        """Where in ``_new`` the last progress of a kind is."""
        self._stale = False
        """Whether what is written lacks something."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_now_and_then, daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._write()

    def __call__(self, event: Event) -> None:
        """Keep an event."""
        with self._lock:
            if isinstance(event, Progress):
                place = self._progress.setdefault(event.what, len(self._new))
                if place < len(self._new):
                    self._new[place] = line(event)
                    return
            self._new.append(line(event))

    def _write_now_and_then(self) -> None:
        while not self._ended.wait(LIVE_SECONDS):
            if self._new or self._stale:
                self._write()

    def _write(self) -> None:
        with self._lock:
            self._lines += self._new
            self._new, self._progress = [], {}
        self._stale = True
        with contextlib.suppress(StoreError):  # again next time
            while len(self._lines) >= PART_EVENTS:
                part = self._lines[:PART_EVENTS]
                self._folder.write(f"events-{self._part:06}.jsonl", self._text(part))
                numbered = enumerate(part, self._first)
                self._kept.extend((n, text) for n, text in numbered if json.loads(text)["event"] in KEPT_KINDS)
                self._part, self._first = self._part + 1, self._first + PART_EVENTS
                del self._lines[:PART_EVENTS]
            self._folder.write("live.jsonl", self._text(self._lines))
            self._stale = False

    def _text(self, lines: list[str]) -> bytes:
        fields = {"part": self._part, "first": self._first, "began": self._began, "kept": list(self._kept)}
        head = json.dumps(fields)
        return "".join(f"{text}\n" for text in (head, *lines)).encode()


@dataclass(frozen=True)
class Entry:
    """An event of a journal."""

    number: int
    """Its place in the journal, from 0."""
    text: str
    """JSON, as :func:`equigram.listeners.line` made it."""


class JournalReader:
    """Reads what is new in the journal of an attempt.

    Args:
      folder: that of the attempt.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._next: int | None = None
        """The number of the first event that was not read; ``None`` before anything was."""
        self._live = b""
        self.began: str | None = None
        """When the journal was begun."""

    def begun(self) -> bool:
        """Whether a driver has ever written it."""
        return self._folder.read("live.jsonl") is not None

    def read(self) -> list[Entry]:
        """The events that were not read before; the first time those of the last :data:`KEPT_PARTS` parts."""
        live = self._folder.read("live.jsonl")
        if live is None or live == self._live:
            return []
        head, lines = _parsed(live)
        self.began = head["began"]
        begins = self._next is None
        if self._next is None:
            self._next = max(0, head["part"] - KEPT_PARTS) * PART_EVENTS
        parts = [(head, lines)]
        for number in range(self._next // PART_EVENTS, head["part"])[::-1]:
            content = self._folder.read(f"events-{number:06}.jsonl")
            if content is not None:
                parts.insert(0, _parsed(content))
        entries = [Entry(number, text) for number, text in parts[0][0]["kept"]] if begins else []
        for one, texts in parts:
            entries.extend(self._unread(one["first"], texts))
        self._live, self._next = live, head["first"] + len(lines)
        return entries

    def _unread(self, first: int, lines: list[str]) -> Iterator[Entry]:
        for number, text in enumerate(lines, first):
            if self._next is not None and number >= self._next:
                yield Entry(number, text)


def _parsed(content: bytes) -> tuple[dict[str, Any], list[str]]:
    """What the first line of a part tells, and the others."""
    head, *lines = content.decode().removesuffix("\n").split("\n")
    return json.loads(head), lines
