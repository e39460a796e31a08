"""The jobs that are known, found in the records and the run stores below the root."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from equigram.api.drive import headline
from equigram.api.job import Facts, Job
from equigram.api.journal import JournalReader
from equigram.api.models import DRIVEN, ENDED
from equigram.api.queue import state_of
from equigram.api.records import ID
from equigram.api.view import TileMap, View
from equigram.errors import EquigramError, LimitError, StoreNotFoundError
from equigram.solve.stage import all_results
from equigram.store import GramStore

if TYPE_CHECKING:
    from equigram.api.job import Listener
    from equigram.api.models import State
    from equigram.api.records import Record, Records, Wish

_LOG = logging.getLogger("equigram.service")

LOCKS = 64
"""Locks that the names share."""

FINDERS = 16
"""Jobs that are looked for at the same time."""


class Registry:
    """The jobs below a root. All methods may be called by any thread.

    Args:
      records: of the jobs.
      listener: told of what happens.
    """

    def __init__(self, records: Records, listener: Listener) -> None:
        self.records, self._listener = records, listener
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._reserved: Counter[str] = Counter()
        """Places of owners for jobs that are being submitted."""
        self._names = [threading.RLock() for _ in range(LOCKS)]

    # ------------------------------------------------------------------ jobs by name

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """While nobody else changes what is wanted of a job of that name, starts it, judges it or deletes it."""
        with self._names[hash(name) % LOCKS]:
            yield

    def get(self, name: str) -> Job | None:
        """A job that is known."""
        with self._lock:
            return self._jobs.get(name)

    def all(self) -> list[Job]:
        """All jobs that are known, the newest first."""
        with self._lock:
            jobs = list(self._jobs.values())
        return sorted(jobs, key=lambda job: (job.since, job.id), reverse=True)

    def put(self, job: Job) -> None:
        """Take a job into account; needs its name to be held."""
        with self._lock:
            self._jobs[job.id] = job

    def forget(self, name: str) -> None:
        """A job is gone; needs its name to be held."""
        with self._lock:
            there = self._jobs.pop(name, None)
        if there is not None:
            self._listener.deleted(name)

    def delete(self, name: str) -> None:
        """Delete a job with its run store, or what is left of it; needs its name to be held."""
        self.records.delete(name)
        self.forget(name)

    @contextlib.contextmanager
    def place(self, owner: str, most: int) -> Iterator[None]:
        """A place for one more job of an owner, while it is submitted or resumed.

        Raises:
          LimitError: there is none.
        """
        with self._lock:
            active = sum(job.state not in ENDED and job.owner == owner for job in self._jobs.values())
            if active + self._reserved[owner] >= most:
                raise LimitError(
                    f"{owner} has {active} jobs that have not ended, and {most} are allowed; wait for some, or cancel "
                    "some"
                )
            self._reserved[owner] += 1
        try:
            yield
        finally:
            with self._lock:
                self._reserved[owner] -= 1

    # ------------------------------------------------------------------ finding

    def find(self, name: str) -> Job | None:
        """A job, looked for where it is not known."""
        if not ID.fullmatch(name):
            return None
        if (known := self.get(name)) is not None:
            return known
        with self.hold(name):
            if (known := self.get(name)) is not None:
                return known
            record = self.records.record(name)
            if record is not None:
                job = self.known(record)
            elif self.records.is_deleted(name) or (facts := self._facts(name)) is None:
                return None
            else:
                job = Job(name, None, facts=facts[0], state=facts[1])
            self.put(job)
            return job

    def known(self, record: Record) -> Job:
        """A job that was submitted, as its record, its wish and its outcome say; what Ray says comes later."""
        wish = self.records.wish(record)
        job = Job(record.id, record, wish, self.records.outcome(record, wish.attempt))
        job.begun = self.records.attempt(record, wish.attempt).read("live.jsonl") is not None
        job.state = state_of(wish, job.outcome, None, begun=job.begun) or "starting"
        if job.state in ("failed", "cancelled"):
            job.view.tiles = self.listing(job)
        return job

    def scan(self) -> None:
        """Finish what was half deleted, find what others have made, and forget what they have deleted."""
        for name in self.records.half_deleted():
            with self.hold(name):
                self.delete(name)
        ids, runs = self.records.ids(), self.records.runs()
        known = {job.id: job for job in self.all()}
        new = [name for name in dict.fromkeys([*ids, *runs]) if name not in known]
        with ThreadPoolExecutor(FINDERS) as pool:
            list(pool.map(self._find_or_tell, new))
        for name, job in known.items():
            gone = name not in runs if job.record is None else name not in ids
            with self.hold(name):
                if self.get(name) is not job:
                    continue
                if gone and job.state in ENDED and self.records.record(name) is None:
                    self.forget(name)
                elif job.record is None and (facts := self._facts(name, job)) is not None:
                    job.facts, state = facts
                    self.change(job, state)

    def _find_or_tell(self, name: str) -> None:
        try:
            self.find(name)
        except EquigramError as error:
            _LOG.warning("%s: %s", name, error)

    def _facts(self, name: str, known: Job | None = None) -> tuple[Facts, State] | None:
        """What is known of a run that was not submitted, and its state; ``None`` where there is no run."""
        store = self._open(name)
        if store is None:
            return None
        if known is not None and known.facts is not None and known.state == "done" and known.facts.info == store.info:
            return known.facts, known.state
        info, counts, results = store.info, TileMap.of(store).counts(), all_results(store)
        complete = counts.finished == counts.tiles and (bool(results) or info.spec.solve is None)
        facts = Facts(info, counts, headline(results))
        return facts, "done" if complete else "incomplete"

    def store(self, job: Job) -> GramStore | None:
        """The run store of a job; ``None`` where there is none yet."""
        return self._open(job.id)

    def _open(self, name: str) -> GramStore | None:
        with contextlib.suppress(StoreNotFoundError):
            return GramStore.open(self.records.store_url(name))
        return None

    # ------------------------------------------------------------------ changes

    def change(self, job: Job, state: State) -> None:
        """A job is in another state now; needs its name to be held."""
        if job.state != state:
            job.state = state
            with job.lock:
                if state not in DRIVEN and job.view.tiles is not None:
                    job.view.tiles.rest()
            _LOG.info("%s is %s", job.id, state, extra={"job": job.id, "state": state})
            self._listener.changed(job)

    def want(self, job: Job, wish: Wish) -> None:
        """Change what is wanted of a submitted job; needs its name to be held."""
        assert job.record is not None
        self.records.want(job.record, wish)
        self.adopt(job, wish)

    def adopt(self, job: Job, wish: Wish) -> None:
        """Take into account what is wanted of a job."""
        another = job.wish is None or job.wish.attempt != wish.attempt
        job.wish = wish
        if another:
            job.outcome, job.handed, job.gone, job.begun = None, None, None, False
            with job.lock:
                job.reader, job.view = None, View(tiles=job.view.tiles)
            self.change(job, "queued")
        elif wish.state == "cancelled":
            self.change(job, "cancelled" if job.state == "queued" else "cancelling")

    def read(self, job: Job, *, again: bool = False) -> int:
        """Take new events of a job into account, and pass them on.

        Args:
          job: which.
          again: from the beginning, or what is kept of that.

        Returns:
          How many there were.
        """
        record, wish = job.record, job.wish
        if record is None or wish is None:
            return 0
        with job.lock:
            if again or job.reader is None or job.heard != wish.attempt:
                job.heard = wish.attempt
                job.reader = JournalReader(self.records.attempt(record, wish.attempt))
                job.view = View(tiles=job.view.tiles)
            entries = job.reader.read()
            kinds = [job.view.apply(entry, lambda: self.listing(job)) for entry in entries]
            if entries:
                self._listener.entries(job, entries, kinds)
        return len(entries)

    def tiles(self, job: Job) -> TileMap | None:
        """The tiles of a job, with what was heard of them; ``None`` where its images are not loaded."""
        with job.lock:
            if job.reader is None:
                self.read(job)
            if job.view.tiles is None:
                job.view.tiles = self._listed(job)
            return job.view.tiles

    def listing(self, job: Job) -> TileMap | None:
        """The tiles of a job as its store has them now; ``None`` where there is none, or it does not answer."""
        with contextlib.suppress(EquigramError):
            return self._listed(job)
        return None

    def _listed(self, job: Job) -> TileMap | None:
        store = self.store(job)
        return TileMap.of(store) if store is not None else None
