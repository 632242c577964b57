from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from cspdeploy.core.errors import InputError
from cspdeploy.quant.place import Layout
from cspdeploy.quant.plan import Grid, QuantPlan, WeightGrid
from cspdeploy.quant.qat_file import QatOrigin, find_qat, graph_fingerprint, load_qat, qat_path, write_qat

ORIGIN = QatOrigin(weights_sha256="abc", placement="ort-cpu", fingerprint="f", height_px=32, width_px=24)
LAYOUT = Layout(
    tensors=("x",), groups=(), followed_by={}, nodes=frozenset({"y"}), float_nodes={}, weights={"w": 0},
    biases={"b": ("x", "w")},
)  # fmt: skip
GRAPH = """
    <ir_version: 8, opset_import: ["": 18]>
    g (float[1, 1, 2, 2] x) => (float[1, 1, 2, 2] y)
    <float[1, 1, 1, 1] w = {1.0}, float[1] b = {0.0}> { y = Conv<%s>(x, w, b) }
"""


@pytest.fixture
def plan() -> QuantPlan:
    grid = WeightGrid(scales=np.asarray([0.1, 0.2], np.float32), axis=0, limit=63)
    integers = np.asarray([[-63, 0, 5], [1, 2, 63]], np.int8)
    return QuantPlan(
        grids={"x": Grid(scale=0.017234, zero_point=3, dtype="uint8")}, weights={"w": grid},
        values={"w": grid.dequantise(integers), "b": np.asarray([0.1, -7.5e-9], np.float32)},
        integers={"w": integers}, biases={"b": ("x", "w")},
    )  # fmt: skip


@pytest.fixture
def path(plan: QuantPlan, tmp_path: Path) -> Path:
    write_qat(tmp_path / "qat-ort-cpu.safetensors", plan, origin=ORIGIN, record={"before": {"top1": 0.5}})
    return tmp_path / "qat-ort-cpu.safetensors"


def test_plan_comes_back_to_the_bit(plan: QuantPlan, path: Path) -> None:
    found = load_qat(path)
    assert (found.origin, found.record, found.path) == (ORIGIN, {"before": {"top1": 0.5}}, path)
    assert (found.plan.grids, found.plan.biases) == (plan.grids, plan.biases)
    assert (found.plan.weights["w"].axis, found.plan.weights["w"].limit) == (0, 63)
    assert np.array_equal(found.plan.weights["w"].scales, plan.weights["w"].scales)
    for got, made in ((found.plan.values, plan.values), (found.plan.integers, plan.integers)):
        assert {name: value.tobytes() for name, value in got.items()} == {
            name: value.tobytes() for name, value in made.items()
        }
    assert find_qat(path.parent, "ort-cpu") == path == qat_path(path.parent, "ort-cpu")
    assert find_qat(path.parent, "openvino") is None


def test_same_plan_gives_the_same_bytes(plan: QuantPlan, path: Path, tmp_path: Path) -> None:
    other = tmp_path / "again" / "qat.safetensors"
    write_qat(other, plan, origin=ORIGIN, record={"before": {"top1": 0.5}})
    assert other.read_bytes() == path.read_bytes()
    assert [one.name for one in other.parent.iterdir()] == [other.name]


def test_weights_that_are_not_rounded_yet_come_back_as_they_are(plan: QuantPlan, tmp_path: Path) -> None:
    values = {**plan.values, "w": np.asarray([[0.123, 0.0, 1.0], [0.5, 0.25, 0.1]], np.float32)}
    write_qat(tmp_path / "start", dataclasses.replace(plan, values=values, integers={}), origin=ORIGIN, record={})
    found = load_qat(tmp_path / "start").plan
    assert not found.integers
    assert np.array_equal(found.values["w"], values["w"])


def test_fits_what_it_was_trained_for(path: Path) -> None:
    load_qat(path).require_fit(ORIGIN, LAYOUT)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"weights_sha256": "other"}, "other weights"),
        ({"placement": "openvino"}, "placement openvino"),
        ({"height_px": 64}, "64 px height"),
        ({"width_px": 64}, "64 px width"),
        ({"fingerprint": "g"}, "another graph"),
    ],
)
def test_fits_nothing_else(path: Path, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        load_qat(path).require_fit(dataclasses.replace(ORIGIN, **changed), LAYOUT)
    assert "--qat" in caught.value.fix


@pytest.mark.parametrize("changed", [{"tensors": ("x", "y")}, {"weights": {}}])
def test_another_layout_is_refused(path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="another layout"):
        load_qat(path).require_fit(ORIGIN, dataclasses.replace(LAYOUT, **changed))


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "qat.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"qat\.safetensors: not a plan") as caught:
        load_qat(tmp_path / "qat.safetensors")
    assert caught.value.fix


def test_weights_of_a_network_are_no_plan(tmp_path: Path) -> None:
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="not a plan"):
        load_qat(tmp_path / "model.safetensors")
    save_file(
        {"w": np.ones(2, np.float32)}, tmp_path / "later.safetensors", metadata={"qat": json.dumps({"format": 2})}
    )
    with pytest.raises(InputError, match="format 2, expected 1"):
        load_qat(tmp_path / "later.safetensors")


@pytest.mark.parametrize("fault", ["bias", "scale", "weight scale", "limit"])
def test_values_that_no_training_leaves_are_refused(plan: QuantPlan, tmp_path: Path, fault: str) -> None:
    grid = plan.weights["w"]
    broken = {
        "bias": dataclasses.replace(plan, values={**plan.values, "b": np.asarray([np.nan, 0], np.float32)}),
        "scale": dataclasses.replace(plan, grids={"x": Grid(scale=0.0, zero_point=0, dtype="uint8")}),
        "weight scale": dataclasses.replace(
            plan, weights={"w": dataclasses.replace(grid, scales=np.asarray([np.inf, 1], np.float32))}
        ),
        "limit": dataclasses.replace(plan, weights={"w": dataclasses.replace(grid, limit=7)}),
    }[fault]
    write_qat(tmp_path / "qat", broken, origin=ORIGIN, record={})
    with pytest.raises(InputError, match="no training leaves"), np.errstate(invalid="ignore"):
        load_qat(tmp_path / "qat")


def test_fingerprint_is_of_the_structure_and_not_of_the_values() -> None:
    model = onnx.parser.parse_model(GRAPH % "pads = [0, 0, 0, 0]")
    same = onnx.parser.parse_model((GRAPH % "pads = [0, 0, 0, 0]").replace("{1.0}", "{2.0}").replace("18", "17"))
    padded = onnx.parser.parse_model(GRAPH % "pads = [1, 1, 1, 1]")
    renamed = onnx.parser.parse_model((GRAPH % "pads = [0, 0, 0, 0]").replace("w", "v"))
    assert graph_fingerprint(model) == graph_fingerprint(same)
    assert len({graph_fingerprint(one) for one in (model, padded, renamed)}) == 3
