"""The jobs of a service: found in the run stores, the records and Ray; watched, started, stopped and deleted.

A service keeps nothing that it could not find again. One thread, :meth:`Jobs.look`, reads what drivers have written and
starts those whose turn it is; requests change records, and wake it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from equigram.api.checks import checked_spec, differences, job_name
from equigram.api.drive import failure, headline
from equigram.api.journal import Entry, JournalReader
from equigram.api.models import ENDED, NodeView, State
from equigram.api.queue import Waiting, after_loss, next_jobs, shares, state_of
from equigram.api.records import ID, Outcome, Record, Records, Share, Wish, now
from equigram.api.view import TileMap, View
from equigram.errors import (
    ClusterError,
    ConflictError,
    EquigramError,
    JobFailedError,
    JobNotFoundError,
    LimitError,
    StoreError,
    StoreNotFoundError,
)
from equigram.solve.stage import solved_matrices, stored_results
from equigram.spec import JobSpec
from equigram.store import GramStore

if TYPE_CHECKING:
    from equigram.api.cluster import Status
    from equigram.api.security import Readable

POLL_SECONDS = 0.5
"""Time between two looks at what drivers have written."""

RAY_SECONDS = 2.0
"""Time between two questions to Ray."""

SCAN_SECONDS = 30.0
"""Time between two listings of the root, where others may have made or deleted runs."""

NODES_SECONDS = 15.0
"""Time between two questions to Ray for its machines."""

GRACE_SECONDS = 5.0
"""Time that a driver which Ray says has ended may take to be seen to have written how."""

_LOG = logging.getLogger("equigram.service")


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


@dataclass(frozen=True)
class Limits:
    """What a service allows.

    Attributes:
      concurrency: jobs that run at the same time.
      images: training and test images of a job.
      jobs: jobs of a token that have not ended.
      upload_bytes: of an upload.
      upload_files: in an uploaded archive.
      body_bytes: of any other request.
      gram_bytes: of a slice of a matrix.
    """

    concurrency: int = 2
    images: int = 200_000
    jobs: int = 100
    upload_bytes: int = 2 * 2**30
    upload_files: int = 200_000
    body_bytes: int = 2**20
    gram_bytes: int = 64 * 2**20


@dataclass(eq=False)
class Job:
    """What is known of a job now."""

    id: str
    record: Record | None
    wish: Wish | None = None
    outcome: Outcome | None = None
    state: State = "incomplete"
    status: Status | None = None
    handed: float | None = None
    """When its driver was handed to Ray by this service."""
    gone: float | None = None
    """Since when Ray says that the driver has ended, and it has not said how."""
    reader: JournalReader | None = None
    view: View = field(default_factory=View)
    share: Share | None = None
    facts: Outcome | None = None
    """What a list says of a run without a record."""
    groups: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    """Of a run without a record."""
    seen: bytes = b""
    """The attributes of a run without a record when ``facts`` were found."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while its journal is read."""

    @property
    def owner(self) -> str | None:
        """The name of the token it was submitted with."""
        return self.record.owner if self.record else None

    @property
    def since(self) -> str:
        """What lists are sorted by: when it was submitted, or its store made."""
        return self.record.submitted if self.record else self.facts.ended if self.facts else ""

    @property
    def driver(self) -> str:
        """The name of its driver in Ray."""
        return f"equigram-{self.id}-{self.wish.attempt if self.wish else 0}"


class Listener(Protocol):
    """Told of what happens to jobs, by the thread of :meth:`Jobs.look` and by requests."""

    def entries(self, job: Job, entries: list[Entry], kinds: list[str]) -> None:
        """New events of its journal."""

    def changed(self, job: Job) -> None:
        """Its state changed."""

    def deleted(self, job: str) -> None:
        """It is gone."""


class Jobs:
    """All jobs below a root.

    Args:
      records: of the jobs.
      drivers: where drivers run; asked for another one when they do not answer.
      limits: what is allowed.
      readable: what jobs may read.
      listener: told of what happens.
    """

    def __init__(
        self,
        records: Records,
        drivers: Callable[[], Drivers],
        limits: Limits,
        readable: Readable,
        listener: Listener,
    ) -> None:
        self.records, self.limits, self.readable = records, limits, readable
        self._drivers, self._listener = drivers, listener
        self._lock = threading.RLock()
        """Held while the jobs below, or a state, are changed; never while storage or Ray are asked."""
        self._jobs: dict[str, Job] = {}
        self._deleted: dict[str, int] = {}
        """How often jobs began to be deleted, or were: what was read meanwhile is not true any more."""
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look_always, name="jobs", daemon=True)
        self._asked, self._scanned, self._counted = float("-inf"), float("-inf"), float("-inf")
        self._nodes: list[NodeView] = []
        self.trouble: str | None = "the service is starting"
        """Why no driver can be started now; ``None`` where all is well."""

    def start(self) -> None:
        """Find all jobs, and go on watching."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more; drivers go on."""
        self._stopped.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    # ------------------------------------------------------------------ requests

    def submit(self, fields: dict[str, Any], priority: int, owner: str, key: str | None) -> tuple[Job, bool]:
        """Keep a job, to run when it is its turn; the same one again goes on where it stopped.

        Returns:
          The job, and whether it is new.

        Raises:
          SpecError: it is not usable.
          ConflictError: another one has its name.
          LimitError: its owner has too many.
        """
        name = job_name(fields, self.records.root, owner, key)
        spec = self._checked({**fields, "store": name}, name)
        record = Record(id=name, spec=spec.to_store(), owner=owner, priority=priority, submitted=now())
        known = self.records.record(name)
        if known is None:
            with self._lock:
                active = sum(job.state not in ENDED for job in self._jobs.values() if job.owner == owner)
            if active >= self.limits.jobs:
                raise LimitError(
                    f"{owner} has {active} jobs that have not ended, and {self.limits.jobs} are allowed; wait for "
                    "some, or cancel some"
                )
            if self.records.submit(record):
                job = self._add(record)
                self._wake.set()
                return job, True
            known = self.records.record(name)
        if known is None or known.spec != record.spec:
            raise ConflictError(
                f"there is another job {name}, with {differences(known, record)}; give this one another `store`, or "
                f"delete that one with `equigram delete {name}`"
            )
        with self._lock:
            job = self._jobs.get(name) or self._add(known)
        if job.state in ("failed", "cancelled", "incomplete"):
            self.resume(name, owner)
        return job, False

    def cancel(self, name: str) -> Job:
        """End a job; what it has finished is kept.

        Raises:
          ConflictError: it has ended.
        """
        job = self.job(name)
        if job.state in ENDED or job.wish is None:
            raise ConflictError(f"{name} is {job.state}, and only a queued or running job can be cancelled")
        self._want(job, Wish(state="cancelled", attempt=job.wish.attempt, since=now(), finished=job.wish.finished))
        self._wake.set()
        return job

    def resume(self, name: str, owner: str) -> Job:
        """Have a job go on where it stopped.

        Raises:
          ConflictError: it has not ended, or is done.
          ForbiddenUrlError: it reads what jobs may not read any more.
        """
        job = self.job(name)
        if job.state not in ("failed", "cancelled", "incomplete"):
            raise ConflictError(f"{name} is {job.state}, and only a failed, cancelled or incomplete job can be resumed")
        if job.record is None:
            spec = GramStore.open(self.records.store_url(name)).info.spec.to_store()
            fields = {**spec, "store": name, "resources": {**spec["resources"], "address": None}}
            record = Record(
                id=name, spec=self._checked(fields, name).to_store(), owner=owner, priority=0, submitted=now()
            )
            self.records.submit(record)
            with self._lock:
                job.record, job.wish, job.state = record, self.records.wish(record), "queued"
        else:
            self._checked(job.record.spec, name)
            wish = self.records.wish(job.record)
            self._want(job, Wish(state="run", attempt=wish.attempt + 1, since=now(), finished=self._finished(job)))
        self._wake.set()
        return job

    def delete(self, name: str) -> None:
        """Delete a job with its run store.

        Raises:
          ConflictError: it has not ended.
        """
        job = self.job(name)
        if job.state not in ENDED or job.status in ("pending", "running"):
            raise ConflictError(f"{name} is {job.state}; cancel it before you delete it")
        with self._lock:
            self._deleted[name] = self._deleted.get(name, 0) + 1
            self._jobs.pop(name, None)
        self.records.delete(name)
        with self._lock:
            self._deleted[name] += 1
        self._listener.deleted(name)

    def job(self, name: str) -> Job:
        """A job.

        Raises:
          JobNotFoundError: there is none of that name.
        """
        with self._lock:
            job = self._jobs.get(name)
        if job is None and ID.fullmatch(name) and self._find(name):
            job = self._jobs.get(name)
        if job is None:
            raise JobNotFoundError(f"there is no job {name!r}; `equigram jobs` lists them")
        return job

    def all(self) -> list[Job]:
        """All jobs, the newest first."""
        with self._lock:
            jobs = list(self._jobs.values())
        return sorted(jobs, key=lambda job: (job.since, job.id), reverse=True)

    def nodes(self) -> list[NodeView]:
        """The machines of the cluster when it was last asked."""
        return self._nodes

    def log(self, job: Job, lines: int) -> str:
        """The last lines that the driver of a job has printed."""
        text = self._drivers().log(job.driver)
        return "\n".join(text.splitlines()[-lines:]) + "\n"

    def read(self, job: Job, *, again: bool = False) -> None:
        """Read the journal of a job that is not watched; ``again`` from its beginning, or what is kept of that."""
        if again:
            with job.lock:
                job.reader, job.view = None, View(tiles=job.view.tiles)
        if job.record is not None and job.reader is None:
            self._read(job)

    def store(self, job: Job) -> GramStore | None:
        """The run store of a job; ``None`` where there is none yet."""
        with contextlib.suppress(StoreNotFoundError):
            return GramStore.open(self.records.store_url(job.id))
        return None

    def _checked(self, fields: dict[str, Any], name: str) -> JobSpec:
        return checked_spec(fields, name, self.readable, self.records)

    def _finished(self, job: Job) -> int:
        """Tiles that are stored."""
        try:
            store = self.store(job)
        except EquigramError:
            return 0
        return sum(len(part.finished_tiles()) for _, part in store.passes()) if store is not None else 0

    # ------------------------------------------------------------------ finding

    def _add(self, record: Record) -> Job:
        """Take a job that was submitted into account."""
        job = self._known(record)
        with self._lock:
            return self._jobs.setdefault(record.id, job)

    def _known(self, record: Record) -> Job:
        """A job that was submitted, as its record, its wish and its outcome say."""
        wish = self.records.wish(record)
        job = Job(record.id, record, wish, self.records.outcome(record.id, wish.attempt))
        begun = self.records.attempt(record.id, wish.attempt).read("live.jsonl") is not None
        job.state = state_of(wish, job.outcome, None, begun=begun) or "starting"
        return job

    def _find(self, name: str) -> bool:
        """Look for a job that is not known; whether there is one."""
        before = self._deleted.get(name, 0)
        with contextlib.suppress(StoreError):
            record = self.records.record(name)
            job = Job(name, None) if record is None else self._known(record)
            if record is not None or self._look_at_run(job):
                with self._lock:
                    if self._deleted.get(name, 0) == before and before % 2 == 0:
                        self._jobs.setdefault(name, job)
                        return True
        return False

    def _look_at_run(self, job: Job) -> bool:
        """Find out how far a run is that was not submitted here; whether there is a run."""
        store = self.store(job)
        if store is None:
            return False
        info = store.info
        seen = json.dumps([info.spec.to_store(), info.created, info.train, info.test], default=str).encode()
        if job.seen == seen and job.state == "done":
            return True
        tiles = TileMap.of(store)
        counts, solved = tiles.counts(), solved_matrices(store)
        results = [one for pair in solved for one in stored_results(store, *pair)]
        asked = info.spec.solve is not None
        complete = counts.finished == counts.tiles and (bool(solved) or not asked)
        facts = Outcome(
            state="done",
            ended=info.created,
            train=info.train,
            test=info.test,
            counts=counts,
            headline=headline(results),
        )
        with self._lock:
            job.facts, job.seen, job.view.tiles = facts, seen, None
            job.groups, job.kernels = info.spec.gram.groups, info.spec.gram.kernels
            self._change(job, "done" if complete else "incomplete")
        return True

    def _scan(self) -> None:
        """Find jobs and runs that others have made, and forget those that they have deleted."""
        ids, runs = self.records.ids(), self.records.runs()
        with self._lock:
            known = dict(self._jobs)
        new = [name for name in dict.fromkeys([*ids, *runs]) if name not in known]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(self._find, new))
        for name, job in known.items():
            if job.record is None and name in runs:
                with contextlib.suppress(EquigramError):
                    self._look_at_run(job)
            gone = name not in runs if job.record is None else name not in ids
            if gone and job.state in ENDED:
                with self._lock:
                    self._jobs.pop(name, None)
                self._listener.deleted(name)

    # ------------------------------------------------------------------ the thread

    def _look_always(self) -> None:
        while not self._stopped.is_set():
            try:
                self.look()
            except StoreError as error:
                _LOG.warning("the storage of the jobs does not answer: %s", error)
            except Exception:
                _LOG.exception("an error that nobody expected while looking after the jobs")
            self._wake.wait(POLL_SECONDS)
            if self._wake.is_set():
                self._wake.clear()
                self._asked = float("-inf")

    def look(self) -> None:
        """Read what drivers have written, see which have ended, and start those whose turn it is."""
        clock = time.monotonic()
        if clock - self._scanned >= SCAN_SECONDS:
            self._scan()
            self._scanned = clock
        active = [job for job in self.all() if job.state not in ENDED or job.status in ("pending", "running")]
        for job in active:
            if job.state in ("starting", "running") or job.status is not None:
                self._read(job)
        if clock - self._asked >= RAY_SECONDS:
            self._asked = clock
            statuses = self._statuses()
            if statuses is not None:
                for job in active:
                    self._judge(job, statuses.get(job.driver))
                self._start_next()
        self._give_shares()

    def _statuses(self) -> dict[str, Status] | None:
        """What Ray says of all drivers; ``None`` where it does not answer."""
        try:
            drivers = self._drivers()
            statuses = drivers.statuses()
            if time.monotonic() - self._counted >= NODES_SECONDS:
                self._nodes, self._counted = drivers.nodes(), time.monotonic()
        except ClusterError as error:
            if self.trouble != str(error):
                _LOG.warning("%s", error)
            self.trouble = str(error)
            return None
        self.trouble = None
        return statuses

    def _read(self, job: Job) -> None:
        """Take new events of a job into account."""
        if job.wish is None:
            return
        with job.lock:
            if job.reader is None:
                job.reader = JournalReader(self.records.attempt(job.id, job.wish.attempt))
            entries = job.reader.read()
            kinds = [job.view.apply(entry, lambda: self._listing(job)) for entry in entries]
        if entries:
            self._listener.entries(job, entries, kinds)
            if job.state == "starting" and job.wish.state == "run":
                with self._lock:
                    self._change(job, "running")

    def _listing(self, job: Job) -> TileMap | None:
        """The tiles of a job as its store has them now; ``None`` where there is none, or it does not answer."""
        with contextlib.suppress(EquigramError):
            store = self.store(job)
            return TileMap.of(store) if store is not None else None
        return None

    def _judge(self, job: Job, status: Status | None) -> None:
        """Find out whether a driver is at work, has ended, or is lost."""
        if job.wish is None or job.record is None:
            return
        job.status = status
        outcome = self.records.outcome(job.id, job.wish.attempt)
        if outcome is not None:
            self._read(job)
        if job.wish.state == "cancelled" and outcome is None and status in ("pending", "running"):
            self._drivers().stop(job.driver)
        begun = job.reader is not None and job.reader.begun()
        handed = job.handed is not None and status is None
        state = state_of(job.wish, outcome, "pending" if handed and self._is_fresh(job) else status, begun=begun)
        if state is None and outcome is None and self._is_fresh(job):
            return
        if state is None:
            state = self._lose(job)
            outcome = job.outcome
        with self._lock:
            job.outcome = outcome
            self._change(job, state)

    @staticmethod
    def _is_fresh(job: Job) -> bool:
        """Whether a driver that seems to be gone may only be seen late."""
        clock = time.monotonic()
        job.gone = job.gone or clock
        since = max(job.gone, job.handed or 0.0)
        return clock - since < GRACE_SECONDS

    def _lose(self, job: Job) -> State:
        """Start another driver for a job whose driver was lost, or let it fail if too many were."""
        assert job.wish is not None
        wish = after_loss(job.wish, self._finished(job), now())
        if wish is not None:
            _LOG.warning("the driver of %s was lost; another one goes on", job.id)
            self._want(job, wish)
            return "queued"
        error = JobFailedError(
            f"{job.wish.lost + 1} drivers of {job.id} in a row were killed, or lost their machine, before they "
            f"finished a tile, perhaps for want of memory; `equigram logs {job.id}` shows what the last one said, "
            f"`equigram resume {job.id}` tries again"
        )
        job.outcome = failure(error)
        self.records.end(job.id, job.wish.attempt, job.outcome)
        return "failed"

    def _start_next(self) -> None:
        """Start the jobs whose turn it is."""
        with self._lock:
            jobs = [job for job in self._jobs.values() if job.record is not None]
            queued = [_waiting(job.record) for job in jobs if job.state == "queued" and job.record]
            running = [_waiting(job.record) for job in jobs if job.record and job.state in ("starting", "running")]
        cpus = int(sum(node.cpus for node in self._nodes if node.alive))
        for name in next_jobs(queued, running, min(self.limits.concurrency, max(1, cpus))):
            job = self.job(name)
            assert job.wish is not None
            arguments = [self.records.root, name, str(job.wish.attempt), "--max-images", str(self.limits.images)]
            try:
                self._drivers().submit(job.driver, arguments)
            except ClusterError as error:
                self.trouble = str(error)
                _LOG.warning("%s", error)
                return
            with self._lock:
                job.handed, job.gone, job.status = time.monotonic(), None, "pending"
                job.reader, job.view = None, View()
                self._change(job, "starting")

    def _give_shares(self) -> None:
        """Tell the running jobs their parts of the cluster, where these have changed."""
        with self._lock:
            busy = [job for job in self._jobs.values() if job.state in ("starting", "running") and job.record]
            wanted = shares({job.id: job.record.priority for job in busy if job.record})
        for job in busy:
            if job.share != wanted[job.id]:
                self.records.give(job.id, wanted[job.id])
                job.share = wanted[job.id]

    def _want(self, job: Job, wish: Wish) -> None:
        """Change what is wanted of a job."""
        self.records.want(job.id, wish)
        with self._lock:
            another = job.wish is None or job.wish.attempt != wish.attempt
            job.wish = wish
            if another:
                job.outcome, job.reader, job.handed, job.gone, job.status = None, None, None, None, None
                self._change(job, "queued")
            elif wish.state == "cancelled" and job.state == "queued":
                self._change(job, "cancelled")

    def _change(self, job: Job, state: State) -> None:
        """A job is in another state now."""
        if job.state != state:
            job.state = state
            _LOG.info("%s is %s", job.id, state, extra={"job": job.id, "state": state})
            self._listener.changed(job)


def _waiting(record: Record | None) -> Waiting:
    assert record is not None
    return Waiting(record.id, record.owner, record.priority, record.submitted)
