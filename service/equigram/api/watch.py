"""The thread that watches drivers, starts those whose turn it is, and tells each its share of the cluster."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from equigram.api.drive import failure
from equigram.api.job import driven, submission
from equigram.api.models import DRIVEN, ENDED
from equigram.api.queue import Waiting, after_loss, next_jobs, shares, state_of
from equigram.api.records import now
from equigram.errors import ClusterError, EquigramError, JobFailedError, StoreError

if TYPE_CHECKING:
    from equigram.api.cluster import Status
    from equigram.api.job import Drivers, Job, Limits
    from equigram.api.models import NodeView, State
    from equigram.api.records import Outcome, Record, Wish
    from equigram.api.registry import Registry

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


class Watch:
    """Watches the jobs of a registry.

    Args:
      registry: the jobs.
      drivers: where drivers run; asked anew each time, as a cluster may be replaced by another.
      limits: what is allowed.
    """

    def __init__(self, registry: Registry, drivers: Callable[[], Drivers], limits: Limits) -> None:
        self._registry, self.drivers, self._limits = registry, drivers, limits
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look_always, name="watch", daemon=True)
        self._asked, self._scanned, self._counted = float("-inf"), float("-inf"), float("-inf")
        self.nodes: list[NodeView] = []
        """The machines of the cluster when it was last asked."""
        self.trouble: str | None = "the service is starting"
        """Why no driver can be started now; ``None`` where all is well."""

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more; drivers go on."""
        self._stopped.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    def wake(self) -> None:
        """Look at once, and ask Ray: something was asked for."""
        self._wake.set()

    def _look_always(self) -> None:
        while not self._stopped.is_set():
            try:
                self.look()
            except StoreError as error:
                _LOG.warning("the storage of the jobs does not answer: %s", error)
            except Exception:
                _LOG.exception("an error that nobody expected while looking after the jobs")
            if self._wake.wait(POLL_SECONDS):
                self._wake.clear()
                self._asked = float("-inf")

    def look(self) -> None:
        """Read what drivers have written, see which have ended, and start those whose turn it is."""
        clock = time.monotonic()
        if clock - self._scanned >= SCAN_SECONDS:
            self._registry.scan()
            self._scanned = clock
        for job in self._registry.all():
            if job.state in DRIVEN:
                self._each(job, self._hear)
        if clock - self._asked >= RAY_SECONDS:
            self._asked = clock
            statuses = self._statuses()
            if statuses is not None:
                self._stop_unwanted(statuses)
                for job in self._registry.all():
                    if job.state not in ENDED:
                        self._each(job, lambda job: self._judge(job, statuses.get(job.driver)))
                self._start_next(statuses)
        self._give_shares()

    def _each(self, job: Job, do: Callable[[Job], None]) -> None:
        """Do something about a job; if it fails, others do not suffer."""
        try:
            with self._registry.hold(job.id):
                if self._registry.get(job.id) is job:
                    do(job)
        except EquigramError as error:
            _LOG.warning("%s: %s", job.id, error, extra={"job": job.id})
        except Exception:
            _LOG.exception("an error that nobody expected with %s", job.id, extra={"job": job.id})

    def _statuses(self) -> dict[str, Status] | None:
        """What Ray says of all drivers; ``None`` where it does not answer."""
        try:
            drivers = self.drivers()
            statuses = drivers.statuses()
            if time.monotonic() - self._counted >= NODES_SECONDS:
                self.nodes, self._counted = drivers.nodes(), time.monotonic()
        except ClusterError as error:
            self._tell(error)
            return None
        self.trouble = None
        return statuses

    def _tell(self, error: ClusterError) -> None:
        if self.trouble != str(error):
            _LOG.warning("%s", error)
        self.trouble = str(error)

    def _hear(self, job: Job) -> None:
        """Take what a driver has written into account."""
        if self._registry.read(job) and not job.begun:
            job.begun = True
            if job.wish is not None and job.wish.state == "run":
                self._registry.change(job, "running")

    def _stop_unwanted(self, statuses: dict[str, Status]) -> None:
        """End all drivers of our jobs that nobody wants: of jobs that were cancelled, and of former attempts."""
        wanted = {submission(job.driver): job for job in self._registry.all() if job.record is not None}
        for name, status in statuses.items():
            job = wanted.get(submission(name))
            if status == "ended" or job is None or job.wish is None:
                continue
            ended = job.outcome is not None and job.outcome.state != "terminated"
            if name != job.driver or (job.wish.state == "cancelled" and not ended):
                self._each(job, lambda _, name=name: self.drivers().stop(name))  # type: ignore[misc]

    def _judge(self, job: Job, status: Status | None) -> None:
        """Find out whether the driver of a job is at work, has ended, or is lost."""
        record = job.record
        if record is None or job.wish is None:
            return
        wish = self._registry.records.wish(record)
        if wish != job.wish:  # another service, or a person, wants something else
            self._registry.adopt(job, wish)
            return
        job.outcome = self._registry.records.outcome(record, wish.attempt)
        self._hear(job)
        if status in ("pending", "running"):
            job.gone = None
        seen = "pending" if status is None and job.handed is not None and self._is_fresh(job) else status
        state = state_of(wish, job.outcome, seen, begun=job.begun)
        if state is None and job.outcome is None and self._is_fresh(job):
            return
        self._registry.change(job, self._lose(job, record, wish) if state is None else state)

    @staticmethod
    def _is_fresh(job: Job) -> bool:
        """Whether a driver that seems to be gone may only be seen late."""
        clock = time.monotonic()
        job.gone = job.gone or clock
        return clock - max(job.gone, job.handed or 0.0) < GRACE_SECONDS

    def _lose(self, job: Job, record: Record, wish: Wish) -> State:
        """Have another driver go on with a job whose driver was lost; if too many were, the job fails."""
        following = after_loss(wish, self.finished(job), now())
        if following is not None:
            _LOG.warning("the driver of %s was lost; another one goes on", job.id, extra={"job": job.id})
            self._registry.want(job, following)
            return "queued"
        job.outcome = _lost(job, wish)
        self._registry.records.end(record, wish.attempt, job.outcome)
        return "failed"

    def finished(self, job: Job) -> int:
        """Tiles of a job that are stored; 0 where that cannot be seen."""
        tiles = self._registry.listing(job)
        return 0 if tiles is None else tiles.counts().finished

    def _start_next(self, statuses: dict[str, Status]) -> None:
        """Start the jobs whose turn it is, once all former drivers of theirs have ended."""
        busy = driven(statuses)
        jobs = [(job, job.record) for job in self._registry.all() if job.record is not None]
        queued = [
            _waiting(record) for job, record in jobs if job.state == "queued" and submission(job.driver) not in busy
        ]
        running = [_waiting(record) for job, record in jobs if job.state in DRIVEN]
        cpus = int(sum(node.cpus for node in self.nodes if node.alive))
        for name in next_jobs(queued, running, min(self._limits.concurrency, max(1, cpus))):
            if (job := self._registry.get(name)) is not None:
                self._each(job, self._start)

    def _start(self, job: Job) -> None:
        """Hand the driver of a job to Ray."""
        record, wish = job.record, job.wish
        if record is None or wish is None or job.state != "queued":
            return
        if (stored := self._registry.records.wish(record)) != wish:
            self._registry.adopt(job, stored)
            return
        limits = ["--max-images", str(self._limits.images), "--max-pixels", str(self._limits.pixels)]
        root = self._registry.records.root
        try:
            self.drivers().submit(job.driver, [root, record.id, record.nonce, str(wish.attempt), *limits])
        except ClusterError as error:
            self._tell(error)
            return
        job.handed, job.gone = time.monotonic(), None
        self._registry.change(job, "starting")

    def _give_shares(self) -> None:
        """Tell the running jobs their parts of the cluster, where these have changed."""
        busy = [
            (job, job.record)
            for job in self._registry.all()
            if job.state in ("starting", "running") and job.record is not None
        ]
        wanted = shares({record.id: record.priority for _, record in busy})
        for job, record in busy:
            if job.share != wanted[record.id]:
                self._registry.records.give(record, wanted[record.id])
                job.share = wanted[record.id]


def _waiting(record: Record) -> Waiting:
    return Waiting(record.id, record.owner, record.priority, record.submitted)


def _lost(job: Job, wish: Wish) -> Outcome:
    """The outcome of a job of which too many drivers were lost."""
    return failure(
        JobFailedError(
            f"{wish.lost + 1} drivers of {job.id} in a row were killed, or lost their machine, before they finished a "
            f"tile, perhaps for want of memory; `equigram logs {job.id}` shows what the last one said"
        )
    )
