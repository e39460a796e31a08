"""One process at a time sets up a run store, or changes what it says of its run: the one that holds its claim.

In a folder the claim is a lock that the kernel gives up when its process ends, however it does. On object storage it is
an object that is created only where none is, and written again every :data:`BEAT` seconds: one that is not belongs to a
process that is gone, and is taken over. Tiles need no claim.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from equigram.errors import StoreError

NAME = ".equigram-claim"

BEAT = 20.0
"""Seconds after which an object is written again as long as it is needed."""

ABANDONED = 110.0
"""Seconds without that after which its process is taken for gone."""

LOOK = 0.5
"""Seconds between two looks at the claim of another process."""

SETTLE = 1.0
"""Seconds between taking over a claim and looking whose it is."""

PATIENCE = 900.0
"""Seconds to wait for it."""

QUIET = 5.0
"""Seconds to wait before that is said."""

_LOG = logging.getLogger("equigram")


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """The claim of a folder, which is made if there is none.

    Raises:
      StoreError: another process has it for longer than :data:`PATIENCE`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place, patience = folder / NAME, _Patience(str(folder))
    while True:
        file = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _locked(file) and _is(file, place):
                break
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        patience.wait("another process on this machine")
    try:
        yield
    finally:
        place.unlink(missing_ok=True)
        os.close(file)


def _locked(file: int) -> bool:
    """Whether the lock of an open file could be had; where there are no locks, everybody has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
    return True


def _is(file: int, place: Path) -> bool:
    """Whether an open file is still the one at that place: who had the lock before has deleted it."""
    try:
        return os.path.samestat(os.fstat(file), place.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def claim(call: Callable[..., Any], folder: str) -> Iterator[None]:
    """The claim of a folder of object storage.

    Args:
      call: does an operation of the file system: ``call("cat_file", path)``.
      folder: its path there.

    Raises:
      StoreError: another process has it for longer than :data:`PATIENCE`.
    """
    place, patience = f"{folder}/{NAME}", _Patience(folder)
    me = {"host": _here(), "process": os.getpid(), "id": uuid.uuid4().hex}
    seen, since = b"", time.monotonic()
    while not _create(call, place, me):
        with contextlib.suppress(FileNotFoundError):
            now = bytes(call("cat_file", place))
            if now != seen:
                seen, since = now, time.monotonic()
            holder = _holder(now)
            abandoned = time.monotonic() - since > ABANDONED
            if abandoned or (holder.get("host") == me["host"] and not alive(int(holder.get("process", 0)))):
                call("pipe_file", place, json.dumps(me).encode())
                time.sleep(SETTLE)  # another one may do the same: the last one has it
                if _is_mine(call, place, me):
                    break
                continue
            patience.wait(f"process {holder.get('process', '?')} on {holder.get('host', '?')}")
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(call, place, me, ended), daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        with contextlib.suppress(Exception):  # gone already; or the storage fails, and it will be found abandoned
            if _is_mine(call, place, me):
                call("rm_file", place)


def _create(call: Callable[..., Any], place: str, me: dict[str, Any]) -> bool:
    """Write the claim if there is none."""
    try:
        call("pipe_file", place, json.dumps(me).encode(), mode="create")
    except FileExistsError:
        return False
    return True


def _beat(call: Callable[..., Any], place: str, me: dict[str, Any], ended: threading.Event) -> None:
    count = 0
    while not ended.wait(BEAT):
        count += 1
        with contextlib.suppress(Exception):  # the storage fails: others will wait, or take over
            if not _is_mine(call, place, me):
                return
            call("pipe_file", place, json.dumps({**me, "beats": count}).encode())


def _here() -> str:
    """Name of this host and its space of process numbers, where there are any: containers may share a name."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {space.readlink()}" if space.exists() else socket.gethostname()


def _is_mine(call: Callable[..., Any], place: str, me: dict[str, Any]) -> bool:
    return bool(_holder(call("cat_file", place)).get("id") == me["id"])


def _holder(content: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError):
        return {}


def alive(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process > 0


class _Patience:
    """Waits for another process, says so once, and ends."""

    def __init__(self, folder: str) -> None:
        self._folder, self._began, self._said = folder, time.monotonic(), False

    def wait(self, holder: str) -> None:
        """Wait a little."""
        waited = time.monotonic() - self._began
        if waited > PATIENCE:
            raise StoreError(
                f"{self._folder}: {holder} has been setting up this store, or changing it, for more than "
                f"{PATIENCE:.0f} s; end it, or run again when it is ready"
            )
        if waited > QUIET and not self._said:
            self._said = True
            _LOG.warning("waiting for %s, which sets up %s or changes it, or died while it did", holder, self._folder)
        time.sleep(LOOK)
