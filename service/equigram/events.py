"""What happens in a run, as values; whoever wants to know is a listener: a function of an event."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from equigram.plan import Tile


@dataclass(frozen=True)
class Event:
    """Something that happened."""

    def to_json(self) -> dict[str, Any]:
        """The kind of event and its fields; tiles as text."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        texts = {name: str(value) for name, value in fields.items() if isinstance(value, Tile)}
        return {"event": type(self).__name__, **fields, **texts}


@dataclass(frozen=True)
class Note(Event):
    """One sentence that a person should know."""

    text: str


@dataclass(frozen=True)
class Progress(Event):
    """``done`` of ``total`` things of the kind ``what`` are done; ``detail`` says more than their number."""

    what: str
    done: int
    total: int
    detail: str = ""


@dataclass(frozen=True)
class ComputationStarted(Event):
    """The computation of missing tiles began, in the pass ``number`` of the run, from 0.

    ``pairs`` are image pairs, ``host`` is where the driver runs.
    """

    tiles: int
    missing_tiles: int
    pairs: int
    missing_pairs: int
    workers: int
    host: str
    process: int
    number: int = 0


@dataclass(frozen=True)
class ComputationEnded(Event):
    """The computation of tiles came to its end: all are stored, or ``error`` says why not."""

    tiles: int
    pairs: int
    seconds: float
    error: str | None


@dataclass(frozen=True)
class WorkerStarted(Event):
    """A worker is ready; workers are numbered in the order in which they were asked for."""

    worker: int
    place: str
    processor: str


@dataclass(frozen=True)
class WorkerLost(Event):
    """A worker died, or was replaced; its ``tiles`` go to others."""

    worker: int
    reason: str
    tiles: int


@dataclass(frozen=True)
class WorkerReleased(Event):
    """A worker ended because the run has more workers than its share of the cluster; it had finished its tiles."""

    worker: int


@dataclass(frozen=True)
class TileStarted(Event):
    """A tile was handed to a worker, which may have another one to finish first."""

    tile: Tile
    worker: int


@dataclass(frozen=True)
class TileCopied(Event):
    """A tile that another worker has not finished yet was handed to an idle one as well."""

    tile: Tile
    worker: int


@dataclass(frozen=True)
class TileFinished(Event):
    """A tile is stored.

    Its worker took ``seconds`` for it: to read and to prepare images, for the kernels of pairs, and to write them.
    """

    tile: Tile
    worker: int
    pairs: int
    seconds: float
    processor: str
    read_seconds: float
    prepare_seconds: float
    kernel_seconds: float
    write_seconds: float


@dataclass(frozen=True)
class TileFailed(Event):
    """A tile failed for the ``failures``-th time, and is tried again after ``pause`` seconds."""

    tile: Tile
    worker: int
    reason: str
    failures: int
    pause: float


Listener: TypeAlias = Callable[[Event], None]


def nobody(event: Event) -> None:
    """A listener that does nothing."""


def tell(*listeners: Listener) -> Listener:
    """One listener for several."""

    def all_of_them(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return all_of_them
