"""Kernel regression on a finished Gram matrix, and how good its predictions are."""

from __future__ import annotations

from equigram.solve.iterative import solve_iteratively
from equigram.solve.metrics import (
    accuracy,
    accuracy_interval,
    balanced_accuracy,
    confusion_matrix,
    inverse_temperature,
    log_loss,
    mean_squared_error,
    negative_log_likelihood,
    probabilities,
)
from equigram.solve.operators import ArrayOperator, StoredOperator
from equigram.solve.regression import Solution, memory_needed, solve
from equigram.solve.spectrum import (
    Spectrum,
    eigendecompose,
    flow_covariance,
    memory_for_spectrum,
    posterior_variance,
    solve_path,
)
from equigram.solve.targets import Targets, class_targets, nested_subset, real_targets
from equigram.solve.tiled import solve_tiled

__all__ = [
    "ArrayOperator",
    "Solution",
    "Spectrum",
    "StoredOperator",
    "Targets",
    "accuracy",
    "accuracy_interval",
    "balanced_accuracy",
    "class_targets",
    "confusion_matrix",
    "eigendecompose",
    "flow_covariance",
    "inverse_temperature",
    "log_loss",
    "mean_squared_error",
    "memory_for_spectrum",
    "memory_needed",
    "negative_log_likelihood",
    "nested_subset",
    "posterior_variance",
    "probabilities",
    "real_targets",
    "solve",
    "solve_iteratively",
    "solve_path",
    "solve_tiled",
]
