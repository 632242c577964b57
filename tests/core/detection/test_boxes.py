"""Suppression against a plain reading of its definition, and boxes back in the picture."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cspdeploy.core.contracts import CONTRACTS
from cspdeploy.core.detection.boxes import Boxes, iou_matrix, suppress, to_picture
from cspdeploy.core.detection.spec import Suppression

RULE = Suppression(score_threshold=0.2, iou_threshold=0.45, max_detections=50)


def scene(num: int, classes: int, *, seed: int = 0, levels: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of up to 60 px within 200, and scores; with `levels`, of so many different values."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 140, (num, 2))
    boxes = np.concatenate([low, low + rng.uniform(5, 60, (num, 2))], 1).astype(np.float32)
    scores = rng.random((num, classes)).astype(np.float32)
    return boxes, np.asarray(np.floor(scores * levels) / levels if levels else scores, np.float32)


def plain(boxes: np.ndarray, scores: np.ndarray, rule: Suppression, beta: float | None = None) -> list[tuple[int, int]]:
    """Candidate and class of what stays, best first, as one would write the definition down."""
    stay = []
    for one in range(scores.shape[1]):
        order = sorted(np.flatnonzero(scores[:, one] > rule.score_threshold), key=lambda i: (-scores[i, one], i))
        kept: list[int] = []
        for i in order:
            if all(overlap(boxes[i], boxes[j], beta) <= rule.iou_threshold for j in kept):
                kept.append(int(i))
        stay += [(i, one) for i in kept]
    return sorted(stay, key=lambda pair: (-scores[pair], *pair))[: rule.max_detections]


def overlap(a: np.ndarray, b: np.ndarray, beta: float | None) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    inside = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    iou = inside / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inside)
    if beta is None:
        return float(iou)
    around = np.square(np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2])).sum()
    return float(iou - (np.square((a[:2] + a[2:] - b[:2] - b[2:]) / 2).sum() / around) ** beta)


@pytest.mark.parametrize("beta", [None, 0.6])
@pytest.mark.parametrize(("num", "classes", "levels"), [(40, 1, 0), (120, 4, 0), (120, 4, 5)])
def test_is_its_definition(num: int, classes: int, levels: int, beta: float | None) -> None:
    boxes, scores = scene(num, classes, levels=levels)
    for rule in (RULE, dataclasses.replace(RULE, max_detections=7), dataclasses.replace(RULE, iou_threshold=0.9)):
        found, expected = suppress(boxes, scores, rule, beta=beta), plain(boxes, scores, rule, beta)
        rows = [row for row, _ in expected]
        np.testing.assert_array_equal(found.boxes_M4, boxes[rows])
        assert found.classes_M.tolist() == [one for _, one in expected]
        np.testing.assert_array_equal(found.scores_M, [scores[pair] for pair in expected])


def test_the_distance_saves_a_box_beside() -> None:
    """Overlap 0.47 of two boxes side by side: gone by the plain rule, there by Darknet's (0.6)."""
    boxes = np.array([[0, 0, 100, 100], [36, 0, 136, 100]], np.float32)
    scores = np.array([[0.9], [0.8]], np.float32)
    assert iou_matrix(boxes[:1], boxes[1:])[0, 0] == pytest.approx(0.4706, abs=1e-4)
    assert len(suppress(boxes, scores, RULE)) == 1
    assert len(suppress(boxes, scores, RULE, beta=0.6)) == 2


def test_one_candidate_of_two_classes_counts_twice() -> None:
    boxes, scores = np.array([[0, 0, 9, 9]], np.float32), np.array([[0.6, 0.1, 0.7]], np.float32)
    found = suppress(boxes, scores, RULE)
    assert found.classes_M.tolist() == [2, 0]
    assert found.above(0.65).classes_M.tolist() == [2]


def test_a_threshold_is_not_above_itself() -> None:
    """Strictly above the score; and an overlap that equals the bound stays."""
    boxes = np.array([[0, 0, 2, 1], [0, 0, 1, 1], [50, 0, 52, 2]], np.float32)
    scores = np.array([[0.9], [0.8], [0.25]], np.float32)
    found = suppress(boxes, scores, Suppression(score_threshold=0.25, iou_threshold=0.5))
    assert found.scores_M.tolist() == scores[:2, 0].tolist()


def test_nan_and_infinite_ones_count_as_none() -> None:
    boxes, scores = scene(6, 2)
    scores[:] = 0.9
    scores[0, 0] = np.nan
    boxes[1, 2], boxes[2, 0], boxes[3, 3] = np.inf, np.nan, 3e6
    found = suppress(boxes, scores, dataclasses.replace(RULE, iou_threshold=1.0))
    rows = [(boxes == box).all(1).argmax() for box in found.boxes_M4]
    assert list(zip(rows, found.classes_M.tolist(), strict=True)) == [(0, 1), (4, 0), (4, 1), (5, 0), (5, 1)]


@pytest.mark.parametrize("num", [0, 5])
def test_no_box_at_all(num: int) -> None:
    found = suppress(np.zeros((num, 4), np.float32), np.zeros((num, 3), np.float32), RULE)
    assert len(found) == 0
    assert found.boxes_M4.shape == (0, 4)
    assert found.boxes_M4.dtype == np.float32
    assert found.classes_M.dtype == np.int64


def test_thousands_of_boxes() -> None:
    """More than are compared at a time, of like scores, in 20 classes: the best are there, and no more than asked."""
    boxes, scores = scene(5000, 20, levels=7)
    rule = dataclasses.replace(RULE, max_detections=300)
    found = suppress(boxes, scores, rule)
    assert len(found) == 300
    some = np.flatnonzero(found.classes_M == found.classes_M[0])
    between = iou_matrix(found.boxes_M4[some], found.boxes_M4[some]) - np.eye(len(some), dtype=np.float32)
    assert between.max() <= rule.iou_threshold
    one = scores[:, :1]
    expected = [row for row, _ in plain(boxes[:2500], one[:2500], rule)]
    np.testing.assert_array_equal(suppress(boxes[:2500], one[:2500], rule).boxes_M4, boxes[:2500][expected])


def at(box: tuple[float, float, float, float]) -> Boxes:
    return Boxes(
        boxes_M4=np.array([box], np.float32), scores_M=np.array([0.5], np.float32), classes_M=np.array([3], np.int64)
    )


@pytest.mark.parametrize(
    ("resize", "width", "height", "box", "expected"),
    [
        ("stretch", 200, 50, (10, 20, 60, 80), (20, 10, 120, 40)),
        ("letterbox", 200, 100, (10, 30, 60, 70), (20, 10, 120, 90)),  # 25 px of grey above and below
        ("letterbox", 100, 200, (30, 10, 70, 60), (10, 20, 90, 120)),
        ("letterbox", 4000, 4, (0, 49, 100, 51), (0, 0, 4000, 4)),  # one row of the input, and grey
        ("letterbox", 200, 100, (-30, 0, 160, 140), (0, 0, 200, 100)),  # cut at the picture's edges
        ("crop", 200, 100, (0, 0, 100, 100), (50, 0, 150, 100)),
        ("crop", 100, 400, (0, 0, 100, 100), (0, 150, 100, 250)),
    ],
)
def test_back_in_the_picture(
    resize: str, width: int, height: int, box: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    contract = dataclasses.replace(CONTRACTS["darknet"].with_size(100, 100), resize=resize, crop_pct=1.0)  # type: ignore[arg-type]
    found = to_picture(at(box), contract, width=width, height=height)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.boxes_M4[0], expected, atol=1e-3)
    assert (found.scores_M[0], found.classes_M[0]) == (0.5, 3)


@pytest.mark.parametrize("field", ["score_threshold", "iou_threshold", "max_detections"])
@pytest.mark.parametrize("value", [True, "0.3", None, float("nan"), -1])
def test_suppression_of_another_type_names_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field}: got {value!r}, expected"):
        dataclasses.replace(RULE, **{field: value})  # type: ignore[arg-type]


def test_number_of_boxes_is_whole() -> None:
    with pytest.raises(ValueError, match=r"max_detections: got 2\.5, expected a whole number"):
        dataclasses.replace(RULE, max_detections=2.5)  # type: ignore[arg-type]
