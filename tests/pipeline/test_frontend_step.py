"""Exports with preprocessing in the graph: what they hold, how true they are, and what the ladder says of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cspdeploy.core.bundle import check_hashes, file_record, read_manifest
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import read_golden
from cspdeploy.core.metrics import top_k
from cspdeploy.core.preprocess import load_image, preprocess, resize_image
from cspdeploy.core.spec import ModelSpec
from cspdeploy.core.types import Frontend, TensorInfo
from cspdeploy.export import simplify
from cspdeploy.pipeline.frontend_step import (
    MAX_STEPS,
    FrontendStep,
    synthetic_photographs,
)
from cspdeploy.pipeline.recipe import ExportRequest
from cspdeploy.pipeline.reproduce import reproduce_bundle
from cspdeploy.runtimes.ort import open_cpu_session
from tests.pipeline.conftest import Export
from tests.pipeline.frontend_parts import U8_KINDS, edit, quick_verify, row_of


@pytest.fixture(scope="module")
def resizing(export: Export) -> Path:
    """Bytes of any size in."""
    return export(Frontend(resize=True))


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "exported" / folder.name))


def _rehash(folder: Path) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    for entry in [*data["artifacts"], *data["files"]]:
        record = file_record(folder / entry["file"])
        entry.update(sha256=record.sha256, num_bytes=record.num_bytes)
    path.write_text(json.dumps(data))


# --- what a bundle holds ---


def test_files_stand_beside_those_without(plain: Path) -> None:
    manifest = read_manifest(plain)
    check_hashes(plain, manifest)
    assert [item.kind for item in manifest.artifacts] == [
        "torchscript", "onnx", "onnx-fp16", "onnx-int8", "onnx-u8", "onnx-fp16-u8", "onnx-int8-u8"
    ]  # fmt: skip
    assert manifest.options["frontend"] == {
        "channel_order": "bgr", "resize": False, "top_k": 3, "max_difference": 0.0
    }  # fmt: skip
    made = {item.kind: item for item in manifest.artifacts}
    assert made["onnx"].frontend is None
    for kind in U8_KINDS:
        found = made[kind]
        assert found.inputs == (TensorInfo(name="image", dtype="uint8", shape=(1, 32, 32, 3)),)
        assert found.outputs == (
            TensorInfo(name="logits", dtype="float32", shape=(1, 10)),
            TensorInfo(name="probabilities", dtype="float32", shape=(1, 3)),
            TensorInfo(name="classes", dtype="int64", shape=(1, 3)),
        )
        assert found.frontend == Frontend(channel_order="bgr", top_k=3)
        assert (found.steps[-1].name, found.steps[-1].outcome) == ("frontend", "done")
        onnx.checker.check_model(plain / found.file, full_check=True)
        session = open_cpu_session(plain / found.file)
        assert dict(session.inputs) == {"image": (1, 32, 32, 3)}


def test_export_is_the_same_to_the_byte_when_it_is_made_again(
    resizing: Path, photo_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simplify, "_CHILD", ["false"])
    report = reproduce_bundle(resizing, models=photo_models)
    assert report.verdict == "equal", report.files
    assert "tiny.u8.onnx" in {file.file for file in report.files}


@pytest.mark.parametrize("kind", U8_KINDS)
def test_outputs_are_those_of_the_file_without_to_the_bit(plain: Path, kind: str) -> None:
    """The network's input is the very same float32 tensor, so that nothing behind it can differ."""
    manifest, golden = read_manifest(plain), read_golden(plain / "golden.npz")
    files = {item.kind: item.file for item in manifest.artifacts}
    floats = open_cpu_session(plain / files[kind.removesuffix("-u8")])
    own = open_cpu_session(plain / files[kind])
    for image, x_CHW in zip(golden.images, golden.x_NCHW, strict=True):
        pixels = resize_image(load_image(image), manifest.spec.preprocess)[None, ..., ::-1]
        found = own.run({"image": np.ascontiguousarray(pixels)})
        logits = floats.run({"input": x_CHW[None]})["logits"]
        np.testing.assert_array_equal(found["logits"], logits)
        np.testing.assert_array_equal(found["classes"], top_k(logits, 3))


def test_picture_of_any_size_gives_what_the_shared_preprocessing_gives(resizing: Path) -> None:
    manifest = read_manifest(resizing)
    floats, own = (open_cpu_session(resizing / name) for name in ("tiny.onnx", "tiny.u8.onnx"))
    for image in synthetic_photographs(manifest.spec.preprocess):
        x_NCHW = preprocess([image], manifest.spec.preprocess)
        expected = np.asarray(floats.run({"input": x_NCHW})["logits"], np.float64)
        found = np.asarray(own.run({"image": image[None]})["logits"], np.float64)
        assert np.linalg.norm(found - expected) <= 2e-2 * np.linalg.norm(expected)


def test_free_batch(export: Export) -> None:
    folder = export(Frontend(resize=True, top_k=2), dynamic_batch=True)
    (found,) = (item for item in read_manifest(folder).artifacts if item.frontend)
    assert found.inputs[0].shape == ("N", "H", "W", 3)
    pictures = np.random.default_rng(0).integers(0, 256, (5, 40, 50, 3), np.uint8)
    outputs = open_cpu_session(folder / found.file).run({"image": pictures})
    assert {name: array.shape for name, array in outputs.items()} == {
        "logits": (5, 10), "probabilities": (5, 2), "classes": (5, 2)
    }  # fmt: skip
    assert quick_verify(folder).verdict == "pass"


# --- how true the resize is ---


def test_difference_is_recorded_and_widens_the_limit(resizing: Path, copy: Callable[[Path], Path]) -> None:
    (found,) = (item for item in read_manifest(resizing).artifacts if item.frontend)
    facts = found.steps[-1].facts
    assert found.frontend is not None
    assert 0 < found.frontend.max_difference == facts["golden"]["max"] <= MAX_STEPS
    assert 0 < facts["output_change"] < 1e-2
    report = quick_verify(resizing, audit=False)
    (limit,), (without,) = row_of(report, "onnx-u8").limits, row_of(report, "onnx").limits
    assert limit.rel_l2 == pytest.approx(without.rel_l2 + facts["output_change"])
    assert limit.terms["pixels"] == facts["output_change"]
    assert "from Pillow's" in limit.why
    # What the golden images really are off by fits into it.
    measured = row_of(report, "onnx-u8").rel_l2
    assert measured is not None
    assert without.rel_l2 < measured <= limit.rel_l2

    folder = copy(resizing)
    data = json.loads((folder / "manifest.json").read_text())
    data["artifacts"][-1]["steps"][-1]["facts"]["output_change"] = 5.0
    (folder / "manifest.json").write_text(json.dumps(data))
    (limit,) = row_of(quick_verify(folder, audit=False), "onnx-u8").limits
    assert limit.rel_l2 == pytest.approx(without.rel_l2 + 1e-2)


# --- the ladder ---


def test_ladder_holds(plain: Path, resizing: Path) -> None:
    resized, report = quick_verify(resizing, audit=False), quick_verify(plain)
    for found in (resized, report):
        assert found.verdict == "pass", [row.reason for row in found.rows]
    row = row_of(report, "preprocess", "onnx-fp16-u8")
    assert (row.verdict, row.max_abs, row.limit) == ("pass", 0.0, 1e-5)
    for kind in U8_KINDS:
        own, without = row_of(report, kind), row_of(report, kind.removesuffix("-u8"))
        assert (own.rel_l2, own.limits, own.decisions) == (without.rel_l2, without.limits, without.decisions)
        assert own.audit is not None
        assert without.audit is not None
        assert own.audit.problem == ""
        assert (own.audit.num_macs, own.audit.found) == (without.audit.num_macs, without.audit.found)
    row = row_of(resized, "preprocess", "onnx-u8")
    assert "from Pillow's on the golden images" in row.note


def _constant(graph: onnx.GraphProto, name: str) -> onnx.TensorProto:
    (found,) = (tensor for tensor in graph.initializer if tensor.name == name)
    assert isinstance(found, onnx.TensorProto)
    return found


def _other_order(graph: onnx.GraphProto) -> None:
    tensor = _constant(graph, "frontend/reversed")
    tensor.CopyFrom(numpy_helper.from_array(np.array([0, 1, 2]), tensor.name))


def _no_mean(graph: onnx.GraphProto) -> None:
    tensor = _constant(graph, "frontend/offset")
    tensor.CopyFrom(numpy_helper.from_array(np.zeros((3, 1, 1), np.float32), tensor.name))


def _swapped_axes(graph: onnx.GraphProto) -> None:
    node = next(node for node in graph.node if node.name == "frontend/transpose")
    node.attribute[0].ints[:] = [0, 3, 2, 1]


def _rescaled(graph: onnx.GraphProto) -> None:
    tensor = _constant(graph, "frontend/gain")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.0001), tensor.name))


@pytest.mark.parametrize("change", [_other_order, _no_mean, _swapped_axes, _rescaled])
def test_wrong_preprocessing_breaks_its_rows_alone(
    plain: Path, copy: Callable[[Path], Path], change: Callable[[onnx.GraphProto], None]
) -> None:
    folder = copy(plain)
    edit(folder / "tiny.u8.onnx", change)
    _rehash(folder)
    report = quick_verify(folder, audit=False)
    assert report.verdict == "fail"
    assert row_of(report, "preprocess", "onnx-u8").verdict == "numeric"
    assert row_of(report, "onnx-u8").verdict == "numeric"
    assert row_of(report, "onnx").verdict == "pass"


def test_graph_without_the_node_that_makes_the_input_has_a_row_that_says_so(
    plain: Path, copy: Callable[[Path], Path]
) -> None:
    folder = copy(plain)

    def rename(graph: onnx.GraphProto) -> None:
        next(node for node in graph.node if node.name == "frontend/normalise").name = "other"

    edit(folder / "tiny.u8.onnx", rename)
    _rehash(folder)
    row = row_of(quick_verify(folder, audit=False), "preprocess", "onnx-u8")
    assert (row.verdict, row.reason) == ("error", "has no node 'frontend/normalise' that makes its input")


def _smallest_first(graph: onnx.GraphProto) -> None:
    node = next(node for node in graph.node if node.op_type == "TopK")
    next(attribute for attribute in node.attribute if attribute.name == "largest").i = 0


def _raw_scores(graph: onnx.GraphProto) -> None:
    node = next(node for node in graph.node if node.op_type == "GatherElements")
    node.input[0] = "logits"


@pytest.mark.parametrize(("change", "verdict"), [(_smallest_first, "decision"), (_raw_scores, "numeric")])
def test_wrong_classes_are_found_though_the_scores_are_right(
    plain: Path, copy: Callable[[Path], Path], change: Callable[[onnx.GraphProto], None], verdict: str
) -> None:
    folder = copy(plain)
    edit(folder / "tiny.u8.onnx", change)
    _rehash(folder)
    report = quick_verify(folder, audit=False)
    assert row_of(report, "onnx-u8").verdict == verdict
    assert row_of(report, "preprocess", "onnx-u8").verdict == "pass"
    assert report.verdict == "fail"


# --- what is refused ---


def test_more_classes_than_there_are(tiny_spec: ModelSpec) -> None:
    with pytest.raises(InputError, match="--embed-topk 11: tiny has 10 classes") as caught:
        FrontendStep(Frontend(top_k=11), tiny_spec, opset=18)
    assert caught.value.fix == "--embed-topk 5"


def test_classes_of_what_gives_none(tiny_spec: ModelSpec) -> None:
    features = dataclasses.replace(tiny_spec, task="features", outputs=("p3",))
    with pytest.raises(InputError, match="--embed-topk 2: tiny gives p3, not classes"):
        FrontendStep(Frontend(top_k=2), features, opset=18)
    with pytest.raises(InputError, match="--embed-topk: is of classes"):
        ExportRequest(model="tiny", features=True, frontend=Frontend(top_k=2))


def test_opset_without_antialias(tiny_spec: ModelSpec) -> None:
    with pytest.raises(InputError, match="--embed-resize: bilinear as Pillow does it needs opset 18, for") as caught:
        FrontendStep(Frontend(resize=True), tiny_spec, opset=17)
    assert "--opset 18" in str(caught.value.fix)
    nearest = dataclasses.replace(tiny_spec.preprocess, interpolation="nearest")
    FrontendStep(Frontend(resize=True), dataclasses.replace(tiny_spec, preprocess=nearest), opset=13)
