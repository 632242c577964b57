from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import cspdeploy
from cspdeploy.check.ladder import VerifySettings, verify_bundles
from cspdeploy.core.bundle import check_hashes, file_sha256, read_manifest
from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import read_golden
from cspdeploy.core.model_folder import read_calibration
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.results import Timing
from cspdeploy.core.spec import ModelSpec
from cspdeploy.core.types import Artifact, Manifest, StepRecord, TensorInfo
from cspdeploy.export import simplify
from cspdeploy.nets.registry import build
from cspdeploy.nets.weights import write_safetensors
from cspdeploy.pipeline import graph_steps
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.runtimes.ort import open_cpu_session

FILES = {
    "tiny.torchscript.pt", "tiny.onnx", "tiny.fp16.onnx", "manifest.json", "golden.npz", "labels.txt",
}  # fmt: skip
Export = Callable[..., Manifest]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "exported"


@pytest.fixture
def without_simplifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unsimplified graph is kept, in no time: onnxsim takes longer to import than all else together."""
    monkeypatch.setattr(simplify, "_CHILD", ["false"])


@pytest.fixture
def export(tiny_models: Path, output: Path) -> Export:
    def call(**options: Any) -> Manifest:
        report = export_bundle(ExportRequest(model="tiny", models=tiny_models, output=output, **options))
        assert report.folder == str(output / "tiny")
        return report.manifest

    return call


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _litter(output: Path) -> list[str]:
    return [path.name for path in output.iterdir() if path.name.startswith(".") and path.suffix != ".lock"]


def _artifact(manifest: Manifest, kind: str) -> Artifact:
    return next(artifact for artifact in manifest.artifacts if artifact.kind == kind)


def _step(manifest: Manifest, name: str) -> StepRecord:
    return next(step for step in _artifact(manifest, "onnx").steps if step.name == name)


# --- what a bundle holds ---


def test_bundle_is_flat_and_holds_what_its_manifest_names(tiny_bundle: Path) -> None:
    assert set(_contents(tiny_bundle)) == FILES
    manifest = read_manifest(tiny_bundle)
    check_hashes(tiny_bundle, manifest)
    named = [artifact.file for artifact in manifest.artifacts] + [record.file for record in manifest.files]
    assert sorted(named) == sorted(FILES - {"manifest.json"})
    for record in (*manifest.artifacts, *manifest.files):
        assert record.num_bytes == (tiny_bundle / record.file).stat().st_size
    assert _litter(tiny_bundle.parent) == []


def test_facts_of_the_manifest(tiny_bundle: Path, tiny_models: Path, tiny_spec: ModelSpec) -> None:
    manifest = read_manifest(tiny_bundle)
    weights = tiny_models / "tiny" / "model.safetensors"
    assert manifest.schema_version == 3
    assert manifest.spec.network == tiny_spec.network
    assert manifest.spec.preprocess == tiny_spec.preprocess
    assert (manifest.spec.name, manifest.spec.provenance.source) == ("tiny", "user")
    assert manifest.spec.provenance.weights_sha256 == file_sha256(weights)
    assert manifest.labels == tuple(f"label {i}" for i in range(10))
    assert (tiny_bundle / "labels.txt").read_text().splitlines() == list(manifest.labels)
    assert manifest.tools.keys() >= {"python", "torch", "onnx", "onnxruntime", "numpy", "pillow"}
    digest = file_sha256(tiny_models / "tiny" / "calibration.npz")[:12]
    assert manifest.options == {
        "model": "tiny", "weights": str(weights), "size_px": [32, 32], "features": False, "strides": [],
        "labels": str(tiny_models / "tiny" / "labels.txt"),
        "fp16": True, "opset": 18,
        "dynamic_batch": False, "preprocess": None, "target": None, "int8": None, "frontend": None,
        "also": [], "further_sizes_px": [], "decode": None, "suppression": None,
        "images": f"{tiny_models / 'tiny' / 'calibration.npz'} ({digest})",
    }  # fmt: skip


def test_facts_of_the_artifacts(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    assert [(item.kind, item.format, item.precision, item.opset) for item in manifest.artifacts] == [
        ("torchscript", "torchscript", "fp32", None), ("onnx", "onnx", "fp32", 18), ("onnx-fp16", "onnx", "fp16", 18),
    ]  # fmt: skip
    for artifact in manifest.artifacts:
        batch = "N" if artifact.kind == "torchscript" else 1
        assert artifact.inputs == (TensorInfo(name="input", dtype="float32", shape=(batch, 3, 32, 32)),)
        assert artifact.outputs == (TensorInfo(name="logits", dtype="float32", shape=(batch, 10)),)
    steps = {artifact.kind: [step.name for step in artifact.steps] for artifact in manifest.artifacts}
    assert steps == {
        "torchscript": ["torchscript"],
        "onnx": ["onnx", "simplify", "split-expansion"],
        "onnx-fp16": ["onnx", "simplify", "split-expansion", "fp16"],
    }
    assert all(step.detail for artifact in manifest.artifacts for step in artifact.steps)
    assert _step(manifest, "simplify").outcome == "done"


def test_artifacts_are_what_the_manifest_says(tiny_bundle: Path) -> None:
    for artifact in read_manifest(tiny_bundle).artifacts[1:]:
        path = tiny_bundle / artifact.file
        onnx.checker.check_model(path, full_check=True)
        session = open_cpu_session(path)
        assert session.inputs == {"input": (1, 3, 32, 32)}
        assert session.outputs == ["logits"]
        assert onnx.load(path).opset_import[0].version == artifact.opset
    sizes = {artifact.kind: artifact.num_bytes for artifact in read_manifest(tiny_bundle).artifacts}
    assert sizes["onnx-fp16"] < 0.6 * sizes["onnx"]  # names and shapes do not halve, and here weights are few


def test_golden_holds_real_images_and_not_those_that_fp16_is_ranged_on(
    tiny_bundle: Path, tiny_models: Path, tiny_spec: ModelSpec
) -> None:
    golden = read_golden(tiny_bundle / "golden.npz")
    stored = read_calibration(tiny_models / "tiny" / "calibration.npz")
    np.testing.assert_array_equal(golden.images, stored[::2])
    np.testing.assert_array_equal(golden.x_NCHW, preprocess(list(golden.images), tiny_spec.preprocess))
    assert golden.outputs_fp64["logits"].shape == (20, 10)
    fp16 = _artifact(read_manifest(tiny_bundle), "onnx-fp16").steps[-1]
    assert fp16.facts["num_images"] == 20


def test_same_inputs_give_the_same_bytes(tiny_bundle: Path, tiny_models: Path, output: Path) -> None:
    """In another process, at another time, into another folder."""
    command = [
        sys.executable, "-m", "cspdeploy.cli.app", "export", "tiny", "--fp16", "--no-verify", "--models",
        str(tiny_models), "-o", str(output),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=Path(cspdeploy.__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(_contents(output / "tiny")) == FILES | {"report.html"}  # which carries no hash
    first, second = _contents(tiny_bundle), _contents(output / "tiny")
    assert [name for name in sorted(FILES) if first[name] != second[name]] == []


# --- options ---


@pytest.mark.usefixtures("without_simplifier")
def test_size_opset_and_free_batch(export: Export, output: Path) -> None:
    manifest = export(size_px=(48, 40), opset=13, dynamic_batch=True, fp16=True)
    assert (manifest.spec.preprocess.height_px, manifest.spec.preprocess.width_px) == (48, 40)
    assert manifest.options["size_px"] == [48, 40]
    assert read_golden(output / "tiny" / "golden.npz").x_NCHW.shape[1:] == (3, 48, 40)
    for artifact in manifest.artifacts:
        assert artifact.inputs[0].shape == ("N", 3, 48, 40)
        assert artifact.outputs[0].shape == ("N", 10)
    for artifact in manifest.artifacts[1:]:
        path = output / "tiny" / artifact.file
        assert artifact.opset == onnx.load(path).opset_import[0].version == 13
        session = open_cpu_session(path)
        for batch in (1, 3):
            x_NCHW = np.zeros((batch, 3, 48, 40), np.float32)
            assert session.run({"input": x_NCHW})["logits"].shape == (batch, 10)


@pytest.mark.parametrize("opset", [12, 21, 99, -1, 0])
def test_opset_out_of_range(opset: int) -> None:
    with pytest.raises(InputError, match=f"--opset {opset}: expected 13 to 20"):
        ExportRequest(model="tiny", opset=opset)


@pytest.mark.usefixtures("without_simplifier")
def test_one_image_is_enough_and_progress_is_told(tiny_models: Path, output: Path, tmp_path: Path) -> None:
    """FP16 is ranged on the same image that proves it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.effect_noise((50, 40), 90).save(folder / "one.png")
    told: list[tuple[str, int, int]] = []
    request = ExportRequest(model="tiny", models=tiny_models, output=output, calibration=folder, fp16=True)
    report = export_bundle(request, progress=lambda what, done, total: told.append((what, done, total)))
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
    assert all(what and done <= total for what, done, total in told)
    assert len(read_golden(output / "tiny" / "golden.npz").images) == 1
    assert _artifact(report.manifest, "onnx-fp16").steps[-1].facts["num_images"] == 1


# --- whole or not at all ---


@pytest.mark.usefixtures("without_simplifier")
def test_existing_bundle_is_replaced_as_a_whole_by_an_untrained_one_without_fp16(
    export: Export, output: Path, tiny_bundle: Path
) -> None:
    shutil.copytree(tiny_bundle, output / "tiny")
    (output / "tiny" / "report.html").write_text("of the old one")
    manifest = export(weights="random")
    assert read_manifest(output / "tiny") == manifest
    assert set(_contents(output / "tiny")) == FILES - {"tiny.fp16.onnx"}
    assert [artifact.kind for artifact in manifest.artifacts] == ["torchscript", "onnx"]
    assert manifest.spec.provenance.untrained
    assert (manifest.spec.provenance.weights_sha256, manifest.options["weights"]) == ("", "random")
    assert _litter(output) == []


@pytest.mark.usefixtures("without_simplifier")
@pytest.mark.parametrize("existing", [True, False])
def test_failing_export_keeps_what_there_was(
    export: Export, output: Path, tmp_path: Path, tiny_bundle: Path, tiny_spec: ModelSpec, existing: bool
) -> None:
    """Weights that are finite, but make outputs that are not, are found after files have been written."""
    if existing:
        shutil.copytree(tiny_bundle, output / "tiny")
    before = _contents(output / "tiny") if existing else {}
    model = build(tiny_spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e30)
    write_safetensors(tmp_path / "huge.safetensors", model, dtype=torch.float32)
    with pytest.raises(InputError, match="NaN or infinite"):
        export(weights=str(tmp_path / "huge.safetensors"))
    assert (output / "tiny").exists() == existing
    assert not existing or _contents(output / "tiny") == before
    assert _litter(output) == []


# --- steps that are refused ---


def _fixed_timings(verdict: Literal["faster", "slower"]) -> dict[str, Timing]:
    timing = Timing(
        p50_ms=1.0, p95_ms=1.0, ci_low_ms=1.0, ci_high_ms=1.0, num_runs=1, verdict=verdict, ratio=1.0, samples_ms=(1.0,)
    )  # fmt: skip
    return {"before": dataclasses.replace(timing, verdict="reference"), "after": timing}


@pytest.mark.parametrize(("verdict", "outcome"), [("faster", "done"), ("slower", "kept")])
def test_split_expansion_must_not_measure_slower(
    export: Export,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    verdict: Literal["faster", "slower"],
    outcome: str,
) -> None:
    monkeypatch.setattr(graph_steps, "measure_latency", lambda calls, settings: _fixed_timings(verdict))
    step = _step(export(), "split-expansion")
    assert (step.outcome, step.facts["convolutions"]) == (outcome, 3)
    operators = [node.op_type for node in onnx.load(output / "tiny" / "tiny.onnx").graph.node]
    assert operators.count("Split") == (0 if outcome == "done" else 3)
    assert "slower" in step.detail if outcome == "kept" else "3 expansion convolutions" in step.detail


@pytest.mark.usefixtures("without_simplifier")
def test_split_expansion_that_is_not_exact_is_not_taken(
    export: Export, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(source: Path, target: Path) -> int:
        model = onnx.load(source)
        tensor = next(item for item in model.graph.initializer if len(item.dims) == 4)
        array = onnx.numpy_helper.to_array(tensor) * 1.001
        tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), tensor.name))
        onnx.save(model, target)
        return 3

    monkeypatch.setattr(graph_steps, "split_expansion_convolutions", spoil)
    step = _step(export(), "split-expansion")
    assert (step.outcome, step.detail) == ("kept", "not rewritten: outputs differ")
    assert "Split" in [node.op_type for node in onnx.load(output / "tiny" / "tiny.onnx").graph.node]


def test_simplifier_that_crashes_does_not_stop_the_export(
    export: Export, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(simplify, "_CHILD", [sys.executable, "-c", crash])
    step = _step(export(), "simplify")
    assert step.outcome == "kept"
    assert "crashed" in step.detail
    onnx.checker.check_model(output / "tiny" / "tiny.onnx", full_check=True)
    recorded = json.loads((output / "tiny" / "manifest.json").read_text())["artifacts"][1]["steps"][1]
    assert recorded["outcome"] == "kept"


# --- feature maps instead of classes ---


@pytest.fixture(scope="module")
def features_bundle(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("features")
    report = export_bundle(
        ExportRequest(model="tiny", models=tiny_models, output=output, fp16=True, features=True, strides=(2, 8))
    )
    return Path(report.folder)


def test_features_are_a_bundle_of_their_own(features_bundle: Path) -> None:
    manifest = read_manifest(features_bundle)
    assert (features_bundle.name, manifest.spec.task) == ("tiny-features", "features")
    for artifact in manifest.artifacts:
        batch = "N" if artifact.kind == "torchscript" else 1
        assert artifact.outputs == (
            TensorInfo(name="features_s2", dtype="float32", shape=(batch, 16, 16, 16)),
            TensorInfo(name="features_s8", dtype="float32", shape=(batch, 48, 4, 4)),
        )
    graph = onnx.load(features_bundle / "tiny-features.onnx").graph
    assert [value.name for value in graph.output] == ["features_s2", "features_s8"]
    assert not any("fc" in tensor.name for tensor in graph.initializer)  # the classifier is left out


def test_every_rung_of_a_features_bundle_holds(features_bundle: Path) -> None:
    report = verify_bundles([features_bundle], VerifySettings(isolate=False, latency=None))
    assert {row.verdict for row in report.rows} == {"pass"}, report.first_break
    assert {(row.artifact, row.runtime) for row in report.rows} >= {
        ("eager", "torch-cpu"), ("torchscript", "torchscript-cpu"), ("onnx", "ort-cpu"), ("onnx-fp16", "fp16-rounding"),
    }  # fmt: skip
    assert all(row.top1_agreement is None for row in report.rows)


def test_fault_in_one_feature_map_is_found(features_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(features_bundle, tmp_path / "broken"))
    path = folder / "tiny-features.onnx"
    model = onnx.load(path)
    last = next(node for node in model.graph.node if node.output[0] == "features_s8")
    assert last.op_type == "LeakyRelu"
    last.attribute[0].f = 0.1  # instead of 0.01
    path.write_bytes(model.SerializeToString())
    data = json.loads((folder / "manifest.json").read_text())
    for entry in data["artifacts"]:
        entry["sha256"] = file_sha256(folder / entry["file"])
        entry["num_bytes"] = (folder / entry["file"]).stat().st_size
    (folder / "manifest.json").write_text(json.dumps(data))
    report = verify_bundles([folder], VerifySettings(isolate=False, latency=None, runtimes=("ort-cpu",)))
    rows = {row.artifact: row for row in report.rows}
    assert rows["onnx"].verdict == "numeric"
    assert rows["onnx"].reason.startswith("features_s8: ")
    assert rows["onnx-fp16"].verdict == "pass"


def test_labelled_accuracy_of_features_is_refused(features_bundle: Path, tmp_path: Path) -> None:
    images = np.zeros((2, 4, 4), np.uint8)
    data = LabelledImages(
        name="d/test", labels=tuple(f"label {i}" for i in range(10)), classes=np.array([0, 1]), stored=images, paths=()
    )
    with pytest.raises(InputError, match="gives features_s2, features_s8, not classes"):
        verify_bundles([features_bundle], VerifySettings(isolate=False, latency=None, accuracy=data))


def test_strides_without_features_are_refused(tiny_models: Path, output: Path) -> None:
    with pytest.raises(InputError, match="--strides") as caught:
        ExportRequest(model="tiny", models=tiny_models, output=output, strides=(8,))
    assert caught.value.fix == "add --features"
