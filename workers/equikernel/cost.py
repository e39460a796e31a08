"""What a pair of images costs, counted and not measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from equikernel.geometry import windows
from equikernel.groups import on_grid, order, reach, union
from equikernel.layers import Branch, Convolution, Nonlinearity, Pooling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from equikernel.layers import Step
    from equikernel.network import Architecture

SPLAT = 4
"""Pixels on which a filter tap lies that is rotated off the grid."""


def pair_flops(network: Architecture, groups: tuple[str, ...], engine: str, image_shape: tuple[int, int, int]) -> float:
    """Floating-point operations of one pair of images ``(H, W, C)``, roughly: both kernels, all groups.

    Per entry of a covariance: ``2 C`` for the input; for each convolution twice (K and Θ) the filter, separable in the
    engines ``"cpu"`` and ``"xla"``; for each nonlinearity what its dual kernels take.
    """
    height, width, channels = image_shape
    decoupled = engine in ("cpu", "xla")
    if engine == "reference":
        components = sum(order(group) ** 2 for group in groups)
    elif all(map(on_grid, groups)):
        components = len(union(groups))
    else:
        components = components_off_grid(groups[0])
    total = 2.0 * channels * (height * width) ** 2
    for step, (rows, cols) in _sizes(network.steps, (height, width), groups[0], network):
        entries = float(rows * cols) ** 2
        if isinstance(step, Convolution):
            taps_y, taps_x = (2 * radius + 1 for radius in step.radii)
            spread = 1 if on_grid(groups[0]) else 2 * SPLAT
            total += entries * 2 * (taps_y + taps_x if decoupled else taps_y * taps_x * spread)
        elif isinstance(step, Nonlinearity):
            total += entries * step.activation.flops
        elif isinstance(step, Pooling):
            total += entries * 2 * step.size**4
        else:
            total += entries * 2
    return total * components


def components_off_grid(group: str) -> int:
    """Different ``K[r, r']`` of a group off the grid: ``K[rs, r's] = K[r, r']`` for the ``s`` that are on it."""
    shared = {0: 4, 2: 2}.get(int(group[1:]) % 4, 1) * (2 if group[0] == "D" else 1)
    return order(group) ** 2 // shared


def _sizes(
    steps: tuple[Step, ...], size: tuple[int, int], group: str, network: Architecture
) -> Iterator[tuple[Step, tuple[int, int]]]:
    """Each step with the image size after it."""
    for step in steps:
        if isinstance(step, Convolution):
            rows, cols = (
                windows(side, radius, step.stride, network.padding).outputs
                for side, radius in zip(size, reach(group, step.radii), strict=True)
            )
            size = rows, cols
        elif isinstance(step, Pooling):
            size = size[0] // step.size, size[1] // step.size
        elif isinstance(step, Branch):
            yield from _sizes(step.steps, size, group, network)
        yield step, size
