"""What the doctor says of CUDA: folders as /proc, /sys and /dev are, texts as nvidia-smi prints them, trials as told.

No GPU is here: these are the findings that recorded facts lead to, not a run on a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cspdeploy.check import doctor_cuda, installation
from cspdeploy.check.cuda_libraries import (
    bringing_packages,
    loaded_libraries,
    missing_libraries,
    needed_libraries,
)
from cspdeploy.check.doctor import Diagnosis, judge
from cspdeploy.check.doctor_cuda import arch_runs
from cspdeploy.check.doctor_driver import driver_command
from cspdeploy.check.doctor_facts import CudaMachine, look_for_cuda
from cspdeploy.core.gpu import DriverFacts, Gpu, GpuProcess, VisibleGpus
from cspdeploy.core.gpu_visible import MigDevice
from cspdeploy.runtimes import all_runtimes
from tests.core import smi

OK = {"works": True}
H100 = Gpu(
    index=0, uuid=smi.UUID, name="NVIDIA H100", driver_version="580.65.06", cuda_version="13.0", compute_mode="Default",
    compute_capability="9.0", memory_total_mib=81559.0, memory_used_mib=4.0, mig_mode="Disabled",
)  # fmt: skip
MODULE = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@host)\nGCC version: 13\n"
)
OLDER_MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39 UTC 2023\n"
FAILED = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running."
)


def _machine(*gpus: Gpu, **facts: Any) -> CudaMachine:
    driver = DriverFacts(smi="/usr/bin/nvidia-smi", cuda_version=gpus[0].cuda_version if gpus else "", gpus=gpus)
    known: dict[str, Any] = {
        "kernel_module": "580.65.06", "device_files": ("/dev/nvidia0",), "driver": driver,
        "visible": VisibleGpus(gpus=gpus), "distribution": "debian",
    }  # fmt: skip
    return CudaMachine(**(known | facts))


def _trials(*, ort: bool = False, torch: bool = False, cuda: str = "13.0", torch_cuda: str = "", **more: Any) -> Any:
    def state(works: bool) -> dict[str, Any]:
        return OK if works else {"works": False, "reason": "the session runs on CPUExecutionProvider"}

    return {
        "engine:onnxruntime": {"works": True, "version": "1.31.1", "cuda": cuda, "providers": []},
        "engine:torch": {"works": True, "version": "2.13.0", "cuda": torch_cuda},
        "runtime:ort-cpu": OK, "runtime:ort-cuda": state(ort), "runtime:torch-cuda": state(torch), **more,
    }  # fmt: skip


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions of installed packages; the wheel for GPUs and nothing else."""
    versions = {"onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(installation, "package_version", versions.get)
    monkeypatch.setattr(doctor_cuda, "package_version", versions.get)
    return versions


def _judge(machine: CudaMachine, trials: Any = None) -> Diagnosis:
    return judge(trials or _trials(), environment={}, flags=(), machine=machine)


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
        _machine(driver=_failing("Failed to initialize NVML: Driver/library version mismatch NVML library version: "
                                 "580.173")),
        "version mismatch NVML library version: 580.173; the kernel has 580.65.06", "sudo reboot"),
    "mismatch in a container": (
        _machine(driver=_failing("Failed to initialize NVML: Driver/library version mismatch"), container=True),
        "the driver was updated while an older one is loaded", "start the container again"),
    "lost": (
        _machine(driver=_failing("Unable to determine the device handle for GPU 0000:01:00.0: GPU is lost.")),
        "nvidia-smi lists no GPU: Unable to determine the device handle", "sudo dmesg"),
    "no libcuda": (
        _machine(dataclasses.replace(H100, cuda_version="")), "its library libcuda.so.1 is not here",
        "sudo apt install libcuda1"),
    "no libcuda in a container": (
        _machine(dataclasses.replace(H100, cuda_version=""), container=True), "libcuda.so.1 is not here",
        "docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility ..."),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYERS)
def test_layer_that_fails(packages: dict[str, str], case: str) -> None:
    machine, words, command = LAYERS[case]
    found = _judge(machine)
    assert not found.healthy
    assert words in found.advice
    assert command in found.command
    # Meant for a CPU, it is a healthy machine that is told what it could have.
    packages.clear()
    packages["onnxruntime"] = "1.31.1"
    found = _judge(machine)
    assert (found.healthy, found.advice) == (True, "ready for ort-cpu")
    assert any(words in one.text and command in one.command for one in found.findings)


@pytest.mark.parametrize("case", LAYERS)
def test_layer_that_seems_to_fail_is_not_told_where_cuda_works(packages: dict[str, str], case: str) -> None:
    machine, words, _ = LAYERS[case]
    found = _judge(machine, _trials(ort=True))
    assert found.healthy
    assert not any(words in one.text for one in found.findings)


def test_no_gpu_at_all_is_a_note_to_the_gpu_wheel_and_nothing_to_the_other(packages: dict[str, str]) -> None:
    found = _judge(CudaMachine())
    assert found.healthy
    (note,) = found.findings
    assert note.text.startswith("no NVIDIA GPU is seen here")
    assert note.command == "pip uninstall -y onnxruntime-gpu && pip install 'cspdeploy[cpu]'"
    missing = _trials(
        **{"libraries:CUDAExecutionProvider": {"works": True, "missing": ["libcuda.so.1", "libcudnn.so.9"]}}
    )
    found = _judge(CudaMachine(), missing)
    assert found.healthy
    assert found.findings[1].text == "on a machine with a GPU, onnxruntime-gpu would not find libcudnn.so.9"
    found = _judge(CudaMachine(driver=_failing(FAILED)))
    assert found.findings[0].text.endswith(f"; nvidia-smi says: {FAILED}")
    packages.clear()
    packages["onnxruntime"] = "1.31.1"
    assert _judge(CudaMachine()).findings == ()


def test_nvidia_smi_that_is_not_here_is_a_note(packages: dict[str, str]) -> None:
    found = _judge(_machine(driver=NONE), _trials(ort=True))
    assert found.healthy
    (note,) = found.findings
    assert "nvidia-smi is not on PATH" in note.text
    assert note.command == "sudo apt install nvidia-smi"
    found = _judge(_machine(driver=NONE, container=True), _trials(ort=True))
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in found.findings[0].command


# --- the device ---


def _with(**facts: Any) -> Gpu:
    return dataclasses.replace(H100, **facts)


HOLDER = GpuProcess(pid=4242, gpu_uuid=smi.UUID, name="python3", memory_mib=61430.0)
UNSEEN = GpuProcess(pid=9, gpu_uuid=smi.UUID)
PART = MigDevice(uuid="MIG-feb88891", profile="1g.10gb", gpu_uuid=smi.UUID)
DEVICES = {
    "prohibited": (
        _machine(_with(compute_mode="Prohibited")), True,
        "GPU 0 (NVIDIA H100) is in compute mode Prohibited: no CUDA", "sudo nvidia-smi -i 0 -c DEFAULT"),
    "exclusive": (
        _machine(_with(compute_mode="Exclusive_Process")), False,
        "compute mode Exclusive_Process: one process at a time; bench opens several",
        "sudo nvidia-smi -i 0 -c DEFAULT"),
    "exclusive and taken": (
        _machine(_with(compute_mode="Exclusive_Process"), processes=(HOLDER,)), True,
        "one process at a time, and process 4242 (python3) has it", "sudo nvidia-smi -i 0 -c DEFAULT"),
    "held": (
        _machine(H100, processes=(HOLDER,)), False,
        "another process uses GPU 0 (NVIDIA H100): 4242 (python3), which holds 61430 MiB of 81559 MiB", "ps -fp 4242"),
    "held by who knows": (
        _machine(H100, processes=(UNSEEN,)), False, "another process uses GPU 0 (NVIDIA H100): 9 (not seen from here);",
        "ps -fp 9"),
    "full, by nobody": (
        _machine(_with(memory_used_mib=61430.0)), False,
        "61430 of 81559 MiB of GPU 0 (NVIDIA H100) are in use by a process that is not seen from here", "nvidia-smi"),
    "parts": (
        _machine(_with(mig_mode="Enabled"), mig=(PART,)), False,
        "in MIG mode: CUDA sees one part of it, and figures are of that part (1g.10gb MIG-feb88891)",
        "export CUDA_VISIBLE_DEVICES=MIG-feb88891"),
    "no parts": (
        _machine(_with(mig_mode="Enabled")), True, "in MIG mode and has no part", "sudo nvidia-smi -i 0 -mig 0"),
    "hidden": (
        _machine(H100, visible=VisibleGpus(setting="3", problem="'3' means none: one GPU, 0, can be named here")), True,
        "CUDA_VISIBLE_DEVICES=3: '3' means none: one GPU, 0, can be named here; CUDA sees no GPU",
        "unset CUDA_VISIBLE_DEVICES"),
    "partly hidden": (
        _machine(H100, visible=VisibleGpus(gpus=(H100,), setting="0,3", problem="'3' means none")), False,
        "CUDA_VISIBLE_DEVICES=0,3: '3' means none; CUDA sees 1", "unset CUDA_VISIBLE_DEVICES"),
    "order": (
        _machine(H100, visible=VisibleGpus(gpus=(H100,), certain=False)), False,
        "GPUs of several kinds: CUDA counts the fastest first", "export CUDA_DEVICE_ORDER=PCI_BUS_ID"),
}  # fmt: skip


@pytest.mark.parametrize("case", DEVICES)
def test_state_of_the_device(packages: dict[str, str], case: str) -> None:
    machine, blocks, words, command = DEVICES[case]
    found = _judge(machine, _trials(ort=not blocks))
    assert found.healthy is not blocks
    (one,) = [one for one in found.findings if words in one.text]
    assert one.command.startswith(command)
    assert one.severity == ("problem" if blocks else "note")


def test_quiet_gpu_has_no_findings(packages: dict[str, str]) -> None:
    assert _judge(_machine(H100), _trials(ort=True, torch=True, torch_cuda="13.0")).findings == ()


# --- the engines ---


@pytest.mark.parametrize(
    ("cuda", "driver", "least"),
    [
        ("13.0", "575.57.08", "580"), ("13.0", "580.65.06", ""), ("12.8", "525.60.11", "525.60.13"),
        ("12.8", "525.60.13", ""), ("11.8", "450.51.06", "450.80.02"), ("11.8", "450.80.02", ""),
        ("13.0", "580", ""), ("", "390.10", ""),
    ],
)  # fmt: skip
def test_driver_older_than_the_cuda_of_a_wheel(packages: dict[str, str], cuda: str, driver: str, least: str) -> None:
    machine = _machine(_with(driver_version=driver, cuda_version="12.2"))
    found = _judge(machine, _trials(cuda=cuda))
    told = [one for one in found.findings if "older than" in one.text]
    assert bool(told) is bool(least)
    if least:
        assert found.advice == (
            f"the driver {driver} (it runs CUDA 12.2) is older than {least}, which CUDA {cuda} of onnxruntime-gpu "
            "1.31.1 needs"
        )
        assert found.command == f"install NVIDIA's driver {least[:3]} or later (nvidia.com/drivers), then reboot"
        # cuda-compat: it runs all the same.
        assert _judge(machine, _trials(ort=True, cuda=cuda)).findings == ()


def test_driver_older_than_torch_needs(packages: dict[str, str]) -> None:
    machine = _machine(_with(driver_version="535.54.03"), distribution="ubuntu")
    found = _judge(machine, _trials(ort=True, cuda="12.8", torch_cuda="13.0"))
    assert found.healthy
    note = next(one for one in found.findings if "older than" in one.text)
    assert "CUDA 13.0 of torch 2.13.0" in note.text
    assert note.command == "sudo ubuntu-drivers install nvidia:580 && sudo reboot"
    assert driver_command("", version="580").startswith("install NVIDIA's driver 580 or later")


def test_wheel_without_cuda(packages: dict[str, str]) -> None:
    packages.clear()
    packages["onnxruntime"] = "1.31.1"
    found = _judge(_machine(H100))
    assert found.healthy
    (note,) = found.findings
    assert note.text == "a GPU is here, but onnxruntime has no CUDA; cspdeploy[gpu] in its place has"
    assert note.command == "pip uninstall -y onnxruntime && pip install 'cspdeploy[gpu]'"


def test_libraries_that_are_missing_by_name_and_package(packages: dict[str, str]) -> None:
    missing = ["libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudnn.so.9"]
    trials = _trials(**{"libraries:CUDAExecutionProvider": {"works": True, "missing": missing}})
    found = _judge(_machine(H100), trials)
    assert found.advice == (
        "onnxruntime-gpu does not find libcublasLt.so.13, libcublas.so.13, libcurand.so.10, libcudnn.so.9"
    )
    assert found.command == "pip install 'nvidia-cublas==13.*' nvidia-curand 'nvidia-cudnn-cu13==9.*'"


def test_libraries_are_not_missed_where_the_wheel_for_cpus_lies_over_the_other(packages: dict[str, str]) -> None:
    packages["onnxruntime"] = "1.31.1"
    trials = _trials(cuda="", **{"libraries:CUDAExecutionProvider": {"works": True, "missing": ["libcudnn.so.9"]}})
    found = _judge(CudaMachine(), trials)
    assert found.advice == "onnxruntime and onnxruntime-gpu are both installed and overwrite each other"
    assert not any("libcudnn" in one.text for one in found.findings)


def test_missing_tensorrt_is_a_note(packages: dict[str, str]) -> None:
    trials = _trials(ort=True, **{"libraries:TensorrtExecutionProvider": {
        "works": True, "missing": ["libnvinfer.so.10", "libnvonnxparser.so.10"]}})  # fmt: skip
    found = _judge(_machine(H100), trials)
    assert found.healthy
    (note,) = found.findings
    assert note.text == "without TensorRT: libnvinfer.so.10, libnvonnxparser.so.10 not found"
    assert note.command == "pip install 'tensorrt-cu13==10.*'"
    assert _judge(_machine(H100), {**trials, "runtime:ort-tensorrt": OK}).findings == ()


def test_two_cudnn_packages_in_one_folder(packages: dict[str, str]) -> None:
    packages |= {"nvidia-cudnn-cu12": "9.10.2.21", "nvidia-cudnn-cu13": "9.28.1.4"}
    found = _judge(_machine(H100))
    assert found.advice == (
        "nvidia-cudnn-cu12 9.10.2.21 and nvidia-cudnn-cu13 9.28.1.4 are both installed, into one folder: "
        "they overwrite each other"
    )
    assert found.command == (
        "pip uninstall -y nvidia-cudnn-cu12 && pip install --force-reinstall --no-deps nvidia-cudnn-cu13"
    )
    assert _judge(_machine(H100), _trials(ort=True)).healthy


def test_clash_of_two_engines_names_what_was_first(packages: dict[str, str]) -> None:
    files = [["/v/nvidia/cudnn/lib/libcudnn.so.9", "torch"], ["/usr/lib/libcudnn.so.9.1.0", "ort-cuda"],
             ["/v/libcudart.so.12", "torch"], ["/v/libcudart.so.13", "ort-cuda"]]  # fmt: skip
    found = _judge(_machine(H100), _trials(ort=True, torch=True, torch_cuda="12.8", loaded={"files": files}))
    assert [one.text for one in found.findings] == [
        "libcudnn.so.9 is loaded twice in one process, first /v/nvidia/cudnn/lib/libcudnn.so.9 (by torch), then "
        "/usr/lib/libcudnn.so.9.1.0 (by ort-cuda): the first serves both engines",
        "onnxruntime was built for CUDA 13.0, torch for CUDA 12.8: they share no libraries",
    ]
    found = _judge(_machine(H100), _trials(ort=True, torch=True, torch_cuda="12.8", loaded={"files": files[:1]}))
    assert found.findings[0].text.endswith("cuDNN was loaded first from /v/nvidia/cudnn/lib/libcudnn.so.9 (by torch)")
    assert found.findings[0].command.startswith("pip install --upgrade torch onnxruntime-gpu")


def test_cudnn_that_torch_refuses(packages: dict[str, str]) -> None:
    told = (
        "cuDNN version incompatibility: PyTorch was compiled  against (9, 10, 2) but found runtime version (9, 1, 0)."
    )
    trials = _trials(ort=True, torch_cuda="13.0")
    trials["engine:torch"]["cudnn_problem"] = told
    (note,) = _judge(_machine(H100), trials).findings
    assert note.text == f"torch refuses the cuDNN that it finds: {told}"


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("sm_90", (9, 0), True), ("sm_80", (8, 6), True), ("sm_86", (8, 0), False), ("sm_80", (9, 0), False),
        ("compute_80", (9, 0), True), ("compute_90", (8, 9), False), ("sm_90a", (9, 0), True),
        ("sm_90a", (9, 1), False), ("sm_120", (12, 0), True), ("sm_100f", (10, 3), True),
        ("compute_90a", (10, 0), False), ("gfx906", (9, 0), False),
    ],
)  # fmt: skip
def test_code_runs_on_a_gpu(arch: str, capability: tuple[int, int], runs: bool) -> None:
    assert arch_runs(arch, capability) is runs


def test_gpu_for_which_an_engine_has_no_kernels(packages: dict[str, str]) -> None:
    trials = _trials(torch_cuda="13.0", ort=True)
    trials["engine:torch"]["archs"] = ["sm_75", "sm_80", "sm_90"]
    assert _judge(_machine(H100), trials).findings == ()
    (note,) = _judge(_machine(_with(compute_capability="12.0")), trials).findings
    assert "compute capability 12.0, for which torch 2.13.0 has no kernels (it has sm_75 sm_80 sm_90)" in note.text
    found = _judge(_machine(_with(compute_capability="6.1")), _trials())
    assert found.advice == (
        "GPU 0 (NVIDIA H100) has compute capability 6.1, CUDA 13 of onnxruntime-gpu 1.31.1 begins at 7.5"
    )
    assert _judge(_machine(_with(compute_capability="")), trials).findings == ()


def test_what_nothing_explains_is_told_in_the_engines_words(packages: dict[str, str]) -> None:
    found = _judge(_machine(H100))
    assert found.advice == (
        "a GPU is here, and onnxruntime-gpu does not run on it: the session runs on CPUExecutionProvider"
    )
    assert found.command == "pip install --upgrade 'onnxruntime-gpu[cuda,cudnn]'"


def test_report_has_all_facts(packages: dict[str, str]) -> None:
    from cspdeploy.core.codec import to_json

    report = json.loads(json.dumps(to_json(_judge(_machine(H100, processes=(HOLDER,)), _trials(ort=True)))))
    assert report["cuda"]["driver"]["gpus"][0]["compute_capability"] == "9.0"
    assert report["cuda"]["processes"][0]["pid"] == 4242
    assert report["cuda"]["kernel_module"] == "580.65.06"


# --- libraries, of real files ---


def test_needed_libraries_of_a_real_file(tmp_path: Path) -> None:
    import onnxruntime

    (library,) = Path(onnxruntime.__file__).parent.glob("capi/onnxruntime_pybind11_state*.so")
    assert "libc.so.6" in needed_libraries(library)
    assert missing_libraries(library) == ()  # none of CUDA's
    broken = tmp_path / "half.so"
    broken.write_bytes(library.read_bytes()[:600])
    assert (
        needed_libraries(broken) == needed_libraries(Path(__file__)) == needed_libraries(tmp_path / "absent.so") == ()
    )
    assert missing_libraries(broken, also=["libcudnn_no_such.so.9"]) == ("libcudnn_no_such.so.9",)


def test_loaded_libraries_are_those_of_cuda(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f10 r--p 00000000 fe:00 12 /v/my files/libcudnn.so.9\n7f10-7f20 r-xp 00000000 fe:00 12 /v/my files/"
        "libcudnn.so.9\n7f20-7f30 r--p 00000000 fe:00 13 /usr/lib/libc.so.6\n7f30-7f40 rw-p 00000000 00:00 0 \n"
        "7f40-7f50 r--p 00000000 fe:00 14 /v/libcublasLt.so.13\n"
    )
    assert loaded_libraries(maps) == ("/v/libcublasLt.so.13", "/v/my files/libcudnn.so.9")
    assert loaded_libraries(tmp_path / "none") == ()


def test_packages_of_each_cuda() -> None:
    names = ["libcublasLt.so.12", "libcublas.so.12", "libcudnn.so.9", "libcufft.so.11", "libcuda.so.1", "libz.so.1"]
    assert bringing_packages(names, cuda="12.8") == (
        "nvidia-cublas-cu12==12.*", "nvidia-cudnn-cu12==9.*", "nvidia-cufft-cu12",
    )  # fmt: skip
    assert bringing_packages(["libnvinfer.so.10"], cuda="13.0") == ("tensorrt-cu13==10.*",)


def test_child_tells_of_a_providers_libraries(tmp_path: Path) -> None:
    """For real: a wheel whose provider needs what is not here. Its file is made by hand, without code."""
    capi = tmp_path / "onnxruntime/capi"
    capi.mkdir(parents=True)
    (capi / "__init__.py").write_text("")
    (capi / "build_and_package_info.py").write_text("cuda_version = '13.0'\n")
    (capi.parent / "__init__.py").write_text("__version__ = '1.31.1'\ndef get_available_providers(): return []\n")
    (capi / "libonnxruntime_providers_cuda.so").write_bytes(_shared_object("libcublasLt.so.97", "libc.so.6"))
    code = "import sys; sys.path.insert(0, sys.argv[1]); from cspdeploy.check.doctor_child import main; main()"
    tried = (
        *(f"runtime:{name}" for name in all_runtimes()),
        "engine:torch",
        "engine:openvino",
        "engine:onnx",
        "format",
    )
    known = json.dumps(dict.fromkeys(tried, OK))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], input=known, capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    answers = {line["ended"]: line["answer"] for line in map(json.loads, done.stdout.splitlines()) if "ended" in line}
    missing = answers["libraries:CUDAExecutionProvider"]["missing"]
    assert missing[0] == "libcublasLt.so.97"
    assert "libc.so.6" not in missing
    assert "libraries:TensorrtExecutionProvider" not in answers


def _shared_object(*needed: str) -> bytes:
    import struct

    names = b"\0" + b"".join(name.encode() + b"\0" for name in needed)
    places = [names.index(name.encode()) for name in needed]
    dynamic_at, base = 64 + 2 * 56, 0x1000
    dynamic_size = 16 * (len(needed) + 2)
    names_at = dynamic_at + dynamic_size
    entries = [(1, place) for place in places] + [(5, base + names_at), (0, 0)]
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 64, 0, 0
    )
    size = names_at + len(names)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096)
    dynamic = struct.pack("<IIQQQQQQ", 2, 6, dynamic_at, base + dynamic_at, 0, dynamic_size, dynamic_size, 8)
    return header + load + dynamic + b"".join(struct.pack("<qQ", *entry) for entry in entries) + names


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
