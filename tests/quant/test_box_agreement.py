"""Boxes of two results of the same maps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cspdeploy.core.detection.match import BoxMatch
from cspdeploy.core.detection.spec import Detection, DetectionHead
from cspdeploy.core.errors import InputError
from cspdeploy.quant.box_agreement import MAX_PAIRS, BoxAgreement, count_boxes
from cspdeploy.quant.budget import Judgement, describe_boxes, earns_its_place, parse_budget
from tests.quant.test_detector_view import DETECTION, maps, moved


def test_same_maps_share_all_boxes() -> None:
    found = count_boxes(maps(), maps(), DETECTION)
    assert (found.expected, found.found, found.matched, found.worst_score) == (found.matched,) * 3 + (0.0,)
    assert found.expected >= 2


def test_box_that_moved_is_lost_and_added() -> None:
    exact = count_boxes(maps(), maps(), DETECTION)
    found = count_boxes(moved("a", (0, 2, 1, 2), 0.5), maps(), DETECTION)
    assert found.expected == found.found == exact.expected
    assert found.matched < exact.matched
    assert found.recall == found.precision < 1


def test_box_that_fell_below_the_score_is_lost() -> None:
    found = count_boxes(moved("a", (0, 4, 1, 2), -6.0), maps(), DETECTION)
    assert found.found == found.matched < found.expected
    assert found.precision == 1.0


def test_batches_add_up() -> None:
    agreement = BoxAgreement(DETECTION)
    lost = moved("a", (0, 2, 1, 2), 0.5)
    agreement.add(maps(), maps())
    agreement.add(lost, maps())
    one, two = count_boxes(maps(), maps(), DETECTION), count_boxes(lost, maps(), DETECTION)
    assert agreement.total == BoxMatch(
        expected=one.expected + two.expected, found=one.found + two.found, matched=one.matched + two.matched,
        worst_score=max(one.worst_score, two.worst_score),
    )  # fmt: skip


def test_untrained_network_of_many_classes_is_bounded() -> None:
    """All scores alike: of 3 * 26 * 26 * 80 pairs above the score, few enter the suppression of either side."""
    head = DetectionHead(output="h", stride_px=16, anchors=((10.0, 10.0), (30.0, 30.0), (60.0, 60.0)))
    rng = np.random.default_rng(0)
    raw = {"h": (2 + rng.normal(size=(1, 3 * 85, 26, 26)) * 0.01).astype(np.float32)}
    other = {"h": raw["h"] + np.float32(0.02)}
    found = count_boxes(other, raw, Detection(heads=(head,)))
    assert 0 < found.expected <= MAX_PAIRS
    assert 0 < found.found <= MAX_PAIRS


def test_nan_is_no_box() -> None:
    broken = {name: np.full_like(array, np.nan) for name, array in maps().items()}
    found = count_boxes(broken, maps(), DETECTION)
    assert (found.found, found.matched) == (0, 0)
    assert found.recall == 0.0


def test_threshold_of_the_file_does_not_change_what_is_counted() -> None:
    """Made for a mean average precision, it keeps thousands of boxes; those that score 0.25 are compared."""
    rule = dataclasses.replace(DETECTION.suppression, score_threshold=0.001)
    low, lost = dataclasses.replace(DETECTION, suppression=rule), moved("a", (0, 2, 1, 2), 0.5)
    assert count_boxes(lost, maps(), low) == count_boxes(lost, maps(), DETECTION)


@pytest.mark.parametrize(
    ("match", "changed", "words"),
    [
        (BoxMatch(expected=1003, found=990, matched=982), 2.09, "97.9 % of 1,003 boxes matched, 0.8 % added"),
        (BoxMatch(expected=10, found=20, matched=10), 50.0, "100.0 % of 10 boxes matched, 50.0 % added"),
        (BoxMatch(expected=0, found=7, matched=0), 100.0, "no boxes to match, 7 added"),
    ],
)
def test_lost_and_added_boxes_are_changed_decisions(match: BoxMatch, changed: float, words: str) -> None:
    judged = Judgement(sqnr_db=30.0, num_images=8, boxes=match)
    assert judged.changed_percent == pytest.approx(changed, abs=0.01)
    assert describe_boxes(match) == words
    assert words in str(judged)
    refused = judged.accuracy_shortfall(parse_budget(max_drop="1%"))
    assert bool(refused) == (changed > 1)
    assert not refused or "of its boxes are not FP32's, 1 % may be" in refused
    assert earns_its_place(judged, parse_budget(max_drop=f"{min(100.0, changed + 0.01):.2f}%"))[0]


def test_first_classes_are_decisions_too() -> None:
    judged = Judgement(sqnr_db=30.0, num_images=200, agreement=0.96)
    assert "4.00 % of its first classes are not FP32's" in judged.accuracy_shortfall(parse_budget(max_drop="3%"))
    assert judged.accuracy_shortfall(parse_budget(max_drop="4%")) == ""


def test_network_without_decisions_is_refused() -> None:
    with pytest.raises(InputError, match="neither boxes nor classes") as caught:
        Judgement(sqnr_db=30.0, num_images=200).accuracy_shortfall(parse_budget(max_drop="3%"))
    assert caught.value.fix == "an SQNR: --max-drop 36dB"


def test_where_nothing_is_found_nothing_is_proven() -> None:
    judged = Judgement(sqnr_db=30.0, num_images=8, boxes=BoxMatch(expected=0, found=0, matched=0))
    assert describe_boxes(judged.boxes) == "no boxes to match"  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"no box above 0\.25 in 8 held-out images") as caught:
        judged.accuracy_shortfall(parse_budget(max_drop="3%"))
    assert "--max-drop 36dB" in caught.value.fix
    assert judged.accuracy_shortfall(parse_budget(max_drop="25dB")) == ""


@pytest.mark.parametrize("text", ["%", "-1%", "101%", "3%%", "3 % dB", "nan%"])
def test_share_of_no_such_form_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--max-drop") as caught:
        parse_budget(max_drop=text)
    assert caught.value.fix


def test_share_reads_as_a_sentence_has_it() -> None:
    assert str(parse_budget(max_drop=" 3 % ")) == "with at most 3 % of the decisions changed"
    assert parse_budget(max_drop="0.5%").limits_accuracy
    assert not parse_budget(max_latency="0.5x").limits_accuracy
