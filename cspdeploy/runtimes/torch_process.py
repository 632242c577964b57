"""Settings of PyTorch on a GPU that are of the whole process: TF32, cuDNN's search. Set on purpose, and read back."""

from __future__ import annotations

from typing import Any

import torch

from cspdeploy.core.errors import InputError
from cspdeploy.runtimes.base import SessionRequest
from cspdeploy.runtimes.cuda_driver import driver_version
from cspdeploy.runtimes.tf32 import override_setting

__all__ = ["float32_parts", "keep_process", "set_process", "set_tf32", "settings_of"]

_in_force: list[tuple[bool, str]] = []
"""TF32 and search of the session that set the process last; empty before the first."""


def set_process(request: SessionRequest) -> None:
    """TF32 and cuDNN's search, which are settings of the whole process.

    Raises:
        InputError: a search that PyTorch does not have.
    """
    if request.cuda.conv_search == "default":
        raise InputError("PyTorch has no convolution search 'default', expected 'heuristic' or 'exhaustive'")
    set_tf32(request.tf32)
    torch.backends.cudnn.benchmark = request.cuda.conv_search == "exhaustive"
    _in_force[:] = [(request.tf32, request.cuda.conv_search)]


def set_tf32(allowed: bool) -> None:
    """Of matrix products and convolutions, by both names that PyTorch has for it from 2.9 on.

    The flags alone leave a part to `torch.backends.fp32_precision`, which may be "tf32". The precisions alone make it
    raise where a flag is read that does not agree, as torch.export and torch.compile do.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    for part in float32_parts().values():
        part.fp32_precision = "tf32" if allowed else "ieee"


def keep_process(request: SessionRequest) -> None:
    """Before a run: the settings of its session, where another one in this process was opened or run since.

    Where it is the same session each time, as in a process of its own, this compares two values and sets nothing.
    """
    if _in_force != [(request.tf32, request.cuda.conv_search)]:
        set_process(request)


def float32_parts() -> dict[str, Any]:
    """What has a precision of float32 of its own, by name; empty before PyTorch 2.9, which has two flags instead."""
    cudnn: Any = torch.backends.cudnn
    if not hasattr(getattr(cudnn, "conv", None), "fp32_precision"):
        return {}
    return {"matmul": torch.backends.cuda.matmul, "cudnn": cudnn.conv, "rnn": cudnn.rnn}


def _tf32_settings() -> dict[str, str]:
    parts = float32_parts()
    found = {name: part.fp32_precision == "tf32" for name, part in parts.items()} or {
        "matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32
    }  # fmt: skip
    return {f"use_tf32_{name}": str(int(used)) for name, used in found.items()}


def settings_of(request: SessionRequest) -> dict[str, str]:
    """What a session on a GPU computes with, read back from PyTorch after `set_process`."""
    cuda = request.cuda
    found = {
        "device_id": str(cuda.device),
        **_tf32_settings(),
        **override_setting(),
        "fp16_reduced_sums": str(int(torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction)),
        "deterministic_algorithms": str(int(torch.are_deterministic_algorithms_enabled())),
        "cudnn_benchmark": str(int(torch.backends.cudnn.benchmark)),
        "cudnn_deterministic": str(int(torch.backends.cudnn.deterministic)),
        "cuda_graph": str(int(request.cuda_graph)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "cudnn": _dotted(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "driver_cuda": driver_version(),
    }
    return {name: value for name, value in found.items() if value}


def _dotted(number: int | None) -> str:
    return "" if number is None else f"{number // 10000}.{number % 10000 // 100}.{number % 100}"
