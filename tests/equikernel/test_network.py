"""Networks as values: layers, image sizes that keep the symmetry, job files, and what is refused."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equikernel import (
    Activation,
    Architecture,
    AvgPool,
    Conv,
    Custom,
    GroupCNN,
    MemoryLimitError,
    NetworkError,
    Residual,
)
from equikernel.errors import EngineError, ImageError
from equikernel.geometry import windows

ONES = np.ones((1, 6, 6, 1))


def test_depth_is_the_shorthand_for_equal_layers() -> None:
    short = GroupCNN(group="C2", depth=2, filter_size=5, activation="erf", w_std=1.2, b_std=0.3)
    long = GroupCNN(group="C2", layers=[Conv(5, activation="erf")] * 2, w_std=1.2, b_std=0.3)
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 1))
    np.testing.assert_array_equal(short.kernel(x).ntk, long.kernel(x).ntk)


def test_what_a_layer_does_not_say_is_as_in_the_network() -> None:
    net = GroupCNN(layers=[Conv(3), Conv(3, w_std=2, b_std=0, activation="sin")], w_std=3, b_std=0.5, activation="erf")
    first, second = net.convolutions
    assert (first.w2, first.b2) == (9, 0.25)
    assert (second.w2, second.b2) == (4, 0)
    assert [str(activation) for activation in net.activations] == ["erf", "sin"]


def test_the_last_convolution_of_a_branch_has_no_activation() -> None:
    net = GroupCNN(layers=[Conv(3), Residual([Conv(3), Conv(3)])])
    assert len(net.convolutions) == 3
    assert len(net.activations) == 2


@pytest.mark.parametrize(
    "net",
    [
        GroupCNN(group="C8", depth=2, head=("erf",)),
        GroupCNN(layers=[Conv((3, 3), stride=2, activation="leaky_relu(0.1)"), AvgPool(2), Residual([Conv(3)])]),
        GroupCNN(layers=[Conv(5, activation="identity"), Activation("hermite(3)")], group="D4"),
    ],
)
def test_a_network_survives_json(net: GroupCNN) -> None:
    assert GroupCNN.model_validate_json(net.model_dump_json()) == net
    assert GroupCNN(**net.model_dump()) == net


def test_layers_and_depth_are_not_both_written() -> None:
    assert "layers" not in Architecture().model_dump()
    assert "depth" not in Architecture(layers=(Conv(3),)).model_dump()


def test_layers_are_sections_in_a_job_file() -> None:
    layers = [{"kind": "conv", "filter": 5}, {"kind": "residual", "layers": [{"kind": "conv"}]}]
    assert GroupCNN(layers=layers) == GroupCNN(layers=[Conv(5), Residual([Conv()])])


@settings(max_examples=200, deadline=None)
@given(
    side=st.integers(1, 40),
    radius=st.integers(0, 3),
    stride=st.integers(1, 4),
    padding=st.sampled_from(["SAME", "VALID"]),
)
def test_a_stride_is_accepted_where_mirrored_filters_lie_on_the_same_pixels(
    side: int, radius: int, stride: int, padding: Any
) -> None:
    net = GroupCNN(group="D1", padding=padding, layers=[Conv((1, 2 * radius + 1), stride=stride)])
    plain = GroupCNN(group="C1", padding=padding, layers=[Conv((1, 2 * radius + 1), stride=stride)])
    if not plain.fits(1, side, "C1"):
        assert not net.fits(1, side, "D1")
        return
    outputs, first = windows(side, radius, stride, padding)
    centres = {first + stride * i for i in range(outputs)}
    assert net.fits(1, side, "D1") == (centres == {side - 1 - centre for centre in centres})


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({"layers": [Conv(3, stride=2)]}, 8, "layers[0]: a stride of 2 on 8 pixels breaks the symmetry of C4"),
        ({"layers": [Conv(3, stride=2)]}, 8, "SAME needs (outputs - 1) · stride + filter - side = 1 to be even"),
        ({"layers": [Conv(3, stride=2)]}, 8, "nearest sides that work: 7 or 9"),
        ({"layers": [Conv(3, stride=3)], "padding": "VALID"}, 8, "VALID needs a stride that divides side - filter = 5"),
        ({"layers": [Conv(3, stride=3)], "padding": "VALID"}, 8, "nearest sides that work: 6 or 9"),
        ({"layers": [Conv(3, stride=2)], "padding": "CIRCULAR"}, 8, "a stride of 2 with CIRCULAR padding is not"),
        ({"layers": [Conv(3), AvgPool(3)]}, 8, "layers[1]: blocks of 3 pixels do not divide the 8 pixels there"),
        ({"layers": [Conv(3), AvgPool(3)]}, 8, "nearest sides that work: 6 or 9"),
        ({"layers": [Conv(3), AvgPool(2), AvgPool(2)]}, 6, "layers[2]: blocks of 2 pixels do not divide the 3"),
        ({"layers": [Conv(3), Residual([Conv(3, stride=3)])]}, 9, "layers[1].layers[0]: a stride of 3 makes fewer"),
        ({"layers": [Conv(3), Residual([AvgPool(2), Conv(3)])]}, 8, "layers[1].layers[0]: blocks of 2 pixels make"),
        ({"layers": [Conv(3), Residual([Conv(3)])], "padding": "VALID"}, 9, "[0]: a filter of 3x3 pixels with VALID"),
        ({"layers": [Conv((3, 5))]}, 9, "a filter of 3x5 pixels is no square, and C4 turns it; use a square filter"),
        ({"layers": [Conv(3), Conv(7)], "padding": "VALID"}, 8, "layers[1]: VALID padding: a filter of 7 pixels does"),
        ({"layers": [Conv(3), Conv(7)], "padding": "VALID"}, 8, "nearest sides that work: 9"),
        ({"depth": 3, "padding": "VALID"}, 6, "3 convolutions of size 3 remove 6 of 6 pixels per side; use depth <= 2"),
        ({"depth": 3, "padding": "VALID", "group": "C8"}, 12, "remove 12 of 12 pixels per side; use depth <= 2"),
        ({"depth": 1, "padding": "CIRCULAR", "group": "C8"}, 4, "a filter of 5 pixels (of 3 pixels, turned by C8)"),
        ({"layers": [Conv(7)], "padding": "CIRCULAR"}, 6, "wraps around the 6 there more than once; use a"),
        ({"layers": [Conv(3), AvgPool(97)]}, 5, "blocks of 97 pixels do not divide the 5 pixels there"),
        ({"layers": [Conv(3), AvgPool(97)]}, 5, "nearest sides that work: 97"),
        ({"layers": [Conv(3), AvgPool(97), AvgPool(97)]}, 5, "no sides up to 4096 work"),
    ],
)  # fmt: skip
def test_a_size_that_does_not_fit_is_refused_with_the_nearest_that_do(
    fields: dict[str, Any], size: int, message: str
) -> None:
    with pytest.raises(NetworkError, match=re.escape(message)):
        GroupCNN(**fields).kernel(np.ones((1, size, size, 1)))


SIZED_LAYERS = st.one_of(
    st.builds(Conv, st.sampled_from([1, 3, 5]), stride=st.integers(1, 3)),
    st.builds(AvgPool, st.integers(2, 4)),
)


@settings(max_examples=300, deadline=None)
@given(
    layers=st.lists(SIZED_LAYERS, max_size=3),
    names=st.sampled_from([("C1",), ("C2",), ("C4",), ("D1",), ("D4",), ("C8",), ("C1", "C4"), ("D1", "C2")]),
    padding=st.sampled_from(["SAME", "VALID", "CIRCULAR"]),
    height=st.integers(1, 24),
    width=st.integers(1, 24),
)
def test_every_size_that_a_refusal_names_works(
    layers: list[Any], names: tuple[str, ...], padding: Any, height: int, width: int
) -> None:
    if padding == "CIRCULAR":
        layers = [layer for layer in layers if getattr(layer, "stride", 1) == 1]
    net = Architecture(padding=padding, layers=(Conv(3), *layers))
    squares = not {"C1", "C2", "D1"}.issuperset(names)
    try:
        net.check_images(height, width, *names)
    except ImageError as error:
        message = str(error)
        for side in re.findall(r"crop them to (\d+)x|, (\d+)x\d+ does", message):
            net.check_images(*2 * (int("".join(side)),), *names)
        for other in re.findall(r"[CD][12]", message.partition("use the group")[2]):
            net.check_images(height, width, other)
        assert squares
        assert height != width
    except NetworkError as error:
        heights, widths = _nearest(str(error), height, width)
        assert heights != [height] or widths != [width]
        for one, other in product(heights, widths):
            if one == other or not squares:
                net.check_images(one, other, *names)


def _nearest(message: str, height: int, width: int) -> tuple[list[int], list[int]]:
    """The heights and widths that a message names; the given ones where it says nothing about them."""
    named = {
        name: [*map(int, re.findall(r"\d+", sides))] for name, sides in re.findall(r"(\w+) that work: ([^;]+)", message)
    }
    sides = named.get("sides")
    return sides or named.get("heights", [height]), sides or named.get("widths", [width])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": []}, "layers[0] is nothing, but the first layer is the lifting convolution; begin with a Conv"),
        ({"layers": [AvgPool(2)]}, "layers[0] is avg_pool, but the first layer is the lifting convolution"),
        ({"layers": [Conv()], "depth": 2}, "layers and depth = 2 both say which convolutions; keep one"),
        ({"layers": [Conv()], "filter_size": 5}, "layers and filter_size = 5 both say"),
        ({"layers": [Conv(), "relu"]}, "layers[1]: 'relu' is not allowed; a layer is a Conv, Activation, AvgPool or"),
        ({"layers": [Conv(), {"kind": "pool"}]}, "a layer is a Conv, Activation, AvgPool or Residual (in a job file"),
        ({"layers": [Conv(), {"kind": "conv", "stride": 0}]}, "layers[1].stride: 0 is not allowed; it must be a whole"),
        ({"layers": [Conv(), {"kind": "conv", "filtr": 3}]}, "layers[1].filtr: no such field; did you mean 'filter'?"),
        ({"layers": [Conv(), Residual([Activation("relu")])]}, "layers[1]: a residual branch ends in a convolution"),
        (
            {"layers": [Conv(), Residual([Conv(activation="relu")])]},
            "layers[1]: a residual branch ends in a convolution",
        ),
        ({"group": "C361"}, "or for small images any other C_n or D_n with n up to 360"),
        (
            {"layers": [Conv(stride=2)], "padding": "CIRCULAR", "group": "C1"},
            "with CIRCULAR padding is not supported",
        ),
        ({"group": "S4"}, "group: 'S4' is not allowed; choose C1, C2, C4, D1, D2, D4"),
    ],
)
def test_a_network_that_is_none_is_refused_in_words(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(NetworkError, match=re.escape(message)):
        GroupCNN(**fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv(4), "Conv: filter[0]: 4 is even, and an even filter has no centre pixel to rotate about; use 3"),
        (lambda: Conv(3, stride=1.5), "Conv: stride: 1.5 is not allowed; it must be a whole number of 1 or more"),
        (lambda: Conv(3, activation="rleu"), "did you mean 'relu'?"),
        (lambda: Conv(3, width=2), "Conv: width: no such field"),
        (lambda: AvgPool(0), "AvgPool: size: 0 is not allowed; it must be a whole number of 1 or more"),
        (lambda: Activation("hermite"), "Activation: activation: 'hermite' is not allowed"),
        (lambda: Residual([]), "Residual: layers: the branch is empty; give it layers"),
        (lambda: Residual([Conv(3), 3]), "Residual: layers[1]: 3 is not allowed; a layer is a Conv"),
    ],
)  # fmt: skip
def test_a_layer_that_is_none_is_refused_in_words(make: Any, message: str) -> None:
    with pytest.raises(NetworkError, match=re.escape(message)):
        make()


def test_explain_names_the_engine_its_reason_and_the_cost() -> None:
    fast = GroupCNN(group="C4").explain((32, 32, 3))
    assert fast.engine == "cpu"
    assert "offsets decouple" in fast.reason
    assert str(fast).startswith("engine 'cpu': offsets decouple")
    assert fast.flops == pytest.approx(4 * fast_flops_of_one_rotation())
    dense = GroupCNN(group="C4", layers=[Conv(3), AvgPool(2), Conv(3)]).explain((32, 32, 3))
    assert dense.engine == "general"
    assert dense.reason == "the pooling layers[1] does not keep the offset between pixels"
    assert dense.pair_bytes > 8 * 4 * 1024**2
    rotated = GroupCNN(group="C8").explain((16, 16, 3))
    assert rotated.reason == "C8 does not map the pixel grid to itself"
    asked = GroupCNN().explain((6, 6, 1), engine="reference")
    assert (asked.engine, asked.reason) == ("reference", "it was asked for")


def fast_flops_of_one_rotation() -> float:
    """Three layers of 3x3 filters and ReLU on 32x32x3 images, by hand."""
    entries = 1024**2
    return float(entries * (2 * 3 + (6 + 40) + 2 * (2 * 6 + 40)))


def test_explain_refuses_what_kernel_would_refuse() -> None:
    shapes: list[Any] = [(32, 32), 7, None, "777", (7.0, 7.0, 3.0), (True, 7, 3), (7, 7, 0)]
    for shape in shapes:
        with pytest.raises(ImageError, match=re.escape(f"image_shape = {shape!r} is no shape of an image")):
            GroupCNN().explain(shape)
    with pytest.raises(NetworkError, match="breaks the symmetry"):
        GroupCNN(layers=[Conv(3, stride=2)]).explain((8, 8, 1))
    with pytest.raises(EngineError, match="cannot do this network"):
        GroupCNN(group="C3").explain((8, 8, 1), engine="cpu")


def test_very_wide_images_have_kernels() -> None:
    net = GroupCNN(group="C1", depth=1)
    x = np.random.default_rng(0).normal(size=(2, 1, 2000, 1))
    np.testing.assert_allclose(net.kernel(x), net.kernel(x, engine="xla"), rtol=1e-5)
    assert net.explain((1, 17_000, 1)).engine == "cpu"


def test_sizes_that_are_named_work_for_all_groups() -> None:
    net = GroupCNN(layers=[Conv(3, stride=2), AvgPool(2)])
    with pytest.raises(NetworkError, match=r"nearest sides that work: 3 or 7$"):
        net.kernel(np.ones((1, 6, 6, 1)), groups=("C1", "C4"))
    net.kernel(np.ones((1, 7, 7, 1)), groups=("C1", "C4"))


def test_what_no_memory_holds_is_refused_with_both_numbers() -> None:
    message = r"the engine 'general' needs \d+\.\d MiB for a pair of 12x12x1 images, and may use 1.0 MiB; use smaller"
    with pytest.raises(MemoryLimitError, match=message):
        GroupCNN(group="C8", depth=1).kernel(np.ones((1, 12, 12, 1)), memory_limit=2**20)
    with pytest.raises(MemoryLimitError, match=r"use memory_limit=\d+$") as refused:
        GroupCNN(group="C1", depth=1).kernel(np.ones((1, 1, 1, 1)), memory_limit=1000)
    GroupCNN(group="C1", depth=1).kernel(np.ones((1, 1, 1, 1)), memory_limit=int(str(refused.value).rpartition("=")[2]))
    with pytest.raises(MemoryLimitError, match=r"the kernels of 3000000 against 3000000 images take \d+\.\d TiB"):
        GroupCNN(depth=1).kernel(np.broadcast_to(ONES, (3_000_000, 6, 6, 1)))
    limits: list[Any] = [0, "1GB", float("nan"), 1e9]
    for limit in limits:
        with pytest.raises(EngineError, match=f"memory_limit = {limit!r}; give a whole number of bytes"):
            GroupCNN(depth=1).kernel(ONES, memory_limit=limit)


@pytest.mark.parametrize("group", ["C3", "C8", "D3"])
def test_groups_off_the_grid_need_a_pass_of_their_own(group: str) -> None:
    with pytest.raises(NetworkError, match=f"it needs a pass of its own, GroupCNN\\(group='{group}'\\)"):
        GroupCNN(depth=1).kernel(ONES, groups=("C1", group))


def test_a_custom_activation_is_named_in_json_and_does_not_come_back() -> None:
    net = GroupCNN(activation=Custom(np.tanh), head=(Custom(np.cos),))
    assert '"custom tanh"' in net.model_dump_json()
    with pytest.raises(ValueError, match="'custom tanh' is not allowed"):
        GroupCNN.model_validate_json(net.model_dump_json())


def test_an_architecture_has_a_network_over_each_group() -> None:
    for architecture in (Architecture(depth=2, b_std=0.3), Architecture(layers=(Conv(5),), activation=Custom(np.tanh))):
        assert architecture.with_group("D4").model_copy(update={"group": "C1"}) == architecture.with_group("C1")
        assert architecture.with_group("C8").steps == architecture.steps


IDENTITY = {"activation": "identity"}


@pytest.mark.parametrize(
    ("layers", "place", "before"),
    [
        ([Conv(3), Activation("relu")], "layers[1]", "layers[0]"),
        ([Conv(3, **IDENTITY), Activation("erf"), Activation("relu")], "layers[2]", "layers[1]"),
        ([Conv(3), Residual([Activation("relu"), Conv(3)])], "layers[1].layers[0]", "layers[0]"),
        ([Conv(3), Residual([Conv(3)]), Activation("relu")], "layers[2]", "layers[0]"),
        ([Conv(3), AvgPool(2), Activation("relu")], "layers[2]", "layers[0]"),
    ],
)
def test_an_activation_of_features_that_are_not_gaussian_is_refused(layers: Any, place: str, before: str) -> None:
    with pytest.raises(NetworkError) as error:
        GroupCNN(layers=layers)
    assert str(error.value).startswith(f"{place}: ")
    assert f"the activation of {before} and no convolution since; they are not Gaussian" in str(error.value)


def test_one_layer_needs_no_list() -> None:
    assert GroupCNN(layers=[Conv(3), Residual(Conv(3))]) == GroupCNN(layers=[Conv(3), Residual([Conv(3)])])
    assert GroupCNN(layers=Conv(3)) == GroupCNN(layers=[Conv(3)])


def test_sums_and_means_of_gaussian_features_may_be_activated() -> None:
    branch = Residual([Activation("relu"), Conv(3)])
    net = GroupCNN(layers=[Conv(3, **IDENTITY), branch, branch, AvgPool(2), Activation("relu")])
    assert len(net.activations) == 3


def test_a_copy_with_other_values_is_another_network() -> None:
    net = GroupCNN(depth=2, w_std=1.5)
    assert len(net.convolutions) == 2
    copy = net.model_copy(update={"depth": 4})
    assert len(copy.convolutions) == 4
    assert copy == GroupCNN(depth=4, w_std=1.5)
    with pytest.raises(NetworkError, match="filter_size: 2 is even"):
        net.model_copy(update={"filter_size": 2})
