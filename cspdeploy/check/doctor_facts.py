"""What there is of an NVIDIA GPU here, layer by layer: on the bus, in the kernel, in /dev, to nvidia-smi, to CUDA."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cspdeploy.core.gpu import DriverFacts, GpuProcess, VisibleGpus, driver_facts, gpu_processes
from cspdeploy.core.gpu_visible import MigDevice, mig_devices, visible_gpus

__all__ = ["CudaMachine", "look_for_cuda"]

_NVIDIA = "0x10de"
_DISPLAY = "0x03"  # class of a display or 3D controller
_MODULE_VERSION = re.compile(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s")
_CONTAINER = re.compile(r"docker|kubepods|containerd|libpod|lxc")


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaMachine:
    """What was found.

    Attributes:
        on_bus: PCI addresses of NVIDIA's display controllers; a container sees the host's.
        kernel_module: version of the driver that the kernel has loaded; empty: none. A container sees the host's.
        module_on_disk: a driver is installed for the kernel that runs.
        nouveau: the kernel drives the GPU with its own driver, which has no CUDA.
        device_files: "/dev/nvidia0" and so on, or what Windows' subsystem and boards have in their place.
        container: this is one.
        distribution: ID of /etc/os-release: "debian".
        processes: that compute on a GPU.
        mig: parts of GPUs in MIG mode.
    """

    on_bus: tuple[str, ...] = ()
    kernel_module: str = ""
    module_on_disk: bool = False
    nouveau: bool = False
    device_files: tuple[str, ...] = ()
    container: bool = False
    distribution: str = ""
    driver: DriverFacts = field(default_factory=DriverFacts)
    processes: tuple[GpuProcess, ...] = ()
    mig: tuple[MigDevice, ...] = ()
    visible: VisibleGpus = field(default_factory=VisibleGpus)

    @property
    def has_gpu(self) -> bool:
        """A GPU is in this machine, whether or not this process can use it."""
        return bool(self.on_bus or self.kernel_module or self.device_files or self.driver.gpus)

    @property
    def driver_version(self) -> str:
        """Of the driver that runs; empty where none does."""
        return next((gpu.driver_version for gpu in self.driver.gpus if gpu.driver_version), self.kernel_module)


def look_for_cuda(root: Path = Path("/"), *, environment: Mapping[str, str] = os.environ) -> CudaMachine:
    """Look. Nothing is loaded or set; without a GPU it is a few files and one look along PATH.

    Args:
        root: under which /proc, /sys, /dev and /etc are.
        environment: PATH of nvidia-smi is the process's own; CUDA_VISIBLE_DEVICES is looked at here.
    """
    driver = driver_facts()
    mig = mig_devices() if any(gpu.mig_mode == "Enabled" for gpu in driver.gpus) else ()
    module = _MODULE_VERSION.search(_read(root / "proc/driver/nvidia/version"))
    release = _read(root / "proc/sys/kernel/osrelease").strip()
    return CudaMachine(
        on_bus=_on_bus(root / "sys/bus/pci/devices"), kernel_module=module[1] if module else "",
        module_on_disk=bool(release) and _module_on_disk(root / "lib/modules" / release),
        nouveau=any(line.startswith("nouveau ") for line in _read(root / "proc/modules").splitlines()),
        device_files=_device_files(root / "dev"), container=_is_container(root),
        distribution=_distribution(_read(root / "etc/os-release")), driver=driver,
        processes=gpu_processes() if driver.gpus else (), mig=mig,
        visible=visible_gpus(driver.gpus, environment=environment, mig=mig),
    )  # fmt: skip


def _on_bus(devices: Path) -> tuple[str, ...]:
    found = [
        folder.name for folder in _entries(devices)
        if _read(folder / "vendor").strip() == _NVIDIA and _read(folder / "class").startswith(_DISPLAY)
    ]  # fmt: skip
    return tuple(sorted(found))


def _device_files(dev: Path) -> tuple[str, ...]:
    # nvidiactl and the like are no GPUs. dxg: Windows' subsystem for Linux, nvhost-gpu and nvgpu: Jetson boards.
    found = [
        entry.name for entry in _entries(dev)
        if re.fullmatch(r"nvidia\d+", entry.name) or entry.name in ("dxg", "nvhost-gpu", "nvgpu")
    ]  # fmt: skip
    return tuple(f"/dev/{name}" for name in sorted(found))


def _module_on_disk(modules: Path) -> bool:
    # Compressed or not, of a package (kernel/, extra/) or built here (updates/dkms/).
    names = ("kernel", "updates", "extra", "weak-updates")
    return any(next((modules / name).glob("**/nvidia.ko*"), None) is not None for name in names)


def _is_container(root: Path) -> bool:
    marked = any((root / name).exists() for name in (".dockerenv", "run/.containerenv"))
    return marked or bool(_CONTAINER.search(_read(root / "proc/1/cgroup")))


def _distribution(os_release: str) -> str:
    rows = (line.partition("=") for line in os_release.splitlines())
    return next((value.strip().strip('"') for name, _, value in rows if name == "ID"), "")


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
