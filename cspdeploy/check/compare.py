"""One artifact's outputs against the reference. Every way to be wrong has a verdict of its own.

Shapes: N images, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.check.tolerance import Tolerance
from cspdeploy.core.metrics import max_abs_difference, relative_l2, top_k
from cspdeploy.core.types import Verdict

__all__ = ["Comparison", "compare_outputs"]

Array = npt.NDArray[np.generic]

# An image whose two best classes are closer than this many times the typical allowed error may go either way.
TIE_FACTOR = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A verdict with its numbers; None where it made no sense to compute them."""

    verdict: Verdict
    reason: str = ""
    rel_l2: float | None = None
    max_abs: float | None = None
    top1_agreement: float | None = None
    top5_agreement: float | None = None


def compare_outputs(
    outputs: dict[str, Array], *, names: tuple[str, ...], reference_NC: npt.NDArray[np.float64], tolerance: Tolerance
) -> Comparison:
    """Judge outputs, which must be one float32 array `[N, C]` named `names[0]`.

    Args:
        outputs: as the engine gave them, in its order.
        names: as the manifest promises them.
        reference_NC: the original's FP64 outputs for the same images in the same order.
    """
    if reference_NC.size == 0:
        return Comparison(verdict="error", reason="nothing was compared: the reference is empty")
    if tuple(outputs) != names:
        return Comparison(verdict="order", reason=f"outputs are {list(outputs)}, expected {list(names)}")
    actual_NC = outputs[names[0]]
    if actual_NC.shape != reference_NC.shape:
        reason = f"shape {list(actual_NC.shape)}, expected {list(reference_NC.shape)}"
        return Comparison(verdict="shape", reason=reason)
    if actual_NC.dtype != np.float32:
        return Comparison(verdict="dtype", reason=f"dtype {actual_NC.dtype}, expected float32")
    num_bad = int(np.count_nonzero(~np.isfinite(actual_NC)))
    if num_bad:
        return Comparison(verdict="nan", reason=f"{num_bad} of {actual_NC.size} values are NaN or infinite")
    return _compare_values(actual_NC, reference_NC, tolerance)


def _compare_values(actual_NC: Array, reference_NC: npt.NDArray[np.float64], tolerance: Tolerance) -> Comparison:
    numbers: dict[str, Any] = {
        "rel_l2": relative_l2(actual_NC, reference_NC),  # type: ignore[arg-type]
        "max_abs": max_abs_difference(actual_NC, reference_NC),  # type: ignore[arg-type]
    }
    expected, got = top_k(reference_NC, 5), top_k(actual_NC, 5)  # type: ignore[arg-type]
    same_first = expected[:, 0] == got[:, 0]
    numbers["top1_agreement"] = float(same_first.mean())
    numbers["top5_agreement"] = float(
        np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(expected, got, strict=True)])
    )
    if not numbers["rel_l2"] <= tolerance.rel_l2:
        if _rows_permuted(actual_NC, reference_NC, tolerance):
            reason = "right outputs for the wrong images: rows are permuted"
            return Comparison(verdict="order", reason=reason, **numbers)
        reason = f"relative L2 {numbers['rel_l2']:.1e}, limit {tolerance.rel_l2:.1e} ({tolerance.why})"
        return Comparison(verdict="numeric", reason=reason, **numbers)
    flipped = np.flatnonzero(~same_first & _decided(reference_NC, tolerance))
    if flipped.size:
        reason = f"another class wins on {flipped.size} clear images, first image {flipped[0]}"
        return Comparison(verdict="decision", reason=reason, **numbers)
    return Comparison(verdict="pass", **numbers)


def _decided(reference_NC: npt.NDArray[np.float64], tolerance: Tolerance) -> npt.NDArray[np.bool_]:
    """Images whose winner leads by more than the allowed error can explain."""
    if reference_NC.shape[1] < 2:
        return np.ones(len(reference_NC), bool)
    best_two = np.sort(reference_NC, axis=1)[:, -2:]
    typical_error = tolerance.rel_l2 * np.sqrt(np.mean(reference_NC**2))
    return np.asarray(best_two[:, 1] - best_two[:, 0] > TIE_FACTOR * typical_error)


def _rows_permuted(actual_NC: Array, reference_NC: npt.NDArray[np.float64], tolerance: Tolerance) -> bool:
    """Whether `actual_NC` is the reference with its rows in another order."""
    distances = np.linalg.norm(actual_NC[:, None].astype(np.float64) - reference_NC[None], axis=2)
    nearest = distances.argmin(axis=1)
    if len(set(nearest.tolist())) != len(nearest):
        return False
    return relative_l2(actual_NC, reference_NC[nearest]) <= tolerance.rel_l2  # type: ignore[arg-type]
