"""Which images of a source are taken, and their labels as class indices or targets."""

from __future__ import annotations

import numpy as np

from equigram.data.arrays import Indices, Labels
from equigram.data.sources import Source, some
from equigram.errors import DataError
from equigram.spec import DataSpec


def to_classes(labels: Labels | None) -> tuple[Labels | None, tuple[str, ...] | None]:
    """Class values as int64 indices and the names of the classes; targets as they are, without names."""
    if labels is None or labels.ndim == 2:
        return labels, None
    values, indices = np.unique(labels, return_inverse=True)
    return indices.astype(np.int64), tuple(str(value) for value in values)


def like_train(
    labels: Labels | None,
    url: str,
    train_labels: Labels | None,
    classes: tuple[str, ...] | None,
    train_url: str,
    role: str = "test",
) -> Labels | None:
    """Labels of test or added images as indices into the training classes, or as targets of the same width."""

    def kind(values: Labels | None) -> str:
        if values is None:
            return "no labels"
        return "classes" if values.ndim == 1 else f"{values.shape[1]} regression targets per image"

    if labels is None:
        return None
    if kind(labels) != kind(train_labels):
        raise DataError(
            f"the {role} images of {url} have {kind(labels)}, but the training images of {train_url} have "
            f"{kind(train_labels)}; give both labels of one kind: integers for classes, floats for regression"
        )
    if classes is None:
        return labels
    indices, names = to_classes(labels)
    place = {name: index for index, name in enumerate(classes)}
    unknown = [name for name in names or () if name not in place]
    if unknown:
        raise DataError(
            f"the {role} images of {url} are of the classes {some(map(repr, unknown))}, which the training images of "
            f"{train_url} do not have ({some(map(repr, classes), 10)}); add training images or remove these"
        )
    assert indices is not None
    return np.array([place[name] for name in names or ()], dtype=np.int64)[indices]


def _groups(labels: Labels | None, classes: tuple[str, ...] | None, indices: Indices) -> list[tuple[str, Indices]]:
    """``indices`` class by class, each with words for the class; all as one without classes."""
    if labels is None or classes is None:
        return [("the source", indices)]
    return [(f"class {name!r}", indices[labels[indices] == number]) for number, name in enumerate(classes)]


def choose_train(
    spec: DataSpec, source: Source, labels: Labels | None, classes: tuple[str, ...] | None
) -> tuple[Indices, Indices]:
    """The training images in their order, and those held out for testing, in the order of the source."""
    _check_per_class("per_class", spec.per_class, classes)
    generator = np.random.default_rng(spec.seed)
    chosen, held_out = [], [np.empty(0, dtype=np.intp)]
    for group, members in _groups(labels, classes, np.arange(len(source))):
        drawn = generator.permutation(members)
        if spec.test_fraction is not None:
            if len(drawn) < 2:
                raise DataError(
                    f"{group} has {len(drawn)} image in {source.url}, but data.test_fraction = {spec.test_fraction} "
                    "needs at least 2, one to test and one to train; add images or set data.test instead"
                )
            count = min(max(int(spec.test_fraction * len(drawn) + 0.5), 1), len(drawn) - 1)
            held_out.append(drawn[:count])
            drawn = drawn[count:]
        if spec.per_class is not None and len(drawn) < spec.per_class:
            left = "" if spec.test_fraction is None else f" left of {len(members)} after data.test_fraction"
            raise DataError(
                f"{group} has {len(drawn)} training images{left} in {source.url}, but data.per_class = "
                f"{spec.per_class}; lower it or add images"
            )
        chosen.append(drawn[: spec.per_class])
    return np.concatenate(chosen), np.sort(np.concatenate(held_out))


def choose_test(
    spec: DataSpec, source: Source, labels: Labels | None, classes: tuple[str, ...] | None, indices: Indices
) -> Indices:
    """The test images among ``indices``, in the order of the source."""
    if spec.test_per_class is None:
        return indices
    _check_per_class("test_per_class", spec.test_per_class, classes if labels is not None else None)
    generator = np.random.default_rng(spec.seed)
    chosen = []
    for group, members in _groups(labels, classes, indices):
        if len(members) < spec.test_per_class:
            raise DataError(
                f"{group} has {len(members)} test images in {source.url}, but data.test_per_class = "
                f"{spec.test_per_class}; lower it or add images"
            )
        chosen.append(generator.permutation(members)[: spec.test_per_class])
    return np.sort(np.concatenate(chosen))


def _check_per_class(field: str, value: int | None, classes: tuple[str, ...] | None) -> None:
    if value is not None and classes is None:
        raise DataError(
            f"data.{field} = {value} chooses images by class, but the images have no classes (no labels, or float ones "
            f"for regression); remove data.{field}, or give integer labels"
        )
