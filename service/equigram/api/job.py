"""A job as the service knows it, and those who deal with it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from equigram.api.view import View

if TYPE_CHECKING:
    from equigram.api.cluster import Status
    from equigram.api.journal import Entry, JournalReader
    from equigram.api.models import NodeView, State, TileCounts
    from equigram.api.records import Outcome, Record, Share, Wish
    from equigram.store import RunInfo


@dataclass(frozen=True)
class Limits:
    """What a service allows.

    Attributes:
      concurrency: jobs that run at the same time.
      images: training and test images of a job together.
      pixels: of an image, as the kernels see it.
      jobs: jobs of a token that have not ended.
      upload_bytes: of an upload.
      upload_files: in an uploaded archive.
      body_bytes: of any other request.
      gram_bytes: of the values in a slice of a matrix.
    """

    concurrency: int = 2
    images: int = 200_000
    pixels: int = 65_536
    jobs: int = 100
    upload_bytes: int = 2 * 2**30
    upload_files: int = 200_000
    body_bytes: int = 2**20
    gram_bytes: int = 64 * 2**20


@dataclass(frozen=True)
class Facts:
    """What a list says of a run that was not submitted here."""

    info: RunInfo
    counts: TileCounts
    headline: str | None

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of its networks."""
        return self.info.spec.gram.groups

    @property
    def kernels(self) -> tuple[str, ...]:
        """Kernels that it stores."""
        return self.info.spec.gram.kernels

    @property
    def train(self) -> int:
        """Training images."""
        return self.info.train

    @property
    def test(self) -> int:
        """Test images."""
        return self.info.test


@dataclass(eq=False)
class Job:
    """What is known of a job now. What is on storage or in Ray counts more; this is found again from there."""

    id: str
    record: Record | None
    wish: Wish | None = None
    outcome: Outcome | None = None
    """Of the present attempt."""
    state: State = "incomplete"
    handed: float | None = None
    """When the present driver was handed to Ray by this service."""
    gone: float | None = None
    """Since when Ray says that the present driver has ended, and it has not said how."""
    begun: bool = False
    """Whether the present driver has written anything."""
    share: Share | None = None
    facts: Facts | None = None
    """Of a run without a record."""
    view: View = field(default_factory=View)
    reader: JournalReader | None = None
    heard: int = 0
    """The attempt that the reader reads."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held while the view and the reader are used."""

    @property
    def owner(self) -> str | None:
        """The name of the token it was submitted with."""
        return self.record.owner if self.record else None

    @property
    def since(self) -> str:
        """What lists are sorted by: when it was submitted, or its store made."""
        return self.record.submitted if self.record else self.facts.info.created if self.facts else ""

    @property
    def driver(self) -> str:
        """The name of its present driver in Ray."""
        return driver_name(self.record, self.wish.attempt) if self.record and self.wish else ""


def driver_name(record: Record, attempt: int) -> str:
    """What a driver is called in Ray, where other services, and jobs of the same name before, have theirs."""
    return f"equigram-{record.id}-{record.nonce}-{attempt}"


def submission(driver: str) -> str:
    """What the names of all drivers of a record have in common."""
    return driver.rpartition("-")[0]


def driven(statuses: Mapping[str, Status]) -> set[str]:
    """The submissions of which Ray has a driver that has not ended."""
    return {submission(name) for name, status in statuses.items() if status != "ended"}


class Drivers(Protocol):
    """Where drivers run: see :class:`equigram.api.cluster.Cluster`."""

    def submit(self, name: str, arguments: list[str]) -> None:
        """Start one, unless one of that name was started before."""

    def statuses(self) -> dict[str, Status]:
        """Of all that are known, by name."""

    def stop(self, name: str) -> None:
        """Have one end."""

    def log(self, name: str) -> str:
        """What one has printed."""

    def nodes(self) -> list[NodeView]:
        """The machines."""


class Listener(Protocol):
    """Told of what happens to jobs, by any thread; events of a job in their order."""

    def entries(self, job: Job, entries: list[Entry], kinds: list[str]) -> None:
        """New events of a job, of the attempt that it reads."""

    def changed(self, job: Job) -> None:
        """A job is in another state."""

    def deleted(self, name: str) -> None:
        """A job is gone."""
