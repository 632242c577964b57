"""What the doctor says of CUDA: folders as /proc, /sys and /dev are, texts as nvidia-smi prints them, trials as told.

No GPU is here: these are the findings that recorded facts lead to, not a run on a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cspdeploy.check.doctor_facts import CudaMachine, look_for_cuda
from cspdeploy.core.gpu import DriverFacts, GpuProcess, VisibleGpus
from cspdeploy.core.gpu_visible import MigDevice
from tests.check.cuda_machines import H100, HOLDER, h100_with, judged, machine_of, trials_of
from tests.core import smi

MODULE = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@host)\nGCC version: 13\n"
)
OLDER_MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39 UTC 2023\n"
FAILED = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running."
)


# --- the machine, as its files tell ---


def _write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def _add_to_bus(root: Path, address: str, *, vendor: str = "0x10de", kind: str = "0x030200") -> None:
    folder = root / "sys/bus/pci/devices" / address
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "class").write_text(f"{kind}\n")


def test_machine_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    _add_to_bus(tmp_path, "0000:00:02.0", vendor="0x8086")
    _add_to_bus(tmp_path, "0000:01:00.1", kind="0x040300")  # the sound of a GPU alone
    _write(tmp_path, dev__nvidiactl="", etc__os_release="")
    found = look_for_cuda(tmp_path, environment={})
    assert found == CudaMachine()
    assert not found.has_gpu


@pytest.mark.parametrize(("text", "version"), [(MODULE, "580.65.06"), (OLDER_MODULE, "535.54.03"), ("", "")])
def test_facts_of_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, version: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    root = _write(
        tmp_path / "root", proc__driver__nvidia__version=text, proc__modules="nouveau 1 0 - Live 0x0\n",
        proc__sys__kernel__osrelease="6.1.0\n", dev__nvidia0="", dev__nvidia10="", dev__nvidiactl="",
        proc__1__cgroup="0::/kubepods/besteffort/pod1\n",
    )  # fmt: skip
    (root / "etc").mkdir()
    (root / "etc/os-release").write_text('NAME="Debian"\nID=debian\nVERSION_ID="12"\n')
    (root / "lib/modules/6.1.0/updates/dkms").mkdir(parents=True)
    (root / "lib/modules/6.1.0/updates/dkms/nvidia.ko.xz").write_text("")
    _add_to_bus(root, "0000:01:00.0")
    found = look_for_cuda(root, environment={})
    assert found == CudaMachine(
        on_bus=("0000:01:00.0",), kernel_module=version, module_on_disk=True, nouveau=True,
        device_files=("/dev/nvidia0", "/dev/nvidia10"), container=True, distribution="debian",
    )  # fmt: skip
    assert found.has_gpu
    assert found.driver_version == version


def test_gpu_that_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    smi.install(tmp_path / "bin", smi.A100_MIG)
    found = look_for_cuda(tmp_path, environment={"CUDA_VISIBLE_DEVICES": "3"})
    assert found.has_gpu
    assert (found.driver_version, len(found.mig), found.visible.gpus) == ("535.161.08", 2, ())


# --- why there is no device: each layer, and the command ---


def _failing(problem: str) -> DriverFacts:
    return DriverFacts(smi="/usr/bin/nvidia-smi", problem=problem)


BUS = ("0000:01:00.0",)
NONE = DriverFacts()
LAYERS = {
    "no driver, Debian": (
        CudaMachine(on_bus=BUS, distribution="debian"), "GPU is here (0000:01:00.0), but no driver is installed",
        "sudo apt install nvidia-driver && sudo reboot"),
    "no driver, Ubuntu": (
        CudaMachine(on_bus=BUS, distribution="ubuntu"), "no driver is installed",
        "sudo ubuntu-drivers install && sudo reboot"),
    "no driver, other": (CudaMachine(on_bus=BUS), "no driver is installed", "nvidia.com/drivers"),
    "nouveau": (CudaMachine(on_bus=BUS, nouveau=True, distribution="debian"), "driven by nouveau", "apt install"),
    "nouveau beside it": (
        CudaMachine(on_bus=BUS, nouveau=True, module_on_disk=True), "driven by nouveau, which has no CUDA",
        "sudo modprobe -r nouveau && sudo modprobe nvidia"),
    "module not loaded": (
        CudaMachine(on_bus=BUS, module_on_disk=True, driver=_failing(FAILED)),
        f"kernel module is not loaded: {FAILED}", "sudo modprobe nvidia"),
    "nvidia-smi alone": (CudaMachine(on_bus=BUS, driver=_failing(FAILED)), "is not loaded", "sudo modprobe nvidia"),
    "host without": (CudaMachine(on_bus=BUS, container=True), "the host has not loaded its driver", "# on the host"),
    "container without --gpus": (
        CudaMachine(on_bus=BUS, kernel_module="580.65.06", container=True),
        "this container was started without a GPU: the driver 580.65.06 is loaded, but /dev/nvidia0 is not here",
        "docker run --gpus all ..."),
    "no device file": (
        CudaMachine(on_bus=BUS, kernel_module="580.65.06"), "/dev/nvidia0 is not here", "sudo nvidia-modprobe -c 0 -u"),
    "mismatch": (
        machine_of(driver=_failing("Failed to initialize NVML: Driver/library version mismatch NVML library version: "
                                 "580.173")),
        "version mismatch NVML library version: 580.173; the kernel has 580.65.06", "sudo reboot"),
    "mismatch in a container": (
        machine_of(driver=_failing("Failed to initialize NVML: Driver/library version mismatch"), container=True),
        "the driver was updated while an older one is loaded", "start the container again"),
    "lost": (
        machine_of(driver=_failing("Unable to determine the device handle for GPU 0000:01:00.0: GPU is lost.")),
        "nvidia-smi lists no GPU: Unable to determine the device handle", "sudo dmesg"),
    "no libcuda": (
        machine_of(h100_with(cuda_version="")), "its library libcuda.so.1 is not here",
        "sudo apt install libcuda1"),
    "no libcuda in a container": (
        machine_of(h100_with(cuda_version=""), container=True), "libcuda.so.1 is not here",
        "docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility ..."),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYERS)
def test_layer_that_fails(packages: dict[str, str], case: str) -> None:
    machine, words, command = LAYERS[case]
    found = judged(machine)
    assert not found.healthy
    assert words in found.advice
    assert command in found.command
    # Meant for a CPU, it is a healthy machine that is told what it could have.
    packages.clear()
    packages["onnxruntime"] = "1.31.1"
    found = judged(machine)
    assert (found.healthy, found.advice) == (True, "ready for ort-cpu")
    assert any(words in one.text and command in one.command for one in found.findings)


@pytest.mark.parametrize("case", LAYERS)
def test_layer_that_seems_to_fail_is_not_told_where_cuda_works(packages: dict[str, str], case: str) -> None:
    machine, words, _ = LAYERS[case]
    found = judged(machine, trials_of(ort=True))
    assert found.healthy
    assert not any(words in one.text for one in found.findings)


def test_no_gpu_at_all_is_a_note_to_the_gpu_wheel_and_nothing_to_the_other(packages: dict[str, str]) -> None:
    found = judged(CudaMachine())
    assert found.healthy
    (note,) = found.findings
    assert note.text.startswith("no NVIDIA GPU is seen here")
    assert note.command == "pip uninstall -y onnxruntime-gpu && pip install 'cspdeploy[cpu]'"
    missing = trials_of(
        **{"libraries:CUDAExecutionProvider": {"works": True, "missing": ["libcuda.so.1", "libcudnn.so.9"]}}
    )
    found = judged(CudaMachine(), missing)
    assert found.healthy
    assert found.findings[1].text == "on a machine with a GPU, onnxruntime-gpu would not find libcudnn.so.9"
    found = judged(CudaMachine(driver=_failing(FAILED)))
    assert found.findings[0].text.endswith(f"; nvidia-smi says: {FAILED}")
    packages.clear()
    packages["onnxruntime"] = "1.31.1"
    assert judged(CudaMachine()).findings == ()


def test_nvidia_smi_that_is_not_here_is_a_note(packages: dict[str, str]) -> None:
    found = judged(machine_of(driver=NONE), trials_of(ort=True))
    assert found.healthy
    (note,) = found.findings
    assert "nvidia-smi is not on PATH" in note.text
    assert note.command == "sudo apt install nvidia-smi"
    found = judged(machine_of(driver=NONE, container=True), trials_of(ort=True))
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in found.findings[0].command


# --- the device ---


UNSEEN = GpuProcess(pid=9, gpu_uuid=smi.UUID)
PART = MigDevice(uuid="MIG-feb88891", profile="1g.10gb", gpu_uuid=smi.UUID)
DEVICES = {
    "prohibited": (
        machine_of(h100_with(compute_mode="Prohibited")), True,
        "GPU 0 (NVIDIA H100) is in compute mode Prohibited: no CUDA", "sudo nvidia-smi -i 0 -c DEFAULT"),
    "exclusive": (
        machine_of(h100_with(compute_mode="Exclusive_Process")), False,
        "compute mode Exclusive_Process: one process at a time; bench opens several",
        "sudo nvidia-smi -i 0 -c DEFAULT"),
    "exclusive and taken": (
        machine_of(h100_with(compute_mode="Exclusive_Process"), processes=(HOLDER,)), True,
        "one process at a time, and process 4242 (python3) has it", "sudo nvidia-smi -i 0 -c DEFAULT"),
    "held": (
        machine_of(H100, processes=(HOLDER,)), False,
        "another process uses GPU 0 (NVIDIA H100): 4242 (python3), which holds 61430 MiB of 81559 MiB", "ps -fp 4242"),
    "held by who knows": (
        machine_of(H100, processes=(UNSEEN,)), False,
        "another process uses GPU 0 (NVIDIA H100): 9 (not seen from here);",
        "ps -fp 9"),
    "full, by nobody": (
        machine_of(h100_with(memory_used_mib=61430.0)), False,
        "61430 of 81559 MiB of GPU 0 (NVIDIA H100) are in use by a process that is not seen from here", "nvidia-smi"),
    "parts": (
        machine_of(h100_with(mig_mode="Enabled"), mig=(PART,)), False,
        "in MIG mode: CUDA sees one part of it, and figures are of that part (1g.10gb MIG-feb88891)",
        "export CUDA_VISIBLE_DEVICES=MIG-feb88891"),
    "no parts": (
        machine_of(h100_with(mig_mode="Enabled")), True, "in MIG mode and has no part",
        "sudo nvidia-smi -i 0 -mig 0"),
    "hidden": (
        machine_of(H100, visible=VisibleGpus(setting="3", problem="'3' means none: one GPU, 0, can be named here")),
        True,
        "CUDA_VISIBLE_DEVICES=3: '3' means none: one GPU, 0, can be named here; CUDA sees no GPU",
        "unset CUDA_VISIBLE_DEVICES"),
    "partly hidden": (
        machine_of(H100, visible=VisibleGpus(gpus=(H100,), setting="0,3", problem="'3' means none")), False,
        "CUDA_VISIBLE_DEVICES=0,3: '3' means none; CUDA sees 1", "unset CUDA_VISIBLE_DEVICES"),
    "order": (
        machine_of(H100, visible=VisibleGpus(gpus=(H100,), certain=False)), False,
        "GPUs of several kinds: CUDA counts the fastest first", "export CUDA_DEVICE_ORDER=PCI_BUS_ID"),
}  # fmt: skip


@pytest.mark.parametrize("case", DEVICES)
def test_state_of_the_device(packages: dict[str, str], case: str) -> None:
    machine, blocks, words, command = DEVICES[case]
    found = judged(machine, trials_of(ort=not blocks))
    assert found.healthy is not blocks
    (one,) = [one for one in found.findings if words in one.text]
    assert one.command.startswith(command)
    assert one.severity == ("problem" if blocks else "note")


def test_quiet_gpu_has_no_findings(packages: dict[str, str]) -> None:
    assert judged(machine_of(H100), trials_of(ort=True, torch=True, torch_cuda="13.0")).findings == ()


@pytest.mark.cuda
def test_this_machines_gpu() -> None:
    from cspdeploy.check.doctor import diagnose

    found = diagnose()
    assert found.cuda.has_gpu
    assert found.cuda.driver.gpus
    assert found.environment["gpu"]
    states = {state.name: state for state in found.runtimes}
    assert states["ort-cuda"].works, states["ort-cuda"]
    assert not any("older than" in one.text for one in found.findings)
