"""What machine and which versions this is. Nothing here imports an engine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

__all__ = ["cpu_flags", "describe_environment", "num_usable_cpus", "package_version", "tool_versions"]

TOOLS = ("cspdeploy", "torch", "onnx", "onnxsim", "onnxruntime", "onnxruntime-gpu", "numpy", "pillow")
_NOTABLE_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
                  "asimddp", "fphp", "i8mm", "bf16")  # fmt: skip


def package_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def tool_versions() -> dict[str, str]:
    """Python and the installed packages that decide an artifact's bytes or speed."""
    versions = {name: version for name in TOOLS if (version := package_version(name))}
    return {"python": platform.python_version(), **versions}


def cpu_flags() -> tuple[str, ...]:
    """Instruction sets that matter for networks and that this CPU has, in a fixed order (Linux; else empty)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    line = next((row for row in text.splitlines() if row.startswith(("flags", "Features"))), "")
    present = set(line.partition(":")[2].split())
    return tuple(flag for flag in _NOTABLE_FLAGS if flag in present)


def _cpu_model() -> str:
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        rows = []
    named = (row.partition(":")[2].strip() for row in rows if row.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def num_usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def describe_environment() -> dict[str, str]:
    """One flat record for reports: system, CPU, load, versions."""
    load = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_flags": " ".join(cpu_flags()),
        "cpus": str(num_usable_cpus()),
        "load_1min": load,
        **tool_versions(),
    }
