"""Mean average precision as COCO defines it, with numpy alone: a device has no pycocotools.

Source: cocodataset/cocoapi, PythonAPI/pycocotools/cocoeval.py (evaluateImg, accumulate), bounding boxes, area "all".
Shapes: T overlap thresholds, D boxes found, G boxes that are true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cspdeploy.core.detection.boxes import Boxes
from cspdeploy.core.detection.spec import Suppression

__all__ = ["MAP_SUPPRESSION", "MeanAveragePrecision", "TrueBoxes", "average_precision"]

MAP_SUPPRESSION = Suppression(score_threshold=0.001, iou_threshold=0.6, max_detections=300)
"""What a mAP is measured with, as Darknet's `valid` writes for COCO: precision is a curve over all scores, which the
threshold for drawing would cut off."""
OVERLAPS = np.linspace(0.5, 0.95, 10)
"""COCO's, 0.5 to 0.95 in steps of 0.05: `map50` is of the first, `map` the mean of all."""
RECALLS = np.linspace(0.0, 1.0, 101)
MAX_PER_CLASS = 100
"""Of an image, the best: COCO's maxDets."""

BoolArray = npt.NDArray[np.bool_]
Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrueBoxes:
    """What somebody has labelled in one image.

    Attributes:
        boxes_M4: left, top, right, bottom, in the pixels in which the found boxes are.
        classes_M: index of the class, int64.
        ignored_M: need not be found, and are no error if they are ("difficult" of VOC, crowds); None: none of them.
        crowd_M: those of the ignored that stand for any number of objects: a found box is theirs by the share of its
            own area that lies inside, and any number may be; None: none of them.
    """

    boxes_M4: npt.NDArray[np.floating]
    classes_M: npt.NDArray[np.int64]
    ignored_M: BoolArray | None = field(default=None)
    crowd_M: BoolArray | None = field(default=None)

    def __len__(self) -> int:
        return len(self.classes_M)

    @property
    def crowds(self) -> BoolArray:
        """`[M]`, of all."""
        return self.crowd_M if self.crowd_M is not None else np.zeros(len(self), bool)

    @property
    def uncounted(self) -> BoolArray:
        """`[M]`, of all: ignored or a crowd."""
        return (self.ignored_M if self.ignored_M is not None else np.zeros(len(self), bool)) | self.crowds


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanAveragePrecision:
    """Of all images together, in [0, 1].

    Attributes:
        map50: at an overlap of 0.5.
        map: the mean over overlaps of 0.5 to 0.95.
        per_class: the latter of each class; None where no image holds one.
        num_images: that were looked at.
        num_boxes: true ones that count.
    """

    map50: float
    map: float
    per_class: tuple[float | None, ...]
    num_images: int
    num_boxes: int


def average_precision(truths: Sequence[TrueBoxes], found: Sequence[Boxes], num_classes: int) -> MeanAveragePrecision:
    """Mean over the classes that occur of the area under precision over recall, at 101 points, as COCO does it.

    Args:
        truths: of each image.
        found: of the same images, in the same pixels, after suppression at a low score: see `MAP_SUPPRESSION`.

    Raises:
        ValueError: not the same number of images, a class that is not one of `num_classes`, or no true box at all.
    """
    if len(truths) != len(found):
        raise ValueError(f"got boxes of {len(found)} images, expected {len(truths)}")
    for classes_M in (*(one.classes_M for one in truths), *(one.classes_M for one in found)):
        if classes_M.size and not 0 <= int(classes_M.min()) <= int(classes_M.max()) < num_classes:
            raise ValueError(f"got classes {set(classes_M.tolist())}, expected 0 to {num_classes - 1}")
    num_boxes = sum(int((~truth.uncounted).sum()) for truth in truths)
    if not num_boxes:
        raise ValueError("no labelled box in any image, expected at least one")
    curves = [_class_precision(truths, found, index) for index in range(num_classes)]
    occurring = np.stack([curve for curve in curves if curve is not None])
    return MeanAveragePrecision(
        map50=float(occurring[:, 0].mean()), map=float(occurring.mean()),
        per_class=tuple(None if curve is None else float(curve.mean()) for curve in curves),
        num_images=len(truths), num_boxes=num_boxes,
    )  # fmt: skip


def _class_precision(truths: Sequence[TrueBoxes], found: Sequence[Boxes], index: int) -> Float64Array | None:
    """`[T]`: the average precision of a class at each overlap, or None where it does not occur."""
    scores: list[Float64Array] = []
    hits: list[BoolArray] = []
    counted: list[BoolArray] = []
    num_true = 0
    for truth, boxes in zip(truths, found, strict=True):
        mine = np.flatnonzero(truth.classes_M == index)
        own = np.flatnonzero(boxes.classes_M == index)
        if not mine.size and not own.size:
            continue
        num_true += int((~truth.uncounted[mine]).sum())
        order = own[np.argsort(-boxes.scores_M[own], kind="stable")][:MAX_PER_CLASS]
        hit, counts = _match(np.asarray(boxes.boxes_M4[order], np.float64), truth, mine)
        scores.append(np.asarray(boxes.scores_M[order], np.float64))
        hits.append(hit)
        counted.append(counts)
    if not num_true:
        return None
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hit_TD, counted_TD = np.concatenate(hits, 1)[:, order], np.concatenate(counted, 1)[:, order]
    return np.array(
        [_area_under(hit & count, ~hit & count, num_true) for hit, count in zip(hit_TD, counted_TD, strict=True)]
    )


def _match(found_D4: Float64Array, truth: TrueBoxes, mine: npt.NDArray[np.int64]) -> tuple[BoolArray, BoolArray]:
    """`[T, D]` each: whether a found box is a true one, and whether it counts at all.

    The best takes first: the true box it overlaps most, one that counts before one that is ignored.
    """
    ignored, crowd = truth.uncounted[mine], truth.crowds[mine]
    overlaps_DG = _overlaps(found_D4, np.asarray(truth.boxes_M4[mine], np.float64), crowd)
    limits_T1 = np.minimum(OVERLAPS, 1 - 1e-10)[:, None]
    hit = np.zeros((len(OVERLAPS), len(found_D4)), bool)
    counted = np.ones_like(hit)
    taken_TG = np.zeros((len(OVERLAPS), len(mine)), bool)
    rows = np.arange(len(OVERLAPS))
    if not mine.size:
        return hit, counted
    for index, overlaps_G in enumerate(overlaps_DG):
        free_TG = (overlaps_G >= limits_T1) & (~taken_TG | crowd)
        # One that counts is worth 2 more than any overlap; of equal ones the last, as the original has it.
        worth_TG = np.where(free_TG, overlaps_G + 2.0 * ~ignored, -1.0)
        best_T = len(mine) - 1 - worth_TG[:, ::-1].argmax(1)
        some_T = worth_TG[rows, best_T] >= 0
        taken_TG[rows[some_T], best_T[some_T]] = True
        hit[:, index] = some_T
        counted[:, index] = ~(some_T & ignored[best_T])
    return hit, counted


def _overlaps(found_D4: Float64Array, true_G4: Float64Array, crowd_G: BoolArray) -> Float64Array:
    """`[D, G]`: intersection over union; with a crowd, over the found box's own area."""
    low = np.maximum(found_D4[:, None, :2], true_G4[None, :, :2])
    high = np.minimum(found_D4[:, None, 2:], true_G4[None, :, 2:])
    inside = np.clip(high - low, 0, None).prod(-1)
    own = (found_D4[:, 2:] - found_D4[:, :2]).prod(-1)[:, None]
    other = (true_G4[:, 2:] - true_G4[:, :2]).prod(-1)[None]
    union = np.where(crowd_G[None], own, own + other - inside)
    return np.asarray(np.where(inside > 0, inside / np.where(union > 0, union, 1.0), 0.0), np.float64)


def _area_under(hit_D: BoolArray, miss_D: BoolArray, num_true: int) -> float:
    """Precision, made to fall only, at each of the recalls; 0 where so many are never found."""
    hits, misses = np.cumsum(hit_D, dtype=np.float64), np.cumsum(miss_D, dtype=np.float64)
    recall = hits / num_true
    precision = hits / (hits + misses + np.spacing(1))
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, RECALLS, side="left")
    reached = places[places < len(falling)]
    return float(falling[reached].sum() / len(RECALLS))
