"""Code for vectors of this processor, written as expressions and compiled with LLVM.

A :class:`Function` under construction hands out :class:`Vector` and :class:`Index` values, whose operators emit
instructions. Vectors are as wide as the registers, so nothing depends on what a compiler manages to vectorise: a loop
over vectors is written as such, and each operation is one instruction. Sums of products are fused where the processor
can; nothing else is rearranged.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

BYTE, INT, POINTER = ir.IntType(8), ir.IntType(64), ir.PointerType()

CACHE_LINE = 64
"""Bytes that vectors in memory are aligned to, at most."""

CONTRACT = ("contract",)

_LLVM = threading.Lock()
"""LLVM's compiler is entered by one thread at a time, and not while the process forks."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_LLVM.acquire, after_in_parent=_LLVM.release, after_in_child=_LLVM.release)

Operand: TypeAlias = "Vector | float"
Whole: TypeAlias = "Index | int"


@dataclass(frozen=True)
class Target:
    """A processor to compile for.

    Attributes:
      cpu, features: as LLVM names them.
      vector_bytes: the widest registers that compute at full speed.
    """

    cpu: str
    features: str
    vector_bytes: int

    @property
    def kind(self) -> str:
        """In words. A name alone does not tell: a virtual machine may hide instructions."""
        return f"{self.cpu} ({8 * self.vector_bytes} bits)"

    def lanes(self, dtype: np.dtype[Any]) -> int:
        """Numbers per vector."""
        return self.vector_bytes // dtype.itemsize


@cache
def host() -> Target:
    """The processor of this machine."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f") and features.get("avx512dq") and features.get("avx512vl"):
        width = 64
    elif features.get("avx2") and features.get("fma"):
        width = 32
    else:
        width = 16
    # LLVM halves vectors of 64 bytes for processors that slowed down under them, which none of these still do.
    off = ",-prefer-256-bit,-prefer-128-bit" if width > 16 else ""
    return Target(llvm.get_host_cpu_name(), features.flatten() + off, width)


@dataclass(frozen=True)
class Vector:
    """A vector in a function under construction; scalars in expressions stand for vectors of them."""

    function: Function
    value: ir.Value

    def __add__(self, other: Operand) -> Vector:
        return self.function.binary("fadd", self, other)

    def __sub__(self, other: Operand) -> Vector:
        return self.function.binary("fsub", self, other)

    def __mul__(self, other: Operand) -> Vector:
        return self.function.binary("fmul", self, other)

    def __truediv__(self, other: Operand) -> Vector:
        return self.function.binary("fdiv", self, other)

    def __radd__(self, other: float) -> Vector:
        return self.function.binary("fadd", other, self)

    def __rsub__(self, other: float) -> Vector:
        return self.function.binary("fsub", other, self)

    def __rmul__(self, other: float) -> Vector:
        return self.function.binary("fmul", other, self)

    def __neg__(self) -> Vector:
        return Vector(self.function, self.function.builder.fneg(self.value))

    def __abs__(self) -> Vector:
        return self.function.intrinsic("fabs", self)

    def __lt__(self, other: Operand) -> Vector:
        return self.function.compared("<", self, other)

    def __le__(self, other: Operand) -> Vector:
        return self.function.compared("<=", self, other)

    def __ge__(self, other: Operand) -> Vector:
        return self.function.compared(">=", self, other)

    def __and__(self, other: Vector) -> Vector:
        return Vector(self.function, self.function.builder.and_(self.value, other.value))


@dataclass(frozen=True)
class Index:
    """A whole number in a function under construction, for addresses and loops."""

    function: Function
    value: ir.Value

    def __add__(self, other: Whole) -> Index:
        return self._with("add", other)

    def __sub__(self, other: Whole) -> Index:
        return self._with("sub", other)

    def __mul__(self, other: Whole) -> Index:
        return self._with("mul", other)

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: int) -> Index:
        return Index(self.function, ir.Constant(INT, other)) - self

    def __mod__(self, other: Whole) -> Index:
        return self._with("urem", other)

    def __floordiv__(self, other: Whole) -> Index:
        return self._with("udiv", other)

    def __lt__(self, other: Whole) -> Index:
        return Index(self.function, self.function.builder.icmp_signed("<", self.value, self.function.whole(other)))

    def __gt__(self, other: Whole) -> Index:
        return Index(self.function, self.function.builder.icmp_signed(">", self.value, self.function.whole(other)))

    def __and__(self, other: Index) -> Index:
        return Index(self.function, self.function.builder.and_(self.value, other.value))

    def _with(self, operation: str, other: Whole) -> Index:
        emit = getattr(self.function.builder, operation)
        return Index(self.function, emit(self.value, self.function.whole(other)))


@dataclass(frozen=True)
class Pointer:
    """An address of numbers in a function under construction."""

    function: Function
    value: ir.Value

    def __add__(self, entries: Whole) -> Pointer:
        function = self.function
        return Pointer(
            function, function.builder.gep(self.value, [function.whole(entries)], source_etype=function.scalar)
        )


class Variable:
    """A vector that changes in loops; it stays in a register."""

    def __init__(self, function: Function, initial: Operand) -> None:
        self._function = function
        with function.builder.goto_entry_block():
            self._slot = function.builder.alloca(function.type)
        self.set(initial)

    def get(self) -> Vector:
        """Its value here."""
        return Vector(self._function, self._function.builder.load(self._slot, typ=self._function.type))

    def set(self, value: Operand) -> None:
        """Change it."""
        self._function.builder.store(self._function.vector(value).value, self._slot)


class Module:
    """Functions that call each other, for vectors of ``dtype`` on ``target``."""

    def __init__(self, dtype: np.dtype[Any], target: Target) -> None:
        self.dtype = dtype
        self.target = target
        self.lanes = target.lanes(dtype)
        self.module = ir.Module()

    def function(self, name: str, parameters: str, *, apart: bool = False) -> Function:
        """Begin a function without result.

        Args:
          name: of the function.
          parameters: one letter for each: ``p`` a pointer, ``i`` a whole number.
          apart: never make it part of its callers.
        """
        types = [POINTER if letter == "p" else INT for letter in parameters]
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), types), name)
        if apart:
            function.attributes.add("noinline")
        return Function(self, function)

    def compile(self, name: str) -> Compiled:
        """Machine code; the function ``name`` can be called. The others are not visible."""
        for function in self.module.functions:
            if function.name != name and not function.is_declaration:
                function.linkage = "internal"
        with _LLVM:  # what LLVM needs on the way is given back before it ends
            machine, module, engine = _compiled(str(self.module), self.target)
            address = engine.get_function_address(name)
        letters = [
            ctypes.c_void_p if kind == POINTER else ctypes.c_int64 for kind in self.module.get_global(name).ftype.args
        ]
        call = ctypes.CFUNCTYPE(None, *letters)(address)
        return Compiled(machine, module, engine, call)


def _compiled(text: str, target: Target) -> tuple[Any, Any, Any]:
    """The machine, the module and the engine for LLVM's language."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple = llvm.Target.from_default_triple()
    machine = triple.create_target_machine(cpu=target.cpu, features=target.features, opt=3, jit=True)
    module = llvm.parse_assembly(text)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return machine, module, engine


@dataclass(frozen=True)
class Compiled:
    """A compiled function.

    Attributes:
      machine, module, engine: what it was compiled for and from, and the owner of the code.
      call: the function; takes addresses and whole numbers, and releases the GIL.
    """

    machine: Any
    module: Any
    engine: Any
    call: Callable[..., None]

    @property
    def assembly(self) -> str:
        """The machine code of all functions, to look at."""
        with _LLVM:
            return str(self.machine.emit_assembly(self.module))


class Function:
    """A function under construction; ``parameters`` are its arguments."""

    def __init__(self, module: Module, function: ir.Function) -> None:
        self.module = module
        self.lanes = module.lanes
        self.dtype = module.dtype
        self.scalar = ir.FloatType() if module.dtype == np.float32 else ir.DoubleType()
        self.type = ir.VectorType(self.scalar, self.lanes)
        self.llvm = function
        entry = function.append_basic_block()
        self.builder = ir.IRBuilder(entry)
        body = function.append_basic_block()
        self.builder.branch(body)
        self.builder.position_at_end(body)
        self.parameters: list[Any] = [Pointer(self, a) if a.type == POINTER else Index(self, a) for a in function.args]

    def vector(self, value: Operand) -> Vector:
        """The same vector, or one of equal numbers."""
        if isinstance(value, Vector):
            return value
        number = ir.Constant(self.scalar, float(self.dtype.type(value)))
        return Vector(self, ir.Constant(self.type, [number] * self.lanes))

    def whole(self, value: Whole) -> ir.Value:
        """The LLVM value of a whole number."""
        return value.value if isinstance(value, Index) else ir.Constant(INT, int(value))

    def binary(self, operation: str, a: Operand, b: Operand) -> Vector:
        """One arithmetic instruction."""
        emit = getattr(self.builder, operation)
        return Vector(self, emit(self.vector(a).value, self.vector(b).value, flags=CONTRACT))

    def compared(self, operation: str, a: Operand, b: Operand) -> Vector:
        """A mask; false where a number is NaN."""
        return Vector(self, self.builder.fcmp_ordered(operation, self.vector(a).value, self.vector(b).value))

    def intrinsic(self, name: str, *arguments: Operand) -> Vector:
        """An LLVM intrinsic of vectors."""
        values = [self.vector(argument).value for argument in arguments]
        return self._call(f"llvm.{name}.v{self.lanes}f{8 * self.dtype.itemsize}", values)

    def _call(self, name: str, values: list[ir.Value]) -> Vector:
        module = self.module.module
        kind = ir.FunctionType(self.type, [value.type for value in values])
        return Vector(self, self.builder.call(module.globals.get(name) or ir.Function(module, kind, name), values))

    def fused(self, a: Operand, b: Operand, c: Operand) -> Vector:
        """``a b + c``, rounded once where the processor has such an instruction."""
        return self.intrinsic("fmuladd", a, b, c)

    def affine(self, a: Vector, scale: float, bias: float) -> Vector:
        """``scale a + bias``."""
        return self.fused(a, scale, bias) if bias else a * scale

    def sqrt(self, a: Operand) -> Vector:
        """The square root."""
        return self.intrinsic("sqrt", a)

    def sqrt_of_moderate(self, a: Vector) -> Vector:
        """The square root of moderate numbers; float64 in AVX-512 from an estimate, because its divider is slow."""
        if self.module.target.vector_bytes < 64 or self.dtype == np.float32:
            return self.sqrt(a)
        inverse = self.inverse_root_estimate(a)
        root = a * inverse
        rest = 1 - root * inverse  # up to 2^-13: √a = root / √(1 - rest)
        return root + (root * rest) * self.horner(rest, (1 / 2, 3 / 8, 5 / 16))

    def inverse_root_estimate(self, a: Vector) -> Vector:
        """``1/√a`` of float64 to 14 bits, with AVX-512."""
        all_lanes = ir.Constant(ir.IntType(self.lanes), -1)
        return self._call("llvm.x86.avx512.rsqrt14.pd.512", [a.value, ir.Constant(self.type, ir.Undefined), all_lanes])

    def maximum(self, a: Operand, b: Operand) -> Vector:
        """The larger one."""
        return self.where(self.vector(a) >= b, a, b)

    def where(self, mask: Vector, a: Operand, b: Operand) -> Vector:
        """``a`` where the mask is true, else ``b``."""
        return Vector(self, self.builder.select(mask.value, self.vector(a).value, self.vector(b).value))

    def polynomial(self, x: Vector, coefficients: Sequence[float]) -> Vector:
        """``Σ coefficients[n] xⁿ``, even and odd powers apart, so that fewer operations wait for one another."""
        if len(coefficients) < 4:
            return self.horner(x, coefficients)
        square = x * x
        return self.fused(self.horner(square, coefficients[1::2]), x, self.horner(square, coefficients[::2]))

    def horner(self, x: Vector, coefficients: Sequence[float]) -> Vector:
        """``Σ coefficients[n] xⁿ``."""
        total = self.vector(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            total = self.fused(total, x, coefficient)
        return total

    def power_of_two(self, shifted: Vector) -> Vector:
        """``2^n`` of a float ``1.5 · 2^m + n`` with ``m`` bits of mantissa, of which ``n`` are the last."""
        bits, mantissa, bias = (32, 23, 127) if self.dtype == np.float32 else (64, 52, 1023)
        integers = ir.VectorType(ir.IntType(bits), self.lanes)

        def constant(value: int) -> ir.Constant:
            return ir.Constant(integers, [ir.Constant(ir.IntType(bits), value)] * self.lanes)

        value = self.builder.bitcast(shifted.value, integers)
        value = self.builder.add(self.builder.shl(value, constant(mantissa)), constant(bias << mantissa))
        return Vector(self, self.builder.bitcast(value, self.type))

    def load(self, source: Pointer, *, aligned: bool = True) -> Vector:
        """The vector at an address."""
        align = self._alignment if aligned else self.dtype.itemsize
        return Vector(self, self.builder.load(source.value, typ=self.type, align=align))

    def store(self, value: Operand, target: Pointer, *, aligned: bool = True) -> None:
        """Write a vector."""
        align = self._alignment if aligned else self.dtype.itemsize
        self.builder.store(self.vector(value).value, target.value, align=align)

    def store_whole(self, value: Index, target: Pointer) -> None:
        """Write one number."""
        self.builder.store(self.builder.sitofp(value.value, self.scalar), target.value)

    @property
    def _alignment(self) -> int:
        return min(CACHE_LINE, self.lanes * self.dtype.itemsize)

    def broadcast(self, source: Pointer) -> Vector:
        """One number at an address, in all lanes."""
        return self._all_lanes(self.builder.load(source.value, typ=self.scalar))

    def from_whole(self, value: Whole) -> Vector:
        """A whole number, in all lanes."""
        return self._all_lanes(self.builder.sitofp(self.whole(value), self.scalar))

    def lane_numbers(self) -> Vector:
        """The numbers 0, 1, 2, … of the lanes."""
        return Vector(self, ir.Constant(self.type, [ir.Constant(self.scalar, float(n)) for n in range(self.lanes)]))

    def _all_lanes(self, number: ir.Value) -> Vector:
        undefined = ir.Constant(self.type, ir.Undefined)
        first = self.builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [ir.Constant(ir.IntType(32), 0)] * self.lanes)
        return Vector(self, self.builder.shuffle_vector(first, undefined, lanes))

    def add_doubles(self, value: Vector, target: Pointer, number: int) -> None:
        """Add to one of the vectors of float64 numbers at an address."""
        doubles = ir.VectorType(ir.DoubleType(), self.lanes)
        wide = value.value if self.scalar == ir.DoubleType() else self.builder.fpext(value.value, doubles)
        address = self.builder.gep(target.value, [self.whole(number)], source_etype=doubles)
        total = self.builder.load(address, typ=doubles, align=8)
        self.builder.store(self.builder.fadd(total, wide), address, align=8)

    def load_index(self, source: Pointer, number: Whole = 0) -> Index:
        """One of the 64-bit whole numbers at an address."""
        address = self.builder.gep(source.value, [self.whole(number)], source_etype=INT)
        return Index(self, self.builder.load(address, typ=INT))

    def choose(self, condition: Index, a: Any, b: Any) -> Any:
        """``a`` if a comparison holds, else ``b``: pointers or whole numbers."""
        if isinstance(a, Pointer):
            return Pointer(self, self.builder.select(condition.value, a.value, b.value))
        return Index(self, self.builder.select(condition.value, self.whole(a), self.whole(b)))

    @contextmanager
    def loop(self, stop: Whole, start: Whole = 0, step: int = 1) -> Iterator[Index]:
        """A loop over ``range(start, stop, step)``, which may be empty."""
        builder = self.builder
        before, head, body = (builder.block, self.llvm.append_basic_block(), self.llvm.append_basic_block())
        after = self.llvm.append_basic_block()
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(INT)
        index.add_incoming(self.whole(start), before)
        builder.cbranch(builder.icmp_signed("<", index, self.whole(stop)), body, after)
        builder.position_at_end(body)
        yield Index(self, index)
        index.add_incoming(builder.add(index, ir.Constant(INT, step)), builder.block)
        builder.branch(head)
        builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Index) -> Iterator[None]:
        """What is emitted within happens only if a comparison holds."""
        with self.builder.if_then(condition.value):
            yield

    def stop_if(self, flag: Pointer) -> None:
        """Return if the byte at an address, which another thread may set, is not 0."""
        value = self.builder.load_atomic(flag.value, "monotonic", 1, typ=BYTE)
        with self.builder.if_then(self.builder.icmp_unsigned("!=", value, ir.Constant(BYTE, 0))):
            self.builder.ret_void()

    def call(self, function: Function, *arguments: Pointer | Whole) -> None:
        """Call a function of the same module."""
        values = [a.value if isinstance(a, Pointer) else self.whole(a) for a in arguments]
        self.builder.call(function.llvm, values)

    def end(self) -> None:
        """Return."""
        self.builder.ret_void()


def aligned(count: int, dtype: Any) -> np.ndarray[Any, Any]:
    """Zeros ``(count,)`` that begin at a cache line."""
    dtype = np.dtype(dtype)
    array = np.zeros(count + CACHE_LINE // dtype.itemsize, dtype)
    skipped = -array.ctypes.data % CACHE_LINE // dtype.itemsize
    return array[skipped : skipped + count]
