"""`compare --paper`: what is claimed of CSP networks, what is measured here, and whether it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cspdeploy.check.latency import LatencySettings
from cspdeploy.core.env import describe_environment
from cspdeploy.nets.cost import Cost, measure_cost
from cspdeploy.nets.registry import find_network, spec_of
from cspdeploy.pipeline.claims import CLAIMS, Claim
from cspdeploy.pipeline.compare import CompareRequest, check_batches, compare_models
from cspdeploy.pipeline.pair_latency import LatencyRow
from cspdeploy.runtimes import require_runtime

__all__ = ["ClaimResult", "PaperReport", "PaperRequest", "check_claims", "judge_time"]

Progress = Callable[[str, int, int], None]

NOT_TIMED = "times are measured only with --latency"
TOO_CLOSE = "the 95 % interval of a ratio holds the claimed value: too noisy or too close to tell"
READING = "the layers were never published, and this reading of the paper's text gives another number"


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperRequest:
    """How to check. Times are measured only with `latency`, at the claims' own sizes."""

    latency: bool = False
    runtimes: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 8)
    calibration: Path | None = None
    settings: LatencySettings = dataclasses.field(default_factory=LatencySettings)

    def __post_init__(self) -> None:
        check_batches(self.batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimResult:
    """A claim and its verdict. `measured` is in the unit of `claim.published`; None where nothing was measured.

    For a time it is the change that speaks most against the claim, and `detail` names all of them with their regime.
    "undecided": the network here is a reading of the paper's text, and gives another number; or a time is too near to
    what is claimed, or too noisy, to say.
    """

    claim: Claim
    measured: float | None
    verdict: Literal["holds", "does not hold", "undecided", "not measurable here"]
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperReport:
    """What `cspdeploy compare --paper` found. `latency` has the rows behind the times, A being the baseline."""

    results: tuple[ClaimResult, ...]
    latency: dict[str, tuple[LatencyRow, ...]]
    warnings: tuple[str, ...]
    environment: dict[str, str]


def check_claims(
    request: PaperRequest,
    *,
    claims: Iterable[Claim] = CLAIMS,
    progress: Progress = lambda what, done, total: None,
) -> PaperReport:
    """Check each claim. That one does not hold is a finding, not an error.

    Raises:
        InputError: a claim is on a network that the registry does not have.
        RuntimeUnavailableError: a runtime that was asked for is missing.
    """
    claims = list(claims)
    for name in request.runtimes:
        require_runtime(name)
    costs = _Costs()
    rows: dict[str, tuple[LatencyRow, ...]] = {}
    warnings: list[str] = []
    results = []
    for i, claim in enumerate(claims):
        progress(claim.pair, i, len(claims))
        if claim.subject == "time" and request.latency and not claim.unmeasurable:
            rows[claim.pair], noise = _time(claim, request, progress)
            warnings += noise
            results.append(judge_time(claim, rows[claim.pair]))
        else:
            results.append(_judge(claim, costs))
    return PaperReport(
        results=tuple(results), latency=rows, warnings=tuple(warnings), environment=describe_environment()
    )


class _Costs:
    """Each network once at each size."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], Cost] = {}

    def figure(self, network: str, claim: Claim) -> float:
        """In the unit of the claim's subject."""
        key = network, claim.size_px
        if key not in self._known:
            spec = spec_of(find_network(network))
            contract = spec.preprocess.with_size(claim.size_px, claim.size_px)
            self._known[key] = measure_cost(dataclasses.replace(spec, preprocess=contract))
        cost = self._known[key]
        figures = {
            "conv weights": cost.num_conv_weights / 1e6,
            "parameters": cost.num_parameters / 1e6,
            "BFLOPs": cost.bflops,
        }
        return figures[claim.subject]


def _judge(claim: Claim, costs: _Costs) -> ClaimResult:
    """A count, or why there is none."""
    if claim.subject in ("time", "top-1"):
        reason = claim.unmeasurable or NOT_TIMED
        return ClaimResult(claim=claim, measured=None, verdict="not measurable here", detail=reason)
    measured = costs.figure(claim.network, claim)
    if claim.is_change:
        baseline = claim.baseline_figure
        if baseline is None:
            baseline = costs.figure(claim.baseline, claim)
        measured = 100 * (measured / baseline - 1)
    if claim.unmeasurable:
        return ClaimResult(claim=claim, measured=measured, verdict="not measurable here", detail=claim.unmeasurable)
    if _holds(claim, measured):
        return ClaimResult(claim=claim, measured=measured, verdict="holds")
    if claim.reading:
        return ClaimResult(claim=claim, measured=measured, verdict="undecided", detail=READING)
    return ClaimResult(claim=claim, measured=measured, verdict="does not hold")


def _holds(claim: Claim, measured: float) -> bool:
    beyond = measured - claim.published
    return (beyond if claim.bound == "at-most" else abs(beyond)) <= claim.tolerance + 1e-9


def _time(
    claim: Claim, request: PaperRequest, progress: Progress
) -> tuple[tuple[LatencyRow, ...], tuple[str, ...]]:  # fmt: skip
    """Both networks on every runtime that is here, the baseline first."""
    report = compare_models(
        CompareRequest(
            a=claim.baseline, b=claim.network, size_px=(claim.size_px, claim.size_px), batches=request.batches,
            runtimes=request.runtimes, calibration=request.calibration, settings=request.settings,
        ),
        progress=lambda what, done, total: progress(f"{claim.pair}: {what}", done, total),
    )  # fmt: skip
    return report.latency, report.warnings


def judge_time(claim: Claim, rows: tuple[LatencyRow, ...]) -> ClaimResult:
    """A claim on times names no regime, so it must hold in every one that is measured, beyond what noise can do.

    A regime decides only where the whole interval of its ratio lies on one side of what is claimed.
    """
    changes: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row.ratio is None or (claim.device and not row.runtime.endswith(f"-{claim.device}")):
            continue
        change, low, high = (100 * (ratio - 1) for ratio in (row.ratio, row.ratio_low or 0.0, row.ratio_high or 0.0))
        said = f"{row.artifact} on {row.runtime}, batch {row.batch}: {change:+.0f} % ({low:+.0f} to {high:+.0f})"
        changes[said] = change, _regime_verdict(claim, row, low, high)
    if not changes:
        where = f" on a {claim.device.upper()} device" if claim.device else ""
        return ClaimResult(
            claim=claim, measured=None, verdict="not measurable here", detail=f"nothing was timed{where}"
        )
    found = {verdict for _, verdict in changes.values()}
    verdict: Literal["holds", "does not hold", "undecided"] = "undecided"
    if "does not hold" in found:
        verdict = "does not hold"
    elif found == {"holds"}:
        verdict = "holds"
    size = f"{claim.size_px} px, NCHW: "
    doubt = f"{TOO_CLOSE}; " if verdict == "undecided" else ""
    return ClaimResult(
        claim=claim, measured=max(change for change, _ in changes.values()), verdict=verdict,
        detail=doubt + size + "; ".join(changes),
    )  # fmt: skip


def _regime_verdict(claim: Claim, row: LatencyRow, low: float, high: float) -> str:
    """Of one row; `low` and `high` are its 95 % interval, as changes in percent."""
    if row.verdict == "faster" and _holds(claim, high):
        return "holds"
    return "undecided" if _holds(claim, low) else "does not hold"
