"""YAML files as plain data. Where PyYAML would guess, they are read as a person means them, or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from equigram.errors import SpecError


class _Loader(yaml.SafeLoader):
    """Takes ``1e-6`` for a number and ``2024-01-31`` for text, and refuses a key that is given twice."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} is given twice, first in line {first[key.value]}; keep one",
                    problem_mark=key.start_mark,
                )
            first[key.value] = key.start_mark.line + 1
        return node


_Loader.yaml_implicit_resolvers = {
    character: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str | Path) -> Any:
    """The plain data in a YAML file; ``None`` if it is empty.

    Raises:
      SpecError: the file cannot be read, is not YAML, or gives a key twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = ", ".join(filter(None, (error.context, error.problem)))
    except (yaml.YAMLError, ValueError) as error:
        where, problem = "", str(error).splitlines()[0]
    except RecursionError:
        where, problem = "", "it is nested too deep"
    raise SpecError(f"{path}{where}: cannot be read as YAML: {problem}")
