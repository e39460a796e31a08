"""NVIDIA GPUs for the GPU engine, through numba-cuda: memory, streams, and the primitives that its source calls."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from cuda.bindings import driver
from llvmlite import ir
from numba import cuda, types
from numba.cuda import config
from numba.cuda.cudadrv.driver import CudaAPIError
from numba.cuda.extending import intrinsic

from equikernel.errors import MemoryLimitError
from equikernel.memory import format_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equikernel.engines.gpu_source import Source

ALL = 0xFFFFFFFF
"""The mask of all threads of a warp."""

SHARED = 48 * 1024
"""Bytes that the threads of a block may share without asking."""

PROGRAMS = 64
"""Compiled sources that are kept."""

CYCLES = 1.2e9
"""In which a scheduler issues an instruction, per second, roughly; it only says how large a batch is."""


class Cuda:
    """The current GPU of this process; see :class:`equikernel.engines.gpu.Device`."""

    def __init__(self) -> None:
        config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # of a few pairs, which nobody can help
        device = cuda.get_current_device()
        self.kind = device.name if isinstance(device.name, str) else device.name.decode()
        self.rate = 4 * device.MULTIPROCESSOR_COUNT * CYCLES
        self.shared = SHARED
        most = device.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        if allow_shared(cuda.jit("void(float64[::1])")(_nothing), most):
            self.shared = most
        self._programs: dict[tuple[str, str], dict[str, Any]] = {}

    def free(self) -> int:
        """Bytes of memory that can be taken."""
        return int(cuda.current_context().get_memory_info().free)

    def put(self, array: NDArray[Any]) -> Any:
        """A copy of an array on the GPU."""
        with _Refusing(array.nbytes):
            return cuda.to_device(np.ascontiguousarray(array))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array on the GPU."""
        with _Refusing(math.prod(shape) * np.dtype(dtype).itemsize):
            return cuda.device_array(shape, dtype)

    def get(self, array: Any) -> NDArray[Any]:
        """A copy of an array on the host."""
        copy: NDArray[Any] = array.copy_to_host()
        return copy

    def stream(self) -> Any:
        """A queue of kernels."""
        return cuda.stream()

    def mark(self, stream: Any) -> Any:
        """An event at the end of a stream."""
        event = cuda.event(timing=False)
        event.record(stream)
        return event

    def wait(self, mark: Any) -> None:
        """Until everything before the event has run."""
        mark.synchronize()

    def compile(self, source: Source, dtype: str) -> dict[str, Any]:
        """The functions of a source, each with the bytes that its blocks share."""
        key = source.text, dtype
        if key not in self._programs:
            shared = 2 * source.layout.image * np.dtype(dtype).itemsize if source.shared else 0
            compiled = {
                name: cuda.jit(signatures(dtype)[name], max_registers=source.registers)(function)
                for name, function in functions_of(source, dtype).items()
            }
            if shared > SHARED:
                allow_shared(compiled["kernel"], shared)
            while len(self._programs) >= PROGRAMS:
                del self._programs[next(iter(self._programs))]
            self._programs[key] = {"kernel": (compiled["kernel"], shared), "finish": (compiled["finish"], 0)}
        return self._programs[key]

    def launch(
        self, program: dict[str, Any], name: str, blocks: int, threads: int, stream: Any, *arguments: Any
    ) -> None:
        """Put a function of a program into a stream."""
        function, shared = program[name]
        function[blocks, threads, stream, shared](*arguments)


class _Refusing:
    """Says in our words that memory of the GPU is short."""

    def __init__(self, needed: int) -> None:
        self.needed = needed

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: object, __: object) -> None:
        if isinstance(error, CudaAPIError) and error.code == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free = int(cuda.current_context().get_memory_info().free)
            raise MemoryLimitError(
                f"the engine 'gpu' needs {format_bytes(self.needed)} more on the GPU, where {format_bytes(free)} are "
                "free; compute fewer or smaller images at once (in a job smaller tiles), or leave the GPU to fewer "
                "processes"
            ) from error


@cache
def device() -> Cuda:
    """The GPU of this process."""
    return Cuda()


def allow_shared(function: Any, size: int) -> bool:
    """Let the threads of a block of a compiled function share ``size`` bytes, and say whether they may.

    numba-cuda has no public way to ask; without, images are read through the cache.
    """
    try:
        (kernel,) = function.overloads.values()
        compiled = kernel._codelibrary.get_cufunc()
    except (AttributeError, ValueError):
        return False
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    if isinstance(compiled.handle, driver.CUkernel):
        (error,) = driver.cuKernelSetAttribute(attribute, size, compiled.handle, cuda.get_current_device().id)
    else:
        (error,) = driver.cuFuncSetAttribute(compiled.handle, attribute, size)
    return bool(error == driver.CUresult.CUDA_SUCCESS)


def _nothing(array: Any) -> None:
    pool = cuda.shared.array(0, types.float64)
    pool[cuda.threadIdx.x] = array[cuda.threadIdx.x]
    array[0] = pool[0]


@intrinsic
def approximate_root(_: Any, x: Any) -> Any:
    """The square root of a float32 in one instruction, to one unit in the last place; exact for 0."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        number = ir.FloatType()
        assembly = ir.InlineAsm(ir.FunctionType(number, [number]), "sqrt.approx.ftz.f32 $0, $1;", "=f,f")
        return builder.call(assembly, arguments)

    return types.float32(types.float32), generate


@intrinsic
def approximate_quotient(_: Any, x: Any, y: Any) -> Any:
    """The quotient of two float32 to two units in the last place, for divisors of less than 2^126."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        number = ir.FloatType()
        kind = ir.FunctionType(number, [number, number])
        return builder.call(ir.InlineAsm(kind, "div.approx.ftz.f32 $0, $1, $2;", "=f,f,f"), arguments)

    return types.float32(types.float32, types.float32), generate


def _place() -> Any:
    return 0, cuda.blockIdx.x, cuda.threadIdx.x


def _far(images: Any, image: Any, place: Any) -> Any:
    return images[
        types.uint64(image), types.uint64(place)
    ]  # of a signed number, Python's negative places are looked for


def _near(pool: Any, home: Any, place: Any) -> Any:
    return pool[types.uint64(place)]


def _store(pool: Any, home: Any, place: Any, value: Any) -> None:
    pool[types.uint64(place)] = value


def _meet() -> None:
    cuda.syncthreads()


def _put(array: Any, row: Any, column: Any, value: Any, condition: Any) -> None:
    if condition:
        array[row, column] = value


def _select(condition: Any, yes: Any, no: Any) -> Any:
    return yes if condition else no


def _narrow(value: Any) -> Any:
    return types.int32(value)


def _double(value: Any) -> Any:
    return types.float64(value)


def _shuffle(value: Any, lane: Any) -> Any:
    return cuda.shfl_sync(ALL, value, lane)


def _smaller(value: Any, other: Any) -> Any:
    return min(value, other)


def _larger(value: Any, other: Any) -> Any:
    return max(value, other)


def _quotient(value: Any, other: Any) -> Any:
    return approximate_quotient(value, other)


def _exact_quotient(value: Any, other: Any) -> Any:
    return value / other


def _root(value: Any) -> Any:
    return approximate_root(value)


def _exact_root(value: Any) -> Any:
    return math.sqrt(value)


def _copysign(value: Any, sign: Any) -> Any:
    return math.copysign(value, sign)


def _exp(value: Any) -> Any:
    return math.exp(value)


@cache
def primitives(dtype: str) -> dict[str, Any]:
    """The functions that the source calls, compiled for each precision, and for the types of their arguments."""
    single = dtype == "float32"
    functions = {
        "place": _place,
        "far": _far,
        "near": _near,
        "store": _store,
        "meet": _meet,
        "put": _put,
        "select": _select,
        "narrow": _narrow,
        "double": _double,
        "shuffle": _shuffle,
        "smaller": _smaller,
        "larger": _larger,
        "quotient": _quotient if single else _exact_quotient,
        "root": _root if single else _exact_root,
        "copysign": _copysign,
        "exp": _exp,
    }
    return {name: cuda.jit(device=True)(function) for name, function in functions.items()}


def functions_of(source: Source, dtype: str) -> dict[str, Any]:
    """``kernel`` and ``finish`` of a source as Python functions of numba-cuda's dialect."""
    real = types.float32 if dtype == "float32" else types.float64
    names: dict[str, Any] = {"cuda": cuda, "real": real, "constant": np.dtype(dtype).type, **primitives(dtype)}
    exec(source.text, names)
    names |= {name: cuda.jit(device=True)(names[name]) for name in names if name.startswith("dual")}
    return {name: names[name] for name in ("kernel", "finish")}


def signatures(dtype: str) -> dict[str, tuple[Any, ...]]:
    """The types of their arguments."""
    images = types.Array(types.float32 if dtype == "float32" else types.float64, 2, "C")
    index, sums, number = types.Array(types.int32, 1, "C"), types.Array(types.float64, 2, "C"), types.int64
    return {
        "kernel": (images, images, index, index, index, index, number, number, sums),
        "finish": (sums, number, number, number, sums),
    }
