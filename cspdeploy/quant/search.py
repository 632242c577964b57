"""Which layers to leave in float, where a wholly INT8 network is outside the budget.

Every evaluation writes a file and runs it, so few are made. Islands are ranked by the noise that they are predicted to
take away for what they cost; along that ranking more and more are left in float (1, 2, 4, ...) until the budget is met;
halving finds the fewest; and then parts go back to INT8 one by one as long as the result stays accurate enough (as
A. Zeller and R. Hildebrandt reduce failing inputs: "Simplifying and Isolating Failure-Inducing Input", 2002).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from cspdeploy.check.stats import SMALLEST_DIFFERENCE
from cspdeploy.core.errors import CspDeployError
from cspdeploy.quant.budget import Budget, Judgement
from cspdeploy.quant.islands import Forecast, Island, Step, rank_islands
from cspdeploy.quant.outcome import Point, SearchResult, Stop, conclude
from cspdeploy.quant.scheme import Scheme

__all__ = ["search"]

Progress = Callable[[str, int, int], None]

_CHEAP_ISLANDS = 6
"""Where the network is accurate but too slow, so many of the islands that cost least are tried: float helps only where
conversions around a small layer take longer than the layer, and such layers are few."""


class _OutOfTimeError(Exception):
    """The next evaluation would end after the deadline."""


def search(
    schemes: Sequence[Scheme],
    islands: Sequence[Island],
    *,
    evaluate: Callable[[Scheme], Judgement],
    forecast: Forecast,
    budget: Budget,
    deadline_s: float,
    progress: Progress = lambda what, done, total: None,
    clock: Callable[[], float] = time.monotonic,
) -> SearchResult:
    """Find a scheme that meets the budget: accurate enough, fast enough, and not slower than FP32.

    Ends with the first of `schemes` that meets it as it is. Otherwise islands are sought for the most accurate of them.
    The first scheme is evaluated whatever the deadline; no other evaluation is begun that could not be done in time if
    it took as long as the longest before. Ctrl-C keeps what was found. The same evaluations give the same result.

    Args:
        schemes: the likeliest first; one at least.
        islands: that may be left in float; a layer may be in several.
        evaluate: makes the file of a scheme and judges it. A `CspDeployError` rules that scheme out.
        deadline_s: from now.
        progress: is told what was tried, and the seconds gone and granted.
        clock: seconds, monotonic.

    Raises:
        ValueError: no schemes.
        CspDeployError: no scheme at all could be evaluated.
        KeyboardInterrupt: before anything was.
    """
    if not schemes:
        raise ValueError("no scheme to begin with")
    run = _Search(islands, evaluate, forecast, budget, _Timer(deadline_s, clock, progress))
    stopped: Stop
    try:
        stopped = "found" if run.explore(schemes) else "exhausted"
    except _OutOfTimeError:
        stopped = "time"
    except KeyboardInterrupt:
        if not run.points:
            raise
        stopped = "interrupted"
    if not run.points and run.failures:
        raise run.failures[0][1]
    return conclude(
        run.points, budget=budget, stopped=stopped, num_layers=len({node for one in islands for node in one.nodes}),
        failures=tuple((scheme, error.message) for scheme, error in run.failures), islands=islands,
    )  # fmt: skip


class _Timer:
    def __init__(self, deadline_s: float, clock: Callable[[], float], progress: Progress) -> None:
        self._deadline_s, self._clock, self._progress = deadline_s, clock, progress
        self._began, self._longest, self._any = clock(), 0.0, False

    def measure(self, evaluate: Callable[[Scheme], Judgement], scheme: Scheme) -> Judgement:
        started = self._clock()
        if self._any and started - self._began + self._longest > self._deadline_s:
            raise _OutOfTimeError
        self._any = True
        try:
            return evaluate(scheme)
        finally:
            self._longest = max(self._longest, self._clock() - started)

    def tell(self, what: str) -> None:
        gone = min(self._clock() - self._began, self._deadline_s)
        self._progress(what, round(gone), round(self._deadline_s) if math.isfinite(self._deadline_s) else 0)


class _Search:
    """`points` and `failures` are filled on the way."""

    def __init__(
        self, islands: Sequence[Island], evaluate: Callable[[Scheme], Judgement], forecast: Forecast, budget: Budget,
        timer: _Timer,
    ) -> None:  # fmt: skip
        self._islands, self._evaluate, self._forecast = islands, evaluate, forecast
        self._budget, self._timer = budget, timer
        self.points: list[Point] = []
        self.failures: list[tuple[Scheme, CspDeployError]] = []
        self._known: dict[Scheme, Point | None] = {}

    def explore(self, schemes: Sequence[Scheme]) -> bool:
        """Whether the budget was met; `points` has where."""
        for scheme in schemes:
            point = self._try(scheme)
            if point is not None and point.meets:
                return True
        accurate = [point for point in self.points if point.accurate]
        if accurate:
            self._relieve(min(accurate, key=_slowness))
        elif self.points:
            self._widen(max(self.points, key=lambda point: (point.quality(self._budget), point.judgement.sqnr_db)))
        return any(point.meets for point in self.points)

    def _try(self, scheme: Scheme) -> Point | None:
        """Evaluated once; None where it could not be."""
        if scheme not in self._known:
            self._known[scheme] = self._measure(scheme)
        return self._known[scheme]

    def _measure(self, scheme: Scheme) -> Point | None:
        what = f"{len(scheme.floats) or 'no'} layers in float"
        try:
            judgement = self._timer.measure(self._evaluate, scheme)
        except CspDeployError as error:
            self.failures.append((scheme, error))
            self._timer.tell(f"{what}: {error.message}")
            return None
        short, slow = judgement.accuracy_shortfall(self._budget), judgement.latency_shortfall(self._budget)
        point = Point(
            scheme=scheme, judgement=judgement, cost=self._forecast.cost(scheme.floats), accurate=not short,
            meets=not short and not slow, shortfall=short or slow,
        )  # fmt: skip
        self.points.append(point)
        self._timer.tell(f"{what}: {judgement}")
        return point

    def _with(self, scheme: Scheme, floats: frozenset[str]) -> Point | None:
        return self._try(dataclasses.replace(scheme, floats=floats))

    def _relieve(self, best: Point) -> None:
        """Accurate, but too slow: leave what is cheap in float, together where it helped alone."""
        first = best.scheme.floats
        cheapest = sorted(self._islands, key=lambda island: self._forecast.cost(first | island.nodes))
        for island in cheapest[:_CHEAP_ISLANDS]:
            point = self._with(best.scheme, best.scheme.floats | island.nodes)
            if point is None:
                continue
            if point.meets:
                return
            best = min(best, point, key=_slowness)

    def _widen(self, base: Point) -> None:
        """Not accurate enough: the fewest islands of the ranking that make it so, and then fewer layers still."""
        chain = rank_islands(self._islands, self._forecast, start=base.scheme.floats)
        low, high = self._gallop(base, chain)
        if high > len(chain):
            return
        while high - low > 1:
            middle = (low + high) // 2
            point = self._with(base.scheme, chain[middle - 1].floats)
            low, high = (low, middle) if point is not None and point.accurate else (middle, high)
        self._return_parts(base.scheme, chain[:high])

    def _gallop(self, base: Point, chain: Sequence[Step]) -> tuple[int, int]:
        """Numbers of steps of which the first is not accurate enough and the second is; beyond the chain if none is.

        Ends early where the network is too slow already, which more float does not mend.
        """
        low, nowhere = 0, len(chain) + 1
        high = self._first_guess(base, chain)
        while high <= len(chain):
            point = self._with(base.scheme, chain[high - 1].floats)
            if point is not None and point.accurate:
                return low, high
            if point is not None and point.judgement.latency_shortfall(self._budget):
                break
            low, high = high, nowhere if high == len(chain) else min(len(chain), 2 * high)
        return low, nowhere

    def _first_guess(self, base: Point, chain: Sequence[Step]) -> int:
        """By the forecast, shifted to what was measured of the first network; without one, a single step."""
        predicted = self._forecast.noise(base.scheme.floats)
        if self._budget.min_sqnr_db is None or not predicted > 0 or not math.isfinite(base.judgement.sqnr_db):
            return 1
        needed = predicted * 10 ** ((base.judgement.sqnr_db - self._budget.min_sqnr_db) / 10)
        return next((i for i, step in enumerate(chain, 1) if step.noise <= needed), max(1, len(chain)))

    def _return_parts(self, scheme: Scheme, steps: Sequence[Step]) -> None:
        """Back to INT8 whatever need not be float, in whole parts first, then in halves of them."""
        kept = steps[-1].floats
        order = {node: i for i, node in enumerate(node for one in self._islands for node in sorted(one.nodes))}
        # What takes most time to leave in float first.
        parts = deque(sorted((step.added for step in steps), key=lambda part: -self._forecast.cost(part)))
        while parts:
            part = parts.popleft() & kept
            if not part:
                continue
            point = self._with(scheme, kept - part) if part != kept else None
            if point is not None and point.accurate and not self._slower(point, self._with(scheme, kept)):
                kept -= part
            elif len(part) > 1:
                parts.extend(_halves(part, key=lambda node: order[node]))

    @staticmethod
    def _slower(point: Point, other: Point | None) -> bool:
        return other is not None and _slowness(point) > (1 + SMALLEST_DIFFERENCE) * _slowness(other)


def _slowness(point: Point) -> float:
    return point.judgement.ratio_to_fp32 or point.cost


def _halves(part: Iterable[str], *, key: Callable[[str], int]) -> tuple[frozenset[str], frozenset[str]]:
    nodes = sorted(part, key=key)
    middle = len(nodes) // 2
    return frozenset(nodes[:middle]), frozenset(nodes[middle:])
