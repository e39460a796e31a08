"""What a run has found out: scores, confusion matrices, predictions, and slices of its matrices."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import numpy as np

from equigram.api.models import Prediction, PredictionsAnswer, ResultAnswer, Scores
from equigram.errors import JobNotFoundError, LimitError, SpecError
from equigram.solve.metrics import confusion_matrix
from equigram.solve.stage import solved_matrices, stored_results
from equikernel.memory import format_bytes

if TYPE_CHECKING:
    from equigram.plan import Part
    from equigram.store import GramStore

_SLICE = re.compile(r"(\d*):(\d*)")


def result(job: str, store: GramStore) -> ResultAnswer:
    """Scores of all regressions, the chosen ones first, and confusion matrices of the test images."""
    info = store.info
    solved = solved_matrices(store)
    scores = [
        Scores(
            group=one.group,
            kernel=one.kernel,
            ridge=one.ridge,
            train_size=one.train_size,
            chosen=one.chosen,
            accuracy=one.accuracy,
            mse=one.mean_squared_error,
            warning=one.warning,
        )
        for pair in solved
        for one in stored_results(store, *pair)
    ]
    labels = store.labels("test") if info.test else None
    confusion = {}
    if info.classes is not None and labels is not None:
        for group, kernel in solved:
            arrays, fields = store.solution(group, kernel)
            confusion[f"{group} {kernel}"] = confusion_matrix(arrays["predictions"][fields["chosen"]], labels).tolist()
    return ResultAnswer(
        id=job,
        classes=None if info.classes is None else list(info.classes),
        scores=sorted(scores, key=lambda one: (not one.chosen, one.train_size is not None)),
        confusion=confusion,
    )


def predictions(
    store: GramStore, group: str | None, kernel: str | None, *, confused: bool, offset: int, limit: int
) -> PredictionsAnswer:
    """Predictions for the test images with the chosen ridge, in their order or the most confused first.

    Raises:
      JobNotFoundError: that matrix is not solved, or there are no test images.
    """
    info, solved = store.info, solved_matrices(store)
    matching = [(g, k) for g, k in solved if group in (None, g) and kernel in (None, k)]
    if not matching:
        named = ", ".join(f"{g} {k}" for g, k in solved) or "nothing"
        raise JobNotFoundError(f"{group or 'any group'} {kernel or 'any kernel'} is not solved; {named} is")
    if not info.test:
        raise JobNotFoundError("the job has no test images to predict; give it some (data.test or data.test_fraction)")
    group, kernel = matching[-1]
    arrays, fields = store.solution(group, kernel)
    values = arrays["predictions"][fields["chosen"]]
    labels, names, classes = store.labels("test"), store.names("test"), info.classes
    margins = None
    if classes is not None and labels is not None:
        truth = values[np.arange(len(values)), labels]
        others = values.copy()
        others[np.arange(len(values)), labels] = -np.inf
        margins = truth - others.max(axis=1)
    order = np.argsort(margins, kind="stable") if confused and margins is not None else np.arange(len(values))
    return PredictionsAnswer(
        group=group,
        kernel=kernel,
        ridge=float(arrays["ridge"][fields["chosen"]]),
        classes=None if classes is None else list(classes),
        total=len(values),
        predictions=[
            Prediction(
                index=index,
                name=names[index],
                true=classes[labels[index]] if classes is not None and labels is not None else None,
                predicted=classes[int(values[index].argmax())] if classes is not None else None,
                values=values[index].tolist(),
                margin=None if margins is None else float(margins[index]),
            )
            for index in order[offset : offset + limit].tolist()
        ],
    )


def window(text: str | None, count: int, name: str) -> range:
    """The images of ``"first:end"``; all of ``count`` without it.

    Raises:
      SpecError: it is not of that form, or not within them.
    """
    match = _SLICE.fullmatch(text or ":")
    first, end = (int(match[1] or 0), int(match[2] or count)) if match else (0, 0)
    if match is None or not 0 <= first < end <= count:
        raise SpecError(f"{name} = {text!r}: write first:end within 0:{count}")
    return range(first, end)


def matrix_slice(store: GramStore, part: Part, group: str, kernel: str, rows: range, cols: range, most: int) -> bytes:
    """A slice of a matrix as an .npy file.

    Raises:
      LimitError: it takes more than ``most`` bytes.
      IncompleteRunError: tiles of it are missing.
    """
    size = len(rows) * len(cols) * np.dtype(store.info.spec.gram.dtype).itemsize
    if size > most:
        raise LimitError(
            f"rows {rows.start}:{rows.stop} and cols {cols.start}:{cols.stop} take {format_bytes(size)}, and "
            f"{format_bytes(most)} are allowed at a time; ask for fewer rows"
        )
    file = io.BytesIO()
    np.lib.format.write_array(file, store.matrix(part, group, kernel, rows, cols), (1, 0), allow_pickle=False)
    return file.getvalue()
