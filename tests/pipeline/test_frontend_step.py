"""Exports with preprocessing in the graph: what they hold, how true they are, and what the ladder says of them."""

from __future__ import annotations

import dataclasses
import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from cspdeploy.check.blame.prepare import BlameRequest, prepare
from cspdeploy.check.inspect import inspect_onnx
from cspdeploy.check.ladder import VerifySettings, verify_bundles
from cspdeploy.check.loose_file import file_subject
from cspdeploy.core.bundle import check_hashes, file_record, read_manifest
from cspdeploy.core.card import read_card, stamp_card
from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import read_golden
from cspdeploy.core.metrics import top_k
from cspdeploy.core.onnx_graph import read_onnx
from cspdeploy.core.preprocess import list_images, load_image, preprocess, resize_image
from cspdeploy.core.spec import ModelSpec, Preprocess, Provenance
from cspdeploy.core.types import Frontend, ParityRow, TensorInfo, VerifyReport
from cspdeploy.export import resize_graph, simplify
from cspdeploy.export.frontend import write_pixel_graph
from cspdeploy.pipeline import frontend_step
from cspdeploy.pipeline.foreign import OnnxOrigin
from cspdeploy.pipeline.frontend_step import (
    MAX_MEAN_STEPS,
    MAX_STEPS,
    FrontendStep,
    measure_pixels,
    synthetic_photographs,
)
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.pipeline.reproduce import reproduce_bundle
from cspdeploy.report.card import card_lines
from cspdeploy.report.html.page import render_report
from cspdeploy.runtimes.ort import open_cpu_session

Export = Callable[..., Path]
U8_KINDS = ("onnx-u8", "onnx-fp16-u8", "onnx-int8-u8")


@pytest.fixture(scope="module")
def export(photo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    def call(frontend: Frontend, **options: Any) -> Path:
        output = tmp_path_factory.mktemp("out")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(simplify, "_CHILD", ["false"])
            request = ExportRequest(
                model="tiny", models=photo_models, output=output, frontend=frontend, **options
            )  # fmt: skip
            return Path(export_bundle(request).folder)

    return call


@pytest.fixture
def plain(tiny_u8_bundle: Path) -> Path:
    """Bytes of the network's size in, BGR, and the classes out."""
    return tiny_u8_bundle


@pytest.fixture(scope="module")
def resizing(export: Export) -> Path:
    """Bytes of any size in."""
    return export(Frontend(resize=True))


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "exported" / folder.name))


def _verify(folder: Path, *runtimes: str, **settings: Any) -> VerifyReport:
    quick: dict[str, Any] = {"latency": None, "isolate": False, "audit": True}
    return verify_bundles([folder], VerifySettings(runtimes=runtimes or ("ort-cpu",), **(quick | settings)))


def _row(report: VerifyReport, artifact: str, runtime: str = "ort-cpu") -> ParityRow:
    (row,) = (row for row in report.rows if (row.artifact, row.runtime) == (artifact, runtime))
    return row


def _rehash(folder: Path) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    for entry in [*data["artifacts"], *data["files"]]:
        record = file_record(folder / entry["file"])
        entry.update(sha256=record.sha256, num_bytes=record.num_bytes)
    path.write_text(json.dumps(data))


def _edit(path: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)


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
    assert _verify(folder).verdict == "pass"


# --- how true the resize is ---


def _contract(resize: str, interpolation: str, size_px: tuple[int, int], crop_pct: float = 1.0) -> Preprocess:
    return Preprocess(
        height_px=size_px[0], width_px=size_px[1], resize=resize, crop_pct=crop_pct, interpolation=interpolation,  # type: ignore[arg-type]
        channel_order="rgb", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize(
    ("resize", "size_px", "crop_pct"),
    [("crop", (48, 48), 0.875), ("crop", (32, 64), 1.0), ("stretch", (40, 30), 1.0), ("letterbox", (48, 40), 1.0)],
)
def test_resize_is_within_the_bound(
    tmp_path: Path, resize: str, interpolation: str, size_px: tuple[int, int], crop_pct: float
) -> None:
    contract = _contract(resize, interpolation, size_px, crop_pct)
    write_pixel_graph(tmp_path / "pixels.onnx", contract, opset=18)
    pictures = [*synthetic_photographs(contract), *synthetic_photographs(contract.with_size(97, 61))]
    found, pixels = measure_pixels(tmp_path / "pixels.onnx", contract, pictures)
    assert found.faithful
    assert found.mean <= MAX_MEAN_STEPS
    assert found.largest <= (0 if interpolation == "nearest" else MAX_STEPS)
    assert {image.shape for image in pixels} == {(*size_px, 3)}


def test_nearest_needs_no_antialias_and_so_no_new_opset(tmp_path: Path) -> None:
    contract = _contract("crop", "nearest", (33, 21))
    write_pixel_graph(tmp_path / "pixels.onnx", contract, opset=13)
    found, _ = measure_pixels(tmp_path / "pixels.onnx", contract, synthetic_photographs(contract))
    assert (found.mean, found.largest) == (0.0, 0)


def test_order_of_the_passes_is_pillows() -> None:
    tall = Image.fromarray(synthetic_photographs(_contract("crop", "bilinear", (64, 16)))[0]).resize((16, 64))
    at_once = np.asarray(tall.resize((24, 40), Image.Resampling.BICUBIC))
    width_first = tall.resize((24, 64), Image.Resampling.BICUBIC).resize((24, 40), Image.Resampling.BICUBIC)
    assert np.array_equal(at_once, np.asarray(width_first)) == (resize_graph.pillow_order() == "width-first")


def _without_antialias(path: Path) -> None:
    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in ("antialias", "exclude_outside"):
                    attribute.i = 0

    _edit(path, change)


def test_resize_without_antialias_is_beyond_the_bound(tmp_path: Path) -> None:
    contract = _contract("stretch", "bilinear", (32, 32))
    write_pixel_graph(tmp_path / "pixels.onnx", contract, opset=18)
    _without_antialias(tmp_path / "pixels.onnx")
    found, _ = measure_pixels(tmp_path / "pixels.onnx", contract, synthetic_photographs(contract))
    assert not found.faithful
    assert found.mean > 10 * MAX_MEAN_STEPS


def test_unfaithful_resize_is_refused_and_the_rest_is_written(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    write = write_pixel_graph

    def other(path: Path, contract: Preprocess, *, opset: int) -> None:
        write(path, contract, opset=opset)
        _without_antialias(path)

    monkeypatch.setattr(frontend_step, "write_pixel_graph", other)
    manifest = read_manifest(export(Frontend(resize=True)))
    assert [item.kind for item in manifest.artifacts] == ["torchscript", "onnx"]
    step = manifest.artifacts[-1].steps[-1]
    assert (step.name, step.outcome) == ("frontend", "kept")
    assert "not Pillow's" in step.detail
    assert "bound 0.1 and 2" in step.detail


def test_difference_is_recorded_and_widens_the_limit(resizing: Path, copy: Callable[[Path], Path]) -> None:
    (found,) = (item for item in read_manifest(resizing).artifacts if item.frontend)
    facts = found.steps[-1].facts
    assert found.frontend is not None
    assert 0 < found.frontend.max_difference == facts["golden"]["max"] <= MAX_STEPS
    assert 0 < facts["output_change"] < 1e-2
    report = _verify(resizing, audit=False)
    (limit,), (without,) = _row(report, "onnx-u8").limits, _row(report, "onnx").limits
    assert limit.rel_l2 == pytest.approx(without.rel_l2 + facts["output_change"])
    assert limit.terms["pixels"] == facts["output_change"]
    assert "from Pillow's" in limit.why
    # What the golden images really are off by fits into it.
    measured = _row(report, "onnx-u8").rel_l2
    assert measured is not None
    assert without.rel_l2 < measured <= limit.rel_l2

    folder = copy(resizing)
    data = json.loads((folder / "manifest.json").read_text())
    data["artifacts"][-1]["steps"][-1]["facts"]["output_change"] = 5.0
    (folder / "manifest.json").write_text(json.dumps(data))
    (limit,) = _row(_verify(folder, audit=False), "onnx-u8").limits
    assert limit.rel_l2 == pytest.approx(without.rel_l2 + 1e-2)


# --- the ladder ---


def test_ladder_holds(plain: Path, resizing: Path) -> None:
    resized, report = _verify(resizing, audit=False), _verify(plain)
    for found in (resized, report):
        assert found.verdict == "pass", [row.reason for row in found.rows]
    row = _row(report, "preprocess", "onnx-fp16-u8")
    assert (row.verdict, row.max_abs, row.limit) == ("pass", 0.0, 1e-5)
    for kind in U8_KINDS:
        own, without = _row(report, kind), _row(report, kind.removesuffix("-u8"))
        assert (own.rel_l2, own.limits, own.decisions) == (without.rel_l2, without.limits, without.decisions)
        assert own.audit is not None
        assert without.audit is not None
        assert own.audit.problem == ""
        assert (own.audit.num_macs, own.audit.found) == (without.audit.num_macs, without.audit.found)
    row = _row(resized, "preprocess", "onnx-u8")
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
    _edit(folder / "tiny.u8.onnx", change)
    _rehash(folder)
    report = _verify(folder, audit=False)
    assert report.verdict == "fail"
    assert _row(report, "preprocess", "onnx-u8").verdict == "numeric"
    assert _row(report, "onnx-u8").verdict == "numeric"
    assert _row(report, "onnx").verdict == "pass"


def test_graph_without_the_node_that_makes_the_input_has_a_row_that_says_so(
    plain: Path, copy: Callable[[Path], Path]
) -> None:
    folder = copy(plain)

    def rename(graph: onnx.GraphProto) -> None:
        next(node for node in graph.node if node.name == "frontend/normalise").name = "other"

    _edit(folder / "tiny.u8.onnx", rename)
    _rehash(folder)
    row = _row(_verify(folder, audit=False), "preprocess", "onnx-u8")
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
    _edit(folder / "tiny.u8.onnx", change)
    _rehash(folder)
    report = _verify(folder, audit=False)
    assert _row(report, "onnx-u8").verdict == verdict
    assert _row(report, "preprocess", "onnx-u8").verdict == "pass"
    assert report.verdict == "fail"


# --- the card ---


def test_every_onnx_file_says_what_it_is(plain: Path) -> None:
    manifest = read_manifest(plain)
    for artifact in manifest.artifacts:
        if artifact.format != "onnx":
            continue
        card = inspect_onnx(plain / artifact.file).card
        assert card is not None
        assert (card.model, card.artifact, card.labels) == ("tiny", artifact.kind, manifest.labels)
        assert (card.preprocess, card.provenance) == (manifest.spec.preprocess, manifest.spec.provenance)
        assert card.frontend == artifact.frontend
        assert card.outputs == tuple(value.name for value in artifact.outputs)
        assert card.tool.startswith("cspdeploy ")


def test_card_is_the_contract_of_a_file_by_itself(plain: Path, tmp_path: Path) -> None:
    """Exported again without --preprocess and --names: labels, contract and UNTRAINED go along."""
    path = tmp_path / "other.onnx"
    shutil.copy(plain / "tiny.onnx", path)
    card = read_card(read_onnx(path).metadata, name="other.onnx")
    assert card is not None
    stamp_card(path, dataclasses.replace(card, provenance=Provenance(source="random")))
    origin = OnnxOrigin(
        path, preprocess=None, images=_pictures(tmp_path / "pictures"), names=None, size_px=None, opset=None,
        max_opset=None, operators=frozenset(), dynamic_batch=False,
    )  # fmt: skip
    manifest = read_manifest(plain)
    assert (origin.spec.preprocess, origin.spec.task) == (manifest.spec.preprocess, "classify")
    assert origin.labels == manifest.labels
    assert origin.spec.provenance.untrained
    subject = file_subject(path, images=tmp_path / "pictures", reference=False)
    images = list_images(tmp_path / "pictures")
    np.testing.assert_array_equal(
        next(iter(subject.feeds.values())), preprocess([str(image) for image in images], manifest.spec.preprocess)
    )


def _pictures(folder: Path) -> Path:
    folder.mkdir()
    for i, picture in enumerate(synthetic_photographs(_contract("crop", "bilinear", (40, 40)))):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


def test_card_for_a_reader(plain: Path) -> None:
    card = inspect_onnx(plain / "tiny.int8.u8.onnx").card
    lines = dict(card_lines(card))
    assert lines["labels"] == "label 0, label 1, label 2, label 3, label 4, ... (10 in all)"
    assert lines["image"] == "32x32 px RGB, shorter side, then the centre, bilinear"
    assert "in the graph, from BGR bytes, and the 3 likeliest classes at its end" in lines["preprocessing"]
    assert card is not None
    untrained = dataclasses.replace(card, provenance=Provenance(source="random"), frontend=None)
    lines = dict(card_lines(untrained))
    assert lines["weights from"].startswith("UNTRAINED")
    assert lines["preprocessing"].endswith("by the application")


# --- what else looks at such files ---


def test_blame_names_the_file_that_takes_floats(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"behind it the nodes of tiny\.int8\.onnx") as caught:
        prepare(BlameRequest(artifact=plain / "tiny.int8.u8.onnx"), folder=tmp_path)
    assert caught.value.fix == f"cspdeploy blame {plain / 'tiny.int8.onnx'}"


def test_page_shows_them_and_keeps_its_snippets_to_files_that_take_floats(plain: Path) -> None:
    manifest = read_manifest(plain)
    golden, report = read_golden(plain / "golden.npz"), _verify(plain, audit=False)
    page = str(render_report(plain, manifest=manifest, golden=golden, report=report))
    assert "input image, uint8 [N, H, W, 3] BGR, of 32x32 px" in page
    assert 'ort.InferenceSession("tiny.onnx"' in html.unescape(page).replace('<span class="string">', "").replace(
        "</span>", ""
    )


def test_accuracy_is_that_of_the_file_without(plain: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (20, 32, 32), np.uint8)
    data = LabelledImages(
        name="x", labels=read_manifest(plain).labels, classes=np.arange(20, dtype=np.int64) % 10, stored=pictures
    )
    report = _verify(plain, accuracy=data, audit=False)
    for kind in U8_KINDS:
        assert _row(report, kind).accuracy_images == 20
        assert _row(report, kind).top1 == _row(report, kind.removesuffix("-u8")).top1


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
