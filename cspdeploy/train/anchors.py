"""Anchors for a set of boxes: k-means by overlap, and their distribution over the heads of a detector.

Source: YOLO9000, arXiv 1612.08242, section 2 (dimension clusters: distance 1 - IoU of boxes with one centre).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from cspdeploy.core.detection.spec import Detection
from cspdeploy.core.errors import InputError

__all__ = ["find_anchors", "mean_best_overlap", "shape_overlaps", "with_anchors"]

MAX_ROUNDS = 300  # k-means of boxes settles within tens of them
MIN_SIDE_PX = 1.0

Float64Array = npt.NDArray[np.float64]
Anchors = tuple[tuple[float, float], ...]


def shape_overlaps(sizes_M2: npt.NDArray[np.floating], anchors_K2: npt.NDArray[np.floating]) -> Float64Array:
    """`[M, K]`: intersection over union of boxes of those widths and heights with one centre."""
    sizes, anchors = np.asarray(sizes_M2, np.float64), np.asarray(anchors_K2, np.float64)
    inside = np.minimum(sizes[:, None], anchors[None]).prod(-1)
    return np.asarray(inside / (sizes.prod(-1)[:, None] + anchors.prod(-1)[None] - inside), np.float64)


def mean_best_overlap(sizes_M2: npt.NDArray[np.floating], anchors: Anchors) -> float:
    """How well anchors fit boxes: the mean over the boxes of the overlap with the best anchor, in [0, 1]."""
    return float(shape_overlaps(sizes_M2, np.asarray(anchors)).max(1).mean())


def find_anchors(sizes_M2: npt.NDArray[np.floating], num: int, *, seed: int = 0) -> Anchors:
    """Cluster the sizes of boxes by overlap; anchors come smallest area first, rounded to a tenth of a pixel.

    All of them differ. Where the boxes have fewer different sizes, the rest are those made smaller and larger by
    steps of the square root of two: they stand ready for boxes that the labels do not show.

    Args:
        sizes_M2: width and height of every box, in pixels of the network's input.
        num: of anchors.
        seed: of the choice of the first centres (k-means++).

    Raises:
        InputError: no box, or a size that is not above 0.
    """
    sizes = np.maximum(np.asarray(sizes_M2, np.float64), 0.0)
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise InputError("boxes: got a width or height that is not above 0", fix="mend the labels")
    if not len(sizes):
        raise InputError("boxes: got none, expected at least one", fix="label more images")
    centres = _first_centres(sizes, num, np.random.default_rng(seed))
    nearest = np.full(len(sizes), -1)
    for _ in range(MAX_ROUNDS):
        found = shape_overlaps(sizes, centres).argmax(1)
        if (found == nearest).all():
            break
        nearest = found
        for index in range(num):
            members = sizes[nearest == index]
            if len(members):  # the median: a few huge boxes do not pull it
                centres[index] = np.median(members, axis=0)
    ordered = centres[np.argsort(centres.prod(1), kind="stable")]
    return tuple(sorted(_filled(_as_anchors(ordered), num), key=lambda pair: pair[0] * pair[1]))


def _as_anchors(centres_K2: Float64Array) -> list[tuple[float, float]]:
    """Those that differ, in tenths of a pixel."""
    rounded = centres_K2.clip(MIN_SIDE_PX).round(1)
    return list(dict.fromkeys((float(width), float(height)) for width, height in rounded))


def _filled(found: list[tuple[float, float]], num: int) -> list[tuple[float, float]]:
    """With scaled ones, the nearest scales first, until there are so many."""
    made, step = list(found), 0
    while len(made) < num:
        step += 1
        for factor in (2 ** (-step / 2), 2 ** (step / 2)):
            scaled = _as_anchors(np.asarray(found) * factor)
            made += [pair for pair in scaled if pair not in made][: num - len(made)]
    return made


def _first_centres(sizes: Float64Array, num: int, rng: np.random.Generator) -> Float64Array:
    """k-means++: each next centre is a box far from those before, by chance."""
    centres = sizes[rng.integers(len(sizes))][None]
    while len(centres) < num:
        far = np.square(1.0 - shape_overlaps(sizes, centres).max(1))
        share = far / far.sum() if far.sum() > 0 else np.full(len(sizes), 1.0 / len(sizes))
        centres = np.concatenate([centres, sizes[rng.choice(len(sizes), p=share)][None]])
    return centres


def with_anchors(detection: Detection, anchors: Anchors) -> Detection:
    """The same heads with other anchors: the smallest for the head of the finest stride, and so on.

    Raises:
        ValueError: not as many as the heads have.
    """
    order = sorted(range(len(detection.heads)), key=lambda index: detection.heads[index].stride_px)
    if sum(len(head.anchors) for head in detection.heads) != len(anchors):
        raise ValueError(f"anchors: got {len(anchors)}, expected {sum(len(h.anchors) for h in detection.heads)}")
    heads, start = list(detection.heads), 0
    for index in order:
        stop = start + len(heads[index].anchors)
        heads[index] = dataclasses.replace(heads[index], anchors=anchors[start:stop])
        start = stop
    return dataclasses.replace(detection, heads=tuple(heads))
