"""What CUDA, and the engines on it, say when it fails: told in one line, with the command that mends it.

Knows CUDA's error numbers and the engines' own texts; imports no engine.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from cspdeploy.core.errors import CspDeployError, DeviceMemoryError, InputError, RuntimeUnavailableError

__all__ = ["CODES", "BrokenGpuError", "Code", "cuda_version", "error_of", "error_of_run", "told"]

Kind = Literal["memory", "index", "driver", "mismatch", "none", "busy", "architecture", "broken"]
GIB = 1 << 30
LOOK = "nvidia-smi"


class Code(NamedTuple):
    """One of CUDA's errors: its name in the driver's interface, and what it means here."""

    name: str
    kind: Kind


# The driver and the runtime share these numbers (cuda.h: CUresult; driver_types.h: cudaError), but for 34 to 36, which
# only the runtime has but for the stub library's.
CODES: dict[int, Code] = {
    2: Code("CUDA_ERROR_OUT_OF_MEMORY", "memory"),
    34: Code("CUDA_ERROR_STUB_LIBRARY", "mismatch"),
    35: Code("cudaErrorInsufficientDriver", "driver"),
    36: Code("cudaErrorCallRequiresNewerDriver", "driver"),
    46: Code("CUDA_ERROR_DEVICE_UNAVAILABLE", "busy"),
    100: Code("CUDA_ERROR_NO_DEVICE", "none"),
    101: Code("CUDA_ERROR_INVALID_DEVICE", "index"),
    209: Code("CUDA_ERROR_NO_BINARY_FOR_GPU", "architecture"),
    222: Code("CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "driver"),
    304: Code("CUDA_ERROR_OPERATING_SYSTEM", "broken"),
    700: Code("CUDA_ERROR_ILLEGAL_ADDRESS", "broken"),
    719: Code("CUDA_ERROR_LAUNCH_FAILED", "broken"),
    802: Code("CUDA_ERROR_SYSTEM_NOT_READY", "broken"),
    803: Code("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "mismatch"),
    804: Code("CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE", "mismatch"),
    999: Code("CUDA_ERROR_UNKNOWN", "broken"),
}

# In the engines' words. ONNX Runtime's arena says the first of memory's where no number is given; the arena with a
# limit, the second. TensorRT says "Error Code 2: OutOfMemory" or "Cuda Runtime (out of memory)".
_TEXTS: tuple[tuple[Kind, str], ...] = (
    ("memory", r"Failed to allocate memory for requested buffer of size|is smaller than requested bytes of|"
               r"out of memory|OutOfMemory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|"
               r"CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    ("index", r"invalid device ordinal|Invalid device ID: -?\d+"),
    ("mismatch", r"unsupported display driver / cuda driver combination|forward compatibility was attempted|"
                 r"stub library"),
    ("driver", r"driver version is insufficient|driver on your system is too old|"
               r"not supported in the installed CUDA driver|compiled with an unsupported toolchain"),
    ("none", r"no CUDA-capable device|No CUDA GPUs are available|Found no NVIDIA driver|Torch not compiled with CUDA"),
    ("busy", r"(?:is|are) busy or unavailable"),
    ("architecture", r"no kernel image is available|not compatible with the current PyTorch installation"),
    ("broken", r"unspecified launch failure|illegal memory access|system not yet initialized|"
               r"CUDA error: unknown error"),
)  # fmt: skip
_NUMBER = re.compile(r"CUDA failure (\d+)|\bError (\d{1,3}): ")
_OF_THE_WORK: frozenset[Kind] = frozenset({"broken", "architecture", "mismatch"})
"""Where a device cannot be used they say why. In a run on one that could be opened they are faults of what was run."""


class BrokenGpuError(RuntimeUnavailableError):
    """CUDA failed by a number that tells neither of memory, nor of a missing or busy device, nor of an old driver."""


def told(
    error: BaseException, *, doing: str, batch: int | None = None, needs: str = "", device: int | None = None
) -> CspDeployError | None:
    """An engine's error on a GPU as one of ours; None where it is of something else.

    Args:
        doing: what was done, as "opening model.onnx".
        batch: of the inputs; half of it is what the fix names.
        needs: the CUDA version that the engine was built for, "13.0".
        device: index that was asked for.
    """
    if isinstance(error, CspDeployError):
        return None
    text = " ".join(str(error).split())
    kind = _kind(error, text)
    if kind is None:
        return None
    return _made(kind, detail=_detail(text), doing=doing, batch=batch, needs=needs, device=device)


def error_of_run(
    error: Exception, *, doing: str, batch: int | None = None, needs: str = "", device: int | None = None
) -> Exception:
    """What to raise for an error in a run of an open session: no memory, and a device that went away, as `told` has it.

    Everything else is the engine's own error, and the fault of what was run: a kernel that crashes the GPU must fail
    what it is of, and not pass for an engine that is not here. Arguments as of `told`.
    """
    if isinstance(error, BrokenGpuError):  # of the driver: the wait for the run, which is where such a kernel is seen
        return RuntimeError(error.message)
    if isinstance(error, CspDeployError) or _kind(error, " ".join(str(error).split())) in _OF_THE_WORK:
        return error
    return told(error, doing=doing, batch=batch, needs=needs, device=device) or error


def error_of(code: int, *, name: str = "", doing: str, device: int | None = None) -> CspDeployError:
    """The error for a number that a function of the driver gave. `name`: by which the driver calls it, if it told."""
    known = CODES.get(code)
    title = name or (known.name if known else f"CUDA error {code}")
    return _made(known.kind if known else "broken", detail=title, doing=doing, device=device)


def cuda_version(number: int) -> str:
    """CUDA's own number of a version in words: 13000 is "13.0"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _kind(error: BaseException, text: str) -> Kind | None:
    number = _NUMBER.search(text)
    code = int(number[1] or number[2]) if number else getattr(error, "error_code", None)  # torch.AcceleratorError
    if isinstance(code, int) and code in CODES:
        return CODES[code].kind
    found = next((kind for kind, pattern in _TEXTS if re.search(pattern, text)), None)
    return found or ("broken" if number is not None else None)


def _detail(text: str) -> str:
    """The part that tells: numbers of bytes where they are told, else the start without the engine's file and line."""
    asked = re.search(r"Tried to allocate ([\d.]+ [KMG]iB).*?([\d.]+ [KMG]iB) is free", text)
    if asked:
        return f"{asked[1]} asked for, {asked[2]} free"
    size = re.search(r"(?:requested buffer of size|requested bytes of|Requested size was) (\d+)", text)
    if size:
        return f"{int(size[1]) / GIB:.2f} GiB asked for"
    failure = re.search(r"CUDA failure \d+: .*?(?= ;|$)", text)
    return (failure[0] if failure else text)[:160]


def _made(
    kind: Kind, *, detail: str, doing: str, batch: int | None = None, needs: str = "", device: int | None = None
) -> CspDeployError:
    if kind == "memory":
        half = f"--batch {batch // 2}, or " if batch is not None and batch > 1 else ""
        return DeviceMemoryError(
            f"{doing}: out of GPU memory ({detail})", fix=f"{half}{LOOK}, to see what else holds it, or --device N"
        )
    if kind == "index":
        return _wrong_index(detail, doing, device)
    if kind == "driver":
        return _old_driver(detail, doing, needs)
    message, fix = _UNAVAILABLE[kind]
    made = BrokenGpuError if kind in _OF_THE_WORK else RuntimeUnavailableError
    return made(f"{doing}: {message} ({detail})", fix=fix)


_UNAVAILABLE: dict[Kind, tuple[str, str]] = {
    "none": ("CUDA finds no GPU", f"{LOOK} -L, and echo $CUDA_VISIBLE_DEVICES; in a container: docker run --gpus all"),
    "busy": (
        "the GPU is busy: another process holds it, or its compute mode lets no second one in",
        f"{LOOK}, to see who holds it, or --device N",
    ),
    "mismatch": (
        "the driver's library and its kernel module do not belong together",
        f"{LOOK}, which then says so as well; restart the machine after a driver update, "
        "and take other libcuda.so off LD_LIBRARY_PATH",
    ),
    "architecture": (
        "the engine has no kernels for this GPU's architecture",
        f"{LOOK} --query-gpu=name,compute_cap --format=csv, then install an engine built for it",
    ),
    "broken": ("CUDA failed", f"{LOOK}, to see whether the GPU is well"),
}


def _old_driver(detail: str, doing: str, needs: str) -> CspDeployError:
    has = _driver_version()
    if has and needs and int(has.partition(".")[0]) >= int(needs.partition(".")[0]):
        what = f"the NVIDIA driver, of CUDA {has}, lacks what the engine, built for CUDA {needs}, asks of it"
    else:
        goes = f"it goes up to CUDA {has}, " if has else ""
        what = f"the NVIDIA driver is too old: {goes}the engine needs {f'CUDA {needs}' if needs else 'a newer one'}"
    engine = f", or an engine built for CUDA {has}" if has else ""
    return RuntimeUnavailableError(
        f"{doing}: {what} ({detail})", fix=f"{LOOK}, to see the driver; install a newer one{engine}"
    )  # fmt: skip


def _wrong_index(detail: str, doing: str, device: int | None) -> CspDeployError:
    found = re.search(r"Invalid device ID: (-?\d+)", detail)
    index = str(device) if device is not None else found[1] if found else "the one asked for"
    told_count = re.search(r"and (\d+) \(exclusive\)", detail)
    count = int(told_count[1]) if told_count else _num_devices()
    have = "how many there are is not known" if count is None else f"there are {count} (0 to {count - 1})"
    return InputError(f"{doing}: no GPU {index}, {have}", fix=f"--device 0, or {LOOK} -L and CUDA_VISIBLE_DEVICES")


def _driver_version() -> str:
    from cspdeploy.runtimes.cuda_driver import driver_version

    return driver_version()


def _num_devices() -> int | None:
    from cspdeploy.runtimes.cuda_driver import count_devices

    try:
        return count_devices()
    except CspDeployError:
        return None
