"""Requests to a service: again while it cannot be reached, and its errors as what they are here."""

from __future__ import annotations

import contextlib
import logging
import re
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter, ValidationError

import equikernel.errors
from equigram import __version__, errors
from equigram.api.models import ErrorAnswer, ErrorDetail
from equigram.client.settings import Settings, is_loopback
from equigram.errors import AuthenticationError, EquigramError, JobNotFoundError, ServiceError
from equikernel.errors import EquikernelError

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0)
"""Seconds between tries of a request."""

PATIENCE = 60.0
"""Seconds after the first failure beyond which there is no other try, however long each took."""

QUIET = 45.0
"""Seconds without a sign of life, one of which is sent every 15 s, after which a stream of events is taken for lost."""

_UNAVAILABLE = (502, 503, 504)
_LOG = logging.getLogger("equigram")

Value = TypeVar("Value")
Body = Callable[[], Iterable[bytes]]


class UnreachedError(Exception):
    """The service was not reached, which may pass.

    Attributes:
      error: what to say when it does not.
      pause: seconds after which the service wants to be asked again; ``None`` if it does not say.
    """

    def __init__(self, error: Exception, pause: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.pause = pause


class Patience:
    """Pauses before the same request is tried again, until it was tried for long enough."""

    def __init__(self) -> None:
        self._tries = 0
        self._since = 0.0

    def bear(self, lost: UnreachedError) -> None:
        """Wait before the next try.

        Raises:
          EquigramError: there is none.
        """
        now = time.monotonic()
        if self._tries == 0:
            self._since = now
        if self._tries == len(PAUSES) or now - self._since > PATIENCE or (lost.pause or 0) > PATIENCE:
            raise lost.error from None
        if self._tries == 0:
            _LOG.warning("%s; trying again for %.0f s", str(lost.error).partition(";")[0], sum(PAUSES))
        time.sleep(max(PAUSES[self._tries], lost.pause or 0))
        self._tries += 1

    def renew(self) -> None:
        """The service was reached."""
        self._tries = 0


class Connection:
    """Requests to one service.

    Args:
      settings: which, and the token.
      timeout: seconds without a sign of life after which a request is taken for lost.
    """

    def __init__(self, settings: Settings, timeout: float) -> None:
        self.url = settings.url
        self._origin = settings.origin
        headers = {"User-Agent": f"equigram/{__version__}"}
        if settings.token is not None:
            headers["Authorization"] = f"Bearer {settings.token}"
        # A proxy for the web cannot reach this machine's own service.
        direct = {"http://": None, "https://": None} if is_loopback(settings.url) else None
        self._timeout = httpx.Timeout(timeout, connect=min(timeout, 10.0))
        self._http = httpx.Client(headers=headers, timeout=self._timeout, mounts=direct)

    def __repr__(self) -> str:
        return f"Connection({self.url!r})"

    def close(self) -> None:
        """Let go of the network."""
        self._http.close()

    def get(self, path: str, kind: type[Value], **query: str | int) -> Value:
        """What the service says at ``path``."""
        return self.read(self.request("GET", path, query=query), kind)

    def post(self, path: str, kind: type[Value], **options: Any) -> Value:
        """What the service answers to a request that does no harm when it comes twice."""
        return self.read(self.request("POST", path, **options), kind)

    def delete(self, path: str) -> None:
        """Delete what is at ``path``; that it is gone at a second try is what the first one has done."""
        patience, again = Patience(), False
        while True:
            try:
                self._once("DELETE", path)
            except UnreachedError as lost:
                patience.bear(lost)
                again = True
            except JobNotFoundError:
                if not again:
                    raise
                return
            else:
                return

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The whole answer to a request that does no harm when it comes twice.

        Args:
          method: of HTTP.
          path: below the URL of the service.
          options: see :meth:`_once`.

        Raises:
          EquigramError: what the service says, as the class it names.
          ServiceError: nothing answers, or something that is no service.
          AuthenticationError: it does not know the token.
        """
        patience = Patience()
        while True:
            try:
                return self._once(method, path, **options)
            except UnreachedError as lost:
                patience.bear(lost)

    @contextlib.contextmanager
    def stream(self, path: str, quiet: float, headers: Mapping[str, str]) -> Iterator[Iterator[bytes]]:
        """The bytes of an answer as they come, with at most ``quiet`` seconds between them.

        Raises:
          UnreachedError: the service was not reached, or lost.
        """
        timeout = httpx.Timeout(quiet, connect=self._timeout.connect)
        with (
            self._understood(quiet),
            self._http.stream("GET", self.url + path, headers=dict(headers), timeout=timeout) as response,
        ):
            self._check(response)
            found = response.headers.get("Content-Type", "")
            if not found.startswith("text/event-stream"):
                raise self._stranger(response)
            yield response.iter_bytes()

    def read(self, response: httpx.Response, kind: type[Value]) -> Value:
        """The value that is the body of an answer.

        Raises:
          ServiceError: it is none.
        """
        try:
            return TypeAdapter(kind).validate_json(response.content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise self._stranger(response, f"{where}: {first['msg']}".lstrip(": ")) from None

    def _once(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | int] | None = None,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
    ) -> httpx.Response:
        """The answer to one request.

        Args:
          method: of HTTP.
          path: below the URL of the service.
          query: parameters.
          json: the body, as plain data.
          headers: more of them.
          body: makes the body, piece by piece.
        """
        with self._understood(self._timeout.read):
            response = self._http.request(
                method,
                self.url + path,
                params=dict(query or {}),
                json=json,
                headers=dict(headers or {}),
                content=body() if body else None,
            )
            self._check(response)
        return response

    @contextlib.contextmanager
    def _understood(self, quiet: float | None) -> Iterator[None]:
        """What can go wrong on the way to the service, in words."""
        try:
            yield
        except httpx.TimeoutException:
            reason = f"nothing comes within {quiet:g} s"
        except (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.DecodingError, httpx.InvalidURL) as error:
            raise ServiceError(f"{self.url} cannot be asked: {error}; check the URL of the service") from None
        except httpx.TransportError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
                cause = cause.__cause__ or cause.__context__
            if cause is not None:
                raise ServiceError(
                    f"{self.url} has a certificate that is not trusted here: {cause.verify_message}; name the "
                    "authority's file in SSL_CERT_FILE, or check the URL"
                ) from None
            reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or "the connection was lost"
        else:
            return
        remedy = "start the service (`equigram serve`), or name its URL in EQUIGRAM_SERVER or --server"
        raise UnreachedError(ServiceError(f"{self.url} does not answer: {reason}; {remedy}")) from None

    def _check(self, response: httpx.Response) -> None:
        """Refuse an answer that is no success."""
        if response.is_success:
            return
        response.read()
        error = self._error(response)
        after = response.headers.get("Retry-After", "")
        pause = float(after) if after.isdecimal() else None
        if response.status_code in _UNAVAILABLE or (response.status_code == 429 and after):
            raise UnreachedError(error, pause)
        raise error

    def _error(self, response: httpx.Response) -> Exception:
        if response.is_redirect:
            return self._stranger(response, f"it redirects to {response.headers.get('Location', '')[:200]}")
        try:
            detail = ErrorAnswer.model_validate_json(response.content).error
        except ValidationError:
            return self._stranger(response)
        error = known_error(detail)
        if isinstance(error, AuthenticationError):
            used = f"the token was {self._origin}" if self._origin else "no token was sent; set EQUIGRAM_TOKEN"
            return AuthenticationError(f"{self.url}: {error} ({used})")
        return error

    def _stranger(self, response: httpx.Response, what: str = "") -> ServiceError:
        """Who answered is no service, or not one of this version."""
        kind = response.headers.get("Content-Type", "nothing").partition(";")[0]
        return ServiceError(
            f"{response.url} answers with status {response.status_code} and {kind}, not as a service of equigram "
            f"{__version__} does{f' ({what})' if what else ''}; check the URL, and what is between here and there"
        )


def known_error(detail: ErrorDetail) -> Exception:
    """The error that a service names: one that is raised on purpose, and nothing else."""
    for module in (errors, equikernel.errors):
        found = getattr(module, detail.type, None)
        if isinstance(found, type) and issubclass(found, EquigramError | EquikernelError):
            for kind in found.__mro__:  # some hold more than a message, which does not travel
                with contextlib.suppress(TypeError):
                    error = kind(detail.message)
                    assert isinstance(error, Exception)
                    return error
    return ServiceError(f"{detail.type}: {detail.message}")


def address(*segments: str) -> str:
    """The path of what these names lead to.

    Raises:
      JobNotFoundError: there is nothing of such a name.
    """
    for segment in segments:
        if segment in ("", ".", ".."):
            raise JobNotFoundError(f"there is nothing of the name {segment!r}; `equigram jobs` lists what there is")
    return "".join(f"/{quote(segment, safe='')}" for segment in segments)
