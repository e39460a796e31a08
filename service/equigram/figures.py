"""The figures of a run, from its store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equigram import plot
from equigram.errors import IncompleteRunError
from equigram.solve.metrics import confusion_matrix
from equigram.solve.stage import solved_matrices, stored_results
from equigram.tables import write_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from equigram.solve.stage import Result
    from equigram.store import GramStore

DRAWN_IMAGES = 4000
"""Training images that a heat map and a spectrum show at most, evenly spread: eigenvalues cost n³."""


def draw_run(store: GramStore, folder: str | Path) -> list[Path]:
    """Draw everything that a run has to show into ``folder``: PNG files, whose paths are returned, and SVG files.

    Heat maps of the train matrices sorted by class, their eigenvalue spectra, and where it was solved with test
    labels the confusion matrices and learning curves, both for the ridge values that were chosen. The data of each are
    beside it as CSV, but for the matrices, which are in the store.

    Raises:
      IncompleteRunError: tiles of the train matrices are missing; nothing was drawn.
      DamagedTileError: a matrix cannot be read whole.
      StoreError: the pictures cannot be written.
    """
    info = store.info
    missing = [tile for tile in info.tiling.missing(store.finished_tiles()) if tile.part == "gram"]
    if missing:
        raise IncompleteRunError(
            f"{store.url} has nothing to draw yet: {len(missing):,} tiles of the train matrices are missing; "
            "`equigram run JOB.yaml` computes them"
        )
    folder = Path(folder)
    labels, test_labels = store.labels("train"), store.labels("test") if info.test else None
    class_labels = labels if info.classes is not None else None
    some = np.unique(np.linspace(0, info.train - 1, min(info.train, DRAWN_IMAGES)).astype(int))
    count = "the " if len(some) == info.train else f"{len(some):,} of {info.train:,} "
    written = []
    solved = solved_matrices(store)
    spectra = {}
    curves = {}
    for group in info.spec.gram.groups:
        for kernel in info.spec.gram.kernels:
            name = f"{group} {kernel.upper()}"
            gram = store.matrix("gram", group, kernel, some, some)
            path = folder / f"gram-{group}-{kernel}.png"
            title = f"{name}: correlations of {count}training images"
            some_labels = None if class_labels is None else class_labels[some]
            written.append(plot.gram_heatmap(_correlations(gram), some_labels, info.classes, title, path))
            spectra[name] = np.linalg.eigvalsh(gram.astype(np.float64))
            if class_labels is None or test_labels is None or (group, kernel) not in solved:
                continue
            arrays, fields = store.solution(group, kernel)
            ridge = float(arrays["ridge"][fields["chosen"]])
            matrix = confusion_matrix(arrays["predictions"][fields["chosen"]], test_labels)
            path = folder / f"confusion-{group}-{kernel}.png"
            written.append(plot.confusion(matrix, info.classes, f"{name}: test images, ridge {ridge:g}", path))
            names = info.classes or ()
            counts = [dict(zip(names, row, strict=True)) for row in matrix.tolist()]
            table = [{"true class": one, **row} for one, row in zip(names, counts, strict=True)]
            write_table(path.with_suffix(".csv"), table)
            results = [result for result in stored_results(store, group, kernel) if result.chosen]
            curves[name] = _learning_curve(results, class_labels)
    written.append(plot.spectrum(spectra, folder / "spectrum.png"))
    write_table(
        folder / "spectrum.csv",
        [
            {"matrix": name, "rank": rank, "eigenvalue": value}
            for name, values in spectra.items()
            for rank, value in enumerate(sorted(values.tolist(), reverse=True), start=1)
        ],
    )
    if any(len(curve) > 1 for curve in curves.values()):
        written.append(plot.learning_curves(curves, folder / "learning-curves.png"))
        write_table(
            folder / "learning-curves.csv",
            [
                {"matrix": name, "per_class": size, "accuracy": share}
                for name, curve in curves.items()
                for size, share in curve
            ],
        )
    return written


def _correlations(gram: NDArray[Any]) -> NDArray[Any]:
    """``K(x, x') / √(K(x, x) K(x', x'))``, float32: no image outshines the rest. NaN for ``0 / 0``."""
    size = np.sqrt(np.diagonal(gram))
    with np.errstate(invalid="ignore", divide="ignore"):
        result: NDArray[Any] = (gram / size[:, None] / size).astype(np.float32)
    return result


def _learning_curve(results: Sequence[Result], labels: NDArray[Any]) -> list[tuple[int, float]]:
    """Accuracies by training images per class; that of all images too, if the classes have equally many."""
    counts = np.unique(np.unique(labels, return_counts=True)[1])
    whole = int(counts[0]) if len(counts) == 1 else None
    sizes = [(whole if result.train_size is None else result.train_size, result.accuracy) for result in results]
    return sorted({size: share for size, share in sizes if size is not None and share is not None}.items())
