"""The driver: hands tiles to Ray actors, keeps them busy, and replaces those that die."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from equigram.errors import ClusterError, EquigramError, ResourceError, TileFailedError
from equikernel.errors import EquikernelError
from equikernel.memory import format_bytes

if TYPE_CHECKING:
    from equigram.plan import Tile
    from equigram.spec import JobSpec, WorkerSpec
    from equigram.store import GramStore
    from equikernel.worker import TileReport

TILES_IN_FLIGHT = 2
"""Tiles that a worker holds at most: one that it computes and one that waits."""

ATTEMPTS = 3
"""How many workers may die over a tile, and how many may fail to start in a row, before the run stops."""

CONNECT_SECONDS = 5.0
"""How long the machine at a cluster's address may take to accept a connection."""

ANSWER_SECONDS = 20.0
"""How long Ray may take to answer there."""

CAPACITY_SECONDS = 120.0
"""How long to wait for room for a single worker before the run stops."""

LOCAL_OBJECT_STORE = 128 * 2**20
"""Bytes of shared memory of a local cluster: only tile reports pass through it."""


@contextlib.contextmanager
def ray_session(workers: WorkerSpec) -> Iterator[None]:
    """A Ray connection for the time of a run: to ``workers.address``, or to a local cluster started for it.

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
        options: dict[str, Any] = {"address": workers.address, "log_to_driver": False, "logging_level": logging.ERROR}
        if workers.address is None:
            from equikernel.kernel import available_cores

            # Where Ray itself would put it, because paths of sockets must be short; but removed afterwards.
            folder = tempfile.TemporaryDirectory(
                prefix="equigram-", dir=os.environ.get("RAY_TMPDIR", "/tmp"), ignore_cleanup_errors=True
            )
            options |= {"address": "local", "num_cpus": available_cores(), "include_dashboard": False}
            options |= {"object_store_memory": LOCAL_OBJECT_STORE, "_temp_dir": stack.enter_context(folder)}
        stack.enter_context(_quiet_ray())
        stack.callback(ray.shutdown)
        terminate = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**options)
        except Exception as error:
            reason = _sentence(error.__cause__ or error)
            if workers.address is None:
                raise ClusterError(f"a local Ray cluster does not start: {reason}") from error
            raise ClusterError(
                f"no connection to the Ray cluster at workers.address = {workers.address!r}: {reason}; run on a "
                "machine of that cluster, or leave the address out to start a local one"
            ) from error
        if callable(terminate) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)  # Ray would print a stack and end the process
        yield


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


def check_address(workers: WorkerSpec) -> None:
    """Raise unless a Ray cluster answers at ``workers.address``, or this machine holds a worker if none is given.

    Raises:
      ClusterError: nobody answers there, or not as Ray does.
      ResourceError: a worker needs more cores than this machine has, or a GPU, and there is none.
    """
    address = workers.address
    if address is None:
        from equikernel.kernel import available_cores, has_gpu

        if workers.gpus and not has_gpu():
            raise ResourceError(
                f"workers.gpus = {workers.gpus:g}, but JAX finds no GPU on this machine; install JAX for its GPU (as "
                "with `pip install 'jax[cuda13]'`), name a cluster in workers.address, or leave out workers.gpus"
            )
        if workers.cpus > available_cores():
            raise ResourceError(
                f"a worker with workers.cpus = {workers.cpus} does not fit on this machine, which has "
                f"{available_cores()} CPUs; ask for less, or name a cluster in workers.address"
            )
        return
    remedy = "start one with `ray start --head`, correct the address, or leave it out to start a local one"
    nobody = f"workers.address is 'auto', but no Ray cluster answers on this machine or at RAY_ADDRESS; {remedy}"
    parts = urlsplit(address if "//" in address else f"//{address}")
    if address != "auto":
        try:
            socket.create_connection((parts.hostname, parts.port), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            raise ClusterError(
                f"no Ray cluster answers at workers.address = {address!r} ({error.strerror or error}); {remedy}"
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
            f"something at workers.address = {address!r} accepts connections, but does not answer as Ray does within "
            f"{ANSWER_SECONDS:g} s; {remedy}"
        ) from None
    if "AuthenticationError" in answer.stderr:
        raise ClusterError(
            f"the Ray cluster at workers.address = {address!r} refuses the token of this process; set "
            "RAY_AUTH_MODE=token, and the cluster's token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        )
    if answer.returncode and address == "auto":
        raise ClusterError(nobody)
    if answer.returncode:
        reason = answer.stderr.strip().rpartition("\n")[2]
        raise ClusterError(f"no Ray cluster answers at workers.address = {address!r} ({reason}); {remedy}")


def worker_count(workers: WorkerSpec, memory: int) -> int:
    """How many workers of ``memory`` bytes the connected cluster holds, or as many as were asked for.

    Raises:
      ResourceError: a single worker does not fit on any node.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needs = {"CPU": workers.cpus, "GPU": workers.gpus, "memory": memory}
    fit = sum(min(int(node.get(name, 0) // need) for name, need in needs.items() if need) for node in nodes)
    if fit == 0:
        most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in needs}
        raise ResourceError(
            f"a worker with workers.cpus = {workers.cpus}, workers.gpus = {workers.gpus:g} and {format_bytes(memory)} "
            f"of memory fits on no node of the Ray cluster; the largest have {most['CPU']:g} CPUs, {most['GPU']:g} "
            f"GPUs and {format_bytes(most['memory'])}; ask for less"
        )
    return fit if workers.count == "auto" else min(workers.count, fit)


def run_tiles(
    store: GramStore,
    spec: JobSpec,
    tiles: Iterable[Tile],
    count: int,
    memory: int,
    note: Callable[[str], None],
) -> Generator[TileReport]:
    """Compute tiles on ``count`` Ray actors; yields a report for each the moment it is stored, in any order.

    A worker that dies is replaced and its tiles are given to others. Needs a :func:`ray_session`.

    Args:
      store: the run, whose images are read and to which the workers write.
      spec: its job.
      tiles: what to compute.
      count: workers at most.
      memory: bytes that each may need; Ray places them accordingly.
      note: told of workers that die.

    Raises:
      EquikernelError: the images of a tile have no kernel.
      StoreError: a worker cannot read or write the store.
      TileFailedError: :data:`ATTEMPTS` workers died over a tile, or it failed in a way nobody expected.
      ClusterError: no worker could be started.
    """
    pool = _Pool(store, spec, tiles, count, memory, note)
    try:
        yield from pool.run()
    finally:
        pool.close()


@dataclass(eq=False)
class _Worker:
    """An actor, and the calls it has not answered yet, in their order: its start (``None``), then tiles."""

    handle: Any
    calls: dict[Any, Tile | None] = field(default_factory=dict)

    @property
    def starting(self) -> bool:
        return None in self.calls.values()


class _Pool:
    """The workers of a run, and the tiles that wait for one."""

    def __init__(
        self,
        store: GramStore,
        spec: JobSpec,
        tiles: Iterable[Tile],
        count: int,
        memory: int,
        note: Callable[[str], None],
    ) -> None:
        self._store = store
        self._spec = spec
        self._waiting = deque(tiles)
        self._count = count
        self._memory = memory
        self._note = note
        self._workers: list[_Worker] = []
        self._deaths: Counter[Tile] = Counter()
        self._failed_starts = 0

    def run(self) -> Iterator[TileReport]:
        """Compute all tiles."""
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, WorkerCrashedError

        last_sign = time.monotonic()
        while self._waiting or any(worker.calls and not worker.starting for worker in self._workers):
            self._dispatch()
            asked = {call: worker for worker in self._workers for call in worker.calls}
            ray.wait(list(asked), timeout=1.0)
            answered = set(ray.wait(list(asked), num_returns=len(asked), timeout=0)[0])
            for call, worker in asked.items():  # in the order of the calls: what came before a death did succeed
                if call not in answered or call not in worker.calls:
                    continue
                try:
                    report = ray.get(call)
                except (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
                    self._lost(worker, error)
                except RayError as error:
                    raise _raised_by_worker(worker.calls[call], error) from None
                else:
                    self._failed_starts = 0
                    if worker.calls.pop(call) is not None:
                        yield report
            if not all(worker.starting for worker in self._workers):
                last_sign = time.monotonic()
            elif time.monotonic() - last_sign > CAPACITY_SECONDS:
                raise ClusterError(
                    f"none of {self._count} workers could start within {CAPACITY_SECONDS:.0f} s: the cluster has no "
                    "room left, see `ray status`. Finished tiles are kept: run again when it has"
                )

    def close(self) -> None:
        """Stop the workers."""
        for worker in self._workers:
            self._stop(worker)

    def _dispatch(self) -> None:
        """Start the workers that are lacking, and fill up the others, the emptiest first."""
        starting = sum(worker.starting for worker in self._workers)
        for _ in range(min(self._count - len(self._workers), len(self._waiting) - starting)):
            self._workers.append(self._start())
        for depth in range(TILES_IN_FLIGHT):
            for worker in self._workers:
                # The last tiles wait for whoever is free first.
                scarce = depth > 0 and len(self._waiting) < len(self._workers)
                if self._waiting and not scarce and not worker.starting and len(worker.calls) == depth:
                    tile = self._waiting.popleft()
                    worker.calls[worker.handle.compute.remote(tile)] = tile

    def _start(self) -> _Worker:
        import ray

        from equikernel.worker import TileWorker

        gram, workers = self._spec.gram, self._spec.workers
        actor: Any = ray.remote(TileWorker).options(
            num_cpus=workers.cpus, num_gpus=workers.gpus, memory=self._memory, max_restarts=0
        )
        handle = actor.remote(self._store, self._spec.network, gram.groups, self._spec.engine, gram.dtype, workers.cpus)
        return _Worker(handle, {handle.ready.remote(): None})

    def _stop(self, worker: _Worker) -> None:
        import ray

        with contextlib.suppress(Exception):  # the cluster may be gone
            ray.kill(worker.handle)

    def _lost(self, worker: _Worker, error: Exception) -> None:
        """Give the tiles of a worker that died to others.

        Raises:
          TileFailedError: the tile that it was computing, the first of its calls, has cost too many workers.
          ClusterError: too many workers died at their start.
        """
        self._workers.remove(worker)
        self._stop(worker)
        tile, *queued = worker.calls.values()
        worker.calls.clear()
        self._waiting.extendleft(one for one in reversed(queued) if one is not None)
        if tile is None:
            self._failed_starts += 1
            if self._failed_starts >= ATTEMPTS:
                raise ClusterError(
                    f"workers do not start: {_sentence(error)}; every node of the cluster needs the same equigram"
                ) from None
            return
        self._deaths[tile] += 1
        if self._deaths[tile] >= ATTEMPTS:
            raise TileFailedError(
                f"tile {tile} failed {ATTEMPTS} times, each time because its worker died ({_sentence(error)}); "
                "finished tiles are kept: run again, with fewer workers if they ran out of memory"
            ) from None
        self._waiting.appendleft(tile)
        self._note(f"a worker died at tile {tile}; another one takes over")


def _raised_by_worker(tile: Tile | None, error: Any) -> Exception:
    """What to raise for an error that a worker raised: it would come again.

    Storage that fails for a moment never gets here: the worker itself is patient with it.
    """
    reason = getattr(error, "cause", error)
    if isinstance(reason, (EquikernelError, EquigramError)):
        return reason
    return TileFailedError(f"tile {tile} failed: {type(reason).__name__}: {_sentence(reason)}; finished tiles are kept")


def _sentence(error: BaseException) -> str:
    """What an error says, in a line: the end of a remote traceback, else the text without Ray's table of ids."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    if any("Traceback (" in line or "ray::" in line for line in lines):
        lines = lines[-1:]
    return textwrap.shorten(" ".join(lines), 400, placeholder=" …") or type(error).__name__
