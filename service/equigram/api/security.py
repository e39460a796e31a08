"""Who may do what: tokens and their scopes, and the URLs that jobs may read."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import unquote, urlsplit

from equigram.errors import ForbiddenUrlError, SpecError

Scope: TypeAlias = Literal["read", "write"]

TOKENS_VARIABLE = "EQUIGRAM_TOKENS"
"""The environment variable with the tokens, where no file is named."""

SHORTEST_TOKEN = 16
"""Characters that a token needs: what is shorter can be guessed."""

_METADATA = re.compile(r"169\.254\.|\[?fe80:|\[?fd00:ec2:|metadata(\.google\.internal)?(:|/|$)", re.IGNORECASE)
"""Addresses at which clouds tell a machine its credentials."""


@dataclass(frozen=True)
class User:
    """Whoever a token belongs to."""

    name: str
    scope: Scope


LOCAL = User("local", "write")
"""Everybody on this machine, where no tokens are set."""


class Tokens:
    """The tokens of a service, of which only digests are kept.

    Args:
      text: a line ``name scope token`` for each, with the scope ``read`` or ``write``; ``#`` begins a comment.
      source: what the text is called in errors.

    Raises:
      SpecError: a line is not of that form, a name or token is given twice, or a token is too short.
    """

    def __init__(self, text: str, source: str) -> None:
        self._users: list[tuple[bytes, User]] = []
        for number, line in enumerate(text.splitlines(), 1):
            fields = line.split("#")[0].split()
            if not fields:
                continue
            where = f"{source}, line {number}"
            if len(fields) != 3 or fields[1] not in ("read", "write"):
                raise SpecError(f"{where}: write `name scope token`, with the scope read or write")
            name, scope, token = fields
            if not re.fullmatch(r"[\w.@-]{1,64}", name):
                raise SpecError(f"{where}: {name!r} is no name; write up to 64 letters, digits and . _ @ -")
            if len(token) < SHORTEST_TOKEN:
                raise SpecError(
                    f"{where}: the token of {name} has {len(token)} characters, and {SHORTEST_TOKEN} are needed; make "
                    "one with `openssl rand -hex 32`"
                )
            digest = _digest(token)
            if any(digest == other or user.name == name for other, user in self._users):
                raise SpecError(f"{where}: the name or the token of {name} is given twice; keep one")
            self._users.append((digest, User(name, "read" if scope == "read" else "write")))

    def __bool__(self) -> bool:
        return bool(self._users)

    def user(self, token: str) -> User | None:
        """Whose a token is. Takes the same time whatever is wrong with it."""
        digest, found = _digest(token), None
        for other, user in self._users:
            if hmac.compare_digest(digest, other):
                found = user
        return found

    @classmethod
    def load(cls, file: Path | None) -> Tokens:
        """The tokens in a file, else in the environment variable :data:`TOKENS_VARIABLE`; perhaps none."""
        if file is None:
            return cls(os.environ.get(TOKENS_VARIABLE, "").replace(",", "\n"), TOKENS_VARIABLE)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(
                f"the tokens in {file} cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from None
        tokens = cls(text, str(file))
        if not tokens:
            raise SpecError(f"{file} holds no token; write a line `name scope token` for each")
        return tokens


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()


class Readable:
    """The URLs that jobs may read: those below some places.

    Args:
      places: folders or URLs, such as ``/data`` and ``s3://images/histology``.

    Raises:
      SpecError: a place is not absolute, or one at which clouds keep credentials.
    """

    def __init__(self, places: Iterable[str]) -> None:
        self.places = tuple(places)
        self._allowed = [_parts(place) for place in self.places]
        for place, parts in zip(self.places, self._allowed, strict=True):
            if parts is None:
                raise SpecError(f"--read {place}: write an absolute path, or a URL without `..` or `::`")
            if _METADATA.match(parts[1]):
                raise SpecError(f"--read {place}: jobs must not read there: clouds keep credentials at such addresses")

    def check(self, url: str, field: str) -> None:
        """Raise :class:`ForbiddenUrlError` unless a job may read ``url``, the value of ``field``."""
        scheme, chained, rest = url.partition("::")
        inside = re.fullmatch(r"zip://[^:]*", scheme) if chained else None
        target = rest if inside else url
        parts = None if (chained and not inside) or ".." in scheme else _parts(target)
        if parts is not None and any(_below(parts, place) for place in self._allowed if place is not None):
            return
        allowed = (
            f"this service lets jobs read {', '.join(self.places)}" if self.places else "this service reads no URLs"
        )
        raise ForbiddenUrlError(
            f"{field} = {url.partition('?')[0]!r}: {allowed}, and what is uploaded; upload it (equigram submit does), "
            "or ask its operator for more (equigram serve --read)"
        )


_Parts: TypeAlias = tuple[str, str, tuple[str, ...]]
"""Scheme, host or bucket, and path."""


def _parts(url: str) -> _Parts | None:
    """A URL in parts that can be compared; ``None`` for one that could be read in more than one way."""
    if "::" in url or any(ord(character) < 32 for character in url):
        return None
    scheme, has_scheme, rest = url.partition("://")
    if not has_scheme or scheme in ("file", "local"):
        path = Path(rest if has_scheme else url)
        # Links are followed as they are now; who may make links in a readable folder may show what is behind them.
        return ("file", "", path.resolve().parts) if path.is_absolute() and ".." not in path.parts else None
    try:
        split = urlsplit(url)
        host = split.netloc
    except ValueError:
        return None
    segments = tuple(segment for segment in split.path.split("/") if segment)
    # A query may be a signature, which would be kept with the job and shown to everybody who may read.
    odd = "@" in host or "\\" in url or "%" in host or bool(split.query or split.fragment)
    odd = odd or any(one in (".", "..") or "/" in one for one in map(unquote, segments))
    return None if odd else (scheme.lower().replace("s3a", "s3"), host.lower(), segments)


def _below(parts: _Parts, place: _Parts) -> bool:
    """Whether a URL is a place, or below it."""
    return parts[:2] == place[:2] and parts[2][: len(place[2])] == place[2]
