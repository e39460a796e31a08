"""From images to kernels: validation, the choice of engine, and the dense layers after the pooling."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from equikernel.activations import DUALS
from equikernel.errors import EngineError, ImageError, NonFiniteKernelError, suggestion
from equikernel.recursion import Pooled, ReferenceEngine

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from equikernel.network import Architecture

EngineName = Literal["auto", "cpu", "reference"]
ENGINES = ("auto", "cpu", "reference")
DTYPES = ("float32", "float64")


class Kernel(NamedTuple):
    """NNGP and NTK of a network on pairs of images: ``(n1, n2)`` arrays, without units."""

    nngp: NDArray[Any]
    ntk: NDArray[Any]


class Engine(Protocol):
    """What computes pooled kernels: everything before the dense layers."""

    def prepare(self, images: NDArray[Any]) -> Any:
        """Per-image constants of ``(n, H, W, C)`` images."""

    def pairs(self, block1: Any, block2: Any, rows: NDArray[np.intp], cols: NDArray[np.intp]) -> dict[str, Pooled]:
        """Pooled kernels ``(p,)`` float64 of the pairs ``(block1[rows[p]], block2[cols[p]])``, by group."""

    def epsilon(self, block: Any) -> float:
        """The machine epsilon of the computation with images of a block."""

    def pooled_bound(self, block: Any) -> NDArray[np.float64]:
        """What the NNGP of each image with itself, ``(n,)``, would be if nothing cancelled in the pooling.

        ``(mean over t of √K(t,t))²`` after the last activation: the mean of ``|K(t,t')|`` is at most that.
        """


@dataclass
class Block:
    """Images as an engine wants them, with what is computed once per image; reusable for many pairs."""

    count: int
    shape: tuple[int, int, int]
    prepared: Any
    variances: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Pooled NNGP of each image with itself, ``(n,)`` by group; filled when a dense head needs it."""


class KernelFunction:
    """The kernels of one architecture for several groups at once, on blocks of images.

    The bits of a pair depend on nothing but the two images, their order and the processor kind: not on the other
    images of a block, the block sizes or the number of threads.

    Args:
      network: everything but the group.
      groups: names of the groups; all of them come from one pass at the cost of the largest.
      engine, dtype: as in :meth:`equikernel.GroupCNN.kernel`.
      threads: CPU threads of the fast engine; ``None`` means all cores this process may use.

    Raises:
      EngineError: no such engine or dtype, or less than one thread.
    """

    def __init__(
        self,
        network: Architecture,
        groups: tuple[str, ...],
        engine: str = "auto",
        dtype: Any = "float32",
        threads: int | None = None,
    ) -> None:
        if engine not in ENGINES:
            hint = suggestion(engine, ENGINES)
            raise EngineError(f"engine {engine!r} does not exist; choose {_listing(ENGINES)}{hint}")
        if threads is not None and threads < 1:
            raise EngineError(f"{threads} threads compute nothing; use 1 or more, or None for all cores")
        self.network = network
        self.groups = groups
        self.dtype = np.dtype(np.float64) if engine == "reference" else _checked_dtype(dtype)
        self._engine: Engine
        if engine == "reference":
            self._engine = ReferenceEngine(network, groups)
        else:
            from equikernel.engines.cpu import CpuEngine

            self._engine = CpuEngine(network, groups, self.dtype, threads or available_cores())

    def prepare(self, images: ArrayLike, name: str = "images") -> Block:
        """Validate ``(n, H, W, C)`` images and compute what each needs on its own.

        Raises:
          ImageError: wrong shape or dtype, no images, NaN or infinite pixels (naming the first such image), values
            whose squares leave the range of the dtype, or non-square images for a group with quarter turns.
          NetworkError: the network does not fit the images.
        """
        array = _checked_images(images, self.dtype, name)
        _, height, width, channels = array.shape
        for group in self.groups:
            self.network.check_images(height, width, group)
        with np.errstate(over="ignore", invalid="ignore"):
            prepared = self._engine.prepare(array)
        return Block(len(array), (height, width, channels), prepared)

    def __call__(self, block1: Block, block2: Block | None = None) -> dict[str, Kernel]:
        """The kernels ``(n1, n2)`` of all pairs, by group; without ``block2`` each pair of ``block1`` only once.

        Raises:
          ImageError: the two blocks have images of different shapes.
          NonFiniteKernelError: a result is NaN or infinite, naming the first pair of images.
        """
        other = block1 if block2 is None else block2
        if block1.shape != other.shape:
            raise ImageError(
                f"x1 has images of {_shape(block1.shape)}, x2 of {_shape(other.shape)}; kernels need equal shapes"
            )
        if block2 is None:
            rows, cols = np.triu_indices(block1.count)
        else:
            rows, cols = (index.ravel() for index in np.indices((block1.count, other.count)))
        with np.errstate(over="ignore", invalid="ignore"):
            pooled = self._engine.pairs(block1.prepared, other.prepared, rows, cols)
            return {
                group: self._finish(group, pooled[group], block1, other, rows, cols, symmetric=block2 is None)
                for group in self.groups
            }

    def _finish(
        self,
        group: str,
        pooled: Pooled,
        block1: Block,
        block2: Block,
        rows: NDArray[np.intp],
        cols: NDArray[np.intp],
        *,
        symmetric: bool,
    ) -> Kernel:
        """Dense layers, then from a list of pairs to matrices in the dtype of the result."""
        q1 = q2 = eps = np.empty(0)
        if self.network.head:
            q1 = self._self_kernels(group, block1)[rows]
            q2 = self._self_kernels(group, block2)[cols]
            eps = np.maximum(self._rounding(group, block1)[rows], self._rounding(group, block2)[cols])
        matrices = []
        for values in dense_layers(self.network, pooled, q1, q2, eps):
            matrix = np.empty((block1.count, block2.count), self.dtype)
            matrix[rows, cols] = values
            if symmetric:
                matrix[cols, rows] = matrix[rows, cols]
            matrices.append(matrix)
        kernel = Kernel(*matrices)
        _refuse_non_finite(kernel, group)
        return kernel

    def _self_kernels(self, group: str, block: Block) -> NDArray[np.float64]:
        if group not in block.variances:
            diagonal = np.arange(block.count)
            for name, pooled in self._engine.pairs(block.prepared, block.prepared, diagonal, diagonal).items():
                block.variances[name] = pooled.nngp
        return block.variances[group]

    def _rounding(self, group: str, block: Block) -> NDArray[np.float64]:
        """Relative rounding error of the pooled NNGP of each image with itself, ``(n,)``.

        The epsilon of the computation, times what cancellation in the pooling costs (erf kernels change sign).
        """
        variance, bound = self._self_kernels(group, block), self._engine.pooled_bound(block.prepared)
        lost = np.divide(bound, variance, out=np.ones_like(bound), where=variance > 0)
        rounding: NDArray[np.float64] = self._engine.epsilon(block.prepared) * np.maximum(lost, 1)
        return rounding


def dense_layers(
    network: Architecture, pooled: Pooled, q1: NDArray[np.float64], q2: NDArray[np.float64], eps: NDArray[np.float64]
) -> Pooled:
    """The dense layers after the pooling: ``K ← w² K + b²``, ``Θ ← K_new + w² Θ``, an activation per name in the head.

    Args:
      pooled: kernels of ``(p,)`` pairs after the pooling.
      q1, q2: pooled NNGP of the first and second image of each pair with itself, ``(p,)``; unused without a head.
      eps: relative rounding error of the pooled kernels of each pair, ``(p,)``; unused without a head.
    """
    w2, b2 = network.w_std**2, network.b_std**2
    k, theta = pooled
    for activation in network.head:
        k, q1, q2 = w2 * k + b2, w2 * q1 + b2, w2 * q2 + b2
        theta = k + w2 * theta
        dual = DUALS[activation]
        k, derivative = dual(k, q1, q2, eps)
        theta = derivative * theta
        q1, q2 = dual(q1, q1, q1)[0], dual(q2, q2, q2)[0]
    k = w2 * k + b2
    return Pooled(k, k + w2 * theta)


def compute(
    network: Architecture,
    groups: tuple[str, ...],
    x1: ArrayLike,
    x2: ArrayLike | None,
    *,
    engine: str,
    dtype: Any,
    threads: int | None = None,
) -> dict[str, Kernel]:
    """The kernels of ``x1`` against ``x2`` by group; see :meth:`equikernel.GroupCNN.kernel`."""
    function = KernelFunction(network, groups, engine, dtype, threads)
    block1 = function.prepare(x1, "x1")
    return function(block1, None if x2 is None else function.prepare(x2, "x2"))


def available_cores() -> int:
    """The CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _checked_dtype(dtype: Any) -> np.dtype[Any]:
    for name in DTYPES:
        with contextlib.suppress(TypeError):
            if dtype is not None and np.dtype(dtype) == name:
                return np.dtype(name)
    raise EngineError(f"dtype {dtype!r} does not exist for kernels; choose {_listing(DTYPES)}")


def _checked_images(images: ArrayLike, dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    try:
        array = np.asarray(images)
    except ValueError as error:
        raise ImageError(f"{name} is no array ({error}); images are (n, height, width, channels)") from None
    if array.dtype.kind not in "fiub":
        raise ImageError(f"{name} has dtype {array.dtype}; images are real numbers, float32 or float64")
    if array.ndim != 4:
        raise ImageError(
            f"{name} has shape {array.shape}; images are (n, height, width, channels), "
            "for grey images with channels = 1, for a single image with n = 1"
        )
    if 0 in array.shape:
        raise ImageError(f"{name} has shape {array.shape}, so it holds no pixels; give at least one image")
    finite = np.isfinite(array).all(axis=(1, 2, 3))
    if not finite.all():
        raise ImageError(f"{name}[{int(np.argmin(finite))}] has NaN or infinite pixels; remove or repair that image")
    largest = np.abs(array, dtype=np.float64).max(axis=(1, 2, 3))
    low, high = (1e-15, 1e15) if dtype.itemsize == 4 else (1e-120, 1e120)
    bad = ((largest > high) | (largest < low)) & (largest > 0)
    if bad.any():
        index = int(np.argmax(bad))
        raise ImageError(
            f"the largest pixel of {name}[{index}] is {largest[index]:.3g}; {dtype.name} kernels need it between "
            f"{low:g} and {high:g} (or an image of zeros); rescale the images"
        )
    return np.ascontiguousarray(array, dtype=dtype)


def _refuse_non_finite(kernel: Kernel, group: str) -> None:
    for name, matrix in zip(kernel._fields, kernel, strict=True):
        finite = np.isfinite(matrix)
        if not finite.all():
            i, j = (int(index) for index in np.unravel_index(int(np.argmin(finite)), matrix.shape))
            raise NonFiniteKernelError(
                f"the {group} {name} of images {i} and {j} is {matrix[i, j]}: the values leave the range of "
                f"{matrix.dtype}; rescale the images, change w_std or depth, or use float64"
            )


def _listing(names: tuple[str, ...]) -> str:
    return " or ".join([", ".join(map(repr, names[:-1])), repr(names[-1])])


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
