"""Spectrum and training dynamics of a finished run: which modes there are, what they hold, and when they are learned.

With Θ(X, X) / s = V diag(e) Vᵀ the targets have the share ``‖v_iᵀ (Y - ȳ)‖² / ‖Y - ȳ‖²`` along the eigenvector v_i, and
gradient flow learns that part like 1 - exp(-e_i t), t in units of 1 / (η s). Predicted errors over time are those of
:class:`equigram.solve.Spectrum`, without ridge.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equigram.errors import DataError, ResourceError
from equigram.events import Listener, Progress
from equigram.experiments.parts import Parts
from equigram.solve.metrics import accuracy, mean_squared_error
from equigram.solve.spectrum import eigendecompose, memory_for_spectrum
from equigram.solve.stage import targets_of
from equigram.tables import write_table
from equikernel.memory import available_memory, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from equigram.solve.spectrum import Spectrum
    from equigram.solve.targets import Targets
    from equigram.spec import KernelName
    from equigram.store import GramStore

TIMES = tuple(float(f"{10**exponent:.3g}") for exponent in np.arange(-1, 6.01, 0.25))
"""From before the largest mode is learned to long after most others."""


def run_dynamics(
    store: GramStore,
    folder: Path,
    listener: Listener,
    kernels: Sequence[KernelName] = ("ntk",),
    times: Sequence[float] = TIMES,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write ``spectrum.csv``, ``dynamics.csv`` and a figure of a run into ``folder``.

    Interrupted, it goes on with the next matrix.

    Args:
      store: a run with labels whose matrices are complete.
      folder: where.
      listener: told of the progress.
      kernels: whose matrices.
      times: in units of 1 / (η s); infinity is after training.

    Returns:
      The rows of both tables: one for each eigenvalue, and one for each time, of each group and kernel.

    Raises:
      DataError: the training images have no labels.
      ResourceError: the eigenvectors do not fit in memory.
      IncompleteRunError, DamagedTileError: a matrix cannot be read whole.
    """
    from equigram import plot

    info = store.info
    needed, available = memory_for_spectrum(info.train), available_memory()
    if needed > available:
        raise ResourceError(
            f"the eigenvectors of {info.train:,} images take {format_bytes(needed)}, and {format_bytes(available)} of "
            "memory are available; make a run of fewer images, for example with `equigram export` and `import`"
        )
    labels, truth = store.labels("train"), store.labels("test") if info.test else None
    if labels is None:
        raise DataError(f"the images of {store.url} have no labels, and so there is nothing to learn")
    targets = targets_of(labels, info.classes)
    pairs = [(group, kernel) for group in info.spec.gram.groups for kernel in kernels]
    problem = {"store": info.created, "images": [info.train, info.test], "times": list(times)}
    parts = Parts(folder / "dynamics.part.json", problem)
    spectra: list[dict[str, Any]] = []
    dynamics: list[dict[str, Any]] = []
    for index, (group, kernel) in enumerate(pairs):
        listener(Progress("spectra", index, len(pairs)))
        name = f"{group} {kernel}"
        part = parts.get(name)
        if part is None:
            spectrum = eigendecompose(store.matrix("gram", group, kernel))
            cross = store.matrix("cross", group, kernel).astype(np.float64) if info.test else None
            names = {"group": group, "kernel": kernel}
            part = [
                [{**names, **row} for row in _modes(spectrum, targets)],
                [{**names, **row} for row in _over_time(spectrum, cross, targets, truth, times)],
            ]
            parts.keep(name, part)
        spectra += part[0]
        dynamics += part[1]
    listener(Progress("spectra", len(pairs), len(pairs)))
    write_table(folder / "spectrum.csv", spectra)
    write_table(folder / "dynamics.csv", dynamics)
    parts.delete()
    plot.dynamics(spectra, dynamics, folder / "dynamics.png")
    return spectra, dynamics


def _modes(spectrum: Spectrum, targets: Targets) -> Iterator[dict[str, Any]]:
    """The rows of the eigenvalues, from the largest on."""
    shares, count = spectrum.alignment(targets), len(spectrum.values)
    for rank, mode in enumerate(range(count - 1, -1, -1), start=1):
        value = float(spectrum.values[mode])
        yield {
            "rank": rank,
            "eigenvalue": value,
            "alignment": float(shares[mode]),
            "cumulative_alignment": float(shares[mode:].sum()),
            "learning_time": 1 / value if value > 0 else None,
        }


def _over_time(
    spectrum: Spectrum,
    cross: NDArray[np.float64] | None,
    targets: Targets,
    truth: NDArray[Any] | None,
    times: Sequence[float],
) -> Iterator[dict[str, Any]]:
    """The rows of the times: errors on the training images and, where there are labelled ones, on the test images."""
    train = targets.values + targets.offset
    for time in times:
        row: dict[str, Any] = {"time": time, "train_mse": mean_squared_error(spectrum.fit(targets, time=time), train)}
        row |= {"test_mse": None, "test_accuracy": None}
        if cross is not None and truth is not None:
            predictions = cross @ spectrum.coefficients(targets, time=time) + targets.offset
            if targets.classes is None:
                row["test_mse"] = mean_squared_error(predictions, truth)
            else:
                row["test_mse"] = mean_squared_error(predictions, np.eye(len(targets.classes))[truth])
                row["test_accuracy"] = accuracy(predictions, truth)
        yield row
