"""Listeners besides the screen: a log of JSON lines, metrics for Prometheus, and the history in the run store."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from equigram.errors import ResourceError, StoreError
from equigram.events import (
    ComputationEnded,
    ComputationStarted,
    Note,
    Progress,
    TileCopied,
    TileFailed,
    TileFinished,
    WorkerLost,
    WorkerReleased,
    WorkerStarted,
)

if TYPE_CHECKING:
    from equigram.events import Event, Listener
    from equigram.store import GramStore

FLUSH_SECONDS = 60.0
"""Time between two writings of the history: so much of it is lost at most when the driver is killed."""


def line(event: Event) -> str:
    """An event as a line of JSON, with the time in UTC."""
    when = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": when, **event.to_json()}, ensure_ascii=False)


class EventLog:
    """Appends every event but the progress to a file, a line of JSON each, the moment it happens.

    Raises:
      ResourceError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ResourceError(f"the event log {path} cannot be written: {error.strerror or error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __call__(self, event: Event) -> None:
        """Write an event; a disk that is full loses the line and not the run."""
        if not isinstance(event, Progress):
            with contextlib.suppress(OSError):
                self._file.write(line(event) + "\n")


class History:
    """Keeps the events of a computation in the run store, in a file for about each minute.

    Storage that fails loses history and not the run: that is told once.
    """

    def __init__(self, store: GramStore, listener: Listener) -> None:
        self._store = store
        self._tell = listener
        self._lines: list[str] = []
        self._written = time.monotonic()
        began = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        self._name = f"{began}-{socket.gethostname()}-{os.getpid()}"
        self._parts = 0
        self._failed = False

    def __call__(self, event: Event) -> None:
        """Remember an event, and write what was remembered at the beginning, at the end and now and then."""
        if isinstance(event, Progress):
            return
        self._lines.append(line(event))
        due = time.monotonic() - self._written > FLUSH_SECONDS
        if due or isinstance(event, (ComputationStarted, ComputationEnded)):
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        try:
            self._store.write_history(f"{self._name}-{self._parts:06}", self._lines)
        except StoreError as error:
            if not self._failed:
                self._failed = True
                self._tell(Note(f"the history of the run is not written: {error}"))
            return
        self._parts += 1
        self._lines = []


def driver_of(name: str) -> tuple[str, int] | None:
    """Host and process of the driver that wrote a file of the history; ``None`` where somebody else did."""
    match = re.fullmatch(r"[0-9TZ.]+-(.+)-(\d+)-\d+", name)
    return (match[1], int(match[2])) if match else None


class Metrics:
    """Counts for Prometheus, served at ``http://HOST:port/metrics`` as long as the process lives.

    Raises:
      ResourceError: the port is taken.
    """

    def __init__(self, port: int, address: str = "127.0.0.1") -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

        registry = CollectorRegistry()
        options: dict[str, Any] = {"namespace": "equigram", "registry": registry}
        self._tiles = Counter("tiles", "Tiles that are stored.", **options)
        self._pairs = Counter("pairs", "Image pairs that are stored.", **options)
        self._failures = Counter("tile_failures", "Tiles that failed and are tried again.", **options)
        self._copies = Counter("tile_copies", "Late tiles that were given to a second worker.", **options)
        self._lost = Counter("workers_lost", "Workers that died or were replaced.", **options)
        self._ready: set[int] = set()
        workers = Gauge("workers", "Workers that are ready.", **options)
        workers.set_function(lambda: len(self._ready))
        self._missing = Gauge("missing_tiles", "Tiles that are not stored yet.", **options)
        self._seconds = Histogram(
            "tile_seconds", "Time of a worker for a tile.", buckets=[4.0**n for n in range(-3, 7)], **options
        )
        try:
            self._server, _ = start_http_server(port, addr=address, registry=registry)
        except OSError as error:
            raise ResourceError(f"metrics cannot be served at {address}:{port}: {error.strerror or error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __call__(self, event: Event) -> None:
        """Count an event."""
        match event:
            case ComputationStarted():
                self._missing.set(event.missing_tiles)
            case ComputationEnded():
                self._ready.clear()
            case WorkerStarted():
                self._ready.add(event.worker)
            case WorkerReleased():
                self._ready.discard(event.worker)
            case WorkerLost():
                self._ready.discard(event.worker)
                self._lost.inc()
            case TileFailed():
                self._failures.inc()
            case TileCopied():
                self._copies.inc()
            case TileFinished():
                self._tiles.inc()
                self._pairs.inc(event.pairs)
                self._missing.dec()
                self._seconds.observe(event.seconds)
