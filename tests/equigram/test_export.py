"""Exports: the same values under the same names, all or some, and nothing left behind where that fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal

from equigram.errors import DamagedTileError, IncompleteRunError, ResourceError, SpecError, StoreError
from equigram.export import export_run
from equigram.plan import Tile
from equigram.spec import JobSpec
from equigram.store import GramStore


@pytest.fixture
def store(job: Callable[..., JobSpec], create: Callable[..., GramStore], compute: Callable[..., None]) -> GramStore:
    """A finished run of 10 training and 5 test images, in tiles of 4."""
    made = create(job(data={"size": 4}, gram={"groups": ["C1", "C4"], "tile": 4, "engine": "reference"}))
    compute(made)
    return made


def exported(output: str) -> dict[str, Any]:
    if output.endswith(".npz"):
        return dict(np.load(output))
    root = zarr.open_group(output, mode="r")
    return {name: array[...] for name, array in root.members(max_depth=None) if isinstance(array, zarr.Array)}


@pytest.mark.parametrize("kind", ["npz", "zarr"])
def test_everything_is_copied(store: GramStore, tmp_path: Path, kind: str) -> None:
    output = str(tmp_path / f"all.{kind}")
    steps: list[tuple[int, int]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = export_run(store, output, progress=lambda done, total: steps.append((done, total)))
    arrays = exported(output)
    assert sorted(arrays) == sorted(names)
    assert len(arrays) == 4 + 8
    assert steps[-1] == (8, 8)
    for group in ("C1", "C4"):
        for kernel in ("nngp", "ntk"):
            assert_array_equal(arrays[f"gram/{group}/{kernel}"], store.matrix("gram", group, kernel), strict=True)
            assert_array_equal(arrays[f"cross/{group}/{kernel}"], store.matrix("cross", group, kernel), strict=True)
    assert_array_equal(arrays["labels/train"], store.labels("train"))
    text = arrays["names/test"]
    assert (text.tobytes().decode().split("\n") if kind == "zarr" else text.tolist()) == store.names("test")


@pytest.mark.parametrize(("train", "test"), [("3:9", "1:5"), ("4:8", "0:4"), (":1", "4:"), ("9:10", "2:3")])
def test_some_images_of_one_matrix_are_copied(store: GramStore, tmp_path: Path, train: str, test: str) -> None:
    output = str(tmp_path / "some.npz")
    export_run(store, output, ["C4"], ["ntk"], train, test)
    arrays = exported(output)
    along, across = (slice(*(int(n) if n else None for n in text.split(":"))) for text in (train, test))
    assert_array_equal(arrays["gram/C4/ntk"], store.matrix("gram", "C4", "ntk")[along, along], strict=True)
    assert_array_equal(arrays["cross/C4/ntk"], store.matrix("cross", "C4", "ntk")[across, along], strict=True)
    assert arrays["names/train"].tolist() == store.names("train")[along]
    assert_array_equal(arrays["labels/test"], np.asarray(store.labels("test"))[across])
    assert len(arrays) == 6


def test_no_test_images_means_no_cross_matrix(store: GramStore, tmp_path: Path) -> None:
    names = export_run(store, str(tmp_path / "gram.npz"), ["C1"], ["nngp"], None, "0:0")
    assert names == ["labels/train", "names/train", "gram/C1/nngp"]


@pytest.mark.parametrize("kind", ["npz", "zarr"])
def test_missing_or_damaged_tiles_end_it_and_leave_nothing(store: GramStore, tmp_path: Path, kind: str) -> None:
    output = tmp_path / f"some.{kind}"
    path = Path(store.url, "gram/C4/ntk/c/1/2")
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedTileError, match=r"chunk 1, 2 of gram/C4/ntk .tile gram.1, 2.. is damaged"):
        export_run(store, str(output), train="5:10")
    store.discard_tile(Tile("gram", 1, 2))
    with pytest.raises(IncompleteRunError, match="2 of 4 chunks of gram/C1/nngp are missing; `equigram run"):
        export_run(store, str(output), train="5:10")
    assert not output.exists()
    assert len(export_run(store, str(output), train="0:8")) == 12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"groups": ["C44"]}, "--group 'C44' is not in the store; choose C1 or C4; did you mean 'C4'?"),
        ({"kernels": ["NTK"]}, "--kernel 'NTK' is not in the store; choose nngp or ntk"),
        ({"train": "0-5"}, "--train '0-5' is no FIRST:END, as in 0:1000"),
        ({"train": "5:5"}, "--train 5:5 names no images: there are 10, from 0:1 to 0:10"),
        ({"test": "0:6"}, "--test 0:6 names no images: there are 5"),
    ],
)
def test_what_is_not_there_is_refused(store: GramStore, tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        export_run(store, str(tmp_path / "out.npz"), **arguments)
    assert words in str(caught.value)
    assert not (tmp_path / "out.npz").exists()


def test_places_that_cannot_be_written_are_refused(store: GramStore, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"export writes .npz files and .zarr groups; choose a name that ends so"):
        export_run(store, str(tmp_path / "out.csv"))
    for name in ("out.npz", "out.zarr"):
        export_run(store, str(tmp_path / name), train="0:2", test="0:0")
        with pytest.raises(SpecError, match=f"{name} exists already; choose another name, or delete it"):
            export_run(store, str(tmp_path / name))
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr/notes.txt").touch()
    with pytest.raises(SpecError, match=r"mine.zarr exists already"):
        export_run(store, str(tmp_path / "mine.zarr"))
    assert (tmp_path / "mine.zarr/notes.txt").exists()
    with pytest.raises(StoreError, match=r"cannot write the export: .*No such file or directory"):
        export_run(store, str(tmp_path / "nowhere/out.npz"))
    with pytest.raises(SpecError, match=r"run/gram/out.zarr is in the run store .*, which holds its run alone"):
        export_run(store, f"{store.url}/gram/out.zarr")
    with pytest.raises(SpecError, match=r"an .npz file is written to this machine only; export a .zarr"):
        export_run(store, "memory://out.npz")


@pytest.mark.parametrize("kind", ["npz", "zarr"])
def test_a_full_disk_is_told_and_no_half_of_an_export_stays(
    store: GramStore, tmpfs: Callable[[str], Path], fill_disk: Callable[[Path], None], kind: str
) -> None:
    disk = tmpfs("size=1m")
    fill_disk(disk)
    output = disk / f"out.{kind}"
    with pytest.raises(StoreError, match=r"out\..*: cannot write the export: .*No space left on device"):
        export_run(store, str(output))
    assert not output.exists()
    (disk / "ballast").unlink()
    assert len(export_run(store, str(output))) == 12


def test_more_memory_than_there_is_is_refused(
    store: GramStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("equigram.export.available_memory", lambda: 1000)
    with pytest.raises(
        ResourceError, match=r"needs 2\.\d KiB of memory, and 1000 bytes are .* images .--train. or write a"
    ):
        export_run(store, str(tmp_path / "out.npz"))
    export_run(store, str(tmp_path / "out.zarr"))


def test_an_export_goes_to_object_storage(store: GramStore, bucket: str) -> None:
    export_run(store, f"{bucket}/out.zarr", ["C4"], ["ntk"])
    root: Any = zarr.open_group(f"{bucket}/out.zarr", mode="r")
    assert_array_equal(root["gram/C4/ntk"][...], store.matrix("gram", "C4", "ntk"))
