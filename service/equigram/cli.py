"""The commands. Bad requests end with exit code 2, failed runs with 1, each with one sentence on standard error."""

from __future__ import annotations

import csv
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from equigram import __version__
from equigram.errors import EquigramError, SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from equigram.plan import Plan, Tiling
    from equigram.solve.stage import Result
    from equigram.spec import JobSpec

app = typer.Typer(
    name="equigram",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Gram matrices of infinitely wide equivariant networks, tile by tile, and predictions with them.

A job is a YAML file; `equigram run job.yaml` does everything it asks for, and started again after any
interruption goes on where it stopped. The smallest job:

    store: runs/mine
    data: {train: path/to/class-folders, test_fraction: 0.2}

Exit codes: 0 done, 1 the run failed (finished tiles are kept), 2 a wrong request, 130 interrupted.""",
)

out = Console()
err = Console(stderr=True)

JobArgument = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")]
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="The run store: a folder or any fsspec URL.")]
GroupOption = Annotated[str | None, typer.Option(help="Symmetry group; by default the last of the job.")]
KernelOption = Annotated[str | None, typer.Option(help="nngp or ntk; by default the last that was solved.")]
RidgeOption = Annotated[float | None, typer.Option(help="One of the job's ridge values; by default the first.")]


class _Rate(ProgressColumn):
    """Things per second since the start, and the time left at that rate."""

    def render(self, task: Task) -> Text:
        begin = task.fields["begin"]
        done = task.completed - begin
        elapsed = time.monotonic() - task.fields["since"]
        if done <= 0 or elapsed <= 0 or task.total is None:
            return Text("")
        rate = done / elapsed
        left = (task.total - task.completed) / rate
        return Text(f"{rate:,.0f}/s, {_duration(left)} left" if left >= 1 else f"{rate:,.0f}/s")


class _Screen:
    """Shows notes and progress bars on standard error."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description:>24}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            _Rate(),
            console=err,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Screen:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def note(self, text: str) -> None:
        self._bars.console.print(Text(f"note: {text}", style="yellow"))

    def progress(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, since=time.monotonic(), begin=done)
        self._bars.update(self._tasks[what], completed=done, total=total)


@app.command()
def run(job: JobArgument) -> None:
    """Run a job: images, Gram matrices, predictions. Run again, it goes on from what is stored.

    Finished tiles are kept whatever happens: a power cut, a full disk, a killed worker. The store accepts only the
    job it was made for.
    """
    from equigram.run import run as run_job

    spec = _load(job)
    with _Screen() as screen:
        finished = run_job(spec, screen)
    info = finished.store.info
    out.print(f"{spec.store}: {info.train} training and {info.test} test images, all {len(info.tiling)} tiles done")
    if finished.results:
        _print_results(finished.results, classes=info.classes is not None)
        out.print(f"next: equigram plot {spec.store}   ·   equigram predict {spec.store} IMAGES")


@app.command()
def plan(job: JobArgument) -> None:
    """Show what a job will cost before anything starts: tiles, pairs, bytes, memory, time.

    Refuses with exit code 2 what `run` would refuse. The time is predicted from the cost of a pair, which is measured
    on this machine. Nothing is written.
    """
    from equigram.driver import check_address
    from equigram.run import check_disk, look_at_images, make_plan, open_store, stored_survey
    from equigram.store import GramStore

    spec = _load(job)
    check_address(spec.workers)
    with _Screen() as screen:
        store = open_store(spec, screen) if GramStore.exists(spec.store) else None
        found = look_at_images(spec) if store is None else stored_survey(store)
        result = make_plan(spec, found, store, screen)
    _print_plan(spec, result)
    if store is None:
        check_disk(spec, result)


@app.command()
def status(store: StoreArgument) -> None:
    """Show what a store holds: its job, the tiles done and missing, and the results."""
    from equigram.solve.stage import stored_results
    from equigram.store import GramStore

    opened = GramStore.open(store)
    info = opened.info
    done = opened.finished_tiles()
    tiling = info.tiling
    pairs = sum(map(tiling.pairs, done))
    table = Table(show_header=False, box=None)
    table.add_row("store", store)
    table.add_row("created", f"{info.created} by equigram {info.versions.get('equigram', '?')} on {info.processor}")
    table.add_row("images", f"{info.train} training, {info.test} test, {'x'.join(map(str, info.image_shape))}")
    table.add_row("matrices", f"{' '.join(info.spec.gram.groups)} · {' '.join(info.spec.gram.kernels)}")
    table.add_row("tiles", f"{len(done)} of {len(tiling)} done, {len(tiling) - len(done)} missing")
    table.add_row("pairs", f"{pairs:,} of {tiling.total_pairs:,} ({pairs / tiling.total_pairs:.1%})")
    out.print(table)
    missing = list(tiling.missing(done))
    if missing:
        names = ", ".join(map(str, missing[:5])) + (" …" if len(missing) > 5 else "")
        out.print(f"missing: {names}", markup=False)
        out.print(_map(tiling, {(tile.row, tile.col) for tile in done if tile.part == "gram"}), markup=False)
        out.print("next: equigram run JOB.yaml computes what is missing")
        return
    results = []
    for group in info.spec.gram.groups:
        for kernel in info.spec.solved_kernels:
            if opened.has_solution(group, kernel):
                results += stored_results(opened, group, kernel)
    if results:
        _print_results(results, classes=info.classes is not None)
    elif info.spec.solved_kernels:
        out.print("not solved yet; next: equigram run JOB.yaml")


@app.command()
def predict(
    store: StoreArgument,
    images: Annotated[str, typer.Argument(help="New images: a folder, an image file, an .npz, .npy or zarr.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="CSV file; by default standard output.")] = None,
    group: GroupOption = None,
    kernel: KernelOption = None,
    ridge: RidgeOption = None,
) -> None:
    """Predict new images with a finished run, and write a CSV line for each.

    Columns: the image, the predicted class, and a score per class (the regression's value: about 1 for the class, 0
    for the others); without classes a value per target.
    """
    from equigram.run import predict as predict_images
    from equigram.store import GramStore

    opened = GramStore.open(store)
    if output is not None and not output.absolute().parent.is_dir():
        raise SpecError(f"{output}: the folder {output.absolute().parent} does not exist; create it first")
    with _Screen() as screen:
        found = predict_images(
            opened, images, group, kernel, ridge, lambda done, total: screen.progress("images", done, total)
        )
    columns = found.classes or tuple(f"target_{i}" for i in range(found.values.shape[1]))
    head = ["image", *(["predicted"] if found.classes else []), *columns]
    lines = [
        [name, *([columns[int(row.argmax())]] if found.classes else []), *(f"{value:.6g}" for value in row)]
        for name, row in zip(found.names, found.values, strict=True)
    ]
    if output is None:
        csv.writer(sys.stdout, lineterminator="\n").writerows([head, *lines])
        return
    try:
        with output.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([head, *lines])
    except OSError as error:
        raise EquigramError(f"{output}: cannot write the predictions: {error.strerror}") from None
    err.print(f"{len(lines)} predictions ({found.group} {found.kernel}, ridge {found.ridge:g}) in {output}")


@app.command()
def plot(
    store: StoreArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the PNG files.")] = Path("plots"),
) -> None:
    """Draw the Gram matrices sorted by class, their spectra, confusion matrices and learning curves as PNG files."""
    from equigram.figures import draw_run
    from equigram.store import GramStore

    for path in draw_run(GramStore.open(store), output):
        out.print(str(path), soft_wrap=True)


def _version(show: bool) -> None:
    if show:
        out.print(f"equigram {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; every error this package raises on purpose becomes one sentence and an exit code."""
    from equikernel.errors import EquikernelError

    try:
        app()
    except (EquigramError, EquikernelError) as error:
        err.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        err.print("interrupted; finished tiles are kept, and the same command goes on from there")
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _load(path: Path) -> JobSpec:
    from equigram.spec import JobSpec

    return JobSpec.load(path)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def _print_plan(spec: JobSpec, plan: Plan) -> None:
    from equigram.memory import available_memory, format_bytes

    tiling = plan.tiling
    free = format_bytes(available_memory())
    table = Table(show_header=False, box=None)
    table.add_row("images", f"{tiling.train:,} training, {tiling.test:,} test")
    table.add_row(
        "matrices",
        f"{plan.matrices} train ({tiling.train:,} x {tiling.train:,}) and {plan.matrices if tiling.test else 0} test "
        f"({tiling.test:,} x {tiling.train:,}) in {plan.dtype}: {' '.join(spec.gram.groups)} · "
        f"{' '.join(spec.gram.kernels)}",
    )
    table.add_row("tiles", f"{len(tiling):,} of {tiling.edge} x {tiling.edge} images, {plan.missing:,} missing")
    table.add_row("pairs", f"{tiling.total_pairs:,}, {plan.missing_pairs:,} missing")
    table.add_row("store", f"{format_bytes(plan.store_bytes)} when finished, at {spec.store}")
    table.add_row("workers", f"{plan.workers} with {spec.workers.cpus} CPU and {spec.workers.gpus:g} GPU each")
    table.add_row("memory per worker", f"{format_bytes(plan.worker_bytes)}")
    table.add_row("memory to solve", f"{format_bytes(plan.solver_bytes)} of {free} available")
    table.add_row("cost of a pair", f"{plan.seconds_per_pair * 1e3:.3g} ms on one worker, measured on this machine")
    table.add_row("predicted time", f"{_duration(plan.seconds)} for the missing tiles")
    out.print(table)


def _print_results(results: Sequence[Result], *, classes: bool) -> None:
    """A table of all ridge values for all images, and one of the train sizes for the first ridge value."""
    score = "accuracy" if classes else "mean squared error"
    table = Table("group", "kernel", "images", "ridge", "accuracy", "mean squared error", "residual", "condition")
    for result in results:
        if result.train_size is None:
            table.add_row(
                result.group, result.kernel, str(result.images), f"{result.ridge:g}",
                _number(result.accuracy, ".3f"), _number(result.mean_squared_error, ".4g"),
                _number(result.residual, ".1e"), _number(result.condition, ".1e"),
            )  # fmt: skip
    out.print(table)
    for warning in dict.fromkeys(f"{r.group} {r.kernel}, ridge {r.ridge:g}: {r.warning}" for r in results if r.warning):
        err.print(f"note: {warning}", style="yellow", markup=False)
    sizes = sorted({result.train_size for result in results if result.train_size is not None})
    if not sizes:
        return
    networks = list(dict.fromkeys((result.group, result.kernel) for result in results))
    ridge = results[0].ridge
    curve = Table("training images", *(f"{g} {k}" for g, k in networks), "best", title=f"{score}, ridge {ridge:g}")
    for size in [*sizes, None]:
        row = {(r.group, r.kernel): r for r in results if r.train_size == size and r.ridge == ridge}
        values = {
            network: value
            for network, r in row.items()
            if (value := r.accuracy if classes else r.mean_squared_error) is not None
        }
        if not values:
            continue
        top = max(values.values()) if classes else min(values.values())
        best = ", ".join(f"{g} {k}" for (g, k), value in values.items() if value == top)
        first = next(iter(row.values()))
        label = str(first.images) if size is None or not classes else f"{first.images} ({size} per class)"
        curve.add_row(label, *(_number(values.get(network), ".3f") for network in networks), best)
    out.print(curve)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _map(tiling: Tiling, done: set[tuple[int, int]], most: int = 48) -> str:
    """The upper triangle in characters: ``#`` all tiles of a cell done, ``+`` some, ``.`` none."""
    blocks = tiling.train_blocks
    step = -(-blocks // most)
    lines = []
    for top in range(0, blocks, step):
        line = ""
        for left in range(0, blocks, step):
            cell = [
                (row, col) in done
                for row in range(top, min(top + step, blocks))
                for col in range(max(left, row), min(left + step, blocks))
            ]
            line += " " if not cell else "#" if all(cell) else "+" if any(cell) else "."
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
