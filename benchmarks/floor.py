"""How fast the instructions of the recursion could be: the least time of a pair of images.

    python benchmarks/floor.py

on an x86-64 processor with AVX2 or AVX-512, whose instructions it can count.

The CPU engine spends its time in one loop per kind of layer. The instructions of such a loop that compute are counted
in its machine code, without loads and stores; then a loop with as many of each kind is timed, on registers, where none
waits for another: nothing that computes these instructions can be faster on this processor. The sum over all entries
and layers is the *floor* of a pair of images and one element of the group. ``docs/performance.md`` says what follows.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from rich.console import Console
from tables import table

from equikernel import GroupCNN
from equikernel.engines import cpu
from equikernel.engines.cpu import CpuEngine
from equikernel.engines.planes import Layer, begin_layer, finish_layer, layers_of
from equikernel.engines.vectors import Function, Module, Target, Variable, Vector, aligned, host

BRANCH = 4.8e-7
"""How close to ±1 a correlation is taken as ±1; any value will do here."""

REPEATS = 20_000
"""Turns of a loop that is timed."""

CHAINS = ((12, 4), (10, 4), (8, 4), (10, 2), (9, 2), (8, 3), (8, 2), (8, 1), (7, 2))
"""Vectors that the instructions of a timed loop change in turn, those that roots are taken of apart: few wait for one
another. The fastest loop counts of those that keep all in registers."""

ROUNDS = 5
"""Times that each is timed; the fastest counts."""

CLASSES = {
    "fused": re.compile(r"vfn?m(add|sub)\d+p[sd]$"),
    "multiply": re.compile(r"vmulp[sd]$"),
    "add": re.compile(r"v(add|sub|max|min)p[sd]$"),
    "compare": re.compile(r"vcmp\w+p[sd]$"),
    "logic": re.compile(r"v(and|andn|or|xor|blendv|blendm|pternlog)\w*$"),
    "root": re.compile(r"vsqrtp[sd]$"),
    "estimate": re.compile(r"vrsqrt\w+p[sd]$"),
}
"""The packed instructions of x86-64 that compute."""


@dataclass(frozen=True)
class Loop:
    """An inner loop in machine code: packed instructions for one vector of entries.

    Attributes:
      arithmetic: those that compute, by class.
      loads, stores: operands in memory that are read and written, constants on the stack among them.
    """

    arithmetic: Counter[str]
    loads: int
    stores: int


@dataclass(frozen=True)
class Floor:
    """What a vector of entries costs without loads and stores.

    Attributes:
      network: whose it is.
      lanes: entries of a vector.
      names: of what is done with each entry: the input, and each layer.
      instructions: packed instructions that compute, by class.
      nanoseconds: on one core.
    """

    network: GroupCNN
    lanes: int
    names: tuple[str, ...]
    instructions: tuple[Counter[str], ...]
    nanoseconds: tuple[float, ...]

    def milliseconds(self, size: int, elements: int = 1, cores: int = 1) -> float:
        """Of a pair of square images and so many elements of a group, with no lane idle."""
        vectors = np.array(entries(self.network, size)) / self.lanes
        return float(vectors @ self.nanoseconds) * 1e-6 * elements / cores


def entries(network: GroupCNN, size: int) -> list[int]:
    """Entries of the covariance of a pair of square images, and after each convolution, that its mean depends on.

    With VALID padding layers have fewer, and none whose two pixels are as far apart as the last layer is wide.
    """
    found = [1] * (len(network.convolutions) + 1)
    for axis in (0, 1):
        sides = [size]
        for step in network.convolutions:
            sides.append(sides[-1] - (2 * step.radii[axis] if network.padding == "VALID" else 0))
        for number, side in enumerate(sides):
            found[number] *= sum(side - abs(offset) for offset in range(1 - sides[-1], sides[-1]))
    return found


class Registers:
    """Stands for the factors of an activation, none of which comes from memory."""

    def __init__(self, x: Vector, y: Vector) -> None:
        self._x, self._y = x, y

    def __call__(self, function: Function, number: Any) -> tuple[Vector, Vector]:
        """The same two vectors for every factor."""
        return self._x, self._y

    def after(self, planes: int) -> Registers:
        """The factors further on."""
        return self

    def product(self, function: Function, number: Any) -> Vector:
        """The product of a factor of both images."""
        return self._x * self._y


def is_counted() -> bool:
    """Whether the instructions of this processor are known here, without which there is no floor."""
    return platform.machine() in ("x86_64", "AMD64") and host().vector_bytes >= 32


def floor(
    network: GroupCNN, channels: int, dtype: Any = np.float32, target: Target | None = None, rounds: int = ROUNDS
) -> Floor:
    """Measure the floor of a network without residual branches on this processor.

    Args:
      network: of which the layers are timed.
      channels: of the images.
      dtype: precision.
      target: compile for another processor, of which this one has all instructions.
      rounds: times that each loop is timed.

    Returns:
      The floor; its times are NaN where no loop has exactly the instructions that were counted.
    """
    layers = layers_of(network.steps, channels)
    kinds: list[tuple[str, Callable[..., None]]] = [("input", _input(channels, layers[0].radii[1]))]
    for number, layer in enumerate(layers):
        following = layers[number + 1].radii[1] if number + 1 < len(layers) else None
        kinds.append((f"layer {number + 1}", _layer(layer, following, first=number == 0)))
    dtype, target = np.dtype(dtype), target or host()
    counts = {kind: _instructions(kind, dtype, target) for _, kind in kinds}
    peaks = {kind: _peak(count, dtype, target, rounds) for kind, count in counts.items()}
    return Floor(
        network,
        target.lanes(dtype),
        tuple(name for name, _ in kinds),
        tuple(counts[kind] for _, kind in kinds),
        tuple(peaks[kind] for _, kind in kinds),
    )


@cache
def _input(channels: int, radius: int) -> Callable[..., None]:
    """One entry of ``K⁰`` and of the horizontal half of the first filter."""

    def emit(f: Function, k: Variable, both: Variable, x: Vector, y: Vector) -> None:
        total = f.fused(x, k.get(), y)
        for _ in range(1, channels):
            total = f.fused(y, k.get(), total)
        for _ in range(radius):
            total = f.fused(y, k.get(), f.fused(x, k.get(), total))
        k.set(total)
        both.set(total)

    return emit


@cache
def _layer(layer: Layer, following: int | None, *, first: bool) -> Callable[..., None]:
    """One entry of a layer and of the horizontal half of the next filter, or of the sums."""

    def emit(f: Function, k: Variable, both: Variable, x: Vector, y: Vector) -> None:
        old, old_both = k.get(), both.get()
        total, total_both = old, old_both
        for _ in range(layer.radii[0]):
            total = (total + x) + y
            total_both = total if first else (total_both + x) + y
        factors: Any = Registers(x, old)
        begun = begin_layer(f, layer, total, factors, BRANCH)
        new, theta = finish_layer(f, layer, [*begun, total_both], Registers(y, old_both), BRANCH, ())  # type: ignore[arg-type]
        if following is None:
            k.set(old + new)
            both.set(old_both + theta)
            return
        for variable, entry, last in ((k, new, old), (both, new + theta, old_both)):
            value = entry
            for _ in range(following):
                value = f.fused(x, entry, f.fused(y, last, value))
            variable.set(value)

    return emit


def _instructions(kind: Callable[..., None], dtype: np.dtype[Any], target: Target) -> Counter[str]:
    """Packed instructions that one vector of entries takes, by class."""
    module = Module(dtype, target)
    f = module.function("turns", "pi")
    memory, turns = f.parameters
    x, y = f.load(memory), f.load(memory + f.lanes)
    k, both = Variable(f, x), Variable(f, y)
    with f.loop(turns):
        kind(f, k, both, x, y)
    f.store(k.get(), memory)
    f.store(both.get(), memory + f.lanes)
    f.end()
    found = [loop.arithmetic for loop in loops(module.compile("turns").assembly)]
    return max(found, key=Counter.total)


def _peak(instructions: Counter[str], dtype: np.dtype[Any], target: Target, rounds: int) -> float:
    """Nanoseconds that so many instructions of each class take if none waits for another; NaN if that is not known."""
    found = [_timed(instructions, dtype, target, rounds, *chains) for chains in CHAINS]
    return min((one for one in found if not math.isnan(one)), default=math.nan)


def _timed(
    instructions: Counter[str], dtype: np.dtype[Any], target: Target, rounds: int, chains: int, root_chains: int
) -> float:
    """Nanoseconds that they take in so many chains, of which each waits only for itself.

    NaN if the compiler makes other ones of them, or has not enough registers.
    """
    module = Module(dtype, target)
    f = module.function("turns", "pi")
    memory, turns = f.parameters
    x, y = f.load(memory), f.load(memory + f.lanes)
    sums = [Variable(f, f.load(memory + (2 + n) * f.lanes)) for n in range(chains)]
    roots = [Variable(f, f.load(memory + (2 + n) * f.lanes)) for n in range(root_chains)]
    emit: dict[str, Callable[[Vector], Vector]] = {
        "fused": lambda a: f.fused(a, x, y),
        "multiply": lambda a: a * x,
        "add": lambda a: Vector(f, f.builder.fadd(a.value, x.value)),  # which is not fused with a product before it
        "logic": lambda a: _bits_of_either(f, a, x),
        "compare": lambda a: f.where(a <= x, a, 0),
    }
    chosen = "logic"  # what selects by a comparison: in AVX-512 another operation does, under a mask
    if target.vector_bytes == 64:
        chosen = "add" if instructions["add"] >= instructions["compare"] else "multiply"
        emit["compare"] = lambda a: f.where(a <= x, emit[chosen](a), 0)
    with f.loop(turns):
        turn = 0
        for root in roots:  # each is one entry
            left = instructions.copy()
            for _ in range(left.pop("root", 0)):
                root.set(f.sqrt(root.get()))
            for _ in range(left.pop("estimate", 0)):
                root.set(f.inverse_root_estimate(root.get()))
            left[chosen] -= left["compare"]
            for name in left.elements():
                sums[turn % chains].set(emit[name](sums[turn % chains].get()))
                turn += 1
    for place, variable in enumerate([*sums, *roots]):
        f.store(variable.get(), memory + (2 + place) * f.lanes)
    f.end()
    compiled = module.compile("turns")
    timed = max(loops(compiled.assembly), key=lambda loop: loop.arithmetic.total())
    wanted = Counter({name: count * root_chains for name, count in instructions.items() if count})
    if timed != Loop(wanted, loads=0, stores=0):
        return math.nan
    numbers = aligned((2 + chains + root_chains) * f.lanes, dtype)
    numbers[:] = np.random.default_rng(0).uniform(0.5, 1, len(numbers))
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        compiled.call(numbers.ctypes.data, REPEATS)
        best = min(best, time.perf_counter() - start)
    return 1e9 * best / (REPEATS * root_chains)


def _bits_of_either(f: Function, a: Vector, b: Vector) -> Vector:
    """What has the bits that one of two vectors has."""
    integers = ir.VectorType(ir.IntType(8 * f.dtype.itemsize), f.lanes)
    both = f.builder.or_(*(f.builder.bitcast(vector.value, integers) for vector in (a, b)))
    return Vector(f, f.builder.bitcast(both, f.type))


def loops(assembly: str) -> list[Loop]:
    """The inner loops of x86-64 machine code that compute with vectors."""
    found = []
    label = ""
    body: list[str] = []
    for line in assembly.splitlines():
        if match := re.match(r"(\.LBB\w+):", line):
            label, body = match[1], []
        elif re.match(r"\tj\w+\s+" + re.escape(label) + "$", line):
            found.append(_counted(body))
        elif line.startswith("\t") and not line.startswith("\t."):
            body.append(line.strip())
    return [loop for loop in found if loop.arithmetic]


def _counted(body: list[str]) -> Loop:
    names = Counter(line.split()[0] for line in body)
    arithmetic: Counter[str] = Counter()
    for name, count in names.items():
        for kind, pattern in CLASSES.items():
            if pattern.match(name):
                arithmetic[kind] += count
    stores = sum(line.startswith("vmov") and line.endswith(")") for line in body)
    loads = sum("(" in line and not line.startswith("lea") for line in body) - stores
    return Loop(arithmetic, loads, stores)


def without_avx512() -> Target:
    """Code for AVX2 that this processor runs."""
    features = llvm.get_host_cpu_features()
    allowed = (
        f"{'+' if on and not name.startswith(('avx512', 'avx10')) else '-'}{name}" for name, on in features.items()
    )
    return Target("haswell", ",".join(allowed), 32)


@contextlib.contextmanager
def restricted_to_avx2() -> Iterator[None]:
    """Without AVX-512, as on other processors: the CPU engine, the floor, and XLA if it has not started yet."""
    with (
        mock.patch.object(cpu, "host", without_avx512),
        mock.patch.object(sys.modules[__name__], "host", without_avx512),
        mock.patch.dict(os.environ, XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa=AVX2"),
    ):
        yield


def targets() -> dict[str, Target]:
    """What to measure here, by name."""
    names = {64: "AVX-512", 32: "AVX2", 16: "vectors of 16 bytes"}
    found = {names[host().vector_bytes]: host()}
    if host().vector_bytes == 64:
        found["AVX2"] = without_avx512()
    return found


def main() -> None:
    """Print the instructions and the floor of ReLU networks of depth 3."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    if not is_counted():
        raise SystemExit("instructions are counted in the code of x86-64 processors with AVX2 or AVX-512 only")
    console = Console()
    console.width = max(console.width, 110)
    network = GroupCNN(depth=3)
    for name, target in targets().items():
        for dtype in (np.float32, np.float64):
            measured = floor(network, 3, dtype, target)
            out = table(
                f"{name}, {np.dtype(dtype).name}, {measured.lanes} entries per vector",
                ("",),
                (*CLASSES, "all", "ns/vector", "ns/entry"),
            )
            for what, count, nanoseconds in zip(
                measured.names, measured.instructions, measured.nanoseconds, strict=True
            ):
                each = (str(count[kind] or "") for kind in CLASSES)
                out.add_row(
                    what, *each, str(count.total()), f"{nanoseconds:.2f}", f"{nanoseconds / measured.lanes:.3f}"
                )
            console.print(out)
            code = CpuEngine(network, (network.group,), np.dtype(dtype), 1, 2**30, target).program(32, 32, 3)
            for loop in loops(code.compiled.assembly):
                if loop.arithmetic["root"]:
                    console.print(
                        f"  a loop of the engine: {loop.arithmetic.total()} that compute, {loop.loads} loads, "
                        f"{loop.stores} stores"
                    )
            console.print(
                f"  floor of a pair of 32x32x3 images: {measured.milliseconds(32):.3f} ms per rotation and core"
            )


if __name__ == "__main__":
    main()
