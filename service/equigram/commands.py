"""Commands that talk to a service. Nothing is computed here, and none of what computes needs to be installed."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from equigram.errors import SpecError
from equigram.terminal import command, err, out, printable

if TYPE_CHECKING:
    from equigram.api.models import JobSummary
    from equigram.client import Client, Job

app = typer.Typer()
PANEL = "Service"

ServerOption = Annotated[
    str | None,
    typer.Option(metavar="URL", help="The service; by default EQUIGRAM_SERVER, or `server` in the configuration file."),
]
TokenOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File with the token; by default EQUIGRAM_TOKEN, or `token` in ~/.config/equigram/config.yaml. A token is "
        "no option itself, as others would see it in the list of processes.",
    ),
]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The job, as `equigram jobs` lists it.")]
GroupOption = Annotated[
    list[str] | None, typer.Option("--group", metavar="GROUP", help="C1, C4, …; again for more; by default all.")
]
KernelOption = Annotated[
    list[str] | None, typer.Option("--kernel", metavar="KERNEL", help="nngp or ntk; by default all.")
]
WaitOption = Annotated[
    bool, typer.Option("--wait", help="Watch it until it ends, and end with its exit code; Ctrl-C only stops watching.")
]


@command(app, PANEL)
def submit(
    job: Annotated[
        Path, typer.Argument(metavar="JOB.yaml", help="The job file; `store` may be absent.", show_default=False)
    ],
    wait: WaitOption = False,
    priority: Annotated[
        int, typer.Option(min=-100, max=100, metavar="NUMBER", help="Higher ones start first, and get more workers.")
    ] = 0,
    key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="For jobs without `store`: the same key is the same job."),
    ] = None,
    no_upload: Annotated[
        bool, typer.Option("--no-upload", help="Take all paths for those of the service, and send no files.")
    ] = False,
    server: ServerOption = None,
    token_file: TokenOption = None,
) -> None:
    """Hand a job to a service, and print its id.

    `store` is its name there. Images and labels that are files or folders here are sent to the service; URLs, and paths
    that are not here, are read by the service. A job that the service has already goes on where it stopped.
    """
    from equigram.screen import Screen

    with _client(server, token_file) as client:
        with Screen(err) as screen:
            submitted = client.submit(job, priority, key, upload=not no_upload, listener=screen)
        out.print(submitted.id, soft_wrap=True)
        if wait:
            _watch(submitted)
        else:
            err.print(f"{submitted.id} is {submitted.state}; next: equigram watch {submitted.id}", soft_wrap=True)


@command(app, PANEL)
def jobs(
    states: Annotated[
        list[str] | None, typer.Option("--state", metavar="STATE", help="queued, running, …; again for more.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a list with all that is known.")] = False,
    server: ServerOption = None,
    token_file: TokenOption = None,
) -> None:
    """List the jobs of a service, newest first."""
    with _client(server, token_file) as client:
        found = [job.summary for job in client.jobs(*states or ())]
    if as_json:
        sys.stdout.write(json.dumps([one.model_dump(mode="json") for one in found], indent=2) + "\n")
    elif found:
        out.print(_table(found))
    else:
        err.print("no jobs" + (f" that are {' or '.join(states)}" if states else ""), soft_wrap=True)


@command(app, PANEL)
def watch(id: IdArgument, server: ServerOption = None, token_file: TokenOption = None) -> None:  # noqa: A002
    """Show what a job does until it ends; Ctrl-C only stops watching.

    Exit codes: 0 it is done, 1 it failed, 3 it is cancelled or incomplete.
    """
    with _client(server, token_file) as client:
        _watch(client.job(id))


@command(app, PANEL)
def logs(
    id: IdArgument,  # noqa: A002
    lines: Annotated[int, typer.Option(min=1, metavar="NUMBER", help="The last ones.")] = 200,
    server: ServerOption = None,
    token_file: TokenOption = None,
) -> None:
    """Print what the driver of a job printed."""
    with _client(server, token_file) as client:
        text = client.job(id).log(lines)
    out.print(printable(text), end="", soft_wrap=True)


@command(app, PANEL)
def cancel(id: IdArgument, server: ServerOption = None, token_file: TokenOption = None) -> None:  # noqa: A002
    """End a job; what is finished is kept, and `equigram resume` goes on from there."""
    with _client(server, token_file) as client:
        job = client.job(id).cancel()
    err.print(f"{job.id} is {job.state}", soft_wrap=True)


@command(app, PANEL)
def resume(
    id: IdArgument,  # noqa: A002
    wait: WaitOption = False,
    server: ServerOption = None,
    token_file: TokenOption = None,
) -> None:
    """Go on with a job that failed, was cancelled or is incomplete."""
    with _client(server, token_file) as client:
        job = client.job(id).resume()
        if wait:
            _watch(job)
        else:
            err.print(f"{job.id} is {job.state}", soft_wrap=True)


@command(app, PANEL)
def delete(
    id: IdArgument,  # noqa: A002
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    server: ServerOption = None,
    token_file: TokenOption = None,
) -> None:
    """Delete a job with its matrices, results and figures."""
    with _client(server, token_file) as client:
        job = client.job(id)
        if not yes:
            if not sys.stdin.isatty():
                raise SpecError(f"deleting {job.id} cannot be undone, and nobody is here to be asked; add --yes")
            if not typer.confirm(f"delete {job.id} ({job.state}) with everything it computed?", err=True):
                err.print(f"{job.id} is kept", soft_wrap=True)
                return
        job.delete()
    err.print(f"{job.id} is deleted", soft_wrap=True)


@command(app, PANEL)
def fetch(
    id: IdArgument,  # noqa: A002
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="By default named as the job.")
    ] = None,
    gram: Annotated[bool, typer.Option("--gram", help="The Gram matrices, too, as .npy files.")] = False,
    groups: GroupOption = None,
    kernels: KernelOption = None,
    server: ServerOption = None,
    token_file: TokenOption = None,
) -> None:
    """Write results, predictions and figures of a job into a folder, and print the path of each.

    `result.json`, `predictions-<group>-<kernel>.csv`, figures as PNG and SVG; with `--gram` also
    `gram-<group>-<kernel>.npy` and `cross-<group>-<kernel>.npy`. All of them or none.
    """
    from equigram.screen import Screen

    with _client(server, token_file) as client, Screen(err) as screen:
        job = client.job(id)
        paths = job.save(output or Path(Path(job.id).name), groups, kernels, gram=gram, listener=screen)
    for path in paths:
        out.print(str(path), soft_wrap=True)


class _Notes(logging.Handler):
    """Shows what a person should know."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(Text(f"note: {printable(record.getMessage())}", style="yellow"), soft_wrap=True)


@contextlib.contextmanager
def _client(server: str | None, token_file: Path | None) -> Iterator[Client]:
    """The way to the service, while a command needs it."""
    from equigram.client import Client

    token = None
    if token_file is not None:
        try:
            token = token_file.read_text(encoding="ascii", errors="replace")
        except OSError as error:
            raise SpecError(f"--token-file {token_file} cannot be read: {error.strerror}") from None
    notes, log = _Notes(), logging.getLogger("equigram")
    log.addHandler(notes)
    try:
        with Client(server, token) as client:
            yield client
    finally:
        log.removeHandler(notes)


def _watch(job: Job) -> None:
    """Show what a job does until it ends, and how it ended."""
    from equigram.screen import Screen

    try:
        with Screen(err) as screen:
            detail = job.wait(listener=screen)
    except KeyboardInterrupt:
        err.print(f"no longer watching; {job.id} goes on: equigram watch {job.id}", soft_wrap=True)
        raise typer.Exit(130) from None
    headline = f": {detail.headline}" if detail.headline else ""
    err.print(f"{detail.id} is done{headline}; next: equigram fetch {detail.id}", soft_wrap=True)


def _table(found: list[JobSummary]) -> Table:
    """A line per job."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("id", "state", "tiles", "images", "submitted", "result"):
        table.add_column(title, overflow="fold", justify="right" if title in ("tiles", "images") else "left")
    for one in found:
        images = [f"{count:,}" for count in (one.train, one.test) if count is not None]
        table.add_row(
            printable(one.id),
            one.state,
            f"{one.counts.finished / max(one.counts.tiles, 1):.0%}" if one.counts else "-",
            " + ".join(images) or "-",
            (one.submitted or "-")[:16].replace("T", " "),
            printable(one.headline or (one.error.message if one.error else "")),
        )
    return table
