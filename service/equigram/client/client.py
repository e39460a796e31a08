"""A service, as a value."""

from __future__ import annotations

import re
import uuid
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, get_args

from equigram.api.models import JobDetail, JobSummary, ServiceView, State
from equigram.client.connection import Connection, address
from equigram.client.job import Job
from equigram.client.settings import Settings
from equigram.client.uploads import send
from equigram.errors import SpecError
from equigram.events import Listener, nobody
from equigram.spec import JobSpec
from equigram.yamlfile import read_yaml
from equikernel.errors import suggestion

PAGE = 100
"""Jobs that are asked for at once."""

_SOURCES = ("train", "test", "train_labels", "test_labels")


class Client:
    """The way to a service.

    Requests that do not reach the service are tried again for half a minute; all of them may come twice without harm.

    Args:
      url: of the service; without it that of EQUIGRAM_SERVER, of the configuration file, or http://127.0.0.1:8786.
      token: what the service knows you by; without it that of EQUIGRAM_TOKEN or of the configuration file, if any. Over
        plain HTTP to another machine it is sent with a warning, not refused: the way there may be a tunnel.
      timeout: seconds without a sign of life after which a request is taken for lost.

    Raises:
      SpecError: the URL, the token or the configuration file cannot be used.
    """

    def __init__(self, url: str | None = None, token: str | None = None, timeout: float = 60.0) -> None:
        self._connection = Connection(Settings.find(url, token), timeout)
        self._close = weakref.finalize(self, self._connection.close)

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the network; its jobs cannot be asked any more."""
        self._close()

    @property
    def url(self) -> str:
        """Of the service."""
        return self._connection.url

    def service(self) -> ServiceView:
        """Version, limits and machines of the service, and what the token may do."""
        return self._connection.get("/service", ServiceView)

    def submit(
        self,
        spec: JobSpec | Mapping[str, Any] | str | Path,
        priority: int = 0,
        key: str | None = None,
        *,
        upload: bool = True,
        listener: Listener = nobody,
    ) -> Job:
        """Hand a job to the service; a job that it has already is returned, and goes on where it stopped.

        Args:
          spec: the job, its fields, or a YAML file with them. It may lack ``store``: then the service makes a name.
          priority: -100 to 100; higher ones start first, and get more of the workers.
          key: with a job without ``store``: the same key is the same job; one is made up without.
          upload: whether images and labels that are files or folders here are sent to the service.
          listener: is told how far the uploads are.

        Raises:
          SpecError: a field is wrong.
          ConflictError: another job has this ``store``.
        """
        fields = _fields(spec)
        if key is None and "store" not in fields:
            key = uuid.uuid4().hex
        if key is not None and not re.fullmatch(r"[!-~]{1,200}", key):
            raise SpecError(f"the key {key!r} is not 1 to 200 letters, digits and signs of ASCII; choose another")
        if upload:
            sent: dict[str, str] = {}
            for name in _SOURCES:
                source = fields["data"].get(name)
                if source is not None and "://" not in source and Path(source).exists():
                    sent[source] = sent.get(source) or self.upload(source, listener)
                    fields["data"][name] = sent[source]
        headers = {} if key is None else {"Idempotency-Key": key}
        body = {"spec": fields, "priority": priority}
        return Job(self._connection, self._connection.post("/jobs", JobDetail, json=body, headers=headers))

    def upload(self, path: str | Path, listener: Listener = nobody) -> str:
        """Send images or labels, and return the URL that names them in a job: ``upload:<sha256>.npz``.

        Args:
          path: an .npz, .npy or .zip, or a folder, of which the files that are not hidden are sent.
          listener: is told how far it is.

        Raises:
          DataError: it cannot be sent.
          LimitError: it is larger than the service takes.
        """
        return send(self._connection, Path(path), listener)

    def jobs(self, *states: str) -> list[Job]:
        """The jobs in some states, or all of them, newest first.

        Raises:
          SpecError: there is no such state.
        """
        known = get_args(State)
        for state in states:
            if state not in known:
                raise SpecError(f"there is no state {state!r}; states are {', '.join(known)}{suggestion(state, known)}")
        found: dict[str, JobSummary] = {}
        offset = 0
        while True:
            query: dict[str, str | int] = {"limit": PAGE, "offset": offset}
            if states:
                query["state"] = ",".join(states)
            answer = self._connection.request("GET", "/jobs", query=query)
            page = self._connection.read(answer, list[JobSummary])
            found |= {one.id: one for one in page}
            offset += len(page)
            if not page or offset >= int(answer.headers.get("X-Total-Count", offset)):
                return [Job(self._connection, summary) for summary in found.values()]

    def job(self, id: str) -> Job:  # noqa: A002
        """The job of this name.

        Raises:
          JobNotFoundError: there is none.
        """
        return Job(self._connection, self._connection.get(address("jobs", id), JobDetail))


def _fields(spec: JobSpec | Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """What is set in a job, as plain data; defaults are those of the service.

    Raises:
      SpecError: a field is wrong, or is the service's to set.
    """
    named, source = True, "job"
    if not isinstance(spec, JobSpec):
        given: Any = spec
        if isinstance(spec, str | Path):
            source = str(spec)
            given = read_yaml(spec)
        if isinstance(given, Mapping):
            named = given.get("store") is not None
            given = {**given, "store": given["store"] if named else "unnamed"}
        spec = JobSpec.parse(given, source)
    if spec.storage_options is not None or spec.resources.address is not None:
        wrong = "resources.address" if spec.storage_options is None else "storage_options"
        raise SpecError(f"{source}: {wrong} is the service's to set, and not sent; leave it out")
    fields: dict[str, Any] = spec.model_dump(mode="json", exclude_unset=True)
    if not named:
        del fields["store"]
    return fields
