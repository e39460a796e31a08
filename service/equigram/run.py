"""A run from a job to predictions: data, plan, tiles, solution. Every stage starts from what the store holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from equigram.data import Survey, fingerprint, load_dataset, load_images, survey
from equigram.driver import check_address, ray_session, run_tiles, worker_count
from equigram.errors import DamagedTileError, DataNotFoundError, ResourceError, SpecError, StoreMismatchError
from equigram.memory import available_memory, format_bytes
from equigram.plan import Plan, Tiling, choose_edge, store_bytes, worker_bytes
from equigram.solve.regression import memory_needed
from equigram.solve.stage import Result, check_solvable, solve_run
from equigram.store import GramStore, free_space
from equikernel.groups import common_turns, needs_square_images
from equikernel.kernel import KernelFunction, available_cores
from equikernel.worker import CACHED_BLOCKS, measure_pair_seconds, processor_kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equigram.plan import Tile
    from equigram.spec import JobSpec

WORKER_BYTES = 350 * 2**20
"""Memory of a worker process before it holds images: Python, NumPy, Numba and Ray."""

PREDICT_BLOCK = 64
"""New images that are predicted at once."""


class Listener(Protocol):
    """Who is told what a run does."""

    def note(self, text: str) -> None:
        """One sentence that a person should know."""

    def progress(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` things of the kind ``what`` are done."""


class Silence:
    """A listener that says nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Finished:
    """A finished run: its store and, if it solves, the results."""

    store: GramStore
    results: tuple[Result, ...]


def run(spec: JobSpec, listener: Listener | None = None) -> Finished:
    """Do everything that the job asks for and the store does not hold yet.

    Killed at any moment, the same call goes on from what is stored, and ends with the same bits on the same kind of
    processor.

    Raises:
      SpecError, DataError: the job or its images are not usable.
      ResourceError: it needs more memory or disk than there is; nothing was started.
      StoreMismatchError: the store belongs to another job.
      StoreError, ClusterError, TileFailedError, SolverError: the run failed; what was finished is kept.
    """
    listener = listener or Silence()
    check_address(spec.workers)
    store = open_store(spec, listener) if GramStore.exists(spec.store) else create_store(spec, listener)
    info = store.info
    if spec.solve is not None:
        check_solvable(spec.solve, store.labels("train"), info.classes)
    check_memory(spec, info.train)
    results: list[Result] = []
    repaired: set[Tile] = set()
    while True:
        compute_tiles(store, spec, listener)
        if spec.solve is None:
            break
        try:
            results = solve_run(
                store, spec.solve, spec.solved_kernels, lambda done, total: listener.progress("solve", done, total)
            )
            break
        except DamagedTileError as error:
            if error.tile in repaired:
                raise
            repaired.add(error.tile)
            listener.note(f"{error}: it is computed again now")
            store.discard_tile(error.tile)
    return Finished(store, tuple(results))


def open_store(spec: JobSpec, listener: Listener) -> GramStore:
    """The store of a job that was started before.

    Raises:
      StoreMismatchError: it belongs to another job, or the images have changed since.
    """
    store = GramStore.open(spec.store)
    store.check_belongs_to(spec)
    info = store.info
    try:
        current = fingerprint(spec.data)
    except DataNotFoundError:
        listener.note(f"the image source {spec.data.train} is not there any more; the images in the store are used")
    else:
        if current != info.fingerprint:
            raise StoreMismatchError(
                f"the image files of this job have changed since {spec.store} was made on {info.created} (other "
                "names, sizes or number of files); restore them, or give the job another `store`"
            )
    if info.processor != processor_kind():
        listener.note(
            f"the store was begun on {info.processor} processors and goes on with {processor_kind()}: "
            "float32 values agree to 5e-6, not to the bit"
        )
    return store


def create_store(spec: JobSpec, listener: Listener) -> GramStore:
    """A new store with the images of a job, after everything that can be refused was."""
    GramStore(spec.store).check_creatable()
    found = look_at_images(spec)
    plan = make_plan(spec, found, None, listener)
    check_disk(spec, plan)
    dataset = load_dataset(
        spec.data, square=needs_square(spec), progress=lambda what, done, total: listener.progress(what, done, total)
    )
    for note in dataset.notes:
        listener.note(note)
    if spec.solve is not None:
        check_solvable(spec.solve, dataset.train.labels, dataset.classes)
    return GramStore.create(spec, dataset, plan.tiling.edge, fingerprint(spec.data), processor_kind())


def look_at_images(spec: JobSpec) -> Survey:
    """The number and shape of the images, without decoding them.

    Raises:
      DataError: the images cannot be used.
      NetworkError, ImageError: the network does not fit them.
      ResourceError: the solver could not hold the matrix.
    """
    found = survey(spec.data, square=needs_square(spec))
    for group in spec.gram.groups:
        spec.network.check_images(found.height, found.width, group)
    check_memory(spec, found.train)
    return found


def stored_survey(store: GramStore) -> Survey:
    """The number and shape of the images in a store."""
    info = store.info
    return Survey(info.train, info.test, *info.image_shape)


def needs_square(spec: JobSpec) -> bool:
    """Whether a group of the job turns images by quarter turns."""
    return any(needs_square_images(group) for group in spec.gram.groups)


def check_memory(spec: JobSpec, train: int) -> None:
    """Raise :class:`ResourceError` unless the solver stage can hold the matrix of ``train`` images."""
    if spec.solve is None:
        return
    needed, available = memory_needed(train), available_memory()
    if needed > available:
        raise ResourceError(
            f"solving with {train} training images needs {format_bytes(needed)} of memory, and "
            f"{format_bytes(available)} are available; take fewer images (data.per_class), a larger machine, or set "
            "`solve: null` to compute the Gram matrices only"
        )


def check_disk(spec: JobSpec, plan: Plan) -> None:
    """Raise :class:`ResourceError` unless the finished run fits where the store is, if that can be known."""
    free = free_space(spec.store)
    if free is not None and plan.store_bytes > free:
        raise ResourceError(
            f"the finished run takes {format_bytes(plan.store_bytes)}, and {format_bytes(free)} are free at "
            f"{spec.store}; free space, choose another `store`, or store fewer kernels or groups"
        )


def make_plan(spec: JobSpec, found: Survey, store: GramStore | None, listener: Listener) -> Plan:
    """What the run costs, with the cost of a pair measured on this machine.

    Args:
      spec: the job.
      found: number and shape of the images.
      store: the store, if there is one already: then its tiles are kept and only the missing ones counted.
      listener: told that a measurement is going on.
    """
    gram = spec.gram
    shape = (found.height, found.width, found.channels)
    listener.note(
        "measuring the cost of a pair on this machine (the first time on a machine, the kernels are compiled)"
    )
    images = np.random.default_rng(0).normal(size=(2, *shape)).astype(gram.dtype)
    pair = measure_pair_seconds(spec.network, gram.groups, gram.engine, gram.dtype, spec.workers.cpus, images)
    asked = spec.workers.count
    workers = max(1, available_cores() // spec.workers.cpus) if asked == "auto" else asked
    if store is not None:
        edge = store.info.tile
    elif gram.tile == "auto":
        edge = choose_edge(found.train, found.test, pair, workers)
    else:
        edge = gram.tile
    tiling = Tiling(found.train, found.test, edge)
    missing = list(tiling.missing(set() if store is None else store.finished_tiles()))
    matrices = len(gram.groups) * len(gram.kernels)
    itemsize = np.dtype(gram.dtype).itemsize
    planes = found.channels + 2 * spec.network.depth
    block = edge * planes * found.height * found.width * itemsize * len(common_turns(gram.groups))
    return Plan(
        tiling=tiling,
        missing=len(missing),
        missing_pairs=sum(map(tiling.pairs, missing)),
        matrices=matrices,
        dtype=gram.dtype,
        workers=workers,
        seconds_per_pair=pair,
        store_bytes=store_bytes(tiling, matrices, itemsize, int(np.prod(shape))),
        worker_bytes=WORKER_BYTES + worker_bytes(tiling, matrices, itemsize, block, CACHED_BLOCKS),
        solver_bytes=0 if spec.solve is None else memory_needed(found.train),
    )


def compute_tiles(store: GramStore, spec: JobSpec, listener: Listener) -> None:
    """Compute the tiles that are missing, on Ray."""
    tiling = store.info.tiling
    finished = store.finished_tiles()
    missing = list(tiling.missing(finished))
    if not missing:
        return
    done, total = sum(map(tiling.pairs, finished)), tiling.total_pairs
    if finished:
        listener.note(f"{len(finished)} of {len(tiling)} tiles are in the store already")
    listener.progress("pairs", done, total)
    with ray_session(spec.workers):
        for report in run_tiles(store, spec, missing, worker_count(spec.workers)):
            done += report.pairs
            listener.progress("pairs", done, total)


@dataclass(frozen=True)
class Predictions:
    """Predictions for new images.

    Attributes:
      names: where each image came from.
      values: ``(m, k)`` float64: a column per class or target.
      classes: class names of the columns; ``None`` for regression.
      group, kernel, ridge: what they were computed with.
    """

    names: tuple[str, ...]
    values: NDArray[np.float64]
    classes: tuple[str, ...] | None
    group: str
    kernel: str
    ridge: float


def predict(
    store: GramStore,
    images: str,
    group: str | None = None,
    kernel: str | None = None,
    ridge: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Predictions:
    """Predict new images with a finished run, in this process, on all cores.

    Args:
      store: the run.
      images: a folder, an image file, an .npz, .npy or zarr; any fsspec URL. Treated as the training images were.
      group, kernel: which Gram matrix; by default the last group of the job and the last solved kernel.
      ridge: one of the job's ridge values; by default the first.
      progress: called with the images done and their number.

    Raises:
      IncompleteRunError: the run has no solution for that group and kernel.
      SpecError: it was not solved with that ridge value.
      DataError: the images are not usable, or unlike the training images.
    """
    info = store.info
    spec = info.spec
    group = group or spec.gram.groups[-1]
    kernel = kernel or (spec.solved_kernels or spec.gram.kernels)[-1]
    arrays, _ = store.solution(group, kernel)
    ridges = arrays["ridge"].tolist()
    chosen = 0 if ridge is None else next((i for i, value in enumerate(ridges) if np.isclose(value, ridge)), None)
    if chosen is None:
        choices = ", ".join(f"{value:g}" for value in ridges)
        raise SpecError(f"the run has no solution for ridge {ridge:g}; choose one of {choices}")
    new = load_images(images, info.preprocessing)
    function = KernelFunction(spec.network, (group,), spec.gram.engine, spec.gram.dtype)
    train = function.prepare(store.images("train"), "the training images")
    values = np.empty((len(new.images), arrays["offset"].size))
    for start in range(0, len(new.images), PREDICT_BLOCK):
        block = function.prepare(new.images[start : start + PREDICT_BLOCK], images)
        cross = getattr(function(block, train)[group], kernel).astype(np.float64)
        values[start : start + PREDICT_BLOCK] = cross @ arrays["coefficients"][chosen] + arrays["offset"]
        progress(min(start + PREDICT_BLOCK, len(values)), len(values))
    return Predictions(new.names, values, info.classes, group, kernel, ridges[chosen])
