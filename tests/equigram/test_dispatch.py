"""What the dispatcher decides, in virtual time: every tile once, whoever dies, hangs, is slow, comes late or leaves."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equigram.dispatch import ATTEMPTS, CAPACITY_SECONDS, TILES_IN_FLIGHT, Dispatcher, Verdict, judge, pause
from equigram.errors import (
    ClusterError,
    DamagedArrayError,
    DamagedTileError,
    StoreError,
    StoreMismatchError,
    TileFailedError,
)
from equigram.events import Event, TileCopied, TileFailed, TileFinished, WorkerLost, WorkerReleased, WorkerStarted
from equigram.plan import Tile, Tiling
from equigram.simulated import Fault, Simulated
from equikernel import ImageError, NonFiniteKernelError
from equikernel.errors import MemoryLimitError

VICTIM = Tile("gram", 0, 2)


def run(
    tiling: Tiling, executor: Simulated, hung_after: float = 100.0, done: frozenset[Tile] = frozenset()
) -> list[Event]:
    """What happens while all tiles are computed; each is reported once."""
    events: list[Event] = []
    reports = list(Dispatcher(tiling.strips(done), executor, events.append, hung_after).run())
    assert Counter(report.tile for report in reports) == Counter(set(tiling.tiles()) - done)
    assert [event.tile for event in events if isinstance(event, TileFinished)] == [report.tile for report in reports]
    return events


def of(events: list[Event], kind: type[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def equal(seconds: float = 1.0) -> Callable[[int, Tile], float]:
    return lambda worker, tile: seconds


def always(count: int) -> Callable[[float], int]:
    return lambda now: count


tilings = st.builds(Tiling, train=st.integers(1, 30), test=st.integers(0, 10), edge=st.integers(1, 6))


@settings(deadline=None)
@given(tilings, st.integers(1, 40), st.randoms(use_true_random=False))
def test_every_tile_is_computed_once_whatever_workers_and_their_speeds(tiling: Tiling, count: int, random: Any) -> None:
    speeds = [random.uniform(0.5, 2) for _ in range(count)]
    executor = Simulated(lambda worker, tile: speeds[worker], always(count))
    events = run(tiling, executor)
    assert executor.most_in_flight <= TILES_IN_FLIGHT
    assert len(of(events, WorkerStarted)) <= min(count, len(tiling))
    assert not of(events, WorkerLost)


@settings(deadline=None)
@given(tilings, st.integers(1, 8), st.randoms(use_true_random=False))
def test_every_tile_is_computed_once_whatever_dies_fails_or_hangs_now_and_then(
    tiling: Tiling, count: int, random: Any
) -> None:
    trouble: Counter[Tile] = Counter()

    def fault(worker: int, tile: Tile) -> Fault:
        if trouble[tile] or random.random() < 0.7:
            return None
        trouble[tile] += 1
        faults: list[Fault] = ["dies", "node", "hangs", OSError("no answer"), RuntimeError("a device is gone")]
        place: int = random.randrange(len(faults))
        return faults[place]

    run(tiling, Simulated(equal(), always(count), fault))


def test_workers_are_kept_busy_to_the_end() -> None:
    tiling = Tiling(train=64, test=0, edge=1)
    executor = Simulated(equal(10.0), always(16), write_seconds=2.0)
    run(tiling, executor)
    assert executor.now() <= 1 + 10 * math.ceil(len(tiling) / 16) + 2 * 2


def test_the_end_is_not_decided_by_a_slow_worker() -> None:
    tiling = Tiling(train=20, test=0, edge=1)
    executor = Simulated(lambda worker, tile: 1000.0 if worker == 3 else 1.0, always(4))
    events = run(tiling, executor, hung_after=1e6)
    assert executor.now() < 1 + len(tiling) / 3 + 5
    assert {event.worker for event in of(events, TileCopied)} <= {0, 1, 2}
    assert len(of(events, TileCopied)) <= TILES_IN_FLIGHT


def test_nothing_is_computed_twice_where_all_workers_are_alike() -> None:
    executor = Simulated(equal(), always(4))
    assert not of(run(Tiling(train=20, test=4, edge=1), executor), TileCopied)


def test_a_worker_gets_tiles_that_share_its_images() -> None:
    tiling = Tiling(train=40, test=0, edge=1)
    executor = Simulated(equal(), always(5))
    run(tiling, executor)
    columns: dict[int, list[int]] = {}
    for worker, tile in executor.computed:
        columns.setdefault(worker, []).append(tile.col)
    changes = sum(a != b for of_one in columns.values() for a, b in itertools.pairwise(of_one))
    assert changes < 0.4 * len(tiling)


def test_workers_that_join_are_used_and_those_that_leave_are_not_missed() -> None:
    tiling = Tiling(train=60, test=0, edge=1)

    def fault(worker: int, tile: Tile) -> Fault:
        return "node" if worker in (1, 2) and tile.row > 20 else None

    executor = Simulated(equal(), lambda now: 4 if now < 100 else 12, fault)
    events = run(tiling, executor)
    assert {event.worker for event in of(events, WorkerStarted)} >= set(range(12))
    assert len(of(events, WorkerLost)) == 2
    assert not of(events, TileFailed)  # a node that leaves is no fault of its tiles
    assert executor.now() < 100 + 60 + len(tiling) / 10


def test_a_run_lets_workers_go_when_its_share_shrinks_and_takes_them_back_when_it_grows() -> None:
    share = {0: 4, 50: 1, 150: 3}

    def most(now: float) -> int:
        return next(count for since, count in reversed(share.items()) if now >= since)

    tiling = Tiling(train=30, test=0, edge=1)
    executor = Simulated(equal(), most, limit=most)
    events = run(tiling, executor)
    released = of(events, WorkerReleased)
    assert len(released) == 3
    assert len(of(events, WorkerStarted)) == 4 + 2
    assert not of(events, WorkerLost)
    assert not of(events, TileFailed)
    assert len(executor.computed) <= len(tiling) + 2  # what the released ones held was finished by them
    # 4 workers until the first look after 50 s, 1 until that after 150 s, then 3
    assert executor.now() == pytest.approx(150 + (len(tiling) - 4 * 50 - 100) / 3, abs=25)


@settings(deadline=None, max_examples=50)
@given(tilings, st.lists(st.integers(1, 6), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_every_tile_is_computed_once_whatever_share_a_run_has(tiling: Tiling, shares: list[int], random: Any) -> None:
    def most(now: float) -> int:
        return shares[int(now // 15) % len(shares)]

    executor = Simulated(lambda worker, tile: random.uniform(0.5, 20), most, limit=most)
    assert not of(run(tiling, executor, hung_after=1000), WorkerLost)


def test_a_hung_worker_is_replaced() -> None:
    hung: list[int] = []

    def fault(worker: int, tile: Tile) -> Fault:
        if tile == VICTIM and not hung:
            hung.append(worker)
            return "hangs"
        return None

    executor = Simulated(equal(), always(1), fault)
    events = run(Tiling(train=5, test=0, edge=1), executor, hung_after=50)
    (lost,) = of(events, WorkerLost)
    assert lost.reason.startswith("it gave no sign for ")
    assert executor.now() < 50 + 10 + 15 + 10


def test_slow_tiles_do_not_make_a_hung_worker() -> None:
    executor = Simulated(lambda worker, tile: 1000.0 if tile == VICTIM else 200.0, always(1))
    assert not of(run(Tiling(train=5, test=0, edge=1), executor, hung_after=300), WorkerLost)


@pytest.mark.parametrize("fault", ["dies", "hangs", OSError("no answer"), RuntimeError("a device is gone")])
def test_a_tile_that_always_fails_is_named_after_its_attempts(fault: Fault) -> None:
    events: list[Event] = []
    executor = Simulated(equal(), always(3), lambda worker, tile: fault if tile == VICTIM else None)
    tiling = Tiling(train=5, test=0, edge=1)
    with pytest.raises(TileFailedError, match=rf"tile gram\[0, 2\] failed {ATTEMPTS} times, the last time because of"):
        list(Dispatcher(tiling.strips(), executor, events.append, 20.0).run())
    failures = [(event.failures, event.pause) for event in of(events, TileFailed) if event.tile == VICTIM]
    assert failures == [(1, pause(1)), (2, pause(2))]
    assert all(event.failures == 1 for event in of(events, TileFailed) if event.tile != VICTIM)
    assert len(of(events, TileFinished)) >= len(tiling) - TILES_IN_FLIGHT


def test_a_tile_that_failed_is_computed_alone() -> None:
    executor = Simulated(equal(), always(2), lambda worker, tile: "dies" if tile == VICTIM else None)
    with pytest.raises(TileFailedError):
        list(Dispatcher(Tiling(train=12, test=0, edge=1).strips(), executor, lambda event: None, 100.0).run())
    workers = [worker for worker, tile in executor.computed if tile == VICTIM]
    assert len(set(workers)) == ATTEMPTS
    for worker in workers[1:]:
        assert executor.computed[[one for one, _ in executor.computed].index(worker) :][-1] is not None
        assert [tile for one, tile in executor.computed if one == worker][-1] == VICTIM


@pytest.mark.parametrize("error", [ImageError("image 3 overflows"), DamagedArrayError("images/train is damaged")])
def test_an_error_of_the_data_ends_the_run_at_once(error: Exception) -> None:
    events: list[Event] = []
    executor = Simulated(equal(), always(1), lambda worker, tile: error if tile == VICTIM else None)
    with pytest.raises(type(error), match=str(error)):
        list(Dispatcher(Tiling(train=5, test=0, edge=1).strips(), executor, events.append, 100.0).run())
    assert not of(events, TileFailed)


def test_a_cluster_without_room_ends_the_run() -> None:
    executor = Simulated(equal(), always(0))
    with pytest.raises(ClusterError, match=r"none of 1 workers could start within 120 s: the cluster has no room left"):
        run(Tiling(train=5, test=0, edge=1), executor)
    assert CAPACITY_SECONDS <= executor.now() < CAPACITY_SECONDS + 2


def test_a_run_goes_on_when_all_workers_were_lost() -> None:
    lost: list[int] = []

    def fault(worker: int, tile: Tile) -> Fault:
        if len(lost) < 3 and tile.row == 1:
            lost.append(worker)
            return "node"
        return None

    run(Tiling(train=6, test=2, edge=1), Simulated(equal(), always(3), fault))
    assert len(lost) == 3


def test_waiting_for_a_second_try_is_no_busy_loop() -> None:
    once: list[int] = []

    def fault(worker: int, tile: Tile) -> Fault:
        if tile == VICTIM and not once:
            once.append(worker)
            return OSError("no answer")
        return None

    executor = Simulated(equal(50.0), always(2), fault)
    run(Tiling(train=6, test=0, edge=1), executor, hung_after=1e4)
    assert executor.looks < 2 * executor.now()


def test_what_is_done_already_is_not_computed() -> None:
    tiling = Tiling(train=6, test=2, edge=1)
    done = frozenset(list(tiling.tiles())[::2])
    executor = Simulated(equal(), always(2))
    run(tiling, executor, done=done)
    assert not done & {tile for _, tile in executor.computed}


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (ImageError("NaN"), Verdict.STOP),
        (NonFiniteKernelError("inf"), Verdict.STOP),
        (DamagedTileError("checksum", VICTIM), Verdict.STOP),
        (DamagedArrayError("checksum"), Verdict.STOP),
        (StoreMismatchError("another job"), Verdict.STOP),
        (StoreError("503"), Verdict.RETRY),
        (ConnectionResetError("reset by peer"), Verdict.RETRY),
        (TimeoutError(), Verdict.RETRY),
        (MemoryLimitError("too large"), Verdict.REPLACE),
        (MemoryError(), Verdict.REPLACE),
        (RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS"), Verdict.REPLACE),
        (KeyError("a bug"), Verdict.REPLACE),
    ],
)
def test_whose_an_error_is(error: Exception, verdict: Verdict) -> None:
    assert judge(error) is verdict


def test_pauses_grow_to_a_minute() -> None:
    assert [pause(failures) for failures in (1, 2, 3, 4, 9)] == [1, 4, 16, 60, 60]
