"""Raw maps of the heads to boxes and scores. Source: AlexeyAB/darknet, src/yolo_layer.c (get_yolo_box)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cspdeploy.core.detection.spec import Detection, DetectionHead

__all__ = ["cell_offsets", "decode_heads", "sigmoid"]

FloatArray = npt.NDArray[np.float32]


def decode_heads(raw: Mapping[str, npt.NDArray[np.floating]], detection: Detection) -> tuple[FloatArray, FloatArray]:
    """Boxes `[N, A, 4]` in pixels of the network's input and scores `[N, A, C]`, float32.

    Candidates come head by head, in a head anchor by anchor, of an anchor row by row.

    Args:
        raw: the map of each head by name, `[N, anchors * (5 + C), h, w]`.

    Raises:
        KeyError: a head's map is missing.
        ValueError: a map's channels do not fit its anchors.
    """
    made = [_decode(np.asarray(raw[head.output], np.float32), head) for head in detection.heads]
    return np.concatenate([boxes for boxes, _ in made], 1), np.concatenate([scores for _, scores in made], 1)


def cell_offsets(head: DetectionHead, height: int, width: int) -> FloatArray:
    """`[h, w, 2]`: what is added to a cell's scaled x and y, in cells: its own place, and what the scale takes back."""
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    return np.asarray(np.stack([xs, ys], -1) - np.float32(0.5 * (head.scale_x_y - 1.0)), np.float32)


def _decode(raw_NCHW: FloatArray, head: DetectionHead) -> tuple[FloatArray, FloatArray]:
    num, chs, height, width = raw_NCHW.shape
    per_anchor, left = divmod(chs, len(head.anchors))
    if left or per_anchor < 6:
        raise ValueError(f"{head.output}: {chs} channels, expected {len(head.anchors)} anchors x (5 + classes)")
    t = raw_NCHW.reshape(num, len(head.anchors), per_anchor, height, width).transpose(0, 1, 3, 4, 2)
    halves = np.asarray(head.anchors, np.float32)[:, None, None, :] * np.float32(0.5)
    with np.errstate(over="ignore"):  # a size that is infinite stays so, and is dropped with what is not finite
        xy = t[..., :2] if head.new_coords else sigmoid(t[..., :2])
        half = (np.square(2 * t[..., 2:4]) if head.new_coords else np.exp(t[..., 2:4])) * halves
    objects, classes = (t[..., 4:5], t[..., 5:]) if head.new_coords else (sigmoid(t[..., 4:5]), sigmoid(t[..., 5:]))
    offsets = cell_offsets(head, height, width)
    centre = (xy * np.float32(head.scale_x_y) + offsets) * np.float32(head.stride_px)
    boxes = np.concatenate([centre - half, centre + half], -1)
    return boxes.reshape(num, -1, 4), (objects * classes).reshape(num, -1, per_anchor - 5)


def sigmoid(x: FloatArray) -> FloatArray:
    """Without an overflow on either side: exp of minus the absolute value only."""
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1 / (1 + e), e / (1 + e)), np.float32)
