from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jsonschema
import pytest

from cspdeploy.check.latency import LatencySettings
from cspdeploy.core.codec import to_json
from cspdeploy.core.schema import json_schema


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    """A leaf.

    Of no interest.
    """

    value: float
    next: _Leaf | None = None


@dataclass(frozen=True, kw_only=True)
class _Tree:
    """A tree of
    leaves."""

    schema_version: int = 3
    name: str
    kind: Literal["oak", "elm"]
    leaves: tuple[_Leaf, ...]
    size: tuple[int, str]
    counts: dict[str, int | None] = field(default_factory=dict)
    anything: Any = None
    tall: bool = False


TREE = _Tree(
    name="a", kind="oak", leaves=(_Leaf(value=float("nan")), _Leaf(value=1.0, next=_Leaf(value=float("-inf")))),
    size=(1, "m"), counts={"x": 1, "y": None}, anything=[1, {"z": None}],
)  # fmt: skip


@pytest.fixture
def schema() -> dict[str, Any]:
    made = json_schema(_Tree, title="tree")
    jsonschema.Draft202012Validator.check_schema(made)
    return made


def test_what_the_codec_writes_is_valid(schema: dict[str, Any]) -> None:
    written = json.loads(json.dumps(to_json(TREE), allow_nan=False))
    assert written["leaves"][0]["value"] == "nan"
    jsonschema.validate(written, schema)


def test_it_says_what_it_is_of(schema: dict[str, Any]) -> None:
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert (schema["title"], schema["description"]) == ("tree", "A tree of leaves.")
    assert schema["$defs"]["_Leaf"]["description"] == "A leaf."
    assert list(schema["$defs"]) == ["_Leaf"]


def _drop(data: dict[str, Any]) -> None:
    del data["counts"]


@pytest.mark.parametrize(
    "break_it",
    [
        lambda data: data.update(extra=1), _drop, lambda data: data.update(schema_version=4),
        lambda data: data.update(kind="ash"), lambda data: data.update(name=None), lambda data: data.update(tall=1),
        lambda data: data.update(size=[1]), lambda data: data.update(size=[1, "m", 2]),
        lambda data: data.update(size=["m", 1]), lambda data: data["counts"].update(x="1"),
        lambda data: data["leaves"][0].update(value="NaN"), lambda data: data["leaves"][1]["next"].pop("value"),
        lambda data: data.update(leaves={}),
    ],
)  # fmt: skip
def test_anything_else_is_not_valid(schema: dict[str, Any], break_it: Callable[[dict[str, Any]], object]) -> None:
    data = to_json(TREE)
    break_it(data)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, schema)


def test_what_has_no_form_in_json_is_refused_with_its_place() -> None:
    @dataclass
    class Bad:
        """Bad."""

        what: set[int]

    with pytest.raises(TypeError, match=r"Bad\.what: set\[int\]"):
        json_schema(Bad, title="bad")


def test_a_dataclass_of_ours_without_others() -> None:
    made = json_schema(LatencySettings, title="settings")
    assert "$defs" not in made
    jsonschema.validate(to_json(LatencySettings()), made)
