"""The grid symmetries: rotations and reflections of the plane that map the pixel grid to itself."""

from __future__ import annotations

from itertools import product
from typing import Literal, NamedTuple, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

GroupName = Literal["C1", "C2", "C4", "D1", "D2", "D4"]
GROUPS: tuple[str, ...] = get_args(GroupName)

Scalar = TypeVar("Scalar", bound=np.generic)


class Symmetry(NamedTuple):
    """An element ``ρ``: a left-right mirror image if ``mirrored``, then ``turns`` quarter turns counter-clockwise."""

    mirrored: bool
    turns: int

    def __mul__(self, other: Symmetry) -> Symmetry:  # type: ignore[override]
        """The symmetry that acts as ``other``, then as this one."""
        turns = -other.turns if self.mirrored else other.turns
        return Symmetry(self.mirrored != other.mirrored, (self.turns + turns) % 4)

    def on_offset(self, offset: tuple[int, int]) -> tuple[int, int]:
        """``ρ v``: the pixel offset ``(dy, dx)`` moved along.

        >>> Symmetry(mirrored=False, turns=1).on_offset((0, 1))
        (-1, 0)
        """
        dy, dx = offset
        dx = -dx if self.mirrored else dx
        for _ in range(self.turns):
            dy, dx = -dx, dy
        return dy, dx

    def on_images(self, images: NDArray[Scalar], axes: tuple[int, int] = (1, 2)) -> NDArray[Scalar]:
        """``ρ f``: images ``(n, H, W, ...)``, rows and columns along ``axes``; odd turns exchange ``H`` and ``W``."""
        return np.rot90(np.flip(images, axes[1]) if self.mirrored else images, k=self.turns, axes=axes)


def symmetries(group: str) -> tuple[Symmetry, ...]:
    """The elements of ``group``, the identity first.

    ``C_n`` holds the ``n`` rotations by multiples of ``2π/n``; ``D_n`` also the left-right mirror image and its
    products with them: D1 one reflection, D2 the left-right and the up-down one, D4 also those on the diagonals.
    """
    n = int(group[1:])
    mirrors = (False, True) if group[0] == "D" else (False,)
    return tuple(Symmetry(mirrored, r * 4 // n) for mirrored, r in product(mirrors, range(n)))


def union(groups: tuple[str, ...]) -> tuple[Symmetry, ...]:
    """The elements of all ``groups``, each once and sorted, so the identity first."""
    return tuple(sorted({element for group in groups for element in symmetries(group)}))


def multiplication_table(group: str) -> NDArray[np.intp]:
    """``table[r, q]`` is the place of the product ``rq`` among :func:`symmetries`: ``(|G|, |G|)``."""
    elements = symmetries(group)
    return np.array([[elements.index(r * q) for q in elements] for r in elements])


def needs_square_images(group: str) -> bool:
    """Whether ``group`` holds a quarter turn, which maps only square images to the same grid."""
    return any(element.turns % 2 for element in symmetries(group))
