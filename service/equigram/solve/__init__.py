"""Kernel regression on a finished Gram matrix, and how good its predictions are."""

from __future__ import annotations

from equigram.solve.metrics import accuracy, confusion_matrix, mean_squared_error
from equigram.solve.regression import (
    Solution,
    Targets,
    class_targets,
    memory_needed,
    nested_subset,
    real_targets,
    solve,
)

__all__ = [
    "Solution",
    "Targets",
    "accuracy",
    "class_targets",
    "confusion_matrix",
    "mean_squared_error",
    "memory_needed",
    "nested_subset",
    "real_targets",
    "solve",
]
