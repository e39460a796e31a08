"""Which service, and with which token."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from equigram.errors import SpecError
from equigram.yamlfile import read_yaml
from equikernel.errors import suggestion

LOCAL = "http://127.0.0.1:8786"
"""Where a service listens unless told otherwise."""

_FIELDS = ("server", "token")
_LOG = logging.getLogger("equigram")


@dataclass(frozen=True)
class Settings:
    """A service, and who asks.

    Attributes:
      url: of the service, without a slash at its end.
      token: what the service knows a person by; it is in no text that is made of these settings.
      origin: where the token comes from, in words; empty without one.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    origin: str = ""

    @classmethod
    def find(cls, url: str | None = None, token: str | None = None) -> Settings:
        """Those given, else EQUIGRAM_SERVER and EQUIGRAM_TOKEN, else the configuration file, else this machine.

        The file is what EQUIGRAM_CONFIG names, or equigram/config.yaml in XDG_CONFIG_HOME or ``~/.config``, with
        ``server`` and ``token``; its token goes to its server only. A token that others may read, in that file or on
        the way over plain HTTP to another machine, is used with a warning: behind a tunnel or in a private network
        that may be meant.

        Raises:
          SpecError: the file is wrong, the URL names no service, or the token cannot be one.
        """
        stored = _stored()
        url = _service_url(url or os.environ.get("EQUIGRAM_SERVER") or stored.get("server") or LOCAL)
        origin = "the one that the program gave"
        if token is None and (token := os.environ.get("EQUIGRAM_TOKEN") or None):
            origin = "that of EQUIGRAM_TOKEN"
        if token is None and "token" in stored and _service_url(stored.get("server") or url) == url:
            token, origin = stored["token"], f"that of {config_path()}"
            _warn_of_readers(config_path())
        if token is None:
            return cls(url)
        token = token.strip()
        if not re.fullmatch(r"[!-~]+", token):
            raise SpecError(f"the token, {origin}, is empty or has spaces or letters beyond ASCII; copy it again")
        if url.startswith("http://") and not is_loopback(url):
            _LOG.warning("the token goes to %s unencrypted, where others may read it; prefer https://", url)
        return cls(url, token, origin)


def config_path() -> Path:
    """The configuration file, whether it is there or not."""
    named = os.environ.get("EQUIGRAM_CONFIG")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path("~/.config").expanduser()) / "equigram" / "config.yaml"


def is_loopback(url: str) -> bool:
    """Whether a URL names this machine, by an address that never leaves it."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _stored() -> dict[str, str]:
    """What the configuration file says. Its values are in no error: one of them is secret."""
    path = config_path()
    if not path.exists() and "EQUIGRAM_CONFIG" not in os.environ:
        return {}
    try:
        fields: Any = read_yaml(path)
    except SpecError as error:
        where, problem, _ = str(error).partition(" as YAML: ")
        remedy = ' as YAML; it has lines `server: URL` and `token: "…"`' if problem else ""
        raise SpecError(where + remedy) from None
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise SpecError(f'{path}: this is no section; write lines `server: URL` and `token: "…"`')
    for name, value in fields.items():
        if name not in _FIELDS:
            raise SpecError(f"{path}: there is no {name!r}; fields are server and token{suggestion(name, _FIELDS)}")
        if not isinstance(value, str):
            raise SpecError(f"{path}: {name} is no text; write it in quotes")
    return fields


def _service_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise SpecError("the URL of the service cannot be read; write https://host or http://host:port") from None
    if parts.username is not None or parts.password is not None:
        raise SpecError(f"the URL of the service at {host} has a name or password in it; use a token instead")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise SpecError(f"{url!r} is no URL of a service; write https://host or http://host:port")
    return url.rstrip("/")


def _warn_of_readers(path: Path) -> None:
    if os.name == "posix" and path.stat().st_mode & 0o077:
        _LOG.warning("%s holds a token, and others may read it; `chmod 600 %s` keeps them out", path, path)
