"""A detector's part of the self-test: the one judge of detectors, before the golden images.

Shapes: as in `cspdeploy.core.detection`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.core.compare import Comparison
from cspdeploy.core.detection import judge
from cspdeploy.core.detection.decisions import detector_limits
from cspdeploy.core.detection.fast import find_boxes_fast
from cspdeploy.core.detection.match import BoxMatch, match_images
from cspdeploy.core.detection.spec import (
    BOXES_OUTPUT,
    COUNT_OUTPUT,
    DETECTIONS_OUTPUT,
    SCORES_OUTPUT,
    TRT_OUTPUTS,
    ULTRALYTICS_OUTPUT,
    Decode,
    Detection,
)
from cspdeploy.core.golden import Golden
from cspdeploy.core.results import Limit

__all__ = ["compare_detector"]

Array = npt.NDArray[Any]


def compare_detector(
    outputs: Mapping[str, Array], *, detection: Detection, decode: Decode, precision: str, golden: Golden,
    limits: Mapping[str, Limit], dtypes: Mapping[str, str], untrained: bool,
) -> tuple[Comparison, BoxMatch | None]:  # fmt: skip
    """Judge outputs of the golden images, whatever their contract, as `verify` does where the file is made.

    Args:
        limits: of the reference's outputs.
        dtypes: of the artifact's outputs.
        untrained: its boxes mean nothing.
    """
    exact = {name: array.astype(np.float32) for name, array in golden.outputs_fp64.items()}
    try:
        found = find_boxes_fast(outputs, detection, decode)
        if len(found) != len(golden.images):
            return Comparison(verdict="shape", reason=f"{len(found)} images, expected {len(golden.images)}"), None
        told = judge.compare_detector(
            outputs, names=_names(detection, decode), dtypes=dtypes, detection=detection, decode=decode,
            precision=precision, reference=golden.outputs_fp64, limits=detector_limits(limits, precision),
            decides=not untrained,
        )  # fmt: skip
    except (KeyError, ValueError, IndexError) as error:
        return Comparison(verdict="shape", reason=f"not the outputs of its contract '{decode}' ({error})"), None
    return told, match_images(find_boxes_fast(exact, detection, detection.network_decode), found)


def _names(detection: Detection, decode: Decode) -> tuple[str, ...]:
    """Of the outputs of that contract, in their order."""
    return {
        "raw": detection.raw_outputs,
        "decoded": (BOXES_OUTPUT, SCORES_OUTPUT),
        "nms": (DETECTIONS_OUTPUT, COUNT_OUTPUT),
        "ultralytics": (ULTRALYTICS_OUTPUT,),
        "trt": TRT_OUTPUTS,
    }[decode]
