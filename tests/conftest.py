"""Small images, stores filled without a cluster, and one Ray cluster and one object storage for all tests."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image

from equigram.data import fingerprint, load_dataset
from equigram.driver import ray_session
from equigram.plan import Tile
from equigram.run import needs_square
from equigram.spec import JobSpec, ResourceSpec
from equigram.store import GramStore
from equikernel.worker import TileWorker

BUCKETS = itertools.count()

FORKING = """
import json, os, signal, sys
import equigram.cli, equigram.figures, equigram.run, equikernel.engines.cpu, s3fs, typer.rich_utils, zarr

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(120)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        sys.argv = ["equigram", *request["arguments"]]
        equigram.cli.main()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs commands in processes of their own, which start with everything imported."""

ENVIRONMENT = os.environ | {"COLUMNS": "80", "TERM": "xterm", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}


def pytest_configure() -> None:
    """Hear Ctrl-C also in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell ignores it for background commands
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pictures(count: int, *, size: int = 8, classes: int = 3, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Noisy stripes whose width tells the class: ``(count, size, size)`` uint8, and ``(count,)`` labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    stripes = 80 * (np.arange(size) // (labels[:, None] + 1) % 2)
    return (stripes[:, None, :] + rng.integers(0, 120, (count, size, size))).astype(np.uint8), labels


@pytest.fixture(scope="session")
def equigram(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs the command line with arguments as a process in a folder; ``environment=`` adds variables."""
    streams = tmp_path_factory.mktemp("streams")
    out, err = streams / "out", streams / "err"
    server = subprocess.Popen(
        [sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    to_server, from_server = server.stdin, server.stdout
    assert to_server is not None
    assert from_server is not None

    def run(
        folder: Path, *arguments: object, environment: Mapping[str, str] = MappingProxyType({})
    ) -> subprocess.CompletedProcess[str]:
        texts = list(map(str, arguments))
        streams = {"out": str(out), "err": str(err)}
        request = {"arguments": texts, "folder": str(folder), "environment": dict(environment), **streams}
        print(json.dumps(request), file=to_server, flush=True)
        code = int(from_server.readline())
        return subprocess.CompletedProcess(
            texts, code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")
        )

    with server:
        yield run
        to_server.close()


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """An .npz of 10 training and 5 test images of three classes."""
    path = tmp_path / "images.npz"
    (x_train, y_train), (x_test, y_test) = pictures(10), pictures(5, seed=1)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """A folder of three class folders with four PNG files each."""
    images, labels = pictures(12)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "photos" / "abc"[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture
def job(tmp_path: Path, npz: Path) -> Callable[..., JobSpec]:
    """Makes jobs on ``npz``: the plain CNN of depth 2, tiles of 4 images; sections given are merged in."""

    def make(store: object = tmp_path / "run", **sections: Any) -> JobSpec:
        fields: dict[str, Any] = {
            "data": {"train": npz},
            "network": {} if "layers" in sections.get("network", {}) else {"depth": 2},
            "gram": {"groups": ["C1"], "tile": 4},
            "resources": {"workers": 0},
        }
        for name, section in sections.items():
            fields[name] = section if section is None else {**fields.get(name, {}), **section}
        return JobSpec.parse({"store": str(store), **fields})

    return make


@pytest.fixture
def create() -> Callable[[JobSpec], GramStore]:
    """Makes the store of a job, with its images and without tiles."""

    def make(spec: JobSpec) -> GramStore:
        dataset = load_dataset(spec.data, square=needs_square(spec))
        assert isinstance(spec.gram.tile, int)
        return GramStore.create(spec, dataset, spec.gram.tile, fingerprint(spec.data))

    return make


@pytest.fixture
def compute() -> Callable[..., None]:
    """Computes tiles of a store in this process, without a cluster: all of them, or those given."""

    def fill(store: GramStore, tiles: Iterable[Tile] | None = None) -> None:
        spec = store.info.spec
        chosen = list(store.info.tiling.tiles() if tiles is None else tiles)
        for one, part in store.passes():
            engine = spec.engine_for(one.groups)
            size = store.info.image_shape[:2]
            worker = TileWorker(part, spec.network, one.groups, engine, spec.gram.dtype, threads=1, size=size)
            for tile in chosen:
                worker.compute(tile)

    return fill


@pytest.fixture(scope="session")
def object_storage() -> Iterator[str]:
    """The endpoint of an S3 server on this machine, to which the environment points."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "none")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "none")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(object_storage: str) -> str:
    """The URL of a new bucket."""
    import fsspec

    name = f"bucket-{next(BUCKETS)}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def cluster(object_storage: str) -> Iterator[None]:
    """A local Ray cluster, which runs in this process use instead of starting their own."""
    with ray_session(ResourceSpec()):
        yield


@pytest.fixture(scope="session")
def listen() -> Callable[[FastAPI], contextlib.AbstractContextManager[str]]:
    """Serves an application of the service in a thread, at a URL."""

    @contextlib.contextmanager
    def begin(app: FastAPI) -> Iterator[str]:
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            app.state.channels._loop.call_soon_threadsafe(app.state.channels.close)
            server.should_exit = True
            thread.join(timeout=60)
            assert not thread.is_alive()

    return begin


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system of its own, with the options of ``mount -t tmpfs -o``; again with ``remount``."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def fill_disk() -> Callable[[Path], None]:
    """Fills the file system of a folder to the last byte, with a file ``ballast`` there."""

    def fill(folder: Path) -> None:
        with (folder / "ballast").open("ab", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(512))

    return fill
