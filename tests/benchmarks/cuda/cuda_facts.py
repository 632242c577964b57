"""What the machine is, which versions run, and what is missing: said before anything is measured."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from cspdeploy.core.env import describe_environment, package_version

__all__ = ["Package", "describe_run", "missing_packages", "remarks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One that the run imports. `needed`: nothing can be measured without it; else `without` says what is left out."""

    module: str
    name: str
    needed: bool = False
    without: str = ""


PACKAGES = (
    Package(module="numpy", name="numpy", needed=True),
    Package(module="PIL", name="pillow", needed=True),
    Package(module="torch", name="torch", needed=True),
    Package(module="onnx", name="onnx", needed=True),
    Package(module="safetensors", name="safetensors", needed=True),
    Package(module="onnxruntime", name="onnxruntime-gpu", without="no row of ONNX Runtime is measured"),
    Package(module="onnxsim", name="onnxsim", without="graphs are exported unsimplified"),
    Package(module="triton", name="triton", without="torch.compile cannot be measured"),
)
TEST_PACKAGES = (
    *(Package(module=name, name=name) for name in ("pytest", "hypothesis", "typer", "rich", "onnxscript")),
    Package(module="pytest_timeout", name="pytest-timeout"),
)
"""Of the tests alone: without one of them the tests are not run, and the benchmark is."""


def missing_packages(packages: tuple[Package, ...]) -> tuple[Package, ...]:
    """Those that are not installed here."""
    return tuple(one for one in packages if importlib.util.find_spec(one.module) is None)


def remarks(kind: str) -> list[str]:
    """What is left out, for what is missing or unfit; a line each."""
    told = [f"{one.name} is not installed: {one.without}" for one in missing_packages(PACKAGES)
            if not one.needed and (kind == "cuda" or one.module != "triton")]  # fmt: skip
    if package_version("onnxruntime") and package_version("onnxruntime-gpu"):
        told.append("onnxruntime and onnxruntime-gpu are both installed: which of them is imported is chance")
    return told


def describe_run() -> dict[str, str]:
    """The environment as reports have it, and the CUDA and cuDNN that PyTorch was built with. Opens no device."""
    import torch

    facts = describe_environment()
    if torch.version.cuda is not None:
        facts["torch_cuda"] = torch.version.cuda
        facts["torch_cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    for name in ("triton", "tensorrt", "nvidia-cudnn-cu13", "nvidia-cublas"):
        if version := package_version(name):
            facts[name] = version
    return facts
