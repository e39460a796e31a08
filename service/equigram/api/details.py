"""What is said of a job, from what is known of it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from equigram.api.models import ENDED, JobDetail, JobSummary, Solved, TileCounts
from equigram.solve.stage import solved_matrices

if TYPE_CHECKING:
    from equigram.api.job import Job
    from equigram.api.jobs import Jobs


def summary(job: Job) -> JobSummary:
    """A job in the list; nothing is read for it."""
    with job.lock:
        return JobSummary(**_fields(job))


def _fields(job: Job) -> dict[str, Any]:
    record, outcome, view = job.record, job.outcome, job.view
    known = outcome or job.facts
    tiling = view.tiles.tiling if view.tiles is not None else None
    gram = record.spec["gram"] if record is not None else {}
    facts = job.facts
    return {
        "id": job.id,
        "state": job.state,
        "owner": job.owner,
        "priority": record.priority if record else 0,
        "submitted": record.submitted if record else None,
        "started": outcome.began if outcome and outcome.began else job.reader.began if job.reader else None,
        "ended": outcome.ended if outcome is not None and job.state in ENDED else None,
        "groups": list(facts.groups if facts else gram["groups"]),
        "kernels": list(facts.kernels if facts else gram["kernels"]),
        "train": tiling.train if tiling else known.train if known else None,
        "test": tiling.test if tiling else known.test if known else None,
        "counts": view.tiles.counts() if view.tiles is not None else known.counts if known else None,
        "progress": view.progress if job.state in ("running", "cancelling") else None,
        "error": outcome.error if outcome is not None and job.state == "failed" else None,
        "headline": known.headline if known is not None and job.state == "done" else None,
    }


def detail(job: Job, jobs: Jobs) -> JobDetail:
    """A job with everything that fits on a page, from its journal and its store."""
    store = jobs.registry.store(job)
    info = store.info if store is not None else None
    solved = solved_matrices(store) if store is not None and job.state == "done" else []
    figures = jobs.records.figures(job.record).names() if job.record else []
    stored = info.spec.to_store() if info is not None else {}
    with job.lock:
        jobs.registry.tiles(job)
        view, fields = job.view, _fields(job)
        counts: TileCounts | None = fields["counts"]
        pace = view.pairs_per_second(datetime.now(UTC)) if job.state == "running" else None
        share, record = job.share, job.record
        return JobDetail(
            **fields,
            spec=record.spec if record else stored,
            attempt=job.wish.attempt if job.wish else 0,
            store=jobs.records.store_url(job.id),
            share=share.end - share.begin if share and job.state == "running" else None,
            tile=info.tile if info else None,
            blocks=(info.tiling.train_blocks, info.tiling.test_blocks) if info else None,
            passes=len(info.passes) if info else None,
            image_shape=info.image_shape if info else None,
            classes=list(info.classes) if info and info.classes is not None else None,
            pairs_per_second=pace,
            seconds_left=(counts.pairs - counts.finished_pairs) / pace if counts and pace else None,
            workers=sorted(view.workers.values(), key=lambda worker: worker.number),
            notes=view.notes,
            solved=[Solved(group=group, kernel=kernel) for group, kernel in solved],
            figures=[name[:-4] for name in figures if name.endswith(".png")],
        )
