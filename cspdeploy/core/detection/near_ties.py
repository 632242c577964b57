"""Which lost and new boxes of an image a near tie excuses. Shapes: as in this folder; A candidates, C classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cspdeploy.core.detection.boxes import Boxes, iou_matrix
from cspdeploy.core.detection.match import MATCH_IOU, MATCH_SCORE
from cspdeploy.core.detection.spec import Suppression

__all__ = ["Candidates", "Change", "Excused", "Pool", "Ties", "excuse", "own_candidates", "safe_iou"]

Pool = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
Candidates = Sequence[Pool]
"""Boxes `[A, 4]` and scores `[A, C]` of each image."""
IndexArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ties:
    """How near to a threshold a decision is a near tie. `share`: of the clear boxes that may still be lost."""

    score: float
    overlap: float
    share: float = 0.0
    most_lost: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Change:
    """Of one image: `missing` of those expected have no match, `added` of those found."""

    expected: Boxes
    found: Boxes
    missing: IndexArray
    added: IndexArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Excused:
    """Boxes that nothing excuses, and `gone`: the lost ones, excused or not, that no rival stands for."""

    clear_lost: int
    clear_new: int
    gone: IndexArray


def excuse(change: Change, pool: Pool, *, rule: Suppression, ties: Ties) -> Excused:
    """Judge the boxes of an image that have no match.

    Excused is a box whose score is about the threshold (or about that of the last box that fits in); one that overlaps
    a box of its class which scores no less, and stands in the other result, about as much as the suppression allows;
    and one of two that are suppressed by each other and score about the same, where the other result has the other:
    a swap. What then goes or comes because of an excused one is excused too.

    Args:
        pool: candidates of the reference, that `change.expected` came of.
    """
    if not change.missing.size and not change.added.size:
        return Excused(clear_lost=0, clear_new=0, gone=np.zeros(0, np.int64))
    boxes, own, missing, added = change.expected, change.found, change.missing, change.added
    rivals = _replaced(change, pool, rule, ties)
    lost = _at_threshold(boxes, missing, rule, ties) | rivals
    new = _at_threshold(own, added, rule, ties) | _about(own, added, boxes, rule, ties)
    overlaps = safe_iou(boxes.boxes_M4[missing], own.boxes_M4[added]) > rule.iou_threshold
    overlaps &= boxes.classes_M[missing][:, None] == own.classes_M[added][None]
    ahead = own.scores_M[added][None] - boxes.scores_M[missing][:, None]
    frees, takes = overlaps & (ahead <= ties.score), overlaps & (ahead >= -ties.score)
    chained = np.zeros(missing.size, bool)
    while True:
        more_new = new | (frees & lost[:, None]).any(0)
        # The moved box itself is no reason for its loss: of two that are a swap, `_replaced` has decided already.
        more_lost = lost | (takes & more_new[None] & ~frees).any(1)
        chained |= more_lost & ~lost
        if (more_new == new).all() and (more_lost == lost).all():
            break
        new, lost = more_new, more_lost
    return Excused(
        clear_lost=int((~lost).sum()), clear_new=int((~new).sum()), gone=missing[~(rivals | chained)]
    )  # fmt: skip


def own_candidates(boxes: Boxes, pool: Pool) -> IndexArray:
    """`[M]`: which candidate each box is; the nearest, where rounding lies between."""
    made = np.zeros(len(boxes), np.int64)
    for index in range(len(boxes)):
        overlaps = safe_iou(boxes.boxes_M4[index : index + 1], pool[0])[0]
        apart = np.abs(pool[1][:, boxes.classes_M[index]] - boxes.scores_M[index])
        made[index] = int(np.argmax(overlaps - np.nan_to_num(apart, nan=np.inf)))
    return made


def safe_iou(a_N4: npt.NDArray[np.float32], b_M4: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """`iou_matrix`, 0 where it has no value: boxes of a wild network are infinite."""
    with np.errstate(all="ignore"):
        return np.nan_to_num(iou_matrix(a_N4, b_M4))


def _at_threshold(boxes: Boxes, which: IndexArray, rule: Suppression, ties: Ties) -> BoolArray:
    threshold = rule.score_threshold
    if len(boxes) >= rule.max_detections:
        threshold = max(threshold, float(boxes.scores_M[-1]))
    return np.asarray(np.abs(boxes.scores_M[which] - threshold) <= ties.score)


def _replaced(change: Change, pool: Pool, rule: Suppression, ties: Ties) -> BoolArray:
    """Those of the missing that another candidate stands for, which the result has: a near tie of the two."""
    boxes, own = change.expected, change.found
    made = np.zeros(change.missing.size, bool)
    for place, index in enumerate(change.missing):
        one, score, name = boxes.boxes_M4[index : index + 1], boxes.scores_M[index], int(boxes.classes_M[index])
        scores_A = pool[1][:, name]
        near = np.flatnonzero(scores_A >= score - ties.score)
        overlaps = safe_iou(one, pool[0][near])[0]
        alike = (np.abs(scores_A[near] - score) <= ties.score) & (overlaps > rule.iou_threshold)
        rivals = near[alike | (np.abs(overlaps - rule.iou_threshold) <= ties.overlap)]
        # Its own candidate is no rival: a box that has moved a little too far would excuse itself.
        rivals = rivals[rivals != own_candidates(boxes_at(boxes, int(index)), pool)[0]]
        same = np.flatnonzero(own.classes_M == name)
        if rivals.size and same.size:
            stands = safe_iou(pool[0][rivals], own.boxes_M4[same]) >= MATCH_IOU
            stands &= np.abs(scores_A[rivals][:, None] - own.scores_M[same][None]) <= MATCH_SCORE
            made[place] = bool(stands.any())
    return made


def boxes_at(boxes: Boxes, index: int) -> Boxes:
    """The one box."""
    here = slice(index, index + 1)
    return Boxes(boxes_M4=boxes.boxes_M4[here], scores_M=boxes.scores_M[here], classes_M=boxes.classes_M[here])


def _about(own: Boxes, added: IndexArray, boxes: Boxes, rule: Suppression, ties: Ties) -> BoolArray:
    """Those added that a box of the reference nearly leaves, or nearly takes away."""
    overlaps = safe_iou(own.boxes_M4[added], boxes.boxes_M4)
    about = np.abs(overlaps - rule.iou_threshold) <= ties.overlap
    about &= own.classes_M[added][:, None] == boxes.classes_M[None]
    about &= boxes.scores_M[None] >= own.scores_M[added][:, None] - ties.score
    return np.asarray(about.any(1))
