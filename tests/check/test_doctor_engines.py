"""What the doctor says of the engines on a GPU, as recorded facts and trials lead to it. No GPU is here."""

from __future__ import annotations

import json

import pytest

from cspdeploy.check.doctor_cuda import arch_runs
from cspdeploy.check.doctor_driver import driver_command
from cspdeploy.check.doctor_facts import CudaMachine
from tests.check.cuda_machines import H100, HOLDER, OK, h100_with, judged, machine_of, trials_of


@pytest.mark.parametrize(
    ("cuda", "driver", "least"),
    [
        ("13.0", "575.57.08", "580"), ("13.0", "580.65.06", ""), ("12.8", "525.60.11", "525.60.13"),
        ("12.8", "525.60.13", ""), ("11.8", "450.51.06", "450.80.02"), ("11.8", "450.80.02", ""),
        ("13.0", "580", ""), ("", "390.10", ""),
    ],
)  # fmt: skip
def test_driver_older_than_the_cuda_of_a_wheel(packages: dict[str, str], cuda: str, driver: str, least: str) -> None:
    machine = machine_of(h100_with(driver_version=driver, cuda_version="12.2"))
    found = judged(machine, trials_of(cuda=cuda))
    told = [one for one in found.findings if "older than" in one.text]
    assert bool(told) is bool(least)
    if least:
        assert found.advice == (
            f"the driver {driver} (it runs CUDA 12.2) is older than {least}, which CUDA {cuda} of onnxruntime-gpu "
            "1.31.1 needs"
        )
        assert found.command == f"install NVIDIA's driver {least[:3]} or later (nvidia.com/drivers), then reboot"
        # cuda-compat: it runs all the same.
        assert judged(machine, trials_of(ort=True, cuda=cuda)).findings == ()


def test_driver_older_than_torch_needs(packages: dict[str, str]) -> None:
    machine = machine_of(h100_with(driver_version="535.54.03"), distribution="ubuntu")
    found = judged(machine, trials_of(ort=True, cuda="12.8", torch_cuda="13.0"))
    assert found.healthy
    note = next(one for one in found.findings if "older than" in one.text)
    assert "CUDA 13.0 of torch 2.13.0" in note.text
    assert note.command == "sudo ubuntu-drivers install nvidia:580 && sudo reboot"
    assert driver_command("", version="580").startswith("install NVIDIA's driver 580 or later")


def test_wheel_without_cuda(packages: dict[str, str]) -> None:
    packages.clear()
    packages["onnxruntime"] = "1.31.1"
    found = judged(machine_of(H100))
    assert found.healthy
    (note,) = found.findings
    assert note.text == "a GPU is here, but onnxruntime has no CUDA; cspdeploy[gpu] in its place has"
    assert note.command == "pip uninstall -y onnxruntime && pip install 'cspdeploy[gpu]'"


def test_libraries_that_are_missing_by_name_and_package(packages: dict[str, str]) -> None:
    missing = ["libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudnn.so.9"]
    trials = trials_of(**{"libraries:CUDAExecutionProvider": {"works": True, "missing": missing}})
    found = judged(machine_of(H100), trials)
    assert found.advice == (
        "onnxruntime-gpu does not find libcublasLt.so.13, libcublas.so.13, libcurand.so.10, libcudnn.so.9"
    )
    assert found.command == "pip install 'nvidia-cublas==13.*' nvidia-curand 'nvidia-cudnn-cu13==9.*'"


def test_libraries_are_not_missed_where_the_wheel_for_cpus_lies_over_the_other(packages: dict[str, str]) -> None:
    packages["onnxruntime"] = "1.31.1"
    trials = trials_of(cuda="", **{"libraries:CUDAExecutionProvider": {"works": True, "missing": ["libcudnn.so.9"]}})
    found = judged(CudaMachine(), trials)
    assert found.advice == "onnxruntime and onnxruntime-gpu are both installed and overwrite each other"
    assert not any("libcudnn" in one.text for one in found.findings)


def test_missing_tensorrt_is_a_note(packages: dict[str, str]) -> None:
    trials = trials_of(ort=True, **{"libraries:TensorrtExecutionProvider": {
        "works": True, "missing": ["libnvinfer.so.10", "libnvonnxparser.so.10"]}})  # fmt: skip
    found = judged(machine_of(H100), trials)
    assert found.healthy
    (note,) = found.findings
    assert note.text == "without TensorRT: libnvinfer.so.10, libnvonnxparser.so.10 not found"
    assert note.command == "pip install 'tensorrt-cu13==10.*'"
    assert judged(machine_of(H100), {**trials, "runtime:ort-tensorrt": OK}).findings == ()


def test_two_cudnn_packages_in_one_folder(packages: dict[str, str]) -> None:
    packages |= {"nvidia-cudnn-cu12": "9.10.2.21", "nvidia-cudnn-cu13": "9.28.1.4"}
    found = judged(machine_of(H100))
    assert found.advice == (
        "nvidia-cudnn-cu12 9.10.2.21 and nvidia-cudnn-cu13 9.28.1.4 are both installed, into one folder: "
        "they overwrite each other"
    )
    assert found.command == (
        "pip uninstall -y nvidia-cudnn-cu12 && pip install --force-reinstall --no-deps nvidia-cudnn-cu13"
    )
    assert judged(machine_of(H100), trials_of(ort=True)).healthy


def test_clash_of_two_engines_names_what_was_first(packages: dict[str, str]) -> None:
    files = [["/v/nvidia/cudnn/lib/libcudnn.so.9", "torch"], ["/usr/lib/libcudnn.so.9.1.0", "ort-cuda"],
             ["/v/libcudart.so.12", "torch"], ["/v/libcudart.so.13", "ort-cuda"]]  # fmt: skip
    found = judged(machine_of(H100), trials_of(ort=True, torch=True, torch_cuda="12.8", loaded={"files": files}))
    assert [one.text for one in found.findings] == [
        "libcudnn.so.9 is loaded twice in one process, first /v/nvidia/cudnn/lib/libcudnn.so.9 (by torch), then "
        "/usr/lib/libcudnn.so.9.1.0 (by ort-cuda): the first serves both engines",
        "onnxruntime was built for CUDA 13.0, torch for CUDA 12.8: they share no libraries",
    ]
    found = judged(machine_of(H100), trials_of(ort=True, torch=True, torch_cuda="12.8", loaded={"files": files[:1]}))
    assert found.findings[0].text.endswith("cuDNN was loaded first from /v/nvidia/cudnn/lib/libcudnn.so.9 (by torch)")
    assert found.findings[0].command.startswith("pip install --upgrade torch onnxruntime-gpu")


def test_cudnn_that_torch_refuses(packages: dict[str, str]) -> None:
    told = (
        "cuDNN version incompatibility: PyTorch was compiled  against (9, 10, 2) but found runtime version (9, 1, 0)."
    )
    trials = trials_of(ort=True, torch_cuda="13.0")
    trials["engine:torch"]["cudnn_problem"] = told
    (note,) = judged(machine_of(H100), trials).findings
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
    trials = trials_of(torch_cuda="13.0", ort=True)
    trials["engine:torch"]["archs"] = ["sm_75", "sm_80", "sm_90"]
    assert judged(machine_of(H100), trials).findings == ()
    (note,) = judged(machine_of(h100_with(compute_capability="12.0")), trials).findings
    assert "compute capability 12.0, for which torch 2.13.0 has no kernels (it has sm_75 sm_80 sm_90)" in note.text
    found = judged(machine_of(h100_with(compute_capability="6.1")), trials_of())
    assert found.advice == (
        "GPU 0 (NVIDIA H100) has compute capability 6.1, CUDA 13 of onnxruntime-gpu 1.31.1 begins at 7.5"
    )
    assert judged(machine_of(h100_with(compute_capability="")), trials).findings == ()


def test_what_nothing_explains_is_told_in_the_engines_words(packages: dict[str, str]) -> None:
    found = judged(machine_of(H100))
    assert found.advice == (
        "a GPU is here, and onnxruntime-gpu does not run on it: the session runs on CPUExecutionProvider"
    )
    assert found.command == "pip install --upgrade 'onnxruntime-gpu[cuda,cudnn]'"


def test_report_has_all_facts(packages: dict[str, str]) -> None:
    from cspdeploy.core.codec import to_json

    report = json.loads(json.dumps(to_json(judged(machine_of(H100, processes=(HOLDER,)), trials_of(ort=True)))))
    assert report["cuda"]["driver"]["gpus"][0]["compute_capability"] == "9.0"
    assert report["cuda"]["processes"][0]["pid"] == 4242
    assert report["cuda"]["kernel_module"] == "580.65.06"
