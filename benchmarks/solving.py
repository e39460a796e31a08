"""The solvers at the sizes that they are for, on a store of a synthetic kernel; part of ``make bench``.

1. The regression in memory against scipy's ``cho_factor`` and ``cho_solve`` on the same matrix: ratios of medians.
2. A factorisation in the store with a quarter of the memory that the matrix takes, against the one in memory.
3. Conjugate gradients with 30,000 images (a matrix of 3.6 GB), and the memory of the process.

    python benchmarks/solving.py [--parts 123] [--images 30000]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from equigram.data import fingerprint, load_dataset
from equigram.solve import StoredOperator, class_targets, solve, solve_iteratively, solve_tiled
from equigram.spec import JobSpec
from equigram.store import GramStore

EDGE, CLASSES, RIDGE = 256, 9, 1e-3
GIB = 2**30


def points(count: int) -> tuple[NDArray[np.float64], Any]:
    """Points whose kernel exp(-|x - x'| / 2) is the matrix, and the targets of nine classes of them."""
    x = np.random.default_rng(0).standard_normal((count, 8))
    labels = (np.abs(x[:, 0]) + np.abs(x[:, 1]) > 1.6) * 3 + (x[:, 2] > 0.5).astype(int) + (x[:, 3] > 0.5)
    return x, class_targets(labels, "abcdefghi")


def kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float32]:
    """exp(-|x - y| / 2), (len(x), len(y))."""
    squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * x @ y.T
    return np.asarray(np.exp(-np.sqrt(np.maximum(squares, 0)) / 2), np.float32)


def make_store(folder: Path, count: int) -> GramStore:
    """A finished run of so many images of one pixel, whose matrix is the synthetic kernel."""
    np.savez(folder / "x.npz", x_train=np.zeros((count, 1, 1, 1)) + np.arange(count)[:, None, None, None] + 1)
    spec = JobSpec.parse(
        {
            "store": str(folder / f"run-{count}"),
            "data": {"train": str(folder / "x.npz"), "normalize": "none"},
            "network": {"depth": 1, "filter_size": 1},
            "gram": {"groups": ["C1"], "kernels": ["ntk"], "tile": EDGE},
            "solve": None,
        }
    )
    if GramStore.exists(spec.store):
        return GramStore.open(spec.store)
    store = GramStore.create(spec, load_dataset(spec.data, square=False), EDGE, fingerprint(spec.data))
    x, _ = points(count)
    for tile in store.info.tiling.tiles():
        rows, cols = store.info.tiling.rows(tile), store.info.tiling.cols(tile)
        block = kernel(x[rows.start : rows.stop], x[cols.start : cols.stop])
        if tile.row == tile.col:
            block = np.maximum(block, block.T)
            np.fill_diagonal(block, 1)
        store.write_values(tile, {("C1", "ntk"): block})
    return store


def by_scipy(gram: NDArray[np.float32], targets: Any) -> NDArray[np.float64]:
    """The coefficients, by scipy alone."""
    matrix = gram.astype(np.float64)
    matrix[np.diag_indices_from(matrix)] += RIDGE
    found: NDArray[np.float64] = scipy.linalg.cho_solve(
        scipy.linalg.cho_factor(matrix, lower=True, overwrite_a=True), targets.values
    )
    return found


def direct(folder: Path, count: int) -> None:
    """Part 1."""
    gram, (_, targets) = make_store(folder, count).matrix("gram", "C1", "ntk"), points(count)
    ours, theirs = [], []
    for _ in range(7 if count < 5000 else 3):
        began = time.perf_counter()
        (solution,) = solve(gram, targets, [RIDGE])
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        expected = by_scipy(gram, targets)
        theirs.append(time.perf_counter() - began)
    error = np.abs(solution.coefficients - expected).max() / np.abs(expected).max()
    print(
        f"direct, {count:,} images: {statistics.median(ours):.2f} s, scipy {statistics.median(theirs):.2f} s, ratio "
        f"{statistics.median(ours) / statistics.median(theirs):.2f}; differs by {error:.0e}, residual "
        f"{solution.residual:.0e}, condition {solution.condition:.0e}"
    )


def tiled(folder: Path, count: int) -> None:
    """Part 2."""
    store, (_, targets) = make_store(folder, count), points(count)
    budget = count * count  # a quarter of float32
    store.discard_factor("C1", "ntk")
    began = time.perf_counter()
    solution = solve_tiled(store, "C1", "ntk", targets, RIDGE, memory=budget)
    seconds = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.perf_counter()
    (expected,) = solve(store.matrix("gram", "C1", "ntk"), targets, [RIDGE])
    error = np.abs(solution.coefficients - expected.coefficients).max() / np.abs(expected.coefficients).max()
    print(
        f"tiled, {count:,} images, {budget / GIB:.2f} GiB: {seconds:.1f} s ({time.perf_counter() - began:.1f} s in "
        f"memory), process {used / GIB:.2f} GiB; differs by {error:.0e}, residual {solution.residual:.0e}, condition "
        f"{solution.condition:.0e} ({expected.condition:.0e})"
    )


def iterative(folder: Path, count: int) -> None:
    """Part 3."""
    store, (_, targets) = make_store(folder, count), points(count)
    steps: list[float] = []
    began = time.perf_counter()
    operator = StoredOperator(store, "C1", "ntk", memory=GIB // 2)
    solution = solve_iteratively(
        operator, targets, RIDGE, rank=384, progress=lambda step, residual: steps.append(time.perf_counter())
    )
    seconds = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    each = (steps[-1] - steps[0]) / max(1, len(steps) - 1)
    print(
        f"conjugate gradients, {count:,} images: {seconds:.0f} s, {len(steps)} steps of {each:.1f} s, process "
        f"{used / GIB:.2f} GiB; residual {solution.residual:.0e}, condition {solution.condition:.0e}"
    )


PARTS = {"direct": direct, "tiled": tiled, "iterative": iterative}


def main() -> None:
    """Run the parts, each in a process of its own, so that its memory is its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="123")
    parser.add_argument("--images", type=int, default=30_000, help="of part 3")
    parser.add_argument("--only", nargs=3, metavar=("PART", "FOLDER", "IMAGES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        part, folder, count = options.only
        PARTS[part](Path(folder), int(count))
        return
    sizes = {
        "1": [("direct", 2000), ("direct", 10_000)],
        "2": [("tiled", 10_000)],
        "3": [("iterative", options.images)],
    }
    with tempfile.TemporaryDirectory() as name:
        for number in options.parts:
            for part, count in sizes[number]:
                make_store(Path(name), count)
                subprocess.run([sys.executable, __file__, "--only", part, name, str(count)], check=True)


if __name__ == "__main__":
    main()
