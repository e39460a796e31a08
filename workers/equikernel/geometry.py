"""Which pixels each layer sees: image sizes through a network, and where a layer would break the symmetry."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from equikernel import groups
from equikernel.errors import NetworkError
from equikernel.layers import Branch, Convolution, Pooling

if TYPE_CHECKING:
    from collections.abc import Callable

    from equikernel.layers import Padding, Step

SEARCHED = 4096
"""Largest image side that is looked at for one that works."""


Size: TypeAlias = tuple[int, int]
"""Height and width."""


class Windows(NamedTuple):
    """Where the filters of a convolution lie on one axis: output ``i`` is centred on pixel ``i stride + first``."""

    outputs: int
    first: int
    """Centre of the first filter."""


def windows(side: int, radius: int, stride: int, padding: Padding) -> Windows:
    """The filters of ``2 radius + 1`` pixels on a side; for SAME and VALID as in XLA and neural-tangents."""
    size = 2 * radius + 1
    if padding == "VALID":
        return Windows((side - size) // stride + 1, radius)
    outputs = -(-side // stride)
    padded = max(0, (outputs - 1) * stride + size - side)
    return Windows(outputs, radius - (padded // 2 if padding == "SAME" else radius))


def trace(steps: tuple[Step, ...], side: int, axis: int, group: str, padding: Padding) -> int:
    """The side that is left of ``side`` pixels along ``axis`` (0 rows, 1 columns) after ``steps``.

    Raises:
      NetworkError: a step does not fit, or breaks the symmetry of the group; without a remedy.
    """
    for step in steps:
        if isinstance(step, Convolution):
            side = _convolved(step, side, axis, group, padding)
        elif isinstance(step, Pooling):
            if side % step.size:
                raise NetworkError(
                    f"{step.place}: blocks of {step.size} pixels do not divide the {side} pixels there, and would "
                    "leave some out on one side"
                )
            side //= step.size
        elif isinstance(step, Branch):
            side = trace(step.steps, side, axis, group, padding)
    return side


def _convolved(step: Convolution, side: int, axis: int, group: str, padding: Padding) -> int:
    radius = groups.reach(group, step.radii)[axis]
    size, stride = 2 * radius + 1, step.stride
    turned = "" if radius == step.radii[axis] else f" (of {2 * step.radii[axis] + 1} pixels, turned by {group})"
    if padding == "CIRCULAR" and side < size:
        raise NetworkError(
            f"{step.place}: CIRCULAR padding: a filter of {size} pixels{turned} wraps around the {side} there more "
            "than once; use a smaller filter or larger images"
        )
    if padding == "VALID" and side < size:
        raise NetworkError(
            f"{step.place}: VALID padding: a filter of {size} pixels{turned} does not fit in the {side} left there"
        )
    outputs, first = windows(side, radius, stride, padding)
    if groups.flips(group)[axis] and 2 * first + (outputs - 1) * stride != side - 1:
        rule = (
            f"VALID needs a stride that divides side - filter = {side - size}"
            if padding == "VALID"
            else f"SAME needs (outputs - 1) · stride + filter - side = {(outputs - 1) * stride + size - side} "
            "to be even and not negative"
        )
        raise NetworkError(
            f"{step.place}: a stride of {stride} on {side} pixels breaks the symmetry of {group}, because the filters "
            f"do not lie symmetrically; {rule}"
        )
    return outputs


def size_after(step: Step, size: Size, group: str, padding: Padding) -> Size:
    """The size of images after a step that fits them."""
    if isinstance(step, Convolution):
        rows, cols = (
            windows(side, radius, step.stride, padding).outputs
            for side, radius in zip(size, groups.reach(group, step.radii), strict=True)
        )
        return rows, cols
    return (size[0] // step.size, size[1] // step.size) if isinstance(step, Pooling) else size


def padded_size(step: Convolution, size: Size, group: str, padding: Padding) -> Size:
    """The size of images with the border that the filters of a convolution see."""
    y, x = groups.reach(group, step.radii) if padding != "VALID" else (0, 0)
    return size[0] + 2 * y, size[1] + 2 * x


def entries(size: Size) -> int:
    """Of a covariance between all pixels of two images of that size."""
    return (size[0] * size[1]) ** 2


def nearest_sides(works: Callable[[int], bool], side: int) -> list[int]:
    """The nearest sides below and above ``side`` that work, as far as there are any up to :data:`SEARCHED`."""
    below = next((s for s in range(side - 1, 0, -1) if works(s)), None)
    above = next((s for s in range(side + 1, SEARCHED + 1) if works(s)), None)
    return [s for s in (below, above) if s is not None]


def margin(steps: tuple[Step, ...], padding: Padding) -> tuple[int, int]:
    """Pixels that VALID convolutions without stride take off each border, rows and columns; 0 for other padding."""
    if padding != "VALID":
        return (0, 0)
    radii = [step.radii for step in steps if isinstance(step, Convolution)]
    return sum(y for y, _ in radii), sum(x for _, x in radii)
