"""What may be asked of the jobs of a service. It keeps nothing that it could not find again."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from equigram.api.checks import checked_spec, differences, job_name
from equigram.api.job import driven, submission
from equigram.api.models import ENDED
from equigram.api.records import Record, Wish, now, spec_to_run
from equigram.api.registry import Registry
from equigram.api.watch import Watch
from equigram.errors import ConflictError, JobNotFoundError, StoreExistsError, StoreMismatchError
from equigram.store import GramStore

if TYPE_CHECKING:
    from equigram.api.job import Drivers, Job, Limits, Listener
    from equigram.api.models import NodeView
    from equigram.api.records import Records
    from equigram.api.security import Readable
    from equigram.spec import JobSpec

TO_RESUME = ("failed", "cancelled", "incomplete")
"""States in which a job can go on."""


class Jobs:
    """All jobs below a root.

    Args:
      records: of the jobs.
      drivers: where drivers run; asked anew each time.
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
        self.registry = Registry(records, listener)
        self._watch = Watch(self.registry, drivers, limits)

    def start(self) -> None:
        """Find all jobs, and go on watching them."""
        self._watch.start()

    def stop(self) -> None:
        """Watch no more; drivers go on."""
        self._watch.stop()

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
        spec = checked_spec({**fields, "store": name}, name, self.readable, self.records)
        record = self._record(spec, owner, priority)
        with self.registry.hold(name):
            self._finish_deletion(name)
            known = self.records.record(name)
            if known is None:
                self._check_place(record)
                with self.registry.place(owner, self.limits.jobs):
                    return self._keep(record), True
            job = self.job(name)
            if known.spec != record.spec:
                self._check_change(job, known, record)
                with self.registry.place(owner, self.limits.jobs):
                    self.records.replace(known, record)
                    self._adopt(job, record)
            elif job.state in TO_RESUME:
                self.resume(name, owner)
            return job, False

    def cancel(self, name: str) -> Job:
        """End a job; what it has finished is kept.

        Raises:
          ConflictError: it has ended.
        """
        with self.registry.hold(name):
            job = self.job(name)
            if job.state in ENDED or job.state == "cancelling" or job.wish is None:
                raise ConflictError(f"{name} is {job.state}, and only a queued or running job can be cancelled")
            wish = job.wish.model_copy(update={"state": "cancelled", "since": now()})
            self.registry.want(job, wish)
        self._watch.wake()
        return job

    def resume(self, name: str, owner: str) -> Job:
        """Have a job go on where it stopped.

        Raises:
          ConflictError: it has not ended, or is done.
          ForbiddenUrlError: it reads what jobs may not read any more.
          LimitError: its owner has too many that have not ended.
        """
        with self.registry.hold(name):
            job = self.job(name)
            if job.state not in TO_RESUME:
                ends = "; wait until its driver has ended" if job.state == "cancelling" else ""
                raise ConflictError(
                    f"{name} is {job.state}, and only a failed, cancelled or incomplete job can be resumed{ends}"
                )
            with self.registry.place(job.owner or owner, self.limits.jobs):
                if job.record is None:
                    return self._take_over(job, owner)
                checked_spec(job.record.spec, name, self.readable, self.records)
                attempt = self.records.wish(job.record).attempt + 1
                wish = Wish(state="run", attempt=attempt, since=now(), finished=self._watch.finished(job))
                self.registry.want(job, wish)
        self._watch.wake()
        return job

    def delete(self, name: str) -> None:
        """Delete a job with its run store.

        Raises:
          ConflictError: it has not ended.
          ClusterError: it is not known whether its driver has ended.
        """
        with self.registry.hold(name):
            job = self.job(name)
            if job.state not in ENDED or self._is_driven(job):
                raise ConflictError(f"{name} is {job.state}, or its driver is; cancel it before you delete it")
            self.registry.delete(name)

    def job(self, name: str) -> Job:
        """A job.

        Raises:
          JobNotFoundError: there is none of that name.
        """
        job = self.registry.find(name)
        if job is None:
            raise JobNotFoundError(f"there is no job {name!r}; `equigram jobs` lists them")
        return job

    def all(self) -> list[Job]:
        """All jobs, the newest first."""
        return self.registry.all()

    @property
    def nodes(self) -> list[NodeView]:
        """The machines of the cluster when it was last asked."""
        return self._watch.nodes

    @property
    def trouble(self) -> str | None:
        """Why no driver can be started now; ``None`` where all is well."""
        return self._watch.trouble

    def log(self, job: Job, lines: int) -> str:
        """The last lines that the driver of a job has printed."""
        if not job.driver:
            raise JobNotFoundError(f"{job.id} was not submitted here, and no driver of it has printed anything")
        text = self._watch.drivers().log(job.driver)
        return "\n".join(text.splitlines()[-lines:]) + "\n"

    # ------------------------------------------------------------------ steps of requests

    @staticmethod
    def _record(spec: JobSpec, owner: str, priority: int) -> Record:
        fields = json.loads(json.dumps(spec.to_store()))  # as it will be read again
        return Record(
            id=spec.store, nonce=secrets.token_hex(4), spec=fields, owner=owner, priority=priority, submitted=now()
        )

    def _keep(self, record: Record) -> Job:
        """Keep a record, and take its job into account."""
        if not self.records.submit(record):
            raise ConflictError(f"another service has just taken a job {record.id}; submit this one again")
        before = self.registry.get(record.id)
        if before is not None:  # a run that was found, which its watchers go on watching
            return self._adopt(before, record)
        job = self.registry.known(record)
        self.registry.put(job)
        self._watch.wake()
        return job

    def _adopt(self, job: Job, record: Record) -> Job:
        """Have a job that is known be that of a new record."""
        job.record, job.facts, job.wish = record, None, None
        self.registry.adopt(job, self.records.wish(record))
        self._watch.wake()
        return job

    def _check_change(self, job: Job, known: Record, record: Record) -> None:
        """Raise :class:`ConflictError` unless a job may take the place of another one of its name.

        It may once that has ended, if its run store would be the same, or if there is none.
        """
        changed = differences(known, record)
        same_run = all(name.split(".")[0] in ("solve", "resources") for name in changed)
        if job.state in ENDED and (same_run or self.registry.store(job) is None):
            return
        remedy = (
            f"or delete that one with `equigram delete {record.id}`"
            if job.state in ENDED
            else f"or wait until that one, which is {job.state}, has ended"
        )
        raise ConflictError(
            f"there is another job {record.id}, with another {', '.join(changed)}; give this one another `store`, "
            f"{remedy}"
        )

    def _take_over(self, job: Job, owner: str) -> Job:
        """Submit a run that was not submitted here."""
        spec = GramStore.open(self.records.store_url(job.id)).info.spec.to_store()
        fields = {**spec, "store": job.id, "resources": {**spec["resources"], "address": None}}
        return self._keep(self._record(checked_spec(fields, job.id, self.readable, self.records), owner, 0))

    def _check_place(self, record: Record) -> None:
        """Raise :class:`ConflictError` unless nothing is where the run store would be, or this job's run."""
        store = GramStore(self.records.store_url(record.id))
        try:
            store.check_free()
        except StoreExistsError:
            try:
                GramStore.open(store.url).check_belongs_to(spec_to_run(record, self.records.root))
            except StoreMismatchError as error:
                raise ConflictError(f"there is another run {record.id}: {error}") from None
        except StoreMismatchError as error:
            raise ConflictError(str(error)) from None

    def _finish_deletion(self, name: str) -> None:
        """Delete what an interrupted deletion has left of a job of that name."""
        if self.records.is_deleted(name):
            self.registry.delete(name)

    def _is_driven(self, job: Job) -> bool:
        """Whether Ray has a driver of a job that has not ended."""
        return bool(job.driver) and submission(job.driver) in driven(self._watch.drivers().statuses())
