from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cspdeploy.check.variants import variants_of
from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.errors import CspDeployError, InputError, RuntimeUnavailableError
from cspdeploy.core.results import Timing
from cspdeploy.nets.cost import measure_cost
from cspdeploy.nets.registry import NETWORKS, build, find_network, spec_of
from cspdeploy.pipeline import paper
from cspdeploy.pipeline.claims import CLAIMS, TIMM, Claim
from cspdeploy.pipeline.compare import CompareRequest
from cspdeploy.pipeline.pair_latency import LatencyRow
from cspdeploy.pipeline.paper import ClaimResult, PaperReport, PaperRequest, check_claims, judge_time
from cspdeploy.pipeline.regimes import GPU_COMMAND, regime_name
from cspdeploy.runtimes import all_runtimes

# CSPDarknet53 and Darknet53 at 256 px: 13.067 and 18.570 BFLOPs, 27.606 and 41.573 million weights.
WEIGHTS = Claim(
    pair="made up", text="weights", source="a test", subject="conv weights", network="cspdarknet53", published=27.61,
    tolerance=0.005,
)  # fmt: skip
CHANGE = Claim(
    pair="made up", text="less", source="a test", subject="BFLOPs", network="cspdarknet53", baseline="darknet53",
    published=-30.0, tolerance=0.5,
)  # fmt: skip
TIME = dataclasses.replace(CHANGE, subject="time", published=-18.0, bound="at-most")


def _check(claim: Claim, **fields: Any) -> ClaimResult:
    (result,) = check_claims(PaperRequest(), claims=[dataclasses.replace(claim, **fields)]).results
    return result


# --- the claims themselves ---


def test_claims_name_networks_of_the_registry() -> None:
    for claim in CLAIMS:
        assert claim.network in (*NETWORKS, ""), claim
        assert claim.baseline in (*NETWORKS, ""), claim
        assert claim.network or claim.unmeasurable, claim
        assert claim.tolerance > 0 or claim.subject == "time", claim


def test_every_pair_of_the_paper_is_there() -> None:
    assert len({claim.pair for claim in CLAIMS}) == 5
    measured = {claim.network for claim in CLAIMS}
    assert {"csdarknet53", "csresnet50", "csresnext50", "cspdensenet201", "csppeleenet"} <= measured
    assert {"csppeleenet_fusion_first", "csppeleenet_fusion_last", "csppeleenet_gamma25"} <= measured


@pytest.fixture(scope="module")
def found() -> PaperReport:
    return check_claims(PaperRequest())


def test_counts_of_the_authors_readme_hold(found: PaperReport) -> None:
    """All but the two whose layers were never published."""
    checked = [
        result
        for result in found.results
        if result.claim.source == "authors' README" and result.claim.subject != "top-1" and not result.claim.reading
    ]
    assert len(checked) == 11
    assert {result.verdict for result in checked} == {"holds"}


def test_headline_of_a_fifth_holds_for_some_pairs_only(found: PaperReport) -> None:
    verdicts = {
        result.claim.network: result.verdict for result in found.results if "headline" in result.claim.text
    }  # fmt: skip
    assert verdicts["csdarknet53"] == verdicts["csresnext50"] == "holds"
    assert verdicts["csresnet50"] == verdicts["csppeleenet"] == "does not hold"


def test_twelve_percent_at_76_is_neither_baseline_s(found: PaperReport) -> None:
    (result,) = [one for one in found.results if one.claim.published == -12.0]
    assert result.verdict == "does not hold"
    assert result.measured == pytest.approx(-15.4, abs=0.05)


def test_accuracy_and_time_are_not_judged_without_measuring(found: PaperReport) -> None:
    unseen = [result for result in found.results if result.claim.subject in ("top-1", "time")]
    assert len(unseen) == 10
    assert {(result.verdict, result.measured) for result in unseen} == {("not measurable here", None)}
    assert all(result.detail for result in unseen)
    assert found.latency == {}
    on_gpus = [result for result in unseen if result.claim.device == "cuda"]
    assert {result.claim.pair.partition(" ")[0] for result in on_gpus} == {
        "CSPDarknet53", "CSPResNet-50", "CSPResNeXt-50",
    }  # fmt: skip
    assert {GPU_COMMAND in result.detail for result in on_gpus} == {True}
    assert {GPU_COMMAND in result.detail for result in unseen if result not in on_gpus} == {False}


def test_claims_on_times_can_be_timed_together() -> None:
    """Those of one pair share one measurement, and each regime that is named is one that can be timed."""
    times = [claim for claim in CLAIMS if claim.subject == "time"]
    for pair in {claim.pair for claim in times}:
        assert len({(claim.network, claim.baseline, claim.size_px) for claim in times if claim.pair == pair}) == 1
    names = {
        regime_name(runtime.name, "eager", variant.name)
        for runtime in all_runtimes().values()
        for variant in variants_of(runtime.name)
    }
    assert {claim.regime for claim in times} - {""} <= names
    assert all(claim.tolerance == 0.5 for claim in times)  # half of the last digit that is published
    published = [claim for claim in times if claim.source == TIMM]
    assert all(claim.regime and claim.device == "cuda" and claim.least_batch == 32 for claim in published)
    assert all("published at batch 1024 under autocast; here weights in FP16" in claim.remark for claim in published)


def test_command_that_measures_on_a_gpu_is_one_that_there_is() -> None:
    """What the table tells to type is parsed, and refused on a machine without a GPU for that reason alone."""
    with pytest.raises(RuntimeUnavailableError, match="--runtime torch-cuda"):
        check_claims(PaperRequest(latency=True, runtimes=tuple(re.findall(r"--runtime (\S+)", GPU_COMMAND))))


def test_report_as_json(found: PaperReport) -> None:
    assert from_json(PaperReport, json.loads(json.dumps(to_json(found)))) == found


def _with_pools_moved(name: str) -> float:
    """BFLOPs of a partial network if its pools came after the last transitions, as in the plain one."""
    spec = spec_of(find_network(name))
    with torch.device("meta"):
        net = build(spec).eval()
    num_pooled = len(spec.network.config["depths"]) - 1
    names = {f"transition{stage + 1}.conv" for stage in range(num_pooled)}
    macs = []

    def count(conv: Any, inputs: Any, output: Any) -> None:
        macs.append(output.numel() * conv.weight[0].numel())

    for name_, module in net.features.named_modules():  # type: ignore[union-attr, operator]
        if name_ in names:
            module.register_forward_hook(count)
    with torch.no_grad():
        net(torch.empty(1, 3, 224, 224, device="meta"))
    assert len(macs) == num_pooled
    return measure_cost(spec).bflops + 2 * 3 * sum(macs) / 1e9  # on a map four times as large


@pytest.mark.parametrize(
    ("network", "plain", "said"),
    [
        ("csppeleenet", "peleenet", "10.6 % more than peleenet"),
        ("csppeleenet_fusion_first", "peleenet", "10.4 % less"),
        ("csppeleenet_gamma25", "peleenet", "22.4 % more"),
        ("cspdensenet201", "densenet201", "4.8 % less"),
    ],
)
def test_what_the_place_of_the_pool_saves_is_said(found: PaperReport, network: str, plain: str, said: str) -> None:
    """In our reading the pool comes before the last transition, which the plain network could have as well."""
    change = 100 * (_with_pools_moved(network) / measure_cost(spec_of(find_network(plain))).bflops - 1)
    assert f"{abs(change):.1f} % {'more' if change > 0 else 'less'}" in said
    changes = [result.claim for result in found.results if result.claim.network == network and result.claim.is_change]
    assert changes
    for claim in changes:
        assert said in claim.remark, claim.text
        assert "not from the split" in claim.remark


def test_bflops_of_csppeleenet_with_the_pool_after(found: PaperReport) -> None:
    assert _with_pools_moved("csppeleenet") == pytest.approx(1.123, abs=0.001)
    (claim,) = [
        result.claim
        for result in found.results
        if result.claim.network == "csppeleenet" and result.claim.subject == "BFLOPs" and not result.claim.is_change
    ]
    assert "1.123 BFLOPs" in claim.remark


# --- verdicts, on claims that are made up ---


@pytest.mark.parametrize(
    ("published", "verdict"),
    [(27.61, "holds"), (27.60, "does not hold"), (27.62, "does not hold"), (0.0, "does not hold")],
)
def test_count_is_judged_to_its_last_digit(published: float, verdict: str) -> None:
    result = _check(WEIGHTS, published=published)
    assert result.verdict == verdict
    assert result.measured == pytest.approx(27.605856)


@pytest.mark.parametrize(
    ("published", "bound", "verdict"),
    [
        (-30.0, "about", "holds"), (-29.0, "about", "does not hold"), (-31.0, "about", "does not hold"),
        (-20.0, "at-most", "holds"), (-30.0, "at-most", "holds"), (-31.0, "at-most", "does not hold"),
        (30.0, "about", "does not hold"),
    ],
)  # fmt: skip
def test_change_against_a_network(published: float, bound: Any, verdict: str) -> None:
    result = _check(CHANGE, published=published, bound=bound)
    assert result.verdict == verdict
    assert result.measured == pytest.approx(100 * (13.067 / 18.570 - 1), abs=0.01)


def test_change_against_a_printed_figure() -> None:
    result = _check(CHANGE, baseline="", baseline_figure=26.134, published=-50.0)
    assert (result.verdict, result.measured) == ("holds", pytest.approx(-50.0, abs=0.01))
    assert _check(CHANGE, baseline="", baseline_figure=13.067, published=-50.0).verdict == "does not hold"


def test_size_is_the_claim_s() -> None:
    half = _check(CHANGE, subject="BFLOPs", baseline="", published=13.067 / 4, tolerance=0.01, size_px=128)
    assert half.verdict == "holds"


def test_reading_that_differs_decides_nothing() -> None:
    assert _check(WEIGHTS, reading=True).verdict == "holds"
    result = _check(WEIGHTS, published=20.0, reading=True)
    assert (result.verdict, result.measured) == ("undecided", pytest.approx(27.605856))
    assert "never published" in result.detail


def test_what_cannot_be_measured_shows_the_nearest_without_a_verdict() -> None:
    result = _check(WEIGHTS, published=1.0, unmeasurable="of another network")
    assert (result.verdict, result.detail) == ("not measurable here", "of another network")
    assert result.measured == pytest.approx(27.605856)


def test_unknown_network() -> None:
    with pytest.raises(InputError, match="cspdarknet35"):
        _check(WEIGHTS, network="cspdarknet35")


# --- times ---


def _row(
    ratio: float | None, verdict: Any, *, runtime: str = "torch-cuda", batch: int = 1, arm: float = 0.0, **fields: Any
) -> LatencyRow:
    timing = Timing(
        p50_ms=1.0, p95_ms=1.0, ci_low_ms=1.0, ci_high_ms=1.0, num_runs=1, verdict="reference", ratio=1.0,
        samples_ms=(1.0,),
    )  # fmt: skip
    return LatencyRow(
        runtime=runtime, artifact="eager", precision="fp32", batch=batch, engine="torch", verdict=verdict, ratio=ratio,
        ratio_low=ratio and ratio - arm, ratio_high=ratio and ratio + arm, a=timing, b=timing, **fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "verdict", "measured"),
    [
        ([_row(0.79, "faster")], "holds", -21.0),
        ([_row(0.79, "faster"), _row(0.9, "faster", batch=8)], "does not hold", -10.0),
        ([_row(0.8, "indistinguishable", arm=0.3)], "undecided", -20.0),
        ([_row(0.8, "faster", arm=0.1)], "undecided", -20.0),  # 10 to 30 % less
        ([_row(0.79, "faster"), _row(0.8, "faster", batch=8, arm=0.1)], "undecided", -20.0),
        ([_row(0.95, "faster", arm=0.02), _row(0.8, "faster", batch=8, arm=0.1)], "does not hold", -5.0),
        ([_row(1.2, "slower"), _row(0.5, "faster", batch=8)], "does not hold", 20.0),
        ([_row(None, "not-measured", reason="out of memory"), _row(0.79, "faster")], "undecided", -21.0),
        ([_row(None, "not-measured"), _row(0.95, "faster")], "does not hold", -5.0),
        ([_row(None, "not-measured")], "not measurable here", None),
        ([], "not measurable here", None),
    ],
)  # fmt: skip
def test_time_must_hold_wherever_it_was_measured(rows: list[LatencyRow], verdict: str, measured: float | None) -> None:
    result = judge_time(TIME, tuple(rows))
    assert result.verdict == verdict
    assert result.measured == (None if measured is None else pytest.approx(measured))
    if measured is None:
        return
    (worst,) = [row for row in rows if row.ratio and 100 * (row.ratio - 1) == pytest.approx(measured)]
    assert result.regime == f"torch-cuda eager, batch {worst.batch}"  # never without its regime
    for row in rows:
        if row.ratio:
            assert f"torch-cuda eager, batch {row.batch}: {100 * (row.ratio - 1):+.1f} %" in result.detail
            assert "256 px" in result.detail
        else:
            assert "; not measured in torch-cuda eager, batch 1" in result.detail
    assert len(result.regimes) == len(rows)
    means = [f"{sum(one.change or 0 for one in result.regimes) / len(rows):+.1f}" for _ in rows[1:]]
    assert not any(f"batch: {mean}" in result.detail for mean in means)


def test_a_claim_holds_in_one_regime_and_not_in_another() -> None:
    rows = (
        _row(0.78, "faster", variant="fp16", batch=32),
        _row(0.985, "indistinguishable", variant="compile fp16 channels-last", batch=32),
        _row(0.82, "faster", variant="channels-last", arm=0.005),
        _row(None, "not-measured", variant="fp16", reason="out of memory"),
    )
    result = judge_time(TIME, rows)
    assert [(one.regime, one.batch, one.verdict) for one in result.regimes] == [
        ("torch-cuda eager fp16", 32, "holds"),
        ("torch-cuda eager compile fp16 channels-last", 32, "does not hold"),
        ("torch-cuda eager channels-last", 1, "undecided"),
        ("torch-cuda eager fp16", 1, "not measured"),
    ]
    assert (result.verdict, result.regime) == (
        "does not hold", "torch-cuda eager compile fp16 channels-last, batch 32"
    )  # fmt: skip
    assert "holds in torch-cuda eager fp16, batch 32: -22.0 %" in result.detail
    assert "does not hold in torch-cuda eager compile fp16 channels-last, batch 32: -1.5 %" in result.detail
    assert result.regimes[3].reason == "out of memory"


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [(0.8049, "holds"), (0.8051, "undecided"), (0.82, "undecided"), (0.8449, "undecided"), (0.8451, "does not hold")],
)  # fmt: skip
def test_placement_in_memory_and_the_last_digit_decide_nothing(ratio: float, verdict: str) -> None:
    """18 % may be 17.5, and two points more or less come with each start of a process."""
    assert judge_time(TIME, (_row(ratio, "faster"),)).verdict == verdict


@pytest.mark.parametrize(("ratio", "verdict"), [(1.06, "holds"), (1.04, "undecided"), (1.01, "does not hold")])
def test_a_claim_that_it_takes_longer(ratio: float, verdict: str) -> None:
    claim = dataclasses.replace(TIME, published=4.0, bound="at-least")
    assert judge_time(claim, (_row(ratio, "slower"),)).verdict == verdict
    two = judge_time(claim, (_row(1.3, "slower"), _row(ratio, "slower", batch=8)))
    assert (two.verdict, two.regime) == (verdict, "torch-cuda eager, batch 8")


def test_published_regime_alone_decides_and_the_others_are_shown() -> None:
    claim = dataclasses.replace(TIME, regime="torch-cuda eager fp16")
    other, own = _row(1.2, "slower"), _row(0.78, "faster", variant="fp16")
    result = judge_time(claim, (other, own))
    assert (result.verdict, result.measured) == ("holds", pytest.approx(-22.0))
    assert [(one.verdict, one.claimed) for one in result.regimes] == [("does not hold", False), ("holds", True)]
    assert "torch-cuda eager, batch 1" not in result.detail
    lost = judge_time(claim, (own, _row(None, "not-measured", reason="out of memory")))
    assert (lost.verdict, "not measured in" in lost.detail) == ("holds", False)  # it is of another regime
    unmeasured = judge_time(claim, (other,))
    assert (unmeasured.verdict, unmeasured.measured) == ("not measurable here", None)
    assert unmeasured.detail == f"published of torch-cuda eager fp16, which was not timed: {GPU_COMMAND}"


def test_a_claim_of_a_large_batch_is_not_refuted_by_one_image() -> None:
    """At batch 1 both networks wait for launches, of which the partial one has more."""
    claim = dataclasses.replace(TIME, regime="torch-cuda eager fp16", least_batch=32)
    one, many = (_row(1.2, "slower", variant="fp16"), _row(0.78, "faster", variant="fp16", batch=32))
    result = judge_time(claim, (one, many))
    assert (result.verdict, result.regime) == ("holds", "torch-cuda eager fp16, batch 32")
    assert [(row.verdict, row.claimed) for row in result.regimes] == [("does not hold", False), ("holds", True)]
    assert judge_time(dataclasses.replace(claim, least_batch=1), (one, many)).verdict == "does not hold"
    alone = judge_time(claim, (one,))
    assert alone.verdict == "not measurable here"
    assert alone.detail.startswith("published of torch-cuda eager fp16, which was not timed at a batch of 32 or more: ")


def test_device_clock_is_shown_and_the_host_decides() -> None:
    row = _row(
        0.98, "indistinguishable", device_ratio=0.7, device_ratio_low=0.7, device_ratio_high=0.7, a_device_ms=2.0,
        b_device_ms=1.4,
    )  # fmt: skip
    (one,) = judge_time(TIME, (row,)).regimes
    assert (one.verdict, one.device_change, one.a_device_ms, one.b_device_ms) == (
        "does not hold", pytest.approx(-30.0), 2.0, 1.4
    )  # fmt: skip


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (_row(0.95, "faster", arm=0.01), "holds"),
        (_row(1.05, "slower", arm=0.01), "does not hold"),
        (_row(1.0, "indistinguishable", arm=0.2), "undecided"),
        (_row(0.99, "indistinguishable", arm=0.001), "undecided"),
        (_row(1.01, "indistinguishable", arm=0.001), "undecided"),
    ],
)  # fmt: skip
def test_faster_is_decided_only_beyond_the_noise(row: LatencyRow, verdict: str) -> None:
    (faster,) = [claim for claim in CLAIMS if claim.subject == "time" and claim.published == 0]
    result = judge_time(faster, (row,))
    assert result.verdict == verdict
    assert ("too noisy or too close to tell" in result.detail) == (verdict == "undecided")


def test_claim_on_gpus_is_not_judged_by_a_cpu() -> None:
    claim = dataclasses.replace(TIME, device="cuda")
    cpu = _row(1.5, "slower", runtime="torch-cpu")
    result = judge_time(claim, (cpu,))
    assert result.verdict == "not measurable here"
    assert result.detail == f"nothing was timed on a CUDA device; on a machine with an NVIDIA GPU: {GPU_COMMAND}"
    lost = judge_time(claim, (cpu, _row(None, "not-measured", reason="out of memory")))
    assert "nothing was timed on a CUDA device (out of memory)" in lost.detail
    assert judge_time(claim, (cpu, _row(0.79, "faster"))).verdict == "holds"
    assert judge_time(dataclasses.replace(claim, device=""), (cpu,)).verdict == "does not hold"


def test_claim_on_gpus_is_not_timed_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes on a CPU would decide nothing."""
    monkeypatch.setattr(paper, "compare_models", lambda *_, **__: pytest.fail("timed"))
    report = check_claims(
        PaperRequest(latency=True, runtimes=("ort-cpu",)), claims=[dataclasses.replace(TIME, device="cuda")]
    )
    assert report.results[0].verdict == "not measurable here"
    assert GPU_COMMAND in report.results[0].detail
    assert report.latency == {"made up": ()}


def test_claims_of_one_pair_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[CompareRequest] = []
    row = _row(0.79, "faster", runtime="ort-cpu")

    def compare(request: CompareRequest, *, progress: Any) -> Any:
        asked.append(request)
        return SimpleNamespace(latency=(row,), warnings=("noise",))

    monkeypatch.setattr(paper, "compare_models", compare)
    claims = [TIME, dataclasses.replace(TIME, published=-50.0), dataclasses.replace(TIME, device="cuda")]
    report = check_claims(PaperRequest(latency=True, runtimes=("ort-cpu",), batches=(4,)), claims=claims)
    assert [result.verdict for result in report.results] == ["holds", "does not hold", "not measurable here"]
    assert report.warnings == ("noise",)
    (request,) = asked
    assert (request.a, request.b, request.on, request.all_on_gpu, request.batches) == (
        "darknet53", "cspdarknet53", "", True, (4,)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"regimes": ("compil",)}, "--regimes compil: unknown"),
        ({"device": 3, "runtimes": ("ort-cpu",)}, "--device 3: no CUDA runtime is timed"),
        ({"batches": (0,)}, "--batch 0"),
    ],
)
def test_wrong_use_is_told_before_anything_is_measured(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(CspDeployError, match=said):
        check_claims(PaperRequest(latency=True, **fields), claims=[TIME])


@pytest.mark.slow
def test_times_are_measured_when_asked_for() -> None:
    from cspdeploy.check.latency import LatencySettings

    quick = LatencySettings(min_runs=5, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.0)
    claim = dataclasses.replace(TIME, network="cs3darknet_focus_s", baseline="cs3darknet_s", size_px=64)
    request = PaperRequest(latency=True, runtimes=("ort-cpu",), batches=(1,), settings=quick)
    report = check_claims(request, claims=[claim])
    (row,) = report.latency["made up"]
    assert row.ratio is not None
    assert report.results[0].verdict in ("holds", "does not hold")
    assert report.results[0].measured == pytest.approx(100 * (row.ratio - 1))
    assert report.results[0].regime == "ort-cpu onnx, batch 1"


@pytest.mark.cuda
@pytest.mark.slow
def test_regimes_of_a_gpu_are_timed() -> None:
    """Needs a GPU. Every regime has its row; both clocks tell, and TF32 is said."""
    from cspdeploy.check.latency import LatencySettings

    claim = dataclasses.replace(
        TIME, network="cs3darknet_focus_s", baseline="cs3darknet_s", size_px=64, device="cuda", regime=""
    )
    request = PaperRequest(
        latency=True, runtimes=("torch-cuda",), batches=(1, 32), settings=LatencySettings(min_runs=5, min_seconds=0.1)
    )
    report = check_claims(request, claims=[claim])
    rows = report.latency["made up"]
    assert {row.variant for row in rows} == {variant.name for variant in variants_of("torch-cuda")}
    assert [(row.regime, row.reason) for row in rows if row.ratio is None] == []
    assert {row.tf32 for row in rows} == {True}
    assert all(row.a_device_ms and row.b_device_ms and row.device_ratio for row in rows)
    assert all(row.inputs.startswith("rotated") for row in rows)
    assert all("TF32 on" in row.engine for row in rows)
    assert report.results[0].verdict != "not measurable here"
