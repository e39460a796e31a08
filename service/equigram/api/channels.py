"""What happens, to everybody who watches: one encoding of each event, however many they are."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from equigram.api.models import ENDED, State

if TYPE_CHECKING:
    from equigram.api.job import Job
    from equigram.api.journal import Entry

KEPT_EVENTS = 5000
"""Events of a job that somebody who begins to watch is told."""

KEPT_CHANNELS = 64
"""Jobs that nobody watches of which events are kept."""

WAITING_CHUNKS = 500
"""Messages that may wait for a watcher; one that is slower is cut off, and comes back for the rest."""

PING_SECONDS = 15.0
"""Time without an event after which a watcher is told that the connection lives."""

PING = b": ping\n\n"

Place: TypeAlias = tuple[int, int]
"""Attempt and number of an event."""


@dataclass(eq=False)
class _Channel:
    recent: deque[tuple[Place, bytes]] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    state: bytes = b""
    ended: bool = False
    watchers: set[asyncio.Queue[bytes | None]] = field(default_factory=set)


class Channels:
    """A :class:`equigram.api.jobs.Listener` that passes on what it hears.

    Args:
      loop: that of the watchers; everything but the methods of the listener is done there.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._channels: OrderedDict[str, _Channel] = OrderedDict()
        self.watchers = 0
        """How many there are."""

    # ------------------------------------------------------------------ the listener

    def entries(self, job: Job, entries: list[Entry], kinds: list[str]) -> None:
        """New events of a job."""
        attempt = job.heard
        messages = [
            ((attempt, entry.number), f"id: {attempt}.{entry.number}\nevent: {kind}\ndata: {entry.text}\n\n".encode())
            for entry, kind in zip(entries, kinds, strict=True)
        ]
        self._call(self._publish, job.id, job.state, messages)

    def changed(self, job: Job) -> None:
        """A job is in another state."""
        self._call(self._change, job.id, job.state)

    def deleted(self, job: str) -> None:
        """A job is gone."""
        self._call(self._delete, job)

    def _call(self, function: object, *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ on the loop

    def _publish(self, job: str, state: State, messages: list[tuple[Place, bytes]]) -> None:
        channel = self._channel(job, state)
        last = channel.recent[-1][0] if channel.recent else (0, -1)
        if messages[0][0][0] > last[0]:
            channel.recent.clear()  # of the attempt before
        new = [message for message in messages if message[0] > last]
        channel.recent.extend(new)
        if new:
            self._send(channel, b"".join(text for _, text in new))

    def _change(self, job: str, state: State) -> None:
        channel = self._channel(job, state)
        channel.state, channel.ended = _state_message(job, state), state in ENDED
        self._send(channel, channel.state)

    def _delete(self, job: str) -> None:
        channel = self._channels.pop(job, None)
        if channel is not None:
            for queue in channel.watchers:
                _cut(queue)

    def _channel(self, job: str, state: State) -> _Channel:
        channel = self._channels.get(job)
        if channel is None:
            channel = self._channels[job] = _Channel(state=_state_message(job, state), ended=state in ENDED)
        self._channels.move_to_end(job)
        idle = [name for name, one in self._channels.items() if not one.watchers and one.ended and name != job]
        for name in idle[: max(0, len(idle) - KEPT_CHANNELS)]:
            del self._channels[name]
        return channel

    @staticmethod
    def _send(channel: _Channel, chunk: bytes) -> None:
        for queue in channel.watchers:
            if queue.qsize() >= WAITING_CHUNKS:
                _cut(queue)
            else:
                queue.put_nowait(chunk)

    def is_empty(self, job: str) -> bool:
        """Whether no event of a job is kept."""
        return job not in self._channels or not self._channels[job].recent

    async def watch(self, job: str, state: State, after: Place | None, *, follow: bool) -> AsyncIterator[bytes]:
        """Everything that happens to a job from now on, after what is kept of what has happened.

        Args:
          job: which.
          state: in which it is.
          after: the last event that is known already.
          follow: go on when the job has ended; else end with it.
        """
        channel = self._channel(job, state)
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        channel.watchers.add(queue)
        self.watchers += 1
        try:
            known = [text for place, text in channel.recent if after is None or place > after]
            yield channel.state + b"".join(known)
            while follow or not (channel.ended and queue.empty()):
                try:
                    chunk = await asyncio.wait_for(queue.get(), PING_SECONDS)
                except TimeoutError:
                    chunk = PING
                if chunk is None:
                    return
                yield chunk
        finally:
            channel.watchers.discard(queue)
            self.watchers -= 1

    def close(self) -> None:
        """End all watching: the service stops."""
        for channel in self._channels.values():
            for queue in channel.watchers:
                _cut(queue)


def _cut(queue: asyncio.Queue[bytes | None]) -> None:
    """End a watcher once it has what waits for it already."""
    queue.put_nowait(None)


def _state_message(job: str, state: str) -> bytes:
    return f"event: state\ndata: {json.dumps({'id': job, 'state': state})}\n\n".encode()
