"""An executor in virtual time: shows what the dispatcher decides, and how it scales, on clusters that do not exist."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from equigram.dispatch import Died, Done, Failed, Started
from equikernel.worker import Spent, TileReport

if TYPE_CHECKING:
    from equigram.dispatch import Answer
    from equigram.plan import Tile

Fault = Exception | str | None
"""What happens instead of a tile: an error that is raised, ``"dies"``, ``"node"`` or ``"hangs"``; or nothing."""


@dataclass(eq=False)
class _Machine:
    free: float
    """When it has computed what it was given."""
    alive: bool = True
    hangs: bool = False
    held: int = 0
    """Tiles that it was given and has not answered for."""


class Simulated:
    """An :class:`equigram.dispatch.Executor` of workers that only take their time.

    Args:
      tile_seconds: how long a worker computes a tile.
      workers: how many there should be at a time.
      fault: what happens to a worker at a tile, halfway.
      limit: how many workers there may be at most at a time.
      start_seconds: from asking for a worker until it is ready.
      submit_seconds, answer_seconds: what the driver takes to hand out a tile, and to take an answer.
      write_seconds: from a computed tile to the answer; meanwhile the next one is computed.
    """

    def __init__(
        self,
        tile_seconds: Callable[[int, Tile], float],
        workers: Callable[[float], int],
        fault: Callable[[int, Tile], Fault] = lambda worker, tile: None,
        *,
        limit: Callable[[float], int | None] = lambda now: None,
        start_seconds: float = 1.0,
        submit_seconds: float = 0.0,
        answer_seconds: float = 0.0,
        write_seconds: float = 0.0,
    ) -> None:
        self._tile_seconds, self._workers, self._fault = tile_seconds, workers, fault
        self._limit = limit
        self._start_seconds, self._write_seconds = start_seconds, write_seconds
        self._submit_seconds, self._answer_seconds = submit_seconds, answer_seconds
        self._machines: list[_Machine] = []
        self._to_come: list[tuple[float, int, Answer]] = []
        self._order = itertools.count()
        self._clock = 0.0
        self.looks = 0
        """How often the dispatcher waited for answers."""
        self.most_in_flight = 0
        """The most tiles that a worker had at the same time."""
        self.computed: list[tuple[int, Tile]] = []
        """What was handed to whom."""

    def capacity(self) -> int:
        """How many workers there should be now."""
        return self._workers(self._clock)

    def limit(self) -> int | None:
        """How many workers there may be at most now."""
        return self._limit(self._clock)

    def start(self) -> int:
        """A worker that is ready after a while, if there is room for it."""
        number = len(self._machines)
        self._machines.append(_Machine(self._clock + self._start_seconds))
        if sum(machine.alive for machine in self._machines) <= self.capacity():
            self._say(self._clock + self._start_seconds, Started(number, f"machine {number}", "simulated"))
        return number

    def submit(self, worker: int, tile: Tile) -> None:
        """Have a tile computed when the worker has computed those before."""
        self._clock += self._submit_seconds
        self.computed.append((worker, tile))
        machine, seconds = self._machines[worker], self._tile_seconds(worker, tile)
        machine.held += 1
        self.most_in_flight = max(self.most_in_flight, machine.held)
        if not machine.alive or machine.hangs:
            return
        began = max(machine.free, self._clock)
        machine.free = began + seconds
        fault = self._fault(worker, tile)
        if fault == "hangs":
            machine.hangs = True
        elif isinstance(fault, Exception):
            self._say(began + seconds / 2, Failed(worker, tile, fault))
        elif fault is not None:
            machine.hangs = True  # what comes behind is lost
            self._say(began + seconds / 2, Died(worker, "it was killed", node=fault == "node"))
        else:
            report = TileReport(tile, 1, Spent(0.0, 0.0, seconds, 0.0), "simulated")
            self._say(machine.free + self._write_seconds, Done(worker, tile, report))

    def _say(self, when: float, answer: Answer) -> None:
        heapq.heappush(self._to_come, (when, next(self._order), answer))

    def stop(self, worker: int, *, hung: bool = False) -> None:
        """Forget a worker, and what it would have said."""
        self._machines[worker].alive = False

    def answers(self, timeout: float) -> list[Answer]:
        """Go on in time until somebody says something."""
        self.looks += 1
        end = self._clock + timeout
        if self._to_come and self._to_come[0][0] <= end:
            self._clock = max(self._clock, self._to_come[0][0])
        else:
            self._clock = end
        said = []
        while self._to_come and self._to_come[0][0] <= self._clock:
            answer = heapq.heappop(self._to_come)[2]
            if self._machines[answer.worker].alive:
                said.append(answer)
                self._machines[answer.worker].held -= isinstance(answer, (Done, Failed))
                self._clock += self._answer_seconds
        return said

    def now(self) -> float:
        """Virtual seconds since the beginning."""
        return self._clock
