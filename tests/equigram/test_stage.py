"""The solver stage: from the matrices in a store to predictions and scores, against scikit-learn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from sklearn.kernel_ridge import KernelRidge

from equigram.errors import DataError, IncompleteRunError, ResourceError, SolverError, SpecError
from equigram.events import Event, Progress, nobody
from equigram.plan import Tile
from equigram.screen import warnings
from equigram.solve import (
    accuracy_interval,
    balanced_accuracy,
    eigendecompose,
    inverse_temperature,
    log_loss,
    negative_log_likelihood,
    posterior_variance,
    probabilities,
)
from equigram.solve.stage import Result, check_memory, check_solvable, choose_method, solve_run, stored_results
from equigram.spec import JobSpec, SolveSpec
from equigram.store import GramStore
from equikernel import GroupCNN

Job = Callable[..., JobSpec]
Create = Callable[[JobSpec], GramStore]
Compute = Callable[..., None]
Finish = Callable[..., GramStore]


@pytest.fixture
def finish(job: Job, create: Create, compute: Compute) -> Finish:
    """Makes a finished store of a job."""

    def make(**sections: Any) -> GramStore:
        store = create(job(**sections))
        compute(store)
        return store

    return make


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Saves arrays as an .npz."""

    def write(**arrays: Any) -> Path:
        np.savez(tmp_path / "special.npz", **arrays)
        return tmp_path / "special.npz"

    return write


def solved(store: GramStore, *kernels: str, **fields: Any) -> list[Result]:
    return solve_run(store, SolveSpec(**fields), kernels or ("ntk",), nobody)


def ridge_regression(
    gram: NDArray[Any], cross: NDArray[Any], targets: NDArray[Any], ridge: float
) -> NDArray[np.float64]:
    """Predictions of scikit-learn for centred targets, with the ridge in units of the mean diagonal."""
    gram, offset = gram.astype(np.float64), targets.mean(axis=0)
    model = KernelRidge(alpha=ridge * gram.diagonal().mean(), kernel="precomputed").fit(gram, targets - offset)
    return np.asarray(model.predict(cross.astype(np.float64)) + offset)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_predictions_are_those_of_scikit_learn(finish: Finish, dtype: str) -> None:
    store = finish(gram={"groups": ["C1", "C4"], "dtype": dtype})
    ridges = (1e-3, 1e-1, 10.0)
    results = solved(store, "nngp", "ntk", ridge=ridges)
    assert [(r.group, r.kernel, r.ridge) for r in results] == [
        (group, kernel, ridge) for group in ("C1", "C4") for kernel in ("nngp", "ntk") for ridge in ridges
    ]
    one_hot, labels = np.eye(3)[store.labels("train")], store.labels("test")
    assert labels is not None
    for group in ("C1", "C4"):
        for kernel in ("nngp", "ntk"):
            gram, cross = store.matrix("gram", group, kernel), store.matrix("cross", group, kernel)
            arrays, _ = store.solution(group, kernel)
            assert_array_equal(arrays["ridge"], ridges)
            for index, ridge in enumerate(ridges):
                expected = ridge_regression(gram, cross, one_hot, ridge)
                assert_allclose(arrays["predictions"][index], expected, rtol=1e-7, atol=1e-9)
                again = cross.astype(np.float64) @ arrays["coefficients"][index] + arrays["offset"]
                assert_allclose(again, expected, rtol=1e-7, atol=1e-9)
                (result,) = (r for r in results if (r.group, r.kernel, r.ridge) == (group, kernel, ridge))
                assert result.accuracy == np.mean(expected.argmax(axis=1) == labels)
                assert result.mean_squared_error == pytest.approx(np.mean((expected - np.eye(3)[labels]) ** 2))
                assert (result.train_size, result.images, result.warning) == (None, 10, None)


def test_a_learning_curve_takes_the_first_images_of_each_class(finish: Finish) -> None:
    store = finish()
    told: list[Event] = []
    spec = SolveSpec(ridge=(0.1,), train_sizes=(2, 1))
    results = solve_run(store, spec, ("ntk",), told.append)
    assert [(r.train_size, r.images) for r in results] == [(1, 3), (2, 6), (None, 10)]
    assert told == [Progress("solve", done, 3) for done in range(4)]
    labels, truth = store.labels("train"), store.labels("test")
    assert labels is not None
    chosen = sorted(np.flatnonzero(labels == label)[i] for label in range(3) for i in range(2))
    gram, cross = store.matrix("gram", "C1", "ntk"), store.matrix("cross", "C1", "ntk")
    expected = ridge_regression(gram[np.ix_(chosen, chosen)], cross[:, chosen], np.eye(3)[labels[chosen]], 0.1)
    assert results[1].mean_squared_error == pytest.approx(np.mean((expected - np.eye(3)[truth]) ** 2))
    arrays, _ = store.solution("C1", "ntk")
    assert arrays["coefficients"].shape == (1, 10, 3)


def test_what_was_solved_is_read_back(finish: Finish) -> None:
    store = finish()
    results = solved(store, ridge=(0.1, 1.0), train_sizes=(1,))
    assert stored_results(GramStore.open(store.url), "C1", "ntk") == results
    assert not store.has_solution("C1", "nngp")


def test_solving_again_replaces_what_was_solved(finish: Finish) -> None:
    store = finish()
    solved(store, ridge=(0.1, 1.0), train_sizes=(1,))
    results = solved(store, ridge=(0.5,))
    assert stored_results(store, "C1", "ntk") == results
    assert store.solution("C1", "ntk")[0]["coefficients"].shape == (1, 10, 3)


def twins() -> dict[str, Any]:
    """Three classes of pairs of equal images: singular without a ridge."""
    images = np.random.default_rng(0).integers(0, 255, (3, 8, 8), dtype=np.uint8).repeat(2, axis=0)
    return {"x_train": images, "y_train": np.arange(6) // 2, "x_test": images[:2], "y_test": [0, 0]}


def test_a_ridge_that_is_too_small_is_a_warning_while_others_go_on(finish: Finish, save: Callable[..., Path]) -> None:
    store = finish(data={"train": save(**twins())}, gram={"dtype": "float64"})
    bad, good = solved(store, ridge=(0.0, 1e-2))
    assert bad.warning is not None
    assert "plus ridge 0 is not positive definite" in bad.warning
    assert {bad.accuracy, bad.mean_squared_error, bad.residual, bad.condition} == {None}
    assert good.warning is None
    assert good.accuracy == 1
    arrays, _ = store.solution("C1", "ntk")
    assert_array_equal(arrays["ridge"], [1e-2])
    assert arrays["predictions"].shape == (1, 2, 3)


def test_no_usable_ridge_at_all_is_an_error(finish: Finish, save: Callable[..., Path]) -> None:
    store = finish(data={"train": save(**twins())}, gram={"dtype": "float64"})
    with pytest.raises(SolverError, match=r"C1 ntk, 6 training images: .* plus ridge 0 is not positive definite.*take"):
        solved(store, ridge=(0.0,))


def test_equal_images_are_named(finish: Finish, save: Callable[..., Path]) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (12, 8, 8), dtype=np.uint8)
    images[7] = images[4]
    fields: dict[str, Any] = {"x_train": images, "y_train": np.arange(12) % 3, "x_test": images[:2], "y_test": [0, 1]}
    store = finish(data={"train": save(**fields)}, gram={"kernels": ["ntk"]})
    for sizes in ((), (3,)):  # of all images, and of nine that hold both
        with pytest.raises(SolverError, match=r"are the same to this kernel\); .*; the images came from .*") as caught:
            solved(store, ridge=(0.0,), train_sizes=sizes or None)
        assert {f"x_train[{index}]" in str(caught.value) for index in (4, 7)} == {True}


def test_real_targets_are_regressed_on_without_accuracy(finish: Finish, save: Callable[..., Path]) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"x_{split}": rng.integers(0, 255, (n, 8, 8), dtype=np.uint8) for split, n in (("train", 9), ("test", 4))}
    targets = {"y_train": rng.normal(size=(9, 2)), "y_test": rng.normal(size=(4, 2))}
    store = finish(data={"train": save(**arrays, **targets)})
    (part, whole) = solved(store, ridge=(0.1,), train_sizes=(5,))
    assert (part.images, whole.images) == (5, 9)
    expected = ridge_regression(
        store.matrix("gram", "C1", "ntk"), store.matrix("cross", "C1", "ntk"), np.asarray(store.labels("train")), 0.1
    )
    assert_allclose(store.solution("C1", "ntk")[0]["predictions"][0], expected, rtol=1e-7)
    assert whole.accuracy is None
    assert whole.mean_squared_error == pytest.approx(np.mean((expected - targets["y_test"]) ** 2))


def test_test_images_without_labels_are_predicted_without_scores(finish: Finish, save: Callable[..., Path]) -> None:
    arrays = {key: value for key, value in twins().items() if key != "y_test"}
    store = finish(data={"train": save(**arrays)})
    (result,) = solved(store, ridge=(0.1,))
    assert (result.accuracy, result.mean_squared_error) == (None, None)
    assert result.residual is not None
    assert store.solution("C1", "ntk")[0]["predictions"].shape == (1, 2, 3)


def test_without_test_images_there_are_coefficients_only(finish: Finish, save: Callable[..., Path]) -> None:
    store = finish(data={"train": save(x=twins()["x_train"], y=twins()["y_train"])})
    (result,) = solved(store, ridge=(0.1,))
    assert (result.accuracy, result.mean_squared_error) == (None, None)
    assert sorted(store.solution("C1", "ntk")[0]) == ["amplitude", "coefficients", "offset", "ridge"]


def test_missing_tiles_are_not_solved(finish: Finish) -> None:
    store = finish()
    store.discard_tile(Tile("cross", 0, 0))
    with pytest.raises(IncompleteRunError, match="1 of 3 chunks of cross/C1/ntk are missing"):
        solved(store)


def test_labels_are_judged_before_anything_is_computed() -> None:
    labels = np.array([0, 0, 1])
    with pytest.raises(DataError, match=r"no labels, so there is nothing to predict; .* `solve: null`"):
        check_solvable(SolveSpec(), None, None)
    with pytest.raises(DataError, match="all 3 training images are of class 'a'"):
        check_solvable(SolveSpec(), np.zeros(3, dtype=np.int64), ("a", "b"))
    with pytest.raises(SpecError, match="2"):
        check_solvable(SolveSpec(train_sizes=(1, 2)), labels, ("a", "b"))
    check_solvable(SolveSpec(train_sizes=(1,)), labels, ("a", "b"))


def test_what_is_solved_is_not_solved_again(finish: Finish, monkeypatch: pytest.MonkeyPatch) -> None:
    store = finish()
    first = solved(store, ridge=(0.1, 1.0), train_sizes=(1,))
    with monkeypatch.context() as patch:
        patch.setattr(GramStore, "matrix", lambda *_: pytest.fail("a matrix is read"))
        patch.setattr(GramStore, "write_solution", lambda *_: pytest.fail("a solution is written"))
        assert solved(store, ridge=(0.1, 1.0), train_sizes=(1,)) == first
        assert solved(store, ridge=(0.1, 1.0), train_sizes=(1,), memory=3.0) == first
    assert len(solved(store, ridge=(0.1, 1.0))) == 2
    assert len(solved(store, ridge=(0.1, 2.0))) == 2
    Path(store.url, "solution/C1/ntk/ridge/c/0").write_bytes(b"damaged")
    assert len(solved(store, ridge=(0.1, 2.0))) == 2
    assert store.solution("C1", "ntk")[0]["ridge"].shape == (2,)


def test_the_ridge_is_chosen_on_training_images_that_are_left_out(finish: Finish) -> None:
    store, ridges = finish(gram={"kernels": ["ntk"], "dtype": "float64"}), (1e-6, 1e-2, 1e-1, 1e3)
    gram, values = store.matrix("gram", "C1", "ntk"), np.eye(3)[store.labels("train")]
    errors = []
    for ridge in ridges:
        missed = []
        for image in range(10):
            rest = np.delete(np.arange(10), image)
            offset, scale = values[rest].mean(axis=0), np.diagonal(gram).mean()
            matrix = gram[np.ix_(rest, rest)] + ridge * scale * np.eye(9)
            missed.append(offset + gram[image, rest] @ np.linalg.solve(matrix, values[rest] - offset) - values[image])
        errors.append(np.mean(np.square(missed)))
    results = solved(store, ridge=ridges)
    assert [result.left_out_error for result in results] == pytest.approx(errors)
    best = int(np.argmin(errors))
    assert [result.chosen for result in results] == [index == best for index in range(4)]
    arrays, fields = store.solution("C1", "ntk")
    assert fields["chosen"] == best
    assert_array_equal(arrays["ridge"], ridges)
    first = solved(store, ridge=ridges, choose="first")
    assert [result.chosen for result in first] == [True, False, False, False]
    assert [result.left_out_error for result in first] == 4 * [None]


def test_many_ridge_values_come_from_one_eigendecomposition(
    finish: Finish, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = finish(data={"train": save(**twins())}, gram={"kernels": ["ntk"], "dtype": "float64"})
    ridges = (0.0, *np.geomspace(1e-5, 10.0, 9).tolist())
    path = solved(store, ridge=ridges)
    path_arrays = store.solution("C1", "ntk")[0]
    monkeypatch.setattr("equigram.solve.stage.PATH", 100)
    store.discard_solutions()
    each = solved(store, ridge=ridges)
    each_arrays = store.solution("C1", "ntk")[0]
    for name, values in each_arrays.items():
        assert_allclose(path_arrays[name], values, rtol=1e-8, atol=1e-10)
    assert "not positive definite" in (path[0].warning or "")
    assert [one.chosen for one in path] == [one.chosen for one in each]
    assert [one.left_out_error for one in path[1:]] == pytest.approx([one.left_out_error for one in each[1:]])


def test_conjugate_gradients_that_do_not_converge_are_said_and_not_chosen(
    finish: Finish, save: Callable[..., Path]
) -> None:
    images = np.random.default_rng(0).integers(0, 255, (80, 8, 8), dtype=np.uint8)
    train = save(x_train=images, y_train=np.arange(80) % 3, x_test=images[:3], y_test=[0, 1, 2])
    store = finish(gram={"kernels": ["ntk"]}, data={"train": train})
    fields: dict[str, Any] = {"method": "iterative", "choose": "first", "rank": 1}
    with pytest.raises(SolverError, match=r"80 training images: .* stopped after 1 steps .*take more steps"):
        solved(store, ridge=(1e-6,), steps=1, **fields)
    assert Path(store.url, "iterate/C1/ntk").exists()
    results = solved(store, ridge=(1e-4, 10.0), steps=7, tolerance=1e-6, **fields)
    assert Path(store.url, "iterate/C1/ntk").exists()
    steps: list[str] = []
    spec = SolveSpec(ridge=(1e-4,), steps=200, tolerance=1e-6, **fields)
    (found,) = solve_run(store, spec, ("ntk",), lambda event: steps.append(str(getattr(event, "detail", ""))))
    assert found.converged
    assert not Path(store.url, "iterate/C1/ntk").exists()
    went_on = len([step for step in steps if "after" in step])
    steps.clear()
    store.discard_solutions()
    solve_run(store, spec, ("ntk",), lambda event: steps.append(str(getattr(event, "detail", ""))))
    assert went_on < len([step for step in steps if "after" in step])
    assert [one.converged for one in results] == [False, True]
    assert [one.chosen for one in results] == [False, True]
    (told,) = warnings(results, "float32")
    assert told.startswith("* C1 ntk, 80 images: with ridge 0.0001 conjugate gradients stopped after 7 steps at ")


def test_a_factorisation_that_rounding_spoils_is_refused(finish: Finish, save: Callable[..., Path]) -> None:
    store = finish(data={"train": save(**twins())}, gram={"dtype": "float64"})
    for ridge in (0.0, 1e-17, 3e-16):
        with pytest.raises(SolverError, match=r"positive definite.* images 0 \(.*\) and 1 \(.*\) are equal: leave"):
            solved(store, ridge=(ridge,), method="tiled")


def test_interrupted_factorisations_go_on_with_the_next_ridge_value(
    finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = finish(gram={"kernels": ["ntk"]})
    spec = SolveSpec(ridge=(1e-3, 1e-1, 1.0), method="tiled", choose="first")
    factorised: list[str] = []

    def told(event: Event) -> None:
        if isinstance(event, Progress) and event.what.startswith("factorise") and event.done == 0:
            factorised.append(event.what)
            if len(factorised) == most:
                raise KeyboardInterrupt

    most = 1000
    whole = solve_run(store, spec, ("ntk",), told)
    expected = store.solution("C1", "ntk")[0]["coefficients"]
    assert len(factorised) == 3
    assert not Path(store.url, "factor/C1/ntk").exists()
    store.discard_solutions()
    factorised.clear()
    most = 3
    with pytest.raises(KeyboardInterrupt):
        solve_run(store, spec, ("ntk",), told)
    assert Path(store.url, "factor/C1/ntk").exists()
    most = 1000
    factorised.clear()
    again = solve_run(store, spec, ("ntk",), told)
    assert [(one.ridge, one.condition) for one in again] == [(one.ridge, one.condition) for one in whole]
    assert factorised == ["factorise C1 ntk, ridge 1"]
    assert_allclose(store.solution("C1", "ntk")[0]["coefficients"], expected, rtol=1e-12)


def test_a_damaged_factor_is_made_anew(finish: Finish) -> None:
    store = finish(gram={"kernels": ["ntk"]})
    spec = SolveSpec(ridge=(1e-3,), method="tiled", choose="first", memory=1e-5)  # a column of tiles at a time
    whole = solve_run(store, spec, ("ntk",), nobody)
    store.discard_solutions()

    def interrupt(event: Event) -> None:
        if isinstance(event, Progress) and event.what.startswith("factorise") and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve_run(store, spec, ("ntk",), interrupt)
    damaged = Path(store.url, "factor/C1/ntk/c/2/0")
    content = bytearray(damaged.read_bytes())
    content[9] ^= 1
    damaged.write_bytes(content)
    assert solve_run(store, spec, ("ntk",), nobody) == whole


def test_equal_targets_are_refused(finish: Finish, save: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"all 4 training images have the same target, 2.5, 0, and there is nothing to"):
        check_solvable(SolveSpec(), np.tile([2.5, 0.0], (4, 1)), None)


def test_the_ridge_is_chosen_by_folds(finish: Finish) -> None:
    store, ridges = finish(gram={"kernels": ["ntk"], "dtype": "float64"}), (1e-4, 1e-1, 1e3)
    gram, values = store.matrix("gram", "C1", "ntk"), np.eye(3)[store.labels("train")]
    parts = np.array_split(np.random.default_rng(0).permutation(10), 3)
    results = solved(store, ridge=ridges, choose="folds", folds=3)
    for result, ridge in zip(results, ridges, strict=True):
        missed = []
        for part in parts:
            rest = np.setdiff1d(np.arange(10), part)
            missed.append(
                ridge_regression(gram[np.ix_(rest, rest)], gram[np.ix_(part, rest)], values[rest], ridge) - values[part]
            )
        assert result.left_out_error == pytest.approx(np.mean(np.square(np.concatenate(missed))))
    assert [result.chosen for result in results] == [
        result.left_out_error == min(r.left_out_error or 9 for r in results) for result in results
    ]
    with pytest.raises(SpecError, match=r"solve.folds = 11 parts cannot be made of 10 training images"):
        check_solvable(SolveSpec(choose="folds", folds=11), store.labels("train"), ("a", "b", "c"))


def test_left_out_images_calibrate_the_scores(finish: Finish) -> None:
    store = finish(gram={"kernels": ["ntk"]})
    labels, truth = store.labels("train"), store.labels("test")
    assert labels is not None
    assert truth is not None
    for choose in ("leave_one_out", "folds"):
        results = solved(store, ridge=(1e-3, 1e-1), choose=choose, folds=3)
        arrays, fields = store.solution("C1", "ntk")
        assert fields["inverse_temperature"] == inverse_temperature(arrays["left_out"], labels)
        predictions = arrays["predictions"][fields["chosen"]]
        assert_allclose(arrays["probabilities"], probabilities(predictions, fields["inverse_temperature"]))
        assert results[fields["chosen"]].log_loss == log_loss(predictions, truth, fields["inverse_temperature"])
        assert {result.dtype for result in results} == {"float32"}
    (result,) = solved(store, ridge=(1e-3,))
    arrays, fields = store.solution("C1", "ntk")
    assert (result.log_loss, fields["inverse_temperature"], "probabilities" in arrays) == (None, None, False)


@pytest.mark.parametrize("groups", [["C1"], ["C1", "C4"]])
def test_variances_are_those_of_the_gaussian_process(finish: Finish, groups: list[str]) -> None:
    store = finish(gram={"groups": groups, "dtype": "float64"})
    results = solved(store, "nngp", "ntk", ridge=(1e-3, 1e-1), variances=True, train_sizes=(2,))
    info, truth = store.info, np.eye(3)[store.labels("test")]
    network = GroupCNN(**info.spec.network.model_dump(), group="C1")
    itself = network.kernel(store.images("test"), groups=tuple(groups), dtype="float64")
    for group in groups:
        for kernel in ("nngp", "ntk"):
            arrays, _ = store.solution(group, kernel)
            spectrum = eigendecompose(store.matrix("gram", group, kernel))
            diagonal = np.diagonal(getattr(itself[group], kernel))
            for index, ridge in enumerate((1e-3, 1e-1)):
                expected = posterior_variance(spectrum, store.matrix("cross", group, kernel), diagonal, ridge)
                assert_allclose(arrays["variances"][index], expected, rtol=1e-6)
                noisy = arrays["amplitude"][index] * (expected + ridge * spectrum.scale)
                likelihood = negative_log_likelihood(arrays["predictions"][index], noisy, truth)
                (result,) = (
                    one
                    for one in results
                    if (one.group, one.kernel, one.ridge, one.train_size) == (group, kernel, ridge, None)
                )
                assert result.negative_log_likelihood == pytest.approx(likelihood)
    assert {one.negative_log_likelihood for one in results if one.train_size} == {None}


def test_variances_need_the_matrix_in_memory(finish: Finish) -> None:
    with pytest.raises(SpecError, match=r"solve.variances needs the matrix in memory, and the method here is 'tiled'"):
        solved(finish(), variances=True, method="tiled")


def test_interrupted_conjugate_gradients_go_on_from_where_they_were(
    finish: Finish, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).integers(0, 255, (80, 8, 8), dtype=np.uint8)
    train = save(x_train=images, y_train=np.arange(80) % 3, x_test=images[:3], y_test=[0, 1, 2])
    store = finish(gram={"kernels": ["ntk"], "dtype": "float64"}, data={"train": train})
    spec = SolveSpec(ridge=(1e-3, 1e-6), method="iterative", choose="first", rank=5, tolerance=1e-10)
    taken: dict[str, int] = {}

    def told(event: Event, most: int = 10**6) -> None:
        if isinstance(event, Progress) and "after" in event.detail:
            taken[event.what] = taken.get(event.what, 0) + 1
            if event.what.endswith("1e-06") and taken[event.what] == most:
                raise KeyboardInterrupt

    whole = solve_run(store, spec, ("ntk",), told)
    expected, steps = store.solution("C1", "ntk")[0], dict(taken)
    assert not Path(store.url, "iterate/C1/ntk").exists()
    store.discard_solutions()
    taken.clear()
    monkeypatch.setattr("equigram.solve.stage.KEEP_SECONDS", 0.0)
    first, second = (f"C1 ntk, ridge {ridge}" for ridge in ("0.001", "1e-06"))
    with pytest.raises(KeyboardInterrupt):
        solve_run(store, spec, ("ntk",), lambda event: told(event, steps[second] * 2 // 3))
    taken.clear()
    again = solve_run(store, spec, ("ntk",), told)
    assert first not in taken  # it had ended
    assert taken[second] < steps[second]
    assert_allclose(store.solution("C1", "ntk")[0]["coefficients"], expected["coefficients"], rtol=1e-4)
    assert [one.accuracy for one in again] == [one.accuracy for one in whole]
    assert not Path(store.url, "iterate/C1/ntk").exists()


@pytest.mark.parametrize("method", ["tiled", "iterative"])
def test_other_methods_find_the_same(finish: Finish, method: str) -> None:
    store = finish(gram={"kernels": ["ntk"]})
    fields: dict[str, Any] = {"ridge": (1e-3, 1e-1), "choose": "first", "train_sizes": (2,)}
    direct = solved(store, **fields)
    expected, _ = store.solution("C1", "ntk")
    events: list[Event] = []
    spec = SolveSpec.model_validate({**fields, "method": method, "memory": 0.5, "tolerance": 1e-10})
    found = solve_run(store, spec, ("ntk",), events.append)
    arrays, _ = store.solution("C1", "ntk")
    for name in ("coefficients", "predictions"):
        assert_allclose(arrays[name], expected[name], rtol=1e-6, atol=1e-8)
    small = "direct" if method == "tiled" else method
    assert [one.method for one in found] == [small, small, method, method]
    assert [one.accuracy for one in found] == [one.accuracy for one in direct]
    assert [one.chosen for one in found] == [one.chosen for one in direct]
    told = [event for event in events if isinstance(event, Progress) and event.what != "solve"]
    assert told
    if method == "iterative":
        assert "after 1 steps" in told[0].detail
        assert told[0].detail.startswith("residual ")


def test_a_ridge_cannot_be_chosen_without_the_matrix_in_memory(finish: Finish) -> None:
    store = finish()
    with pytest.raises(
        SpecError, match=r"solve.choose = 'folds' needs the matrix in memory, and the method here is 'it"
    ):
        solved(store, choose="folds", method="iterative")
    with pytest.raises(SpecError, match=r"solve.choose = 'leave_one_out' needs the matrix in memory"):
        check_memory(SolveSpec(choose="leave_one_out", method="tiled"), 10, 4, 4, 3)


def test_the_method_follows_the_memory() -> None:
    assert choose_method(SolveSpec(memory=1.0), 5000) == "direct"
    assert choose_method(SolveSpec(memory=1.0), 20_000) == "iterative"
    assert choose_method(SolveSpec(memory=1.0, method="tiled"), 10) == "tiled"
    check_memory(SolveSpec(memory=2.0), 30_000, 4, 256, 9)
    with pytest.raises(ResourceError, match=r"with 30,000 training images needs .* with method 'direct', and 2.0 GiB"):
        check_memory(SolveSpec(memory=2.0, method="direct"), 30_000, 4, 256, 9)
    with pytest.raises(ResourceError, match=r"'iterative'.* take a lower solve.rank, tiles of less than 256"):
        check_memory(SolveSpec(memory=0.1), 30_000, 4, 256, 9)


def test_accuracies_have_intervals_and_a_balanced_form(finish: Finish) -> None:
    store = finish()
    (result,) = solved(store, ridge=(0.1,))
    predictions = store.solution("C1", "ntk")[0]["predictions"][0]
    labels = store.labels("test")
    assert labels is not None
    assert result.accuracy_interval == accuracy_interval(predictions, labels)
    assert result.balanced_accuracy == balanced_accuracy(predictions, labels)
    assert stored_results(store, "C1", "ntk") == [result]
