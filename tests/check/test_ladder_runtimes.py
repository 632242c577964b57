"""`verify` where an engine or a device is not here."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import cspdeploy.check.rungs
from cspdeploy.check.ladder import VerifySettings, verify_bundles
from cspdeploy.check.latency import LatencySettings
from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import SessionRequest

CUDA = "CUDAExecutionProvider"
SHORT = LatencySettings(
    min_runs=5, min_seconds=0.0, min_rounds=1, warmup_runs=1, warmup_seconds=0.0, max_warmup_seconds=0.0,
    lead_in_seconds=0.0, burst=1,
)  # fmt: skip


def _hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """As if `packages` were not installed, for all who ask before they import."""
    find = importlib.util.find_spec

    def find_others(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        return None if name in packages else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_others)


def test_without_torch_its_rows_are_not_checkable_rather_than_passed(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, ladder: Any
) -> None:
    _hide(monkeypatch, "torch")
    report = ladder.verify(tiny_bundle, latency=SHORT)
    verdicts = ladder.verdicts(report)
    assert verdicts["eager", "torch-cpu"] == verdicts["torchscript", "torchscript-cpu"] == "not-checkable"
    assert verdicts["onnx", "ort-cpu"] == verdicts["onnx-fp16", "ort-cpu"] == "pass"
    assert report.verdict == "pass"
    row = ladder.row(report, "torchscript", "torchscript-cpu")
    assert "torch is not installed" in row.reason
    assert (row.rel_l2, row.top1_agreement, row.p50_ms) == (None, None, None)


def test_without_any_runtime_nothing_is_proven(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, ladder: Any) -> None:
    _hide(monkeypatch, "torch", "onnxruntime", "onnx")
    with pytest.raises(InputError, match="nothing could be checked"):
        ladder.verify(tiny_bundle)


def test_runtime_that_reads_no_artifact_of_the_bundle(bundle: Path, ladder: Any) -> None:
    ladder.edit(bundle, lambda data: data.update(artifacts=data["artifacts"][:2]))
    (bundle / "tiny.fp16.onnx").unlink()
    with pytest.raises(InputError, match="nothing could be checked"):
        ladder.verify(bundle, "fp16-rounding")


def test_no_bundle_is_not_a_pass() -> None:
    with pytest.raises(InputError, match="nothing could be checked"):
        verify_bundles([], VerifySettings())


def test_device_that_was_asked_for_and_is_not_here(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, ladder: Any
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailableError) as caught:
        ladder.verify(tiny_bundle, "ort-cuda")
    assert caught.value.exit_code == 3


def _pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is thought to have CUDA, and an engine that opens every session without it and says nothing."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    get_providers = onnxruntime.InferenceSession.get_providers

    def without_cuda(session: onnxruntime.InferenceSession) -> list[str]:
        return [name for name in get_providers(session) if name != CUDA]

    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", without_cuda)
    cuda = dataclasses.replace(all_runtimes()["ort-cuda"], missing=lambda: None)
    known = {**all_runtimes(), "ort-cuda": cuda}
    monkeypatch.setattr(cspdeploy.check.rungs, "require_runtime", known.__getitem__)
    monkeypatch.setattr(cspdeploy.check.rungs, "all_runtimes", lambda: known)


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_silent_fallback_of_a_runtime_that_was_asked_for(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, ladder: Any
) -> None:
    _pretend_cuda(monkeypatch)
    with pytest.raises(RuntimeUnavailableError, match=f"asked for {CUDA}, the session runs on CPU"):
        ladder.verify(tiny_bundle, "ort-cpu", "ort-cuda")


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_device_that_nobody_asked_for_does_not_stop_the_others(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, ladder: Any
) -> None:
    _pretend_cuda(monkeypatch)
    monkeypatch.delenv("CSPDEPLOY_RUNTIMES", raising=False)
    report = ladder.verify(tiny_bundle)
    verdicts = ladder.verdicts(report)
    assert verdicts["onnx", "ort-cpu"] == "pass"
    assert {verdict for (_, runtime), verdict in verdicts.items() if runtime == "ort-cuda"} == {"not-checkable"}
    assert report.verdict == "pass"


def test_gpu_that_is_busy_stops_those_who_asked_for_it_and_no_others(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, ladder: Any
) -> None:
    def open_(request: SessionRequest) -> Any:
        raise RuntimeUnavailableError("opening tiny.onnx: the GPU is busy", fix="nvidia-smi")

    known = {name: all_runtimes()[name] for name in ("ort-cpu", "ort-cuda")}
    known["ort-cuda"] = dataclasses.replace(known["ort-cuda"], missing=lambda: None, open=open_)
    monkeypatch.setattr(cspdeploy.check.rungs, "all_runtimes", lambda: known)
    monkeypatch.setattr(cspdeploy.check.rungs, "open_device", lambda index: None)
    monkeypatch.delenv("CSPDEPLOY_RUNTIMES", raising=False)
    row = ladder.row(ladder.verify(tiny_bundle), "onnx", "ort-cuda")
    assert (row.verdict, row.reason) == ("not-checkable", "opening tiny.onnx: the GPU is busy")
    with pytest.raises(RuntimeUnavailableError, match="the GPU is busy"):
        ladder.verify(tiny_bundle, device=0)
