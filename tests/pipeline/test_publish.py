from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from cspdeploy.core.bundle import check_hashes, read_manifest
from cspdeploy.core.errors import InputError
from cspdeploy.core.results import ParityRow, VerifyReport
from cspdeploy.core.timings import read_timings
from cspdeploy.pipeline.publish import publish_report


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))


def _report(bundle: Path) -> VerifyReport:
    row = ParityRow(
        bundle=str(bundle), artifact="onnx", runtime="ort-cpu", verdict="pass", rel_l2=3e-7, limit=6e-6, num_images=20
    )
    return VerifyReport(
        verdict="pass", first_break="", noise_floor={str(bundle): 4e-7}, untrained=(), rows=(row,), warnings=(),
        environment={"cpu": "a CPU"},
    )  # fmt: skip


@pytest.mark.slow
def test_the_error_along_the_layers_of_each_onnx_file_is_drawn(bundle: Path) -> None:
    page = publish_report(bundle, _report(bundle)).read_text(encoding="utf-8")
    assert "Signal to noise by layer" in page
    assert "onnx-fp16 on " in page
    assert "against the original in float64" in page
    assert "Signal to noise by layer" not in publish_report(bundle, _report(bundle), layers=False).read_text()


@pytest.mark.slow
def test_a_file_that_cannot_be_traced_leaves_a_line_and_the_rest_of_the_page(bundle: Path) -> None:
    (bundle / "tiny.fp16.onnx").write_bytes(b"garbage")
    page = publish_report(bundle, _report(bundle)).read_text(encoding="utf-8")
    assert "No error along the layers of onnx-fp16" in page
    assert "One artifact does what the original network does" in page


def test_a_file_that_crashed_its_engine_is_not_traced_here(bundle: Path) -> None:
    good = _report(bundle)
    rows = tuple(
        dataclasses.replace(good.rows[0], artifact=kind, verdict="crash", reason="SIGSEGV")
        for kind in ("onnx", "onnx-fp16")
    )
    said: list[str] = []
    publish_report(
        bundle, dataclasses.replace(good, verdict="fail", rows=rows),
        progress=lambda what, done, total: said.append(what),
    )  # fmt: skip
    assert said == ["report"]


def test_a_verified_bundle(bundle: Path) -> None:
    said: list[str] = []
    path = publish_report(bundle, _report(bundle), layers=False, progress=lambda what, done, total: said.append(what))
    page = path.read_text(encoding="utf-8")
    assert path == bundle / "report.html"
    assert "One artifact does what the original network does" in page
    assert "report" in said


def test_a_bundle_that_nobody_verified(bundle: Path) -> None:
    page = publish_report(bundle).read_text(encoding="utf-8")
    assert "Not verified" in page
    assert "<svg" not in page


def test_the_page_changes_nothing_that_the_manifest_describes(bundle: Path) -> None:
    publish_report(bundle)
    first = (bundle / "report.html").read_bytes()
    publish_report(bundle, _report(bundle), layers=False)
    assert (bundle / "report.html").read_bytes() != first
    check_hashes(bundle, read_manifest(bundle))


def test_what_verify_timed_lies_beside_the_page(bundle: Path) -> None:
    """For a device to compare itself with. A report without timings takes them away: they were of other files."""
    good = _report(bundle)
    row = dataclasses.replace(good.rows[0], p50_ms=3.5)
    other = dataclasses.replace(row, bundle="another", p50_ms=7.0)
    publish_report(bundle, dataclasses.replace(good, rows=(row, other)), layers=False)
    found, remark = read_timings(bundle)
    assert remark == ""
    assert found is not None
    assert found.machine == "a CPU"
    assert [(one.artifact, one.runtime, one.p50_ms) for one in found.rows] == [("onnx", "ort-cpu", 3.5)]
    check_hashes(bundle, read_manifest(bundle))
    publish_report(bundle)  # verified nothing, and so says nothing of the timings
    assert read_timings(bundle)[0] == found
    publish_report(bundle, good, layers=False)  # untimed, but compared: what it came to is recorded
    untimed, _ = read_timings(bundle)
    assert untimed is not None
    assert [(one.p50_ms, one.rel_l2) for one in untimed.rows] == [(None, row.rel_l2) for row in good.rows]
    nothing = tuple(dataclasses.replace(row, rel_l2=None) for row in good.rows)
    publish_report(bundle, dataclasses.replace(good, rows=nothing), layers=False)
    assert not (bundle / "timings.json").exists()


def test_a_failure_is_on_the_page(bundle: Path) -> None:
    good = _report(bundle)
    row = dataclasses.replace(good.rows[0], verdict="crash", reason="SIGSEGV", rel_l2=None, limit=None)
    report = dataclasses.replace(good, verdict="fail", first_break="x", rows=(row,))
    page = publish_report(bundle, report, layers=False).read_text(encoding="utf-8")
    assert "onnx on ort-cpu is the first to break: engine crashed" in page
    assert "SIGSEGV" in page


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json"):
        publish_report(tmp_path)


def test_a_bundle_without_golden_outputs(bundle: Path) -> None:
    (bundle / "golden.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="not a golden file"):
        publish_report(bundle)
