"""How fast one pair of images is, beside neural-tangents' plain CNN on the same machine in the same run.

    python benchmarks/bench.py [--quick]

The rows of a table take turns over several rounds, so that a busy machine slows all of them, and the medians are
compared. The full run takes about ten minutes and a few GB of memory; ``--quick`` leaves out large images.

1. C1, C2, C4, D4 and several groups in one pass, and the engine "xla", against neural-tangents.
2. Every activation, padding, filter and depth against ReLU, SAME, 3x3 and depth 3, per entry of the covariance.
3. Growth with the side of the image.
4. Error of float32 against float64, by depth.
5. Memory of a pair of large images.
"""

from __future__ import annotations

import argparse
import importlib.metadata
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
from numpy.typing import NDArray
from rich.console import Console
from tables import table

from equikernel import Conv, Custom, GroupCNN, Residual
from equikernel.kernel import available_cores
from equikernel.tangents import stax

Images = NDArray[np.float32]
BLOCK = 8
"""Images on each side of a call: 8x8 pairs, the best block of neural-tangents."""

AGREEMENT = 1e-5
"""Largest relative difference between the plain CNN kernels of the two programs, float32."""


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


def relative_difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The largest ``|a - b| / |b|``."""
    return float(np.max(np.abs(a - b) / np.abs(b)))


def against_neural_tangents(console: Console, cases: Sequence[tuple[int, int]]) -> bool:
    """The first table; returns whether the two programs agree."""
    rows: list[Row] = []
    for size, depth in cases:
        x1, x2 = noise(BLOCK, size, 0), noise(BLOCK, size, 1)
        net, case = GroupCNN(depth=depth), (f"{size}x{size}", str(depth))
        pairs = BLOCK**2
        rows.append(Row((*case, "neural-tangents", "C1", "float32"), tangents_call(depth, x1, x2), pairs))
        for groups in ("C1", "C2", "C4", "C1+C2+C4", "D4"):
            call = kernel_call(net, x1, x2, groups=groups)
            rows.append(Row((*case, "equikernel", groups, "float32"), call, pairs, calls_per_round=3))
        call = kernel_call(net, x1, x2, dtype="float64", groups="C4")
        rows.append(Row((*case, "equikernel", "C4", "float64"), call, pairs, calls_per_round=3))
        call = kernel_call(net, x1, x2, engine="xla", groups="C1")
        rows.append(Row((*case, "equikernel, xla", "C1", "float32"), call, pairs))
    measure(rows, rounds=3)
    out = table(
        f"1. NNGP and NTK, {BLOCK}x{BLOCK} pairs of RGB images, 3x3 filters, SAME, ReLU",
        ("size", "depth", "program", "group", "dtype"),
        ("ms/pair", "faster"),
        "faster: than neural-tangents' plain CNN (C1) on one pair",
    )
    agree = True
    for start in range(0, len(rows), len(rows) // len(cases)):
        case_rows = rows[start : start + len(rows) // len(cases)]
        for row in case_rows:
            faster = case_rows[0].milliseconds_per_pair / row.milliseconds_per_pair
            out.add_row(
                *row.labels,
                f"{row.milliseconds_per_pair:.2f}",
                f"{faster:.1f}x",
                end_section=row is case_rows[-1],
            )
    console.print(out)
    for start in range(0, len(rows), len(rows) // len(cases)):
        tangents, plain, _, c4, _, _, c4_exact, xla = (row.result for row in rows[start : start + 8])
        differences = relative_difference(plain, tangents), relative_difference(xla, plain)
        agree &= max(differences) <= AGREEMENT
        console.print(
            f"{rows[start].labels[0]}, depth {rows[start].labels[1]}, largest relative differences: C1 against "
            f"neural-tangents {differences[0]:.1e}, xla against cpu {differences[1]:.1e} (allowed {AGREEMENT:.0e}); "
            f"C4 float32 against float64 {relative_difference(c4, c4_exact):.1e}",
            soft_wrap=True,
        )
    return agree


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


def entries(net: GroupCNN, size: int) -> float:
    """Entries of the covariance of a pair, summed over its convolutions and the elements of its group."""
    from equikernel.groups import order

    sides, total = size, 0.0
    for step in net.convolutions:
        sides -= 2 * step.radii[0] if net.padding == "VALID" else 0
        total += float(sides) ** 4
    return total * order(net.group)


def efficiency(console: Console, size: int) -> None:
    """The second table: time per entry of the covariance, for each kind of network."""
    x1, x2 = noise(4, size, 0), noise(4, size, 1)
    nets = networks()
    for dtype in ("float32", "float64"):
        rows = [Row((name,), kernel_call(net, x1, x2, dtype=dtype), 16) for name, net in nets.items()]
        measure(rows, rounds=3)
        out = table(
            f"2. Time per entry of the covariance, {size}x{size}, {dtype}, engine cpu",
            ("network",),
            ("ms/pair", "ns", "x"),
        )
        costs = [
            1e6 * row.milliseconds_per_pair / entries(net, size) for row, net in zip(rows, nets.values(), strict=True)
        ]
        for row, cost in zip(rows, costs, strict=True):
            out.add_row(*row.labels, f"{row.milliseconds_per_pair:.2f}", f"{cost:.3f}", f"{cost / costs[0]:.2f}")
        console.print(out)


def growth(console: Console, sides: Sequence[int]) -> None:
    """The third table: cost against the side of the image, C4 of depth 3."""
    rows = []
    for side in sides:
        count = 4 if side <= 32 else 1
        rows.append(Row((f"{side}x{side}",), kernel_call(GroupCNN(), noise(count, side, 0), noise(1, side, 1)), count))
    measure(rows, rounds=3)
    out = table("3. Growth with the image, C4, depth 3, float32, engine cpu", ("size",), ("ms/pair", "ns/(HW)²"))
    for row, side in zip(rows, sides, strict=True):
        out.add_row(*row.labels, f"{row.milliseconds_per_pair:.2f}", f"{1e6 * row.milliseconds_per_pair / side**4:.2f}")
    console.print(out)


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


def vector_extension() -> str:
    """The widest x86 vector instructions, or the machine type."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")


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
    quick = parser.parse_args().quick
    jax.config.update("jax_platforms", "cpu")
    console = Console()
    console.print(machine(), soft_wrap=True)

    agree = against_neural_tangents(console, [(16, 3), (16, 8)] if quick else [(32, 3), (16, 3), (16, 8)])
    efficiency(console, 16 if quick else 32)
    growth(console, (8, 16, 32) if quick else (8, 16, 32, 64, 96))
    precision(console, (1, 10, 40) if quick else (1, 2, 5, 10, 20, 30, 40, 50))
    memory(console, (64,) if quick else (64, 224))
    if not agree:
        console.print("The programs disagree: the times of the first table compare different results.")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
