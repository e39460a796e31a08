"""The figures of a run, from its store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from equigram import plot
from equigram.solve.metrics import confusion_matrix
from equigram.solve.stage import stored_results

if TYPE_CHECKING:
    from equigram.store import GramStore

SPECTRUM_IMAGES = 4000
"""Training images that a spectrum is computed from at most, evenly spread: eigenvalues cost n³."""


def draw_run(store: GramStore, folder: str | Path) -> list[Path]:
    """Draw everything that a run has to show into ``folder``: PNG files, whose paths are returned.

    Heat maps of the train matrices sorted by class, their eigenvalue spectra, and where it was solved with test
    labels the confusion matrices (first ridge value) and learning curves.

    Raises:
      IncompleteRunError, DamagedTileError: a matrix cannot be read whole.
      StoreError: the pictures cannot be written.
    """
    info = store.info
    folder = Path(folder)
    labels, test_labels = store.labels("train"), store.labels("test") if info.test else None
    class_labels = labels if info.classes is not None else None
    written = []
    spectra = {}
    curves: dict[str, list[tuple[int, float]]] = {}
    for group in info.spec.gram.groups:
        for kernel in info.spec.gram.kernels:
            name = f"{group} {kernel.upper()}"
            gram = store.matrix("gram", group, kernel)
            path = folder / f"gram-{group}-{kernel}.png"
            written.append(plot.gram_heatmap(gram, class_labels, info.classes, f"{name} Gram matrix", path))
            some = np.unique(np.linspace(0, len(gram) - 1, min(len(gram), SPECTRUM_IMAGES)).astype(int))
            spectra[name] = np.linalg.eigvalsh(gram[np.ix_(some, some)].astype(np.float64))
            if info.classes is None or test_labels is None or not store.has_solution(group, kernel):
                continue
            predictions = store.solution(group, kernel)[0]["predictions"][0]
            matrix = confusion_matrix(predictions, test_labels)
            path = folder / f"confusion-{group}-{kernel}.png"
            written.append(plot.confusion(matrix, info.classes, f"{name}: test images", path))
            curves[name] = [
                (result.train_size, result.accuracy)
                for result in stored_results(store, group, kernel)
                if result.train_size is not None and result.accuracy is not None and result.ridge == _first(store)
            ]
    written.append(plot.spectrum(spectra, folder / "spectrum.png"))
    if any(curves.values()):
        written.append(plot.learning_curves(curves, folder / "learning-curves.png"))
    return written


def _first(store: GramStore) -> float:
    solve = store.info.spec.solve
    return solve.ridge[0] if solve else 0.0
