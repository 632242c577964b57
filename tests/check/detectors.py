"""A detector of one convolution, exact in numpy, as a bundle of any contract; and ways to damage its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cspdeploy.core.bundle import file_record, write_manifest
from cspdeploy.core.catalog import artifact_file
from cspdeploy.core.detection.decode import decode_heads
from cspdeploy.core.detection.spec import Decode, Detection, DetectionHead, Suppression
from cspdeploy.core.golden import Golden, write_golden
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.spec import ModelSpec, Preprocess, Provenance
from cspdeploy.core.types import Artifact, Manifest, TensorInfo
from cspdeploy.export.decode import add_decode

SIZE, STRIDE, CLASSES = 64, 16, 2
CONTRACT = Preprocess(
    height_px=SIZE, width_px=SIZE, resize="stretch", crop_pct=1.0, interpolation="bilinear", channel_order="rgb",
    mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
)  # fmt: skip


def detection_of(decode: Decode, *, anchors: tuple[tuple[float, float], ...] = ((20, 26), (31, 18))) -> Detection:
    head = DetectionHead(output="head_s16", stride_px=STRIDE, anchors=anchors, scale_x_y=1.05)
    return Detection(heads=(head,), decode=decode, suppression=Suppression(max_detections=60))


def weights() -> np.ndarray:
    """`[anchors * (5 + C), 3, 16, 16]`: logits of some units, so that a few cells of an image hold an object."""
    rng = np.random.default_rng(3)
    made = rng.normal(0, 0.12, (2, 5 + CLASSES, 3, STRIDE, STRIDE))
    made[:, 2:4] *= 0.1  # sizes near those of the anchors
    return made.reshape(-1, 3, STRIDE, STRIDE).astype(np.float32)


def raw_maps(x_NCHW: np.ndarray) -> np.ndarray:
    cells = SIZE // STRIDE
    patches = x_NCHW.astype(np.float64).reshape(len(x_NCHW), 3, cells, STRIDE, cells, STRIDE)
    return np.einsum("ncyixj,ocij->noyx", patches, weights().astype(np.float64))


def write_raw(path: Path) -> None:
    cells, chs = SIZE // STRIDE, 2 * (5 + CLASSES)
    node = helper.make_node("Conv", ["input", "w"], ["head_s16"], "conv", strides=[STRIDE, STRIDE])
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("head_s16", TensorProto.FLOAT, ["N", chs, cells, cells])],
        [numpy_helper.from_array(weights(), "w")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)


def make_bundle(
    folder: Path,
    decode: Decode,
    *,
    precision: str = "fp32",
    built_with: Detection | None = None,
    trained: bool = True,
    picture_shape: tuple[int, int] = (SIZE, SIZE),
    resize: Literal["crop", "stretch", "letterbox"] = "stretch",
) -> Path:
    """Six images of noise; `built_with`: what the file is made with, where that is not what the manifest says."""
    folder.mkdir(parents=True)
    detection = detection_of(decode)
    images = np.random.default_rng(1).integers(0, 256, (6, *picture_shape, 3), np.uint8)
    contract = dataclasses.replace(CONTRACT, resize=resize)
    x_NCHW = preprocess(list(images), contract)
    raw = {"head_s16": raw_maps(x_NCHW)}
    boxes, scores = decode_heads(raw, detection)
    exact = raw if decode == "raw" else {"boxes": boxes.astype(np.float64), "scores": scores.astype(np.float64)}
    rounded = {name: (array * (1 + 1e-6)).astype(np.float32) for name, array in exact.items()}
    golden = Golden(images=images, x_NCHW=x_NCHW, outputs_fp64=exact, outputs_fp32=rounded)
    write_golden(folder / "golden.npz", golden)
    (folder / "labels.txt").write_text("apple\npear\n")
    kind = {"fp32": "onnx", "fp16": "onnx-fp16", "int8": "onnx-int8"}[precision]
    path = folder / artifact_file("tiny", kind)
    write_raw(path)
    add_decode(path, path, detection=built_with or detection, num_classes=CLASSES, height_px=SIZE, width_px=SIZE)
    outputs = tuple(_info(value) for value in onnx.load(path).graph.output)
    record = file_record(path)
    artifact = Artifact(
        kind=kind, file=record.file, format="onnx", precision=precision, sha256=record.sha256,  # type: ignore[arg-type]
        num_bytes=record.num_bytes, opset=17, steps=(), outputs=outputs, decode=decode,
        inputs=(TensorInfo(name="input", dtype="float32", shape=("N", 3, SIZE, SIZE)),),
    )  # fmt: skip
    spec = dataclasses.replace(spec_of(detection, trained=trained), preprocess=contract)
    manifest = Manifest(
        spec=spec, labels=("apple", "pear"), artifacts=(artifact,),
        files=(file_record(folder / "golden.npz"), file_record(folder / "labels.txt")), options={}, tools={},
    )  # fmt: skip
    write_manifest(folder, manifest)
    return folder


def spec_of(detection: Detection, *, trained: bool = True) -> ModelSpec:
    from cspdeploy.core.spec import NetworkSpec

    return ModelSpec(
        name="tiny", network=NetworkSpec(family="darknet", config={}), num_classes=CLASSES, preprocess=CONTRACT,
        provenance=Provenance(source="user" if trained else "random", origin="test"), task="detect",
        outputs=detection.network_outputs, detection=detection,
    )  # fmt: skip


def _info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorInfo(
        name=value.name, dtype=dtype, shape=tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    )


def damage(path: Path, output: str, *nodes: Callable[[str, str], onnx.NodeProto], **constants: np.ndarray) -> None:
    """Put nodes behind an output: each is made of the name that it takes and the name that it gives."""
    model = onnx.load(path)
    names = [f"{output}/{i}" for i in range(len(nodes))] + [output]
    for node in model.graph.node:
        for i, name in enumerate(node.output):
            if name == output:
                node.output[i] = names[0]
        for i, name in enumerate(node.input):
            if name == output:
                node.input[i] = names[0]
    model.graph.node.extend(make(names[i], names[i + 1]) for i, make in enumerate(nodes))
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    onnx.save(model, path)


def scale(path: Path, output: str, factor: float) -> None:
    constant = np.array(factor, np.float32)
    damage(path, output, lambda a, b: helper.make_node("Mul", [a, "by"], [b]), by=constant)


def shift(path: Path, output: str, by: float) -> None:
    damage(path, output, lambda a, b: helper.make_node("Add", [a, "by"], [b]), by=np.array(by, np.float32))


def reverse_images(path: Path, *outputs: str) -> None:
    """Image 0 gets what is of the last one."""
    for output in outputs:
        names = [f"{output}_{end}" for end in ("from", "to", "axis", "step")]
        ends = dict(zip(names, ([-1], [-(2**31)], [0], [-1]), strict=True))
        damage(
            path, output, lambda a, b, names=names: helper.make_node("Slice", [a, *names], [b]),  # type: ignore[misc]
            **{name: np.array(end, np.int64) for name, end in ends.items()},
        )  # fmt: skip
