"""The process of the service: settings, logs, and the server."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from equigram.api.app import make_app
from equigram.api.cluster import Cluster, LocalCluster
from equigram.api.job import Drivers, Limits
from equigram.api.records import HIDDEN, Records
from equigram.api.security import Readable, Tokens
from equigram.errors import ConflictError, ResourceError, SpecError

GRACE_SECONDS = 5
"""Time that requests have to be answered when the service is told to stop."""


@dataclass(frozen=True)
class Settings:
    """How a service runs.

    Attributes:
      root: URL of the folder of all run stores.
      host, port: where it listens.
      address: dashboard of a Ray cluster, ``http://host:8265``; ``None`` for a local one.
      cpus: of a local cluster; ``None`` for all.
      tokens: file of tokens; ``None`` for those in the environment, if any.
      readable: URLs that jobs may read.
      hostnames: by which it may be called; ``None`` for any, where tokens are needed.
      limits: what is allowed.
    """

    root: str
    host: str = "127.0.0.1"
    port: int = 8786
    address: str | None = None
    cpus: int | None = None
    tokens: Path | None = None
    readable: Sequence[str] = ()
    hostnames: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)


class JsonLines(logging.Formatter):
    """A line of JSON for each message: time, level, logger, text, and what else is known."""

    _KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in self._KNOWN and name[0] != "_"},
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


def log_to(stream: Any) -> None:
    """Have the service, and the server below it, log lines of JSON."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    for name, level in (("equigram", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


class _Server(uvicorn.Server):
    """Ends the connections that watch when it is told to stop: they would never end by themselves."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        channels = getattr(self.config.app.state, "channels", None)  # type: ignore[union-attr]
        if channels is not None:
            channels.close()
        super().handle_exit(sig, frame)


def serve(settings: Settings, started: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
      settings: how.
      started: told the URL as soon as it listens.

    Raises:
      SpecError: it listens beyond this machine without tokens.
      ResourceError: the port is taken.
      StoreError: the root cannot be written.
      ClusterError: no local cluster can be started.
    """
    tokens = Tokens.load(settings.tokens)
    alone = _is_loopback(settings.host)
    if not tokens and (settings.hostnames or not alone):  # a proxy in front lets others in, too
        opened = f"--hostname {settings.hostnames[0]}" if alone else f"--host {settings.host}"
        raise SpecError(
            f"{opened} lets other machines in, and no token is set: name a file of tokens (--tokens), or set "
            "EQUIGRAM_TOKENS; a line is `name scope token` with the scope read or write"
        )
    readable = Readable(settings.readable)
    records = Records(absolute_root(settings.root))
    drivers: Callable[[], Drivers]
    if settings.address is None:
        drivers = LocalCluster(records.root, settings.cpus)
    else:
        cluster = Cluster(settings.address.rstrip("/"), "python")
        drivers = lambda: cluster  # noqa: E731
    hosts = None if not alone and not settings.hostnames else list(settings.hostnames)
    app = make_app(records, drivers, tokens, readable, settings.limits, hosts)
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray's client would go there instead
        os.environ.pop(variable, None)
    log_to(sys.stderr)
    with _listen(settings.host, settings.port) as listening, _alone(records):
        records.uploads().sweep()
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        started(f"http://{shown}:{port}")
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=GRACE_SECONDS,
            proxy_headers=False,
        )
        _Server(config).run(sockets=[listening])


@contextlib.contextmanager
def _alone(records: Records) -> Iterator[None]:
    """While no other service of this machine serves the root, which must be writable; in object storage, at once."""
    records.check()
    folder = Path(records.root, HIDDEN)
    if "://" in records.root:
        yield
        return
    with (folder / "service.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError(
                f"another service serves {records.root}; end that one, or serve another folder"
            ) from None
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)
    except OSError as error:
        raise ResourceError(
            f"the service cannot listen at {host}:{port}: {error.strerror or error}; choose another --port or --host"
        ) from None
    return listening


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def absolute_root(root: str) -> str:
    """A root that drivers find, too, which run in other folders."""
    return root if "://" in root else str(Path(root).expanduser().absolute())
