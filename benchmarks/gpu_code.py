"""What the kernels of the engine "gpu" compile to for an H100, on any machine: registers, instructions, the floor.

    python benchmarks/gpu_code.py

One line per kind of kernel: how long it takes to compile; its registers, and the bytes that do not fit in them; and
what a turn of its inner loop executes for each entry of the covariance (all layers together), by the unit of a
multiprocessor that does it: arithmetic, special functions, exchange with memory and other lanes. From the rates of
these units follows the time that each of them takes for a pair and rotation if it is never idle, of which the longest
is the *floor*. ``docs/performance.md`` says what follows.

Needs numba-cuda with NVIDIA's compiler, assembler and disassembler (``make gpu-code`` installs them), and no GPU. Exit
code 1: a kernel does not compile, or keeps rows in memory.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

try:
    import numba.cuda.dispatcher
    from numba import cuda
except ImportError:
    sys.exit("numba-cuda is not installed in this environment; run `make gpu-code`, which makes one that has it")

from equikernel import GroupCNN
from equikernel.engines import gpu_device, gpu_source

ARCHITECTURE = (9, 0)
MULTIPROCESSORS, HERTZ = 132, 1.98e9
"""Of an H100 SXM and an H200, at the highest clock."""

UNITS = {
    "float": re.compile(r"[FD](ADD|MUL|FMA)$"),
    "special": re.compile("MUFU$"),
    "exchange": re.compile("(LD[SG]?|ST[SG]?|SHFL)$"),
}
"""The instructions of each unit; the others are of all kinds, those of a branch that is seldom taken among them."""

RATES = {"float32": 128, "float64": 64, "special": 16, "exchange": 32, "issue": 128}
"""Threads of a multiprocessor of compute capability 9.0 whose instruction a unit takes in a cycle (CUDA C++ Programming
Guide, throughput of native arithmetic instructions); ``issue`` is what the schedulers hand out in all."""

LOCAL = ("LDL", "STL")
"""The instructions that move what does not fit in the registers of a thread."""

MOST_MOVES = 8
"""Of these in a turn of the inner loop, of hundreds to a thousand; each row of planes in memory would take more."""


@dataclass(frozen=True)
class Case:
    """A kernel for square images of three channels, which are in shared memory or in the cache."""

    dtype: str = "float32"
    activation: str = "relu"
    padding: Any = "SAME"
    side: int = 32
    depth: int = 3
    shared: bool = True

    def __str__(self) -> str:
        words = self.activation, self.padding, self.dtype, f"{self.side}x{self.side}", f"depth {self.depth}"
        return " ".join((*words, *([] if self.shared else ["in cache"])))


CASES = (
    Case(),
    Case(shared=False),
    Case(dtype="float64", shared=False),
    Case(activation="gelu"),
    Case(padding="VALID"),
    Case(padding="CIRCULAR"),
    Case(side=16),
    Case(side=64, shared=False),
    Case(side=8, depth=8),
)


@dataclass(frozen=True)
class Compiled:
    """What came of a kernel.

    Attributes:
      seconds: until it was compiled.
      registers: of a thread.
      spilled: bytes of a thread that do not fit in them; few, if they are what it needs once per plane.
      moves: of these within the inner loop.
      instructions: of a thread per entry of the covariance, by unit.
    """

    seconds: float
    registers: int
    spilled: int
    moves: int
    instructions: dict[str, float]

    def floor(self, case: Case) -> dict[str, float]:
        """Microseconds of a pair and rotation, by unit."""
        entries = case.side**4 / (MULTIPROCESSORS * HERTZ)
        rates = {**RATES, "float": RATES[case.dtype]}
        return {unit: 1e6 * entries * count / rates[unit] for unit, count in self.instructions.items() if unit in rates}


def compile_case(case: Case) -> Compiled:
    """Compile a kernel, and count.

    Raises:
      CalledProcessError: NVIDIA's assembler does not take it.
    """
    net = GroupCNN(depth=case.depth, activation=case.activation, padding=case.padding)
    shape = (case.side, case.side, 3)
    source = gpu_source.kernel_source(net.steps, net.padding, shape, case.dtype, case.shared)
    major, minor = ARCHITECTURE
    start = time.perf_counter()
    function = gpu_device.functions_of(source, case.dtype)["kernel"]
    code, _ = cuda.compile_ptx(function, gpu_device.signatures(case.dtype)["kernel"], cc=ARCHITECTURE)
    with tempfile.TemporaryDirectory() as folder:
        text, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        text.write_text(code)
        options = f"-arch=sm_{major}{minor}", f"-maxrregcount={source.registers}", "-v"
        said = _run("ptxas", *options, text, "-o", binary).stderr
        seconds = time.perf_counter() - start
        listing = _run("nvdisasm", "-c", binary).stdout
    counted = inner_loop(listing)
    entries = source.layout.columns * source.unrolled
    units = {unit: sum(n for name, n in counted.items() if kind.match(name)) for unit, kind in UNITS.items()}
    units["issue"] = counted.total()
    return Compiled(
        seconds=seconds,
        registers=max(map(int, re.findall(r"Used (\d+) registers", said))),
        spilled=max(map(int, re.findall(r"(\d+) bytes spill stores", said))),
        moves=sum(counted[name] for name in LOCAL),
        instructions={unit: count / entries for unit, count in units.items()},
    )


def inner_loop(listing: str) -> Counter[str]:
    """The instructions of the shortest loop with special functions, by name; ``listing`` is what nvdisasm writes."""
    labels: dict[str, int] = {}
    names: list[str] = []
    loops: list[Counter[str]] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", line):
            names.append(instruction[1])
            target = re.search(r"BRA\S*\s.*`\((\.L_\w+)\)", line)
            if target and target[1] in labels:
                loops.append(Counter(names[labels[target[1]] :]))
    return min((loop for loop in loops if loop["MUFU"]), key=Counter.total)


def _run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run one of the tools that come with NVIDIA's packages."""
    command = [str(next(_tools(tool), tool)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)


def _tools(name: str) -> Iterator[Path]:
    found = find_spec("nvidia")
    for place in (found.submodule_search_locations or []) if found else []:
        yield from Path(place).glob(f"*/bin/{name}")


def main() -> int:
    """Print a line per kernel."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    # Device functions are compiled for the processor of the moment, and there is none.
    numba.cuda.dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=ARCHITECTURE)
    units = ("issue", *UNITS)
    print(" " * 60 + f"{'per entry':>42}{'floor, µs':>40}")
    print(
        f"{'':44}{'s':>4} {'regs':>5} {'spill':>5} "
        + "".join(f"{unit:>10}" for unit in ("all", *UNITS))
        + "".join(f"{unit:>10}" for unit in units)
    )
    wrong = 0
    for case in CASES:
        try:
            found = compile_case(case)
        except subprocess.CalledProcessError as error:
            print(f"WRONG: {case}: {error.stderr}")
            wrong += 1
            continue
        floors = found.floor(case)
        print(
            f"{case!s:44}{found.seconds:4.1f} {found.registers:5} {found.spilled:5} "
            + "".join(f"{found.instructions[unit]:10.1f}" for unit in units)
            + "".join(f"{floors[unit]:10.2f}" for unit in units),
            flush=True,
        )
        if found.moves > MOST_MOVES:
            print(f"WRONG: its inner loop moves {found.moves} numbers between registers and memory")
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
