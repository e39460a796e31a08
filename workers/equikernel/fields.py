"""The fields of validated models in words: what each may be, and what is wrong with the values given."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from equikernel.errors import either, suggestion

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 2


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for each field that a pydantic error names: the field, the value it was given, and what is allowed.

    Args:
      error: what ``model`` raised.
      model: the class that was validated.
    """
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        field, problem = _describe_one(detail, model)
        lines.setdefault(field, f"{field}: {problem}" if field else problem)  # a union has a problem per member
    return "\n".join(lines.values())


def allowed(model: type[BaseModel], field: str) -> str:
    """What a field may be, in words: ``"'auto' or a whole number from 1 to 65536"``.

    A text among the annotations of a type says it instead: ``Annotated[str, "a path or URL"]``.
    """
    return _words(_annotation(model.model_fields[field]))


def _describe_one(detail: ErrorDetails, model: type[BaseModel]) -> tuple[str, str]:
    """The name of the field as a user writes it, and what is wrong with it."""
    field, annotation = _find(model, detail["loc"])
    value: Any = detail["input"]
    match detail["type"]:
        case "extra_forbidden":
            unknown = str(detail["loc"][-1])
            names = _fields(annotation)
            elsewhere = _elsewhere(model, unknown)
            hint = elsewhere if unknown in model.model_fields else suggestion(unknown, names) or elsewhere
            return f"{field}.{unknown}".lstrip("."), f"no such field{hint or '.'} Allowed here: {', '.join(names)}"
        case "invalid_key":
            return field, f"{_short(value)} is not the name of a field. Allowed here: {', '.join(_fields(annotation))}"
        case "missing":
            return field, f"this field is required; give {_words(annotation)}"
        case "value_error":
            return field, str(detail["ctx"]["error"])
        case "layer":
            return field, f"{_short(value)} is not allowed; {detail['msg']}"
        case _:
            given = "nothing (null)" if value is None else _short(value)
            verb = "choose" if _choices(annotation) else "it must be"
            return field, f"{given} is not allowed; {verb} {_words(annotation)}{_hint(value, annotation)}"


def _find(model: type[BaseModel], location: Sequence[int | str]) -> tuple[str, Any]:
    """The field at ``location`` as a user writes it, ``gram.groups[1]``, and its type.

    Stops at parts of the location that are neither fields nor places in a list: members of a union, unknown fields.
    """
    name, here = "", model
    for part in location:
        members = [member for member, _ in _members(here)]
        section = next((member for member in members if _is_section(member)), None)
        item = next((get_args(member)[0] for member in members if get_origin(member) is tuple), None)
        one_of_several = [member for member in members if _is_section(member) and _tag(member) == part]
        if len(members) > 1 and one_of_several:
            here = one_of_several[0]
        elif section is not None and part in section.model_fields:
            name, here = f"{name}.{part}", _annotation(section.model_fields[part])
        elif item is not None and isinstance(part, int):
            name, here = f"{name}[{part}]", item
        else:
            break
    return name.lstrip("."), here


def _annotation(field: FieldInfo) -> Any:
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _members(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The members of a union, or the one type there is, each with the constraints that hold for it."""
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        flat = [one for part in extra for one in (part.metadata if isinstance(part, FieldInfo) else [part])]
        yield from _members(inner, (*metadata, *flat))
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member, metadata)
    else:
        yield annotation, metadata


def _words(annotation: Any) -> str:
    """What a type allows: ``"'a' or 'b', or null"``."""
    words: list[str] = []
    for member, metadata in _members(annotation):
        words += map(repr, get_args(member)) if get_origin(member) is Literal else [_word(member, metadata)]
    choice = either(word for word in words if word != "null")
    if "null" not in words:
        return choice
    return f"null, or {choice}" if choice.startswith("a section") else f"{choice}, or null"


def _word(member: Any, metadata: tuple[Any, ...]) -> str:
    """What a type that is no union and no literal allows."""
    said = [one for one in metadata if isinstance(one, str)]
    if member is NoneType:
        return "null"
    if said:
        return said[-1]
    if _is_section(member):
        return f"a section with the fields {', '.join(member.model_fields)}"
    if get_origin(member) is tuple:
        items = _words(get_args(member)[0])
        return f"a list of {items.replace('a whole number', 'whole numbers').replace('a number', 'numbers')}"
    if member in (int, float):
        return ("a whole number" if member is int else "a number") + _range(metadata)
    return {str: "text", bool: "true or false"}.get(member, str(member))


def _range(metadata: tuple[Any, ...]) -> str:
    """``" from 1 to 4096"``, ``" of 0 or more"``, ``" above 0 and below 1"``."""
    bounds = {name: getattr(one, name) for one in metadata for name in ("ge", "gt", "le", "lt") if hasattr(one, name)}
    numbers = {name: int(bound) if bound == int(bound) else bound for name, bound in bounds.items()}
    if numbers.keys() == {"ge", "le"}:
        return f" from {numbers['ge']} to {numbers['le']}"
    forms = {"ge": " of {} or more", "gt": " above {}", "le": " up to {}", "lt": " below {}"}
    return " and".join(form.format(numbers[name]) for name, form in forms.items() if name in numbers)


def _hint(value: Any, annotation: Any) -> str:
    """A guess at what was meant."""
    if type(value) in (int, float) and str in (member for member, _ in _members(annotation)):
        return "; a number that is meant as text needs quotes"
    return suggestion(value, _choices(annotation)) if isinstance(value, str) else ""


def _choices(annotation: Any) -> list[str]:
    return [one for member, _ in _members(annotation) if get_origin(member) is Literal for one in get_args(member)]


def _elsewhere(model: type[BaseModel], field: str) -> str:
    """A hint to a field of that name, or nearly, in another section."""
    if field in model.model_fields:
        return "; it belongs to the top level."
    sections = [(section, _fields(info.annotation)) for section, info in model.model_fields.items()]
    places = {name: f"{section}.{name}" for section, names in reversed(sections) for name in names}
    close = difflib.get_close_matches(field, places, n=1, cutoff=0.8)
    return f"; did you mean {places[close[0]]}?" if close else ""


def _fields(annotation: Any) -> list[str]:
    """Names of the fields of a section."""
    return [name for member, _ in _members(annotation) if _is_section(member) for name in member.model_fields]


def _tag(section: type[BaseModel]) -> Any:
    """What the field ``kind`` of a section says that is one of several."""
    return section.model_fields["kind"].default if "kind" in section.model_fields else None


def _is_section(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, BaseModel)


def _short(value: Any) -> str:
    return _SHORT.repr(value)
