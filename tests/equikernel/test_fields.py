"""What is wrong with a value, in words: one line per field, with the value and what is allowed."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from equikernel import GroupCNN, NetworkError
from equikernel.fields import allowed, describe


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def even(value: int) -> int:
    if value % 2:
        raise ValueError(f"{value} is odd; use {value + 1}")
    return value


class Paint(Strict):
    colour: Literal["red", "green"] = "red"
    layers: int = Field(default=1, ge=1, le=9, strict=True)
    thickness: float = Field(default=1, gt=0, lt=2, strict=True)
    place: Annotated[str, "a path or URL"] | None = None


class House(Strict):
    name: str
    paint: Paint = Paint()
    roof: Paint | None = None
    floors: Literal["auto"] | Annotated[int, Field(ge=0, strict=True)] = "auto"
    windows: Annotated[int, AfterValidator(even), Field(le=8)] = 2
    rooms: tuple[Literal["kitchen", "bath"], ...] = ()
    sizes: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    doors: tuple[Paint, ...] = ()


def problem(fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        House.model_validate(fields)
    return describe(caught.value, House)


def wrong(**fields: Any) -> str:
    return problem({"name": "a", **fields})


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("name", "text"),
        ("paint", "a section with the fields colour, layers, thickness, place"),
        ("roof", "null, or a section with the fields colour, layers, thickness, place"),
        ("floors", "'auto' or a whole number of 0 or more"),
        ("windows", "a whole number up to 8"),
        ("rooms", "a list of 'kitchen' or 'bath'"),
        ("sizes", "a list of numbers of 0 or more, or null"),
    ],
)
def test_what_a_field_may_be_follows_from_its_type(field: str, words: str) -> None:
    assert allowed(House, field) == words


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("colour", "'red' or 'green'"),
        ("layers", "a whole number from 1 to 9"),
        ("thickness", "a number above 0 and below 2"),
        ("place", "a path or URL, or null"),
    ],
)
def test_the_bounds_of_a_number_and_a_text_of_its_own_are_part_of_it(field: str, words: str) -> None:
    assert allowed(Paint, field) == words


def test_a_wrong_choice_names_the_choices_and_the_nearest() -> None:
    assert wrong(paint={"colour": "Green"}) == (
        "paint.colour: 'Green' is not allowed; choose 'red' or 'green'; did you mean 'green'?"
    )


def test_a_typing_mistake_in_a_list_names_the_entry() -> None:
    assert wrong(rooms=["bath", "kitchn"]) == (
        "rooms[1]: 'kitchn' is not allowed; choose 'kitchen' or 'bath'; did you mean 'kitchen'?"
    )


def test_a_value_that_fits_no_member_of_a_union_is_one_line() -> None:
    for value in ("many", -1, 1.5, True, None):
        given = "nothing (null)" if value is None else repr(value)
        assert wrong(floors=value) == f"floors: {given} is not allowed; choose 'auto' or a whole number of 0 or more"


def test_a_section_that_is_none_is_described_by_its_fields() -> None:
    section = "a section with the fields colour, layers, thickness, place"
    assert wrong(paint=3) == f"paint: 3 is not allowed; it must be {section}"
    assert wrong(paint=None) == f"paint: nothing (null) is not allowed; it must be {section}"
    assert wrong(roof=[1]) == f"roof: [1] is not allowed; it must be null, or {section}"


def test_a_field_in_a_section_in_a_list_has_its_whole_name() -> None:
    assert wrong(doors=[{}, {"layers": 0}]) == (
        "doors[1].layers: 0 is not allowed; it must be a whole number from 1 to 9"
    )


def test_an_unknown_field_names_the_nearest_and_all() -> None:
    assert wrong(roomz=3) == (
        "roomz: no such field; did you mean 'rooms'? Allowed here: "
        "name, paint, roof, floors, windows, rooms, sizes, doors"
    )
    assert wrong(roof={"zzz": 3}) == "roof.zzz: no such field. Allowed here: colour, layers, thickness, place"


def test_a_field_in_the_wrong_section_is_sent_to_the_right_one() -> None:
    assert wrong(colour="red").startswith("colour: no such field; did you mean paint.colour? Allowed here: ")
    assert wrong(paint={"windows": 2}).startswith("paint.windows: no such field; it belongs to the top level. ")


def test_what_is_required_is_asked_for_in_words() -> None:
    assert problem({}) == "name: this field is required; give text"


def test_a_key_that_is_no_text_is_no_field() -> None:
    assert wrong(paint={3: 1}) == (
        "paint: 3 is not the name of a field. Allowed here: colour, layers, thickness, place"
    )


def test_what_is_no_mapping_at_all_is_described() -> None:
    assert problem([1]).startswith("[1] is not allowed; it must be a section with the fields name, paint, ")


def test_a_validator_of_our_own_speaks_for_itself() -> None:
    assert wrong(windows=3) == "windows: 3 is odd; use 4"


def test_a_number_where_text_belongs_is_told_how_to_become_text() -> None:
    assert problem({"name": 2024}) == (
        "name: 2024 is not allowed; it must be text; a number that is meant as text needs quotes"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "x", "1.5", True, None, [1.5], 0, 2])
def test_what_is_no_number_in_the_range_is_refused_with_the_range(value: Any) -> None:
    assert wrong(paint={"thickness": value}).endswith("is not allowed; it must be a number above 0 and below 2")


def test_a_huge_value_is_shortened() -> None:
    for value in ("x" * 10_000, list(range(10_000)), {str(i): i for i in range(10_000)}, 10**1000):
        assert len(wrong(paint={"colour": value})) < 160


def test_a_value_that_holds_itself_is_described() -> None:
    loop: dict[str, Any] = {}
    loop["colour"] = loop
    assert "paint.colour: {" in wrong(paint=loop)


def test_every_wrong_field_has_a_line() -> None:
    lines = wrong(paint={"colour": "blue", "layers": 0}, floors="x").splitlines()
    assert [line.split(":")[0] for line in lines] == ["paint.colour", "paint.layers", "floors"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"group": "C0"},
            "group: 'C0' is not allowed; choose C1, C2, C4, D1, D2, D4, or for small images any other C_n",
        ),
        ({"depht": 3}, "depht: no such field; did you mean 'depth'? Allowed here: depth, filter_size, layers, "),
        ({"depth": 0}, "depth: 0 is not allowed; it must be a whole number from 1 to 1000"),
        ({"depth": 2.0}, "depth: 2.0 is not allowed; it must be a whole number from 1 to 1000"),
        ({"filter_size": 4}, "filter_size: 4 is even, and an even filter has no centre pixel to rotate about; use 3"),
        ({"filter_size": -1}, "filter_size: -1 is not allowed; it must be an odd number of 1 or more"),
        ({"padding": "same"}, "choose 'SAME', 'VALID' or 'CIRCULAR'; did you mean 'SAME'?"),
        (
            {"activation": "tanh"},
            "activation: 'tanh' is not allowed; choose relu, leaky_relu(a), abs, erf, gelu, sin, ",
        ),
        ({"w_std": 0}, "w_std: 0 is not allowed; it must be a number above 0 and up to 1000000"),
        ({"w_std": True}, "w_std: True is not allowed; it must be a number above 0 and up to 1000000"),
        ({"b_std": "0"}, "b_std: '0' is not allowed; it must be a number from 0 to 1000000"),
        ({"head": ["relu", "eerf"]}, "head[1]: 'eerf' is not allowed; choose relu, leaky_relu(a), abs, "),
        ({"head": 3}, "head: 3 is not allowed; it must be a list of relu, leaky_relu(a), abs, "),
    ],
)
def test_a_wrong_network_is_refused_in_words(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(NetworkError) as caught:
        GroupCNN(**fields)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
