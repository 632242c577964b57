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

from cspdeploy.core.catalog import TIE_FACTOR
from cspdeploy.core.metrics import error_histogram, max_abs_difference, relative_l2, softmax, sqnr_db, top_k
from cspdeploy.core.results import ImageBoxes, ImageDecision, Limit, Verdict

__all__ = ["Comparison", "compare_outputs"]

Array = npt.NDArray[np.generic]
Reference = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A verdict with its numbers; None or empty where it made no sense to compute them.

    With several outputs `rel_l2` and `limit` are those of the output that comes nearest to its limit, `max_abs` is the
    largest of all, `sqnr_db` and `error_histogram` are of all together.
    """

    verdict: Verdict
    reason: str = ""
    rel_l2: float | None = None
    limit: float | None = None
    max_abs: float | None = None
    sqnr_db: float | None = None
    top1_agreement: float | None = None
    top5_agreement: float | None = None
    decisions: tuple[ImageDecision, ...] = ()
    error_histogram: tuple[int, ...] = ()
    box_recall: float | None = None
    box_precision: float | None = None
    num_boxes: int | None = None
    boxes: tuple[ImageBoxes, ...] = ()
    note: str = ""
    """What was not compared, whatever the verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """What is asked of an output beyond its limit."""

    decisions: bool
    dtypes: Mapping[str, str]
    num_flips: int | None
    images: bool


def compare_outputs(
    outputs: Mapping[str, Array],
    *,
    names: tuple[str, ...],
    reference: Mapping[str, Reference],
    limits: Mapping[str, Limit],
    decisions: bool,
    dtypes: Mapping[str, str] | None = None,
    num_flips: int | None = None,
    images: bool = True,
) -> Comparison:
    """Judge outputs, which must be arrays called `names`.

    Args:
        outputs: as the engine gave them, in its order.
        names: as the manifest promises them.
        reference: the original's FP64 outputs for the same images in the same order.
        limits: of each output.
        decisions: the one output is logits `[N, C]`, of which the largest decides.
        dtypes: as the manifest promises them; float32 for an output that is not in it.
        num_flips: images whose first class may change, however near the tie; None for any number of near ties.
        images: the arrays are `[N, ...]`, a row an image; False where the first axis may be anything, or missing.
    """
    if not reference or any(array.size == 0 for array in reference.values()):
        return Comparison(verdict="error", reason="nothing was compared: the reference is empty")
    if tuple(outputs) != names or tuple(reference) != names:
        return Comparison(
            verdict="order", reason=f"outputs are {list(outputs)}, expected {list(names)} as in {list(reference)}"
        )
    rules = _Rules(decisions=decisions, dtypes=dtypes or {}, num_flips=num_flips, images=images)
    found = [_compare_one(outputs[name], reference[name], limits[name], rules) for name in names]
    together = _together(outputs, reference) if all(one.rel_l2 is not None for one in found) else {}
    for name, comparison in zip(names, found, strict=True):
        if comparison.verdict != "pass":
            where = f"{name}: " if len(names) > 1 else ""
            return dataclasses.replace(comparison, reason=where + comparison.reason, **together)
    nearest = max(found, key=lambda comparison: (comparison.rel_l2 or 0.0) / (comparison.limit or 1.0))
    return dataclasses.replace(nearest, max_abs=max(comparison.max_abs or 0.0 for comparison in found), **together)


def _together(outputs: Mapping[str, Array], reference: Mapping[str, Reference]) -> dict[str, Any]:
    """What is told of all outputs at once."""
    noise = signal = 0.0
    counts = np.zeros(0, np.int64)
    for name, exact in reference.items():
        actual = outputs[name].astype(np.float64)
        noise += float(np.sum((actual - exact) ** 2))
        signal += float(np.sum(exact**2))
        histogram = np.array(error_histogram(actual, exact))
        counts = counts + histogram if counts.size else histogram
    distance = float(np.sqrt(noise / signal)) if signal else (float("inf") if noise else 0.0)
    return {"sqnr_db": sqnr_db(distance), "error_histogram": tuple(int(count) for count in counts)}


def _compare_one(actual: Array, reference: Reference, limit: Limit, rules: _Rules) -> Comparison:
    if actual.shape != reference.shape:
        return Comparison(verdict="shape", reason=f"shape {list(actual.shape)}, expected {list(reference.shape)}")
    expected = rules.dtypes.get(limit.output, "float32")
    if actual.dtype != expected:
        return Comparison(verdict="dtype", reason=f"dtype {actual.dtype}, expected {expected}")
    num_bad = int(np.count_nonzero(~np.isfinite(actual)))
    if num_bad:
        return Comparison(verdict="nan", reason=f"{num_bad} of {actual.size} values are NaN or infinite")
    numbers: dict[str, Any] = {
        "rel_l2": relative_l2(actual, reference),
        "limit": limit.rel_l2,
        "max_abs": max_abs_difference(actual, reference),
    }
    if rules.decisions:
        numbers |= _agreement(actual, reference)
    if not numbers["rel_l2"] <= limit.rel_l2:
        if rules.images and _rows_permuted(actual, reference, limit):
            reason = "right outputs for the wrong images: rows are permuted"
            return Comparison(verdict="order", reason=reason, **numbers)
        reason = f"relative L2 {numbers['rel_l2']:.1e}, limit {limit.rel_l2:.1e} ({limit.why})"
        return Comparison(verdict="numeric", reason=reason, **numbers)
    if rules.decisions and (reason := _wrong_decisions(actual, reference, limit, rules.num_flips)):
        return Comparison(verdict="decision", reason=reason, **numbers)
    return Comparison(verdict="pass", **numbers)


def _wrong_decisions(actual: Array, reference: Reference, limit: Limit, num_flips: int | None) -> str:
    """Why the decisions are not those of the original, or empty."""
    changed = top_k(reference, 1)[:, 0] != top_k(actual, 1)[:, 0]
    clear = np.flatnonzero(changed & _decided(reference, limit))
    if clear.size:
        return f"another class wins on {clear.size} clear images, first image {clear[0]}"
    if num_flips is not None and int(changed.sum()) > num_flips:
        return f"another class wins on {changed.sum()} of {len(changed)} images, at most {num_flips} may change"
    return ""


def _agreement(actual_NC: Array, reference_NC: Reference) -> dict[str, Any]:
    expected, got = top_k(reference_NC, 5), top_k(actual_NC, 5)
    common = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(expected, got, strict=True)]
    return {
        "top1_agreement": float((expected[:, 0] == got[:, 0]).mean()),
        "top5_agreement": float(np.mean(common)),
        "decisions": tuple(
            ImageDecision(index=int(first), probability=float(row[first]))
            for first, row in zip(got[:, 0], softmax(actual_NC), strict=True)
        ),
    }


def _decided(reference_NC: Reference, limit: Limit) -> npt.NDArray[np.bool_]:
    """Images whose winner leads by more than the allowed error can explain."""
    if reference_NC.shape[1] < 2:
        return np.ones(len(reference_NC), bool)
    best_two = np.sort(reference_NC, axis=1)[:, -2:]
    typical_error = limit.rel_l2 * np.sqrt(np.mean(reference_NC**2))
    return np.asarray(best_two[:, 1] - best_two[:, 0] > TIE_FACTOR * typical_error)


def _rows_permuted(actual: Array, reference: Reference, limit: Limit) -> bool:
    """Whether `actual` is the reference with its images in another order."""
    flat = reference.reshape(len(reference), -1)
    # One row at a time: feature maps of all pairs of images would not fit into memory.
    nearest = [int(np.linalg.norm(flat - row.ravel(), axis=1).argmin()) for row in actual.astype(np.float64)]
    if len(set(nearest)) != len(nearest):
        return False
    return relative_l2(actual, reference[nearest]) <= limit.rel_l2
