"""How much memory this process may still take, with the limits that containers and batch systems set."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be allocated before the machine, or the control group of this process, runs out.

    The smallest of what the kernel calls available and what each control group (version 1 or 2) above this process
    leaves; file cache counts as free. Where none of this can be read, the free physical memory, or ``sys.maxsize``.

    Args:
      root: where ``proc`` and ``sys`` are mounted.
    """
    limits = [*_machine(root), *_control_groups(root)]
    return max(0, min(limits)) if limits else _free_physical()


def format_bytes(count: float) -> str:
    """``count`` bytes for people, in binary units: ``"1.5 GiB"``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _machine(root: Path) -> list[int]:
    available = _fields(root / "proc/meminfo").get("MemAvailable:")
    return [] if available is None else [available * 1024]


def _control_groups(root: Path) -> list[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, limit, usage, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = mount / path.strip("/")
        for folder in (group, *group.parents):
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None:
                left.append(most - used + _fields(folder / "memory.stat").get(cache, 0))
            if folder == mount:
                break
    return left


def _number(path: Path) -> int | None:
    """The integer in a file; none if there is no such file or it says ``max``."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _fields(path: Path) -> dict[str, int]:
    """The lines ``name value ...`` of a file; empty if there is no such file."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return {}
    words = [line.split() for line in lines]
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}


def _free_physical() -> int:
    for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        try:
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            continue
    return sys.maxsize
