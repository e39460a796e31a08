"""A run from job to predictions: what it refuses before anything starts, what it goes on from, what it repairs."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import equigram.dispatch
import equigram.run
import equikernel.worker
from equigram.data import survey
from equigram.driver import TileActor
from equigram.errors import (
    ClusterError,
    DamagedTileError,
    DataError,
    IncompleteRunError,
    ResourceError,
    SpecError,
    StoreError,
    StoreMismatchError,
    TileFailedError,
)
from equigram.events import ComputationStarted, Event, Note, Progress, TileFinished, nobody
from equigram.plan import Tile, tile_of
from equigram.run import look_at_images, make_plan, predict, run, stored_survey
from equigram.spec import JobSpec
from equigram.store import GramStore, versions
from equikernel import ImageError, NetworkError
from equikernel.kernel import available_cores
from equikernel.worker import processor_kind

Job = Callable[..., JobSpec]
Create = Callable[[JobSpec], GramStore]
Compute = Callable[..., None]


class Listening:
    """A listener that remembers."""

    def __init__(self, on_progress: Callable[[str, int], None] = lambda what, done: None) -> None:
        self.events: list[Event] = []
        self.notes: list[str] = []
        self.last: dict[str, tuple[int, int]] = {}
        self.on_progress = on_progress

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Note):
            self.notes.append(event.text)
        elif isinstance(event, Progress):
            self.last[event.what] = (event.done, event.total)
            self.on_progress(event.what, event.done)

    def __contains__(self, words: str) -> bool:
        return any(words in note for note in self.notes)


@pytest.fixture
def simple(job: Job) -> Job:
    """Makes jobs whose workers have nothing to compile."""

    def make(*store: object, **sections: Any) -> JobSpec:
        gram = {"groups": ["C1"], "tile": 4, "engine": "reference"} | sections.pop("gram", {})
        return job(*store, data={"size": 4} | sections.pop("data", {}), gram=gram, **sections)

    return make


@pytest.fixture
def begun(simple: Job, create: Create, compute: Compute) -> GramStore:
    """A store of ``simple`` in which the first tile is done."""
    store = create(simple())
    compute(store, [Tile("gram", 0, 0)])
    return store


@pytest.fixture
def finished(simple: Job, create: Create, compute: Compute) -> GramStore:
    """A store of ``simple`` in which all tiles are done."""
    store = create(simple())
    compute(store)
    return store


def chunks(store: GramStore) -> dict[Path, tuple[int, int]]:
    """The chunks of the matrices, with what changes when they are written."""
    files = [path for part in ("gram", "cross") for path in Path(store.url, part).rglob("c/*/*")]
    whole = [path for path in files if path.suffix != ".partial"]  # left by a writer that died or found no room
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in whole}


def tile_of_chunk(chunk: Path) -> Tile:
    """The tile that a chunk of a matrix belongs to."""
    part, *_, row, col = chunk.parts[-6:]
    return tile_of("gram" if part == "gram" else "cross", int(row), int(col))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


# From images to predictions


def test_class_folders_become_predictions(cluster: None, job: Job, class_folders: Path) -> None:
    listener = Listening()
    spec = job(
        data={"train": class_folders, "test_fraction": 0.25, "size": 6},
        gram={"groups": ["C1", "C4"], "tile": "auto"},
        resources={"workers": 2},
        solve={"ridge": [1e-2, 1.0], "train_sizes": [1, 3]},
    )
    finished = run(spec, listener)
    info = finished.store.info
    assert (info.train, info.test, info.classes, info.tile) == (9, 3, ("a", "b", "c"), 8)
    assert len(finished.results) == 2 * 2 * 3 * 2
    assert listener.last["pairs"] == (72, 72)
    assert listener.last["solve"] == (12, 12)
    assert set(GramStore.open(spec.store).finished_tiles()) == set(info.tiling.tiles())


def test_a_finished_run_is_solved_again_without_computing_a_tile(finished: GramStore, simple: Job) -> None:
    before = chunks(finished)
    results = run(simple(solve={"ridge": [0.5], "kernels": ["nngp"]})).results
    assert [(r.kernel, r.ridge) for r in results] == [("nngp", 0.5)]
    assert chunks(finished) == before
    assert GramStore.open(finished.url).info.spec.solved_kernels == ("nngp",)


def test_without_a_solver_there_are_matrices_only(simple: Job) -> None:
    done = run(simple(solve=None))
    assert done.results == ()
    assert done.store.matrix("gram", "C1", "ntk").shape == (10, 10)
    with pytest.raises(IncompleteRunError, match="no solution for C1 ntk"):
        predict(done.store, done.store.info.spec.data.train)


def test_a_run_in_object_storage_goes_on_from_a_lost_chunk(cluster: None, simple: Job, bucket: str) -> None:
    spec = simple(f"{bucket}/run", resources={"workers": 1})
    store = run(spec).store
    ntk, files = store.matrix("gram", "C1", "ntk"), fsspec.filesystem("s3")
    lost = f"{spec.store}/gram/C1/ntk/c/2/1"
    files.rm_file(lost)
    listener = Listening()
    run(spec, listener)
    (started,) = [event for event in listener.events if isinstance(event, ComputationStarted)]
    assert (started.tiles, started.missing_tiles, started.missing_pairs) == (12, 1, 8)
    assert files.exists(lost)
    assert_array_equal(GramStore.open(spec.store).matrix("gram", "C1", "ntk"), ntk)


def test_options_of_storage_come_from_the_job_and_are_not_kept(
    simple: Job, bucket: str, object_storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(fsspec.config, "conf", {})
    options = {"s3": {"endpoint_url": object_storage, "key": "name", "secret": "hush-hush"}}
    spec = simple(f"{bucket}/run", storage_options=options)
    assert "hush" not in repr(spec)
    assert run(spec).results
    files = fsspec.filesystem("s3")
    assert "hush" not in files.cat_file(f"{bucket}/run/zarr.json").decode()
    assert all("hush" not in text.decode() for text in files.cat(f"{bucket}/run/history/events/*").values())
    store = GramStore(spec.store)
    TileActor({"s3": {"secret": "other"}}, store, spec.network, ("C1",), "reference", "float64", 1, (4, 4))
    assert fsspec.config.conf["s3"] == {**options["s3"], "secret": "other"}


# What it goes on from


def test_a_store_of_another_job_is_refused(begun: GramStore, simple: Job) -> None:
    before = chunks(begun)
    with pytest.raises(StoreMismatchError, match=r"network\.depth is 2 in the store and 1 in the job"):
        run(simple(network={"depth": 1}))
    assert chunks(begun) == before


def test_changed_images_are_refused(begun: GramStore, simple: Job, npz: Path) -> None:
    arrays = dict(np.load(npz))
    np.savez(npz, **arrays | {"x_train": arrays["x_train"][:-1], "y_train": arrays["y_train"][:-1]})
    with pytest.raises(
        StoreMismatchError,
        match=r"image files of this job have changed since .*run was made on 20.*: data\.train bytes [\d,]+ in the "
        r"store and [\d,]+ now; data\.train names and sizes [0-9a-f]{12} in the store and [0-9a-f]{12} now; .* Restore",
    ):
        run(simple())


def test_images_that_are_gone_are_not_missed(begun: GramStore, simple: Job, npz: Path) -> None:
    npz.unlink()
    listener = Listening()
    assert run(simple(), listener).results
    assert f"the image source {npz} is not there any more; the images in the store are used" in listener


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what is asked of S3 in this process, by operation."""
    import s3fs

    asked: Counter[str] = Counter()
    call = s3fs.S3FileSystem._call_s3

    async def counting(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        asked[method] += 1
        return await call(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counting)
    return asked


def test_a_resume_from_object_storage_asks_for_pages_of_listings_and_not_for_chunks(
    job: Job, create: Create, bucket: str, tmp_path: Path, requests: Counter[str]
) -> None:
    asked = []
    for blocks in (7, 33):
        np.savez(tmp_path / "x.npz", x_train=np.random.default_rng(0).normal(size=(blocks, 2, 2, 1)))
        gram = {"tile": 1, "kernels": ["ntk"], "engine": "reference"}
        data = {"train": tmp_path / "x.npz", "normalize": "none"}
        spec = job(f"{bucket}/{blocks}", data=data, gram=gram, solve=None)
        store = create(spec)
        chunk = bytes(store.chunk_bytes or 0)
        names = [f"{spec.store}/gram/C1/ntk/c/{row}/{col}" for row in range(blocks) for col in range(blocks)]
        fsspec.filesystem("s3").pipe({name: chunk for name in names if not name.endswith("/c/3/5")})
        requests.clear()
        events: list[Event] = []
        run(spec, events.append)
        assert [event.tile for event in events if isinstance(event, TileFinished)] == [Tile("gram", 3, 5)]
        asked.append(Counter(requests))
    few, many = asked
    pages = -(-(33**2 - 1) // 1000)
    assert many - few == Counter(list_objects_v2=pages - 1)
    assert few.total() < 60, few


def test_another_kind_of_processor_is_told(begun: GramStore, simple: Job) -> None:
    begun.remember_worker("abacus")
    listener = Listening()
    run(simple(), listener)
    words = f"tiles come from different processors, abacus, {processor_kind()}: float32 values agree to 5e-6, and"
    assert words in listener


def test_another_version_is_told(begun: GramStore, simple: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    now = {**versions(), "llvmlite": "0.1"}
    monkeypatch.setattr(equigram.run, "versions", lambda packages: now)
    listener = Listening()
    run(simple(), listener)
    warning = f"the store was begun with llvmlite {versions()['llvmlite']}, now 0.1"
    assert f"{warning}: float32 values agree to 5e-6" in listener


def test_all_damaged_tiles_are_computed_again_at_once(finished: GramStore, simple: Job) -> None:
    ntk = finished.matrix("gram", "C1", "ntk")
    flip_a_byte(Path(finished.url, "gram/C1/ntk/c/2/0"))
    flip_a_byte(Path(finished.url, "cross/C1/nngp/c/1/1"))
    before = chunks(finished)
    listener = Listening()
    assert run(simple(), listener).results
    assert "damaged in the store and computed again: tiles cross[1, 1], gram[0, 2]" in listener
    assert_array_equal(finished.matrix("gram", "C1", "ntk"), ntk)
    written = {path for path, mark in chunks(finished).items() if mark != before[path]}
    assert len(written) == 2 * 2 + 2


def test_damage_that_comes_back_is_an_error(
    finished: GramStore, simple: Job, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_bad_disk(store: GramStore, *_: Any) -> None:
        compute(store, store.info.tiling.missing(store.finished_tiles()))
        flip_a_byte(Path(store.url, "gram/C1/ntk/c/1/1"))

    monkeypatch.setattr(equigram.run, "compute_tiles", on_a_bad_disk)
    with pytest.raises(DamagedTileError, match=r"tile gram\[1, 1\]"):
        run(simple())


# What it refuses before anything starts


def refuses(spec: JobSpec, error: type[Exception], words: str) -> None:
    """A run ends with an error, and leaves nothing where its store would be."""
    with pytest.raises(error, match=words):
        run(spec)
    assert not Path(spec.store).exists()


def test_images_without_labels_are_refused_before_a_tile_is_computed(simple: Job, tmp_path: Path) -> None:
    np.save(tmp_path / "bare.npy", np.ones((4, 4, 4), np.uint8))
    refuses(simple(data={"train": tmp_path / "bare.npy"}), DataError, "no labels, so there is nothing to predict")


def test_a_network_that_does_not_fit_the_images_is_refused(simple: Job) -> None:
    refuses(simple(network={"padding": "VALID"}), NetworkError, "VALID padding eats the image")


def test_a_cluster_where_nobody_answers_is_refused(simple: Job) -> None:
    refuses(
        simple(resources={"workers": 1, "address": "127.0.0.1:1"}),
        ClusterError,
        "no Ray cluster answers at .*127.0.0.1:1",
    )


def test_matrices_that_do_not_fit_in_memory_are_refused_with_both_numbers(
    simple: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = r"solving with 10 training images needs 48\.0 MiB of memory with method 'direct', and 10\.2 MiB may be used"
    refuses(simple(solve={"method": "direct", "memory": 0.01}), ResourceError, words)


def test_a_worker_that_does_not_fit_in_memory_is_refused_with_both_numbers(
    simple: Job, begun: GramStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(equigram.run, "available_memory", lambda: 200 * 2**20)
    words = r"a worker needs 3\d\d\.\d MiB of memory, and 200\.0 MiB are available; set gram\.tile or data\.size lower"
    refuses(simple(tmp_path / "new"), ResourceError, words)
    before = chunks(begun)
    with pytest.raises(ResourceError, match=words):
        run(simple())
    assert chunks(begun) == before


def test_memory_bounds_the_workers_of_the_plan(simple: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equigram.run, "available_cores", lambda: 6)
    spec = simple(resources={"workers": 5})
    found = survey(spec.data, square=False)
    assert make_plan(spec, found, None, Listening()).workers == 5
    small = make_plan(simple(resources={"workers": "auto"}), found, None, Listening())
    assert (small.workers, small.parallel) == (0, 6)
    monkeypatch.setattr(equigram.run, "available_memory", lambda: 800 * 2**20)
    assert make_plan(spec, found, None, Listening()).workers == 2


@pytest.mark.usefixtures("cluster")
def test_on_a_cluster_a_worker_measures_and_its_nodes_are_counted(simple: Job) -> None:
    auto, five = (simple(resources={"workers": workers, "address": "auto"}) for workers in ("auto", 5))
    found = survey(auto.data, square=False)
    listener = Listening()
    plan = make_plan(auto, found, None, listener)
    assert "measuring the cost of a pair on the cluster" in listener
    assert plan.workers == available_cores()
    assert make_plan(five, found, None, Listening()).workers == 5
    large = simple(resources={"workers": "auto", "address": "auto", "cpus_per_worker": 1000})
    with pytest.raises(ResourceError, match=r"a worker with resources.cpus_per_worker = 1000.* fits on no node of"):
        make_plan(large, found, None, Listening())


def test_the_plan_of_a_store_counts_what_is_missing(simple: Job, begun: GramStore) -> None:
    plan = make_plan(simple(), stored_survey(begun), begun, Listening())
    assert (plan.tiling, plan.missing, plan.missing_pairs) == (begun.info.tiling, 11, 105 - 10)
    assert plan.store_bytes == 2 * 15 * (4 * 4 * 4 + 4) + 15 * 4 * 4 * 4
    assert plan.seconds > 0


def test_a_run_that_does_not_fit_on_the_disk_is_refused_with_both_numbers(
    simple: Job, create: Create, tmpfs: Callable[[str], Path]
) -> None:
    place = tmpfs("size=128k")
    refuses(
        simple(place / "run", gram={"tile": 128}),
        ResourceError,
        r"the finished run takes 257\.0 KiB, and 128\.0 KiB are free at .*run; free space, choose",
    )


# What happens to a disk meanwhile


def test_a_disk_that_fills_up_ends_the_run_and_costs_nothing_that_is_finished(
    simple: Job, create: Create, tmpfs: Callable[[str], Path], fill_disk: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(equikernel.worker, "STORAGE_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(equigram.dispatch, "pause", lambda failures: 0.0)
    place = tmpfs("size=4m")
    spec = simple(place / "run")
    store = create(spec)

    def fill(what: str, done: int) -> None:
        if what == "pairs" and done:
            fill_disk(place)

    with pytest.raises(
        TileFailedError, match=r"cannot write tile .*: No space left on device; nothing finished is lost"
    ):
        run(spec, Listening(fill))
    finished = store.finished_tiles()
    stored = {path: mark for path, mark in chunks(store).items() if tile_of_chunk(path) in finished}
    assert stored
    with pytest.raises(ResourceError, match=r"the missing tiles take \d.* KiB, and 0 bytes are free at"):
        run(spec)
    (place / "ballast").unlink()
    assert run(spec).results
    assert stored.items() <= chunks(store).items()


def test_a_disk_that_became_read_only_is_noticed_before_a_cluster_is_started(
    simple: Job, create: Create, compute: Compute, tmpfs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = simple(tmpfs("size=4m") / "run")
    compute(create(spec), [Tile("gram", 0, 0)])
    tmpfs("remount,ro")
    monkeypatch.setattr(equigram.run, "ray_session", None)
    with pytest.raises(StoreError, match=r"cannot write to the run store: .*run is read-only, or this user"):
        run(spec)


def test_a_plan_says_at_once_what_a_run_would_find_out(simple: Job, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for store, words in (
        (f"{bucket}-nowhere/run", "the bucket .*-nowhere does not exist"),
        (tmp_path / "file/run", ".*file is a file"),
    ):
        with pytest.raises(StoreError, match=f"cannot write to the run store: {words}"):
            look_at_images(simple(store))


def test_an_image_without_kernel_is_refused_before_anything_is_stored(simple: Job, npz: Path) -> None:
    arrays = dict(np.load(npz))
    images = arrays["x_test"].astype(np.float32)
    images[3, 1, 1] = 1e30
    np.savez(npz, **{**arrays, "x_train": arrays["x_train"].astype(np.float32), "x_test": images})
    words = r"test image \d .x_test.3..: the largest pixel of the image"
    refuses(simple(data={"normalize": "none"}), ImageError, words)


def test_a_file_of_somebody_else_in_the_history_is_passed_over(begun: GramStore, simple: Job) -> None:
    Path(begun.url, "history/events").mkdir(parents=True, exist_ok=True)
    Path(begun.url, "history/events/notes.jsonl").write_text("mine\n")
    assert run(simple()).results


# Predictions


def test_new_images_are_predicted_as_test_images_are(finished: GramStore, simple: Job, tmp_path: Path) -> None:
    run(simple(solve={"ridge": [0.1, 1.0]}))
    np.savez(tmp_path / "new.npz", x=np.load(simple().data.train)["x_test"])
    for kernel in ("nngp", "ntk"):
        arrays, _ = finished.solution("C1", kernel)
        for index, ridge in enumerate((None, 1.0)):
            new = predict(GramStore.open(finished.url), str(tmp_path / "new.npz"), "C1", kernel, ridge)
            assert (new.group, new.kernel, new.ridge) == ("C1", kernel, (0.1, 1.0)[index])
            assert new.classes == ("0", "1", "2")
            assert new.names == tuple(f"x[{i}]" for i in range(5))
            assert_allclose(new.values, arrays["predictions"][index], rtol=1e-4, atol=1e-6)


def test_a_ridge_is_the_one_that_was_asked_for(finished: GramStore, simple: Job, npz: Path) -> None:
    run(simple(solve={"ridge": [1e-10, 1e-9, 0.1]}))
    assert predict(finished, str(npz), ridge=1e-9).ridge == 1e-9
    for ridge in (0.0, 5e-9):
        with pytest.raises(SpecError, match="no solution for ridge"):
            predict(finished, str(npz), ridge=ridge)


def test_a_small_budget_of_the_solver_is_taken_with_the_tiles_of_the_run(finished: GramStore, simple: Job) -> None:
    """The factorisation in the store is for budgets that hold no matrix, and what it needs depends on the tiles."""
    for method in ("tiled", "iterative"):
        fields = {"method": method, "memory": 0.002, "choose": "first", "ridge": [0.1]}
        assert run(simple(solve=fields)).results
        assert run(simple(finished.url + method, solve=fields)).results
    with pytest.raises(ResourceError, match=r"with method 'tiled', .*; take tiles of less than 4 images"):
        run(simple(solve={"method": "tiled", "memory": 1e-7}))


def test_a_factor_in_the_store_is_counted(simple: Job) -> None:
    spec = simple(solve={"method": "tiled", "choose": "first"})
    with_factor, without = (make_plan(one, look_at_images(one), None, nobody) for one in (spec, simple()))
    assert with_factor.store_bytes == without.store_bytes + 8 * 10 * 10


def test_new_images_have_the_variances_and_probabilities_of_test_images(
    finished: GramStore, simple: Job, tmp_path: Path
) -> None:
    (*_, last) = run(simple(solve={"ridge": [0.1, 1.0], "variances": True})).results
    np.savez(tmp_path / "new.npz", x=np.load(simple().data.train)["x_test"])
    arrays, fields = finished.solution("C1", "ntk")
    for ridge in (0.1, 1.0):
        index = int(ridge)
        calibrated = index == fields["chosen"]
        new = predict(finished, str(tmp_path / "new.npz"), ridge=ridge, variances=True, calibrated=calibrated)
        scale = float(finished.diagonal("C1", "ntk").mean(dtype=np.float64))
        noisy = arrays["amplitude"][index] * (arrays["variances"][index] + ridge * scale)
        assert new.variances is not None
        assert_allclose(new.variances, noisy, rtol=1e-4)
        if calibrated:
            assert new.probabilities is not None
            assert_allclose(new.probabilities, arrays["probabilities"], rtol=1e-4)
        else:
            with pytest.raises(SpecError, match=r"no calibrated probabilities for C1 ntk, .*; they need classes"):
                predict(finished, "there-is-no-such-folder", ridge=ridge, calibrated=True)
    assert last.negative_log_likelihood is not None


def test_variances_that_memory_does_not_hold_are_refused(
    finished: GramStore, simple: Job, npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(simple())
    monkeypatch.setattr("equigram.run.available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match=r"the variances of 5 images with .* and 1000 bytes are available"):
        predict(finished, str(npz), variances=True)
    assert predict(finished, str(npz)).variances is None


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("C2", None, None), "holds no C2 ntk; choose of the groups C1 and the kernels nngp, ntk"),
        (("C1", "abc", None), "holds no C1 abc; choose of the groups C1 and the kernels nngp, ntk"),
        (("C1", "ntk", 7.0), "no solution for ridge 7; choose one of 1e-06, 0.0001, 0.01"),
    ],
)
def test_predictions_that_the_run_cannot_make_are_refused(
    finished: GramStore, simple: Job, npz: Path, asked: Iterable[Any], words: str
) -> None:
    run(simple())
    with pytest.raises(SpecError, match=words):
        predict(finished, str(npz), *asked)


def test_training_images_are_read_once_for_all_new_ones(
    finished: GramStore, simple: Job, npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(simple())
    whole = predict(finished, str(npz), "C1", "ntk")
    read: list[int] = []
    block = GramStore.block

    def counting(store: GramStore, split: Any, index: int) -> Any:
        read.append(index)
        return block(store, split, index)

    monkeypatch.setattr(GramStore, "block", counting)
    monkeypatch.setattr("equigram.run.PREDICT_BLOCK", 2)
    steps: list[int] = []
    parts = predict(finished, str(npz), "C1", "ntk", progress=lambda done, total: steps.append(done))
    assert read == [0, 1, 2]
    assert len(whole.names) > 2
    assert steps == sorted(steps)
    assert steps[-1] == len(whole.names)
    assert_allclose(parts.values, whole.values, rtol=1e-12)


LAYERS = [{"kind": "conv", "activation": "leaky_relu(0.1)"}, {"kind": "avg_pool", "size": 2}, {"kind": "conv"}]


@pytest.mark.parametrize(
    "sections",
    [
        {"network": {"layers": LAYERS}, "gram": {"groups": ["C1", "C4"]}},
        {"network": {"depth": 1}, "gram": {"groups": ["C8", "C4"], "dtype": "float64"}},
        {"network": {"depth": 2}, "gram": {"groups": ["C1", "D4"], "engine": "xla"}},
    ],
    ids=["layers", "C8", "xla"],
)
def test_every_engine_and_several_groups_go_through_a_store(
    job: Job, create: Callable[..., GramStore], compute: Callable[..., None], sections: dict[str, Any]
) -> None:
    spec = job(**sections)
    store = create(spec)
    compute(store)
    x = store.images("train")
    for group in spec.gram.groups:
        kernel = spec.network_for(group).kernel(x, engine=spec.gram.engine, dtype=spec.gram.dtype)
        for name in ("nngp", "ntk"):
            assert_allclose(store.matrix("gram", group, name), getattr(kernel, name), rtol=1e-6)
