"""Verification: whatever is damaged or wrong is found, nothing is changed, and what was found can be repaired."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal

import equigram.verify
from equigram.errors import DamagedArrayError, StoreError, StoreMismatchError
from equigram.events import nobody
from equigram.plan import Part, Tile, tile_of
from equigram.run import extend, finish, mend, repair
from equigram.spec import JobSpec
from equigram.store import GramStore
from equigram.verify import Report, verify
from equikernel.worker import processor_kind

ALL = 1000
"""More samples than there are tiles."""


@pytest.fixture
def finished(job: Callable[..., JobSpec], create: Callable[..., GramStore], compute: Callable[..., None]) -> GramStore:
    """A finished run of 10 training and 5 test images: 6 tiles and 6, both with a partial last block."""
    store = create(job(data={"size": 4}, gram={"groups": ["C1", "C4"], "tile": 4, "engine": "reference"}))
    compute(store)
    store.remember_worker(processor_kind())
    return GramStore.open(store.url)


def check(store: GramStore, samples: int = 0) -> Report:
    return verify(GramStore.open(store.url), nobody, samples)


def files(store: GramStore) -> dict[str, bytes]:
    every = (path for path in sorted(Path(store.url).rglob("*")) if path.is_file() and path.suffix != ".jsonl")
    return {str(path): path.read_bytes() for path in every}


def chunk_files(store: GramStore) -> list[Path]:
    return sorted(path for part in ("gram", "cross") for path in Path(store.url, part).rglob("c/*/*"))


def tile_of_chunk(chunk: Path) -> Tile:
    part, *_, row, col = chunk.parts[-6:]
    return tile_of("gram" if part == "gram" else "cross", int(row), int(col))


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bits flipped, the end cut off, or bytes added."""
    kind, place = rng.integers(4), int(rng.integers(len(content)))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content + rng.bytes(1 + place)
    changed = bytearray(content)
    for byte in rng.integers(len(content), size=1 if kind == 2 else 8):
        changed[byte] ^= int(rng.integers(1, 256))
    return bytes(changed) if bytes(changed) != content else content[:place]


def write(store: GramStore, name: str, place: tuple[Any, ...], value: Any) -> None:
    """Change entries as zarr does, with a new checksum."""
    array: Any = zarr.open_group(store.url, mode="r+")[name]
    array[place] = value


def test_a_whole_store_has_nothing_wrong_and_is_not_changed(finished: GramStore) -> None:
    before = files(finished)
    report = check(finished, ALL)
    assert report == Report((), missing=0, chunks=report.chunks, images=15, minors=6, anew=12, to_the_bit=True)
    assert files(finished) == before


def test_missing_tiles_are_counted_and_not_wrong(finished: GramStore) -> None:
    finished.discard_tile(Tile("gram", 0, 1))
    Path(finished.url, "cross/C4/ntk/c/1/1").unlink()
    report = check(finished, ALL)
    assert (report.missing, report.findings) == (2, ())


def find_damages(store: GramStore, count: int) -> None:
    rng = np.random.default_rng(0)
    places = chunk_files(store)
    for _ in range(count):
        path = places[rng.integers(len(places))]
        content = path.read_bytes()
        path.write_bytes(damage(content, rng))
        assert check(store).bad_tiles == [tile_of_chunk(path)]
        part, group, kernel = path.parts[-6:-3]
        with pytest.raises(StoreError):
            GramStore.open(store.url).matrix("gram" if part == "gram" else "cross", group, kernel)
        path.write_bytes(content)
    assert check(store).findings == ()


def test_random_damages_are_all_found_and_refused_by_the_solver(finished: GramStore) -> None:
    find_damages(finished, 25)


@pytest.mark.soak
def test_a_thousand_random_damages_are_all_found_and_refused_by_the_solver(finished: GramStore) -> None:
    find_damages(finished, 1000)


def test_wrong_values_with_the_right_checksum_are_found(finished: GramStore) -> None:
    ntk = finished.matrix("gram", "C4", "ntk")
    write(finished, "gram/C4/ntk", (1, 5), ntk[1, 5] * 1.001)
    (finding,) = check(finished).findings
    assert finding.what == "the C4 ntk of tile gram[0, 1] differs from its transpose"
    write(finished, "gram/C4/ntk", (5, 1), ntk[1, 5] * 1.001)
    assert check(finished).findings == ()  # within bounds, and not sampled
    (finding,) = check(finished, ALL).findings
    assert finding.what.startswith("entry 1, 1 of the C4 ntk of tile gram[0, 1] is ")
    assert finding.tile == Tile("gram", 0, 1)


@pytest.mark.parametrize(
    ("name", "place", "factor", "words"),
    [
        ("gram/C1/nngp", (3, 2), 1.1, "the C1 nngp of tile gram[0, 0] is not symmetric"),
        ("gram/C1/nngp", (9, 9), 1 + 1e-6, "entry 1 of the diagonal of the C1 nngp of tile gram[2, 2] is"),
        ("cross/C1/ntk", (4, 9), 100, "entry 0, 1 of the C1 ntk of tile cross[1, 2] is"),
        ("cross/C1/ntk", (4, 9), np.nan, "chunk 1, 2 of cross/C1/ntk is damaged: it holds values that are not finite"),
    ],
)
def test_impossible_values_are_found_without_samples(
    finished: GramStore, name: str, place: tuple[int, int], factor: float, words: str
) -> None:
    part: Part = "gram" if name.startswith("gram") else "cross"
    _, group, kernel = name.split("/")
    write(finished, name, place, finished.matrix(part, group, kernel)[place] * factor)
    (finding,) = check(finished).findings
    assert finding.what.startswith(words)
    assert finding.tile is not None


def test_a_matrix_that_is_not_positive_is_found(finished: GramStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry of a block is possible, but not all of them together."""
    root = np.sqrt(np.diag(finished.matrix("gram", "C1", "nngp")))
    block = 0.99 * np.outer(root[:4], root[4:8]) * np.random.default_rng(0).choice([-1, 1], (4, 4))
    write(finished, "gram/C1/nngp", (slice(0, 4), slice(4, 8)), block)
    write(finished, "gram/C1/nngp", (slice(4, 8), slice(0, 4)), block.T)
    monkeypatch.setattr(equigram.verify._Verification, "_check_anew", lambda *_: 0)
    monkeypatch.setattr(equigram.verify._Verification, "_sampled_entries", lambda _: ({}, {}))
    findings = check(finished, ALL).findings
    words = "the C1 nngp of the images of tile gram[0, 1] is not positive semi-definite: eigenvalues from -"
    assert [finding.what.startswith(words) for finding in findings] == 3 * [True]
    assert [finding.tile for finding in findings] == [Tile("gram", 0, 0), Tile("gram", 0, 1), Tile("gram", 1, 1)]


def test_other_images_are_found(finished: GramStore) -> None:
    images = finished.images("train")
    write(finished, "images/train", (7,), images[7] + 0.01)
    (finding,) = check(finished, ALL).findings
    assert (finding.what, finding.data) == ("images/train holds other values than were stored", "images/train")


@pytest.mark.parametrize("name", ["labels/train", "labels/test", "names/test"])
def test_other_labels_and_names_and_lost_ones_are_found(finished: GramStore, name: str) -> None:
    array: Any = zarr.open_group(finished.url, mode="r+")[name]
    array[0] = array[0] ^ 1
    (finding,) = check(finished).findings
    assert f"{name} holds other values than were stored" in finding.what
    assert finding.data == name
    Path(finished.url, name, "c/0").unlink()
    (finding,) = check(finished).findings
    assert f"{name} is damaged: a chunk is missing" in finding.what
    shutil.rmtree(Path(finished.url, name))
    (finding,) = check(finished).findings
    assert finding.what == f"{name}: its metadata cannot be read"
    assert finding.data == name


@pytest.mark.parametrize("extended", [False, True])
def test_images_labels_and_names_are_read_from_their_sources_again(
    finished: GramStore, tmp_path: Path, npz: Path, extended: bool
) -> None:
    if extended:
        images = np.random.default_rng(7).integers(0, 200, (3, 8, 8)).astype(np.uint8)
        np.savez(tmp_path / "more.npz", x=images, y=np.arange(3))
        extend(finished, finished.info.spec, "train", str(tmp_path / "more.npz"), None, nobody)
        finish(finished, finished.info.spec, nobody)
    before = {name: finished.images("train").tobytes() for name in ("images/train",)}
    labels, names = finished.labels("train"), finished.names("train")
    shutil.rmtree(Path(finished.url, "images/train"))
    shutil.rmtree(Path(finished.url, "names"))
    array: Any = zarr.open_group(finished.url, mode="r+")["labels/train"]
    array[0] = array[0] ^ 1
    report = check(finished)
    assert report.bad_data == ["images/train", "labels/train", "names/test", "names/train"]
    assert not report.beyond
    again = GramStore.open(finished.url)
    with pytest.raises(DamagedArrayError, match="labels/train holds other values than were stored; `equigram verify"):
        again.labels("train")
    assert mend(again, again.info.spec, report, nobody) == [
        "metadata written again: names",
        "read from the job's data again: images/train, labels/train, names/test, names/train",
    ]
    assert again.images("train").tobytes() == before["images/train"]
    assert_array_equal(again.labels("train"), labels)
    assert again.names("train") == names
    assert check(again, ALL).findings == ()
    sources = dict(np.load(npz))
    sources["y_train"][0] = 1
    np.savez(npz, **sources)
    array = zarr.open_group(again.url, mode="r+")["labels/train"]
    array[0] = array[0] ^ 1
    report = check(again)
    with pytest.raises(StoreMismatchError, match=r"labels/train of .* cannot be mended: the sources of the job hold"):
        mend(again, again.info.spec, report, nobody)


@pytest.mark.parametrize("change", [{"fill_value": 0.0}, {"shape": [10, 8, 8, 1]}, {"attributes": {"mine": 1}}])
def test_other_metadata_of_images_are_found_and_mended(finished: GramStore, change: dict[str, Any]) -> None:
    path = Path(finished.url, "images/train/zarr.json")
    before = files(finished)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    report = check(finished)
    assert report.bad_data == ["images/train"]
    mend(finished, finished.info.spec, report, nobody)
    assert check(finished, ALL).findings == ()
    assert {name: len(content) for name, content in files(finished).items()} == {
        name: len(content) for name, content in before.items()
    }


def test_a_chunk_in_the_place_of_another_is_found_and_both_are_mended(finished: GramStore) -> None:
    before = files(finished)
    one, other = (Path(finished.url, f"cross/C4/ntk/c/0/{col}") for col in (0, 1))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    report = check(finished, 0)
    assert report.bad_tiles == [Tile("cross", 0, 0), Tile("cross", 0, 1)]
    assert all(re.match(r"entry \d, \d of the C4 ntk of tile", finding.what) for finding in report.findings)
    mend(finished, finished.info.spec, report, nobody)
    assert check(finished, ALL).findings == ()
    assert files(finished) == before


def test_what_was_solved_with_a_chunk_in_the_wrong_place_is_solved_again(finished: GramStore) -> None:
    finish(finished, finished.info.spec, nobody)
    right = finished.solution("C4", "ntk")[0]["predictions"]
    one, other = (Path(finished.url, f"cross/C4/ntk/c/0/{col}") for col in (0, 1))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    shutil.rmtree(Path(finished.url, "solution"))
    finish(finished, finished.info.spec, nobody)
    assert np.abs(finished.solution("C4", "ntk")[0]["predictions"] - right).max() > 1e-3
    assert mend(finished, finished.info.spec, check(finished), nobody) == ["computed again: 2 tiles", "solved again"]
    assert_array_equal(finished.solution("C4", "ntk")[0]["predictions"], right)


def test_a_folder_in_the_place_of_a_chunk_is_mended(finished: GramStore) -> None:
    before = files(finished)
    chunk = Path(finished.url, "gram/C1/ntk/c/0/1")
    chunk.unlink()
    (chunk / "sub").mkdir(parents=True)
    report = check(finished)
    assert report.bad_tiles == [Tile("gram", 0, 1)]
    mend(finished, finished.info.spec, report, nobody)
    assert files(finished) == before


@pytest.mark.parametrize("content", ["null", "[]", "{", '{"attributes": 3}'])
def test_a_damaged_solution_is_solved_again(finished: GramStore, content: str) -> None:
    finish(finished, finished.info.spec, nobody)
    arrays, _ = finished.solution("C1", "ntk")
    Path(finished.url, "solution/C1/ntk/zarr.json").write_text(content)
    report = check(finished)
    assert report.bad_solutions
    assert mend(finished, finished.info.spec, report, nobody) == ["solved again"]
    assert_array_equal(finished.solution("C1", "ntk")[0]["coefficients"], arrays["coefficients"])


def test_a_damaged_solution_is_found(finished: GramStore) -> None:
    finished.write_solution("C1", "ntk", {"ridge": np.arange(3.0)}, {})
    assert check(finished).findings == ()
    Path(finished.url, "solution/C1/ntk/ridge/c/0").unlink()
    (finding,) = check(finished).findings
    assert finding.what.endswith("; `equigram run JOB.yaml` solves again")
    assert finding.solved


def test_an_image_without_kernel_is_found(finished: GramStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write(finished, "images/train", (7,), np.float32(1e30))
    monkeypatch.setattr(equigram.verify._Verification, "_images_are_whole", lambda *_: True)
    (finding,) = check(finished).findings
    words = "an image has no kernel with itself: the C1 nngp of images/train[7] is no finite float32"
    assert finding.what == words


def test_lost_metadata_of_matrices_are_written_again(finished: GramStore) -> None:
    before = files(finished)
    Path(finished.url, "gram/C1/ntk/zarr.json").unlink()
    Path(finished.url, "cross/C1/nngp/zarr.json").write_text("{")
    Path(finished.url, "gram/C1/zarr.json").unlink()
    report = check(finished)
    assert report.bad_arrays == ["cross/C1/nngp", "gram/C1", "gram/C1/ntk"]
    assert not any(finding.beyond for finding in report.findings)
    mend(finished, finished.info.spec, report, nobody)
    assert check(GramStore.open(finished.url), ALL).findings == ()
    assert files(finished) == before


@pytest.mark.parametrize("name", ["images", "labels", "names", "history", "solution", "solution/C1"])
def test_lost_metadata_of_groups_are_written_again(finished: GramStore, name: str) -> None:
    finished.write_solution("C1", "ntk", {"ridge": np.array([1e-3])}, {"solutions": []})
    before = files(finished)
    Path(finished.url, name, "zarr.json").unlink()
    report = check(finished)
    assert [finding.what for finding in report.findings] == [f"{name}: its metadata cannot be read"]
    mend(finished, finished.info.spec, report, nobody)
    assert check(GramStore.open(finished.url), ALL).findings == ()
    assert files(finished) == before


def test_damaged_images_do_not_end_the_verification(finished: GramStore) -> None:
    Path(finished.url, "images/test/c/1/0/0/0").write_bytes(b"nothing")
    Path(finished.url, "gram/C1/ntk/c/0/2").write_bytes(b"nothing")
    images, tile = check(finished, ALL).findings
    assert "images/test is damaged" in images.what
    assert tile.what == "chunk 0, 2 of gram/C1/ntk has 7 bytes, not 68"


def test_another_layout_is_found(finished: GramStore) -> None:
    path = Path(finished.url, "gram/C1/ntk/zarr.json")
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps({**metadata, "shape": [11, 10]}))
    (finding,) = check(finished).findings
    assert finding.what == "gram/C1/ntk has the shape (11, 10); the job needs (10, 10)"
    path.write_text(json.dumps({**metadata, "fill_value": 0.0}))
    (finding,) = check(finished).findings
    assert finding.what == "gram/C1/ntk: its metadata are not those of the job"
    path.write_text("nonsense")
    (finding,) = check(finished).findings
    assert finding.what.startswith("gram/C1/ntk: its metadata cannot be read")


def test_on_another_kind_of_processor_values_agree_to_rounding(finished: GramStore) -> None:
    finished.remember_worker("abacus")
    nngp = finished.matrix("gram", "C1", "nngp")
    write(finished, "gram/C1/nngp", (9, 9), nngp[9, 9] * np.float32(1 + 1e-6))
    report = check(finished, ALL)
    assert (report.findings, report.to_the_bit) == ((), False)
    write(finished, "gram/C1/nngp", (9, 9), nngp[9, 9] * np.float32(1 + 1e-5))
    assert check(finished, ALL).bad_tiles == [Tile("gram", 2, 2)]


def test_what_is_wrong_is_computed_again(finished: GramStore) -> None:
    before = files(finished)
    for path in chunk_files(finished)[::17]:
        path.write_bytes(b"nothing")
    report = check(finished)
    assert len(report.bad_tiles) > 3
    repair(finished, finished.info.spec, report.bad_tiles, nobody)
    assert check(finished, ALL).findings == ()
    assert files(finished) == before
