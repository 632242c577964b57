"""Labelled accuracy of an artifact in a session."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.metrics import top_k
from cspdeploy.core.preprocess import normalise
from cspdeploy.core.spec import Accuracy, Preprocess

__all__ = ["measure_accuracy"]

BATCH = 256


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
