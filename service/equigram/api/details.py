"""What is said of a job, from what is known of it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from equigram.api.models import ENDED, JobDetail, JobSummary, Solved, TileCounts
from equigram.api.view import TileMap
from equigram.solve.stage import solved_matrices

if TYPE_CHECKING:
    from equigram.api.jobs import Job, Jobs


def summary(job: Job) -> JobSummary:
    """A job in the list; nothing is read for it."""
    return JobSummary(**_fields(job))


def _fields(job: Job) -> dict[str, Any]:
    view, outcome = job.view, job.outcome or job.facts
    tiling = view.tiles.tiling if view.tiles is not None else None
    gram = job.record.spec["gram"] if job.record else {}
    ended = job.state in ENDED
    return {
        "id": job.id,
        "state": job.state,
        "owner": job.owner,
        "priority": job.record.priority if job.record else 0,
        "submitted": job.record.submitted if job.record else None,
        "started": view.began or (outcome.began if outcome else None),
        "ended": outcome.ended if outcome is not None and ended else None,
        "groups": list(gram.get("groups", job.groups)),
        "kernels": list(gram.get("kernels", job.kernels)),
        "train": tiling.train if tiling else outcome.train if outcome else None,
        "test": tiling.test if tiling else outcome.test if outcome else None,
        "counts": view.tiles.counts() if view.tiles is not None else outcome.counts if outcome else None,
        "progress": view.progress if job.state == "running" else None,
        "error": outcome.error if outcome is not None and job.state == "failed" else None,
        "headline": outcome.headline if outcome is not None and job.state == "done" else None,
    }


def detail(job: Job, jobs: Jobs) -> JobDetail:
    """A job with everything that fits on a page, from its journal and its store."""
    jobs.read(job)
    store = jobs.store(job)
    if store is not None and job.view.tiles is None:
        job.view.tiles = TileMap.of(store)
    info, view, fields = store.info if store is not None else None, job.view, _fields(job)
    counts: TileCounts | None = fields["counts"]
    pace = view.pairs_per_second(datetime.now(UTC)) if job.state == "running" else None
    solved = solved_matrices(store) if store is not None and job.state == "done" else []
    stored = info.spec.to_store() if info is not None else {}
    return JobDetail(
        **fields,
        spec=job.record.spec if job.record else stored,
        attempt=job.wish.attempt if job.wish else 0,
        store=jobs.records.store_url(job.id),
        share=job.share.end - job.share.begin if job.share and job.state == "running" else None,
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
        figures=[name[:-4] for name in jobs.records.figures(job.id).names() if name.endswith(".png")],
    )
