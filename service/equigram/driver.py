"""Ray: connections to a cluster, how many workers it holds, and tiles on actors."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

from equigram.dispatch import CAPACITY_SECONDS, TILES_IN_FLIGHT, Died, Done, Failed, Started, sentence
from equigram.errors import ClusterError, ResourceError
from equigram.plan import Tile
from equigram.storage import configure
from equikernel.memory import format_bytes
from equikernel.worker import CACHED_BLOCKS, Spent, TileReport, tile_sides

if TYPE_CHECKING:
    from types import FrameType

    from equigram.dispatch import Answer
    from equigram.plan import Part
    from equigram.spec import JobSpec, ResourceSpec
    from equigram.store import GramStore

T = TypeVar("T")

Share: TypeAlias = Callable[[], tuple[float, float]]
"""Tells which part of a cluster's workers a run may have now, as an interval of 0 to 1; other runs have the rest."""

CONNECT_SECONDS = 5.0
"""How long the machine at a cluster's address may take to accept a connection."""

ANSWER_SECONDS = 20.0
"""How long Ray may take to answer there."""

LOCAL_OBJECT_STORE = 128 * 2**20
"""Bytes of shared memory of a local cluster, for blocks of images."""

LAST_WORDS = (
    "error: this process was killed, or ended by Ray, whose cluster is gone; finished tiles are kept: run again"
)
"""What is said for a process that cannot say it any more."""

BLOCK_SHARE = 0.5
"""Part of the shared memory of the driver's node that blocks of images may take."""


@contextlib.contextmanager
def ray_session(resources: ResourceSpec) -> Iterator[None]:
    """A Ray connection for the time of a run: to ``resources.address``, or to a local cluster started for it.

    A connection that this process has already is used, and left open.

    Raises:
      ClusterError: there is no connection.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"address": resources.address, "log_to_driver": False, "logging_level": logging.ERROR}
        if resources.address is None:
            from equikernel.kernel import available_cores

            # Where Ray itself would put it, because paths of sockets must be short; but removed afterwards.
            folder = tempfile.TemporaryDirectory(
                prefix="equigram-", dir=os.environ.get("RAY_TMPDIR", "/tmp"), ignore_cleanup_errors=True
            )
            options |= {"address": "local", "num_cpus": available_cores(), "include_dashboard": False}
            options |= {"object_store_memory": LOCAL_OBJECT_STORE, "_temp_dir": stack.enter_context(folder)}
        stack.enter_context(_last_words())
        stack.enter_context(_quiet_ray())
        stack.callback(_shutdown)
        try:
            with _signals_wait():
                _init(options)
        except Exception as error:
            reason = sentence(error.__cause__ or error)
            if resources.address is None:
                raise ClusterError(
                    f"a local Ray cluster does not start: {reason}; finished tiles are kept: run again"
                ) from error
            raise ClusterError(
                f"no connection to the Ray cluster at resources.address = {resources.address!r}: {reason}; run on a "
                "machine of that cluster, or leave the address out to start a local one"
            ) from error
        yield


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until Ray has started: in between they would leave locks taken. A second one does not.

    Ray would also put a handler of its own in place of that of SIGTERM, and end the process without our words.
    """
    from ray._private import utils

    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    for one in (signal.SIGINT, signal.SIGTERM):
        if callable(handler := signal.getsignal(one)):
            handlers[one] = handler
    if not handlers or threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def later(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        if len(arrived) > 1:
            handlers[number](number, frame)

    for number in handlers:
        signal.signal(number, later)
    original = utils.set_sigterm_handler
    utils.set_sigterm_handler = original if signal.SIGTERM not in handlers else lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = original
        for number, handler in handlers.items():
            signal.signal(number, handler)  # in C, too, Ray has put one there, which prints a stack
        if len(arrived) == 1:
            signal.raise_signal(arrived[0])


def _init(options: dict[str, Any]) -> None:
    """``ray.init``; a second time for a local cluster, which a loaded machine may not start in the 30 s of Ray."""
    import ray
    from ray._private.node import Node

    try:
        ray.init(**options)
    except BaseException as error:
        if options["address"] != "local":
            raise
        # Ray forgets the processes that it has started by then: only what raised the error knows them.
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if isinstance(node := frame.f_locals.get("self"), Node):
                node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)
        if not isinstance(error, Exception):
            raise
        ray.shutdown()
        ray.init(**options)


def _shutdown() -> None:
    """``ray.shutdown``; it alone would wait a second for the autoscaler of a local cluster, which has nothing to do."""
    import ray
    from ray._private import worker

    if worker._global_node is not None:
        worker._global_node.kill_monitor(check_alive=False)
    ray.shutdown()


@contextlib.contextmanager
def _last_words() -> Iterator[None]:
    """Ray ends its driver without a word when the cluster is gone: then a process that outlives it says so."""
    witness = subprocess.Popen(
        ["sh", "-c", 'read -r ended || printf "\\n%s\\n" "$1" >&2', "sh", LAST_WORDS],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield
    finally:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            witness.communicate(b"ended\n", timeout=ANSWER_SECONDS)


@contextlib.contextmanager
def _quiet_ray() -> Iterator[None]:
    """Ray prints a paragraph on standard output for each worker that dies, which is told in a note already."""
    from ray._private import worker

    original = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = original


def check_address(resources: ResourceSpec) -> None:
    """Raise unless a Ray cluster answers at ``resources.address``, or this machine holds a worker if none is given.

    Raises:
      ClusterError: nobody answers there, or not as Ray does.
      ResourceError: a worker needs more cores than this machine has, or a GPU, and there is none.
    """
    address = resources.address
    if address is None:
        from equikernel.kernel import available_cores, has_gpu

        if resources.gpus_per_worker and not has_gpu():
            raise ResourceError(
                f"resources.gpus_per_worker = {resources.gpus_per_worker:g}, but no GPU is found on this machine; "
                "install numba-cuda or JAX for it (as with `pip install 'numba-cuda[cu13]'`), name a cluster in "
                "resources.address, or leave it out"
            )
        if resources.cpus_per_worker > available_cores():
            raise ResourceError(
                f"a worker with resources.cpus_per_worker = {resources.cpus_per_worker} does not fit on this machine, "
                f"which has {available_cores()} CPUs; ask for less, or name a cluster in resources.address"
            )
        return
    remedy = "start one with `ray start --head`, correct the address, or leave it out to start a local one"
    nobody = f"resources.address is 'auto', but no Ray cluster answers on this machine or at RAY_ADDRESS; {remedy}"
    parts = urlsplit(address if "//" in address else f"//{address}")
    if address != "auto":
        try:
            socket.create_connection((parts.hostname, parts.port), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            raise ClusterError(
                f"no Ray cluster answers at resources.address = {address!r} ({error.strerror or error}); {remedy}"
            ) from None
        if parts.scheme == "ray":
            return
    # Ray itself would try for minutes, then end this process.
    command = [sys.executable, "-m", "ray.scripts.scripts", "status"]
    command += [] if address == "auto" else ["--address", parts.netloc]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        if address == "auto":
            raise ClusterError(nobody) from None
        raise ClusterError(
            f"something at resources.address = {address!r} accepts connections, but does not answer as Ray does "
            f"within {ANSWER_SECONDS:g} s; {remedy}"
        ) from None
    if "AuthenticationError" in answer.stderr:
        raise ClusterError(
            f"the Ray cluster at resources.address = {address!r} refuses the token of this process; set "
            "RAY_AUTH_MODE=token, and the cluster's token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        )
    if answer.returncode and address == "auto":
        raise ClusterError(nobody)
    if answer.returncode:
        reason = answer.stderr.strip().rpartition("\n")[2]
        raise ClusterError(f"no Ray cluster answers at resources.address = {address!r} ({reason}); {remedy}")


def fitting_workers(resources: ResourceSpec, memory: int) -> int:
    """How many workers of ``memory`` bytes the connected cluster holds now."""
    needs = _needs(resources, memory)
    return sum(
        min(int(node["Resources"].get(name, 0) // need) for name, need in needs.items() if need)
        for node in _nodes(resources)
    )


def shared_workers(begin: float, end: float, workers: int) -> int:
    """How many of a cluster's workers lie in an interval of 0 to 1; one at least.

    >>> [shared_workers(begin, begin + 1 / 3, 8) for begin in (0, 1 / 3, 2 / 3)]
    [2, 3, 3]
    """
    return max(1, int(end * workers + 1e-9) - int(begin * workers + 1e-9))


def target_workers(resources: ResourceSpec, memory: int) -> int:
    """How many workers of ``memory`` bytes the connected cluster should be asked for now.

    A cluster that may grow is asked for as many as the job names, or for one more than none: actors that find no room
    are what Ray's autoscaler starts nodes for. A local cluster is asked for no more than it holds.
    """
    fit = fitting_workers(resources, memory)
    if resources.workers == "auto":
        return max(fit, 1)
    return min(resources.workers, fit) if resources.address is None else resources.workers


def check_room(resources: ResourceSpec, memory: int) -> None:
    """Raise :class:`ResourceError` if not a single worker of ``memory`` bytes fits on a node of the cluster.

    Not where the job says that such a node may come, with ``resources.wait``.
    """
    import ray

    if resources.wait or fitting_workers(resources, memory):
        return
    nodes, labels = _nodes(resources), resources.node_labels or {}
    if not nodes:
        raise ResourceError(
            f"none of the {sum(node['Alive'] for node in ray.nodes())} nodes of the Ray cluster has the labels "
            f"resources.node_labels = {labels}; start some with `ray start --labels`, or ask for others"
        )
    most = {name: max(node["Resources"].get(name, 0) for node in nodes) for name in _needs(resources, memory)}
    raise ResourceError(
        f"a worker with resources.cpus_per_worker = {resources.cpus_per_worker}, resources.gpus_per_worker = "
        f"{resources.gpus_per_worker:g} and {format_bytes(memory)} of memory fits on no node of the Ray cluster; the "
        f"largest have {most['CPU']:g} CPUs, {most['GPU']:g} GPUs and {format_bytes(most['memory'])}; ask for less, or "
        "set resources.wait if the cluster starts larger ones when they are asked for"
    )


def on_a_worker(resources: ResourceSpec, function: Callable[[], T]) -> T:
    """What ``function`` returns where a worker would run, with its share of a node. Needs a :func:`ray_session`.

    Raises:
      ClusterError: there is no room for it in the time that a first worker would be waited for, or it dies there.
      Exception: whatever it raises.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    task: Any = ray.remote(lambda: function()).options(
        **share_of_a_worker(resources)
    )  # Ray takes no callables but functions
    wait = CAPACITY_SECONDS if resources.wait is None else max(resources.wait, CAPACITY_SECONDS)
    try:
        returned: T = ray.get(task.remote(), timeout=wait)
    except RayTaskError as error:
        raise getattr(error, "cause", error) from None
    except GetTimeoutError:
        raise ClusterError(
            f"the cost of a pair could not be measured within {wait:.0f} s: the cluster has no room left, see `ray "
            "status`; try again when it has, or set resources.wait to wait longer"
        ) from None
    except RayError as error:
        raise ClusterError(f"the cost of a pair could not be measured on the cluster: {sentence(error)}") from error
    return returned


def share_of_a_worker(resources: ResourceSpec) -> dict[str, Any]:
    """What Ray gives to a worker, but for its memory."""
    return {
        "num_cpus": resources.cpus_per_worker,
        "num_gpus": resources.gpus_per_worker,
        "label_selector": resources.node_labels,
    }


def _needs(resources: ResourceSpec, memory: int) -> dict[str, float]:
    return {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker, "memory": memory}


def _nodes(resources: ResourceSpec) -> list[dict[str, Any]]:
    """The nodes that are alive and have the labels of the job."""
    import ray

    asked = (resources.node_labels or {}).items()
    return [node for node in ray.nodes() if node["Alive"] and asked <= (node.get("Labels") or {}).items()]


def check_local_cluster() -> None:
    """Raise :class:`ClusterError` if a process of the cluster that this one has started is gone.

    Ray itself notices after a minute, and then waits for its node for ever.
    """
    from ray._private import worker

    node = worker._global_node
    dead = [kind for kind, _ in node.dead_processes() if kind in ("raylet", "gcs_server")] if node is not None else []
    if dead:
        raise ClusterError(
            f"the local Ray cluster is gone: its {dead[0]} process has died; finished tiles are kept: run again"
        )


def _kill_process(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _cause(error: BaseException) -> str:
    """Why an actor died, without the pages that Ray has to say about it."""
    words = sentence(error.__cause__ or error)
    if "connection error code 2" in words:
        return "its process was killed, perhaps for want of memory, or crashed"
    return textwrap.shorten(words, 200, placeholder=" …")


class TileActor:
    """A tile worker as a Ray actor; it reads the images that come with a tile."""

    def __init__(self, storage_options: Any, store: GramStore, *arguments: Any) -> None:
        from equikernel.worker import TileWorker

        configure(storage_options)
        self._store = store
        self._worker = TileWorker(store, *arguments)

    def ready(self) -> tuple[str, int, str, str]:
        """The node and process of this worker, what to call its place, and its processor: answers when it started."""
        import ray

        node, process = ray.get_runtime_context().get_node_id(), os.getpid()
        return node, process, f"{ray.util.get_node_ip_address()}, process {process}", self._worker.processor

    def compute(self, tile: tuple[Part, int, int, *tuple[Any, ...]]) -> tuple[int, *tuple[float, ...]]:
        """Compute a tile and store it; its pairs and what was spent: plain values are what Ray passes on fastest.

        Args:
          tile: part, row and column; perhaps split, index and reference of images of it that are in the object store.
        """
        import ray

        part, row, col, *more = tile
        blocks = {(split, index): images for split, index, images in zip(*[iter(more)] * 3, strict=True)}

        def read(split: Any, index: int) -> Any:
            images = blocks.get((split, index))
            return self._store.block(split, index) if images is None else ray.get(images)

        report = self._worker.compute(Tile(part, row, col), read)
        return report.pairs, *report.spent


class OnRay:
    """An :class:`equigram.dispatch.Executor` of Ray actors. Needs a :func:`ray_session`.

    The driver reads each block of images once and puts it into Ray's object store, as long as there is room: however
    many workers need it, each node fetches it once.

    Args:
      store: the run, whose images are read and to which the workers write.
      spec: its job.
      groups: those of the pass.
      memory: bytes that each worker may need; Ray places them accordingly.
      actor: what computes the tiles.
      share: tells which part of the cluster the run may have now; ``None`` if it need not share.
    """

    def __init__(
        self,
        store: GramStore,
        spec: JobSpec,
        groups: tuple[str, ...],
        memory: int,
        actor: type[TileActor] = TileActor,
        share: Share | None = None,
    ) -> None:
        self._share = share
        self._store = store
        self._actor = actor
        self._spec = spec
        self._groups = groups
        self._memory = memory
        self._actors: dict[int, Any] = {}
        self._places: dict[int, tuple[str, int, str]] = {}
        """Node, process and kind of processor of each worker."""
        self._had: defaultdict[int, OrderedDict[tuple[str, int], None]] = defaultdict(OrderedDict)
        """The blocks that each worker has used last, and has still."""
        self._started = 0
        self._said: queue.SimpleQueue[tuple[int, Tile | None, Any]] = queue.SimpleQueue()
        self._blocks: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._blocks_at_once = self._room_for_blocks()

    def _room_for_blocks(self) -> int:
        import ray

        info = self._store.info
        block = 4 * info.tile * math.prod(info.image_shape)
        here = ray.get_runtime_context().get_node_id()
        mine = [node["Resources"] for node in ray.nodes() if node["NodeID"] == here]
        room = sum(resources.get("object_store_memory", 0) for resources in mine)
        return int(BLOCK_SHARE * room // block)

    def capacity(self) -> int:
        """How many workers there should be now."""
        if self._spec.resources.address is None:
            check_local_cluster()
        limit = self.limit()
        target = target_workers(self._spec.resources, self._memory)
        return target if limit is None else min(target, limit)

    def limit(self) -> int | None:
        """How many workers there may be at most now: the share of those that the cluster holds, and one at least."""
        begin, end = (0.0, 1.0) if self._share is None else self._share()
        if (begin, end) == (0.0, 1.0):
            return None
        return shared_workers(begin, end, fitting_workers(self._spec.resources, self._memory))

    def start(self) -> int:
        """Ask Ray for an actor."""
        import ray

        gram, resources = self._spec.gram, self._spec.resources
        actor: Any = ray.remote(self._actor).options(
            **share_of_a_worker(resources), memory=self._memory, max_restarts=0, max_concurrency=TILES_IN_FLIGHT
        )
        options = self._spec.storage_options
        handle = actor.remote(
            options,
            self._store,
            self._spec.network,
            self._groups,
            self._spec.engine_of_workers(self._groups),
            gram.dtype,
            resources.cpus_per_worker,
            self._store.info.image_shape[:2],
        )
        number, self._started = self._started, self._started + 1
        self._actors[number] = handle
        self._listen(number, None, handle.ready.remote())
        return number

    def submit(self, worker: int, tile: Tile) -> None:
        """Call an actor."""
        new = [side for side in tile_sides(tile) if side not in self._had[worker]]
        blocks = [value for side in new if (images := self._block(*side)) is not None for value in (*side, images)]
        self._listen(worker, tile, self._actors[worker].compute.remote((tile.part, tile.row, tile.col, *blocks)))

    def _block(self, split: Any, index: int) -> Any:
        """The images of a block in the object store; ``None`` where there is no room for it."""
        import ray

        if self._blocks_at_once < 2:
            return None
        key = (split, index)
        if key not in self._blocks:
            self._blocks[key] = ray.put(self._store.block(split, index))
        self._blocks.move_to_end(key)
        while len(self._blocks) > self._blocks_at_once:
            self._blocks.popitem(last=False)
        return self._blocks[key]

    def _listen(self, worker: int, tile: Tile | None, call: Any) -> None:
        call.future().add_done_callback(lambda future: self._said.put((worker, tile, future)))

    def stop(self, worker: int, *, hung: bool = False) -> None:
        """Kill an actor; one that hangs may not even hear Ray, so its process is killed by another one on its node."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._had.pop(worker, None)
        with contextlib.suppress(Exception):  # it, or the cluster, may be gone
            ray.kill(self._actors[worker])
            if hung and worker in self._places:
                node, process, _ = self._places[worker]
                there = NodeAffinitySchedulingStrategy(node, soft=False)
                ray.remote(_kill_process).options(num_cpus=0, scheduling_strategy=there).remote(process)

    def answers(self, timeout: float) -> list[Answer]:
        """What the actors said since, in that order."""
        said = []
        with contextlib.suppress(queue.Empty):
            said.append(self._said.get(timeout=timeout))
            while True:
                said.append(self._said.get_nowait())
        return [self._answer(*one) for one in said]

    def _answer(self, worker: int, tile: Tile | None, future: Any) -> Answer:
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

        error = future.exception()
        if error is None and tile is None:
            node, process, place, processor = future.result()
            self._places[worker] = node, process, processor
            return Started(worker, place, processor)
        if error is None and tile is not None:
            had = self._had[worker]
            for side in tile_sides(tile):
                had[side] = None
                had.move_to_end(side)
            while len(had) > CACHED_BLOCKS:
                had.popitem(last=False)
            pairs, *spent = future.result()
            return Done(worker, tile, TileReport(tile, pairs, Spent(*spent), self._places[worker][2]))
        if tile is None or isinstance(error, (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)):
            return Died(worker, _cause(error), node=self._node_is_gone(worker, error))
        return Failed(worker, tile, getattr(error, "cause", error))

    def _node_is_gone(self, worker: int, error: Any) -> bool:
        import ray
        from ray.exceptions import NodeDiedError

        if isinstance(error, NodeDiedError) or getattr(error, "preempted", False):
            return True
        node = self._places[worker][0] if worker in self._places else None
        return node is not None and not any(one["Alive"] for one in ray.nodes() if one["NodeID"] == node)

    def now(self) -> float:
        """Of the monotonic clock."""
        return time.monotonic()
