"""A run that grows: new images, old bits, and nothing computed that is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import equigram.store
from equigram.errors import DataError, SpecError, StoreMismatchError
from equigram.events import Event, TileFinished, nobody
from equigram.plan import Tile, Tiling
from equigram.run import extend, extend_matrices, finish, run
from equigram.spec import JobSpec, KernelName
from equigram.store import GramStore
from equigram.verify import verify
from equikernel import ImageError

Job = Callable[..., JobSpec]


def pixels(count: int, seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4)).astype(np.uint8)


TRAIN, TEST, MORE = pixels(10, 0), pixels(5, 1), pixels(7, 2)
"""With tiles of 4 images, the last blocks of both splits are partial, before and after."""


@pytest.fixture
def spec(job: Job, tmp_path: Path) -> JobSpec:
    np.savez(tmp_path / "first.npz", x_train=TRAIN, y_train=np.arange(10) % 3, x_test=TEST, y_test=np.arange(5) % 3)
    np.savez(tmp_path / "more.npz", x=MORE, y=np.arange(7) % 3)
    gram = {"groups": ["C1", "C4"], "tile": 4, "engine": "reference"}
    return job(data={"train": tmp_path / "first.npz"}, network={"depth": 1}, gram=gram)


def computed(events: list[Event]) -> set[Tile]:
    return {event.tile for event in events if isinstance(event, TileFinished)}


def grow(store: GramStore, split: Any, data: Path) -> set[Tile]:
    """Extend a run; the tiles that were computed."""
    events: list[Event] = []
    extend(store, store.info.spec, split, str(data), None, events.append)
    finish(store, store.info.spec, events.append)
    return computed(events)


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_more_training_images_are_treated_alike_and_only_their_tiles_are_computed(
    place: str, spec: JobSpec, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if place == "bucket":
        gram = spec.gram.model_copy(update={"groups": ("C4",), "kernels": ("ntk",)})
        spec = spec.model_copy(update={"store": f"{request.getfixturevalue('bucket')}/run", "gram": gram})
    store = run(spec).store
    before = {(part, *names): store.matrix(part, *names) for part in store.parts for names in store.matrices}
    old = set(store.info.tiling.tiles()) - set(store.info.tiling.partial("train"))
    tiles = grow(store, "train", tmp_path / "more.npz")
    info = GramStore.open(store.url).info
    assert (info.train, info.test) == (17, 5)
    assert tiles == set(info.tiling.tiles()) - old
    images = store.images("train")
    names = store.names("train")
    order = [int(name.removeprefix("x_train[")[:-1]) for name in names[:10]]
    assert names[10:] == [f"x[{index}]" for index in range(7)]
    scaled = np.concatenate([TRAIN[order], MORE])[..., None] / 255
    mean, std = scaled[:10].mean(), scaled[:10].std()
    np.testing.assert_allclose(images, (scaled - mean) / std, rtol=1e-5, atol=1e-6)
    assert_array_equal(store.labels("train"), np.concatenate([np.array(order) % 3, np.arange(7) % 3]))
    for (part, group, kernel), values in before.items():
        grown = store.matrix(part, group, kernel)
        assert_array_equal(grown[: len(values), : values.shape[1]], values)
        network = spec.network_for(group)
        rows = store.images("test" if part == "cross" else "train")
        exact = network.kernel(rows, None if part == "gram" else images, engine="reference")
        assert_array_equal(grown, getattr(exact, kernel).astype(np.float32))
    assert store.solution("C4", "ntk")[0]["coefficients"].shape[1] == 17
    assert verify(GramStore.open(store.url), nobody, samples=4).findings == ()
    assert run(spec).results


def test_more_test_images(spec: JobSpec, tmp_path: Path) -> None:
    store = run(spec).store
    tiles = grow(store, "test", tmp_path / "more.npz")
    assert (store.info.train, store.info.test) == (10, 12)
    assert {tile.part for tile in tiles} == {"cross"}
    assert len(tiles) == 2 * 3
    assert verify(GramStore.open(store.url), nobody, samples=4).findings == ()


def test_the_first_test_images(tmp_path: Path, spec: JobSpec) -> None:
    np.savez(tmp_path / "alone.npz", x_train=TRAIN, y_train=np.arange(10) % 3)
    store = run(
        spec.model_copy(update={"data": spec.data.model_copy(update={"train": str(tmp_path / "alone.npz")})})
    ).store
    assert store.info.test == 0
    grow(store, "test", tmp_path / "more.npz")
    assert store.info.test == 7
    assert store.solution("C1", "nngp")[0]["predictions"].shape[1] == 7


def test_what_was_added_is_not_added_again(spec: JobSpec, tmp_path: Path) -> None:
    store = run(spec).store
    grow(store, "train", tmp_path / "more.npz")
    (tmp_path / "copy.npz").write_bytes((tmp_path / "more.npz").read_bytes())
    for name in ("more", "copy"):
        with pytest.raises(StoreMismatchError, match=rf"{name}.npz was added to .* before; `equigram run` computes wh"):
            grow(GramStore.open(store.url), "train", tmp_path / f"{name}.npz")


def test_an_image_without_kernel_is_refused_before_it_is_added(spec: JobSpec, tmp_path: Path) -> None:
    images = MORE.astype(np.float32)
    np.savez(tmp_path / "plain.npz", x_train=TRAIN.astype(np.float32), y_train=np.arange(10) % 3)
    spec = spec.model_copy(
        update={"data": spec.data.model_copy(update={"train": str(tmp_path / "plain.npz"), "normalize": "none"})}
    )
    store = run(spec).store
    images[2, 1, 1] = 1e30
    np.savez(tmp_path / "huge.npz", x=images, y=np.arange(7) % 3)
    with pytest.raises(ImageError, match=r"training image 2 .x\[2\].: the largest pixel .* is 1e.30.*; nothing was st"):
        grow(store, "train", tmp_path / "huge.npz")
    assert GramStore.open(store.url).info.train == 10
    assert verify(store, nobody, samples=1).findings == ()


def chunks(store: GramStore) -> dict[Path, tuple[int, bytes]]:
    """When each chunk of the matrices was written, and what it holds."""
    paths = Path(store.url).glob("[gc]r*/*/*/c/*/*")
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_more_groups_and_kernels_leave_what_is_there(spec: JobSpec) -> None:
    lesser = spec.gram.model_copy(update={"groups": ("C4",), "kernels": ("ntk",)})
    store = run(spec.model_copy(update={"gram": lesser})).store
    before, events = chunks(store), list[Event]()
    larger = extend_matrices(store, store.info.spec, ["D4", "C3"], ["nngp"])
    finish(store, larger, events.append)
    info = GramStore.open(store.url).info
    assert [(one.groups, one.kernels) for one in info.passes] == [
        (("C4",), ("ntk",)), (("C4",), ("nngp",)), (("D4",), ("ntk", "nngp")), (("C3",), ("ntk", "nngp")),
    ]  # fmt: skip
    assert before.items() <= chunks(store).items()
    assert len([event for event in events if isinstance(event, TileFinished)]) == 3 * len(info.tiling)
    images = store.images("train")
    for group, kernel in info.spec.gram.matrices:
        exact = getattr(spec.network_for(group).kernel(images, engine="reference"), kernel)
        assert_array_equal(store.matrix("gram", group, kernel), exact.astype(np.float32))
        assert store.has_solution(group, kernel)
    report = verify(GramStore.open(store.url), nobody, samples=2)
    assert (report.findings, report.missing, report.anew) == ((), 0, 8)
    assert report.chunks == 6 * (9 + 6)
    assert run(info.spec).results
    assert len(grow(store, "train", Path(spec.data.train).with_name("more.npz"))) > 0
    assert verify(GramStore.open(store.url), nobody, samples=1).findings == ()


@pytest.mark.parametrize(
    ("groups", "kernels", "words"),
    [
        (["C4"], [], "has C4 already; `equigram run` computes what is missing"),
        ([], ["ntk"], "has ntk already"),
        (["D4", "D4"], [], "gram.groups: 'D4' is named twice"),
        (["E8"], [], "gram.groups.*'E8' is not allowed"),
        ([], ["gp"], "gram.kernels.*'gp' is not allowed"),
    ],
)
def test_groups_and_kernels_that_are_there_or_do_not_exist_are_refused(
    groups: list[str], kernels: list[KernelName], words: str, spec: JobSpec, create: Callable[[JobSpec], GramStore]
) -> None:
    store = create(spec)
    before = store.info
    with pytest.raises(SpecError, match=words):
        extend_matrices(store, spec, groups, kernels)
    assert GramStore.open(store.url).info == before


def test_additions_of_two_processes_are_both_kept(spec: JobSpec, tmp_path: Path) -> None:
    np.savez(tmp_path / "third.npz", x=pixels(5, 9), y=np.arange(5) % 3)
    first, second = (GramStore.open(run(spec).store.url) for _ in range(2))
    for store in (first, second):  # both have read what there is before either adds to it
        assert len(np.asarray(store.labels("train"))) == len(store.names("train")) == 10
    extend(first, spec, "train", str(tmp_path / "more.npz"), None, nobody)
    extend(second, spec, "train", str(tmp_path / "third.npz"), None, nobody)
    first, second = GramStore.open(spec.store), GramStore.open(spec.store)
    assert first.info == second.info
    extend_matrices(first, spec, ["D4"], [])
    second.add_matrices(["C2"], [])
    with pytest.raises(StoreMismatchError, match="has D4 already"):
        second.add_matrices(["D4"], [])
    store = GramStore.open(spec.store)
    assert store.info.spec.gram.groups == ("C1", "C4", "D4", "C2")
    assert len(np.asarray(store.labels("train"))) == len(store.names("train")) == 22
    first.remember(spec)  # read before D4 and C2 came
    assert GramStore.open(spec.store).info.spec.gram.groups == ("C1", "C4", "D4", "C2")
    finish(store, store.info.spec, nobody)
    assert verify(GramStore.open(spec.store), nobody, samples=2).findings == ()


@pytest.mark.parametrize("step", range(3))
def test_an_extension_that_dies_between_making_room_and_filling_it_leaves_the_run(
    step: int, spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = run(spec).store
    append, calls = equigram.store._append, list[int]()

    def die(array: Any, count: int, values: Any) -> None:
        calls.append(count)
        if len(calls) == step + 1:
            array.resize((count + len(values), *array.shape[1:]))
            raise KeyboardInterrupt
        append(array, count, values)

    with monkeypatch.context() as patch:
        patch.setattr(equigram.store, "_append", die)
        with pytest.raises(KeyboardInterrupt):
            grow(store, "train", tmp_path / "more.npz")
    report = verify(GramStore.open(store.url), nobody, samples=1)
    assert report.findings == ()
    assert len(GramStore.open(store.url).names("train")) == 10
    grow(GramStore.open(store.url), "train", tmp_path / "more.npz")
    assert verify(GramStore.open(store.url), nobody, samples=1).findings == ()


def test_an_interrupted_addition_of_a_group_leaves_the_run(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    store = run(spec).store

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GramStore, "_change", die)
        with pytest.raises(KeyboardInterrupt):
            extend_matrices(store, spec, ["D4"], [])
    assert GramStore.open(store.url).info.spec.gram.groups == ("C1", "C4")
    assert run(spec).results
    finish(store, extend_matrices(store, spec, ["D4"], []), nobody)
    assert store.has_solution("D4", "ntk")


def test_images_that_do_not_fit_are_refused_and_change_nothing(spec: JobSpec, tmp_path: Path) -> None:
    store = run(spec).store
    np.savez(tmp_path / "bare.npz", x=MORE)
    np.savez(tmp_path / "large.npz", x=np.zeros((3, 5, 5), np.uint8), y=np.zeros(3, int))
    np.savez(tmp_path / "new.npz", x=MORE, y=np.full(7, 9))
    before = {path: path.stat().st_mtime_ns for path in Path(store.url).rglob("*")}
    for name, words in (
        ("bare", "the added images of .* have no labels, and the train images in .* have some"),
        ("large", "5"),
        ("new", "the added images of .* are of the classes '9', which the training images of the store do not have"),
    ):
        with pytest.raises(DataError, match=words):
            grow(store, "train", tmp_path / f"{name}.npz")
    assert {path: path.stat().st_mtime_ns for path in Path(store.url).rglob("*")} == before


def test_an_interrupted_extension_leaves_the_run_and_can_be_done_again(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = run(spec).store
    gram = store.matrix("gram", "C4", "ntk")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GramStore, "_change", die)
        with pytest.raises(KeyboardInterrupt):
            grow(store, "train", tmp_path / "more.npz")
    again = GramStore.open(store.url)
    assert again.info.train == 10
    assert len(again.images("train")) == len(again.names("train")) == 10
    assert run(spec).results
    assert verify(again, nobody, samples=4).findings == ()
    assert_array_equal(GramStore.open(store.url).matrix("gram", "C4", "ntk"), gram)
    grow(GramStore.open(store.url), "train", tmp_path / "more.npz")
    assert verify(GramStore.open(store.url), nobody, samples=4).findings == ()


@pytest.mark.parametrize(("train", "test"), [(8, 4), (9, 5), (1, 0)])
def test_partial_tiles_are_those_of_a_last_block_that_is_not_full(train: int, test: int) -> None:
    tiling = Tiling(train, test, edge=4)
    for split, count in (("train", train), ("test", test)):
        partial = set(tiling.partial(split))  # type: ignore[arg-type]
        short = {
            tile
            for tile in tiling.tiles()
            for side, images in (
                ("test" if tile.part == "cross" else "train", tiling.rows(tile)),
                ("train", tiling.cols(tile)),
            )
            if side == split and len(images) < 4
        }
        assert partial == short
        assert bool(partial) == bool(count % 4)
