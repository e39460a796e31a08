"""A device for the GPU engine that is none: runs the source of its kernels with NumPy, all threads in lockstep."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equikernel.engines.gpu_source import WARP, Source

Array = NDArray[Any]


class Lockstep:
    """Every name in the source is an array with an entry per thread; a shuffle is an exchange between entries.

    Args:
      shared: bytes that the threads of a block share.
      rate: instructions of a warp per second that it claims.
    """

    kind = "lockstep"

    def __init__(self, shared: int = 0, rate: float = 1e12) -> None:
        self.shared = shared
        self.rate = rate
        self.launches: list[tuple[str, int, int]] = []
        """The function, blocks and threads of each."""
        self.programs: dict[tuple[str, str], dict[str, Any]] = {}
        """What is compiled is kept, as on a GPU."""

    def free(self) -> int:
        return 10**12

    def put(self, array: Array) -> Array:
        return array.copy()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return np.full(shape, np.nan, dtype)

    def get(self, array: Array) -> Array:
        return array

    def stream(self) -> None:
        return None

    def mark(self, stream: None) -> None:
        return None

    def wait(self, mark: None) -> None:
        pass

    def compile(self, source: Source, dtype: str) -> dict[str, Any]:
        key = source.text, dtype
        if key not in self.programs:
            number = np.dtype(dtype).type
            names: dict[str, Any] = {name: globals()[name] for name in PRIMITIVES}
            names |= {"constant": number, "real": number, "source": source}
            exec(source.text, names)
            self.programs[key] = names
        return self.programs[key]

    def launch(
        self, program: dict[str, Any], name: str, blocks: int, threads: int, stream: None, *arguments: Any
    ) -> None:
        self.launches.append((name, blocks, threads))
        block, thread = (index.ravel() for index in np.indices((blocks, threads)))
        entries = 2 * program["source"].layout.image
        program["place"] = lambda: (block, block, thread)
        pool = np.full((blocks, entries), np.nan, program["real"])
        program["cuda"] = SimpleNamespace(shared=SimpleNamespace(array=lambda *_: pool))
        with np.errstate(all="ignore"):
            program[name](*arguments)


PRIMITIVES = (
    "far", "near", "store", "meet", "put", "select", "smaller", "larger", "narrow", "double", "shuffle", "root",
    "quotient", "copysign", "exp",
)  # fmt: skip

select, smaller, larger = np.where, np.minimum, np.maximum
root, quotient, copysign, exp = np.sqrt, np.divide, np.copysign, np.exp


def far(images: Array, image: Array, place: Array) -> Array:
    values: Array = images[image, place]
    return values


def near(pool: Array, home: Array, place: Array) -> Array:
    values: Array = pool[home, place]
    return values


def store(pool: Array, home: Array, place: Array, value: Array) -> None:
    pool[home, place] = value


def meet() -> None:
    pass


def put(array: Array, row: Array, column: Any, value: Array, condition: Array) -> None:
    rows, columns, values, here = np.broadcast_arrays(row, column, value, condition)
    array[rows[here], columns[here]] = values[here]


def narrow(value: Any) -> Any:
    return np.asarray(value).astype(np.int32)


def double(value: Any) -> Any:
    return np.asarray(value).astype(np.float64)


def shuffle(value: Array, lane: Array) -> Array:
    warps = np.broadcast_to(value, lane.shape).reshape(-1, WARP)
    return np.take_along_axis(warps, lane.reshape(-1, WARP) % WARP, axis=1).ravel()
