"""What a person sees of a run: notes and progress while it goes on, tables of what it will cost and what came out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from equigram.events import ComputationStarted, Note, Progress, TileCopied, TileFailed, TileFinished, WorkerLost

if TYPE_CHECKING:
    from collections.abc import Set

    from rich.console import Console

    from equigram.events import Event
    from equigram.plan import Part, Tile, Tiling
    from equigram.solve.stage import Result

LINE_SECONDS = 30.0
"""Time between two lines about the same stage where there is no terminal to draw a bar on."""

WORTH_A_LINE = 1.0
"""Seconds that a stage takes at least to be told about where there is no terminal."""

STAGES = {"pairs": "computing image pairs", "solve": "solving regressions", "images": "predicting images"}
"""What a person calls a stage, where its name is not that already; the last word is what is counted."""

MAP_CELLS = 48
"""Rows and columns of a map of tiles at most."""


@dataclass
class _Stage:
    """Something that takes a while, and how far it is."""

    title: str
    bar: TaskID
    since: float
    """When it was first heard of."""
    first: int
    """Things that were done by then."""
    heard: float
    """When it was last heard of."""
    told: float
    """When a line was last written about it."""
    done: int
    total: int
    detail: str = ""
    """What is said instead of the speed."""

    @property
    def unit(self) -> str:
        """What is counted."""
        return "columns" if self.title.startswith("factorise") else self.title.split()[-1]

    @property
    def finished(self) -> bool:
        return self.done >= self.total

    @property
    def seconds(self) -> float:
        return self.heard - self.since

    def speed(self, now: float) -> str:
        """Things per second, and the time left or, at the end, taken: ``"1,234 pairs/s, 12 min left"``."""
        if self.detail:
            return self.detail
        if self.done == self.first or not self.seconds:
            return ""
        rate = (self.done - self.first) / self.seconds
        per_second = f"{f'{rate:,.0f}' if rate >= 10 else f'{rate:.2g}'} {self.unit}/s"
        if self.finished:
            return f"{per_second}, took {duration(self.seconds)}"
        left = (self.total - self.done) / rate - (now - self.heard)
        return f"{per_second}, {duration(max(left, 0))} left"


class _Speed(ProgressColumn):
    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock

    def render(self, task: Task) -> Text:
        stage: _Stage | None = task.fields.get("stage")
        return Text(stage.speed(self._clock()) if stage else "")


class Screen:
    """Tells a person what a run does: on a terminal with bars, elsewhere with a plain line now and then.

    Args:
      console: where to.
      clock: seconds since any moment.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._notes: set[str] = set()
        self._stages: dict[str, _Stage] = {}
        self._bars = Bars(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            _Speed(clock),
            console=console,
            disable=not console.is_terminal or console.is_dumb_terminal,
        )

    def __enter__(self) -> Screen:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Show an event, if it is one for people."""
        match event:
            case Note(text):
                self._note(text)
            case Progress(what, done, total, detail):
                self._progress(what, done, total, detail)
            case ComputationStarted():
                if event.missing_tiles < event.tiles:
                    done = event.tiles - event.missing_tiles
                    self._note(f"{done:,} of {event.tiles:,} tiles are in the store already")
                workers = "1 worker" if event.workers == 1 else f"{event.workers:,} workers"
                self._note(f"starting {workers}" if event.workers else "computing in this process")
            case WorkerLost(worker, reason, tiles) if tiles:
                self._note(f"worker {worker} was lost: {reason}; others take over what it had")
            case TileFailed():
                self._note(f"tile {event.tile} failed: {event.reason}; again in {duration(event.pause)}")

    def _note(self, text: str) -> None:
        """One sentence that a person should know, once."""
        if text not in self._notes:
            self._notes.add(text)
            self._console.print(Text(f"note: {text}", style="yellow"), soft_wrap=True)

    def _progress(self, what: str, done: int, total: int, detail: str) -> None:
        """``done`` of ``total`` things of a stage are done."""
        now = self._clock()
        stage = self._stages.get(what)
        if stage is not None and stage.finished and done >= total:
            return
        if stage is None or stage.finished:
            title = STAGES.get(what, what)
            bar = self._bars.add_task(title, total=total)
            stage = self._stages[what] = _Stage(title, bar, now, done, now, now, done, total)
        stage.done, stage.total, stage.heard, stage.detail = done, total, now, detail
        self._bars.update(stage.bar, completed=done, total=total, stage=stage)
        due = stage.seconds >= WORTH_A_LINE if stage.finished else now - stage.told >= LINE_SECONDS
        if self._bars.disable and due:
            stage.told = now
            share = f"{done:,} of {total:,}" + ("" if stage.finished else f" ({done / total:.0%})")
            line = f"{stage.title}: {detail or f'{share}, {stage.speed(now)}'}"
            self._console.print(line.rstrip(", "), soft_wrap=True)


def duration(seconds: float) -> str:
    """A time for people: ``"0.3 s"``, ``"45 s"``, ``"12 min"``, ``"3.5 h"``, ``"2.1 days"``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    if seconds < 119.5 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def summary(history: Iterable[Mapping[str, Any]]) -> str:
    """What happened to a run, from its history: ``"2 computations, the last until 2026-01-31 12:00 UTC; ..."``."""
    count: Counter[str] = Counter()
    seconds, kernel_seconds, last = 0.0, 0.0, ""
    for event in history:
        count[str(event.get("event"))] += 1
        last = str(event.get("time", last))
        if event.get("event") == TileFinished.__name__:
            seconds += float(event["seconds"])
            kernel_seconds += float(event.get("kernel_seconds", 0))
    began = count[ComputationStarted.__name__]
    if not began:
        return "no tile was computed yet"
    words = [f"{began} {'computation' if began == 1 else 'computations'}, last event {last[:16].replace('T', ' ')} UTC"]
    kernels = f", {kernel_seconds / seconds:.0%} in kernels" if kernel_seconds else ""  # unknown of earlier runs
    words += [f"{duration(seconds)} of workers{kernels}"]
    for kind, one, several in (
        (WorkerLost, "worker lost", "workers lost"),
        (TileFailed, "tile tried again", "tiles tried again"),
        (TileCopied, "late tile computed twice", "late tiles computed twice"),
    ):
        if number := count[kind.__name__]:
            words.append(f"{number:,} {one if number == 1 else several}")
    return "; ".join(words)


def results_table(results: Sequence[Result]) -> Table:
    """A row for each network, kernel and ridge value with all training images.

    ``<`` marks the ridge values that were chosen, ``*`` what warnings are about.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    whole = [result for result in results if result.train_size is None]
    several = any(not result.chosen for result in whole)
    columns: list[tuple[str, Callable[[Result], str | None]]] = [
        ("group", lambda r: r.group),
        ("kernel", lambda r: r.kernel),
        ("ridge", lambda r: f"{r.ridge:.3g}" + (" <" if r.chosen else "  ") * several),
        ("accuracy  95%", _accuracy),
        ("mse", lambda r: _number(r.mean_squared_error, "#.3g")),
        ("left out\nmse", lambda r: _number(r.left_out_error, "#.3g")),
        ("nll", lambda r: _number(r.negative_log_likelihood, ".2f")),
        ("resid.", lambda r: _number(r.residual, ".0e")),
        ("cond.", lambda r: _number(r.condition, ".0e")),
        ("", lambda r: "*" if r.warning else None),
    ]
    shown = [(title, [cell(result) for result in whole]) for title, cell in columns]
    shown = [(title, cells) for title, cells in shown if any(cells)]
    for title, _ in shown:
        table.add_column(title, no_wrap=True, justify="left" if title in ("group", "kernel", "") else "right")
    for row in zip(*(cells for _, cells in shown), strict=True):
        table.add_row(*(cell or ("-" if title else "") for (title, _), cell in zip(shown, row, strict=True)))
    return table


def _accuracy(result: Result) -> str | None:
    """The accuracy and its 95% interval."""
    if result.accuracy is None or result.accuracy_interval is None:
        return _number(result.accuracy, ".3f")
    low, high = (f"{bound:.2f}".removeprefix("0") for bound in result.accuracy_interval)
    return f"{result.accuracy:.3f} {low}-{high}"


def warnings(results: Sequence[Result], dtype: str) -> Iterator[str]:
    """The warnings of all results in one sentence per kind."""
    solved = [result for result in results if result.warning and result.condition is not None]
    ill = [result for result in solved if result.converged]
    failed = [result for result in results if result.warning and result.condition is None]
    if ill:
        remedy = " or gram.dtype: float64" if dtype == "float32" else ""
        yield f"* ill-conditioned in {dtype}: {_named(ill)}; compare a larger ridge{remedy}"
    for result in solved:
        if not result.converged:
            yield f"* {result.group} {result.kernel}, {result.images:,} images: {result.warning}"
    if failed:
        yield f"* no solution for {_named(failed)}: {failed[0].warning}"


def comparison(results: Sequence[Result]) -> Group | None:
    """Which network did better at which training size, by kernel, with the chosen ridge; ``None`` without sizes.

    Better is a higher accuracy or, for regression, a lower mean squared error on the test images.
    """
    ridges = {result.ridge for result in results if result.chosen}
    classes = any(result.accuracy is not None for result in results)
    scores = {
        (result.train_size, result.kernel, result.group): score
        for result in results
        if result.chosen and (score := result.accuracy if classes else result.mean_squared_error) is not None
    }
    images = {result.train_size: result.images for result in results}
    if len(images) < 2 or not scores:
        return None
    groups = list(dict.fromkeys(result.group for result in results))
    kernels = list(dict.fromkeys(result.kernel for result in results))
    ridge = f"ridge {ridges.pop():g}" if len(ridges) == 1 else "the chosen ridge each"
    what = f"test {'accuracy' if classes else 'mean squared error'}, {ridge}"
    title = f"which network did better: {what}" if len(groups) > 1 else what
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("training\nimages", no_wrap=True, justify="right")
    if classes:
        table.add_column("per\nclass", no_wrap=True, justify="right")
    for kernel in kernels:
        for group in groups:
            table.add_column(f"{kernel}\n{group}", no_wrap=True, justify="right")
        if len(groups) > 1:
            table.add_column("\nbetter", no_wrap=True, style="bold")
    for size, count in sorted(images.items(), key=lambda item: item[1]):
        row = [f"{count:,}"]
        if classes:
            row.append("all" if size is None else f"{size:,}")
        for kernel in kernels:
            values = {group: scores.get((size, kernel, group)) for group in groups}
            row += [_number(value, ".3f" if classes else "#.4g") or "-" for value in values.values()]
            if len(groups) > 1:
                row.append(_best({group: v for group, v in values.items() if v is not None}, highest=classes))
        table.add_row(*row)
    return Group(Text(title), table)


def tile_map(tiling: Tiling, done: Set[Tile], part: Part) -> str:
    """The tiles of a matrix in characters: ``#`` all tiles of a cell done, ``+`` some, ``.`` none."""
    rows = tiling.train_blocks if part == "gram" else tiling.test_blocks
    cols = tiling.train_blocks
    step = -(-max(rows, cols) // MAP_CELLS)
    there = {(tile.row, tile.col) for tile in done if tile.part == part}
    lines = []
    for top in range(0, rows, step):
        line = ""
        for left in range(0, cols, step):
            cell = [
                (row, col) in there
                for row in range(top, min(top + step, rows))
                for col in range(max(left, row) if part == "gram" else left, min(left + step, cols))
            ]
            line += " " if not cell else "#" if all(cell) else "+" if any(cell) else "."
        lines.append(line)
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _named(results: Sequence[Result]) -> str:
    """Networks, kernels and ridge values, each once: ``"C1 nngp, C4 nngp with ridge 0.0001"``."""
    by_ridge: dict[float, dict[str, None]] = {}
    for result in results:
        by_ridge.setdefault(result.ridge, {})[f"{result.group} {result.kernel}"] = None
    return "; ".join(f"{', '.join(names)} with ridge {ridge:g}" for ridge, names in by_ridge.items())


def _best(values: dict[str, float], *, highest: bool) -> str:
    if not values:
        return "-"
    top = (max if highest else min)(values.values())
    best = [group for group, value in values.items() if value == top]
    return "equal" if len(best) == len(values) > 1 else " ".join(best)
