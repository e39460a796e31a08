"""What object storage and compression cost; ``make storage``.

1. Requests of a resume from S3 (the moto server) of a run of 10,000 chunks of which one is missing.
2. ``equigram verify`` of 800 chunks where the storage takes 30 ms to answer.
3. Size of compressed chunks of C4 kernels of real images, and the time that compressing one takes.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import s3fs
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images

from equigram.data import fingerprint, load_dataset
from equigram.events import nobody
from equigram.plan import Tile
from equigram.run import run
from equigram.spec import JobSpec
from equigram.store import GramStore
from equigram.verify import verify
from equikernel import GroupCNN

ANSWER = 0.03
"""Seconds that the storage takes to answer in part 2."""


def make_store(place: str, images: NDArray[Any], folder: Path, **gram: Any) -> GramStore:
    """A store without tiles of the job that has these images."""
    np.savez(folder / "x.npz", x_train=images)
    spec = JobSpec.parse(
        {
            "store": place,
            "data": {"train": str(folder / "x.npz"), "normalize": "none"},
            "network": {"depth": 1},
            "gram": {"groups": ["C1"], "engine": "reference", **gram},
            "resources": {"workers": 0},
            "solve": None,
        }
    )
    return GramStore.create(spec, load_dataset(spec.data, square=False), int(gram["tile"]), fingerprint(spec.data))


def resume(folder: Path) -> None:
    """Part 1."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    files = fsspec.filesystem("s3")
    files.mkdir("bucket")
    images = np.random.default_rng(0).normal(size=(100, 2, 2, 1))
    store = make_store("s3://bucket/run", images, folder, kernels=["ntk"], tile=1)
    chunk = bytes(store.chunk_bytes or 0)
    files.pipe({f"bucket/run/gram/C1/ntk/c/{i // 100}/{i % 100}": chunk for i in range(10_000) if i != 305})
    asked: Counter[str] = Counter()
    call = s3fs.S3FileSystem._call_s3

    async def counting(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        asked[method] += 1
        return await call(self, method, *arguments, **options)

    s3fs.S3FileSystem._call_s3 = counting
    try:
        run(store.info.spec, nobody)
    finally:
        s3fs.S3FileSystem._call_s3 = call
        server.stop()
    print(f"resume of {len(store.info.tiling):,} tiles, one missing: {asked.total()} requests, {dict(asked)}")


def verification(folder: Path) -> None:
    """Part 2."""
    images = np.random.default_rng(0).normal(size=(20 * 4, 4, 4, 1))
    store = make_store(str(folder / "verified"), images, folder, kernels=["nngp", "ntk"], tile=4)
    run(store.info.spec, nobody)
    call = GramStore._call
    for readers in (16, 1):

        def slow(self: GramStore, *arguments: Any, **options: Any) -> Any:
            time.sleep(ANSWER)
            return call(self, *arguments, **options)

        with_readers(readers)
        GramStore._call = slow  # type: ignore[method-assign]
        try:
            began = time.perf_counter()
            report = verify(GramStore.open(store.url), nobody, samples=8)
        finally:
            GramStore._call = call  # type: ignore[method-assign]
        seconds = time.perf_counter() - began
        print(f"verify, {report.chunks} chunks, {ANSWER * 1e3:.0f} ms a request, {readers} at a time: {seconds:.1f} s")


def with_readers(count: int) -> None:
    """Read so many chunks at a time from now on."""
    import equigram.store

    equigram.store.READERS = count


def compression(folder: Path) -> None:
    """Part 3."""
    pixels = load_sample_images().images[0].astype(np.float64) / 255
    images = np.stack([pixels[16 * i : 16 * i + 16, 16 * j : 16 * j + 16] for i in range(16) for j in range(16)])
    kernel = GroupCNN(group="C4").kernel(images, dtype="float64")
    for dtype in ("float32", "float64"):
        place = str(folder / dtype)
        store = make_store(place, images, folder, kernels=["ntk"], tile=256, dtype=dtype, compression="zstd")
        began = time.perf_counter()
        store.write_values(Tile("gram", 0, 0), {("C1", "ntk"): kernel.ntk})
        seconds = time.perf_counter() - began
        share = Path(place, "gram/C1/ntk/c/0/0").stat().st_size / (256 * 256 * np.dtype(dtype).itemsize)
        print(f"zstd, {dtype}: {share:.2f} of the size, {1e3 * seconds:.1f} ms to compress and write 256 x 256 values")


def main() -> None:
    """Run all parts."""
    with tempfile.TemporaryDirectory() as name:
        for part in (resume, verification, compression):
            part(Path(name))


if __name__ == "__main__":
    main()
