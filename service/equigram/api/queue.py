"""Which jobs run, and with which share of the cluster: decisions without a cluster or a clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from equigram.api.records import Outcome, Share, Wish

if TYPE_CHECKING:
    from equigram.api.cluster import Status
    from equigram.api.models import State

PRIORITY_STEP = 10
"""A priority that is so much higher gives twice the share."""

LOST_DRIVERS = 3
"""A job fails when so many drivers in a row were lost without having finished a tile."""


@dataclass(frozen=True)
class Waiting:
    """A job in the queue, or one that runs."""

    id: str
    owner: str
    priority: int
    submitted: str


def next_jobs(queued: Iterable[Waiting], running: Iterable[Waiting], concurrency: int) -> list[str]:
    """The jobs that start now: by priority, then those of the owner with the fewest running, then the oldest.

    >>> a, b, c = (Waiting(id, owner, 0, id) for id, owner in (("1", "ann"), ("2", "ann"), ("3", "bob")))
    >>> next_jobs([a, b, c], [], concurrency=2)
    ['1', '3']
    """
    left, busy, chosen = list(queued), Counter(job.owner for job in running), []
    while left and busy.total() < concurrency:
        best = min(left, key=lambda job: (-job.priority, busy[job.owner], job.submitted, job.id))
        left.remove(best)
        busy[best.owner] += 1
        chosen.append(best.id)
    return chosen


def shares(priorities: Mapping[str, int]) -> dict[str, Share]:
    """The share of each running job, in the order of their names; together they are the whole cluster.

    >>> shares({"a": 0, "b": 10})
    {'a': Share(begin=0.0, end=0.3333333333333333), 'b': Share(begin=0.3333333333333333, end=1.0)}
    """
    weights = {job: 2.0 ** (priority / PRIORITY_STEP) for job, priority in sorted(priorities.items())}
    total, begin, found = sum(weights.values()), 0.0, {}
    for job, weight in weights.items():
        end = begin + weight / total
        found[job] = Share(begin=begin, end=end)
        begin = end
    if found:
        last = list(found)[-1]
        found[last] = Share(begin=found[last].begin, end=1.0)
    return found


def state_of(wish: Wish, outcome: Outcome | None, status: Status | None, *, begun: bool) -> State | None:
    """The state of a submitted job, from what is wanted of it, how its present driver ended, and what Ray says.

    Args:
      wish: what is wanted.
      outcome: of the driver of that attempt; ``None`` if it said nothing.
      status: of it, as Ray says; ``None`` if Ray does not know it.
      begun: whether it has ever written its journal.

    Returns:
      The state; ``None`` where the driver was lost: it is gone, and was not able to say why.
    """
    if outcome is not None and outcome.state != "terminated":
        return outcome.state
    active = status in ("pending", "running") and outcome is None
    if wish.state == "cancelled":
        return "cancelling" if active else "cancelled"
    if active:
        return "running" if begun else "starting"
    gone = begun or outcome is not None or status == "ended"
    return None if gone else "queued"


def after_loss(wish: Wish, finished: int, since: str) -> Wish | None:
    """What is wanted of a job whose driver was lost: another one; ``None`` if too many were.

    Args:
      wish: what was wanted.
      finished: tiles that are stored now.
      since: the time.
    """
    lost = 1 if finished > wish.finished else wish.lost + 1
    if lost >= LOST_DRIVERS:
        return None
    return Wish(state="run", attempt=wish.attempt + 1, since=since, lost=lost, finished=finished)
