"""Which worker computes which tile, and what happens when something fails: all decisions of a run, and no cluster.

Tiles are handed out in strips (:meth:`equigram.plan.Tiling.strips`), so that a worker keeps the images it has. Each
worker holds two tiles: it computes one, and reads the images of the other or writes what it finished before. At the end
workers that are idle take tiles from the strips of others, then compute what others have not finished as well, and
whoever is first counts: a tile has the same bits wherever it is computed.
"""

from __future__ import annotations

import enum
import heapq
import textwrap
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

from equigram.errors import (
    ClusterError,
    DamagedArrayError,
    DamagedTileError,
    EquigramError,
    StoreError,
    StoreMismatchError,
    TileFailedError,
)
from equigram.events import (
    Listener,
    TileCopied,
    TileFailed,
    TileFinished,
    TileStarted,
    WorkerLost,
    WorkerReleased,
    WorkerStarted,
)
from equikernel.errors import EquikernelError, MemoryLimitError

if TYPE_CHECKING:
    from equigram.plan import Tile
    from equikernel.worker import TileReport

TILES_IN_FLIGHT = 2
"""Tiles that a worker holds at most."""

ATTEMPTS = 3
"""How often a tile may fail, and how many workers in a row may fail to start, before the run stops."""

CAPACITY_SECONDS = 120.0
"""How long to wait for room for a single worker before the run stops."""

LOOK_SECONDS = 10.0
"""Time between two looks at how many workers the cluster holds."""

COPY_AFTER = 1.5
"""A tile that takes so many times as long as the mean is computed by an idle worker as well."""

HUNG_TILES = 10
"""A worker is never taken for hung before it took so many times as long as the mean tile."""


@dataclass(frozen=True)
class Started:
    """A worker is ready, on a kind of processor, at a place that tells people where that is."""

    worker: int
    place: str
    processor: str


@dataclass(frozen=True)
class Done:
    """A worker has stored a tile."""

    worker: int
    tile: Tile
    report: TileReport


@dataclass(frozen=True)
class Failed:
    """A worker raised an error over a tile, and is still there."""

    worker: int
    tile: Tile
    error: Exception


@dataclass(frozen=True)
class Died:
    """A worker is not there any more, or never was; ``node`` if the machine went with it."""

    worker: int
    reason: str
    node: bool = False


Answer: TypeAlias = Started | Done | Failed | Died


class Executor(Protocol):
    """Where tiles are computed: in this process, on Ray, or in a simulation."""

    def capacity(self) -> int:
        """How many workers there should be now."""

    def limit(self) -> int | None:
        """How many workers there may be at most now; the rest is let go. ``None``: the run need not share."""

    def start(self) -> int:
        """Begin to start a worker; its number, one after the other from 0."""

    def submit(self, worker: int, tile: Tile) -> None:
        """Hand a tile to a worker that has started."""

    def stop(self, worker: int, *, hung: bool = False) -> None:
        """End a worker at once, also one that does not react; it answers no more."""

    def answers(self, timeout: float) -> list[Answer]:
        """What the workers said since, in the order in which they did; waits for ``timeout`` seconds at most."""

    def now(self) -> float:
        """Seconds since any moment."""


class Verdict(enum.Enum):
    """What to do about the error of a worker."""

    STOP = "it would come again everywhere"
    RETRY = "the infrastructure's: it may be gone in a while, or elsewhere"
    REPLACE = "the worker's: as RETRY, and the worker may be broken"


def judge(error: BaseException) -> Verdict:
    """Whose an error is: the data's and the job's come again, the infrastructure's may not.

    Storage (:class:`StoreError`, any :class:`OSError`) may come back. Errors that nobody expects (of a device, of a
    library) are taken for those of the worker; if they are not, they come :data:`ATTEMPTS` times.
    """
    if isinstance(error, (DamagedTileError, DamagedArrayError, StoreMismatchError)):
        return Verdict.STOP
    if isinstance(error, (MemoryLimitError, MemoryError)):
        return Verdict.REPLACE
    if isinstance(error, (StoreError, OSError)):
        return Verdict.RETRY
    return Verdict.STOP if isinstance(error, (EquigramError, EquikernelError)) else Verdict.REPLACE


def pause(failures: int) -> float:
    """Seconds to wait before a tile is tried again that has failed so often: 1, 4, 16, … and 60 at most."""
    return min(60.0, 4.0 ** (failures - 1))


@dataclass(eq=False)
class _Worker:
    number: int
    heard: float
    """When it last said something, or was given something while it had nothing."""
    ready: bool = False
    tiles: dict[Tile, float] = field(default_factory=dict)
    """The tiles that it holds, the oldest first, and since when it may be at each."""
    strip: deque[Tile] = field(default_factory=deque)
    """Tiles that are meant for it."""
    leaving: bool = False
    """It is given no more tiles, and ends when it has finished those that it holds."""


class Dispatcher:
    """Has tiles computed.

    Args:
      strips: the tiles, in the order in which they are handed out; read as they are needed.
      executor: where.
      listener: told of everything.
      hung_after: seconds without a sign after which a worker that has a tile is replaced.
      wait: seconds without a single worker after which the run stops.
    """

    def __init__(
        self,
        strips: Iterable[list[Tile]],
        executor: Executor,
        listener: Listener,
        hung_after: float,
        wait: float | None = None,
    ) -> None:
        self._strips = iter(strips)
        self._exhausted = False
        self._next: deque[deque[Tile]] = deque()
        """Strips that were read, or given back."""
        self._waiting = 0
        """Tiles in these and in the strips of the workers."""
        self._executor = executor
        self._tell = listener
        self._hung_after = hung_after
        self._wait = CAPACITY_SECONDS if wait is None else wait
        self._workers: dict[int, _Worker] = {}
        self._open: dict[_Worker, None] = {}
        """The workers that hold fewer tiles than they may, as an ordered set."""
        self._holders: dict[Tile, list[_Worker]] = {}
        """Who holds each tile that was handed out and is not finished."""
        self._failures: dict[Tile, int] = {}
        self._again: list[tuple[float, Tile]] = []
        """Tiles that are tried again, and when: a heap."""
        self._starting = 0
        """Workers that are not ready yet."""
        self._failed_starts = 0
        self._finished, self._seconds = 0, 0.0
        self._target = 0

    def run(self) -> Generator[TileReport]:
        """Compute all tiles; yields a report for each the moment it is stored, in any order.

        Raises:
          EquikernelError, EquigramError: of a tile, where it would come again.
          TileFailedError: a tile failed :data:`ATTEMPTS` times.
          ClusterError: no worker could be started.
        """
        room, looked = self._executor.now(), -LOOK_SECONDS
        try:
            while True:
                now = self._executor.now()
                if now - looked >= LOOK_SECONDS:
                    looked, self._target = now, max(self._executor.capacity(), 1)
                    self._replace_hung(now)
                    self._share()
                self._let_leave()
                self._read_ahead()
                if not (self._waiting or self._holders or self._again):
                    return
                self._hand_out(now)
                self._start_workers(now)
                for answer in self._executor.answers(self._patience(now)):
                    report = self._hear(answer, self._executor.now())
                    if report is not None:
                        yield report
                if len(self._workers) > self._starting:
                    room = self._executor.now()
                elif self._executor.now() - room > self._wait:
                    raise ClusterError(
                        f"none of {len(self._workers)} workers could start within {self._wait:.0f} s: the cluster has "
                        "no room left, see `ray status`. Finished tiles are kept: run again when it has, or set "
                        "resources.wait to wait longer"
                    )
        finally:
            for worker in self._workers.values():
                self._executor.stop(worker.number)

    # ------------------------------------------------------------------ handing out

    def _read_ahead(self) -> None:
        """Read as many strips as tell whether there is something for everyone."""
        while not self._exhausted and self._waiting <= TILES_IN_FLIGHT * self._target:
            strip = next(self._strips, None)
            if strip is None:
                self._exhausted = True
            else:
                self._next.append(deque(strip))
                self._waiting += len(strip)

    def _start_workers(self, now: float) -> None:
        wanted = min(self._target - len(self._workers), self._waiting + len(self._again) - self._starting)
        for _ in range(wanted):
            number = self._executor.start()
            self._starting += 1
            self._workers[number] = _Worker(number, now)

    def _share(self) -> None:
        """Choose the workers that leave, where there are more than there may be: those with the fewest tiles."""
        limit = self._executor.limit()
        surplus = 0 if limit is None else max(0, len(self._workers) - max(limit, 1))
        by_tiles = sorted(self._workers.values(), key=lambda worker: (worker.ready, len(worker.tiles)))
        for place, worker in enumerate(by_tiles):
            worker.leaving = place < surplus
            if worker.leaving and worker.strip:
                self._next.appendleft(worker.strip)
                worker.strip = deque()
            self._offer(worker)

    def _let_leave(self) -> None:
        """End the workers that leave and hold no tile any more."""
        for worker in [one for one in self._workers.values() if one.leaving and not one.tiles]:
            del self._workers[worker.number]
            self._starting -= not worker.ready
            self._executor.stop(worker.number)
            self._tell(WorkerReleased(worker.number))

    def _offer(self, worker: _Worker) -> None:
        """Have a worker among those that are given tiles if it may have some."""
        if worker.ready and not worker.leaving and len(worker.tiles) < TILES_IN_FLIGHT:
            self._open[worker] = None
        else:
            self._open.pop(worker, None)

    def _hand_out(self, now: float) -> None:
        """Fill up the workers, the emptiest first."""
        for depth in range(TILES_IN_FLIGHT):
            for worker in [one for one in self._open if len(one.tiles) == depth]:
                tile = self._take(worker, now)
                if tile is not None:
                    self._tell(TileStarted(tile, worker.number))
                    self._give(worker, tile, now)
        idle = [worker for worker in self._open if not worker.tiles]
        if idle and not self._waiting:
            for worker, tile in zip(idle, self._stragglers(now), strict=False):
                self._tell(TileCopied(tile, worker.number))
                self._give(worker, tile, now)

    def _take(self, worker: _Worker, now: float) -> Tile | None:
        """The next tile for a worker, if it should have one."""
        if self._again and self._again[0][0] <= now:  # alone, so that it is known what a worker died of
            return None if worker.tiles else heapq.heappop(self._again)[1]
        ready = len(self._workers) - self._starting
        scarce = self._exhausted and self._waiting < ready  # the last ones go to who is free first
        if not self._waiting or (worker.tiles and scarce) or any(tile in self._failures for tile in worker.tiles):
            return None
        if not worker.strip and self._next:
            worker.strip = self._next.popleft()
        self._waiting -= 1
        if worker.strip:
            return worker.strip.popleft()
        longest = max(self._workers.values(), key=lambda one: len(one.strip))
        return longest.strip.pop()

    def _stragglers(self, now: float) -> Iterator[Tile]:
        """The tiles that a worker waits to compute, or takes long to, and no other one has; the oldest first."""
        mean = self._seconds / self._finished if self._finished else float("inf")
        late = []
        for tile, (holder, *others) in self._holders.items():
            since = holder.tiles[tile]
            queued = tile != next(iter(holder.tiles))
            if not others and tile not in self._failures and (queued or now - since > COPY_AFTER * mean):
                late.append((since, tile))
        return (tile for _, tile in sorted(late))

    def _give(self, worker: _Worker, tile: Tile, now: float) -> None:
        if not worker.tiles:
            worker.heard = now
        worker.tiles[tile] = now
        self._holders.setdefault(tile, []).append(worker)
        self._offer(worker)
        self._executor.submit(worker.number, tile)

    def _patience(self, now: float) -> float:
        """Seconds until there may be something to do without an answer; what is due already waits for a worker."""
        wait = self._again[0][0] - now if self._again else 0.0
        return wait if 0 < wait < 1 else 1.0

    # ------------------------------------------------------------------ hearing

    def _hear(self, answer: Answer, now: float) -> TileReport | None:
        """Act on an answer; the report of a tile that is finished for the first time."""
        worker = self._workers.get(answer.worker)
        if worker is None:
            return None
        worker.heard = now
        match answer:
            case Started(number, place, processor):
                worker.ready = True
                self._starting -= 1
                self._failed_starts = 0
                self._offer(worker)
                self._tell(WorkerStarted(number, place, processor))
            case Done(number, tile, report):
                self._let_go(worker, tile, now)
                if self._holders.pop(tile, None) is not None:  # else somebody else was faster
                    self._failures.pop(tile, None)
                    self._finished += 1
                    seconds = sum(report.spent)
                    self._seconds += seconds
                    self._tell(TileFinished(tile, number, report.pairs, seconds, report.processor, *report.spent))
                    return report
            case Failed(_, tile, error):
                verdict = judge(error)
                if verdict is Verdict.STOP:
                    raise error
                self._let_go(worker, tile, now)
                if verdict is Verdict.REPLACE:
                    self._lose(worker, f"it raised {type(error).__name__}", now)
                if self._drop(worker, tile):
                    self._try_again(tile, worker, f"{type(error).__name__}: {sentence(error)}", now)
            case Died(_, reason, node):
                if not worker.ready and not node:
                    self._failed_starts += 1
                    if self._failed_starts >= ATTEMPTS:
                        raise ClusterError(
                            f"workers do not start: {reason}; every node of the cluster needs the same equigram"
                        )
                self._lose(worker, reason, now, suspects=not node)
        return None

    def _let_go(self, worker: _Worker, tile: Tile, now: float) -> None:
        """A worker has nothing to do with a tile any more, and may be at its next one."""
        del worker.tiles[tile]
        self._offer(worker)
        for following in worker.tiles:
            worker.tiles[following] = now

    def _drop(self, worker: _Worker, tile: Tile) -> bool:
        """Take a tile from a worker; whether nobody else has it now."""
        holders = self._holders.get(tile, [])
        if worker in holders:
            holders.remove(worker)
            if not holders:
                del self._holders[tile]
                return True
        return False

    def _lose(self, worker: _Worker, reason: str, now: float, *, suspects: bool = False, hung: bool = False) -> None:
        """Give the tiles of a worker that is gone to others.

        Args:
          suspects: its tiles may have been the reason.
          hung: it is not gone, but does not react.
        """
        del self._workers[worker.number]
        self._starting -= not worker.ready
        self._open.pop(worker, None)
        self._executor.stop(worker.number, hung=hung)
        self._tell(WorkerLost(worker.number, reason, len(worker.tiles)))
        self._next.appendleft(worker.strip)
        for tile in worker.tiles:
            if self._drop(worker, tile):
                if suspects:
                    self._try_again(tile, worker, f"its worker died ({reason})", now)
                else:
                    self._next[0].appendleft(tile)
                    self._waiting += 1
        if not self._next[0]:
            self._next.popleft()

    def _try_again(self, tile: Tile, worker: _Worker, reason: str, now: float) -> None:
        """Hand a tile out again after a while.

        Raises:
          TileFailedError: it has failed too often.
        """
        failures = self._failures[tile] = self._failures.get(tile, 0) + 1
        if failures >= ATTEMPTS:
            raise TileFailedError(
                f"tile {tile} failed {failures} times, the last time because of {reason}; finished tiles are kept: "
                "mend that and run again"
            )
        wait = pause(failures)
        heapq.heappush(self._again, (now + wait, tile))
        self._tell(TileFailed(tile, worker.number, reason, failures, wait))

    def _replace_hung(self, now: float) -> None:
        patience = max(self._hung_after, HUNG_TILES * self._seconds / max(self._finished, 1))
        for worker in list(self._workers.values()):
            if worker.tiles and now - worker.heard > patience:
                self._lose(worker, f"it gave no sign for {now - worker.heard:.0f} s", now, suspects=True, hung=True)


def sentence(error: BaseException) -> str:
    """What an error says, in a line: the end of a remote traceback, else the text without Ray's table of ids."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    if any("Traceback (" in line or "ray::" in line for line in lines):
        lines = lines[-1:]
    return textwrap.shorten(" ".join(lines), 400, placeholder=" …") or type(error).__name__
