"""What the mathematics demands of the literal recursion at every layer, before any engine makes use of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from equikernel import Activation, AvgPool, Conv, GroupCNN, Residual, recursion
from equikernel.groups import GRID_GROUPS, Symmetry, multiplication_table, order, symmetries
from equikernel.images import Labels

Array = NDArray[np.float64]

LAYERS = (
    Conv(3, activation="gelu"),
    Conv(1, activation="identity", w_std=1.3),
    Residual([Activation("erf"), Conv(3)]),
    AvgPool(2),
    Conv(1),
)


def kernels_of_all_layers(net: GroupCNN, x1: Array, x2: Array) -> list[tuple[Array, Array]]:
    """``K[p, r, r', t, t']`` and Θ after every step."""
    found: list[tuple[Array, Array]] = []
    q1, _ = recursion.variances(net, net.group, x1, Labels("x1"))
    q2, _ = recursion.variances(net, net.group, x2, Labels("x2"))
    k = recursion.input_kernel(x1, x2, net.group)
    recursion.propagate(net, net.group, k, iter(zip(q1, q2, strict=True)), lambda *both: found.append(both))
    return found


def inverse(element: Symmetry) -> Symmetry:
    return next(other for other in symmetries("D4") if other * element == Symmetry(mirrored=False, turns=0))


def moved(x: Array, element: Symmetry, shift: tuple[int, int], axes: tuple[int, int] = (1, 2)) -> Array:
    """``ρ(h) f`` on the torus, for ``h`` the translation by ``shift`` after ``element`` about the centre."""
    return np.roll(element.on_images(x, axes), shift, axes)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data(), group=st.sampled_from(GRID_GROUPS), seed=st.integers(0, 2**32 - 1))
def test_kernels_of_moved_images_are_the_kernels_at_moved_group_elements(
    data: st.DataObject, group: str, seed: int
) -> None:
    """``K_{g,g'}(ρ(h)f, ρ(h')f') = K_{h⁻¹g, h'⁻¹g'}(f, f')`` for NNGP and NTK at every layer."""
    elements = symmetries(group)
    h1, h2 = (data.draw(st.sampled_from(elements)) for _ in range(2))
    shift1, shift2 = ((2 * data.draw(st.integers(0, 1)), 2 * data.draw(st.integers(0, 1))) for _ in range(2))
    rng = np.random.default_rng(seed)
    x1, x2 = rng.normal(size=(2, 1, 4, 4, 2))
    net = GroupCNN(group=group, padding="CIRCULAR", layers=LAYERS, b_std=0.2)

    before = kernels_of_all_layers(net, x1, x2)
    after = kernels_of_all_layers(net, moved(x1, h1, shift1), moved(x2, h2, shift2))
    rows = [elements.index(inverse(h1) * r) for r in elements]
    cols = [elements.index(inverse(h2) * r) for r in elements]
    for both, both_moved in zip(before, after, strict=True):
        scale = 4 // both[0].shape[3]  # after the pooling, the shift in pixels is half as large
        for kernel, kernel_moved in zip(both, both_moved, strict=True):
            there = kernel[:, rows][:, :, cols]
            there = moved(there, h1, (shift1[0] // scale, shift1[1] // scale), axes=(3, 4))
            there = moved(there, h2, (shift2[0] // scale, shift2[1] // scale), axes=(5, 6))
            np.testing.assert_allclose(kernel_moved, there, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR"])
@pytest.mark.parametrize(("group", "shared"), [("C4", 4), ("C8", 4), ("C6", 2), ("C3", 1), ("D4", 8), ("D3", 2)])
def test_only_the_difference_of_elements_on_the_grid_matters(group: str, shared: int, padding: str) -> None:
    """``K[rs, r's] = K[r, r']`` for the ``s`` that map pixels to pixels, at every layer."""
    rng = np.random.default_rng(0)
    x1, x2 = rng.normal(size=(2, 1, 5, 5, 1))
    net = GroupCNN(group=group, depth=2 if padding != "VALID" else 1, padding=padding, b_std=0.1)
    table = multiplication_table(group)
    on_grid = [place for place, element in enumerate(symmetries(group)) if element.on_grid]
    assert len(on_grid) == shared
    for kernels in kernels_of_all_layers(net, x1, x2):
        for kernel in kernels:
            for s in on_grid:
                rs = table[:, s]
                np.testing.assert_allclose(kernel[:, rs][:, :, rs], kernel, rtol=1e-12, atol=1e-14)


def test_rotated_filters_off_the_grid_keep_their_weight() -> None:
    """Each tap is spread over at most four pixels with weights that sum to 1."""
    for group in ("C3", "C5", "C8", "D6"):
        assert len(symmetries(group)) == order(group)
        for element in symmetries(group):
            for offset in ((0, 0), (1, 1), (-1, 2)):
                pixels = element.splat(offset)
                assert len({pixel for pixel, _ in pixels}) == len(pixels) <= 4
                assert abs(sum(weight for _, weight in pixels) - 1) < 1e-14
                y, x = (sum(weight * pixel[axis] for pixel, weight in pixels) for axis in range(2))
                assert abs(np.hypot(y, x) - np.hypot(*offset)) < 1e-12


@pytest.mark.parametrize("group", ["C3", "C8", "D3"])
def test_a_constant_image_looks_the_same_through_all_filters(group: str) -> None:
    """On the torus: then the kernel is that of the plain CNN."""
    x = np.full((1, 5, 5, 2), 0.7)
    plain = GroupCNN(group="C1", depth=2, padding="CIRCULAR", b_std=0.3).kernel(x, engine="reference")
    kernel = GroupCNN(group=group, depth=2, padding="CIRCULAR", b_std=0.3).kernel(x, engine="reference")
    np.testing.assert_allclose(kernel.nngp, plain.nngp, rtol=1e-14)
    np.testing.assert_allclose(kernel.ntk, plain.ntk, rtol=1e-6)  # c comes near the branch point
