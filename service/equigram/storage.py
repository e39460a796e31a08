"""Options of the file systems that hold images and stores, for all of a process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def configure(options: Mapping[str, Mapping[str, Any]] | None) -> None:
    """Open URLs with these options, by protocol, from now on: ``{"s3": {"endpoint_url": ..., "anon": True}}``.

    They go before those of fsspec's own configuration, its files and the variables ``FSSPEC_S3_ENDPOINT_URL`` and the
    like, which hold without a job.
    """
    if options:
        from fsspec.config import conf

        for protocol, values in options.items():
            conf[protocol] = {**conf.get(protocol, {}), **values}
