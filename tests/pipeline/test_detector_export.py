"""A detector from its cfg to a bundle: every contract, with what else an export can be asked for."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cspdeploy.core.bundle import read_manifest
from cspdeploy.core.card import read_card
from cspdeploy.core.detection.postprocess import find_boxes
from cspdeploy.core.detection.spec import Decode, Suppression, SuppressionOptions
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import read_golden
from cspdeploy.core.onnx_graph import read_onnx
from cspdeploy.core.types import Artifact, Frontend, Manifest
from cspdeploy.export import simplify
from cspdeploy.nets.darknet.cfg import read_cfg
from cspdeploy.nets.darknet.network import DarknetNet
from cspdeploy.nets.darknet.weights import write_darknet
from cspdeploy.pipeline.darknet import spec_of_cfg
from cspdeploy.pipeline.decode_step import DecodeStep
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.pipeline.reproduce import reproduce_bundle
from cspdeploy.pipeline.source import with_decode
from cspdeploy.runtimes import require_runtime
from cspdeploy.runtimes.base import SessionRequest
from cspdeploy.runtimes.ort import open_cpu_session

CONV = "[convolutional]\nbatch_normalize=1\nfilters={}\nsize=3\nstride=2\npad=1\nactivation=leaky\n"
HEAD = (
    "[convolutional]\nfilters=14\nsize=1\nactivation=linear\n"
    "[yolo]\nmask={}\nanchors=8,12, 20,22, 40,30\nclasses=2\nnum=3\nscale_x_y=1.05\n"
)
DETECTOR = (
    "[net]\nheight=64\nwidth=64\nchannels=3\n"
    + "".join(CONV.format(filters) for filters in (8, 8, 16, 16))
    + HEAD.format("1,2")
    + "[route]\nlayers=-4\n"
    + HEAD.format("0,1")
)
RULE = SuppressionOptions(score_threshold=0.3, max_detections=25)
CONTRACTS: tuple[Decode, ...] = ("raw", "decoded", "nms", "ultralytics")


@pytest.fixture(autouse=True)
def without_simplifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplify, "_CHILD", ["false"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cfg with weights, photographs and names."""
    folder = tmp_path_factory.mktemp("detector")
    (folder / "tiny-yolo.cfg").write_text(DETECTOR)
    (folder / "own.names").write_text("ant\nbee\n")
    torch.manual_seed(0)
    network = DarknetNet(read_cfg(folder / "tiny-yolo.cfg"))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.6)
            nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:  # a head: scores that differ
            nn.init.normal_(module.weight, std=0.4)
    write_darknet(folder / "tiny-yolo.weights", network)
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for index in range(8):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        coarse.resize((96, 72), Image.Resampling.BICUBIC).save(folder / "photos" / f"{index}.png")
    return folder


@pytest.fixture
def request_for(place: Path, tmp_path: Path) -> Callable[..., ExportRequest]:
    def make(**changes: Any) -> ExportRequest:
        return ExportRequest(**{
            "model": str(place / "tiny-yolo.cfg"), "weights": str(place / "tiny-yolo.weights"),
            "calibration": place / "photos", "names": place / "own.names", "output": tmp_path / "out",
            "suppression": RULE, **changes,
        })  # fmt: skip

    return make


def export(request: ExportRequest) -> tuple[Path, Manifest]:
    report = export_bundle(request)
    return Path(report.folder), read_manifest(Path(report.folder))


def of_kind(manifest: Manifest, kind: str) -> Artifact:
    return next(artifact for artifact in manifest.artifacts if artifact.kind == kind)


@pytest.mark.parametrize("decode", CONTRACTS)
def test_every_file_gives_the_boxes_of_the_network(request_for: Callable[..., ExportRequest], decode: Decode) -> None:
    folder, manifest = export(request_for(decode=decode, fp16=True, dynamic_batch=True))
    golden, detection = read_golden(folder / "golden.npz"), manifest.spec.detection
    assert detection is not None
    assert tuple(golden.outputs_fp32) == detection.network_outputs
    expected = find_boxes(golden.outputs_fp32, detection, detection.network_decode)
    assert sum(len(found) for found in expected) > 20
    for artifact in (of_kind(manifest, "onnx"), of_kind(manifest, "onnx-fp16")):
        session = open_cpu_session(folder / artifact.file)
        outputs = session.run({"input": golden.x_NCHW})
        assert [(value.name, value.dtype) for value in artifact.outputs] == [
            (name, str(value.dtype)) for name, value in outputs.items()
        ]
        for value in artifact.outputs:
            assert (len(golden.x_NCHW), *value.shape[1:]) == outputs[value.name].shape
        card = read_card(read_onnx(folder / artifact.file).metadata, name=artifact.file)
        assert card is not None
        assert (card.decode, card.detection) == (artifact.decode, detection) == (decode, detection)
        if artifact.precision == "fp32":
            for found, other in zip(find_boxes(outputs, detection, decode), expected, strict=True):
                assert found.classes_M.tolist() == other.classes_M.tolist()
                np.testing.assert_allclose(found.boxes_M4, other.boxes_M4, atol=1e-2)
    step = next(step for step in of_kind(manifest, "onnx").steps if step.name == "decode")
    assert step.facts == {"decode": decode, "candidates": 2 * (4 * 4 + 8 * 8)}
    traced = of_kind(manifest, "torchscript")
    assert traced.decode == detection.network_decode
    assert [value.name for value in traced.outputs] == list(detection.network_outputs)


def test_for_tensorrt(request_for: Callable[..., ExportRequest]) -> None:
    folder, manifest = export(request_for(decode="trt", target="tensorrt-10"))
    artifact = of_kind(manifest, "onnx")
    assert [(value.name, value.dtype, value.shape) for value in artifact.outputs] == [
        ("num_dets", "int32", (1, 1)), ("det_boxes", "float32", (1, 25, 4)), ("det_scores", "float32", (1, 25)),
        ("det_classes", "int32", (1, 25)),
    ]  # fmt: skip
    assert "ONNX Runtime cannot load the file" in artifact.steps[-1].detail
    assert tuple(read_golden(folder / "golden.npz").outputs_fp32) == ("boxes", "scores")


@pytest.mark.parametrize(
    ("changes", "message", "fix"),
    [
        ({"decode": "trt", "also": ("ort",)}, "--decode trt: ONNX Runtime, which writes --also ort", "--decode nms"),
        ({"decode": "trt", "also": ("opt",)}, "writes --also opt, has no such operator", "leave out --also opt"),
        ({"decode": "trt", "target": "ort-web"}, "a plugin of TensorRT, which ort-web has not", "--decode nms"),
        ({"decode": "nms", "target": "opencv-4.11"}, "opencv-4.11 has no operator NonMax", "--decode decoded"),
        ({"decode": "nms", "target": "opencv-4"}, "takes opset 13 at least, the files have 12", "--decode decoded"),
        ({"decode": "nms", "features": True}, "--decode: is of boxes", "leave out --features"),
        ({"features": True}, "--score-threshold: is of boxes", "leave out --features"),
        ({"features": True, "suppression": SuppressionOptions(iou_threshold=0.5)}, "--iou-threshold: is of", "leave"),
        ({"frontend": Frontend(top_k=1)}, "--embed-topk 1: tiny-yolo gives boxes, scores", "leave out --embed-topk"),
    ],
)
def test_what_does_not_go_together(
    request_for: Callable[..., ExportRequest], tmp_path: Path, changes: dict[str, Any], message: str, fix: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        export_bundle(request_for(**changes))
    assert fix in caught.value.fix
    assert not list((tmp_path / "out").glob("*/*"))


def test_a_classifier_has_no_boxes(tiny_models: Path, tmp_path: Path) -> None:
    request = ExportRequest(model="tiny", models=tiny_models, output=tmp_path, decode="nms")
    with pytest.raises(InputError, match="--decode: 'tiny' gives logits, not boxes"):
        export_bundle(request)
    with pytest.raises(InputError, match="--decode: is of networks that are built here"):
        ExportRequest(model="net.onnx", decode="nms")
    few = SuppressionOptions(max_detections=9)
    with pytest.raises(InputError, match="--max-detections: 'tiny' gives logits, not boxes"):
        export_bundle(dataclasses.replace(request, decode=None, suppression=few))
    with pytest.raises(InputError, match="--max-detections: is of networks that are built here"):
        ExportRequest(model="net.onnx", suppression=few)


def test_one_option_of_the_suppression_leaves_the_others_as_the_model_has_them(place: Path) -> None:
    spec = spec_of_cfg(place / "tiny-yolo.cfg")
    assert spec.detection is not None
    own = Suppression(score_threshold=0.1, iou_threshold=0.7, max_detections=50)
    spec = dataclasses.replace(spec, detection=dataclasses.replace(spec.detection, suppression=own))
    found = with_decode(spec, decode=None, suppression=SuppressionOptions(iou_threshold=0.3)).detection
    assert found is not None
    assert found.suppression == dataclasses.replace(own, iou_threshold=0.3)


def test_what_the_cfg_asks_for_and_does_not_get_is_said(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "greedy.cfg"
    path.write_text(DETECTOR.replace("scale_x_y=1.05", "scale_x_y=1.05\nnms_kind=greedynms\nbeta_nms=0.6"))
    said = "suppression by plain overlap; the cfg asks for greedynms (beta_nms 0.6)"
    assert said in DecodeStep(spec_of_cfg(path))._detail()
    assert "plain overlap" not in DecodeStep(spec_of_cfg(place / "tiny-yolo.cfg"))._detail()


def test_a_size_that_the_strides_do_not_divide(
    place: Path, tmp_path: Path, request_for: Callable[..., ExportRequest]
) -> None:
    """Its map has a cell more than the decoding knows of. The cfg's own size is mended by --size."""
    with pytest.raises(InputError, match="100x64 px, expected multiples of 16") as caught:
        export_bundle(request_for(size_px=(100, 64)))
    assert caught.value.fix == "--size 96x64"
    own = tmp_path / "own.cfg"
    own.write_text(DETECTOR.replace("height=64\nwidth=64", "height=100\nwidth=100"))
    with pytest.raises(InputError, match="100x100 px, expected multiples of 16") as caught:
        export_bundle(request_for(model=str(own)))
    assert caught.value.fix == "--size 96x96"
    assert export(request_for(model=str(own), size_px=(96, 96)))[1].spec.preprocess.height_px == 96


def test_preprocessing_in_the_graph(request_for: Callable[..., ExportRequest]) -> None:
    """Its resize is measured on candidates: boxes that are suppressed cannot be subtracted from each other."""
    folder, manifest = export(request_for(decode="nms", frontend=Frontend(resize=True)))
    artifact, detection = of_kind(manifest, "onnx-u8"), manifest.spec.detection
    assert detection is not None
    assert [value.name for value in artifact.outputs] == ["detections", "num_detections"]
    image = np.asarray(Image.open(next(iter(sorted(Path(request_for().calibration or "").iterdir())))))
    outputs = open_cpu_session(folder / artifact.file).run({"image": image[None]})
    (found,) = find_boxes(outputs, detection, "nms")
    assert len(found) > 0


@pytest.mark.slow
def test_further_forms_and_sizes(request_for: Callable[..., ExportRequest]) -> None:
    """Each size has candidates of its own; PyTorch's and ONNX Runtime's own forms give the same boxes."""
    folder, manifest = export(request_for(decode="nms", also=("pt2", "ort"), further_sizes_px=((96, 64),)))
    detection, golden = manifest.spec.detection, read_golden(folder / "golden.npz")
    assert detection is not None
    steps = {artifact.kind: artifact.steps for artifact in manifest.artifacts}
    found = {
        kind: next((step.facts["candidates"] for step in of if step.name == "decode"), None)
        for kind, of in steps.items()
    }
    assert found["onnx"] == 160
    assert found["onnx@96x64"] == 240
    expected = find_boxes(golden.outputs_fp32, detection, "decoded")
    for kind, runtime in (("pt2", "pt2-cpu"), ("ort", "ort-cpu"), ("torchscript", "torchscript-cpu")):
        artifact = of_kind(manifest, kind)
        names = tuple(value.name for value in artifact.outputs)
        session = require_runtime(runtime).open(SessionRequest(path=folder / artifact.file, outputs=names))
        outputs = session.run({artifact.inputs[0].name: golden.x_NCHW[:1]})
        assert artifact.decode is not None
        (one,) = find_boxes(outputs, detection, artifact.decode)
        assert one.classes_M.tolist() == expected[0].classes_M.tolist()
        np.testing.assert_allclose(one.boxes_M4, expected[0].boxes_M4, atol=1e-2)


def test_is_built_again_to_the_byte(request_for: Callable[..., ExportRequest]) -> None:
    folder, _ = export(request_for(decode="nms", suppression=dataclasses.replace(RULE, iou_threshold=0.6)))
    assert reproduce_bundle(folder).verdict == "equal"


def test_a_network_whose_boxes_are_infinite(place: Path, request_for: Callable[..., ExportRequest]) -> None:
    """Its sizes are exponentials of what its heads give."""
    network = DarknetNet(read_cfg(place / "tiny-yolo.cfg"))
    for parameter in network.parameters():
        nn.init.constant_(parameter, 9.0)
    weights = place / "wild.weights"
    write_darknet(weights, network)
    with pytest.raises(InputError, match=r"NaN or infinite on real images \(boxes\)"):
        export_bundle(request_for(weights=str(weights)))


def test_a_bundle_of_before_there_were_boxes(request_for: Callable[..., ExportRequest]) -> None:
    folder, _ = export(request_for(decode="raw"))
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    data["spec"]["detection"] = None
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="detection: expected for the task 'detect'") as caught:
        read_manifest(folder)
    assert "export" in caught.value.fix
    shutil.rmtree(folder)
