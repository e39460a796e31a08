"""Gram matrices that were computed elsewhere, in the form of :mod:`equigram.export`, into the store of a job."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np

from equigram.data.sources import some
from equigram.errors import DataError, EquigramError
from equigram.events import Progress
from equigram.plan import SplitName, Tile, is_diagonal, row_split
from equigram.verify import TOLERANCE
from equikernel.memory import available_memory, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from equigram.events import Listener
    from equigram.spec import Pass
    from equigram.store import GramStore

ELSEWHERE = "elsewhere"
"""The kind of processor of tiles that were imported: nothing is said about their bits."""


def import_matrices(store: GramStore, source: str, listener: Listener, samples: int, seed: int = 0) -> int:
    """Take the tiles that a store lacks from ``source``, as far as they are complete there.

    Args:
      store: the run of a job, with its images; what it holds already is kept.
      source: an .npz file or a zarr group of ``gram/<group>/<kernel>`` ``(n, n)`` and ``cross/<group>/<kernel>``
        ``(m, n)`` for the images of the run in their order; NaN where values are missing, perhaps in one triangle.
      listener: told of the progress.
      samples: how many tiles of each pass are computed here for comparison, before anything is stored.
      seed: of their choice.

    Returns:
      How many tiles were taken.

    Raises:
      DataError: ``source`` cannot be read, or is of other images; it is not symmetric; or values differ from those
        computed here by more than rounding explains. Nothing was stored.
    """
    arrays = _Source(source)
    names = [f"{part}/{group}/{kernel}" for part in store.parts for group, kernel in store.matrices]
    if not any(name in arrays for name in names):
        raise DataError(
            f"{source} holds none of the matrices {', '.join(names)}, but {some(sorted(arrays.arrays)) or 'nothing'}; "
            "give them these names"
        )
    for matrix in store.parts:
        _check_names(store, arrays, row_split(matrix))
    rng = np.random.default_rng(seed)
    taken = [(one, part, list(_complete(part, arrays))) for one, part in store.passes()]
    for one, part, tiles in taken:
        chosen = rng.permutation(len(tiles))[:samples]
        _compare(part, one, [tiles[index] for index in chosen], arrays, listener)
    done, total = 0, sum(len(tiles) for _, _, tiles in taken)
    if total:
        store.remember_worker(ELSEWHERE)
    for _, part, tiles in taken:
        for tile in tiles:
            listener(Progress("tiles", done, total))
            part.write_values(tile, {names: _values(part, arrays, tile, *names) for names in part.matrices})
            done += 1
    listener(Progress("tiles", done, total))
    return total


def check_source(source: str) -> None:
    """Raise :class:`DataError` unless ``source`` can be opened as an .npz file or a zarr group."""
    _Source(source, only_names=True)


class _Source:
    """The arrays of an .npz file or a zarr group by name; those of a zarr are read when they are sliced.

    Raises:
      DataError: it cannot be read.
    """

    def __init__(self, place: str, *, only_names: bool = False) -> None:
        self.place = place
        self._diagonals: dict[tuple[str, int], NDArray[np.float64]] = {}
        try:
            self.arrays = self._open(only_names)
        except EquigramError:
            raise
        except Exception as error:
            raise self._unreadable(place, "an .npz file or a zarr group", error) from None

    def _open(self, only_names: bool) -> dict[str, Any]:
        import zarr

        if self.place.endswith(".npz"):
            with np.load(self.place) as file:
                if not isinstance(file, np.lib.npyio.NpzFile):
                    raise ValueError("it is a single array")
                if only_names:
                    return dict.fromkeys(file)
                needed, available = _unpacked_bytes(self.place), available_memory()
                if needed > available:
                    raise DataError(
                        f"{self.place} holds {format_bytes(needed)}, and {format_bytes(available)} of memory are "
                        "available; write it as a zarr, which is read tile by tile"
                    )
                return dict(file)
        if "://" in self.place:  # zarr asks several things at once, and leaves unheard what fails second
            files, path = fsspec.core.url_to_fs(self.place)
            files.ls(path)
        members = zarr.open_group(self.place, mode="r").members(max_depth=None)
        return {name: array for name, array in members if isinstance(array, zarr.Array)}

    @staticmethod
    def _unreadable(what: str, kind: str, error: Exception) -> DataError:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "allow_pickle" in reason:
            reason = "it is no .npz file, or holds Python objects"
        return DataError(f"{what} cannot be read as {kind}: {reason}; nothing was imported")

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def all(self, name: str) -> NDArray[Any]:
        """A whole array."""
        try:
            return np.asarray(self.arrays[name][...])
        except Exception as error:
            raise self._unreadable(f"{name} in {self.place}", "an array", error) from None

    def block(self, name: str, rows: slice, cols: slice) -> NDArray[np.float64]:
        """A block of a matrix."""
        try:
            return np.asarray(self.arrays[name][rows, cols], np.float64)
        except Exception as error:
            raise self._unreadable(f"{name} in {self.place}", "a matrix", error) from None

    def scale(self, name: str, rows: slice, cols: slice) -> NDArray[np.float64]:
        """``√(K(f, f) K(f', f'))``, which rounding errors of a block of a train matrix are relative to."""
        for side in (rows, cols):
            if (name, side.start) not in self._diagonals:
                self._diagonals[name, side.start] = np.diag(self.block(name, side, side)).copy()
        with np.errstate(invalid="ignore"):
            return np.sqrt(np.outer(self._diagonals[name, rows.start], self._diagonals[name, cols.start]))


def _unpacked_bytes(place: str) -> int:
    with zipfile.ZipFile(place) as file:
        return sum(info.file_size for info in file.infolist())


def _check_names(store: GramStore, arrays: _Source, split: SplitName) -> None:
    """Raise if the source says that its images are others, or in another order."""
    name = f"names/{split}"
    if name not in arrays:
        return
    found = arrays.all(name)
    there = found.tobytes().decode(errors="replace").split("\n") if found.dtype == np.uint8 else found.tolist()
    for index, (mine, other) in enumerate(zip(store.names(split), there, strict=False)):
        if mine != other:
            raise DataError(
                f"{arrays.place} is of other images, or in another order: {split} image {index} is {other!r} there and "
                f"{mine!r} in {store.url}; nothing was imported"
            )


def _complete(store: GramStore, arrays: _Source) -> Iterator[Tile]:
    """The tiles of a pass that the store lacks and that the source has."""
    tiling = store.info.tiling
    for part in store.parts:
        for group, kernel in store.matrices:
            name = f"{part}/{group}/{kernel}"
            if name not in arrays:
                continue
            array = arrays.arrays[name]
            if np.dtype(array.dtype).kind not in "fiu":
                raise DataError(
                    f"{name} in {arrays.place} holds {array.dtype}, and a Gram matrix holds real numbers; nothing was "
                    "imported"
                )
            if array.shape != tiling.shape(part):
                raise DataError(
                    f"{name} in {arrays.place} has the shape {array.shape}, and the run in {store.url} needs "
                    f"{tiling.shape(part)}; nothing was imported"
                )
    finished = store.finished_tiles()
    for tile in tiling.missing(finished):
        if all(f"{tile.part}/{group}/{kernel}" in arrays for group, kernel in store.matrices):
            blocks = [_values(store, arrays, tile, *names) for names in store.matrices]
            if all(np.isfinite(block).all() for block in blocks):
                yield tile


def _values(store: GramStore, arrays: _Source, tile: Tile, group: str, kernel: str) -> NDArray[Any]:
    """The values of a tile in the dtype of the run; from the other triangle where they are missing in the upper one.

    Raises:
      DataError: the two triangles hold different values.
    """
    tiling, name = store.info.tiling, f"{tile.part}/{group}/{kernel}"
    rows, cols = (slice(side.start, side.stop) for side in (tiling.rows(tile), tiling.cols(tile)))
    dtype = store.info.spec.gram.dtype
    values = arrays.block(name, rows, cols)
    if tile.part == "gram":
        mirror, scale = arrays.block(name, cols, rows).T, arrays.scale(name, rows, cols)
        both = np.isfinite(values) & np.isfinite(mirror)
        apart = np.subtract(values, mirror, where=both, out=np.zeros_like(values))
        wrong = np.abs(apart) > 2 * TOLERANCE[dtype] * np.where(np.isfinite(scale), scale, np.abs(values))
        if wrong.any():
            row, col = np.argwhere(wrong)[0].tolist()
            raise DataError(
                f"{name} is not symmetric: entry {rows.start + row}, {cols.start + col} is {values[row, col]:.9g}, and "
                f"{mirror[row, col]:.9g} the other way round; nothing was imported"
            )
        values = np.where(np.isfinite(values), values, mirror)
        if is_diagonal(tile):
            values = np.triu(values) + np.triu(values, 1).T
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def _compare(store: GramStore, one: Pass, tiles: list[Tile], arrays: _Source, listener: Listener) -> None:
    """Raise unless tiles of a source hold what is computed here, up to rounding."""
    spec = store.info.spec
    function = spec.function_here(one.groups, store.info.image_shape)
    for done, tile in enumerate(tiles):
        listener(Progress("comparing tiles", done, len(tiles)))
        row = function.prepare(store.block(row_split(tile.part), tile.row))
        col = row if is_diagonal(tile) else function.prepare(store.block("train", tile.col))
        kernels = function(row) if is_diagonal(tile) else function(row, col)
        along, across = function.diagonal(row), function.diagonal(col)
        for group, kernel in store.matrices:
            computed = getattr(kernels[group], kernel).astype(np.float64)
            scale = np.sqrt(np.outer(getattr(along[group], kernel), getattr(across[group], kernel)))
            found = _values(store, arrays, tile, group, kernel).astype(np.float64)
            error = np.abs(found - computed) / np.where(scale > 0, scale, 1)
            if (worst := error.max()) > TOLERANCE[spec.gram.dtype]:
                place = np.unravel_index(int(error.argmax()), error.shape)
                raise DataError(
                    f"entry {place[0]}, {place[1]} of the {group} {kernel} of tile {tile} is {found[place]:.9g} in "
                    f"{arrays.place} and {computed[place]:.9g} computed here ({worst:.1g} of the diagonal apart, "
                    f"{TOLERANCE[spec.gram.dtype]:g} are allowed): other images, another network or another "
                    "normalisation; nothing was imported"
                )
    listener(Progress("comparing tiles", len(tiles), len(tiles)))
