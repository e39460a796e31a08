"""How many tiles a second the driver hands out, and how many workers it can keep busy; ``make scaling``.

1. The real driver and the real store with a kernel that costs nothing, against a bare loop of Ray actors that write the
   same chunks with zarr alone.
2. The same with a kernel that takes a while, on 1, 2 and 4 workers, against a simulation of the real dispatcher in
   virtual time, whose inputs are measured in 1.
3. The simulation on 8 to 4,096 workers, and what limits them first.
4. A resume of a store with a million chunks, and a plan of a hundred million tiles.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equigram.data import fingerprint, load_dataset
from equigram.dispatch import Dispatcher
from equigram.driver import OnRay, TileActor
from equigram.events import nobody
from equigram.plan import TILE_SECONDS, Tile, Tiling
from equigram.simulated import Simulated
from equigram.spec import JobSpec
from equigram.store import GramStore
from equikernel.kernel import Kernel

EDGE = 256
"""Images of a tile: 256 KiB a chunk in float32."""

MEMORY = 2**27
IN_FLIGHT = 2

SETTLE = 8.0
"""Seconds that the agents of a new cluster take to start, on the same cores: nothing is timed before."""


@dataclass
class Images:
    """A block that is nothing but so many images."""

    count: int


class Nothing:
    """A kernel function that takes ``seconds`` and returns zeros."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def prepare(self, images: Any) -> Images:
        """Count them."""
        return Images(len(images))

    def __call__(self, row: Images, col: Images | None = None) -> dict[str, Kernel]:
        """Sleep, and make zeros."""
        time.sleep(self.seconds)
        zeros = np.zeros((row.count, (col or row).count), np.float32)
        return {"C1": Kernel(zeros, zeros)}


class Stub(TileActor):
    """A worker whose kernel is :class:`Nothing`; how long it takes comes in the environment."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._worker._function = Nothing(float(os.environ.get("STUB_SECONDS", "0")))  # type: ignore[assignment]


class Bare:
    """Writes chunks of a zarr array, and does nothing else."""

    def __init__(self, path: str) -> None:
        import zarr

        self.array: Any = zarr.open_array(path, mode="r+")
        self.values = np.zeros((EDGE, EDGE), np.float32)

    def compute(self, row: int, col: int) -> int:
        """Write a chunk and its mirror image."""
        rows, cols = (slice(EDGE * block, EDGE * (block + 1)) for block in (row, col))
        self.array[rows, cols] = self.values
        if row != col:
            self.array[cols, rows] = self.values.T
        return row


def make_store(folder: Path, blocks: int, edge: int = EDGE) -> GramStore:
    """A store without tiles, of ``blocks`` x ``blocks`` chunks of ``edge`` x ``edge`` values, in a new folder."""
    folder.mkdir()
    np.savez(folder / "x.npz", x_train=np.random.default_rng(0).normal(size=(edge * blocks, 2, 2, 1)))
    spec = JobSpec.parse(
        {
            "store": str(folder / "run"),
            "data": {"train": str(folder / "x.npz")},
            "network": {"depth": 1},
            "gram": {"groups": ["C1"], "kernels": ["ntk"], "tile": edge, "engine": "reference"},
            "solve": None,
        }
    )
    dataset = load_dataset(spec.data, square=False)
    return GramStore.create(spec, dataset, edge, fingerprint(spec.data))


@dataclass
class Run:
    """What a run of the driver took."""

    tiles: int
    seconds: float
    driver_seconds: float
    """Of processor time of the driver."""

    @property
    def rate(self) -> float:
        """Tiles a second."""
        return self.tiles / self.seconds


def driven(store: GramStore, workers: int, seconds: float, warm: int = 50) -> Run:
    """The real driver on ``workers`` actors; the first tiles, while workers start, do not count."""
    import ray

    class Counted(OnRay):
        def capacity(self) -> int:
            return workers

    os.environ["STUB_SECONDS"] = str(seconds)
    ray.init(
        address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        runtime_env={"env_vars": {"STUB_SECONDS": str(seconds)}},
    )  # fmt: skip
    try:
        executor = Counted(store, store.info.spec, ("C1",), MEMORY, Stub)
        reports = Dispatcher(store.info.tiling.strips(), executor, nobody, 600).run()
        for _ in range(warm):
            next(reports)
        time.sleep(SETTLE)
        began, processor = time.perf_counter(), time.process_time()
        tiles = sum(1 for _ in reports)
        return Run(tiles, time.perf_counter() - began, time.process_time() - processor)
    finally:
        ray.shutdown()


def bare(folder: Path, blocks: int, workers: int, warm: int = 50) -> float:
    """Tiles a second of a loop that only hands out chunks and waits."""
    import ray
    import zarr

    path = str(folder / "bare.zarr")
    zarr.create_array(
        path, shape=(EDGE * blocks,) * 2, chunks=(EDGE, EDGE), dtype="float32", compressors=None,
        config={"write_empty_chunks": True},
    )  # fmt: skip
    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        actors = [ray.remote(Bare).options(num_cpus=1, max_concurrency=IN_FLIGHT).remote(path) for _ in range(workers)]
        tiles = ((row, col) for row in range(blocks) for col in range(row, blocks))
        running = {actor.compute.remote(*next(tiles)): actor for actor in actors for _ in range(IN_FLIGHT)}
        done, began = 0, 0.0
        while running:
            (call,), _ = ray.wait(list(running))
            actor = running.pop(call)
            done += 1
            if done == warm:
                time.sleep(SETTLE)
                began = time.perf_counter()
            following = next(tiles, None)
            if following is not None:
                running[actor.compute.remote(*following)] = actor
        return (done - warm) / (time.perf_counter() - began)
    finally:
        ray.shutdown()


def simulated(tiling: Tiling, workers: int, seconds: float, driver_seconds: float, write_seconds: float) -> float:
    """Seconds that the real dispatcher takes in virtual time, once the workers are there."""

    def cost(worker: int, tile: Tile) -> float:
        return seconds * tiling.pairs(tile) / tiling.edge**2 if seconds > 1 else seconds

    executor = Simulated(
        cost, lambda now: workers, start_seconds=0.0, write_seconds=write_seconds,
        submit_seconds=driver_seconds / 2, answer_seconds=driver_seconds / 2,
    )  # fmt: skip
    for _ in Dispatcher(tiling.strips(), executor, nobody, 1e9).run():
        pass
    return executor.now()


def dispatch_seconds(workers: int) -> float:
    """Processor time that the decisions themselves take per tile, without Ray, storage or anything else."""
    tiling = Tiling(train=200, test=0, edge=1)
    began = time.process_time()
    simulated(tiling, workers, 1.0, 0.0, 0.0)
    return (time.process_time() - began) / len(tiling)


RESUME = """
import resource, sys, time
from equigram.store import GramStore
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
store = GramStore.open(sys.argv[1])
done = store.finished_tiles()
strips = sum(1 for _ in store.info.tiling.strips(done))
seconds = time.perf_counter() - began
print(len(done), strips, seconds, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def resume(folder: Path, blocks: int) -> None:
    """Time and memory of a resume, in a process of its own, of a store of which all chunks but some are there."""
    store = make_store(folder, blocks, edge=8)
    chunks = Path(store.url, "gram/C1/ntk/c")
    for row in range(blocks):
        (chunks / str(row)).mkdir(parents=True)
        for col in range(blocks):
            with (chunks / str(row) / str(col)).open("wb") as file:
                file.truncate(store.chunk_bytes)
    (chunks / "0" / "7").unlink()
    out = subprocess.run([sys.executable, "-c", RESUME, store.url], capture_output=True, text=True, check=True).stdout
    done, strips, seconds, before, peak = out.split()
    print(
        f"resume of {blocks**2:,} chunks ({int(done):,} tiles, {strips} strip left): {float(seconds):.1f} s, "
        f"{int(peak) // 1024} MB at most, of which {int(before) // 1024} MB are Python and its packages"
    )


def main() -> None:
    """Measure, simulate, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=60, help="blocks of images of the run that is timed")
    parser.add_argument("--resume-blocks", type=int, default=1000, help="blocks of the store that is resumed")
    parser.add_argument("--parts", default="1234", help="which of the four parts to do")
    options = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    driver = write = 0.0
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # the driver is measured, and not a disk
    with tempfile.TemporaryDirectory(dir=memory) as name:
        folder = Path(name)
        if {"1", "2", "3"} & set(options.parts):
            workers = 2
            alone = bare(folder, options.blocks, workers)
            ours = driven(make_store(folder / "nothing", options.blocks), workers, 0.0)
            driver, write = ours.driver_seconds / ours.tiles, workers / ours.rate
            print(f"{workers} workers, {EDGE}x{EDGE} float32 and their mirror images, a kernel that costs nothing:")
            print(f"  a bare loop {alone:.0f} tiles/s, equigram {ours.rate:.0f} tiles/s: {ours.rate / alone:.0%}")
            print(
                f"  processor time of the driver per tile: {1e3 * driver:.2f} ms, of the decisions alone: "
                f"{1e3 * dispatch_seconds(2):.3f} ms with 2 workers, {1e3 * dispatch_seconds(4096):.3f} ms with 4,096"
            )
        if "2" in options.parts:
            print("a kernel that takes 0.5 s:")
            for workers in (1, 2, 4):
                store = make_store(folder / str(workers), 14)
                real = driven(store, workers, 0.5, warm=workers)
                predicted = simulated(store.info.tiling, workers, 0.5, driver, write)
                rate = len(store.info.tiling) / predicted
                print(
                    f"  {workers} workers: {real.rate:.2f} tiles/s, simulated {rate:.2f}; "
                    f"{real.rate * 0.5 / workers:.1%} of {workers} workers without a driver"
                )
        if "3" in options.parts:
            print(f"simulated, tiles of {TILE_SECONDS:g} s, 20 per worker, {1e3 * driver:.2f} ms of driver each:")
            for workers in (8, 64, 512, 4096):
                edge_blocks = int((2 * 20 * workers) ** 0.5)
                tiling = Tiling(train=edge_blocks, test=0, edge=1)
                seconds = simulated(tiling, workers, TILE_SECONDS, driver, write)
                ideal = tiling.total_pairs * TILE_SECONDS / workers
                busy = len(tiling) * driver / seconds
                print(
                    f"  {workers:>5} workers, {len(tiling):>6,} tiles: {ideal / seconds:.1%} efficient, "
                    f"driver {busy:.0%} busy"
                )
            print(f"  the driver is the first bottleneck, from about {TILE_SECONDS / driver:,.0f} workers on")
        if "4" in options.parts:
            resume(folder / "resume", options.resume_blocks)
            tiling = Tiling(train=14_142 * 1024, test=0, edge=1024)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            first = next(iter(tiling.strips()))
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(f"a plan of {len(tiling):,} tiles, first strip {first[0]}: {after - before} kB")


if __name__ == "__main__":
    main()
