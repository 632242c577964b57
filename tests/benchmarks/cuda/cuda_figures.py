"""The figures that are aimed at, judged one by one from what was measured: holds, does not hold, not measured, why."""

from __future__ import annotations

from collections.abc import Sequence

from cuda_regimes import FP16_LIMIT, FP32_LIMIT, NETWORK_PAIRS, REGIMES, Regime
from cuda_result import Comparison, Figure, Parity, Result, Row, Verdict

from cspdeploy.check.stats import SMALLEST_DIFFERENCE
from cspdeploy.pipeline.claims import CLAIMS, Claim
from cspdeploy.pipeline.time_claims import judge_change

__all__ = [
    "CLAIM_REGIMES",
    "COMPILED",
    "EAGER",
    "GRAPHS",
    "REFERENCE",
    "TEST_IMAGES",
    "judge",
    "missed_rows",
    "unjudged",
]

COMPILED, EAGER, REFERENCE = "compile-fp16-nhwc", "eager-tf32", "eager-fp32"
"""What speed is held against: both as in use, where convolutions of FP32 take TF32. `REFERENCE`, without it, is what
numbers are held against, and its time is shown beside the other."""
GRAPHS = ("ort-fp16-graph", "ort-fp16-nhwc-graph")
"""ONNX Runtime with CUDA graph and I/O binding, in either layout: the faster one is the one that is used."""
AT_LEAST_EAGER = 3.0
AT_LEAST_COMPILED = 0.9
AGREEMENT = 0.995
LARGE = 32
CLAIM_REGIMES = (
    EAGER, "eager-tf32-nhwc", "eager-fp16", "eager-fp16-nhwc", COMPILED, "ort-tf32", "ort-fp16", *GRAPHS,
)  # fmt: skip
"""As in use, each of which `cspdeploy compare --paper` times alike. FP16 in NCHW is what is published."""


def judge(result: Result) -> tuple[Figure, ...]:
    """All figures of all pairs of networks that the result has rows of, else of all pairs."""
    there = {row.network for row in result.rows}
    pairs = [pair for pair in NETWORK_PAIRS if there & {*pair}] or list(NETWORK_PAIRS)
    if result.kind == "cpu":
        pairs = [tuple(dict.fromkeys(row.network for row in result.rows))]  # type: ignore[list-item]
    networks = [name for pair in pairs for name in pair]
    found: list[Figure] = []
    if result.kind == "cuda":
        for name in networks:
            found += _speed_figures(result, name)
    for name in networks:
        found += _parity_figures(result.parity, name)
    found += _agreement_figures(result.parity)
    for pair in pairs:
        if len(pair) == 2:
            found += _claims(result, *pair)
    return tuple(found)


def unjudged(figures: Sequence[Figure]) -> list[Figure]:
    """Those of which nothing was measured, each with the reason in its detail."""
    return [one for one in figures if one.verdict == "not measured"]


def missed_rows(figures: Sequence[Figure], network: str) -> bool:
    """Whether a figure of speed of that network does not hold."""
    return any(one.speed and one.verdict == "does not hold" and one.figure.startswith(f"{network}:") for one in figures)


def _speed_figures(result: Result, network: str) -> list[Figure]:
    graph = "ort-cuda FP16 with CUDA graph and I/O binding"
    return [
        _bound(result, network, 1, COMPILED, f"{graph}, batch 1: not slower than torch.compile FP16 ({COMPILED})",
               # Below two in a hundred a difference is one of the placement in memory.
               most=1 + SMALLEST_DIFFERENCE),
        _bound(result, network, 1, EAGER,
               f"{graph}, batch 1: at least {AT_LEAST_EAGER:g}x eager FP32 with TF32 as in use ({EAGER})",
               most=1 / AT_LEAST_EAGER),
        _bound(result, network, 1, REFERENCE, f"{graph}, batch 1: beside eager FP32 with TF32 off ({REFERENCE})"),
        _bound(result, network, LARGE, COMPILED,
               f"{graph}, batch {LARGE}: at least {AT_LEAST_COMPILED:g}x the throughput of torch.compile FP16 "
               f"({COMPILED})",
               most=1 / AT_LEAST_COMPILED),
    ]  # fmt: skip


def _bound(result: Result, network: str, batch: int, against: str, figure: str, *, most: float | None = None) -> Figure:
    """Time over time at most `most`, of the faster layout; None: measured, without a bound."""
    title = f"{network}: {figure}"
    found = [
        one for regime in GRAPHS
        if (one := _comparison(result.comparisons, f"{network}/{regime}", f"{network}/{against}", batch)) is not None
    ]  # fmt: skip
    if not found:
        reasons = [_why(result.rows, network, regime, batch) for regime in (*GRAPHS, against)]
        return Figure(figure=title, verdict="not measured", detail=next(filter(None, reasons), "not run"))
    best = min(found, key=lambda one: one.ratio)
    detail = f"{1 / best.ratio:.2f}x as fast ({1 / best.high:.2f} to {1 / best.low:.2f}), {best.subject.split('/')[1]}"
    return Figure(figure=title, verdict="measured" if most is None else _verdict(best, most), detail=detail)


def _verdict(one: Comparison, most: float) -> Verdict:
    """Of a ratio of times that may be `most`: by the whole of its interval."""
    if one.high <= most:
        return "holds"
    return "does not hold" if one.low > most else "undecided"


def _comparison(found: Sequence[Comparison], subject: str, against: str, batch: int) -> Comparison | None:
    return next(
        (one for one in found if (one.subject, one.against, one.batch) == (subject, against, batch)), None
    )  # fmt: skip


def _why(rows: Sequence[Row], network: str, regime: str, batch: int) -> str:
    row = next((one for one in rows if (one.network, one.regime, one.batch) == (network, regime, batch)), None)
    return row.reason if row is not None else ""


def _parity_figures(parity: Sequence[Parity], network: str) -> list[Figure]:
    found = []
    for limit, what in ((FP32_LIMIT, "FP32, TF32 off"), (FP16_LIMIT, "FP16, finite in every run")):
        title = f"{network}: {what}: rel_l2 under {limit:g} in every regime"
        rows = [one for one in parity if one.network == network and one.limit == limit]
        measured = [one for one in rows if one.rel_l2 is not None]
        if not measured:
            reason = next((one.reason for one in rows if one.reason), "not run")
            found.append(Figure(figure=title, verdict="not measured", detail=reason, speed=False))
            continue
        worst = max(measured, key=lambda one: one.rel_l2 or 0.0)
        holds = all((one.rel_l2 or 0.0) < limit and not one.first_bad_run for one in measured)
        left = len(rows) - len(measured)
        detail = f"at most {worst.rel_l2:.1e} ({worst.regime})" + (f"; {left} regimes not measured" if left else "")
        found.append(Figure(figure=title, verdict="holds" if holds else "does not hold", detail=detail, speed=False))
    return found


def _agreement_figures(parity: Sequence[Parity]) -> list[Figure]:
    """Of a trained network on the test images; on others it is told, and is not this figure."""
    title = f"top-1 agreement at least {100 * AGREEMENT:g} % on the test images"
    rows = [one for one in parity if one.num_images and one.top1_agreement is not None and one.images != GOLDEN]
    if not rows:
        return [Figure(figure=title, verdict="not measured", detail="not run", speed=False)]
    worst = min(rows, key=lambda one: one.top1_agreement or 0.0)
    detail = (
        f"at least {100 * (worst.top1_agreement or 0.0):.2f} % of {worst.num_images} {worst.images} ({worst.regime})"
    )
    if TEST_IMAGES not in worst.images:
        return [Figure(figure=title, verdict="not measured", detail=f"no test images here; {detail}", speed=False)]
    holds = (worst.top1_agreement or 0.0) >= AGREEMENT
    return [Figure(figure=title, verdict="holds" if holds else "does not hold", detail=detail, speed=False)]


GOLDEN = "golden images"
TEST_IMAGES = "test images of Fashion-MNIST"


def _claims(result: Result, network: str, baseline: str) -> list[Figure]:
    """What the network takes off its baseline's time, by regime: each claim that is on it, judged by the one judge
    that there is; without a claim it is measured."""
    regimes = {one.name: one for one in REGIMES[result.kind]}
    cpu = result.kind == "cpu"
    batches = sorted({row.batch for row in result.rows if row.network == network}) if cpu else (1, LARGE)
    names = [name for name in regimes if any(row.regime == name for row in result.rows)] if cpu else CLAIM_REGIMES
    found = []
    for batch in batches:
        for name in names:
            claims: list[Claim | None] = [*_claims_on(result, network, baseline, regimes[name], batch)]
            found += [_change(result, network, baseline, name, batch, claim) for claim in claims or [None]]
    return found


def _claims_on(result: Result, network: str, baseline: str, regime: Regime, batch: int) -> list[Claim]:
    return [
        one for one in CLAIMS
        if one.subject == "time" and (one.network, one.baseline) == (network, baseline)
        and one.device in ("", result.kind) and one.regime in ("", regime.compared_as)
        and batch >= one.least_batch and one.size_px == result.size_px
    ]  # fmt: skip


def _change(result: Result, network: str, baseline: str, regime: str, batch: int, claim: Claim | None) -> Figure:
    title = f"{network} instead of {baseline}, {regime}, batch {batch}"
    title += f": {claim.text} ({claim.source})" if claim is not None else ""
    one = _comparison(result.comparisons, f"{network}/{regime}", f"{baseline}/{regime}", batch)
    if one is None:
        reasons = (_why(result.rows, name, regime, batch) for name in (network, baseline))
        return Figure(figure=title, verdict="not measured", detail=next(filter(None, reasons), "not run"))
    change, low, high = (100 * (ratio - 1) for ratio in (one.ratio, one.low, one.high))
    verdict: Verdict = "measured" if claim is None else judge_change(claim, low, high)
    return Figure(figure=title, verdict=verdict, detail=f"{change:+.1f} % ({low:+.1f} to {high:+.1f})")
