from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from cspdeploy.core.results import ParityRow, Regression, Repeats, Timing, VerifyReport
from cspdeploy.report.junit import junit_xml

TIMING = Timing(p50_ms=2.0, ci_low_ms=1.9, ci_high_ms=2.1, num_runs=30, verdict="faster", ratio=1.5, samples_ms=(2.0,))


def _row(artifact: str, verdict: str, reason: str = "", **more: object) -> ParityRow:
    return ParityRow(
        bundle="exported/tiny.v2", artifact=artifact, runtime="ort-cpu", verdict=verdict, reason=reason, **more  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture
def report() -> VerifyReport:
    rows = (
        _row("onnx", "pass", rel_l2=1.25e-7, limit=3e-6, timing=TIMING, p50_ms=2.0),
        _row("onnx-fp16", "numeric", "relative L2 1.0e-01, limit 1.0e-02", rel_l2=0.1),
        _row("onnx-int8", "crash", "the engine died: \x1b[31mSIGSEGV\x00 <&>"),
        _row("torchscript", "not-checkable", "torch is not installed"),
    )
    return VerifyReport(
        verdict="fail", first_break="onnx-fp16 on ort-cpu", noise_floor={"exported/tiny.v2": 2e-7}, untrained=(),
        rows=rows, warnings=("noisy machine",), environment={"cpu": "x"},
    )  # fmt: skip


def _cases(root: ET.Element) -> dict[str, ET.Element]:
    return {case.get("name", ""): case for case in root.iter("testcase")}


def _properties(element: ET.Element) -> dict[str, str]:
    return {item.get("name", ""): item.get("value", "") for item in element.findall("properties/property")}


def test_one_case_a_row_with_its_outcome(report: VerifyReport) -> None:
    root = ET.fromstring(junit_xml(report))  # noqa: S314  # our own
    cases = _cases(root)
    outcomes = {
        name.split()[0]: [child.tag for child in case if child.tag != "properties"] for name, case in cases.items()
    }
    assert outcomes == {"onnx": [], "onnx-fp16": ["failure"], "onnx-int8": ["error"], "torchscript": ["skipped"]}
    failure = cases["onnx-fp16 on ort-cpu"].find("failure")
    assert failure is not None
    assert failure.get("message") == failure.text == "numeric: relative L2 1.0e-01, limit 1.0e-02"
    assert failure.get("type") == "numeric"
    assert {case.get("classname") for case in cases.values()} == {"exported.tiny_v2"}
    assert all(case.get("time") is None for case in cases.values())  # nothing here is the duration of a test


def test_counts(report: VerifyReport) -> None:
    root = ET.fromstring(junit_xml(report))  # noqa: S314
    for element in (root, root[0]):
        counts = [element.get(name) for name in ("tests", "failures", "errors", "skipped")]
        assert counts == ["4", "1", "1", "1"]


def test_figures_are_properties_as_they_were_measured(report: VerifyReport) -> None:
    root = ET.fromstring(junit_xml(report))  # noqa: S314
    found = _properties(_cases(root)["onnx on ort-cpu"])
    assert (float(found["rel_l2"]), found["p50_ms"], found["latency"], found["ratio"]) == (
        1.25e-7,
        "2.0",
        "faster",
        "1.5",
    )
    assert "max_abs" not in found  # nothing was measured
    suite = _properties(root[0])
    assert (suite["verdict"], suite["first_break"], suite["cpu"]) == ("fail", "onnx-fp16 on ort-cpu", "x")


def test_what_is_known_of_a_session_is_in_its_case(report: VerifyReport) -> None:
    repeats = Repeats(num_runs=10, num_different=3, max_rel_l2=1.5e-7)
    known: dict[str, Any] = {
        "repeats": repeats, "settings": {"tf32": "off"}, "rounding_rel_l2": 2e-4, "tf32_rel_l2": 3e-4,
        "events_p50_ms": 0.25,
    }  # fmt: skip
    row = dataclasses.replace(next(row for row in report.rows if row.rel_l2 == 1.25e-7), **known)
    root = ET.fromstring(junit_xml(dataclasses.replace(report, rows=(row,))))  # noqa: S314
    found = _properties(_cases(root)["onnx on ort-cpu"])
    assert (found["repeats"], found["repeats_different"], found["repeats_max_rel_l2"]) == ("10", "3", "1.5e-07")
    assert (found["settings"], found["events_p50_ms"]) == ("tf32 off", "0.25")
    assert (found["rounding_rel_l2"], found["tf32_rel_l2"]) == ("0.0002", "0.0003")


def test_what_xml_cannot_hold_is_replaced(report: VerifyReport) -> None:
    error = _cases(ET.fromstring(junit_xml(report)))["onnx-int8 on ort-cpu"].find("error")  # noqa: S314
    assert error is not None
    assert error.text == "crash: the engine died: \ufffd[31mSIGSEGV\ufffd <&>"


def test_regressions_are_a_suite_of_their_own(report: VerifyReport) -> None:
    found = (
        Regression(artifact="onnx", runtime="ort-cpu", verdict="worse", reason="slower", ratio=0.5, latency="slower"),
        Regression(artifact="onnx-fp16", runtime="ort-cpu", verdict="gone"),
        Regression(artifact="onnx-int8", runtime="ort-cpu", verdict="new"),
    )
    report = dataclasses.replace(report, against="old/tiny", regressions=found)
    root = ET.fromstring(junit_xml(report))  # noqa: S314
    assert [suite.get("name") for suite in root] == ["exported/tiny.v2", "against old/tiny"]
    assert [root[1].get(name) for name in ("tests", "failures")] == ["3", "2"]
    assert (root.get("tests"), root.get("failures")) == ("7", "3")


def test_a_common_reader_reads_it(report: VerifyReport, tmp_path: Path) -> None:
    junitparser = pytest.importorskip("junitparser")
    path = tmp_path / "junit.xml"
    path.write_text(junit_xml(report), encoding="utf-8")
    read = junitparser.JUnitXml.fromfile(str(path))
    assert (read.tests, read.failures, read.errors, read.skipped) == (4, 1, 1, 1)
    cases = {case.name: case for suite in read for case in suite}
    assert cases["onnx on ort-cpu"].is_passed
    assert cases["torchscript on ort-cpu"].is_skipped
    assert cases["onnx-fp16 on ort-cpu"].is_failure
    assert cases["onnx-int8 on ort-cpu"].is_error
