"""A matrix in the memory of Ray workers: products, workers that die, and stores that are damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
from numpy.testing import assert_allclose, assert_array_equal

from equigram.errors import DamagedTileError
from equigram.events import nobody
from equigram.solve import StoredOperator, class_targets, solve, solve_iteratively
from equigram.solve.cluster import ClusterOperator
from equigram.solve.stage import solve_run
from equigram.spec import JobSpec, ResourceSpec, SolveSpec
from equigram.store import GramStore


@pytest.fixture
def finished(
    job: Callable[..., JobSpec], create: Callable[[JobSpec], GramStore], compute: Callable[..., None]
) -> GramStore:
    """A finished run of 10 images: 6 tiles of 4."""
    store = create(job(gram={"kernels": ["ntk"], "groups": ["C4"]}))
    compute(store)
    return store


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("workers", [1, 100])
def test_workers_multiply_as_one_process_does(finished: GramStore, workers: int) -> None:
    alone = StoredOperator(finished, "C4", "ntk")
    values = np.random.default_rng(0).standard_normal((10, 70))
    with ClusterOperator(finished, "C4", "ntk", ResourceSpec(workers=workers)) as together:
        assert (together.count, together.scale, together.dtype) == (alone.count, alone.scale, alone.dtype)
        first = together.multiply(values)
        assert_allclose(first, alone.multiply(values), rtol=1e-12)
        assert_array_equal(together.multiply(values), first)


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_dies_is_replaced(finished: GramStore) -> None:
    values = np.ones((10, 2))
    with ClusterOperator(finished, "C4", "ntk", ResourceSpec(workers=2)) as together:
        before = together.multiply(values)
        ray.kill(together._actors[0], no_restart=False)
        assert_array_equal(together.multiply(values), before)


@pytest.mark.usefixtures("cluster")
def test_conjugate_gradients_run_on_workers(finished: GramStore) -> None:
    targets = class_targets(np.arange(10) % 3, "abc")
    (direct,) = solve(finished.matrix("gram", "C4", "ntk"), targets, [1e-3])
    with ClusterOperator(finished, "C4", "ntk", ResourceSpec(workers=2)) as together:
        found = solve_iteratively(together, targets, 1e-3, tolerance=1e-12)
    assert_allclose(found.coefficients, direct.coefficients, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("cluster")
def test_a_job_on_a_cluster_is_solved_by_its_workers(finished: GramStore) -> None:
    spec = SolveSpec(ridge=(1e-2,), method="iterative", tolerance=1e-10, train_sizes=(2,))
    alone = solve_run(finished, spec, ("ntk",), nobody)
    shutil.rmtree(Path(finished.url, "solution"))
    together = solve_run(finished, spec, ("ntk",), nobody, ResourceSpec(workers=2))
    assert [one.accuracy for one in together] == [one.accuracy for one in alone]
    assert max(one.residual or 0.0 for one in together) <= 1e-10


@pytest.mark.usefixtures("cluster")
def test_a_damaged_tile_is_told_by_the_worker_that_reads_it(finished: GramStore) -> None:
    path = Path(finished.url, "gram/C4/ntk/c/0/1")
    content = bytearray(path.read_bytes())
    content[2] ^= 1
    path.write_bytes(content)
    with (
        ClusterOperator(finished, "C4", "ntk", ResourceSpec(workers=2)) as together,
        pytest.raises(DamagedTileError, match=r"chunk 0, 1 of gram/C4/ntk"),
    ):
        together.multiply(np.ones((10, 1)))
