"""The benchmark of a whole run, on few and small images."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pipeline
import pytest


def test_a_whole_run_is_measured_and_agrees_with_the_other_programs() -> None:
    command = [sys.executable, pipeline.__file__, "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "…" not in done.stdout
    for words in ("1. From files to accuracies", "meanwhile: writing tiles", "3. The same 1,775 pairs", "C4 ntk 0."):
        assert words in done.stdout


def test_stages_follow_each_other_and_shares_are_of_all_workers() -> None:
    nothing = {f"{name}_seconds": 0.0 for name in ("read", "prepare", "kernel", "write")}
    something = {f"{name}_seconds": 1.0 for name in ("read", "prepare", "write")} | {"kernel_seconds": 8.0}
    moments: list[tuple[str, float, dict[str, Any]]] = [
        ("Note", 1.0, {"text": "imported"}),
        ("Note", 1.5, {"text": "measuring"}),
        ("Progress", 2.0, {"what": "reading training images"}),
        ("Note", 4.0, {"text": "prepared"}),
        ("ComputationStarted", 8.0, {"workers": 2}),
        ("TileStarted", 10.0, {}),
        ("TileFinished", 19.0, something),
        ("TileFinished", 20.0, nothing | {"kernel_seconds": 9.0}),
        ("ComputationEnded", 20.0, {}),
        ("Progress", 21.0, {"what": "solve"}),
        ("Note", 24.0, {"text": "solved"}),
    ]
    events = [{"event": kind, "at": at, "processor": at / 10, **fields} for kind, at, fields in moments]
    times = pipeline.times_of(events, began=0.0, ended=25.0)
    assert list(times.stages.values()) == [1, 1, 2, 4, 2, 10, 1, 3, 1]
    assert (times.total, times.tiles, times.workers) == (25, 10, 2)
    assert (times.read, times.prepare, times.kernels, times.write) == (1, 1, 17, 1)
    assert times.driver == pytest.approx(1)
    assert times.of_workers(times.kernels) == pytest.approx(0.85)
    assert times.of_run(times.kernels) == pytest.approx(0.34)
