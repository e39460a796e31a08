"""Conjugate gradients and the matrices that they multiply with, against factorisations and plain products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from equigram.errors import DamagedTileError, IncompleteRunError, SolverError, SpecError
from equigram.plan import Tile
from equigram.solve import ArrayOperator, StoredOperator, class_targets, real_targets, solve, solve_iteratively
from equigram.solve.iterative import Preconditioner
from equigram.spec import JobSpec
from equigram.store import GramStore

Float64s = NDArray[np.float64]
Create = Callable[[JobSpec], GramStore]
Job = Callable[..., JobSpec]


def gram_of(count: int, seed: int = 0, dtype: Any = np.float64) -> Any:
    """The Gram matrix (count, count) of 2 exp(-|x - x'| / 2) for random points in four dimensions."""
    x = np.random.default_rng(seed).standard_normal((count, 4))
    gram = 2 * np.exp(-np.sqrt(np.square(x[:, None] - x[None]).sum(axis=-1)) / 2)
    return np.asarray(gram, dtype)


def labels_of(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 4, count)


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_conjugate_gradients_agree_with_the_factorisation(dtype: Any, ridge: float) -> None:
    gram, targets = gram_of(300, dtype=dtype), class_targets(labels_of(300), "abcd")
    (direct,) = solve(gram, targets, [ridge])
    assert direct.condition < 1e6
    found = solve_iteratively(ArrayOperator(gram), targets, ridge)
    assert np.abs(found.coefficients - direct.coefficients).max() < 1e-6 * np.abs(direct.coefficients).max()
    assert found.residual <= 1e-8
    assert found.warning is None
    assert direct.condition / 100 < found.condition < direct.condition
    assert (found.ridge, found.scale) == (ridge, direct.scale)
    assert_array_equal(found.offset, direct.offset)


@pytest.mark.parametrize("rank", [40, 512])
def test_conjugate_gradients_agree_with_the_factorisation_at_a_condition_of_a_million(rank: int) -> None:
    points = np.sort(np.random.default_rng(0).uniform(-3, 3, 400))
    gram = np.exp(-np.square(points[:, None] - points))
    targets = real_targets(np.stack([np.sin(5 * points), points], 1))
    ridge = float(np.linalg.eigvalsh(gram)[-1] / 9e5)
    values = np.linalg.eigvalsh(gram + ridge * np.eye(400))
    assert 8e5 < values[-1] / values[0] < 1e6
    (direct,) = solve(gram, targets, [ridge])
    found = solve_iteratively(ArrayOperator(gram), targets, ridge, rank=rank)
    assert np.abs(found.coefficients - direct.coefficients).max() < 1e-6 * np.abs(direct.coefficients).max()
    assert found.converged


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 40),
    columns=st.integers(1, 5),
    rank=st.sampled_from([1, 5, 40]),
)
def test_any_number_of_images_and_targets_is_solved(seed: int, count: int, columns: int, rank: int) -> None:
    gram = gram_of(count, seed)
    values = np.random.default_rng(seed).standard_normal((count, columns))
    values[:, columns // 2] = values[:, 0]  # linearly dependent
    found = solve_iteratively(ArrayOperator(gram), real_targets(values), 1e-3, rank=rank)
    (direct,) = solve(gram, real_targets(values), [1e-3])
    assert_allclose(found.coefficients, direct.coefficients, rtol=1e-5, atol=1e-6 * np.abs(direct.coefficients).max())


def test_constant_targets_need_no_step() -> None:
    steps: list[int] = []
    targets = real_targets(np.full((20, 2), 3.0))
    found = solve_iteratively(ArrayOperator(gram_of(20)), targets, 1e-3, progress=lambda step, _: steps.append(step))
    assert (steps, found.residual, found.coefficients.any()) == ([], 0.0, np.False_)


def test_the_preconditioner_saves_most_steps() -> None:
    def steps(rank: int) -> int:
        count = 0

        def counted(step: int, _: float) -> None:
            nonlocal count
            count = step

        solve_iteratively(ArrayOperator(gram), targets, 1e-4, rank=rank, progress=counted)
        return count

    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 3))
    gram = np.exp(-np.square(x[:, None] - x[None]).sum(axis=-1) / 4)
    targets = real_targets(rng.standard_normal((400, 1)))
    assert 3 * steps(100) < steps(1)


def test_powers_of_the_preconditioner_are_inverse_to_each_other() -> None:
    gram, values = gram_of(60), np.random.default_rng(1).standard_normal((60, 3))
    preconditioner = Preconditioner.sketch(ArrayOperator(gram), 1e-3, 15)
    half = preconditioner.apply(values, 0.5)
    assert_allclose(preconditioner.apply(half, 0.5), preconditioner.apply(values, 1))
    assert_allclose(preconditioner.apply(half, -0.5), values)
    assert_allclose(preconditioner.vectors.T @ preconditioner.vectors, np.eye(15), atol=1e-12)
    assert (preconditioner.values <= np.linalg.eigvalsh(gram / 2)[::-1][:15] * (1 + 1e-9)).all()


def test_one_sketch_serves_all_ridge_values() -> None:
    operator, targets = ArrayOperator(gram_of(100)), class_targets(labels_of(100), "abcd")
    sketch = Preconditioner.sketch(operator, 0.0, 20)
    for ridge in (1e-4, 1e-1):
        ours = solve_iteratively(operator, targets, ridge, sketch=sketch)
        theirs = solve_iteratively(operator, targets, ridge, rank=20)
        assert_array_equal(ours.coefficients, theirs.coefficients)


def test_going_on_from_an_earlier_result_takes_few_steps() -> None:
    operator, targets = ArrayOperator(gram_of(300)), class_targets(labels_of(300), "abcd")
    kept: list[Float64s] = []
    whole = solve_iteratively(operator, targets, 1e-4, rank=10, keep=lambda scaled: kept.append(scaled.copy()))
    again: list[float] = []
    found = solve_iteratively(
        operator, targets, 1e-4, rank=10, start=kept[-3], progress=lambda _, residual: again.append(residual)
    )
    assert 1 <= len(again) < len(kept) / 2
    assert_allclose(found.coefficients, whole.coefficients, rtol=1e-5, atol=1e-6 * np.abs(whole.coefficients).max())


def test_a_tolerance_out_of_reach_is_said() -> None:
    operator, targets = ArrayOperator(gram_of(300, dtype=np.float32)), class_targets(labels_of(300), "abcd")
    with pytest.raises(SolverError, match=r"stopped after 3 steps at a residual of .*, above the tolerance 1e-08; the"):
        solve_iteratively(operator, targets, 1e-4, rank=2, steps=3)  # what is left is most of the targets
    found = solve_iteratively(operator, targets, 1e-4, rank=40, steps=12)
    assert not found.converged
    assert found.warning is not None
    assert found.warning.startswith("with ridge 0.0001 conjugate gradients stopped after 12 steps at a residual of ")
    assert found.warning.endswith("take more steps (solve.steps), a higher rank (solve.rank) or a larger ridge")
    true = (gram_of(300, dtype=np.float32) / 2 + 1e-4 * np.eye(300)) @ (found.coefficients * found.scale)
    left = np.linalg.norm(true - targets.values) / np.linalg.norm(targets.values)
    assert_allclose(found.residual, left, rtol=1e-6)


def test_rounding_sets_a_limit_to_the_residual_and_that_is_said() -> None:
    found = solve_iteratively(ArrayOperator(gram_of(100)), real_targets(np.eye(100)), 1e-4, tolerance=1e-17, steps=500)
    assert found.warning is not None
    assert found.residual < 1e-11
    assert not found.converged
    assert found.warning.endswith("; rounding allows no less: take a larger tolerance or ridge")


def test_an_indefinite_matrix_is_refused_with_a_ridge_to_try() -> None:
    gram = gram_of(80)
    _, vectors = np.linalg.eigh(gram)
    gram -= vectors[:, :1] * vectors[:, :1].T
    targets = real_targets(np.random.default_rng(4).standard_normal((80, 2)))
    with pytest.raises(SolverError, match=r"of 80 images plus ridge 0 is not positive definite: its small") as error:
        solve_iteratively(ArrayOperator(gram), targets, 0.0)
    enough = float(str(error.value).split("such as ")[1].split(",")[0])
    assert solve_iteratively(ArrayOperator(gram), targets, enough).residual <= 1e-8


def test_what_is_not_finite_is_refused() -> None:
    gram = gram_of(20)
    gram[3, 4] = gram[4, 3] = np.nan
    with pytest.raises(SolverError, match="entries that are not finite; verify the run store"):
        solve_iteratively(ArrayOperator(gram), real_targets(np.eye(20)), 0.1)
    with pytest.raises(SpecError, match=r"the start has shape \(20, 1\), and the targets \(20, 20\)"):
        solve_iteratively(ArrayOperator(gram_of(20)), real_targets(np.eye(20)), 0.1, start=np.ones((20, 1)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ridge": -1.0}, "ridge -1 is not allowed"),
        ({"ridge": np.nan}, "ridge nan is not allowed"),
        ({"tolerance": 0.0}, "tolerance 0, 1000 steps and rank 512"),
        ({"tolerance": 1.0}, "tolerance 1, "),
        ({"steps": 0}, "0 steps"),
        ({"rank": 0}, "rank 0"),
    ],
)
def test_values_that_mean_nothing_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        solve_iteratively(ArrayOperator(gram_of(8)), real_targets(np.eye(8)), **{"ridge": 0.1, **options})


def test_targets_of_other_images_are_refused() -> None:
    with pytest.raises(SpecError, match="targets of 8 images, and a matrix of 9"):
        solve_iteratively(ArrayOperator(gram_of(9)), real_targets(np.eye(8)), 0.1)


@pytest.fixture
def stored(job: Job, create: Create) -> tuple[GramStore, Any]:
    """A store of 10 images, tile 4, filled with a known matrix; and that matrix."""
    store, gram = create(job(gram={"groups": ["C1"], "kernels": ["ntk"], "tile": 4})), gram_of(10, dtype=np.float32)
    for tile in store.info.tiling.tiles():
        rows, cols = store.info.tiling.rows(tile), store.info.tiling.cols(tile)
        values = gram if tile.part == "gram" else np.ones((5, 10), np.float32)
        store.write_values(tile, {("C1", "ntk"): values[rows.start : rows.stop, cols.start : cols.stop]})
    return store, gram


@pytest.mark.parametrize("memory", [0, 3 * 4 * 16, 10**6])
def test_products_with_a_stored_matrix_are_those_with_it(stored: tuple[GramStore, Any], memory: int) -> None:
    store, gram = stored
    operator, values = StoredOperator(store, "C1", "ntk", memory), np.random.default_rng(0).standard_normal((10, 3))
    assert (operator.count, operator.dtype) == (10, np.dtype(np.float32))
    assert_allclose(operator.scale, 2)
    for _ in range(2):
        assert_allclose(operator.multiply(values), gram.astype(np.float64) @ values / 2, rtol=1e-12)
    assert_allclose(ArrayOperator(gram).multiply(values), operator.multiply(values), rtol=1e-12)


def test_kept_tiles_are_not_read_again(stored: tuple[GramStore, Any]) -> None:
    store, gram = stored
    operator = StoredOperator(store, "C1", "ntk", memory=3 * 4 * 16)
    operator.multiply(np.ones((10, 1)))
    Path(store.url, "gram/C1/ntk/c/0/1").unlink()
    assert_allclose(operator.multiply(np.ones((10, 1)))[:, 0], gram.sum(axis=1) / 2, rtol=1e-5)
    Path(store.url, "gram/C1/ntk/c/1/2").unlink()
    with pytest.raises(IncompleteRunError, match="of 3 chunks of gram/C1/ntk are missing"):
        operator.multiply(np.ones((10, 1)))


def test_missing_and_damaged_tiles_are_refused(stored: tuple[GramStore, Any]) -> None:
    store, _ = stored
    path = Path(store.url, "gram/C1/ntk/c/0/2")
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedTileError, match=r"chunk 0, 2 of gram/C1/ntk .*checksum") as error:
        StoredOperator(store, "C1", "ntk").multiply(np.ones((10, 1)))
    assert error.value.tile == Tile("gram", 0, 2)
    path = Path(store.url, "gram/C1/ntk/c/1/1")
    path.unlink()
    with pytest.raises(IncompleteRunError, match="1 of 3 chunks of gram/C1/ntk are missing"):
        StoredOperator(store, "C1", "ntk")
