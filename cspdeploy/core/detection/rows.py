"""Boxes that a graph has suppressed: what their rows must be, whichever boxes they are. Shapes: as in this folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cspdeploy.core.compare import Comparison
from cspdeploy.core.detection.near_ties import safe_iou
from cspdeploy.core.detection.spec import COUNT_OUTPUT, DETECTIONS_OUTPUT, Detection

__all__ = ["form_of_rows"]

Array = npt.NDArray[np.generic]

ROUNDING = 0.01
"""How far beyond the overlap's threshold two rows of a class may lie: float32 rounds a side of 10 px at 1000 px to
6e-6 of it, an engine that runs the tail in FP16 that of a box of 100 px to 0.005."""


def form_of_rows(
    outputs: Mapping[str, Array], names: tuple[str, ...], dtypes: Mapping[str, str], detection: Detection, *,
    num_images: int, num_classes: int,
) -> Comparison:  # fmt: skip
    """Names, shapes, dtypes, finite, best first, nothing after the last, classes that there are, and suppressed.

    Whatever the precision, and however near the ties: the graph suppresses its own boxes, by its own numbers.
    """
    if tuple(outputs) != names or set(names) != {DETECTIONS_OUTPUT, COUNT_OUTPUT}:
        return Comparison(verdict="order", reason=f"outputs are {list(outputs)}, expected {list(names)}")
    most = detection.suppression.max_detections
    for name, shape, dtype in (
        (DETECTIONS_OUTPUT, (num_images, most, 6), "float32"), (COUNT_OUTPUT, (num_images,), "int64"),
    ):  # fmt: skip
        if outputs[name].shape != shape:
            return Comparison(
                verdict="shape", reason=f"{name}: shape {list(outputs[name].shape)}, expected {list(shape)}"
            )
        if outputs[name].dtype != dtypes.get(name, dtype):
            return Comparison(verdict="dtype", reason=f"{name}: dtype {outputs[name].dtype}, expected {dtype}")
    rows_NM6 = outputs[DETECTIONS_OUTPUT].astype(np.float32)
    counts_N = outputs[COUNT_OUTPUT].astype(np.int64)
    if num_bad := int(np.count_nonzero(~np.isfinite(rows_NM6))):
        return Comparison(verdict="nan", reason=f"{num_bad} of {rows_NM6.size} values are NaN or infinite")
    if counts_N.min() < 0 or counts_N.max() > most:
        return Comparison(verdict="shape", reason=f"{COUNT_OUTPUT}: got up to {counts_N.max()}, expected 0 to {most}")
    for index, (rows, count) in enumerate(zip(rows_NM6, counts_N, strict=True)):
        if problem := _problem_of(rows, int(count), num_classes, limit=detection.suppression.iou_threshold):
            return dataclasses.replace(problem, reason=f"{problem.reason}, image {index}")
    return Comparison(verdict="pass")


def _problem_of(
    rows_M6: npt.NDArray[np.float32], count: int, num_classes: int, *, limit: float
) -> Comparison | None:  # fmt: skip
    """Of one image."""
    used, rest = rows_M6[:count], rows_M6[count:]
    if (np.diff(used[:, 4]) > 0).any() or rest.any():
        return Comparison(verdict="order", reason="boxes are not best first, or rows after the last are not zero")
    if (used[:, 5] != np.floor(used[:, 5])).any() or (used[:, 5] < 0).any() or (used[:, 5] >= num_classes).any():
        return Comparison(verdict="decision", reason=f"a class that is none of {num_classes}")
    if (worst := _overlap(used)) > limit + ROUNDING:
        what = f"two boxes of a class overlap by {worst:.2f}, the graph is to leave {limit:g} at most"
        return Comparison(verdict="decision", reason=what)
    return None


def _overlap(rows_M6: npt.NDArray[np.float32]) -> float:
    """Largest of two rows of one class."""
    overlaps = safe_iou(rows_M6[:, :4], rows_M6[:, :4]) * (rows_M6[:, None, 5] == rows_M6[None, :, 5])
    np.fill_diagonal(overlaps, 0)
    return float(overlaps.max(initial=0))
