"""From images to kernels: validation, the choice of engine, and the dense layers after the pooling."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from equikernel.errors import (
    EngineError,
    ImageError,
    MemoryLimitError,
    NonFiniteKernelError,
    either,
    is_whole,
    suggestion,
)
from equikernel.groups import on_grid, union
from equikernel.images import Labels, as_images, check_pixels
from equikernel.layers import Branch, Convolution, Pooling
from equikernel.memory import available_memory, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import ArrayLike, NDArray

    from equikernel.layers import Step
    from equikernel.network import Architecture
    from equikernel.pooled import Pooled, Prepared

    Index = NDArray[np.intp]

EngineName = Literal["auto", "cpu", "gpu", "xla", "general", "reference"]
ENGINES = ("auto", "cpu", "gpu", "xla", "general", "reference")
DTYPES = ("float32", "float64")

SHARE = 0.5
"""Share of the free memory that a call uses unless told otherwise; and share of that for work in progress."""


class _Matrices(NamedTuple):
    nngp: NDArray[Any]
    ntk: NDArray[Any]


class Kernel(_Matrices):
    """NNGP and NTK of a network on pairs of images: a tuple of two ``(n1, n2)`` arrays, without units."""

    engine: str = ""
    """The engine that computed them."""


class Engine(Protocol):
    """What computes pooled kernels: everything before the dense layers."""

    name: str

    def prepare(self, images: NDArray[Any], labels: Labels) -> Prepared:
        """Per-image constants of ``(n, H, W, C)`` images; ``labels`` is what errors call them."""

    def pairs(self, block1: Any, block2: Any, rows: NDArray[np.intp], cols: NDArray[np.intp]) -> dict[str, Pooled]:
        """Pooled kernels ``(p,)`` float64 of the pairs ``(block1[rows[p]], block2[cols[p]])``, by group."""

    def image_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of one prepared image."""

    def pair_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of working memory without which not even a single pair can be computed."""

    def working_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of working memory that the engine takes when there are many pairs, at least :meth:`pair_bytes`."""


@dataclass
class Block:
    """Images as an engine wants them, with what is computed once per image; reusable for many pairs."""

    count: int
    shape: tuple[int, int, int]
    prepared: Prepared
    labels: Labels
    pooled: dict[str, Pooled] = field(default_factory=dict)
    """Pooled kernels of each image with itself, ``(n,)`` by group; filled when they are needed."""


@dataclass(frozen=True)
class Explanation:
    """Which engine computes a network's kernels, and what they cost; ``str()`` says it in words.

    Attributes:
      engine: its name.
      reason: why this one.
      flops: floating-point operations of one pair of images, roughly.
      pair_bytes: memory of one pair with its two images, the smallest ``memory_limit``.
      image_bytes: memory of each image with its per-image constants.
    """

    engine: str
    reason: str
    flops: float
    pair_bytes: int
    image_bytes: int

    def __str__(self) -> str:
        return (
            f"engine {self.engine!r}: {self.reason}; {self.flops:.2g} flop and {format_bytes(self.pair_bytes)} of "
            f"working memory per pair, {format_bytes(self.image_bytes)} per image"
        )


def needs_dense(steps: Iterable[Step], groups: tuple[str, ...]) -> str:
    """Why a network has no offset decoupling, in words; empty if it has.

    Exactly those networks have it whose group maps pixels to pixels, and whose layers all keep the offset ``t' - t``.
    """
    for group in groups:
        if not on_grid(group):
            return f"{group} does not map the pixel grid to itself"
    for step in steps:
        if isinstance(step, Convolution) and step.stride > 1:
            return f"the stride of {step.place} does not keep the offset between pixels"
        if isinstance(step, Pooling):
            return f"the pooling {step.place} does not keep the offset between pixels"
        if isinstance(step, Branch) and (why := needs_dense(step.steps, groups)):
            return why
    return ""


def choose_engine(
    network: Architecture, groups: tuple[str, ...], engine: str, gpu: bool | None = None
) -> tuple[str, str]:
    """The engine to use and the reason, for the name that a user gave.

    Args:
      network, groups: the networks.
      engine: one of :data:`ENGINES`.
      gpu: whether to compute on a GPU that all engines can use; ``None`` means as it is here.

    Raises:
      EngineError: there is no such engine, or it cannot do this network.
    """
    if engine not in ENGINES:
        hint = suggestion(engine, ENGINES)
        raise EngineError(f"engine {engine!r} does not exist; choose {either(map(repr, ENGINES))}{hint}")
    why = needs_dense(network.steps, groups)
    if engine in ("cpu", "gpu", "xla") and why:
        raise EngineError(f"the engine {engine!r} cannot do this network: {why}; use 'general' or 'auto'")
    if engine == "general" and len(groups) > 1 and not all(map(on_grid, groups)):
        raise EngineError(f"the groups {', '.join(groups)} do not share a pass; compute {groups[-1]} alone")
    if engine != "auto":
        return engine, "it was asked for"
    if why:
        return "general", why
    if gpu is None:
        missing = why_no_gpu()
        gpu = not missing
        if missing and jax_has_gpu():
            return "xla", f"offsets decouple, and there is a GPU; not 'gpu', because {missing}"
    return ("gpu", "offsets decouple, and there is a GPU") if gpu else ("cpu", "offsets decouple, and there is no GPU")


def has_gpu() -> bool:
    """Whether an engine computes on a GPU here."""
    return not why_no_gpu() or jax_has_gpu()


@cache
def why_no_gpu() -> str:
    """Why the engine ``"gpu"`` cannot be used here, in words; empty if it can."""
    if find_spec("numba_cuda") is None:
        return "numba-cuda is not installed (as with `pip install 'numba-cuda[cu13]'`)"
    try:
        if not _driver_finds_gpu():
            return "no NVIDIA GPU with a driver is found"
        from equikernel.engines.gpu_device import device

        device()  # needs more than a driver
        return ""
    except Exception as error:  # whatever is wrong with a driver, other engines work
        return f"numba-cuda fails ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"


def _driver_finds_gpu() -> bool:
    """Whether there is a GPU; the driver itself is asked, because importing numba takes more than a second."""
    from cuda.bindings import driver

    try:
        return not driver.cuInit(0)[0] and driver.cuDeviceGetCount()[1] > 0
    except RuntimeError:  # there is no driver
        return False


@cache
def jax_has_gpu() -> bool:
    """Whether JAX computes on a GPU here. JAX is only imported where a plug-in for GPUs is installed."""
    if not entry_points(group="jax_plugins"):
        return False
    import jax

    return str(jax.default_backend()) in ("gpu", "cuda", "rocm")


class KernelFunction:
    """The kernels of one architecture for several groups at once, on blocks of images.

    With the engine ``"cpu"`` the bits of a pair depend on nothing but the two images, their order and the processor
    kind: not on the other images of a block, the block sizes or the number of threads.

    Args:
      network: everything but the group.
      groups: names of the groups; all of them come from one pass at the cost of their union.
      engine, dtype: as in :meth:`equikernel.GroupCNN.kernel`.
      threads: CPU threads of the engine ``"cpu"``; ``None`` means all cores this process may use.
      memory_limit: bytes that a call may use besides its result; ``None`` means half of what is free now.

    Raises:
      EngineError: no such engine or dtype, an engine that cannot do this network, or less than one thread.
    """

    def __init__(
        self,
        network: Architecture,
        groups: tuple[str, ...],
        engine: str = "auto",
        dtype: Any = "float32",
        threads: int | None = None,
        memory_limit: int | None = None,
    ) -> None:
        if threads is not None and not (is_whole(threads) and threads >= 1):
            raise EngineError(f"threads = {threads!r}; give a whole number, 1 or more, or None for all cores")
        if memory_limit is not None and not (is_whole(memory_limit) and memory_limit >= 1):
            raise EngineError(
                f"memory_limit = {memory_limit!r}; give a whole number of bytes, 1 or more, or None for half of what "
                "is free"
            )
        name, self.reason = choose_engine(network, groups, engine)
        self._any_engine = engine == "auto"
        self._threads = threads or available_cores()
        self._memory_limit = memory_limit
        self.network = network
        self.groups = groups
        self.dtype = np.dtype(np.float64) if name == "reference" else _checked_dtype(dtype)
        self._take(name)

    def _take(self, name: str) -> None:
        """Take the engine ``name``, and the memory where it computes."""
        self.memory = int(SHARE * _free_memory(name)) if self._memory_limit is None else self._memory_limit
        self.engine = _engine(name, self.network, self.groups, self.dtype, self._threads, self.memory)

    def prepare(self, images: ArrayLike, name: str = "images", first: int = 0) -> Block:
        """Validate ``(n, H, W, C)`` images and compute what each needs on its own.

        ``name`` and the number ``first`` of the first image are what errors call them.

        Raises:
          ImageError: wrong shape or dtype, no images, NaN or infinite pixels (naming the first such image), values
            whose squares leave the range of the dtype, or non-square images for a group with quarter turns.
          NetworkError: the network does not fit the images.
        """
        array, labels = as_images(images, name), Labels(name, first)
        _, height, width, channels = array.shape
        self.check_size(height, width, channels)
        check_pixels(array, self.dtype, labels)
        with np.errstate(over="ignore", invalid="ignore"):
            prepared = self.engine.prepare(array, labels)
        self._refuse_vanishing(prepared, labels)
        return Block(len(array), (height, width, channels), prepared, labels)

    def check_size(self, height: int, width: int, channels: int) -> None:
        """Raise unless the network is defined on images of that shape and one pair fits in memory.

        Raises:
          ImageError, NetworkError: as :meth:`prepare`.
          MemoryLimitError: a single pair needs more memory than there is.
        """
        self.check_shape(height, width)
        needed = self.least_bytes((height, width, channels))
        if needed > self.memory:
            smaller = ["smaller images"] if height * width > 1 else []
            smaller += ["a group with fewer elements"] if len(union(self.groups)) > 1 else []
            raise MemoryLimitError(
                f"the engine {self.engine.name!r} needs {format_bytes(needed)} for a pair of "
                f"{height}x{width}x{channels} images, and may use {format_bytes(self.memory)}; use "
                f"{', '.join([*smaller, f'or memory_limit={needed} or more' if smaller else f'memory_limit={needed}'])}"
            )

    def check_shape(self, height: int, width: int) -> None:
        """Raise unless the network, and the engine, are defined on images of that size; as :meth:`check_size`.

        Where ``"auto"`` took the engine ``"gpu"``, and it cannot, ``"xla"`` takes its place if JAX has the GPU too,
        else ``"cpu"``.
        """
        self.network.check_images(height, width, *self.groups)
        if self.engine.name != "gpu":
            return
        if not self._any_engine:
            check_gpu(self.network, width, self.dtype.name)
        elif why := _why_not_gpu(self.network, width, self.dtype.name):
            self._take("xla" if jax_has_gpu() else "cpu")
            self.reason = f"offsets decouple, and there is a GPU; not 'gpu', because {why}"
            if self.engine.name == "cpu":
                self.reason += ", and not 'xla', because JAX has no GPU"

    def least_bytes(self, image_shape: tuple[int, int, int]) -> int:
        """Bytes that a single pair of images ``(H, W, C)`` takes."""
        return self.engine.pair_bytes(*image_shape) + self.block_bytes(image_shape, 1)

    def block_bytes(self, image_shape: tuple[int, int, int], edge: int) -> int:
        """Bytes of two blocks of ``edge`` prepared images ``(H, W, C)`` and their kernels, besides working memory."""
        # Of a pair: indices and flags; both kernels of every element; of every group both after pooling, and what the
        # dense layers take.
        pair = 40 + 16 * len(union(self.groups)) + (144 if self.network.head else 64) * len(self.groups)
        return 2 * edge * self.engine.image_bytes(*image_shape) + edge**2 * pair

    def _refuse_vanishing(self, prepared: Prepared, labels: Labels) -> None:
        """Raise :class:`ImageError` where kernels cannot but be too small for the dtype of the result."""
        w2, b2 = self.network.w_std**2, self.network.b_std**2
        q = prepared.bound
        for activation in self.network.head_activations:
            q = activation.moment(w2 * q + b2)
        q = w2 * q + b2
        tiny = float(np.finfo(self.dtype).tiny)
        bad = (q < tiny) & (prepared.bound > 0)
        if bad.any():
            index = int(np.argmax(bad))
            raise ImageError(
                f"the kernel of {labels.of(index)} with itself is at most {q[index]:.3g} after the head, below the "
                f"range of {self.dtype.name}, {tiny:.1e}; rescale the images or change w_std or b_std"
            )

    def __call__(self, block1: Block, block2: Block | None = None) -> dict[str, Kernel]:
        """The kernels ``(n1, n2)`` of all pairs, by group; without ``block2`` each pair of ``block1`` only once.

        Raises:
          ImageError: the two blocks have images of different shapes.
          NonFiniteKernelError: a result is NaN or infinite, naming the first pair of images.
        """
        return self.begin(block1, block2)()

    def begin(self, block1: Block, block2: Block | None = None) -> Callable[[], dict[str, Kernel]]:
        """Do what a call does but for its end, on the host, which is returned: meanwhile the engine may go on.

        Raises:
          ImageError: the two blocks have images of different shapes.
        """
        other = block1 if block2 is None else block2
        if block1.shape != other.shape:
            raise _unequal(block1.shape, other.shape)
        if block2 is None:
            rows, cols = np.triu_indices(block1.count)
        else:
            rows, cols = (index.ravel() for index in np.indices((block1.count, other.count)))
        with np.errstate(over="ignore", invalid="ignore"):
            pooled = self.engine.pairs(block1.prepared, other.prepared, rows, cols)
            if self.network.head:
                self._self_kernels(block1)
                self._self_kernels(other)

        def end() -> dict[str, Kernel]:
            with np.errstate(over="ignore", invalid="ignore"):
                return {
                    group: self._finish(group, pooled[group], block1, other, rows, cols, symmetric=block2 is None)
                    for group in self.groups
                }

        return end

    def diagonal(self, block: Block) -> dict[str, Pooled]:
        """NNGP and NTK ``(n,)`` float64 of each image with itself, by group: the diagonal of what a call gives."""
        same = np.arange(block.count)
        with np.errstate(over="ignore", invalid="ignore"):
            pooled = self._self_kernels(block)
            return {group: self._dense(group, pooled[group], block, block, same, same) for group in self.groups}

    def _finish(
        self,
        group: str,
        pooled: Pooled,
        block1: Block,
        block2: Block,
        rows: Index,
        cols: Index,
        *,
        symmetric: bool,
    ) -> Kernel:
        """Dense layers, then from a list of pairs to matrices in the dtype of the result."""
        matrices = []
        for values in self._dense(group, pooled, block1, block2, rows, cols):
            matrix = np.empty((block1.count, block2.count), self.dtype)
            matrix[rows, cols] = values
            if symmetric:
                matrix[cols, rows] = matrix[rows, cols]
            matrices.append(matrix)
        kernel = Kernel(*matrices)
        kernel.engine = self.engine.name
        _refuse_non_finite(kernel, group, block1.labels, block2.labels)
        return kernel

    def _dense(self, group: str, pooled: Pooled, block1: Block, block2: Block, rows: Index, cols: Index) -> Pooled:
        """The pooled kernels ``(p,)`` of pairs through the dense layers."""
        q1 = q2 = eps = np.empty(0)
        if self.network.head:
            q1 = self._self_kernels(block1)[group].nngp[rows]
            q2 = self._self_kernels(block2)[group].nngp[cols]
            eps = np.maximum(self._rounding(group, block1)[rows], self._rounding(group, block2)[cols])
        return dense_layers(self.network, pooled, q1, q2, eps)

    def _self_kernels(self, block: Block) -> dict[str, Pooled]:
        if not block.pooled:
            same = np.arange(block.count)
            block.pooled.update(self.engine.pairs(block.prepared, block.prepared, same, same))
        return block.pooled

    def _rounding(self, group: str, block: Block) -> NDArray[np.float64]:
        """Relative rounding error of the pooled NNGP of each image with itself, ``(n,)``.

        The epsilon of the computation, times what cancellation in the pooling costs (erf kernels change sign).
        """
        variance, bound = self._self_kernels(block)[group].nngp, block.prepared.bound
        lost = np.divide(bound, variance, out=np.ones_like(bound), where=variance > 0)
        rounding: NDArray[np.float64] = block.prepared.epsilon * np.maximum(lost, 1)
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
    for activation in network.head_activations:
        k, q1, q2 = w2 * k + b2, w2 * q1 + b2, w2 * q2 + b2
        theta = k + w2 * theta
        k, derivative = activation.dual(k, q1, q2, eps)
        theta = derivative * theta
        q1, q2 = activation.moment(q1), activation.moment(q2)
    k = w2 * k + b2
    return type(pooled)(k, k + w2 * theta)


def compute(
    network: Architecture,
    groups: tuple[str, ...],
    x1: ArrayLike,
    x2: ArrayLike | None,
    *,
    engine: str,
    dtype: Any,
    threads: int | None = None,
    memory_limit: int | None = None,
) -> dict[str, Kernel]:
    """The kernels of ``x1`` against ``x2`` by group, block by block; see :meth:`equikernel.GroupCNN.kernel`."""
    first = as_images(x1, "x1")
    function = KernelFunction(network, groups, engine, dtype, threads, memory_limit)
    second = first if x2 is None else as_images(x2, "x2")
    if first.shape[1:] != second.shape[1:]:
        raise _unequal(first.shape[1:], second.shape[1:])
    function.check_size(*first.shape[1:])
    results = _empty_results(function, len(first), len(second))
    largest = max(len(first), len(second))
    edge = block_edge(function, first.shape[1:], largest)
    if edge >= largest:
        return function(function.prepare(first, "x1"), None if x2 is None else function.prepare(second, "x2"))
    for name, images in (("x1", first),) if x2 is None else (("x1", first), ("x2", second)):
        check_pixels(images, function.dtype, Labels(name))  # before any time is spent
    for i in range(0, len(first), edge):
        rows = function.prepare(first[i : i + edge], "x1", first=i)
        for j in range(i if x2 is None else 0, len(second), edge):
            if x2 is None and i == j:
                part = function(rows)
            else:
                part = function(rows, function.prepare(second[j : j + edge], "x1" if x2 is None else "x2", first=j))
            for group, kernel in part.items():
                for matrix, values in zip(results[group], kernel, strict=True):
                    matrix[i : i + edge, j : j + edge] = values
                    if x2 is None:
                        matrix[j : j + edge, i : i + edge] = values.T
    return results


def check_gpu(network: Architecture, width: int, dtype: str) -> None:
    """Raise :class:`EngineError` if the engine ``"gpu"`` cannot do a network for rows of ``width`` pixels."""
    if why := _why_not_gpu(network, width, dtype):
        raise EngineError(f"the engine 'gpu' cannot do this network: {why}; use engine='auto'")


def _why_not_gpu(network: Architecture, width: int, dtype: str) -> str:
    from equikernel.engines.gpu_source import why_not

    return why_not(network.steps, network.padding, width, dtype)


def _free_memory(engine: str) -> int:
    """Bytes that can be allocated for an engine, where it computes."""
    if engine != "gpu" or why_no_gpu():
        return available_memory()
    from equikernel.engines.gpu_device import device

    return min(available_memory(), device().free())


def block_edge(function: KernelFunction, image_shape: tuple[int, int, int], largest: int) -> int:
    """Images per side of a block, so that two blocks and their pairs fit in the memory of ``function``."""
    budget = function.memory - function.engine.working_bytes(*image_shape)
    edge = largest
    while edge > 1 and function.block_bytes(image_shape, edge) > budget:
        edge = -(-edge // 2)
    return edge


def _empty_results(function: KernelFunction, rows: int, cols: int) -> dict[str, Kernel]:
    """Arrays for the kernels; the memory is taken only when they are filled.

    Raises:
      MemoryLimitError: they do not fit.
    """
    needed, free = 2 * len(function.groups) * rows * cols * function.dtype.itemsize, available_memory()
    if needed > free:
        raise MemoryLimitError(
            f"the kernels of {rows} against {cols} images take {format_bytes(needed)}, and {format_bytes(free)} are "
            "free; compute them in blocks of images, or into a store with `equigram run`"
        )
    results = {}
    for group in function.groups:
        results[group] = Kernel(*(np.empty((rows, cols), function.dtype) for _ in range(2)))
        results[group].engine = function.engine.name
    return results


def explain(
    network: Architecture, groups: tuple[str, ...], image_shape: tuple[int, int, int], *, engine: str, dtype: Any
) -> Explanation:
    """Which engine computes the kernels of ``(H, W, C)`` images; see :meth:`equikernel.GroupCNN.explain`."""
    from equikernel.cost import pair_flops

    if not (
        isinstance(image_shape, (tuple, list))
        and len(image_shape) == 3
        and all(is_whole(side) and side >= 1 for side in image_shape)
    ):
        raise ImageError(f"image_shape = {image_shape!r} is no shape of an image; give (height, width, channels)")
    height, width, channels = image_shape
    function = KernelFunction(network, groups, engine, dtype)
    function.check_shape(height, width)
    return Explanation(
        function.engine.name,
        function.reason,
        pair_flops(network, groups, function.engine.name, image_shape),
        function.least_bytes(image_shape),
        function.engine.image_bytes(height, width, channels),
    )


def _engine(
    name: str, network: Architecture, groups: tuple[str, ...], dtype: np.dtype[Any], threads: int, memory: int
) -> Engine:
    """The engine called ``name``; its module is imported only when it is used.

    Of ``memory`` it may use :data:`SHARE` for work in progress; a single pair all.
    """
    memory = int(SHARE * memory)
    if name in ("xla", "general"):
        from equikernel.engines.device import require_device

        require_device(name)
    match name:
        case "reference":
            from equikernel.recursion import ReferenceEngine

            return ReferenceEngine(network, groups, memory)
        case "general":
            from equikernel.engines.general import GeneralEngine

            return GeneralEngine(network, groups, memory)
        case "gpu":
            if why := why_no_gpu():
                raise EngineError(f"the engine 'gpu' has no device: {why}; use engine='xla' or 'cpu'")
            from equikernel.engines.gpu import GpuEngine
            from equikernel.engines.gpu_device import device

            return GpuEngine(network, groups, dtype, memory, device())
        case "xla":
            from equikernel.engines.xla import XlaEngine

            return XlaEngine(network, groups, dtype, memory)
        case _:
            from equikernel.engines.cpu import CpuEngine

            return CpuEngine(network, groups, dtype, threads, memory)


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
    raise EngineError(f"dtype {dtype!r} does not exist for kernels; choose {either(map(repr, DTYPES))}")


def _unequal(shape1: tuple[int, ...], shape2: tuple[int, ...]) -> ImageError:
    return ImageError(f"x1 has images of {_shape(shape1)}, x2 of {_shape(shape2)}; kernels need equal shapes")


def _refuse_non_finite(kernel: Kernel, group: str, labels1: Labels, labels2: Labels) -> None:
    for name, matrix in zip(kernel._fields, kernel, strict=True):
        finite = np.isfinite(matrix)
        if not finite.all():
            i, j = (int(index) for index in np.unravel_index(int(np.argmin(finite)), matrix.shape))
            raise NonFiniteKernelError(
                f"the {group} {name} of {labels1.of(i)} and {labels2.of(j)} is {matrix[i, j]}: the values leave the "
                f"range of {matrix.dtype}; rescale the images, change w_std or depth, or use float64"
            )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
