"""A job of a service, from its submission to its results."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from equigram.api.models import (
    ENDED,
    JobDetail,
    JobSummary,
    Prediction,
    PredictionsAnswer,
    Progress,
    ResultAnswer,
    State,
)
from equigram.client.connection import Connection, address
from equigram.client.matrix import RemoteMatrix, read_npy
from equigram.client.saving import save
from equigram.client.stream import Told, as_event, follow
from equigram.errors import (
    ConflictError,
    IncompleteRunError,
    JobCancelledError,
    JobFailedError,
    JobNotFoundError,
    ServiceError,
    SpecError,
    WaitTimeoutError,
)
from equigram.events import Listener, Note, nobody
from equigram.screen import Screen
from equikernel.errors import either, suggestion

PAGE = 1000
"""Predictions that are asked for at once."""

_ACTIVE = ("queued", "starting", "running")


class Job:
    """A job, as the service knew it when it was last asked; :meth:`refresh` asks again.

    Made by :meth:`equigram.Client.submit`, :meth:`~equigram.Client.job` and :meth:`~equigram.Client.jobs`.

    Attributes:
      id: its name in the service.
      summary: what the list of jobs says of it.
    """

    def __init__(self, connection: Connection, summary: JobSummary) -> None:
        self.id = summary.id
        self.summary = summary
        self._connection = connection
        self._path = address("jobs", summary.id)

    def __repr__(self) -> str:
        return f"Job({self.id!r}, {', '.join(self._words())})"

    def _repr_html_(self) -> str:
        """For notebooks."""
        progress, error = self.summary.progress, self.summary.error
        bar = ""
        if progress is not None and progress.total:
            bar = f' <progress value="{progress.done:d}" max="{progress.total:d}"></progress>'
        words = "<br>".join(map(html.escape, self._words()))
        why = f"<br>{html.escape(error.message)}" if error is not None else ""
        return f"<div><b>{html.escape(self.id)}</b>{bar}<br>{words}{why}</div>"

    def _words(self) -> list[str]:
        """State, progress and result."""
        words = [str(self.summary.state)]
        if (progress := self.summary.progress) is not None:
            words.append(f"{progress.stage} {progress.done:,} of {progress.total:,}".removesuffix(" 0 of 0"))
        if self.summary.headline is not None:
            words.append(self.summary.headline)
        return words

    @property
    def state(self) -> State:
        """Its state, as last heard."""
        return self.summary.state

    @property
    def detail(self) -> JobDetail:
        """Everything that the service says of it, as last heard."""
        if not isinstance(self.summary, JobDetail):
            self.refresh()
        assert isinstance(self.summary, JobDetail)
        return self.summary

    def refresh(self) -> Self:
        """Ask the service again."""
        self.summary = self._connection.get(self._path, JobDetail)
        return self

    def progress(self) -> Progress | None:
        """How far the present stage is, now; ``None`` when nothing runs."""
        return self.refresh().summary.progress

    def events(self, after: str | None = None) -> Iterator[Told]:
        """What happens, ``(id, kind, data)`` each, until the job has ended.

        It begins with what has happened in the present attempt, or the last 5,000 events of it. A lost connection is
        taken up again where it was lost.

        Args:
          after: the id of the event after which to begin.
        """
        return follow(self._connection, f"{self._path}/events", after)

    def wait(self, timeout: float | None = None, listener: Listener = nobody) -> JobDetail:
        """Wait until the job has ended, and return what is to say of it.

        Args:
          timeout: seconds to wait at most; any time without.
          listener: is told what happens, for example a :class:`equigram.screen.Screen`.

        Raises:
          JobFailedError: it failed.
          JobCancelledError: somebody cancelled it, or it is incomplete.
          WaitTimeoutError: it goes on.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        after = None
        while True:
            for told in follow(self._connection, f"{self._path}/events", after, deadline):
                after, event = told.id or after, as_event(told)
                if told.kind == "state":
                    event = Note(f"{self.id} is {told.data.get('state')}")
                if event is not None:
                    listener(event)
            if self.refresh().state in ENDED or time.monotonic() >= deadline:  # else it was resumed meanwhile
                break
        detail = self.detail
        kept = f"what it had finished is kept, and `equigram resume {self.id}` goes on from there"
        if detail.state == "failed":
            reason = detail.error.message if detail.error else f"`equigram logs {self.id}` may say why"
            raise JobFailedError(f"{self.id} failed: {reason}; {kept}")
        if detail.state in ENDED - {"done"}:
            raise JobCancelledError(f"{self.id} is {detail.state}; {kept}")
        if detail.state != "done":
            raise WaitTimeoutError(f"{self.id} is {detail.state} after {timeout:g} s; it goes on, wait again for it")
        return detail

    def watch(self, timeout: float | None = None) -> JobDetail:
        """Wait with bars on a terminal or in a notebook; see :meth:`wait`."""
        with Screen(Console(stderr=True, markup=False, highlight=False, emoji=False)) as screen:
            return self.wait(timeout, screen)

    def cancel(self) -> Self:
        """End it; what is finished is kept. Nothing happens to a job that is cancelled already.

        Raises:
          ConflictError: it has ended by itself.
        """
        return self._ask("cancel", ("cancelling", "cancelled"))

    def resume(self) -> Self:
        """Go on with a job that failed, was cancelled or is incomplete. Nothing happens to one that is under way.

        Raises:
          ConflictError: it is done.
        """
        return self._ask("resume", _ACTIVE)

    def _ask(self, what: str, wanted: tuple[str, ...]) -> Self:
        try:
            self.summary = self._connection.post(f"{self._path}/{what}", JobDetail)
        except ConflictError:
            if self.refresh().state not in wanted:  # else an answer was lost, or somebody was faster
                raise
        return self

    def delete(self) -> None:
        """Delete its matrices, results and figures.

        Raises:
          ConflictError: it runs.
        """
        self._connection.delete(self._path)

    def log(self, lines: int = 200) -> str:
        """The last lines that its driver printed."""
        return self._connection.request("GET", f"{self._path}/log", query={"lines": lines}).text

    def result(self) -> ResultAnswer:
        """Accuracies, errors and confusion matrices.

        Raises:
          IncompleteRunError: nothing is solved yet.
        """
        return self._connection.get(f"{self._path}/result", ResultAnswer)

    def predictions(self, group: str, kernel: str) -> PredictionsAnswer:
        """The predictions for all test images, with the chosen ridge, in the order of the images."""
        found: list[Prediction] = []
        while True:
            page = self._connection.get(
                f"{self._path}/predictions",
                PredictionsAnswer,
                group=group,
                kernel=kernel,
                sort="index",
                offset=len(found),
                limit=PAGE,
            )
            found += page.predictions
            if len(found) >= page.total:
                return page.model_copy(update={"predictions": found})
            if not page.predictions:
                raise ServiceError(f"{self.id}: only {len(found):,} of {page.total:,} predictions came; ask again")

    def gram(self, group: str, kernel: str) -> RemoteMatrix:
        """The train matrix, (n, n) float32 or float64, of which only the parts that are looked at travel."""
        return self._matrix("gram", group, kernel)

    def cross(self, group: str, kernel: str) -> RemoteMatrix:
        """The test x train matrix, (m, n) float32 or float64, of which only the parts that are looked at travel."""
        return self._matrix("cross", group, kernel)

    def _matrix(self, part: str, group: str, kernel: str) -> RemoteMatrix:
        detail = self.detail
        for what, asked, choices in (("group", group, detail.groups), ("kernel", kernel, detail.kernels)):
            if asked not in choices:
                hint = suggestion(asked, choices)
                raise SpecError(f"{what} {asked!r} is not in {self.id}; choose {either(choices)}{hint}")
        if detail.train is None or detail.tile is None:
            detail = self.refresh().detail
        if detail.train is None or detail.tile is None:
            raise IncompleteRunError(f"{self.id} is {self.state} and has no images yet; wait for it")
        shape = (detail.train if part == "gram" else detail.test or 0, detail.train)
        dtype = _precision(detail.spec)
        path = self._path + address(part, group, kernel)

        def fetch(rows: range, cols: range) -> Any:
            query = {name: f"{axis.start}:{axis.stop}" for name, axis in (("rows", rows), ("cols", cols))}
            answer = self._connection.request("GET", path, query=query)
            return read_npy(answer.content, (len(rows), len(cols)), matrix.dtype, str(answer.url))

        matrix = RemoteMatrix(f"{part} {group} {kernel}", shape, dtype, detail.tile, fetch)
        return matrix

    @property
    def figures(self) -> list[str]:
        """Names of the figures there are, as last heard."""
        return self.detail.figures

    def figure(self, name: str, form: str = "png") -> bytes:
        """A figure as a ``png``, an ``svg``, or its data as a ``csv``.

        Raises:
          JobNotFoundError: there is none.
        """
        if name not in self.figures:
            known = either(self.figures) if self.figures else "there are none yet"
            raise JobNotFoundError(f"{self.id} has no figure {name!r}: {known}{suggestion(name, self.figures)}")
        return self._connection.request("GET", self._path + address("figures", f"{name}.{form}")).content

    def save(
        self,
        folder: str | Path,
        groups: list[str] | None = None,
        kernels: list[str] | None = None,
        *,
        gram: bool = False,
        listener: Listener = nobody,
    ) -> list[Path]:
        """Write results, predictions and figures into a folder, all of them or none, and return their paths.

        Args:
          folder: where; files of the same names are replaced.
          groups: those whose predictions and matrices are wanted; all without.
          kernels: those whose predictions and matrices are wanted; all without.
          gram: whether the matrices are wanted, too.
          listener: is told about the progress.

        Raises:
          IncompleteRunError: there is nothing to write yet.
          StoreError: a file cannot be written.
        """
        return save(self, Path(folder), groups, kernels, gram, listener)


def _precision(spec: dict[str, Any]) -> str:
    """The dtype of the matrices of a job."""
    section = spec.get("gram")
    found = section.get("dtype", "float32") if isinstance(section, dict) else "float32"
    return "float64" if found == "float64" else "float32"
