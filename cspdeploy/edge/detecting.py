"""From a detector's outputs to boxes in the application's own picture. Loaded for detectors only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.core.detection.boxes import Boxes, to_picture
from cspdeploy.core.detection.fast import find_boxes_fast
from cspdeploy.core.detection.spec import Decode, Detection, Suppression
from cspdeploy.core.errors import InputError
from cspdeploy.edge.opening import OpenedArtifact
from cspdeploy.edge.results import DetectedBox, Detections

__all__ = ["BoxRule", "boxes_in_pictures", "rule_of"]

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BoxRule:
    """Which boxes an application wants of an artifact.

    Attributes:
        detection: with the suppression that was asked for.
        decode: the contract of the artifact's outputs.
        score: what the graph found must score more than that; the others are suppressed by it already.
        most: boxes of an image.
    """

    detection: Detection
    decode: Decode
    score: float
    most: int


def rule_of(
    opened: OpenedArtifact, *, score: float | None = None, iou: float | None = None, max_detections: int | None = None
) -> BoxRule:
    """What was asked for, or what the artifact was exported with.

    Raises:
        InputError: out of range, more than the graph's own suppression leaves, or a contract that ONNX Runtime cannot
            load.
    """
    detection, decode = opened.detection, opened.decode
    if detection is None or decode is None:
        raise InputError(f"{opened.path}: does not say how boxes come of its outputs", fix="export it again")
    if decode == "trt":
        raise InputError(
            f"{opened.path}: its boxes are made by a plugin of TensorRT, which is not the engine here",
            fix="build it with trtexec, or cspdeploy export --decode nms",
        )
    own = detection.suppression
    asked = {"score_threshold": score, "iou_threshold": iou, "max_detections": max_detections}
    try:
        rule = dataclasses.replace(own, **{name: value for name, value in asked.items() if value is not None})  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise InputError(str(error), fix="score=0.25, iou=0.45, max_detections=300") from error
    if decode == "nms":
        _refuse_more(opened, own, rule)
    return BoxRule(
        detection=dataclasses.replace(detection, suppression=rule), decode=decode, score=rule.score_threshold,
        most=rule.max_detections,
    )  # fmt: skip


def _refuse_more(opened: OpenedArtifact, own: Suppression, rule: Suppression) -> None:
    """What the graph has dropped is gone."""
    names = {"score_threshold": "score", "iou_threshold": "iou", "max_detections": "max_detections"}
    lost = {
        "score_threshold": rule.score_threshold < own.score_threshold,
        "iou_threshold": rule.iou_threshold != own.iou_threshold,
        "max_detections": rule.max_detections > own.max_detections,
    }
    for name in (name for name, is_lost in lost.items() if is_lost):
        option = f"--{name.replace('_', '-')} {getattr(rule, name)}"
        raise InputError(
            f"{names[name]}: got {getattr(rule, name)}, the graph of {opened.path.name} suppresses by "
            f"{getattr(own, name)} already",
            fix=f"cspdeploy export {option}, or --decode decoded, which leaves it to the application",
        )


def boxes_in_pictures(
    outputs: Mapping[str, Array], opened: OpenedArtifact, rule: BoxRule, *, sizes_px: Sequence[tuple[int, int]]
) -> list[Detections]:
    """The boxes of each image, best first.

    Args:
        sizes_px: width and height of each image, as the application gave it.

    Raises:
        InputError: outputs that are not those of the contract, or no score of an image is a number.
    """
    try:
        found = find_boxes_fast(outputs, rule.detection, rule.decode)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{opened.path}: not the outputs of its contract '{rule.decode}' ({error})", fix="export it again"
        ) from error
    _refuse_nan(outputs, opened)
    untrained = opened.provenance.untrained
    return [
        Detections(boxes=_in_picture(boxes, opened, rule, size_px), untrained=untrained)
        for boxes, size_px in zip(found, sizes_px, strict=True)
    ]


def _refuse_nan(outputs: Mapping[str, Array], opened: OpenedArtifact) -> None:
    """Candidates without a number count as none; where there is no other, the engine has failed."""
    for name, array in outputs.items():
        floats = array.size and np.issubdtype(array.dtype, np.floating)
        if floats and np.isnan(array).reshape(len(array), -1).all(1).any():
            raise InputError(
                f"{opened.path}: output '{name}' is NaN throughout: {opened.runtime.name} cannot compute it",
                fix=f"python -m cspdeploy.edge selftest {opened.path.parent}",
            )


def _in_picture(
    boxes: Boxes, opened: OpenedArtifact, rule: BoxRule, size_px: tuple[int, int]
) -> tuple[DetectedBox, ...]:
    width, height = size_px
    placed = to_picture(boxes.above(rule.score), opened.contract, width=width, height=height)
    num_labels = len(opened.labels)
    highest = int(placed.classes_M.max(initial=-1))
    if num_labels and highest >= num_labels:
        raise InputError(f"{opened.model}: a box of class {highest} and {num_labels} labels", fix="export it again")
    return tuple(
        DetectedBox(
            label=opened.labels[index] if num_labels else f"class {index}", index=index, score=score,
            left=left, top=top, right=right, bottom=bottom,
        )
        for (left, top, right, bottom), score, index in zip(
            placed.boxes_M4[: rule.most].tolist(), placed.scores_M[: rule.most].tolist(),
            placed.classes_M[: rule.most].tolist(), strict=True,
        )
    )  # fmt: skip
