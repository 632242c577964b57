"""The INT8 step as the export takes it: what is asked for, on which images, and what becomes of a refusal."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from cspdeploy.check.audit import audit_onnx
from cspdeploy.core.bundle import check_hashes, read_manifest, write_manifest
from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import read_golden
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.spec import ModelSpec
from cspdeploy.core.types import StepRecord, TensorInfo
from cspdeploy.export import simplify
from cspdeploy.pipeline.images import images_to_calibrate, real_images
from cspdeploy.pipeline.int8_step import Int8Request, Int8Step, refusal
from cspdeploy.pipeline.recipe import ExportReport, ExportRequest, export_bundle
from cspdeploy.pipeline.reproduce import reproduce_bundle
from cspdeploy.quant import int8 as quantiser
from cspdeploy.runtimes.ort import open_cpu_session

Pixels = np.ndarray


@pytest.fixture
def without_simplifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unsimplified graph is kept, in no time."""
    monkeypatch.setattr(simplify, "_CHILD", ["false"])


# --- what is asked for ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "--int8-mode fast: expected static, dynamic, weights"),
        ({"calibration": "mean"}, "--calibration mean: expected auto, "),
        ({"effort": "none"}, "--effort none: expected normal, high"),
        ({"max_images": 0}, "--calib-images 0: expected 1 or more"),
        ({"time_limit_s": 0.0}, "--int8-time-limit 0.0: expected"),
        ({"time_limit_s": float("nan")}, "--int8-time-limit nan: expected"),
        ({"max_drop": "0.1"}, "--max-drop 0.1: points of top-1 need labelled images"),
        ({"max_drop": "much"}, "--max-drop 'much': expected points"),
        ({"max_latency": "0x"}, "--max-latency 0x: expected more than nothing"),
        ({"mode": "dynamic", "calibration": "mse"}, "--calibration mse: is of static ranges, --int8-mode dynamic"),
        ({"mode": "weights", "effort": "high"}, "--effort high: is of static ranges, --int8-mode weights has none"),
        ({"mode": "weights", "power_of_two": True}, "--power-of-two: is of static ranges"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Int8Request(**options)
    assert caught.value.fix


def test_every_way_of_choosing_ranges_can_be_asked_for() -> None:
    from cspdeploy.quant.ranges import METHODS

    for name in ("auto", *METHODS):
        assert Int8Request(calibration=name).settings().method == name  # type: ignore[arg-type]


def test_request_goes_through_json() -> None:
    request = Int8Request(effort="high", max_drop="36dB", max_latency="0.5x", labelled="photos", max_images=7)
    assert from_json(Int8Request, json.loads(json.dumps(to_json(request)))) == request


# --- the images ---


def test_golden_images_are_not_calibrated_on(tiny_spec: ModelSpec) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (200, 8, 8), np.uint8)
    golden = np.arange(0, 128, 2)
    found = images_to_calibrate(tiny_spec, stored=stored, golden=golden, origin="here", folder=None, max_images=512)
    expected = preprocess(list(np.delete(stored, golden, axis=0)), tiny_spec.preprocess)
    np.testing.assert_array_equal(next(found.batches(512)), expected)
    assert found.origin == "here"


def test_few_images_are_all_calibrated_on(tiny_spec: ModelSpec) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    found = images_to_calibrate(
        tiny_spec, stored=stored, golden=np.arange(0, 40, 2), origin="here", folder=None, max_images=512
    )
    assert len(found) == 40


@pytest.mark.parametrize(("max_images", "expected"), [(512, 70), (20, 20)])
def test_files_of_a_folder_are_read_as_prediction_reads_them(
    tiny_spec: ModelSpec, tmp_path: Path, max_images: int, expected: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 50, 41, 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i:03d}.png")
    (tmp_path / "notes.txt").write_text("none")
    stored, origin = real_images(tiny_spec, None, tmp_path)
    golden = np.arange(0, 40, 2)
    found = images_to_calibrate(
        tiny_spec, stored=stored, golden=golden, origin=origin, folder=tmp_path, max_images=max_images
    )
    assert len(found) == expected
    assert found.origin == f"{tmp_path} ({expected} of 90 images)"
    assert found.ignored == {".txt": 1}
    names = {Path(found.name(i)).name for i in range(len(found))}
    assert not names & {f"{i:03d}.png" for i in golden}
    first = Path(found.name(0))
    np.testing.assert_array_equal(next(found.batches(1)), preprocess([first], tiny_spec.preprocess))


# --- the artifact ---


def test_bundle_with_int8(tiny_int8_bundle: Path) -> None:
    manifest = read_manifest(tiny_int8_bundle)
    check_hashes(tiny_int8_bundle, manifest)
    assert [artifact.kind for artifact in manifest.artifacts] == ["torchscript", "onnx", "onnx-fp16", "onnx-int8"]
    made = manifest.artifacts[-1]
    assert (made.file, made.precision, made.opset) == ("tiny.int8.onnx", "int8", 18)
    assert made.inputs == (TensorInfo(name="input", dtype="float32", shape=(1, 3, 32, 32)),)
    assert made.outputs == (TensorInfo(name="logits", dtype="float32", shape=(1, 10)),)
    assert [step.name for step in made.steps] == ["onnx", "simplify", "split-expansion", "int8"]
    assert made.steps[-1].outcome == "done"
    path = tiny_int8_bundle / made.file
    onnx.checker.check_model(path, full_check=True)
    assert audit_onnx(path, declared="int8").problem == ""
    assert manifest.options["int8"] == to_json(Int8Request(calibration="minmax"))
    assert refusal(made.steps) == ""


def test_int8_file_computes_what_the_network_does(tiny_int8_bundle: Path) -> None:
    golden = read_golden(tiny_int8_bundle / "golden.npz")
    session = open_cpu_session(tiny_int8_bundle / "tiny.int8.onnx")
    got = np.concatenate([session.run({"input": x[None]})["logits"] for x in golden.x_NCHW])
    exact = golden.outputs_fp64["logits"]
    # One rounding to 8 bits of a bell curve is 40 dB; 30 dB leaves room for the dozen of them here, and none for a
    # scale, an order or a bias that is wrong.
    assert 10 * np.log10(np.square(exact).sum() / np.square(exact - got).sum()) > 30


# --- the step by itself ---


@pytest.fixture
def step(tiny_spec: ModelSpec, photos: Pixels) -> Callable[..., Int8Step]:
    """`step(max_drop="36dB")`: of "tiny", on all photos."""

    def make(**options: Any) -> Int8Step:
        return Int8Step(
            Int8Request(**options), tiny_spec, labels=tuple(f"label {i}" for i in range(10)), stored=photos,
            golden=np.arange(0, 96, 2), origin="photos", folder=None, target=None,
        )  # fmt: skip

    return make


def _nothing(what: str, done: int, total: int) -> None: ...


@pytest.mark.usefixtures("int8_is_faster")
def test_budget_that_no_file_can_keep(step: Callable[..., Int8Step], tiny_bundle: Path, tmp_path: Path) -> None:
    made = step(calibration="minmax", max_drop="120dB", time_limit_s=0.01)
    record = made.make(tiny_bundle / "tiny.onnx", tmp_path / "out.onnx", trusted=True, progress=_nothing)
    assert (record.name, record.outcome) == ("int8", "kept")
    assert record.detail.startswith("no INT8 file")
    assert "120 dB" in record.detail
    assert not (tmp_path / "out.onnx").exists()
    assert refusal((record,)) == record.detail


def test_file_that_is_int8_in_name_only_is_refused(
    step: Callable[..., Int8Step], tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The FP32 file under the INT8 file's name."""

    def copy(source: Path, target: Path, *_: object, **__: object) -> StepRecord:
        shutil.copy(source, target)
        return StepRecord(name="int8", outcome="done", detail="copied")

    monkeypatch.setattr(quantiser, "quantise", copy)
    record = step().make(tiny_bundle / "tiny.onnx", tmp_path / "out.onnx", trusted=True, progress=_nothing)
    assert record.outcome == "kept"
    assert record.detail.startswith("no INT8 file: named INT8, but 0 % of its MACs are in INT8")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("trusted", [True, False])
def test_failure_on_a_strangers_graph_is_a_refusal_and_on_ours_a_fault(
    step: Callable[..., Int8Step], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    def fail(source: Path, target: Path, *_: object, **__: object) -> StepRecord:
        target.write_bytes(b"half")
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(quantiser, "quantise", fail)
    path = tmp_path / "out.onnx"
    if trusted:
        with pytest.raises(RuntimeError, match="no such"):
            step().make(path, path, trusted=True, progress=_nothing)
    else:
        record = step().make(path, path, trusted=False, progress=_nothing)
        assert record.detail == "no INT8 file: it cannot be quantised (no such operator)"
    assert not path.exists()


def test_bad_input_is_an_error_whoever_made_the_graph(
    step: Callable[..., Int8Step], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> StepRecord:
        raise InputError("tensor 'x': not finite", fix="use other weights")

    monkeypatch.setattr(quantiser, "quantise", fail)
    with pytest.raises(InputError, match="tensor 'x'"):
        step().make(tmp_path / "in.onnx", tmp_path / "out.onnx", trusted=False, progress=_nothing)


def test_images_of_another_kind_than_the_models_own_are_told(
    photo_models: Path, tiny_spec: ModelSpec, photos: Pixels, tmp_path: Path
) -> None:
    """Half as bright as what lies in the model's folder."""
    for i, image in enumerate(photos[:48]):
        Image.fromarray(image // 2).save(tmp_path / f"{i:02}.png")
    weights = str(photo_models / "tiny" / "model.safetensors")

    def made(folder: Path | None) -> Int8Step:
        return Int8Step(
            Int8Request(), tiny_spec, labels=(), stored=photos, golden=np.arange(0, 48, 2), origin="photos",
            folder=folder, target=None, weights=weights,
        )  # fmt: skip

    told = [finding.text for finding in made(tmp_path)._findings]
    assert any(text.startswith("not such images as the model saw") for text in told), told
    assert not any("as the model saw" in finding.text for finding in made(None)._findings)


def test_budget_that_nothing_here_can_measure_is_refused_before_the_export(
    tiny_spec: ModelSpec, photos: Pixels
) -> None:
    with pytest.raises(InputError, match="--max-latency: ort-web cannot be timed on this machine"):
        Int8Step(
            Int8Request(max_latency="0.5x"), tiny_spec, labels=(), stored=photos, golden=np.arange(4),
            origin="photos", folder=None, target="ort-web",
        )  # fmt: skip


@pytest.mark.usefixtures("without_simplifier")
def test_engine_that_only_int8_files_are_placed_for(photo_models: Path, tmp_path: Path) -> None:
    request = ExportRequest(
        model="tiny", models=photo_models, output=tmp_path, int8=Int8Request(calibration="minmax"), target="ARM64"
    )
    manifest = export_bundle(request).manifest
    assert manifest.options["target"] == "arm64"
    assert manifest.artifacts[-1].steps[-1].facts["placement"] == "arm64"
    with pytest.raises(InputError, match="target 'ARM64': INT8 files alone are placed for it"):
        export_bundle(dataclasses.replace(request, int8=None))
    with pytest.raises(InputError, match="target 'arm63': unknown"):
        export_bundle(dataclasses.replace(request, target="arm63"))


# --- what is made again ---


@pytest.mark.slow
@pytest.mark.usefixtures("without_simplifier", "int8_is_faster")
def test_same_inputs_give_the_same_int8_bytes(photo_models: Path, tmp_path: Path) -> None:
    int8 = Int8Request()
    request = ExportRequest(model="tiny", models=photo_models, output=tmp_path, int8=int8)
    folder = Path(export_bundle(request).folder)
    report = reproduce_bundle(folder, models=photo_models)
    assert "tiny.int8.onnx" in {file.file for file in report.files}
    assert (report.verdict, report.remarks) == ("equal", ())


def test_missing_labelled_images_are_named(tiny_int8_bundle: Path, photo_models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_int8_bundle, tmp_path / "tiny"))
    manifest = read_manifest(folder)
    int8 = {**manifest.options["int8"], "labelled": str(tmp_path / "gone")}
    write_manifest(folder, dataclasses.replace(manifest, options={**manifest.options, "int8": int8}))
    with pytest.raises(InputError, match=f"the labelled images {tmp_path / 'gone'}"):
        reproduce_bundle(folder, models=photo_models)


def test_report_of_an_export_without_int8_refuses_nothing(tiny_bundle: Path) -> None:
    assert ExportReport(folder=str(tiny_bundle), manifest=read_manifest(tiny_bundle)).refused_int8 == ""
