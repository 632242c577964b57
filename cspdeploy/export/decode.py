"""Decoding of a detector's heads, and what follows it, behind the network in one ONNX file, all of it float32.

It is put there when float16 and INT8 have been made: an exponential overflows in half precision, and a box of 600 px
has no sides in 8 bits. Shapes: as in `cspdeploy.core.detection`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from cspdeploy.core.detection.decode import cell_offsets
from cspdeploy.core.detection.spec import (
    BOXES_OUTPUT,
    SCORES_OUTPUT,
    ULTRALYTICS_OUTPUT,
    Detection,
    DetectionHead,
)
from cspdeploy.export.decode_nms import TRT_DOMAIN, add_nms, add_trt_nms
from cspdeploy.export.graph_part import GraphPart
from cspdeploy.export.rewrite import write_model

__all__ = ["DECODE_PREFIX", "add_decode"]

DECODE_PREFIX = "decode"
"""Of the names of all nodes that are added here."""


def add_decode(
    source: Path, target: Path, *, detection: Detection, num_classes: int, height_px: int, width_px: int,
    labels: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write `source`, whose outputs are the raw maps of the heads, with the outputs of `detection.decode` to `target`.

    Args:
        source: float32 outputs `detection.raw_outputs`, for an input of `height_px` x `width_px`.
        labels: of the classes, which "ultralytics" keeps in the file.
    """
    model = onnx.load(source)
    if detection.decode != "raw":
        graph, part = model.graph, GraphPart(DECODE_PREFIX)
        heads = [
            _add_head(part, head, num_classes, height_px // head.stride_px, width_px // head.stride_px)
            for head in detection.heads
        ]
        num, batch = detection.num_candidates(height_px, width_px), _batch(graph)
        outputs = _add_tail(part, heads, detection, num_candidates=num, num_classes=num_classes, batch=batch)
        del graph.output[:]
        graph.output.extend(outputs)
        graph.node.extend(part.nodes)
        graph.initializer.extend(part.constants)
    if detection.decode == "trt":
        model.opset_import.append(helper.make_opsetid(TRT_DOMAIN, 1))
    if detection.decode == "ultralytics":
        helper.set_model_props(model, _ultralytics_metadata(model, detection, height_px, width_px, labels))
    write_model(model, target)


class _Head(NamedTuple):
    """Names of `[N, anchors, h, w, 2]`, of the same and of `[N, anchors, h, w, C]`; and anchors times cells."""

    name: str
    centre: str
    half: str
    scores: str
    num: int


def _add_tail(
    part: GraphPart, heads: Sequence[_Head], detection: Detection, *, num_candidates: int, num_classes: int,
    batch: int | str,
) -> list[onnx.ValueInfoProto]:  # fmt: skip
    """What follows the decoded heads; gives the graph's outputs."""
    if detection.decode == "ultralytics":
        width = 4 + num_classes
        rows = [_flat(part, head, _add_centre_size(part, head), width, "rows") for head in heads]
        together = part.node("Concat", *rows, name="rows", axis=1)
        part.node("Transpose", together, name="channels_first", output=ULTRALYTICS_OUTPUT, perm=[0, 2, 1])
        return [helper.make_tensor_value_info(ULTRALYTICS_OUTPUT, TensorProto.FLOAT, [batch, width, num_candidates])]
    decoded = detection.decode == "decoded"
    corners = [_flat(part, head, _add_corners(part, head), 4, "flat_boxes") for head in heads]
    scored = [_flat(part, head, head.scores, num_classes, "flat_scores") for head in heads]
    boxes = part.node("Concat", *corners, name="boxes", output=BOXES_OUTPUT if decoded else "", axis=1)
    scores = part.node("Concat", *scored, name="scores", output=SCORES_OUTPUT if decoded else "", axis=1)
    if detection.decode == "nms":
        return add_nms(part, boxes, scores, rule=detection.suppression, num_classes=num_classes, batch=batch)
    if detection.decode == "trt":
        return add_trt_nms(part, boxes, scores, rule=detection.suppression, batch=batch)
    return [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, num_candidates, width])
        for name, width in ((boxes, 4), (scores, num_classes))
    ]


def _add_corners(part: GraphPart, head: _Head) -> str:
    low = part.node("Sub", head.centre, head.half, name=f"{head.name}/low")
    high = part.node("Add", head.centre, head.half, name=f"{head.name}/high")
    return part.node("Concat", low, high, name=f"{head.name}/corners", axis=4)


def _add_centre_size(part: GraphPart, head: _Head) -> str:
    """With the scores behind, as one row has it."""
    size = part.node("Add", head.half, head.half, name=f"{head.name}/size")
    return part.node("Concat", head.centre, size, head.scores, name=f"{head.name}/row", axis=4)


def _flat(part: GraphPart, head: _Head, values: str, width: int, what: str) -> str:
    """`[N, anchors * h * w, width]`."""
    shape = part.integers(0, head.num, width, name=f"{head.name}/{what}_shape")
    return part.node("Reshape", values, shape, name=f"{head.name}/{what}")


def _ultralytics_metadata(
    model: onnx.ModelProto, detection: Detection, height_px: int, width_px: int, labels: Sequence[str]
) -> dict[str, str]:
    """`metadata_props` that ultralytics' runtimes read, with those that the file has already.

    Numbers and Python literals as text. Source: ultralytics, nn/autobackend.py and engine/exporter.py.
    """
    batch = _batch(model.graph)
    kept = {entry.key: entry.value for entry in model.metadata_props}
    return kept | {
        "task": "detect", "stride": str(max(head.stride_px for head in detection.heads)),
        "imgsz": str([height_px, width_px]), "batch": str(batch if isinstance(batch, int) else 1),
        "names": str(dict(enumerate(labels))), "channels": "3",
    }  # fmt: skip


def _batch(graph: onnx.GraphProto) -> int | str:
    given = {tensor.name for tensor in graph.initializer}
    taken = next(value for value in graph.input if value.name not in given)
    batch = taken.type.tensor_type.shape.dim[0]
    return batch.dim_param or batch.dim_value or "N"


def _add_head(part: GraphPart, head: DetectionHead, num_classes: int, height: int, width: int) -> _Head:
    at, anchors = head.output, len(head.anchors)
    shape = part.integers(0, anchors, 5 + num_classes, height, width, name=f"{at}/shape")
    split = part.node("Reshape", head.output, shape, name=f"{at}/split_anchors")
    t = part.node("Transpose", split, name=f"{at}/channels_last", perm=[0, 1, 3, 4, 2])
    active = t if head.new_coords else part.node("Sigmoid", t, name=f"{at}/sigmoid")
    sizes = _slice(part, t, 2, 4, name=f"{at}/wh")
    if head.new_coords:
        doubled = part.node("Add", sizes, sizes, name=f"{at}/twice")
        wide = part.node("Mul", doubled, doubled, name=f"{at}/square")
    else:
        wide = part.node("Exp", sizes, name=f"{at}/exp")
    halves = np.asarray(head.anchors, np.float32).reshape(1, anchors, 1, 1, 2) / 2
    half = part.node("Mul", wide, part.constant(halves, np.float32, name=f"{at}/halves"), name=f"{at}/half")
    # scale * stride and offset * stride in one constant each: two roundings fewer, and two nodes.
    xy = _slice(part, active, 0, 2, name=f"{at}/xy")
    factor = part.constant(head.scale_x_y * head.stride_px, np.float32, name=f"{at}/scale")
    offsets = cell_offsets(head, height, width)[None, None] * np.float32(head.stride_px)
    scaled = part.node("Mul", xy, factor, name=f"{at}/scaled")
    centre = part.node("Add", scaled, part.constant(offsets, np.float32, name=f"{at}/cells"), name=f"{at}/centre")
    objects = _slice(part, active, 4, 5, name=f"{at}/objectness")
    classes = _slice(part, active, 5, 5 + num_classes, name=f"{at}/classes")
    scores = part.node("Mul", objects, classes, name=f"{at}/scores")
    return _Head(at, centre, half, scores, anchors * height * width)


def _slice(part: GraphPart, values: str, start: int, stop: int, *, name: str) -> str:
    """Of the last axis of five."""
    bounds = [
        part.integers(bound, name=f"{name}_{what}") for what, bound in (("from", start), ("to", stop), ("axis", 4))
    ]
    return part.node("Slice", values, *bounds, name=name)
