"""The grid symmetries: a group, which acts on offsets and images alike."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from equikernel.groups import GRID_GROUPS, Symmetry, keeps_rectangles, multiplication_table, symmetries, union

D4 = symmetries("D4")
IMAGES = np.random.default_rng(0).normal(size=(1, 5, 5, 2))


def test_the_groups_have_the_orders_of_rotations_and_reflections() -> None:
    orders = {group: len(set(symmetries(group))) for group in GRID_GROUPS}
    assert orders == {"C1": 1, "C2": 2, "C4": 4, "D1": 2, "D2": 4, "D4": 8}


@pytest.mark.parametrize("group", GRID_GROUPS)
def test_the_table_is_that_of_a_group_whose_first_element_is_the_identity(group: str) -> None:
    table = multiplication_table(group)
    places = np.arange(len(table))
    np.testing.assert_array_equal(table[0], places)
    np.testing.assert_array_equal(table[:, 0], places)
    for line in (*table, *table.T):
        np.testing.assert_array_equal(np.sort(line), places)
    for a, b, c in product(places, repeat=3):
        assert table[table[a, b], c] == table[a, table[b, c]]


@pytest.mark.parametrize(("a", "b"), list(product(D4, D4)), ids=str)
def test_a_product_acts_as_one_after_the_other(a: Symmetry, b: Symmetry) -> None:
    np.testing.assert_array_equal((a * b).on_images(IMAGES), a.on_images(b.on_images(IMAGES)))
    assert (a * b).on_offset((1, 2)) == a.on_offset(b.on_offset((1, 2)))


@pytest.mark.parametrize("element", D4, ids=str)
def test_a_pixel_of_a_moved_image_is_where_its_offset_from_the_centre_moves(element: Symmetry) -> None:
    moved = element.on_images(IMAGES)[0]
    for dy, dx in product(range(-2, 3), repeat=2):
        y, x = element.on_offset((dy, dx))
        np.testing.assert_array_equal(moved[2 + y, 2 + x], IMAGES[0, 2 + dy, 2 + dx])


def test_d1_is_the_left_right_mirror_and_d2_adds_the_up_down_one() -> None:
    np.testing.assert_array_equal(symmetries("D1")[1].on_images(IMAGES), IMAGES[:, :, ::-1])
    flips = [element.on_images(IMAGES) for element in symmetries("D2")]
    for expected in (IMAGES, IMAGES[:, :, ::-1], IMAGES[:, ::-1], IMAGES[:, ::-1, ::-1]):
        assert sum(np.array_equal(one, expected) for one in flips) == 1


def test_a_union_holds_each_element_once_and_the_identity_first() -> None:
    assert union(("C4", "C2", "C1")) == symmetries("C4")
    assert union(("D1", "C4")) == (*symmetries("C4"), symmetries("D1")[1])


def test_quarter_turns_need_square_images() -> None:
    assert [group for group in GRID_GROUPS if keeps_rectangles(group)] == ["C1", "C2", "D1", "D2"]
