"""Boxes that are left: what they are, how they overlap, how they are suppressed, and where they lie in the picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cspdeploy.core.detection.spec import Suppression
from cspdeploy.core.pixels.fit import fit_image
from cspdeploy.core.spec import Preprocess

__all__ = ["Boxes", "iou_matrix", "suppress", "to_picture"]

FloatArray = npt.NDArray[np.float32]
IndexArray = npt.NDArray[np.int64]

MAX_SIDE_PX = float(1 << 20)
"""A coordinate must be within that, or its box counts as none: an exponential of a wild network is infinite, or so
large that the square of it is, and then no overlap can be computed. No picture is as large."""
_BLOCK = 1024
"""Candidates that are compared with the boxes that stay at a time: 300 x 1024 overlaps are some MB."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Boxes:
    """Of one image, best first.

    Attributes:
        boxes_M4: left, top, right, bottom, float32, in pixels of the network's input or of the picture.
        scores_M: in [0, 1], float32.
        classes_M: index of the class, int64.
    """

    boxes_M4: FloatArray
    scores_M: FloatArray
    classes_M: IndexArray

    def __len__(self) -> int:
        return len(self.scores_M)

    def above(self, score: float) -> Boxes:
        """Those that score more than that."""
        keep = np.flatnonzero(self.scores_M > score)
        return Boxes(boxes_M4=self.boxes_M4[keep], scores_M=self.scores_M[keep], classes_M=self.classes_M[keep])


def iou_matrix(a_N4: FloatArray, b_M4: FloatArray) -> FloatArray:
    """`[N, M]`: intersection over union of each box with each; 0 for boxes without an area."""
    low = np.maximum(a_N4[:, None, :2], b_M4[None, :, :2])
    high = np.minimum(a_N4[:, None, 2:], b_M4[None, :, 2:])
    sides = np.maximum(high - low, 0)
    inside = sides[..., 0] * sides[..., 1]  # prod() of two takes several times as long
    union = _area(a_N4)[:, None] + _area(b_M4)[None] - inside
    return np.asarray(inside / np.maximum(union, np.float32(1e-12)), np.float32)


def _area(boxes_N4: FloatArray) -> FloatArray:
    sides = np.maximum(boxes_N4[:, 2:] - boxes_N4[:, :2], 0)
    return np.asarray(sides[:, 0] * sides[:, 1], np.float32)


def suppress(boxes_A4: FloatArray, scores_AC: FloatArray, rule: Suppression, *, beta: float | None = None) -> Boxes:
    """Class by class: the best box stays, those that overlap it too much go. Then the best of all classes together.

    Scores that are NaN, and boxes that are not finite or beyond `MAX_SIDE_PX`, count as none. Equal scores: the first
    candidate, then the first class.

    Args:
        boxes_A4: of one image, left, top, right, bottom.
        scores_AC: of the same.
        beta: Darknet's `beta_nms`: the distance of the centres, relative to the box around both, to the power of
            `2 * beta`, is taken off the overlap first (0.6 in "greedynms" and "diounms"); None for the plain overlap.
    """
    usable = np.asarray((np.abs(boxes_A4) < MAX_SIDE_PX).all(axis=1))
    rows, classes = np.nonzero((scores_AC > rule.score_threshold) & usable[:, None])
    order = np.argsort(-scores_AC[rows, classes], kind="stable")  # they come by candidate, then by class
    rows, classes = rows[order], classes[order]
    best = _survivors(boxes_A4[rows], classes, rule, beta)
    rows, classes = rows[best], classes[best]
    return Boxes(
        boxes_M4=np.asarray(boxes_A4[rows], np.float32), scores_M=np.asarray(scores_AC[rows, classes], np.float32),
        classes_M=classes.astype(np.int64),
    )  # fmt: skip


def _survivors(boxes_N4: FloatArray, classes_N: IndexArray, rule: Suppression, beta: float | None) -> IndexArray:
    """Indices of those that stay, of boxes that come best first.

    All classes go together, so that it ends with the last box that is wanted: an untrained network has a hundred
    thousand candidates of like scores.
    """
    kept = np.zeros(0, np.int64)
    for start in range(0, len(boxes_N4), _BLOCK):
        left = np.arange(start, min(start + _BLOCK, len(boxes_N4)))
        for index in range(0, len(kept), _BLOCK):
            by = kept[index : index + _BLOCK]
            left = left[~_suppressed(boxes_N4, classes_N, by=by, of=left, rule=rule, beta=beta).any(0)]
        found: list[int] = []
        while left.size and len(kept) + len(found) < rule.max_detections:
            found.append(int(left[0]))
            by, left = left[:1], left[1:]
            rivals = np.flatnonzero(classes_N[left] == classes_N[by[0]])  # few: most of the time goes into overlaps
            gone = _suppressed(boxes_N4, classes_N, by=by, of=left[rivals], rule=rule, beta=beta)[0]
            left = np.delete(left, rivals[gone])
        kept = np.concatenate([kept, np.array(found, np.int64)])
        if len(kept) >= rule.max_detections:
            break
    return kept


def _suppressed(
    boxes_N4: FloatArray, classes_N: IndexArray, *, by: IndexArray, of: IndexArray, rule: Suppression,
    beta: float | None,
) -> npt.NDArray[np.bool_]:  # fmt: skip
    """`[len(by), len(of)]`: whether a box that stays takes another one of its class away."""
    overlap = iou_matrix(boxes_N4[by], boxes_N4[of])
    if beta is not None:
        overlap = overlap - _distance(boxes_N4[by], boxes_N4[of]) ** np.float32(beta)
    return np.asarray((overlap > rule.iou_threshold) & (classes_N[by][:, None] == classes_N[of][None]), np.bool_)


def _distance(a_N4: FloatArray, b_M4: FloatArray) -> FloatArray:
    """`[N, M]`: squared distance of the centres over the squared diagonal of the box around both."""
    low = np.minimum(a_N4[:, None, :2], b_M4[None, :, :2])
    high = np.maximum(a_N4[:, None, 2:], b_M4[None, :, 2:])
    centres = ((a_N4[:, :2] + a_N4[:, 2:])[:, None] - (b_M4[:, :2] + b_M4[:, 2:])[None]) / 2
    diagonal = np.square(high - low).sum(-1)
    return np.asarray(np.square(centres).sum(-1) / np.maximum(diagonal, np.float32(1e-12)), np.float32)


def to_picture(found: Boxes, contract: Preprocess, *, width: int, height: int) -> Boxes:
    """The same boxes in pixels of the picture of `width` x `height` that the contract prepared, cut at its edges."""
    fit = fit_image(contract, width=width, height=height)
    scale = np.array([width / fit.scaled_px[0], height / fit.scaled_px[1]] * 2, np.float32)
    offset = np.array([fit.left_px, fit.top_px] * 2, np.float32)
    limit = np.array([width, height] * 2, np.float32)
    boxes = np.clip((found.boxes_M4 + offset) * scale, 0, limit)
    return Boxes(boxes_M4=np.asarray(boxes, np.float32), scores_M=found.scores_M, classes_M=found.classes_M)
