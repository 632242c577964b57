"""From a classifier's outputs to its likeliest classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import InputError
from cspdeploy.core.metrics import softmax, top_k
from cspdeploy.edge.opening import OpenedArtifact
from cspdeploy.edge.results import Prediction, Result

__all__ = ["likeliest_classes", "require_top"]

Array = npt.NDArray[Any]


def likeliest_classes(outputs: Mapping[str, Array], opened: OpenedArtifact, top: int) -> list[Result]:
    """The `top` likeliest classes of each image.

    Raises:
        InputError: not as many class scores as labels.
    """
    logits_NC = outputs[opened.outputs[0]]
    labels = opened.labels
    if labels and logits_NC.shape[1] != len(labels):
        raise InputError(
            f"{opened.model}: {logits_NC.shape[1]} classes and {len(labels)} labels", fix="export it again"
        )
    probabilities_NC = softmax(logits_NC)
    return [
        Result(
            predictions=tuple(
                Prediction(
                    label=labels[int(i)] if labels else f"class {i}", index=int(i), probability=float(row[i])
                )
                for i in best
            ),
            untrained=opened.provenance.untrained,
        )
        for best, row in zip(top_k(logits_NC, top), probabilities_NC, strict=True)
    ]  # fmt: skip


def require_top(top: object) -> None:
    """Refuse what is no number of classes.

    Raises:
        InputError: not a whole number, or below 1.
    """
    if isinstance(top, bool) or not isinstance(top, (int, np.integer)) or top < 1:
        raise InputError(f"top: got {top!r}, expected a whole number of at least 1", fix="top=1")
