from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from cspdeploy.cli.render import NARROWEST_TABLE, print_renderable
from cspdeploy.core.results import Timing
from cspdeploy.pipeline.claims import CLAIMS, Claim
from cspdeploy.pipeline.compare import ComparedSide, CompareReport, Quantity, Regime
from cspdeploy.pipeline.pair_latency import LatencyRow
from cspdeploy.pipeline.paper import ClaimResult, PaperReport
from cspdeploy.pipeline.sides import AccuracyPair, CurvePoint, KnownAccuracy, TrainingPair, TrainingRun
from cspdeploy.pipeline.time_claims import RegimeVerdict
from cspdeploy.report.compare import render_comparison, render_paper


def _text(renderable: RenderableType, *, width: int = NARROWEST_TABLE) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _line(text: str, start: str) -> str:
    """The one line that starts so, its spaces made single."""
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return " ".join(line.split())


def _side(given: str, *, untrained: bool = False) -> ComparedSide:
    return ComparedSide(
        given=given, kind="network", name=given, family="cspnet", num_classes=1000, own_size_px=(256, 256),
        weights="random, UNTRAINED" if untrained else "", untrained=untrained,
    )  # fmt: skip


def _timing(p50_ms: float) -> Timing:
    return Timing(
        p50_ms=p50_ms, p95_ms=p50_ms, ci_low_ms=p50_ms, ci_high_ms=p50_ms, num_runs=30, verdict="reference", ratio=1.0,
        samples_ms=(p50_ms,),
    )  # fmt: skip


TIMED = LatencyRow(
    runtime="ort-cpu", artifact="onnx", precision="fp32", batch=8, engine="onnxruntime 1.31.1, 2 threads",
    verdict="slower", ratio=1.2345, ratio_low=1.2, ratio_high=1.25, a=_timing(10.0), b=_timing(12.345),
)  # fmt: skip
NOT_TIMED = LatencyRow(
    runtime="ort-cuda", artifact="onnx", precision="fp32", batch=8, engine="", verdict="not-measured",
    reason="out of memory [8 GB]",
)  # fmt: skip
RUN = TrainingRun(
    dataset="fashion-mnist/train", size_px=(32, 32), num_images=60000, epochs=14, recipe={"batch": 128}, seconds=7200.0,
    last_epochs=(CurvePoint(epoch=14, train_loss=0.621, test_top1=0.9337),),
)  # fmt: skip


def _accuracy(top1: float, source: str) -> KnownAccuracy:
    return KnownAccuracy(top1=top1, top5=0.95, dataset="d/test", num_images=100, size_px=(32, 32), source=source)


def _report(**fields: Any) -> CompareReport:
    values: dict[str, Any] = {
        "a": _side("csp"), "b": _side("base"),
        "quantities": (
            Quantity(name="parameters", kind="count", a=27_642_184, b=41_609_928, ratio=1.5053),
            Quantity(name="MACs", kind="count", a=6_533_700_000, b=9_285_000_000, ratio=1.4211),
            Quantity(name="peak activation memory", kind="bytes", a=20_971_520, b=12_582_912, ratio=0.6),
        ),
        "accuracy": AccuracyPair(a=None, b=None, comparable=False, reason="no accuracy of csp and base is known"),
        "training": None, "latency": (), "notes": (), "warnings": (),
        "regime": Regime(
            size_px=(256, 192), size_from="as asked", layout="NCHW", batches=(1, 8), min_runs=20, min_seconds=1.0,
            environment={"cpu": "a CPU", "system": "Linux"},
        ),
    }  # fmt: skip
    return CompareReport(**{**values, **fields})


def test_one_row_a_quantity() -> None:
    text = _text(render_comparison(_report()))
    assert _line(text, "A csp") == "A csp against B base at 256x192 px"
    assert _line(text, "parameters") == "parameters 27,642,184 41,609,928 1.505"
    assert _line(text, "MACs") == "MACs, GMAC 6.534 9.285 1.421"
    assert _line(text, "peak") == "peak activation memory 21.0 MB 12.6 MB 0.600"
    assert _line(text, "accuracy") == "accuracy: no accuracy of csp and base is known"
    assert _line(text, "size") == "size: 256x192 px, as asked"
    assert "latency" not in text
    assert "top-1" not in text


def test_latency_with_its_interval_its_verdict_and_its_regime() -> None:
    text = _text(render_comparison(_report(latency=(TIMED, NOT_TIMED), a=_side("csp", untrained=True))))
    assert _line(text, "ort-cpu onnx") == "ort-cpu onnx, batch 8 10.00 ms 12.35 ms 1.234 (1.200 to 1.250) slower"
    assert _line(text, "ort-cuda onnx") == "ort-cuda onnx, batch 8 not measured: out of memory [8 GB]"
    assert "NCHW" in _line(text, "latency:")
    assert "at least 20 runs and 1 s" in _line(text, "latency:")
    assert _line(text, "ort-cpu: ") == "ort-cpu: onnxruntime 1.31.1, 2 threads, fp32"
    assert "a CPU" in _line(text, "machine:")
    assert "UNTRAINED" in _line(text, "A csp is")
    assert "B base is" not in text


def test_variant_stands_in_its_row_and_its_note_below() -> None:
    graph = dataclasses.replace(
        TIMED, runtime="ort-cuda", artifact="onnx-fp16", variant="cuda-graph", note="captured [once]", tf32=True,
        engine="onnxruntime-gpu 1.31.1, GPU 0, TF32 on", inputs="rotated: 64 sets, 50 MB", device_ratio=0.9,
        device_ratio_low=0.88, device_ratio_high=0.92, a_device_ms=1.0, b_device_ms=0.9,
    )  # fmt: skip
    text = _text(render_comparison(_report(latency=(TIMED, graph))))
    assert "10.00 ms 12.35 ms" in _line(text, "ort-cuda onnx-fp16 cuda-graph, batch 8")
    assert _line(text, "  between events") == "between events 1.00 ms 0.90 ms 0.900 (0.880 to 0.920)"
    assert _line(text, "cuda-graph: ") == "cuda-graph: captured [once]"
    assert _line(text, "inputs rotated") == "inputs rotated: 64 sets, 50 MB"
    assert "TF32 on" in _line(text, "ort-cuda: ")


def test_every_precision_of_a_runtime_is_said() -> None:
    half = dataclasses.replace(TIMED, artifact="onnx-fp16", precision="fp16")
    text = _text(render_comparison(_report(latency=(TIMED, half))))
    assert _line(text, "ort-cpu: ") == "ort-cpu: onnxruntime 1.31.1, 2 threads, fp32 and fp16"


def test_accuracy_of_both() -> None:
    pair = AccuracyPair(a=_accuracy(0.9, "recorded"), b=_accuracy(0.885, "recorded"), comparable=True, reason="")
    text = _text(render_comparison(_report(accuracy=pair)))
    assert _line(text, "top-1") == "top-1 90.00 % 88.50 % -1.50 points"
    assert _line(text, "accuracy: A") == "accuracy: A: d/test, 100 images at 32x32 px, recorded"


def test_difference_that_is_not_the_networks_says_so_beside_the_number() -> None:
    pair = AccuracyPair(
        a=_accuracy(0.772, "published: one"), b=_accuracy(0.8, "published: two"), comparable=True,
        reason="by different training",
    )  # fmt: skip
    text = _text(render_comparison(_report(accuracy=pair)))
    assert _line(text, "top-1") == "top-1 77.20 % 80.00 % +2.80 points not by the network alone"


def test_accuracy_that_cannot_be_compared() -> None:
    pair = AccuracyPair(
        a=_accuracy(0.9, "recorded"),
        b=_accuracy(0.8, "published: x"),
        comparable=False,
        reason="not comparable: d and e",
    )
    text = _text(render_comparison(_report(accuracy=pair)))
    assert _line(text, "top-1") == "top-1 90.00 % 80.00 % not comparable"
    assert "not comparable: d and e" in text
    pair = dataclasses.replace(pair, b=None, reason="no accuracy of base is known")
    assert _line(_text(render_comparison(_report(accuracy=pair))), "top-1") == "top-1 90.00 %"


def test_training_budget() -> None:
    pair = TrainingPair(a=RUN, b=RUN, equal_budget=True, differences=())
    text = _text(render_comparison(_report(training=pair)))
    assert _line(text, "B  ") == "B fashion-mnist/train 32x32 60,000 14 2.0 0.621, 93.37 %"
    assert _line(text, "equal budget") == "equal budget: batch 128"
    pair = TrainingPair(a=RUN, b=RUN, equal_budget=False, differences=("epochs: 14 and 3",))
    text = _text(render_comparison(_report(training=pair)))
    assert _line(text, "not an equal budget") == "not an equal budget: epochs: 14 and 3"


# --- the claims ---

CLAIM = Claim(
    pair="CSP against base", text="weights of csp", source="README", subject="conv weights", published=20.5,
    tolerance=0.005, network="csp", remark="of the plain form",
)  # fmt: skip
CHANGE = dataclasses.replace(
    CLAIM, text="20 % less", subject="BFLOPs", published=-20.0, baseline="base", bound="at-most", size_px=224
)


def _paper(*results: ClaimResult, **fields: Any) -> PaperReport:
    return PaperReport(**{"results": results, "latency": {}, "warnings": (), "environment": {}, **fields})


def test_claims_with_their_verdicts() -> None:
    text = _text(
        render_paper(
            _paper(
                ClaimResult(claim=CLAIM, measured=20.4991, verdict="holds"),
                ClaimResult(claim=CHANGE, measured=-7.94, verdict="does not hold", detail="as measured"),
                ClaimResult(
                    claim=dataclasses.replace(CHANGE, text="in text", baseline="", baseline_figure=9.74, remark=""),
                    measured=None, verdict="not measurable here", detail="as measured",
                ),
            )
        )
    )  # fmt: skip
    assert _line(text, "weights of csp") == "weights of csp README 20.50 M 20.499 M csp at 256 holds [1]"
    assert _line(text, "20 % less") == "20 % less README -20 % or beyond -7.9 % csp / base at 224 does not hold [2, 1]"
    assert "csp / 9.74 BFLOPs at 224" in _line(text, "in text")
    assert _line(text, "in text").endswith("not measurable here [2]")
    assert _line(text, "[1]") == "[1] of the plain form"
    assert _line(text, "[2]") == "[2] as measured"
    assert text.splitlines()[-1] == "holds: 1, does not hold: 1, undecided: 0, not measurable here: 1"


def test_time_and_accuracy_claims() -> None:
    time = dataclasses.replace(CHANGE, text="faster too", subject="time", published=0.0)
    top1 = Claim(
        pair="CSP against base", text="top-1 76.6 % against 75.8 %", source="README", subject="top-1", published=0.8,
        tolerance=0.05, unmeasurable="no data",
    )  # fmt: skip
    report = _paper(
        ClaimResult(claim=time, measured=18.0, verdict="does not hold", detail="slower"),
        ClaimResult(claim=top1, measured=None, verdict="not measurable here", detail="no data"),
        latency={"CSP against base": (TIMED,)}, environment={"cpu": "a CPU"}, warnings=("noise",),
    )  # fmt: skip
    text = _text(render_paper(report))
    assert _line(text, "faster too").startswith("faster too README faster +18.0 % csp / base at 224 does not hold")
    assert "+0.8 points" in _line(text, "top-1 76.6")
    assert _line(text, "ort-cpu: ") == "ort-cpu: onnxruntime 1.31.1, 2 threads, fp32"
    assert _line(text, "warning") == "warning: noise"


def _regime(regime: str, verdict: Any, change: float | None, **fields: Any) -> RegimeVerdict:
    ms = {} if change is None else {"a_ms": 2.0, "b_ms": 1.6, "low": change - 1, "high": change + 1}
    return RegimeVerdict(
        regime=regime, batch=32, precision="fp16", verdict=verdict, change=change, **{**ms, **fields}
    )  # fmt: skip


def test_claim_on_times_has_a_table_of_its_regimes() -> None:
    time = dataclasses.replace(CHANGE, text="18 % less time", subject="time", published=-18.0, device="cuda")
    regimes = (
        _regime("torch-cuda eager fp16", "holds", -21.0, device_change=-22.5, a_device_ms=1.9, b_device_ms=1.47),
        _regime("ort-cuda onnx-fp16 cuda-graph", "does not hold", -2.0, claimed=False),
        _regime("ort-cuda onnx nhwc", "not measured", None, reason="out of memory"),
    )
    result = ClaimResult(
        claim=time, measured=-21.0, verdict="holds", detail="in one", regime="torch-cuda eager fp16, batch 32",
        regimes=regimes,
    )  # fmt: skip
    text = _text(render_paper(_paper(result, latency={"CSP against base": (TIMED,)})))
    assert "csp / base at 224, torch-cuda eager fp16, batch 32" in _line(text, "18 % less time  ")
    assert _line(text, "18 % less time: ") == "18 % less time: csp / base at 224 px, regime by regime"
    assert _line(text, "torch-cuda eager fp16") == (
        "torch-cuda eager fp16 32 2.000 1.600 -21.0 % (-22.0 to -20.0) 1.900, 1.470 -22.5 % holds"
    )
    assert _line(text, "ort-cuda onnx-fp16").endswith("-2.0 % (-3.0 to -1.0) does not hold, not what was claimed")
    assert _line(text, "ort-cuda onnx nhwc") == "ort-cuda onnx nhwc 32 not measured: out of memory"
    assert "regime by regime" not in _text(
        render_paper(_paper(dataclasses.replace(result, regimes=regimes[2:], regime="", measured=None)))
    )


def test_real_claims_fit_into_a_log() -> None:
    results = [ClaimResult(claim=claim, measured=-29.6, verdict="not measurable here") for claim in CLAIMS]
    text = _text(render_paper(_paper(*results)))
    assert "…" not in text
    assert all(pair in text for pair in ("CSPDarknet53 against Darknet53", "CSPPeleeNet against PeleeNet"))


# --- terminals ---


@pytest.mark.parametrize("width", [1, 8, 20, 40, 79])
def test_narrow_terminal_does_not_crash(width: int) -> None:
    pair = TrainingPair(a=RUN, b=RUN, equal_budget=True, differences=())
    for part in (
        render_comparison(_report(latency=(TIMED, NOT_TIMED), training=pair, warnings=("noise",))),
        render_paper(_paper(ClaimResult(claim=CLAIM, measured=None, verdict="undecided"))),
    ):
        assert max(len(line) for line in _text(part, width=width).splitlines()) <= max(width, 8)


def test_names_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_renderable(render_comparison(_report(a=_side("models/[bold]x"), notes=("[/n]",), warnings=(":cat:",))))
    text = capsys.readouterr().out
    assert all(word in text for word in ("models/[bold]x", "[/n]", ":cat:"))
