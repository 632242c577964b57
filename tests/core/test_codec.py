from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    size: int
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    name: str
    flag: bool
    kind: Literal["a", "b"]
    stride: Literal[1, 2]
    leaves: tuple[Leaf, ...]
    pair: tuple[int, str]
    shape: tuple[int | str, ...]
    counts: dict[str, int]
    note: str | None = None

    def __post_init__(self) -> None:
        if self.name == "forbidden":
            raise ValueError("name: got 'forbidden'")


GOOD: dict[str, Any] = {
    "name": "t", "flag": True, "kind": "a", "stride": 2, "leaves": [{"size": 1, "ratio": 0.5}], "pair": [3, "x"],
    "shape": ["N", 3], "counts": {"k": 1}, "note": None,
}  # fmt: skip

words = st.text('aé"\\\n\0\u2028😀', max_size=5)
leaves = st.builds(Leaf, size=st.integers(), ratio=st.floats(allow_nan=False))
trees = st.builds(
    Tree,
    name=words,
    leaves=st.lists(leaves, max_size=3).map(tuple),
    pair=st.tuples(st.integers(), words),
    shape=st.lists(st.integers() | words, max_size=4).map(tuple),
    counts=st.dictionaries(words, st.integers(), max_size=3),
    note=st.none() | words,
)


@given(trees)
def test_survives_the_trip_through_json_text(tree: Tree) -> None:
    assert from_json(Tree, json.loads(json.dumps(to_json(tree), allow_nan=False))) == tree


def test_model_spec_survives_the_trip(tiny_spec: ModelSpec) -> None:
    assert from_json(ModelSpec, json.loads(json.dumps(to_json(tiny_spec)))) == tiny_spec


def test_nan_is_written_as_a_word_and_read_back() -> None:
    data = to_json(Leaf(size=1, ratio=math.nan))
    assert data == {"size": 1, "ratio": "nan"}
    assert math.isnan(from_json(Leaf, data).ratio)


def test_default_may_be_absent_and_whole_numbers_serve_as_floats() -> None:
    without_note = {key: value for key, value in GOOD.items() if key != "note"}
    assert from_json(Tree, without_note).note is None
    ratio = from_json(Leaf, {"size": 1, "ratio": 2}).ratio
    assert ratio == 2.0
    assert isinstance(ratio, float)


@pytest.mark.parametrize(
    ("key", "value", "path"),
    [
        ("extra", 1, "$.extra"),
        ("name", 1, "$.name"),
        ("name", None, "$.name"),
        ("name", "forbidden", "$"),
        ("flag", 1, "$.flag"),
        ("kind", "c", "$.kind"),
        ("kind", ["a"], "$.kind"),
        ("stride", 3, "$.stride"),
        ("leaves", {}, "$.leaves"),
        ("leaves", [{"size": 1, "ratio": 0.5}, 7], "$.leaves[1]"),
        ("leaves", [{"size": 1}], "$.leaves[0].ratio: missing"),
        ("leaves", [{"size": True, "ratio": 0.5}], "$.leaves[0].size"),
        ("leaves", [{"size": 1.0, "ratio": 0.5}], "$.leaves[0].size"),
        ("leaves", [{"size": 1, "ratio": "much"}], "$.leaves[0].ratio"),
        ("leaves", [{"size": 1, "ratio": True}], "$.leaves[0].ratio"),
        ("pair", [1], "$.pair"),
        ("pair", ["x", 1], "$.pair[0]"),
        ("shape", ["N", None], "$.shape[1]"),
        ("shape", [True], "$.shape[0]"),
        ("counts", [], "$.counts"),
        ("counts", {"k": "1"}, "$.counts.k"),
        ("note", 1, "$.note"),
    ],
)
def test_bad_field_is_named_by_its_path(key: str, value: object, path: str) -> None:
    with pytest.raises(InputError) as caught:
        from_json(Tree, {**GOOD, key: value})
    assert caught.value.message.startswith(path)


@pytest.mark.parametrize("stride", [True, 2.0])
def test_a_literal_takes_only_its_own_type(stride: object) -> None:
    with pytest.raises(InputError, match=r"\$\.stride"):
        from_json(Tree, {**GOOD, "stride": stride})


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_only_an_object_is_a_dataclass(data: object) -> None:
    with pytest.raises(InputError, match="expected an object"):
        from_json(Leaf, data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Circle:
    type: Literal["circle"] = "circle"
    radius: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Square:
    type: Literal["square"] = "square"
    side: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    shapes: tuple[Circle | Square, ...]


def test_member_of_a_union_is_chosen_by_its_type() -> None:
    """Its error is told, not that of the last member."""
    good = Shapes(shapes=(Circle(radius=1), Square(side=2)))
    assert from_json(Shapes, to_json(good)) == good
    with pytest.raises(InputError, match=r"\$\.shapes\[0\]\.radius: got str, expected int"):
        from_json(Shapes, {"shapes": [{"type": "circle", "radius": "one"}]})
    with pytest.raises(InputError):
        from_json(Shapes, {"shapes": [{"type": "hexagon", "side": 1}]})
