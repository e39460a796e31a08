"""A run from a job to predictions: data, plan, tiles, solution. Every stage starts from what the store holds."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from equigram.data import Survey, fingerprint, load_dataset, load_images, load_more, survey
from equigram.data.sources import some
from equigram.dispatch import Dispatcher
from equigram.driver import OnRay, check_address, check_room, ray_session
from equigram.errors import DamagedTileError, DataError, DataNotFoundError, ResourceError, SpecError, StoreMismatchError
from equigram.events import (
    ComputationEnded,
    ComputationStarted,
    Event,
    Listener,
    Note,
    Progress,
    WorkerStarted,
    nobody,
    tell,
)
from equigram.listeners import FLUSH_SECONDS, History
from equigram.local import InProcess
from equigram.plan import Plan, SplitName, Tile, Tiling, choose_edge, image_bytes, matrix_bytes, worker_bytes
from equigram.solve.regression import memory_needed
from equigram.solve.stage import Result, check_solvable, solve_run
from equigram.storage import configure
from equigram.store import GramStore, free_space
from equikernel.errors import EquikernelError, NetworkError
from equikernel.groups import keeps_rectangles, union
from equikernel.kernel import KernelFunction, available_cores
from equikernel.memory import available_memory, format_bytes
from equikernel.worker import CACHED_BLOCKS, TileWorker, measure_pair_seconds, processor_kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equigram.dispatch import Executor
    from equigram.spec import JobSpec, ResourceSpec
    from equikernel.network import Architecture

WORKER_BYTES = 350 * 2**20
"""Memory of a worker process before it holds images: Python, NumPy, Numba and Ray."""

CLUSTER_SECONDS = 5.0
"""A local cluster takes about so long to start: what its workers compute in less is computed in this process."""

MEASURED_SIDE = {"reference": 8, "general": 16}
"""Pixels per side of the images that the cost of a pair is measured with at most, by engine; 48 for the others."""

PREDICT_BLOCK = 64
"""New images that are computed at once against a block of training images."""


@dataclass(frozen=True)
class Finished:
    """A finished run: its store and, if it solves, the results."""

    store: GramStore
    results: tuple[Result, ...]


def run(spec: JobSpec, listener: Listener = nobody) -> Finished:
    """Do everything that the job asks for and the store does not hold yet.

    Killed at any moment, the same call goes on from what is stored, and ends with the same bits on the same kind of
    processor.

    Raises:
      SpecError, DataError: the job or its images are not usable.
      ResourceError: it needs more memory or disk than there is; nothing was started.
      StoreMismatchError: the store belongs to another job.
      StoreError, ClusterError, TileFailedError, SolverError: the run failed; what was finished is kept.
    """
    configure(spec.storage_options)
    check_address(spec.resources)
    pair_seconds = None
    if GramStore.exists(spec.store):
        store = open_store(spec, listener)
        check_solver(spec, stored_survey(store))
        store.remember(spec)
    else:
        store, pair_seconds = create_store(spec, listener)
    compute_tiles(store, spec, listener, pair_seconds)
    try:
        results = solve(store, spec, listener)
    except DamagedTileError:
        damaged = store.damaged_tiles()
        listener(Note(f"damaged in the store and computed again: tiles {some(sorted(map(str, damaged)))}"))
        repair(store, spec, damaged, listener)
        results = solve(store, spec, listener)
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
        listener(Note(f"the image source {spec.data.train} is not there any more; the images in the store are used"))
    else:
        if current != info.fingerprint:
            raise StoreMismatchError(
                f"the image files of this job have changed since {spec.store} was made on {info.created} (other "
                "names, sizes, content or number of files); restore them, or give the job another `store`"
            )
    if info.processor != processor_kind(spec.engine):
        listener(
            Note(
                f"the store was begun on {info.processor} processors and goes on with {processor_kind(spec.engine)}: "
                "float32 values agree to 5e-6, not to the bit"
            )
        )
    return store


def create_store(spec: JobSpec, listener: Listener) -> tuple[GramStore, float]:
    """A new store with the images of a job, after everything that can be refused was; and the cost of a pair."""
    found = look_at_images(spec)
    GramStore(spec.store).check_writable()
    plan = make_plan(spec, found, None, listener)
    check_disk(spec, plan)
    dataset = load_dataset(
        spec.data, square=needs_square(spec), progress=lambda what, done, total: listener(Progress(what, done, total))
    )
    for note in dataset.notes:
        listener(Note(note))
    store = GramStore.create(spec, dataset, plan.tiling.edge, fingerprint(spec.data), processor_kind(spec.engine))
    return store, plan.seconds_per_pair


def look_at_images(spec: JobSpec) -> Survey:
    """The number, shape and labels of the images of a job without a store, without decoding them.

    Raises:
      DataError: the images cannot be used, or their labels not solved with.
      NetworkError, ImageError: the network does not fit them.
      ResourceError: the solver could not hold the matrices.
      SpecError, StoreMismatchError: the store cannot be where the job wants it.
    """
    GramStore(spec.store).check_free()
    found = survey(spec.data, square=needs_square(spec))
    spec.network.check_images(found.height, found.width, *spec.gram.groups)
    check_solver(spec, found)
    return found


def stored_survey(store: GramStore) -> Survey:
    """The number, shape and labels of the images in a store."""
    info = store.info
    return Survey(info.train, info.test, *info.image_shape, store.labels("train"), info.classes)


def needs_square(spec: JobSpec) -> bool:
    """Whether a group of the job turns images by quarter turns."""
    return any(not keeps_rectangles(group) for group in spec.gram.groups)


def solver_memory(spec: JobSpec, train: int, test: int) -> int:
    """Bytes that the solver stage needs for ``train`` and ``test`` images; 0 without one."""
    if spec.solve is None:
        return 0
    return memory_needed(train) + test * train * np.dtype(spec.gram.dtype).itemsize


def worker_memory(spec: JobSpec, tiling: Tiling, image_shape: tuple[int, int, int]) -> int:
    """Bytes that a worker needs at most, for images of ``(H, W, C)``."""
    gram, threads = spec.gram, spec.resources.cpus_per_worker
    engine = KernelFunction(spec.network, gram.groups, spec.engine, gram.dtype, threads).engine
    blocks = worker_bytes(
        tiling.edge,
        engine.image_bytes(*image_shape),
        4 * math.prod(image_shape),
        CACHED_BLOCKS,
        len(union(gram.groups)),
        len(gram.groups),
        np.dtype(gram.dtype).itemsize,
    )
    return WORKER_BYTES + engine.working_bytes(*image_shape) + blocks


def check_solver(spec: JobSpec, found: Survey) -> None:
    """Raise unless the solver stage can hold its matrices and solve with these labels.

    Raises:
      DataError, SpecError: the labels do not allow the regressions that the job asks for.
      ResourceError: the matrices do not fit in memory.
    """
    if spec.solve is not None:
        check_solvable(spec.solve, found.labels, found.classes)
    needed, available = solver_memory(spec, found.train, found.test), available_memory()
    if needed > available:
        raise ResourceError(
            f"solving with {found.train} training images needs {format_bytes(needed)} of memory, and "
            f"{format_bytes(available)} are available; take fewer images (data.per_class), a larger machine, or set "
            "`solve: null` to compute the Gram matrices only"
        )


def check_worker_memory(spec: JobSpec, needed: int) -> None:
    """Raise :class:`ResourceError` unless a worker of ``needed`` bytes fits on this machine, if it is to run here."""
    available = available_memory()
    if spec.resources.address is None and needed > available:
        raise ResourceError(
            f"a worker needs {format_bytes(needed)} of memory, and {format_bytes(available)} are available; set "
            "gram.tile or data.size lower, or use a larger machine"
        )


def check_disk(spec: JobSpec, plan: Plan) -> None:
    """Raise :class:`ResourceError` unless the finished run fits where the store is, if that can be known."""
    _check_free_space(spec, plan.store_bytes, "the finished run takes")


def _check_free_space(spec: JobSpec, needed: int, what: str) -> None:
    free = free_space(spec.store)
    if free is not None and needed > free:
        raise ResourceError(
            f"{what} {format_bytes(needed)}, and {format_bytes(free)} are free at {spec.store}; free space, choose "
            "another `store`, or store fewer kernels or groups"
        )


def make_plan(spec: JobSpec, found: Survey, store: GramStore | None, listener: Listener) -> Plan:
    """What the run costs, with the cost of a pair measured on this machine.

    Args:
      spec: the job.
      found: number and shape of the images.
      store: the store, if there is one already: then its tiles are kept and only the missing ones counted.
      listener: told that a measurement is going on.

    Raises:
      ResourceError: a worker needs more memory than this machine has.
    """
    gram, resources = spec.gram, spec.resources
    shape = (found.height, found.width, found.channels)
    listener(
        Note("measuring the cost of a pair on this machine (the first time on a machine, the kernels are compiled)")
    )
    pair = predicted_pair_seconds(spec, shape)
    workers = wanted_workers(resources)
    if store is not None:
        edge = store.info.tile
    elif gram.tile == "auto":
        edge = choose_edge(found.train, found.test, pair, workers)
    else:
        edge = gram.tile
    tiling = Tiling(found.train, found.test, edge)
    done = None if store is None else store.finished_tiles()
    missing_pairs = tiling.total_pairs - (done.pairs if done is not None else 0)
    memory = worker_memory(spec, tiling, shape)
    check_worker_memory(spec, memory)
    if resources.address is None:
        workers = min(workers, available_memory() // memory)
    here = computes_here(resources, pair * missing_pairs / workers)
    matrices, itemsize = len(gram.groups) * len(gram.kernels), np.dtype(gram.dtype).itemsize
    return Plan(
        tiling=tiling,
        missing=len(tiling) - (len(done) if done is not None else 0),
        missing_pairs=missing_pairs,
        matrices=matrices,
        dtype=gram.dtype,
        workers=0 if here else workers,
        parallel=cores_in_workers(resources) if here else workers,
        seconds_per_pair=pair,
        store_bytes=matrix_bytes(tiling, matrices, itemsize) + image_bytes(tiling, int(np.prod(shape))),
        worker_bytes=memory,
        solver_bytes=solver_memory(spec, found.train, found.test),
    )


def wanted_workers(resources: ResourceSpec) -> int:
    """How many workers share the tiles, as far as that is known before a cluster is asked; 1 for this process."""
    if resources.address is not None and resources.workers != "auto":
        return resources.workers
    fit = cores_in_workers(resources)
    return fit if resources.workers == "auto" else max(1, min(resources.workers, fit))


def cores_in_workers(resources: ResourceSpec) -> int:
    """How many workers the cores of this machine make."""
    return max(1, available_cores() // resources.cpus_per_worker)


def computes_here(resources: ResourceSpec, seconds: float) -> bool:
    """Whether this process computes the tiles itself, which take ``seconds`` on the workers."""
    small = resources.workers == "auto" and resources.address is None and seconds < CLUSTER_SECONDS
    return small or resources.workers == 0


def predicted_pair_seconds(spec: JobSpec, shape: tuple[int, int, int]) -> float:
    """Seconds that a pair of images ``(H, W, C)`` takes on one worker, measured on this machine.

    Large images are measured as smaller ones: the cost grows with the square of the number of pixels.
    """
    height, width, channels = shape
    network, gram = spec.network, spec.gram
    rows, cols = measured_size(network, gram.groups, height, width, MEASURED_SIDE.get(spec.engine, 48))
    images = np.random.default_rng(0).normal(size=(2, rows, cols, channels)).astype(gram.dtype)
    try:
        pair = measure_pair_seconds(
            network, gram.groups, spec.engine, gram.dtype, spec.resources.cpus_per_worker, images
        )
    except EquikernelError as error:
        raise NetworkError(f"this network fails already on noise of mean 0 and standard deviation 1: {error}") from None
    return pair * (height * width / (rows * cols)) ** 2


def measured_size(
    network: Architecture, groups: tuple[str, ...], height: int, width: int, most: int
) -> tuple[int, int]:
    """The size of images to measure instead of ``height x width``: up to ``most`` pixels a side if the network fits."""

    def fits(side: int) -> bool:
        return network.fits(min(height, side), min(width, side), *groups)

    largest = max(height, width)
    smaller = range(min(most, largest), 0, -1)
    side = next((side for side in (*smaller, *range(most + 1, largest)) if fits(side)), largest)
    return min(height, side), min(width, side)


def compute_tiles(store: GramStore, spec: JobSpec, listener: Listener, pair_seconds: float | None = None) -> None:
    """Compute the tiles that are missing, on Ray or, where that is faster, in this process.

    Args:
      store: the run.
      spec: its job, which may name other resources than the store does.
      listener: told of everything.
      pair_seconds: the cost of a pair on one worker, where it is known already.
    """
    info, tiling, resources = store.info, store.info.tiling, spec.resources
    finished = store.finished_tiles()
    missing = len(tiling) - len(finished)
    if not missing:
        return
    matrices, itemsize = len(spec.gram.groups) * len(spec.gram.kernels), np.dtype(spec.gram.dtype).itemsize
    _check_free_space(spec, matrix_bytes(tiling, matrices, itemsize, finished), "the missing tiles take")
    memory = worker_memory(spec, tiling, info.image_shape)
    check_worker_memory(spec, memory)
    store.check_writable()
    done, total = finished.pairs, tiling.total_pairs
    if pair_seconds is None and resources.workers == "auto" and resources.address is None:
        pair_seconds = predicted_pair_seconds(spec, info.image_shape)
    here = computes_here(resources, (pair_seconds or 0) * (total - done) / wanted_workers(resources))
    with contextlib.ExitStack() as stack:
        if here:
            executor: Executor = InProcess(_worker(store, spec))
        else:
            stack.enter_context(ray_session(resources))
            check_room(resources, memory)
            executor = OnRay(store, spec, memory)
        workers = 0 if here else executor.capacity()
        began = time.monotonic()
        everyone = tell(listener, History(store, listener), _Kinds(store))
        warn_of_another_driver(store, listener)
        everyone(
            ComputationStarted(len(tiling), missing, total, total - done, workers, socket.gethostname(), os.getpid())
        )
        listener(Progress("pairs", done, total))
        tiles, before, failure = 0, done, "it was interrupted"
        try:
            dispatcher = Dispatcher(tiling.strips(finished), executor, everyone, resources.hung_after)
            for report in stack.enter_context(contextlib.closing(dispatcher.run())):
                tiles, done = tiles + 1, done + report.pairs
                listener(Progress("pairs", done, total))
            failure = ""
        except Exception as error:
            failure = str(error)
            raise
        finally:
            everyone(ComputationEnded(tiles, done - before, time.monotonic() - began, failure or None))


class _Kinds:
    """Keeps the kinds of processors that compute, before they store a tile."""

    def __init__(self, store: GramStore) -> None:
        self._store = store
        self._known: set[str] = set()

    def __call__(self, event: Event) -> None:
        if isinstance(event, WorkerStarted) and event.processor not in self._known:
            self._known.add(event.processor)
            self._store.remember_worker(event.processor)


def warn_of_another_driver(store: GramStore, listener: Listener) -> None:
    """Tell of a driver that seems to be computing the same store, according to the history: waste, but no harm."""
    recent = datetime.now(UTC) - timedelta(seconds=2.5 * FLUSH_SECONDS)
    files = [name for name, written in store.history_files().items() if written > recent]
    for driver, name in {name.rpartition("-")[0]: name for name in files}.items():
        host, process = driver.partition("-")[2].rsplit("-", 1)
        ended = any(event.get("event") == ComputationEnded.__name__ for event in store.history([name]))
        gone = host == socket.gethostname() and not Path(f"/proc/{process}").exists()
        if not (ended or gone or (host, process) == (socket.gethostname(), str(os.getpid()))):
            listener(
                Note(
                    f"another driver (process {process} on {host}) was computing this store a moment ago; if it still "
                    "is, both do all the work that is left, which harms nothing but wastes the time of one"
                )
            )


def _worker(store: GramStore, spec: JobSpec) -> TileWorker:
    """A worker in this process, on all cores."""
    return TileWorker(store, spec.network, spec.gram.groups, spec.engine, spec.gram.dtype, available_cores())


def extend(
    store: GramStore, spec: JobSpec, split: SplitName, data: str, labels: str | None, listener: Listener
) -> Finished:
    """Add images to a run, compute the tiles with them, and solve anew; finished entries keep their bits.

    Args:
      store: the run.
      spec: its job, which may name other resources than the store does.
      split: whether they are training or test images.
      data, labels: as ``train`` and ``train_labels`` of a job; treated as the images that are there.
      listener: told of everything.

    Raises:
      DataError: the images or labels cannot be used, or are unlike those that are there.
      ResourceError: the run would need more memory or disk than there is; nothing was changed.
      StoreMismatchError: they were added before.
    """
    info = store.info
    kept = store.labels("train")
    more = load_more(
        data, labels, split, info.preprocessing, kept, info.classes,
        progress=lambda what, done, total: listener(Progress(what, done, total)),
    )  # fmt: skip
    if more.labels is None and (kept if split == "train" else store.labels(split)) is not None:
        raise DataError(
            f"the added images of {data} have no labels, and the {split} images in {store.url} have some; give them "
            "labels too"
        )
    tiling = Tiling(
        info.train + (len(more.images) if split == "train" else 0),
        info.test + (len(more.images) if split == "test" else 0),
        info.tile,
    )
    check_solver(spec, dataclasses.replace(stored_survey(store), train=tiling.train, test=tiling.test))
    matrices, itemsize = len(spec.gram.groups) * len(spec.gram.kernels), np.dtype(spec.gram.dtype).itemsize
    needed = matrix_bytes(tiling, matrices, itemsize) - matrix_bytes(info.tiling, matrices, itemsize)
    _check_free_space(spec, needed + 4 * more.images.size, "what is added takes")
    store.check_writable()
    store.extend(split, more, data)
    compute_tiles(store, spec, listener)
    return Finished(store, tuple(solve(store, spec, listener)))


def repair(store: GramStore, spec: JobSpec, tiles: Iterable[Tile], listener: Listener) -> None:
    """Delete tiles, and compute all that are missing, on Ray."""
    for tile in tiles:
        store.discard_tile(tile)
    compute_tiles(store, spec, listener)


def solve(store: GramStore, spec: JobSpec, listener: Listener) -> list[Result]:
    """Do the regressions that the job asks for, on the matrices in the store."""
    if spec.solve is None:
        return []
    return solve_run(
        store, spec.solve, spec.solved_kernels, lambda done, total: listener(Progress("solve", done, total))
    )


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
    if group not in spec.gram.groups or kernel not in spec.gram.kernels:
        raise SpecError(
            f"{store.url} holds no {group} {kernel}; choose of the groups {', '.join(spec.gram.groups)} and the "
            f"kernels {', '.join(spec.gram.kernels)}"
        )
    arrays, _ = store.solution(group, kernel)
    ridges = arrays["ridge"].tolist()
    chosen = 0 if ridge is None else next((i for i, value in enumerate(ridges) if np.isclose(value, ridge)), None)
    if chosen is None:
        choices = ", ".join(f"{value:g}" for value in ridges)
        raise SpecError(f"the run has no solution for ridge {ridge:g}; choose one of {choices}")
    new = load_images(images, info.preprocessing)
    function = KernelFunction(spec.network, (group,), spec.engine, spec.gram.dtype)
    values = np.tile(arrays["offset"].astype(np.float64), (len(new.images), 1))
    coefficients = arrays["coefficients"][chosen]
    blocks = info.tiling.train_blocks
    for index in range(blocks):  # each block of training images is read and prepared once
        first = index * info.tile
        train = function.prepare(store.block("train", index), "the training images", first)
        for start in range(0, len(values), PREDICT_BLOCK):
            block = function.prepare(new.images[start : start + PREDICT_BLOCK], images, start)
            cross = getattr(function(block, train)[group], kernel).astype(np.float64)
            values[start : start + len(cross)] += cross @ coefficients[first : first + train.count]
            progress((index * len(values) + start + len(cross)) // blocks, len(values))
    return Predictions(new.names, values, info.classes, group, kernel, ridges[chosen])
