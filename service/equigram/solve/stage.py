"""The solver stage: reads finished matrices from the store, writes coefficients, predictions and metrics back."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equigram.digests import json_sha256
from equigram.errors import DamagedArrayError, DataError, ResourceError, SolverError, SpecError, StoreError
from equigram.events import Listener, Progress
from equigram.plan import Tile
from equigram.solve.cluster import ClusterOperator
from equigram.solve.iterative import Preconditioner, solve_iteratively
from equigram.solve.matrices import Float64s
from equigram.solve.metrics import (
    accuracy,
    accuracy_interval,
    balanced_accuracy,
    inverse_temperature,
    log_loss,
    mean_squared_error,
    negative_log_likelihood,
    probabilities,
)
from equigram.solve.operators import Operator, StoredOperator, SubsetOperator
from equigram.solve.regression import Solution, memory_needed, solve_each
from equigram.solve.spectrum import memory_for_spectrum, solve_path_each
from equigram.solve.targets import Targets, class_targets, nested_subset, real_targets
from equigram.solve.tiled import least_memory, solve_tiled
from equigram.spec import ResourceSpec, SolveSpec
from equigram.store import GramStore
from equikernel.memory import available_memory, format_bytes

Labels = NDArray[Any] | None
Method = str
"""``direct``, ``tiled`` or ``iterative``."""

SHARE = 0.9
"""Part of the available memory that the solver takes unless it is told otherwise."""

VERSION = 2
"""Of what is stored: solutions of another version are solved again."""


PATH = 8
"""So many ridge values or more come from one eigendecomposition, which is then less work than as many inverses."""

KEEP_SECONDS = 60.0
"""Time after which conjugate gradients keep where they are: what is lost at most when they are interrupted."""


@dataclass(frozen=True)
class Result:
    """One regression: a network, a kernel, a number of training images and a ridge value, and how good it is.

    Attributes:
      group, kernel: which Gram matrix.
      train_size: training images per class (of all images in regression); ``None`` for all there are.
      images: training images used.
      ridge: λ in units of the mean diagonal.
      accuracy: share of test images predicted right, 0 to 1; ``None`` for regression or without test labels.
      mean_squared_error: in squared units of the targets, one-hot for classes; ``None`` without test labels.
      residual: relative residual of the linear system; ``None`` where it has no usable solution.
      condition: estimated condition number of the regularised matrix; ``None`` likewise.
      warning: what a person should know, if anything: why there is no solution, or that it is ill-conditioned.
      chosen: whether this is the ridge value to predict with, of those with the same images.
      method: ``direct``, ``tiled`` or ``iterative``.
      left_out_error: mean squared error on training images that were left out; ``None`` where none were.
      accuracy_interval: 95% bounds of the accuracy on images like the test images (Wilson); ``None`` likewise.
      balanced_accuracy: mean over the classes of the share of their test images predicted right; ``None`` likewise.
      log_loss: mean of -log of the calibrated probability of the true class of the test images, in nats; ``None``
        likewise, and where no training image was left out to calibrate with.
      negative_log_likelihood: of the test targets under the Gaussian process that makes the training targets most
        likely, in nats per image and column; ``None`` without variances.
      dtype: of the stored matrix; what is solved is float64.
      converged: whether conjugate gradients reached the tolerance; true for other methods.
    """

    group: str
    kernel: str
    train_size: int | None
    images: int
    ridge: float
    accuracy: float | None
    mean_squared_error: float | None
    residual: float | None
    condition: float | None
    warning: str | None
    chosen: bool = False
    method: Method = "direct"
    left_out_error: float | None = None
    accuracy_interval: tuple[float, float] | None = None
    balanced_accuracy: float | None = None
    log_loss: float | None = None
    negative_log_likelihood: float | None = None
    dtype: str | None = None
    converged: bool = True


def check_solvable(spec: SolveSpec, labels: Labels, classes: tuple[str, ...] | None) -> int:
    """Raise what the solver stage would, as far as the labels alone tell: before any tile is computed.

    Returns:
      How many columns the targets have.

    Raises:
      DataError: there are no labels, or only one class or target.
      SpecError: ``solve.train_sizes`` asks for more images than there are, or ``solve.folds`` for more parts.
    """
    targets = targets_of(labels, classes)
    if classes is None and (np.abs(targets.values) <= 1e-12 * np.abs(targets.offset)).all():
        raise DataError(
            f"all {len(targets.values)} training images have the same target, {_vector(targets.offset)}, and there is "
            "nothing to learn; correct the labels, or set `solve: null` to compute the Gram matrices only"
        )
    smallest = len(targets.values)
    for size in spec.train_sizes or ():
        smallest = min(smallest, len(_subset(labels, size, classes)))
    if spec.choose == "folds" and spec.folds > smallest:
        raise SpecError(f"solve.folds = {spec.folds} parts cannot be made of {smallest} training images; take fewer")
    return int(targets.values.shape[1])


def _vector(values: Float64s) -> str:
    return ", ".join(f"{value:g}" for value in values[:8]) + ", ..." * (len(values) > 8)


def check_memory(spec: SolveSpec, train: int, itemsize: int, edge: int, columns: int) -> int:
    """Raise unless the solver stage has the memory that it needs; returns how much that is, in bytes.

    Args:
      spec: the method, and how much memory it may use.
      train: training images.
      itemsize: bytes of an entry of the stored matrices.
      edge: of the tiles.
      columns: of the targets.

    Raises:
      ResourceError: there is less memory.
      SpecError: the ridge value cannot be chosen in the way that is asked for.
    """
    _check_choice(spec, choose_method(spec, train))
    budget = memory_budget(spec)
    needs = {
        "direct": memory_needed(train),
        "tiled": least_memory(train, edge, columns),
        "iterative": _least_iterative(spec, train, itemsize, edge, columns),
    }
    needed = needs[choose_method(spec, train)]
    if needed > budget:
        method = choose_method(spec, train)
        smaller = "" if method == "direct" else f"tiles of less than {edge} images (gram.tile), "
        remedy = {"direct": "solve.method: iterative, ", "tiled": "", "iterative": "a lower solve.rank, "}[method]
        raise ResourceError(
            f"solving with {train:,} training images needs {format_bytes(needed)} of memory with method {method!r}, "
            f"and {format_bytes(budget)} may be used; take {remedy}{smaller}fewer images (data.per_class) or a larger "
            "machine, or set `solve: null` to compute the Gram matrices only"
        )
    return needed


def _check_choice(spec: SolveSpec, method: Method) -> None:
    """Raise :class:`SpecError` if something is asked for that a method does not have."""
    if spec.choose in ("leave_one_out", "folds") and method != "direct":
        raise SpecError(
            f"solve.choose = {spec.choose!r} needs the matrix in memory, and the method here is {method!r}; set "
            "solve.choose to 'first' or 'auto', or use a larger machine"
        )
    if spec.variances and method != "direct":
        raise SpecError(
            f"solve.variances needs the matrix in memory, and the method here is {method!r}; leave it out, or use a "
            "larger machine"
        )


def memory_budget(spec: SolveSpec) -> int:
    """Bytes that the solver stage may use."""
    return int(SHARE * available_memory() if spec.memory is None else spec.memory * 2**30)


def choose_method(spec: SolveSpec, train: int) -> Method:
    """How ``train`` images are solved with."""
    if spec.method != "auto":
        return spec.method
    return "direct" if memory_needed(train) <= memory_budget(spec) else "iterative"


def _least_iterative(spec: SolveSpec, train: int, itemsize: int, edge: int, columns: int) -> int:
    """Bytes that conjugate gradients need without a single tile kept: the sketch, and vectors."""
    return 8 * train * (5 * min(spec.rank, max(1, train // 4)) + 10 * columns) + 64 * itemsize * edge * edge


def solve_run(
    store: GramStore,
    spec: SolveSpec,
    kernels: tuple[str, ...],
    listener: Listener,
    cluster: ResourceSpec | None = None,
) -> list[Result]:
    """Solve for every group and kernel, train size and ridge value; store and return the results.

    What is stored already for the same images, labels and settings is not solved again.

    Args:
      store: a run whose matrices are complete.
      spec: ridge values, train sizes and methods.
      kernels: the kernels to predict with.
      listener: told of the progress.
      cluster: workers of the connected Ray cluster that hold the tiles for conjugate gradients; ``None`` means that
        this process reads them.

    Raises:
      IncompleteRunError, DamagedTileError: a matrix cannot be read whole.
      SolverError: a regression has no usable solution for any ridge value.
      ResourceError: there is not enough memory.
      ClusterError: the cluster is gone.
    """
    info = store.info
    labels, test_labels = store.labels("train"), store.labels("test") if info.test else None
    pairs = [(group, kernel) for group in info.spec.gram.groups for kernel in kernels]
    results: list[Result] = []
    for index, (group, kernel) in enumerate(pairs):
        stage = _Stage(store, spec, group, kernel, labels, test_labels, listener, (index, len(pairs)), cluster)
        some = stage.stored() or stage.solve()
        stage.tidy(some)
        results += some
        listener(Progress("solve", (index + 1) * stage.regressions, len(pairs) * stage.regressions))
    return results


def _asked(spec: SolveSpec) -> dict[str, Any]:
    """What a job asks for, wherever it is solved, as JSON."""
    return spec.model_dump(mode="json", exclude={"memory", "kernels"})


def solved_matrices(store: GramStore) -> list[tuple[str, str]]:
    """The groups and kernels that are solved as the last job asks for, in its order.

    Raises:
      DamagedArrayError: a solution is damaged.
    """
    spec, found = store.info.spec, list[tuple[str, str]]()
    for group, kernel in itertools.product(spec.gram.groups, spec.solved_kernels or spec.gram.kernels):
        attributes = store.solution_attributes(group, kernel) or {}
        same = spec.solve is None or attributes.get("asked") == json_sha256(_asked(spec.solve))
        if same and attributes.get("version") == VERSION:
            found.append((group, kernel))
    return found


def stored_results(store: GramStore, group: str, kernel: str) -> list[Result]:
    """The results that :func:`solve_run` stored."""
    _, attributes = store.solution(group, kernel)
    return [_result(fields) for fields in attributes["solutions"]]


def all_results(store: GramStore) -> list[Result]:
    """The results of all matrices that are solved as the last job asks for."""
    return [result for pair in solved_matrices(store) for result in stored_results(store, *pair)]


@dataclass(eq=False)
class _Attempt:
    """A regression with some of the images, and what came of it."""

    size: int | None
    chosen: NDArray[np.int64] | None
    targets: Targets
    method: Method
    ridge: float
    solution: Solution | SolverError
    left_out: Float64s | None
    predictions: list[Float64s] = dataclasses.field(default_factory=list)

    @property
    def left_out_error(self) -> float | None:
        """Mean squared error on training images that were left out; ``None`` where none were."""
        if self.left_out is None:
            return None
        return mean_squared_error(self.left_out, self.targets.values + self.targets.offset)

    def inverse_temperature(self) -> float | None:
        """What calibrates the predictions of classes; ``None`` where no image was left out."""
        targets = self.targets
        if self.left_out is None or targets.classes is None:
            return None
        return inverse_temperature(self.left_out, (targets.values + targets.offset).argmax(axis=1))


class _Stage:
    """The regressions with one matrix."""

    def __init__(
        self,
        store: GramStore,
        spec: SolveSpec,
        group: str,
        kernel: str,
        labels: Labels,
        test_labels: Labels,
        listener: Listener,
        place: tuple[int, int],
        cluster: ResourceSpec | None,
    ) -> None:
        self._store, self._spec, self._names, self._info = store, spec, (group, kernel), store.info
        self._labels, self._test_labels, self._listener, self._cluster = labels, test_labels, listener, cluster
        self._sizes = [*sorted(spec.train_sizes or ()), None]
        self.regressions = len(self._sizes)
        self._place, self._count = place[0] * self.regressions, place[1] * self.regressions
        self._method = choose_method(spec, store.info.train)
        _check_choice(spec, self._method)

    def stored(self) -> list[Result]:
        """What is stored, if it is what would be solved; else nothing."""
        try:
            _, attributes = self._store.solution(*self._names)
        except StoreError:  # there is none, or it is damaged
            return []
        same = attributes.get("inputs") == self._inputs() and attributes.get("version") == VERSION
        return [_result(fields) for fields in attributes["solutions"]] if same else []

    def _inputs(self) -> str:
        """SHA-256 of all that decides the results."""
        info = self._info
        asked = {**_asked(self._spec), "method": self._method}
        return json_sha256({**asked, "seed": info.spec.data.seed, "sha256": info.sha256})

    def _problem(self) -> str:
        """SHA-256 of what all regressions are about, however they are done."""
        return json_sha256({"seed": self._info.spec.data.seed, "sha256": self._info.sha256})

    def solve(self) -> list[Result]:
        """Solve, and store it."""
        attempts: list[_Attempt] = []
        for number, size in enumerate(self._sizes):
            self._listener(Progress("solve", self._place + number, self._count))
            some = list(self._attempts(size))
            self._check_some_solved(some)
            attempts += some
        self._predict(attempts)
        for size in self._sizes:
            self._check_some_solved([one for one in attempts if one.size == size])
        results = self._judge(attempts)
        whole = [one for one in attempts if one.size is None and isinstance(one.solution, Solution)]
        best = whole.index(self._choose(whole))
        beta = whole[best].inverse_temperature()
        self._store.write_solution(
            *self._names,
            _arrays(whole, best, beta),
            {
                "version": VERSION,
                "chosen": best,
                "inverse_temperature": beta,
                "inputs": self._inputs(),
                "asked": json_sha256(_asked(self._spec)),
                "solutions": [dataclasses.asdict(result) for result in results],
            },
        )
        return results

    def tidy(self, results: Sequence[Result]) -> None:
        """Delete what is only of use until all is solved."""
        self._store.discard_factor(*self._names)
        if all(result.converged for result in results):
            self._store.discard_iterates(*self._names)

    def _check_some_solved(self, some: Sequence[_Attempt]) -> None:
        """Raise unless a ridge value has a solution."""
        if all(isinstance(one.solution, SolverError) for one in some):
            images = len(some[0].targets.values)
            raise SolverError(f"{' '.join(self._names)}, {images} training images: {some[-1].solution}")

    def _attempts(self, size: int | None) -> Iterator[_Attempt]:
        """The regressions with so many training images per class."""
        labels, classes, spec = self._labels, self._info.classes, self._spec
        chosen = None if size is None else _subset(labels, size, classes)
        targets = targets_of(labels if chosen is None or labels is None else labels[chosen], classes)
        count = len(targets.values)
        method = self._method
        if chosen is not None and method != "direct":  # a part of a matrix has no factor in the store
            method = choose_method(spec.model_copy(update={"method": "auto"}), count) if method == "tiled" else method
        if method == "direct":
            gram = self._store.matrix("gram", *self._names, chosen, chosen)
            leave_one_out = spec.choose == "leave_one_out" or (spec.choose == "auto" and len(spec.ridge) > 1)
            folds = self._fold_predictions(gram, targets) if spec.choose == "folds" else None
            queries = self._queries if spec.variances and chosen is None and self._info.test else None
            fits = memory_for_spectrum(count) <= memory_budget(spec)
            if leave_one_out and queries is None and len(spec.ridge) >= PATH and fits:
                solutions = solve_path_each(gram, targets, spec.ridge)
            else:
                solutions = solve_each(gram, targets, spec.ridge, leave_one_out=leave_one_out, queries=queries)
            for index, solution in enumerate(solutions):
                if isinstance(solution, SolverError):
                    solution, left_out = self._named(solution, chosen), None
                else:
                    left_out = solution.left_out if folds is None else folds[index]
                yield _Attempt(size, chosen, targets, method, spec.ridge[index], solution, left_out)
            return
        with self._operator(chosen, targets) if method == "iterative" else contextlib.nullcontext() as operator:
            sketch = None if operator is None else Preconditioner.sketch(operator, 0.0, spec.rank)
            for ridge in spec.ridge:
                try:
                    solution = self._solve_large(operator, sketch, targets, ridge, size)
                except SolverError as error:
                    solution = self._named(error, chosen)
                yield _Attempt(size, chosen, targets, method, ridge, solution, None)

    def _named(self, error: SolverError, chosen: NDArray[np.int64] | None) -> SolverError:
        """An error with the names of the images that it is about; equal ones are looked for where none is named."""
        names = self._store.names("train")
        used = range(len(names)) if chosen is None else chosen.tolist()
        if error.images:
            images = [names[used[index]] for index in error.images]
            subject = "image" if len(images) == 1 else "images"
            return SolverError(f"{error}; the {subject} came from {' and '.join(images)}", error.images)
        pair = self._equal_images(used) if "positive definite" in str(error) else None
        if pair is None:
            return error
        first, second = pair
        return SolverError(
            f"{error}; training images {first} ({names[first]}) and {second} ({names[second]}) are equal: leave one out"
        )

    def _equal_images(self, used: Sequence[int]) -> tuple[int, int] | None:
        """Two of these training images with the same pixels, if there are any."""
        tiling, wanted, seen = self._info.tiling, set(used), dict[bytes, int]()
        for block in range(tiling.train_blocks):
            first = tiling.train_images(block).start
            for index, image in enumerate(self._store.block("train", block), first):
                digest = hashlib.sha256(image.tobytes()).digest()
                if index in wanted and seen.setdefault(digest, index) != index:
                    return seen[digest], index
        return None

    def _queries(self) -> Iterator[tuple[NDArray[Any], Float64s]]:
        """The test images, a block at a time: their kernels with the training images, and with themselves."""
        tiling, (group, kernel) = self._info.tiling, self._names
        function = self._info.spec.function_here((group,), self._info.image_shape)
        for block in range(tiling.test_blocks):
            rows = tiling.rows(Tile("cross", block, 0))
            images = function.prepare(self._store.block("test", block), "the test images", rows.start)
            itself = getattr(function.diagonal(images)[group], kernel)
            yield self._store.matrix("cross", group, kernel, rows), itself

    @contextlib.contextmanager
    def _operator(self, chosen: NDArray[np.int64] | None, targets: Targets) -> Iterator[Operator]:
        """The matrix of some images, to multiply with."""
        store, names, gram = self._store, self._names, self._info.spec.gram
        with contextlib.ExitStack() as stack:
            if self._cluster is not None:
                operator: Operator = stack.enter_context(ClusterOperator(store, *names, self._cluster))
            else:
                itemsize, columns = np.dtype(gram.dtype).itemsize, targets.values.shape[1]
                needed = _least_iterative(self._spec, self._info.train, itemsize, self._info.tile, columns)
                operator = StoredOperator(store, *names, max(0, memory_budget(self._spec) - needed))
            if chosen is not None:
                diagonal = store.diagonal(*names)[chosen].astype(np.float64)
                operator = SubsetOperator(operator, chosen, float(diagonal.mean()))
            yield operator

    def _solve_large(
        self,
        operator: Operator | None,
        sketch: Preconditioner | None,
        targets: Targets,
        ridge: float,
        size: int | None,
    ) -> Solution:
        """A regression without the matrix in memory: with an operator, or else by a factorisation in the store.

        What was interrupted goes on: conjugate gradients from where they were, the others from the last panel, and what
        had ended is not done again.
        """
        spec, name = self._spec, f"{' '.join(self._names)}, ridge {ridge:g}"
        place = f"{self._problem()[:16]}-{self._method}-{'all' if size is None else size}-{ridge!r}"
        kept, facts = self._store.iterate(*self._names, place) or (None, {})
        if operator is None:
            tiled = functools.partial(
                solve_tiled, self._store, *self._names, targets, ridge, memory=memory_budget(spec),
                progress=lambda done, total: self._listener(Progress(f"factorise {name}", done, total)),
                solved=None if kept is None else (kept, facts["condition"]),
            )  # fmt: skip
            try:
                solution = tiled()
            except DamagedArrayError:  # a tile of the factor, which is deleted
                solution = tiled()
        else:
            digits, last = max(1, round(-np.log10(spec.tolerance) * 10)), time.monotonic()

            def told(step: int, residual: float) -> None:
                reached = 0 if residual <= 0 else int(min(digits, max(0.0, -10 * np.log10(residual))))
                self._listener(Progress(name, reached, digits, f"residual {residual:.0e} after {step} steps"))

            latest: list[Float64s] = []

            def keep(scaled: Float64s) -> None:
                nonlocal last
                latest[:] = [scaled]
                if time.monotonic() - last >= KEEP_SECONDS:
                    self._store.write_iterate(*self._names, place, scaled, {})
                    last = time.monotonic()

            try:
                solution = solve_iteratively(
                    operator, targets, ridge, tolerance=spec.tolerance, steps=spec.steps, sketch=sketch, start=kept,
                    progress=told, keep=keep,
                )  # fmt: skip
            except SolverError:
                if latest and np.isfinite(latest[0]).all():  # more steps may help
                    self._store.write_iterate(*self._names, place, latest[0], {})
                raise
        values = solution.coefficients * solution.scale
        self._store.write_iterate(*self._names, place, values, {"condition": solution.condition})
        return solution

    def _fold_predictions(self, gram: NDArray[Any], targets: Targets) -> list[Float64s | None]:
        """For each ridge value the predictions of parts that are left out in turn; ``None`` without solution."""
        spec, values = self._spec, targets.values + targets.offset
        order = np.random.default_rng(self._info.spec.data.seed).permutation(len(gram))
        found = [np.full(values.shape, np.nan) for _ in spec.ridge]
        for part in np.array_split(order, spec.folds):
            rest = np.setdiff1d(order, part)
            offset = values[rest].mean(axis=0)
            others = Targets(values[rest] - offset, offset, targets.classes)
            for index, solution in enumerate(solve_each(gram[np.ix_(rest, rest)], others, spec.ridge)):
                if isinstance(solution, Solution):
                    found[index][part] = solution.predict(gram[np.ix_(part, rest)])
        return [each if np.isfinite(each).all() else None for each in found]

    def _predict(self, attempts: Sequence[_Attempt]) -> None:
        """The predictions of all solutions for the test images, from one pass over these."""
        tiling = self._info.tiling
        for block in range(tiling.test_blocks):
            rows = tiling.rows(Tile("cross", block, 0))
            cross = self._store.matrix("cross", *self._names, rows)
            for one in attempts:
                if isinstance(one.solution, SolverError):
                    continue
                try:
                    part = one.solution.predict(cross if one.chosen is None else cross[:, one.chosen])
                except SolverError as error:  # an overflow
                    one.solution = error
                else:
                    one.predictions.append(part)

    def _judge(self, attempts: Sequence[_Attempt]) -> list[Result]:
        """How good the solutions are, and which ridge value is chosen for each number of images."""
        solved = [one for one in attempts if isinstance(one.solution, Solution)]
        chosen = [self._choose([one for one in solved if one.size == size]) for size in self._sizes]
        return [self._result(one, chosen=any(one is best for best in chosen)) for one in attempts]

    @staticmethod
    def _choose(solved: Sequence[_Attempt]) -> _Attempt:
        """Of regressions with the same images and a solution, the one to predict with."""
        converged = [one for one in solved if isinstance(one.solution, Solution) and one.solution.converged]
        if not converged:
            return min(solved, key=lambda one: one.solution.residual if isinstance(one.solution, Solution) else np.inf)
        tried = [one for one in converged if one.left_out_error is not None]
        return min(tried, key=lambda one: one.left_out_error or 0.0) if tried else converged[0]

    def _result(self, one: _Attempt, *, chosen: bool) -> Result:
        group, kernel = self._names
        result = Result(
            group=group,
            kernel=kernel,
            train_size=one.size,
            images=len(one.targets.values),
            ridge=one.ridge,
            accuracy=None,
            mean_squared_error=None,
            residual=None,
            condition=None,
            warning=None,
            chosen=chosen,
            method=one.method,
            dtype=self._info.spec.gram.dtype,
        )
        if isinstance(one.solution, SolverError):
            return dataclasses.replace(result, warning=str(one.solution))
        scores: dict[str, Any] = {}
        if one.predictions and self._test_labels is not None:
            scores = _scores(np.concatenate(one.predictions), self._test_labels, one)
        return dataclasses.replace(
            result,
            **scores,
            residual=one.solution.residual,
            condition=one.solution.condition,
            warning=one.solution.warning,
            converged=one.solution.converged,
            left_out_error=one.left_out_error,
        )


def _arrays(solved: Sequence[_Attempt], best: int, beta: float | None) -> dict[str, NDArray[Any]]:
    """What is stored of the regressions with all images; ``beta`` is the inverse temperature of the ``best``."""
    solutions = [one.solution for one in solved if isinstance(one.solution, Solution)]
    arrays = {
        "ridge": np.array([solution.ridge for solution in solutions]),
        "amplitude": np.array([solution.amplitude for solution in solutions]),
        "coefficients": np.stack([solution.coefficients for solution in solutions]),
        "offset": solutions[0].offset,
    }
    if solved[0].predictions:
        arrays["predictions"] = np.stack([np.concatenate(one.predictions) for one in solved])
        if beta is not None:
            arrays["probabilities"] = probabilities(arrays["predictions"][best], beta)
    if (left_out := solved[best].left_out) is not None:
        arrays["left_out"] = left_out
    variances = [one.variances for one in solutions if one.variances is not None]
    if variances:
        arrays["variances"] = np.stack(variances)
    return arrays


def _result(fields: dict[str, Any]) -> Result:
    """A result from JSON."""
    interval = fields.get("accuracy_interval")
    return Result(**{**fields, "accuracy_interval": None if interval is None else (interval[0], interval[1])})


def targets_of(labels: Labels, classes: tuple[str, ...] | None) -> Targets:
    """The targets of labels as a store has them.

    Raises:
      DataError: there are no labels, or only one class.
    """
    if labels is None:
        raise DataError(
            "the training images have no labels, so there is nothing to predict; give labels (class folders, `y` in "
            "the .npz, data.train_labels), or set `solve: null` to compute the Gram matrices only"
        )
    return real_targets(labels) if classes is None else class_targets(labels, classes)


def _subset(labels: Labels, size: int, classes: tuple[str, ...] | None) -> NDArray[np.int64]:
    if labels is None:
        raise DataError("solve.train_sizes needs labels; leave it out")
    return nested_subset(labels, size, classes)


def _scores(predictions: Float64s, labels: NDArray[Any], one: _Attempt) -> dict[str, Any]:
    """How good predictions of the test images are: fields of a :class:`Result`."""
    truth = labels if one.targets.classes is None else np.eye(predictions.shape[1])[labels]
    scores: dict[str, Any] = {"mean_squared_error": mean_squared_error(predictions, truth)}
    variances = one.solution.noisy_variances() if isinstance(one.solution, Solution) else None
    if variances is not None and (variances > 0).all():
        scores["negative_log_likelihood"] = negative_log_likelihood(predictions, variances, truth)
    if one.targets.classes is not None:
        scores["accuracy"] = accuracy(predictions, labels)
        scores["accuracy_interval"] = accuracy_interval(predictions, labels)
        scores["balanced_accuracy"] = balanced_accuracy(predictions, labels)
        if (beta := one.inverse_temperature()) is not None:
            scores["log_loss"] = log_loss(predictions, labels, beta)
    return scores
