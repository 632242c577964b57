from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest

import cspdeploy
from cspdeploy.check import doctor
from cspdeploy.check.doctor import Diagnosis, diagnose
from cspdeploy.core.errors import RuntimeUnavailableError
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Runtime, Session, SessionRequest


def _runtime(name: str, *, probe: Callable[[], None] = lambda: None, missing: tuple[str, str] | None = None) -> Runtime:
    def refuse(request: SessionRequest) -> Session:
        raise AssertionError("doctor opens no artifact")

    return Runtime(
        name=name, device="cpu", formats=frozenset({"onnx"}), precisions=frozenset({"fp32"}), timed=True, notes={},
        missing=lambda: missing, probe=probe, open=refuse,
    )  # fmt: skip


def _diagnose(monkeypatch: pytest.MonkeyPatch, *runtimes: Runtime) -> Diagnosis:
    monkeypatch.setattr(doctor, "all_runtimes", lambda: {runtime.name: runtime for runtime in runtimes})
    return diagnose()


def _raise(error: Exception) -> Callable[[], None]:
    def probe() -> None:
        raise error

    return probe


def test_this_machine() -> None:
    found = diagnose()
    states = {state.name: state for state in found.runtimes}
    assert list(states) == list(all_runtimes())
    for name in ("torch-cpu", "torchscript-cpu", "ort-cpu", "fp16-rounding"):
        assert states[name].works, states[name]
        assert states[name].reason == states[name].fix == ""
        assert name in found.advice
    assert found.healthy
    assert found.environment["cpus"]


def test_absent_device_has_a_reason_and_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    state = next(state for state in diagnose().runtimes if state.name == "ort-cuda")
    assert not state.works
    assert "CUDAExecutionProvider" in state.reason
    assert "pip install" in state.fix


def test_installed_is_not_enough_it_must_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = RuntimeUnavailableError("asked for CUDA, the session runs on CPU", fix="cspdeploy doctor")
    found = _diagnose(
        monkeypatch,
        _runtime("good"),
        _runtime("fallback", probe=_raise(silent)),
        _runtime("broken", probe=_raise(OSError("libcudnn.so.9: cannot open shared object file"))),
        _runtime("absent", missing=("no such engine", "install it")),
    )
    assert {state.name: state.works for state in found.runtimes} == {
        "good": True, "fallback": False, "broken": False, "absent": False,
    }  # fmt: skip
    states = {state.name: state for state in found.runtimes}
    assert states["fallback"].reason == "asked for CUDA, the session runs on CPU"
    assert "libcudnn" in states["broken"].reason
    assert (states["absent"].reason, states["absent"].fix) == ("no such engine", "install it")
    for state in found.runtimes[1:]:
        assert state.fix
    assert found.healthy
    assert found.advice == "ready for good"


def test_failure_without_words_still_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    state = _diagnose(monkeypatch, _runtime("broken", probe=_raise(MemoryError()))).runtimes[0]
    assert not state.works
    assert "MemoryError" in state.reason


def test_no_runtime_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _diagnose(monkeypatch, _runtime("broken", probe=_raise(RuntimeError("no"))))
    assert not found.healthy
    assert "pip install 'cspdeploy[cpu]'" in found.advice


def test_two_packages_that_overwrite_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda name: "1.27.0")
    found = _diagnose(monkeypatch, _runtime("good"))
    assert not found.healthy
    assert "pip uninstall" in found.advice


def test_broken_installation_is_diagnosed_not_fatal(tmp_path: Path) -> None:
    """torch is there, but its libraries are not: the import itself fails, and for CUDA it comes before the probe."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        'raise OSError("libtorch_cpu.so: cannot open shared object file")\n'
    )
    root = Path(cspdeploy.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(root)))}
    done = subprocess.run(
        [sys.executable, "-m", "cspdeploy.cli.app", "doctor", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    states = {state["name"]: state for state in json.loads(done.stdout)["runtimes"]}
    assert states["ort-cpu"]["works"]
    for name in ("torch-cpu", "torch-cuda", "torchscript-cpu", "torchscript-cuda"):
        assert not states[name]["works"]
        assert "libtorch_cpu.so" in states[name]["reason"]
