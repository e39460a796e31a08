"""The driver: hands tiles to Ray actors, keeps them busy, and replaces those that die."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from equigram.errors import ClusterError, StoreError, TileFailedError
from equikernel.errors import EquikernelError

if TYPE_CHECKING:
    from equigram.plan import Tile
    from equigram.spec import JobSpec, WorkerSpec
    from equigram.store import GramStore
    from equikernel.worker import TileReport

log = logging.getLogger(__name__)

TILES_IN_FLIGHT = 2
"""Tiles that a worker holds at most: one that it computes and one that waits."""

ATTEMPTS = 3
"""How often a tile is tried before the run stops."""

CONNECT_SECONDS = 5.0
"""How long a Ray cluster may take to accept a connection."""

CAPACITY_SECONDS = 120.0
"""How long to wait for room for a single worker before the run stops."""


def is_retryable(error: BaseException) -> bool:
    """Whether a tile that failed with ``error`` is worth another attempt.

    The infrastructure's failures are: a worker that died, a node that left, storage that did not answer. The data's
    are not: the same images give the same error.
    """
    import ray.exceptions

    return isinstance(error, (ray.exceptions.RayError, StoreError))


def cause(error: BaseException) -> BaseException:
    """The error that a worker raised, out of what Ray wraps it in; Ray's own where the worker raised none."""
    import ray.exceptions

    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, Exception):
        return error.cause
    return error


LOCAL_OBJECT_STORE = 128 * 2**20
"""Bytes of shared memory of a local cluster: only tile reports pass through it."""


@contextlib.contextmanager
def ray_session(workers: WorkerSpec) -> Iterator[None]:
    """A Ray connection for the time of a run: to ``workers.address``, or to a local cluster started for it.

    Raises:
      ClusterError: nobody answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    if workers.address is None:
        from equikernel.kernel import available_cores

        options |= {"num_cpus": available_cores(), "include_dashboard": False, "address": "local"}
        options["object_store_memory"] = LOCAL_OBJECT_STORE
    else:
        options["address"] = workers.address
    try:
        ray.init(**options)
    except Exception as error:
        where = (
            "a local Ray cluster does not start"
            if workers.address is None
            else f"no Ray cluster answers at workers.address = {workers.address!r}"
        )
        raise ClusterError(
            f"{where}: {_first_line(error)}; check `ray status`, or leave the address out to start a local one"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def check_address(workers: WorkerSpec) -> None:
    """Raise :class:`ClusterError` unless something listens at ``workers.address``, if one is given."""
    address = workers.address
    if address is None or address == "auto":
        return
    parts = urlsplit(address if "//" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise ClusterError(f"workers.address = {address!r} is no Ray address; write host:port, ray://host:port or auto")
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at workers.address = {address!r} ({error.strerror or error}); "
            "start one with `ray start --head`, correct the address, or leave it out to start a local one"
        ) from None


def worker_count(workers: WorkerSpec) -> int:
    """How many workers the connected cluster holds, or as many as were asked for.

    Raises:
      ClusterError: a single worker does not fit on any node.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = sum(
        min(
            int(node.get("CPU", 0) // workers.cpus),
            int(node.get("GPU", 0) // workers.gpus) if workers.gpus else 2**31,
        )
        for node in nodes
    )
    if fit == 0:
        most_cpus = max((node.get("CPU", 0) for node in nodes), default=0)
        most_gpus = max((node.get("GPU", 0) for node in nodes), default=0)
        raise ClusterError(
            f"a worker with workers.cpus = {workers.cpus} and workers.gpus = {workers.gpus:g} fits on no node; the "
            f"largest have {most_cpus:g} CPUs and {most_gpus:g} GPUs; ask for less"
        )
    return fit if workers.count == "auto" else min(workers.count, fit)


def run_tiles(store: GramStore, spec: JobSpec, tiles: Iterable[Tile], count: int) -> Iterator[TileReport]:
    """Compute tiles on ``count`` Ray actors; yields a report for each the moment it is stored, in any order.

    A worker that dies is replaced and its tiles are given to others. Needs a :func:`ray_session`.

    Raises:
      EquikernelError: the images of a tile have no kernel.
      TileFailedError: a tile failed :data:`ATTEMPTS` times, or with an error that would come again.
      StoreError: the storage failed that often.
      ClusterError: no worker could be started.
    """
    pool = _Pool(store, spec, tiles, count)
    try:
        yield from pool.run()
    finally:
        pool.close()


@dataclass
class _Worker:
    """An actor, and the tiles it holds in the order they were given; the first is the one it computes."""

    handle: Any
    started: Any
    ready: bool = False
    held: dict[Any, Tile] = field(default_factory=dict)


class _Pool:
    """The workers of a run, and the tiles that wait for one."""

    def __init__(self, store: GramStore, spec: JobSpec, tiles: Iterable[Tile], count: int) -> None:
        self._store = store
        self._spec = spec
        self._waiting = deque(tiles)
        self._count = min(count, len(self._waiting))
        self._workers: list[_Worker] = []
        self._failures: Counter[Tile] = Counter()
        self._failed_starts = 0

    def run(self) -> Iterator[TileReport]:
        """Compute all tiles."""
        import ray

        last_sign = time.monotonic()
        while self._waiting or any(worker.held for worker in self._workers):
            self._dispatch()
            references = {
                reference: worker
                for worker in self._workers
                for reference in (list(worker.held) if worker.ready else [worker.started])
            }
            done, _ = ray.wait(list(references), timeout=1.0)
            for reference in done:
                worker = references[reference]
                try:
                    result = ray.get(reference)
                except Exception as error:
                    self._failed(worker, reference, error)
                else:
                    if worker.ready:
                        del worker.held[reference]
                        yield result
                    worker.ready = True
                    self._failed_starts = 0
            if done or any(worker.ready for worker in self._workers):
                last_sign = time.monotonic()
            elif time.monotonic() - last_sign > CAPACITY_SECONDS:
                raise ClusterError(
                    f"none of {self._count} workers could start within {CAPACITY_SECONDS:.0f} s: the cluster has no "
                    "room left, see `ray status`. Finished tiles are kept: run again when it has"
                )

    def close(self) -> None:
        """Stop the workers."""
        import ray

        for worker in self._workers:
            with contextlib.suppress(Exception):
                ray.kill(worker.handle)

    def _dispatch(self) -> None:
        """Start the workers that are lacking, and fill up those that are ready, the emptiest first."""
        unserved = len(self._waiting)
        while len(self._workers) < self._count and unserved > sum(not worker.ready for worker in self._workers):
            self._workers.append(self._start())
        for depth in range(TILES_IN_FLIGHT):
            for worker in self._workers:
                if self._waiting and worker.ready and len(worker.held) == depth:
                    tile = self._waiting.popleft()
                    worker.held[worker.handle.compute.remote(tile)] = tile

    def _start(self) -> _Worker:
        import ray

        from equikernel.worker import TileWorker

        gram, workers = self._spec.gram, self._spec.workers
        actor: Any = ray.remote(TileWorker).options(num_cpus=workers.cpus, num_gpus=workers.gpus, max_restarts=0)
        handle = actor.remote(self._store, self._spec.network, gram.groups, gram.engine, gram.dtype, workers.cpus)
        return _Worker(handle, handle.ready.remote())

    def _failed(self, worker: _Worker, reference: Any, error: Exception) -> None:
        """Take a tile, or all tiles of a worker that died, back; raise where another attempt is no use."""
        import ray.exceptions

        if worker not in self._workers:  # its death was dealt with at the first of its tiles
            return
        reason = cause(error)
        tile = worker.held.get(reference)
        if isinstance(error, ray.exceptions.RayTaskError):
            worker.held.pop(reference, None)
        else:
            self._workers.remove(worker)
            computing, *queued = worker.held.values() if worker.held else [None]
            self._waiting.extendleft(reversed([one for one in queued if one is not None]))
            tile = computing
            log.warning("a worker died%s; its tiles go to another", f" at tile {tile}" if tile else "")
        if tile is None:
            self._failed_starts += 1
            if self._failed_starts >= ATTEMPTS:
                raise ClusterError(f"workers do not start: {_first_line(reason)}") from reason
            return
        if isinstance(reason, EquikernelError):
            raise reason from None
        self._failures[tile] += 1
        if not is_retryable(reason):
            raise TileFailedError(
                f"tile {tile} failed: {type(reason).__name__}: {_first_line(reason)}; finished tiles are kept"
            ) from reason
        if self._failures[tile] >= ATTEMPTS:
            if isinstance(reason, StoreError):
                raise reason from None
            raise TileFailedError(
                f"tile {tile} failed {ATTEMPTS} times, the last time because its worker died ({_first_line(reason)}); "
                "finished tiles are kept: run again, with fewer workers if they ran out of memory"
            ) from None
        self._waiting.appendleft(tile)
        if isinstance(reason, StoreError):
            time.sleep(2.0 ** self._failures[tile] / 2)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
