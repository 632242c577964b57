"""The fast path against the plain one: the same boxes, to the last bit."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import pytest

from cspdeploy.core.detection.boxes import Boxes
from cspdeploy.core.detection.fast import find_boxes_fast
from cspdeploy.core.detection.postprocess import find_boxes
from cspdeploy.core.detection.spec import Suppression
from tests.edge.detectors import detection_of, outputs_of, raw_heads


def _same(a: list[Boxes], b: list[Boxes]) -> bool:
    fields = ("boxes_M4", "scores_M", "classes_M")
    return len(a) == len(b) and all(
        np.array_equal(getattr(one, name), getattr(two, name)) for one, two in zip(a, b, strict=True) for name in fields
    )


@pytest.mark.parametrize("new_coords", [False, True])
@pytest.mark.parametrize("score", [0.0, 0.25, 0.6, 0.99])
def test_raw_heads_give_the_very_boxes_of_the_plain_way(new_coords: bool, score: float) -> None:
    detection = detection_of("raw", new_coords=new_coords, suppression=Suppression(score_threshold=score))
    for seed in range(3):
        raw = raw_heads(seed, num=2, new_coords=new_coords)
        found = find_boxes_fast(raw, detection, "raw")
        assert _same(found, find_boxes(raw, detection, "raw"))
        assert score > 0.5 or sum(map(len, found))


def test_what_is_no_number_and_what_is_too_large_is_dropped_alike() -> None:
    raw, detection = raw_heads(num=2), detection_of("raw")
    raw["head_s8"][0, 4] = np.nan  # objectness of an anchor
    raw["head_s8"][1, 5] = np.inf  # a class
    raw["head_s16"][0, 2] = 200.0  # a size that overflows
    raw["head_s16"][1, 0] = np.nan  # a place
    found = find_boxes_fast(raw, detection, "raw")
    assert _same(found, find_boxes(raw, detection, "raw"))
    assert all(np.isfinite(boxes.boxes_M4).all() and np.isfinite(boxes.scores_M).all() for boxes in found)


def test_scores_a_rounding_above_one_are_not_lost() -> None:
    """Of new_coords in 8 bits: objectness alone is below the threshold, and the product above it."""
    raw = raw_heads(new_coords=True)
    raw["head_s8"][:, 4], raw["head_s8"][:, 5] = 0.2499, 1.01
    detection = detection_of("raw", new_coords=True)
    found = find_boxes_fast(raw, detection, "raw")
    assert _same(found, find_boxes(raw, detection, "raw"))
    assert (np.abs(found[0].scores_M - 0.2499 * 1.01) < 1e-6).any()


@pytest.mark.parametrize("decode", ["decoded", "ultralytics", "nms"])
def test_other_contracts_are_passed_on(decode: Literal["decoded", "ultralytics", "nms"]) -> None:
    detection = detection_of(decode)
    outputs = outputs_of(raw_heads(), detection)
    assert _same(find_boxes_fast(outputs, detection, decode), find_boxes(outputs, detection, decode))


def test_maps_that_do_not_fit_are_refused() -> None:
    raw = raw_heads()
    with pytest.raises(KeyError):
        find_boxes_fast({"head_s8": raw["head_s8"]}, detection_of("raw"), "raw")
    with pytest.raises(ValueError, match="head_s8: 15 channels"):
        find_boxes_fast(raw | {"head_s8": raw["head_s8"][:, :15]}, detection_of("raw"), "raw")
    odd = dataclasses.replace(detection_of("raw"), heads=detection_of("raw").heads[:1])
    assert len(find_boxes_fast(raw, odd, "raw")) == 1
