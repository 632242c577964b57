"""A report for the readers of JUnit files: CI servers show each row as a test."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from xml.etree import ElementTree as ET

from cspdeploy.core.results import ParityRow, Regression, VerifyReport
from cspdeploy.report.sessions import settings_words

__all__ = ["junit_xml"]

# XML 1.0 knows no other control characters, not even escaped: https://www.w3.org/TR/xml/#charsets
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ENGINE_FAILED = ("crash", "hang", "error")
_NOT_JUDGED = ("not-checkable", "not-checked")


def junit_xml(report: VerifyReport) -> str:
    """The report as JUnit XML: a suite a bundle, a case a row, and a suite for the comparison with an older bundle.

    A row that is out of its limits is a failure, one whose engine died, hung or raised an error; one that cannot be
    checked here is skipped. Figures are properties of the case. No case has a `time`: what was measured is the latency
    of the artifact, not the duration of a test.
    """
    root = ET.Element("testsuites", name="cspdeploy verify")
    for bundle in dict.fromkeys(row.bundle for row in report.rows):
        suite = ET.SubElement(root, "testsuite", name=_clean(bundle))
        properties = {
            "verdict": report.verdict, "first_break": report.first_break, "untrained": bundle in report.untrained,
            "noise_floor": report.noise_floor.get(bundle), **report.environment,
        }  # fmt: skip
        _add_properties(suite, properties)
        for row in report.rows:
            if row.bundle == bundle:
                _add_row(suite, row)
        if report.notes:
            ET.SubElement(suite, "system-out").text = _clean("\n".join(report.notes))
        if report.warnings:
            ET.SubElement(suite, "system-err").text = _clean("\n".join(report.warnings))
    if report.regressions:
        suite = ET.SubElement(root, "testsuite", name=_clean(f"against {report.against}"))
        for found in report.regressions:
            _add_regression(suite, found)
    for suite in root:
        _count(suite, suite.iter("testcase"))
    _count(root, root.iter("testcase"))
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _add_row(suite: ET.Element, row: ParityRow) -> None:
    case = _add_case(suite, artifact=row.artifact, runtime=row.runtime, group=row.bundle)
    timing = row.timing
    figures = {
        "verdict": row.verdict, "num_bytes": row.num_bytes or None, "rel_l2": row.rel_l2, "limit": row.limit,
        "max_abs": row.max_abs, "sqnr_db": row.sqnr_db, "top1_agreement": row.top1_agreement,
        "top5_agreement": row.top5_agreement, "box_recall": row.box_recall, "box_precision": row.box_precision,
        "num_boxes": row.num_boxes, "num_images": row.num_images or None, "top1": row.top1, "top5": row.top5,
        "map50": row.map50, "map": row.map, "tf32_rel_l2": row.tf32_rel_l2, "rounding_rel_l2": row.rounding_rel_l2,
        "repeats": row.repeats.num_runs if row.repeats else None,
        "repeats_different": row.repeats.num_different if row.repeats else None,
        "repeats_max_rel_l2": row.repeats.max_rel_l2 if row.repeats else None,
        "settings": settings_words(row) or None, "events_p50_ms": row.events_p50_ms,
        "p50_ms": row.p50_ms, "p95_ms": row.p95_ms, "latency": timing.verdict if timing else None,
        "ratio": timing.ratio if timing else None, "note": row.note or None,
    }  # fmt: skip
    _add_properties(case, figures)
    _add_outcome(case, row.verdict, row.reason, failed=row.failed)


def _add_regression(suite: ET.Element, found: Regression) -> None:
    case = _add_case(suite, artifact=found.artifact, runtime=found.runtime, group=suite.get("name", ""))
    figures = {
        "verdict": found.verdict, "old_verdict": found.old_verdict, "new_verdict": found.new_verdict,
        "rel_l2": found.rel_l2, "top1_agreement": found.top1_agreement, "same_boxes": found.same_boxes,
        "old_bytes": found.old_bytes, "new_bytes": found.new_bytes, "latency": found.latency or None,
        "ratio": found.ratio,
    }  # fmt: skip
    _add_properties(case, figures)
    _add_outcome(case, found.verdict, found.reason, failed=found.verdict in ("worse", "gone"))


def _add_case(suite: ET.Element, *, artifact: str, runtime: str, group: str) -> ET.Element:
    # Readers make a tree of the dots in a class name, so that those of a path must not be dots.
    classname = _clean(group).strip("/").replace(".", "_").replace("/", ".")
    return ET.SubElement(suite, "testcase", classname=classname, name=_clean(f"{artifact} on {runtime}"))


def _add_properties(element: ET.Element, values: Mapping[str, object]) -> None:
    """Those that are there. Numbers as Python writes them, so that none is rounded."""
    present = {name: value for name, value in values.items() if value is not None and value != ""}
    if present:
        parent = ET.SubElement(element, "properties")
        for name, value in present.items():
            ET.SubElement(parent, "property", name=_clean(name), value=_clean(str(value)))


def _add_outcome(case: ET.Element, verdict: str, reason: str, *, failed: bool) -> None:
    message = _clean(f"{verdict}: {reason}" if reason else verdict)
    if verdict in _NOT_JUDGED:
        ET.SubElement(case, "skipped", message=message)
    elif failed:
        kind = "error" if verdict in _ENGINE_FAILED else "failure"
        ET.SubElement(case, kind, message=message, type=verdict).text = message


def _count(element: ET.Element, cases: Iterable[ET.Element]) -> None:
    found = list(cases)
    element.set("tests", str(len(found)))
    for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        element.set(attribute, str(sum(case.find(tag) is not None for case in found)))


def _clean(text: str) -> str:
    """Without characters that an XML file cannot hold."""
    return _NOT_XML.sub("\ufffd", text)
