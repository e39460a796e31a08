"""The records of jobs: what was asked for, and how it ended. What is done is in the run stores, and nowhere else.

Below the root of the service each job has its run store, ``<id>``, and a folder ``.equigram/jobs/<id>``:

================================  ===========================================================================
``job.json``                      the job as it was submitted, by whom and when; never changed
``<nonce>/wish.json``             what is wanted of it now: to run, in an attempt of that number, or to be cancelled
``<nonce>/share.json``            which part of the cluster's workers it may have
``<nonce>/attempt-0001/``         the journal of a driver, and ``outcome.json``, how it ended
``<nonce>/figures/``              what was drawn at its end
================================  ===========================================================================

The nonce is new for each submission, so that nothing of a job that was deleted is taken for one of the same name.
Uploads are in ``.equigram/uploads``, by their SHA-256. ``.equigram/deleted/<id>`` is there while a job is deleted.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from equigram.api.folder import Folder
from equigram.api.models import ErrorDetail, TileCounts
from equigram.errors import StoreError
from equigram.spec import JobSpec

HIDDEN = ".equigram"
"""The folder of everything below the root that is no run store."""

ID = re.compile(r"[a-z0-9A-Z][a-z0-9A-Z._-]{0,99}")
"""What a job may be called."""


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Record(_Document):
    """A job as it was submitted."""

    id: str
    nonce: str
    """Of this submission; part of the names of its drivers in Ray."""
    spec: dict[str, Any]
    """As :meth:`equigram.spec.JobSpec.to_store` of what was submitted."""
    owner: str
    priority: int
    submitted: str


class Wish(_Document):
    """What is wanted of a job."""

    state: Literal["run", "cancelled"]
    attempt: int
    """Number of the driver, from 1."""
    since: str
    lost: int = 0
    """Drivers that were lost in a row, without having finished a tile."""
    finished: int = 0
    """Tiles that were finished when the attempt began."""


class Share(_Document):
    """An interval of 0 to 1 of the cluster's workers."""

    begin: float
    end: float


class Outcome(_Document):
    """How a driver ended."""

    state: Literal["done", "failed", "terminated"]
    """``terminated``: it was told to end."""
    ended: str
    began: str | None = None
    error: ErrorDetail | None = None
    train: int | None = None
    test: int | None = None
    counts: TileCounts | None = None
    headline: str | None = None


Document = TypeVar("Document", bound=_Document)


class Records:
    """The records of all jobs below a root.

    Args:
      root: URL of the folder of the service.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._runs = Folder(self.root)
        self._hidden = Folder(f"{self.root}/{HIDDEN}")

    def ids(self) -> list[str]:
        """Of all jobs that were submitted."""
        return [name for name in self._hidden.names("jobs") if ID.fullmatch(name)]

    def runs(self) -> list[str]:
        """The folders below the root that may be run stores."""
        return [name for name in self._runs.names() if ID.fullmatch(name)]

    def store_url(self, job: str) -> str:
        """Where the run of a job lives."""
        return f"{self.root}/{job}"

    def record(self, job: str) -> Record | None:
        """A job as it was submitted; ``None`` if it was not submitted here, or is being deleted."""
        record = self._read(Record, f"jobs/{job}/job.json")
        return None if record is None or self.is_deleted(job) else record

    def submit(self, record: Record) -> bool:
        """Keep a job; whether there was none of that name. It is to run until something else is wanted."""
        return self._hidden.create(f"jobs/{record.id}/job.json", record.model_dump_json().encode())

    def replace(self, known: Record, record: Record) -> None:
        """Keep a job in the place of another one of its name; the run store stays."""
        self._hidden.write(f"jobs/{record.id}/job.json", record.model_dump_json().encode())
        self._hidden.delete(_place(known))

    def wish(self, record: Record) -> Wish:
        """What is wanted of a job."""
        return self._read(Wish, f"{_place(record)}/wish.json") or first_wish(record)

    def want(self, record: Record, wish: Wish) -> None:
        """Change what is wanted of a job."""
        self._write(f"{_place(record)}/wish.json", wish)

    def share(self, record: Record) -> Share | None:
        """The job's part of the cluster."""
        return self._read(Share, f"{_place(record)}/share.json")

    def give(self, record: Record, share: Share) -> None:
        """Change a job's part of the cluster."""
        self._write(f"{_place(record)}/share.json", share)

    def attempt(self, record: Record, attempt: int) -> Folder:
        """The folder of a driver."""
        return Folder(self._hidden.at(f"{_place(record)}/attempt-{attempt:04}"))

    def outcome(self, record: Record, attempt: int) -> Outcome | None:
        """How a driver ended; ``None`` if it has not, or was not able to say it."""
        return self._read(Outcome, f"{_place(record)}/attempt-{attempt:04}/outcome.json")

    def end(self, record: Record, attempt: int, outcome: Outcome) -> None:
        """Keep how a driver ended."""
        self._write(f"{_place(record)}/attempt-{attempt:04}/outcome.json", outcome)

    def figures(self, record: Record) -> Folder:
        """The folder of the figures of a job."""
        return Folder(self._hidden.at(f"{_place(record)}/figures"))

    def uploads(self) -> Folder:
        """The folder of uploads."""
        return Folder(self._hidden.at("uploads"))

    def has_upload(self, name: str) -> bool:
        """Whether a file of that name was uploaded."""
        return self._hidden.exists(f"uploads/{name}")

    def is_deleted(self, job: str) -> bool:
        """Whether somebody has begun to delete a job."""
        return self._hidden.exists(f"deleted/{job}")

    def half_deleted(self) -> list[str]:
        """Jobs that somebody has begun to delete."""
        return [name for name in self._hidden.names("deleted") if ID.fullmatch(name)]

    def delete(self, job: str) -> None:
        """Delete a job with its run store; interrupted, it is gone, and what is left of it is deleted later."""
        self._hidden.write(f"deleted/{job}", now().encode())
        self._runs.delete(job)
        self._hidden.delete(f"jobs/{job}")
        self._hidden.delete(f"deleted/{job}")

    def check(self) -> None:
        """Raise :class:`StoreError` unless the root can be written."""
        self._hidden.write("probe", now().encode())

    def _read(self, kind: type[Document], name: str) -> Document | None:
        content = self._hidden.read(name)
        if content is None:
            return None
        try:
            return kind.model_validate_json(content)
        except ValidationError:
            raise StoreError(
                f"{self._hidden.at(name)} is damaged, or of another version of equigram; restore it from a copy, or "
                "delete it"
            ) from None

    def _write(self, name: str, document: _Document) -> None:
        self._hidden.write(name, document.model_dump_json().encode())


def _place(record: Record) -> str:
    return f"jobs/{record.id}/{record.nonce}"


def first_wish(record: Record) -> Wish:
    """What is wanted of a job that was submitted."""
    return Wish(state="run", attempt=1, since=record.submitted)


def now() -> str:
    """The time, as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def spec_to_run(record: Record, root: str) -> JobSpec:
    """The job of a record as a driver runs it: its store below the root, on the cluster of the driver."""
    fields = record.spec
    data = {name: uploaded(value, root) if isinstance(value, str) else value for name, value in fields["data"].items()}
    resources = {**fields["resources"], "address": "auto"}
    whole = {**fields, "store": f"{root.rstrip('/')}/{record.id}", "data": data, "resources": resources}
    return JobSpec.parse(whole, source=record.id)


UPLOAD = re.compile(r"upload:([0-9a-f]{64}\.(?:npz|npy|zip))")
"""What a job calls a file that was uploaded."""


def uploaded(value: str, root: str) -> str:
    """The URL of an upload; any other value as it is."""
    match = UPLOAD.fullmatch(value)
    if match is None:
        return value
    url = f"{root.rstrip('/')}/{HIDDEN}/uploads/{match[1]}"
    return f"zip://::{url}" if url.endswith(".zip") else url
