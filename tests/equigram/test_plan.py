"""Tiles: every pair exactly once, nothing twice, and predictions that come true."""

import itertools
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equigram.plan import (
    LARGEST_TILE,
    STRIP,
    TILE_SECONDS,
    TILES_PER_WORKER,
    Part,
    Plan,
    Tile,
    TileSet,
    Tiling,
    choose_edge,
    image_bytes,
    is_diagonal,
    matrix_bytes,
    worker_bytes,
)
from equigram.spec import JobSpec, Pass
from equigram.store import GramStore

tilings = st.builds(Tiling, train=st.integers(1, 60), test=st.integers(0, 40), edge=st.integers(1, 70))


@given(tilings)
def test_every_pair_of_training_images_is_in_one_tile_of_the_upper_triangle(tiling: Tiling) -> None:
    pairs = Counter(
        (i, j)
        for tile in tiling.tiles()
        if tile.part == "gram"
        for i in tiling.rows(tile)
        for j in tiling.cols(tile)
        if not is_diagonal(tile) or i <= j
    )
    assert pairs == Counter((i, j) for i in range(tiling.train) for j in range(i, tiling.train))


@given(tilings)
def test_every_pair_of_a_test_and_a_training_image_is_in_one_tile(tiling: Tiling) -> None:
    pairs = Counter(
        (i, j) for tile in tiling.tiles() if tile.part == "cross" for i in tiling.rows(tile) for j in tiling.cols(tile)
    )
    assert pairs == Counter((i, j) for i in range(tiling.test) for j in range(tiling.train))


@given(tilings)
def test_tiles_fill_every_chunk_of_both_matrices_once(tiling: Tiling) -> None:
    chunks = Counter((tile.part, *chunk) for tile in tiling.tiles() for chunk in tiling.chunks(tile))
    blocks = {"gram": tiling.train_blocks, "cross": tiling.test_blocks}
    assert chunks == Counter(
        (part, row, col) for part in blocks for row in range(blocks[part]) for col in range(tiling.train_blocks)
    )


@given(tilings)
def test_tiles_and_pairs_are_counted_without_listing_them(tiling: Tiling) -> None:
    tiles = list(tiling.tiles())
    assert len(tiling) == len(tiles) == len(set(tiles))
    assert tiling.total_pairs == sum(map(tiling.pairs, tiles))


@given(tilings, st.data())
def test_missing_are_the_tiles_that_are_not_done_in_their_order(tiling: Tiling, data: st.DataObject) -> None:
    tiles = list(tiling.tiles())
    done = data.draw(st.sets(st.sampled_from(tiles)))
    assert list(tiling.missing(done)) == [tile for tile in tiles if tile not in done]


@given(tilings, st.data())
def test_strips_are_the_missing_tiles_each_once_and_share_a_column(tiling: Tiling, data: st.DataObject) -> None:
    tiles = list(tiling.tiles())
    done = data.draw(st.sets(st.sampled_from(tiles)))
    strips = list(tiling.strips(done))
    assert Counter(tile for strip in strips for tile in strip) == Counter(set(tiles) - done)
    for strip in strips:
        assert len({(tile.part, tile.col) for tile in strip}) == 1
        assert strip[-1].row - strip[0].row < STRIP


@given(tilings, st.data())
def test_a_set_of_tiles_is_a_set_and_counts_what_they_hold(tiling: Tiling, data: st.DataObject) -> None:
    tiles = list(tiling.tiles())
    some = data.draw(st.sets(st.sampled_from(tiles)))
    masks: dict[Part, Any] = {part: np.zeros(tiling.blocks(part), bool) for part in ("gram", "cross")}
    for tile in some:
        for chunk in tiling.chunks(tile):
            masks[tile.part][chunk] = True
    held = TileSet(tiling, masks)
    assert set(held) == some
    assert set(tiles) - held == set(tiles) - some
    assert all((tile in held) == (tile in some) for tile in tiles)
    assert list(held) == [tile for tile in tiles if tile in some]
    assert (len(held), held.pairs) == (len(some), sum(map(tiling.pairs, some)))
    assert held.chunks == sum(len(tiling.chunks(tile)) for tile in some)


def test_a_chunk_of_the_train_matrix_without_its_mirror_image_is_no_tile() -> None:
    mask = np.zeros((2, 2), bool)
    mask[0, 1] = True
    assert set(TileSet(Tiling(4, 0, 2), {"gram": mask})) == set()


def test_a_plan_of_a_hundred_million_tiles_is_lazy() -> None:
    tiling = Tiling(train=14_142 * 1024, test=0, edge=1024)
    tracemalloc.start()
    assert len(tiling) > 10**8
    assert [str(tile) for tile in itertools.islice(tiling.tiles(), 2)] == ["gram[0, 0]", "gram[0, 1]"]
    assert [len(strip) for strip in itertools.islice(tiling.strips(), 5)] == [1, 2, 3, 4, 4]
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_a_tile_is_named_by_its_matrix_and_place() -> None:
    assert str(Tile("cross", 3, 14)) == "cross[3, 14]"


@given(
    train=st.integers(1, 200_000),
    test=st.integers(0, 200_000),
    seconds=st.floats(0, 1e4),
    workers=st.integers(1, 10_000),
)
def test_a_chosen_edge_is_a_multiple_of_eight_that_keeps_workers_busy_for_seconds(
    train: int, test: int, seconds: float, workers: int
) -> None:
    edge = choose_edge(train, test, seconds, workers)
    smallest = min(8, max(train, test))
    assert smallest <= edge <= min(LARGEST_TILE, max(train, test))
    assert edge % 8 == 0 or edge == max(train, test)
    if edge > 8:
        assert edge**2 * seconds <= TILE_SECONDS
        assert Tiling(train, test, 1).total_pairs / edge**2 >= workers * TILES_PER_WORKER


def test_slow_pairs_make_small_tiles_and_more_images_larger_ones() -> None:
    assert choose_edge(10_000, 0, 1e-3, workers=1) == 120
    assert choose_edge(10_000, 0, 1e-1, workers=1) == 8
    assert choose_edge(1_000, 0, 1e-6, workers=64) < choose_edge(10_000, 0, 1e-6, workers=64) == 312


def test_short_runs_have_more_tiles_but_none_below_a_second_or_too_many_for_the_driver() -> None:
    assert choose_edge(1_000, 200, 3.5e-4, workers=2) == 72  # 64 tiles per worker, of 1.8 s
    assert choose_edge(1_000, 200, 3.5e-4, workers=16) == 48  # of a second
    assert choose_edge(1_000, 200, 5e-5, workers=16) == 72  # 8 tiles per worker, of a quarter of it
    assert choose_edge(10_000, 0, 2e-4, workers=512) == 96  # of 2 s, so that the driver hands out 256 a second


def test_the_predicted_time_is_shared_among_the_workers() -> None:
    plan = Plan(Tiling(4, 0, 2), {Pass(("C1",), ("ntk",)): 0.5}, 3, 10, 2, "float32", 5, 5, 5.0, 0, 0, 0)
    assert plan.seconds == 1.0


@pytest.mark.parametrize(("dtype", "groups"), [("float32", ["C1", "C4"]), ("float64", ["C2"])])
def test_the_predicted_bytes_of_the_matrices_are_those_of_a_finished_store(
    job: Callable[..., JobSpec],
    create: Callable[[JobSpec], GramStore],
    compute: Callable[..., None],
    dtype: str,
    groups: list[str],
) -> None:
    store = create(job(gram={"groups": groups, "dtype": dtype}))
    compute(store)
    tiling = store.info.tiling
    itemsize = {"float32": 4, "float64": 8}[dtype]

    def stored(*parts: str) -> int:
        files = [file for part in parts for file in Path(store.url, part).rglob("c/**/*") if file.is_file()]
        return sum(file.stat().st_size for file in files)

    assert stored("gram", "cross") == matrix_bytes(tiling, 2 * len(groups), itemsize)
    assert 0 < stored("images") <= image_bytes(tiling, values=8 * 8)


def test_more_of_anything_takes_more_memory() -> None:
    least = {"edge": 8, "image": 100, "pixels": 50, "cached_blocks": 1, "elements": 1, "groups": 1, "itemsize": 4}
    for name in least:
        assert worker_bytes(**{**least, name: 2 * least[name]}) > worker_bytes(**least)
