"""A detector's file, as the ladder has it, before the one judge of detectors.

Shapes: as in `cspdeploy.core.detection`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cspdeploy.check.subject import Candidate, Subject
from cspdeploy.core.compare import Comparison
from cspdeploy.core.detection import judge
from cspdeploy.core.detection.spec import Decode, Detection
from cspdeploy.core.results import Limit

__all__ = ["compare_detector"]

Array = npt.NDArray[np.generic]


def compare_detector(
    outputs: Mapping[str, Array], *, subject: Subject, made: Candidate, detection: Detection,
    limits: Mapping[str, Limit],
) -> Comparison:  # fmt: skip
    """Judge what a file of a detector gave for all images of the subject.

    What lies in front of a plugin is judged as candidates, and the plugin by what its node says. Which boxes it would
    leave is not known, and no share of the same boxes is told.
    """
    decode: Decode = made.decode or detection.network_decode
    reference = subject.outputs_fp64
    dtypes = dict(zip(made.output_names, made.output_dtypes, strict=False))
    own, names = dict(outputs), made.network_names
    if made.cut and tuple(own) == names:  # by the names of the reference, in the plugin's order
        own, names, dtypes = dict(zip(reference, own.values(), strict=True)), tuple(reference), {}
    found = judge.compare_detector(
        own, names=names, dtypes=dtypes, detection=detection, decode=decode, precision=made.precision,
        reference=reference, limits=limits, decides=not subject.untrained and not subject.synthetic,
    )  # fmt: skip
    if not made.cut:
        return found
    if made.plugin_fault and found.verdict == "pass":
        found = dataclasses.replace(found, verdict="decision", reason=made.plugin_fault)
    return dataclasses.replace(found, box_recall=None, box_precision=None, num_boxes=None, boxes=())
