"""The JAX engine: orbit reduction and offset decoupling on CPUs and GPUs.

Orbit reduction: ``K_G(f, f') = 1/|G| Σ_{d ∈ G} K_{C_1}(f, ρ(d) f')`` after pooling, and likewise Θ. Offset decoupling:
a convolution moves ``t`` and ``t'`` by the same tap, so for each offset ``δ = t' - t`` (modulo the image) the network is
a recursion on one plane over ``t``. Zero padding cuts the plane where ``t`` or ``t + δ`` leaves the image, into at most
two *segments* per axis; no filter reaches from one into another. See ``docs/kernels.md``.

Arrays are ``(H, W, B)``: ``B`` planes of horizontal offsets and pairs of images, innermost, so that every shift along
rows and columns moves whole vectors. Compiled code loops over the vertical offsets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from equikernel.engines.decoupled import image_constants, refuse_overflow, working_dtype
from equikernel.groups import symmetries, union
from equikernel.layers import Branch, Convolution, Nonlinearity, convolutions
from equikernel.recursion import Pooled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from equikernel.layers import Padding, Step
    from equikernel.network import Architecture

Array: TypeAlias = Any
"""A JAX array."""

CPU_ENTRIES, GPU_ENTRIES = 2**17, 2**23
"""Entries of the planes that are computed at once: on a CPU, they stay in the caches of a few cores."""

CPU_CALL, GPU_CALL = 2**25, 2**31
"""Entries times layers of one compiled call, some tenths of a second: an interrupted program ends after so long."""

FEWEST_OFFSETS = 8
"""Horizontal offsets side by side at least, memory permitting, for vector instructions."""

PLANES = 10
"""Planes that the compiled code holds at the same time, besides those of the images and of residual branches."""

ARCSINE: dict[int, tuple[float, ...]] = {
    4: (
        0.03369084720283012, 0.017149238357677253, 0.03110066273549457, 0.04459940152851218, 0.07500094543497424,
        0.16666666337430908,
    ),
    8: (
        0.028757851367421566, -0.014851887071247204, 0.01740087944269402, 0.005457506718640358, 0.01032281435018578,
        0.011479177415184906, 0.013971212973552933, 0.017352392720869973, 0.02237217294214989, 0.030381944138531247,
        0.04464285714635543, 0.07499999999998433, 0.16666666666666669,
    ),
}  # fmt: skip
"""By bytes of the precision: ``R`` with ``arcsin w = w + w³ R(w²)`` for ``w² <= 1/4``, highest power first."""


@dataclass(frozen=True)
class Prepared:
    """Images ready for the planes.

    ``packed``: ``(n, C + factors, H, W)`` in the dtype of the computation: the pixels, then the factors of each
    activation, functions of the preactivation variances.
    """

    packed: NDArray[Any]
    channels: int
    bound: NDArray[np.float64]
    """``(mean over t of √K(t,t))²`` at the end, ``(n,)``."""


class Shape(NamedTuple):
    """What one compiled call computes: ``pairs x offsets`` planes at once, for up to ``rows`` vertical offsets."""

    pairs: int
    offsets: int
    rows: int


class XlaEngine:
    """Pooled kernels of ``groups`` in ``dtype``, on JAX's default device, in ``memory`` bytes."""

    name = "xla"

    def __init__(self, network: Architecture, groups: tuple[str, ...], dtype: np.dtype[Any], memory: int) -> None:
        self.network = network
        self.groups = groups
        self.dtype = dtype
        self.memory = memory

    def prepare(self, images: NDArray[Any]) -> Prepared:
        """Pack ``(n, H, W, C)`` images with the factors of their activations.

        Raises:
          ImageError: an image's kernel with itself overflows the dtype.
          NetworkError: an activation has no second moment.
        """
        dtype = working_dtype(self.network, images.shape[1], images.shape[2], self.dtype)
        constants, bound = image_constants(self.network, images)
        layers = [np.stack(factors, axis=1).astype(dtype) for factors in constants]
        packed = np.concatenate([images.transpose(0, 3, 1, 2).astype(dtype), *layers], axis=1)
        refuse_overflow(packed, dtype)
        return Prepared(packed, images.shape[3], bound)

    def pooled_bound(self, block: Prepared) -> NDArray[np.float64]:
        """``(mean over t of √K(t,t))²`` after the last step, ``(n,)``."""
        return block.bound

    def epsilon(self, block: Prepared) -> float:
        """The machine epsilon of the computation."""
        return float(np.finfo(block.packed.dtype).eps)

    def image_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of one prepared image, and of what preparing it takes."""
        itemsize = working_dtype(self.network, height, width, self.dtype).itemsize
        factors = self._factor_planes()
        return height * width * ((channels + factors) * itemsize * 2 + 8 * factors)

    def pair_bytes(self, height: int, width: int) -> int:
        """Bytes of the planes of one offset, for images of up to four channels."""
        itemsize = working_dtype(self.network, height, width, self.dtype).itemsize
        return height * width * self._entry_bytes(4 + self._factor_planes(), itemsize)

    def pairs(
        self, block1: Prepared, block2: Prepared, rows: NDArray[np.intp], cols: NDArray[np.intp]
    ) -> dict[str, Pooled]:
        """Pooled kernels ``(p,)`` float64 of the pairs ``(block1[rows[p]], block2[cols[p]])``, by group."""
        elements = union(self.groups)
        _, planes, height, width = block1.packed.shape
        itemsize = block1.packed.dtype.itemsize
        margin = self.network.margin
        down, across = (useful_offsets(side, cut) for side, cut in zip((height, width), margin, strict=True))
        platform = jax.default_backend()
        work = len(self.network.steps)
        shape = self._shape(len(rows), len(across), height * width, self._entry_bytes(planes, itemsize), work, platform)
        compiled = _compiled(self.network.steps, self.network.padding, block1.channels, platform)

        def calls() -> Iterator[tuple[int, slice, int, Array]]:
            """What is computed: the element, the pairs, the offsets that count, and the sums to come."""
            for place, element in enumerate(elements):
                for start in range(0, len(rows), shape.pairs):
                    pairs = slice(start, min(start + shape.pairs, len(rows)))
                    x = block1.packed[_filled(rows[pairs], shape.pairs)]
                    y = element.on_images(block2.packed[_filled(cols[pairs], shape.pairs)], axes=(2, 3))
                    for left in range(0, len(across), shape.offsets):
                        offsets = across[left : left + shape.offsets]
                        filled = _filled(offsets, shape.offsets)
                        for top in range(0, len(down), shape.rows):
                            end = min(top + shape.rows, len(down))
                            sums = compiled(x, np.ascontiguousarray(y), down, filled, top, end, True)
                            yield place, pairs, len(offsets), sums

        totals = np.zeros((len(elements), 2, len(rows)))

        def add(place: int, pairs: slice, count: int, sums: Array) -> None:
            totals[place, :, pairs] += np.asarray(sums)[:, :count, : pairs.stop - pairs.start].sum(axis=1)

        with jax.enable_x64(True):
            waiting: tuple[int, slice, int, Array] | None = None
            for call in calls():  # one ahead of what is added up, so that a device never waits
                if waiting is not None:
                    add(*waiting)
                waiting = call
            if waiting is not None:
                add(*waiting)
        totals /= float((height - 2 * margin[0]) * (width - 2 * margin[1])) ** 2
        results = {}
        for group in self.groups:
            members = [elements.index(element) for element in symmetries(group)]
            results[group] = Pooled(*totals[members].mean(axis=0))
        return results

    def _factor_planes(self) -> int:
        """Factors of all activations of an image."""
        return sum(len(activation.factors(np.ones(1))) for activation in self.network.activations)

    def _entry_bytes(self, image_planes: int, itemsize: int) -> int:
        """Working memory per entry of a plane: both images repeated for each offset, the second twice, and planes."""
        return itemsize * (3 * image_planes + PLANES + 2 * _branch_depth(self.network.steps))

    def _shape(self, pairs: int, offsets: int, pixels: int, entry_bytes: int, work: int, platform: str) -> Shape:
        """The largest blocks within the memory, of few different shapes, because each one is compiled."""
        entries, call = (CPU_ENTRIES, CPU_CALL) if platform == "cpu" else (GPU_ENTRIES, GPU_CALL)
        planes = min(max(entries // pixels, FEWEST_OFFSETS), self.memory // (entry_bytes * pixels))
        if planes < offsets:
            blocks = -(-offsets // max(planes, 1))
            at_once, side_by_side = 1, -(-offsets // blocks)
        else:
            at_once, side_by_side = _power_of_two(min(planes // offsets, 2 * pairs - 1)), offsets
        return Shape(at_once, side_by_side, max(1, call // (pixels * at_once * side_by_side * work)))


def _power_of_two(limit: int) -> int:
    """The largest power of two up to ``limit``."""
    return 1 << (limit.bit_length() - 1)


def _filled(index: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    """``index`` with its first entry repeated at the end, to the length ``count``."""
    return np.concatenate([index, np.full(count - len(index), index[0])])


def _branch_depth(steps: tuple[Step, ...]) -> int:
    """How many residual branches lie within each other."""
    return max((1 + _branch_depth(step.steps) for step in steps if isinstance(step, Branch)), default=0)


def useful_offsets(side: int, margin: int) -> NDArray[np.intp]:
    """Offsets modulo ``side`` with a segment longer than ``2 margin``: those with pixel pairs left by VALID padding."""
    return np.array([d for d in range(side) if max(side - d, d) > 2 * margin])


@lru_cache(maxsize=128)
def _compiled(steps: tuple[Step, ...], padding: Padding, channels: int, platform: str) -> Callable[..., Array]:
    """The function that sums planes, compiled anew for each shape and dtype of its arguments.

    Its arguments: images ``x``, ``y`` ``(P, planes, H, W)``; all vertical offsets ``(n,)``; horizontal offsets
    ``(D,)``; the first of the vertical ones that are computed, and the end; True (see :func:`_stored`). It returns the
    sums of K and Θ over the planes, ``(2, D, P)`` float64.
    """

    def sums(x: Array, y: Array, down: Array, across: Array, begin: Array, end: Array, true: Array) -> Array:
        pairs, _, height, width = x.shape
        count = len(across) * pairs
        planes = _Planes(steps, padding, channels, down, across, pairs, (height, width), x.dtype, platform, true)
        x = jnp.broadcast_to(x.transpose(1, 2, 3, 0)[:, :, :, None], (*x.shape[1:], len(across), pairs))
        x = x.reshape(*x.shape[:3], count)
        # Twice below each other, so that a vertical offset is a slice.
        y = y.transpose(1, 2, 3, 0)[:, :, (jnp.arange(width)[:, None] + across) % width]
        y = jnp.concatenate([y, y], axis=1).reshape(-1, 2 * height, width, count)

        def add(index: Array, total: Array) -> Array:
            k, theta = planes.run(x, y, index)
            weights = planes.rows_inside[index][:, None, None]
            return total + jnp.stack([(plane * weights).sum(axis=0) for plane in (k, theta)])

        total = jax.lax.fori_loop(begin, end, add, jnp.zeros((2, width, count)))
        total = total.reshape(2, width, len(across), pairs) * planes.columns_inside[:, :, None]
        return total.sum(axis=1)

    return jax.jit(sums)


class _Planes:
    """The recursion on the planes of one vertical offset."""

    def __init__(
        self,
        steps: tuple[Step, ...],
        padding: Padding,
        channels: int,
        down: Array,
        across: Array,
        pairs: int,
        size: tuple[int, int],
        dtype: Any,
        platform: str,
        true: Array,
    ) -> None:
        self.steps = steps
        self.circular = padding == "CIRCULAR"
        self.channels = channels
        self.down = down
        self.platform, self.true = platform, true
        radii = [step.radii for step in convolutions(steps)]
        # How close to ±1 a correlation is taken as ±1; sums over larger filters round more.
        self.eps = float(jnp.finfo(dtype).eps) * max(1, *(max(radius) for radius in radii))
        self.functions = _functions(dtype)
        margin = tuple(map(sum, zip(*radii, strict=True))) if padding == "VALID" else (0, 0)
        self.rows_inside = _inside(down, size[0], margin[0]).T.astype(jnp.float64)
        self.columns_inside = _inside(across, size[1], margin[1])
        self.row_links = {r: _links(down, size[0], r).transpose(2, 0, 1).astype(dtype) for r, _ in radii}
        self.column_links = {
            r: jnp.repeat(_links(across, size[1], r), pairs, axis=2)[:, None].astype(dtype) for _, r in radii
        }

    def run(self, x: Array, y: Array, index: Array) -> tuple[Array, Array]:
        """K and Θ after all steps, ``(H, W, B)``, for the vertical offset ``down[index]``."""
        offset = self.down[index]
        place = self.channels

        def through(steps: tuple[Step, ...], k: Array, theta: Array) -> tuple[Array, Array]:
            nonlocal place
            for step in steps:
                match step:
                    case Convolution():
                        k, theta = self.convolve(step, k, theta, index)
                    case Nonlinearity(activation):
                        k, theta = self.activate(activation, place, k, theta, x, y, offset)
                        place += len(activation.factors(np.ones(1)))
                    case Branch(_, inner):
                        branch = through(inner, k, theta)
                        k, theta = self.stored(lambda a, b, c, d: (a + c, b + d), k, theta, *branch)
            return k, theta

        def inp(x, y, offset):
            k = sum(x[c] * _moved(y, c, offset) for c in range(self.channels))
            return k / self.channels

        k = self.stored(inp, x, y, offset)
        return through(self.steps, k, None)

    def convolve(self, step: Convolution, k: Array, theta: Array | None, index: Array) -> tuple[Array, Array]:
        r, s = step.radii
        scale = step.w2 / ((2 * r + 1) * (2 * s + 1))
        rows, columns = self.row_links[r][index], self.column_links[s]

        def vertical(rows, *planes):
            return tuple(self.box(p, r, 0, rows[:, :, None, None]) for p in planes)

        def horizontal(columns, k, *theta):
            k = self.box(k, s, 1, columns) * scale + step.b2
            return (k, *(k + self.box(t, s, 1, columns) * scale for t in theta))

        planes = (k,) if theta is None else (k, theta)
        if r:
            planes = self.stored(vertical, rows, *planes)
        planes = self.stored(horizontal, columns, *planes)
        return planes[0], planes[-1]

    def box(self, plane: Array, radius: int, axis: int, links: Array) -> Array:
        side = plane.shape[axis]
        if radius == 0:
            return plane
        if self.circular:
            ends = [
                jax.lax.slice_in_dim(plane, side - radius, side, axis=axis),
                jax.lax.slice_in_dim(plane, 0, radius, axis=axis),
            ]
        else:
            shape = list(plane.shape)
            shape[axis] = radius
            ends = [jnp.zeros(shape, plane.dtype)] * 2
        longer = jnp.concatenate([ends[0], plane, ends[1]], axis=axis)
        terms = [jax.lax.slice_in_dim(longer, v, v + side, axis=axis) for v in range(2 * radius + 1)]
        if not self.circular:
            terms = [t if v == radius else t * links[v] for v, t in enumerate(terms)]
        return sum(terms[1:], terms[0])

    def activate(self, activation, place, k, theta, x, y, offset):
        count = len(activation.factors(np.ones(1)))

        def dual(k, theta, x, y, offset):
            xf = [x[place + i] for i in range(count)]
            yf = [_moved(y, place + i, offset) for i in range(count)]
            k, derivative = activation.combine(k, xf, yf, self.eps, self.functions)
            return k, derivative * theta

        return self.stored(dual, k, theta, x, y, offset)

    def stored(self, function, *arrays):
        if self.platform != "cpu":
            return jax.lax.optimization_barrier(function(*arrays))
        shapes = jax.eval_shape(function, *arrays)
        return jax.lax.cond(
            self.true, function, lambda *_: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), *arrays
        )


def _moved(y, plane, offset):
    return jax.lax.dynamic_slice(y, (plane, offset, 0, 0), (1, y.shape[1] // 2, *y.shape[2:]))[0]


def _segment(offsets: Array, side: int) -> tuple[Array, Array]:
    t = jnp.arange(side)[:, None]
    second = t >= side - offsets
    return jnp.where(second, side - offsets, 0), jnp.where(second, side, side - offsets)


def _links(offsets: Array, side: int, radius: int) -> Array:
    begin, end = _segment(offsets, side)
    t = jnp.arange(side)[:, None] + jnp.arange(-radius, radius + 1)[:, None, None]
    return (begin <= t) & (t < end)


def _inside(offsets: Array, side: int, margin: int) -> Array:
    begin, end = _segment(offsets, side)
    t = jnp.arange(side)[:, None]
    return (begin + margin <= t) & (t + margin < end)


def _functions(dtype):
    series = ARCSINE[jnp.dtype(dtype).itemsize]

    def arcsine(w, square):
        r = series[0]
        for c in series[1:]:
            r = r * square + c
        return w + w * square * r

    def arccos(c):
        a = abs(c)
        large = a > 0.5
        square = jnp.where(large, (1 - a) / 2, a * a)
        arc = arcsine(jnp.where(large, jnp.sqrt(square), a), square)
        arc = jnp.where(large, 2 * arc, math.pi / 2 - arc)
        return jnp.where(c < 0, math.pi - arc, arc)

    def arctan2(y, x):
        a = abs(y)
        large = a > 0.5
        square = jnp.where(large, x * x / (2 * (1 + a)), a * a)
        arc = arcsine(jnp.where(large, jnp.sqrt(square), a), square)
        arc = jnp.where(large, math.pi / 2 - 2 * arc, arc)
        return jnp.where(y < 0, -arc, arc)

    names = ("where", "sign", "sqrt", "exp", "sinh", "ones_like", "zeros_like")
    return SimpleNamespace(**{n: getattr(jnp, n) for n in names}, arccos=arccos, arctan2=arctan2)
