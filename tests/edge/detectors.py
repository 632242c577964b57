"""Bundles of detectors whose outputs are known: constants, in each of the contracts, of which ONNX Runtime adds 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cspdeploy.core.bundle import file_record, write_manifest
from cspdeploy.core.card import card_of, stamp_card
from cspdeploy.core.detection.boxes import Boxes, suppress
from cspdeploy.core.detection.decode import decode_heads
from cspdeploy.core.detection.spec import Decode, Detection, DetectionHead, Suppression
from cspdeploy.core.golden import Golden, write_golden
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.spec import ModelSpec, NetworkSpec, Preprocess, Provenance
from cspdeploy.core.types import Artifact, Manifest, TensorInfo

LABELS = ("cat", "dog", "apple")
CONTRACT = Preprocess(
    height_px=32, width_px=64, resize="letterbox", crop_pct=1.0, interpolation="bilinear", channel_order="rgb",
    mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
)  # fmt: skip
HEADS = (
    DetectionHead(output="head_s8", stride_px=8, anchors=((10.0, 14.0), (23.0, 9.0)), scale_x_y=1.05),
    DetectionHead(output="head_s16", stride_px=16, anchors=((37.0, 28.0),), scale_x_y=1.2),
)
ALL_DECODES: tuple[Decode, ...] = ("raw", "decoded", "ultralytics", "nms")


def detection_of(decode: Decode, *, new_coords: bool = False, suppression: Suppression | None = None) -> Detection:
    heads = tuple(dataclasses.replace(head, new_coords=new_coords) for head in HEADS)
    return Detection(heads=heads, decode=decode, suppression=suppression or Suppression())


def raw_heads(seed: int = 0, *, num: int = 1, new_coords: bool = False) -> dict[str, np.ndarray]:
    """Of 32x64 px and three classes: some candidates of many score above 0.25."""
    rng = np.random.default_rng(seed)
    shapes = {"head_s8": (num, 16, 4, 8), "head_s16": (num, 8, 2, 4)}
    maps = {name: rng.normal(0, 1.5, shape).astype(np.float32) for name, shape in shapes.items()}
    if new_coords:
        return {name: (1 / (1 + np.exp(-map_NCHW))).astype(np.float32) for name, map_NCHW in maps.items()}
    return maps


def outputs_of(raw: Mapping[str, np.ndarray], detection: Detection) -> dict[str, np.ndarray]:
    """What a file of that contract gives for these maps of its heads."""
    if detection.decode == "raw":
        return dict(raw)
    boxes, scores = decode_heads(raw, detection)
    if detection.decode == "decoded":
        return {"boxes": boxes, "scores": scores}
    if detection.decode == "ultralytics":
        centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
        return {"output0": np.concatenate([centre, size, scores], -1).transpose(0, 2, 1)}
    most = detection.suppression.max_detections
    rows, counts = np.zeros((len(boxes), most, 6), np.float32), np.zeros(len(boxes), np.int64)
    for i, (boxes_A4, scores_AC) in enumerate(zip(boxes, scores, strict=True)):
        found = suppress(boxes_A4, scores_AC, detection.suppression)
        counts[i] = len(found)
        rows[i, : len(found)] = np.concatenate(
            [found.boxes_M4, found.scores_M[:, None], found.classes_M[:, None]], 1
        )  # fmt: skip
    return {"detections": rows, "num_detections": counts}


def expected_boxes(detection: Detection, raw: Mapping[str, np.ndarray] | None = None) -> Boxes:
    """By numpy, in pixels of the network's input."""
    boxes, scores = decode_heads(raw_heads() if raw is None else raw, detection)
    return suppress(boxes[0], scores[0], detection.suppression)


def write_detector(
    folder: Path, *, decode: Decode = "decoded", outputs: Mapping[str, np.ndarray] | None = None,
    suppression: Suppression | None = None, contract: Preprocess = CONTRACT, labels: tuple[str, ...] = LABELS,
    untrained: bool = False,
) -> Path:  # fmt: skip
    """A bundle "spots" with one artifact, "onnx".

    Args:
        outputs: of one image; by default those of `raw_heads()`.
    """
    folder.mkdir(parents=True)
    detection = detection_of(decode, suppression=suppression)
    made = dict(outputs or outputs_of(raw_heads(), detection))
    path = folder / "spots.onnx"
    path.write_bytes(constant_model(made, contract).SerializeToString())
    record = file_record(path)
    artifact = Artifact(
        kind="onnx", file=path.name, format="onnx", precision="fp32", sha256=record.sha256, num_bytes=record.num_bytes,
        opset=17, steps=(), decode=decode,
        inputs=(TensorInfo(name="input", dtype="float32", shape=(1, 3, contract.height_px, contract.width_px)),),
        outputs=tuple(
            TensorInfo(name=name, dtype=str(array.dtype), shape=array.shape) for name, array in made.items()
        ),
    )  # fmt: skip
    spec = ModelSpec(
        name="spots", network=NetworkSpec(family="test", config={}), num_classes=len(labels), preprocess=contract,
        provenance=Provenance(source="random" if untrained else "user", origin="test"), task="detect",
        outputs=detection.network_outputs, detection=detection,
    )  # fmt: skip
    images = np.random.default_rng(3).integers(0, 256, (4, 20, 36, 3), np.uint8)
    exact = outputs_of(raw_heads(), dataclasses.replace(detection, decode=detection.network_decode))
    repeated = {name: np.repeat(array, len(images), 0) for name, array in exact.items()}
    golden = Golden(
        images=images, x_NCHW=preprocess(list(images), contract), outputs_fp32=repeated,
        outputs_fp64={name: array.astype(np.float64) for name, array in repeated.items()},
    )  # fmt: skip
    write_golden(folder / "golden.npz", golden)
    manifest = Manifest(
        spec=spec, labels=labels, artifacts=(artifact,), files=(file_record(folder / "golden.npz"),), options={},
        tools={},
    )  # fmt: skip
    stamp_card(path, card_of(manifest, artifact, tool="cspdeploy 1"))
    record = file_record(path)
    stamped = dataclasses.replace(artifact, sha256=record.sha256, num_bytes=record.num_bytes)
    write_manifest(folder, dataclasses.replace(manifest, artifacts=(stamped,)))
    return folder


def constant_model(outputs: Mapping[str, np.ndarray], contract: Preprocess) -> onnx.ModelProto:
    """A graph that gives these arrays whatever its input is."""
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["mean"], axes=[0, 1, 2, 3], keepdims=0),
        helper.make_node("Mul", ["mean", "nothing"], ["zero"]),
        helper.make_node("Cast", ["zero"], ["whole_zero"], to=onnx.TensorProto.INT64),
    ]
    constants = [numpy_helper.from_array(np.zeros((), np.float32), "nothing")]
    values = []
    for name, array in outputs.items():
        whole = array.dtype == np.int64
        constants.append(numpy_helper.from_array(array, f"{name}_made"))
        nodes.append(helper.make_node("Add", [f"{name}_made", "whole_zero" if whole else "zero"], [name]))
        kind = onnx.TensorProto.INT64 if whole else onnx.TensorProto.FLOAT
        values.append(helper.make_tensor_value_info(name, kind, array.shape))
    shape = [1, 3, contract.height_px, contract.width_px]
    taken = helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "spots", [taken], values, constants)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
