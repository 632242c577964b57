"""Which boxes may be others: near ties, and nothing that only looks like one."""

from __future__ import annotations

import numpy as np
import pytest

from cspdeploy.core.detection.boxes import Boxes, suppress
from cspdeploy.core.detection.decisions import decide_boxes, ties_for
from cspdeploy.core.detection.judge import heads_of
from cspdeploy.core.detection.spec import Detection, DetectionHead, Suppression

RULE = Suppression()


def _of(*rows: tuple[float, float, float], size: float = 40.0) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of class 0 by left, top and score."""
    boxes = np.array([[x, y, x + size, y + size] for x, y, _ in rows], np.float32).reshape(-1, 4)
    return boxes, np.array([[score] for *_, score in rows], np.float32).reshape(-1, 1)


def _boxes(*rows: tuple[float, float, float]) -> Boxes:
    boxes, scores = _of(*rows)
    return Boxes(boxes_M4=boxes, scores_M=scores[:, 0], classes_M=np.zeros(len(rows), np.int64))


def _reason(found: Boxes, pool: tuple[np.ndarray, np.ndarray], precision: str, limit: float, **how: object) -> str:
    return decide_boxes(
        [found], [suppress(*pool, RULE)], rule=RULE, ties=ties_for(precision, limit), reference=[pool],
        **how,  # type: ignore[arg-type]
    ).reason  # fmt: skip


FAR = [(100.0 * i, 500.0, 0.9) for i in range(30)]


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ([(0, 0, 0.80)], ""),
        ([(6, 0, 0.80)], ""),  # a swap of two that score alike
        ([(0, 0, 0.80), (6, 0, 0.80)], "new"),  # not suppressed: its own candidate is no rival
        ([], "lost"),  # the near duplicate is lost too, and excuses nothing
        ([(300, 0, 0.80)], "lost"),
        ([(3, 0, 0.80)], "lost"),  # moved by less than it takes to leave its own candidate
    ],
)
def test_alike_is_a_swap_and_nothing_else(found: list[tuple[float, float, float]], fault: str) -> None:
    pool = _of((0, 0, 0.80), (6, 0, 0.79999))
    reason = _reason(_boxes(*found), pool, "fp32", 1e-4)
    assert bool(reason) == bool(fault), reason
    assert fault in reason


def test_what_follows_of_a_swap_is_excused() -> None:
    """Of four in a row each suppresses the next; where the first two change places, all that follow do."""
    pool = _of((0, 0, 0.800001), (10, 0, 0.8), (20, 0, 0.6), (30, 0, 0.5))
    assert suppress(*pool, RULE).boxes_M4[:, 0].tolist() == [0, 20]
    assert _reason(_boxes((10, 0, 0.8), (30, 0, 0.5)), pool, "fp32", 1e-5) == ""
    assert "lost" in _reason(_boxes((0, 0, 0.8), (30, 0, 0.5)), pool, "fp32", 1e-5)


def test_int8_may_not_lose_a_head_or_a_class() -> None:
    """Three boxes of 33 near the threshold: few enough for the share, but all that the head or the class has."""
    boxes, scores = _of(*FAR, *((100.0 * i, 0.0, 0.3) for i in range(3)))
    heads = np.repeat([0, 1], [30, 3])
    kept = _boxes(*FAR)
    assert _reason(kept, (boxes, scores), "int8", 0.1) == ""
    assert "of head 1 are lost" in _reason(kept, (boxes, scores), "int8", 0.1, heads_A=heads)
    two = np.zeros((33, 2), np.float32)
    two[:30, 0], two[30:, 1] = scores[:30, 0], scores[30:, 0]
    assert "of class 1 are lost" in _reason(kept, (boxes, two), "int8", 0.1)


def test_int8_may_lose_a_tenth() -> None:
    near = [(100.0 * i, 0.0, 0.3) for i in range(6)]
    pool = _of(*FAR, *near)
    assert _reason(_boxes(*FAR, *near[:3]), pool, "int8", 0.1) == ""
    assert "near ties" in _reason(_boxes(*FAR, *near[:2]), pool, "int8", 0.1)


def test_heads_by_their_number_of_candidates() -> None:
    heads = tuple(
        DetectionHead(output=f"s{stride}", stride_px=stride, anchors=((9.0, 9.0),) * 3) for stride in (32, 16)
    )  # fmt: skip
    found = heads_of(Detection(heads=heads), 3 * 7 * 5 * (1 + 4))
    assert found is not None
    assert np.bincount(found).tolist() == [105, 420]
    assert heads_of(Detection(heads=heads), 7) is None
