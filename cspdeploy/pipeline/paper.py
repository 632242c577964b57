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
from cspdeploy.pipeline.regimes import check_device, check_regimes, timed_runtimes
from cspdeploy.pipeline.time_claims import RegimeVerdict, judge_rows, overall, summarise_regimes, why_untimed

__all__ = ["ClaimResult", "PaperReport", "PaperRequest", "check_claims", "judge_time"]

Progress = Callable[[str, int, int], None]

READING = "the layers were never published, and this reading of the paper's text gives another number"


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperRequest:
    """How to check. Times are measured only with `latency`, at the claims' own sizes.

    `batches`, `runtimes`, `regimes` and `device` as in `CompareRequest`; with no regimes, all of them on GPUs.
    """

    latency: bool = False
    runtimes: tuple[str, ...] = ()
    batches: tuple[int, ...] | None = None
    regimes: tuple[str, ...] = ()
    device: int | None = None
    calibration: Path | None = None
    settings: LatencySettings = dataclasses.field(default_factory=LatencySettings)

    def __post_init__(self) -> None:
        check_batches(self.batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimResult:
    """A claim and its verdict. `measured` is in the unit of `claim.published`; None where nothing was measured.

    For a time it is the change that speaks most against the claim, `regime` says in which regime, and `regimes` has
    every one with its own verdict.
    "undecided": the network here is a reading of the paper's text, and gives another number; or a time is too near to
    what is claimed, or too noisy, to say.
    """

    claim: Claim
    measured: float | None
    verdict: Literal["holds", "does not hold", "undecided", "not measurable here"]
    detail: str = ""
    regime: str = ""
    regimes: tuple[RegimeVerdict, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperReport:
    """What `cspdeploy compare --paper` found. `latency` has the rows behind the times by pair, A being the baseline."""

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
        InputError: a claim is on a network that the registry does not have; no such regime.
        RuntimeUnavailableError: a runtime or a device that was asked for is missing.
    """
    claims = list(claims)
    if request.latency:
        runtimes = timed_runtimes(request.runtimes)
        check_regimes(request.regimes, runtimes)
        check_device(request.device, runtimes)
    costs = _Costs()
    rows: dict[str, tuple[LatencyRow, ...]] = {}
    warnings: list[str] = []
    results = []
    for i, claim in enumerate(claims):
        progress(claim.pair, i, len(claims))
        if claim.subject == "time" and request.latency and not claim.unmeasurable:
            if claim.pair not in rows:  # claims of one pair are on the same networks
                rows[claim.pair], noise = _time(claim, _device_of(claim.pair, claims), request, progress)
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
        reason = claim.unmeasurable or why_untimed(claim, None)
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


def _device_of(pair: str, claims: Iterable[Claim]) -> str:
    """On which device a pair is timed: none but a GPU where all that is claimed of its times is claimed of GPUs."""
    devices = {claim.device for claim in claims if claim.pair == pair and claim.subject == "time"}
    return devices.pop() if len(devices) == 1 else ""


def _time(
    claim: Claim, device: str, request: PaperRequest, progress: Progress
) -> tuple[tuple[LatencyRow, ...], tuple[str, ...]]:  # fmt: skip
    """Both networks on every runtime that is here, the baseline first. Nothing where none is on the device."""
    runtimes = timed_runtimes(request.runtimes, device=device)
    if not runtimes:
        return (), ()
    report = compare_models(
        CompareRequest(
            a=claim.baseline, b=claim.network, size_px=(claim.size_px, claim.size_px), batches=request.batches,
            runtimes=request.runtimes, on=device, regimes=request.regimes, all_on_gpu=True, device=request.device,
            calibration=request.calibration, settings=request.settings,
        ),
        progress=lambda what, done, total: progress(f"{claim.pair}: {what}", done, total),
    )  # fmt: skip
    return report.latency, report.warnings


def judge_time(claim: Claim, rows: tuple[LatencyRow, ...]) -> ClaimResult:
    """Each regime by itself. A claim that names none must hold in every one that is measured, beyond noise."""
    found = judge_rows(claim, rows)
    verdict, worst = overall(claim, found)
    if verdict == "not measured" or worst is None:
        return ClaimResult(
            claim=claim, measured=None, verdict="not measurable here", detail=why_untimed(claim, found), regimes=found
        )
    return ClaimResult(
        claim=claim, measured=worst.change, verdict=verdict, detail=summarise_regimes(claim, found),
        regime=f"{worst.regime}, batch {worst.batch}", regimes=found,
    )  # fmt: skip
