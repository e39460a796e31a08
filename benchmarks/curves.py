"""Learning curves on real images, from patches to accuracies with error bars; part of ``make bench``.

A thousand patches of photographs, turned at random like the test patches (which are from other parts of the
photographs): CNN (C1) against C4 and D4, NTK and NNGP, from one pass over the pairs; all curves from these matrices.

    python benchmarks/curves.py [--train 200] [--test 40] [--size 16] [--subsets 10] [-o FOLDER]
"""

from __future__ import annotations

import argparse
import runpy
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from equigram.experiments.curves import run_curves
from equigram.run import run
from equigram.screen import Screen
from equigram.spec import JobSpec

TEXTURES = Path(__file__).resolve().parents[1] / "examples/textures.py"

GROUPS = ("C1", "C4", "D4")
SIZES = (1, 2, 5, 10, 20, 50, 100, 200)


def experiment(folder: Path, train: int, test: int, size: int, subsets: int) -> None:
    """Cut patches, compute the matrices, and print the accuracies."""
    cut = runpy.run_path(str(TEXTURES))["main"]
    cut(folder / "patches", train, test, turned=("train", "test"))
    spec = JobSpec.parse(
        {
            "store": str(folder / "run"),
            "data": {"train": str(folder / "patches/train"), "test": str(folder / "patches/test"), "size": size},
            "network": {"depth": 3, "w_std": 2**0.5},
            "gram": {"groups": list(GROUPS)},
            "solve": None,
        }
    )
    began = time.monotonic()
    with Screen(Console(stderr=True)) as screen:
        store = run(spec, screen).store
        computed = time.monotonic()
        sizes = [one for one in SIZES if one <= train]
        rows = run_curves(store, folder / "curves", screen, sizes, subsets)
    ended = time.monotonic()
    info = store.info
    print(
        f"{info.train} training and {info.test} test images of {size}x{size}, groups {', '.join(GROUPS)}: matrices "
        f"{computed - began:.0f} s ({1e3 * (computed - began) / info.tiling.total_pairs:.2f} ms per pair), "
        f"{len(rows)} regressions {ended - computed:.0f} s"
    )
    print("images  " + "  ".join(f"{group + ' ' + kernel:>15}" for kernel in ("ntk", "nngp") for group in GROUPS))
    for images in dict.fromkeys(row["images"] for row in rows):
        cells = [_cell(rows, images, group, kernel) for kernel in ("ntk", "nngp") for group in GROUPS]
        print(f"{images:6}  " + "  ".join(f"{cell:>15}" for cell in cells))
    for kernel in ("ntk", "nngp"):
        for images in dict.fromkeys(row["images"] for row in rows):
            print(f"{kernel}, {images} images: C4 - C1 on the same subsets {_difference(rows, images, kernel)}")


def _scores(rows: list[dict[str, Any]], images: int, group: str, kernel: str) -> list[float]:
    names = images, group, kernel
    return [row["accuracy"] for row in rows if (row["images"], row["group"], row["kernel"]) == names]


def _mean(values: list[float]) -> str:
    """The mean, and its standard error."""
    bar = f" ± {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{bar}"


def _cell(rows: list[dict[str, Any]], images: int, group: str, kernel: str) -> str:
    return _mean(_scores(rows, images, group, kernel))


def _difference(rows: list[dict[str, Any]], images: int, kernel: str) -> str:
    pairs = zip(_scores(rows, images, "C4", kernel), _scores(rows, images, "C1", kernel), strict=True)
    return _mean([c4 - c1 for c4, c1 in pairs])


def main() -> None:
    """Run the experiment with the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--train", type=int, default=200, help="training patches per class, of five")
    parser.add_argument("--test", type=int, default=40, help="test patches per class")
    parser.add_argument("--size", type=int, default=16, help="pixels along a side")
    parser.add_argument("--subsets", type=int, default=10, help="random subsets of each size")
    parser.add_argument("-o", "--output", type=Path, help="keep run, tables and figures in this folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = asked.output or Path(folder)
        experiment(place, asked.train, asked.test, asked.size, asked.subsets)


if __name__ == "__main__":
    main()
