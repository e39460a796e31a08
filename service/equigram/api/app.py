"""The service over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import struct
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from equigram import __version__
from equigram.api.channels import Channels
from equigram.api.details import detail, summary
from equigram.api.guard import Guard, body_of
from equigram.api.job import Drivers, Limits
from equigram.api.jobs import Jobs
from equigram.api.metrics import ServiceMetrics
from equigram.api.models import (
    ErrorAnswer,
    JobDetail,
    JobSummary,
    PredictionsAnswer,
    ResultAnswer,
    ServiceView,
    State,
    Submission,
    UploadAnswer,
)
from equigram.api.pictures import gram_picture, image_picture
from equigram.api.records import Records
from equigram.api.results import matrix_slice, predictions, result, window
from equigram.api.security import LOCAL, Readable, Tokens, User
from equigram.errors import (
    AuthenticationError,
    ClusterError,
    ConflictError,
    DataError,
    EquigramError,
    IncompleteRunError,
    JobNotFoundError,
    LimitError,
    SpecError,
    StoreError,
    StoreMismatchError,
    StoreNotFoundError,
)
from equigram.plan import Part, SplitName
from equigram.store import GramStore
from equikernel.errors import EquikernelError

PAGE = Path(__file__).parent / "page"

STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (AuthenticationError, 403),
    (JobNotFoundError, 404),
    (StoreNotFoundError, 404),
    (LimitError, 413),
    (ConflictError, 409),
    (StoreMismatchError, 409),
    (IncompleteRunError, 409),
    (SpecError, 422),
    (DataError, 422),
    (EquikernelError, 422),
    (ClusterError, 503),
    (StoreError, 503),
    (EquigramError, 500),
)
"""Statuses of errors; the first that fits."""

STATES = rf"^({'|'.join(get_args(State))})(,({'|'.join(get_args(State))}))*$"

EXPANDED = 8
"""An archive may be so many times as large when it is unpacked as an upload may be."""

ENTRY_BYTES = 400
"""Of the directory of an archive for each file, at most, on the average."""

_LOG = logging.getLogger("equigram.service")

Name = Annotated[str, InPath(description="Name of the job.", examples=["histology"], max_length=200)]
Group = Annotated[str, InPath(description="Group of the network.", examples=["C4"], max_length=20)]
Kernel = Annotated[Literal["nngp", "ntk"], InPath(description="Kernel.")]
Which = Annotated[Literal["gram", "cross"], InPath(description="``gram``: train x train. ``cross``: test x train.")]
Window = Annotated[str | None, Query(description="``first:end``; all without it.", examples=["0:100"], max_length=40)]


def make_app(
    records: Records,
    drivers: Callable[[], Drivers],
    tokens: Tokens,
    readable: Readable,
    limits: Limits,
    hosts: list[str] | None,
) -> FastAPI:
    """The application.

    Args:
      records: of its jobs.
      drivers: where their drivers run.
      tokens: who may do what; empty for everybody on this machine.
      readable: what jobs may read.
      limits: what is allowed.
      hosts: names by which it may be called; ``None`` for any.
    """
    metrics = ServiceMetrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.channels = Channels(asyncio.get_running_loop())
        app.state.jobs = Jobs(records, drivers, limits, readable, app.state.channels)
        app.state.jobs.start()
        try:
            yield
        finally:
            await run_in_threadpool(app.state.jobs.stop)

    app = FastAPI(
        title="equigram",
        version=__version__,
        description="Gram matrices of infinitely wide equivariant networks: jobs, their progress and their results.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}},
    )
    app.add_middleware(
        Guard,
        tokens=tokens,
        hosts=hosts,
        body_bytes=limits.body_bytes,
        upload_bytes=limits.upload_bytes,
        metrics=metrics,
    )
    _handle_errors(app)
    _add_jobs(app)
    _add_results(app)
    _add_uploads(app, records, limits)
    _add_service(app, metrics, records, readable, limits)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app


class Octets(Response):
    """Bytes."""

    media_type = "application/octet-stream"


class Picture(Response):
    """A PNG file."""

    media_type = "image/png"


def _jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs


def _channels(request: Request) -> Channels:
    channels: Channels = request.app.state.channels
    return channels


def _user(request: Request) -> User:
    user: User | None = request.scope.get("user")
    return user or LOCAL


def _store(name: Name, request: Request) -> GramStore:
    """The run store of a job that has one."""
    jobs = _jobs(request)
    store = jobs.registry.store(jobs.job(name))
    if store is None:
        raise JobNotFoundError(f"{name} has no run store yet: its images are not loaded")
    return store


InJobs = Annotated[Jobs, Depends(_jobs)]
InChannels = Annotated[Channels, Depends(_channels)]
Caller = Annotated[User, Depends(_user)]
Store = Annotated[GramStore, Depends(_store)]


def _handle_errors(app: FastAPI) -> None:
    """Have every error answered with an :class:`ErrorAnswer`."""

    def answer(error: BaseException, status: int) -> Response:
        return Response(body_of(error), status, media_type="application/json")

    async def ours(request: Request, error: Exception) -> Response:
        status = next(status for kind, status in STATUSES if isinstance(error, kind))
        if isinstance(error, LimitError) and request.method == "POST" and request.url.path != "/uploads":
            status = 429
        return answer(error, status)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:10]]
        return answer(SpecError("; ".join(lines)), 422)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = {404: JobNotFoundError, 405: ConflictError}.get(error.status_code, SpecError)
        return answer(kind(f"{request.method} {request.url.path}: {error.detail}"), error.status_code)

    async def unexpected(request: Request, error: Exception) -> Response:
        _LOG.error("an error that nobody expected", exc_info=error)
        return answer(EquigramError("an error that nobody expected; the log of the service has it"), 500)

    app.add_exception_handler(EquigramError, ours)
    app.add_exception_handler(EquikernelError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def _add_jobs(app: FastAPI) -> None:
    """What is about jobs as such."""

    @app.post("/jobs", status_code=201, responses={200: {"model": JobDetail, "description": "That very job exists."}})
    def submit(
        body: Submission,
        jobs: InJobs,
        user: Caller,
        response: Response,
        idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
    ) -> JobDetail:
        """Submit a job; the same one again goes on where it stopped."""
        job, created = jobs.submit(body.spec, body.priority, user.name, idempotency_key)
        response.status_code = 201 if created else 200
        response.headers["location"] = f"/jobs/{job.id}"
        return detail(job, jobs)

    @app.get("/jobs")
    def list_jobs(
        jobs: InJobs,
        response: Response,
        state: Annotated[
            str | None, Query(description="States, with commas.", examples=["running,queued"], pattern=STATES)
        ] = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
    ) -> list[JobSummary]:
        """All jobs, the newest first; the header ``X-Total-Count`` has their number."""
        states = None if state is None else set(state.split(","))
        chosen = [job for job in jobs.all() if states is None or job.state in states]
        response.headers["x-total-count"] = str(len(chosen))
        return [summary(job) for job in chosen[offset : offset + limit]]

    @app.get("/jobs/{name}")
    def get_job(name: Name, jobs: InJobs) -> JobDetail:
        """A job."""
        return detail(jobs.job(name), jobs)

    @app.post("/jobs/{name}/cancel")
    def cancel(name: Name, jobs: InJobs) -> JobDetail:
        """End a job; what it has finished is kept."""
        return detail(jobs.cancel(name), jobs)

    @app.post("/jobs/{name}/resume")
    def resume(name: Name, jobs: InJobs, user: Caller) -> JobDetail:
        """Have a job go on where it stopped."""
        return detail(jobs.resume(name, user.name), jobs)

    @app.delete("/jobs/{name}", status_code=204)
    def delete(name: Name, jobs: InJobs) -> None:
        """Delete a job with its run store."""
        jobs.delete(name)

    @app.get("/jobs/{name}/log", response_class=PlainTextResponse)
    def log(name: Name, jobs: InJobs, lines: Annotated[int, Query(ge=1, le=100_000)] = 1000) -> str:
        """The last lines that the driver of a job has printed."""
        return jobs.log(jobs.job(name), lines)

    @app.get("/jobs/{name}/events", response_class=StreamingResponse)
    async def events(
        name: Name,
        jobs: InJobs,
        channels: InChannels,
        after: Annotated[str | None, Query(pattern=r"^\d{1,9}\.\d{1,12}$", examples=["1.17"])] = None,
        last_event_id: Annotated[str | None, Header(pattern=r"^\d{1,9}\.\d{1,12}$")] = None,
        follow: bool = True,
    ) -> StreamingResponse:
        """Server-sent events: what happened in the present attempt, as far as it is kept, and what happens.

        Each has an id ``attempt.number``; ``state`` tells of another state of the job, and has none.
        """
        job = await run_in_threadpool(jobs.job, name)
        if channels.is_empty(job.id):
            await run_in_threadpool(jobs.registry.read, job, again=True)
        last = after or last_event_id
        attempt, _, number = last.partition(".") if last else ("", "", "")
        place = (int(attempt), int(number)) if last else None
        await asyncio.sleep(0)  # what was read just now is on its way
        stream = channels.watch(job.id, job.state, place, follow=follow)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"x-accel-buffering": "no"})


def _add_results(app: FastAPI) -> None:
    """What is in the run store of a job."""

    @app.get("/jobs/{name}/tiles", response_class=Octets)
    def get_tiles(name: Name, jobs: InJobs, part: Literal["gram", "cross"] = "gram") -> Response:
        """The state of each tile, a byte: 0 missing, 1 being computed, 2 stored, 3 failed and tried again.

        Row by row; the headers ``X-Rows`` and ``X-Cols`` have their numbers.
        """
        job = jobs.job(name)
        with job.lock:
            tiles = jobs.registry.tiles(job)
            if tiles is None or (part == "cross" and not tiles.tiling.test):
                raise JobNotFoundError(f"{name} has no tiles of {part}: it has no such images, or they are not loaded")
            states = tiles.states(part)
        headers = {"x-rows": str(states.shape[0]), "x-cols": str(states.shape[1])}
        return Octets(states.tobytes(), headers=headers)

    @app.get("/jobs/{name}/result")
    def get_result(name: Name, store: Store) -> ResultAnswer:
        """Scores of all regressions, and confusion matrices."""
        return result(name, store)

    @app.get("/jobs/{name}/predictions")
    def get_predictions(
        store: Store,
        group: Annotated[str | None, Query(max_length=20)] = None,
        kernel: Literal["nngp", "ntk"] | None = None,
        sort: Literal["index", "confused"] = "index",
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    ) -> PredictionsAnswer:
        """Predictions for the test images; of the last matrix that was solved unless one is named."""
        return predictions(store, group, kernel, confused=sort == "confused", offset=offset, limit=limit)

    @app.get("/jobs/{name}/images/{split}/{index}.png", response_class=Picture)
    def image(store: Store, split: SplitName, index: Annotated[int, InPath(ge=0, le=10**9)]) -> Response:
        """An image as it was before it was normalised."""
        count = store.info.test if split == "test" else store.info.train
        if index >= count:
            raise JobNotFoundError(f"there is no {split} image {index}; there are {count}")
        return Picture(image_picture(store, split, index))

    @app.get("/jobs/{name}/{part}/{group}/{kernel}", response_class=Octets)
    def matrix(
        store: Store, jobs: InJobs, part: Which, group: Group, kernel: Kernel, rows: Window = None, cols: Window = None
    ) -> Response:
        """A slice of a matrix, as an .npy file."""
        along, across = _window(store, part, group, kernel, rows, cols)
        content = matrix_slice(store, part, group, kernel, along, across, jobs.limits.gram_bytes)
        return Octets(content)

    @app.get("/jobs/{name}/{part}/{group}/{kernel}/picture.png", response_class=Picture)
    def picture(
        store: Store,
        part: Which,
        group: Group,
        kernel: Kernel,
        rows: Window = None,
        cols: Window = None,
        pixels: Annotated[int, Query(ge=1, le=2048)] = 512,
    ) -> Response:
        """A window of a matrix in colours, clear where tiles are missing; ``X-Minimum`` and ``X-Maximum`` end them."""
        along, across = _window(store, part, group, kernel, rows, cols)
        content, low, high = gram_picture(store, part, group, kernel, along, across, pixels)
        headers = {"x-minimum": repr(low), "x-maximum": repr(high)}
        return Picture(content, headers=headers)

    @app.get("/jobs/{name}/figures/{figure}", response_class=Response)
    def figure(
        name: Name,
        jobs: InJobs,
        figure: Annotated[str, InPath(pattern=r"^[\w-]{1,100}\.(png|svg|csv)$", examples=["spectrum.png"])],
    ) -> Response:
        """A figure that was drawn when the job was done, or the table beside it."""
        record = jobs.job(name).record
        content = None if record is None else jobs.records.figures(record).read(figure)
        if content is None:
            raise JobNotFoundError(f"{name} has no figure {figure}; they are drawn when a job is done")
        kinds = {"png": "image/png", "svg": "image/svg+xml", "csv": "text/csv"}
        return Response(content, media_type=kinds[figure.rsplit(".", 1)[1]])


def _window(
    store: GramStore, part: Part, group: str, kernel: str, rows: str | None, cols: str | None
) -> tuple[range, range]:
    """The rows and columns that are asked for, of a matrix that there is."""
    if (group, kernel) not in store.matrices or part not in store.parts:
        names = ", ".join(f"{g} {k}" for g, k in store.matrices)
        raise JobNotFoundError(
            f"there is no matrix {part} {group} {kernel}; there are {' and '.join(store.parts)} of {names}"
        )
    shape = store.info.tiling.shape(part)
    return window(rows, shape[0], "rows"), window(cols, shape[1], "cols")


def _add_uploads(app: FastAPI, records: Records, limits: Limits) -> None:
    """Files for jobs to read."""

    @app.post(
        "/uploads",
        status_code=201,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    async def upload(
        request: Request, x_filename: Annotated[str, Header(pattern=r"\.(npz|npy|zip)$", max_length=300)]
    ) -> UploadAnswer:
        """Keep a file: an .npz or .npy, or a .zip of class folders. The same content again is kept once."""
        suffix = re.sub(r".*\.", "", x_filename)
        uploads = records.uploads()
        file, digest, size = await run_in_threadpool(uploads.scratch), hashlib.sha256(), 0
        try:
            with file.open("wb") as out:
                async for chunk in request.stream():
                    digest.update(chunk)
                    size += len(chunk)
                    await run_in_threadpool(out.write, chunk)
            await run_in_threadpool(_check_upload, file, suffix, limits)
            name = f"{digest.hexdigest()}.{suffix}"
            await run_in_threadpool(uploads.put, name, file)
        finally:
            file.unlink(missing_ok=True)
        return UploadAnswer(url=f"upload:{name}", bytes=size, sha256=digest.hexdigest())


def _check_upload(file: Path, suffix: str, limits: Limits) -> None:
    """Raise unless a file is what its name says, and no larger when it is unpacked than it may be."""
    try:
        if suffix == "npy":
            np.lib.format.open_memmap(file, mode="r")  # np.load would take a .zip as well, and leave a broken one open
            return
        count, directory = _contents(file)
        if count > limits.upload_files or directory > ENTRY_BYTES * limits.upload_files:
            raise LimitError(f"the upload holds {count:,} files, and {limits.upload_files:,} are allowed")
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except LimitError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"the upload is no .{suffix} file that can be read: {reason}") from None
    size, most = sum(member.file_size for member in members), EXPANDED * limits.upload_bytes
    if len(members) > limits.upload_files or size > most:
        raise LimitError(
            f"the upload holds {len(members):,} files of {size:,} bytes, and {limits.upload_files:,} files of {most:,} "
            "bytes are allowed"
        )
    if suffix == "npz":
        _check_arrays(file, members)
    if any(member.flag_bits & 1 for member in members):
        raise DataError("the upload is encrypted; pack it without a password")


def _check_arrays(file: Path, members: list[zipfile.ZipInfo]) -> None:
    """Raise :class:`DataError` unless an archive holds arrays only, and none of Python objects."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with zipfile.ZipFile(file) as archive:
        for member in members:
            try:
                with archive.open(member) as array:
                    *_, dtype = readers[np.lib.format.read_magic(array)](array)
            except Exception:
                raise DataError(
                    f"the upload is no .npz file: {member.filename!r} in it is no array; name an archive of images .zip"
                ) from None
            if dtype.hasobject:
                raise DataError(f"the upload holds Python objects, in {member.filename!r}, which nobody unpickles")


def _contents(file: Path) -> tuple[int, int]:
    """How many files an archive holds, and the bytes of its directory, as its last bytes say."""
    with file.open("rb") as archive:
        archive.seek(max(0, file.stat().st_size - 66_000))
        tail = archive.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0:
        raise ValueError("it has no directory")
    count, directory = struct.unpack_from("<HI", tail, end + 10)
    large = tail.rfind(b"PK\x06\x06", 0, end)
    if large >= 0 and (count == 0xFFFF or directory == 0xFFFFFFFF):
        count, directory = struct.unpack_from("<QQ", tail, large + 32)
    return count, directory


def _add_service(app: FastAPI, metrics: ServiceMetrics, records: Records, readable: Readable, limits: Limits) -> None:
    """What is about the service itself."""

    @app.get("/service")
    def service(jobs: InJobs, user: Caller) -> ServiceView:
        """The service, and what the caller may do."""
        return ServiceView(
            version=__version__,
            root=records.root,
            scope=user.scope,
            name=user.name,
            concurrency=limits.concurrency,
            upload_bytes=limits.upload_bytes,
            readable=list(readable.places),
            nodes=jobs.nodes,
            trouble=jobs.trouble,
        )

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", include_in_schema=False)
    async def readyz(jobs: InJobs) -> JSONResponse:
        if jobs.trouble is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "not ready; GET /service says why"}, 503)  # to everybody, so without the reason

    @app.get("/metrics", response_class=PlainTextResponse, include_in_schema=False)
    def counts(jobs: InJobs, channels: InChannels) -> Response:
        states: list[State] = [job.state for job in jobs.all()]
        return Response(metrics.text(states, lambda: channels.watchers), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")
