"""What machine and which versions this is. Nothing here imports an engine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from cspdeploy.core.gpu_facts import describe_gpus
from cspdeploy.core.gpu_visible import see_gpus

__all__ = [
    "available_bytes", "clock_mhz", "cpu_flags", "cpu_governor", "cpu_model", "describe_environment",
    "num_usable_cpus", "other_machine",
    "package_version", "throttled_seconds", "tool_versions",
]  # fmt: skip

TOOLS = ("cspdeploy", "torch", "onnx", "onnxsim", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy", "pillow")
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


def cpu_model() -> str:
    """The processor as it names itself (Linux; elsewhere what Python knows of it, or "unknown")."""
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        rows = []
    named = (row.partition(":")[2].strip() for row in rows if row.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def other_machine(machine: str) -> str:
    """What to know of a file that an engine has optimised for the processor `machine`; empty where that is this one.

    Such a file may hold layouts or instructions that another processor has not: it is slower there, or does not run.
    """
    here = cpu_model()
    return "" if machine in ("", here) else f"optimised for another machine ({machine}; this is {here})"


def num_usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def clock_mhz() -> float | None:
    """Clock of the first usable CPU at this moment, or None where the system does not tell."""
    kilohertz = _read(_cpufreq() / "scaling_cur_freq").strip()
    if kilohertz.isdigit():
        return int(kilohertz) / 1e3
    rows = (row.partition(":")[2].strip() for row in _read(Path("/proc/cpuinfo")).splitlines() if "cpu MHz" in row)
    return next((float(value) for value in rows), None)


def cpu_governor() -> str:
    """What decides on the CPU's clock: "performance", "powersave", ...; empty where the system does not tell."""
    return _read(_cpufreq() / "scaling_governor").strip()


def _cpufreq() -> Path:
    cpu = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return Path(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq")


def _affinity() -> str:
    """The CPUs that this process may run on: "0-3 8"; empty where the system does not tell."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _cgroup_folder() -> Path:
    """Of this process in control groups version 2."""
    rows = (row.partition("::") for row in _read(Path("/proc/self/cgroup")).splitlines())
    name = next((path for number, _, path in rows if number == "0"), "/")
    folder = Path("/sys/fs/cgroup") / name.lstrip("/")
    return folder if (folder / "cpu.stat").is_file() else Path("/sys/fs/cgroup")  # a container sees its own as the root


def throttled_seconds() -> float:
    """How long a quota has kept this process's control group from running up to now; 0 without one."""
    for row in _read(_cgroup_folder() / "cpu.stat").splitlines():
        name, _, value = row.partition(" ")
        if name == "throttled_usec":
            return int(value) / 1e6
    return 0.0


def _cpu_quota() -> str:
    """CPUs that the control group may use at once, or "none"."""
    quota, _, period = _read(_cgroup_folder() / "cpu.max").strip().partition(" ")
    return f"{int(quota) / int(period):g}" if quota.isdigit() and period.isdigit() else "none"


def available_bytes() -> int | None:
    """Memory that can be had without swapping, or None where the system does not tell."""
    rows = (row.split() for row in _read(Path("/proc/meminfo")).splitlines())
    return next((1024 * int(row[1]) for row in rows if row and row[0] == "MemAvailable:"), None)


def _is_virtual() -> bool:
    return any(row.startswith("flags") and " hypervisor" in row for row in _read(Path("/proc/cpuinfo")).splitlines())


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _describe_visible_gpus() -> dict[str, str]:
    """Of the GPUs that CUDA shows to this process, in its order; empty where there is none."""
    seen = see_gpus()
    facts = describe_gpus(seen.gpus)
    return {**facts, "gpu_visible": seen.setting} if facts and seen.setting is not None else facts


def describe_environment() -> dict[str, str]:
    """One flat record for reports: system, CPU, what its speed depends on, load, GPU where there is one, versions."""
    load = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"
    mhz = clock_mhz()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "kernel": platform.release(),
        "virtual_machine": "yes" if _is_virtual() else "not seen",
        "cpu": cpu_model(),
        "cpu_flags": " ".join(cpu_flags()),
        "cpus": str(num_usable_cpus()),
        "cpu_affinity": _affinity(),
        "cpu_quota": _cpu_quota(),
        "cpu_governor": cpu_governor() or "unknown",
        "clock_mhz": f"{mhz:.0f}" if mhz else "unknown",
        "load_1min": load,
        **_describe_visible_gpus(),
        **tool_versions(),
    }
