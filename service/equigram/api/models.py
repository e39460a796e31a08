"""What the service says: the bodies of its answers, for the service and its clients.

Times are ISO 8601 in UTC. Everything is derived from the run stores, the jobs' records and Ray, never kept elsewhere.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

State: TypeAlias = Literal["queued", "starting", "running", "cancelling", "done", "failed", "cancelled", "incomplete"]
"""``queued``: waits for its turn. ``starting``: handed to Ray. ``running``: its driver is at work. ``cancelling``: its
driver is told to end. ``done``: everything it asks for is in the store. ``failed``: its driver ended with an error.
``cancelled``: somebody wanted that.
``incomplete``: tiles or solutions are missing and nobody computes them: a run that was not submitted here."""

DRIVEN: frozenset[State] = frozenset({"starting", "running", "cancelling"})
"""States in which a job has a driver."""

ENDED: frozenset[State] = frozenset({"done", "failed", "cancelled", "incomplete"})
"""States in which nothing happens until somebody asks for it."""


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class ErrorDetail(_Answer):
    """An error as one sentence."""

    type: str
    """The class of the error in :mod:`equigram.errors`."""
    message: str
    """What is wrong, both values, where, and the remedy."""


class ErrorAnswer(_Answer):
    """The body of every answer with a status of 400 or more."""

    error: ErrorDetail


class Submission(_Answer):
    """The body of ``POST /jobs``."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [
                {
                    "spec": {
                        "store": "histology",
                        "data": {
                            "train": "s3://images/NCT-CRC-HE-100K",
                            "test": "s3://images/CRC-VAL-HE-7K",
                            "size": 32,
                        },
                        "gram": {"groups": ["C1", "C4"], "kernels": ["nngp", "ntk"]},
                    },
                    "priority": 0,
                }
            ]
        },
    )

    spec: dict[str, Any]
    """A job, as in a job file. ``store`` names the job: a relative path, below the root of the service; without it the
    service makes a name. No ``storage_options`` and no ``resources.address``: these are the service's."""
    priority: int = Field(default=0, ge=-100, le=100, strict=True)
    """Higher ones start first, and get more of the workers."""


class Progress(_Answer):
    """How far the present stage of a job is."""

    stage: str
    """``"loading images"``, ``"computing tiles"``, ``"solving C4 ntk"``, …"""
    done: int
    """Things of the stage that are done: images, tiles, steps."""
    total: int
    """Things of the stage; 0 where that is not known."""
    detail: str = ""
    """What the number does not say."""


class TileCounts(_Answer):
    """Tiles and pairs of all passes of a run together."""

    tiles: int
    """Tiles that there will be."""
    finished: int
    """Tiles that are stored."""
    pairs: int
    """Image pairs that there will be."""
    finished_pairs: int
    """Image pairs that are stored."""


class JobSummary(_Answer):
    """A job in the list."""

    id: str
    """Its name, and that of its store below the root."""
    state: State
    """See :data:`State`."""
    owner: str | None
    """The name of the token it was submitted with; ``None`` for runs that were not submitted here."""
    priority: int
    """As submitted."""
    submitted: str | None
    """When."""
    started: str | None
    """When its present or last driver began."""
    ended: str | None
    """When that ended."""
    groups: list[str]
    """Groups of its networks."""
    kernels: list[str]
    """Kernels that it stores."""
    train: int | None
    """Training images; ``None`` before they were counted."""
    test: int | None
    """Test images."""
    counts: TileCounts | None
    """``None`` before there is a store."""
    progress: Progress | None
    """Of a running job."""
    error: ErrorDetail | None
    """Why it failed."""
    headline: str | None
    """The best accuracy or error of its results, in words."""


class Worker(_Answer):
    """A worker of a running job."""

    number: int
    """In the order in which they were asked for."""
    place: str
    """Node and process."""
    processor: str
    """Kind of processor or GPU."""
    tiles: int
    """Tiles that it has finished."""
    pairs: int
    """Image pairs that it has finished."""
    lost: str | None
    """Why it is gone, if it is."""


class Solved(_Answer):
    """A matrix that was solved."""

    group: str
    kernel: str


class JobDetail(JobSummary):
    """A job with everything that fits on a page."""

    spec: dict[str, Any]
    """Without secrets, which it never had."""
    attempt: int
    """Drivers that were started for it."""
    store: str
    """URL of its run store."""
    share: float | None
    """Part of the cluster's workers that a running job may have."""
    tile: int | None
    """Edge of a tile in images."""
    blocks: tuple[int, int] | None
    """Blocks of training images, and of test images."""
    passes: int | None
    """Each tile is computed once in each pass."""
    image_shape: tuple[int, int, int] | None
    """Height, width, channels."""
    classes: list[str] | None
    """Names; ``None`` for regression or where there are no labels."""
    pairs_per_second: float | None
    """Of the last minute."""
    seconds_left: float | None
    """For the tiles, at that rate."""
    workers: list[Worker]
    """Of the present driver."""
    notes: list[str]
    """What a person should know."""
    solved: list[Solved]
    """The matrices with a solution."""
    figures: list[str]
    """Names under ``/jobs/{id}/figures/``, without the ``.png`` or ``.svg``."""


class Scores(_Answer):
    """One regression: a matrix, a ridge value, a number of training images."""

    group: str
    kernel: str
    ridge: float
    """In units of the mean diagonal of the train matrix."""
    train_size: int | None
    """Training images per class (of all in regression); ``None`` for all of them."""
    chosen: bool
    """Whether the job predicts with it."""
    accuracy: float | None
    """On the test images, 0 to 1."""
    mse: float | None
    """Mean squared error on the test images."""
    warning: str | None
    """What a person should know of it."""


class ResultAnswer(_Answer):
    """The body of ``GET /jobs/{id}/result``."""

    id: str
    classes: list[str] | None
    scores: list[Scores]
    confusion: dict[str, list[list[int]]]
    """By ``"C4 ntk"``: rows are true classes, columns predicted ones; of the chosen ridge."""


class Prediction(_Answer):
    """The prediction for a test image."""

    index: int
    """Its place among the test images."""
    name: str
    """Where it came from."""
    true: str | None
    """Its class, if that is known."""
    predicted: str | None
    """The class with the highest value; ``None`` in regression."""
    values: list[float]
    """A value per class or target."""
    margin: float | None
    """Value of the true class less the highest other one: negative where it is wrong."""


class PredictionsAnswer(_Answer):
    """The body of ``GET /jobs/{id}/predictions``."""

    group: str
    kernel: str
    ridge: float
    classes: list[str] | None
    total: int
    predictions: list[Prediction]


class UploadAnswer(_Answer):
    """The body of the answer to ``POST /uploads``."""

    url: str
    """What to write in ``data.train``, ``data.test``, …: ``upload:<sha256>.npz``."""
    bytes: int
    sha256: str


class NodeView(_Answer):
    """A machine of the Ray cluster."""

    name: str
    alive: bool
    cpus: float
    gpus: float
    memory: int
    """Bytes that Ray may give to workers."""


class ServiceView(_Answer):
    """The body of ``GET /service``."""

    version: str
    root: str
    scope: Literal["read", "write"]
    """What the token of this request may do."""
    name: str
    """The name of that token."""
    concurrency: int
    """Jobs that run at the same time at most."""
    upload_bytes: int
    """The largest upload."""
    readable: list[str]
    """URLs below which jobs may read."""
    nodes: list[NodeView]
    """Machines, as they were when Ray answered last."""
    trouble: str | None
    """Why no job can be started now; ``None`` where all is well."""
