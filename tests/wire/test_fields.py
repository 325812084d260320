"""Dataclasses of what travels: a field of another type is refused by its name, wherever in it the wrong value is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest

from lorasync.wire.fields import made


@dataclass(frozen=True, kw_only=True)
class Parcel:
    kind: ClassVar[str] = "parcel"
    name: str
    count: int = 0
    seconds: float = 0.0
    open: bool = False
    colour: Literal["red", "green"] = "red"
    sizes: tuple[int, ...] = ()
    places: dict[str, dict[str, str]] = field(default_factory=dict)
    note: str | None = None
    rest: Any = None


ALL = {
    "name": "a",
    "count": 2,
    "seconds": 0.5,
    "open": True,
    "colour": "green",
    "sizes": (1, 2),
    "places": {"x": {"y": "z"}},
    "note": "n",
    "rest": [object],
}


def test_all_fields_arrive_and_those_left_out_have_their_defaults():
    assert made(Parcel, ALL) == Parcel(**ALL)
    assert made(Parcel, {"name": "a"}) == Parcel(name="a")


@pytest.mark.parametrize(
    ("name", "sent", "got"),
    [("sizes", [1, 2], (1, 2)), ("seconds", 3, 3.0), ("note", None, None), ("sizes", [], ())],
)
def test_what_a_route_makes_of_a_value_is_made_right(name, sent, got):
    found = getattr(made(Parcel, {"name": "a", name: sent}), name)
    assert found == got
    assert type(found) is type(got)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("name", None, "name: got NoneType, expected str"),
        ("name", b"a", "name: got bytes, expected str"),
        ("count", True, "count: got bool, expected int"),
        ("count", 2.0, "count: got float, expected int"),
        ("open", 1, "open: got int, expected bool"),
        ("seconds", "1", "seconds: got str, expected float"),
        ("seconds", True, "seconds: got bool, expected float"),
        ("seconds", float("nan"), "seconds: got float, expected float"),
        ("seconds", float("inf"), "seconds: got float, expected float"),
        ("colour", "blue", r"colour: got 'blue', expected one of red, green"),
        ("colour", ["red"], r"colour: got \['red'\], expected one of red, green"),
        ("sizes", 1, "sizes: got int, expected tuple"),
        ("sizes", "12", "sizes: got str, expected tuple"),
        ("sizes", [1, "2"], r"sizes\[1\]: got str, expected int"),
        ("places", [], "places: got list, expected dict"),
        ("places", {"x": "y"}, r"places\['x'\]: got str, expected dict"),
        ("places", {"x": {"y": 1}}, r"places\['x'\]\['y'\]: got int, expected str"),
        ("places", {1: {}}, "places: got int, expected str"),
        ("note", 1, "note: got int, expected str"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_name(name, value, said):
    with pytest.raises(TypeError, match=f"^{said}"):
        made(Parcel, {"name": "a", name: value})


def test_missing_and_unknown_fields_are_named_and_so_is_what_is_no_dict():
    with pytest.raises(TypeError, match="'name'"):
        made(Parcel, {})
    with pytest.raises(TypeError, match=r"got the unknown fields 'kind', 'more', 5"):
        made(Parcel, {"name": "a", "more": 1, "kind": "parcel", 5: 1})
    for other in (None, [], "name", [("name", "a")]):
        with pytest.raises(TypeError, match=f"got {type(other).__name__}, expected dict"):
            made(Parcel, other)
