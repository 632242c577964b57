"""Why CUDA has no device here, or not the one that is meant: from the bus up to CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cspdeploy.check.doctor_facts import CudaMachine
from cspdeploy.check.finding import Finding, Severity
from cspdeploy.core.gpu import Gpu

__all__ = ["check_devices", "check_driver", "driver_command"]

MUCH_MEMORY = 0.5
"""Of a GPU's memory in others' hands: batches that fit an empty GPU then do not, and an engine may pick kernels with
less workspace, which are slower."""
IN_USE_MIB = 1024.0
"""Below, memory that nobody seems to hold is the driver's own: up to some 600 MiB with ECC and a window system."""

_RUN_WITH_GPU = "docker run --gpus all"


def driver_command(distribution: str, *, version: str = "") -> str:
    """The command that installs a driver, by the distribution's own means.

    Args:
        distribution: ID of /etc/os-release.
        version: first number of the least that is needed: "580"; empty: any.
    """
    if distribution == "ubuntu":
        return f"sudo ubuntu-drivers install {f'nvidia:{version}' if version else ''}".strip() + " && sudo reboot"
    if distribution == "debian" and not version:  # its own is of the age of its release
        return "sudo apt install nvidia-driver && sudo reboot"
    return f"install NVIDIA's driver{f' {version} or later' if version else ''} (nvidia.com/drivers), then reboot"


def check_driver(machine: CudaMachine, *, severity: Severity) -> list[Finding]:
    """The lowest layer that fails, alone: what stands on it cannot work."""
    for look in (_no_module, _no_device_file, _mismatch, _smi_fails, _no_libcuda):
        told = look(machine)
        if told is not None:
            text, command = told
            return [Finding(severity=severity, text=text, command=command)]
    return []


_Told = tuple[str, str] | None


def _no_module(machine: CudaMachine) -> _Told:
    if machine.kernel_module or not machine.on_bus or machine.driver.gpus:
        return None
    where = f"an NVIDIA GPU is here ({', '.join(machine.on_bus)})"
    if machine.container:
        return f"{where}, but the host has not loaded its driver", "sudo modprobe nvidia  # on the host"
    if machine.nouveau:
        command = "sudo modprobe -r nouveau && sudo modprobe nvidia"
        if not machine.module_on_disk:
            command = driver_command(machine.distribution)
        return f"{where}, driven by nouveau, which has no CUDA", command
    if machine.module_on_disk or machine.driver.smi:
        said = f": {machine.driver.problem}" if machine.driver.problem else ""
        return f"{where}, but its driver's kernel module is not loaded{said}", "sudo modprobe nvidia"
    return f"{where}, but no driver is installed", driver_command(machine.distribution)


def _no_device_file(machine: CudaMachine) -> _Told:
    if machine.device_files or not machine.kernel_module or machine.driver.gpus:
        return None
    loaded = f"the driver {machine.kernel_module} is loaded, but /dev/nvidia0 is not here"
    if machine.container:
        return f"this container was started without a GPU: {loaded}", f"{_RUN_WITH_GPU} ..."
    return loaded, "sudo nvidia-modprobe -c 0 -u"


def _mismatch(machine: CudaMachine) -> _Told:
    if "version mismatch" not in machine.driver.problem.lower():
        return None
    module = f"; the kernel has {machine.kernel_module}" if machine.kernel_module else ""
    text = f"the driver was updated while an older one is loaded: {machine.driver.problem}{module}"
    return text, "start the container again" if machine.container else "sudo reboot"


def _no_smi(machine: CudaMachine) -> _Told:
    if machine.driver.smi or not machine.device_files:
        return None
    text = "nvidia-smi is not on PATH: clocks, power and other processes on the GPU cannot be read"
    if machine.container:
        return text, f"{_RUN_WITH_GPU} -e NVIDIA_DRIVER_CAPABILITIES=compute,utility ..."
    commands = {"debian": "sudo apt install nvidia-smi", "ubuntu": "sudo apt install nvidia-utils-<driver's number>"}
    return text, commands.get(machine.distribution, "add the folder of nvidia-smi to PATH")


def _smi_fails(machine: CudaMachine) -> _Told:
    if machine.driver.gpus or not machine.driver.smi:
        return None
    return f"nvidia-smi lists no GPU: {machine.driver.problem or 'no answer'}", "sudo dmesg | grep -iE 'nvrm|xid'"


def _no_libcuda(machine: CudaMachine) -> _Told:
    if machine.driver.cuda_version or not machine.driver.gpus:
        return None
    text = f"the driver {machine.driver_version} works, but its library libcuda.so.1 is not here"
    if machine.container:
        return text, f"{_RUN_WITH_GPU} -e NVIDIA_DRIVER_CAPABILITIES=compute,utility ..."
    return text, "sudo apt install libcuda1" if machine.distribution == "debian" else "install the driver again"


def check_devices(machine: CudaMachine, *, severity: Severity) -> list[Finding]:
    """What stands between a driver that works and CUDA, or makes its figures less true. `severity`: of the former."""
    found = list(_visibility(machine, severity))
    if told := _no_smi(machine):
        found.append(Finding(severity="note", text=told[0], command=told[1]))
    checks: tuple[Callable[[CudaMachine, Gpu, Severity], Iterator[Finding]], ...] = (_compute_mode, _mig, _held)
    for gpu in dict.fromkeys(machine.visible.gpus or machine.driver.gpus):
        for check in checks:
            found += check(machine, gpu, severity)
    return found


def _visibility(machine: CudaMachine, severity: Severity) -> Iterator[Finding]:
    visible = machine.visible
    if machine.driver.gpus and visible.problem:
        text = f"CUDA_VISIBLE_DEVICES={visible.setting}: {visible.problem}"
        left = f"; CUDA sees {len(visible.gpus)}" if visible.gpus else "; CUDA sees no GPU"
        yield Finding(
            severity="note" if visible.gpus else severity, text=text + left, command="unset CUDA_VISIBLE_DEVICES"
        )
    if not visible.certain:
        text = "GPUs of several kinds: CUDA counts the fastest first, nvidia-smi by the place on the bus"
        yield Finding(severity="note", text=text, command="export CUDA_DEVICE_ORDER=PCI_BUS_ID")


def _compute_mode(machine: CudaMachine, gpu: Gpu, severity: Severity) -> Iterator[Finding]:
    command = f"sudo nvidia-smi -i {gpu.index} -c DEFAULT"
    if gpu.compute_mode == "Prohibited":
        yield Finding(severity=severity, text=f"{_name(gpu)} is in compute mode Prohibited: no CUDA", command=command)
    elif gpu.compute_mode.startswith("Exclusive"):
        holder = next((one for one in machine.processes if one.gpu_uuid == gpu.uuid), None)
        by = f", and process {holder.pid} ({holder.name or 'not seen from here'}) has it" if holder else ""
        text = f"{_name(gpu)} is in compute mode {gpu.compute_mode}: one process at a time{by}; bench opens several"
        yield Finding(severity=severity if holder else "note", text=text, command=command)


def _mig(machine: CudaMachine, gpu: Gpu, severity: Severity) -> Iterator[Finding]:
    if gpu.mig_mode != "Enabled":
        return
    parts = [part for part in machine.mig if part.gpu_uuid == gpu.uuid]
    if not parts:
        text = f"{_name(gpu)} is in MIG mode and has no part: CUDA finds no device on it"
        yield Finding(severity=severity, text=text, command=f"sudo nvidia-smi -i {gpu.index} -mig 0")
        return
    listed = ", ".join(f"{part.profile} {part.uuid}" for part in parts)
    text = f"{_name(gpu)} is in MIG mode: CUDA sees one part of it, and figures are of that part ({listed})"
    yield Finding(severity="note", text=text, command=f"export CUDA_VISIBLE_DEVICES={parts[0].uuid}")


def _held(machine: CudaMachine, gpu: Gpu, severity: Severity) -> Iterator[Finding]:
    used, total = gpu.memory_used_mib, gpu.memory_total_mib
    held = [one for one in machine.processes if one.gpu_uuid == gpu.uuid]
    for one in sorted(held, key=lambda one: -(one.memory_mib or 0.0)):
        memory = f" {one.memory_mib:.0f} MiB of" if one.memory_mib is not None else ""
        of = f" {total:.0f} MiB" if memory and total else ""
        text = (
            f"another process uses {_name(gpu)}: {one.pid} ({one.name or 'not seen from here'})"
            f"{f', which holds{memory}{of}' if memory else ''}; timings and free memory are shared with it"
        )
        yield Finding(severity="note", text=text, command=f"ps -fp {one.pid}")
    if not held and used and total and used > IN_USE_MIB and used > MUCH_MEMORY * total:
        text = (
            f"{used:.0f} of {total:.0f} MiB of {_name(gpu)} are in use by a process that is not seen from here: "
            "in another container, or of the host"
        )
        yield Finding(severity="note", text=text, command="nvidia-smi  # on the host")


def _name(gpu: Gpu) -> str:
    return f"GPU {gpu.index} ({gpu.name})"
