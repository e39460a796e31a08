"""Estimators for scikit-learn: kernel regression with an infinitely wide equivariant network.

>>> from equigram.sklearn import EquivariantKernelClassifier
>>> from equikernel import GroupCNN
>>> model = EquivariantKernelClassifier(network=GroupCNN(group="C4", depth=2), ridge=[1e-4, 1e-2])
>>> model.fit(images, labels).predict(more_images)          # images (n, H, W, C)

They need scikit-learn (``pip install equigram[sklearn]``), and work in pipelines, ``cross_val_score`` and
``GridSearchCV``, over ``network`` for example.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import tempfile
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from equigram.errors import SpecError
from equigram.solve import (
    Targets,
    class_targets,
    inverse_temperature,
    probabilities,
    real_targets,
)
from equigram.solve.regression import best_of, left_out_error, solve_each
from equikernel import GroupCNN
from equikernel.kernel import compute

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
except ImportError as error:
    raise ImportError("equigram.sklearn needs scikit-learn; install it with `pip install equigram[sklearn]`") from error

Array = NDArray[Any]


class _KernelRegression(BaseEstimator):  # type: ignore[misc]
    """What both estimators do."""

    def __init__(
        self,
        network: GroupCNN | None = None,
        *,
        kernel: str = "ntk",
        ridge: Any = 1e-4,
        normalize: bool = True,
        image_shape: tuple[int, int, int] | None = None,
        dtype: str = "float32",
        engine: str = "auto",
        resources: dict[str, Any] | None = None,
        store: str | None = None,
    ) -> None:
        self.network = network
        self.kernel = kernel
        self.ridge = ridge
        self.normalize = normalize
        self.image_shape = image_shape
        self.dtype = dtype
        self.engine = engine
        self.resources = resources
        self.store = store

    def _fit(self, images: Array, targets: Targets) -> Self:
        """Choose the ridge, and keep what predictions need."""
        ridges = [float(one) for one in np.atleast_1d(self.ridge)]
        self.mean_, self.std_ = np.zeros(images.shape[-1]), np.ones(images.shape[-1])
        if self.normalize:
            self.mean_ = images.mean(axis=(0, 1, 2), dtype=np.float64)
            self.std_ = images.std(axis=(0, 1, 2), dtype=np.float64)
            self.std_[self.std_ == 0] = 1.0
        self.images_ = self._normalised(images)
        best = best_of(solve_each(self._gram(), targets, ridges, leave_one_out=True), targets)
        error = left_out_error(best, targets)
        self.ridge_, self.left_out_error_ = best.ridge, math.inf if error is None else error
        self.solution_ = best
        return self

    def _network(self) -> GroupCNN:
        if self.network is not None and not isinstance(self.network, GroupCNN):
            raise SpecError(f"network = {self.network!r} is no equikernel.GroupCNN")
        if self.kernel not in ("nngp", "ntk"):
            raise SpecError(f"kernel = {self.kernel!r} is not allowed; choose 'nngp' or 'ntk'")
        return GroupCNN() if self.network is None else self.network.model_copy()  # a use leaves traces in it

    def _gram(self) -> Array:
        """The train Gram matrix (n, n): computed here, or by a job."""
        network = self._network()
        if self.resources is None and self.store is None:
            return self._cross(self.images_, None)
        from equigram.run import run
        from equigram.spec import JobSpec

        with (
            tempfile.TemporaryDirectory(prefix="equigram-") as folder,
            self._images_beside(store := self.store or f"{folder}/run") as images,
        ):
            spec = JobSpec.parse(
                {
                    "store": store,
                    "data": {"train": images, "normalize": "none"},
                    "network": network.model_dump(exclude={"group"}, exclude_unset=True),
                    "gram": {
                        "groups": [network.group],
                        "kernels": [self.kernel],
                        "dtype": self.dtype,
                        "engine": self.engine,
                    },
                    "resources": self.resources or {},
                    "solve": None,
                },
                source="EquivariantKernel",
            )
            done = run(spec).store
            order = [int(re.findall(r"\d+", name)[-1]) for name in done.names("train")]
            place = np.argsort(order)
            return done.matrix("gram", network.group, self.kernel)[np.ix_(place, place)]

    @contextlib.contextmanager
    def _images_beside(self, store: str) -> Iterator[str]:
        """Where the images lie for a job, which knows them by their place: beside the store, as long as it runs."""
        import fsspec

        place, content = f"{store.rstrip('/')}.images.npz", io.BytesIO()
        np.savez(content, x_train=self.images_)
        fs, path = fsspec.core.url_to_fs(place)
        fs.makedirs(str(path).rpartition("/")[0], exist_ok=True)
        fs.pipe_file(path, content.getvalue())
        try:
            yield place
        finally:
            fs.rm(path)

    def _cross(self, images: Array, others: Array | None) -> Array:
        network = self._network()
        kernels = compute(network, (network.group,), images, others, engine=self.engine, dtype=self.dtype)
        return np.asarray(getattr(kernels[network.group], self.kernel))

    def _regress(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """μ(x): (m, k) float64."""
        check_is_fitted(self)
        images = self._normalised(self._images(X, reset=False))
        return self.solution_.predict(self._cross(images, self.images_))

    def _normalised(self, images: Array) -> Array:
        return np.ascontiguousarray((images - self.mean_) / self.std_, self.dtype)

    def _images(self, X: Any, *, reset: bool) -> Array:  # noqa: N803
        """``X`` as images (n, H, W, C)."""
        X = validate_data(  # noqa: N806
            self, X, reset=reset, allow_nd=True, dtype=[np.float64, np.float32], ensure_min_samples=2 if reset else 1
        )
        return self._shaped(X, reset=reset)

    def _shaped(self, X: Array, *, reset: bool) -> Array:  # noqa: N803
        if X.ndim == 2:
            shape = (1, 1, X.shape[1]) if self.image_shape is None else tuple(self.image_shape)
            if len(shape) != 3 or math.prod(shape) != X.shape[1]:
                raise SpecError(
                    f"image_shape = {self.image_shape} does not fit rows of {X.shape[1]} features; it must be "
                    "(H, W, C), with H·W·C features"
                )
            X = X.reshape(-1, *shape)  # noqa: N806
        if X.ndim != 4:
            raise SpecError(f"X has shape {X.shape}; it must be images (n, H, W, C), or flat rows (n, H·W·C)")
        if reset:
            self.image_shape_ = X.shape[1:]
        elif X.shape[1:] != self.image_shape_:
            raise SpecError(f"the images are {X.shape[1:]}, and those of the fit {self.image_shape_}")
        return X

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags


PARAMETERS = """

    Args:
      network: a :class:`equikernel.GroupCNN`; ``None`` is C4 with three layers of 3x3 filters.
      kernel: ``"ntk"`` or ``"nngp"``.
      ridge: λ in units of the mean diagonal, or several, of which the one with the smallest mean squared error on
        training images that are left out one at a time is taken.
      normalize: subtract the mean of each channel over the training images, and divide by its standard deviation.
      image_shape: (H, W, C) of flat rows. ``None`` takes a row of d features for one pixel with d channels, which makes
        any network a fully connected one.
      dtype: of the kernels, ``"float32"`` or ``"float64"``.
      engine: as in :meth:`equikernel.GroupCNN.kernel`.
      resources: ``resources`` of a job, as a dictionary: the train matrix is then computed by a job on Ray workers,
        and predictions in this process.
      store: where that job lives, so that an interrupted fit of the same images goes on (other images, as those of
        cross-validation, need another store); ``None`` is a temporary folder.

    Attributes:
      ridge_: the λ that was taken.
      left_out_error_: its mean squared error on training images that are left out.
      solution_: the :class:`equigram.solve.Solution`, with residual and condition number.
      images_: the training images, (n, H, W, C), as the kernels see them.
      classes_, beta_: of the classifier, the labels, sorted, and the inverse temperature of ``predict_proba``.

    Raises (from ``fit`` and predictions):
      SpecError, DataError: parameters or images that cannot be; both are ``ValueError``.
      SolverError: no ridge value has a solution.
    """


class EquivariantKernelRegressor(RegressorMixin, MultiOutputMixin, _KernelRegression):  # type: ignore[misc]
    """Kernel regression, μ(x) = ȳ + Θ(x, X) (Θ(X, X) + λ s)⁻¹ (Y - ȳ), with an infinitely wide equivariant network."""

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803
        """Fit to images ``(n, H, W, C)`` or flat rows, and targets ``(n,)`` or ``(n, k)``."""
        X, y = validate_data(  # noqa: N806
            self, X, y, allow_nd=True, multi_output=True, y_numeric=True, dtype=[np.float64, np.float32],
            ensure_min_samples=2,
        )  # fmt: skip
        self._single = y.ndim == 1
        return self._fit(self._shaped(X, reset=True), real_targets(y.reshape(len(y), -1).astype(np.float64)))

    def predict(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """μ(x), in the shape of the targets."""
        predictions = self._regress(X)
        return predictions[:, 0] if self._single else predictions


class EquivariantKernelClassifier(ClassifierMixin, _KernelRegression):  # type: ignore[misc]
    """Kernel regression on one-hot targets with an infinitely wide equivariant network."""

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803
        """Fit to images ``(n, H, W, C)`` or flat rows, and labels ``(n,)`` of any kind."""
        X, y = validate_data(  # noqa: N806
            self, X, y, allow_nd=True, dtype=[np.float64, np.float32], ensure_min_samples=2
        )
        check_classification_targets(y)
        self.classes_, labels = np.unique(column_or_1d(y), return_inverse=True)
        self._fit(self._shaped(X, reset=True), class_targets(labels, [str(one) for one in self.classes_]))
        left_out = self.solution_.left_out
        assert left_out is not None
        self.beta_ = inverse_temperature(left_out, labels)
        return self

    def decision_function(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """μ(x), about 1 for the class and 0 for others: (m, k); for two classes their difference, (m,)."""
        predictions = self._regress(X)
        return predictions[:, 1] - predictions[:, 0] if len(self.classes_) == 2 else predictions

    def predict(self, X: Any) -> Array:  # noqa: N803
        """The class with the largest μ(x): (m,)."""
        predictions = self._regress(X)
        return np.asarray(self.classes_[predictions.argmax(axis=1)])

    def predict_proba(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """``softmax(β μ(x))``, (m, k): β fits the training images that are left out one at a time best."""
        return probabilities(self._regress(X), self.beta_)


for _estimator in (EquivariantKernelRegressor, EquivariantKernelClassifier):
    _estimator.__doc__ = f"{_estimator.__doc__}{PARAMETERS}"
