"""What a pair of images costs, counted and not measured."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import TYPE_CHECKING

from equikernel.geometry import entries, size_after
from equikernel.groups import on_grid, order, symmetries, union
from equikernel.layers import Branch, Convolution, Nonlinearity, Pooling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from equikernel.geometry import Size
    from equikernel.groups import Offset
    from equikernel.layers import Step
    from equikernel.network import Architecture

TERM = 8
"""Operations of a weighted term of a compensated sum: a product, a sum, and six for what the sum lost."""


def pair_flops(network: Architecture, groups: tuple[str, ...], engine: str, image_shape: tuple[int, int, int]) -> float:
    """Floating-point operations of one pair of images ``(H, W, C)``, roughly: both kernels, all groups.

    Per entry of a covariance: ``2 C`` for the input; for each convolution, of K and, but for the lifting one, of Θ, one
    for each row and column of its filter, or :data:`TERM` for each pair of pixels that it sees in the engine
    ``"reference"`` and off the grid; for each nonlinearity what its dual kernels take.
    """
    if engine == "reference":
        return sum(order(group) ** 2 * _covariance_flops(network, group, image_shape, engine) for group in groups)
    components = len(union(groups)) if all(map(on_grid, groups)) else components_off_grid(groups[0])
    return components * _covariance_flops(network, groups[0], image_shape, engine)


def _covariance_flops(network: Architecture, group: str, image_shape: tuple[int, int, int], engine: str) -> float:
    """Operations for K and Θ between two elements of ``group``."""
    height, width, channels = image_shape
    separable = engine != "reference" and on_grid(group)
    averaged = order(group) if engine == "reference" else 1
    total = 2.0 * channels * entries((height, width))
    filtered = 1  # K alone, because Θ⁰ = 0
    for step, before, after in _sizes(network.steps, (height, width), group, network):
        here = entries(after)
        if isinstance(step, Convolution) and separable:
            taps_y, taps_x = (2 * radius + 1 for radius in step.radii)
            total += filtered * (taps_y * entries((after[0], before[1])) + taps_x * here)
            filtered = 2
        elif isinstance(step, Convolution):
            mean = averaged * entries(before) if filtered == 2 else 0.0
            total += filtered * (mean + TERM * pixels_seen(group, step.radii) * here)
            filtered = 2
        elif isinstance(step, Nonlinearity):
            total += here * step.activation.flops
        elif isinstance(step, Pooling):
            total += 2 * entries(before)
        else:
            total += 2 * here
    return total


@cache
def pixels_seen(group: str, radii: Offset) -> float:
    """``Σ_v`` of how many pairs of pixels the tap ``v`` lies on in both images, the mean over all pairs of elements.

    The number of taps on the grid; off it bilinear interpolation spreads a tap over up to four pixels.
    """
    rows, cols = (range(-radius, radius + 1) for radius in radii)
    pixels = (sum(len(element.splat(tap)) for element in symmetries(group)) for tap in product(rows, cols))
    return float(sum((count / order(group)) ** 2 for count in pixels))


def components_off_grid(group: str) -> int:
    """Different ``K[r, r']`` of a group off the grid: ``K[rs, r's] = K[r, r']`` for the ``s`` that are on it."""
    shared = {0: 4, 2: 2}.get(int(group[1:]) % 4, 1) * (2 if group[0] == "D" else 1)
    return order(group) ** 2 // shared


def _sizes(steps: tuple[Step, ...], size: Size, group: str, network: Architecture) -> Iterator[tuple[Step, Size, Size]]:
    """Each step with the image size before and after it."""
    for step in steps:
        before, size = size, size_after(step, size, group, network.padding)
        if isinstance(step, Branch):
            yield from _sizes(step.steps, before, group, network)
        yield step, before, size
