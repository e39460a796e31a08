"""The grid symmetries: rotations of the plane by multiples of ``2π/n`` that map the pixel grid to itself."""

from __future__ import annotations

from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

GroupName = Literal["C1", "C2", "C4"]
GROUPS: tuple[str, ...] = get_args(GroupName)

Scalar = TypeVar("Scalar", bound=np.generic)


def order(group: str) -> int:
    """The number of rotations ``n`` of ``C_n``."""
    return int(group[1:])


def quarter_turns(group: str) -> tuple[int, ...]:
    """The rotations of ``group``, each as a number of quarter turns; the identity first.

    C1: ``(0,)``, C2: ``(0, 2)``, C4: ``(0, 1, 2, 3)``.
    """
    n = order(group)
    return tuple(r * 4 // n for r in range(n))


def common_turns(groups: tuple[str, ...]) -> tuple[int, ...]:
    """The quarter turns that at least one of ``groups`` needs, sorted: those of the largest."""
    return tuple(sorted({turn for group in groups for turn in quarter_turns(group)}))


def rotate_offset(offset: tuple[int, int], turns: int) -> tuple[int, int]:
    """``ρ(r) v``: the pixel offset ``(dy, dx)`` after ``turns`` quarter turns counter-clockwise.

    >>> rotate_offset((0, 1), 1)
    (-1, 0)
    """
    dy, dx = offset
    for _ in range(turns % 4):
        dy, dx = -dx, dy
    return dy, dx


def rotate_images(images: NDArray[Scalar], turns: int) -> NDArray[Scalar]:
    """``ρ(r) f``: images ``(n, H, W, ...)`` turned counter-clockwise by ``turns`` quarter turns.

    An odd number of turns exchanges ``H`` and ``W``.
    """
    return np.rot90(images, k=turns, axes=(1, 2))


def needs_square_images(group: str) -> bool:
    """Whether ``group`` holds a quarter turn, which maps only square images to the same grid."""
    return any(turn % 2 for turn in quarter_turns(group))
