"""Trainability: how well conditioned the kernels of deep networks are, over depth and variances of weights and biases.

The variance q of the features of an image follows ``q ← σ_w² E[φ(u)²] + σ_b²``, u ~ N(0, q). At its fixed point two
nearly equal images become more or less alike with the factor ``χ₁ = σ_w² E[φ'(u)²]`` per layer: where χ₁ < 1 deep
networks see all images alike (ordered phase), where χ₁ > 1 they see no resemblance (chaotic phase), and on the line
χ₁ = 1 between them depth does least harm (Poole et al. 2016; Schoenholz et al. 2017; Xiao et al. 2020). For each point:
the condition number of the NTK, its mean diagonal, and the mean ratio of its off-diagonal to its diagonal entries.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equigram.errors import SpecError, StoreError
from equigram.events import Listener, Progress
from equigram.tables import write_table
from equikernel import GroupCNN, NetworkError, NonFiniteKernelError
from equikernel.activations import parse

STEPS = 5000
"""Iterations after which the variance is taken for its fixed point."""

KEPT = 20
"""New points after which the table is written."""

LARGEST = 1e12
"""A variance beyond this one diverges."""


@dataclass(frozen=True)
class Trainability:
    """What to compute.

    Attributes:
      groups: symmetry groups of the networks.
      depths: convolutions.
      weight_variances, bias_variances: σ_w² and σ_b².
      activation: a named one.
      images: random images.
      size: pixels along their sides.
      seed: of the images.
    """

    groups: tuple[str, ...] = ("C1", "C4")
    depths: tuple[int, ...] = (2, 4, 8, 16, 32)
    weight_variances: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
    bias_variances: tuple[float, ...] = (0.0, 0.05, 0.5)
    activation: str = "erf"
    images: int = 16
    size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("depths", 1), ("weight_variances", 0.0), ("bias_variances", 0.0)):
            values: Sequence[float] = getattr(self, name)
            if not values or min(values) < least or len(set(values)) < len(values):
                raise SpecError(f"{name} = {list(values)} is not allowed; name each once, all {least:g} or more")
        if self.images < 2:
            raise SpecError(f"images = {self.images} is not allowed; it must be 2 or more")


def fixed_point(activation: str, weight_variance: float, bias_variance: float) -> tuple[float, float]:
    """The fixed point q* of the variance from q = 1 on, and the slope χ₁ there; infinite where the variance diverges.

    Raises:
      NetworkError: there is no such activation.
    """
    try:
        one, q = parse(activation), np.ones(1)
    except ValueError as error:
        raise NetworkError(f"activation: {error}") from None
    for _ in range(STEPS):
        after = weight_variance * one.moment(q) + bias_variance
        if not after[0] < LARGEST:
            return math.inf, math.inf
        if abs(after[0] - q[0]) <= 1e-14 * after[0]:
            break
        q = after
    slope = one.dual(q, q, q)[1]
    return float(q[0]), weight_variance * float(slope[0])


def run_trainability(spec: Trainability, folder: Path, listener: Listener) -> list[dict[str, Any]]:
    """Compute what is missing in ``folder``, and write its table ``trainability.csv`` and figure.

    Returns:
      The rows: one for each group, depth and pair of variances. Condition numbers are infinite where the NTK is not
      positive definite to float64 rounding, and all numbers of a network ``None`` where its kernel overflows or is 0.

    Raises:
      SpecError: the folder holds a table of other settings.
      NetworkError, ImageError: a network cannot be, or does not fit the images.
    """
    from equigram import plot

    path = folder / "trainability.csv"
    settings = {"activation": spec.activation, "images": spec.images, "size": spec.size, "seed": spec.seed}
    done = _stored(path, settings)
    points = [
        (group, depth, weight, bias)
        for group in spec.groups
        for weight in spec.weight_variances
        for bias in spec.bias_variances
        for depth in spec.depths
    ]
    images = np.random.default_rng(spec.seed).standard_normal((spec.images, spec.size, spec.size, 1))
    rows: list[dict[str, Any]] = []
    fresh = 0
    for index, (group, depth, weight, bias) in enumerate(points):
        listener(Progress("networks", index, len(points)))
        row = done.get((group, depth, weight, bias))
        if row is None:
            fresh += 1
            row = {
                "group": group,
                "depth": depth,
                "weight_variance": weight,
                "bias_variance": bias,
                **_measured(spec.activation, group, depth, weight, bias, images),
                **settings,
            }
        rows.append(row)
        if fresh == KEPT:
            _write(path, done, rows)
            fresh = 0
    listener(Progress("networks", len(points), len(points)))
    _write(path, done, rows)
    plot.trainability(rows, folder / "trainability.png")
    return rows


def _key(row: dict[str, Any]) -> tuple[str, int, float, float]:
    return row["group"], row["depth"], row["weight_variance"], row["bias_variance"]


def _write(
    path: Path, done: dict[tuple[str, int, float, float], dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> None:
    """Write a table of the rows, and of those that were there before."""
    written = set(map(_key, rows))
    write_table(path, [*rows, *(row for key, row in done.items() if key not in written)])


def _measured(
    activation: str, group: str, depth: int, weight: float, bias: float, images: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """What a point of the table says of its network."""
    variance, slope = fixed_point(activation, weight, bias)
    row: dict[str, Any] = {"fixed_variance": variance, "slope": slope}
    row |= dict.fromkeys(("condition", "mean_diagonal", "off_diagonal_ratio"))
    net = GroupCNN(group=group, depth=depth, activation=activation, w_std=weight**0.5, b_std=bias**0.5)
    try:
        ntk = np.asarray(net.kernel(images, dtype="float64").ntk)
    except NonFiniteKernelError:
        return row
    diagonal = np.diagonal(ntk)
    if not diagonal.mean() > 0:
        return row
    values = np.linalg.eigvalsh(ntk)
    ratio = (ntk.sum() - diagonal.sum()) / (len(ntk) - 1) / diagonal.sum()
    least = len(ntk) * float(np.finfo(np.float64).eps) * values[-1]
    condition = float(values[-1] / values[0]) if values[0] > least else math.inf
    return row | {"condition": condition, "mean_diagonal": float(diagonal.mean()), "off_diagonal_ratio": float(ratio)}


def _stored(path: Path, settings: dict[str, Any]) -> dict[tuple[str, int, float, float], dict[str, Any]]:
    """The rows of an earlier table."""
    if not path.exists():
        return {}
    found = {}
    numbers = ("fixed_variance", "slope", "condition", "mean_diagonal", "off_diagonal_ratio")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if None in row.values():
                    raise ValueError("a line that ends early")
                there = {name: row[name] for name in settings}
                if there != {name: str(value) for name, value in settings.items()}:
                    raise SpecError(f"{path} is of {there}, and asked for is {settings}; choose another folder")
                fields: dict[str, Any] = {name: float(row[name]) if row[name] else None for name in numbers}
                key = row["group"], int(row["depth"]), float(row["weight_variance"]), float(row["bias_variance"])
                names = ("group", "depth", "weight_variance", "bias_variance")
                found[key] = {**dict(zip(names, key, strict=True)), **fields, **settings}
    except SpecError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error!r}); delete it, or choose another folder") from None
    return found
