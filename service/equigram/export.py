"""Gram matrices, labels and names out of a run store: some or all, as one .npz file or a zarr group."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equigram.errors import EquigramError, ResourceError, SpecError, StoreError
from equigram.plan import Part, SplitName, row_split
from equikernel.errors import either, suggestion
from equikernel.memory import available_memory, format_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equigram.store import GramStore

CHUNK = 1024
"""Edge of the chunks of an exported zarr array at most."""


def export_run(
    store: GramStore,
    output: str,
    groups: Sequence[str] | None = None,
    kernels: Sequence[str] | None = None,
    train: str | None = None,
    test: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Write arrays of a run, under the names that they have in the store, to ``output``.

    Args:
      store: the run.
      output: a new .npz file, or a new .zarr, a folder or any fsspec URL.
      groups, kernels: which matrices; ``None`` means all.
      train, test: ``"FIRST:END"``, which images; ``None`` means all.
      progress: called with the matrices written and their number.

    Returns:
      The names of the arrays.

    Raises:
      SpecError: there are no such matrices or images, or ``output`` is of no known kind or exists.
      ResourceError: a matrix does not fit in memory, or all of them for an .npz file.
      IncompleteRunError, DamagedTileError: a tile that is needed is missing or damaged; nothing is written.
      StoreError: ``output`` cannot be written.
    """
    info = store.info
    rows: dict[SplitName, range] = {
        "train": _window("--train", train, info.train, least=1),
        "test": _window("--test", test, info.test, least=0),
    }
    matrices: list[tuple[Part, str, str]] = [
        (part, group, kernel)
        for part in store.parts
        if rows[row_split(part)]
        for group in _chosen("--group", groups, info.spec.gram.groups)
        for kernel in _chosen("--kernel", kernels, info.spec.gram.kernels)
    ]
    kind = re.search(r"\.(npz|zarr)/?$", output)
    if kind is None:
        raise SpecError(f"{output}: export writes .npz files and .zarr groups; choose a name that ends so")
    if store.is_inside(output):
        raise SpecError(f"{output} is in the run store {store.url}, which holds its run alone; choose another place")
    if (whole := kind[1] == "npz") and "://" in output:
        raise SpecError(f"{output}: an .npz file is written to this machine only; export a .zarr, which may be any URL")
    sizes = [len(rows[row_split(part)]) * len(rows["train"]) for part, _, _ in matrices]
    needed = np.dtype(info.spec.gram.dtype).itemsize * (sum(sizes) if whole else max(sizes))
    if needed > (available := available_memory()):
        raise ResourceError(
            f"exporting these matrices to {output} needs {format_bytes(needed)} of memory, and "
            f"{format_bytes(available)} are available; take fewer images (--train)"
            f"{' or write a .zarr' if whole else ''}"
        )

    def arrays() -> Iterator[tuple[str, NDArray[Any]]]:
        for split, images in rows.items():
            if images:
                labels = store.labels(split)
                if labels is not None:
                    yield f"labels/{split}", labels[images.start : images.stop]
                yield f"names/{split}", np.array(store.names(split)[images.start : images.stop])
        for done, (part, group, kernel) in enumerate(matrices):
            progress(done, len(matrices))
            values = store.matrix(part, group, kernel, rows[row_split(part)], rows["train"])
            yield f"{part}/{group}/{kernel}", values
        progress(len(matrices), len(matrices))

    try:
        return _write_npz(output, arrays()) if whole else _write_zarr(output, arrays())
    except EquigramError:
        raise
    except FileExistsError:
        raise SpecError(f"{output} exists already; choose another name, or delete it") from None
    except Exception as error:  # each file system has its own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise StoreError(f"{output}: cannot write the export: {reason}; nothing of it is left") from None


def _write_npz(output: str, arrays: Iterator[tuple[str, NDArray[Any]]]) -> list[str]:
    contents = dict(arrays)  # before the file is made: what is missing or damaged leaves none
    with open(output, "xb") as file:  # noqa: PTH123
        try:
            np.savez(file, **contents)  # type: ignore[arg-type]
        except BaseException:
            Path(output).unlink()
            raise
    return list(contents)


def _write_zarr(output: str, arrays: Iterator[tuple[str, NDArray[Any]]]) -> list[str]:
    import fsspec
    import zarr

    files, path = fsspec.core.url_to_fs(output)
    if files.exists(path):
        raise FileExistsError
    names = []
    try:
        root = zarr.open_group(output, mode="w-")
        for name, values in arrays:
            stored = np.frombuffer("\n".join(values).encode(), np.uint8) if values.dtype.kind == "U" else values
            root.create_array(name, data=stored, chunks=tuple(max(1, min(CHUNK, side)) for side in stored.shape))
            names.append(name)
    except BaseException:
        with contextlib.suppress(Exception):  # the place may be what fails
            files.rm(path, recursive=True)
        raise
    return names


def _window(option: str, text: str | None, count: int, least: int) -> range:
    """The images that ``FIRST:END`` means."""
    if text is None:
        return range(count)
    match = re.fullmatch(r"\s*(\d*)\s*:\s*(\d*)\s*", text)
    if match is None:
        raise SpecError(f"{option} {text!r} is no FIRST:END, as in 0:1000")
    first, end = int(match[1] or 0), int(match[2] or count)
    if not (first <= end <= count and end - first >= least):
        raise SpecError(f"{option} {text} names no images: there are {count}, from 0:1 to 0:{count}")
    return range(first, end)


def _chosen(option: str, asked: Sequence[str] | None, stored: Sequence[str]) -> list[str]:
    """What was asked for, in the order of the store."""
    for one in asked or ():
        if one not in stored:
            raise SpecError(f"{option} {one!r} is not in the store; choose {either(stored)}{suggestion(one, stored)}")
    return [one for one in stored if not asked or one in asked]
