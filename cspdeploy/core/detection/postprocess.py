"""Outputs of an artifact, whatever its contract, to boxes: the one way, on the device and where it is proven."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cspdeploy.core.detection.boxes import Boxes, suppress
from cspdeploy.core.detection.decode import decode_heads
from cspdeploy.core.detection.spec import (
    BOXES_OUTPUT,
    COUNT_OUTPUT,
    DETECTIONS_OUTPUT,
    SCORES_OUTPUT,
    TRT_OUTPUTS,
    ULTRALYTICS_OUTPUT,
    Decode,
    Detection,
)

__all__ = ["candidates_of", "find_boxes"]

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]


def candidates_of(outputs: Mapping[str, Array], detection: Detection, decode: Decode) -> tuple[FloatArray, FloatArray]:
    """Boxes `[N, A, 4]` and scores `[N, A, C]` of all candidates.

    Args:
        decode: the contract of those outputs: raw, decoded or ultralytics.

    Raises:
        ValueError: a contract after whose suppression there are no candidates any more.
        KeyError: an output is missing.
    """
    if decode == "raw":
        return decode_heads({name: np.asarray(outputs[name], np.float32) for name in detection.raw_outputs}, detection)
    if decode == "decoded":
        return np.asarray(outputs[BOXES_OUTPUT], np.float32), np.asarray(outputs[SCORES_OUTPUT], np.float32)
    if decode == "ultralytics":
        rows_NAK = np.asarray(outputs[ULTRALYTICS_OUTPUT], np.float32).transpose(0, 2, 1)
        centre, half = rows_NAK[..., :2], rows_NAK[..., 2:4] / 2
        return np.concatenate([centre - half, centre + half], -1), rows_NAK[..., 4:]
    raise ValueError(f"{decode}: gives boxes that are suppressed already")


def find_boxes(
    outputs: Mapping[str, Array], detection: Detection, decode: Decode, *, beta: float | None = None
) -> list[Boxes]:
    """The boxes of each image, in pixels of the network's input, best first.

    Of "nms" and "trt" those that the graph found; of the others after `suppress` by `detection.suppression`.

    Raises:
        KeyError: an output is missing.
    """
    if decode == "nms":
        rows_NM6, counts_N = np.asarray(outputs[DETECTIONS_OUTPUT], np.float32), outputs[COUNT_OUTPUT]
        return [
            Boxes(boxes_M4=rows[:count, :4], scores_M=rows[:count, 4], classes_M=rows[:count, 5].astype(np.int64))
            for rows, count in zip(rows_NM6, counts_N.astype(np.int64).ravel(), strict=True)
        ]
    if decode == "trt":
        counts, boxes, scores, classes = (outputs[name] for name in TRT_OUTPUTS)
        return [
            Boxes(
                boxes_M4=np.asarray(boxes[i, :count], np.float32), scores_M=np.asarray(scores[i, :count], np.float32),
                classes_M=classes[i, :count].astype(np.int64),
            )
            for i, count in enumerate(counts.astype(np.int64).ravel())
        ]  # fmt: skip
    boxes_NA4, scores_NAC = candidates_of(outputs, detection, decode)
    return [
        suppress(boxes_A4, scores_AC, detection.suppression, beta=beta)
        for boxes_A4, scores_AC in zip(boxes_NA4, scores_NAC, strict=True)
    ]
