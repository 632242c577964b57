"""Outputs of an old and a new detector against each other, whatever their contracts: numbers, and which boxes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cspdeploy.check.subject import Candidate, Subject
from cspdeploy.core.detection.boxes import Boxes
from cspdeploy.core.detection.decisions import decide_boxes, ties_for
from cspdeploy.core.detection.match import match_images
from cspdeploy.core.detection.postprocess import candidates_of, find_boxes
from cspdeploy.core.detection.spec import Decode, Detection, Suppression
from cspdeploy.core.metrics import relative_l2
from cspdeploy.core.tolerance import limits_for
from cspdeploy.runtimes.base import Outputs

__all__ = ["BoxChange", "compare_boxes", "suppression_of"]

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxChange:
    """New against old.

    Attributes:
        rel_l2: of the candidates, or of the maps where both give these; None behind a suppression.
        same_boxes: share of the boxes of either that the other has too, the smaller one.
        reason: why these are not the decisions of the same network, or empty.
    """

    rel_l2: float | None
    same_boxes: float
    reason: str


def _detection_of(subject: Subject) -> Detection | None:
    return subject.manifest.spec.detection if subject.manifest is not None else None


def suppression_of(subject: Subject) -> Suppression | None:
    """Its thresholds; None of what is no detector."""
    detection = _detection_of(subject)
    return detection.suppression if detection is not None else None


def compare_boxes(
    got: Outputs, expected: Outputs, *, new: tuple[Subject, Candidate], old: tuple[Subject, Candidate]
) -> BoxChange | None:
    """Match the boxes of the same images.

    Args:
        got, expected: outputs of the new one and of the old one.

    Returns:
        None where either is no detector.
    """
    subject, made = new
    detection = _detection_of(subject)
    sides = [_side(outputs, *one) for outputs, one in ((expected, old), (got, new))]
    if detection is None or sides[0] is None or sides[1] is None:
        return None
    (was, was_values), (found, values) = sides[0], sides[1]
    match = match_images(was, found)
    limits = limits_for(made.precision, subject.floors)
    # Each may be its own limit away from the same reference, and so both limits from the other.
    ties = ties_for(made.precision, 2 * max(limit.rel_l2 for limit in limits.values()))
    exact = {name: np.asarray(array, np.float32) for name, array in subject.outputs_fp64.items()}
    decided = decide_boxes(
        found, was, rule=detection.suppression, ties=dataclasses.replace(ties, share=2 * ties.share),
        reference=list(zip(*candidates_of(exact, detection, detection.network_decode), strict=True)),
    )  # fmt: skip
    return BoxChange(
        rel_l2=_distance(values, was_values), same_boxes=min(match.recall, match.precision), reason=decided.reason
    )


def _side(outputs: Outputs, subject: Subject, made: Candidate) -> tuple[list[Boxes], Mapping[str, Array]] | None:
    """Boxes, and the numbers in front of a suppression; no numbers behind one."""
    detection = _detection_of(subject)
    if detection is None:
        return None
    decode: Decode = made.decode or detection.network_decode
    own = dict(zip(subject.outputs_fp64, outputs.values(), strict=True)) if made.cut else dict(outputs)
    boxes = find_boxes(own, detection, decode)
    if decode == "nms":
        return boxes, {}
    if decode == detection.network_decode:
        return boxes, own
    return boxes, dict(zip(subject.outputs_fp64, candidates_of(own, detection, decode), strict=True))


def _distance(got: Mapping[str, Array], expected: Mapping[str, Array]) -> float | None:
    if not got or not expected:
        return None
    if [(name, array.shape) for name, array in got.items()] != [(name, a.shape) for name, a in expected.items()]:
        return math.inf
    return max(relative_l2(got[name], expected[name]) for name in expected)
