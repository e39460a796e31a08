"""The figures of a run: what is drawn of a real small store, and when nothing is."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from equigram import figures, plot
from equigram.data import fingerprint, load_dataset
from equigram.errors import DamagedTileError, IncompleteRunError, StoreError
from equigram.events import nobody
from equigram.figures import draw_run
from equigram.solve.stage import solve_run, stored_results
from equigram.spec import JobSpec
from equigram.store import GramStore
from equikernel.kernel import KernelFunction


def compute(store: GramStore) -> None:
    """All tiles, in this process."""
    info = store.info
    function = KernelFunction(info.spec.network, info.spec.gram.groups, "reference")
    for tile in info.tiling.tiles():
        rows = function.prepare(store.block("test" if tile.part == "cross" else "train", tile.row))
        cols = function.prepare(store.block("train", tile.col))
        store.write_tile(tile, function(rows, cols))


def make_run(folder: Path, labels: Any = None, *, test: int = 6, **sections: Any) -> GramStore:
    """A run on 12 random images of 4x4 pixels in three classes, computed and solved."""
    classes = np.arange(12 + test) % 3
    values = classes if labels is None else np.asarray(labels)
    noise = np.random.default_rng(0).random((12 + test, 4, 4))
    images = noise + 0.5 * classes[:, None, None]
    arrays: dict[str, Any] = {"x_train": images[:12], "y_train": values[:12]}
    if test:
        arrays |= {"x_test": images[12:], "y_test": values[12:]}
    np.savez(folder / "data.npz", **arrays)
    spec = JobSpec.parse(
        {
            "store": str(folder / "run"),
            "data": {"train": str(folder / "data.npz"), "normalize": "none"},
            "network": {"depth": 1},
            "gram": {"groups": ["C1", "C4"], "engine": "reference", "dtype": "float64"},
            "solve": {"ridge": [1e-3, 1e-1], "train_sizes": [1, 2]},
            **sections,
        }
    )
    dataset = load_dataset(spec.data, square=True)
    store = GramStore.create(spec, dataset, 8, fingerprint(spec.data))
    compute(store)
    if spec.solve is not None:
        solve_run(store, spec.solve, spec.solved_kernels, nobody)
    return store


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """What is drawn, by the name of the file; nothing is written."""
    pictures: dict[str, tuple[Any, ...]] = {}

    def draw(*arguments: Any) -> Path:
        *rest, path = arguments
        pictures[Path(path).name] = tuple(rest)
        return Path(path)

    for name in ("gram_heatmap", "spectrum", "confusion", "learning_curves"):
        monkeypatch.setattr(plot, name, draw)
    return pictures


def test_a_solved_run_has_all_figures_as_png_files(tmp_path: Path) -> None:
    paths = draw_run(make_run(tmp_path, gram={"groups": ["C1"], "kernels": ["ntk"], "engine": "reference"}), tmp_path)
    assert [path.name for path in paths] == [
        "gram-C1-ntk.png", "confusion-C1-ntk.png", "spectrum.png", "learning-curves.png",
    ]  # fmt: skip
    assert {path.read_bytes()[:8] for path in paths} == {b"\x89PNG\r\n\x1a\n"}


def test_every_network_and_kernel_is_drawn(tmp_path: Path, drawn: dict[str, tuple[Any, ...]]) -> None:
    paths = draw_run(make_run(tmp_path), tmp_path / "pictures")
    pairs = [f"{group}-{kernel}" for group in ("C1", "C4") for kernel in ("nngp", "ntk")]
    singles = ["spectrum.png", "learning-curves.png"]
    assert sorted(drawn) == sorted([f"gram-{p}.png" for p in pairs] + [f"confusion-{p}.png" for p in pairs] + singles)
    assert sorted(paths) == sorted(tmp_path / "pictures" / name for name in drawn)


def test_the_heat_map_shows_correlations_by_class(tmp_path: Path, drawn: dict[str, tuple[Any, ...]]) -> None:
    store = make_run(tmp_path)
    draw_run(store, tmp_path)
    matrix, labels, classes, title = drawn["gram-C4-ntk.png"]
    gram = store.matrix("gram", "C4", "ntk")
    assert_allclose(matrix[2, 5], gram[2, 5] / np.sqrt(gram[2, 2] * gram[5, 5]), rtol=1e-6)
    assert_allclose(np.diagonal(matrix), 1, rtol=1e-6)
    assert_array_equal(labels, store.labels("train"))
    assert classes == ("0", "1", "2")
    assert title == "C4 NTK: correlations of the training images"


def test_an_image_without_a_kernel_is_left_grey() -> None:
    matrix = figures._correlations(np.array([[4.0, 0.0], [0.0, 0.0]]))
    assert_array_equal(matrix, [[1, np.nan], [np.nan, np.nan]])


def test_the_spectrum_is_that_of_the_stored_matrix(tmp_path: Path, drawn: dict[str, tuple[Any, ...]]) -> None:
    store = make_run(tmp_path)
    draw_run(store, tmp_path)
    (spectra,) = drawn["spectrum.png"]
    assert list(spectra) == ["C1 NNGP", "C1 NTK", "C4 NNGP", "C4 NTK"]
    assert_allclose(spectra["C1 NTK"], np.linalg.eigvalsh(store.matrix("gram", "C1", "ntk")))


def test_the_spectrum_of_many_images_is_that_of_some(
    tmp_path: Path, drawn: dict[str, tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "DRAWN_IMAGES", 5)
    draw_run(make_run(tmp_path), tmp_path)
    assert len(drawn["spectrum.png"][0]["C4 NTK"]) == 5


def test_the_confusion_matrix_agrees_with_the_accuracy(tmp_path: Path, drawn: dict[str, tuple[Any, ...]]) -> None:
    store = make_run(tmp_path)
    draw_run(store, tmp_path)
    counts, classes, title = drawn["confusion-C1-ntk.png"]
    best = next(r for r in stored_results(store, "C1", "ntk") if r.train_size is None and r.chosen)
    assert_array_equal(counts.sum(axis=1), [2, 2, 2])
    assert best.accuracy == pytest.approx(np.trace(counts) / 6)
    assert (classes, title) == (("0", "1", "2"), f"C1 NTK: test images, ridge {best.ridge:g}")


def test_the_data_of_the_figures_are_beside_them(tmp_path: Path) -> None:
    store = make_run(tmp_path)
    for path in draw_run(store, tmp_path / "out"):
        assert path.with_suffix(".svg").exists()
    with (tmp_path / "out/confusion-C4-ntk.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    best = next(r for r in stored_results(store, "C4", "ntk") if r.train_size is None and r.chosen)
    assert best.accuracy == pytest.approx(sum(int(row[row["true class"]]) for row in rows) / 6)
    with (tmp_path / "out/spectrum.csv").open(encoding="utf-8") as file:
        values = [float(row["eigenvalue"]) for row in csv.DictReader(file) if row["matrix"] == "C4 NTK"]
    assert_allclose(values, np.linalg.eigvalsh(store.matrix("gram", "C4", "ntk").astype(float))[::-1])
    with (tmp_path / "out/learning-curves.csv").open(encoding="utf-8") as file:
        assert {row["per_class"] for row in csv.DictReader(file)} == {"1", "2", "4"}


def test_the_learning_curve_ends_with_all_images(tmp_path: Path, drawn: dict[str, tuple[Any, ...]]) -> None:
    store = make_run(tmp_path)
    draw_run(store, tmp_path)
    (curves,) = drawn["learning-curves.png"]
    accuracy = {r.images // 3: r.accuracy for r in stored_results(store, "C4", "nngp") if r.chosen}
    assert curves["C4 NNGP"] == sorted(accuracy.items())
    assert [size for size, _ in curves["C4 NNGP"]] == [1, 2, 4]


def test_of_unequal_classes_all_images_are_no_point_of_the_learning_curve(
    tmp_path: Path, drawn: dict[str, tuple[Any, ...]]
) -> None:
    draw_run(make_run(tmp_path, labels=[0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 1, 2, 0, 1, 2]), tmp_path)
    assert [size for size, _ in drawn["learning-curves.png"][0]["C1 NTK"]] == [1, 2]


@pytest.mark.parametrize("ridge", [(1e-3, 0.1), (0.1, 1e-3)])
def test_the_figures_are_of_the_chosen_ridge(
    tmp_path: Path, drawn: dict[str, tuple[Any, ...]], ridge: tuple[float, ...]
) -> None:
    draw_run(make_run(tmp_path, solve={"ridge": ridge, "train_sizes": [1, 2], "choose": "first"}), tmp_path)
    assert drawn["confusion-C4-ntk.png"][2].endswith(f"ridge {ridge[0]:g}")


@pytest.mark.parametrize(
    ("change", "absent"),
    [
        ({"test": 0}, {"confusion", "learning"}),
        ({"solve": None}, {"confusion", "learning"}),
        ({"labels": np.linspace(0, 1, 18)}, {"confusion", "learning"}),
        ({"solve": {"ridge": 1e-3}}, {"learning"}),
    ],
    ids=["no test images", "not solved", "regression", "no training sizes"],
)
def test_what_a_run_does_not_have_is_not_drawn(
    tmp_path: Path, drawn: dict[str, tuple[Any, ...]], change: dict[str, Any], absent: set[str]
) -> None:
    draw_run(make_run(tmp_path, **change), tmp_path)
    kinds = {name.split("-")[0].removesuffix(".png") for name in drawn}
    assert kinds == {"gram", "spectrum", "confusion", "learning"} - absent


def test_an_unfinished_run_is_not_drawn_at_all(tmp_path: Path, drawn: dict[str, tuple[Any, ...]]) -> None:
    store = make_run(tmp_path)
    (tmp_path / "run/gram/C4/ntk/c/0/1").unlink()
    with pytest.raises(
        IncompleteRunError, match=r"run has nothing to draw yet: 1 tiles of the train matrices are miss"
    ):
        draw_run(GramStore.open(store.url), tmp_path)
    assert not drawn


def test_missing_test_tiles_do_not_keep_the_train_matrices_from_being_drawn(
    tmp_path: Path, drawn: dict[str, tuple[Any, ...]]
) -> None:
    store = make_run(tmp_path)
    (tmp_path / "run/cross/C4/ntk/c/0/1").unlink()
    draw_run(GramStore.open(store.url), tmp_path)
    assert "gram-C4-ntk.png" in drawn


def test_a_damaged_tile_is_not_drawn(tmp_path: Path, drawn: dict[str, tuple[Any, ...]]) -> None:
    store = make_run(tmp_path)
    chunk = tmp_path / "run/gram/C1/nngp/c/0/1"
    content = bytearray(chunk.read_bytes())
    content[17] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(DamagedTileError, match=r"gram/C1/nngp .* is damaged"):
        draw_run(GramStore.open(store.url), tmp_path)


def test_a_place_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    store = make_run(tmp_path)
    (tmp_path / "file").write_text("text", encoding="utf-8")
    with pytest.raises(StoreError, match="cannot be written: "):
        draw_run(store, tmp_path / "file")
