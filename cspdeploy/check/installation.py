"""Whether the installed packages fit together, from what they say of themselves."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cspdeploy.core.catalog import MAX_IR_VERSION, MAX_OPSET
from cspdeploy.core.env import package_version

__all__ = ["Finding", "check_packages", "engine_distributions"]

# Each of them installs the module onnxruntime, over that of any other.
_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn",
                 "onnxruntime-rocm", "onnxruntime-migraphx", "onnxruntime-training", "ort-nightly",
                 "ort-nightly-gpu")  # fmt: skip
_GPU = ("onnxruntime-gpu", "ort-nightly-gpu")
_NUMPY_ABI = re.compile(r"numpy.*(multiarray|_ARRAY_API|ABI|compiled using)|dtype size changed", re.IGNORECASE)
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)[^;]*?>=\s*([0-9.]+)")

Answer = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that contradicts itself or does not work (problem), or that is good to know (note)."""

    severity: Literal["problem", "note"]
    text: str
    command: str = ""
    """That mends it; empty where there is none."""


def engine_distributions() -> list[str]:
    """Installed packages that bring the module onnxruntime."""
    return [name for name in _ONNXRUNTIMES if package_version(name)]


def check_packages(trials: Mapping[str, Answer], *, has_gpu: bool) -> list[Finding]:
    """What is wrong, worst first: one wheel over another, a broken one, versions that do not fit.

    Args:
        trials: answers of `cspdeploy.check.trials.run_trials`.
        has_gpu: an NVIDIA GPU is in this machine.
    """
    installed = engine_distributions()
    return [
        *_overwritten(installed, trials.get("engine:onnxruntime", {})),
        *_broken_engines(trials, installed),
        *_too_old(),
        *_format(trials.get("format", {}), installed),
        *_cuda(trials, installed, has_gpu=has_gpu),
    ]


def _overwritten(installed: list[str], engine: Answer) -> list[Finding]:
    extra = "gpu" if any(name in _GPU for name in installed) else "cpu"
    command = f"pip uninstall -y {' '.join(installed)} && pip install 'cspdeploy[{extra}]'"
    if len(installed) > 1:
        text = f"{' and '.join(installed)} are both installed and overwrite each other"
        return [Finding(severity="problem", text=text, command=command)]
    listed = package_version(installed[0]) if installed else None
    loaded = engine.get("version")
    if listed and loaded and _release(listed) != _release(loaded):
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
        if match and version and _release(version) < _release(match[2]):
            text = f"{match[1]} {version} is older than {match[2]}, which cspdeploy needs"
            found.append(Finding(severity="problem", text=text, command=f"pip install '{match[1]}>={match[2]}'"))
    return list(dict.fromkeys(found))


def _format(answer: Answer, installed: list[str]) -> list[Finding]:
    if not answer or answer["works"]:
        return []
    text = f"this onnxruntime does not read IR {MAX_IR_VERSION} with opset {MAX_OPSET}: {answer['reason']}"
    command = f"pip install --upgrade {installed[0] if installed else 'onnxruntime'}"
    return [Finding(severity="problem", text=text, command=command)]


def _cuda(trials: Mapping[str, Answer], installed: list[str], *, has_gpu: bool) -> list[Finding]:
    works = bool(trials.get("runtime:ort-cuda", {}).get("works"))
    ours, theirs = (str(trials.get(f"engine:{name}", {}).get("cuda", "")) for name in ("onnxruntime", "torch"))
    differ = bool(ours and theirs) and ours.split(".")[0] != theirs.split(".")[0]
    versions = f"onnxruntime was built for CUDA {ours}, torch for CUDA {theirs}: they share no libraries"
    if works or not has_gpu or not installed:
        return [Finding(severity="note", text=versions)] if differ and has_gpu else []
    if not any(name in _GPU for name in installed):
        text = f"a GPU is here, but {installed[0]} has no CUDA; cspdeploy[gpu] in its place has"
        return [Finding(severity="note", text=text)]
    reason = trials.get("runtime:ort-cuda", {}).get("reason", "")
    text = f"a GPU is here, and onnxruntime-gpu does not run on it: {versions if differ else reason}"
    return [Finding(severity="problem", text=text, command="pip install --upgrade 'onnxruntime-gpu[cuda,cudnn]'")]


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without trailing zeros, suffixes of pre-releases and builds."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
