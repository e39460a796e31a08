"""What a person sees: bars on a terminal, few plain lines elsewhere, and tables that fit 80 columns."""

import dataclasses
import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from equigram.events import Note, Progress
from equigram.plan import Tile, Tiling
from equigram.screen import Screen, comparison, duration, results_table, tile_map, warnings
from equigram.solve.stage import Result


class Clock:
    """A clock that stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A screen, its clock, and what is to be seen on it."""

    def __init__(self, *, terminal: bool, width: int = 80) -> None:
        self.clock = Clock()
        self._file = io.StringIO()
        self.console = Console(
            file=self._file, force_terminal=terminal, width=width, color_system=None, legacy_windows=False, _environ={}
        )
        self.screen = Screen(self.console, self.clock)

    def after(self, seconds: float, what: str, done: int, total: int) -> None:
        self.clock.now += seconds
        self.screen(Progress(what, done, total))

    @property
    def raw(self) -> str:
        return self._file.getvalue()

    @property
    def lines(self) -> list[str]:
        return self.raw.splitlines()

    @property
    def bars(self) -> list[str]:
        """The bars as they were drawn last."""
        visible = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw).replace("\r", "\n")
        last: dict[str, str] = {}
        for line in visible.splitlines():
            if "%" in line:
                last[line[:24].strip()] = line.rstrip()
        return list(last.values())


@pytest.fixture
def log() -> Iterator[Watched]:
    watched = Watched(terminal=False)
    with watched.screen:
        yield watched


def on_a_terminal(*reports: tuple[float, str, int, int]) -> list[str]:
    watched = Watched(terminal=True)
    with watched.screen:
        for report in reports:
            watched.after(*report)
    assert all(len(line) <= 80 for line in watched.bars)
    return watched.bars


# -------------------------------------------------------------------------------------------------------- terminal


def test_a_bar_names_the_stage_its_speed_and_the_time_left() -> None:
    (bar,) = on_a_terminal((0, "pairs", 0, 28_880), (10, "pairs", 14_440, 28_880))
    assert bar.startswith("computing image pairs ")
    assert bar.endswith(" 50% 1,444 pairs/s, 10 s left")


def test_a_finished_bar_says_how_long_it_took_and_does_not_change_any_more() -> None:
    later = (500, "solve", 1, 2)
    (first, _) = on_a_terminal((0, "pairs", 0, 100), (20, "pairs", 100, 100), later)
    assert first.endswith(" 100% 5 pairs/s, took 20 s")


def test_what_was_done_before_does_not_count_for_the_speed() -> None:
    (bar,) = on_a_terminal((0, "pairs", 900, 1000), (10, "pairs", 950, 1000))
    assert bar.endswith(" 95% 5 pairs/s, 10 s left")


def test_the_time_left_goes_down_between_two_reports() -> None:
    watched = Watched(terminal=True)
    with watched.screen:
        watched.after(0, "pairs", 0, 100)
        watched.after(10, "pairs", 10, 100)
        watched.clock.now += 30
    assert watched.bars[0].endswith(" 10% 1 pairs/s, 60 s left")


def test_a_stage_that_is_done_again_has_a_bar_of_its_own() -> None:
    watched = Watched(terminal=True)
    with watched.screen:
        for seconds, done in ((0, 0), (10, 100), (0, 100), (5, 90), (5, 100)):
            watched.after(seconds, "pairs", done, 100)
    assert "10 pairs/s, took 10 s" in watched.raw
    assert "2 pairs/s, took 5.0 s" in watched.raw


def test_the_longest_stage_fits_80_columns() -> None:
    (bar,) = on_a_terminal((0, "checking training images", 0, 10**8), (1, "checking training images", 10**6, 10**8))
    assert "1,000,000 images/s" in bar


# ------------------------------------------------------------------------------------------------ not a terminal


def test_without_a_terminal_there_are_no_control_characters(log: Watched) -> None:
    log.screen(Note("the kernels are compiled"))
    for done in range(0, 101, 10):
        log.after(20, "pairs", done, 100)
    assert re.fullmatch(r"[\x20-\x7e\n]+", log.raw)


def test_without_a_terminal_there_is_a_line_now_and_then_and_at_the_end(log: Watched) -> None:
    for done in range(1001):
        log.after(0.125, "pairs", done, 1000)
    assert log.lines == [
        "computing image pairs: 240 of 1,000 (24%), 8 pairs/s, 95 s left",
        "computing image pairs: 480 of 1,000 (48%), 8 pairs/s, 65 s left",
        "computing image pairs: 720 of 1,000 (72%), 8 pairs/s, 35 s left",
        "computing image pairs: 960 of 1,000 (96%), 8 pairs/s, 5.0 s left",
        "computing image pairs: 1,000 of 1,000, 8 pairs/s, took 2 min",
    ]


def test_a_stage_that_took_no_time_is_not_worth_a_line(log: Watched) -> None:
    log.after(0, "reading training images", 1, 160)
    log.after(0.5, "reading training images", 160, 160)
    assert log.raw == ""


def test_the_end_of_a_stage_is_told_once(log: Watched) -> None:
    for done in (0, 10, 10, 10):
        log.after(5, "solve", done, 10)
    assert log.lines == ["solving regressions: 10 of 10, 2 regressions/s, took 5.0 s"]


def test_the_end_of_a_long_stage_is_told_even_right_after_a_line(log: Watched) -> None:
    for seconds, done in ((0, 0), (31, 9), (0.25, 10)):
        log.after(seconds, "solve", done, 10)
    assert [line.split(",")[0] for line in log.lines] == [
        "solving regressions: 9 of 10 (90%)",
        "solving regressions: 10 of 10",
    ]


def test_a_stage_that_stands_still_has_no_speed(log: Watched) -> None:
    log.after(0, "pairs", 0, 10)
    log.after(60, "pairs", 0, 10)
    assert log.lines == ["computing image pairs: 0 of 10 (0%)"]


def test_a_note_is_one_line_and_told_once(log: Watched) -> None:
    log.screen(Note("long " * 40 + "note"))
    log.screen(Note("long " * 40 + "note"))
    log.screen(Note("other"))
    assert log.lines == ["note: " + "long " * 40 + "note", "note: other"]


def test_a_note_may_hold_what_looks_like_markup(log: Watched) -> None:
    log.screen(Note("runs/[red]a[/]:smile:"))
    assert log.lines == ["note: runs/[red]a[/]:smile:"]


def test_a_terminal_that_cannot_draw_gets_lines() -> None:
    watched = Watched(terminal=True)
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with Screen(dumb, watched.clock) as screen:
        screen(Progress("pairs", 0, 10))
        watched.clock.now += 5
        screen(Progress("pairs", 10, 10))
    assert dumb.file.getvalue() == "computing image pairs: 10 of 10, 2 pairs/s, took 5.0 s\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (0.26, "0.3 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (100, "100 s"),
        (119.6, "2 min"),
        (3600, "60 min"),
        (7200, "2.0 h"),
        (47 * 3600, "47.0 h"),
        (72 * 3600, "3.0 days"),
    ],
)
def test_a_time_is_told_in_the_unit_that_fits(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# ---------------------------------------------------------------------------------------------------------- tables


def result(group: str = "C1", kernel: str = "ntk", **fields: Any) -> Result:
    values: dict[str, Any] = {
        "train_size": None, "images": 160, "ridge": 1e-4, "accuracy": 0.9, "mean_squared_error": 0.05,
        "residual": 1e-12, "condition": 1e6, "warning": None, "chosen": True,
    }  # fmt: skip
    return Result(group=group, kernel=kernel, **{**values, **fields})


def shown(table: Any) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=80, markup=False, highlight=False).print(table)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert "…" not in file.getvalue()
    return [line for line in lines if line]


def words(line: str) -> list[str]:
    return line.split()


def test_results_have_a_row_for_each_network_kernel_and_ridge() -> None:
    rows = shown(results_table([result(), result("C4", ridge=0.01, accuracy=0.95, condition=1.2e16, warning="ill")]))
    assert words(rows[0]) == ["group", "kernel", "ridge", "accuracy", "95%", "mse", "resid.", "cond."]
    assert words(rows[2]) == ["C1", "ntk", "0.0001", "0.900", "0.0500", "1e-12", "1e+06"]
    assert words(rows[3]) == ["C4", "ntk", "0.01", "0.950", "0.0500", "1e-12", "1e+16", "*"]


def test_the_chosen_ridge_is_marked_and_why_is_shown() -> None:
    results = [
        result(left_out_error=0.25, accuracy_interval=(0.875, 0.925), chosen=False),
        result(ridge=0.01, left_out_error=0.125, accuracy_interval=(0.87, 0.93)),
    ]
    rows = shown(results_table(results))
    assert words(rows[0]) == ["left", "out"]
    assert words(rows[2 + 1])[2:7] == ["0.0001", "0.900", ".88-.93", "0.0500", "0.250"]
    assert words(rows[3 + 1])[2:8] == ["0.01", "<", "0.900", ".87-.93", "0.0500", "0.125"]


def test_the_widest_results_fit_80_columns() -> None:
    fields: dict[str, Any] = {"mean_squared_error": 1.2345e-5, "left_out_error": 1.2345e-5, "warning": "ill"}
    wide = result("C4", "nngp", images=100_000, ridge=1.25e-6, accuracy_interval=(0.88, 0.91), **fields)
    assert max(map(len, shown(results_table([wide, dataclasses.replace(wide, chosen=False)])))) <= 80


def test_columns_without_a_value_are_left_out() -> None:
    regression = [result(accuracy=None), result(accuracy=None, mean_squared_error=0.1234)]
    assert "accuracy" not in shown(results_table(regression))[0]
    unlabelled = [result(accuracy=None, mean_squared_error=None)]
    assert words(shown(results_table(unlabelled))[0]) == [
        "group", "kernel", "ridge", "resid.", "cond.",
    ]  # fmt: skip


def test_a_ridge_without_a_solution_has_dashes() -> None:
    failed = result(ridge=0, accuracy=None, mean_squared_error=None, residual=None, condition=None, warning="not p. d.")
    rows = shown(results_table([failed, result()]))
    assert words(rows[2]) == ["C1", "ntk", "0", "-", "-", "-", "-", "*"]


def test_the_results_of_smaller_training_sets_are_in_the_comparison_only() -> None:
    results = [result(train_size=4, images=20), result()]
    assert len(shown(results_table(results))) == 3


def test_the_comparison_says_which_network_did_better_at_which_size() -> None:
    results = [
        result("C1", accuracy=0.79, train_size=4, images=20), result("C1", accuracy=0.9),
        result("C4", accuracy=0.84, train_size=4, images=20), result("C4", accuracy=0.9),
        result("C1", "nngp", accuracy=0.8, train_size=4, images=20), result("C1", "nngp", accuracy=0.9),
        result("C4", "nngp", accuracy=0.7, train_size=4, images=20), result("C4", "nngp", accuracy=0.91),
        result("C1", accuracy=0.1, ridge=0.5, chosen=False),
    ]  # fmt: skip
    table = shown(comparison(results))
    assert table[0] == "which network did better: test accuracy, ridge 0.0001"
    assert words(table[1]) == ["training", "per", "ntk", "ntk", "nngp", "nngp"]
    assert words(table[2]) == ["images", "class", "C1", "C4", "better", "C1", "C4", "better"]
    assert words(table[4]) == ["20", "4", "0.790", "0.840", "C4", "0.800", "0.700", "C1"]
    assert words(table[5]) == ["160", "all", "0.900", "0.900", "equal", "0.900", "0.910", "C4"]


def test_in_regression_the_smaller_error_is_better() -> None:
    results = [
        result(group, accuracy=None, mean_squared_error=error, train_size=size, images=size or 160)
        for group, size, error in (("C1", 10, 0.5), ("C1", None, 0.2), ("C4", 10, 0.4), ("C4", None, 0.3))
    ]
    table = shown(comparison(results))
    assert table[0] == "which network did better: test mean squared error, ridge 0.0001"
    assert [words(row) for row in table[4:]] == [
        ["10", "0.5000", "0.4000", "C4"],
        ["160", "0.2000", "0.3000", "C1"],
    ]


def test_three_groups_and_two_kernels_fit_80_columns() -> None:
    results = [
        result(group, kernel, train_size=size, images=100_000 if size is None else 9 * size, accuracy=accuracy)
        for group, accuracy in (("C1", 0.8), ("C2", 0.9), ("C4", 0.9))
        for kernel in ("nngp", "ntk")
        for size in (1000, None)
    ]
    table = shown(comparison(results))
    assert max(map(len, table)) <= 80
    assert words(table[4])[-4:] == ["0.900", "0.900", "C2", "C4"]


def test_a_single_network_is_not_compared() -> None:
    table = shown(comparison([result(train_size=4, images=20), result()]))
    assert table[0] == "test accuracy, ridge 0.0001"
    assert not any("better" in row for row in table)


def test_each_network_is_compared_with_the_ridge_that_was_chosen_for_it() -> None:
    small = result(train_size=4, images=20, ridge=0.1)
    assert shown(comparison([small, result()]))[0] == "test accuracy, the chosen ridge each"


def test_without_training_sizes_or_scores_there_is_no_comparison() -> None:
    assert comparison([result("C1"), result("C4")]) is None
    unscored: dict[str, Any] = {"accuracy": None, "mean_squared_error": None}
    assert comparison([result(**unscored), result(train_size=4, images=20, **unscored)]) is None


def test_a_size_without_a_solution_has_a_dash() -> None:
    failed = result("C1", train_size=4, images=20, accuracy=None, mean_squared_error=None, condition=None, warning="x")
    table = shown(comparison([failed, result("C1"), result("C4", train_size=4, images=20), result("C4")]))
    assert words(table[4])[-3:] == ["-", "0.900", "C4"]


def test_warnings_of_one_kind_are_one_sentence() -> None:
    ill: dict[str, Any] = {"condition": 1e12, "warning": "with ridge … the condition number …"}
    results = [
        result("C1", **ill),
        result("C1", train_size=4, **ill),
        result("C4", **ill),
        result("C4", ridge=0, **ill),
    ]
    assert list(warnings(results, "float32")) == [
        "* ill-conditioned in float32: C1 ntk, C4 ntk with ridge 0.0001; C4 ntk with ridge 0; compare a larger ridge "
        "or gram.dtype: float64"
    ]
    assert list(warnings(results[:1], "float64")) == [
        "* ill-conditioned in float64: C1 ntk with ridge 0.0001; compare a larger ridge"
    ]


def test_what_has_no_solution_is_named_with_the_reason_of_the_first() -> None:
    failed: dict[str, Any] = {"condition": None, "ridge": 0.0}
    results = [result(warning="not positive definite", **failed), result("C4", warning="neither", **failed)]
    assert list(warnings(results, "float32")) == [
        "* no solution for C1 ntk, C4 ntk with ridge 0: not positive definite"
    ]


def test_good_results_have_no_warnings() -> None:
    assert list(warnings([result()], "float32")) == []


# ------------------------------------------------------------------------------------------------------------- map


def test_the_map_shows_the_upper_triangle_of_the_train_matrix() -> None:
    done = {Tile("gram", 0, 0), Tile("gram", 0, 2), Tile("gram", 1, 1), Tile("cross", 0, 1)}
    assert tile_map(Tiling(train=5, test=3, edge=2), done, "gram").splitlines() == ["#.#", " #.", "  ."]


def test_the_map_shows_the_whole_test_matrix() -> None:
    done = {Tile("gram", 0, 0), Tile("cross", 0, 1), Tile("cross", 1, 0)}
    assert tile_map(Tiling(train=5, test=3, edge=2), done, "cross").splitlines() == [".#.", "#.."]


def test_the_map_of_many_tiles_has_cells_of_several() -> None:
    tiling = Tiling(train=192, test=10, edge=2)  # 96 x 96 blocks, cells of 2 x 2
    assert set(tile_map(tiling, set(), "gram")) == {".", " ", "\n"}
    assert set(tile_map(tiling, set(tiling.tiles()), "gram")) == {"#", " ", "\n"}
    rows = tile_map(tiling, {Tile("gram", 0, 0), Tile("gram", 0, 1), Tile("gram", 1, 1)}, "gram").splitlines()
    assert (len(rows), len(rows[0]), rows[0][:2]) == (48, 48, "#.")
    assert tile_map(tiling, {Tile("gram", 0, 1)}, "gram")[0] == "+"
