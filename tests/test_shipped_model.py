"""The model that the repository ships, through the whole pipeline: what a user of it relies on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cspdeploy.check.ladder import VerifySettings, verify_bundles
from cspdeploy.core.catalog import EAGER
from cspdeploy.core.codec import to_json
from cspdeploy.core.datasets import FASHION_MNIST_FOLDER, open_dataset
from cspdeploy.core.model_folder import read_calibration, read_labels, read_spec
from cspdeploy.core.results import VerifyReport
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle

MODELS = Path(__file__).parents[1] / "models"
FOLDER = MODELS / "cspdarknet53"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exported")
    export_bundle(ExportRequest(model="cspdarknet53", models=MODELS, output=output, fp16=True))
    return output / "cspdarknet53"


@pytest.fixture(scope="module")
def report(bundle: Path) -> VerifyReport:
    # The weights are found by their hash, wherever the bundle lies.
    return verify_bundles([bundle], VerifySettings(isolate=False, latency=None))


def test_folder_is_whole() -> None:
    spec = read_spec(FOLDER)
    assert spec.provenance.source == "trained"
    assert spec.provenance.accuracy is not None
    assert spec.provenance.accuracy.num_images == 10_000
    assert spec.provenance.accuracy.top1 >= 0.93
    assert len(read_labels(FOLDER / "labels.txt", num_classes=spec.num_classes)) == 10
    assert len(read_calibration(FOLDER / "calibration.npz")) == 512
    curve = json.loads((FOLDER / "train.json").read_text())
    assert len(curve["epochs"]) == curve["recipe"]["epochs"]


@pytest.mark.timeout(600)
def test_every_row_passes_within_the_promised_distance(report: VerifyReport) -> None:
    assert report.verdict == "pass"
    rows = {(row.artifact, row.runtime): row for row in report.rows}
    for artifact, runtime in ((EAGER, "torch-cpu"), ("torchscript", "torchscript-cpu"), ("onnx", "ort-cpu")):
        assert rows[artifact, runtime].verdict == "pass"
        assert rows[artifact, runtime].rel_l2 < 1e-5
    for runtime in ("ort-cpu", "fp16-rounding"):
        assert rows["onnx-fp16", runtime].verdict == "pass"
        assert rows["onnx-fp16", runtime].rel_l2 < 1e-2
    assert to_json(report)["rows"][0]["artifact"] == "preprocess"


def test_fp16_file_is_half_the_size(bundle: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in bundle.iterdir()}
    assert sizes["cspdarknet53.fp16.onnx"] <= 0.51 * sizes["cspdarknet53.onnx"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_labelled_accuracy_is_the_recorded_one_on_every_runtime(bundle: Path) -> None:
    if not (FASHION_MNIST_FOLDER / "t10k-images-idx3-ubyte.gz").is_file():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    data = open_dataset("fashion-mnist", split="test")
    report = verify_bundles([bundle], VerifySettings(isolate=False, latency=None, accuracy=data))
    recorded = read_spec(FOLDER).provenance.accuracy
    assert recorded is not None
    measured = {f"{row.artifact} on {row.runtime}": row.top1 for row in report.rows if row.top1 is not None}
    assert len(measured) == 5
    assert all(abs(top1 - recorded.top1) <= 0.001 for top1 in measured.values())
