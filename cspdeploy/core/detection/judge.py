"""A detector's outputs, of whatever contract, against the original's: numbers first, then which boxes come of them.

The one judge, where a file is made and on the device that runs it. Shapes: as in this folder.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from cspdeploy.core.catalog import TIE_FACTOR
from cspdeploy.core.compare import Comparison, compare_outputs
from cspdeploy.core.detection.boxes import Boxes, suppress
from cspdeploy.core.detection.decisions import MOST_LOST, BoxDecisions, decide_boxes, ties_for
from cspdeploy.core.detection.fast import find_boxes_fast
from cspdeploy.core.detection.match import MATCH_IOU, MATCH_SCORE
from cspdeploy.core.detection.near_ties import Candidates, Ties, safe_iou
from cspdeploy.core.detection.postprocess import candidates_of
from cspdeploy.core.detection.rows import form_of_rows
from cspdeploy.core.detection.spec import BOXES_OUTPUT, SCORES_OUTPUT, Decode, Detection
from cspdeploy.core.results import Limit

__all__ = ["compare_detector", "heads_of"]

Array = npt.NDArray[np.generic]
Reference = Mapping[str, npt.NDArray[np.float64]]

LEAST_THRESHOLD = 0.05
"""Of a file that keeps every candidate (0.001, for a mean average precision over all recalls) the boxes that somebody
will look at are still those that score."""
MAX_EXPLAINED = 50
"""Boxes of an image, the best, that are looked for among the reference's candidates."""
COUNT_SLACK = 0.1
"""What suppression makes of a few candidates more or less: one that comes up may take several away."""
NOTHING_COMPARED = "no box on any golden image, on either side: of the suppressed boxes nothing could be compared"
FORM_ONLY = "untrained: of the suppressed boxes their form, their number and their origin were judged, not which"


def compare_detector(
    outputs: Mapping[str, Array], *, names: tuple[str, ...], dtypes: Mapping[str, str], detection: Detection,
    decode: Decode, precision: str, reference: Reference, limits: Mapping[str, Limit], decides: bool,
) -> Comparison:  # fmt: skip
    """Judge what a file gave for all images.

    Candidates, as maps or decoded, are compared number by number; of boxes that the graph has suppressed, form and
    origin. Then the boxes of both are matched, both through the one post-processing, each by its own contract.

    Args:
        names: of the outputs, in the order that the file promises.
        dtypes: as it promises them; float32 for an output that is not in it.
        decode: the contract of `outputs`.
        reference: the original's, in its own contract.
        limits: of the reference's outputs, as `detector_limits` gives them.
        decides: False of an untrained network, whose candidates all score alike, and of random inputs, which show
            no object. Then the boxes of a sound file may be others, but not where a graph that suppresses is in FP32.
    """
    own = dict(outputs)
    exact = {name: np.asarray(array, np.float32) for name, array in reference.items()}
    pool = list(zip(*candidates_of(exact, detection, detection.network_decode), strict=True))
    if decode == "nms":
        num_classes = pool[0][1].shape[1]
        found = form_of_rows(own, names, dtypes, detection, num_images=len(pool), num_classes=num_classes)
    else:
        if decode == "ultralytics":
            if problem := _not_one(own, names):
                return problem
            boxes_NA4, scores_NAC = candidates_of(own, detection, decode)
            own, names, dtypes = {BOXES_OUTPUT: boxes_NA4, SCORES_OUTPUT: scores_NAC}, tuple(reference), {}
            decode = "decoded"
        found = _compare_numbers(
            own, names=names, dtypes=dtypes, reference=reference, limits=limits, detection=detection,
            weighted=precision != "fp32" and decode == "decoded" == detection.network_decode,
        )  # fmt: skip
    if found.verdict not in ("pass", "numeric"):
        return found
    ties = ties_for(precision, max(limit.rel_l2 for limit in limits.values()))
    boxes = find_boxes_fast(own, detection, decode)
    expected = find_boxes_fast(exact, detection, detection.network_decode)
    decided = decide_boxes(
        boxes, expected, rule=detection.suppression, ties=ties, reference=pool,
        heads_A=heads_of(detection, len(pool[0][0])),
    )  # fmt: skip
    found = dataclasses.replace(
        found, box_recall=decided.recall, box_precision=decided.precision, num_boxes=decided.num_boxes,
        boxes=decided.images,
    )  # fmt: skip
    if found.verdict != "pass":
        return found
    if decode == "nms":
        return _judge_rows(found, decided, boxes, pool, detection, precision=precision, ties=ties, limits=limits,
                           decides=decides)  # fmt: skip
    if decided.reason and decides:
        return dataclasses.replace(found, verdict="decision", reason=decided.reason)
    return found


def heads_of(detection: Detection, num_candidates: int) -> npt.NDArray[np.int64] | None:
    """`[A]`: which head each candidate comes of; None where the heads do not make that many."""
    per_px = [len(head.anchors) / head.stride_px**2 for head in detection.heads]
    exact = [num_candidates * one / sum(per_px) for one in per_px]
    counts = [round(one) for one in exact]
    return np.repeat(np.arange(len(counts)), counts) if np.allclose(counts, exact, rtol=1e-9) else None


def _compare_numbers(
    own: Mapping[str, Array], *, names: tuple[str, ...], dtypes: Mapping[str, str], reference: Reference,
    limits: Mapping[str, Limit], detection: Detection, weighted: bool,
) -> Comparison:  # fmt: skip
    """FP32 as any network. Of FP16 and INT8 the sides of a box count by its score over the threshold, at most 1.

    Nearly all candidates are background: how large a box is that nobody keeps means nothing, and its logits are what
    FP16 and INT8 move most. An FP32 file must have the original's numbers everywhere.
    """
    plain = compare_outputs(own, names=names, reference=reference, limits=limits, decisions=False, dtypes=dtypes)
    if not weighted or plain.verdict not in ("pass", "numeric"):
        return plain
    threshold = max(detection.suppression.score_threshold, LEAST_THRESHOLD)
    weight_NA1 = np.minimum(reference[SCORES_OUTPUT].max(-1, keepdims=True) / threshold, 1)
    return compare_outputs(
        {**own, BOXES_OUTPUT: np.asarray(own[BOXES_OUTPUT] * weight_NA1, np.float32)}, names=names,
        reference={**reference, BOXES_OUTPUT: reference[BOXES_OUTPUT] * weight_NA1}, limits=limits, decisions=False,
        dtypes={name: dtype for name, dtype in dtypes.items() if name != BOXES_OUTPUT},
    )  # fmt: skip


def _judge_rows(
    found: Comparison, decided: BoxDecisions, boxes: Sequence[Boxes], pool: Candidates, detection: Detection, *,
    precision: str, ties: Ties, limits: Mapping[str, Limit], decides: bool,
) -> Comparison:  # fmt: skip
    """Boxes that the graph has suppressed: which they are, and the numbers of those that both have."""
    reason = decided.reason if decides or precision == "fp32" else _wrong_number(boxes, pool, detection, ties)
    reason = reason or _unexplained(boxes, pool, int8=precision == "int8")
    if reason:
        return dataclasses.replace(found, verdict="decision", reason=reason)
    limit = limits.get(BOXES_OUTPUT) or next(iter(limits.values()))
    most = TIE_FACTOR * limit.rel_l2 * _scale(pool)
    # Of INT8 the sides are judged by the overlap alone.
    if precision != "int8" and decided.worst_px > most:
        reason = f"a box is off by {decided.worst_px:.2g} px, at most {most:.2g} px is explained ({limit.why})"
    elif decided.worst_score > ties.score:
        reason = f"a box's score is off by {decided.worst_score:.2g}, at most {ties.score:.2g} is explained"
    if reason:
        return dataclasses.replace(found, verdict="numeric", reason=reason)
    if not decided.num_boxes and not any(map(len, boxes)):
        return dataclasses.replace(found, note=NOTHING_COMPARED)
    return found if decides or precision == "fp32" else dataclasses.replace(found, note=FORM_ONLY)


def _scale(pool: Candidates) -> float:
    """Rms of the coordinates, in pixels, of which a relative L2 is a share."""
    boxes = np.stack([boxes for boxes, _ in pool]).astype(np.float64)
    return float(np.sqrt(np.mean(np.square(boxes[np.isfinite(boxes)]))))


def _wrong_number(boxes: Sequence[Boxes], pool: Candidates, detection: Detection, ties: Ties) -> str:
    """Why there cannot be so many, or so few: as the reference has where the threshold is off by a near tie."""
    rule = detection.suppression
    ends = [min(max(rule.score_threshold + by, 0.0), 0.999) for by in (ties.score, -ties.score)]
    rules = [dataclasses.replace(rule, score_threshold=end) for end in ends]
    fewest, most = sorted(sum(len(suppress(*one, changed)) for one in pool) for changed in rules)
    low, high = math.floor(fewest * (1 - COUNT_SLACK)) - 1, math.ceil(most * (1 + COUNT_SLACK)) + 1
    count = sum(map(len, boxes))
    return "" if low <= count <= high else f"{count} boxes, the original has {fewest} to {most}"


def _unexplained(boxes: Sequence[Boxes], pool: Candidates, *, int8: bool) -> str:
    """The first box that is no candidate of the reference, or empty. INT8 moves a few as far."""
    reason, strange, total = "", 0, 0
    for image, (own, (boxes_A4, scores_AC)) in enumerate(zip(boxes, pool, strict=True)):
        for index in range(min(len(own), MAX_EXPLAINED)):
            name, score = int(own.classes_M[index]), float(own.scores_M[index])
            near = safe_iou(own.boxes_M4[index : index + 1], boxes_A4)[0] >= MATCH_IOU
            total += 1
            if not (near & (np.abs(scores_AC[:, name] - score) <= MATCH_SCORE)).any():
                strange += 1
                told = f"image {image}: a box that is no candidate of the original's (class {name}, score {score:.3f})"
                reason = reason or told
    return reason if strange > (max(1, math.floor(MOST_LOST * total)) if int8 else 0) else ""


def _not_one(outputs: Mapping[str, Array], names: tuple[str, ...]) -> Comparison | None:
    """What is wrong with the one output `[N, 4 + C, A]`, before it is taken apart."""
    if tuple(outputs) != names:
        return Comparison(verdict="order", reason=f"outputs are {list(outputs)}, expected {list(names)}")
    array = outputs[names[0]]
    if array.ndim != 3:
        return Comparison(verdict="shape", reason=f"shape {list(array.shape)}, expected [N, 4 + C, A]")
    if array.dtype != np.float32:
        return Comparison(verdict="dtype", reason=f"dtype {array.dtype}, expected float32")
    return None
