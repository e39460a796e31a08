"""A matrix that stays where it is: only the parts that are looked at travel."""

from __future__ import annotations

import contextlib
import io
import operator
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from equigram.errors import EquigramError, ServiceError, StoreError
from equigram.events import Listener, Progress, nobody

LIMIT = 64 * 2**20 - 4096
"""Bytes of values in one request at most: 64 MiB, with room for the header."""

GAP = 2**18
"""Bytes that nobody asked for, and that may travel where it saves a request."""

Fetch = Callable[[range, range], NDArray[Any]]
"""The values in some rows and columns."""


class RemoteMatrix:
    """A Gram matrix in the store of a service: ``matrix[:100, ::-1]``, ``matrix[[3, 1, 7]]``, ``np.asarray(matrix)``.

    It is indexed like an array, with whole numbers, slices and one list of places or of truth values. Nothing is kept:
    the same values travel again when they are asked for again.

    Args:
      name: what it is, for people.
      shape: rows and columns.
      dtype: of the values.
      edge: rows and columns of a tile of the store.
      fetch: asks for rows and columns.

    Attributes:
      shape: (n, n) of the train matrix, (m, n) of test x train.
      dtype: float32 or float64.
    """

    ndim = 2

    def __init__(self, name: str, shape: tuple[int, int], dtype: DTypeLike, edge: int, fetch: Fetch) -> None:
        self.name = name
        self.shape = shape
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._edge = edge
        self._fetch = fetch

    def __repr__(self) -> str:
        return f"RemoteMatrix({self.name!r}, {self.shape[0]:,} x {self.shape[1]:,} {self.dtype})"

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """Values."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self.size * self.dtype.itemsize

    def __getitem__(self, key: Any) -> Any:
        rows, cols = self._both(key)
        (row_places, one_row), (col_places, one_col) = (
            _places(part, length, name)
            for part, length, name in zip((rows, cols), self.shape, ("rows", "columns"), strict=True)
        )
        values = self._gather(row_places, col_places)
        return values[0 if one_row else slice(None), 0 if one_col else slice(None)]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError(f"{self.name} is not in memory, so that an array of it is a copy; leave out copy=False")
        values: NDArray[Any] = self[:, :]
        return values if dtype is None else values.astype(dtype, copy=False)

    def save(self, path: str | Path, listener: Listener = nobody) -> Path:
        """Write all of it as an .npy file, some rows at a time; whole or not at all.

        Raises:
          StoreError: the file cannot be written.
        """
        path = Path(path)
        beside = path.with_name(f".{uuid.uuid4().hex}.tmp")
        rows, cols = self.shape
        step = self._height(cols)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        try:
            with beside.open("xb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for first in range(0, rows, step):
                    file.write(self[first : first + step].data)
                    listener(Progress(f"fetching {self.name}: rows", min(first + step, rows), rows))
            beside.replace(path)
        except EquigramError:
            raise
        except OSError as error:
            raise StoreError(f"{path}: cannot be written: {error.strerror or error}; choose another folder") from None
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
        return path

    def _both(self, key: Any) -> tuple[Any, Any]:
        """What is asked for of rows and columns."""
        parts = list(key) if isinstance(key, tuple) else [key]
        ellipses = [place for place, part in enumerate(parts) if part is Ellipsis]
        if len(ellipses) > 1:
            raise IndexError(f"{self.name} is indexed with two ellipses ('...'); keep one")
        for place in ellipses:
            parts[place : place + 1] = [slice(None)] * (3 - len(parts))
        parts += [slice(None)] * (2 - len(parts))
        if len(parts) > 2:
            raise IndexError(f"{self.name} has rows and columns, and {len(parts)} indices were given; give two")
        rows, cols = parts
        if isinstance(rows, list | np.ndarray) and isinstance(cols, list | np.ndarray):
            raise IndexError(f"{self.name} takes one list of places; take matrix[rows][:, columns]")
        return rows, cols

    def _height(self, cols: int) -> int:
        """Rows of a request that spans so many columns, or as many as the limit allows: whole tiles, if possible."""
        most = LIMIT // self.dtype.itemsize
        height = max(most // max(cols, 1), min(self._edge, most))
        return height - height % self._edge if height > self._edge else height

    def _gather(self, rows: NDArray[np.intp], cols: NDArray[np.intp]) -> NDArray[Any]:
        """The values at these places, which may be in any order and come twice."""
        values = np.empty((len(rows), len(cols)), self.dtype)
        if not values.size:
            return values
        row_order, col_order = np.argsort(rows, kind="stable"), np.argsort(cols, kind="stable")
        rows, cols = rows[row_order], cols[col_order]
        item = self.dtype.itemsize
        height = self._height(int(cols[-1] - cols[0]) + 1)
        for down in _pieces(rows, GAP // (len(cols) * item), height):
            top, tall = int(rows[down][0]), int(rows[down][-1] - rows[down][0]) + 1
            for across in _pieces(cols, GAP // (tall * item), LIMIT // (tall * item)):
                left, wide = int(cols[across][0]), int(cols[across][-1] - cols[across][0]) + 1
                block = self._fetch(range(top, top + tall), range(left, left + wide))
                picked = block[np.ix_(rows[down] - top, cols[across] - left)]
                values[np.ix_(row_order[down], col_order[across])] = picked
        return values


def read_npy(content: bytes, shape: tuple[int, int], dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    """The array in an .npy file that came from ``where``.

    Raises:
      ServiceError: it is not one of this shape and dtype, or not all of it.
    """
    file = io.BytesIO(content)
    try:
        values: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError, TypeError) as error:
        raise ServiceError(f"{where} is no .npy file ({str(error).splitlines()[0]}); ask again") from None
    found = f"{values.dtype} {values.shape}"
    if values.shape != shape or values.dtype != dtype or file.read(1):
        raise ServiceError(f"{where} is {found}, but {dtype} {shape} was asked for; ask again, or look at its service")
    return values


def _places(key: Any, length: int, name: str) -> tuple[NDArray[np.intp], bool]:
    """The places along an axis that a key asks for, and whether it is a single one.

    Raises:
      IndexError: there are no such places.
    """
    if isinstance(key, slice):
        return np.arange(*key.indices(length), dtype=np.intp), False
    if isinstance(key, list | np.ndarray) and np.ndim(key) == 1:
        found = np.asarray(key)
        if found.dtype == bool and len(found) == length:
            return np.flatnonzero(found), False
        if found.size and found.dtype.kind not in "iu":
            raise IndexError(f"{found.dtype} values are no {name}; there are {length:,} of them, from 0 on")
        places, single = found.astype(np.intp), False
    else:
        try:
            if isinstance(key, bool | np.bool_):
                raise TypeError
            places, single = np.array([operator.index(key)], np.intp), True
        except TypeError:
            raise IndexError(
                f"{key!r} names no {name}; use a whole number, a slice, or one list of whole numbers"
            ) from None
    wrong = places[(places < -length) | (places >= length)]
    if wrong.size:
        raise IndexError(f"{name} {int(wrong[0]):,} was asked for, but there are {length:,}, from 0 on")
    return np.where(places < 0, places + length, places), single


def _pieces(places: NDArray[np.intp], gap: int, most: int) -> Iterator[slice]:
    """Parts of ascending places that are at most ``gap`` others apart, and span at most ``most``."""
    cuts = [*(np.flatnonzero(np.diff(places) > gap + 1) + 1).tolist(), len(places)]
    first = 0
    for cut in cuts:
        while first < cut:
            last = min(cut, int(np.searchsorted(places, places[first] + most)))
            yield slice(first, last)
            first = last
