"""Whether two results are the same boxes, and which of the others a near tie excuses. Shapes: as in this folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cspdeploy.core.catalog import INT8_AGREEMENT, INT8_LIMIT, TIE_FACTOR
from cspdeploy.core.detection.boxes import Boxes
from cspdeploy.core.detection.match import MATCH_IOU, MATCH_SCORE, match_boxes
from cspdeploy.core.detection.near_ties import Candidates, Change, Ties, excuse, own_candidates
from cspdeploy.core.detection.spec import SCORES_OUTPUT, Suppression
from cspdeploy.core.results import ImageBoxes, Limit

__all__ = ["SCORE_GAIN", "BoxDecisions", "Candidates", "Ties", "decide_boxes", "detector_limits", "ties_for"]

WIDEST_SCORE_TIE = MATCH_SCORE
"""What INT8 moves a score by, at most: measured as it says there."""
WIDEST_OVERLAP_TIE = 1 - MATCH_IOU
"""A box that has moved further is another one. INT8 kept 99 % of those 530 candidates within 0.06."""
MOST_LOST = 0.1
"""Share of the boxes that near ties may excuse in INT8, all together: two and a half times what that network lost. What
loses more has lost its objects, however crowded they stand."""
LEAST_GROUP = 3
"""Boxes of a class or of a head from which on INT8 must keep half: the share above hides a dead head of few boxes. Of
one or two, a near tie is most."""

SCORE_GAIN = 4.0
"""INT8 alone: a score is the product of two sigmoids, whose relative error is the absolute one of two logits, and most
scores are small. A trained YOLOv4-tiny has 0.054 where the model of the noise says 0.070 undamped: 0.8 of it arrives,
while the logits of a classifier show 0.21. Four times the model leaves the margin that classifiers have."""


def ties_for(precision: str, limit: float) -> Ties:
    """What an error of `limit` (relative L2, of a score of about 1 and a box of about its size) can tip.

    INT8 may lose as many clear boxes as a classifier may change images: its noise is that of single pixels.
    """
    score, overlap = (min(TIE_FACTOR * limit, widest) for widest in (WIDEST_SCORE_TIE, WIDEST_OVERLAP_TIE))
    if precision != "int8":
        return Ties(score=score, overlap=overlap)
    return Ties(score=score, overlap=overlap, share=1 - INT8_AGREEMENT, most_lost=MOST_LOST)


def detector_limits(limits: Mapping[str, Limit], precision: str) -> dict[str, Limit]:
    """The limits of a detector: as of any network, but for the scores of an INT8 file."""
    scores = limits.get(SCORES_OUTPUT)
    if precision != "int8" or scores is None or scores.overridden:
        return dict(limits)
    wider = min(SCORE_GAIN * scores.rel_l2, INT8_LIMIT)
    why = f"{SCORE_GAIN:g} x ({scores.why}) for the sigmoids behind it, at most {INT8_LIMIT:g}"
    changed = dataclasses.replace(scores, rel_l2=wider, why=why, terms={**scores.terms, "score_gain": SCORE_GAIN})
    return {**limits, SCORES_OUTPUT: changed}


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxDecisions:
    """Of all images together.

    Attributes:
        reason: why these are not the original's decisions, or empty.
        recall: share of the reference's boxes that are found again; 1 where there is none.
        precision: share of the found boxes that the reference has; 1 where there is none.
        num_boxes: of the reference.
        worst_px: largest distance of a side of a matched box.
        worst_score: largest difference of the scores of matched boxes.
        images: lost and new boxes of each.
    """

    reason: str
    recall: float
    precision: float
    num_boxes: int
    worst_px: float = 0.0
    worst_score: float = 0.0
    images: tuple[ImageBoxes, ...] = ()


MAX_SHOWN = 50
"""New boxes of an image that are told one by one; the others are counted."""


def decide_boxes(
    found: Sequence[Boxes], expected: Sequence[Boxes], *, rule: Suppression, ties: Ties, reference: Candidates,
    heads_A: npt.NDArray[np.int64] | None = None,
) -> BoxDecisions:  # fmt: skip
    """Match the boxes of each image, and judge those that have no match, as `near_ties.excuse` says.

    Args:
        reference: candidates that `expected` came of.
        heads_A: the head that each of them comes of; None for one that made all.

    Raises:
        ValueError: not the same number of images.
    """
    lost = invented = clear_lost = clear_new = num_expected = num_found = 0
    first, worst_px, worst_score = -1, 0.0, 0.0
    images: list[ImageBoxes] = []
    groups: dict[str, list[int]] = {}
    for index, (boxes, own, pool) in enumerate(zip(expected, found, reference, strict=True)):
        places = match_boxes(boxes, own)
        hits = places >= 0
        missing = np.flatnonzero(~hits)
        added = np.setdiff1d(np.arange(len(own)), places)
        told = _rows(own, added[:MAX_SHOWN])
        images.append(ImageBoxes(lost=tuple(missing.tolist()), new=told, more_new=added.size - len(told)))
        judged = excuse(Change(expected=boxes, found=own, missing=missing, added=added), pool, rule=rule, ties=ties)
        _count_groups(groups, boxes, judged.gone, pool, heads_A)
        first = index if first < 0 and judged.clear_lost + judged.clear_new else first
        lost, invented = lost + missing.size, invented + added.size
        clear_lost, clear_new = clear_lost + judged.clear_lost, clear_new + judged.clear_new
        num_expected, num_found = num_expected + len(boxes), num_found + len(own)
        if hits.any():
            worst_px = max(worst_px, _farthest(boxes.boxes_M4[hits], own.boxes_M4[places[hits]]))
            worst_score = max(worst_score, _farthest(boxes.scores_M[hits], own.scores_M[places[hits]]))
    total = max(num_expected, num_found)
    reason = _clear_reason(clear_lost, clear_new, total, ties)
    reason = f"{reason}, first in image {first}" if reason else _gross_reason(lost, invented, total, ties)
    return BoxDecisions(
        reason=reason or _group_reason(groups, ties), recall=1 - lost / num_expected if num_expected else 1.0,
        precision=1 - invented / num_found if num_found else 1.0, num_boxes=num_expected, worst_px=worst_px,
        worst_score=worst_score, images=tuple(images),
    )  # fmt: skip


def _count_groups(
    groups: dict[str, list[int]], boxes: Boxes, gone: npt.NDArray[np.int64],
    pool: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]], heads_A: npt.NDArray[np.int64] | None,
) -> None:  # fmt: skip
    """Add the boxes of an image, and those of them that nothing stands for any more, to their class and their head."""
    names = [[f"class {index}"] for index in boxes.classes_M]
    if heads_A is not None and len(boxes):
        for name, candidate in zip(names, own_candidates(boxes, pool), strict=True):
            name.append(f"head {heads_A[candidate]}")
    lost = set(gone.tolist())
    for index, both in enumerate(names):
        for group in both:
            counts = groups.setdefault(group, [0, 0])
            counts[0] += 1
            counts[1] += index in lost


def _group_reason(groups: Mapping[str, list[int]], ties: Ties) -> str:
    if ties.most_lost >= 1:  # what FP32 and FP16 lose is told one by one
        return ""
    for name, (total, lost) in groups.items():
        if total >= LEAST_GROUP and 2 * lost > total:
            return f"{lost} of the {total} boxes of {name} are lost"
    return ""


def _rows(boxes: Boxes, which: npt.NDArray[np.int64]) -> tuple[tuple[float, ...], ...]:
    return tuple(
        (*(round(float(side), 2) for side in boxes.boxes_M4[i]), round(float(boxes.scores_M[i]), 4),
         float(boxes.classes_M[i]))
        for i in which
    )  # fmt: skip


def _clear_reason(lost: int, new: int, total: int, ties: Ties) -> str:
    allowed = max(1, math.floor(ties.share * total + 1e-9)) if ties.share else 0
    if max(lost, new) <= allowed:
        return ""
    which = f"{lost} clear boxes are lost" if lost > allowed else f"{new} clear boxes are new"
    return f"{which}, at most {allowed} of {total} may be" if allowed else which


def _gross_reason(lost: int, new: int, total: int, ties: Ties) -> str:
    most = max(2, math.floor(ties.most_lost * total + 1e-9))
    if ties.most_lost >= 1 or max(lost, new) <= most:
        return ""
    return f"{lost} of {total} boxes are lost and {new} are new, at most {most} are explained by near ties"


def _farthest(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    return float(np.abs(a.astype(np.float64) - b).max())
