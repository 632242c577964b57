"""The network to a .pt2 file of `torch.export`: the form that PyTorch keeps, where TorchScript is being retired."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cspdeploy.core.types import StepRecord

__all__ = ["MAX_BATCH", "RETIREMENT", "export_pt2"]

MAX_BATCH = 4096
"""`torch.export` wants a bound for a size that is left free."""
RETIREMENT = (
    "PyTorch is retiring TorchScript (deprecated since 2.11); .pt2 is what it keeps, to be compiled by AOTInductor or "
    "ExecuTorch"
)
"""In one plain sentence; source: the deprecation warnings of `torch.jit` in PyTorch 2.11 and later."""

_ROOT = "model"


def export_pt2(model: nn.Module, example_NCHW: Tensor, path: Path) -> StepRecord:
    """Write `path`, the batch free from 1 to `MAX_BATCH`. Batch norms stay nodes of their own.

    Args:
        model: on the CPU, whose `forward` takes one tensor.
        example_NCHW: float32 `[N, 3, H, W]`; height and width are fixed by it.
    """
    # A batch of one is specialised: the program would take no other.
    example = example_NCHW if len(example_NCHW) > 1 else example_NCHW.repeat(2, 1, 1, 1)
    free = torch.export.Dim("N", min=1, max=MAX_BATCH)
    with torch.no_grad():
        # A copy: weights that went through inference mode are tensors that torch.export does not take.
        own = copy.deepcopy(model).eval()
        for module in own.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = nn.Parameter(weight.detach().clone(), requires_grad=False)
        program = torch.export.export(own, (example[:2],), dynamic_shapes=({0: free},), strict=False)
        program.example_inputs = None  # pixels of whoever exports have no place in the file
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
    _write_canonical(buffer, path)
    return StepRecord(name="pt2", outcome="done", detail=f"torch.export, batch 1 to {MAX_BATCH}; {RETIREMENT}")


def _write_canonical(saved: io.BytesIO, path: Path) -> None:
    """Write the archive without what changes from one place or run to the next.

    Left out: stack traces of every node, which hold source paths of this machine, and the serialization id, a hash over
    all. The folder that all lies in is named after the file otherwise.
    """
    # Python's own write, so that a full disk is an OSError.
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name in sorted(source.namelist()):
            inner = name.partition("/")[2]
            if inner == ".data/serialization_id":
                continue
            data = source.read(name)
            if inner.startswith("models/") and inner.endswith(".json"):
                data = json.dumps(_without_traces(json.loads(data)), separators=(",", ":")).encode()
            target.writestr(zipfile.ZipInfo(f"{_ROOT}/{inner}"), data)  # ZipInfo's date is fixed: 1980


def _without_traces(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_traces(item) for key, item in value.items() if key != "stack_trace"}
    if isinstance(value, list):
        return [_without_traces(item) for item in value]
    return value
