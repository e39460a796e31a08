"""The experiments: tables against their definitions, figures as files, and what happens when they are interrupted."""

from __future__ import annotations

import csv
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.kernel_ridge import KernelRidge

import equigram.experiments.augmentation
import equigram.experiments.trainability
from equigram.errors import DataError, ResourceError, SpecError, StoreError
from equigram.events import Event, Progress, nobody
from equigram.experiments import convergence, curves, dynamics
from equigram.experiments.augmentation import run_augmentation
from equigram.experiments.convergence import BATCH, Convergence, run_convergence
from equigram.experiments.curves import default_sizes, run_curves
from equigram.experiments.dynamics import run_dynamics
from equigram.experiments.parts import Parts
from equigram.experiments.trainability import Trainability, fixed_point, run_trainability
from equigram.solve import memory_needed
from equigram.spec import JobSpec
from equigram.store import GramStore
from equigram.tables import write_table
from equikernel import GroupCNN, NetworkError

SMALL = Convergence(groups=("C4",), widths=(2, 8, 32), samples=16, depth=2, images=2, size=4)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def is_figure(path: Path) -> bool:
    content = path.read_bytes()
    return content.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in content[:1000]


@pytest.fixture
def finished(
    job: Callable[..., JobSpec], create: Callable[[JobSpec], GramStore], compute: Callable[..., None], tmp_path: Path
) -> GramStore:
    """A finished run of three classes: 18 training and 9 test images, C1 and C4."""
    rng = np.random.default_rng(0)
    labels, truth = np.arange(18) % 3, np.arange(9) % 3
    stripes = 80 * (np.arange(8) // (np.concatenate([labels, truth])[:, None] + 1) % 2)
    images = (stripes[:, None, :] + rng.integers(0, 120, (27, 8, 8))).astype(np.uint8)
    np.savez(tmp_path / "x.npz", x_train=images[:18], y_train=labels, x_test=images[18:], y_test=truth)
    store = create(job(data={"train": tmp_path / "x.npz"}, gram={"groups": ["C1", "C4"], "tile": 8}))
    compute(store)
    return store


# ------------------------------------------------------------------------------------------------------ convergence


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("convergence")
    return folder, run_convergence(SMALL, folder, nobody)


def test_errors_are_those_of_the_mean_of_the_samples(sampled: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = sampled
    assert [(row["group"], row["kernel"], row["width"]) for row in rows] == [
        (group, kernel, width) for group in ("C4",) for kernel in ("nngp", "ntk") for width in (2, 8, 32)
    ]
    for row in rows:
        samples = np.load(folder / f"samples/{row['group']}-{row['width']}.npz")[row["kernel"]][: row["networks"]]
        net = SMALL.network(row["group"])
        limit = getattr(net.kernel(SMALL.inputs(), engine="reference"), row["kernel"])
        expected = np.mean(np.abs(samples.mean(axis=0) - limit) / np.abs(limit))
        assert_allclose(row["relative_error"], expected, rtol=1e-6)
        assert_allclose(row["relative_bias"], np.mean((samples.mean(axis=0) - limit) / np.abs(limit)), rtol=1e-5)
        assert_allclose(row["spread_of_one"], np.mean(samples.std(axis=0, ddof=1) / np.abs(limit)), rtol=1e-5)
        assert 0 < row["standard_error"] < row["spread_of_one"]
        assert row["networks"] == {2: 256, 8: 64, 32: 16}[row["width"]]


def test_both_slopes_are_found_again() -> None:
    """Made-up samples with a bias of 0.8 / width and a spread of 1.5 / √width."""
    spec = Convergence(groups=("C1",), widths=(1, 4, 16, 64), samples=400)
    limit, rng = np.array([[2.0, 1.0], [1.0, 3.0]]), np.random.default_rng(0)
    samples = [
        limit * (1 + 0.8 / width + 1.5 / width**0.5 * rng.standard_normal((spec.networks(width), 1, 1)))
        for width in spec.widths
    ]
    rows = convergence._rows("C1", "ntk", spec, limit, samples)
    for row in rows:
        assert abs(row["fitted_bias_times_width"] - 0.8) < 3 * row["fitted_bias_standard_error"] < 0.3
        assert row["fitted_spread_times_root_width"] == pytest.approx(1.5, rel=0.1)
        assert abs(row["bias_exponent"] + 1) < 3 * row["bias_exponent_standard_error"] < 0.5
        assert row["spread_exponent"] == pytest.approx(-0.5, abs=0.05)
        assert row["relative_error"] == pytest.approx(abs(row["relative_bias"]))


def test_the_spread_falls_like_the_root_of_the_width(sampled: tuple[Path, list[dict[str, Any]]]) -> None:
    for kernel in ("nngp", "ntk"):
        some = [row for row in sampled[1] if row["kernel"] == kernel]
        assert 2 < some[0]["spread_of_one"] / some[2]["spread_of_one"] < 8  # 4, but for chance


def test_a_table_and_figures_are_written(sampled: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = sampled
    written = table(folder / "convergence.csv")
    assert [float(row["relative_error"]) for row in written] == [row["relative_error"] for row in rows]
    assert is_figure(folder / "convergence.png")
    assert is_figure(folder / "convergence.svg")


def test_what_is_sampled_is_not_sampled_again_and_more_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = Convergence(groups=("C1",), widths=(2, 4), samples=BATCH, depth=1, images=2, size=3)
    monkeypatch.setattr(convergence, "MORE", 1)
    original = convergence._more
    calls: list[int] = []

    def more(*arguments: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments[2])
        return original(*arguments)

    monkeypatch.setattr(convergence, "_more", more)
    first = run_convergence(spec, tmp_path, nobody)
    assert calls == [4, 2]
    assert run_convergence(spec, tmp_path, nobody) == first
    larger = Convergence(groups=("C1",), widths=(2, 4), samples=2 * BATCH, depth=1, images=2, size=3)
    with pytest.raises(KeyboardInterrupt):
        run_convergence(larger, tmp_path, nobody)
    assert calls == [4, 2, 4]
    calls.clear()
    rows = run_convergence(larger, tmp_path, nobody)
    assert calls == [2]
    monkeypatch.setattr(convergence, "_more", original)
    assert run_convergence(larger, tmp_path / "anew", nobody) == rows


def test_samples_of_other_settings_are_refused(tmp_path: Path) -> None:
    spec = Convergence(groups=("C1",), widths=(2,), samples=2, depth=1, images=1, size=3)
    run_convergence(spec, tmp_path, nobody)
    other = Convergence(groups=("C1",), widths=(2,), samples=2, depth=2, images=1, size=3)
    with pytest.raises(SpecError, match=r"holds samples of .*'depth': 1.* and asked for are .*'depth': 2"):
        run_convergence(other, tmp_path, nobody)
    (tmp_path / "samples/C1-2.npz").write_bytes(b"nothing")
    with pytest.raises(StoreError, match=r"C1-2.npz is damaged .* delete it and run again"):
        run_convergence(
            Convergence(groups=("C1",), widths=(2,), samples=2, depth=1, images=1, size=3), tmp_path, nobody
        )


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"samples": 1}, "samples = 1 is not allowed; it must be 2 or more"),
        ({"depth": 0}, "depth = 0 is not allowed"),
        ({"widths": ()}, r"widths = \[\] is not allowed"),
        ({"widths": (2, 2)}, r"widths = \[2, 2\] is not allowed; name at least one, and each once"),
        ({"widths": (0, 2)}, "width 0 is not allowed"),
    ],
)
def test_what_cannot_be_sampled_is_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        Convergence(**fields)


# --------------------------------------------------------------------------------------------------- learning curves


def test_a_point_of_a_learning_curve_is_a_regression_with_a_subset(finished: GramStore, tmp_path: Path) -> None:
    rows = run_curves(finished, tmp_path, nobody, sizes=[2, 6], subsets=3, seed=4, ridge=[1e-2])
    labels, truth = finished.labels("train"), finished.labels("test")
    assert labels is not None
    rng = np.random.default_rng(4)
    orders = [[rng.permutation(np.flatnonzero(labels == label)) for label in range(3)] for _ in range(3)]
    for row in rows:
        chosen = np.sort(np.concatenate([one[: row["per_class"]] for one in orders[row["subset"]]]))
        gram = finished.matrix("gram", row["group"], row["kernel"]).astype(np.float64)[np.ix_(chosen, chosen)]
        cross = finished.matrix("cross", row["group"], row["kernel"]).astype(np.float64)[:, chosen]
        one_hot = np.eye(3)[labels[chosen]]
        model = KernelRidge(alpha=1e-2 * gram.diagonal().mean(), kernel="precomputed")
        predictions = model.fit(gram, one_hot - one_hot.mean(axis=0)).predict(cross) + one_hot.mean(axis=0)
        assert row["accuracy"] == np.mean(predictions.argmax(axis=1) == truth)
        assert_allclose(row["mse"], np.mean(np.square(predictions - np.eye(3)[truth])), rtol=1e-6)
    sizes = [(row["group"], row["kernel"], row["per_class"]) for row in rows]
    assert sizes.count(("C4", "ntk", 2)) == 3
    assert sizes.count(("C4", "ntk", 6)) == 1  # all images: there is one such subset
    assert len(table(tmp_path / "curves.csv")) == len(rows) == 4 * 4
    assert is_figure(tmp_path / "curves.png")
    assert is_figure(tmp_path / "curves.svg")


def test_interrupted_curves_go_on_and_matrices_may_be_larger_than_memory(
    finished: GramStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_curves(finished, tmp_path / "whole", nobody, sizes=[1, 2], subsets=2)
    scored: list[Any] = []
    score = curves._score

    def counting(*problem: Any) -> dict[str, Any]:
        if len(scored) == most:
            raise KeyboardInterrupt
        scored.append(problem)
        return score(*problem)

    most = 5
    monkeypatch.setattr(curves, "_score", counting)
    with pytest.raises(KeyboardInterrupt):
        run_curves(finished, tmp_path / "parts", nobody, sizes=[1, 2], subsets=2)
    assert not (tmp_path / "parts/curves.csv").exists()
    scored.clear()
    most = 1000
    monkeypatch.setattr(curves, "available_memory", lambda: memory_needed(6) + 100)
    assert run_curves(finished, tmp_path / "parts", nobody, sizes=[1, 2], subsets=2) == whole
    assert len(scored) == len(whole) - 4  # a size is kept when all its subsets are done
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["curves.csv", "curves.png", "curves.svg"]
    run_curves(finished, tmp_path / "parts", nobody, sizes=[1], subsets=2, seed=1)
    assert len(scored) == len(whole) - 4 + 8


def test_parts_of_experiments_are_kept_unless_they_are_damaged_or_of_another_problem(tmp_path: Path) -> None:
    path, problem = tmp_path / "x.part.json", {"seed": 1, "times": (1.0, math.inf)}
    parts = Parts(path, problem)
    assert parts.get("a") is None
    parts.keep("a", [{"accuracy": 0.5}])
    assert Parts(path, problem).get("a") == [{"accuracy": 0.5}]
    assert Parts(path, {"seed": 2}).get("a") is None
    content = path.read_text(encoding="utf-8")
    for damaged in ("[1]", "{", "{}", content.replace("0.5", "5.0"), content.replace("accuracy", "accurasy")):
        path.write_text(damaged)
        assert Parts(path, problem).get("a") is None
    parts.delete()
    assert not path.exists()


def test_interrupted_dynamics_and_augmentation_go_on(
    finished: GramStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Progress) and event.done == 1:
            raise KeyboardInterrupt

    computed: list[str] = []

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any) -> Any:
            computed.append(original.__name__)
            return original(*given)

        return counting

    whole = run_dynamics(finished, tmp_path / "a", nobody)
    with pytest.raises(KeyboardInterrupt):
        run_dynamics(finished, tmp_path / "b", interrupt)
    monkeypatch.setattr(dynamics, "_modes", counted(dynamics._modes))
    assert run_dynamics(finished, tmp_path / "b", nobody) == whole  # one of two matrices
    options: dict[str, Any] = {"names": ("C2", "D1"), "images": 4}
    rows = run_augmentation(finished, tmp_path / "c", nobody, **options)
    with pytest.raises(KeyboardInterrupt):
        run_augmentation(finished, tmp_path / "d", interrupt, **options)
    compared = counted(equigram.experiments.augmentation._compared)
    monkeypatch.setattr(equigram.experiments.augmentation, "_compared", compared)
    assert run_augmentation(finished, tmp_path / "d", nobody, **options) == rows
    assert computed == ["_modes", "_compared"]
    assert not list(tmp_path.rglob("*.part.json"))


def test_the_ridge_of_a_subset_is_chosen_on_left_out_images(finished: GramStore, tmp_path: Path) -> None:
    rows = run_curves(finished, tmp_path, nobody, sizes=[6], subsets=1, ridge=[1e-6, 1e-1, 1e3])
    assert {row["ridge"] for row in rows} <= {1e-6, 1e-1}  # a huge ridge predicts the mean


def test_default_sizes_end_with_the_smallest_class() -> None:
    assert default_sizes(1) == [1]
    assert default_sizes(32) == [1, 2, 5, 10, 20, 32]
    assert default_sizes(100) == [1, 2, 5, 10, 20, 50, 100]


def test_curves_that_cannot_be_are_refused(
    finished: GramStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Any, create: Any
) -> None:
    with pytest.raises(SpecError, match=r"sizes \[2, 7\] are asked for; the smallest class has 6 training images"):
        run_curves(finished, tmp_path, nobody, sizes=[7, 2])
    monkeypatch.setattr(curves, "available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match=r"subsets of 18 images take .* take smaller sizes"):
        run_curves(finished, tmp_path, nobody)
    np.savez(tmp_path / "bare.npz", x_train=np.arange(64, dtype=np.uint8).reshape(4, 4, 4))
    bare = create(job(tmp_path / "bare", data={"train": tmp_path / "bare.npz"}, solve=None))
    with pytest.raises(DataError, match=r"has no classes, or no labelled test images"):
        run_curves(bare, tmp_path, nobody)
    with pytest.raises(DataError, match=r"have no labels, and so there is nothing to learn"):
        run_dynamics(bare, tmp_path, nobody)


# ---------------------------------------------------------------------------------------------------------- dynamics


def test_spectrum_and_dynamics_are_those_of_the_matrices(finished: GramStore, tmp_path: Path) -> None:
    events: list[Event] = []
    spectra, over_time = run_dynamics(finished, tmp_path, events.append, ("nngp", "ntk"), (0.0, 3.0, np.inf))
    assert events[-1] == Progress("spectra", 4, 4)
    labels = finished.labels("train")
    targets = np.eye(3)[labels] - np.eye(3)[labels].mean(axis=0)
    for group in ("C1", "C4"):
        gram = finished.matrix("gram", group, "ntk").astype(np.float64)
        gram /= gram.diagonal().mean()
        some = [row for row in spectra if (row["group"], row["kernel"]) == (group, "ntk")]
        assert [row["rank"] for row in some] == list(range(1, 19))
        assert_allclose([row["eigenvalue"] for row in some], np.linalg.eigvalsh(gram)[::-1], rtol=1e-6, atol=1e-9)
        assert_allclose(sum(row["alignment"] for row in some), 1)
        assert_allclose(some[-1]["cumulative_alignment"], 1)
        assert_allclose(some[0]["learning_time"], 1 / some[0]["eigenvalue"])
        start, middle, end = (row for row in over_time if (row["group"], row["kernel"]) == (group, "ntk"))
        assert_allclose(start["train_mse"], np.mean(np.square(targets)))
        assert end["train_mse"] < 1e-6 < middle["train_mse"] < start["train_mse"]
        cross = finished.matrix("cross", group, "ntk").astype(np.float64)
        whole = finished.matrix("gram", group, "ntk").astype(np.float64)
        predictions = cross @ np.linalg.solve(whole, targets) + np.eye(3)[labels].mean(axis=0)
        truth = finished.labels("test")
        assert_allclose(end["test_mse"], np.mean(np.square(predictions - np.eye(3)[truth])), rtol=1e-4)
        assert end["test_accuracy"] == np.mean(predictions.argmax(axis=1) == truth)
    assert len(table(tmp_path / "spectrum.csv")) == 4 * 18
    assert len(table(tmp_path / "dynamics.csv")) == 4 * 3
    assert is_figure(tmp_path / "dynamics.png")
    assert is_figure(tmp_path / "dynamics.svg")


def test_more_images_than_memory_holds_are_refused(finished: GramStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamics, "available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match=r"the eigenvectors of 18 images take .* are available"):
        run_dynamics(finished, Path("nowhere"), nobody)


# ------------------------------------------------------------------------------------------------------ augmentation


def test_training_on_all_turned_images_is_the_averaged_kernel(finished: GramStore, tmp_path: Path) -> None:
    rows = run_augmentation(finished, tmp_path, nobody, ("C2", "D4"), images=6, ridge=(1e-3, 1.0))
    assert [(row["group"], row["kernel"]) for row in rows[::2]] == [
        (group, kernel) for group in ("C2", "D4") for kernel in ("nngp", "ntk")
    ]
    for row in rows:
        assert row["elements"] == {"C2": 2, "D4": 8}[row["group"]]
        assert row["ridge_averaged"] == row["ridge_augmented"] / row["elements"]
        assert row["largest_difference"] < 1e-9 * max(1.0, row["largest_prediction"])
        assert row["largest_prediction"] > 0.01
        assert row["kernel_difference"] < 1e-12  # without a head the averaged kernel is that of the group network
    assert len(table(tmp_path / "augmentation.csv")) == 8
    assert len(table(tmp_path / "predictions.csv")) == 8 * 6 * 3
    assert is_figure(tmp_path / "augmentation.png")
    assert is_figure(tmp_path / "augmentation.svg")


def test_another_ridge_on_the_averaged_kernel_is_not_the_same(
    finished: GramStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = equigram.experiments.augmentation._solve
    monkeypatch.setattr(
        equigram.experiments.augmentation, "_solve",
        lambda matrix, values, ridge: original(matrix, values, ridge * (4 if len(matrix) == 6 else 1)),
    )  # fmt: skip
    rows = run_augmentation(finished, tmp_path, nobody, ("C4",), images=6, ridge=(1e-1,))
    assert min(row["largest_difference"] for row in rows) > 1e-3


def test_groups_off_the_grid_are_not_augmented_with(finished: GramStore, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"group 'C3' does not map pixels to pixels; choose of C2, C4, D1, D2 and D4"):
        run_augmentation(finished, tmp_path, nobody, ("C3",))


# ------------------------------------------------------------------------------------------------------ trainability


def test_the_fixed_point_and_slope_of_relu_are_known() -> None:
    # He initialisation: E[relu(u)²] = q / 2, so that σ_w² = 2 keeps the variance, and χ₁ = σ_w² / 2.
    assert fixed_point("relu", 2.0, 0.0) == pytest.approx((1.0, 1.0))
    assert fixed_point("relu", 1.0, 0.5) == pytest.approx((1.0, 0.5))
    assert fixed_point("relu", 2.5, 0.0) == (np.inf, np.inf)


def test_the_fixed_point_of_erf_is_that_of_quadrature() -> None:
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    weights = weights / weights.sum()
    q, slope = fixed_point("erf", 1.7, 0.1)
    erf = np.vectorize(math.erf)
    derivative = 2 / np.sqrt(np.pi) * np.exp(-q * np.square(nodes))
    assert_allclose(1.7 * (weights * erf(np.sqrt(q) * nodes) ** 2).sum() + 0.1, q, rtol=1e-9)
    assert_allclose(slope, 1.7 * (weights * np.square(derivative)).sum(), rtol=1e-9)


def test_conditions_are_those_of_the_kernels_and_the_ordered_phase_is_the_worse(tmp_path: Path) -> None:
    spec = Trainability(
        groups=("C4",), depths=(2, 6), weight_variances=(0.5, 3.0), bias_variances=(0.5,), images=4, size=4
    )
    rows = run_trainability(spec, tmp_path, nobody)
    images = np.random.default_rng(0).standard_normal((4, 4, 4, 1))
    for row in rows:
        net = GroupCNN(
            depth=row["depth"], activation="erf", w_std=row["weight_variance"] ** 0.5, b_std=row["bias_variance"] ** 0.5
        )
        ntk = net.kernel(images, engine="reference").ntk
        assert_allclose(row["condition"], np.linalg.cond(ntk), rtol=1e-4)
        assert_allclose(row["mean_diagonal"], np.diagonal(ntk).mean())
        ratio = ntk[~np.eye(4, dtype=bool)].mean() / np.diagonal(ntk).mean()
        assert_allclose(row["off_diagonal_ratio"], ratio)
    by_place = {(row["weight_variance"], row["depth"]): row for row in rows}
    assert by_place[0.5, 6]["slope"] < 1 < by_place[3.0, 6]["slope"]
    assert by_place[0.5, 6]["condition"] > 10 * by_place[0.5, 2]["condition"]
    assert by_place[3.0, 6]["condition"] < by_place[3.0, 2]["condition"]
    assert is_figure(tmp_path / "trainability.png")
    assert is_figure(tmp_path / "trainability.svg")


def test_points_that_are_there_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"groups": ("C1",), "bias_variances": (0.1,), "images": 2, "size": 3, "activation": "relu"}
    first = run_trainability(Trainability(depths=(1,), weight_variances=(1.0, 2.0), **fields), tmp_path, nobody)
    computed = []
    original = equigram.experiments.trainability._measured

    def measured(*arguments: Any) -> Any:
        computed.append(arguments[2:5])
        return original(*arguments)

    monkeypatch.setattr(equigram.experiments.trainability, "_measured", measured)
    rows = run_trainability(Trainability(depths=(1, 2), weight_variances=(1.0, 2.0), **fields), tmp_path, nobody)
    assert computed == [(2, 1.0, 0.1), (2, 2.0, 0.1)]
    assert [row for row in rows if row["depth"] == 1] == first
    run_trainability(Trainability(depths=(1,), weight_variances=(1.0, 2.0), **fields), tmp_path, nobody)
    assert len(table(tmp_path / "trainability.csv")) == 4  # what was there stays
    with pytest.raises(SpecError, match=r"trainability.csv is of .*relu.* and asked for is .*erf"):
        run_trainability(
            Trainability(depths=(1,), weight_variances=(1.0,), **{**fields, "activation": "erf"}), tmp_path, nobody
        )


def test_damaged_files_of_experiments_are_said(tmp_path: Path) -> None:
    (tmp_path / "trainability.csv").write_text("group,depth\nC1,two\n")
    with pytest.raises(StoreError, match=r"trainability.csv is damaged .*; delete it, or choose another folder"):
        run_trainability(Trainability(depths=(1,)), tmp_path, nobody)
    with pytest.raises(NetworkError, match="activation: 'foo' is not allowed; choose relu"):
        run_trainability(Trainability(depths=(1,), activation="foo"), tmp_path / "other", nobody)
    spec = Convergence(groups=("C1",), widths=(2,), samples=2, depth=1, images=1, size=3)
    run_convergence(spec, tmp_path, nobody)
    samples = tmp_path / "samples/C1-2.npz"
    content = samples.read_bytes()
    flipped = bytearray(content)
    flipped[200] ^= 1
    for damaged in (content[:300], bytes(flipped)):
        samples.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"C1-2.npz is damaged .* delete it and run again"):
            run_convergence(spec, tmp_path, nobody)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(StoreError, match=r"settings.json is damaged .*; choose another folder"):
        run_convergence(spec, tmp_path, nobody)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(StoreError, match=r"holds samples, but not of what \(settings.json\); choose another folder"):
        run_convergence(spec, tmp_path, nobody)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"depths": ()}, r"depths = \[\] is not allowed"),
        ({"depths": (0,)}, r"depths = \[0\] is not allowed; name each once, all 1 or more"),
        ({"weight_variances": (-1.0,)}, r"weight_variances = \[-1.0\] is not allowed"),
        ({"images": 1}, "images = 1 is not allowed"),
    ],
)
def test_what_cannot_be_trained_is_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        Trainability(**fields)


# ---------------------------------------------------------------------------------------------------------- commands


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(equigram: Command) -> Command:
    """Runs an experiment by command in a folder."""
    return lambda folder, *arguments: equigram(folder, "experiment", *arguments)


def test_the_commands_write_what_they_say(finished: GramStore, command: Command, tmp_path: Path) -> None:
    done = command(tmp_path, "curves", finished.url, "-o", "out/curves", "--size", 2, "--subsets", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("C1 nngp, 6 images: ")
    assert done.stdout.splitlines()[-1] == "out/curves/curves.csv, curves.png, curves.svg"
    done = command(tmp_path, "dynamics", finished.url, "-o", "out/dynamics")
    assert done.returncode == 0, done.stderr
    done = command(tmp_path, "augmentation", finished.url, "-o", "out/augmentation", "--group", "C2", "--images", 4)
    assert done.returncode == 0, done.stderr
    assert "C2 ntk, ridge " in done.stdout
    options: tuple[object, ...] = ("--group", "C1", "--depth", 1, "--activation", "relu")
    done = command(tmp_path, "trainability", "-o", "out/trainability", *options)
    assert done.returncode == 0, done.stderr
    options = ("--group", "C1", "--width", 2, "--samples", 2, "--depth", 1, "--images", 1, "--size", 3)
    done = command(tmp_path, "convergence", "-o", "out/convergence", *options)
    assert done.returncode == 0, done.stderr
    assert "C1 ntk: relative error " in done.stdout
    assert json.loads((tmp_path / "out/convergence/settings.json").read_text())["depth"] == 1
    for name in ("curves", "dynamics", "convergence", "augmentation", "trainability"):
        for suffix in (".csv", ".png", ".svg"):
            assert (tmp_path / "out" / name / f"{name}{suffix}").exists()


def test_bad_requests_end_in_one_sentence(finished: GramStore, command: Command, tmp_path: Path) -> None:
    for words, *arguments in (
        ("--kernel 'rbf' is not in", "dynamics", finished.url, "-o", "x", "--kernel", "rbf"),
        ("nothing is not a finished run store", "curves", "nothing", "-o", "x"),
        ("sizes [100] are asked for", "curves", finished.url, "-o", "x", "--size", 100),
        ("C5x", "convergence", "-o", "x", "--group", "C5x"),
    ):
        done = command(tmp_path, *arguments)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert words in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_a_table_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/x.csv: cannot be written: .*; choose a folder"):
        write_table(tmp_path / "file/x.csv", [{"a": 1}])
