"""The ready job files, on small data in exactly the formats that they are for."""

from __future__ import annotations

import string
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from equigram.solve.stage import stored_results
from equigram.store import GramStore

EXAMPLES = Path(__file__).parents[2] / "examples"

Command = Callable[..., subprocess.CompletedProcess[str]]

TISSUES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")


def tissue(label: int, side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A picture ``(side, side, 3)`` whose colour and grain tell its class."""
    coarse = rng.integers(0, 50, (2 + label, 2 + label, 3), dtype=np.uint8)
    grain = np.asarray(Image.fromarray(coarse).resize((side, side)))
    colour = np.array([20 + 85 * (label % 3), 20 + 85 * (label // 3), 100])
    return np.asarray((grain + colour).astype(np.uint8))


def published_folders(folder: Path, train: int, test: int) -> None:
    """NCT-CRC-HE-100K and CRC-VAL-HE-7K as they are unzipped: TIFFs of 224x224 pixels in a folder per tissue."""
    rng = np.random.default_rng(0)
    for name, part, count in (("NCT-CRC-HE-100K", "", train), ("CRC-VAL-HE-7K", "TCGA-", test)):
        for label, tissue_name in enumerate(TISSUES):
            place = folder / name / tissue_name
            place.mkdir(parents=True)
            for _ in range(count):
                letters = "".join(rng.choice(list(string.ascii_uppercase), 8))
                Image.fromarray(tissue(label, 224, rng)).save(place / f"{tissue_name}-{part}{letters}.tif")


def published_file(path: Path, train: int, test: int) -> None:
    """PathMNIST: images of 28x28 pixels and labels of shape ``(n, 1)``, in three parts."""
    rng = np.random.default_rng(1)
    arrays: dict[str, NDArray[np.uint8]] = {}
    for part, count in (("train", train), ("val", 9), ("test", test)):
        labels = (np.arange(count) % 9).astype(np.uint8)
        arrays[f"{part}_images"] = np.stack([tissue(int(label), 28, rng) for label in labels])
        arrays[f"{part}_labels"] = labels[:, None]
    np.savez(path, **arrays)  # type: ignore[arg-type]


def run_example(equigram: Command, folder: Path, name: str, **data: Any) -> GramStore:
    """Run an example with other data, and as few images, as a user would."""
    job = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
    job["data"] |= {"per_class": 2, "test_per_class": 1, **data}
    job["solve"]["train_sizes"] = [1]
    job["resources"] = {"workers": 0}
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    assert "9 test, " in equigram(folder, "plan", "job.yaml").stdout
    for arguments in (("run", "job.yaml"), ("experiment", "curves", job["store"], "-o", "curves", "--subsets", 2)):
        done = equigram(folder, *arguments)
        assert done.returncode == 0, done.stderr
    assert (folder / "curves/curves.svg").exists()
    return GramStore.open(str(folder / job["store"]))


def check(store: GramStore) -> None:
    info = store.info
    assert (info.train, info.test, info.spec.gram.groups) == (18, 9, ("C1", "C4", "D4"))
    for group in info.spec.gram.groups:
        for kernel in ("nngp", "ntk"):
            results = stored_results(store, group, kernel)
            assert [result.images for result in results] == 3 * [9] + 3 * [18]
            best = next(result for result in results if result.chosen and result.train_size is None)
            assert best.accuracy is not None
            assert best.accuracy > 0.5


def test_histology_as_it_is_published(equigram: Command, tmp_path: Path) -> None:
    published_folders(tmp_path, 3, 2)
    folders = {"train": str(tmp_path / "NCT-CRC-HE-100K"), "test": str(tmp_path / "CRC-VAL-HE-7K")}
    store = run_example(equigram, tmp_path, "histology", size=16, **folders)
    check(store)
    assert store.info.classes == TISSUES
    assert store.info.image_shape == (16, 16, 3)
    assert {name.split("/")[0] for name in store.names("test")} == set(TISSUES)
    assert all(name.split("/")[1].startswith(f"{name.split('/')[0]}-TCGA-") for name in store.names("test"))


def test_pathmnist_as_it_is_published(equigram: Command, tmp_path: Path) -> None:
    published_file(tmp_path / "pathmnist.npz", 27, 18)
    store = run_example(equigram, tmp_path, "pathmnist", size=14, train=str(tmp_path / "pathmnist.npz"))
    check(store)
    assert store.info.classes == tuple(map(str, range(9)))
    assert store.info.image_shape == (14, 14, 3)


@pytest.mark.parametrize("name", ["histology", "pathmnist", "textures"])
def test_the_data_of_an_example_are_asked_for_in_a_sentence(equigram: Command, tmp_path: Path, name: str) -> None:
    done = equigram(tmp_path, "plan", EXAMPLES / f"{name}.yaml")
    job = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert job["data"]["train"] in done.stderr
    assert done.stderr.count("\n") == 1
