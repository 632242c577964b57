"""`verify` on a good bundle, and what its report says as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cspdeploy.check.ladder import VerifySettings, verify_bundles
from cspdeploy.check.latency import LatencySettings
from cspdeploy.core.codec import to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import read_golden

SHORT = LatencySettings(
    min_runs=5, min_seconds=0.0, min_rounds=1, warmup_runs=1, warmup_seconds=0.0, max_warmup_seconds=0.0,
    lead_in_seconds=0.0, burst=1,
)  # fmt: skip
GARBAGE = b"this was never an ONNX file"


def test_good_bundle_passes_on_every_rung(tiny_bundle: Path, ladder: Any) -> None:
    report = ladder.verify(tiny_bundle)
    assert report.verdict == "pass"
    assert report.first_break == ""
    assert report.untrained == ()
    assert set(ladder.verdicts(report).values()) == {"pass"}
    assert list(ladder.verdicts(report))[:6] == [
        ("preprocess", "shared"), ("eager", "torch-cpu"), ("torchscript", "torchscript-cpu"), ("onnx", "ort-cpu"),
        ("onnx-fp16", "fp16-rounding"), ("onnx-fp16", "ort-cpu"),
    ]  # fmt: skip
    num_images = len(read_golden(tiny_bundle / "golden.npz").images)
    for row in report.rows[1:]:
        assert row.num_images == num_images
        assert row.rel_l2 is not None
        assert row.limit is not None
        assert row.rel_l2 <= row.limit
        assert row.rel_l2 < (1e-2 if row.artifact == "onnx-fp16" else 1e-5)
        assert row.top1_agreement is not None
        assert row.p50_ms is None
    floor = report.noise_floor[str(tiny_bundle)]
    assert 0 < floor < 1e-5
    assert "onnxruntime" in report.environment


def test_fp16_on_the_cpu_says_what_it_does_not_prove(tiny_bundle: Path, ladder: Any) -> None:
    report = ladder.verify(tiny_bundle, "ort-cpu", "fp16-rounding")
    assert "FP32" in ladder.row(report, "onnx-fp16", "ort-cpu").note
    assert ladder.row(report, "onnx", "ort-cpu").note == ""
    rounded, computed = (ladder.row(report, "onnx-fp16", name).rel_l2 for name in ("fp16-rounding", "ort-cpu"))
    assert rounded is not None
    assert computed is not None
    assert rounded != computed  # results are rounded too, not the weights alone
    assert rounded > 100 * report.noise_floor[str(tiny_bundle)]


def test_placement_is_in_the_row(tiny_bundle: Path, ladder: Any) -> None:
    row = ladder.row(ladder.verify(tiny_bundle, "ort-cpu"), "onnx", "ort-cpu")
    assert list(row.placement) == ["CPUExecutionProvider"]
    assert row.placement["CPUExecutionProvider"] > 5


def test_runtimes_that_were_asked_for_and_no_others(tiny_bundle: Path, ladder: Any) -> None:
    assert list(ladder.verdicts(ladder.verify(tiny_bundle, "torchscript-cpu"))) == [
        ("preprocess", "shared"), ("torchscript", "torchscript-cpu"),
    ]  # fmt: skip


def test_two_bundles_in_one_report(tiny_bundle: Path, bundle: Path, ladder: Any) -> None:
    (bundle / "tiny.onnx").write_bytes(GARBAGE)
    ladder.rehash(bundle)
    report = verify_bundles(
        [tiny_bundle, bundle], VerifySettings(runtimes=("ort-cpu",), latency=None, isolate=False, audit=False)
    )
    failed = [row for row in report.rows if row.failed]
    assert [(row.bundle, row.artifact) for row in failed] == [(str(bundle), "onnx")]
    assert report.verdict == "fail"
    assert report.first_break.startswith(f"{bundle}: onnx on ort-cpu: ")
    assert set(report.noise_floor) == {str(tiny_bundle), str(bundle)}


def test_progress_names_what_is_done(tiny_bundle: Path) -> None:
    seen: list[str] = []
    settings = VerifySettings(runtimes=("ort-cpu",), latency=None, isolate=False, audit=False)
    verify_bundles([tiny_bundle], settings, progress=lambda what, done, total: seen.append(what))
    assert seen == ["tiny: onnx on ort-cpu", "tiny: onnx-fp16 on ort-cpu"]


@pytest.mark.parametrize("batch", [1, 3, 10, 16])
def test_fixed_batch_is_filled_up(make_mean_bundle: Callable[[int], Path], batch: int, ladder: Any) -> None:
    row = ladder.row(ladder.verify(make_mean_bundle(batch), "ort-cpu"), "onnx", "ort-cpu")
    assert row.verdict == "pass"
    assert row.num_images == 10


def test_untrained_is_told(bundle: Path, ladder: Any) -> None:
    ladder.edit(bundle, lambda data: data["spec"]["provenance"].update(source="random"))
    assert ladder.verify(bundle, "ort-cpu").untrained == (str(bundle),)


# --- what the report says as a whole ---


def test_first_break_names_the_other_runtimes_and_counts_the_rest(bundle: Path, ladder: Any) -> None:
    for file in ("tiny.onnx", "tiny.fp16.onnx"):
        (bundle / file).write_bytes(GARBAGE)
    ladder.rehash(bundle)
    report = ladder.verify(bundle, "ort-cpu", "fp16-rounding")
    assert report.first_break.startswith(f"{bundle}: onnx on ort-cpu: ")
    assert report.first_break.endswith("; 2 further rows fail")
    ladder.edit(bundle, lambda data: data.update(artifacts=data["artifacts"][2:]))
    for file in ("tiny.onnx", "tiny.torchscript.pt"):
        (bundle / file).unlink()
    report = ladder.verify(bundle, "ort-cpu", "fp16-rounding")
    assert report.first_break.startswith(f"{bundle}: onnx-fp16 on ")
    assert report.first_break.endswith("; it breaks on fp16-rounding too")


def test_next_step_is_to_find_the_node(bundle: Path, ladder: Any) -> None:
    assert ladder.verify(bundle, "ort-cpu").settings["next_step"] == ""
    ladder.edit_convolution(bundle / "tiny.onnx", ladder.negate_largest)
    ladder.rehash(bundle)
    report = ladder.verify(bundle, "ort-cpu")
    assert report.settings["next_step"] == f"cspdeploy blame {bundle}/tiny.onnx --runtime ort-cpu"


def test_no_node_is_to_blame_for_a_file_that_does_not_open(bundle: Path, ladder: Any) -> None:
    (bundle / "tiny.onnx").write_bytes(GARBAGE)
    ladder.rehash(bundle)
    assert ladder.verify(bundle, "ort-cpu").settings["next_step"] == ""


def test_report_tells_how_it_was_made(tiny_bundle: Path, ladder: Any) -> None:
    report = ladder.verify(tiny_bundle, "ort-cpu", tolerances={"onnx-fp16": 0.02, "": 0.5}, time_limit_s=7.0)
    assert report.settings["tolerances"] == {"onnx-fp16": 0.02, "*": 0.5}
    assert (report.settings["time_limit_s"], report.settings["latency"]) == (7.0, None)
    phases = report.settings["phase_seconds"]
    assert {"open", "run", "compare", "preprocess"} <= set(phases)
    assert sum(phases.values()) <= report.settings["seconds"]
    json.dumps(to_json(report), allow_nan=False)


# --- limits and decisions in the rows ---


def test_rows_hold_their_limits_errors_and_decisions(tiny_bundle: Path, ladder: Any) -> None:
    golden = read_golden(tiny_bundle / "golden.npz")
    expected = golden.outputs_fp64["logits"].argmax(axis=1)
    for row in ladder.verify(tiny_bundle).rows[1:]:
        (limit,) = row.limits
        assert (limit.output, limit.rel_l2, limit.overridden) == ("logits", row.limit, False)
        assert limit.terms["noise_floor"] > 0
        assert row.sqnr_db == pytest.approx(-20 * np.log10(row.rel_l2))
        assert sum(row.error_histogram) == golden.outputs_fp64["logits"].size
        assert len(row.decisions) == row.num_images == len(expected)
        agree = [decision.index == index for decision, index in zip(row.decisions, expected, strict=True)]
        assert row.top1_agreement == np.mean(agree)


def test_fp16_model_is_neither_vacuous_nor_short(tiny_bundle: Path, ladder: Any) -> None:
    """Where every result is really rounded, the error is of the size that the model expects."""
    row = ladder.row(ladder.verify(tiny_bundle, "fp16-rounding"), "onnx-fp16", "fp16-rounding")
    assert row.limit / 16 < row.rel_l2 < row.limit / 2


def test_given_tolerance_decides_and_is_told(tiny_bundle: Path, ladder: Any) -> None:
    report = ladder.verify(tiny_bundle, "ort-cpu", tolerances={"onnx-fp16": 1e-9})
    broken, held = ladder.row(report, "onnx-fp16", "ort-cpu"), ladder.row(report, "onnx", "ort-cpu")
    assert (broken.verdict, broken.limit, broken.limits[0].overridden) == ("numeric", 1e-9, True)
    assert "given with --tolerance" in broken.reason
    assert (held.verdict, held.limits[0].overridden) == ("pass", False)


def test_tolerance_without_a_name_is_for_all_but_the_named(tiny_bundle: Path, ladder: Any) -> None:
    report = ladder.verify(tiny_bundle, "ort-cpu", tolerances={"": 0.5, "onnx-fp16": 0.25})
    assert [row.limit for row in report.rows[1:]] == [0.5, 0.25]


def test_tolerance_for_an_artifact_that_is_not_there(tiny_bundle: Path, ladder: Any) -> None:
    with pytest.raises(InputError, match="no such artifact"):
        ladder.verify(tiny_bundle, "ort-cpu", tolerances={"onnx-fp61": 0.5})
