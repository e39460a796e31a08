"""File systems that hold images, stores and records: their options, and requests to them."""

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


def ask(fs: Any, operation: str, *arguments: Any, seconds: float, **options: Any) -> Any:
    """An operation of a file system, which may take so many seconds at most where that is remote."""
    import fsspec

    if not fs.async_impl:
        return getattr(fs, operation)(*arguments, **options)
    return fsspec.asyn.sync(fs.loop, getattr(fs, f"_{operation}"), *arguments, timeout=seconds, **options)


def children(fs: Any, path: str, *, seconds: float) -> list[str]:
    """Names of the files and folders directly in a folder; none where there is no folder."""
    fs.invalidate_cache()
    try:
        found = [str(name).rstrip("/") for name in ask(fs, "ls", path, seconds=seconds, detail=False)]
    except FileNotFoundError:  # in object storage a folder is gone with the last object in it
        return []
    return [name.rsplit("/", 1)[-1] for name in found if name != path]


def reason(error: Exception, *, seconds: float) -> str:
    """Why an operation failed, in words."""
    if isinstance(error, TimeoutError):
        return f"no answer within {seconds:g} s"
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {' '.join(str(error).split())}"
