"""The rules of the CUDA benchmark's figures, and its files: results made by hand, no figure of CUDA's."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from cuda_figures import CLAIM_REGIMES, COMPILED, EAGER, REFERENCE, judge  # noqa: E402
from cuda_regimes import FP16_LIMIT, FP32_LIMIT, REGIMES  # noqa: E402
from cuda_result import (  # noqa: E402
    Comparison,
    Kind,
    Parity,
    Result,
    Row,
    merge_results,
    read_result,
    write_result,
)
from cuda_table import NO_CUDA, markdown  # noqa: E402

from cspdeploy.core.errors import InputError  # noqa: E402
from cspdeploy.core.results import Timing  # noqa: E402
from cspdeploy.pipeline.claims import CLAIMS  # noqa: E402
from cspdeploy.pipeline.pair_latency import LatencyRow  # noqa: E402
from cspdeploy.pipeline.paper import judge_time  # noqa: E402

FACTS = {"gpu": "a GPU", "gpu_driver": "580.1", "torch": "2.13.0"}


def _result(kind: Kind = "cuda", **parts: object) -> Result:
    return dataclasses.replace(
        Result(kind=kind, commands=("python tests/benchmarks/cuda",), size_px=256, facts=FACTS),
        **parts,  # type: ignore[arg-type]
    )


def _row(network: str, regime: str, batch: int = 1, p50_ms: float | None = 1.0, reason: str = "") -> Row:
    return Row(
        network=network, regime=regime, batch=batch, runtime="ort-cuda", p50_ms=p50_ms, ci_low_ms=p50_ms,
        ci_high_ms=p50_ms, num_runs=80 if p50_ms else 0, reason=reason,
    )  # fmt: skip


def _ratio(subject: str, against: str, ratio: float, batch: int = 1) -> Comparison:
    return Comparison(subject=subject, against=against, batch=batch, ratio=ratio, low=0.98 * ratio, high=1.02 * ratio)


# --- figures ---


def _speed(compiled: float, eager: float, large: float) -> Result:
    name = "cspdarknet53"
    return _result(
        rows=(_row(name, "ort-fp16-graph"),),
        comparisons=(
            _ratio(f"{name}/ort-fp16-graph", f"{name}/compile-fp16-nhwc", 2 * compiled),
            _ratio(f"{name}/ort-fp16-nhwc-graph", f"{name}/compile-fp16-nhwc", compiled),
            _ratio(f"{name}/ort-fp16-graph", f"{name}/eager-tf32", eager),
            _ratio(f"{name}/ort-fp16-graph", f"{name}/eager-fp32", eager / 2),
            _ratio(f"{name}/ort-fp16-graph", f"{name}/compile-fp16-nhwc", large, batch=32),
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("compiled", "eager", "large", "verdicts"),
    [
        (0.99, 0.32, 1.08, ["holds"] * 3),
        (1.02, 1 / 3, 1 / 0.9, ["undecided"] * 3),  # within 2 % of each, which is what their intervals hold
        (1.05, 0.35, 1.15, ["does not hold"] * 3),
        (0.5, 0.1, 0.5, ["holds"] * 3),
    ],
)
def test_figures_of_speed(compiled: float, eager: float, large: float, verdicts: list[str]) -> None:
    figures = judge(_speed(compiled, eager, large))
    speed = [one for one in figures if one.figure.startswith("cspdarknet53: ort-cuda")]
    strict = speed.pop(2)  # twice as slow without TF32, which nobody has who sets nothing
    assert [one.verdict for one in speed] == verdicts
    assert "ort-fp16-nhwc-graph" in speed[0].detail  # the faster layout
    assert "at least 3x eager FP32 with TF32 as in use (eager-tf32)" in speed[1].figure
    assert ("TF32 off (eager-fp32)" in strict.figure, strict.verdict) == (True, "measured")
    assert strict.detail.startswith(f"{2 / eager:.2f}x as fast")


def test_nothing_measured_is_no_pass_and_says_why() -> None:
    rows = (_row("cspdarknet53", "ort-fp16-graph", p50_ms=None, reason="no CUDA provider"),)
    for result in (_result(), _result(rows=rows)):
        figures = judge(result)
        assert {one.verdict for one in figures} == {"not measured"}
    first = next(one for one in judge(_result(rows=rows)) if one.figure.startswith("cspdarknet53: ort-cuda"))
    assert first.detail == "no CUDA provider"


@pytest.mark.parametrize(
    ("rel_l2", "bad_run", "verdict"), [(0.009, 0, "holds"), (0.011, 0, "does not hold"), (0.009, 2, "does not hold")]
)
def test_figure_of_fp16(rel_l2: float, bad_run: int, verdict: str) -> None:
    parity = Parity(network="resnet50", regime="ort-fp16", limit=FP16_LIMIT, rel_l2=rel_l2, first_bad_run=bad_run)
    result = _result(rows=(_row("resnet50", "ort-fp16"),), parity=(parity,))
    figure = next(one for one in judge(result) if one.figure.startswith("resnet50: FP16"))
    assert (figure.verdict, figure.speed) == (verdict, False)


@pytest.mark.parametrize(
    ("agreement", "images", "verdict"),
    [
        (0.995, "test images of Fashion-MNIST", "holds"),
        (0.9949, "test images of Fashion-MNIST", "does not hold"),
        (1.0, "calibration images", "not measured"),
    ],
)
def test_figure_of_agreement(agreement: float, images: str, verdict: str) -> None:
    rows = (Parity(network="x", regime="ort-fp16", num_images=512, images=images, top1_agreement=agreement),)
    figure = next(one for one in judge(_result(parity=rows)) if "top-1 agreement" in one.figure)
    assert figure.verdict == verdict


# 17.5 % or more off, beyond the two points that the placement in memory is good for and beyond the interval.
@pytest.mark.parametrize(
    ("ratio", "verdict"), [(0.785, "holds"), (0.815, "undecided"), (0.82, "undecided"), (0.87, "does not hold")]
)
@pytest.mark.parametrize("regime", ["eager-tf32", "eager-fp16"])
def test_the_claim_of_18_percent_is_judged_regime_by_regime(ratio: float, verdict: str, regime: str) -> None:
    rows = tuple(_row(name, regime) for pair in ("resnet50", "darknet53") for name in (f"csp{pair}", pair))
    result = _result(rows=rows, comparisons=(
        _ratio(f"cspresnet50/{regime}", f"resnet50/{regime}", ratio),
        _ratio(f"cspdarknet53/{regime}", f"darknet53/{regime}", ratio),
    ))  # fmt: skip
    found = {one.figure: one for one in judge(result)}
    claim = found[f"cspresnet50 instead of resnet50, {regime}, batch 1: 18 % less time on a GPU (web articles)"]
    assert (claim.verdict, claim.detail[:7]) == (verdict, f"{100 * (ratio - 1):+.1f} %")
    other = "cspresnet50 instead of resnet50, ort-fp16, batch 32: 18 % less time on a GPU (web articles)"
    assert found[other].verdict == "not measured"
    assert not any("eager-fp32" in title and "instead of" in title for title in found)  # nobody has TF32 off


def test_what_is_published_of_a_large_batch_is_judged_at_one() -> None:
    ratios = [_ratio("cspresnet50/eager-fp16", "resnet50/eager-fp16", 0.7, batch) for batch in (1, 32)]
    result = _result(rows=(_row("cspresnet50", "eager-fp16"),), comparisons=tuple(ratios))
    timm = {one.figure.partition(":")[0]: one.verdict for one in judge(result) if "timm" in one.figure}
    assert timm == {"cspresnet50 instead of resnet50, eager-fp16, batch 32": "holds"}


@pytest.mark.parametrize("ratio", [0.785, 0.795, 0.81, 0.82, 0.83, 0.845, 0.87, 1.1])
def test_the_benchmark_and_compare_judge_alike(ratio: float) -> None:
    """The same time on both tables never has two verdicts."""
    one = _ratio("cspresnet50/eager-fp16", "resnet50/eager-fp16", ratio, 32)
    ours = [figure.verdict for figure in judge(_result(rows=(_row("cspresnet50", "eager-fp16"),), comparisons=(one,)))
            if "cspresnet50 instead of resnet50, eager-fp16, batch 32" in figure.figure]  # fmt: skip
    timing = Timing(p50_ms=1.0, p95_ms=1.0, ci_low_ms=1.0, ci_high_ms=1.0, num_runs=1, verdict="reference", ratio=1.0,
                    samples_ms=(1.0,))  # fmt: skip
    row = LatencyRow(
        runtime="torch-cuda", artifact="eager", variant="fp16", precision="fp16", batch=32, engine="", verdict="faster",
        ratio=one.ratio, ratio_low=one.low, ratio_high=one.high, a=timing, b=timing,
    )  # fmt: skip
    claims = [one for one in CLAIMS if one.subject == "time" and one.network == "cspresnet50"]
    assert ours == [judge_time(claim, (row,)).verdict for claim in claims]
    assert len(ours) == 2


def test_claims_are_judged_in_regimes_that_compare_has() -> None:
    """Set alike, so that both time the same thing; among them the one in which the 18 % were published."""
    regimes = {one.name: one for one in REGIMES["cuda"]}
    assert "torch-cuda eager fp16" in {regimes[name].compared_as for name in CLAIM_REGIMES}
    for name in (*CLAIM_REGIMES, COMPILED, EAGER):
        assert regimes[name].tf32, name
        assert regimes[name].compared_as
        assert not regimes[name].extra
    assert not any(one.tf32 for one in REGIMES["cuda"] if one.limit == FP32_LIMIT)  # numbers are without
    assert not regimes[REFERENCE].tf32


# --- files ---


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    result = _speed(1.0, 0.3, 1.0)
    result = dataclasses.replace(result, figures=judge(result))
    write_result(tmp_path / "new" / "cuda.json", result)
    assert read_result(tmp_path / "new" / "cuda.json") == result
    data = json.loads((tmp_path / "new" / "cuda.json").read_text())
    for change in ({"schema_version": 99}, {"speed": 1}):
        (tmp_path / "bad.json").write_text(json.dumps(data | change))
        with pytest.raises(InputError):
            read_result(tmp_path / "bad.json")


def test_results_of_two_calls_are_one() -> None:
    out = "not measured: out of time"
    first = _result(
        rows=(_row("a", "x"), _row("a", "x", 32, None, out), _row("b", "x")),
        comparisons=(_ratio("a/x", "a/y", 0.5), _ratio("b/x", "b/y", 0.5)),
    )  # fmt: skip
    second = _result(
        rows=(_row("a", "x", 32, 2.0), _row("b", "x", 1, 3.0), _row("b", "y", 1, 4.0), _row("a", "x", 1, None, out)),
        comparisons=(_ratio("b/x", "b/y", 0.75),),
    )  # fmt: skip
    found = merge_results(first, second)
    assert {(one.network, one.regime, one.batch): one.p50_ms for one in found.rows} == {
        ("a", "x", 1): 1.0, ("a", "x", 32): 2.0, ("b", "x", 1): 3.0, ("b", "y", 1): 4.0
    }  # fmt: skip
    assert {one.subject: one.ratio for one in found.comparisons} == {"a/x": 0.5, "b/x": 0.75}


@pytest.mark.parametrize("fact", ["gpu", "gpu_driver", "torch"])
def test_results_of_two_machines_are_never_one(fact: str) -> None:
    with pytest.raises(InputError, match=fact):
        merge_results(_result(), _result(facts=FACTS | {fact: "another"}))
    with pytest.raises(InputError, match="expected the same"):
        merge_results(_result(), _result("cpu"))


def test_a_page_holds_every_row_and_what_it_lacks() -> None:
    rows = (_row("cspdarknet53", "ort-fp16"), _row("cspdarknet53", "trt-fp16", 1, None, "no | TensorRT"))
    page = markdown(_result(rows=rows, remarks=("onnxsim is not installed",)))
    assert "| ONNX Runtime CUDA FP16 | 1.000 (1.000 to 1.000) |" in page
    assert "| ONNX Runtime TensorRT FP16 | not measured |" in page
    assert "no \\| TensorRT" in page
    assert "- onnxsim is not installed" in page
    assert NO_CUDA not in page
