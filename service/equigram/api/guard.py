"""What every request passes (size, host, origin, token), and every answer gets (headers, a count, a line of log)."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

from equigram.api.models import ErrorAnswer, ErrorDetail
from equigram.api.security import LOCAL, Tokens, User
from equigram.errors import AuthenticationError, EquigramError, LimitError, SpecError

if TYPE_CHECKING:
    from equigram.api.metrics import ServiceMetrics

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

PUBLIC = ("/", "/healthz", "/readyz")
"""What needs no token: the page asks for one."""

PUBLIC_FOLDER = "/page/"
"""The scripts and styles of the page."""

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""

METHODS = SAFE | {"POST", "DELETE"}
"""Methods that are counted by their names."""

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""Of every answer: other sites can neither show the page, nor have it run their scripts, nor read from the service."""

AUDIT = logging.getLogger("equigram.audit")
"""A line for each request that was to change something."""


class Guard:
    """An ASGI application around another one.

    Args:
      application: what is guarded.
      tokens: who may do what; empty for a service of this machine only, where everybody may do everything.
      hosts: names by which the service may be called, besides those of loopback; ``None`` for any.
      body_bytes: of a request, but for uploads.
      upload_bytes: of an upload.
      metrics: counts requests.
    """

    def __init__(
        self,
        application: Application,
        tokens: Tokens,
        hosts: Iterable[str] | None,
        body_bytes: int,
        upload_bytes: int,
        metrics: ServiceMetrics,
    ) -> None:
        self._application, self._tokens, self._metrics = application, tokens, metrics
        self._hosts = None if hosts is None else LOOPBACK | {host.lower() for host in hosts}
        self._body_bytes, self._upload_bytes = body_bytes, upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message.setdefault("headers", [])
                present = {name for name, _ in headers}
                headers += [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in present]
                if b"cache-control" not in present:
                    headers.append((b"cache-control", b"no-store"))
            await send(message)

        try:
            await self._guarded(scope, receive, answer)
        finally:
            self._told(scope, status, time.monotonic() - began)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check_host(headers)
            scope["user"] = self._user(scope, headers)
            limit = self._upload_bytes if scope["path"] == "/uploads" else self._body_bytes
            _check_length(headers, limit)
        except _RefusedError as refused:
            await refuse(send, refused.status, refused.error)
            return
        left = limit

        async def measured() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise _RefusedError(413, _too_long(limit))
            return message

        async def answer(message: Message) -> None:
            if left >= 0:  # else whoever read the body makes another error of the refusal
                await send(message)

        try:
            await self._application(scope, measured, answer)
        except _RefusedError:
            pass
        finally:
            if left < 0:
                await refuse(send, 413, _too_long(limit))

    def _check_host(self, headers: dict[str, str]) -> None:
        """Refuse a name that is not ours: a site may have its name resolve to this machine."""
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if self._hosts is not None and name.lower() not in self._hosts:
            raise _RefusedError(
                400,
                SpecError(
                    f"this service is not called {name!r}; its operator can add that (equigram serve --hostname)"
                    if name
                    else "the request does not name a host; send a header Host"
                ),
            )

    def _user(self, scope: Scope, headers: dict[str, str]) -> User | None:
        """Who asks; ``None`` for what everybody may see."""
        changes = scope["method"] not in SAFE
        if changes:
            _check_origin(headers)
        path = scope["path"]
        if not changes and (path in PUBLIC or path.startswith(PUBLIC_FOLDER)):
            return None
        if not self._tokens:
            return LOCAL
        kind, _, token = headers.get("authorization", "").partition(" ")
        user = self._tokens.user(token.strip()) if kind.lower() == "bearer" else None
        if user is None:
            raise _RefusedError(
                401,
                AuthenticationError(
                    "the service does not know this token"
                    if token
                    else "the service asks for a token, and none was sent"
                ),
            )
        scope["user"] = user  # also where it is refused
        if changes and user.scope != "write":
            raise _RefusedError(
                403,
                AuthenticationError(
                    f"the token {user.name} has the scope read, and {scope['method']} {path} needs write"
                ),
            )
        return user

    def _told(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._metrics.answered(method, route, status, seconds)
        if scope["method"] not in SAFE:
            user, client = scope.get("user"), scope.get("client")
            AUDIT.info(
                "%s %s",
                scope["method"],
                scope["path"],
                extra={
                    "user": user.name if user else None,
                    "client": client[0] if client else None,
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "seconds": round(seconds, 4),
                },
            )


class _RefusedError(Exception):
    """A request that is not passed on."""

    def __init__(self, status: int, error: EquigramError) -> None:
        super().__init__(str(error))
        self.status, self.error = status, error


def _check_origin(headers: dict[str, str]) -> None:
    """Refuse what another site has a browser send."""
    origin, host, site = headers.get("origin"), headers.get("host", ""), headers.get("sec-fetch-site", "none")
    ours = origin is None or origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())
    if not ours or site not in ("none", "same-origin"):
        raise _RefusedError(
            403, AuthenticationError(f"requests that change something must come from this service's page, not {origin}")
        )


def _check_length(headers: dict[str, str], limit: int) -> None:
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise _RefusedError(413, _too_long(limit, int(length)))


def _too_long(limit: int, length: int | None = None) -> LimitError:
    has = f"has {length:,} bytes" if length is not None else "is longer than allowed"
    return LimitError(f"the body of the request {has}, and {limit:,} bytes are allowed")


def body_of(error: BaseException) -> bytes:
    """The body of an answer that tells of an error."""
    answer = ErrorAnswer(error=ErrorDetail(type=type(error).__name__, message=str(error)))
    return json.dumps(answer.model_dump()).encode()


async def refuse(send: Send, status: int, error: EquigramError) -> None:
    """Answer with an error."""
    body = body_of(error)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 413:
        headers.append((b"connection", b"close"))  # nobody reads the rest
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
