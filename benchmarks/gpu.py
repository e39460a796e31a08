"""Whether the engine "gpu" is right on the GPU of this machine, and how fast.

    python benchmarks/gpu.py [--quick]

First it is compared with the literal recursion (small images: all paddings, activations, precisions) and with the
engine "cpu" in float64 (larger ones). Then one line per image size, depth, padding and precision, as they come: µs per
pair and rotation, the floor and the ratio to it, the engines "xla" on the same GPU and "cpu" on two cores of the same
machine, and the days that 100,000 images take with C4. The floor is the time of the arithmetic alone, at the peak rate
of the GPU's data sheet. ``--quick`` leaves out depth 21, whose kernels take a quarter of a minute each to compile.

Exit code 0: right; 1: wrong, with the cases; 2: there is no GPU that the engine can use. (``make`` has its own 2 for
both.)
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equikernel import Activation, Conv, EquikernelError, GroupCNN, Residual
from equikernel.kernel import KernelFunction, jax_has_gpu, why_no_gpu

TOLERANCE = {"float32": 5e-6, "float64": 1e-12}
"""Largest difference, relative to ``√(K(f, f) K(f', f'))``."""

PEAK = {
    r"H200|H100 80GB HBM3|H100 SXM\w*|GH200": (67.0, 34.0),
    "H100 NVL": (60.0, 30.0),
    "H100 PCIe": (51.0, 26.0),
    "A100": (19.5, 9.7),
    "L40S": (91.6, 1.43),
    "L40": (90.5, 1.41),
    "L4": (30.3, 0.473),
    "A10": (31.2, 0.488),
    "V100": (15.7, 7.8),
    "T4": (8.1, 0.253),
}
"""TFLOPS of float32 and float64 without tensor cores, of data sheets, where a fused multiply-add is two; by
words in the name of the GPU."""

ARITHMETIC = {"float32": 27.7, "float64": 55.7}
"""Arithmetic instructions per plane entry and layer, of ReLU and 3x3 filters at depth 3, from ``make gpu-code``."""

GOAL_MICROSECONDS, GOAL_RATIO, GOAL_CORES, GOAL_DAYS = 8.0, 4.0, 100.0, 2.0
"""Of 32x32 pixels at depth 3, SAME, float32, on an H100 or H200: µs of a pair and rotation, times the floor, times as
fast as two cores of a CPU, and days of the large job; at most, but for the cores."""

IMAGES, ROTATIONS = 100_000, 4
"""Of the large job."""

ENOUGH_SECONDS = 0.5
"""A call that takes so long is timed; shorter ones get more pairs."""

RESNET = (
    Conv(3, activation="identity"),
    Residual([Activation("gelu"), Conv(3), Residual([Conv((5, 3))]), Conv(1)]),
    Conv((1, 5), activation="sin", b_std=0.4),
)

SMALL: dict[str, tuple[GroupCNN, tuple[int, int, int]]] = {
    "one pixel": (GroupCNN(group="C4", depth=2, b_std=0.3), (1, 1, 3)),
    **{
        f"{padding} {activation}": (
            GroupCNN(group="C2", depth=2, padding=padding, activation=activation, w_std=1.4, b_std=0.1),
            (7, 9, 2),
        )
        for padding, activation in product(
            ("SAME", "VALID", "CIRCULAR"), ("relu", "leaky_relu(0.2)", "abs", "erf", "gelu", "sin", "cos", "hermite(4)")
        )
    },
    "other numbers in the same layers": (
        GroupCNN(group="C2", depth=2, activation="leaky_relu(0.3)", w_std=1.2, b_std=0.2),
        (7, 9, 2),
    ),
    "residual": (GroupCNN(group="D2", layers=RESNET), (8, 7, 2)),
    "residual, periodic": (GroupCNN(group="D2", layers=RESNET, padding="CIRCULAR"), (8, 6, 2)),
    "wide filters": (GroupCNN(group="C2", layers=[Conv((3, 5)), Conv((5, 7))], padding="VALID"), (8, 13, 1)),
    "32 channels": (GroupCNN(group="C4", depth=2), (7, 7, 32)),
    "D4": (GroupCNN(group="D4", depth=3), (8, 8, 1)),
}
"""Compared with the literal recursion."""

LARGE: dict[str, tuple[GroupCNN, tuple[int, int, int]]] = {
    **{
        f"{padding} {side}x{side}": (GroupCNN(group="C2", depth=3, padding=padding, w_std=2**0.5), (side, side, 3))
        for padding, side in product(("SAME", "VALID", "CIRCULAR"), (16, 32, 64))
    },
    "33x47": (GroupCNN(group="C2", depth=3), (33, 47, 3)),
    "96x96": (GroupCNN(group="C1", depth=2), (96, 96, 3)),
    "depth 21": (GroupCNN(group="C1", depth=21, w_std=2**0.5), (16, 16, 3)),
}
"""Compared with the engine "cpu" in float64."""

BRIGHT: dict[str, tuple[GroupCNN, tuple[int, int, int]]] = {
    f"{padding}, bright lines": (GroupCNN(group="C2", depth=12, padding=padding, activation="gelu"), (6, 11, 1))
    for padding in ("SAME", "CIRCULAR")
}
"""Likewise, with a row and a column of each image 255 times as bright: what does not count may be infinite here."""


def main() -> int:
    """Compare, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without depth 21")
    quick = parser.parse_args().quick
    if why := why_no_gpu():
        print(f"The engine 'gpu' cannot be checked or measured on this machine: {why}.")
        return 2
    from equikernel.engines.gpu_device import device

    gpu = device()
    print(f"{gpu.kind}, {gpu.free() / 2**30:.0f} GiB free, {gpu.shared // 1024} KiB shared by a block", flush=True)
    wrong = [*compare(SMALL, "reference"), *compare(LARGE, "cpu"), *compare(BRIGHT, "cpu", 255), *repeated()]
    for line in wrong:
        print(f"WRONG: {line}")
    print(f"{len(wrong)} of {2 * (len(SMALL) + len(LARGE) + len(BRIGHT)) + 1} comparisons are wrong\n", flush=True)
    measure(gpu.kind, (3,) if quick else (3, 21))
    return 1 if wrong else 0


def special_images(shape: tuple[int, int, int], bright: float = 1.0) -> NDArray[np.float64]:
    """Noise with a bright row and column, a multiple, the half turn and the negative of it, a constant and zero."""
    x = np.random.default_rng(0).normal(size=(2, *shape))
    x[:, shape[0] // 3] *= bright
    x[:, :, 0] *= bright
    return np.concatenate([x, [3 * x[0], x[0, ::-1, ::-1], -x[1], np.full(shape, 0.7), np.zeros(shape)]])


def compare(cases: dict[str, tuple[GroupCNN, tuple[int, int, int]]], judge: str, bright: float = 1.0) -> list[str]:
    """What is wrong with the engine, in words."""
    wrong = []
    for name, (net, shape) in cases.items():
        x = special_images(shape, bright)[: 7 if judge == "reference" else 3]
        exact = net.kernel(x, engine=judge, dtype="float64")
        diagonals = [np.sqrt(np.maximum(np.diag(values), 0)) for values in exact]
        scales = [np.outer(diagonal, diagonal) for diagonal in diagonals]
        for dtype, tolerance in TOLERANCE.items():
            try:
                found = net.kernel(x, engine="gpu", dtype=dtype)
            except EquikernelError as error:
                wrong.append(f"{name}, {dtype}: {error}")
                continue
            worst = max(
                float(np.max(abs(values - truth) / np.where(scale > 0, scale, 1)))
                for values, truth, scale in zip(found, exact, scales, strict=True)
            )
            if not worst <= tolerance:
                wrong.append(f"{name}, {dtype}: {worst:.1e} from {judge!r}, allowed {tolerance:.0e}")
    return wrong


def repeated() -> list[str]:
    """Whether the bits of pairs depend on the others of a call."""
    x = np.random.default_rng(1).normal(size=(40, 32, 32, 3))
    net = GroupCNN(group="C4", depth=3)
    whole, some = net.kernel(x, engine="gpu"), net.kernel(x[:3], x[20:], engine="gpu")
    same = all(np.array_equal(values[:3, 20:], part) for values, part in zip(whole, some, strict=True))
    return [] if same else ["the bits of a pair depend on the other pairs of a call"]


@dataclass(frozen=True)
class Case:
    """What is timed."""

    side: int
    depth: int
    padding: Any
    dtype: str

    def seconds(self, engine: str) -> float:
        """Of a pair and rotation, the shortest of three calls; on two cores, if on any."""
        net = GroupCNN(group="C4", depth=self.depth, padding=self.padding)
        function = KernelFunction(net, ("C4",), engine, self.dtype, threads=2)
        images = np.random.default_rng(0).normal(size=(2, self.side, self.side, 3)).astype(self.dtype)
        edge = 1
        while True:
            one, other = (function.prepare(image[None].repeat(edge, axis=0)) for image in images)
            times = []
            for _ in range(3):
                start = time.perf_counter()
                function(one, other)
                times.append(time.perf_counter() - start)
            if min(times) >= ENOUGH_SECONDS or edge >= 1024:
                return min(times) / (edge**2 * ROTATIONS)
            edge *= 2

    def floor(self, kind: str) -> float:
        """Seconds of the arithmetic at the peak rate; 0 where that is not known."""
        for words, peaks in PEAK.items():
            if re.search(rf"\b({words})\b", kind):
                peak = 1e12 * peaks[0 if self.dtype == "float32" else 1] / 2
                return self.side**4 * self.depth * ARITHMETIC[self.dtype] / peak
        return 0.0


def measure(kind: str, depths: tuple[int, ...]) -> None:
    """A line per case."""
    print("                                          µs per pair and rotation              times        100,000 images")
    print("   side depth  padding  dtype         gpu     floor       xla   2 cores    floor  2 cores        C4, days")
    for depth, dtype, padding, side in product(depths, TOLERANCE, ("SAME", "VALID", "CIRCULAR"), (8, 16, 32, 64, 96)):
        if padding == "VALID" and side <= 2 * depth:
            continue
        case = Case(side, depth, padding, dtype)
        own, floor = case.seconds("gpu"), case.floor(kind)
        # Compiling for XLA takes long, so of depth 21 one size is enough.
        some = padding == "SAME" and (depth == 3 or side == 32)
        xla = case.seconds("xla") if jax_has_gpu() and some else 0.0
        cores = case.seconds("cpu") if some else 0.0
        days = own * ROTATIONS * IMAGES * (IMAGES + 1) / 2 / 86_400
        print(
            f"{side:4}x{side:<3} {depth:4}  {padding:8} {dtype} "
            + "".join(_or_nothing(1e6 * seconds, 10) for seconds in (own, floor, xla, cores))
            + _or_nothing(own / floor if floor else 0, 9)
            + _or_nothing(cores / own, 9)
            + f"{days:16.2f}",
            flush=True,
        )
        if (side, depth, padding, dtype) == (32, 3, "SAME", "float32"):
            goals = (
                (f"{GOAL_MICROSECONDS:g} µs", 1e6 * own <= GOAL_MICROSECONDS),
                (f"{GOAL_RATIO:g} times the floor", bool(floor) and own <= GOAL_RATIO * floor),
                (f"{GOAL_CORES:g} times two cores", cores >= GOAL_CORES * own),
                (f"{GOAL_DAYS:g} days", days <= GOAL_DAYS),
            )
            for goal, met in goals:
                print(f"        goal, {goal}: {'met' if met else 'missed'}", flush=True)


def _or_nothing(number: float, width: int) -> str:
    return f"{f'{number:.2f}' if number else '-':>{width}}"


if __name__ == "__main__":
    sys.exit(main())
