"""How fast one pair of images is, beside neural-tangents' plain CNN on the same machine in the same run.

    python benchmarks/bench.py [--quick]

The competitors take turns over several rounds, so that a busy machine slows all of them, and the medians are compared.
The full run takes some minutes and a few GB of memory; ``--quick`` leaves out 32x32 images.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from equikernel import GroupCNN
from equikernel.kernel import available_cores
from equikernel.tangents import stax

Images = NDArray[np.float32]
BLOCK = 8
"""Images on each side of a call: 8x8 pairs, the best block of neural-tangents."""

AGREEMENT = 1e-5
"""Largest relative difference between the plain CNN kernels of the two programs, float32."""


@dataclass(frozen=True)
class Case:
    """A network and an image size, on which all competitors are compared."""

    size: int
    depth: int


@dataclass
class Competitor:
    """One row of the table: ``call`` returns NNGP and NTK of one block of pairs, as ``(2, 8, 8)``."""

    case: Case
    program: str
    group: str
    dtype: str
    call: Callable[[], NDArray[Any]]
    calls_per_round: int
    result: NDArray[Any] = field(init=False)
    seconds: list[float] = field(default_factory=list)

    @property
    def milliseconds_per_pair(self) -> float:
        """Median over the timed calls."""
        return 1e3 * statistics.median(self.seconds) / BLOCK**2

    def warm_up(self) -> None:
        """Compile, and keep the result."""
        self.result = self.call()

    def time_one_round(self) -> None:
        """Time ``calls_per_round`` calls."""
        for _ in range(self.calls_per_round):
            start = time.perf_counter()
            self.call()
            self.seconds.append(time.perf_counter() - start)


def tangents_call(case: Case, x1: Images, x2: Images) -> Callable[[], NDArray[Any]]:
    """The plain CNN with global average pooling and a dense read-out, in neural-tangents, jitted."""
    layers = [layer for _ in range(case.depth) for layer in (stax.Conv(1, (3, 3), padding="SAME"), stax.Relu())]
    _, _, kernel_fn = stax.serial(*layers, stax.GlobalAvgPool(), stax.Dense(1))
    jitted = jax.jit(lambda x1, x2: kernel_fn(x1, x2, ("nngp", "ntk")))
    return lambda: np.stack(jitted(x1, x2))


def equikernel_call(case: Case, groups: str, dtype: str, x1: Images, x2: Images) -> Callable[[], NDArray[Any]]:
    """The same network over ``groups`` in one pass, in the fast engine, through the public function; the last one's."""
    net, names = GroupCNN(depth=case.depth), groups.split("+")
    return lambda: np.stack(net.kernel(x1, x2, engine="cpu", dtype=dtype, groups=names)[names[-1]])


def competitors(case: Case) -> list[Competitor]:
    """The rows of one case, the baseline first; nothing is computed yet."""
    rng = np.random.default_rng(0)
    x1, x2 = (rng.normal(size=(BLOCK, case.size, case.size, 3)).astype(np.float32) for _ in range(2))
    rows = [Competitor(case, "neural-tangents", "C1", "float32", tangents_call(case, x1, x2), calls_per_round=1)]
    for groups in ("C1", "C2", "C4", "C1+C2+C4", "D4"):
        call = equikernel_call(case, groups, "float32", x1, x2)
        rows.append(Competitor(case, "equikernel", groups, "float32", call, calls_per_round=3))
    call = equikernel_call(case, "C4", "float64", x1, x2)
    rows.append(Competitor(case, "equikernel", "C4", "float64", call, calls_per_round=3))
    return rows


def relative_difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The largest ``|a - b| / |b|``."""
    return float(np.max(np.abs(a - b) / np.abs(b)))


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
        f"{name} {importlib.metadata.version(name)}" for name in ("neural-tangents", "jax", "numba", "numpy")
    )
    extension = vector_extension()
    return (
        f"{processor()}, {platform.machine()}{f' {extension}' if extension else ''}, {available_cores()} cores in use; "
        f"Python {platform.python_version()}, {versions}"
    )


def table(rows: list[Competitor]) -> Table:
    """Medians, and the ratio to neural-tangents' plain CNN on the same images."""
    title = f"NNGP and NTK, {BLOCK}x{BLOCK} pairs of RGB images, 3x3 filters, SAME, ReLU"
    caption = "faster: than neural-tangents' plain CNN (C1) on one pair"
    out = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("size", "depth", "program", "group", "dtype"):
        out.add_column(name, no_wrap=True)
    for name in ("ms/pair", "pairs/s", "faster"):
        out.add_column(name, justify="right", no_wrap=True, min_width=7)
    for row in rows:
        same_case = [other for other in rows if other.case == row.case]
        out.add_row(
            f"{row.case.size}x{row.case.size}",
            str(row.case.depth),
            row.program,
            row.group,
            row.dtype,
            f"{row.milliseconds_per_pair:.2f}",
            f"{1e3 / row.milliseconds_per_pair:.1f}",
            f"{same_case[0].milliseconds_per_pair / row.milliseconds_per_pair:.1f}x",
            end_section=row is same_case[-1],
        )
    return out


def main() -> int:
    """Measure, print, and return 1 when the programs disagree."""
    parser = argparse.ArgumentParser(description="Compare the kernels of one pair with those of neural-tangents.")
    parser.add_argument("--quick", action="store_true", help="only 16x16 images, about a minute")
    quick = parser.parse_args().quick
    jax.config.update("jax_platforms", "cpu")
    console = Console()
    console.print(machine(), soft_wrap=True)

    cases = [Case(16, 3), Case(16, 8)] if quick else [Case(32, 3), Case(16, 3), Case(16, 8)]
    rows = [row for case in cases for row in competitors(case)]
    for row in rows:
        row.warm_up()
    for _ in range(2):
        for row in rows:
            row.time_one_round()
    console.print(table(rows))

    agree = True
    for case in cases:
        tangents, plain, _, c4, _, _, c4_exact = (row.result for row in rows if row.case == case)
        difference = relative_difference(plain, tangents)
        agree &= difference <= AGREEMENT
        console.print(
            f"{case.size}x{case.size}, depth {case.depth}, largest relative differences: "
            f"C1 against neural-tangents {difference:.1e} (allowed {AGREEMENT:.0e}), "
            f"C4 float32 against float64 {relative_difference(c4, c4_exact):.1e}",
            soft_wrap=True,
        )
    if not agree:
        console.print("The programs disagree: the times above compare different results.")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
