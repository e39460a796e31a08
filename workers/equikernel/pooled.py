"""What every engine makes of images and of pairs of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from equikernel.groups import order, symmetries

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equikernel.groups import Symmetry

    Array = NDArray[np.float64]


class Pooled(NamedTuple):
    """Kernels after group pooling, ``(p,)`` float64 each, before any dense layer."""

    nngp: Array
    ntk: Array


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Images as an engine wants them, with what is computed once for each.

    Attributes:
      bound: what the NNGP of each image with itself, ``(n,)``, would be if nothing cancelled in the pooling:
        ``(mean over t of √K(t,t))²`` after the last step; the mean of ``|K(t,t')|`` is at most that.
      epsilon: the machine epsilon of the computation with these images.
    """

    bound: Array
    epsilon: float


def by_group(groups: tuple[str, ...], elements: tuple[Symmetry, ...], totals: Array) -> dict[str, Pooled]:
    """The orbit means of the kernels against each image under each symmetry.

    Summed one after the other, so that the bits of a pair do not depend on how many there are.

    Args:
      groups: their names.
      elements: symmetries, those of all groups among them.
      totals: NNGP and NTK of plain CNNs, ``(elements, 2, p)``.
    """
    results = {}
    for group in groups:
        total = np.zeros(totals.shape[1:])
        for element in symmetries(group):
            total += totals[elements.index(element)]
        results[group] = Pooled(*(total / order(group)))
    return results
