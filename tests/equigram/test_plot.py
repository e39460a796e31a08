"""The pictures: real PNG files, decoded with Pillow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from equigram.errors import SpecError, StoreError
from equigram.plot import _block_means, confusion, gram_heatmap, learning_curves, spectrum

TISSUES = ["ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"]
LONG_NAMES = [f"{tissue}: a long name of tissue, $with_a^{{dollar" for tissue in TISSUES]


def gram_of(n: int, seed: int = 0) -> NDArray[np.float64]:
    features = np.random.default_rng(seed).standard_normal((n, 5))
    return np.asarray(1 + features @ features.T)


def pixels_of(path: Path) -> NDArray[np.uint8]:
    """(height, width, 3) of a whole and sensibly large picture that is not of one colour."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        colored = image.convert("RGB")
        assert len(colored.getcolors(2**24) or ()) > 20
        pixels = np.array(colored)
    height, width, _ = pixels.shape
    assert 300 <= height <= 3000
    assert 300 <= width <= 3000
    return pixels


def margins_are_white(pixels: NDArray[np.uint8]) -> bool:
    """Nothing is cut off at the edges of the picture."""
    return all((edge == 255).all() for edge in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]))


@pytest.mark.parametrize(
    ("n", "labels", "classes"),
    [
        (3, None, None),
        (1, None, None),
        (3, [0, 0, 0], ["the only class"]),
        (90, [image % 9 for image in range(90)], TISSUES),
        (90, [image % 9 for image in range(90)], LONG_NAMES),
        (90, [image % 45 for image in range(90)], None),
        (2500, [image % 9 for image in range(2500)], TISSUES),
    ],
)
def test_a_gram_heatmap_is_a_picture(
    tmp_path: Path, n: int, labels: list[int] | None, classes: list[str] | None
) -> None:
    numbers = None if labels is None else np.array(labels)
    path = gram_heatmap(gram_of(n), numbers, classes, "C4 ntk", tmp_path / "gram.png")
    assert path == tmp_path / "gram.png"
    assert margins_are_white(pixels_of(path))


def test_a_large_gram_matrix_is_drawn_as_block_means_of_the_sorted_images() -> None:
    order = np.random.default_rng(0).permutation(60)
    means = _block_means(gram_of(60), order, most=20)
    expected = gram_of(60)[np.ix_(order, order)].reshape(20, 3, 20, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(means, expected)


def test_blocks_of_unequal_size_are_averaged_by_their_size() -> None:
    means = _block_means(np.arange(25.0).reshape(5, 5), np.arange(5), most=2)
    np.testing.assert_allclose(means, [[3, 5.5], [15.5, 18]])


def test_the_gram_matrix_is_not_modified(tmp_path: Path) -> None:
    gram = gram_of(10)
    gram.setflags(write=False)
    gram_heatmap(gram, np.arange(10) % 2, None, "", tmp_path / "gram.png")


def test_missing_tiles_of_a_gram_matrix_stay_grey(tmp_path: Path) -> None:
    gram = gram_of(4)
    gram[:2] = np.nan
    pixels = pixels_of(gram_heatmap(gram, None, None, "half done", tmp_path / "half.png"))
    assert (pixels == 0xBB).all(axis=-1).mean() > 0.2
    gram_heatmap(np.full((4, 4), np.nan), None, None, "nothing done", tmp_path / "none.png")


def test_a_constant_gram_matrix_is_drawn(tmp_path: Path) -> None:
    pixels_of(gram_heatmap(np.ones((5, 5)), np.zeros(5, dtype=int), ["one"], "constant", tmp_path / "gram.png"))


def test_a_spectrum_is_a_picture(tmp_path: Path) -> None:
    eigenvalues = np.linalg.eigvalsh(gram_of(50) + 1e-3 * np.eye(50))
    path = spectrum({f"{group} ntk": eigenvalues for group in ("C1", "C2", "C4", "D4")}, tmp_path / "spectrum.png")
    assert margins_are_white(pixels_of(path))


def test_eigenvalues_of_zero_or_below_are_left_out(tmp_path: Path) -> None:
    eigenvalues = np.array([5.0, 2.0, 0.0, -1e-7], dtype=np.float32)
    pixels_of(spectrum({"C4 ntk": eigenvalues}, tmp_path / "spectrum.png"))
    pixels_of(spectrum({"one image": np.array([2.0])}, tmp_path / "one.png"))


@pytest.mark.parametrize("largest", [9, 10_000_000])
@pytest.mark.parametrize("classes", [TISSUES, None, ["colorectal adenocarcinoma epithelium"] * 9])
def test_a_confusion_matrix_is_a_picture(tmp_path: Path, classes: list[str] | None, largest: int) -> None:
    matrix = np.random.default_rng(0).integers(0, largest + 1, (9, 9))
    matrix[4] = 0
    path = confusion(matrix, classes, "C4 ntk, λ = 1e-4", tmp_path / "confusion.png")
    assert margins_are_white(pixels_of(path))


@pytest.mark.parametrize("k", [1, 2, 60])
def test_any_number_of_classes_is_drawn(tmp_path: Path, k: int) -> None:
    pixels_of(confusion(np.eye(k, dtype=np.int64), None, "perfect", tmp_path / "confusion.png"))


def test_learning_curves_are_a_picture(tmp_path: Path) -> None:
    curves = {f"C{n} ntk": [(size, 0.5 + 0.01 * n) for size in (100, 1, 2, 10, 1000, 5)] for n in range(12)}
    assert margins_are_white(pixels_of(learning_curves(curves, tmp_path / "curves.png")))
    pixels_of(learning_curves({"one point": [(10, 1.0)]}, tmp_path / "point.png"))


def test_a_class_name_that_the_font_lacks_is_drawn_without_a_warning(tmp_path: Path) -> None:
    pixels_of(confusion(np.eye(2, dtype=np.int64), ["猫", "犬"], "", tmp_path / "confusion.png"))


def test_a_picture_replaces_the_one_before_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "gram.png"
    gram_heatmap(gram_of(3), None, None, "", path)
    first = path.read_bytes()
    gram_heatmap(gram_of(4), None, None, "", str(path))
    assert path.read_bytes() != first
    assert sorted(file.name for file in path.parent.iterdir()) == ["gram.png", "gram.svg"]


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    first, second = (gram_heatmap(gram_of(5), None, None, "", tmp_path / f"{name}.png") for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".svg").read_bytes() == second.with_suffix(".svg").read_bytes()


def test_a_path_that_cannot_be_written_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "gram.png", tmp_path / "folder"):
        with pytest.raises(StoreError) as caught:
            gram_heatmap(gram_of(3), None, None, "", path)
        assert str(caught.value).startswith(f"{path}: cannot be written: ")
        assert str(caught.value).endswith("; choose a folder you can write to")
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize(
    ("draw", "text"),
    [
        (
            lambda path: gram_heatmap(np.ones((2, 3)), None, None, "", path),
            "the Gram matrix to draw has shape (2, 3); it must be (n, n) with n of 1 or more",
        ),
        (
            lambda path: gram_heatmap(np.ones((2, 2)), np.zeros(3, dtype=int), None, "", path),
            "labels (3,) do not fit a Gram matrix (2, 2); pass one label per row",
        ),
        (
            lambda path: gram_heatmap(np.ones((2, 2)), np.array([0, 2]), ["a", "b"], "", path),
            "label 2 has no name among 2 classes; name its class",
        ),
        (
            lambda path: confusion(np.ones((2, 2), dtype=int), ["a"], "", path),
            "the confusion matrix has shape (2, 2) and 1 class names; pass (k, k) counts and k names",
        ),
        (lambda path: spectrum({}, path), "there is no curve to draw; pass at least one"),
        (
            lambda path: spectrum({"C4 ntk": np.array([1.0, np.nan])}, path),
            "the eigenvalues of 'C4 ntk', shape (2,), must be (n,) finite numbers with a mean above 0",
        ),
        (lambda path: spectrum({"C4 ntk": -np.ones(2)}, path), "the eigenvalues of 'C4 ntk'"),
        (lambda path: learning_curves({}, path), "there is no curve to draw; pass at least one"),
        (
            lambda path: learning_curves({"C4 ntk": [(0, 0.5)]}, path),
            "the learning curve of 'C4 ntk' is [(0, 0.5)]; it must be pairs of training images per class, 1 or more, "
            "and accuracy, 0 to 1",
        ),
        (lambda path: learning_curves({"C4 ntk": [(1, float("nan"))]}, path), "the learning curve of 'C4 ntk'"),
        (lambda path: learning_curves({"C4 ntk": []}, path), "the learning curve of 'C4 ntk'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, draw: Any, text: str) -> None:
    with pytest.raises(SpecError) as caught:
        draw(tmp_path / "picture.png")
    assert str(caught.value).startswith(text)
    assert not list(tmp_path.iterdir())


def test_drawing_touches_no_global_state_of_matplotlib(tmp_path: Path) -> None:
    code = (
        "import sys, numpy, matplotlib; before = matplotlib.rcParams.copy(); from equigram.plot import spectrum; "
        f"spectrum({{'a': numpy.ones(3)}}, {str(tmp_path / 'a.png')!r}); "
        "print('matplotlib.pyplot' in sys.modules, before == matplotlib.rcParams.copy())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == (
        "False True\n"
    )
