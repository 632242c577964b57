"""Claims on times, judged regime by regime. Never by an average: it would be of no machine and of no use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cspdeploy.pipeline.claims import Claim
from cspdeploy.pipeline.pair_latency import LatencyRow
from cspdeploy.pipeline.regimes import GPU_COMMAND
from cspdeploy.runtimes import all_runtimes

__all__ = [
    "NOT_TIMED", "PLACEMENT_POINTS", "RegimeVerdict", "judge_change", "judge_rows", "overall", "summarise_regimes",
    "why_untimed",
]  # fmt: skip

NOT_TIMED = "times are measured only with --latency"
TOO_CLOSE = "the 95 % interval of a ratio holds the claimed value: too noisy or too close to tell"
PLACEMENT_POINTS = 2.0
"""By so much a time changes with the placement of buffers in memory from one process to the next, as
`cspdeploy.check.stats` has it: the interval of one pair of processes does not hold it, and is made wider by it."""

Verdict = Literal["holds", "does not hold", "undecided", "not measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegimeVerdict:
    """What one regime says of a claim. Changes are of B against A, the baseline, in percent of A's time.

    Attributes:
        regime: runtime, artifact and variant.
        a_ms: with `b_ms` the medians by the host's clock.
        a_device_ms: with `b_device_ms` those by the device's own clock; None where there is none.
        change: with `low` and `high` its 95 % interval, by the host's clock.
        device_change: by the device's clock.
        claimed: whether the claim is on this regime and a batch as large as this; others are shown for what they are,
            and decide nothing.
        reason: why it was not measured.
    """

    regime: str
    batch: int
    precision: str
    verdict: Verdict
    claimed: bool = True
    reason: str = ""
    a_ms: float | None = None
    b_ms: float | None = None
    a_device_ms: float | None = None
    b_device_ms: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    device_change: float | None = None


def judge_rows(claim: Claim, rows: Sequence[LatencyRow]) -> tuple[RegimeVerdict, ...]:
    """One verdict for each row on a device that the claim is on."""
    devices = {name: runtime.device for name, runtime in all_runtimes().items()}
    return tuple(_judge_row(claim, row) for row in rows if claim.device in ("", devices.get(row.runtime)))


def _judge_row(claim: Claim, row: LatencyRow) -> RegimeVerdict:
    claimed = claim.regime in ("", row.regime) and row.batch >= claim.least_batch
    if row.ratio is None or row.a is None or row.b is None:
        return RegimeVerdict(
            regime=row.regime, batch=row.batch, precision=row.precision, verdict="not measured", claimed=claimed,
            reason=row.reason,
        )  # fmt: skip
    change, low, high = (100 * (ratio - 1) for ratio in (row.ratio, row.ratio_low or 0.0, row.ratio_high or 0.0))
    return RegimeVerdict(
        regime=row.regime, batch=row.batch, precision=row.precision, verdict=judge_change(claim, low, high),
        claimed=claimed, a_ms=row.a.p50_ms, b_ms=row.b.p50_ms, a_device_ms=row.a_device_ms,
        b_device_ms=row.b_device_ms, change=change, low=low, high=high,
        device_change=None if row.device_ratio is None else 100 * (row.device_ratio - 1),
    )  # fmt: skip


def judge_change(claim: Claim, low: float, high: float) -> Literal["holds", "does not hold", "undecided"]:
    """Of one measured change: decided where its whole interval, made wider by what none holds, is on one side.

    Args:
        low: with `high` the 95 % interval of the change, in percent of the baseline's time.
    """
    low, high = low - PLACEMENT_POINTS, high + PLACEMENT_POINTS
    if claim.bound == "at-least":
        low, high, limit = -high, -low, claim.tolerance - claim.published
    else:
        limit = claim.published + claim.tolerance
    if high <= limit:
        return "holds"
    return "does not hold" if low > limit else "undecided"


def overall(claim: Claim, found: Sequence[RegimeVerdict]) -> tuple[Verdict, RegimeVerdict | None]:
    """The verdict of the claim, and the regime that speaks most against it.

    A claim that names no regime is refuted by one in which it does not hold, and holds where it holds in all of them:
    with one of them not measured it is undecided.
    """
    measured = [one for one in found if one.change is not None and one.claimed]
    if not measured:
        return "not measured", None
    sign = -1 if claim.bound == "at-least" else 1
    worst = max(measured, key=lambda one: (one.verdict == "does not hold", sign * (one.change or 0.0)))
    verdicts = {one.verdict for one in (found if not claim.regime else measured) if one.claimed}
    if worst.verdict == "does not hold":
        return "does not hold", worst
    return ("holds" if verdicts == {"holds"} else "undecided"), worst


def summarise_regimes(claim: Claim, found: Sequence[RegimeVerdict]) -> str:
    """In which regimes the claim holds and in which it does not, each by its name: "holds in ...; undecided in ...".

    Those that the claim is on and that could not be measured are named as well, with the reason.
    """
    size = f"{claim.size_px} px, inputs in NCHW"
    parts = []
    for verdict in ("holds", "does not hold", "undecided"):
        named = [
            f"{one.regime}, batch {one.batch}: {one.change:+.1f} % ({one.low:+.1f} to {one.high:+.1f})"
            for one in found
            if one.verdict == verdict and one.claimed
        ]
        parts += [f"{verdict} in {'; '.join(named)}"] if named else []
    doubt = f" ({TOO_CLOSE})" if any(one.verdict == "undecided" and one.claimed for one in found) else ""
    lost = [
        f"{one.regime}, batch {one.batch}" + (f" ({one.reason})" if one.reason else "")
        for one in found
        if one.verdict == "not measured" and one.claimed
    ]
    unmeasured = f"; not measured in {'; '.join(lost)}" if lost else ""
    return f"{size}: {'. '.join(parts)}{doubt}{unmeasured}"


def why_untimed(claim: Claim, found: Sequence[RegimeVerdict] | None) -> str:
    """Why a claim on a time has no number here, and what would measure it.

    Args:
        found: None: no latency was asked for.
    """
    if found is None:
        return f"{NOT_TIMED}, this one on an NVIDIA GPU: {GPU_COMMAND}" if claim.device == "cuda" else NOT_TIMED
    reasons = "; ".join(dict.fromkeys(one.reason for one in found if one.reason and one.claimed))
    if claim.regime and not reasons and any(one.change is not None for one in found):
        batch = f" at a batch of {claim.least_batch} or more" if claim.least_batch > 1 else ""
        return f"published of {claim.regime}, which was not timed{batch}: {GPU_COMMAND}"
    if claim.device == "cuda":
        said = f" ({reasons})" if reasons else ""
        return f"nothing was timed on a CUDA device{said}; on a machine with an NVIDIA GPU: {GPU_COMMAND}"
    return f"nothing was timed ({reasons})" if reasons else "nothing was timed"
