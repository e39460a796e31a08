"""The driver of a job: a process of its own, which Ray starts, and which needs no service.

    python -m equigram.api.drive ROOT JOB NONCE ATTEMPT --max-images 200000 --max-pixels 65536

It does what ``equigram run`` does, keeps its events and how it ended where the service finds them, and draws the run.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from equigram.api.journal import Journal
from equigram.api.models import ErrorDetail
from equigram.api.records import HIDDEN, Outcome, Record, Records, now, spec_to_run
from equigram.api.view import TileMap
from equigram.driver import ray_session
from equigram.errors import EquigramError, LimitError, StoreError
from equigram.events import Listener, Note, Progress
from equigram.figures import draw_run
from equigram.run import finish, prepare
from equigram.solve.stage import Result, all_results
from equigram.storage import configure
from equigram.store import GramStore
from equikernel.errors import EquikernelError

if TYPE_CHECKING:
    from equigram.data import Survey

SHARE_SECONDS = 5.0
"""Time between two looks at the share of the job."""

NO_REDIRECTS = {protocol: {"allow_redirects": False} for protocol in ("http", "https")}
"""A server that jobs may read from must not send them to one that they may not."""


class _Terminated(BaseException):
    """SIGTERM: the job was cancelled, or its machine is to go."""


def main(arguments: list[str] | None = None) -> int:
    """Run a job, and keep how it ended."""
    parser = argparse.ArgumentParser(prog="python -m equigram.api.drive", description="The driver of a job.")
    parser.add_argument("root")
    parser.add_argument("job")
    parser.add_argument("nonce")
    parser.add_argument("attempt", type=int)
    parser.add_argument("--max-images", type=int, required=True)
    parser.add_argument("--max-pixels", type=int, required=True)
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    began = now()
    records = Records(given.root)
    record = records.record(given.job)
    if record is None or record.nonce != given.nonce:
        print(f"error: {given.root} has no job {given.job} any more; it was deleted", file=sys.stderr)  # noqa: T201
        return 1
    outcome = Outcome(state="terminated", ended=now())
    try:
        with Journal(records.attempt(record, given.attempt)) as journal:
            store = _drive(records, record, given.max_images, given.max_pixels, journal)
            outcome = success(store)
    except _Terminated:
        outcome = Outcome(state="terminated", ended=now())
    except (EquigramError, EquikernelError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        outcome = failure(error)
    except Exception as error:
        traceback.print_exc()
        outcome = failure(EquigramError(f"an error that nobody expected, {type(error).__name__}: see the log"))
    records.end(record, given.attempt, _as_submitted(outcome.model_copy(update={"began": began}), given.root))
    return 0 if outcome.state == "done" else 1


def _terminate(*_: object) -> None:
    raise _Terminated


def _drive(records: Records, record: Record, images: int, pixels: int, listener: Listener) -> GramStore:
    """Do everything that a job asks for, and draw it."""
    spec = spec_to_run(record, records.root)
    configure(NO_REDIRECTS)

    def allow(found: Survey) -> None:
        count, size = found.train + found.test, found.height * found.width
        if count > images or size > pixels:
            raise LimitError(
                f"{record.id} has {count:,} images of {size:,} pixels, and {images:,} of {pixels:,} are allowed; "
                "take fewer (data.per_class) or smaller ones (data.size), or ask its operator for more (equigram serve "
                "--max-images, --max-pixels)"
            )

    with ray_session(spec.resources):  # one for all stages
        store, costs = prepare(spec, listener, allow, connected=True)
        finished = finish(store, spec, listener, costs, _Share(records, record))
    _draw(records, record, finished.store, listener)
    return finished.store


class _Share:
    """The job's part of the cluster, as the service has told it; all of it until it tells."""

    def __init__(self, records: Records, record: Record) -> None:
        self._records, self._record = records, record
        self._looked, self._share = float("-inf"), (0.0, 1.0)

    def __call__(self) -> tuple[float, float]:
        if time.monotonic() - self._looked > SHARE_SECONDS:
            self._looked = time.monotonic()
            try:
                share = self._records.share(self._record)
            except StoreError:  # later
                return self._share
            self._share = (0.0, 1.0) if share is None else (share.begin, share.end)
        return self._share


def _draw(records: Records, record: Record, store: GramStore, listener: Listener) -> None:
    """Draw the figures of a finished run beside its record; where that fails, the run is done all the same."""
    listener(Progress("drawing figures", 0, 1))
    try:
        with tempfile.TemporaryDirectory() as folder:
            draw_run(store, folder)
            for file in sorted(Path(folder).iterdir()):
                records.figures(record).put(file.name, file)
    except Exception as error:
        listener(Note(f"the figures could not be drawn: {type(error).__name__}: {error}"))


def failure(error: Exception) -> Outcome:
    """The outcome of a driver that ends with an error."""
    return Outcome(state="failed", ended=now(), error=ErrorDetail(type=type(error).__name__, message=str(error)))


def _as_submitted(outcome: Outcome, root: str) -> Outcome:
    """An outcome whose error calls uploads as the job does, and not by where they are kept."""
    if outcome.error is None:
        return outcome
    place = re.compile(rf"(zip://::)?{re.escape(root.rstrip('/'))}/{re.escape(HIDDEN)}/uploads/")
    return outcome.model_copy(
        update={"error": outcome.error.model_copy(update={"message": place.sub("upload:", outcome.error.message)})}
    )


def success(store: GramStore) -> Outcome:
    """The outcome of a driver that has done everything, with what a list of jobs says of the run."""
    info = store.info
    return Outcome(
        state="done",
        ended=now(),
        train=info.train,
        test=info.test,
        counts=TileMap.of(store).counts(),
        headline=headline(all_results(store)),
    )


def headline(results: list[Result]) -> str | None:
    """The best result of those with all training images, in words."""
    whole = [one for one in results if one.chosen and one.train_size is None]
    if accurate := [one for one in whole if one.accuracy is not None]:
        best = max(accurate, key=lambda one: one.accuracy or 0.0)
        return f"accuracy {best.accuracy:.1%} ({best.group} {best.kernel})"
    if measured := [one for one in whole if one.mean_squared_error is not None]:
        best = min(measured, key=lambda one: one.mean_squared_error or 0.0)
        return f"mean squared error {best.mean_squared_error:.3g} ({best.group} {best.kernel})"
    return None


if __name__ == "__main__":
    sys.exit(main())
