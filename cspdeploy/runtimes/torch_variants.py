"""The eager network set otherwise: channels-last, in float16, compiled. Outputs stay float32 and in their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cspdeploy.core.errors import CspDeployError, InputError, RuntimeUnavailableError
from cspdeploy.runtimes.base import SessionRequest

__all__ = ["CAPTURING", "MODES", "compile_failure", "prepared", "refuse_variants"]

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Of `torch.compile`."""
CAPTURING = MODES[1:3]
"""Of them those that on CUDA capture CUDA graphs by themselves."""

_OF_COMPILER = ("torch._dynamo", "torch._inductor")
_FIXES = (
    ("C++ compiler", "apt-get install g++, or CXX=/path/to/it"),
    ("Python.h", "apt-get install python3-dev"),
    ("triton", "pip install triton"),
)


def prepared(model: nn.Module, *, request: SessionRequest) -> Callable[..., Any]:
    """The network as `request.cuda` asks for it; changes `model`.

    Raises:
        InputError: a mode that PyTorch does not have, or two ways to capture CUDA graphs at once.
    """
    cuda = request.cuda
    if cuda.half:
        model = _Float32Outputs(model.half())
    if cuda.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not cuda.compile:
        return model
    if cuda.compile not in MODES:
        raise InputError(f"torch.compile has no mode '{cuda.compile}', expected one of {', '.join(MODES)}")
    if request.cuda_graph and cuda.compile in CAPTURING:
        raise InputError(
            f"torch.compile in mode '{cuda.compile}' captures CUDA graphs by itself, another one was asked for",
            fix="leave out the CUDA graph, or compile with max-autotune-no-cudagraphs",
        )
    # Shapes are fixed, as in a deployed engine; with sizes as symbols some kernels are not considered.
    compiled = torch.compile(model, mode=cuda.compile, dynamic=False)
    return _told(compiled, mode=cuda.compile)


class _Float32Outputs(nn.Module):
    """A network in float16 whose outputs are widened, as those of an FP16 artifact are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Any:
        found = self.model(*inputs)
        return found.float() if isinstance(found, Tensor) else tuple(value.float() for value in found)


def _told(compute: Callable[..., Any], *, mode: str) -> Callable[..., Any]:
    """Compiled code is made in its first run, and so fails there."""

    def run(*inputs: Tensor) -> Any:
        try:
            return compute(*inputs)
        except Exception as error:  # the compiler's exceptions share no base class but this one
            found = compile_failure(error, mode=mode)
            if found is None:
                raise
            raise found from error

    return run


def compile_failure(error: BaseException, *, mode: str) -> CspDeployError | None:
    """A failure of PyTorch's compiler in one line; None where it is of something else, memory among it."""
    if not any(kind.__module__.startswith(_OF_COMPILER) for kind in type(error).__mro__):
        return None
    text = " ".join(str(error).split())
    if "out of memory" in text:
        return None
    fix = next((fix for words, fix in _FIXES if words in text), "run it without torch.compile")
    return RuntimeUnavailableError(f"torch.compile in mode '{mode}' failed: {text[:200]}", fix=fix)


def refuse_variants(request: SessionRequest, *, what: str) -> None:
    """Refuse settings of the eager network for a file that is run as it is.

    Raises:
        InputError: one was asked for.
    """
    cuda = request.cuda
    asked = {"channels-last": cuda.channels_last, "fp16": cuda.half, "compile": bool(cuda.compile)}
    names = [name for name, wanted in asked.items() if wanted]
    if names:
        raise InputError(
            f"{request.path}: {what} is run as it is, asked for {', '.join(names)}", fix="--runtime torch-cuda"
        )
