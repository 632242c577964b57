from __future__ import annotations

import pytest
import torch

from cspdeploy.core.errors import DeviceMemoryError, InputError, RuntimeUnavailableError
from cspdeploy.runtimes import cuda_errors
from cspdeploy.runtimes.cuda_errors import cuda_version, error_of, error_of_run, told

ARENA = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node. "
    "Name:'/stem/conv/Conv' Status Message: /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* "
    "onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*, bool, "
    "onnxruntime::WaitNotificationFn) Failed to allocate memory for requested buffer of size 8589934592"
)
TORCH = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 4.31 GiB is "
    "free. Process 12 has 74.79 GiB memory in use."
)
OLD = (
    "CUDA failure 36: API call is not supported in the installed CUDA driver ; GPU=-1 ; hostname=vm ; "
    "file=/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_execution_provider_info.cc ; line=70 ; "
    "expr=cudaGetDeviceCount(&num_devices);"
)


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        (ARENA, "8.00 GiB asked for"),
        (TORCH, "20.00 GiB asked for, 4.31 GiB free"),
        ("Available memory of 1048576 is smaller than requested bytes of 1073741824", "1.00 GiB asked for"),
        ("CUDA failure 2: out of memory ; GPU=0 ; hostname=vm ; file=x.cc ; line=3 ; expr=y;", "out of memory"),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", "CUDA error"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUBLAS_STATUS_ALLOC_FAILED"),
        ("CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED ; GPU=0", "CUDNN_STATUS_ALLOC_FAILED"),
        ("CUDNN failure 4002: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED ; GPU=0", "ALLOCATION_FAILED"),
        ("[E] Error Code 2: OutOfMemory (Requested size was 2147483648 bytes.)", "2.00 GiB asked for"),
        ("[defaultAllocator.cpp::allocate::57] Error Code 1: Cuda Runtime (out of memory)", "out of memory"),
    ],
)
def test_no_memory_is_one_line_with_half_the_batch(text: str, detail: str) -> None:
    found = told(RuntimeError(text), doing="running net.onnx", batch=32)
    assert isinstance(found, DeviceMemoryError)
    assert found.message.startswith("running net.onnx: out of GPU memory (")
    assert detail in found.message
    assert found.fix.startswith("--batch 16, or nvidia-smi")
    assert "\n" not in str(found)


def test_pytorchs_own_class_is_known_by_its_text() -> None:
    found = told(torch.OutOfMemoryError(TORCH), doing="running", batch=1)
    assert isinstance(found, DeviceMemoryError)
    assert "--batch" not in found.fix  # there is no smaller one


@pytest.mark.parametrize(
    "text",
    [
        OLD,
        "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version ; GPU=-1 ; hostname=vm",
        "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by "
        "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx",
        "CUDA error: CUDA driver version is insufficient for CUDA runtime version",
        "CUDA error: the provided PTX was compiled with an unsupported toolchain.",
    ],
)
def test_driver_that_is_too_old_names_both_versions(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(cuda_errors, "_driver_version", lambda: "12.2")
    found = told(RuntimeError(text), doing="opening net.onnx", needs="13.0")
    assert isinstance(found, RuntimeUnavailableError)
    assert "the NVIDIA driver is too old: it goes up to CUDA 12.2, the engine needs CUDA 13.0" in found.message
    assert "\n" not in str(found)


def test_driver_of_the_same_version_that_lacks_a_function_is_not_called_older(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_errors, "_driver_version", lambda: "13.0")
    found = told(RuntimeError(OLD), doing="opening", needs="13.0")
    assert found is not None
    assert "of CUDA 13.0, lacks what the engine, built for CUDA 13.0, asks of it" in found.message


@pytest.mark.parametrize(
    ("text", "words", "fix"),
    [
        ("CUDA failure 100: no CUDA-capable device is detected ; GPU=-1", "finds no GPU", "nvidia-smi -L"),
        ("No CUDA GPUs are available", "finds no GPU", "nvidia-smi -L"),
        ("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU", "finds no GPU", "docker"),
        ("Torch not compiled with CUDA enabled", "finds no GPU", "nvidia-smi"),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", "the GPU is busy", "--device N"),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", "the GPU is busy", "--device N"),
        ("CUDA failure 46: all CUDA-capable devices are busy or unavailable ; GPU=0", "the GPU is busy", "--device N"),
        ("Unexpected error from cudaGetDeviceCount(). Error 803: system has unsupported display driver / cuda driver "
         "combination", "do not belong together", "restart"),
        ("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized", "CUDA failed", "nvidia-"),
        ("CUDA failure 804: forward compatibility was attempted on non supported HW", "do not belong", "libcuda.so"),
        ("CUDA error: no kernel image is available for execution on the device", "no kernels for this", "compute_cap"),
        ("CUDA failure 999: unknown error ; GPU=0 ; hostname=vm", "CUDA failed", "nvidia-smi"),
        ("CUDA error: an illegal memory access was encountered", "CUDA failed", "nvidia-smi"),
        ("CUDA failure 12345: a number of the future ; GPU=0", "CUDA failed", "nvidia-smi"),
    ],
)  # fmt: skip
def test_device_that_cannot_be_used_is_unavailable(text: str, words: str, fix: str) -> None:
    found = told(RuntimeError(text), doing="opening net.onnx")
    assert isinstance(found, RuntimeUnavailableError)
    assert found.exit_code == 3
    assert words in found.message
    assert fix in found.fix


def test_wrong_index_tells_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Invalid device ID: 3, must be between 0 (inclusive) and 2 (exclusive)."
    found = told(RuntimeError(text), doing="opening net.onnx", device=3)
    assert isinstance(found, InputError)
    assert found.message == "opening net.onnx: no GPU 3, there are 2 (0 to 1)"
    monkeypatch.setattr(cuda_errors, "_num_devices", lambda: None)
    found = told(RuntimeError("CUDA error: invalid device ordinal"), doing="opening", device=7)
    assert found is not None
    assert "no GPU 7, how many there are is not known" in found.message


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Unknown provider option: \"bogus\"."), RuntimeError("shape mismatch"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"),
        InputError("CUDA error: out of memory"),
    ],
)  # fmt: skip
def test_what_is_of_something_else_is_left_to_its_owner(error: Exception) -> None:
    assert told(error, doing="running") is None


def test_number_that_pytorch_gives_with_its_error_counts() -> None:
    class NumberedError(RuntimeError):
        error_code = 2

    assert isinstance(told(NumberedError("CUDA error"), doing="running"), DeviceMemoryError)


@pytest.mark.parametrize(
    ("code", "name", "kind"),
    [
        (2, "CUDA_ERROR_OUT_OF_MEMORY", DeviceMemoryError), (101, "CUDA_ERROR_INVALID_DEVICE", InputError),
        (100, "CUDA_ERROR_NO_DEVICE", RuntimeUnavailableError), (4711, "CUDA error 4711", RuntimeUnavailableError),
    ],
)  # fmt: skip
def test_numbers_of_the_driver(code: int, name: str, kind: type[Exception]) -> None:
    found = error_of(code, doing="asking", device=5)
    assert isinstance(found, kind)
    assert name in found.message or "no GPU 5" in found.message


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered", "CUDA failure 719: unspecified launch failure ; GPU=0",
        "CUDA failure 901: operation failed due to a previous error during capture ; GPU=0",
        "CUDA error: unknown error",
        "CUDA error: no kernel image is available for execution on the device", "shape mismatch",
    ],
)  # fmt: skip
def test_fault_in_a_run_is_the_engines_own_error(text: str) -> None:
    error = RuntimeError(text)
    assert error_of_run(error, doing="running net.onnx") is error


@pytest.mark.parametrize("code", [700, 719, 209, 4711])
def test_fault_that_the_driver_tells_of_in_a_run_is_no_missing_engine(code: int) -> None:
    error = error_of(code, doing="waiting for the GPU")
    assert isinstance(error, RuntimeUnavailableError)
    found = error_of_run(error, doing="running net.onnx")
    assert type(found) is RuntimeError
    assert str(found).startswith("waiting for the GPU: ")


@pytest.mark.parametrize(
    ("text", "kind"),
    [(TORCH, DeviceMemoryError), ("CUDA error: invalid device ordinal", InputError), (OLD, RuntimeUnavailableError),
     ("CUDA error: no CUDA-capable device is detected", RuntimeUnavailableError),
     ("CUDA failure 46: all CUDA-capable devices are busy or unavailable ; GPU=0", RuntimeUnavailableError)],
)  # fmt: skip
def test_device_that_went_away_in_a_run_is_told(text: str, kind: type[Exception]) -> None:
    assert isinstance(error_of_run(RuntimeError(text), doing="running net.onnx"), kind)
    memory = DeviceMemoryError("out of GPU memory")
    assert error_of_run(memory, doing="running net.onnx") is memory


def test_versions_in_words() -> None:
    assert [cuda_version(number) for number in (13000, 12080, 11040)] == ["13.0", "12.8", "11.4"]
