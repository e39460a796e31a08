"""Plain CNN kernels by offset decoupling: the code of the CPU engine, made for each network and image size.

A convolution moves ``t`` and ``t'`` by the same tap, so the offset ``δ = t' - t`` (modulo the image) never changes:
for each offset the whole network is a recursion on one ``H x W`` *plane*: box filter, activation, box filter, …, sum.
With SAME and VALID padding the plane of ``δ`` holds two true offsets per axis, ``δ`` and ``δ - H``; they meet at a
*seam* that no filter may cross. See ``docs/kernels.md``.

Each lane of a vector holds the plane of another horizontal offset, of one image or of several. So the neighbours of an
entry are whole vectors, the pixel of the first image is the same in all lanes, and those of the second lie next to each
other. Seams are where a horizontal link of a lane is multiplied by 0, and rows of zeros above and below.

Stored are rows after the horizontal half of the box filter, of ``K`` and of ``K + Θ``: a convolution treats both alike,
``K ← w² A(K) + b²`` and ``Θ ← w² A(K + Θ) + b²``. The vertical half, the activation and the next horizontal half happen
in registers. The planes of the next layer overwrite those of the last one, ``radius`` rows lower.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from equikernel.activations import Activation, Homogeneous
from equikernel.engines import duals
from equikernel.engines.decoupled import Offsets, nonnegative_inputs, useful_offsets
from equikernel.engines.duals import Factors, Kernels
from equikernel.engines.vectors import Compiled, Function, Index, Module, Pointer, Target, Variable, Vector
from equikernel.errors import NetworkError
from equikernel.layers import Branch, Convolution, Nonlinearity, Padding, Step

EXPANDED_PLANE, EXPANDED_BYTES = 2**17, 2**22
"""Sizes of a plane of the second images, and of all, up to which these are laid out lane by lane, so that lanes may
belong to different images. Of larger ones, what a layer needs would leave the L2 cache; there, lanes are neighbouring
offsets of one image, which overlap in memory."""

COLUMNS_AT_ONCE = 32
"""Entries that are summed in the precision of the computation before they are added in float64."""

WIDE = 32
"""Columns from which on the first stage of a column is computed two columns ahead, with vectors of 64 bytes: narrower
rows would lose more at their end, and narrower vectors have not enough registers."""

LAYERS_IN_LINE = 6
"""Layers up to which a plane is one piece of code, a few percent faster; more would take long to compile."""

LARGEST_BIAS = 1e12
"""``b²/w²`` up to which both are part of the constants of an image."""


@dataclass(frozen=True)
class Activate:
    """An activation.

    Attributes:
      activation: which.
      place: the planes between the first factors of its layer and its own.
      nonnegative: whether the covariances that it is applied to cannot be negative.
    """

    activation: Activation
    place: int
    nonnegative: bool


@dataclass(frozen=True)
class Save:
    """The beginning of a residual branch: keep K and Θ in a slot."""

    slot: int


@dataclass(frozen=True)
class Add:
    """The end of a residual branch: add what was kept."""

    slot: int


Operation: TypeAlias = Activate | Save | Add


@dataclass(frozen=True)
class Layer:
    """A convolution and what follows entry by entry, up to the next convolution.

    Attributes:
      radii: of the filter.
      w2, b2: of the convolution, ``w2`` divided by the number of taps, the first one's also by the channels.
      operations: what follows.
      place: the plane of the first factor.
    """

    radii: tuple[int, int]
    w2: float
    b2: float
    operations: tuple[Operation, ...]
    place: int

    @property
    def folded(self) -> Homogeneous | None:
        """An arc cosine that follows at once: ``w2`` is then part of its constants, if it is moderate."""
        match self.operations[:1]:
            case (Activate(Homogeneous(beta=beta) as activation),) if beta and self.b2 <= LARGEST_BIAS * self.w2:
                return activation if duals.is_moderate(activation.arcsine[0] * self.w2) else None
        return None

    @property
    def nonnegative(self) -> bool:
        """Whether its covariances cannot be negative; only told where an activation follows at once."""
        match self.operations[:1]:
            case (Activate(nonnegative=nonnegative),):
                return nonnegative
        return False

    @property
    def scale(self) -> float:
        """What a folded arc cosine is multiplied by; the first factors are divided by ``w2``."""
        return self.folded.arcsine[0] * self.w2 if self.folded else 1.0


def layers_of(steps: tuple[Step, ...], channels: int) -> tuple[Layer, ...]:
    """The layers of a network for images of ``channels`` channels."""
    found: list[Layer] = []
    place = channels
    signs = iter(nonnegative_inputs(steps))

    def add(operation: Operation) -> None:
        found[-1] = replace(found[-1], operations=(*found[-1].operations, operation))

    def run(steps: tuple[Step, ...], slot: int) -> None:
        nonlocal place
        for step in steps:
            match step:
                case Convolution(radii=radii):
                    inputs = math.prod(2 * radius + 1 for radius in radii) * (1 if found else channels)
                    found.append(Layer(radii, step.w2 / inputs, step.b2, (), place))
                case Nonlinearity(activation):
                    add(Activate(activation, place - found[-1].place, next(signs)))
                    place += activation.planes
                case Branch():
                    add(Save(slot))
                    run(step.steps, slot + 1)
                    add(Add(slot))

    run(steps, 0)
    return tuple(found)


def factor_scales(layers: Sequence[Layer], dtype: np.dtype[Any]) -> dict[int, tuple[float, float]]:
    """Constants of the layers that are part of the factors; see :func:`equikernel.engines.decoupled.pack`.

    They make up for the rounding of :attr:`Layer.scale`, which would move all kernels the same way.
    """
    return {
        layer.place: (layer.folded.arcsine[0] / float(dtype.type(layer.scale)), layer.w2)
        for layer in layers
        if layer.folded
    }


def check_weights(layers: Sequence[Layer], dtype: np.dtype[Any]) -> None:
    """Raise :class:`NetworkError` where weights have lost digits in ``dtype``, or would."""
    limits = np.finfo(dtype)
    least, most = float(limits.tiny / limits.eps), float(limits.max * limits.eps)
    for number, layer in enumerate(layers):
        if not least <= layer.w2 <= most:
            raise NetworkError(
                f"convolution {number + 1}: the weights, w_std² over inputs of a filter = {layer.w2:.3g}, leave the "
                f"range of {dtype.name}, {least:.0e} to {most:.0e}; change w_std and rescale the images, or use float64"
            )


@dataclass(frozen=True)
class Layout:
    """Where everything is in the scratch memory of a thread, in entries.

    Attributes:
      height, width: of the images.
      lanes: entries of a vector.
      layers: of the network.
      padding: of its convolutions.
      margins: pixels that VALID padding removes at each border, rows and columns.
      planes: pixels and factors of an image.
      itemsize: bytes of an entry.
    """

    height: int
    width: int
    lanes: int
    layers: tuple[Layer, ...]
    padding: Padding
    margins: tuple[int, int]
    planes: int
    itemsize: int

    @property
    def across(self) -> Offsets:
        """The horizontal offsets."""
        return useful_offsets(self.width, self.margins[1])

    @property
    def down(self) -> Offsets:
        """The vertical offsets."""
        return useful_offsets(self.height, self.margins[0])

    @property
    def expanded(self) -> bool:
        """Whether lanes may belong to different images."""
        plane = self.height * self.width * self.lanes * self.itemsize
        fits = plane <= EXPANDED_PLANE and self.planes * plane <= EXPANDED_BYTES
        return self.across.count % self.lanes != 0 and fits

    def blocks(self, images: int) -> int:
        """Vectors of lanes that so many second images take."""
        if self.expanded:
            return -(-images * self.across.count // self.lanes)
        return images * -(-self.across.count // self.lanes)

    @property
    def row(self) -> int:
        """Entries of a row of a plane: what is written one column to the left of column 0 belongs to no entry."""
        return (self.width + 1) * self.lanes

    @property
    def shift(self) -> int:
        """Rows by which planes move in all."""
        return sum(layer.radii[0] for layer in self.layers)

    @property
    def ahead(self) -> int:
        """Columns by which the first stage of an entry goes before the second."""
        return 2 if self.width >= WIDE and self.lanes * self.itemsize == 64 else 1

    @property
    def rows(self) -> int:
        """Rows of a plane, with room for the shifts and for rows below that CIRCULAR padding repeats."""
        return self.height + self.shift + max(layer.radii[0] for layer in self.layers)

    @property
    def radius(self) -> int:
        """The largest horizontal radius."""
        return max(layer.radii[1] for layer in self.layers)

    @property
    def linked(self) -> int:
        """The largest distance between entries of a row that filters connect and seams may cut."""
        return 0 if self.padding == "CIRCULAR" else min(self.radius, self.width - 1)

    @property
    def slots(self) -> int:
        """Residual branches within each other."""
        saved = (o for layer in self.layers for o in layer.operations if isinstance(o, Save))
        return max((save.slot + 1 for save in saved), default=0)

    @property
    def second_row(self) -> int:
        """Entries of a row of the second image: lane by lane, or twice itself and what the last lanes see."""
        if self.expanded:
            return self.width * self.lanes
        return -(-(2 * self.width + 2 * self.lanes) // self.lanes) * self.lanes

    @property
    def parts(self) -> dict[str, int]:
        """Entries of each part, multiples of ``lanes``."""
        twice = -(-(2 * self.width + 4 * self.lanes) // self.lanes) * self.lanes
        return {
            "knl": self.rows * self.row,
            "sum": self.rows * self.row,
            "zeros": self.row,
            "saved": 2 * self.slots * self.height * self.width * self.lanes,
            "line": 2 * (self.width + 2 * self.radius) * self.lanes,
            "seams": self.lanes,
            "links": self.linked * (self.width + self.linked) * self.lanes,
            "inside": self.width * self.lanes,
            "twice": twice,
            "second": self.planes * self.height * self.second_row + self.ahead * self.lanes,
        }

    def start(self, part: str) -> int:
        """Where a part begins."""
        names = list(self.parts)
        return sum(self.parts[name] for name in names[: names.index(part)])

    @property
    def entries(self) -> int:
        """All of it."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Program:
    """Code for a network and an image size.

    Attributes:
      layout: of its scratch memory.
      compiled: its function. It adds up K and Θ over all pixel pairs, of one image against several, and takes the
        addresses of the first image, of all second images and of the entries where those that are meant begin; how many
        these are; the addresses of the vertical offsets and how many there are; of the scratch memory, zeros; of
        the sums, ``(blocks, 2, lanes)`` float64 zeros; and of a byte that stops it.
    """

    layout: Layout
    compiled: Compiled


@lru_cache(maxsize=64)
def program(layout: Layout, dtype: np.dtype[Any], target: Target, branch: float) -> Program:
    """The code for a layout.

    Args:
      layout: of images and network.
      dtype: precision.
      target: processor.
      branch: correlations with ``1 - |c| < branch`` are taken as ``±1``.
    """
    return Program(layout, _Generator(layout, Module(dtype, target), branch).compile())


class _Stages(NamedTuple):
    """What computes the entries of a column in two stages.

    Attributes:
      begin: emits the first; its vectors go on to the second. Of columns behind the last they are never used.
      finish: emits the second.
    """

    begin: Callable[[Index | int], list[Vector]]
    finish: Callable[[Index, list[Vector]], tuple[Vector, ...]]


class _Row(NamedTuple):
    """A row of a plane.

    Attributes:
      number: of the row, and in the first image.
      other: of the row in the second image.
      below, above: how many rows lie before and after it on the same side of the seam.
    """

    number: Index
    other: Index
    below: Index
    above: Index


class _Generator:
    """Writes the functions of a program."""

    def __init__(self, layout: Layout, module: Module, branch: float) -> None:
        self.layout = layout
        self.module = module
        self.branch = branch
        self.circular = layout.padding == "CIRCULAR"
        self.functions: dict[Any, Function] = {}

    def compile(self) -> Compiled:
        """All functions, compiled."""
        layout = self.layout
        f = self.module.function("pooled", "pppipippp")
        x, images, others, count, offsets, down, scratch, sums, stop = f.parameters
        second = scratch + layout.start("second")
        per_image = -(-layout.across.count // layout.lanes)

        def planes_of(block: Index, moved: Index | int) -> None:
            self.write_seams(f, scratch, block if layout.expanded else block % per_image)
            into = sums + block * (2 * layout.lanes * 8 // layout.itemsize)
            with f.loop(down) as number:
                f.stop_if(stop)
                self.plane(f, scratch, x, second + moved, f.load_index(offsets, number), into)

        if layout.expanded:
            with f.loop((count * layout.across.count + (layout.lanes - 1)) // layout.lanes) as block:
                self.expand(f, scratch, images, others, count, block)
                planes_of(block, 0)
        else:
            with f.loop(count) as image:
                self.repeat(f, scratch, images + f.load_index(others, image))
                with f.loop(per_image) as block:
                    moved = (block * layout.lanes + layout.across.first) % layout.width
                    planes_of(image * per_image + block, moved)
        f.end()
        return self.module.compile("pooled")

    # The second image.

    def doubled(self, f: Function, source: Pointer, target: Pointer) -> None:
        """Write a row again and again, over twice its length and a vector."""
        layout = self.layout
        for copy in range(-(-(2 * layout.width + layout.lanes) // layout.width)):
            stop = min(layout.width, 2 * layout.width + layout.lanes - copy * layout.width)
            with f.loop(stop, step=layout.lanes) as x:
                f.store(f.load(source + x, aligned=False), target + x + copy * layout.width, aligned=False)

    def repeat(self, f: Function, scratch: Pointer, image: Pointer) -> None:
        """Lanes are neighbouring offsets: each row of the second image twice."""
        layout = self.layout
        with f.loop(layout.planes * layout.height) as row:
            target = scratch + layout.start("second") + row * layout.second_row
            self.doubled(f, image + row * layout.width, target)

    def expand(
        self, f: Function, scratch: Pointer, images: Pointer, others: Pointer, count: Index, block: Index
    ) -> None:
        """Lanes are offsets of several images: a vector for each pixel."""
        layout = self.layout
        offsets, lanes = layout.across.count, layout.lanes
        begin = block * lanes
        last = (begin + (lanes - 1)) // offsets
        twice = scratch + (layout.start("twice") + lanes)
        numbers = f.lane_numbers()
        with f.loop(f.choose(last < count, last + 1, count), start=begin // offsets) as image:
            before = image * offsets - begin  # lanes before its first offset, or minus its offsets before lane 0
            lane = f.choose(before > 0, before, 0)
            offset = (lane - before + layout.across.first) % layout.width
            mine = numbers >= f.from_whole(lane)
            source = images + f.load_index(others, image)
            with f.loop(layout.planes * layout.height) as row:
                self.doubled(f, source + row * layout.width, twice)
                target = scratch + layout.start("second") + row * layout.second_row
                with f.loop(layout.width) as x:
                    here = target + x * lanes
                    f.store(f.where(mine, f.load(twice + (x + offset - lane), aligned=False), f.load(here)), here)

    def write_seams(self, f: Function, scratch: Pointer, block: Index) -> None:
        """Which horizontal neighbours are linked, and which entries count in the end, in each lane of a block."""
        layout = self.layout
        if self.circular:
            return
        width, lanes, linked = layout.width, layout.lanes, layout.linked
        seams = scratch + layout.start("seams")
        with f.loop(lanes) as lane:
            offset = (block * lanes + lane) % layout.across.count if layout.expanded else block * lanes + lane
            f.store_whole(width - (offset + layout.across.first) % width, seams + lane)
        seam = f.load(seams)

        def write(part: Pointer, start: int, stop: int, before: int, after: int) -> None:
            """1 unless a seam lies between ``x - before`` and ``x + after``."""
            with f.loop(stop, start=start) as x:
                cut = (f.from_whole(x - before) < seam) & (seam <= f.from_whole(x + after))
                f.store(f.where(cut, 0, 1), part + x * lanes)

        for distance in range(1, linked + 1):
            write(self.links(scratch, distance), distance, width, distance, 0)
        margin = layout.margins[1]
        if margin:
            write(scratch + layout.start("inside"), margin, width - margin, margin, margin)

    def links(self, scratch: Pointer, distance: int) -> Pointer:
        """Whether ``x - distance`` and ``x`` are linked, 1 or 0, for each column and lane; 0 beyond the image."""
        layout = self.layout
        return scratch + (layout.start("links") + (distance - 1) * (layout.width + layout.linked) * layout.lanes)

    # The planes.

    def plane(self, f: Function, scratch: Pointer, x: Pointer, y: Pointer, offset: Index, sums: Pointer) -> None:
        """Call what adds the sums over a plane to ``sums``."""
        layout = self.layout
        knl, both = scratch + layout.start("knl"), scratch + layout.start("sum")
        top = layout.shift
        f.call(self.input_function(), scratch, x, y, offset, knl + top * layout.row)
        spoilt = 0
        for number, layer in enumerate(layout.layers):
            if self.circular:
                for planes in (knl, both)[: 2 if number else 1]:
                    f.call(self.wrap_function(layer.radii[0]), planes + top * layout.row)
            spoilt += layer.radii[0] if layout.padding == "VALID" else 0
            last = number + 1 == len(layout.layers)
            following = None if last else layout.layers[number + 1].radii[1]
            function = self.layer_function(layer, following, first=number == 0)
            f.call(
                function, scratch, x + layer.place * layout.height * layout.width,
                y + layer.place * layout.height * layout.second_row, offset, knl + top * layout.row,
                both + top * layout.row, spoilt, sums,
            )  # fmt: skip
            top -= layer.radii[0]

    def input_function(self) -> Function:
        """``K⁰``, not yet divided by the number of channels, after the horizontal half of the first filter."""
        layout = self.layout
        f = self.module.function("input", "pppip")
        scratch, x, y, offset, knl = f.parameters
        channels = layout.layers[0].place
        with f.loop(layout.height) as number:
            row = self.row_of(f, number, offset)

            def products(column: Index, _: list[Vector], row: _Row = row) -> tuple[Vector]:
                pixels = self.factors(x, y, row, column)
                return (_sum(pixels.product(f, channel) for channel in range(channels)),)

            stages = _Stages(lambda _: [], products)
            self.write_row(f, scratch, layout.layers[0].radii[1], stages, (knl + number * layout.row,))
        f.end()
        return f

    def factors(self, x: Pointer, y: Pointer, row: _Row, column: Index | int) -> Factors:
        """The planes that begin at ``x`` and ``y``, at one pixel of the first image."""
        layout = self.layout
        step = layout.lanes if layout.expanded else 1
        return Factors(
            x + (row.number * layout.width + column),
            y + (row.other * layout.second_row + column * step),
            layout.height * layout.width,
            layout.height * layout.second_row,
            aligned=layout.expanded,
        )

    def layer_function(self, layer: Layer, following: int | None, *, first: bool) -> Function:
        """A layer on a plane, and the horizontal half of the next filter, of radius ``following``, or the sums.

        Layers that differ only in where their factors are share a function.
        """
        key = (replace(layer, place=0), following, first)
        if key not in self.functions:
            self.functions[key] = self._layer_function(f"layer{len(self.functions)}", layer, following, first=first)
        return self.functions[key]

    def _layer_function(self, name: str, layer: Layer, following: int | None, *, first: bool) -> Function:
        layout = self.layout
        f = self.module.function(name, "pppippip", apart=len(layout.layers) > LAYERS_IN_LINE)
        _, _, _, offset, _, _, spoilt, _ = f.parameters
        with f.loop(layout.height) as number:
            row = self.row_of(f, number, offset)
            if layout.padding == "VALID":
                with f.when((row.below > spoilt - 1) & (row.above > spoilt - 1)):
                    self.write_layer(f, row, layer, following, first=first)
            else:
                self.write_layer(f, row, layer, following, first=first)
        f.end()
        return f

    def row_of(self, f: Function, number: Index, offset: Index) -> _Row:
        """Where a row of the plane of a vertical offset lies."""
        height = self.layout.height
        moved = number + offset
        wrapped = moved < height
        other = f.choose(wrapped, moved, moved - height)
        below = f.choose(wrapped, number, other)
        above = f.choose(wrapped, height - 1 - moved, height - 1 - number)
        return _Row(number, other, below, above)

    def write_layer(self, f: Function, row: _Row, layer: Layer, following: int | None, *, first: bool) -> None:
        """One row of a layer; the parameters of ``f`` are as :meth:`plane` gives them."""
        layout = self.layout
        scratch, x, y, _, knl, both, _, sums = f.parameters
        of_k = self.rows_around(f, scratch, knl, row, layer.radii[0])
        of_both = [] if first else self.rows_around(f, scratch, both, row, layer.radii[0])

        def begin(column: Index | int) -> list[Vector]:
            total = _sum(f.load(line + (column + 1) * layout.lanes) for line in of_k)
            begun = begin_layer(f, layer, total, self.factors(x, y, row, column), self.branch)
            return [*begun, total] if first else begun

        def finish(column: Index, begun: list[Vector]) -> Kernels:
            size = layout.height * layout.width * layout.lanes
            here = scratch + (layout.start("saved") + (row.number * layout.width + column) * layout.lanes)
            saved = [here + number * size for number in range(2 * layout.slots)]
            if not first:
                begun.append(_sum(f.load(line + (column + 1) * layout.lanes) for line in of_both))
            return finish_layer(f, layer, begun, self.factors(x, y, row, column), self.branch, saved)

        def stored(column: Index, begun: list[Vector]) -> Kernels:
            k, theta = finish(column, begun)
            return k, k + theta

        if following is None:
            self.add_row(f, scratch, _Stages(begin, finish), sums)
        else:
            lower = (row.number - layer.radii[0]) * layout.row
            self.write_row(f, scratch, following, _Stages(begin, stored), (knl + lower, both + lower))

    def rows_around(self, f: Function, scratch: Pointer, plane: Pointer, row: _Row, radius: int) -> list[Pointer]:
        """The rows that the vertical half of a filter sees; rows of zeros beyond the seam."""
        layout = self.layout
        zeros = scratch + layout.start("zeros")
        found = [plane + row.number * layout.row]
        for v in range(1, (radius if self.circular else min(radius, layout.height - 1)) + 1):
            before, after = found[0] + -v * layout.row, found[0] + v * layout.row
            if not self.circular:
                before = f.choose(row.below > v - 1, before, zeros)
                after = f.choose(row.above > v - 1, after, zeros)
            found += [before, after]
        return found

    def columns(
        self, f: Function, stages: _Stages, start: Index | int, stop: Index | int
    ) -> Iterator[tuple[Index, tuple[Vector, ...]]]:
        """A loop over columns; yields each with its entries.

        While the second stage of a column is computed, so is the first of a later one: a processor looks ahead a
        limited number of operations that wait for others, and here few do.
        """
        ahead = self.layout.ahead
        begun = [[Variable(f, vector) for vector in stages.begin(start + n)] for n in range(ahead)]
        with f.loop(stop, start=start) as x:
            columns = [[variable.get() for variable in column] for column in begun]
            columns.append(stages.begin(x + ahead))
            for variables, vectors in zip(begun, columns[1:], strict=True):
                for variable, vector in zip(variables, vectors, strict=True):
                    variable.set(vector)
            yield x, stages.finish(x, columns[0])

    def write_row(
        self,
        f: Function,
        scratch: Pointer,
        radius: int,
        stages: _Stages,
        targets: tuple[Pointer, ...],
    ) -> None:
        """The horizontal half of a box filter: write rows of ``Σ_{|v| <= radius} entries(x + v)``.

        Args:
          f: the function under construction.
          scratch: its memory.
          radius: of the filter.
          stages: of the entries of a column, one for each target.
          targets: rows of planes.
        """
        layout = self.layout
        width, lanes = layout.width, layout.lanes
        reach = radius if self.circular else min(radius, layout.linked)
        if reach == 0:
            for x, entries in self.columns(f, stages, 0, width):
                for entry, target in zip(entries, targets, strict=True):
                    f.store(entry, target + (x + 1) * lanes)
            return
        if reach == 1 and not self.circular:
            # The last column, and its sum so far, stay in registers. What column -1 gets is never read.
            links = self.links(scratch, 1)
            before = [(Variable(f, 0), Variable(f, 0)) for _ in targets]
            for x, entries in self.columns(f, stages, 0, width):
                link = f.load(links + x * lanes)
                for entry, target, (last, so_far) in zip(entries, targets, before, strict=True):
                    f.store(f.fused(link, entry, so_far.get()), target + x * lanes)
                    so_far.set(f.fused(link, last.get(), entry))
                    last.set(entry)
            for target, (_, so_far) in zip(targets, before, strict=True):
                f.store(so_far.get(), target + width * lanes)
            return
        lines = self.write_lines(f, scratch, radius, stages, len(targets))
        with f.loop(width) as x:
            for line, target in zip(lines, targets, strict=True):
                f.store(self.box_sum(f, scratch, line, x, radius, reach), target + (x + 1) * lanes)

    def write_lines(self, f: Function, scratch: Pointer, radius: int, stages: _Stages, count: int) -> list[Pointer]:
        """Rows of entries without the horizontal half, with ``radius`` columns before and after them."""
        layout = self.layout
        width, lanes = layout.width, layout.lanes
        size = (width + 2 * radius) * lanes
        lines = [scratch + (layout.start("line") + number * size) for number in range(count)]
        for x, entries in self.columns(f, stages, 0, width):
            for entry, line in zip(entries, lines, strict=True):
                f.store(entry, line + (x + radius) * lanes)
        if self.circular:
            for line in lines:
                for v in range(radius):
                    first, last = radius - 1 - v, radius + width + v
                    f.store(f.load(line + (first + width) * lanes), line + first * lanes)
                    f.store(f.load(line + (last - width) * lanes), line + last * lanes)
        return lines

    def box_sum(self, f: Function, scratch: Pointer, line: Pointer, x: Index, radius: int, reach: int) -> Vector:
        """The sum around column ``x`` of a line, of the columns that are linked and not further than ``reach``."""
        lanes = self.layout.lanes
        here = line + (x + radius) * lanes
        total = f.load(here)
        for v in range(1, reach + 1):
            left, right = f.load(here + -v * lanes), f.load(here + v * lanes)
            if self.circular:
                total = total + (left + right)
            else:
                links = self.links(scratch, v)
                total = f.fused(f.load(links + x * lanes), left, total)
                total = f.fused(f.load(links + (x + v) * lanes), right, total)
        return total

    def add_row(self, f: Function, scratch: Pointer, stages: _Stages, sums: Pointer) -> None:
        """Add the sums of K and Θ over a row, of the entries that count, to the float64 numbers at ``sums``."""
        layout = self.layout
        totals = Variable(f, 0), Variable(f, 0)

        def add(start: Index | int, stop: Index | int) -> None:
            for total in totals:
                total.set(0)
            for x, kernels in self.columns(f, stages, start, stop):
                for total, kernel in zip(totals, kernels, strict=True):
                    if layout.margins[1]:
                        inside = f.load(scratch + (layout.start("inside") + x * layout.lanes))
                        total.set(f.fused(inside, kernel, total.get()))
                    else:
                        total.set(total.get() + kernel)
            for number, total in enumerate(totals):
                f.add_doubles(total.get(), sums, number)

        if layout.width <= COLUMNS_AT_ONCE:
            add(0, layout.width)
            return
        with f.loop(layout.width, step=COLUMNS_AT_ONCE) as start:
            stop = start + COLUMNS_AT_ONCE
            add(start, f.choose(stop < layout.width, stop, layout.width))

    def wrap_function(self, radius: int) -> Function:
        """CIRCULAR padding: repeat rows above and below a plane whose first row is at the address."""
        key = ("wrap", radius)
        if key in self.functions:
            return self.functions[key]
        layout = self.layout
        f = self.module.function(f"wrap{radius}", "p")
        (plane,) = f.parameters
        for v in range(radius):
            with f.loop(layout.row, step=layout.lanes) as x:
                f.store(f.load(plane + x + (layout.height - 1 - v) * layout.row), plane + x + (-1 - v) * layout.row)
                f.store(f.load(plane + x + v * layout.row), plane + x + (layout.height + v) * layout.row)
        f.end()
        self.functions[key] = f
        return f


def begin_layer(f: Function, layer: Layer, total: Vector, factors: Factors, branch: float) -> list[Vector]:
    """The first half of a layer at one entry, from the sum of K over its filter."""
    if layer.folded:
        c = _biased(total, layer) * factors.product(f, 1)
        return duals.begin_arc_cosine(f, c, layer.scale, branch, nonnegative=layer.nonnegative)
    rounded = float(f.dtype.type(layer.w2))
    rest = layer.w2 - rounded  # without it, each layer would move c by the same error in the same direction
    return [f.fused(total, rounded, f.affine(total, rest, layer.b2)) if rest else f.affine(total, rounded, layer.b2)]


def finish_layer(
    f: Function, layer: Layer, begun: list[Vector], factors: Factors, branch: float, saved: Sequence[Pointer]
) -> Kernels:
    """The second half: K and Θ after the layer.

    Args:
      f: the function under construction.
      layer: which.
      begun: the vectors of the first half, and the sum of K + Θ over its filter.
      factors: of its first activation.
      branch: correlations with ``1 - |c| < branch`` are taken as ``±1``.
      saved: where K and Θ are kept at the beginning of residual branches, two for each.
    """
    operations = list(layer.operations)
    *begun, total = begun
    if layer.folded:
        operations.pop(0)
        _, middle = layer.folded.arcsine
        nngp, angle = duals.arc_cosine(f, begun, middle, layer.scale, nonnegative=layer.nonnegative)
        k, theta = factors.product(f, 0) * nngp, _biased(total, layer) * angle
    else:
        (k,), theta = begun, f.affine(total, layer.w2, layer.b2)
    for operation in operations:
        match operation:
            case Activate(activation, place, nonnegative):
                k, theta = duals.emit(f, activation, k, theta, factors.after(place), branch, nonnegative=nonnegative)
            case Save(slot):
                f.store(k, saved[2 * slot])
                f.store(theta, saved[2 * slot + 1])
            case Add(slot):
                k, theta = k + f.load(saved[2 * slot]), theta + f.load(saved[2 * slot + 1])
    return k, theta


def _biased(total: Vector, layer: Layer) -> Vector:
    """``A(K) + b²/w²`` of a folded layer."""
    return total + layer.b2 / layer.w2 if layer.b2 else total


def _sum(vectors: Iterable[Vector]) -> Vector:
    return reduce(operator.add, vectors)
