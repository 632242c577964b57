"""One input, run after run in one session: does it give the same bits each time, and numbers at all?

The second run of a session may fail where the first was right: buffers are reused from then on, and a kernel that
reads what it never wrote finds the leavings of another (https://github.com/microsoft/onnxruntime/issues/22723: FP16
on CUDA gives NaN from the second run on).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cspdeploy.core.metrics import relative_l2
from cspdeploy.core.results import Repeats, Verdict
from cspdeploy.runtimes.base import Outputs, Runtime

__all__ = ["DEVICE_REPEATS", "Judge", "Repeated", "check_repeats", "num_repeats"]

DEVICE_REPEATS = 10
"""Runs of one input on a GPU where nobody asked for another number. Sums whose order the hardware chooses differ in
nearly every run, and buffers are reused from the second run on, so that few runs show either; ten of one image are a
small part of the time that its row takes."""

Judge = Callable[[Outputs], tuple[Verdict, str]]
"""The verdict on the outputs of one run, with its reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeated:
    """The figures, and what they mean for the row: "pass", or the verdict of the first run that fails it, and why."""

    figures: Repeats
    verdict: Verdict = "pass"
    reason: str = ""

    @property
    def remark(self) -> str:
        """What a row says that holds though its bits are not the same each time; else empty."""
        found = self.figures
        if self.verdict != "pass" or not found.num_different:
            return ""
        return (
            f"not the same to the bit each time: {found.num_different} of {found.num_runs} runs of one input differ "
            f"from the first, by a relative L2 of {found.max_rel_l2:.1e} at most"
        )


def num_repeats(runtime: Runtime, asked: int | None) -> int:
    """Runs of one input in a session of `runtime`: as asked for; None: on a GPU `DEVICE_REPEATS`, else none."""
    if asked is not None:
        return asked
    return DEVICE_REPEATS if runtime.device == "cuda" else 0


def check_repeats(
    run: Callable[[], Outputs], first: Outputs, *, num_runs: int, judge: Judge,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Repeated:  # fmt: skip
    """Run again what gave `first`, until there are `num_runs` of it, and hold each run against the first one.

    A run that is not finite where the first one was fails, and so does one that `judge` refuses while it takes the
    first one: a first run that fails by itself is a matter of its row. Other bits alone are no failure.

    Args:
        run: computes once, on the same input in the same session. What it raises passes through.
        first: outputs of the session's very first run.
        judge: asked only of runs that differ from the first one.
    """
    num_different, max_rel_l2, first_bad_run = 0, 0.0, 0
    verdict: Verdict = "pass"
    reason, first_holds = "", None
    for number in range(2, num_runs + 1):
        progress(number, num_runs)
        outputs = run()
        if _same_bits(outputs, first):
            continue
        num_different += 1
        max_rel_l2 = max(max_rel_l2, _distance(outputs, first))
        lost = _lost(outputs, first)
        if lost and not first_bad_run:
            first_bad_run = number
        if verdict != "pass":
            continue
        if lost:
            what, where = lost
            verdict, reason = "nan", f"finite in run 1, {what} in run {number} of {num_runs}: {where}"
            continue
        first_holds = judge(first)[0] == "pass" if first_holds is None else first_holds
        if first_holds:
            verdict, told = judge(outputs)
            reason = f"run 1 holds, run {number} of {num_runs} of the same input does not: {told}" if told else ""
    figures = Repeats(
        num_runs=num_runs, num_different=num_different, max_rel_l2=max_rel_l2, first_bad_run=first_bad_run
    )
    return Repeated(figures=figures, verdict=verdict, reason=reason)


def _same_bits(outputs: Outputs, first: Outputs) -> bool:
    """NaN is equal to a NaN of the same bits, and 0 is not -0."""
    return tuple(outputs) == tuple(first) and all(
        (one.dtype, one.shape) == (other.dtype, other.shape) and one.tobytes() == other.tobytes()
        for one, other in zip(outputs.values(), first.values(), strict=True)
    )


def _distance(outputs: Outputs, first: Outputs) -> float:
    """Relative L2 of the output that is farthest off; infinite where they cannot be compared."""
    if set(outputs) != set(first) or any(outputs[name].shape != array.shape for name, array in first.items()):
        return math.inf
    return max((relative_l2(outputs[name], array) for name, array in first.items() if array.size), default=0.0)


def _lost(outputs: Mapping[str, npt.NDArray[np.generic]], first: Outputs) -> tuple[str, str] | None:
    """What became of values that were finite in the first run, and of how many; None where all still are."""
    for name, array in outputs.items():
        before = first.get(name)
        if before is None or before.shape != array.shape:
            continue
        now, then = array.astype(np.float64), before.astype(np.float64)
        bad = np.isfinite(then) & ~np.isfinite(now)
        if bad.any():
            what = "NaN" if np.isnan(now[bad]).any() else "infinite"
            return what, f"{np.count_nonzero(bad)} of {array.size} values of {name}"
    return None
