"""The source of the GPU engine's kernel, for one network and image size.

A convolution moves ``t`` and ``t'`` by the same tap, so for each offset ``δ = t' - t`` (modulo the image) the network
is a recursion on one *plane* over ``t``. A warp takes several horizontal offsets side by side and streams the rows of
their planes, one vertical offset after the other, through all layers at once: a convolution of radius ``r`` works ``r``
rows behind its input, and keeps ``2 r`` rows in registers. A lane holds a few neighbouring columns, and has those of
its neighbours by shuffles. Filters do not reach across rows and columns where ``t`` or ``t + δ`` leaves the image:
there the *link* between neighbours is 0, else 1; one number per row, and one per column and lane.

Only the sums over all planes of a warp leave it, no warp waits for another, and how a pair of images is cut into tasks
depends on nothing else: so its bits are always the same.

The source has no branches that depend on data. Compiled for a GPU, a name is a number of one thread; the tests run the
same source on CPUs with NumPy, where a name is an array with an entry per thread.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from equikernel.activations import BRANCH_POINT, Homogeneous
from equikernel.engines.decoupled import nonnegative_inputs, rounding, useful_offsets
from equikernel.engines.gpu_code import Code, Value, functions, horner
from equikernel.engines.series import ARCCOSINE
from equikernel.geometry import margin
from equikernel.layers import Branch, Convolution, Nonlinearity, convolutions, nonlinearities

if TYPE_CHECKING:
    from equikernel.activations import Activation
    from equikernel.layers import Padding, Step

WARP = 32
"""Threads of a warp."""

WARPS = 8
"""Warps of a block at most."""

STEPS = 4096
"""Rows that a task streams at most, but for a single vertical offset: tasks enough for all processors."""

MOST_COLUMNS = 8
"""Columns of a lane at most."""

FEW_REGISTERS, REGISTERS = 128, 255
"""Registers of a thread with which a processor holds 16 warps, enough to hide what each waits for; and at most."""

SPILLED = 10
"""Instructions per row that each further register costs."""

MOST_KEPT = 640
"""Numbers that a thread keeps from row to row at most; beyond, compiling takes many minutes."""

UNROLLED = 16
"""Columns times layers up to which a kernel in float32 takes two rows at once."""

FINISHED = 128
"""Pairs whose sums one block finishes."""

INSTRUCTIONS = 46
"""Of one entry and layer, roughly."""


@dataclass(frozen=True)
class Layout:
    """How a pair of images is cut into tasks, of one warp each.

    Attributes:
      columns: neighbouring columns of each lane.
      lanes: that share a row.
      across, down: the horizontal and vertical offsets with pixel pairs.
      groups: of horizontal offsets.
      chunks: of vertical offsets.
      chunk: vertical offsets in each.
      warps: of a block, which are tasks of one pair.
      period: rows that are streamed for each vertical offset.
      stride: entries from one row of an image to the next; rows are followed by their beginning.
      planes: of an image, its channels and the factors of the nonlinearities.
      image: entries of an image.
    """

    columns: int
    lanes: int
    across: tuple[int, ...]
    down: tuple[int, ...]
    groups: int
    chunks: int
    chunk: int
    warps: int
    period: int
    stride: int
    planes: int
    image: int

    @property
    def blocks(self) -> int:
        """Blocks of a pair."""
        return -(-self.groups * self.chunks // self.warps)

    @property
    def tasks(self) -> int:
        """Tasks of a pair, those without offsets included."""
        return self.blocks * self.warps


@dataclass(frozen=True)
class Source:
    """A kernel.

    Attributes:
      text: Python source of the function ``kernel`` and, for its sums, ``finish``: everything about the network. Its
        numbers are ``constant(…)``, in the precision of the computation.
      layout: the tasks of a pair.
      shared: whether the threads of a block share both images of its pair.
      registers: of a thread at most.
      instructions: of all warps for a pair, roughly.
      unrolled: rows that a turn of the inner loop streams.
    """

    text: str
    layout: Layout
    shared: bool
    registers: int
    instructions: float
    unrolled: int


def kept_per_column(steps: tuple[Step, ...]) -> tuple[int, int]:
    """Numbers that a lane keeps per column from row to row, and rows that the last layer works behind the first."""
    kept = rows = 0
    kernels = 1  # of K alone, because Θ⁰ = 0

    def run(steps: tuple[Step, ...]) -> None:
        nonlocal kept, rows, kernels
        for step in steps:
            if isinstance(step, Convolution):
                kept += 2 * kernels * step.radii[0]
                rows += step.radii[0]
                kernels = 2
            elif isinstance(step, Branch):
                before = rows
                run(step.steps)
                kept += 2 * (rows - before)

    run(steps)
    return kept, rows


def choose_columns(steps: tuple[Step, ...], padding: Padding, width: int, dtype: str) -> int:
    """The columns per lane that cost least; 0 if there is no kernel."""
    kept, rows = kept_per_column(steps)
    words = np.dtype(dtype).itemsize // 4
    layers = len(list(convolutions(steps)))

    def cost(columns: int) -> float:
        registers = _registers(columns, kept, rows, words)
        per_row = layers * (columns * INSTRUCTIONS + 6) + 2 * rows + 20 + SPILLED * max(0, registers - REGISTERS)
        waits = 1.25 if registers > FEW_REGISTERS else 1.0
        return waits * per_row / (min(WARP // -(-width // columns), width) * width)

    possible = [columns for columns in _columns(padding, width) if columns * kept <= MOST_KEPT]
    return min(possible, key=cost, default=0)


def _registers(columns: int, kept: int, rows: int, words: int) -> int:
    """Registers of a thread, roughly: of what it keeps, what it computes with, and where it reads."""
    return words * columns * (kept + 9) + 3 * rows + 30


def _columns(padding: Padding, width: int) -> list[int]:
    """The numbers of columns with which a warp holds a row; with CIRCULAR padding all lanes have as many."""
    return [
        columns
        for columns in range(1, MOST_COLUMNS + 1)
        if -(-width // columns) <= WARP and not (padding == "CIRCULAR" and width % columns)
    ]


def why_not(steps: tuple[Step, ...], padding: Padding, width: int, dtype: str) -> str:
    """Why there is no kernel for a network whose offsets decouple, in words; empty if there is one."""
    columns = _columns(padding, width)
    if width > WARP * MOST_COLUMNS:
        return f"rows of {width} pixels are too wide, the most is {WARP * MOST_COLUMNS}"
    if not columns:
        return (
            f"rows of {width} pixels do not divide into at most {WARP} equal parts of up to {MOST_COLUMNS}, as "
            "CIRCULAR padding needs"
        )
    if not choose_columns(steps, padding, width, dtype):
        kept = columns[0] * kept_per_column(steps)[0]
        return (
            f"so deep a network on rows of {width} pixels keeps {kept} numbers per thread, and the most is {MOST_KEPT}"
        )
    return ""


def layout(steps: tuple[Step, ...], padding: Padding, image_shape: tuple[int, int, int], dtype: str) -> Layout:
    """The tasks of a pair of images ``(H, W, C)``."""
    height, width, channels = image_shape
    columns = choose_columns(steps, padding, width, dtype)
    lanes = -(-width // columns)
    margin_y, margin_x = margin(steps, padding)
    across, down = (np.sort(useful_offsets(*each).numbers) for each in ((width, margin_x), (height, margin_y)))
    groups = -(-len(across) // (WARP // lanes))
    period = height + (2 * kept_per_column(steps)[1] if padding == "CIRCULAR" else 0)
    chunk = -(-len(down) // -(-len(down) // max(1, STEPS // period)))
    chunks = -(-len(down) // chunk)
    warps = -(-groups * chunks // -(-groups * chunks // WARPS))
    planes = channels + sum(step.activation.planes for step in nonlinearities(steps))
    stride = width + columns - 1
    return Layout(
        columns=columns,
        lanes=lanes,
        across=tuple(across.tolist()),
        down=tuple(down.tolist()),
        groups=groups,
        chunks=chunks,
        chunk=chunk,
        warps=warps,
        period=period,
        stride=stride,
        planes=planes,
        image=planes * height * stride,
    )


@lru_cache(maxsize=128)
def kernel_source(
    steps: tuple[Step, ...], padding: Padding, image_shape: tuple[int, int, int], dtype: str, shared: bool
) -> Source:
    """The kernel for pairs of images.

    Args:
      steps, padding: of a network whose offsets decouple, and for which :func:`why_not` is empty.
      image_shape: ``(H, W, C)``.
      dtype: of the computation.
      shared: whether both images of a pair fit in the memory that the threads of a block share.
    """
    plan = layout(steps, padding, image_shape, dtype)
    body = _Rows(steps, padding, image_shape, dtype, plan, shared)
    body.run(steps)
    return body.source()


@dataclass
class _Planes:
    """K and Θ of a row, a value per column of the lane, ``behind`` rows behind the input; Θ⁰ = 0 is empty."""

    behind: int
    k: list[Any]
    theta: list[Any]


class _Rows:
    """Writes what a warp does for each row that it streams."""

    def __init__(
        self,
        steps: tuple[Step, ...],
        padding: Padding,
        image_shape: tuple[int, int, int],
        dtype: str,
        plan: Layout,
        shared: bool,
    ) -> None:
        self.padding = padding
        self.height, self.width, self.channels = image_shape
        self.plan = plan
        self.shared = shared
        self.code = Code(dtype)
        self.duals: dict[str, str] = {}
        """The functions that nonlinearities are, without and with their names."""
        self.signs = iter(nonnegative_inputs(steps))
        radii = [step.radii for step in convolutions(steps)]
        self.layers = len(radii)
        self.eps = float(np.finfo(dtype).eps) * rounding(steps)
        self.margin = margin(steps, padding)
        self.behind = sum(radius for radius, _ in radii)
        self.reach = max(radius for _, radius in radii)
        self.kept: list[str] = []
        """Numbers kept from row to row."""
        self.moves: list[tuple[str, str]] = []
        """Their next values, in the order of the assignments."""
        self.sums: list[tuple[str, str]] = []
        """Of K and Θ over all rows so far, and by how much they are too large."""
        self.pointers = self.links = 0
        """Rows for which places in the images, and links with the row before, are kept."""
        self.partial = plan.columns * plan.lanes != self.width or self.margin[1] > 0
        """Whether some columns do not count."""
        self.place = self.channels
        self.rounded = 1.0
        """By how much the scales so far are too small, because of rounding."""

    # The recursion

    def run(self, steps: tuple[Step, ...]) -> None:
        """All of it, from the pixels to the sums."""
        planes = _Planes(0, self.input_kernel(), [])
        self.add_up(self.through(steps, planes))

    def through(self, steps: tuple[Step, ...], planes: _Planes) -> _Planes:
        """K and Θ after some steps."""
        scaled = False
        for step, after in zip(steps, (*steps[1:], None), strict=True):
            match step:
                case Convolution():
                    planes = self.convolution(step, planes, scaled=scaled)
                case Nonlinearity(activation):
                    scale = self.scale(after) if isinstance(after, Convolution) else 1.0
                    planes = self.nonlinearity(activation, planes, scale)
                case Branch(_, inner):
                    late, after_branch = self.late(planes, inner), self.through(inner, planes)
                    planes = _Planes(late.behind, _sum(late.k, after_branch.k), _sum(late.theta, after_branch.theta))
            scaled = isinstance(step, Nonlinearity)
        return planes

    def scale(self, step: Convolution, terms: int = 1) -> float:
        """What a convolution multiplies its sums with; what rounding takes off it, the next one gives back."""
        exact = self.rounded * step.w2 / (terms * (2 * step.radii[0] + 1) * (2 * step.radii[1] + 1))
        scale = float(np.dtype(self.code.dtype).type(exact))
        self.rounded = exact / scale
        return scale

    def input_kernel(self) -> list[Any]:
        """``C K⁰(t, t + δ) = f(t)·f'(t + δ)``."""
        columns, size = range(self.plan.columns), self.height * self.plan.stride
        sums = [self.code.let(f"{self.load('x', 0, 0, k)} * {self.load('y', 0, 0, k)}") for k in columns]
        if self.channels > 1:
            self.code.lines.append(f"for plane in range({size}, {self.channels * size}, {size}):")
            for k, total in zip(columns, sums, strict=True):
                x, y = (self.entry(image, f"{image}0 + plane + {k}") for image in "xy")
                self.code.lines.append(f"    {total.name} = {total.name} + {x} * {y}")
        return sums

    def convolution(self, step: Convolution, planes: _Planes, *, scaled: bool) -> _Planes:
        """``K ← w² A(K) + b²``, ``Θ ← K + w² A(Θ)``; the scale may be in the values already."""
        radius_y, radius_x = step.radii
        k = self.across(self.down(planes.k, radius_y, planes.behind), radius_x)
        scale = 1.0 if scaled else self.scale(step, 1 if planes.theta else self.channels)
        k = [total * scale + step.b2 for total in k]
        theta = k
        if planes.theta:
            sums = self.across(self.down(planes.theta, radius_y, planes.behind), radius_x)
            theta = [total * scale + new for total, new in zip(sums, k, strict=True)]
        return _Planes(planes.behind + radius_y, k, theta)

    def down(self, values: list[Any], radius: int, behind: int) -> list[Any]:
        """Sums over neighbouring rows, ``radius`` rows later."""
        if not radius:
            return values
        sums = []
        for value in values:
            rows, above = self.keep(radius), self.keep(radius)
            # A row with those above it, and later those below it.
            total = rows[-1]
            for j in reversed(range(1, radius)):
                total = rows[j - 1] + self.linked(total, behind + j)
            total = value + self.linked(total, behind)
            below = value
            for j in range(1, radius):
                below = rows[j - 1] + self.linked(below, behind + j - 1)
            sums.append(above[-1] + self.linked(below, behind + radius - 1))
            self.shift(rows, value)
            self.shift(above, total)
        return sums

    def linked(self, value: Any, behind: int) -> Any:
        """A sum that reaches from one row to another, cut where they are not linked."""
        if self.padding == "CIRCULAR":
            return value
        self.links = max(self.links, behind)
        return value * Value(f"link{behind}", self.code)

    def across(self, values: list[Any], radius: int) -> list[Any]:
        """Sums over neighbouring columns."""
        if not radius:
            return values
        columns = self.plan.columns
        beside = dict(enumerate(values))
        for m in range(1, radius + 1):
            for k, side in ((-m, "left"), (columns - 1 + m, "right")):
                value = values[k % columns]
                if self.plan.lanes > 1:
                    value = self.code.let(f"shuffle({value.name}, {side}{-(-m // columns)})")
                beside[k] = value
        sums = []
        for k in range(columns):
            left, right = beside[k - radius], beside[k + radius]
            for j in reversed(range(1, radius)):
                left = beside[k - j] + self.joined(left, k - j)
                right = beside[k + j] + self.joined(right, k + j + 1)
            sums.append(beside[k] + self.joined(left, k) + self.joined(right, k + 1))
        return sums

    def joined(self, value: Any, column: int) -> Any:
        """A sum that reaches across the border of a column and the one before it, cut where they are not linked."""
        return value if self.padding == "CIRCULAR" else value * Value(f"side{column + self.reach - 1}", self.code)

    def nonlinearity(self, activation: Activation, planes: _Planes, scale: float) -> _Planes:
        """``K ← E[σσ]`` and ``Θ ← K̇ Θ``, times ``scale``: for each column a call of a function in the source."""
        name = self.dual(activation, scale, nonnegative=next(self.signs))
        places = range(self.place, self.place + activation.planes)
        self.place += activation.planes
        new = []
        for column, kernels in enumerate(zip(planes.k, planes.theta, strict=True)):
            factors = [self.load(image, place, planes.behind, column) for image in "xy" for place in places]
            arguments = ", ".join([*map(self.code.text, kernels), *factors])
            new.append(self.code.let_two(f"{name}({arguments})"))
        return _Planes(planes.behind, [k for k, _ in new], [theta for _, theta in new])

    def dual(self, activation: Activation, scale: float, *, nonnegative: bool) -> str:
        """The name of the function of K, Θ and the factors of both images that an activation is in the source."""
        code = self.code.apart()
        names = [f"{image}{index}" for image in "xy" for index in range(activation.planes)]
        factors = [Value(name, code) for name in names]
        x, y = tuple(factors[: activation.planes]), tuple(factors[activation.planes :])
        k: Any = Value("k", code)
        derivative: Any = scale
        if isinstance(activation, Homogeneous) and activation.beta:
            k, derivative = arc_cosine(activation, k, x, y, scale, self.eps, code, nonnegative=nonnegative)
        elif isinstance(activation, Homogeneous):
            k = k * scale
        else:
            k, derivative = (scale * value for value in activation.combine(k, x, y, self.eps, functions(code)))
        theta = derivative * Value("theta", code)
        body = "\n".join(_indented([*code.lines, f"return {code.text(k)}, {code.text(theta)}"]))
        body = f"({', '.join(['k', 'theta', *names])}):\n{body}\n"
        return self.duals.setdefault(body, f"dual{len(self.duals)}")

    def late(self, planes: _Planes, steps: tuple[Step, ...]) -> _Planes:
        """The input of a residual branch when its output is there."""
        _, rows = kept_per_column(steps)
        if not rows:
            return planes
        late = []
        for values in (planes.k, planes.theta):
            line = [self.keep(rows) for _ in values]
            late.append([kept[-1] for kept in line])
            for kept, value in zip(line, values, strict=True):
                self.shift(kept, value)
        return _Planes(planes.behind + rows, *late)

    def add_up(self, planes: _Planes) -> None:
        """Add a row to the sums over all rows, which keep what rounding cuts off.

        What does not count is passed over, not multiplied with 0: rows that mix two planes may be infinite or NaN.
        """
        for values in (planes.k, planes.theta):
            row: Any = 0.0
            for k, value in enumerate(values):
                row = row + (self.only_if(f"inside{k}", value) if self.partial else value)
            total, low = self.keep(1)[0], self.keep(1)[0]
            more = self.only_if("counts", row) - low
            new = total + more
            self.shift([low], (new - total) - more)
            self.shift([total], new)
            self.sums.append((total.name, low.name))

    # What the recursion is written in

    def only_if(self, condition: str, value: Any) -> Value:
        """A value where a condition holds, else 0."""
        return self.code.call("select", Value(condition, self.code), value, 0.0)

    def load(self, image: str, plane: int, behind: int, column: int) -> str:
        """An entry of a row of one of the images."""
        self.pointers = max(self.pointers, behind)
        return self.entry(image, f"{image}{behind} + {plane * self.height * self.plan.stride + column}")

    def entry(self, image: str, place: str) -> str:
        """An entry of one of the images."""
        if self.shared:
            return f"near(pool, home, {place})"
        return f"far(images1, image1, {place})" if image == "x" else f"far(images2, image2, {place})"

    def keep(self, count: int) -> list[Value]:
        """Names of numbers that are kept from row to row, 0 at first."""
        first = len(self.kept)
        self.kept += [f"s{first + j}" for j in range(count)]
        return [Value(f"s{first + j}", self.code) for j in range(count)]

    def shift(self, line: list[Value], value: Value) -> None:
        """Let a value come into a line of kept numbers after this row, and the last one go."""
        for j, kept in reversed(list(enumerate(line))):
            self.moves.append((kept.name, line[j - 1].name if j else value.name))

    # The source around it

    def source(self) -> Source:
        """The kernel."""
        plan, code = self.plan, self.code
        zero, one = code.text(0.0), code.text(1.0)
        circular = self.padding == "CIRCULAR"
        slots = WARP // plan.lanes
        start = -self.behind % self.height if circular else 0
        margin_y, margin_x = self.margin
        head = [
            "home, block, thread = place()",
            "block = block + first",
            f"pair = block // {plan.blocks}",
            f"task = block % {plan.blocks} * {plan.warps} + thread // {WARP}",
            "image1 = rows[start + pair]",
            "image2 = cols[start + pair]",
            f"lane = thread % {WARP}",
            f"part = lane % {plan.lanes}",
            # Lanes beyond the last whole row do what its lanes do, with the same neighbours.
            f"slot = smaller(lane // {plan.lanes}, {slots - 1})",
            f"number = task % {plan.groups} * {slots} + slot",
            f"chunk = task // {plan.groups}",
            f"active = (lane < {slots * plan.lanes}) & (number < {len(plan.across)}) & (chunk < {plan.chunks})",
            f"offset = across[smaller(number, {len(plan.across) - 1})]",
            f"column = part * {plan.columns}",
            f"other = (column + offset) % {self.width}",
            f"seam_x = {self.width} - offset",
        ]
        for distance in range(1, -(-self.reach // plan.columns) + 1):
            left, right = f"part - {distance}", f"part + {distance}"
            if circular:
                left, right = f"({left}) % {plan.lanes}", f"({right}) % {plan.lanes}"
            else:
                left, right = f"larger({left}, 0)", f"smaller({right}, {plan.lanes - 1})"
            begin = f"slot * {plan.lanes}"
            head += [f"left{distance} = {begin} + {left}", f"right{distance} = {begin} + {right}"]
        if not circular:
            for j in range(2 * self.reach + plan.columns - 1):
                here = f"column + {j + 1 - self.reach}"
                linked = f"({here} > 0) & ({here} < {self.width}) & ({here} != seam_x)"
                head.append(f"side{j} = select({linked}, {one}, {zero})")
        if self.partial:
            for k in range(plan.columns):
                head.append(f"inside{k} = {_inside(f'(column + {k})', self.width, margin_x, 'seam_x')}")
        if self.shared:
            threads = plan.warps * WARP
            head += [
                "pool = cuda.shared.array(0, real)",
                f"for piece in range({-(-plan.image // threads)}):",
                f"    entry = smaller(piece * {threads} + thread, {plan.image - 1})",
                "    store(pool, home, entry, far(images1, image1, entry))",
                f"    store(pool, home, entry + {plan.image}, far(images2, image2, entry))",
                "meet()",
            ]
        head += [f"{name} = {zero}" for name in self.kept]
        for name, count, value in self.lines_of_rows():
            head += [f"{name}{j} = {value}" for j in range(1, count + 1)]
        head += [
            f"turns = select(active, smaller({len(plan.down)} - chunk * {plan.chunk}, {plan.chunk}), 0)",
            *([f"late = -{self.behind}"] if self.padding == "SAME" else []),
        ]
        # With VALID and CIRCULAR padding no row counts of which a part still comes while the next plane is streamed.
        counts = f"(late >= 0) & (late < turns * {self.height})"
        if circular:
            counts = f"(phase >= {2 * self.behind}) & (step < turns)"
        elif self.padding == "VALID":
            counts = f"({_inside(f'phase - {self.behind}', self.height, margin_y, 'seam_y')}) & (step < turns)"
        second = plan.image if self.shared else 0
        row = [
            f"x0 = narrow(row * {plan.stride} + column)",
            f"y0 = narrow(moved * {plan.stride} + other + {second})",
            *([] if circular else [f"link0 = select((phase > 0) & (moved > 0), {one}, {zero})"]),
            f"counts = {counts}",
            *code.lines,
            *(f"{name} = {value}" for name, value in self.moves),
            *(f"{name}{j} = {name}{j - 1}" for name, count, _ in self.lines_of_rows() for j in range(count, 0, -1)),
            f"row = select(row == {self.height - 1}, 0, row + 1)",
            f"moved = select(moved == {self.height - 1}, 0, moved + 1)",
            *(["late = late + 1"] if self.padding == "SAME" else []),
        ]
        rest = self.behind if self.padding == "SAME" else 0
        # Two rows at once save moves between what is kept, as long as the instructions stay in their cache.
        many = code.dtype == "float64" or plan.columns * self.layers > UNROLLED
        unrolled = 1 if plan.period % 2 or many else 2
        second_row = [re.sub(r"\bt(\d+)\b", r"u\1", line).replace("phase", "(phase + 1)") for line in row]
        plane = [
            f"delta = down[smaller(chunk * {plan.chunk} + step, {len(plan.down) - 1})]",
            *([f"seam_y = {self.height} - delta"] if self.padding == "VALID" else []),
            f"row = {start}",
            f"moved = ({start} + delta) % {self.height}",
            f"for phase in range(0, {plan.period} if step < {plan.chunk} else {rest}, {unrolled}):",
            *_indented(row),
            *_indented(second_row if unrolled > 1 else []),
        ]
        tail = []
        for place, (total, low) in enumerate(self.sums):
            tail.append(f"total = double({total}) - double({low})")
            tail += [f"total = total + shuffle(total, lane ^ {distance})" for distance in (16, 8, 4, 2, 1)]
            tail.append(f"put(sums, pair * {plan.tasks} + task, {place}, total, lane == 0)")
        body = [*head, f"for step in range({plan.chunk + (1 if rest else 0)}):", *_indented(plane), *tail]
        lines = [
            *(f"{name} = constant({float(number)!r})" for name, number in code.constants.items()),
            *(f"def {name}{body}\n" for body, name in self.duals.items()),
            "def kernel(images1, images2, rows, cols, across, down, start, first, sums):",
            *_indented(body),
            "",
            "",
            "def finish(sums, element, start, count, totals):",
            *_indented([
                "home, block, thread = place()",
                f"here = block * {FINISHED} + thread",
                "pair = smaller(here, count - 1)",
                *(
                    line
                    for place in (0, 1)
                    for line in (
                        f"total = sums[pair * {plan.tasks}, {place}]",
                        f"for task in range(1, {plan.tasks}):",
                        f"    total = total + sums[pair * {plan.tasks} + task, {place}]",
                        f"put(totals, 2 * element + {place}, start + pair, total, here < count)",
                    )
                ),
            ]),
        ]  # fmt: skip
        words = np.dtype(code.dtype).itemsize // 4
        few = _registers(plan.columns, len(self.kept) // plan.columns, self.behind, words) <= FEW_REGISTERS
        return Source(
            text="\n".join(lines) + "\n",
            layout=plan,
            shared=self.shared,
            registers=FEW_REGISTERS if few else REGISTERS,
            instructions=plan.tasks * plan.chunk * plan.period * plan.columns * self.layers * INSTRUCTIONS,
            unrolled=unrolled,
        )

    def lines_of_rows(self) -> list[tuple[str, int, str]]:
        """What is kept of the rows on their way through the layers: a name, of how many rows, and the first value."""
        zero = self.code.text(0.0)
        lines = [
            ("x", self.pointers, "narrow(column)"),
            ("y", self.pointers, f"narrow(other + {self.plan.image if self.shared else 0})"),
        ]
        return lines if self.padding == "CIRCULAR" else [*lines, ("link", self.links, zero)]


def arc_cosine(
    activation: Homogeneous,
    k: Any,
    x: tuple[Value, ...],
    y: tuple[Value, ...],
    scale: float,
    eps: float,
    code: Code,
    *,
    nonnegative: bool,
) -> tuple[Any, Any]:
    """Both dual kernels of ``α u + β |u|``, from ``A = middle ± (1/2 - arccos|c|/π)`` and ``√(1-c²)/π + c A``.

    Where ``c`` is not negative, but for rounding errors, its sign is left out.
    """
    where, root = functions(code).where, functions(code).sqrt
    arc_scale, middle = activation.arcsine
    scale *= arc_scale
    c: Any = k * (x[1] * y[1])
    size: Any = c if nonnegative else abs(c)
    size = where(size > 1 - BRANCH_POINT * eps, 1.0, size)
    gap = 1 - size
    arc = root(gap) * horner(tuple(scale * p for p in ARCCOSINE[code.dtype]), gap)
    if nonnegative:
        c, angle = size, scale * (middle + 0.5) - arc
    else:
        c, angle = code.call("copysign", size, c), code.call("copysign", scale / 2 - arc, c) + scale * middle
    sine = root(gap * (2 - gap)) * (scale / math.pi)
    return x[0] * y[0] * (c * angle + sine), angle


def _sum(values: list[Any], others: list[Any]) -> list[Any]:
    return [value + other for value, other in zip(values, others, strict=True)]


def _inside(place: str, side: int, margin: int, seam: str) -> str:
    """Source of whether a pixel lies at least ``margin`` away from the ends of its segment."""
    return (
        f"(({place} >= {margin}) & ({place} < {seam} - {margin}))"
        f" | (({place} >= {seam} + {margin}) & ({place} < {side - margin}))"
    )


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]
