"""Tiles in this process, one after the other: for jobs that take less time than a cluster needs to start."""

from __future__ import annotations

import os
import time
from collections import deque
from typing import TYPE_CHECKING

from equigram.dispatch import Done, Failed, Started

if TYPE_CHECKING:
    from equigram.dispatch import Answer
    from equigram.plan import Tile
    from equikernel.worker import TileWorker


class InProcess:
    """An :class:`equigram.dispatch.Executor` of a single worker, which is this process.

    Args:
      worker: what computes the tiles.
    """

    def __init__(self, worker: TileWorker) -> None:
        self._worker = worker
        self._waiting: deque[tuple[int, Tile]] = deque()
        self._answers: list[Answer] = []
        self._started = 0

    def capacity(self) -> int:
        """One."""
        return 1

    def limit(self) -> int | None:
        """None: this process shares with nobody."""
        return None

    def start(self) -> int:
        """Be ready at once."""
        number, self._started = self._started, self._started + 1
        self._answers.append(Started(number, f"process {os.getpid()}", self._worker.processor))
        return number

    def submit(self, worker: int, tile: Tile) -> None:
        """Put a tile behind those that wait."""
        self._waiting.append((worker, tile))

    def stop(self, worker: int, *, hung: bool = False) -> None:
        """Forget the tiles that wait."""
        self._waiting = deque((number, tile) for number, tile in self._waiting if number != worker)

    def answers(self, timeout: float) -> list[Answer]:
        """Compute a tile, if there is nothing else to say; else sleep."""
        if not self._answers and self._waiting:
            number, tile = self._waiting.popleft()
            try:
                self._answers.append(Done(number, tile, self._worker.compute(tile)))
            except Exception as error:
                self._answers.append(Failed(number, tile, error))
        elif not self._answers:
            time.sleep(timeout)
        answers, self._answers = self._answers, []
        return answers

    def now(self) -> float:
        """Of the monotonic clock."""
        return time.monotonic()
