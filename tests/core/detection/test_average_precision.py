"""Our mean average precision against pycocotools, and by hand."""

import io
from contextlib import redirect_stdout

import numpy as np
import pytest

from cspdeploy.core.detection.average_precision import TrueBoxes, average_precision
from cspdeploy.core.detection.boxes import Boxes

SIDE = 200.0


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corner = rng.uniform(0, SIDE * 0.8, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(4, SIDE * 0.5, (count, 2))], 1).astype(np.float32)


def random_case(seed: int, *, images: int, classes: int, crowds: bool) -> tuple[list[TrueBoxes], list[Boxes]]:
    """True boxes, and found ones: some near a true one, some invented, more than COCO's 100 in the first image."""
    rng = np.random.default_rng(seed)
    truths, found = [], []
    for image in range(images):
        count = int(rng.integers(0, 9))
        boxes, kinds = random_boxes(rng, count), rng.integers(0, classes, count)
        crowd = rng.random(count) < 0.2 if crowds else np.zeros(count, bool)
        truths.append(TrueBoxes(boxes_M4=boxes, classes_M=kinds, crowd_M=crowd))
        near = np.repeat(boxes, 2, 0) + rng.normal(0, 4, (2 * count, 4)).astype(np.float32)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        invented = random_boxes(rng, 260 if image == 0 else int(rng.integers(0, 12)))
        all_boxes = np.concatenate([near, invented]).astype(np.float32)
        all_kinds = np.concatenate([np.repeat(kinds, 2), rng.integers(0, classes, len(invented))])
        scores = rng.integers(1, 50, len(all_boxes)).astype(np.float32) / 50  # many of them equal
        order = np.argsort(-scores, kind="stable")
        found.append(Boxes(boxes_M4=all_boxes[order], scores_M=scores[order], classes_M=all_kinds[order]))
    return truths, found


def by_pycocotools(truths: list[TrueBoxes], found: list[Boxes], classes: int) -> tuple[float, float]:
    from pycocotools import coco, cocoeval

    labels = [
        {"image_id": image, "category_id": int(kind), "bbox": xywh(box), "iscrowd": int(crowd),
         "area": float(np.prod(xywh(box)[2:]))}
        for image, truth in enumerate(truths)
        for box, kind, crowd in zip(truth.boxes_M4, truth.classes_M, truth.crowds, strict=True)
    ]  # fmt: skip
    results = [
        {"image_id": image, "category_id": int(kind), "bbox": xywh(box), "score": float(score)}
        for image, boxes in enumerate(found)
        for box, score, kind in zip(boxes.boxes_M4, boxes.scores_M, boxes.classes_M, strict=True)
    ]
    with redirect_stdout(io.StringIO()):
        whole = coco.COCO()
        whole.dataset = {
            "images": [{"id": image} for image in range(len(truths))],
            "categories": [{"id": kind, "name": str(kind)} for kind in range(classes)],
            "annotations": [{**label, "id": index + 1} for index, label in enumerate(labels)],
        }
        whole.createIndex()
        judge = cocoeval.COCOeval(whole, whole.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[1]), float(judge.stats[0])


def xywh(box: np.ndarray) -> list[float]:
    left, top, right, bottom = (float(side) for side in box)
    return [left, top, right - left, bottom - top]


@pytest.mark.parametrize("crowds", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_pycocotools(seed: int, crowds: bool) -> None:
    truths, found = random_case(seed, images=12, classes=3, crowds=crowds)
    ours = average_precision(truths, found, 4)  # the fourth class does not occur
    theirs50, theirs = by_pycocotools(truths, found, 4)
    assert 0.05 < theirs < 0.95
    assert ours.map50 == pytest.approx(theirs50, abs=1e-9)
    assert ours.map == pytest.approx(theirs, abs=1e-9)
    assert ours.per_class[3] is None


def boxes_of(truth: TrueBoxes, *, shift: float = 0.0, score: float = 0.9) -> Boxes:
    return Boxes(
        boxes_M4=np.asarray(truth.boxes_M4 + np.float32(shift), np.float32),
        scores_M=np.full(len(truth), score, np.float32), classes_M=truth.classes_M,
    )  # fmt: skip


def one_box(side: float = 100.0, **flags: np.ndarray) -> TrueBoxes:
    return TrueBoxes(boxes_M4=np.array([[0, 0, side, side]], np.float32), classes_M=np.zeros(1, np.int64), **flags)


def test_all_found_is_one() -> None:
    truth = one_box()
    measured = average_precision([truth], [boxes_of(truth)], 1)
    assert (measured.map50, measured.map, measured.per_class) == (pytest.approx(1), pytest.approx(1), (measured.map,))


def test_an_overlap_of_068_counts_at_four_thresholds_of_ten() -> None:
    truth = one_box()
    measured = average_precision([truth], [boxes_of(truth, shift=10.0)], 1)  # 8100 / 11900 = 0.68
    assert (measured.map50, measured.map) == (pytest.approx(1), pytest.approx(0.4))


def test_nothing_found_is_zero() -> None:
    truth = one_box()
    nothing = Boxes(boxes_M4=np.zeros((0, 4), np.float32), scores_M=np.zeros(0, np.float32),
                    classes_M=np.zeros(0, np.int64))  # fmt: skip
    assert average_precision([truth], [nothing], 1).map50 == 0


def test_of_two_on_one_object_the_second_is_an_error() -> None:
    truth, other = one_box(), one_box()
    twice = Boxes(boxes_M4=np.repeat(truth.boxes_M4, 2, 0), scores_M=np.array([0.9, 0.8], np.float32),
                  classes_M=np.zeros(2, np.int64))  # fmt: skip
    low = boxes_of(other, score=0.1)
    assert average_precision([truth, other], [twice, low], 1).map == pytest.approx((51 + 50 * 2 / 3) / 101)


@pytest.mark.parametrize("found_it", [True, False])
def test_ignored_box_neither_counts_nor_errs(found_it: bool) -> None:
    plain, difficult = one_box(), one_box(ignored_M=np.ones(1, bool))
    other = boxes_of(difficult) if found_it else boxes_of(difficult).above(1.0)
    assert average_precision([plain, difficult], [boxes_of(plain), other], 1).map == pytest.approx(1)


def test_bad_input_is_refused() -> None:
    truth = one_box()
    with pytest.raises(ValueError, match="2 images"):
        average_precision([truth], [boxes_of(truth)] * 2, 1)
    with pytest.raises(ValueError, match="classes"):
        average_precision([truth], [boxes_of(truth)], 0)
    with pytest.raises(ValueError, match="no labelled box"):
        average_precision([one_box(ignored_M=np.ones(1, bool))], [boxes_of(truth)], 1)
