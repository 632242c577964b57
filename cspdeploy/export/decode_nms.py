"""Non-maximum suppression in the graph, by ONNX's own operator or by TensorRT's plugin, behind decoded candidates.

Shapes: N images, A candidates, C classes; R candidates that score above the threshold in any image, and some empty
ones; M boxes that are given of each image.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper

from cspdeploy.core.detection.boxes import MAX_SIDE_PX
from cspdeploy.core.detection.spec import COUNT_OUTPUT, DETECTIONS_OUTPUT, TRT_OUTPUTS, Suppression
from cspdeploy.export.graph_part import GraphPart

__all__ = ["NMS_OPSET", "TRT_DOMAIN", "TRT_OPERATOR", "add_nms", "add_trt_nms"]

NMS_OPSET = 13
"""From here on ReduceSum, Squeeze and Unsqueeze take their axes as an input, as they are written here."""
TRT_DOMAIN, TRT_OPERATOR = "TRT", "EfficientNMS_TRT"
"""TensorRT's parser finds a plugin by the operator's name in whatever domain. One of its own keeps the file valid for
`onnx.checker`, which refuses an unknown operator in ONNX's."""

_COLUMNS = 6


def add_nms(
    part: GraphPart, boxes: str, scores: str, *, rule: Suppression, num_classes: int, batch: int | str
) -> list[ValueInfoProto]:
    """The boxes that `core.detection.boxes.suppress` gives, in the outputs of the contract "nms".

    What cannot score is left out first: the operator would go over all candidates once for every class.

    Args:
        boxes: name of `[N, A, 4]` left, top, right, bottom.
        scores: name of `[N, A, C]`.

    Returns:
        The graph's outputs.
    """
    threshold = part.constant([rule.score_threshold], np.float32, name="nms/score_threshold")
    boxes, scores = _add_prefilter(part, boxes, scores, threshold, num_empty=-(-rule.max_detections // num_classes))
    by_class = part.node("Transpose", scores, name="nms/class_first", perm=[0, 2, 1])
    chosen = part.node(
        "NonMaxSuppression", boxes, by_class, part.integers(rule.max_detections, name="nms/most"),
        part.constant([rule.iou_threshold], np.float32, name="nms/iou_threshold"), threshold, name="nms/suppress",
    )  # fmt: skip
    # Scores of the survivors at their places, 0 elsewhere: one TopK over candidates and classes then orders them as
    # numpy does, equal scores by candidate and then by class, in every image of the batch.
    places = part.node("Gather", chosen, part.integers(0, 2, 1, name="nms/by_candidate"), name="nms/places", axis=1)
    kept = part.node("GatherND", scores, places, name="nms/kept")
    none = part.node("ConstantOfShape", part.node("Shape", scores, name="nms/shape"), name="nms/none")
    dense = part.node("ScatterND", none, places, kept, name="nms/dense")
    flat = part.node("Reshape", dense, part.integers(0, -1, name="nms/flat_shape"), name="nms/flat")
    best_scores, best_places = f"{part.prefix}/nms/best_scores", f"{part.prefix}/nms/best_places"
    part.nodes_of(
        "TopK", flat, part.integers(rule.max_detections, name="nms/top"), name="nms/best",
        outputs=(best_scores, best_places), axis=1, largest=1, sorted=1,
    )  # fmt: skip
    return _add_rows(part, boxes, best_scores, best_places, rule=rule, num_classes=num_classes, batch=batch)


def _add_prefilter(part: GraphPart, boxes: str, scores: str, threshold: str, *, num_empty: int) -> tuple[str, str]:
    """Names of `[N, R, 4]` and `[N, R, C]`: the candidates that score in any image, in their order.

    Counting what is above the threshold keeps a candidate of which one class is NaN; the maximum might not.

    Args:
        num_empty: candidates without a score that are put after them, so that there are enough to choose from.
    """
    above = part.node("Greater", scores, threshold, name="nms/above")
    ones = part.node("Cast", above, name="nms/ones", to=TensorProto.FLOAT)
    per_candidate = part.node("ReduceSum", ones, part.integers(2, name="nms/classes"), name="nms/hits", keepdims=0)
    in_batch = part.node(
        "ReduceSum", per_candidate, part.integers(0, name="nms/images"), name="nms/any_image", keepdims=0
    )
    found = part.node("NonZero", in_batch, name="nms/nonzero")
    rows = part.node("Squeeze", found, part.integers(0, name="nms/first"), name="nms/rows")
    after = part.integers(0, 0, 0, 0, num_empty, 0, name="nms/empty")
    boxes, scores = (
        part.node(
            "Pad", part.node("Gather", values, rows, name=f"nms/{name}", axis=1), after, name=f"nms/{name}_padded"
        )
        for name, values in (("boxes", boxes), ("scores", scores))
    )
    # A box that is not finite, or so large that its area is not: a comparison with NaN is false.
    sides = part.node("Abs", boxes, name="nms/sides")
    bounded = part.node("Less", sides, part.constant(MAX_SIDE_PX, np.float32, name="nms/bound"), name="nms/bounded")
    count = part.node(
        "ReduceSum", part.node("Cast", bounded, name="nms/bounded_ones", to=TensorProto.FLOAT),
        part.integers(2, name="nms/corners"), name="nms/num_bounded", keepdims=1,
    )  # fmt: skip
    valid = part.node("Greater", count, part.constant(3.5, np.float32, name="nms/all_four"), name="nms/valid")
    nothing = part.constant(0, np.float32, name="nms/zero")
    return boxes, part.node("Where", valid, scores, nothing, name="nms/valid_scores")


def _add_rows(
    part: GraphPart, boxes: str, scores: str, places: str, *, rule: Suppression, num_classes: int, batch: int | str
) -> list[ValueInfoProto]:
    """`[N, M, 6]` and `[N]` from scores `[N, M]` and places `[N, M]`, candidate times C plus class."""
    classes_in_all = part.integers(num_classes, name="nms/num_classes")
    candidates = part.node("Div", places, classes_in_all, name="nms/candidates")
    before = part.node("Mul", candidates, classes_in_all, name="nms/before")
    classes = part.node("Sub", places, before, name="nms/class_of")
    last = part.integers(2, name="nms/last")
    index = part.node("Unsqueeze", candidates, last, name="nms/index")
    columns = (
        part.node("GatherND", boxes, index, name="nms/found_boxes", batch_dims=1),
        part.node("Unsqueeze", scores, last, name="nms/score_column"),
        part.node(
            "Unsqueeze", part.node("Cast", classes, name="nms/class_numbers", to=TensorProto.FLOAT), last,
            name="nms/class_column",
        ),
    )  # fmt: skip
    rows = part.node("Concat", *columns, name="nms/rows_of_six", axis=2)
    zero = part.constant(0, np.float32, name="nms/no_value")
    real = part.node("Greater", columns[1], zero, name="nms/real")
    part.node("Where", real, rows, zero, name="nms/detections", output=DETECTIONS_OUTPUT)
    numbers = part.node("Cast", real, name="nms/real_ones", to=TensorProto.INT64)
    part.node(
        "ReduceSum", numbers, part.integers(1, 2, name="nms/rows_axes"), name="nms/count", output=COUNT_OUTPUT,
        keepdims=0,
    )  # fmt: skip
    return [
        helper.make_tensor_value_info(
            DETECTIONS_OUTPUT, TensorProto.FLOAT, [batch, rule.max_detections, _COLUMNS]
        ),
        helper.make_tensor_value_info(COUNT_OUTPUT, TensorProto.INT64, [batch]),
    ]  # fmt: skip


def add_trt_nms(
    part: GraphPart, boxes: str, scores: str, *, rule: Suppression, batch: int | str
) -> list[ValueInfoProto]:
    """One node of TensorRT's plugin, class by class as the others; its best 4096 scores of an image enter.

    Source: NVIDIA/TensorRT, plugin/efficientNMSPlugin/README.md.

    Returns:
        The graph's outputs.
    """
    part.nodes_of(
        TRT_OPERATOR, boxes, scores, name="nms/plugin", outputs=TRT_OUTPUTS, domain=TRT_DOMAIN, plugin_version="1",
        score_threshold=rule.score_threshold, iou_threshold=rule.iou_threshold,
        max_output_boxes=rule.max_detections, background_class=-1, score_activation=0, class_agnostic=0, box_coding=0,
    )  # fmt: skip
    most = rule.max_detections
    kinds = ((TensorProto.INT32, [1]), (TensorProto.FLOAT, [most, 4]), (TensorProto.FLOAT, [most]),
             (TensorProto.INT32, [most]))  # fmt: skip
    return [
        helper.make_tensor_value_info(name, dtype, [batch, *shape])
        for name, (dtype, shape) in zip(TRT_OUTPUTS, kinds, strict=True)
    ]
