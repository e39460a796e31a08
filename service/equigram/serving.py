"""The command that serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from equigram.terminal import command, err, out

app = typer.Typer()


@command(app, "Service")
def serve(
    root: Annotated[
        str, typer.Argument(metavar="ROOT", help="Folder or URL of all run stores of the service; made if need be.")
    ],
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; beyond this machine only with tokens.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="PORT", help="Where to listen; 0 is any.")] = 8786,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Dashboard of a Ray cluster, http://HOST:8265; else one of this machine."),
    ] = None,
    cpus: Annotated[
        int | None, typer.Option(min=1, metavar="NUMBER", help="CPUs of the cluster of this machine; by default all.")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Lines `name scope token`, scope read or write; or EQUIGRAM_TOKENS."),
    ] = None,
    read: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Folder or URL below which jobs may read; again for more.")
    ] = None,
    hostname: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="By which it may be called; again for more.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, metavar="NUMBER", help="Jobs that run at the same time.")] = 2,
    max_images: Annotated[int, typer.Option(min=1, metavar="NUMBER", help="Images of a job.")] = 200_000,
    max_pixels: Annotated[int, typer.Option(min=1, metavar="NUMBER", help="Pixels of an image.")] = 65_536,
    max_jobs: Annotated[int, typer.Option(min=1, metavar="NUMBER", help="Jobs of a token that have not ended.")] = 100,
    max_upload: Annotated[float, typer.Option(min=0.001, metavar="GIB", help="Size of an upload.")] = 2.0,
    stop: Annotated[bool, typer.Option("--stop", help="Serve nothing; end the cluster of this machine.")] = False,
) -> None:
    """Serve jobs over HTTP, with a page to watch them: submit, watch, cancel, resume, fetch.

    Each job runs as a driver of its own, a Ray job, on a cluster that outlives the service: started again, it finds
    everything in ROOT and Ray, and goes on watching. The cluster of this machine listens on loopback only, with a token
    of its own, and stays until `equigram serve ROOT --stop`.
    """
    from equigram.api.cluster import LocalCluster
    from equigram.api.job import Limits
    from equigram.api.server import Settings, absolute_root
    from equigram.api.server import serve as serve_jobs

    if stop:
        LocalCluster(absolute_root(root)).stop()
        err.print(
            "the cluster of this machine is stopped; jobs that ran go on when the service is back", soft_wrap=True
        )
        return
    limits = Limits(
        concurrency=concurrency,
        images=max_images,
        pixels=max_pixels,
        jobs=max_jobs,
        upload_bytes=int(max_upload * 2**30),
    )
    settings = Settings(root, host, port, address, cpus, tokens, tuple(read or ()), tuple(hostname or ()), limits)
    serve_jobs(settings, lambda url: out.print(f"equigram serves {root} at {url}", soft_wrap=True))
