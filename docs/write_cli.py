"""Writes docs/cli.md from the commands, so that it says what they do.

.venv/bin/python docs/write_cli.py
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from equigram.cli import app

HERE = Path(__file__).parent


def render() -> str:
    """The whole page."""
    program: Any = typer.main.get_command(app)
    parts = [
        "<!-- Written by docs/write_cli.py from the commands; change those. -->",
        "# The command line",
        _help(program),
        *(_section(names, command) for names, command in _commands(program, ("equigram",))),
    ]
    return "\n\n".join(parts) + "\n"


def _commands(group: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if not command.hidden:
            yield (*names, name), command
            if hasattr(command, "commands"):
                yield from _commands(command, (*names, name))


def _section(names: tuple[str, ...], command: Any) -> str:
    shown = [one for one in command.params if one.name != "help" and not getattr(one, "hidden", False)]
    arguments = [one for one in shown if one.param_type_name == "argument"]
    options = [one for one in shown if one.param_type_name == "option"]
    words = [*names, *(["COMMAND"] if hasattr(command, "commands") else []), *map(_metavar, arguments)]
    words += ["[OPTIONS]"] if options else []
    parts = [f"{'#' * len(names)} `{' '.join(names)}`", f"```text\n{' '.join(words)}\n```", _help(command)]
    if shown:
        rows = [_row(f"`{_metavar(one)}`", one, "required" if one.required else "") for one in arguments]
        rows += [_row(_switch(one), one, _default(one)) for one in options]
        head = ["| argument or option | meaning | default |", "| --- | --- | --- |"]
        parts.append("\n".join([*head, *rows]))
    return "\n\n".join(parts)


def _help(command: Any) -> str:
    return inspect.cleandoc(command.help or "").replace("``", "`")


def _metavar(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _switch(option: Any) -> str:
    value = "" if option.is_flag else f" {option.metavar or option.type.name.upper()}"
    return ", ".join(f"`{one}{value}`" for one in sorted(option.opts, key=len, reverse=True))


def _row(name: str, parameter: Any, default: str) -> str:
    return f"| {name} | {' '.join((parameter.help or '').split())} | {default} |".replace("|  |", "| |")


def _default(option: Any) -> str:
    if option.required:
        return "required"
    return "" if option.is_flag or option.default is None else f"`{option.default}`"


if __name__ == "__main__":
    (HERE / "cli.md").write_text(render(), encoding="utf-8")
