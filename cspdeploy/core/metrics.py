"""How far two arrays are apart. NaN never equals anything, not even NaN."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["ERROR_DECADES", "error_histogram", "max_abs_difference", "relative_l2", "softmax", "sqnr_db", "top_k"]

Array = npt.NDArray[np.generic]
"""Of numbers, as engines give them."""

ERROR_DECADES = tuple(10.0**power for power in range(-9, 1))
"""Borders between the counts of `error_histogram`: 11 counts, below 1e-9, 1e-9 to 1e-8, ..., 1 and above."""


def relative_l2(actual: Array, reference: Array) -> float:
    """||actual - reference|| / ||reference||, in float64.

    Unlike a cosine it sees a change of scale. Infinite where `actual` is not finite or the reference is all zero
    while `actual` is not; 0 for two all-zero arrays.

    Raises:
        ValueError: other shapes, or nothing to compare.
    """
    _require_comparable(actual, reference)
    actual64, reference64 = actual.astype(np.float64), reference.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf is NaN, which is judged below
        distance = float(np.linalg.norm((actual64 - reference64).ravel()))
    norm = float(np.linalg.norm(reference64.ravel()))
    if not np.isfinite(distance):
        return float("inf")
    if norm == 0:
        return 0.0 if distance == 0 else float("inf")
    return distance / norm


def max_abs_difference(actual: Array, reference: Array) -> float:
    """Largest absolute difference; infinite where either is not finite.

    Raises:
        ValueError: other shapes, or nothing to compare.
    """
    _require_comparable(actual, reference)
    with np.errstate(invalid="ignore", over="ignore"):
        largest = float(np.max(np.abs(actual.astype(np.float64) - reference.astype(np.float64))))
    return largest if np.isfinite(largest) else float("inf")


def sqnr_db(relative_l2: float) -> float:
    """Signal to quantisation noise of that relative L2 distance, in dB; infinite for none."""
    return float("inf") if relative_l2 == 0 else -20 * math.log10(relative_l2)


def error_histogram(actual: Array, reference: Array) -> tuple[int, ...]:
    """Counts of |actual - reference| / rms(reference) between `ERROR_DECADES`, of which the lower border is inside.

    Errors against an all-zero reference count as the largest.

    Raises:
        ValueError: other shapes, or nothing to compare.
    """
    _require_comparable(actual, reference)
    reference64 = reference.astype(np.float64).ravel()
    errors = np.abs(actual.astype(np.float64).ravel() - reference64)
    rms = float(np.sqrt(np.mean(reference64**2)))
    if rms > 0:
        errors /= rms
    else:
        errors[errors > 0] = ERROR_DECADES[-1]
    bins = np.searchsorted(ERROR_DECADES, errors, side="right")
    return tuple(int(count) for count in np.bincount(bins, minlength=len(ERROR_DECADES) + 1))


def _require_comparable(actual: Array, reference: Array) -> None:
    if actual.shape != reference.shape:
        raise ValueError(f"shapes: got {list(actual.shape)}, expected {list(reference.shape)}")
    if actual.size == 0:
        raise ValueError("nothing to compare: the arrays are empty")


def top_k(logits_NC: Array, k: int) -> npt.NDArray[np.int64]:
    """Indices of the k largest of each row, largest first, `[N, min(k, C)]`; equal values by lower index."""
    return np.argsort(-logits_NC.astype(np.float64), axis=1, kind="stable")[:, :k]


def softmax(logits_NC: Array) -> npt.NDArray[np.float64]:
    """Probabilities of each row, in float64."""
    shifted = logits_NC.astype(np.float64) - np.max(logits_NC, axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))
