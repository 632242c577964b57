"""What a search has tried, what of it nothing else beats, and what it chose and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cspdeploy.check.stats import SMALLEST_DIFFERENCE
from cspdeploy.quant.budget import Budget, Judgement
from cspdeploy.quant.islands import Island
from cspdeploy.quant.pareto import pareto_front
from cspdeploy.quant.scheme import Scheme

__all__ = ["Point", "SearchResult", "Stop", "conclude", "describe_floats"]

Stop = Literal["found", "exhausted", "time", "interrupted"]
"""found: to its end, with a file within the budget; exhausted: to its end, without; time, interrupted: before its end,
with or without one."""

_MAX_NAMES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A scheme that was evaluated.

    Attributes:
        cost: forecast of leaving its layers in float, which stands in for a latency where none was measured.
        accurate, meets: within the budget's accuracy, within all of it.
        shortfall: why it does not meet the budget, or empty.
    """

    scheme: Scheme
    judgement: Judgement
    cost: float
    accurate: bool
    meets: bool
    shortfall: str

    def quality(self, budget: Budget) -> float:
        """The more the better: points of top-1 or decisions where those are asked for, else the SQNR in dB."""
        drop, changed = self.judgement.top1_drop_points, self.judgement.changed_percent
        if budget.max_changed_percent is not None and changed is not None:
            return -changed
        return self.judgement.sqnr_db if budget.max_drop_points is None or drop is None else -drop


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What came of a search.

    Attributes:
        points: in the order of their evaluation.
        front: those that no other beats in quality and latency, fastest first.
        chosen: one that meets the budget, or None.
        reason: one sentence on the choice, or on why there is none.
        failures: schemes that could not be evaluated, with the error.
    """

    points: tuple[Point, ...]
    front: tuple[Point, ...]
    chosen: Point | None
    reason: str
    stopped: Stop
    failures: tuple[tuple[Scheme, str], ...] = ()

    @property
    def num_evaluations(self) -> int:
        """Those that failed are among them."""
        return len(self.points) + len(self.failures)


def conclude(
    points: Sequence[Point], *, budget: Budget, stopped: Stop, num_layers: int, islands: Sequence[Island],
    failures: tuple[tuple[Scheme, str], ...] = (),
) -> SearchResult:  # fmt: skip
    """Choose among what was evaluated.

    Of those that meet the budget the fastest; of those that are no faster or slower than it by 2 %, the most accurate.
    Where only a latency is asked for, the most accurate.

    Args:
        points: one at least.
        num_layers: that could be INT8.
    """
    good = [point for point in points if point.meets]
    # By what was timed only where that is asked for: else the next run, timed otherwise, would choose another file.
    times_of_good = _times(good) if budget.limits_latency else [point.cost for point in good]
    chosen = _choose(good, budget, times=times_of_good) if good else None
    told = chosen or max(points, key=lambda point: (point.accurate, point.quality(budget)))
    floats = told.scheme.floats
    how = (
        f"{len(floats)} of {num_layers} layers in float ({describe_floats(floats, islands)})" if floats else "all INT8"
    )
    if chosen is not None:
        reason = f"{how}: {chosen.judgement}"
    else:
        within = str(budget) or "that is not slower than FP32"
        reason = f"no INT8 file {within}: the best, {'with ' if floats else ''}{how}, falls short: {told.shortfall}"
    early = {"time": "; the search ended at its time limit", "interrupted": "; the search was interrupted"}
    times = _times(points)
    front = pareto_front([(point.quality(budget), time) for point, time in zip(points, times, strict=True)])
    return SearchResult(
        points=tuple(points), front=tuple(points[i] for i in front), chosen=chosen,
        reason=reason + early.get(stopped, ""), stopped=stopped, failures=failures,
    )  # fmt: skip


def _times(points: Sequence[Point]) -> list[float]:
    """Latency over FP32's; where some point has none, the forecast for all."""
    ratios = [point.judgement.ratio_to_fp32 for point in points]
    return [ratio if ratio is not None else math.nan for ratio in ratios] if None not in ratios else [
        point.cost for point in points
    ]  # fmt: skip


def _choose(good: Sequence[Point], budget: Budget, *, times: Sequence[float]) -> Point:
    fastest = min(times)
    rivals = [
        point for point, time in zip(good, times, strict=True)
        if time <= (1 + SMALLEST_DIFFERENCE) * fastest or (budget.limits_latency and not budget.limits_accuracy)
    ]  # fmt: skip
    return max(rivals, key=lambda point: (point.quality(budget), point.judgement.sqnr_db))


def describe_floats(floats: frozenset[str], islands: Sequence[Island]) -> str:
    """In the names of the largest islands that make them up, such as "stem.conv1, stages.4"."""
    names: list[str] = []
    left = set(floats)
    for island in sorted(islands, key=lambda island: -len(island.nodes)):
        if left and island.nodes <= floats and not left.isdisjoint(island.nodes):
            names.append(island.name)
            left -= island.nodes
    names += sorted(left)
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
