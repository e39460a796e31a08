"""Which jobs run and with which share of the cluster: decisions about states, without a cluster or a clock."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equigram.api.models import State
from equigram.api.queue import LOST_DRIVERS, Waiting, after_loss, next_jobs, shares, state_of
from equigram.api.records import Outcome, Wish
from equigram.driver import shared_workers

jobs = st.builds(
    Waiting,
    st.uuids().map(str),
    st.sampled_from(["ann", "bob", "eve"]),
    st.integers(-100, 100),
    st.integers(0, 50).map(lambda n: f"2026-01-01T00:00:{n:02}"),
)
NOW = "2026-01-01T00:00:00"


@given(st.lists(jobs, max_size=20), st.lists(jobs, max_size=5), st.integers(1, 8))
def test_jobs_start_by_priority_as_long_as_there_is_room(
    queued: list[Waiting], running: list[Waiting], most: int
) -> None:
    chosen = next_jobs(queued, running, most)
    assert len(chosen) == max(0, min(len(queued), most - len(running)))
    by_name = {job.id: job for job in queued}
    left = [job for job in queued if job.id not in chosen]
    assert all(by_name[name].priority >= job.priority for name in chosen for job in left)
    assert len(set(chosen)) == len(chosen)


def test_an_owner_with_many_jobs_does_not_keep_others_waiting() -> None:
    queued = [Waiting(f"a{n}", "ann", 0, f"0{n}") for n in range(5)] + [Waiting("b", "bob", 0, "99")]
    assert next_jobs(queued, [], 2) == ["a0", "b"]
    assert next_jobs(queued, [Waiting("x", "ann", 0, "0")], 2) == ["b"]


def test_jobs_of_one_owner_start_in_their_order() -> None:
    queued = [Waiting(name, "ann", 0, since) for name, since in (("late", "3"), ("early", "1"), ("mid", "2"))]
    assert next_jobs(queued, [], 3) == ["early", "mid", "late"]


@given(st.dictionaries(st.uuids().map(str), st.integers(-100, 100), min_size=1, max_size=8), st.integers(0, 1000))
def test_shares_are_the_whole_cluster_and_no_worker_is_left_over(priorities: dict[str, int], workers: int) -> None:
    found = shares(priorities)
    assert found.keys() == priorities.keys()
    bounds = [(share.begin, share.end) for share in found.values()]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 1
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(bounds))
    counts = [shared_workers(begin, end, workers) for begin, end in bounds]
    assert sum(counts) >= workers
    assert sum(counts) <= workers + sum(count == 1 for count in counts)


def test_ten_more_of_priority_are_twice_the_share() -> None:
    found = {job: share.end - share.begin for job, share in shares({"a": 0, "b": 10, "c": 20}).items()}
    assert math.isclose(found["b"], 2 * found["a"])
    assert math.isclose(found["c"], 4 * found["a"])


RUN, CANCELLED = (Wish(state=state, attempt=1, since=NOW) for state in ("run", "cancelled"))
DONE, FAILED, TERMINATED = (Outcome(state=state, ended=NOW) for state in ("done", "failed", "terminated"))


@pytest.mark.parametrize(
    ("wish", "outcome", "status", "begun", "state"),
    [
        (RUN, None, None, False, "queued"),
        (RUN, None, "pending", False, "starting"),
        (RUN, None, "running", False, "starting"),
        (RUN, None, "running", True, "running"),
        (RUN, DONE, "running", True, "done"),  # Ray sees it later
        (RUN, DONE, None, True, "done"),  # Ray has forgotten it
        (RUN, FAILED, "ended", True, "failed"),
        (RUN, None, "ended", True, None),
        (RUN, None, "ended", False, None),  # killed before it could write
        (RUN, None, None, True, None),  # the cluster is gone
        (RUN, TERMINATED, "ended", True, None),  # its machine was to go
        (RUN, TERMINATED, "running", True, None),
        (CANCELLED, None, "running", True, "cancelling"),
        (CANCELLED, None, "ended", True, "cancelled"),
        (CANCELLED, TERMINATED, "ended", True, "cancelled"),
        (CANCELLED, None, None, False, "cancelled"),  # in the queue
        (CANCELLED, DONE, "ended", True, "done"),  # it was faster
        (CANCELLED, FAILED, "ended", True, "failed"),
    ],
)
def test_the_state_of_a_job_follows_from_its_wish_its_outcome_and_ray(
    wish: Wish, outcome: Outcome | None, status: str | None, begun: bool, state: State | None
) -> None:
    assert state_of(wish, outcome, status, begun=begun) == state  # type: ignore[arg-type]


def test_a_lost_driver_is_followed_by_another_until_several_in_a_row_have_done_nothing() -> None:
    wish: Wish | None = RUN
    attempts = []
    while wish is not None:
        attempts.append(wish.attempt)
        wish = after_loss(wish, finished=0, since=NOW)
    assert attempts == list(range(1, LOST_DRIVERS + 1))


def test_drivers_that_finish_tiles_may_be_lost_for_ever() -> None:
    wish = RUN
    for finished in range(1, 20):
        following = after_loss(wish, finished, NOW)
        assert following is not None
        wish = following
    assert wish.attempt == 20
    assert Counter([wish.lost]) == {1: 1}
