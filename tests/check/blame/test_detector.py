"""Detectors: a planted fault is named in files of every contract, though no engine sees their last nodes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from PIL import Image
from torch import nn

from cspdeploy.check.blame import BlameReport, BlameRequest, blame
from cspdeploy.core.bundle import file_record, read_manifest, write_manifest
from cspdeploy.core.detection.spec import DECODES, Decode
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import read_golden
from cspdeploy.export import simplify
from cspdeploy.export.decode import add_decode
from cspdeploy.nets.darknet.cfg import read_cfg
from cspdeploy.nets.darknet.network import DarknetNet
from cspdeploy.nets.darknet.weights import write_darknet
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from tests.check import detectors

CONV = "[convolutional]\nbatch_normalize=1\nfilters={}\nsize=3\nstride={}\npad=1\nactivation=leaky\n"
HEAD = (
    "[convolutional]\nfilters=14\nsize=1\nactivation=linear\n"
    "[yolo]\nmask={}\nanchors=8,12, 20,22, 40,30\nclasses=2\nnum=3\nscale_x_y=1.05\n"
)
DETECTOR = (
    "[net]\nheight=32\nwidth=32\nchannels=3\n"
    + "".join(CONV.format(filters, stride) for filters, stride in ((8, 2), (8, 1), (12, 2), (12, 1), (16, 2), (16, 1)))
    + HEAD.format("1,2")
    + "[route]\nlayers=-4\n"
    + HEAD.format("0,1")
)
slow = pytest.mark.slow
FILES = {"fp32": "tiny-yolo.onnx", "fp16": "tiny-yolo.fp16.onnx", "int8": "tiny-yolo.int8.onnx"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Decode], Path]:
    """`exported(decode)`: a bundle with FP32, FP16 and INT8 files, made once."""
    place = tmp_path_factory.mktemp("detector")
    (place / "tiny-yolo.cfg").write_text(DETECTOR)
    torch.manual_seed(0)
    network = DarknetNet(read_cfg(place / "tiny-yolo.cfg"))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.9, 1.1)
            nn.init.normal_(module.bias, std=0.05)
        elif isinstance(module, nn.Conv2d):  # what goes in must be seen in what comes out
            nn.init.kaiming_normal_(module.weight, a=0.1)
            if module.bias is not None:
                nn.init.normal_(module.weight, std=0.5)
    write_darknet(place / "tiny-yolo.weights", network)
    rng = np.random.default_rng(0)
    (place / "photos").mkdir()
    for index in range(8):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        coarse.resize((48, 36), Image.Resampling.BICUBIC).save(place / "photos" / f"{index}.png")
    made: dict[Decode, Path] = {}

    def make(decode: Decode) -> Path:
        if decode not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(simplify, "_CHILD", ["false"])
                report = export_bundle(ExportRequest(
                    model=str(place / "tiny-yolo.cfg"), weights=str(place / "tiny-yolo.weights"),
                    calibration=place / "photos", output=place / decode, decode=decode, fp16=True,
                ))  # fmt: skip
            made[decode] = Path(report.folder)
            _add_int8(made[decode])
        return made[decode]

    return make


@pytest.fixture
def blame_damaged(exported: Callable[[Decode], Path], tmp_path: Path) -> Callable[..., BlameReport]:
    """`blame_damaged(decode, file, harm)`: of a copy of the bundle in which `harm(model)` has changed that file."""

    def make(decode: Decode, file: str, harm: Callable[[onnx.ModelProto], None] | None = None) -> BlameReport:
        folder = tmp_path / "copy"
        shutil.copytree(exported(decode), folder)
        if harm is not None:
            model = onnx.load(folder / file)
            harm(model)
            onnx.save(model, folder / file)
            manifest = read_manifest(folder)
            record = file_record(folder / file)
            artifacts = tuple(
                dataclasses.replace(item, sha256=record.sha256, num_bytes=record.num_bytes)
                if item.file == file else item for item in manifest.artifacts
            )  # fmt: skip
            write_manifest(folder, dataclasses.replace(manifest, artifacts=artifacts))
        return blame(BlameRequest(artifact=folder / file))

    return make


class _Golden(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, folder: Path) -> None:
        self._inputs = iter([{"input": x[None]} for x in read_golden(folder / "golden.npz").x_NCHW])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._inputs, None)


def _add_int8(folder: Path) -> None:
    """The network in 8 bits, heads and decoding in float, as an export writes it."""
    manifest = read_manifest(folder)
    spec, detection = manifest.spec, manifest.spec.detection
    assert detection is not None
    network, small = folder.parent / "network.onnx", folder.parent / "small.onnx"
    if detection.decode == "raw":
        shutil.copyfile(folder / FILES["fp32"], network)
    else:
        onnx.utils.extract_model(folder / FILES["fp32"], network, ["input"], list(detection.raw_outputs))
    heads = [node.name for node in onnx.load(network).graph.node if set(node.output) & set(detection.raw_outputs)]
    quantize_static(
        network, small, _Golden(folder), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8, per_channel=True, nodes_to_exclude=heads,
    )  # fmt: skip
    path = folder / FILES["int8"]
    side = spec.preprocess.height_px
    add_decode(small, path, detection=detection, num_classes=2, height_px=side, width_px=side)
    plain = next(item for item in manifest.artifacts if item.kind == "onnx")
    record = file_record(path)
    added = dataclasses.replace(
        plain, kind="onnx-int8", file=record.file, precision="int8", sha256=record.sha256, num_bytes=record.num_bytes
    )
    write_manifest(folder, dataclasses.replace(manifest, artifacts=(*manifest.artifacts, added)))


def _scale(model: onnx.ModelProto, name: str, factor: float) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), name))


def _convolution(model: onnx.ModelProto) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == "Conv"][2]


@pytest.mark.parametrize(
    "decode", ["nms", "decoded", *(pytest.param(one, marks=slow) for one in ("trt", "ultralytics"))]
)
def test_a_file_against_that_of_another_bundle(decode: Decode, tmp_path: Path, ladder: Any) -> None:
    """Neither has an original here: its weights are nowhere, and its FP32 file is what is wrong."""
    sound, harmed = (detectors.make_bundle(tmp_path / name / "tiny", decode) for name in ("sound", "harmed"))
    path = next(harmed.glob("*.onnx"))
    request = BlameRequest(artifact=path, against=str(sound / path.name))
    assert blame(request).verdict == "within"
    model = onnx.load(path)
    _scale(model, "w", 1.1)
    onnx.save(model, path)
    ladder.rehash(harmed)
    report = blame(request)
    assert report.blamed is not None
    assert (report.blamed.node, report.verdict) == ("conv", "introduced")
    with pytest.raises(InputError, match="does not stand for them"):
        blame(BlameRequest(artifact=path))


def test_another_form_of_outputs_is_refused(tmp_path: Path) -> None:
    """The one tensor of the other has no boxes and scores inside, and these have no maps of heads any more."""
    own = detectors.make_bundle(tmp_path / "own" / "tiny", "decoded")
    other = detectors.make_bundle(tmp_path / "other" / "tiny", "raw")
    with pytest.raises(InputError, match="no boxes and scores of all candidates inside"):
        blame(BlameRequest(artifact=next(own.glob("*.onnx")), against=str(next(other.glob("*.onnx")))))


@slow
@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("precision", FILES)
def test_nothing_in_a_sound_file(decode: Decode, precision: str, blame_damaged: Callable[..., BlameReport]) -> None:
    report = blame_damaged(decode, FILES[precision])
    assert report.precision == precision
    # Maps have no wider limit as scores do, and those of these random weights are beyond it; no one node is at fault.
    maps = precision == "int8" and decode in ("raw", "ultralytics")
    assert report.verdict in (("within", "accumulated") if maps else ("within",))
    told = {"nms": "suppression", "trt": "suppression", "ultralytics": "decodes"}.get(decode, "")
    assert any(told in note for note in report.notes if told) == bool(told)


@slow
@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_scaled_weights_of_a_convolution(
    decode: Decode, precision: str, blame_damaged: Callable[..., BlameReport]
) -> None:
    blamed: list[str] = []

    def harm(model: onnx.ModelProto) -> None:
        node = _convolution(model)
        _scale(model, node.input[1], 3.0)
        blamed.append(node.name)

    report = blame_damaged(decode, FILES[precision], harm)
    assert report.blamed is not None
    assert (report.blamed.node, report.verdict) == (blamed[0], "introduced")


@slow
@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("which", ["activation", "weight"])
def test_wrong_scale_of_a_quantiser(decode: Decode, which: str, blame_damaged: Callable[..., BlameReport]) -> None:
    blamed: list[str] = []

    def harm(model: onnx.ModelProto) -> None:
        node = _convolution(model)
        makers = {name: item for item in model.graph.node for name in item.output}
        reader = makers[node.input[0 if which == "activation" else 1]]
        assert reader.op_type == "DequantizeLinear"
        changed = [reader]
        if which == "activation":
            changed.insert(0, makers[reader.input[0]])
        for item in changed:
            scale = next(tensor for tensor in model.graph.initializer if tensor.name == item.input[1])
            wrong = numpy_helper.to_array(scale) * np.float32(0.05 if which == "activation" else 3.0)
            name = f"{item.output[0]}_wrong"
            model.graph.initializer.append(numpy_helper.from_array(wrong.astype(np.float32), name))
            item.input[1] = name
        blamed.append(changed[0].name)

    report = blame_damaged(decode, FILES["int8"], harm)
    assert report.blamed is not None
    assert report.blamed.node == blamed[0]


@slow
@pytest.mark.parametrize("decode", ["nms", "decoded"])
def test_a_fault_of_the_decoding(decode: Decode, blame_damaged: Callable[..., BlameReport]) -> None:
    """Anchors of one head that are too wide: behind the network, in front of the suppression."""
    heads: list[str] = []

    def harm(model: onnx.ModelProto) -> None:
        name = next(tensor.name for tensor in model.graph.initializer if tensor.name.endswith("/halves"))
        _scale(model, name, 1.2)
        heads.extend(node.name for node in model.graph.node if name in node.input)

    report = blame_damaged(decode, FILES["fp32"], harm)
    assert report.blamed is not None
    assert report.blamed.node in heads
