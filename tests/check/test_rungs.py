from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import cspdeploy.check.rungs
from cspdeploy.check.rungs import RUNTIMES_VARIABLE, Rung, list_rungs
from cspdeploy.check.subject import bundle_subject
from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.cuda_driver import CudaDevice, Driver

CPU_RUNGS = [
    ("eager", "torch-cpu"),
    ("torchscript", "torchscript-cpu"),
    ("onnx", "ort-cpu"),
    ("onnx-fp16", "fp16-rounding"),
    ("onnx-fp16", "ort-cpu"),
]


def _rungs(folder: Path, *runtimes: str) -> list[Rung]:
    return list_rungs(bundle_subject(folder), runtimes=list(runtimes))


def _names(rungs: list[Rung]) -> list[tuple[str, str]]:
    return [(rung.candidate.artifact, rung.runtime.name) for rung in rungs]


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """As if `packages` were not installed, for all who ask before they import."""
    find = importlib.util.find_spec

    def find_others(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        return None if name in packages else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_others)


def test_ladder_is_complete_and_in_order(tiny_bundle: Path) -> None:
    rungs = [rung for rung in _rungs(tiny_bundle) if rung.runtime.device == "cpu"]
    assert _names(rungs) == CPU_RUNGS
    assert [rung.not_checkable for rung in rungs] == [""] * 5
    for rung in rungs:
        assert rung.request.path.is_file()
        assert rung.candidate.num_bytes == rung.request.path.stat().st_size
        assert rung.candidate.output_names == ("logits",)
        assert rung.candidate.precision == ("fp16" if "fp16" in rung.candidate.artifact else "fp32")


def test_batch_is_the_artifacts_own(tiny_bundle: Path) -> None:
    batches = {rung.candidate.artifact: rung.candidate.batch for rung in _rungs(tiny_bundle)}
    assert batches == {"eager": None, "torchscript": None, "onnx": 1, "onnx-fp16": 1}


def test_only_the_runtimes_that_were_asked_for(tiny_bundle: Path) -> None:
    assert _names(_rungs(tiny_bundle, "ort-cpu")) == [("onnx", "ort-cpu"), ("onnx-fp16", "ort-cpu")]
    assert _names(_rungs(tiny_bundle, "ort-cpu", "torch-cpu")) == [
        ("eager", "torch-cpu"), ("onnx", "ort-cpu"), ("onnx-fp16", "ort-cpu"),
    ]  # fmt: skip


def test_unknown_runtime(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="--runtime ort: unknown"):
        _rungs(tiny_bundle, "ort")


def test_reference_runtime_is_no_rung(tiny_bundle: Path) -> None:
    assert "onnx-fp64" not in [name for _, name in _names(_rungs(tiny_bundle))]
    with pytest.raises(InputError, match="--runtime onnx-fp64: computes what others are judged by"):
        _rungs(tiny_bundle, "onnx-fp64")


def test_absent_device_is_left_out_unless_asked_for(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "ort-cuda" not in [name for _, name in _names(_rungs(tiny_bundle))]
    with pytest.raises(RuntimeUnavailableError, match="ort-cuda"):
        _rungs(tiny_bundle, "ort-cpu", "ort-cuda")


def test_missing_engine_of_the_cpu_gives_rungs_that_say_so(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hide(monkeypatch, "torch")
    rungs = _rungs(tiny_bundle)
    assert _names(rungs) == CPU_RUNGS
    reasons = {rung.runtime.name: rung.not_checkable for rung in rungs}
    assert "torch is not installed" in reasons["torch-cpu"]
    assert "pip install 'cspdeploy[export]'" in reasons["torchscript-cpu"]
    assert reasons["ort-cpu"] == reasons["fp16-rounding"] == ""


def test_missing_engine_that_was_asked_for_is_an_error(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hide(monkeypatch, "torch")
    with pytest.raises(RuntimeUnavailableError, match="--runtime torchscript-cpu: torch is not installed"):
        _rungs(tiny_bundle, "torchscript-cpu")


# --- the weights of the eager rung ---


def _eager(folder: Path) -> Rung:
    return _rungs(folder, "torch-cpu")[0]


def test_weights_lie_where_the_export_found_them(bundle: Path, tiny_models: Path) -> None:
    assert _eager(bundle).request.path == tiny_models / "tiny" / "model.safetensors"


def test_weights_in_the_models_folder_beside(bundle: Path, tiny_models: Path) -> None:
    _edit(bundle, lambda data: data["options"].update(weights="/nowhere/model.safetensors"))
    assert _eager(bundle).not_checkable == "the weights that the bundle was made from are not here"
    shutil.copytree(tiny_models, bundle.parent.parent / "models")
    found = _eager(bundle)
    assert found.not_checkable == ""
    assert found.request.path == bundle.parent.parent / "models" / "tiny" / "model.safetensors"


def test_weights_in_the_models_folder_here(
    bundle: Path, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _edit(bundle, lambda data: data["options"].update(weights="random"))
    shutil.copytree(tiny_models, tmp_path / "here" / "models")
    monkeypatch.chdir(tmp_path / "here")
    assert _eager(bundle).request.path.samefile(tmp_path / "here" / "models" / "tiny" / "model.safetensors")


def test_other_bytes_are_not_the_weights(bundle: Path, tiny_models: Path, tmp_path: Path) -> None:
    """A model that was trained further must not pass for the one that was exported."""
    content = bytearray((tiny_models / "tiny" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "changed.safetensors").write_bytes(content)
    _edit(bundle, lambda data: data["options"].update(weights=str(tmp_path / "changed.safetensors")))
    assert "are not here" in _eager(bundle).not_checkable


def test_no_weights_without_a_hash(bundle: Path) -> None:
    _edit(bundle, lambda data: data["spec"]["provenance"].update(weights_sha256=""))
    assert "are not here" in _eager(bundle).not_checkable


# --- manifests that hold too little ---


def test_artifact_without_inputs(bundle: Path) -> None:
    _edit(bundle, lambda data: data["artifacts"][1].update(inputs=[]))
    with pytest.raises(InputError, match="manifest"):
        _rungs(bundle)


def test_artifact_whose_input_has_no_batch(bundle: Path) -> None:
    _edit(bundle, lambda data: data["artifacts"][1]["inputs"][0].update(shape=[]))
    with pytest.raises(InputError, match="manifest"):
        _rungs(bundle)


def test_no_artifact_at_all(bundle: Path) -> None:
    _edit(bundle, lambda data: data.update(artifacts=[]))
    with pytest.raises(InputError, match="manifest"):
        _rungs(bundle)


def test_environment_names_the_runtimes_that_are_meant(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUNTIMES_VARIABLE, "ort-cpu, fp16-rounding")
    assert {rung.runtime.name for rung in _rungs(tiny_bundle)} == {"ort-cpu", "fp16-rounding"}
    assert {rung.runtime.name for rung in _rungs(tiny_bundle, "torch-cpu")} == {"torch-cpu"}
    monkeypatch.setenv(RUNTIMES_VARIABLE, "ort-gpu")
    with pytest.raises(InputError, match="ort-gpu is unknown"):
        _rungs(tiny_bundle)


def test_optional_engine_that_is_not_here_is_not_missed(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUNTIMES_VARIABLE)
    assert ("onnx", "openvino") in _names(_rungs(tiny_bundle))
    _hide(monkeypatch, "openvino")
    assert ("onnx", "openvino") not in _names(_rungs(tiny_bundle))


# --- the GPU that was asked for ---


def test_a_gpu_without_any_runtime_that_uses_one(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUNTIMES_VARIABLE, "ort-cpu, ort-cuda")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailableError) as caught:
        list_rungs(bundle_subject(tiny_bundle), runtimes=[], device=0)
    assert caught.value.exit_code == 3
    assert caught.value.message.startswith("--device 0: no runtime on CUDA can be used here (ort-cuda: ")
    assert caught.value.fix


def test_a_gpu_for_runtimes_that_use_none(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="--device 1: ort-cpu, torch-cpu runs on no GPU"):
        list_rungs(bundle_subject(tiny_bundle), runtimes=["ort-cpu", "torch-cpu"], device=1)


class _TwoGpus:
    """What the driver's library says of how many GPUs there are, and no more."""

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return 0


def test_a_gpu_that_is_not_there_is_told_before_anything_is_opened(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = dataclasses.replace(all_runtimes()["ort-cuda"], missing=lambda: None)
    monkeypatch.setattr(cspdeploy.check.rungs, "require_runtime", lambda name: runtime)
    monkeypatch.setattr(
        cspdeploy.check.rungs, "open_device", lambda index: CudaDevice(index, driver=Driver(_TwoGpus()))
    )
    with pytest.raises(InputError) as caught:
        list_rungs(bundle_subject(tiny_bundle), runtimes=["ort-cuda"], device=5)
    assert caught.value.exit_code == 2
    assert caught.value.message == "--device 5: no such GPU, there are 2 (0 to 1)"


def test_the_index_is_in_the_requests_on_cuda_and_in_no_other(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = dataclasses.replace(all_runtimes()["ort-cuda"], missing=lambda: None)
    known = {**all_runtimes(), "ort-cuda": cuda}
    monkeypatch.setattr(cspdeploy.check.rungs, "require_runtime", known.__getitem__)
    monkeypatch.setattr(cspdeploy.check.rungs, "open_device", lambda index: None)
    rungs = list_rungs(bundle_subject(tiny_bundle), runtimes=["ort-cpu", "ort-cuda"], device=3)
    assert {(rung.runtime.name, rung.request.cuda.device) for rung in rungs} == {("ort-cpu", 0), ("ort-cuda", 3)}
    rungs = list_rungs(bundle_subject(tiny_bundle), runtimes=["ort-cuda"])
    assert {rung.request.cuda.device for rung in rungs} == {0}
