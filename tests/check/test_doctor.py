from __future__ import annotations

import importlib.metadata
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import cspdeploy
from cspdeploy.check import doctor_child, installation
from cspdeploy.check.cpu_features import explain_cpu
from cspdeploy.check.doctor import Diagnosis, diagnose, judge
from cspdeploy.check.doctor_child import try_provider, try_runtime
from cspdeploy.check.doctor_facts import CudaMachine
from cspdeploy.check.trials import run_trials
from cspdeploy.core.errors import RuntimeUnavailableError
from cspdeploy.report.files import render_diagnosis
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Runtime, Session, SessionRequest

ABI = "numpy.core.multiarray failed to import"
OK = {"works": True}


def _runtime(name: str, *, probe: Callable[[], None] = lambda: None, missing: tuple[str, str] | None = None) -> Runtime:
    def refuse(request: SessionRequest) -> Session:
        raise AssertionError("doctor opens no artifact")

    return Runtime(
        name=name, device="cpu", formats=frozenset({"onnx"}), precisions=frozenset({"fp32"}), timed=True, notes={},
        missing=lambda: missing, probe=probe, open=refuse, modules=("engine",),
    )  # fmt: skip


def _raise(error: Exception) -> Callable[[], None]:
    def probe() -> None:
        raise error

    return probe


def _judge(
    trials: dict[str, dict[str, Any]], *, gpu: bool = False, environment: dict[str, str] | None = None
) -> Diagnosis:
    machine = CudaMachine(device_files=("/dev/nvidia0",)) if gpu else CudaMachine()
    return judge(trials, environment=environment or {}, flags=("avx2",), machine=machine)


def _engine(version: str = "", *, cuda: str = "") -> dict[str, Any]:
    return {"works": True, "version": version or onnxruntime.__version__, "cuda": cuda, "providers": []}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions of installed packages; nothing else is installed. Changed by the test."""
    versions: dict[str, str] = {}
    monkeypatch.setattr(installation, "package_version", versions.get)
    return versions


# --- what a runtime or provider says of itself ---


def test_this_machine() -> None:
    found = diagnose()
    states = {state.name: state for state in found.runtimes}
    assert set(states) == set(all_runtimes())
    for name in ("torch-cpu", "torchscript-cpu", "ort-cpu", "fp16-rounding"):
        assert states[name].works, states[name]
        assert states[name].reason == states[name].fix == ""
    assert found.healthy
    assert found.command == ""
    assert all(name in found.advice for name in ("ready for", "ort-cpu", "torch-cpu"))
    assert found.environment["cpus"]
    providers = {state.name: state.works for state in found.providers}
    assert list(providers) == onnxruntime.get_available_providers()
    assert providers["CPUExecutionProvider"]
    assert not any(finding.severity == "problem" for finding in found.findings)


def test_installed_is_not_enough_it_must_compute() -> None:
    silent = RuntimeUnavailableError("asked for CUDA, the session runs on CPU", fix="cspdeploy doctor")
    assert try_runtime(_runtime("good")) == OK
    assert try_runtime(_runtime("fallback", probe=_raise(silent))) == {
        "works": False, "reason": "asked for CUDA, the session runs on CPU", "fix": "cspdeploy doctor",
    }  # fmt: skip
    broken = try_runtime(_runtime("broken", probe=_raise(OSError("libcudnn.so.9: cannot open\nand more"))))
    assert broken == {
        "works": False,
        "reason": "libcudnn.so.9: cannot open",
        "fix": "pip install --force-reinstall engine",
    }
    absent = try_runtime(_runtime("absent", missing=("no such engine", "install it")))
    assert absent == {"works": False, "reason": "no such engine", "fix": "install it"}


def test_failure_without_words_still_has_a_reason() -> None:
    assert try_runtime(_runtime("broken", probe=_raise(MemoryError())))["reason"] == "MemoryError"


def test_absent_device_has_a_reason_and_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    answer = try_runtime(all_runtimes()["ort-cuda"])
    assert "CUDAExecutionProvider" in answer["reason"]
    assert "pip install" in answer["fix"]


def test_provider_that_is_listed_must_take_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert try_provider("CPUExecutionProvider") == OK
    if "AzureExecutionProvider" in onnxruntime.get_available_providers():
        assert try_provider("AzureExecutionProvider")["works"] is False
    # Each wheel opens a session on the CPU when the provider that was asked for does not load.
    opened = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda model, options, providers: opened(model, options))
    answer = try_provider("CUDAExecutionProvider")
    assert answer["works"] is False
    assert "the session runs on" in answer["reason"]


def test_newest_format_that_exports_write_is_really_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_child._try_format() == OK
    monkeypatch.setattr(doctor_child, "MAX_IR_VERSION", 99)
    with pytest.raises(Exception, match="IR version"):
        doctor_child._try_format()


# --- broken wheels, in real processes ---


def _shadow(folder: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)


def test_wheel_that_crashes_is_contained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _shadow(
        tmp_path, monkeypatch, onnxruntime="import os\nos.abort()\n", torch="raise ImportError('libtorch.so: no')\n",
        openvino="raise ImportError('libopenvino.so: no')\n",
    )  # fmt: skip
    found = diagnose()
    assert not found.healthy
    states = {state.name: state for state in found.runtimes}
    assert set(states) == set(all_runtimes())
    assert not any(state.works for state in states.values())
    assert states["ort-cpu"].reason == "crashes its process (SIGABRT)"
    assert states["torch-cpu"].reason == "libtorch.so: no"
    assert states["openvino"].reason == "libopenvino.so: no"
    assert all(state.fix for state in states.values())
    assert found.providers == ()
    assert found.advice == "onnxruntime cannot be imported: crashes its process (SIGABRT)"
    assert found.command == "pip install --force-reinstall onnxruntime"
    assert [finding.severity for finding in found.findings[:2]] == ["problem", "problem"]


def test_wheel_for_another_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _shadow(tmp_path, monkeypatch, onnxruntime=f"raise ImportError('{ABI}')\n", torch="raise ImportError('no')\n")
    found = diagnose()
    assert found.advice.startswith("onnxruntime was built for another numpy than ")
    assert found.command == "pip install --upgrade onnxruntime"


def test_task_that_hangs_is_given_up_and_the_rest_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import json, sys, time\n"
        "known = json.load(sys.stdin)\n"
        "for name in ('first', 'hangs', 'last'):\n"
        "    if name in known: continue\n"
        "    print('noise of an engine'); print(3)\n"
        "    print(json.dumps({'started': name}), flush=True)\n"
        "    if name == 'hangs': time.sleep(1000)\n"
        "    print(json.dumps({'ended': name, 'answer': {'works': True}}), flush=True)\n"
    )
    found = run_trials([sys.executable, str(script)], time_limit_s=1.0)
    assert found == {
        "first": OK, "hangs": {"works": False, "reason": "does not answer within 1 s", "fix": ""}, "last": OK,
    }  # fmt: skip


def test_openvino_whose_files_are_broken_is_a_problem() -> None:
    broken = {"works": False, "reason": "libopenvino.so: cannot open", "fix": ""}
    found = _judge({"runtime:a": OK, "engine:openvino": broken})
    assert not found.healthy
    assert found.advice == "openvino cannot be imported: libopenvino.so: cannot open"
    assert found.command == "pip install --force-reinstall openvino"


def test_child_that_does_not_start_is_no_endless_loop() -> None:
    assert run_trials([sys.executable, "-c", "raise SystemExit(3)"]) == {}
    found = _judge({})
    assert not found.healthy
    assert found.advice == "no runtime works here"


# --- the verdict ---


def test_ready() -> None:
    found = _judge({"runtime:a": OK, "runtime:b": {"works": False, "reason": "no"}, "runtime:c": OK})
    assert (found.healthy, found.advice, found.command) == (True, "ready for a, c", "")
    assert [(state.name, bool(state.fix)) for state in found.runtimes] == [("a", False), ("b", True), ("c", False)]


def test_no_runtime_is_unhealthy() -> None:
    found = _judge({"runtime:a": {"works": False, "reason": "no", "fix": "install it"}})
    assert not found.healthy
    assert (found.advice, found.command) == ("no runtime works here", "pip install 'cspdeploy[cpu]'")


def test_two_packages_that_overwrite_each_other(packages: dict[str, str]) -> None:
    packages.update({"onnxruntime": "1.27.0", "onnxruntime-gpu": "1.27.0"})
    found = _judge({"runtime:a": OK})
    assert not found.healthy
    assert found.advice == "onnxruntime and onnxruntime-gpu are both installed and overwrite each other"
    assert found.command == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'cspdeploy[gpu]'"


def test_files_of_another_version_than_the_package(packages: dict[str, str]) -> None:
    packages["onnxruntime"] = "1.27.0"
    found = _judge({"runtime:a": OK, "engine:onnxruntime": _engine("1.31.1")})
    assert found.advice.startswith("onnxruntime is listed as 1.27.0, its files are of 1.31.1")
    packages["onnxruntime"] = "1.31.1"
    assert _judge({"runtime:a": OK, "engine:onnxruntime": _engine("1.31.1")}).healthy


def test_onnxruntime_that_is_too_old_for_the_format() -> None:
    found = _judge({"runtime:a": OK, "format": {"works": False, "reason": "Unsupported model IR version: 10"}})
    assert not found.healthy
    assert "does not read IR 10 with opset" in found.advice
    assert found.command.startswith("pip install --upgrade onnxruntime")


def test_package_below_its_lower_bound(packages: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["numpy>=1.26", 'torch>=2.6; extra == "export"', 'onnx>=1.17; extra == "export"', "rich"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    packages.update(numpy="1.26.0", torch="2.5.1+cu121", onnx="1.17.0rc1")
    found = _judge({"runtime:a": OK})
    assert [finding.text for finding in found.findings] == [
        "torch 2.5.1+cu121 is older than 2.6, which cspdeploy needs"
    ]
    assert found.command == "pip install 'torch>=2.6'"


@pytest.mark.parametrize(
    ("package", "works", "gpu", "torch_cuda", "healthy", "words"),
    [
        ("onnxruntime-gpu", False, True, "12.6", False, "does not run on it: libcudnn.so.9"),
        ("onnxruntime-gpu", False, True, "13.0", False, "built for CUDA 12.8, torch for CUDA 13.0"),
        ("onnxruntime-gpu", True, True, "13.0", True, "built for CUDA 12.8, torch for CUDA 13.0"),
        ("onnxruntime-gpu", True, True, "12.6", True, ""),
        ("onnxruntime-gpu", False, False, "", True, "no NVIDIA GPU is seen here"),
        ("onnxruntime", False, False, "", True, ""),
        ("onnxruntime", False, True, "", True, "a GPU is here, but onnxruntime has no CUDA"),
    ],
)
def test_gpu(
    packages: dict[str, str], package: str, works: bool, gpu: bool, torch_cuda: str, healthy: bool, words: str
) -> None:
    packages[package] = onnxruntime.__version__
    trials = {
        "engine:onnxruntime": _engine(cuda="12.8" if "gpu" in package else ""),
        "engine:torch": {"works": True, "version": "2.9", "cuda": torch_cuda},
        "runtime:ort-cpu": OK, "runtime:ort-cuda": OK if works else {"works": False, "reason": "libcudnn.so.9: no"},
    }  # fmt: skip
    found = _judge(trials, gpu=gpu)
    assert found.healthy is healthy
    told = [finding.text for finding in found.findings if "nvidia-smi is not on PATH" not in finding.text]
    assert any(words in text for text in told) is bool(words)
    assert bool(told) is bool(words)
    assert bool(found.command) is not healthy


def test_machine_that_is_too_busy_to_time_anything() -> None:
    found = _judge({"runtime:a": OK}, environment={"load_1min": "3.20", "cpus": "4", "cpu_governor": "powersave"})
    assert found.healthy
    assert [finding.text.partition(":")[0] for finding in found.findings] == [
        "busy", "the CPU's governor is 'powersave'",
    ]  # fmt: skip
    assert _judge({"runtime:a": OK}, environment={"load_1min": "0.5", "cpus": "4"}).findings == ()
    assert _judge({"runtime:a": OK}, environment={"load_1min": "unknown", "cpus": "4"}).findings == ()


def test_cpu_in_plain_words() -> None:
    found = {row.name: row for row in explain_cpu(("avx2", "avx_vnni"), machine="x86_64")}
    assert found["VNNI"].present
    assert "INT8 files can beat FP32" in found["VNNI"].meaning
    assert not found["AVX-512"].present
    arm = {row.name: row for row in explain_cpu(("asimddp",), machine="aarch64")}
    assert arm["NEON dot product"].present
    assert not arm["I8MM"].present
    assert explain_cpu((), machine="x86_64") == ()
    assert explain_cpu(("avx2",), machine="riscv64") == ()


def test_table_says_it_all() -> None:
    from rich.console import Console

    found = _judge({"runtime:a": OK, "provider:B": {"works": False, "reason": "falls back"}, "engine:torch": {
        "works": False, "reason": "libtorch: no"}})  # fmt: skip
    console = Console(width=200, file=io.StringIO())
    console.print(render_diagnosis(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(word in text for word in ("AVX2", "falls back", "torch cannot be imported: libtorch: no"))
    assert text.rstrip().endswith("fix: pip install --force-reinstall torch")


def test_works_where_nothing_is_installed() -> None:
    """No torch, no onnx, no engine: a table that says so, and no traceback."""
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "absent = ('torch', 'onnx', 'onnxruntime', 'openvino')\n"
        "u.find_spec = lambda name, *rest: None if name in absent else find(name, *rest)\n"
        "from cspdeploy.check import doctor_child; doctor_child.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cspdeploy.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, input="{}", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count('"works": false') == len(all_runtimes())
