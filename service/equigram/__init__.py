"""Gram matrices of infinitely wide equivariant neural networks: distributed, resumable, and predictions with them.

>>> import equigram
>>> finished = equigram.run(equigram.JobSpec.load("job.yaml"))
>>> finished.store.matrix("gram", "C4", "ntk")             # (n, n)

Names are imported on first use, so that ``import equigram`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equigram.client import Client, Job
    from equigram.errors import EquigramError
    from equigram.run import predict, run
    from equigram.spec import JobSpec
    from equigram.store import GramStore

__version__ = "0.1.0"
__all__ = ["Client", "EquigramError", "GramStore", "Job", "JobSpec", "__version__", "predict", "run"]

_HOMES = {
    "Client": "client",
    "EquigramError": "errors",
    "GramStore": "store",
    "Job": "client",
    "JobSpec": "spec",
    "predict": "run",
    "run": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'equigram' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"equigram.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
