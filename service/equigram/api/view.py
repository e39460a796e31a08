"""What the events of a run say of it: its tiles, its workers, its pace."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from equigram.api.models import Progress, TileCounts, Worker
from equigram.plan import Tile, Tiling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equigram.api.journal import Entry
    from equigram.plan import Part
    from equigram.store import GramStore

MISSING, COMPUTING, STORED, FAILED = range(4)
"""States of a tile: not there, in the hands of a worker, in the store, failed and tried again soon."""

PACE_SECONDS = 60.0
"""Time over which the pace is measured."""

MOST_NOTES = 100
"""Notes that are kept of a run."""

Fields: TypeAlias = dict[str, Any]


class TileMap:
    """The states of the tiles of a run.

    Args:
      tiling: the tiles.
      passes: each tile is computed once in each.
    """

    def __init__(self, tiling: Tiling, passes: int) -> None:
        self.tiling, self.passes = tiling, passes
        parts: tuple[Part, ...] = ("gram", "cross") if tiling.test else ("gram",)
        self._stored: dict[Part, NDArray[np.bool_]] = {
            part: np.zeros((passes, *tiling.blocks(part)), dtype=np.bool_) for part in parts
        }
        """Whether a tile is stored, ``[pass, row, col]``; of the train matrix the upper triangle counts."""
        self._pairs = 0
        self._pass = 0
        """In which pass tiles are computed now."""
        self._holders: dict[Tile, set[int]] = {}
        self._failed: set[Tile] = set()

    @classmethod
    def of(cls, store: GramStore) -> TileMap:
        """That of a store, as a listing shows it."""
        passes = store.passes()
        found = cls(store.info.tiling, len(passes))
        for number, (_, part) in enumerate(passes):
            done = part.finished_tiles()
            found._pairs += done.pairs
            for tile in done:
                found._stored[tile.part][number, tile.row, tile.col] = True
            if len(done) == len(found.tiling) and number + 1 < len(passes):
                found._pass = number + 1
        return found

    def counts(self) -> TileCounts:
        """How many there are and will be."""
        return TileCounts(
            tiles=self.passes * len(self.tiling),
            finished=sum(int(one.sum()) for one in self._stored.values()),
            pairs=self.passes * self.tiling.total_pairs,
            finished_pairs=self._pairs,
        )

    def states(self, part: Part) -> NDArray[np.uint8]:
        """The state of each tile ``(row, col)``; of the train matrix both triangles are filled."""
        found = np.where(self._stored[part].all(axis=0), STORED, MISSING).astype(np.uint8)
        for tiles, state in ((self._holders, COMPUTING), (self._failed, FAILED)):
            for tile in tiles:
                if tile.part == part:
                    found[tile.row, tile.col] = state
        return np.maximum(found, found.T) if part == "gram" else found

    def apply(self, kind: str, event: Fields) -> None:
        """Take an event into account; the same one again changes nothing."""
        if kind == "WorkerLost":
            self._forget(int(event["worker"]))
        elif kind in ("ComputationStarted", "ComputationEnded"):
            self.rest()
            self._pass = min(int(event.get("number", self._pass)), self.passes - 1)
        tile = Tile.parse(str(event.get("tile", "")))
        if tile is None or tile.part not in self._stored:
            return
        stored = self._stored[tile.part][self._pass]
        if tile.row >= stored.shape[0] or tile.col >= stored.shape[1]:
            return  # of images that were added since
        if kind in ("TileStarted", "TileCopied") and not stored[tile.row, tile.col]:
            self._holders.setdefault(tile, set()).add(int(event["worker"]))
            self._failed.discard(tile)
        elif kind == "TileFailed":
            self._holders.pop(tile, None)
            self._failed.add(tile)
        elif kind == "TileFinished":
            self._holders.pop(tile, None)
            self._failed.discard(tile)
            if not stored[tile.row, tile.col]:
                stored[tile.row, tile.col] = True
                self._pairs += int(event["pairs"])

    def rest(self) -> None:
        """Nobody computes any more, or tries anything again."""
        self._holders.clear()
        self._failed.clear()

    def _forget(self, worker: int) -> None:
        for tile in [tile for tile, holders in self._holders.items() if worker in holders]:
            self._holders[tile].discard(worker)
            if not self._holders[tile]:
                del self._holders[tile]


@dataclass
class View:
    """What was heard of an attempt."""

    tiles: TileMap | None = None
    progress: Progress | None = None
    notes: list[str] = field(default_factory=list)
    workers: dict[int, Worker] = field(default_factory=dict)
    _pace: deque[tuple[datetime, int]] = field(default_factory=deque)

    def apply(self, entry: Entry, listing: Callable[[], TileMap | None]) -> str:
        """Take an event into account.

        Args:
          entry: the event.
          listing: the tiles as the store has them now; asked when a computation begins or ends, or nothing is known.

        Returns:
          Its kind.
        """
        event = json.loads(entry.text)
        kind = str(event["event"])
        if kind in ("ComputationStarted", "ComputationEnded") or (self.tiles is None and "tile" in event):
            self.tiles = listing() or self.tiles
        if self.tiles is not None:
            self.tiles.apply(kind, event)
        number = event.get("worker")
        match kind:
            case "Note":
                self.notes = [*self.notes, str(event["text"])][-MOST_NOTES:]
            case "Progress":
                stage = "computing tiles" if event["what"] == "pairs" else str(event["what"])
                self.progress = Progress(stage=stage, done=event["done"], total=event["total"], detail=event["detail"])
            case "ComputationStarted":
                self.workers.clear()
                self._pace.clear()
            case "WorkerStarted":
                self.workers[number] = Worker(
                    number=number, place=event["place"], processor=event["processor"], tiles=0, pairs=0, lost=None
                )
            case "WorkerLost" | "WorkerReleased" if number in self.workers:
                reason = event.get("reason", "others have its share of the cluster")
                self.workers[number] = self.workers[number].model_copy(update={"lost": reason})
            case "TileFinished":
                when = datetime.fromisoformat(event["time"])
                self._pace.append((when, int(event["pairs"])))
                while (when - self._pace[0][0]).total_seconds() > PACE_SECONDS:
                    self._pace.popleft()
                if worker := self.workers.get(number):
                    more = {"tiles": worker.tiles + 1, "pairs": worker.pairs + int(event["pairs"])}
                    self.workers[number] = worker.model_copy(update=more)
            case _:
                pass
        return kind

    def pairs_per_second(self, now: datetime) -> float | None:
        """Of the last minute; ``None`` where too little was heard."""
        recent = [(when, pairs) for when, pairs in self._pace if (now - when).total_seconds() <= PACE_SECONDS]
        if len(recent) < 2:
            return None
        span = max((now - recent[0][0]).total_seconds(), 1e-3)
        return sum(pairs for _, pairs in recent[1:]) / span
