"""A run from a job to predictions: data, plan, tiles, solution. Every stage starts from what the store holds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from equigram.claim import alive
from equigram.data import Split, Survey, fingerprint, load_dataset, load_images, load_more, survey
from equigram.data.sources import some
from equigram.dispatch import Dispatcher
from equigram.driver import OnRay, Share, check_address, check_room, on_a_worker, ray_session, target_workers
from equigram.errors import (
    DamagedTileError,
    DataError,
    DataNotFoundError,
    ResourceError,
    SolverError,
    SpecError,
    StoreExistsError,
    StoreMismatchError,
)
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
from equigram.listeners import FLUSH_SECONDS, History, driver_of
from equigram.local import InProcess
from equigram.plan import (
    SMALLEST_TILE,
    Plan,
    SplitName,
    Tile,
    TileSet,
    Tiling,
    choose_edge,
    image_bytes,
    matrix_bytes,
    worker_bytes,
)
from equigram.solve.metrics import probabilities
from equigram.solve.regression import memory_needed, solve_each
from equigram.solve.stage import (
    Result,
    check_memory,
    check_solvable,
    choose_method,
    solve_run,
    targets_of,
)
from equigram.spec import JobSpec, KernelName
from equigram.storage import configure
from equigram.store import SAME_SOFTWARE, GramStore, free_space, versions
from equikernel.engines.decoupled import pack_bytes
from equikernel.errors import EquikernelError, NetworkError
from equikernel.groups import keeps_rectangles, union
from equikernel.images import Labels, check_pixels
from equikernel.kernel import available_cores
from equikernel.memory import available_memory, format_bytes
from equikernel.worker import CACHED_BLOCKS, TileReport, TileWorker, measure_pair_seconds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equigram.dispatch import Executor
    from equigram.spec import Pass, ResourceSpec
    from equigram.verify import Report
    from equikernel.network import Architecture

WORKER_BYTES = 350 * 2**20
"""Memory of a worker process before it holds images: Python, NumPy, LLVM and Ray."""

CLUSTER_SECONDS = 5.0
"""A local cluster takes about so long to start: what its workers compute in less is computed in this process."""

ROUNDING = "float32 values agree to 5e-6, and perhaps not to the bit"
"""What is said of tiles that come from different processors or versions."""

CHECKED_BYTES = 2**28
"""Bytes of prepared images that are tried at once, before anything is stored."""

MEASURED_SIDE = {"reference": 8, "general": 16}
"""Pixels per side of the images that the cost of a pair is measured with at most, by engine; 48 for the others."""

PREDICT_BLOCK = 64
"""New images that are computed at once against a block of training images."""


@dataclass(frozen=True)
class Finished:
    """A finished run: its store and, if it solves, the results."""

    store: GramStore
    results: tuple[Result, ...]


def everything(found: Survey) -> None:
    """Allow any number of images of any size."""


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
    store, costs = prepare(spec, listener)
    return finish(store, spec, listener, costs)


def prepare(
    spec: JobSpec,
    listener: Listener = nobody,
    allow: Callable[[Survey], None] = everything,
    *,
    connected: bool = False,
) -> tuple[GramStore, dict[Pass, float] | None]:
    """The store of a job with its images, made if there is none, and the costs of its pairs where they were measured.

    Args:
      spec: the job.
      listener: told of everything.
      allow: raises where there are more or larger images than there may be; asked before anything is loaded.
      connected: whether there is a connection to the cluster of the job, which then need not be looked for.

    Raises: as :func:`run`.
    """
    configure(spec.storage_options)
    if not connected:
        check_address(spec.resources)
    if not GramStore.exists(spec.store):
        try:
            return create_store(spec, listener, allow)
        except StoreExistsError:
            listener(Note(f"another driver has made {spec.store} in the meantime; this one goes on from it"))
    store = open_store(spec, listener)
    check_solver(spec, stored_survey(store), store.info.tile)
    store.remember(spec)
    return store, None


def finish(
    store: GramStore,
    spec: JobSpec,
    listener: Listener,
    costs: dict[Pass, float] | None = None,
    share: Share | None = None,
) -> Finished:
    """Compute the tiles that a store lacks, and those that turn out to be damaged, and solve.

    Args, Raises: as of :func:`compute_tiles` and :func:`run`.
    """
    compute_tiles(store, spec, listener, costs, share)
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
        changed = [
            f"{what} {_short(stored)} in the store and {_short(current.get(what))} now"
            for what, stored in info.fingerprint.items()
            if stored != current.get(what)
        ]
        if changed:
            raise StoreMismatchError(
                f"the image files of this job have changed since {spec.store} was made on {info.created}: "
                f"{'; '.join(changed)}. Restore them, or give the job another `store`"
            )
    now = versions(SAME_SOFTWARE)
    before = {name: info.versions.get(name, "?") for name in SAME_SOFTWARE}
    changed = [f"{what} {then}, now {now.get(what)}" for what, then in before.items() if then != now.get(what)]
    if changed:
        listener(Note(f"the store was begun with {'; '.join(changed)}: {ROUNDING}"))
    return store


def _short(fact: int | str | None) -> str:
    """A number of a fingerprint, or the beginning of a checksum."""
    return f"{fact:,}" if isinstance(fact, int) else str(fact)[:12]


def create_store(
    spec: JobSpec, listener: Listener, allow: Callable[[Survey], None]
) -> tuple[GramStore, dict[Pass, float]]:
    """A new store with the images of a job, after everything that can be refused was; and the costs of its pairs."""
    found = look_at_images(spec, listener)
    allow(found)
    GramStore(spec.store).check_writable()
    plan = make_plan(spec, found, None, listener)
    check_disk(spec, plan)
    dataset = load_dataset(spec.data, square=needs_square(spec), progress=_progress(listener), surveyed=found)
    for note in dataset.notes:
        listener(Note(note))
    check_kernels(spec, spec.gram.passes, dataset.train, "training", listener)
    if dataset.test is not None:
        check_kernels(spec, spec.gram.passes, dataset.test, "test", listener)
    store = GramStore.create(spec, dataset, plan.tiling.edge, fingerprint(spec.data))
    return store, plan.costs


def check_kernels(spec: JobSpec, passes: Iterable[Pass], split: Split, which: str, listener: Listener) -> None:
    """Raise unless every image has a kernel with itself in each pass, and so, by Cauchy-Schwarz, with every other.

    Raises:
      EquikernelError: of the same class as the kernel's own, naming the first image that has none.
    """
    dtype: np.dtype[Any] = np.dtype(spec.gram.dtype)
    _, height, width, channels = split.images.shape
    for one in passes:
        function = spec.function_here(one.groups, (height, width, channels))
        step = max(1, CHECKED_BYTES // function.engine.image_bytes(height, width, channels))
        for start in range(0, len(split.images), step):
            listener(Progress("checking images", start, len(split.images)))
            images = split.images[start : start + step]
            try:
                check_pixels(images, dtype, Labels("images"))
                function.prepare(images)
            except EquikernelError as error:
                for index, image in enumerate(images, start):
                    try:
                        check_pixels(image[None], dtype, Labels("the image"))
                        function.prepare(image[None], "the image")
                    except EquikernelError as reason:
                        name = f"{which} image {index} ({split.names[index]})"
                        raise type(reason)(f"{name}: {reason}; nothing was stored") from None
                raise error from None
        listener(Progress("checking images", len(split.images), len(split.images)))


def _progress(listener: Listener) -> Callable[[str, int, int], None]:
    """Tells a listener how far the reading of images is."""
    return lambda what, done, total: listener(Progress(what, done, total))


def look_at_images(spec: JobSpec, listener: Listener = nobody) -> Survey:
    """The number, shape and labels of the images of a job without a store, without decoding them.

    Args:
      spec: the job.
      listener: told how many were looked at.

    Raises:
      DataError: the images cannot be used, or their labels not solved with.
      NetworkError, ImageError: the network does not fit them.
      ResourceError: the solver could not hold the matrices.
      SpecError, StoreMismatchError: the store cannot be where the job wants it.
    """
    store = GramStore(spec.store)
    if store.in_this_process and spec.resources.workers != 0:
        raise SpecError(
            f"{spec.store} lies in the memory of this process, where the workers, which are other processes, cannot "
            "write; set `store` to a folder or a URL that all workers reach, or resources.workers to 0"
        )
    store.check_free()
    store.check_place()
    found = survey(spec.data, square=needs_square(spec), progress=_progress(listener))
    spec.network.check_images(found.height, found.width, *spec.gram.groups)
    check_solver(spec, found, SMALLEST_TILE if spec.gram.tile == "auto" else spec.gram.tile)
    return found


def stored_survey(store: GramStore) -> Survey:
    """The number, shape and labels of the images in a store."""
    info = store.info
    return Survey(info.train, info.test, *info.image_shape, store.labels("train"), info.classes)


def needs_square(spec: JobSpec) -> bool:
    """Whether a group of the job turns images by quarter turns."""
    return any(not keeps_rectangles(group) for group in spec.gram.groups)


def worker_memory(spec: JobSpec, groups: tuple[str, ...], tiling: Tiling, image_shape: tuple[int, int, int]) -> int:
    """Bytes that a worker needs at most for a pass over ``groups``, for images of ``(H, W, C)``."""
    gram, threads = spec.gram, spec.resources.cpus_per_worker
    engine = spec.function_here(groups, image_shape, threads).engine
    blocks = worker_bytes(
        tiling.edge,
        engine.image_bytes(*image_shape),
        4 * math.prod(image_shape),
        CACHED_BLOCKS,
        len(union(groups)),
        len(groups),
        np.dtype(gram.dtype).itemsize,
    )
    preparing = pack_bytes(spec.network, *image_shape)  # while pairs are computed
    return WORKER_BYTES + engine.working_bytes(*image_shape) + preparing + blocks


def check_solver(spec: JobSpec, found: Survey, tile: int) -> int:
    """Raise unless the solver stage has the memory that it needs, and can solve with these labels.

    Args:
      spec: the job.
      found: its images.
      tile: the edge of the tiles, or the smallest that it may be.

    Returns:
      Bytes that the stage needs; 0 without one.

    Raises:
      DataError, SpecError: the labels do not allow the regressions that the job asks for.
      ResourceError: there is not enough memory.
    """
    if spec.solve is None:
        return 0
    columns = check_solvable(spec.solve, found.labels, found.classes)
    itemsize = np.dtype(spec.gram.dtype).itemsize
    return check_memory(spec.solve, found.train, itemsize, tile, columns)


def check_worker_memory(spec: JobSpec, needed: int) -> None:
    """Raise :class:`ResourceError` unless a worker of ``needed`` bytes fits on this machine, if it is to run here."""
    available = available_memory()
    if spec.resources.address is None and needed > available:
        raise ResourceError(
            f"a worker needs {format_bytes(needed)} of memory, and {format_bytes(available)} are available; set "
            "gram.tile or data.size lower, or use a larger machine"
        )


def factor_bytes(spec: JobSpec, train: int) -> int:
    """Bytes of the factor that the solver keeps in the store as long as it needs it; 0 without one."""
    tiled = spec.solve is not None and choose_method(spec.solve, train) == "tiled"
    return 8 * train * train if tiled else 0


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
    """What the run costs, with the cost of a pair measured on this machine, or by a worker of the job's cluster.

    Args:
      spec: the job.
      found: number and shape of the images.
      store: the store, if there is one already: then its tiles are kept and only the missing ones counted.
      listener: told that a measurement is going on.

    Raises:
      ResourceError: a worker needs more memory than this machine has, or fits on no node of the cluster.
      ClusterError: the cluster does not answer, or has no room left.
    """
    gram, resources = spec.gram, spec.resources
    shape = (found.height, found.width, found.channels)
    passes = gram.passes if store is None else store.info.passes
    measure = functools.partial(pair_costs, spec, passes, shape)
    local = resources.address is None
    where = "this machine" if local else "the cluster"
    listener(Note(f"measuring the cost of a pair on {where} (the first time on a machine, the kernels are compiled)"))
    with contextlib.nullcontext() if local else ray_session(resources):
        if not local:
            check_room(resources, WORKER_BYTES)
        costs = measure() if local else on_a_worker(resources, measure)
        if store is not None:
            edge = store.info.tile
        elif gram.tile == "auto":
            workers = wanted_workers(resources, WORKER_BYTES)
            edge = choose_edge(found.train, found.test, max(costs.values()), workers)
        else:
            edge = gram.tile
        tiling = Tiling(found.train, found.test, edge)
        memory = max(worker_memory(spec, one.groups, tiling, shape) for one in passes)
        check_worker_memory(spec, memory)
        if not local:
            check_room(resources, memory)
        workers = wanted_workers(resources, memory)
    done = {} if store is None else {one: part.finished_tiles() for one, part in store.passes()}
    missing = {one: len(tiling) - len(done.get(one, ())) for one in passes}
    missing_pairs = {one: tiling.total_pairs - (done[one].pairs if one in done else 0) for one in passes}
    work = sum(costs[one] * missing_pairs[one] for one in passes)
    here = computes_here(resources, work / workers)
    matrices, itemsize = len(gram.matrices), np.dtype(gram.dtype).itemsize
    return Plan(
        tiling=tiling,
        costs=costs,
        missing=sum(missing.values()),
        missing_pairs=sum(missing_pairs.values()),
        matrices=matrices,
        dtype=gram.dtype,
        workers=0 if here else workers,
        parallel=cores_in_workers(resources) if here else workers,
        work=work,
        store_bytes=matrix_bytes(tiling, matrices, itemsize)
        + image_bytes(tiling, int(np.prod(shape)))
        + factor_bytes(spec, found.train),
        worker_bytes=memory,
        solver_bytes=check_solver(spec, found, edge),
    )


def wanted_workers(resources: ResourceSpec, memory: int) -> int:
    """How many workers of ``memory`` bytes share the tiles, here or on the connected cluster; 1 for this process."""
    if resources.address is not None:
        return target_workers(resources, memory)
    fit = cores_in_workers(resources)
    asked = fit if resources.workers == "auto" else max(1, min(resources.workers, fit))
    return max(1, min(asked, available_memory() // memory))


def cores_in_workers(resources: ResourceSpec) -> int:
    """How many workers the cores of this machine make."""
    return max(1, available_cores() // resources.cpus_per_worker)


def computes_here(resources: ResourceSpec, seconds: float) -> bool:
    """Whether this process computes the tiles itself, which take ``seconds`` on the workers."""
    small = resources.workers == "auto" and resources.address is None and seconds < CLUSTER_SECONDS
    return small or resources.workers == 0


def pair_costs(spec: JobSpec, passes: Iterable[Pass], shape: tuple[int, int, int]) -> dict[Pass, float]:
    """Seconds that a pair of images ``(H, W, C)`` takes on one worker in each pass, measured where this is called."""
    return {one: predicted_pair_seconds(spec, one.groups, shape) for one in passes}


def predicted_pair_seconds(spec: JobSpec, groups: tuple[str, ...], shape: tuple[int, int, int]) -> float:
    """Seconds that a pair of images ``(H, W, C)`` takes on one worker in a pass, measured on this machine.

    Large images are measured as smaller ones: the cost grows with the square of the number of pixels.
    """
    height, width, channels = shape
    network, dtype, engine = spec.network, spec.gram.dtype, spec.engine_here(groups)
    rows, cols = measured_size(network, groups, height, width, MEASURED_SIDE.get(engine, 48))
    images = np.random.default_rng(0).normal(size=(2, rows, cols, channels)).astype(dtype)
    try:
        pair = measure_pair_seconds(network, groups, engine, dtype, spec.resources.cpus_per_worker, images)
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


def compute_tiles(
    store: GramStore,
    spec: JobSpec,
    listener: Listener,
    costs: dict[Pass, float] | None = None,
    share: Share | None = None,
) -> None:
    """Compute the tiles that are missing, pass by pass, on Ray or, where that is faster, in this process.

    Args:
      store: the run.
      spec: its job, which may name other resources than the store does.
      listener: told of everything.
      costs: the cost of a pair in each pass on one worker, where it is known already.
      share: tells which part of the cluster the run may have now; ``None`` if it need not share.
    """
    info, tiling, resources = store.info, store.info.tiling, spec.resources
    finished = {one: (part, part.finished_tiles(tidy=True)) for one, part in store.passes()}
    total, done = len(finished) * tiling.total_pairs, sum(tiles.pairs for _, tiles in finished.values())
    left = {one: (part, tiles) for one, (part, tiles) in finished.items() if len(tiles) < len(tiling)}
    if not left:
        return
    itemsize = np.dtype(spec.gram.dtype).itemsize
    needed = sum(matrix_bytes(tiling, len(one.matrices), itemsize, tiles) for one, (_, tiles) in left.items())
    _check_free_space(spec, needed, "the missing tiles take")
    memory = {one: worker_memory(spec, one.groups, tiling, info.image_shape) for one in left}
    check_worker_memory(spec, max(memory.values()))
    store.check_writable()
    seconds = 0.0
    if resources.workers == "auto" and resources.address is None:
        costs = costs or pair_costs(spec, left, info.image_shape)
        work = sum(costs[one] * (tiling.total_pairs - tiles.pairs) for one, (_, tiles) in left.items())
        seconds = work / wanted_workers(resources, max(memory.values()))
    here = computes_here(resources, seconds)
    with contextlib.ExitStack() as stack:
        if not here:
            stack.enter_context(ray_session(resources))
            check_room(resources, max(memory.values()))
        warn_of_another_driver(store, listener)
        listener(Progress("pairs", done, total))
        for one, (part, tiles) in left.items():
            executor: Executor = (
                _here(part, spec, one) if here else OnRay(part, spec, one.groups, memory[one], share=share)
            )
            number = list(finished).index(one)
            for report in _compute_pass(store, tiles, executor, resources, listener, number):
                done += report.pairs
                listener(Progress("pairs", done, total))


def _here(store: GramStore, spec: JobSpec, one: Pass) -> Executor:
    """A worker of a pass in this process, on all cores."""
    engine, size = spec.engine_of_workers(one.groups), store.info.image_shape[:2]
    return InProcess(TileWorker(store, spec.network, one.groups, engine, spec.gram.dtype, available_cores(), size))


def _compute_pass(
    store: GramStore,
    finished: TileSet,
    executor: Executor,
    resources: ResourceSpec,
    listener: Listener,
    number: int,
) -> Iterator[TileReport]:
    """Compute the tiles of the pass ``number`` that are not ``finished``, and report each; its events are stored."""
    tiling = store.info.tiling
    everyone = tell(listener, History(store, listener), _Kinds(store, listener))
    began, total = time.monotonic(), tiling.total_pairs
    missing, missing_pairs = len(tiling) - len(finished), total - finished.pairs
    workers = 0 if isinstance(executor, InProcess) else executor.capacity()
    host, process = socket.gethostname(), os.getpid()
    everyone(ComputationStarted(len(tiling), missing, total, missing_pairs, workers, host, process, number))
    tiles, pairs, failure = 0, 0, "it was interrupted"
    try:
        dispatcher = Dispatcher(tiling.strips(finished), executor, everyone, resources.hung_after, resources.wait)
        with contextlib.closing(dispatcher.run()) as reports:
            for report in reports:
                tiles, pairs = tiles + 1, pairs + report.pairs
                yield report
        failure = ""
    except Exception as error:
        failure = str(error)
        raise
    finally:
        everyone(ComputationEnded(tiles, pairs, time.monotonic() - began, failure or None))


class _Kinds:
    """Keeps the kinds of processors that compute, before they store a tile, and tells where there are several."""

    def __init__(self, store: GramStore, listener: Listener) -> None:
        self._store, self._listener = store, listener
        self._known: set[str] = set()

    def __call__(self, event: Event) -> None:
        if isinstance(event, WorkerStarted) and event.processor not in self._known:
            self._known.add(event.processor)
            self._store.remember_worker(event.processor)
            info = self._store.info
            engines = {info.spec.engine_for(one.groups) for one in info.passes}
            if len(info.processors) > 1 and len(engines) == 1:
                self._listener(Note(f"tiles come from different processors, {', '.join(info.processors)}: {ROUNDING}"))


def warn_of_another_driver(store: GramStore, listener: Listener) -> None:
    """Tell of a driver that seems to be computing the same store, according to the history: waste, but no harm."""
    recent = datetime.now(UTC) - timedelta(seconds=2.5 * FLUSH_SECONDS)
    files = {name: driver_of(name) for name, written in store.history_files().items() if written > recent}
    here = socket.gethostname()
    for driver, name in {driver: name for name, driver in files.items() if driver is not None}.items():
        host, process = driver
        ended = any(event.get("event") == ComputationEnded.__name__ for event in store.history([name]))
        gone = host == here and not alive(process)
        if not (ended or gone or driver == (here, os.getpid())):
            listener(
                Note(
                    f"another driver (process {process} on {host}) was computing this store a moment ago; if it still "
                    "is, both do all the work that is left, which harms nothing but wastes the time of one"
                )
            )


def extend(
    store: GramStore, spec: JobSpec, split: SplitName, data: str, labels: str | None, listener: Listener
) -> None:
    """Add images to a run. Their tiles are missing then; finished entries keep their bits.

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
        data, labels, split, info.preprocessing, kept, info.classes, progress=_progress(listener),
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
    check_kernels(spec, info.passes, more, "training" if split == "train" else "test", listener)
    check_solver(spec, dataclasses.replace(stored_survey(store), train=tiling.train, test=tiling.test), info.tile)
    matrices, itemsize = len(spec.gram.matrices), np.dtype(spec.gram.dtype).itemsize
    needed = matrix_bytes(tiling, matrices, itemsize) - matrix_bytes(info.tiling, matrices, itemsize)
    _check_free_space(spec, needed + 4 * more.images.size, "what is added takes")
    store.check_writable()
    store.extend(split, more, data, labels)


def extend_matrices(store: GramStore, spec: JobSpec, groups: Sequence[str], kernels: Sequence[KernelName]) -> JobSpec:
    """Add groups and kernels to a run. Their tiles are missing then; what is finished stays as it is.

    Args:
      store: the run.
      spec: its job, which may name other resources than the store does.
      groups, kernels: those to add.

    Returns:
      The job with them.

    Raises:
      SpecError: the run has one of them already, or there is no such group or kernel.
      NetworkError, ImageError: the network, or its images, do not fit a group.
      ResourceError: the disk has no room for the matrices; nothing was changed.
    """
    info, gram = store.info, spec.gram
    already = [name for name in (*groups, *kernels) if name in (*gram.groups, *gram.kernels)]
    if already:
        raise SpecError(f"{store.url} has {already[0]} already; `equigram run` computes what is missing")
    fields = spec.model_dump(mode="json")
    more = {"groups": [*gram.groups, *groups], "kernels": [*gram.kernels, *kernels]}
    larger = JobSpec.parse({**fields, "gram": {**fields["gram"], **more}}, source=store.url)
    larger.network.check_images(*info.image_shape[:2], *groups)
    count, itemsize = len(larger.gram.matrices) - len(gram.matrices), np.dtype(gram.dtype).itemsize
    _check_free_space(spec, matrix_bytes(info.tiling, count, itemsize), "what is added takes")
    store.check_writable()
    store.add_matrices(groups, kernels)
    return spec.model_copy(update={"gram": store.info.spec.gram})


def discard(store: GramStore, tiles: Iterable[Tile]) -> None:
    """Delete tiles, and all solutions, which may come from what was wrong in them."""
    for tile in tiles:
        store.discard_tile(tile)
    store.discard_solutions()


def repair(store: GramStore, spec: JobSpec, tiles: Iterable[Tile], listener: Listener) -> None:
    """Delete ``tiles`` and all solutions, which may come from what was wrong in them; compute all that are missing."""
    discard(store, tiles)
    compute_tiles(store, spec, listener)


def mend(store: GramStore, spec: JobSpec, report: Report, listener: Listener) -> list[str]:
    """Mend what a verification has found, as far as it can be.

    Args:
      store: the run.
      spec: its job, which may name other resources than the store does.
      report: of :func:`equigram.verify.verify`.
      listener: told of everything.

    Returns:
      What was done, in words.

    Raises:
      StoreMismatchError: images, labels or names are to be read again, and are not what they were.
      TileFailedError, ClusterError, ...: as :func:`run`.
    """
    done = []
    to_solve = report.bad_solutions or (bool(report.bad_tiles) and store.has_solutions())
    if report.bad_arrays:
        store.mend_layout(report.bad_arrays)
        done.append(f"metadata written again: {', '.join(report.bad_arrays)}")
    if report.bad_data:
        load_again(store, report.bad_data, listener)
        done.append(f"read from the job's data again: {', '.join(report.bad_data)}")
    if report.bad_tiles:
        discard(store, report.bad_tiles)
        done.append(f"computed again: {len(report.bad_tiles):,} tile{'' if len(report.bad_tiles) == 1 else 's'}")
    if to_solve:
        finish(store, spec, listener)
        done.append("solved again")
    elif report.bad_tiles:
        compute_tiles(store, spec, listener)
    return done


def load_again(store: GramStore, names: Iterable[str], listener: Listener) -> None:
    """Read images, labels or names from the sources of the job, and of what was added, and store them anew.

    Raises:
      DataError: a source cannot be read.
      StoreMismatchError: they are not what they were when the run was made; nothing was changed.
    """
    info = store.info
    progress = _progress(listener)
    dataset = load_dataset(info.spec.data, square=needs_square(info.spec), progress=progress)
    splits: dict[SplitName, Split] = {"train": dataset.train}
    if dataset.test is not None:
        splits["test"] = dataset.test
    for added in info.extensions:
        split: SplitName = added["split"]
        more = load_more(
            added["source"], added["labels"], split, info.preprocessing, dataset.train.labels, info.classes,
            progress=progress,
        )  # fmt: skip
        splits[split] = splits[split].joined(more) if split in splits else more
    store.restore(names, splits)


def solve(store: GramStore, spec: JobSpec, listener: Listener) -> list[Result]:
    """Do the regressions that the job asks for, on the matrices in the store."""
    if spec.solve is None:
        return []
    resources = spec.resources
    on_cluster = resources.address is not None and choose_method(spec.solve, store.info.train) == "iterative"
    with ray_session(resources) if on_cluster else contextlib.nullcontext():
        return solve_run(store, spec.solve, spec.solved_kernels, listener, resources if on_cluster else None)


@dataclass(frozen=True)
class Predictions:
    """Predictions for new images.

    Attributes:
      names: where each image came from.
      values: ``(m, k)`` float64: a column per class or target.
      classes: class names of the columns; ``None`` for regression.
      group, kernel, ridge: what they were computed with.
      probabilities: ``(m, k)`` float64, calibrated on training images that were left out; ``None`` unless they were
        asked for.
      variances: ``(m,)`` float64, of a target of each image, with noise, in squared units of the targets, under the
        Gaussian process that makes the training targets most likely; ``None`` unless they were asked for.
      warning: what a person should know of the solution, if anything.
    """

    names: tuple[str, ...]
    values: NDArray[np.float64]
    classes: tuple[str, ...] | None
    group: str
    kernel: str
    ridge: float
    probabilities: NDArray[np.float64] | None = None
    variances: NDArray[np.float64] | None = None
    warning: str | None = None


def predict(
    store: GramStore,
    images: str,
    group: str | None = None,
    kernel: str | None = None,
    ridge: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    calibrated: bool = False,
    variances: bool = False,
) -> Predictions:
    """Predict new images with a finished run, in this process, on all cores.

    Args:
      store: the run.
      images: a folder, an image file, an .npz, .npy or zarr; any fsspec URL. Treated as the training images were.
      group, kernel: which Gram matrix; by default the last group of the job and the last solved kernel.
      ridge: one of the job's ridge values; by default the one that was chosen.
      progress: called with the images done and their number.
      calibrated: also give probabilities of the classes.
      variances: also compute these, which takes a factorisation of the train matrix in memory.

    Raises:
      IncompleteRunError: the run has no solution for that group and kernel.
      ResourceError: the memory does not hold what the variances need.
      SpecError: it was not solved with that ridge value, or has nothing to calibrate with.
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
    arrays, fields = store.solution(group, kernel)
    ridges = arrays["ridge"].tolist()
    chosen = (
        fields["chosen"]
        if ridge is None
        else next((i for i, value in enumerate(ridges) if math.isclose(value, ridge, rel_tol=1e-6)), None)
    )
    if chosen is None:
        choices = ", ".join(f"{value:g}" for value in ridges)
        raise SpecError(f"the run has no solution for ridge {ridge:g}; choose one of {choices}")
    beta = fields.get("inverse_temperature") if chosen == fields["chosen"] else None
    if calibrated and beta is None:
        raise SpecError(
            f"{store.url} has no calibrated probabilities for {group} {kernel}, ridge {ridges[chosen]:g}; they need "
            "classes, the chosen ridge value, and training images that were left out: give several ridge values, or "
            "`solve: {choose: leave_one_out}`, and enough memory for the matrix"
        )
    new = load_images(images, info.preprocessing)
    if variances:
        _check_room_for_variances(info.train, len(new.images))
    function = info.spec.function_here((group,), info.image_shape)
    crosses = np.empty((len(new.images), info.train if variances else 0))
    itself = np.empty(len(new.images))
    values = np.tile(arrays["offset"].astype(np.float64), (len(new.images), 1))
    coefficients = arrays["coefficients"][chosen]
    blocks = info.tiling.train_blocks
    for index in range(blocks):  # each block of training images is read and prepared once
        first = index * info.tile
        train = function.prepare(store.block("train", index), "the training images", first)
        for start in range(0, len(values), PREDICT_BLOCK):
            block = function.prepare(new.images[start : start + PREDICT_BLOCK], images, start)
            cross = getattr(function(block, train)[group], kernel).astype(np.float64)
            rows = slice(start, start + len(cross))
            values[rows] += cross @ coefficients[first : first + train.count]
            if variances:
                crosses[rows, first : first + train.count] = cross
            if variances and index == 0:
                itself[rows] = getattr(function.diagonal(block)[group], kernel)
            progress((index * len(values) + start + len(cross)) // blocks, len(values))
    warning = next(
        (one["warning"] for one in fields["solutions"] if one["train_size"] is None and one["ridge"] == ridges[chosen]),
        None,
    )
    found = Predictions(new.names, values, info.classes, group, kernel, ridges[chosen], warning=warning)
    if calibrated and beta is not None:
        found = dataclasses.replace(found, probabilities=probabilities(values, beta))
    if variances:
        targets = targets_of(store.labels("train"), info.classes)
        gram = store.matrix("gram", group, kernel)
        (solution,) = solve_each(gram, targets, [ridges[chosen]], queries=lambda: [(crosses, itself)])
        if isinstance(solution, SolverError):
            raise solution
        found = dataclasses.replace(found, variances=solution.noisy_variances())
    return found


def _check_room_for_variances(train: int, new: int) -> None:
    """Raise :class:`ResourceError` unless the variances of ``new`` images can be computed in memory."""
    needed, available = memory_needed(train) + 8 * train * new, available_memory()
    if needed > available:
        raise ResourceError(
            f"the variances of {new:,} images with {train:,} training images take {format_bytes(needed)} of memory, "
            f"and {format_bytes(available)} are available; predict without them, fewer images at a time, or on a "
            "larger machine"
        )
