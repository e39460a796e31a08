"""The solver stage: reads finished matrices from the store, writes coefficients, predictions and metrics back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equigram.errors import DataError, SolverError
from equigram.solve.metrics import accuracy, mean_squared_error
from equigram.solve.regression import Solution, solve
from equigram.solve.targets import Targets, class_targets, nested_subset, real_targets
from equigram.spec import SolveSpec
from equigram.store import GramStore

Labels = NDArray[Any] | None


@dataclass(frozen=True)
class Result:
    """One regression: a network, a kernel, a number of training images and a ridge value, and how good it is.

    Attributes:
      group, kernel: which Gram matrix.
      train_size: training images per class (of all images in regression); ``None`` for all there are.
      images: training images used.
      ridge: λ in units of the mean diagonal.
      accuracy: share of test images predicted right, 0 to 1; ``None`` for regression or without test labels.
      mean_squared_error: in squared units of the targets, one-hot for classes; ``None`` without test labels.
      residual: relative residual of the linear system; ``None`` where it has no usable solution.
      condition: estimated condition number of the regularised matrix; ``None`` likewise.
      warning: what a person should know, if anything: why there is no solution, or that it is ill-conditioned.
    """

    group: str
    kernel: str
    train_size: int | None
    images: int
    ridge: float
    accuracy: float | None
    mean_squared_error: float | None
    residual: float | None
    condition: float | None
    warning: str | None


def check_solvable(spec: SolveSpec, labels: Labels, classes: tuple[str, ...] | None) -> None:
    """Raise what the solver stage would, as far as the labels alone tell: before any tile is computed.

    Raises:
      DataError: there are no labels, or only one class.
      SpecError: ``solve.train_sizes`` asks for more images than there are.
    """
    _targets(labels, classes)
    for size in spec.train_sizes or ():
        _subset(labels, size, classes)


def solve_run(
    store: GramStore, spec: SolveSpec, kernels: tuple[str, ...], progress: Callable[[int, int], None]
) -> list[Result]:
    """Solve for every group and kernel, train size and ridge value; store and return the results.

    Args:
      store: a run whose matrices are complete.
      spec: ridge values and train sizes.
      kernels: the kernels to predict with.
      progress: called with the regressions done and their number.

    Raises:
      IncompleteRunError, DamagedTileError: a matrix cannot be read whole.
      SolverError: a regression has no usable solution for any ridge value.
    """
    info = store.info
    labels, test_labels = store.labels("train"), store.labels("test") if info.test else None
    sizes = [*sorted(spec.train_sizes or ()), None]
    total = len(info.spec.gram.groups) * len(kernels) * len(sizes)
    results: list[Result] = []
    done = 0
    for group in info.spec.gram.groups:
        for kernel in kernels:
            gram = store.matrix("gram", group, kernel)
            cross = store.matrix("cross", group, kernel) if info.test else None
            here: list[Result] = []
            arrays: dict[str, NDArray[Any]] = {}
            for size in sizes:
                chosen = None if size is None else _subset(labels, size, info.classes)
                targets = _targets(labels if chosen is None or labels is None else labels[chosen], info.classes)
                part = gram if chosen is None else gram[np.ix_(chosen, chosen)]
                rows = cross if cross is None or chosen is None else cross[:, chosen]
                solved = []
                for ridge in spec.ridge:
                    result, solution, predictions = _regression(part, rows, targets, test_labels, ridge)
                    here.append(Result(group=group, kernel=kernel, train_size=size, images=len(part), **result))
                    if solution is not None:
                        solved.append((solution, predictions))
                if not solved:
                    raise SolverError(f"{group} {kernel}, {len(part)} training images: {here[-1].warning}")
                if size is None:
                    arrays = {
                        "ridge": np.array([solution.ridge for solution, _ in solved]),
                        "coefficients": np.stack([solution.coefficients for solution, _ in solved]),
                        "offset": targets.offset,
                    }
                    if rows is not None:
                        arrays["predictions"] = np.stack([predictions for _, predictions in solved])
                done += 1
                progress(done, total)
            store.write_solution(group, kernel, arrays, {"solutions": [asdict(result) for result in here]})
            results += here
    return results


def _regression(
    gram: NDArray[Any], cross: NDArray[Any] | None, targets: Targets, test_labels: Labels, ridge: float
) -> tuple[dict[str, Any], Solution | None, NDArray[np.float64]]:
    """One ridge value: the fields of its :class:`Result`, the solution if there is one, and the test predictions."""
    try:
        (solution,) = solve(gram, targets, (ridge,))
        predictions = np.empty(0) if cross is None else solution.predict(cross)
    except SolverError as error:
        failed = dict.fromkeys(("accuracy", "mean_squared_error", "residual", "condition"))
        return {**failed, "ridge": ridge, "warning": str(error)}, None, np.empty(0)
    right, error_squared = (None, None) if cross is None else _scores(predictions, test_labels, targets)
    result = {
        "ridge": ridge,
        "accuracy": right,
        "mean_squared_error": error_squared,
        "residual": solution.residual,
        "condition": solution.condition,
        "warning": solution.warning,
    }
    return result, solution, predictions


def stored_results(store: GramStore, group: str, kernel: str) -> list[Result]:
    """The results that :func:`solve_run` stored."""
    _, attributes = store.solution(group, kernel)
    return [Result(**fields) for fields in attributes["solutions"]]


def _targets(labels: Labels, classes: tuple[str, ...] | None) -> Targets:
    if labels is None:
        raise DataError(
            "the training images have no labels, so there is nothing to predict; give labels (class folders, `y` in "
            "the .npz, data.train_labels), or set `solve: null` to compute the Gram matrices only"
        )
    return real_targets(labels) if classes is None else class_targets(labels, classes)


def _subset(labels: Labels, size: int, classes: tuple[str, ...] | None) -> NDArray[np.int64]:
    if labels is None:
        raise DataError("solve.train_sizes needs labels; leave it out")
    return nested_subset(labels, size, classes)


def _scores(predictions: NDArray[np.float64], labels: Labels, targets: Targets) -> tuple[float | None, float | None]:
    """Accuracy and mean squared error on the test images."""
    if labels is None:
        return None, None
    if targets.classes is None:
        return None, mean_squared_error(predictions, labels)
    one_hot = np.zeros_like(predictions)
    one_hot[np.arange(len(labels)), labels] = 1
    return accuracy(predictions, labels), mean_squared_error(predictions, one_hot)
