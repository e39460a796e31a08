"""Rotations and reflections of the plane, and what they do to images and filters on the pixel grid."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from functools import cache
from itertools import product
from typing import Literal, NamedTuple, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

GridGroupName = Literal["C1", "C2", "C4", "D1", "D2", "D4"]

GRID_GROUPS: tuple[str, ...] = get_args(GridGroupName)
"""The groups whose elements map the pixel grid to itself."""

LARGEST = 360
"""The largest ``n`` of ``C_n`` and ``D_n``."""

ROUNDING = 1e-12
"""Distance below which a rotated filter tap is on a pixel."""

Offset = tuple[int, int]
Scalar = TypeVar("Scalar", bound=np.generic)


class Symmetry(NamedTuple):
    """An element ``ρ``: a left-right mirror image if ``mirrored``, then ``turns`` quarter turns counter-clockwise."""

    mirrored: bool
    turns: int | Fraction
    """In [0, 4): an integer where the pixel grid is mapped to itself, else a fraction."""

    def __mul__(self, other: Symmetry) -> Symmetry:  # type: ignore[override]
        """The symmetry that acts as ``other``, then as this one."""
        turns = -other.turns if self.mirrored else other.turns
        return Symmetry(self.mirrored != other.mirrored, (self.turns + turns) % 4)

    @property
    def on_grid(self) -> bool:
        """Whether it maps the pixel grid to itself."""
        return self.turns.denominator == 1

    def on_offset(self, offset: Offset) -> Offset:
        """``ρ v``: the pixel offset ``(dy, dx)`` moved along; for elements on the grid.

        >>> Symmetry(mirrored=False, turns=1).on_offset((0, 1))
        (-1, 0)
        """
        dy, dx = offset
        dx = -dx if self.mirrored else dx
        for _ in range(int(self.turns)):
            dy, dx = -dx, dy
        return dy, dx

    def splat(self, offset: Offset) -> list[tuple[Offset, float]]:
        """The pixels on which the rotated filter tap ``ρ v`` lies, with weights that sum to 1.

        ``R[a, v] = hat(a - ρ v)``, ``hat`` the product over both axes of ``max(0, 1 - |·|)``: bilinear, at most four
        pixels ``a``; a single one for elements on the grid.
        """
        if self.on_grid:
            return [(self.on_offset(offset), 1.0)]
        dy, dx = offset
        dx = -dx if self.mirrored else dx
        angle = float(self.turns) * math.pi / 2
        y = dy * math.cos(angle) - dx * math.sin(angle)
        x = dy * math.sin(angle) + dx * math.cos(angle)
        return [((ay, ax), wy * wx) for (ay, wy), (ax, wx) in product(_hat(y), _hat(x))]

    def on_images(self, images: NDArray[Scalar], axes: tuple[int, int] = (1, 2)) -> NDArray[Scalar]:
        """``ρ f``: images ``(n, H, W, ...)``, rows and columns along ``axes``; odd turns exchange ``H`` and ``W``.

        For elements on the grid.
        """
        return np.rot90(np.flip(images, axes[1]) if self.mirrored else images, k=int(self.turns), axes=axes)


def _hat(position: float) -> list[tuple[int, float]]:
    """The pixels beside a position on one axis, with their linear weights."""
    nearest = round(position)
    if abs(position - nearest) < ROUNDING:
        return [(nearest, 1.0)]
    below = math.floor(position)
    return [(below, below + 1 - position), (below + 1, position - below)]


def is_group(name: str) -> bool:
    """Whether ``name`` is ``C`` or ``D`` and a whole number from 1 to :data:`LARGEST`."""
    return re.fullmatch(r"[CD][1-9][0-9]{0,3}", name) is not None and int(name[1:]) <= LARGEST


def order(group: str) -> int:
    """``|G|``: ``n`` for ``C_n``, ``2n`` for ``D_n``."""
    return int(group[1:]) * (2 if group[0] == "D" else 1)


@cache
def symmetries(group: str) -> tuple[Symmetry, ...]:
    """The elements of ``group``, the identity first.

    ``C_n`` holds the ``n`` rotations by multiples of ``2π/n``; ``D_n`` also the left-right mirror image and its
    products with them: D1 one reflection, D2 the left-right and the up-down one, D4 also those on the diagonals.
    """
    n = int(group[1:])
    mirrors = (False, True) if group[0] == "D" else (False,)
    turns = [Fraction(4 * r, n) for r in range(n)]
    return tuple(
        Symmetry(mirrored, int(turn) if turn.denominator == 1 else turn) for mirrored, turn in product(mirrors, turns)
    )


def on_grid(group: str) -> bool:
    """Whether all elements of ``group`` map the pixel grid to itself."""
    return group in GRID_GROUPS


def union(groups: tuple[str, ...]) -> tuple[Symmetry, ...]:
    """The elements of all ``groups``, each once and sorted, so the identity first."""
    return tuple(sorted({element for group in groups for element in symmetries(group)}))


@cache
def multiplication_table(group: str) -> NDArray[np.intp]:
    """``table[r, q]`` is the place of the product ``rq`` among :func:`symmetries`: ``(|G|, |G|)``."""
    elements = symmetries(group)
    places = {element: place for place, element in enumerate(elements)}
    table = np.array([[places[r * q] for q in elements] for r in elements])
    table.setflags(write=False)
    return table


def keeps_rectangles(group: str) -> bool:
    """Whether ``group`` maps rectangles along the axes to themselves: C1, C2, D1 and D2."""
    return group in ("C1", "C2", "D1", "D2")


def flips(group: str) -> tuple[bool, bool]:
    """Whether ``group`` turns the vertical and the horizontal axis around, so that layers must be symmetric there."""
    return (group not in ("C1", "D1"), group != "C1")


def splat_matrices(group: str, radii: Offset) -> NDArray[np.float64]:
    """``R_r[a, v]`` (:meth:`Symmetry.splat`) for all pixels ``a`` within :func:`reach` and taps ``v``, row by row.

    Shape ``(|G|, pixels, taps)``.
    """
    pixels = {pixel: place for place, pixel in enumerate(product(*(range(-r, r + 1) for r in reach(group, radii))))}
    taps = list(product(range(-radii[0], radii[0] + 1), range(-radii[1], radii[1] + 1)))
    matrices = np.zeros((order(group), len(pixels), len(taps)))
    for r, element in enumerate(symmetries(group)):
        for v, tap in enumerate(taps):
            for pixel, weight in element.splat(tap):
                matrices[r, pixels[pixel], v] += weight
    return matrices


@cache
def reach(group: str, radii: Offset) -> Offset:
    """Pixels that the rotated filters of ``group`` reach beyond their centre, on each axis, for ``radii`` of the base.

    More than ``radii`` only off the grid: the corners of a square stick out when it is turned.
    """
    if on_grid(group):
        return radii
    corners = list(product((-radii[0], radii[0]), (-radii[1], radii[1])))
    pixels = [pixel for element in symmetries(group) for corner in corners for pixel, _ in element.splat(corner)]
    return max(abs(y) for y, _ in pixels), max(abs(x) for _, x in pixels)
