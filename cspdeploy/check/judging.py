"""The verdict on outputs: limits of a file, and whatever its task asks of it. Shapes: N images or other inputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cspdeploy.check.detector_check import compare_detector
from cspdeploy.check.frontend_rows import network_outputs, with_pixels
from cspdeploy.check.settings import VerifySettings
from cspdeploy.check.subject import Candidate, Subject
from cspdeploy.core.compare import Comparison, compare_outputs
from cspdeploy.core.detection.decisions import detector_limits
from cspdeploy.core.graph_images import check_top_k
from cspdeploy.core.metrics import relative_l2
from cspdeploy.core.quantised import count_quantised
from cspdeploy.core.results import Limit
from cspdeploy.core.tolerance import allowed_flips, limits_for
from cspdeploy.runtimes.base import Outputs

__all__ = ["detects", "joint_distance", "judge_outputs", "limits_of", "rows_of_first_call", "subject_of_first_call"]


def limits_of(made: Candidate, subject: Subject, settings: VerifySettings) -> dict[str, Limit]:
    """How far each output of a file may be from the reference."""
    limits = limits_for(
        made.precision, subject.floors, num_quantised=_num_quantised(made), tolerance=settings.tolerance(made.artifact)
    )
    limits = with_pixels(limits, made)
    return detector_limits(limits, made.precision) if detects(subject) else limits


def detects(subject: Subject) -> bool:
    """Whether boxes are what decides: of a bundle whose task is to detect."""
    return subject.manifest is not None and subject.manifest.spec.detection is not None


def judge_outputs(outputs: Outputs, *, made: Candidate, subject: Subject, limits: Mapping[str, Limit]) -> Comparison:
    """Judge what a file gave for all inputs of the subject.

    Args:
        outputs: of the graph, with what top-k in it adds, `[N, ...]`.
        limits: of `limits_of`.
    """
    own = network_outputs(outputs, made)
    detection = subject.manifest.spec.detection if subject.manifest is not None else None
    if detection is not None:
        return compare_detector(own, subject=subject, made=made, detection=detection, limits=limits)
    judged = subject.task == "classify" and not subject.synthetic
    found = compare_outputs(
        own, names=made.network_names, reference=subject.outputs_fp64, limits=limits,
        decisions=judged and all(array.ndim == 2 for array in subject.outputs_fp64.values()),
        dtypes=dict(zip(made.output_names, made.output_dtypes, strict=False)),
        images=not subject.one_call,
        # An untrained network decides nothing: all of its images are near ties.
        num_flips=None if subject.untrained else allowed_flips(made.precision, subject.num_inputs),
    )  # fmt: skip
    if found.verdict == "pass" and made.frontend is not None and made.frontend.top_k:
        verdict, reason = check_top_k(outputs, next(iter(own.values())), made.frontend)
        found = dataclasses.replace(found, verdict=verdict, reason=reason)
    return found


def subject_of_first_call(subject: Subject, made: Candidate) -> Subject:
    """The same subject with no more inputs than `Subject.first_call` has, and their reference."""
    if subject.one_call:
        return subject
    count = min(made.batch or 1, subject.num_inputs)
    return dataclasses.replace(
        subject, feeds={name: array[:count] for name, array in subject.feeds.items()},
        outputs_fp64={name: array[:count] for name, array in subject.outputs_fp64.items()},
    )  # fmt: skip


def rows_of_first_call(outputs: Outputs, *, subject: Subject, made: Candidate) -> Outputs:
    """What a first call gave, without the rows that only fill up a fixed batch."""
    if subject.one_call:
        return outputs
    count = min(made.batch or 1, subject.num_inputs)
    return {name: array[:count] for name, array in outputs.items()}


def joint_distance(outputs: Outputs, reference: Mapping[str, npt.NDArray[np.float64]]) -> float:
    """Relative L2 of all outputs together; infinite where they cannot be compared."""

    def joined(arrays: Mapping[str, npt.NDArray[np.generic]]) -> npt.NDArray[np.float64]:
        return np.concatenate([arrays[name].astype(np.float64).ravel() for name in reference])

    if set(outputs) != set(reference) or any(outputs[name].shape != reference[name].shape for name in reference):
        return math.inf
    return relative_l2(joined(outputs), joined(reference))


def _num_quantised(made: Candidate) -> int:
    if made.precision != "int8":
        return 0
    return count_quantised(made.path) if made.format == "onnx" else made.num_quantised
