"""Labelled accuracy of an artifact in a session."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.detection.average_precision import MAP_SUPPRESSION, TrueBoxes, average_precision
from cspdeploy.core.detection.boxes import Boxes, to_picture
from cspdeploy.core.detection.labelled import LabelledBoxes
from cspdeploy.core.detection.postprocess import find_boxes
from cspdeploy.core.detection.spec import Decode
from cspdeploy.core.metrics import top_k
from cspdeploy.core.preprocess import load_image, normalise, resize_image
from cspdeploy.core.spec import Accuracy, Preprocess
from cspdeploy.core.types import Manifest

__all__ = ["measure_accuracy", "measure_boxes"]

BATCH = 256
BOX_BATCH = 16
"""Pictures of a detector are large: 16 at 608 px are 71 MB as they go in."""


def measure_accuracy(
    compute: Callable[[npt.NDArray[Any]], npt.NDArray[np.generic]],
    data: LabelledImages,
    contract: Preprocess,
    *,
    prepare: Callable[[npt.NDArray[np.uint8]], npt.NDArray[Any]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Top-1 and top-5 accuracy over all of `data`.

    Args:
        compute: inputs `[N, 3, H, W]` float32, or what `prepare` gives, to logits `[N, C]`.
        prepare: images `[N, H, W, 3]` uint8 RGB at the contract's size to inputs; None: as the contract says.
    """
    prepared = prepare or functools.partial(normalise, contract=contract)
    num_first = num_among_five = 0
    for indices in data.batches(BATCH):
        logits = compute(prepared(data.resized(indices, contract)))
        hits = top_k(logits, 5) == data.classes[indices][:, None]
        hits &= np.isfinite(logits).all(axis=1)[:, None]  # sorted like any others, a row of NaN would name class 0
        num_first += int(hits[:, 0].sum())
        num_among_five += int(hits.any(axis=1).sum())
        progress(int(indices[-1]) + 1, len(data))
    return Accuracy(
        dataset=data.name, num_images=len(data), top1=num_first / len(data), top5=num_among_five / len(data)
    )


def measure_boxes(
    compute: Callable[[npt.NDArray[Any]], Mapping[str, npt.NDArray[np.generic]]],
    data: LabelledBoxes,
    manifest: Manifest,
    *,
    decode: Decode,
    batch: int = BOX_BATCH,
    prepare: Callable[[npt.NDArray[np.uint8]], npt.NDArray[Any]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Mean average precision over all of `data`, whose classes are numbered as the model's, in the pictures' pixels.

    Suppressed by `MAP_SUPPRESSION`; where the graph suppresses, by the thresholds in the graph.

    Args:
        compute: inputs `[N, 3, H, W]` float32, or what `prepare` gives, to the outputs of `decode`.
        prepare: as in `measure_accuracy`.

    Raises:
        ValueError: a model that gives no boxes.
    """
    spec, detection = manifest.spec, manifest.spec.detection
    if detection is None:
        raise ValueError(f"{spec.name}: gives no boxes")
    rule = dataclasses.replace(detection, suppression=MAP_SUPPRESSION)
    prepared = prepare or functools.partial(normalise, contract=spec.preprocess)
    truths: list[TrueBoxes] = []
    found: list[Boxes] = []
    for start in range(0, len(data), batch):
        images = [load_image(path) for path in data.paths[start : start + batch]]
        outputs = compute(prepared(np.stack([resize_image(image, spec.preprocess) for image in images])))
        for index, (image, boxes) in enumerate(zip(images, find_boxes(outputs, rule, decode), strict=True), start):
            truths.append(data.truth(index, width=image.width, height=image.height))
            found.append(to_picture(boxes, spec.preprocess, width=image.width, height=image.height))
        progress(len(found), len(data))
    measured = average_precision(truths, found, spec.num_classes)
    return Accuracy(dataset=data.name, num_images=len(data), map50=measured.map50, map=measured.map)
