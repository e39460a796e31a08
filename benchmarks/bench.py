"""How fast one pair of images is, beside neural-tangents' plain CNN on the same machine in the same run.

    python benchmarks/bench.py [--quick | --check] [--avx2] [--record]

The rows of a table take turns over several rounds, so that a busy machine slows all of them, and the medians are
compared. The full run takes about ten minutes and a few GB of memory; ``--quick`` leaves out large images.
``--avx2`` forbids both programs the instructions of AVX-512, as if the processor had none.

1. C1, C2, C4, D4 and several groups in one pass, and the engine "xla", against neural-tangents.
2. Every activation, padding, filter and depth against ReLU, SAME, 3x3 and depth 3, per entry of the covariance.
3. Growth with the side of the image.
4. Error of float32 against float64, by depth.
5. Memory of a pair of large images.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from floor import entries, floor, is_counted, restricted_to_avx2
from history import compare, record, vector_extension
from numpy.typing import NDArray
from rich.console import Console
from tables import table

from equikernel import Conv, Custom, GroupCNN, Residual
from equikernel.activations import Homogeneous
from equikernel.groups import order
from equikernel.kernel import DTYPES, KernelFunction, available_cores
from equikernel.layers import Branch
from equikernel.tangents import stax

Images = NDArray[np.float32]
BLOCK = 8
"""Images on each side of a call of neural-tangents: 8x8 pairs are its best block."""

AGREEMENT = 1e-5
"""Largest relative difference between the plain CNN kernels of the two programs, float32."""


NAME = "kernels"
"""Of the recorded ratios."""

NEURAL_TANGENTS = "neural-tangents"
C4 = ("equikernel", "C4", "float32")

LEAST_RATIO = 40
"""How much faster than neural-tangents' plain CNN C4 must be at 16x16 for a commit to pass; 90 is usual."""

LEAST_SHARE = 0.35
"""Share of the floor in the time of C4 at 16x16 for a commit to pass; 70% is usual."""

ATTEMPTS = 3
"""How often both are measured at most, because what else the machine does lowers the share."""


@dataclass
class Row:
    """One row of a table: ``call`` returns NNGP and NTK of one block of pairs, as ``(2, n1, n2)``."""

    labels: tuple[str, ...]
    call: Callable[[], NDArray[Any]]
    pairs: int
    calls_per_round: int = 1
    result: NDArray[Any] = field(init=False)
    seconds: list[float] = field(default_factory=list)

    @property
    def milliseconds_per_pair(self) -> float:
        """Median over the timed calls."""
        return 1e3 * statistics.median(self.seconds) / self.pairs

    def time_one_round(self) -> None:
        """Time ``calls_per_round`` calls."""
        for _ in range(self.calls_per_round):
            start = time.perf_counter()
            self.call()
            self.seconds.append(time.perf_counter() - start)


def measure(rows: Sequence[Row], rounds: int) -> None:
    """Compile all rows and keep their results, then time them in turn."""
    for row in rows:
        row.result = row.call()
    for _ in range(rounds):
        for row in rows:
            row.time_one_round()


def noise(count: int, size: int, seed: int) -> Images:
    """RGB images."""
    return np.random.default_rng(seed).normal(size=(count, size, size, 3)).astype(np.float32)


def tangents_call(depth: int, x1: Images, x2: Images) -> Callable[[], NDArray[Any]]:
    """The plain CNN with global average pooling and a dense read-out, in neural-tangents, jitted."""
    layers = [layer for _ in range(depth) for layer in (stax.Conv(1, (3, 3), padding="SAME"), stax.Relu())]
    _, _, kernel_fn = stax.serial(*layers, stax.GlobalAvgPool(), stax.Dense(1))
    jitted = jax.jit(lambda x1, x2: kernel_fn(x1, x2, ("nngp", "ntk")))
    return lambda: np.stack(jitted(x1, x2))


def kernel_call(
    net: GroupCNN, x1: Images, x2: Images, engine: str = "cpu", dtype: str = "float32", groups: str = ""
) -> Callable[[], NDArray[Any]]:
    """A network through the public function; of several ``groups`` in one pass, ``C1+C4``, the last one's kernels."""
    if not groups:
        return lambda: np.stack(net.kernel(x1, x2, engine=engine, dtype=dtype))
    names = groups.split("+")
    return lambda: np.stack(net.kernel(x1, x2, engine=engine, dtype=dtype, groups=names)[names[-1]])


def prepared_call(net: GroupCNN, x1: Images, x2: Images, dtype: str = "float32") -> Callable[[], NDArray[Any]]:
    """A network on blocks of images that are prepared already, as those of a tile mostly are."""
    function = KernelFunction(net, (net.group,), "cpu", dtype)
    row, col = function.prepare(x1), function.prepare(x2)
    return lambda: np.stack(function(row, col)[net.group])


def relative_difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The largest ``|a - b| / |b|``."""
    return float(np.max(np.abs(a - b) / np.abs(b)))


@dataclass
class Case:
    """What is compared with neural-tangents at one image size and depth.

    Attributes:
      size, depth: of images and network.
      block: images on each side of a call of equikernel; neural-tangents always gets :data:`BLOCK`.
    """

    size: int
    depth: int
    block: int = BLOCK

    def rows(self) -> list[Row]:
        """neural-tangents, then equikernel in many ways."""
        x1, x2 = noise(self.block, self.size, 0), noise(self.block, self.size, 1)
        net, labels, pairs = GroupCNN(depth=self.depth), (f"{self.size}x{self.size}", str(self.depth)), self.block**2
        tangents = tangents_call(self.depth, x1[:BLOCK], x2[:BLOCK])
        rows = [Row((*labels, NEURAL_TANGENTS, "C1", "float32"), tangents, BLOCK**2)]
        for groups in ("C1", "C2", "C4", "C1+C2+C4", "D4"):
            call = kernel_call(net, x1, x2, groups=groups)
            rows.append(Row((*labels, "equikernel", groups, "float32"), call, pairs, calls_per_round=3))
        call = kernel_call(net, x1, x2, dtype="float64", groups="C4")
        rows.append(Row((*labels, "equikernel", "C4", "float64"), call, pairs, calls_per_round=3))
        call = kernel_call(net, x1, x2, engine="xla", groups="C1")
        rows.append(Row((*labels, "equikernel, xla", "C1", "float32"), call, pairs))
        return rows

    def least(self, dtype: str) -> float:
        """Milliseconds that a pair takes at least with one element of the group; NaN if that is not known."""
        return least_milliseconds(GroupCNN(depth=self.depth), self.size, 1, dtype)


def least_milliseconds(net: GroupCNN, size: int, elements: int, dtype: str) -> float:
    """The floor of a pair of square images of that size on all cores; NaN on processors where it is not known."""
    return floor(net, 3, dtype).milliseconds(size, elements, available_cores()) if is_counted() else math.nan


def percent(share: float) -> str:
    """A share in words; nothing if it is not known."""
    return "" if math.isnan(share) else f"{share:.0%}"


def against_neural_tangents(console: Console, cases: Sequence[Case]) -> tuple[bool, dict[str, float]]:
    """The first table; returns whether the two programs agree, and ratios of C4."""
    by_case = [case.rows() for case in cases]
    floors = [{dtype: case.least(dtype) for dtype in DTYPES} for case in cases]
    measure([row for rows in by_case for row in rows], rounds=3)
    # Again, because what else the machine does changes.
    floors = [
        {dtype: min(least, case.least(dtype)) for dtype, least in before.items()}
        for case, before in zip(cases, floors, strict=True)
    ]
    out = table(
        "1. NNGP and NTK of pairs of RGB images, 3x3 filters, SAME, ReLU, each program in blocks that suit it",
        ("size", "depth", "program", "group", "dtype"),
        ("ms/pair", "faster", "of floor"),
        "faster: than neural-tangents' plain CNN (C1) on one pair; of floor: time of the instructions alone over time",
    )
    agree, ratios = True, {}
    for case, rows, least in zip(cases, by_case, floors, strict=True):
        for row in rows:
            group, dtype = row.labels[3], row.labels[4]
            faster = rows[0].milliseconds_per_pair / row.milliseconds_per_pair
            share = least[dtype] * order(group.split("+")[-1]) / row.milliseconds_per_pair
            out.add_row(
                *row.labels,
                f"{row.milliseconds_per_pair:.2f}",
                f"{faster:.1f}x",
                percent(share) if row is not rows[0] else "",
                end_section=row is rows[-1],
            )
            if row.labels[2:4] == ("equikernel", "C4"):
                name = f"{case.size}x{case.size}, depth {case.depth}, {dtype}"
                ratios[f"C4 faster than neural-tangents' CNN, {name}"] = faster
                ratios[f"floor over time, {name}"] = share
    console.print(out)
    for case, rows in zip(cases, by_case, strict=True):
        tangents, plain, _, c4, _, _, c4_exact, xla = (row.result[:, :BLOCK, :BLOCK] for row in rows)
        differences = relative_difference(plain, tangents), relative_difference(xla, plain)
        agree &= max(differences) <= AGREEMENT
        console.print(
            f"{case.size}x{case.size}, depth {case.depth}, largest relative differences: C1 against "
            f"neural-tangents {differences[0]:.1e}, xla against cpu {differences[1]:.1e} (allowed {AGREEMENT:.0e}); "
            f"C4 float32 against float64 {relative_difference(c4, c4_exact):.1e}",
            soft_wrap=True,
        )
    return agree, ratios


GROWTH = (
    Case(8, 3, 64), Case(16, 3, 32), Case(32, 3), Case(64, 3, 2), Case(96, 3, 1),
    Case(33, 3), Case(49, 3, 4), Case(65, 3, 2), Case(20, 21, 8), Case(32, 21, 4), Case(33, 21, 4),
)  # fmt: skip
"""The cases of the third table; those of odd widths do not fill all lanes of vectors where images are large."""


def check(console: Console) -> bool:
    """Whether C4 is as much faster than neural-tangents as it must be; for every commit."""
    case = Case(16, 3, 32)
    rows = [row for row in case.rows() if row.labels[2:] in ((NEURAL_TANGENTS, "C1", "float32"), C4)]
    least = math.inf
    for _ in range(ATTEMPTS):
        measure(rows, rounds=5)
        tangents, ours = (min(row.seconds) / row.pairs for row in rows)
        least = float(np.minimum(least, case.least("float32")))  # NaN where it is not known
        share = least * order("C4") / (1e3 * ours)
        if is_fast(tangents / ours, share):
            break
    alone = f"its instructions alone take {share:.1%} of its time (at least {LEAST_SHARE:.0%})"
    if math.isnan(share):
        alone = "its floor is not known, because no loop has exactly its instructions (see benchmarks/floor.py)"
    console.print(
        f"C4 at 16x16, depth 3, is {tangents / ours:.0f} times faster than neural-tangents' plain CNN (at least "
        f"{LEAST_RATIO} wanted); {alone if is_counted() else 'its instructions are not counted on this processor'}",
        soft_wrap=True,
    )
    return is_fast(tangents / ours, share)


def is_fast(ratio: float, share: float) -> bool:
    """Whether a commit passes; where instructions are not counted, the ratio decides alone."""
    return ratio >= LEAST_RATIO and (share >= LEAST_SHARE or not is_counted())


def networks() -> dict[str, GroupCNN]:
    """The networks of the second table, the first to compare with."""
    deep = 3
    nets = {"ReLU, SAME, 3x3, depth 3": GroupCNN(group="C1", depth=deep)}
    for name in ("leaky_relu(0.1)", "abs", "erf", "gelu", "sin", "cos", "identity", "hermite(4)", "monomial(2)"):
        nets[name] = GroupCNN(group="C1", depth=deep, activation=name)
    nets["tanh by a series of 16 terms"] = GroupCNN(group="C1", depth=deep, activation=Custom(np.tanh, 16))
    for padding in ("VALID", "CIRCULAR"):
        nets[padding] = GroupCNN(group="C1", depth=deep, padding=padding)
    nets["filters 5x5"] = GroupCNN(group="C1", depth=deep, filter_size=5)
    nets["filters 1x5"] = GroupCNN(group="C1", layers=(Conv((1, 5)),) * deep)
    nets["residual"] = GroupCNN(group="C1", layers=(Conv(3), Residual([Conv(3), Conv(3)])))
    for depth in (8, 21):
        nets[f"depth {depth}"] = GroupCNN(group="C1", depth=depth)
    for group in ("C4", "D4"):
        nets[group] = GroupCNN(group=group, depth=deep)
    return nets


def efficiency(console: Console, size: int) -> None:
    """The second table: time over the floor, and per entry of the covariance, for each kind of network."""
    x1, x2 = noise(BLOCK, size, 0), noise(BLOCK, size, 1)
    nets = networks()
    for dtype in DTYPES:
        rows = [Row((name,), prepared_call(net, x1, x2, dtype), BLOCK**2) for name, net in nets.items()]
        measure(rows, rounds=3)
        out = table(
            f"2. Each kind of network, {size}x{size}, {dtype}, engine cpu, images prepared",
            ("network",),
            ("ms/pair", "ns/entry", "x", "of floor"),
            "x: against the first line; of floor: where activations are arc cosines and no kernels are kept",
        )
        first = 0.0
        for row, net in zip(rows, nets.values(), strict=True):
            cost = 1e6 * row.milliseconds_per_pair / (sum(entries(net, size)[1:]) * order(net.group))
            first = first or cost
            share = ""
            branches = any(isinstance(step, Branch) for step in net.steps)
            arcs = [isinstance(a, Homogeneous) and a.beta != 0 for a in net.activations]
            if arcs and all(arcs) and not branches:
                share = percent(least_milliseconds(net, size, order(net.group), dtype) / row.milliseconds_per_pair)
            out.add_row(*row.labels, f"{row.milliseconds_per_pair:.2f}", f"{cost:.3f}", f"{cost / first:.2f}", share)
        console.print(out)


def growth(console: Console, cases: Sequence[Case]) -> dict[str, float]:
    """The third table: C4 for small, large and deep; returns the share of the floor in the time."""
    rows = []
    for case in cases:
        x1, x2 = noise(case.block, case.size, 0), noise(case.block, case.size, 1)
        call = prepared_call(GroupCNN(depth=case.depth), x1, x2)
        rows.append(Row((f"{case.size}x{case.size}", str(case.depth), str(case.block**2)), call, case.block**2))
    measure(rows, rounds=3)
    out = table(
        "3. Small, large and deep: C4, float32, engine cpu, images prepared",
        ("size", "depth", "pairs"),
        ("ms/pair", "ns/(HW)²", "of floor"),
    )
    shares = {}
    for row, case in zip(rows, cases, strict=True):
        share = case.least("float32") * order("C4") / row.milliseconds_per_pair
        shares[f"floor over time, {case.size}x{case.size}, depth {case.depth}"] = share
        each = 1e6 * row.milliseconds_per_pair / case.size**4
        out.add_row(*row.labels, f"{row.milliseconds_per_pair:.3g}", f"{each:.2f}", percent(share))
    console.print(out)
    return shares


def precision(console: Console, depths: Sequence[int]) -> None:
    """The fourth table: error of float32 against float64, w_std² = 2, for pairs and images with themselves."""
    x = noise(3, 16, 0)
    x = np.concatenate([x, 2 * x[:1], np.rot90(x[:1], axes=(1, 2))])
    names = [f"{kernel}, {padding}" for padding in ("SAME", "CIRCULAR") for kernel in ("nngp", "ntk")]
    out = table("4. Largest relative error of float32, C4, 16x16, w_std² = 2, by depth", ("depth",), names)
    for depth in depths:
        cells = []
        for padding in ("SAME", "CIRCULAR"):
            net = GroupCNN(depth=depth, w_std=2**0.5, padding=padding)
            for values, exact in zip(net.kernel(x), net.kernel(x, dtype="float64"), strict=True):
                cells.append(f"{relative_difference(values, exact):.1e}")
        out.add_row(str(depth), *cells)
    console.print(out)


def memory(console: Console, sides: Sequence[int]) -> None:
    """The fifth table: peak memory of a process with one pair, above Python and NumPy; with compilation."""
    program = (
        "import re, sys, numpy as np\n"
        "def peak():\n"  # that of getrusage may be the parent's
        "    return int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak()\n"
        "from equikernel import GroupCNN\n"
        "x = np.random.default_rng(0).normal(size=(2, int(sys.argv[1]), int(sys.argv[1]), 3))\n"
        "GroupCNN(group=sys.argv[2]).kernel(x[:1], x[1:])\n"
        "print(peak() - before)\n"
    )
    if not Path("/proc/self/status").exists():
        console.print("5. The peak of memory is measured on Linux only.")
        return
    out = table("5. Peak memory of one pair, depth 3, above Python and NumPy", ("size", "group"), ("MiB",))
    for side in sides:
        group = "C4" if side < 200 else "C1"
        done = subprocess.run(
            [sys.executable, "-c", program, str(side), group], capture_output=True, text=True, check=True
        )
        out.add_row(f"{side}x{side}", group, f"{int(done.stdout) / 1024:.0f}")
    console.print(out)


def processor() -> str:
    """The processor model, as the operating system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> str:
    """Processor, cores and the versions that decide the speed."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("neural-tangents", "jax", "llvmlite", "numpy")
    )
    extension = vector_extension()
    return (
        f"{processor()}, {platform.machine()}{f' {extension}' if extension else ''}, {available_cores()} cores in use; "
        f"Python {platform.python_version()}, {versions}"
    )


def main() -> int:
    """Measure, print, and return 1 when the programs disagree."""
    parser = argparse.ArgumentParser(description="Compare the kernels of one pair with those of neural-tangents.")
    parser.add_argument("--quick", action="store_true", help="no large images, about two minutes")
    parser.add_argument("--check", action="store_true", help="only whether C4 is fast enough, half a minute")
    parser.add_argument("--avx2", action="store_true", help="forbid both programs AVX-512")
    parser.add_argument("--record", action="store_true", help="append the ratios to benchmarks/results")
    options = parser.parse_args()
    quick = options.quick
    if options.record and (quick or options.check):
        parser.error("only the full run is recorded")
    if quick and options.check:
        parser.error("--check is quicker than --quick; give one of them")
    jax.config.update("jax_platforms", "cpu")
    console = Console()
    console.print(machine() + (", without AVX-512" if options.avx2 else ""), soft_wrap=True)
    with restricted_to_avx2() if options.avx2 else contextlib.nullcontext():
        if options.check:
            return 0 if check(console) else 1
        return run(console, f"{NAME}-avx2" if options.avx2 else NAME, quick=quick, keep=options.record)


def run(console: Console, name: str, *, quick: bool, keep: bool) -> int:
    """All tables; returns 1 when the programs disagree.

    Args:
      console: where they go.
      name: of the recorded ratios.
      quick: leave out large images.
      keep: record the ratios.
    """
    agree, ratios = against_neural_tangents(
        console, ([] if quick else [Case(32, 3)]) + [Case(16, 3, 32), Case(16, 8, 32)]
    )
    efficiency(console, 16 if quick else 32)
    ratios |= growth(console, GROWTH[:3] if quick else GROWTH)
    precision(console, (1, 10, 40) if quick else (1, 2, 5, 10, 20, 30, 40, 50))
    memory(console, (64,) if quick else (64, 224))
    ratios = {what: value for what, value in ratios.items() if not math.isnan(value)}
    for line in compare(name, ratios):
        console.print(line, soft_wrap=True)
    if keep and agree:
        record(name, ratios)
    if not agree:
        console.print("The programs disagree: the times of the first table compare different results.")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
