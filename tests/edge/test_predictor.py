from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from cspdeploy.core.bundle import file_record, write_manifest
from cspdeploy.core.errors import InputError, RuntimeUnavailableError, TamperedError
from cspdeploy.core.golden import Golden, read_golden
from cspdeploy.core.metrics import relative_l2, softmax
from cspdeploy.core.spec import ModelSpec
from cspdeploy.core.types import Artifact, Manifest, TensorInfo
from cspdeploy.edge import Predictor
from cspdeploy.export import simplify
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))


@pytest.fixture(scope="module")
def golden(tiny_bundle: Path) -> Golden:
    return read_golden(tiny_bundle / "golden.npz")


@pytest.mark.parametrize(
    ("artifact", "runtime", "limit"),
    [
        ("onnx", "ort-cpu", 1e-5),
        ("torchscript", "torchscript-cpu", 1e-5),
        ("onnx-fp16", "ort-cpu", 1e-2),
        ("onnx-fp16", "fp16-rounding", 1e-2),
    ],
)
def test_answers_are_the_golden_ones(
    tiny_bundle: Path, golden: Golden, artifact: str, runtime: str, limit: float
) -> None:
    logits = Predictor.open(tiny_bundle, artifact=artifact, runtime=runtime).logits(*golden.images)
    assert logits.dtype == np.float32
    assert relative_l2(logits, golden.outputs_fp64["logits"]) < limit


def test_batch_over_a_fixed_batch_model_is_each_image_by_itself(tiny_bundle: Path, golden: Golden) -> None:
    predictor = Predictor.open(tiny_bundle)
    together = predictor.logits(*golden.images[:7])
    assert together.shape == (7, 10)
    for i in range(7):
        assert np.array_equal(predictor.logits(golden.images[i])[0], together[i])


@pytest.mark.parametrize("batch", [2, 4, 7])
@pytest.mark.parametrize("num_images", [1, 4, 5])
def test_last_call_of_a_fixed_batch_is_filled_up(
    tmp_path: Path, tiny_spec: ModelSpec, batch: int, num_images: int
) -> None:
    """The network gives each image's mean colour, so that no image can stand for another."""
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    mean (float[{batch},3,32,32] input) => (float[{batch},3] logits) {{
        logits = ReduceMean<axes = [2, 3], keepdims = 0>(input)
    }}"""
    (tmp_path / "mean.onnx").write_bytes(onnx.parser.parse_model(text).SerializeToString())
    record = file_record(tmp_path / "mean.onnx")
    artifact = Artifact(
        kind="onnx", file=record.file, format="onnx", precision="fp32", sha256=record.sha256,
        num_bytes=record.num_bytes, opset=17, steps=(),
        inputs=(TensorInfo(name="input", dtype="float32", shape=(batch, 3, 32, 32)),),
        outputs=(TensorInfo(name="logits", dtype="float32", shape=(batch, 3)),),
    )  # fmt: skip
    manifest = Manifest(
        spec=dataclasses.replace(tiny_spec, num_classes=3),
        labels=("red", "green", "blue"),
        artifacts=(artifact,),
        files=(),
        options={},
        tools={},
    )
    write_manifest(tmp_path, manifest)
    colours = np.random.default_rng(0).integers(0, 256, (num_images, 3), np.uint8)
    images = [np.broadcast_to(colour, (32, 32, 3)) for colour in colours]
    logits = Predictor.open(tmp_path).logits(*images)
    assert np.allclose(logits, (colours / 255 - 0.5) / 0.25, atol=1e-5)


def test_prediction_is_likeliest_first_with_softmax(tiny_bundle: Path, golden: Golden) -> None:
    predictor = Predictor.open(tiny_bundle)
    found = predictor(golden.images[0], top=4)
    expected = softmax(golden.outputs_fp64["logits"])[0]
    assert [prediction.index for prediction in found] == np.argsort(-expected)[:4].tolist()
    for prediction in found:
        assert prediction.label == f"label {prediction.index}"
        assert prediction.probability == pytest.approx(expected[prediction.index], rel=1e-4)
    assert sum(prediction.probability for prediction in predictor(golden.images[0], top=99)) == pytest.approx(1)
    assert len(predictor(golden.images[0], top=99)) == 10


def test_path_bytes_and_array_are_the_same_image(tiny_bundle: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (40, 50, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    (tmp_path / "photo.png").write_bytes(buffer.getvalue())
    predictor = Predictor.open(str(tiny_bundle))
    expected = predictor(pixels)
    for source in (buffer.getvalue(), tmp_path / "photo.png", str(tmp_path / "photo.png")):
        assert predictor(source) == expected


def test_no_image(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="no image given"):
        Predictor.open(tiny_bundle).logits()


def test_not_an_image(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_text("words")
    with pytest.raises(InputError, match=r"photo\.png: not an image"):
        Predictor.open(tiny_bundle)(tmp_path / "photo.png")


def test_unknown_artifact_names_those_that_are_there(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="no artifact 'onnx-int8', it has torchscript, onnx, onnx-fp16") as caught:
        Predictor.open(tiny_bundle, artifact="onnx-int8")
    assert caught.value.fix.startswith("--artifact ")


@pytest.mark.parametrize(
    ("artifact", "runtime"),
    [("onnx", "torchscript-cpu"), ("torchscript", "ort-cpu"), ("onnx", "fp16-rounding"), ("onnx", "torch-cpu")],
)
def test_runtime_that_does_not_read_the_artifact(tiny_bundle: Path, artifact: str, runtime: str) -> None:
    with pytest.raises(InputError, match=f"--runtime {runtime}: does not read '{artifact}'"):
        Predictor.open(tiny_bundle, artifact=artifact, runtime=runtime)


def test_unknown_and_absent_runtime(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--runtime ort-gpu: unknown"):
        Predictor.open(tiny_bundle, runtime="ort-gpu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailableError, match="ort-cuda"):
        Predictor.open(tiny_bundle, runtime="ort-cuda")


@pytest.mark.parametrize("file", ["tiny.onnx", "tiny.torchscript.pt", "labels.txt"])
def test_changed_file_is_refused_whichever_it_is(bundle: Path, file: str) -> None:
    content = bytearray((bundle / file).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / file).write_bytes(content)
    with pytest.raises(TamperedError, match=file.replace(".", r"\.")):
        Predictor.open(bundle)


def test_folder_without_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json"):
        Predictor.open(tmp_path)


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_untrained_weights_are_told(bundle: Path) -> None:
    assert not Predictor.open(bundle).untrained
    _edit(bundle, lambda data: data["spec"]["provenance"].update(source="random"))
    assert Predictor.open(bundle).untrained


def test_labels_that_do_not_fit_the_classes(bundle: Path) -> None:
    _edit(bundle, lambda data: data.update(labels=data["labels"][:3]))
    with pytest.raises(InputError, match="labels"):
        Predictor.open(bundle)


def test_artifact_without_inputs(bundle: Path) -> None:
    _edit(bundle, lambda data: data["artifacts"][1].update(inputs=[]))
    with pytest.raises(InputError, match="manifest"):
        Predictor.open(bundle)


def test_outputs_by_name_and_no_classes_of_a_features_bundle(
    tiny_models: Path, tmp_path: Path, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simplify, "_CHILD", ["false"])
    report = export_bundle(ExportRequest(model="tiny", models=tiny_models, output=tmp_path, features=True))
    predictor = Predictor.open(report.folder)
    assert predictor.task == "features"
    found = predictor.outputs(*golden.images[:3])
    expected = read_golden(Path(report.folder) / "golden.npz").outputs_fp64
    assert list(found) == ["features_s4", "features_s8"]
    for name, maps in found.items():
        assert relative_l2(maps, expected[name][:3]) < 1e-5
    with pytest.raises(InputError, match="not classes") as caught:
        predictor(golden.images[0])
    assert ".outputs(IMAGE)" in caught.value.fix
