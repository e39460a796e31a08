"""What benchmarks keep of what they found."""

from __future__ import annotations

import json
import platform
import re
import socket
from pathlib import Path

from history import commit, compare, latest, machine, record

FIGURES = {"kernels": 0.97, "times faster": 101.2345}


def test_what_is_recorded_is_the_latest(tmp_path: Path) -> None:
    assert latest("pairs", tmp_path) is None
    record("pairs", {"kernels": 0.5}, tmp_path)
    path = record("pairs", FIGURES, tmp_path)
    entries = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == "pairs.json"
    assert [entry["figures"] for entry in entries] == [{"kernels": 0.5}, {"kernels": 0.97, "times faster": 101.2}]
    assert latest("pairs", tmp_path) == entries[-1]
    assert latest("others", tmp_path) is None


def test_an_entry_says_when_and_with_what_and_names_no_host(tmp_path: Path) -> None:
    entry = json.loads(record("pairs", FIGURES, tmp_path).read_text(encoding="utf-8"))[0]
    assert list(entry) == ["date", "commit", "machine", "versions", "figures"]
    assert set(entry["versions"]) == {"jax", "llvmlite", "neural-tangents", "numpy"}
    assert entry["commit"] == commit()
    assert entry["machine"].endswith((" core", " cores"))
    values = [entry["date"], entry["commit"], entry["machine"], *entry["versions"].values()]
    for name in {socket.gethostname(), platform.node()}:
        assert not [value for value in values if re.search(rf"\b{re.escape(name)}\b", value)]


def test_the_last_entry_is_of_such_a_machine(tmp_path: Path) -> None:
    path = record("pairs", FIGURES, tmp_path)
    entries = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps([*entries, {**entries[0], "machine": "an abacus, 10 rows"}]), encoding="utf-8")
    assert latest("pairs", tmp_path) == entries[0]
    assert entries[0]["machine"] == machine()


def test_changes_are_told_a_line_each(tmp_path: Path) -> None:
    assert list(compare("pairs", FIGURES, tmp_path)) == [f"nothing is recorded of pairs on {machine()}"]
    record("pairs", {"kernels": 0.96, "times faster": 50.0, "slower": 4.0, "dropped": 1.5, "zero": 0.0}, tmp_path)
    head, *lines = compare("pairs", {**FIGURES, "slower": 3.0, "zero": 0.1, "added": 7.0}, tmp_path)
    assert head.startswith(f"against {commit()} of 20")
    assert lines == [
        "  kernels: 0.97, as before (0.96)",
        "  times faster: 101.2, more than before (50, +102%)",
        "  slower: 3, less than before (4, -25%)",
        "  zero: 0.1, more than before (0)",
        "  added: 7, new",
        "  dropped: not measured, 1.5 before",
    ]
