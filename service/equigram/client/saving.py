"""The results of a job as files."""

from __future__ import annotations

import csv
import io
import re
import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from equigram.api.models import PredictionsAnswer
from equigram.errors import EquigramError, IncompleteRunError, ServiceError, SpecError, StoreError
from equigram.events import Listener
from equikernel.errors import either, suggestion

if TYPE_CHECKING:
    from equigram.client.job import Job


def save(
    job: Job, folder: Path, groups: list[str] | None, kernels: list[str] | None, gram: bool, listener: Listener
) -> list[Path]:
    """Write what :meth:`equigram.client.Job.save` says."""
    detail = job.refresh().detail
    wanted = [(g, k) for g in _some("group", groups, detail.groups) for k in _some("kernel", kernels, detail.kernels)]
    solved = [pair for pair in wanted if pair in {(one.group, one.kernel) for one in detail.solved}]
    if not (solved or gram or detail.figures):
        raise IncompleteRunError(f"{job.id} is {job.state} and has nothing to fetch yet; wait for it")
    beside = folder.absolute().with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        if folder.exists() and not folder.is_dir():
            raise SpecError(f"{folder} is a file; name a folder")
        beside.mkdir(parents=True)
        if solved:
            (beside / "result.json").write_text(job.result().model_dump_json(indent=2) + "\n", encoding="utf-8")
        for group, kernel in solved:
            table = _table(job.predictions(group, kernel))
            (beside / _name(f"predictions-{group}-{kernel}.csv")).write_text(table, encoding="utf-8")
        for figure in detail.figures:
            for form in ("png", "svg"):
                (beside / _name(f"{figure}.{form}")).write_bytes(job.figure(figure, form))
        for group, kernel in wanted if gram else ():
            job.gram(group, kernel).save(beside / _name(f"gram-{group}-{kernel}.npy"), listener)
            if detail.test:
                job.cross(group, kernel).save(beside / _name(f"cross-{group}-{kernel}.npy"), listener)
        folder.mkdir(parents=True, exist_ok=True)
        return [file.replace(folder / file.name) for file in sorted(beside.iterdir())]
    except EquigramError:
        raise
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written: {error.strerror or error}; choose another folder") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _some(what: str, asked: list[str] | None, there: Sequence[str]) -> Iterable[str]:
    """Those that are asked for, all of which must be there."""
    for one in asked or ():
        if one not in there:
            raise SpecError(f"--{what} {one!r} is not in this job; choose {either(there)}{suggestion(one, there)}")
    return dict.fromkeys(asked or there)


def _name(name: str) -> str:
    """The name of a file; not one that leads out of the folder."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ServiceError(f"the service names a file {name!r}, which is not written here; is it of equigram?")
    return name


def _table(answer: PredictionsAnswer) -> str:
    """Predictions as CSV: a line per test image, a column per class or target."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    count = len(answer.predictions[0].values) if answer.predictions else 0
    columns = answer.classes or [f"target_{i}" for i in range(count)]
    lines.writerow(["index", "image", "true", "predicted", "margin", *columns])
    for one in answer.predictions:
        margin = "" if one.margin is None else f"{one.margin:.6g}"
        values = (f"{value:.6g}" for value in one.values)
        lines.writerow([one.index, one.name, one.true, one.predicted, margin, *values])
    return text.getvalue()
