"""What benchmarks found before: ratios and shares by date, commit, machine and versions, in ``benchmarks/results``.

Times are not kept, as they say more of a machine than of the program.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from equikernel.engines.vectors import host
from equikernel.kernel import available_cores

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PACKAGES = ("jax", "llvmlite", "neural-tangents", "numpy")
"""Those that decide the speed."""

SAME = 0.04
"""Relative change that is no more than noise."""


def record(name: str, figures: Mapping[str, float], folder: Path = RESULTS) -> Path:
    """Append ratios and shares to what is known of the benchmark ``name``; returns the file."""
    path = folder / f"{name}.json"
    entry = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "figures": {what: float(f"{value:.4g}") for what, value in figures.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*_entries(path), entry], indent=2) + "\n", encoding="utf-8")
    return path


def latest(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The last entry of the benchmark ``name`` on such a machine as this one; ``None`` without one."""
    here = machine()
    return next((entry for entry in reversed(_entries(folder / f"{name}.json")) if entry["machine"] == here), None)


def compare(name: str, figures: Mapping[str, float], folder: Path = RESULTS) -> Iterator[str]:
    """How each figure has changed since the last entry on such a machine, a line each."""
    before = latest(name, folder)
    if before is None:
        yield f"nothing is recorded of {name} on {machine()}"
        return
    yield f"against {before['commit']} of {before['date']}, {before['machine']}:"
    for what, value in figures.items():
        then = before["figures"].get(what)
        yield f"  {what}: {value:.4g}, {_change(then, value)}"
    for what in before["figures"]:
        if what not in figures:
            yield f"  {what}: not measured, {before['figures'][what]:.4g} before"


def _change(then: float | None, now: float) -> str:
    if then is None:
        return "new"
    if abs(now - then) <= SAME * abs(then):
        return f"as before ({then:.4g})"
    share = f", {now / then - 1:+.0%}" if then else ""
    return f"{'more' if now > then else 'less'} than before ({then:.4g}{share})"


def _entries(path: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return entries


def commit() -> str:
    """The commit of this checkout, with "dirty" if files but the results are changed; "unknown" without git."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head} dirty" if changed else head


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(HERE.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def machine() -> str:
    """The kind of machine in words: ``"x86-64 with AVX-512, 2 cores"``."""
    kind = {"AMD64": "x86-64", "x86_64": "x86-64", "aarch64": "ARM64", "arm64": "ARM64"}.get(
        platform.machine(), platform.machine()
    )
    extension = vector_extension()
    cores = available_cores()
    return f"{kind}{f' with {extension}' if extension else ''}, {cores} {'core' if cores == 1 else 'cores'}"


def vector_extension() -> str:
    """The widest vector instructions of x86 that the engine uses here."""
    return {64: "AVX-512", 32: "AVX2"}.get(host().vector_bytes, "")
