"""Matrices that were computed elsewhere: taken where they are right, refused with both values where they are not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.testing import assert_array_equal

from equigram.errors import DataError
from equigram.events import Event, TileFinished, nobody
from equigram.export import export_run
from equigram.importing import ELSEWHERE, check_source, import_matrices
from equigram.plan import Tile
from equigram.run import finish, run
from equigram.spec import JobSpec
from equigram.store import GramStore
from equigram.verify import verify

Job = Callable[..., JobSpec]
Create = Callable[[JobSpec], GramStore]


SECTIONS: dict[str, Any] = {
    "network": {"depth": 2},
    "gram": {"groups": ["C1", "C4", "C3"], "tile": 4, "engine": "reference"},
    "resources": {"workers": 0},
}
"""Two passes."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 training and 5 test images of three classes."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    x = np.random.default_rng(0).integers(0, 256, (15, 4, 4)).astype(np.uint8)
    np.savez(path, x_train=x[:10], y_train=np.arange(10) % 3, x_test=x[10:], y_test=np.arange(5) % 3)
    return path


@pytest.fixture
def spec(job: Job, images: Path) -> JobSpec:
    return job(data={"train": images}, **SECTIONS)


@pytest.fixture(scope="module")
def elsewhere(images: Path, tmp_path_factory: pytest.TempPathFactory) -> GramStore:
    """A finished run of the same job, to be read only."""
    store = str(tmp_path_factory.mktemp("elsewhere") / "run")
    return run(JobSpec.parse({"store": store, "data": {"train": str(images)}, **SECTIONS})).store


@pytest.mark.parametrize("kind", ["npz", "zarr"])
def test_what_export_writes_is_taken_as_it_is(
    kind: str, spec: JobSpec, elsewhere: GramStore, create: Create, tmp_path: Path
) -> None:
    source = str(tmp_path / f"out.{kind}")
    export_run(elsewhere, source)
    store = create(spec)
    assert import_matrices(store, source, nobody, samples=2) == 2 * len(store.info.tiling)
    for part in store.parts:
        for group, kernel in store.matrices:
            assert_array_equal(store.matrix(part, group, kernel), elsewhere.matrix(part, group, kernel))
    assert GramStore.open(store.url).info.processors == (ELSEWHERE,)
    report = verify(GramStore.open(store.url), nobody, samples=3)
    assert (report.findings, report.missing, report.to_the_bit) == ((), 0, False)
    assert import_matrices(store, source, nobody, samples=2) == 0
    assert finish(store, spec, nobody).results


def matrices(store: GramStore) -> dict[str, Any]:
    """All of a run in float64."""
    every = [(part, *names) for part in store.parts for names in store.matrices]
    return {"/".join(one): store.matrix(*one).astype(np.float64) for one in every}


def saved(tmp_path: Path, arrays: dict[str, Any]) -> str:
    np.savez(tmp_path / "made.npz", **arrays)
    return str(tmp_path / "made.npz")


def test_one_triangle_is_enough_and_what_is_missing_is_computed(
    spec: JobSpec, elsewhere: GramStore, create: Create, tmp_path: Path
) -> None:
    arrays = matrices(elsewhere)
    for name, values in arrays.items():
        if name.startswith("gram/C3"):
            values[np.triu_indices(10, 1)] = np.nan
    arrays["gram/C4/ntk"][9, 9] = np.nan
    del arrays["cross/C3/nngp"]
    store = create(spec)
    assert import_matrices(store, saved(tmp_path, arrays), nobody, samples=1) == (12 - 1) + 6
    events: list[Event] = []
    finish(store, spec, events.append)
    computed = {event.tile for event in events if isinstance(event, TileFinished)}
    assert computed == {Tile("gram", 2, 2), *(Tile("cross", row, col) for row in range(2) for col in range(3))}
    for name, values in matrices(elsewhere).items():
        assert_array_equal(matrices(store)[name], values)


def wrong(name: str, place: tuple[int, int], factor: float) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name][place] *= factor

    return change


def another_shape(arrays: dict[str, Any]) -> None:
    arrays["cross/C1/ntk"] = arrays["cross/C1/ntk"][:4]


def another_network(arrays: dict[str, Any]) -> None:
    for name, values in arrays.items():
        if name.endswith("C4/ntk"):
            values *= 1.0001


def other_images(arrays: dict[str, Any]) -> None:
    arrays["names/train"] = np.array(["a", "b"])


def of_dtype(dtype: Any) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays["gram/C1/ntk"] = arrays["gram/C1/ntk"].astype(dtype)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (of_dtype(str), r"gram/C1/ntk in .* holds <U\d+, and a Gram matrix holds real numbers"),
        (of_dtype(bool), r"gram/C1/ntk in .* holds bool, and a Gram matrix holds real numbers"),
        (of_dtype(complex), r"gram/C1/ntk in .* holds complex128, and a Gram matrix holds real numbers"),
        (wrong("gram/C1/ntk", (1, 7), 1.1), r"gram/C1/ntk is not symmetric: entry 1, 7 is \S+, and \S+ the other way"),
        (another_shape, r"cross/C1/ntk in .* has the shape \(4, 10\), and the run in .* needs \(5, 10\)"),
        (
            another_network,
            r"of the C4 ntk of tile .* is \S+ in .* and \S+ computed here \(\S+ of the diagonal",
        ),
        (other_images, r"other images, or in another order: train image 0 is 'a' there and 'x_train\[\d\]' in"),
    ],
)
def test_what_is_wrong_is_refused_with_both_values_and_nothing_is_stored(
    change: Callable[[dict[str, Any]], None],
    words: str,
    spec: JobSpec,
    elsewhere: GramStore,
    create: Create,
    tmp_path: Path,
) -> None:
    arrays = matrices(elsewhere)
    change(arrays)
    store = create(spec)
    with pytest.raises(DataError, match=f"{words}.*; nothing was imported"):
        import_matrices(store, saved(tmp_path, arrays), nobody, samples=20)
    assert len(store.finished_tiles()) == 0
    assert GramStore.open(store.url).info.processors == ()


def test_a_damaged_source_is_refused(spec: JobSpec, elsewhere: GramStore, create: Create, tmp_path: Path) -> None:
    export_run(elsewhere, str(tmp_path / "out.zarr"))
    for content in (b"", b"nonsense"):
        for name in ("gram/C4/ntk", "names/train"):
            chunk = next((tmp_path / "out.zarr" / name / "c").rglob("0"))
            chunk = chunk / "0" if chunk.is_dir() else chunk
            before = chunk.read_bytes()
            chunk.write_bytes(content)
            store = create(spec.model_copy(update={"store": str(tmp_path / f"run-{len(content)}-{name[:4]}")}))
            with pytest.raises(DataError, match=rf"{name} in .*out.zarr cannot be read as .*; nothing was imported"):
                import_matrices(store, str(tmp_path / "out.zarr"), nobody, samples=1)
            assert len(store.finished_tiles()) == 0
            chunk.write_bytes(before)


def test_rounding_is_relative_to_the_diagonal(
    spec: JobSpec, elsewhere: GramStore, create: Create, tmp_path: Path
) -> None:
    arrays = matrices(elsewhere)
    rng = np.random.default_rng(0)
    for name, values in arrays.items():
        if name.startswith("gram"):
            root = np.sqrt(np.diag(values))
            values += 1e-7 * rng.normal(size=values.shape) * np.outer(root, root)
            values[0, 1] = values[1, 0] * (1 + 1e-12)
    store = create(spec)
    assert import_matrices(store, saved(tmp_path, arrays), nobody, samples=3) == 2 * len(store.info.tiling)


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e300])
def test_what_is_not_finite_is_left_out(
    value: float, spec: JobSpec, elsewhere: GramStore, create: Create, tmp_path: Path
) -> None:
    arrays = matrices(elsewhere)
    arrays["gram/C4/ntk"][1, 5] = arrays["gram/C4/ntk"][5, 1] = value
    store = create(spec)
    assert import_matrices(store, saved(tmp_path, arrays), nobody, samples=1) == 2 * len(store.info.tiling) - 1
    assert Tile("gram", 0, 1) not in store.finished_tiles()


@pytest.mark.parametrize("name", ["nothing.npz", "nothing.zarr", "text.npz"])
def test_what_cannot_be_read_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("not an array")
    with pytest.raises(DataError, match=rf"{name} cannot be read as an \.npz file or a zarr group: \S"):
        check_source(str(tmp_path / name))


def test_a_server_that_does_not_answer_is_said_in_one_line(job: Job, tmp_path: Path) -> None:
    spec = job(storage_options={"s3": {"endpoint_url": "http://127.0.0.1:9", "key": "none", "secret": "none"}})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**spec.to_store(), "storage_options": spec.storage_options}))
    command = [str(Path(sys.executable).with_name("equigram")), "import", "job.yaml", "s3://bucket/x.zarr"]
    environment = os.environ | {"AWS_MAX_ATTEMPTS": "1"}  # else it takes some seconds
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "http://127.0.0.1:9/bucket" in done.stderr
    assert not Path(spec.store).exists()


def test_a_file_without_matrices_is_refused(spec: JobSpec, create: Create, tmp_path: Path) -> None:
    source = saved(tmp_path, {"x": np.zeros(3)})
    check_source(source)
    with pytest.raises(DataError, match=r"holds none of the matrices gram/C1/nngp, gram/C1/ntk, .*, but x; give them"):
        import_matrices(create(spec), source, nobody, samples=1)
