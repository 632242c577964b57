"""One artifact's outputs against the reference. Every way to be wrong has a verdict of its own.

Shapes: N images, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.check.tolerance import Tolerance
from cspdeploy.core.metrics import max_abs_difference, relative_l2, top_k
from cspdeploy.core.types import Verdict

__all__ = ["Comparison", "compare_outputs"]

Array = npt.NDArray[np.generic]
Reference = npt.NDArray[np.float64]

# An image whose two best classes are closer than this many times the typical allowed error may go either way.
TIE_FACTOR = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A verdict with its numbers; None where it made no sense to compute them.

    With several outputs `rel_l2` and `limit` are those of the output that comes nearest to its limit, `max_abs` is the
    largest of all.
    """

    verdict: Verdict
    reason: str = ""
    rel_l2: float | None = None
    limit: float | None = None
    max_abs: float | None = None
    top1_agreement: float | None = None
    top5_agreement: float | None = None


def compare_outputs(
    outputs: Mapping[str, Array],
    *,
    names: tuple[str, ...],
    reference: Mapping[str, Reference],
    tolerances: Mapping[str, Tolerance],
    decisions: bool,
) -> Comparison:
    """Judge outputs, which must be float32 arrays `[N, ...]` called `names`.

    Args:
        outputs: as the engine gave them, in its order.
        names: as the manifest promises them.
        reference: the original's FP64 outputs for the same images in the same order.
        tolerances: of each output.
        decisions: the one output is logits `[N, C]`, of which the largest decides.
    """
    if not reference or any(array.size == 0 for array in reference.values()):
        return Comparison(verdict="error", reason="nothing was compared: the reference is empty")
    if tuple(outputs) != names or tuple(reference) != names:
        return Comparison(
            verdict="order", reason=f"outputs are {list(outputs)}, expected {list(names)} as in {list(reference)}"
        )
    found = [_compare_one(outputs[name], reference[name], tolerances[name], decisions=decisions) for name in names]
    for name, comparison in zip(names, found, strict=True):
        if comparison.verdict != "pass":
            where = f"{name}: " if len(names) > 1 else ""
            return dataclasses.replace(comparison, reason=where + comparison.reason)
    nearest = max(found, key=lambda comparison: (comparison.rel_l2 or 0.0) / (comparison.limit or 1.0))
    return dataclasses.replace(nearest, max_abs=max(comparison.max_abs or 0.0 for comparison in found))


def _compare_one(actual: Array, reference: Reference, tolerance: Tolerance, *, decisions: bool) -> Comparison:
    if actual.shape != reference.shape:
        return Comparison(verdict="shape", reason=f"shape {list(actual.shape)}, expected {list(reference.shape)}")
    if actual.dtype != np.float32:
        return Comparison(verdict="dtype", reason=f"dtype {actual.dtype}, expected float32")
    num_bad = int(np.count_nonzero(~np.isfinite(actual)))
    if num_bad:
        return Comparison(verdict="nan", reason=f"{num_bad} of {actual.size} values are NaN or infinite")
    numbers: dict[str, Any] = {
        "rel_l2": relative_l2(actual, reference),  # type: ignore[arg-type]
        "limit": tolerance.rel_l2,
        "max_abs": max_abs_difference(actual, reference),  # type: ignore[arg-type]
    }
    if decisions:
        numbers |= _agreement(actual, reference)
    if not numbers["rel_l2"] <= tolerance.rel_l2:
        if _rows_permuted(actual, reference, tolerance):
            reason = "right outputs for the wrong images: rows are permuted"
            return Comparison(verdict="order", reason=reason, **numbers)
        reason = f"relative L2 {numbers['rel_l2']:.1e}, limit {tolerance.rel_l2:.1e} ({tolerance.why})"
        return Comparison(verdict="numeric", reason=reason, **numbers)
    if decisions:
        same_first = top_k(reference, 1)[:, 0] == top_k(actual, 1)[:, 0]  # type: ignore[arg-type]
        flipped = np.flatnonzero(~same_first & _decided(reference, tolerance))
        if flipped.size:
            reason = f"another class wins on {flipped.size} clear images, first image {flipped[0]}"
            return Comparison(verdict="decision", reason=reason, **numbers)
    return Comparison(verdict="pass", **numbers)


def _agreement(actual_NC: Array, reference_NC: Reference) -> dict[str, float]:
    expected, got = top_k(reference_NC, 5), top_k(actual_NC, 5)  # type: ignore[arg-type]
    common = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(expected, got, strict=True)]
    return {
        "top1_agreement": float((expected[:, 0] == got[:, 0]).mean()),
        "top5_agreement": float(np.mean(common)),
    }


def _decided(reference_NC: Reference, tolerance: Tolerance) -> npt.NDArray[np.bool_]:
    """Images whose winner leads by more than the allowed error can explain."""
    if reference_NC.shape[1] < 2:
        return np.ones(len(reference_NC), bool)
    best_two = np.sort(reference_NC, axis=1)[:, -2:]
    typical_error = tolerance.rel_l2 * np.sqrt(np.mean(reference_NC**2))
    return np.asarray(best_two[:, 1] - best_two[:, 0] > TIE_FACTOR * typical_error)


def _rows_permuted(actual: Array, reference: Reference, tolerance: Tolerance) -> bool:
    """Whether `actual` is the reference with its images in another order."""
    flat = reference.reshape(len(reference), -1)
    # One row at a time: feature maps of all pairs of images would not fit into memory.
    nearest = [int(np.linalg.norm(flat - row.ravel(), axis=1).argmin()) for row in actual.astype(np.float64)]
    if len(set(nearest)) != len(nearest):
        return False
    return relative_l2(actual, reference[nearest]) <= tolerance.rel_l2  # type: ignore[arg-type]
