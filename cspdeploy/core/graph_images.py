"""What files with preprocessing in their graph take and give, beyond what their network does.

Shapes: N images, H height, W width, C classes, k classes of a top-k.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.core.catalog import CLASSES_OUTPUT, FP16_LIMIT, PROBABILITIES_OUTPUT
from cspdeploy.core.metrics import softmax
from cspdeploy.core.preprocess import read_pixels, resize_pixels
from cspdeploy.core.results import Limit, Verdict
from cspdeploy.core.spec import Preprocess
from cspdeploy.core.types import Artifact, Frontend

__all__ = ["check_top_k", "graph_pixels", "in_order", "pixel_change", "pixels_for", "with_pixel_change"]

Array = npt.NDArray[Any]
Pixels = npt.NDArray[np.uint8]

PROBABILITY_LIMIT = 1e-5
"""Softmax in float32 against float64 on the same scores: some roundings of 6e-8, of a number of 1 at most; a hundredth
of a point of a per cent would be 1e-4."""


def graph_pixels(pixels_HWC: Pixels, frontend: Frontend, contract: Preprocess) -> Pixels:
    """RGB pixels as the graph takes them: resized, unless it does that, in its own channel order.

    May be the given array itself.
    """
    sized = pixels_HWC if frontend.resize else resize_pixels(pixels_HWC, contract)
    return np.ascontiguousarray(in_order(sized, frontend))


def pixels_for(frontend: Frontend, stored: Pixels, contract: Preprocess) -> Pixels:
    """Stored images, `[N, h, w]` or `[N, h, w, 3]`, as `[N, H, W, 3]`: what `graph_pixels` makes of each."""
    return np.stack([graph_pixels(read_pixels(image), frontend, contract) for image in stored])


def in_order(images: Pixels, frontend: Frontend) -> Pixels:
    """RGB images `[..., 3]` in the frontend's order."""
    return np.ascontiguousarray(images[..., ::-1]) if frontend.channel_order == "bgr" else images


def pixel_change(artifact: Artifact) -> float:
    """Relative L2 that its own resize moves the outputs by, as its steps say. What is no such number counts as none."""
    steps = artifact.steps if artifact.frontend is not None and artifact.frontend.resize else ()
    found = [step.facts.get("output_change") for step in steps]
    numbers = (float(one) for one in found if isinstance(one, int | float) and not isinstance(one, bool))
    return max((one for one in numbers if 0 <= one < math.inf), default=0.0)


def with_pixel_change(limits: Mapping[str, Limit], change: float) -> dict[str, Limit]:
    """The limits of a file that resizes by itself: errors add up, at most.

    What pixels at the bound of a resize are worth (a tenth of a step of 255 in the mean) was measured at export, with
    the FP32 file on them. It never excuses more than the error that FP16 is allowed.

    Args:
        change: of `pixel_change`.
    """
    if not change:
        return dict(limits)
    bounded = min(change, FP16_LIMIT)
    capped = f", at most {FP16_LIMIT:g}" if bounded < change else ""
    return {
        name: limit if limit.overridden else dataclasses.replace(
            limit, rel_l2=limit.rel_l2 + bounded, terms={**limit.terms, "pixels": bounded},
            why=f"{limit.why}; and {bounded:.1e}{capped}, which pixels a tenth of a step of 255 from Pillow's move the "
            "outputs of the FP32 file by: its graph resizes",
        )
        for name, limit in limits.items()
    }  # fmt: skip


def check_top_k(outputs: Mapping[str, Array], logits_NC: Array, frontend: Frontend) -> tuple[Verdict, str]:
    """Whether "classes" and "probabilities" say what the scores of the same file say; "pass" and no reason if so."""
    num_classes, num_images = frontend.top_k, len(logits_NC)
    for name, dtype in ((PROBABILITIES_OUTPUT, "float32"), (CLASSES_OUTPUT, "int64")):
        if name not in outputs:
            return "order", f"no output '{name}'"
        if outputs[name].dtype != dtype:
            return "dtype", f"{name}: dtype {outputs[name].dtype}, expected {dtype}"
        if outputs[name].shape != (num_images, num_classes):
            return "shape", f"{name}: shape {list(outputs[name].shape)}, expected {[num_images, num_classes]}"
    problem = _wrong_classes(outputs[CLASSES_OUTPUT].astype(np.int64), logits_NC)
    if problem:
        return "decision", f"{CLASSES_OUTPUT}: {problem}"
    exact = np.take_along_axis(softmax(np.asarray(logits_NC, np.float64)), outputs[CLASSES_OUTPUT], axis=1)
    off = float(np.abs(outputs[PROBABILITIES_OUTPUT].astype(np.float64) - exact).max())
    if off <= PROBABILITY_LIMIT:
        return "pass", ""
    return (
        "numeric",
        f"{PROBABILITIES_OUTPUT}: off the softmax of the scores by {off:.1e}, limit {PROBABILITY_LIMIT:g}",
    )


def _wrong_classes(classes_Nk: npt.NDArray[np.int64], logits_NC: Array) -> str:
    if classes_Nk.min() < 0 or classes_Nk.max() >= logits_NC.shape[1]:
        return f"{classes_Nk.min()} to {classes_Nk.max()}, expected 0 to {logits_NC.shape[1] - 1}"
    num = classes_Nk.shape[1]
    scores = np.asarray(logits_NC, np.float64)
    # By their scores and not by their numbers: of two classes with the same score either may come first.
    expected = -np.sort(-scores, axis=1)[:, :num]
    wrong = (np.take_along_axis(scores, classes_Nk, axis=1) != expected).any(axis=1)
    wrong |= [len(set(row)) != num for row in _rows(classes_Nk)]
    return f"not the {num} largest scores in their order, first image {int(np.argmax(wrong))}" if wrong.any() else ""


def _rows(classes_Nk: npt.NDArray[np.int64]) -> Sequence[Sequence[int]]:
    rows: list[list[int]] = classes_Nk.tolist()
    return rows
