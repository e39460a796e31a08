"""Augmentation equals symmetry: regression on all turned images with a CNN kernel, against the group-averaged kernel.

With the kernel Θ of a plain CNN, the n training images in all ``|G|`` positions, and the ridge λ, the prediction is
that of the averaged kernel ``Θ_G(x, x') = 1/|G| Σ_g Θ(x, g x')`` on the n images alone with the ridge ``λ / |G|``,
because the coefficients of an image are the same in all of its positions (Gerken and Kessel 2024, *Emergent
equivariance in deep ensembles*). Without a dense head Θ_G is also the kernel of the group convolutional network.
Ridges here are absolute.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from equigram.errors import DataError, SolverError, SpecError
from equigram.events import Listener, Progress
from equigram.experiments.parts import Parts
from equigram.solve.stage import targets_of
from equigram.tables import write_table
from equikernel import groups
from equikernel.kernel import compute

if TYPE_CHECKING:
    from collections.abc import Sequence

    from equigram.store import GramStore
    from equikernel.network import Architecture

Array = NDArray[np.float64]

RIDGES = (1e-4, 1e-2, 1.0)
"""In units of the mean diagonal of the matrix of all positions."""


def run_augmentation(
    store: GramStore,
    folder: Path,
    listener: Listener,
    names: Sequence[str] = ("C2", "C4", "D4"),
    images: int = 40,
    ridge: Sequence[float] = RIDGES,
) -> list[dict[str, Any]]:
    """Write ``augmentation.csv`` and a figure of a run into ``folder``; everything is computed anew, in float64.

    Args:
      store: a run with labels and test images; its network and images are taken.
      folder: where.
      listener: told of the progress.
      names: groups that map pixels to pixels.
      images: training images at most, evenly spread over those of the run, and as many test images.
      ridge: λ of the augmented regression, in units of its mean diagonal.

    Returns:
      The rows of the table: one for each group, kernel and ridge, with the largest difference of the predictions.

    Raises:
      DataError: the run has no labels, or no test images.
      SpecError: a group does not map pixels to pixels.
      SolverError: a matrix is not positive definite with its ridge.
    """
    from equigram import plot

    info = store.info
    labels = store.labels("train")
    if labels is None or not info.test:
        raise DataError(f"{store.url} has no labels, or no test images, with which regressions could be compared")
    square = info.image_shape[0] == info.image_shape[1]
    for name in names:
        if not groups.is_group(name) or not groups.on_grid(name):
            raise SpecError(f"group {name!r} does not map pixels to pixels; choose of C2, C4, D1, D2 and D4")
        if not (square or groups.keeps_rectangles(name)):
            raise SpecError(f"group {name!r} turns images by 90 degrees, which needs square ones; choose C2, D1 or D2")
    some = np.unique(np.linspace(0, info.train - 1, min(info.train, images)).astype(int))
    train = store.images("train")[some].astype(np.float64)
    test = store.images("test")[: min(info.test, images)].astype(np.float64)
    targets = targets_of(labels[some], info.classes)
    problem = {"store": info.created, "images": [len(train), len(test)], "ridge": list(ridge)}
    parts = Parts(folder / "augmentation.part.json", problem)
    rows: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for done, name in enumerate(names):
        listener(Progress("groups", done, len(names)))
        part = parts.get(name)
        if part is None:
            part = _compared(info.spec.network, name, train, test, targets.values, ridge)
            parts.keep(name, part)
        rows += part[0]
        points += part[1]
    listener(Progress("groups", len(names), len(names)))
    write_table(folder / "augmentation.csv", rows)
    write_table(folder / "predictions.csv", points)
    parts.delete()
    plot.augmentation(points, folder / "augmentation.png")
    return rows


def _compared(
    network: Architecture, name: str, train: Array, test: Array, targets: Array, ridge: Sequence[float]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of a group, and its predictions."""
    rows: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    elements = groups.symmetries(name)
    orbit = np.concatenate([np.ascontiguousarray(element.on_images(train)) for element in elements])
    options: dict[str, Any] = {"engine": "auto", "dtype": "float64"}
    gram, cross = (compute(network, ("C1",), *pair, **options)["C1"] for pair in ((orbit, None), (test, orbit)))
    group = compute(network, (name,), train, None, **options)[name]
    for kernel in ("nngp", "ntk"):
        whole, between = np.asarray(getattr(gram, kernel)), np.asarray(getattr(cross, kernel))
        averaged = _mean_blocks(whole, len(elements))[: len(train)]
        averaged_cross = between.reshape(len(test), len(elements), len(train)).mean(axis=1)
        scale = float(np.diagonal(whole).mean())
        difference = np.abs(averaged - np.asarray(getattr(group, kernel))).max() / np.abs(averaged).max()
        for value in ridge:
            augmented = between @ _solve(whole, np.tile(targets, (len(elements), 1)), value * scale)
            symmetric = averaged_cross @ _solve(averaged, targets, value * scale / len(elements))
            rows.append(
                {
                    "group": name,
                    "kernel": kernel,
                    "elements": len(elements),
                    "images": len(train),
                    "ridge_augmented": value * scale,
                    "ridge_averaged": value * scale / len(elements),
                    "largest_prediction": float(np.abs(augmented).max()),
                    "largest_difference": float(np.abs(augmented - symmetric).max()),
                    "kernel_difference": float(difference),
                }
            )
            points += [
                {"group": name, "kernel": kernel, "augmented": float(one), "averaged": float(other)}
                for one, other in zip(augmented.ravel(), symmetric.ravel(), strict=True)
            ]
    return rows, points


def _mean_blocks(orbit: Array, count: int) -> Array:
    """``1/|G| Σ_g Θ(g' x, g x')`` for all g' x: (|G| n, n)."""
    return np.asarray(orbit.reshape(len(orbit), count, -1).mean(axis=1))


def _solve(matrix: Array, values: Array, ridge: float) -> Array:
    """(matrix + ridge I)⁻¹ values."""
    regularised = (matrix + matrix.T) / 2
    regularised[np.diag_indices_from(regularised)] += ridge
    try:
        return np.asarray(scipy.linalg.solve(regularised, values, assume_a="pos"))
    except scipy.linalg.LinAlgError:
        raise SolverError(
            f"a kernel matrix of {len(matrix)} images plus ridge {ridge:.3g} is not positive definite; take a larger "
            "ridge"
        ) from None
