"""The device that JAX computes on."""

from __future__ import annotations

import os
import sys

import jax

from equikernel.errors import EngineError


def require_device(engine: str) -> None:
    """Raise :class:`EngineError` unless JAX has the device that it was told to use, if it was told."""
    try:
        jax.devices()
    except Exception as error:
        asked = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EngineError(
            f"the engine {engine!r} has no device: JAX is to compute on {asked!r} (JAX_PLATFORMS) and cannot "
            f"({reason}); unset it to use what there is, install JAX for that device, or use engine='cpu'"
        ) from None


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
