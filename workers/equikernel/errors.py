"""The errors of :mod:`equikernel`: one root, leaves that are also the builtin a caller expects.

Every message states what is wrong, the offending value beside the allowed one, where, and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails


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


class NonFiniteKernelError(EquikernelError, ArithmeticError):
    """A kernel came out as NaN or infinity: the images or weights overflow the dtype."""

    exit_code = 1


def suggestion(value: object, allowed: Iterable[str]) -> str:
    """``"; did you mean 'relu'?"`` when ``value`` is close to one of ``allowed``, else an empty string."""
    close = difflib.get_close_matches(str(value), list(allowed), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def describe(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line per problem of a pydantic error: the field, the value it was given, and what is allowed.

    Args:
      error: what ``model`` raised.
      model: the class that was validated; unknown fields are compared with its field names.
      prefix: put before every field name, for example ``"network."``.
    """
    return "\n".join(_describe_one(detail, model, prefix) for detail in error.errors())


def _describe_one(detail: ErrorDetails, model: type[BaseModel], prefix: str) -> str:
    location = [part for part in detail["loc"] if not (isinstance(part, str) and "[" in part)]
    field = prefix + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    value: Any = detail.get("input")
    context = detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            allowed = _fields_at(model, location[:-1])
            hint = suggestion(location[-1], allowed)
            return f"{field}: no such field (given {value!r}){hint} Allowed here: {', '.join(allowed)}".replace(
                ") Allowed", "). Allowed"
            )
        case "missing":
            return f"{field}: this field is required"
        case "literal_error" | "enum":
            expected = str(context["expected"])
            hint = suggestion(value, [word.strip(" '") for word in expected.replace(" or ", ",").split(",")])
            return f"{field}: {value!r} is not allowed; choose {expected}{hint}"
        case "value_error":
            return f"{field}: {context['error']}" if field else str(context["error"])
        case _:
            message = detail["msg"].replace("Input should be", "must be")
            return f"{field}: {value!r} is not allowed; it {message}"


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Names of the fields of the model nested in ``model`` at ``location``."""
    from pydantic import BaseModel

    current: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        annotation = current.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        current = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(current.model_fields)
