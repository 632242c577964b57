"""The network to TorchScript: traced, frozen, batch norms folded into convolutions."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from cspdeploy.core.types import StepRecord

__all__ = ["export_torchscript"]


def export_torchscript(model: nn.Module, example_NCHW: Tensor, path: Path) -> StepRecord:
    """Write `path`. The batch stays free in TorchScript whatever the example's is."""
    with warnings.catch_warnings(), torch.inference_mode():
        # PyTorch 2.11 and later deprecate TorchScript as a whole.
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model.eval(), example_NCHW, check_trace=False)  # type: ignore[no-untyped-call]
        frozen = torch.jit.freeze(traced)
        buffer = io.BytesIO()
        torch.jit.save(frozen, buffer)
    path.write_bytes(buffer.getbuffer())  # Python's own write, so that a full disk is an OSError
    return StepRecord(name="torchscript", outcome="done", detail="traced and frozen; batch norms folded")
