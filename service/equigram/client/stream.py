"""The events of a job as they come, whatever happens to the connection."""

from __future__ import annotations

import codecs
import dataclasses
import json
import math
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from equigram.api.models import ENDED
from equigram.client.connection import QUIET, Connection, Patience, UnreachedError
from equigram.errors import ServiceError
from equigram.events import Event
from equigram.plan import Tile

STEADY = 10.0
"""Seconds after which a connection that was lost had been a good one."""

_KINDS = {kind.__name__: kind for kind in Event.__subclasses__()}


class Told(NamedTuple):
    """What a service tells of a job.

    Attributes:
      id: ``"<attempt>.<number>"``, after which one can go on; ``None`` for the state of the job.
      kind: a class in :mod:`equigram.events`, or ``"state"``.
      data: its fields, tiles as text, and ``time``; or ``state`` and ``id``.
    """

    id: str | None
    kind: str
    data: dict[str, Any]


def follow(connection: Connection, path: str, after: str | None, deadline: float = math.inf) -> Iterator[Told]:
    """Everything at ``path`` until the job has ended; the state only when it is another one.

    Args:
      connection: to the service.
      path: of the events of a job.
      after: the event after which to begin; ``None`` for the first one of the present attempt.
      deadline: the moment of :func:`time.monotonic` to stop at, up to the 15 s between two signs of life.

    Raises:
      ServiceError: the service does not answer, or not with events.
    """
    patience, state = Patience(), ""
    while (left := deadline - time.monotonic()) > 0:
        began = time.monotonic()
        heard = False
        try:
            resumed = {"Last-Event-ID": after} if after else {}
            with connection.stream(f"{path}?follow=false", min(QUIET, left), resumed) as content:
                for told in messages(content):
                    if time.monotonic() > deadline:
                        return
                    if told is None:
                        continue
                    heard = heard or (told.id or told.data.get("state")) not in (after, state)
                    after = told.id or after
                    if told.kind == "state":
                        if told.data.get("state") == state:
                            continue
                        state = str(told.data.get("state"))
                    yield told
            if state in ENDED:
                return
            raise UnreachedError(ServiceError(f"{connection.url} ends the events of a job that goes on; try again"))
        except UnreachedError as lost:
            if time.monotonic() >= deadline:
                return
            if heard or time.monotonic() - began > STEADY:
                patience.renew()
            patience.bear(lost)


def messages(content: Iterable[bytes]) -> Iterator[Told | None]:
    """The messages of an event stream; ``None`` for a mere sign of life.

    Raises:
      ServiceError: there is something else in it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest, fields = "", dict[str, str]()
    for piece in content:
        *lines, rest = re.split(r"\r\n|\n|\r(?!\Z)", rest + decoder.decode(piece))
        for line in lines:
            if line:
                name, _, value = line.partition(":")
                value = value.removeprefix(" ")
                fields[name] = f"{fields[name]}\n{value}" if name == "data" and name in fields else value
                if not name:
                    yield None
            elif "data" in fields:
                yield _told(fields)
                fields = {}
            else:
                fields = {}


def _told(fields: dict[str, str]) -> Told:
    try:
        data = json.loads(fields["data"])
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise ServiceError(
            f"an event of the service is no JSON object, but {fields['data'][:80]!r}; is it of equigram?"
        )
    return Told(fields.get("id") or None, fields.get("event", "message"), data)


def as_event(told: Told) -> Event | None:
    """The event as the driver told it; ``None`` for the state of the job, and for what this version does not know."""
    kind = _KINDS.get(told.kind)
    if kind is None:
        return None
    names = [field.name for field in dataclasses.fields(kind)]
    values = {name: told.data[name] for name in names if name in told.data}
    if isinstance(text := values.get("tile"), str):
        values["tile"] = Tile.parse(text)
        if values["tile"] is None:
            return None
    try:
        return kind(**values)
    except TypeError:
        return None
