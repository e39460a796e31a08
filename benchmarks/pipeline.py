"""A whole run, from image files to accuracies, where its time goes, and what others take; ``make bench-run``.

Patches of photographs become files in class folders; a process of its own does with them what ``equigram run`` does,
CNN (C1) and C4 in one pass on Ray workers, one for each core. Beside it stand, measured on a sample of its pairs and
multiplied: its kernels without anything around them, neural-tangents, and the recursion taken literally.

    python benchmarks/pipeline.py [--quick] [--record]
"""

from __future__ import annotations

import argparse
import json
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from history import compare, machine, record
from numpy.typing import NDArray
from rich.console import Console
from tables import table

from equigram.solve.stage import all_results
from equigram.spec import JobSpec
from equigram.store import GramStore
from equikernel.kernel import KernelFunction, available_cores

NAME = "pipeline"
TEXTURES = Path(__file__).resolve().parents[1] / "examples/textures.py"
GROUPS = ("C1", "C4")
W_STD = 1.4142
CLASSES = 5

ROUNDS = 3
"""Timed calls of each of the other programs."""

AGREEMENT = 1e-5
"""Largest relative difference between stored kernels and those of the others."""

RUN = """
import json, sys, time
from equigram.events import Note
from equigram.run import finish, prepare
from equigram.spec import JobSpec

with open(sys.argv[2], "w", buffering=1) as log:
    def tell(event):
        print(json.dumps({"at": time.time(), "processor": time.process_time(), **event.to_json()}), file=log)
    spec = JobSpec.load(sys.argv[1])
    tell(Note("imported"))
    store, costs = prepare(spec, tell)  # what `equigram.run` does is this ...
    tell(Note("prepared"))
    finish(store, spec, tell, costs)  # ... and this
    tell(Note("solved"))
"""

Float64s = NDArray[np.float64]


@dataclass(frozen=True)
class Times:
    """What a run took, in seconds.

    Attributes:
      stages: one after the other, from the start of Python to its end.
      workers: how many computed.
      read, prepare, kernels, write: of all workers for the tiles; all but kernels while they compute another one.
      driver: processor time of the driver meanwhile.
    """

    stages: dict[str, float]
    workers: int
    read: float
    prepare: float
    kernels: float
    write: float
    driver: float

    @property
    def total(self) -> float:
        """From the start of Python to its end."""
        return sum(self.stages.values())

    @property
    def tiles(self) -> float:
        """From the first tile to the last."""
        return self.stages["tiles"]

    def of_workers(self, seconds: float) -> float:
        """A share of the time that all workers had, from the first tile to the last."""
        return seconds / (self.workers * self.tiles)

    def of_run(self, seconds: float) -> float:
        """A share of the time that all workers would have had, had they been there from the beginning to the end."""
        return seconds / (self.workers * self.total)


def times_of(events: list[dict[str, Any]], began: float, ended: float) -> Times:
    """What a run took, from its events, and from when its process began and ended."""

    def first(kind: str, **fields: str) -> dict[str, Any]:
        return next(e for e in events if e["event"] == kind and all(e[name] == text for name, text in fields.items()))

    first_tile, last_tile = first("TileStarted"), first("ComputationEnded")
    marks = {
        "": began,
        "start Python": first("Note", text="imported")["at"],
        "look at the files, measure a pair": first("Progress", what="reading training images")["at"],
        "read, resize and check images": first("Note", text="prepared")["at"],
        "start Ray": first("ComputationStarted")["at"],
        "start workers": first_tile["at"],
        "tiles": last_tile["at"],
        "end Ray": first("Progress", what="solve")["at"],
        "solve": first("Note", text="solved")["at"],
        "end Python": ended,
    }
    stages = {name: end - start for (_, start), (name, end) in pairwise(marks.items())}
    finished = [event for event in events if event["event"] == "TileFinished"]
    spent = {
        name: sum(event[f"{name}_seconds"] for event in finished) for name in ("read", "prepare", "kernel", "write")
    }
    return Times(
        stages,
        first("ComputationStarted")["workers"],
        spent["read"],
        spent["prepare"],
        spent["kernel"],
        spent["write"],
        last_tile["processor"] - first_tile["processor"],
    )


def run_job(job: Path, log: Path) -> Times:
    """Do a job in a process of its own, as a user would."""
    began = time.time()
    subprocess.run([sys.executable, "-c", RUN, str(job), str(log)], check=True)
    ended = time.time()
    return times_of([json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()], began, ended)


@dataclass
class Sample:
    """Some pairs, as another program computes them.

    Attributes:
      call: computes NNGP and NTK of a block of pairs.
      stored: what the run has stored for them.
      seconds: of each timed call.
    """

    call: Callable[[], Sequence[NDArray[Any]]]
    stored: tuple[Float64s, Float64s]
    seconds: list[float] = field(default_factory=list)

    def time(self) -> None:
        """Time a call."""
        start = time.perf_counter()
        self.call()
        self.seconds.append(time.perf_counter() - start)

    def seconds_for(self, pairs: int) -> float:
        """What so many pairs would take, on all cores."""
        return statistics.median(self.seconds) / self.stored[0].size * pairs

    def difference(self) -> float:
        """Largest relative difference to what is stored; a call compiles what is to be compiled."""
        pairs = zip(self.call(), self.stored, strict=True)
        return max(float(np.max(np.abs(values - stored) / np.abs(stored))) for values, stored in pairs)


def stored_pairs(store: GramStore, group: str, rows: slice, cols: slice) -> tuple[Float64s, Float64s]:
    """NNGP and NTK of pairs of training images."""
    nngp, ntk = (store.matrix("gram", group, kernel)[rows, cols].astype(np.float64) for kernel in ("nngp", "ntk"))
    return nngp, ntk


def kernels_alone(store: GramStore, spec: JobSpec, edge: int) -> Sample:
    """What the workers call, on all cores."""
    groups = spec.gram.groups
    function = KernelFunction(spec.network, groups, spec.engine_for(groups), spec.gram.dtype, available_cores())
    x = store.images("train")[: 2 * edge]
    row, col = function.prepare(x[:edge]), function.prepare(x[edge:])
    stored = stored_pairs(store, "C4", slice(edge), slice(edge, 2 * edge))
    return Sample(lambda: function(row, col)["C4"], stored)


def neural_tangents(store: GramStore, spec: JobSpec, edge: int = 8) -> Sample:
    """The plain CNN in neural-tangents, jitted, in its best block."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from equikernel.tangents import stax

    net = spec.network
    convolution = stax.Conv(1, (3, 3), padding="SAME", W_std=net.w_std)
    layers = [layer for _ in net.convolutions for layer in (convolution, stax.Relu())]
    _, _, kernel_fn = stax.serial(*layers, stax.GlobalAvgPool(), stax.Dense(1, W_std=net.w_std))
    jitted = jax.jit(lambda x1, x2: kernel_fn(x1, x2, ("nngp", "ntk")))
    x = store.images("train")[: 2 * edge]
    stored = stored_pairs(store, "C1", slice(edge), slice(edge, 2 * edge))
    return Sample(lambda: [np.asarray(kernel) for kernel in jitted(x[:edge], x[edge:])], stored)


def literal(store: GramStore, spec: JobSpec, edge: int) -> Sample:
    """The recursion of the group convolutions as the paper writes it, C4, float64."""
    function = KernelFunction(spec.network, ("C4",), "reference")
    x = store.images("train")[: 2 * edge].astype(np.float64)
    row, col = function.prepare(x[:edge]), function.prepare(x[edge:])
    stored = stored_pairs(store, "C4", slice(edge), slice(edge, 2 * edge))
    return Sample(lambda: function(row, col)["C4"], stored)


def show_stages(console: Console, times: Times) -> None:
    """The first table."""
    out = table("1. From files to accuracies", ("stage",), ("s", "% of the run"))
    for name, seconds in times.stages.items():
        out.add_row(name, f"{seconds:.2f}", f"{seconds / times.total:.1%}")
    out.add_section()
    out.add_row("all", f"{times.total:.2f}", "100%")
    console.print(out)


def show_workers(console: Console, times: Times) -> None:
    """The second table."""
    out = table(
        f"2. {times.workers} workers, from the first tile to the last",
        ("what",),
        ("s", "% tiles", "% run"),
        f"% tiles: of the time of {times.workers} workers while there are tiles; % run: of all stages; "
        "meanwhile: while another tile is computed",
    )
    rest = times.workers * times.tiles - times.kernels
    for name, seconds in (
        ("kernels", times.kernels),
        ("hand-over, others' last tiles", rest),
    ):
        out.add_row(name, f"{seconds:.2f}", f"{times.of_workers(seconds):.2%}", f"{times.of_run(seconds):.2%}")
    out.add_section()
    for name, seconds in (
        ("meanwhile: loading blocks", times.read),
        ("meanwhile: self-kernels, rotation", times.prepare),
        ("meanwhile: writing tiles", times.write),
        ("meanwhile: the driver, processor time", times.driver),
    ):
        out.add_row(name, f"{seconds:.2f}", f"{times.of_workers(seconds):.2%}", f"{times.of_run(seconds):.2%}")
    console.print(out)


def show_others(
    console: Console, times: Times, pairs: int, samples: dict[str, Sample], errors: Sequence[float]
) -> None:
    """The third table."""
    out = table(
        f"3. The same {pairs:,} pairs",
        ("program",),
        ("ms/pair", "min", "x run", "error"),
        "x run: times what the run took from files to accuracies; the others only compute kernels, and are measured on "
        "a sample; error: largest relative difference to what the run has stored",
    )
    out.add_row("the run, C1 and C4", f"{1e3 * times.total / pairs:.3f}", f"{times.total / 60:.1f}", "1", "")
    for (name, one), error in zip(samples.items(), errors, strict=True):
        seconds = one.seconds_for(pairs)
        out.add_row(
            name,
            f"{1e3 * seconds / pairs:.3f}",
            f"{seconds / 60:.1f}",
            f"{seconds / times.total:.3g}",
            f"{error:.0e}",
        )
    console.print(out)


def benchmark(console: Console, folder: Path, train: int, test: int, size: int) -> tuple[dict[str, float], bool]:
    """Cut patches, run, compare and print; the figures to keep, and whether all programs agree."""
    cut = runpy.run_path(str(TEXTURES))["main"]
    cut(folder / "patches", train // CLASSES, test // CLASSES, turned=("train", "test"))
    fields = {
        "store": str(folder / "run"),
        "data": {"train": str(folder / "patches/train"), "test": str(folder / "patches/test"), "size": size},
        "network": {"depth": 3, "w_std": W_STD},
        "gram": {"groups": list(GROUPS)},
        "solve": {"ridge": [1e-3, 1e-2]},
        "resources": {"workers": available_cores()},
    }
    (folder / "job.yaml").write_text(json.dumps(fields), encoding="utf-8")  # JSON is YAML
    times = run_job(folder / "job.yaml", folder / "log.jsonl")
    store = GramStore.open(str(folder / "run"))
    spec, pairs = store.info.spec, store.info.tiling.total_pairs
    samples = {
        "its kernels alone, C1 and C4": kernels_alone(store, spec, min(128, train // 2)),
        "neural-tangents, C1, 8x8 blocks": neural_tangents(store, spec),
        "literal recursion, C4, float64": literal(store, spec, 2),
    }
    errors = [one.difference() for one in samples.values()]
    for _ in range(ROUNDS):  # in turn, so that a busy machine slows all of them
        for one in samples.values():
            one.time()
    show_stages(console, times)
    show_workers(console, times)
    show_others(console, times, pairs, samples, errors)
    chosen = {f"{one.group} {one.kernel}": one.accuracy for one in all_results(store) if one.chosen}
    console.print(f"accuracy: {', '.join(f'{name} {accuracy:.3f}' for name, accuracy in chosen.items())}")
    alone, tangents, recursion = (one.seconds_for(pairs) for one in samples.values())
    figures = {
        "kernels, share of the workers' time": times.of_workers(times.kernels),
        "self-kernels and rotation, share of the workers' time": times.of_workers(times.prepare),
        "loading and writing, share of the workers' time": times.of_workers(times.read + times.write),
        "kernels, share of the whole run": times.of_run(times.kernels),
        "reading images, share of the whole run": times.stages["read, resize and check images"] / times.total,
        "neural-tangents, C1, times the whole run": tangents / times.total,
        "literal recursion, C4, times the whole run": recursion / times.total,
        "neural-tangents, C1, times the kernels alone": tangents / alone,
        "literal recursion, C4, times the kernels alone": recursion / alone,
    }
    return figures, max(errors) <= AGREEMENT


def main() -> int:
    """Measure, print, and return 1 when the programs disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50 training and 10 test images of 8x8, half a minute")
    parser.add_argument("--record", action="store_true", help="append ratios and shares to benchmarks/results")
    asked = parser.parse_args()
    if asked.quick and asked.record:
        parser.error("the figures of a quick run say nothing worth keeping")
    console = Console()
    console.print(machine(), soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        figures, agree = benchmark(console, Path(folder), *((50, 10, 8) if asked.quick else (1000, 200, 16)))
    if not asked.quick:
        console.print(*compare(NAME, figures), sep="\n", soft_wrap=True)
    if asked.record and agree:
        record(NAME, figures)
    if not agree:
        console.print("The programs disagree: their times are those of different results.")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
