"""Commands on a terminal: where they print, and how they end."""

from __future__ import annotations

import functools
import re
import signal
from collections.abc import Callable
from typing import ParamSpec

import typer
from rich.console import Console
from rich.text import Text

from equigram.errors import EquigramError

out = Console(markup=False, highlight=False, emoji=False)
err = Console(stderr=True, markup=False, highlight=False, emoji=False)

Parameters = ParamSpec("Parameters")


class _Terminated(BaseException):
    """SIGTERM, which batch systems and containers send before they kill."""


def _terminate(*_: object) -> None:
    raise _Terminated


def command(
    group: typer.Typer, panel: str | None = None
) -> Callable[[Callable[Parameters, None]], Callable[Parameters, None]]:
    """Registers a command; errors that are raised on purpose become one sentence and an exit code.

    Args:
      group: the commands it belongs to.
      panel: the title it is listed under in the help.
    """

    def register(function: Callable[Parameters, None]) -> Callable[Parameters, None]:
        command = _guarded(function)
        group.command(name=function.__name__.rstrip("_"), rich_help_panel=panel)(command)
        return command

    return register


def _guarded(function: Callable[Parameters, None]) -> Callable[Parameters, None]:
    @functools.wraps(function)
    def command(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            function(*args, **kwargs)
        except (KeyboardInterrupt, _Terminated) as stop:
            said, code = ("interrupted", 130) if isinstance(stop, KeyboardInterrupt) else ("terminated", 143)
            kept = "; finished tiles are kept, and the same command goes on from there"
            err.print(f"{said}{kept if function.__name__ == 'run' else ''}", soft_wrap=True)
            raise typer.Exit(code) from None
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "equigram", "equikernel"):
                raise
            name = function.__name__.rstrip("_")
            does, extra = ("serves", "service") if name == "serve" else ("computes", "workers")
            _fail(
                f"`equigram {name}` {does}, and needs packages that are not installed ({package}); install them with "
                f"pip install 'equigram[{extra}]'"
            )
            raise typer.Exit(2) from None
        except Exception as error:
            from equikernel.errors import EquikernelError

            if not isinstance(error, (EquigramError, EquikernelError)):
                raise
            _fail(str(error))
            raise typer.Exit(error.exit_code) from None
        finally:
            signal.signal(signal.SIGTERM, before)

    return command


def _fail(sentence: str) -> None:
    """Say why a command ends."""
    err.print(Text.assemble(("error: ", "bold red"), printable(sentence)), soft_wrap=True)


def printable(text: str) -> str:
    """Text of others without what would steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "�", re.sub(r"\x1b\[[0-9;]*[A-Za-z]|\r(?=\n)", "", text))
