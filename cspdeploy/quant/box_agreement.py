"""The boxes of an INT8 detector against those of FP32: what its users see of the difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cspdeploy.core.detection.boxes import Boxes, suppress
from cspdeploy.core.detection.match import BoxMatch, match_images
from cspdeploy.core.detection.postprocess import candidates_of
from cspdeploy.core.detection.spec import Detection, Suppression
from cspdeploy.quant.plan import Floats

__all__ = ["JUDGED_SCORE", "BoxAgreement", "count_boxes"]

Array = npt.NDArray[np.generic]

JUDGED_SCORE = 0.25
"""Boxes that score more are compared: Darknet's own default for what it draws."""
MAX_PAIRS = 1000
"""Candidates times classes of one image that enter the suppression, the best of FP32's. Trained networks have tens;
without a bound an untrained one of 80 classes, where tens of thousands score alike, takes a minute an image."""


@dataclasses.dataclass(slots=True)
class BoxAgreement:
    """Counts, batch by batch, raw maps of two files. `total` is what was counted so far."""

    detection: Detection
    total: BoxMatch = dataclasses.field(default_factory=lambda: BoxMatch(expected=0, found=0, matched=0))

    def add(self, actual: Mapping[str, Array], exact: Mapping[str, Array]) -> None:
        """Count the boxes of some images."""
        more = count_boxes(actual, exact, self.detection)
        self.total = BoxMatch(
            expected=self.total.expected + more.expected, found=self.total.found + more.found,
            matched=self.total.matched + more.matched, worst_score=max(self.total.worst_score, more.worst_score),
        )  # fmt: skip


def count_boxes(actual: Mapping[str, Array], exact: Mapping[str, Array], detection: Detection) -> BoxMatch:
    """Boxes above `JUDGED_SCORE` that two results of raw maps share, after the suppression of each.

    Args:
        exact: of FP32, on the same images.
    """
    boxes_NA4, scores_NAC = candidates_of(exact, detection, "raw")
    others_NA4, other_scores_NAC = candidates_of(actual, detection, "raw")
    reference, other = [], []
    for i, scores_AC in enumerate(scores_NAC):
        rule = dataclasses.replace(detection.suppression, score_threshold=_threshold(scores_AC))
        reference.append(suppress(boxes_NA4[i], scores_AC, rule))
        other.append(_boxes(others_NA4[i], other_scores_NAC[i], rule))
    return match_images(reference, other)


def _boxes(boxes_A4: Floats, scores_AC: Floats, rule: Suppression) -> Boxes:
    """By FP32's threshold, but never of more candidates than that: a file may score all of them high."""
    threshold = max(rule.score_threshold, _threshold(scores_AC))
    return suppress(boxes_A4, scores_AC, dataclasses.replace(rule, score_threshold=threshold))


def _threshold(scores_AC: Floats) -> float:
    """`JUDGED_SCORE`, or the score that `MAX_PAIRS` pairs exceed."""
    scores = np.nan_to_num(scores_AC.ravel(), nan=0.0)
    if scores.size <= MAX_PAIRS:
        return JUDGED_SCORE
    highest = float(np.partition(scores, -MAX_PAIRS - 1)[-MAX_PAIRS - 1])
    return min(max(JUDGED_SCORE, highest), MAX_THRESHOLD)


MAX_THRESHOLD = float(np.nextafter(np.float32(1.0), np.float32(0.0)))
"""A rule takes thresholds below 1."""
