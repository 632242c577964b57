"""Whether the installed engines fit this GPU, its driver, and each other's CUDA libraries."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cspdeploy.check.cuda_libraries import DRIVER_LIBRARIES, bringing_packages
from cspdeploy.check.doctor_driver import check_devices, check_driver, driver_command
from cspdeploy.check.doctor_facts import CudaMachine
from cspdeploy.check.finding import Finding, Severity
from cspdeploy.core.env import package_version

__all__ = ["GPU_WHEELS", "arch_runs", "check_cuda", "release"]

GPU_WHEELS = ("onnxruntime-gpu", "ort-nightly-gpu")

# Least driver of each CUDA on Linux, by table 2 ("CUDA Toolkit and Minimum Required Driver Version for CUDA Minor
# Version Compatibility") of the CUDA toolkit's release notes.
LEAST_DRIVER = {13: "580", 12: "525.60.13", 11: "450.80.02"}
# CUDA 13 has no kernels for Maxwell, Pascal and Volta any more (its release notes, "Deprecated Architectures").
LEAST_CAPABILITY = {13: (7, 5)}

_ARCH = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)$")
_LIBRARY = re.compile(r"(lib\w+\.so\.\d+)")

Answer = Mapping[str, Any]


def check_cuda(trials: Mapping[str, Answer], installed: list[str], machine: CudaMachine) -> list[Finding]:
    """What is missing for CUDA, the lowest layer first; nothing on a machine without a GPU that nobody meant for one.

    It is a problem where onnxruntime-gpu is installed and a GPU is here, and a note otherwise.

    Args:
        trials: answers of `cspdeploy.check.trials.run_trials`.
        installed: packages that bring the module onnxruntime.
    """
    wanted = any(name in GPU_WHEELS for name in installed)
    if not machine.has_gpu:
        return _no_gpu(trials, machine) if wanted else []
    works = _works(trials, "ort-cuda")
    severity: Severity = "problem" if wanted and not works else "note"
    any_works = any(_works(trials, name) for name in ("ort-cuda", "torch-cuda", "torchscript-cuda"))
    lowest = [] if any_works else check_driver(machine, severity=severity)
    found = [
        *lowest, *check_devices(machine, severity=severity), *_wheels(trials, installed, machine, severity),
    ]  # fmt: skip
    if wanted and not works and not any(one.severity == "problem" for one in found):
        reason = trials.get("runtime:ort-cuda", {}).get("reason", "it was not tried")
        text = f"a GPU is here, and onnxruntime-gpu does not run on it: {reason}"
        found.append(
            Finding(severity="problem", text=text, command="pip install --upgrade 'onnxruntime-gpu[cuda,cudnn]'")
        )
    return sorted(found, key=lambda one: one.severity != "problem")


def _works(trials: Mapping[str, Answer], runtime: str) -> bool:
    return bool(trials.get(f"runtime:{runtime}", {}).get("works"))


def _no_gpu(trials: Mapping[str, Answer], machine: CudaMachine) -> list[Finding]:
    command = "pip uninstall -y onnxruntime-gpu && pip install 'cspdeploy[cpu]'"
    text = "no NVIDIA GPU is seen here (none on the PCI bus, no /dev/nvidia0): onnxruntime-gpu computes on the CPU"
    if machine.driver.problem:
        text += f"; nvidia-smi says: {machine.driver.problem}"
    found = [Finding(severity="note", text=text, command=command)]
    missing, packages = _missing(trials, "CUDAExecutionProvider")
    if missing:
        text = f"on a machine with a GPU, onnxruntime-gpu would not find {', '.join(missing)}"
        found.append(Finding(severity="note", text=text, command=_pip(packages)))
    return found


def _wheels(
    trials: Mapping[str, Answer], installed: list[str], machine: CudaMachine, severity: Severity
) -> Iterator[Finding]:
    if installed and not any(name in GPU_WHEELS for name in installed):
        text = f"a GPU is here, but {installed[0]} has no CUDA; cspdeploy[gpu] in its place has"
        command = f"pip uninstall -y {' '.join(installed)} && pip install 'cspdeploy[gpu]'"
        yield Finding(severity="note", text=text, command=command)
    yield from _old_driver(trials, machine, severity)
    yield from _capability(trials, machine, severity)
    yield from _libraries(trials, severity)
    yield from _clash(trials, severity)


def _cuda_of(trials: Mapping[str, Answer], engine: str) -> str:
    return str(trials.get(f"engine:{engine}", {}).get("cuda", ""))


def _named(trials: Mapping[str, Answer], engine: str) -> str:
    name = "onnxruntime-gpu" if engine == "onnxruntime" else engine
    return f"{name} {trials.get(f'engine:{engine}', {}).get('version', '')}".strip()


def _old_driver(trials: Mapping[str, Answer], machine: CudaMachine, severity: Severity) -> Iterator[Finding]:
    """Not where it runs all the same: NVIDIA's cuda-compat packages put a newer libcuda on an older driver."""
    for engine, runtime in (("onnxruntime", "ort-cuda"), ("torch", "torch-cuda")):
        cuda = _cuda_of(trials, engine)
        least = LEAST_DRIVER.get(release(cuda)[0]) if release(cuda) else None
        if least is None or _works(trials, runtime) or not machine.driver_version:
            continue
        if release(machine.driver_version) < release(least):
            runs = f" (it runs CUDA {machine.driver.cuda_version})" if machine.driver.cuda_version else ""
            text = (
                f"the driver {machine.driver_version}{runs} is older than {least}, "
                f"which CUDA {cuda} of {_named(trials, engine)} needs"
            )
            command = driver_command(machine.distribution, version=least.partition(".")[0])
            yield Finding(severity=severity if engine == "onnxruntime" else "note", text=text, command=command)


def _capability(trials: Mapping[str, Answer], machine: CudaMachine, severity: Severity) -> Iterator[Finding]:
    archs = [str(arch) for arch in trials.get("engine:torch", {}).get("archs", ())]
    ours = release(_cuda_of(trials, "onnxruntime"))
    for gpu in dict.fromkeys(machine.visible.gpus):
        has = gpu.compute_capability
        numbers = tuple(int(part) for part in has.split(".")) if re.fullmatch(r"\d+\.\d+", has) else ()
        name = f"GPU {gpu.index} ({gpu.name}) has compute capability {has}"
        if len(numbers) != 2:
            continue
        if archs and not any(arch_runs(arch, numbers) for arch in archs):
            text = f"{name}, for which {_named(trials, 'torch')} has no kernels (it has {' '.join(archs)})"
            yield Finding(severity="note", text=text, command="pip install --upgrade torch")
        least = LEAST_CAPABILITY.get(ours[0]) if ours else None
        if least is not None and numbers < least:
            text = f"{name}, CUDA {ours[0]} of {_named(trials, 'onnxruntime')} begins at {least[0]}.{least[1]}"
            command = "install an onnxruntime-gpu that is built for CUDA 12"
            yield Finding(severity=severity, text=text, command=command)


def arch_runs(arch: str, capability: tuple[int, ...]) -> bool:
    """Whether code for `arch`, as torch.cuda.get_arch_list spells it, runs on a GPU of that compute capability.

    Machine code ("sm_86") runs on the same major number and any minor one from its own on, that of an architecture
    alone ("sm_90a") on this one; PTX ("compute_90") is compiled for every later one. Source: CUDA programming guide,
    "Binary Compatibility" and "PTX Compatibility".
    """
    match = _ARCH.match(arch)
    if match is None:
        return False
    own = (int(match[2]), int(match[3]))
    if match[4] == "a":
        return capability == own
    if match[1] == "compute" and not match[4]:
        return capability >= own
    return capability[0] == own[0] and capability[1] >= own[1]


def _missing(trials: Mapping[str, Answer], provider: str) -> tuple[list[str], tuple[str, ...]]:
    """Libraries of a provider that are not here, those of the driver left out, and the packages that bring them."""
    cuda = _cuda_of(trials, "onnxruntime")
    told = trials.get(f"libraries:{provider}", {}).get("missing", ())
    if not cuda:  # a build without CUDA lies over the other's files, and has loaded none of its libraries
        return [], ()
    missing = [str(name) for name in told if name not in DRIVER_LIBRARIES]
    return missing, bringing_packages(missing, cuda=cuda)


def _pip(packages: tuple[str, ...]) -> str:
    quoted = " ".join(f"'{one}'" if "*" in one else one for one in packages)
    return f"pip install {quoted}" if packages else ""


def _libraries(trials: Mapping[str, Answer], severity: Severity) -> Iterator[Finding]:
    missing, packages = _missing(trials, "CUDAExecutionProvider")
    if missing and severity == "problem":
        text = f"onnxruntime-gpu does not find {', '.join(missing)}"
        yield Finding(severity=severity, text=text, command=_pip(packages))
    missing, packages = _missing(trials, "TensorrtExecutionProvider")
    if missing and not _works(trials, "ort-tensorrt"):
        text = f"without TensorRT: {', '.join(missing)} not found"
        yield Finding(severity="note", text=text, command=_pip(packages))


def _clash(trials: Mapping[str, Answer], severity: Severity) -> Iterator[Finding]:
    """CUDA libraries of two engines in one process, or of two packages in one folder."""
    ours, theirs = _cuda_of(trials, "onnxruntime"), _cuda_of(trials, "torch")
    wheels = {major: version for major in (11, 12, 13) if (version := package_version(f"nvidia-cudnn-cu{major}"))}
    if len(wheels) > 1:
        listed = " and ".join(f"nvidia-cudnn-cu{major} {version}" for major, version in wheels.items())
        keep = release(ours or theirs)[:1]
        gone = " ".join(f"nvidia-cudnn-cu{major}" for major in wheels if (major,) != keep)
        again = f"nvidia-cudnn-cu{keep[0]}" if keep and keep[0] in wheels else "onnxruntime-gpu"
        command = f"pip uninstall -y {gone} && pip install --force-reinstall --no-deps {again}"
        text = f"{listed} are both installed, into one folder: they overwrite each other"
        yield Finding(severity=severity, text=text, command=command)
    shared, differ = False, bool(ours and theirs) and release(ours)[0] != release(theirs)[0]
    for library, files in _loaded_twice(trials).items():
        shared = True
        listed = ", then ".join(f"{path} (by {task})" for path, task in files)
        text = f"{library} is loaded twice in one process, first {listed}: the first serves both engines"
        yield Finding(severity="note", text=text, command=_separate(differ))
    if differ:
        text = f"onnxruntime was built for CUDA {ours}, torch for CUDA {theirs}: they share no libraries"
        first = next(((path, task) for path, task in _loaded(trials) if "/libcudnn.so" in path), None)
        both = f"; cuDNN was loaded first from {first[0]} (by {first[1]})" if first and not shared else ""
        yield Finding(severity="note", text=text + both, command=_separate(differ))
    problem = str(trials.get("engine:torch", {}).get("cudnn_problem", ""))
    if problem:
        text = f"torch refuses the cuDNN that it finds: {problem}"
        yield Finding(severity="note", text=text, command="pip install --force-reinstall torch")


def _separate(differ: bool) -> str:
    return "pip install --upgrade torch onnxruntime-gpu  # until both are of one CUDA" if differ else ""


def _loaded(trials: Mapping[str, Answer]) -> list[tuple[str, str]]:
    """Files in the order in which they came into the process, each with the task that brought it."""
    return [(str(path), str(task)) for path, task in trials.get("loaded", {}).get("files", ())]


def _loaded_twice(trials: Mapping[str, Answer]) -> dict[str, list[tuple[str, str]]]:
    files: dict[str, list[tuple[str, str]]] = {}
    for path, task in _loaded(trials):
        if name := _LIBRARY.match(path.rpartition("/")[2]):
            files.setdefault(name[1], []).append((path, task))
    return {name: found for name, found in files.items() if len(found) > 1}


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without trailing zeros, suffixes of pre-releases and builds."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
