from __future__ import annotations

import numpy as np
import pytest

from cspdeploy.core.detection.spec import Detection, DetectionHead
from cspdeploy.core.errors import InputError
from cspdeploy.train.anchors import find_anchors, mean_best_overlap, shape_overlaps, with_anchors

SHAPES = ((10.0, 12.0), (30.0, 20.0), (60.0, 64.0))


def _sizes(num: int = 90) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.repeat(SHAPES, num // 3, axis=0) * rng.uniform(0.95, 1.05, (num, 2))


def test_overlap_of_shapes() -> None:
    found = shape_overlaps(np.array([[10.0, 10.0]]), np.array([[10.0, 10.0], [20.0, 5.0], [5.0, 5.0]]))
    assert found == pytest.approx(np.array([[1.0, 50 / 150, 0.25]]))


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_found_smallest_first(seed: int) -> None:
    anchors = find_anchors(_sizes(), 3, seed=seed)
    assert np.asarray(anchors) == pytest.approx(np.asarray(SHAPES), rel=0.05)
    assert mean_best_overlap(_sizes(), anchors) > 0.93


def test_the_same_seed_gives_the_same_anchors() -> None:
    sizes = np.random.default_rng(1).uniform(5, 90, (200, 2))
    assert find_anchors(sizes, 6, seed=4) == find_anchors(sizes, 6, seed=4)


def test_found_anchors_fit_better_than_those_of_coco() -> None:
    sizes = np.random.default_rng(1).uniform(20, 90, (200, 2))
    published = ((10.0, 14.0), (23.0, 27.0), (37.0, 58.0), (81.0, 82.0), (135.0, 169.0), (344.0, 319.0))
    assert mean_best_overlap(sizes, find_anchors(sizes, 6)) > mean_best_overlap(sizes, published) + 0.1


@pytest.mark.parametrize(("sizes", "match"), [
    (np.zeros((0, 2)), "got none, expected at least one"),
    ([[5.0, 0.0]] * 8, "not above 0"),
    ([[5.0, float("nan")]] * 8, "not above 0"),
])  # fmt: skip
def test_sizes_that_give_no_anchors(sizes: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        find_anchors(np.array(sizes), 3)


@pytest.mark.parametrize(("sizes", "expected"), [
    ([[8.0, 4.0]] * 5, ((4.0, 2.0), (5.7, 2.8), (8.0, 4.0), (11.3, 5.7), (16.0, 8.0))),
    ([[1.0, 1.0]] * 5, ((1.0, 1.0), (1.4, 1.4), (2.0, 2.0), (2.8, 2.8), (4.0, 4.0))),  # none below a pixel
    ([[8.0, 4.0], [80.0, 40.0]], ((5.7, 2.8), (8.0, 4.0), (11.3, 5.7), (56.6, 28.3), (80.0, 40.0))),
])  # fmt: skip
def test_few_different_sizes_are_joined_by_scaled_ones(
    sizes: list[list[float]], expected: tuple[tuple[float, float], ...]
) -> None:
    assert find_anchors(np.array(sizes), 5) == expected


def test_the_finest_head_gets_the_smallest_whatever_their_order() -> None:
    old = ((1.0, 1.0), (1.0, 1.0))
    detection = Detection(heads=(
        DetectionHead(output="head_s32", stride_px=32, anchors=old),
        DetectionHead(output="head_s16", stride_px=16, anchors=old),
    ))  # fmt: skip
    found = with_anchors(detection, ((4.0, 4.0), (8.0, 8.0), (30.0, 30.0), (60.0, 60.0)))
    assert found.heads[0].anchors == ((30.0, 30.0), (60.0, 60.0))
    assert found.heads[1].anchors == ((4.0, 4.0), (8.0, 8.0))
    with pytest.raises(ValueError, match="got 3, expected 4"):
        with_anchors(detection, ((4.0, 4.0), (8.0, 8.0), (30.0, 30.0)))
