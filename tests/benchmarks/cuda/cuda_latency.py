"""Latency of a network and its baseline in every regime, in turns within one batch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cuda_networks import Network
from cuda_regimes import Regime
from cuda_result import Comparison, Kernel, Profile, Row
from cuda_sessions import Sessions, random_feeds

from cspdeploy.check.bound_call import BoundCall
from cspdeploy.check.latency import LatencySettings, Measured, measure_rounds
from cspdeploy.check.stats import compare_rounds, event_time, median_interval, percentile, spread, supported_percentile
from cspdeploy.check.worker import Worker
from cspdeploy.core.errors import CspDeployError

__all__ = ["QUICK", "TIMING", "Group", "time_group"]

TIMING = LatencySettings(
    # All things are on one GPU, which therefore never idles: its clock is up after CLIMB_SECONDS and stays so, and a
    # lead-in need not wait for it. Eight rounds: fewer than six prove nothing, and the rest is for a stray.
    min_runs=80, min_seconds=0.4, min_rounds=8, max_runs=4000, max_wall_seconds=2.0, warmup_seconds=0.2,
    max_warmup_seconds=1.0, burst=10, max_burst=400, lead_in_seconds=0.04,
)  # fmt: skip
QUICK = LatencySettings(min_runs=6, min_seconds=0.0, min_rounds=6, warmup_seconds=0.0, max_warmup_seconds=0.0,
                        lead_in_seconds=0.0, max_wall_seconds=1.0)  # fmt: skip
"""For a look at the benchmark itself: real measurements, too few to conclude anything from."""
CLIMB_SECONDS = 2.0
"""A GPU that idled begins at some hundred MHz and climbs for up to two seconds."""
COPIES = "+copies"
PROFILED_RUNS = 20
NUM_KERNELS = 10


@dataclass(slots=True, kw_only=True)
class Group:
    """What was found of one or two networks at one batch. `calls` are still open, for a profile."""

    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    calls: dict[str, BoundCall]

    def profile(self, network: str, regime: str, batch: int) -> Profile:
        """The longest kernels of one row."""
        call = self.calls.get(f"{network}/{regime}")
        base = Profile(network=network, batch=batch, regime=regime)
        if call is None:
            return dataclasses.replace(base, reason="not profiled: not measured")
        try:
            nodes, busy_ms = call.kernels(PROFILED_RUNS)
        except CspDeployError as error:
            return dataclasses.replace(base, reason=f"not profiled: {error.message}")
        longest = sorted(nodes, key=lambda node: -node.ms)[:NUM_KERNELS]
        kernels = tuple(Kernel(name=one.operator, ms=one.ms, num_calls=one.num_calls) for one in longest)
        return dataclasses.replace(base, busy_ms=busy_ms, kernels=kernels)


def time_group(
    networks: Sequence[Network], regimes: Sequence[Regime], batch: int, sessions: Sessions, *,
    settings: LatencySettings, progress: Callable[[str], None] = lambda what: None,
) -> Group:  # fmt: skip
    """Time all regimes of all networks in turns.

    Args:
        networks: a network and its baseline, or one alone.
    """
    for network in networks:
        for regime in regimes:
            sessions.start(network, regime, batch)
    rows: dict[str, Row] = {}
    calls: dict[str, BoundCall] = {}
    for network in networks:
        for regime in regimes:
            progress(f"{network.name} {regime.name}, batch {batch}: opening")
            for name, row, call in _bind(network, regime, batch, sessions):
                rows[name] = row
                if call is not None:
                    calls[name] = call
    progress(f"{' and '.join(network.name for network in networks)}, batch {batch}: timing {len(calls)} rows")
    failures: dict[str, CspDeployError] = {}
    measured = _measure(calls, settings, failures)
    for name, found in measured.items():
        rows[name] = _fill(rows[name], found)
    for name, error in failures.items():
        rows[name] = _fail(rows[name], error)
    return Group(
        rows=tuple(rows.values()), comparisons=tuple(_compare(measured, batch)),
        calls={name: call for name, call in calls.items() if name in measured},
    )  # fmt: skip


def _bind(network: Network, regime: Regime, batch: int, sessions: Sessions) -> list[tuple[str, Row, BoundCall | None]]:
    """The row of a regime, and that with copies where there is to be one."""
    found: list[tuple[str, Row, BoundCall | None]] = []
    for copies in (False, True) if regime.with_copies else (False,):
        name = f"{network.name}/{regime.name}{COPIES if copies else ''}"
        row = Row(network=network.name, batch=batch, regime=regime.name, runtime=regime.runtime, copies=copies)
        try:
            worker = sessions.get(network, regime, batch)
            row = _describe(row, worker)
            call = worker.bind(random_feeds(network.spec, batch), name=name, copies=copies, rotate=not copies)
        except CspDeployError as error:
            found.append((name, _fail(row, error), None))
        else:
            found.append((name, dataclasses.replace(row, rotated=bool(call.inputs)), call))
    return found


def _describe(row: Row, worker: Worker) -> Row:
    opened = worker.wait_opened()
    operators = Counter(f"{node.operator} on {node.provider}" for node in opened.nodes)
    return dataclasses.replace(row, placement=dict(opened.placement), operators=dict(sorted(operators.items())),
                    num_copies=opened.num_copies, settings=dict(opened.settings))  # fmt: skip


def _measure(
    calls: Mapping[str, BoundCall], settings: LatencySettings, failures: dict[str, CspDeployError]
) -> dict[str, Measured]:
    if not calls:
        return {}
    first = next(iter(calls.values()))
    if settings.max_warmup_seconds:
        with contextlib.suppress(CspDeployError):  # it fails again where failures are noted
            first.burst(min_runs=1, min_seconds=CLIMB_SECONDS, max_runs=1 << 20, lead_in_seconds=0.0)
            first.forget_rounds()
    return measure_rounds(calls, settings, failures=failures)


def _fill(row: Row, found: Measured) -> Row:
    samples = [value for one in found.rounds_ms for value in one]
    low, high = median_interval(found.rounds_ms)
    device = event_time(found.rounds_ms, found.device_rounds_ms)
    return dataclasses.replace(
        row, p50_ms=percentile(samples, 50), ci_low_ms=low, ci_high_ms=high, p95_ms=supported_percentile(samples, 95),
        events_p50_ms=device.p50_ms if device is not None and not row.copies else None, num_runs=len(samples),
        spread=spread(samples), stable=found.stable,
    )  # fmt: skip


def _fail(row: Row, error: CspDeployError) -> Row:
    return dataclasses.replace(row, reason=error.message)


def _compare(measured: Mapping[str, Measured], batch: int) -> list[Comparison]:
    """Each row against the first regime of its network and against the compiled one; and network against baseline."""
    found = []
    networks = list(dict.fromkeys(name.partition("/")[0] for name in measured))
    for name in measured:
        network, _, regime = name.partition("/")
        against = [f"{network}/{other}" for other in _ANCHORS if other != regime]
        against += [f"{other}/{regime}" for other in networks[1:] if network == networks[0]]
        found += [(name, other) for other in against if other in measured]
    return [_ratio(measured, subject, against, batch) for subject, against in found]


def _ratio(measured: Mapping[str, Measured], subject: str, against: str, batch: int) -> Comparison:
    # A ratio of speeds is that of times turned over: with the subject as reference it is subject's time over the other.
    ratio = compare_rounds(measured[subject].rounds_ms, measured[against].rounds_ms)
    return Comparison(batch=batch, subject=subject, against=against, ratio=ratio.ratio, low=ratio.low, high=ratio.high)


_ANCHORS = ("eager-tf32", "eager-fp32", "compile-fp16-nhwc", "ort-tf32", "ort-fp32")
"""What every row of the same network is compared with."""
