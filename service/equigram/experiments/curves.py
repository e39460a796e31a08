"""Learning curves from one Gram matrix: accuracies over the number of training images, for random subsets of them.

A subset is a sub-block of the stored matrix: nothing is computed again. For each size several subsets are drawn, the
same for all groups and kernels, so that these can be compared on each; the ridge is chosen on left-out training images
of the subset.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from equigram.errors import DataError, ResourceError, SpecError
from equigram.events import Listener, Progress
from equigram.experiments.parts import Parts
from equigram.solve.metrics import accuracy, mean_squared_error
from equigram.solve.regression import best_of, memory_needed, solve_each
from equigram.solve.stage import targets_of
from equigram.tables import write_table
from equikernel.memory import available_memory, format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from equigram.solve.targets import Targets
    from equigram.store import GramStore

RIDGES = (1e-6, 1e-4, 1e-2)


def run_curves(
    store: GramStore,
    folder: Path,
    listener: Listener,
    sizes: Sequence[int] | None = None,
    subsets: int = 5,
    seed: int = 0,
    ridge: Sequence[float] = RIDGES,
) -> list[dict[str, Any]]:
    """Write ``curves.csv`` and a figure of a run into ``folder``; interrupted, it goes on from the last size.

    Args:
      store: a run of classes, with labelled test images, whose matrices are complete.
      folder: where.
      listener: told of the progress.
      sizes: training images per class; by default 1, 2, 5, 10, … and all of the smallest class.
      subsets: random subsets of each size.
      seed: of the subsets.
      ridge: to choose from on left-out images.

    Returns:
      The rows of the table: one for each group, kernel, size and subset.

    Raises:
      DataError: there are no classes, or no labelled test images.
      SpecError: a size is larger than the smallest class.
      ResourceError: the largest subset does not fit in memory.
      SolverError: no ridge value has a solution.
      IncompleteRunError, DamagedTileError: a matrix cannot be read whole.
    """
    from equigram import plot

    info = store.info
    labels, truth = store.labels("train"), store.labels("test") if info.test else None
    if labels is None or truth is None or info.classes is None:
        raise DataError(f"{store.url} has no classes, or no labelled test images, which learning curves are about")
    members = [np.flatnonzero(labels == label) for label in range(len(info.classes))]
    smallest = min(map(len, members))
    chosen = default_sizes(smallest) if sizes is None else sorted(set(sizes))
    if not chosen or chosen[0] < 1 or chosen[-1] > smallest:
        raise SpecError(f"sizes {chosen} are asked for; the smallest class has {smallest} training images")
    largest = len(info.classes) * chosen[-1]
    needed, available = memory_needed(largest), available_memory()
    if needed > available:
        raise ResourceError(
            f"subsets of {largest:,} images take {format_bytes(needed)} of memory to solve with, and "
            f"{format_bytes(available)} are available; take smaller sizes"
        )
    rng = np.random.default_rng(seed)
    orders = [[rng.permutation(one) for one in members] for _ in range(subsets)]
    pairs = [(group, kernel) for group in info.spec.gram.groups for kernel in info.spec.gram.kernels]
    whole = max(map(len, members))  # of all images there is one subset
    drawn = {size: orders if size < whole else orders[:1] for size in chosen}
    total, done = len(pairs) * sum(map(len, drawn.values())), 0
    problem = {"store": info.created, "images": [info.train, info.test], "seed": seed, "ridge": list(ridge)}
    parts = Parts(folder / "curves.part.json", {**problem, "subsets": subsets})
    rows: list[dict[str, Any]] = []
    for group, kernel in pairs:
        matrices = _Matrices(store, group, kernel, available - needed)
        for size in chosen:
            name = f"{group} {kernel} {size}"
            some = parts.get(name)
            if some is None:
                some = []
                for subset, order in enumerate(drawn[size]):
                    listener(Progress("subsets", done + subset, total))
                    images = np.sort(np.concatenate([one[:size] for one in order]))
                    fields = {"group": group, "kernel": kernel, "per_class": size, "images": len(images)}
                    score = _score(*matrices.of(images), targets_of(labels[images], info.classes), truth, ridge)
                    some.append({**fields, "subset": subset, **score})
                parts.keep(name, some)
            rows += some
            done += len(some)
    listener(Progress("subsets", total, total))
    write_table(folder / "curves.csv", rows)
    parts.delete()
    plot.curves(rows, folder / "curves.png")
    return rows


def default_sizes(smallest: int) -> list[int]:
    """1, 2, 5, 10, … below the number of images of the smallest class, and that."""
    sizes = [step * 10**power for power in range(9) for step in (1, 2, 5)]
    return [*(size for size in sizes if size < smallest), smallest]


class _Matrices:
    """The matrices of a group and kernel: read once, where ``room`` bytes hold them, or for each subset."""

    def __init__(self, store: GramStore, group: str, kernel: str, room: int) -> None:
        self._store, self._names, info = store, (group, kernel), store.info
        self._fits = np.dtype(info.spec.gram.dtype).itemsize * (info.train + info.test) * info.train <= room

    @cached_property
    def _whole(self) -> tuple[NDArray[Any], NDArray[Any]]:
        return self._store.matrix("gram", *self._names), self._store.matrix("cross", *self._names)

    def of(self, images: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Of some training images: their Gram matrix, and the cross matrix of all test images with them."""
        if not self._fits:
            gram = self._store.matrix("gram", *self._names, images, images)
            return gram, self._store.matrix("cross", *self._names, None, images)
        gram, cross = self._whole
        return gram[np.ix_(images, images)], cross[:, images]


def _score(
    gram: NDArray[Any], cross: NDArray[Any], targets: Targets, truth: NDArray[Any], ridge: Sequence[float]
) -> dict[str, Any]:
    """How good a regression with some of the training images is."""
    best = best_of(solve_each(gram, targets, ridge, leave_one_out=len(ridge) > 1), targets)
    predictions = best.predict(cross)
    one_hot = np.eye(predictions.shape[1])[truth]
    return {
        "ridge": best.ridge,
        "accuracy": accuracy(predictions, truth),
        "mse": mean_squared_error(predictions, one_hot),
        "residual": best.residual,
        "condition": best.condition,
        "dtype": best.dtype,
    }
