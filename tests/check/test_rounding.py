"""FP16 on a device that computes in FP16, against the reference that rounds after every node."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import cspdeploy.check.rounding
import cspdeploy.check.rungs
from cspdeploy.check.rounding import RoundingReference, computes_half
from cspdeploy.check.rung_check import run_all
from cspdeploy.check.settings import VerifySettings
from cspdeploy.check.subject import Candidate, Subject, bundle_subject
from cspdeploy.core.metrics import relative_l2
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Runtime, SessionRequest

REFERENCE = "fp16-rounding"


@pytest.fixture
def half_like(monkeypatch: pytest.MonkeyPatch) -> list[SessionRequest]:
    """ONNX Runtime on the CPU under the name and device of "ort-cuda"; gives the requests that the reference got."""
    cpu, reference = all_runtimes()["ort-cpu"], all_runtimes()[REFERENCE]
    runtime = dataclasses.replace(all_runtimes()["ort-cuda"], missing=lambda: None, open=cpu.open)
    requests: list[SessionRequest] = []

    def open_(request: SessionRequest) -> Any:
        requests.append(request)
        return reference.open(request)

    known = {**all_runtimes(), "ort-cuda": runtime, REFERENCE: dataclasses.replace(reference, open=open_)}
    monkeypatch.setattr(cspdeploy.check.rungs, "require_runtime", known.__getitem__)
    monkeypatch.setattr(cspdeploy.check.rounding, "all_runtimes", lambda: known)
    return requests


def _expected(folder: Path) -> float:
    subject = bundle_subject(folder)
    made = _half(subject)
    outputs = []
    for name in ("ort-cpu", REFERENCE):
        session: Any = all_runtimes()[name].open(SessionRequest(path=made.path))
        outputs.append(run_all(session, subject, made)["logits"])
    return relative_l2(*outputs)


def _half(subject: Subject) -> Candidate:
    return next(made for made in subject.candidates if made.precision == "fp16")


def test_distance_to_rounding_is_in_the_row(tiny_bundle: Path, half_like: list[SessionRequest], ladder: Any) -> None:
    report = ladder.verify(tiny_bundle, "ort-cuda")
    row = ladder.row(report, "onnx-fp16", "ort-cuda")
    assert row.rounding_rel_l2 == pytest.approx(_expected(tiny_bundle))
    assert row.rounding_rel_l2 > 1e-5
    assert ladder.row(report, "onnx", "ort-cuda").rounding_rel_l2 is None
    assert len(half_like) == 1


def test_the_rung_of_the_reference_computes_it_once_for_all(
    tiny_bundle: Path, half_like: list[SessionRequest], ladder: Any
) -> None:
    report = ladder.verify(tiny_bundle, REFERENCE, "ort-cuda")
    assert ladder.row(report, "onnx-fp16", "ort-cuda").rounding_rel_l2 == pytest.approx(_expected(tiny_bundle))
    assert ladder.row(report, "onnx-fp16", REFERENCE).rounding_rel_l2 is None
    assert len(half_like) == 1


def test_without_the_reference_the_row_says_why(
    tiny_bundle: Path, half_like: list[SessionRequest], ladder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = dataclasses.replace(all_runtimes()[REFERENCE], missing=lambda: ("onnx is not installed", ""))
    monkeypatch.setattr(cspdeploy.check.rounding, "all_runtimes", lambda: {**all_runtimes(), REFERENCE: gone})
    row = ladder.row(ladder.verify(tiny_bundle, "ort-cuda"), "onnx-fp16", "ort-cuda")
    assert (row.verdict, row.rounding_rel_l2) == ("pass", None)
    assert "not compared with FP16 rounding after every node: onnx is not installed" in row.note
    assert half_like == []


def test_a_reference_that_fails_is_no_fault_of_the_engine(
    tiny_bundle: Path, half_like: list[SessionRequest], ladder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_(request: SessionRequest) -> Any:
        raise ValueError("a graph that it does not know\nand more of it")

    broken = dataclasses.replace(all_runtimes()[REFERENCE], open=open_)
    monkeypatch.setattr(cspdeploy.check.rounding, "all_runtimes", lambda: {**all_runtimes(), REFERENCE: broken})
    row = ladder.row(ladder.verify(tiny_bundle, "ort-cuda"), "onnx-fp16", "ort-cuda")
    assert (row.verdict, row.rounding_rel_l2) == ("pass", None)
    assert row.note.endswith("every node: a graph that it does not know")


@pytest.mark.parametrize(
    ("name", "notes", "expected"),
    [("ort-cuda", {}, True), ("ort-cpu", {"fp16": "computed in FP32"}, False), ("ort-cpu", {}, True),
     (REFERENCE, {}, False)],
)  # fmt: skip
def test_who_computes_in_fp16(tiny_bundle: Path, name: str, notes: dict[str, str], expected: bool) -> None:
    subject = bundle_subject(tiny_bundle)
    runtime: Runtime = dataclasses.replace(all_runtimes()[name], notes=notes)
    assert computes_half(runtime, _half(subject)) is expected
    assert not computes_half(runtime, subject.candidates[0])


def test_outputs_that_nobody_will_ask_for_are_not_kept(tiny_bundle: Path) -> None:
    reference = RoundingReference(VerifySettings(isolate=False))
    made = _half(bundle_subject(tiny_bundle))
    asked: list[object] = []

    def run(session: object) -> Any:
        asked.append(session)
        return {}

    reference.keep(made, {"logits": bundle_subject(tiny_bundle).outputs_fp64["logits"]})
    reference.distance(made, {}, run)
    assert len(asked) == 1
