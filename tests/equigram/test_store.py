"""The run store: what is in it, who may read it, what becomes of damage, and what it refuses."""

import errno
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import yaml
import zarr
from numpy.testing import assert_allclose, assert_array_equal

import equigram.store
from equigram import claim
from equigram.data import Split
from equigram.errors import (
    DamagedArrayError,
    DamagedTileError,
    IncompleteRunError,
    SpecError,
    StoreError,
    StoreMismatchError,
    StoreNotFoundError,
)
from equigram.events import nobody
from equigram.importing import import_matrices
from equigram.plan import Tile
from equigram.run import run
from equigram.solve.stage import solve_run
from equigram.spec import JobSpec, SolveSpec
from equigram.store import GramStore, free_space
from equigram.verify import verify
from equikernel import NonFiniteKernelError
from equikernel.kernel import Kernel

Job = Callable[..., JobSpec]
Create = Callable[[JobSpec], GramStore]
Compute = Callable[..., None]

EDGE_TILE = Tile("gram", 0, 2)
"""Of 4 x 2 images: 10 training images in tiles of 4."""


@pytest.fixture
def store(job: Job, create: Create) -> GramStore:
    return create(job())


@pytest.fixture
def finished(store: GramStore, compute: Compute) -> GramStore:
    compute(store)
    return store


def chunk(store: GramStore, row: int, col: int, matrix: str = "gram/C1/ntk") -> Path:
    return Path(store.url, matrix, "c", str(row), str(col))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


def files(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


# What is in it


READER = """
import sys
import numpy
import zarr

run = zarr.open_group(sys.argv[1], mode="r")
gram, cross = run["gram/C1/ntk"][...].astype("f8"), run["cross/C1/ntk"][...].astype("f8")
targets = numpy.eye(3)[run["labels/train"][...]]
ridge = 1e-2 * gram.diagonal().mean() * numpy.eye(len(gram))
offset = targets.mean(axis=0)
numpy.save(sys.argv[2], cross @ numpy.linalg.solve(gram + ridge, targets - offset) + offset)
assert not {"equigram", "equikernel"} & set(sys.modules)
"""


def test_a_run_is_read_and_solved_with_nothing_but_zarr_and_numpy(finished: GramStore, tmp_path: Path) -> None:
    solve_run(finished, SolveSpec(ridge=(1e-2,)), ("ntk",), nobody)
    command = [sys.executable, "-c", READER, finished.url, str(tmp_path / "predictions.npy")]
    subprocess.run(command, check=True, timeout=60)
    arrays, _ = finished.solution("C1", "ntk")
    assert_allclose(np.load(tmp_path / "predictions.npy"), arrays["predictions"][0], rtol=1e-8)


def test_images_labels_and_names_are_kept_as_the_kernels_see_them(store: GramStore, npz: Path) -> None:
    source = np.load(npz)
    pixels = source["x_train"].astype(np.float64) / 255
    normal = (pixels - pixels.mean()) / pixels.std()
    order = [int(name.removeprefix("x_train[").removesuffix("]")) for name in store.names("train")]
    assert_allclose(store.images("train")[..., 0], normal[order], rtol=1e-5, atol=1e-6)
    assert_array_equal(store.labels("train"), source["y_train"][order])
    assert_array_equal(store.labels("test"), source["y_test"])
    assert_array_equal(store.block("train", 2), store.images("train", range(8, 10)))
    assert store.describe_image("test", 1, 0) == "test image 4 (x_test[4])"


def test_names_that_are_not_text_are_kept_printable(job: Job, create: Create, class_folders: Path) -> None:
    strange = "a\nb\udcff.png"
    (class_folders / "a" / "0.png").rename(class_folders / "a" / strange)
    names = create(job(data={"train": class_folders})).names("train")
    assert len(names) == 12
    assert "a/a b\\udcff.png" in names


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_chunks_have_the_bytes_that_zarr_itself_writes(
    job: Job, create: Create, compute: Compute, dtype: str, compression: str
) -> None:
    store = create(job(gram={"dtype": dtype, "compression": compression}))
    compute(store)
    chunks = {path: path.read_bytes() for path in Path(store.url).glob("[gc]r*/*/*/c/*/*")}
    assert len(chunks) == 2 * (9 + 6)
    for name in ("gram/C1/ntk", "gram/C1/nngp", "cross/C1/ntk", "cross/C1/nngp"):
        array: Any = zarr.open_array(f"{store.url}/{name}", mode="r+")
        array[...] = array[...]
    assert {path: path.read_bytes() for path in chunks} == chunks


def test_compressed_chunks_are_finished_whatever_their_size_and_damage_is_found(
    job: Job, create: Create, compute: Compute
) -> None:
    store = create(job(gram={"compression": "zstd", "tile": 10}))
    compute(store)
    assert len(store.finished_tiles()) == len(store.info.tiling)
    chunk = Path(store.url, "gram/C1/ntk/c/0/0")
    content = chunk.read_bytes()
    assert len(content) < 4 * 10 * 10 + 4
    for damaged in (content[:-9], content[:20] + b"x" + content[21:], b""):
        chunk.write_bytes(damaged)
        with pytest.raises((DamagedTileError, IncompleteRunError)):
            store.matrix("gram", "C1", "ntk")
        found = verify(store, nobody, samples=0)
        assert found.bad_tiles == [Tile("gram", 0, 0)]
    store.discard_tile(Tile("gram", 0, 0))
    compute(store, [Tile("gram", 0, 0)])
    assert chunk.read_bytes() == content


def test_both_triangles_hold_the_same_bits(finished: GramStore) -> None:
    for kernel in ("nngp", "ntk"):
        gram = finished.matrix("gram", "C1", kernel)
        assert_array_equal(gram, gram.T)


def test_a_run_without_test_images_or_labels_has_no_such_arrays(job: Job, create: Create, tmp_path: Path) -> None:
    np.save(tmp_path / "bare.npy", np.load(job().data.train)["x_train"])
    store = create(job(data={"train": tmp_path / "bare.npy"}, solve=None))
    assert store.labels("train") is None
    assert sorted(zarr.open_group(store.url, mode="r").keys()) == ["gram", "history", "images", "names"]
    with pytest.raises(StoreMismatchError, match="holds no matrix cross/C1/ntk; it holds gram of the groups C1"):
        store.matrix("cross", "C1", "ntk")


def test_a_matrix_that_was_not_asked_for_is_refused(finished: GramStore) -> None:
    with pytest.raises(
        StoreMismatchError, match=r"holds no matrix gram/C4/ntk; .* groups C1 and the kernels nngp, ntk"
    ):
        finished.matrix("gram", "C4", "ntk")


# Missing and damaged tiles


def test_a_missing_tile_reads_as_nan_and_is_refused(store: GramStore, compute: Compute) -> None:
    missing = Tile("gram", 0, 1)
    compute(store, [tile for tile in store.info.tiling.tiles() if tile != missing])
    plain: Any = zarr.open_array(f"{store.url}/gram/C1/ntk", mode="r")[...]
    assert np.isnan(plain[:4, 4:8]).all()
    assert np.isnan(plain[4:8, :4]).all()
    assert np.isnan(plain).sum() == 32
    assert list(store.info.tiling.missing(store.finished_tiles())) == [missing]
    with pytest.raises(IncompleteRunError, match=r"2 of 9 chunks of gram/C1/ntk are missing; `equigram run JOB.yaml`"):
        store.matrix("gram", "C1", "ntk")


def test_nothing_is_finished_in_a_new_store(store: GramStore) -> None:
    assert set(store.finished_tiles()) == set()


@pytest.mark.parametrize("matrix", ["gram/C1/ntk", "gram/C1/nngp"])
@pytest.mark.parametrize("place", [(0, 2), (2, 0)])
def test_a_tile_is_finished_when_all_its_chunks_are(finished: GramStore, matrix: str, place: tuple[int, int]) -> None:
    chunk(finished, *place, matrix).unlink()
    assert list(finished.info.tiling.missing(finished.finished_tiles())) == [EDGE_TILE]


@pytest.mark.parametrize("damage", ["truncated", "empty", "longer", "flipped"])
@pytest.mark.parametrize("tile", [EDGE_TILE, Tile("gram", 2, 2), Tile("cross", 1, 2), Tile("gram", 0, 0)], ids=str)
def test_a_torn_chunk_is_written_anew_without_being_read(
    finished: GramStore, compute: Compute, tile: Tile, damage: str
) -> None:
    path = chunk(finished, tile.row, tile.col, f"{tile.part}/C1/ntk")
    whole = path.read_bytes()
    if damage == "flipped":
        flip_a_byte(path)
    else:
        path.write_bytes({"truncated": whole[:-7], "empty": b"", "longer": whole + b"\0"}[damage])
        assert tile not in finished.finished_tiles()
    compute(finished, [tile])
    assert path.read_bytes() == whole
    assert len(finished.finished_tiles()) == len(finished.info.tiling)


@pytest.mark.parametrize("place", [(0, 2), (2, 0)])
def test_a_flipped_bit_is_noticed_and_names_the_tile_to_compute_again(
    finished: GramStore, place: tuple[int, int]
) -> None:
    flip_a_byte(chunk(finished, *place))
    assert EDGE_TILE in finished.finished_tiles()
    with pytest.raises(
        DamagedTileError, match=r"chunk \d, \d of gram/C1/ntk \(tile gram\[0, 2\]\).*computes that tile"
    ) as e:
        finished.matrix("gram", "C1", "ntk")
    assert e.value.tile == EDGE_TILE
    assert finished.damaged_tiles() == {EDGE_TILE}
    finished.matrix("gram", "C1", "nngp")
    finished.discard_tile(EDGE_TILE)
    assert finished.damaged_tiles() == set()
    assert list(finished.info.tiling.missing(finished.finished_tiles())) == [EDGE_TILE]
    finished.discard_tile(EDGE_TILE)


def test_all_damaged_tiles_are_found_at_once(finished: GramStore) -> None:
    flip_a_byte(chunk(finished, 1, 1, "gram/C1/nngp"))
    flip_a_byte(chunk(finished, 1, 0, "cross/C1/ntk"))
    assert finished.damaged_tiles() == {Tile("gram", 1, 1), Tile("cross", 1, 0)}


def test_a_stored_nan_is_damage(finished: GramStore) -> None:
    zarr.open_array(f"{finished.url}/cross/C1/ntk", mode="r+")[4, 1] = np.nan
    with pytest.raises(DamagedTileError, match=r"tile cross\[1, 0\].*values that are not finite"):
        finished.matrix("cross", "C1", "ntk")


def test_values_that_are_not_finite_are_never_stored(job: Job, create: Create) -> None:
    store = create(job(gram={"kernels": ["ntk"]}))
    with pytest.raises(
        NonFiniteKernelError, match=r"tile gram\[0, 0\].* C1 ntk .* no finite float32.*gram.dtype: float64"
    ):
        store.write_tile(Tile("gram", 0, 0), {"C1": Kernel(np.ones((4, 4)), np.full((4, 4), 1e39))})
    assert set(store.finished_tiles()) == set()


def test_the_temporary_files_of_a_killed_writer_are_passed_over(finished: GramStore) -> None:
    before = finished.matrix("gram", "C1", "ntk")
    path = chunk(finished, 0, 0)
    shutil.copy(path, path.with_suffix(".0123abcd.partial"))
    assert len(finished.finished_tiles()) == len(finished.info.tiling)
    assert_array_equal(finished.matrix("gram", "C1", "ntk"), before)


@pytest.mark.parametrize("name", ["images/train/c/0/0/0/0", "labels/test/c/0", "names/train/c/0"])
def test_images_that_are_lost_or_damaged_are_not_read_as_zeros(store: GramStore, name: str) -> None:
    kind, split, *_ = name.split("/")
    read: Any = getattr(store, kind)
    flip_a_byte(Path(store.url, name))
    with pytest.raises(StoreError, match=f"{kind}/{split} is damaged: .*checksum.*; `equigram verify --repair`"):
        read(split)
    Path(store.url, name).unlink()
    with pytest.raises(StoreError, match=f"{kind}/{split} is damaged: a chunk is missing; `equigram verify"):
        read(split)


def test_an_array_that_is_lost_is_an_error_in_a_sentence(store: GramStore) -> None:
    shutil.rmtree(Path(store.url, "images"))
    with pytest.raises(
        StoreError, match=r"images/train is gone, or its metadata are damaged .KeyError.; `equigram verify"
    ):
        store.images("train")


@pytest.mark.parametrize("content", [None, "{"])
def test_matrices_without_their_metadata_are_not_said_to_be_nothing(
    finished: GramStore, job: Job, create: Create, tmp_path: Path, content: str | None
) -> None:
    path = Path(finished.url, "zarr.json")
    path.unlink() if content is None else path.write_text(content)
    words = r"run holds matrices, but its zarr.json, which tells of the run, is gone or damaged; restore that file"
    with pytest.raises(StoreError, match=words):
        GramStore.open(finished.url)
    with pytest.raises(StoreError, match=words):
        create(job(finished.url))
    path.write_text('{"zarr_format": 3, "node_type": "group"}')  # as the message says
    other = create(job(tmp_path / "other"))
    assert import_matrices(other, finished.url, nobody, samples=2) == len(other.info.tiling)


def test_an_edge_tile_of_a_writer_that_does_not_know_of_more_images_is_not_kept(finished: GramStore) -> None:
    ignorant = GramStore.open(finished.url)
    images = np.full((3, *ignorant.info.image_shape), 0.5, np.float32)
    finished.extend("train", Split(images, np.zeros(3, np.int64), ("a", "b", "c")), "more")
    ignorant.write_values(Tile("gram", 0, 0), {names: np.ones((4, 4)) for names in ignorant.matrices})
    with pytest.raises(StoreMismatchError, match=r"images were added to .* by another process meanwhile; what is fini"):
        ignorant.write_values(EDGE_TILE, {names: np.ones((4, 2)) for names in ignorant.matrices})
    assert EDGE_TILE not in GramStore.open(finished.url).finished_tiles()
    with pytest.raises(StoreMismatchError, match="images were added to"):
        ignorant.write_solution("C1", "ntk", {"ridge": np.zeros(1)}, {})


# Where it may be


def test_a_folder_with_other_files_is_refused_and_left_alone(job: Job, create: Create, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    before = files(tmp_path)
    with pytest.raises(StoreMismatchError, match="already holds something that is not an equigram run, and is left"):
        create(job())
    assert files(tmp_path) == before


@pytest.mark.parametrize("content", ['{"zarr_format": 3, "node_type": "group", "attributes": {}}', "[]", "\ufffd{"])
def test_the_zarr_group_of_somebody_else_is_refused(job: Job, create: Create, tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "zarr.json").write_text(content)
    with pytest.raises(StoreMismatchError, match="is left alone"):
        create(job())
    with pytest.raises(StoreNotFoundError, match="is not a finished run store; make one with `equigram run"):
        GramStore.open(str(tmp_path / "run"))


def test_a_file_is_refused_and_left_alone(job: Job, create: Create, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("precious")
    with pytest.raises(StoreMismatchError, match="is left alone"):
        create(job())
    with pytest.raises(StoreError, match=r"cannot write to the run store: .*run is a file"):
        create(job(tmp_path / "run" / "inside"))
    assert (tmp_path / "run").read_text() == "precious"


def test_an_empty_folder_is_a_fine_place(job: Job, create: Create, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert create(job()).info.train == 10


def test_a_finished_creation_is_not_overwritten(job: Job, create: Create, finished: GramStore) -> None:
    before = files(Path(finished.url))
    with pytest.raises(StoreMismatchError, match="has become a run store in the meantime"):
        create(job())
    assert files(Path(finished.url)) == before


@pytest.mark.parametrize("step", range(10))
def test_an_interrupted_creation_is_taken_over_by_any_job(
    job: Job, create: Create, compute: Compute, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    steps = iter(range(100))

    def interrupted(write: Callable[..., Any]) -> Callable[..., Any]:
        def writing(*arguments: Any) -> None:
            if next(steps) == step:
                raise KeyboardInterrupt
            write(*arguments)

        return writing

    spec = job(gram={"groups": ["C1", "C2"]})
    with monkeypatch.context() as patch:
        for writer in ("_add_array", "_add_matrix"):
            patch.setattr(equigram.store, writer, interrupted(getattr(equigram.store, writer)))
        with pytest.raises(KeyboardInterrupt):
            create(spec)
    assert not GramStore.exists(spec.store)
    with pytest.raises(StoreNotFoundError, match="not a finished run store"):
        GramStore.open(spec.store)
    store = create(job(gram={"groups": ["C1"], "kernels": ["ntk"]}))
    compute(store)
    assert sorted(path.name for path in Path(store.url).glob("gram/*/*")) == ["ntk", "zarr.json"]


def test_a_run_may_lie_in_the_memory_of_the_process_that_computes_it(job: Job) -> None:
    fsspec.filesystem("memory").rm("/", recursive=True)
    finished = run(job("memory://run"))
    assert finished.results
    assert len(finished.store.finished_tiles()) == len(finished.store.info.tiling)
    with pytest.raises(SpecError, match="memory of this process, where the workers, which are other processes"):
        run(job("memory://other", resources={"workers": 1}))


def test_an_unknown_protocol_is_refused(job: Job, create: Create) -> None:
    with pytest.raises(SpecError, match=r"foo://run: cannot open this kind of URL: .*foo"):
        create(job("foo://run"))


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert free_space(str(tmp_path / "a" / "b")) == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_a_read_only_place_is_refused_before_anything_is_written(
    job: Job, create: Create, tmpfs: Callable[[str], Path]
) -> None:
    place = tmpfs("ro")
    with pytest.raises(StoreError, match=r"cannot write to the run store: .* is read-only, or this user may not"):
        create(job(place / "run"))


def test_a_finished_run_is_read_from_a_read_only_place(
    job: Job, create: Create, compute: Compute, tmpfs: Callable[[str], Path]
) -> None:
    store = create(job(tmpfs("size=4m") / "run"))
    compute(store)
    gram = store.matrix("gram", "C1", "ntk")
    tmpfs("remount,ro")
    again = GramStore.open(store.url)
    assert_array_equal(again.matrix("gram", "C1", "ntk"), gram)
    with pytest.raises(StoreError, match=r"cannot write tile gram.* Read-only file system; nothing finished is lost"):
        again.write_tile(Tile("gram", 0, 0), {"C1": Kernel(gram[:4, :4], gram[:4, :4])})


def test_what_killed_workers_left_half_written_is_deleted_by_the_next_driver(finished: GramStore) -> None:
    chunk = Path(finished.url, "gram/C1/ntk/c/0/0")
    old, new = (chunk.with_name(f"0.{name}.partial") for name in ("old", "new"))
    for partial in (old, new):
        shutil.copyfile(chunk, partial)
    long_ago = time.time() - equigram.store.LEFT_SECONDS - 10
    os.utime(old, (long_ago, long_ago))
    os.utime(chunk, (long_ago, long_ago))
    finished.finished_tiles()
    assert old.exists()
    run(finished.info.spec)
    assert (old.exists(), new.exists(), chunk.exists()) == (False, True, True)


def test_a_full_disk_leaves_no_torn_chunk(
    job: Job, create: Create, compute: Compute, tmpfs: Callable[[str], Path], fill_disk: Callable[[Path], None]
) -> None:
    place = tmpfs("size=2m")
    store = create(job(place / "run", gram={"tile": 4}))
    compute(store, [Tile("gram", 0, 0)])
    fill_disk(place)
    kernel = Kernel(np.ones((4, 4)), np.ones((4, 4)))
    with pytest.raises(StoreError, match=r"cannot write tile gram\[0, 1\]: No space left on device; nothing finished"):
        store.write_tile(Tile("gram", 0, 1), {"C1": kernel})
    (place / "ballast").unlink()
    assert set(store.finished_tiles()) == {Tile("gram", 0, 0)}
    store.write_tile(Tile("gram", 0, 1), {"C1": kernel})
    assert len(store.finished_tiles()) == 2


# Which job it belongs to


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("network", {"depth": 3}, "network.depth is 2 in the store and 3 in the job"),
        ("network", {"head": ["relu"]}, r"network.head is \[\] in the store and \['relu'\] in the job"),
        ("data", {"size": 6}, "data.size is None in the store and 6 in the job"),
        ("data", {"seed": 1}, "data.seed is 0 in the store and 1 in the job"),
        ("gram", {"groups": ["C2"]}, r"gram.groups is \['C1'\] in the store and \['C2'\] in the job"),
        ("gram", {"kernels": ["ntk"]}, r"gram.kernels is \['nngp', 'ntk'\] in the store and \['ntk'\] in the job"),
        ("gram", {"tile": 8}, "gram.tile is 4 in the store and 8 in the job"),
        ("gram", {"dtype": "float64"}, "gram.dtype is 'float32' in the store and 'float64' in the job"),
        ("gram", {"engine": "reference"}, "gram.engine is 'auto' in the store and 'reference' in the job"),
    ],
)
def test_a_job_for_other_matrices_is_refused_with_both_values(
    job: Job, store: GramStore, section: str, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(StoreMismatchError, match=f"belongs to another job: {words}. Give this job another `store`"):
        store.check_belongs_to(job(**{section: change}))


def test_every_difference_is_named(job: Job, store: GramStore) -> None:
    with pytest.raises(StoreMismatchError, match=r"data.size .*; network.w_std .*; gram.dtype .*\. Give"):
        store.check_belongs_to(job(data={"size": 6}, network={"w_std": 2.0}, gram={"dtype": "float64"}))


def test_a_job_that_differs_in_what_does_not_change_the_matrices_is_welcome_and_remembered(
    job: Job, store: GramStore
) -> None:
    other = job(resources={"workers": 7}, solve={"ridge": [0.5]}, gram={"kernels": ["ntk", "nngp"], "tile": "auto"})
    store.check_belongs_to(other)
    store.remember(other)
    assert store.info.spec == other == GramStore.open(store.url).info.spec
    assert store.info.tile == 4


def test_nothing_is_written_for_the_same_job(job: Job, store: GramStore) -> None:
    before = files(Path(store.url))
    store.remember(job())
    assert files(Path(store.url)) == before


def test_the_format_of_another_version_is_refused(store: GramStore) -> None:
    path = Path(store.url, "zarr.json")
    document = json.loads(path.read_text())
    document["attributes"]["equigram"] |= {"format": 7, "versions": {"equigram": "9.1"}}
    path.write_text(json.dumps(document))
    with pytest.raises(
        StoreMismatchError, match=r"store format 7, this version of equigram reads 4; use the version of equigram"
    ):
        GramStore.open(store.url)


def test_a_store_is_pickled_with_its_whole_path(store: GramStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(store.url).parent)
    content = pickle.dumps(GramStore("run"))
    monkeypatch.chdir("/")
    copy = pickle.loads(content)
    assert copy.url == store.url
    assert copy.info == store.info


# Solutions


def test_a_solution_is_there_when_it_is_complete(store: GramStore) -> None:
    with pytest.raises(IncompleteRunError, match=r"no solution for C1 ntk; finish it with `equigram run JOB.yaml`"):
        store.solution("C1", "ntk")
    store.write_solution("C1", "ntk", {"ridge": np.array([0.5])}, {"solutions": []})
    zarr.open_group(f"{store.url}/solution/C1/ntk", mode="r+").attrs.clear()
    assert not store.has_solution("C1", "ntk")
    store.write_solution("C1", "ntk", {"ridge": np.array([2.0])}, {"solutions": [1]})
    arrays, attributes = store.solution("C1", "ntk")
    assert_array_equal(arrays["ridge"], [2.0])
    assert attributes == {"solutions": [1]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: shutil.rmtree(place / "ridge"),
        lambda place: (place / "ridge/c/0").unlink(),
        lambda place: (place / "ridge/zarr.json").write_text("{"),
        lambda place: (place / "zarr.json").write_text("nonsense"),
        lambda place: (place / "zarr.json").write_text((place / "zarr.json").read_text().replace("0.25", "0.75")),
        lambda place: zarr.open_array(place / "ridge", mode="r+").__setitem__(0, 3.0),
    ],
)
def test_a_damaged_solution_is_never_used(store: GramStore, damage: Callable[[Path], Any]) -> None:
    store.write_solution("C1", "ntk", {"ridge": np.array([0.5])}, {"accuracy": 0.25})
    damage(Path(store.url, "solution/C1/ntk"))
    with pytest.raises(DamagedArrayError, match=r"(damaged|gone).*; `equigram run JOB.yaml` solves again"):
        store.solution("C1", "ntk")
    store.write_solution("C1", "ntk", {"ridge": np.array([0.5])}, {"accuracy": 0.25})
    assert store.solution("C1", "ntk")[1] == {"accuracy": 0.25}


def test_a_solution_that_finds_no_room_leaves_the_one_before(
    job: Job, create: Create, tmpfs: Callable[[str], Path], fill_disk: Callable[[Path], None]
) -> None:
    place = tmpfs("size=2m")
    store = create(job(place / "run"))
    store.write_solution("C1", "ntk", {"ridge": np.array([0.5])}, {})
    fill_disk(place)
    with pytest.raises(StoreError, match="cannot write the solution: No space left on device"):
        store.write_solution("C1", "ntk", {"ridge": np.arange(9.0)}, {})
    assert_array_equal(store.solution("C1", "ntk")[0]["ridge"], [0.5])
    assert not list(Path(store.url).rglob("*.partial"))


@pytest.mark.parametrize("url", [None, "memory://interrupted"])
def test_a_solution_that_is_interrupted_is_none(
    url: str | None, job: Job, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, put = create(job() if url is None else job(url)), GramStore._put
    arrays = {"ridge": np.arange(9.0), "labels": np.arange(3)}

    def room_for(files: int) -> Callable[[GramStore, str, bytes], None]:
        left = iter(range(files))

        def put_if_there_is_room(store: GramStore, name: str, content: bytes) -> None:
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            put(store, name, content)

        return put_if_there_is_room

    for files in range(5):
        monkeypatch.setattr(GramStore, "_put", room_for(files))
        with pytest.raises(StoreError, match="cannot write the solution: No space left on device"):
            store.write_solution("C1", "ntk", arrays, {})
        assert not store.has_solution("C1", "ntk")
    monkeypatch.setattr(GramStore, "_put", room_for(5))
    store.write_solution("C1", "ntk", arrays, {})
    assert_array_equal(store.solution("C1", "ntk")[0]["ridge"], np.arange(9.0))


def test_a_solution_that_is_half_deleted_is_none(job: Job, create: Create, monkeypatch: pytest.MonkeyPatch) -> None:
    store, call = create(job("memory://half")), GramStore._call
    store.write_solution("C1", "ntk", {"ridge": np.array([0.5])}, {})

    def interrupted(store: GramStore, operation: str, *arguments: Any, **options: Any) -> Any:
        if operation == "rm":
            raise OSError(errno.EIO, "Input/output error")
        return call(store, operation, *arguments, **options)

    monkeypatch.setattr(GramStore, "_call", interrupted)
    with pytest.raises(StoreError, match="cannot write the solution: Input/output error"):
        store.write_solution("C1", "ntk", {"ridge": np.array([2.0])}, {})
    assert not store.has_solution("C1", "ntk")


def test_a_new_solution_leaves_nothing_of_the_one_before(store: GramStore) -> None:
    for arrays in ({"ridge": np.array([0.5]), "beta": np.array([1.0])}, {"ridge": np.array([2.0])}):
        store.write_solution("C1", "ntk", arrays, {})
    assert {path.name for path in Path(store.url, "solution/C1").iterdir()} == {"ntk", "zarr.json"}
    assert {path.name for path in Path(store.url, "solution/C1/ntk").iterdir()} == {"ridge", "zarr.json"}


# Its attributes


@pytest.mark.parametrize(
    "change",
    [{"train": 9}, {"preprocessing": None}, {"spec": {}}, {"checksum": "0"}, {"state": "preparing"}, {"state": 1}],
)
def test_attributes_that_were_changed_are_refused(store: GramStore, change: dict[str, Any], job: Job) -> None:
    path = Path(store.url, "zarr.json")
    document = json.loads(path.read_text())
    document["attributes"]["equigram"] |= change
    path.write_text(json.dumps(document))
    with pytest.raises(StoreError, match=r"the attributes in zarr.json are damaged, or were edited: their checksum"):
        GramStore.open(store.url)
    before = files(Path(store.url))
    with pytest.raises(StoreError, match="are damaged, or were edited"):
        run(job())
    assert files(Path(store.url)) == before


MAKES_A_STORE = """
import sys, time
from equigram.errors import StoreMismatchError
from equigram.data import fingerprint, load_dataset
from equigram.spec import JobSpec
from equigram.store import GramStore
spec = JobSpec.load(sys.argv[1])
dataset = load_dataset(spec.data, square=True)
print("ready", flush=True)
time.sleep(float(sys.stdin.readline()))
try:
    GramStore.create(spec, dataset, spec.gram.tile, fingerprint(spec.data))
    print("made")
except StoreMismatchError as error:
    print("meanwhile" if "has become a run store in the meantime" in str(error) else error)
"""


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_of_two_processes_that_make_a_store_one_waits_for_the_other(
    place: str, job: Job, compute: Compute, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    command = [sys.executable, "-c", MAKES_A_STORE]
    for lag in (0, 0.05):
        where = f"{request.getfixturevalue('bucket')}/run" if place == "bucket" else str(tmp_path / "run")
        where += str(lag)
        job_file = tmp_path / "job.yaml"
        spec = job(where)
        job_file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
        two = [
            subprocess.Popen(
                [*command, str(job_file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]  # fmt: skip
        for process in two:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process, pause in zip(two, (0, lag), strict=True):
            assert process.stdin is not None
            process.stdin.write(f"{pause}\n")
            process.stdin.flush()
        said = [process.communicate(timeout=60) for process in two]
        assert sorted(said) == [("made\n", ""), ("meanwhile\n", "")]
        store = GramStore.open(where)
        compute(store)
        assert verify(store, nobody, samples=1).findings == ()
        assert not [name for name in store._children() if name == claim.NAME]


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_the_claim_of_a_process_that_was_killed_is_taken_over(
    place: str,
    job: Job,
    create: Create,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    where = f"{request.getfixturevalue('bucket')}/run" if place == "bucket" else str(tmp_path / "other")
    spec = job(where)
    holds = "import sys, time; from equigram.store import GramStore\nwith GramStore(sys.argv[1])._alone(): " + (
        "print(1, flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", holds, where], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(claim, "PATIENCE", 1.0)
            patch.setattr(claim, "QUIET", 0.1)
            with pytest.raises(StoreError, match=r"has been setting up this store, or changing it, for more than 1 s"):
                create(spec)
        (said,) = [record.message for record in caplog.records if record.name == "equigram"]
        assert re.match(rf"waiting for .*process.*, which sets up {where.removeprefix('s3://')} or changes it", said)
        process.kill()
    create(spec)
    assert GramStore.exists(where)


def test_a_claim_that_nobody_renews_is_taken_over(
    job: Job, create: Create, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = json.dumps({"host": "another", "process": 1, "id": "x"}).encode()
    fsspec.filesystem("s3").pipe(f"{bucket}/run/{claim.NAME}", holder)
    monkeypatch.setattr(claim, "ABANDONED", 0.2)
    create(job(f"{bucket}/run"))
    assert GramStore.exists(f"{bucket}/run")


def test_a_claim_is_renewed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT", 0.1)
    files, place = fsspec.filesystem("s3"), f"{bucket}/run/{claim.NAME}"
    store = GramStore(f"{bucket}/run")
    with store._alone():
        first = files.cat_file(place)
        time.sleep(1.0)
        assert files.cat_file(place) != first
    assert not files.exists(place)


# Object storage


def test_a_run_lives_in_object_storage(job: Job, create: Create, compute: Compute, bucket: str) -> None:
    store = create(job(f"{bucket}/deep/run"))
    compute(store)
    local = create(job())
    compute(local)
    assert_array_equal(store.matrix("gram", "C1", "ntk"), local.matrix("gram", "C1", "ntk"))
    assert_array_equal(store.images("train"), local.images("train"))
    store.discard_tile(EDGE_TILE)
    store.discard_tile(EDGE_TILE)
    assert list(store.info.tiling.missing(pickle.loads(pickle.dumps(store)).finished_tiles())) == [EDGE_TILE]
    assert free_space(store.url) is None
    with pytest.raises(StoreMismatchError, match="has become a run store in the meantime"):
        create(job(store.url))
    with pytest.raises(StoreMismatchError, match="is left alone"):
        create(job(bucket))


def test_a_bucket_that_does_not_exist_is_not_made(job: Job, create: Create, bucket: str) -> None:
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/run: cannot write to .*bucket does not exist"):
        create(job("s3://no-such-bucket/run"))
    with pytest.raises(StoreError, match="bucket does not exist"):
        create(job("s3://no-such-bucket/run"))


@pytest.mark.parametrize(
    ("listens", "reason"), [(False, "Could not connect to the endpoint"), (True, "no answer within 3 s")]
)
def test_storage_that_refuses_or_stays_silent_is_an_error(
    object_storage: str, monkeypatch: pytest.MonkeyPatch, listens: bool, reason: str
) -> None:
    monkeypatch.setattr(equigram.store, "ANSWER_SECONDS", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        if not listens:
            server.close()
        options = {"endpoint_url": endpoint, "config_kwargs": {"retries": {"max_attempts": 0}}}
        monkeypatch.setitem(fsspec.config.conf, "s3", options)
        with pytest.raises(StoreError, match=f"s3://a/run: cannot open the run store: .*{reason}.*; nothing finished"):
            GramStore.exists("s3://a/run")


def test_errors_pickle(finished: GramStore) -> None:
    flip_a_byte(chunk(finished, 0, 0))
    with pytest.raises(DamagedTileError) as raised:
        finished.matrix("gram", "C1", "ntk")
    copy = pickle.loads(pickle.dumps(raised.value))
    assert isinstance(copy, DamagedTileError)
    assert (str(copy), copy.tile) == (str(raised.value), Tile("gram", 0, 0))
