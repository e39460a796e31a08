"""The device that JAX computes on."""

from __future__ import annotations

import sys

import jax


def platform() -> str:
    """``"cpu"`` or ``"gpu"``."""
    return "cpu" if jax.default_backend() == "cpu" else "gpu"


def device_memory() -> int:
    """Half of the bytes that JAX may use of the memory of the device itself; unlimited where that is the machine's."""
    stats = jax.local_devices()[0].memory_stats()
    return int(stats["bytes_limit"]) // 2 if stats and "bytes_limit" in stats else sys.maxsize


def device_kind() -> str:
    """The kind of GPU; empty on CPUs."""
    return "" if platform() == "cpu" else str(jax.local_devices()[0].device_kind)


def power_of_two(limit: int) -> int:
    """The largest power of two up to ``limit``: of such lengths, few are compiled."""
    return 1 << (limit.bit_length() - 1)
