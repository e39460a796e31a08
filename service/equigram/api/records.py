"""The records of jobs: what was asked for, and how it ended. What is done is in the run stores, and nowhere else.

Below the root of the service each job has its run store, ``<id>``, and a folder ``.equigram/jobs/<id>``:

==========================  =============================================================================
``job.json``                the job as it was submitted, by whom and when; never changed
``wish.json``               what is wanted of it now: to run, in an attempt of that number, or to be cancelled
``share.json``              which part of the cluster's workers it may have
``attempt-0001/``           the journal of a driver, and ``outcome.json``, how it ended
``figures/``                what was drawn at its end
==========================  =============================================================================

Uploads are in ``.equigram/uploads``, by their SHA-256.
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
        """A job as it was submitted; ``None`` if it was not submitted here."""
        return self._read(Record, f"jobs/{job}/job.json")

    def submit(self, record: Record) -> bool:
        """Keep a job, and the wish that it runs; whether there was none of that name.

        The record counts: a service that dies before it has written the wish finds it again.
        """
        created = self._hidden.create(f"jobs/{record.id}/job.json", record.model_dump_json().encode())
        if created:
            self.want(record.id, first_wish(record))
        return created

    def wish(self, record: Record) -> Wish:
        """What is wanted of a job."""
        return self._read(Wish, f"jobs/{record.id}/wish.json") or first_wish(record)

    def want(self, job: str, wish: Wish) -> None:
        """Change what is wanted of a job."""
        self._write(f"jobs/{job}/wish.json", wish)

    def share(self, job: str) -> Share | None:
        """The job's part of the cluster."""
        return self._read(Share, f"jobs/{job}/share.json")

    def give(self, job: str, share: Share) -> None:
        """Change a job's part of the cluster."""
        self._write(f"jobs/{job}/share.json", share)

    def attempt(self, job: str, attempt: int) -> Folder:
        """The folder of a driver."""
        return Folder(self._hidden.at(f"jobs/{job}/attempt-{attempt:04}"))

    def outcome(self, job: str, attempt: int) -> Outcome | None:
        """How a driver ended; ``None`` if it has not, or was not able to say it."""
        return self._read(Outcome, f"jobs/{job}/attempt-{attempt:04}/outcome.json")

    def end(self, job: str, attempt: int, outcome: Outcome) -> None:
        """Keep how a driver ended."""
        self._write(f"jobs/{job}/attempt-{attempt:04}/outcome.json", outcome)

    def figures(self, job: str) -> Folder:
        """The folder of the figures of a job."""
        return Folder(self._hidden.at(f"jobs/{job}/figures"))

    def uploads(self) -> Folder:
        """The folder of uploads."""
        return Folder(self._hidden.at("uploads"))

    def has_upload(self, name: str) -> bool:
        """Whether a file of that name was uploaded."""
        return self._hidden.exists(f"uploads/{name}")

    def delete(self, job: str) -> None:
        """Delete a job, its run store first: interrupted, it is still there to be deleted again."""
        self._runs.delete(job)
        self._hidden.delete(f"jobs/{job}")

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
