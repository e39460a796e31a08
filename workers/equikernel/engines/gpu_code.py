"""Straight-line Python source, written by computing with the names of values instead of values."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, TypeAlias

from equikernel.engines.series import ARCSINE, SINH_DEGREE

Number: TypeAlias = "Value | float"


class Code:
    """Lines of source that define each name once, and the constants in them.

    Attributes:
      dtype: the precision of the constants, ``"float32"`` or ``"float64"``.
      lines: the source so far.
      constants: by name.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.lines: list[str] = []
        self.constants: dict[str, float] = {}
        self._names: dict[float, str] = {}
        self._count = 0

    def apart(self) -> Code:
        """Other lines with the same constants, for a function."""
        code = Code(self.dtype)
        code.constants, code._names = self.constants, self._names
        return code

    def let(self, expression: str) -> Value:
        """A new name for an expression."""
        self._count += 1
        name = f"t{self._count}"
        self.lines.append(f"{name} = {expression}")
        return Value(name, self)

    def let_two(self, expression: str) -> tuple[Value, Value]:
        """New names for a pair."""
        first, second = self.let(expression), self.let(expression)
        self.lines[-2:] = [f"{first.name}, {second.name} = {expression}"]
        return first, second

    def text(self, number: Number) -> str:
        """A value, or a constant in the precision of the code, as it stands in the source."""
        if isinstance(number, Value):
            return number.name
        if number not in self._names:
            self._names[number] = f"C{len(self._names)}"
            self.constants[self._names[number]] = number
        return self._names[number]

    def call(self, function: str, *arguments: Number) -> Value:
        """The result of a primitive function of numbers."""
        return self.let(f"{function}({', '.join(map(self.text, arguments))})")


class Value:
    """The name of a number of each thread; arithmetic with it writes source."""

    def __init__(self, name: str, code: Code) -> None:
        self.name = name
        self.code = code

    def _with(self, operator: str, first: Number, second: Number) -> Value:
        return self.code.let(f"{self.code.text(first)} {operator} {self.code.text(second)}")

    def __add__(self, other: Number) -> Value:
        return self if _is(other, 0) else self._with("+", self, other)

    __radd__ = __add__

    def __sub__(self, other: Number) -> Value:
        return self._with("-", self, other)

    def __rsub__(self, other: Number) -> Value:
        return self._with("-", other, self)

    def __mul__(self, other: Number) -> Number:
        if _is(other, 0):
            return 0.0
        return self if _is(other, 1) else self._with("*", self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Number) -> Number:
        return self.code.call("quotient", self, other) if isinstance(other, Value) else self * (1 / other)

    def __rtruediv__(self, other: float) -> Value:
        return self.code.call("quotient", other, self)

    def __pow__(self, exponent: int) -> Number:
        return math.prod([self] * exponent, start=1.0)

    def __neg__(self) -> Value:
        return self.code.let(f"-{self.name}")

    def __abs__(self) -> Value:
        return self.code.let(f"abs({self.name})")

    def __lt__(self, other: Number) -> Value:
        return self._with("<", self, other)

    def __gt__(self, other: Number) -> Value:
        return self._with(">", self, other)


def _is(number: Number, constant: float) -> bool:
    return not isinstance(number, Value) and number == constant


def horner(coefficients: tuple[float, ...], x: Value) -> Any:
    """A polynomial, the highest power first."""
    series: Any = 0.0
    for coefficient in coefficients:
        series = series * x + coefficient
    return series


def functions(code: Code) -> Any:
    """What the dual kernels of the activations take for ``numpy``: functions of values, for the arguments they have."""

    def where(condition: Value, yes: Number, no: Number) -> Value:
        return code.call("select", condition, yes, no)

    def root(x: Value) -> Value:
        return code.call("root", x)

    def arctan2(y: Value, x: Value) -> Value:
        """The angle of a point of the unit circle with ``x >= 0``."""
        a = abs(y)
        large = a > 0.5
        square: Any = where(large, x * x / (2 * (1 + a)), a * a)
        w: Any = where(large, root(square), a)
        arc: Any = w + w * square * horner(ARCSINE[code.dtype], square)
        return code.call("copysign", where(large, math.pi / 2 - 2 * arc, arc), y)

    def sinh(k: Value) -> Any:
        """``sinh k`` for ``|k| <= 1``."""
        odd = range(SINH_DEGREE[code.dtype], 0, -2)
        return k * horner(tuple(1 / math.factorial(n) for n in odd), k * k)  # type: ignore[arg-type]

    return SimpleNamespace(
        where=where,
        sqrt=root,
        exp=lambda x: code.call("exp", x),
        sign=lambda x: code.call("copysign", 1.0, x),
        arctan2=arctan2,
        sinh=sinh,
        zeros_like=lambda _: 0.0,
        ones_like=lambda _: 1.0,
    )
