"""Whether the installed packages fit together, from what they say of themselves."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from typing import Any

from cspdeploy.check.doctor_cuda import GPU_WHEELS, check_cuda, release
from cspdeploy.check.doctor_facts import CudaMachine
from cspdeploy.check.finding import Finding
from cspdeploy.core.catalog import MAX_IR_VERSION, MAX_OPSET
from cspdeploy.core.env import package_version

__all__ = ["check_packages", "engine_distributions"]

# Each of them installs the module onnxruntime, over that of any other.
_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn",
                 "onnxruntime-rocm", "onnxruntime-migraphx", "onnxruntime-training", "ort-nightly",
                 "ort-nightly-gpu")  # fmt: skip
_NUMPY_ABI = re.compile(r"numpy.*(multiarray|_ARRAY_API|ABI|compiled using)|dtype size changed", re.IGNORECASE)
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)[^;]*?>=\s*([0-9.]+)")

Answer = Mapping[str, Any]


def engine_distributions() -> list[str]:
    """Installed packages that bring the module onnxruntime."""
    return [name for name in _ONNXRUNTIMES if package_version(name)]


def check_packages(trials: Mapping[str, Answer], *, machine: CudaMachine) -> list[Finding]:
    """What is wrong, worst first: one wheel over another, a broken one, versions that do not fit.

    Args:
        trials: answers of `cspdeploy.check.trials.run_trials`.
        machine: what there is of an NVIDIA GPU.
    """
    installed = engine_distributions()
    return [
        *_overwritten(installed, trials.get("engine:onnxruntime", {})),
        *_broken_engines(trials, installed),
        *_too_old(),
        *_format(trials.get("format", {}), installed),
        *check_cuda(trials, installed, machine),
    ]


def _overwritten(installed: list[str], engine: Answer) -> list[Finding]:
    extra = "gpu" if any(name in GPU_WHEELS for name in installed) else "cpu"
    command = f"pip uninstall -y {' '.join(installed)} && pip install 'cspdeploy[{extra}]'"
    if len(installed) > 1:
        text = f"{' and '.join(installed)} are both installed and overwrite each other"
        return [Finding(severity="problem", text=text, command=command)]
    listed = package_version(installed[0]) if installed else None
    loaded = engine.get("version")
    if listed and loaded and release(listed) != release(loaded):
        text = f"{installed[0]} is listed as {listed}, its files are of {loaded}: another was installed over it"
        return [Finding(severity="problem", text=text, command=command)]
    return []


def _broken_engines(trials: Mapping[str, Answer], installed: list[str]) -> list[Finding]:
    found = []
    for name in ("onnxruntime", "openvino", "torch", "onnx"):
        answer = trials.get(f"engine:{name}", {"works": True})
        if answer["works"]:
            continue
        package = installed[0] if name == "onnxruntime" and installed else name
        command = f"pip install --force-reinstall {package}"
        text = f"{name} cannot be imported: {answer['reason']}"
        if _NUMPY_ABI.search(answer["reason"]):
            command = f"pip install --upgrade {package}"
            text = f"{package} was built for another numpy than {package_version('numpy')}: {answer['reason']}"
        found.append(Finding(severity="problem", text=text, command=command))
    return found


def _too_old() -> list[Finding]:
    """Packages below the version that cspdeploy asks for; nothing where it runs from a checkout."""
    try:
        required = importlib.metadata.requires("cspdeploy") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for line in required:
        match = _REQUIREMENT.match(line)
        version = package_version(match[1]) if match else None
        if match and version and release(version) < release(match[2]):
            text = f"{match[1]} {version} is older than {match[2]}, which cspdeploy needs"
            found.append(Finding(severity="problem", text=text, command=f"pip install '{match[1]}>={match[2]}'"))
    return list(dict.fromkeys(found))


def _format(answer: Answer, installed: list[str]) -> list[Finding]:
    if not answer or answer["works"]:
        return []
    text = f"this onnxruntime does not read IR {MAX_IR_VERSION} with opset {MAX_OPSET}: {answer['reason']}"
    command = f"pip install --upgrade {installed[0] if installed else 'onnxruntime'}"
    return [Finding(severity="problem", text=text, command=command)]
