"""The errors of :mod:`equikernel`: one root, leaves that are also the builtin a caller expects.

Every message states what is wrong, the offending value beside the allowed one, where, and the remedy.
"""

from __future__ import annotations

import difflib
import numbers
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable


class EquikernelError(Exception):
    """Root of the errors raised on purpose by this package."""

    exit_code = 2
    """Exit status of a command that ends with this error: 2 a wrong request, 1 a failed run."""


class NetworkError(EquikernelError, ValueError):
    """The network is not one this package can compute, or does not fit the images."""


class ImageError(EquikernelError, ValueError):
    """The images are not usable: wrong shape, dtype or values."""


class EngineError(EquikernelError, ValueError):
    """The engine or dtype asked for does not exist."""


class MemoryLimitError(EquikernelError, MemoryError):
    """The computation does not fit in memory, however it is cut."""


class NonFiniteKernelError(EquikernelError, ArithmeticError):
    """A kernel came out as NaN or infinity: the images or weights overflow the dtype."""

    exit_code = 1


def suggestion(value: object, allowed: Iterable[str]) -> str:
    """``"; did you mean 'relu'?"`` when ``value`` is close to one of ``allowed`` in any case, else an empty string."""
    names = {name.lower(): name for name in allowed}
    close = difflib.get_close_matches(str(value).lower(), names, n=1)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def either(options: Iterable[object]) -> str:
    """``"a, b or c"``."""
    *first, last = map(str, options)
    return f"{', '.join(first)} or {last}" if first else last


def is_whole(value: Any) -> bool:
    """Whether ``value`` is a whole number, of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
