"""How many boxes two results share: what a detector is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cspdeploy.core.detection.boxes import Boxes, iou_matrix

__all__ = ["MATCH_IOU", "MATCH_SCORE", "BoxMatch", "match_boxes", "match_images"]

MATCH_IOU = 0.9
"""What "the same box" means: on a box of 40 px, its four sides off by less than a pixel each."""
MATCH_SCORE = 0.1
"""By how much the scores of the same box may differ, at most. INT8 moves them by 0.06 near a threshold of 0.25, by 0.10
anywhere, of 1,400 candidates above 0.01 of a trained YOLOv4-tiny on 40 photographs (FP16: 0.002, FP32: 1e-6)."""

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxMatch:
    """Of any number of images.

    Attributes:
        expected: boxes of the reference.
        found: boxes of the other.
        matched: that are in both: a box of the same class with an overlap of `MATCH_IOU`, scores within `MATCH_SCORE`.
        worst_score: largest difference of the scores of matched boxes.
    """

    expected: int
    found: int
    matched: int
    worst_score: float = 0.0

    @property
    def recall(self) -> float:
        """Share of the reference's boxes that are found again; 1 where there is none."""
        return self.matched / self.expected if self.expected else 1.0

    @property
    def precision(self) -> float:
        """Share of the other's boxes that the reference has; 1 where there is none."""
        return self.matched / self.found if self.found else 1.0


def match_boxes(reference: Boxes, other: Boxes) -> IndexArray:
    """`[M]`: for each box of the reference, best first, the index of its match in the other, or -1; each once."""
    taken = np.zeros(len(other), bool)
    found = np.full(len(reference), -1, np.int64)
    overlaps = iou_matrix(reference.boxes_M4, other.boxes_M4)
    alike = (reference.classes_M[:, None] == other.classes_M[None]) & (overlaps >= MATCH_IOU)
    alike &= np.abs(reference.scores_M[:, None] - other.scores_M[None]) <= MATCH_SCORE
    for index in range(len(reference)):
        free = np.flatnonzero(alike[index] & ~taken)
        if free.size:
            found[index] = free[overlaps[index, free].argmax()]
            taken[found[index]] = True
    return found


def match_images(reference: Sequence[Boxes], other: Sequence[Boxes]) -> BoxMatch:
    """All images together.

    Raises:
        ValueError: not the same number of images.
    """
    expected = found = matched = 0
    worst = 0.0
    for one, two in zip(reference, other, strict=True):
        places = match_boxes(one, two)
        hits = places >= 0
        expected, found, matched = expected + len(one), found + len(two), matched + int(hits.sum())
        if hits.any():
            worst = max(worst, float(np.abs(one.scores_M[hits] - two.scores_M[places[hits]]).max()))
    return BoxMatch(expected=expected, found=found, matched=matched, worst_score=worst)
