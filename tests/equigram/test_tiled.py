"""Factorisations of matrices that no memory holds, against factorisations in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from equigram.errors import (
    DamagedArrayError,
    DamagedTileError,
    IncompleteRunError,
    ResourceError,
    SolverError,
    SpecError,
)
from equigram.plan import Tile
from equigram.solve import class_targets, real_targets, solve, solve_tiled
from equigram.solve.tiled import least_memory
from equigram.spec import JobSpec
from equigram.store import GramStore

N, EDGE = 30, 4
LEAST = least_memory(N, EDGE, 3)

Job = Callable[..., JobSpec]
Create = Callable[[JobSpec], GramStore]


def gram_of(seed: int = 0, dtype: Any = np.float32) -> NDArray[Any]:
    x = np.random.default_rng(seed).standard_normal((N, 4))
    return np.asarray(2 * np.exp(-np.sqrt(np.square(x[:, None] - x[None]).sum(axis=-1)) / 2), dtype)


def fill(store: GramStore, gram: NDArray[Any]) -> None:
    for tile in store.info.tiling.tiles():
        rows, cols = store.info.tiling.rows(tile), store.info.tiling.cols(tile)
        store.write_values(tile, {("C1", "ntk"): gram[rows.start : rows.stop, cols.start : cols.stop]})


@pytest.fixture
def store(job: Job, create: Create, tmp_path: Path) -> GramStore:
    """A store of 30 images in tiles of 4 with a known matrix."""
    images = np.random.default_rng(0).integers(0, 255, (N, 4, 4)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", x_train=images, y_train=np.arange(N) % 3)
    made = create(job(data={"train": tmp_path / "x.npz"}, gram={"groups": ["C1"], "kernels": ["ntk"], "tile": EDGE}))
    fill(made, gram_of())
    return made


TARGETS = class_targets(np.arange(N) % 3, "abc")


@pytest.mark.parametrize("panels", [1, 3, 8])
def test_the_solution_is_that_of_the_factorisation_in_memory(store: GramStore, panels: int) -> None:
    wide = 8 * EDGE * (8 // panels) * (N + EDGE * (8 // panels))
    told: list[tuple[int, int]] = []
    found = solve_tiled(
        store, "C1", "ntk", TARGETS, 1e-3, memory=LEAST + wide, progress=lambda done, total: told.append((done, total))
    )
    (direct,) = solve(gram_of(), TARGETS, [1e-3])
    assert_allclose(found.coefficients, direct.coefficients, rtol=1e-9, atol=1e-12)
    assert found.residual < 1e-13
    assert direct.condition / 20 < found.condition < direct.condition
    assert told[-1] == (8, 8)
    factor: Any = zarr.open_group(store.url, mode="r")["factor/C1/ntk"]
    lower = np.tril(factor[...])
    assert_allclose(lower @ lower.T, gram_of() / 2 + 1e-3 * np.eye(N), rtol=1e-6, atol=1e-8)


def test_an_interrupted_factorisation_goes_on_from_the_last_panel(
    store: GramStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def solved(most: int = 1000) -> tuple[Any, int]:
        """The solution, interrupted after ``most`` tiles, and how many tiles of the factor were written."""
        original = GramStore.write_factor
        written: set[tuple[int, int]] = set()

        def write(self: GramStore, group: str, kernel: str, row: int, col: int, values: Any) -> None:
            if len(written) == most:
                raise KeyboardInterrupt
            written.add((row, col))
            original(self, group, kernel, row, col, values)

        with monkeypatch.context() as patch:
            patch.setattr(GramStore, "write_factor", write)
            return solve_tiled(store, "C1", "ntk", TARGETS, 1e-3, memory=LEAST), len(written)

    whole, written = solved()
    assert written == 36
    again, written = solved()
    assert_array_equal(again.coefficients, whole.coefficients)
    assert written == 0  # the factor is there
    store.discard_factor("C1", "ntk")
    with pytest.raises(KeyboardInterrupt):
        solved(8 + 7 + 3)
    again, written = solved()
    assert_array_equal(again.coefficients, whole.coefficients)
    assert written == 36 - 8 - 7
    solve_tiled(store, "C1", "ntk", TARGETS, 1e-2, memory=LEAST)  # another ridge needs another factor
    assert solved()[1] == 36


def test_a_damaged_factor_is_refused_and_made_anew(store: GramStore) -> None:
    whole = solve_tiled(store, "C1", "ntk", TARGETS, 1e-3, memory=LEAST)
    path = Path(store.url, "factor/C1/ntk/c/5/2")
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedArrayError, match=r"chunk 5, 2 of factor/C1/ntk is damaged: its checksum .* again"):
        solve_tiled(store, "C1", "ntk", TARGETS, 1e-3, memory=LEAST)
    again = solve_tiled(store, "C1", "ntk", TARGETS, 1e-3, memory=LEAST)
    assert_array_equal(again.coefficients, whole.coefficients)


def test_missing_and_damaged_tiles_are_refused(store: GramStore) -> None:
    Path(store.url, "gram/C1/ntk/c/6/1").unlink()
    with pytest.raises(IncompleteRunError, match=r"1 of .* chunks of gram/C1/ntk are missing"):
        solve_tiled(store, "C1", "ntk", TARGETS, 1e-3, memory=LEAST)
    Path(store.url, "gram/C1/ntk/c/6/1").write_bytes(bytes(68))
    with pytest.raises(DamagedTileError, match=r"chunk 6, 1 of gram/C1/ntk") as error:
        solve_tiled(store, "C1", "ntk", TARGETS, 1e-3, memory=LEAST)
    assert error.value.tile == Tile("gram", 1, 6)


def test_what_cannot_be_solved_is_refused(store: GramStore) -> None:
    with pytest.raises(ResourceError, match=r"of a matrix of 30 images in tiles of 4 needs .* and may use 1000 bytes"):
        solve_tiled(store, "C1", "ntk", TARGETS, 1e-3, memory=1000)
    with pytest.raises(SpecError, match="ridge -1 is not allowed"):
        solve_tiled(store, "C1", "ntk", TARGETS, -1.0, memory=LEAST)
    gram = gram_of()
    gram[:, 9], gram[9] = gram[:, 17], gram[17]
    gram[9, 9] = gram[17, 17]
    fill(store, gram)
    with pytest.raises(
        SolverError, match=r"not positive definite to float64 rounding, which shows at training image 17"
    ):
        solve_tiled(store, "C1", "ntk", TARGETS, 0.0, memory=LEAST)
    assert solve_tiled(store, "C1", "ntk", TARGETS, 1e-6, memory=LEAST).residual < 1e-8


def test_constant_targets_have_no_coefficients(store: GramStore) -> None:
    assert not solve_tiled(store, "C1", "ntk", real_targets(np.ones((N, 1))), 1e-3, memory=LEAST).coefficients.any()


def test_more_images_need_another_factor(store: GramStore, tmp_path: Path) -> None:
    from equigram.data import Split

    solve_tiled(store, "C1", "ntk", TARGETS, 1e-3, memory=LEAST)
    images = np.full((1, *store.info.image_shape), 0.5, np.float32)
    store.extend("train", Split(images, np.zeros(1, np.int64), ("a",)), "more")
    assert not Path(store.url, "factor").exists()
