"""The scikit-learn estimators: their conventions, and predictions that are those of the solver."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from equigram.errors import SpecError, StoreMismatchError
from equigram.sklearn import EquivariantKernelClassifier, EquivariantKernelRegressor
from equigram.solve import real_targets, solve
from equikernel import GroupCNN

NET = GroupCNN(group="C4", depth=2)


SMALL = GroupCNN(depth=1)


@parametrize_with_checks([EquivariantKernelClassifier(SMALL), EquivariantKernelRegressor(SMALL)])  # type: ignore[untyped-decorator]
def test_scikit_learns_own_checks_pass(estimator: Any, check: Any) -> None:
    check(estimator)


def digits(count: int = 60) -> tuple[Any, Any]:
    """Some images of handwritten digits 0 to 3: (count, 8, 8, 1), and their labels."""
    images, labels = load_digits(n_class=4, return_X_y=True)
    return images[:count].reshape(-1, 8, 8, 1), labels[:count]


def test_predictions_are_those_of_the_solver() -> None:
    images, labels = digits()
    values = np.stack([labels, labels**2], axis=1).astype(float)
    model = EquivariantKernelRegressor(NET, kernel="nngp", ridge=1e-3, normalize=False, dtype="float64")
    model.fit(images[:50], values[:50])
    train, test = (
        NET.kernel(images[:50], dtype="float64").nngp,
        NET.kernel(images[50:], images[:50], dtype="float64").nngp,
    )
    (solution,) = solve(train, real_targets(values[:50]), [1e-3])
    assert_allclose(model.predict(images[50:]), solution.predict(test), rtol=1e-9)
    assert_allclose(EquivariantKernelRegressor(NET).fit(images[:50], values[:50, 0]).predict(images[:3]).shape, (3,))


def test_images_and_flat_rows_are_the_same() -> None:
    images, labels = digits()
    rows = images.reshape(len(images), -1)
    of_images = EquivariantKernelClassifier(NET).fit(images[:40], labels[:40])
    of_rows = EquivariantKernelClassifier(NET, image_shape=(8, 8, 1)).fit(rows[:40], labels[:40])
    assert_allclose(of_images.decision_function(images[40:]), of_rows.decision_function(rows[40:]))
    assert of_images.score(images[40:], labels[40:]) > 0.9


def test_turned_images_are_predicted_as_upright_ones() -> None:
    images, labels = digits()
    model = EquivariantKernelClassifier(NET, dtype="float64").fit(images[:40], labels[:40])
    turned = np.rot90(images[40:], axes=(1, 2))
    assert_allclose(model.decision_function(turned), model.decision_function(images[40:]), rtol=1e-9, atol=1e-9)


def test_probabilities_are_calibrated_on_images_that_are_left_out() -> None:
    images, labels = digits(80)
    names = np.array(["zero", "one", "two", "three"])[labels]
    model = EquivariantKernelClassifier(NET).fit(images[:50], names[:50])
    chances = model.predict_proba(images[50:])
    assert_allclose(chances.sum(axis=1), 1)
    assert_array_equal(model.classes_, ["one", "three", "two", "zero"])
    assert_array_equal(model.classes_[chances.argmax(axis=1)], model.predict(images[50:]))
    assert 0.01 <= model.beta_ <= 100


def test_the_ridge_with_the_smallest_error_on_left_out_images_is_taken() -> None:
    images, labels = digits()
    ridges = [1e-6, 1e-3, 1e3]
    errors = [EquivariantKernelClassifier(NET, ridge=one).fit(images, labels).left_out_error_ for one in ridges]
    model = EquivariantKernelClassifier(NET, ridge=ridges).fit(images, labels)
    assert model.ridge_ == ridges[int(np.argmin(errors))]
    assert model.left_out_error_ == min(errors)


def test_they_are_cloned_pickled_and_searched_over() -> None:
    images, labels = digits()
    model = EquivariantKernelClassifier(NET, ridge=1e-2)
    assert clone(model).get_params() == model.get_params()
    fitted = model.fit(images, labels)
    again = pickle.loads(pickle.dumps(fitted))
    assert_array_equal(again.predict(images), fitted.predict(images))
    grid = {"network": [GroupCNN(group="C1", depth=1), GroupCNN(group="C4", depth=1)], "kernel": ["nngp", "ntk"]}
    search = GridSearchCV(EquivariantKernelClassifier(), grid, cv=2).fit(images, labels)
    assert len(search.cv_results_["params"]) == 4
    flat = make_pipeline(MinMaxScaler(), EquivariantKernelClassifier(NET, image_shape=(8, 8, 1)))
    assert cross_val_score(flat, images.reshape(len(images), -1), labels, cv=2).mean() > 0.8


def test_the_train_matrix_can_be_computed_by_a_job(tmp_path: Path) -> None:
    images, labels = digits(30)
    here = EquivariantKernelClassifier(NET).fit(images, labels)
    job = EquivariantKernelClassifier(NET, resources={"workers": 0}, store=str(tmp_path / "run")).fit(images, labels)
    assert_array_equal(job.predict(images), here.predict(images))
    assert_allclose(job.decision_function(images), here.decision_function(images), atol=1e-4)
    assert (tmp_path / "run/gram/C4/ntk").exists()
    (tmp_path / "run/gram/C4/ntk/c/0/0").unlink()  # as after an interruption
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    again = EquivariantKernelClassifier(NET, resources={"workers": 0}, store=str(tmp_path / "run")).fit(images, labels)
    assert_array_equal(again.solution_.coefficients, job.solution_.coefficients)
    with pytest.raises(StoreMismatchError):
        EquivariantKernelClassifier(NET, resources={"workers": 0}, store=str(tmp_path / "run")).fit(
            images[:20], labels[:20]
        )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"network": "C4"}, "network = 'C4' is no equikernel.GroupCNN"),
        ({"kernel": "rbf"}, "kernel = 'rbf' is not allowed; choose 'nngp' or 'ntk'"),
        ({"ridge": -1.0}, "ridge -1 is not allowed"),
        ({"ridge": []}, "there is no ridge value"),
        ({"image_shape": (4, 4, 1)}, r"image_shape = \(4, 4, 1\) does not fit rows of 64 features"),
    ],
)
def test_parameters_that_cannot_be_are_refused(options: dict[str, Any], text: str) -> None:
    images, labels = digits(20)
    with pytest.raises(SpecError, match=text):
        EquivariantKernelClassifier(**{"network": NET, **options}).fit(images.reshape(20, -1), labels)


def test_images_of_another_shape_are_refused() -> None:
    images, labels = digits(20)
    model = EquivariantKernelClassifier(NET).fit(images, labels)
    with pytest.raises(SpecError, match=r"the images are \(8, 4, 2\), and those of the fit \(8, 8, 1\)"):
        model.predict(images.reshape(20, 8, 4, 2))
    with pytest.raises(SpecError, match=r"X has shape \(20, 8, 8\); it must be images"):
        model.predict(images[..., 0])
