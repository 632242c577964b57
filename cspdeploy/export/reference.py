"""What the original computes: the outputs that every artifact is judged by. Shapes: N images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cspdeploy.core.errors import InputError

__all__ = ["compute_reference"]

MAX_BATCH_PIXELS = 1 << 18
"""FP64 convolutions gather patches; this keeps their memory in the tens of megabytes."""


@torch.inference_mode()
def compute_reference(
    model: nn.Module, x_NCHW: npt.NDArray[np.float32], *, names: tuple[str, ...]
) -> tuple[dict[str, npt.NDArray[np.float64]], dict[str, npt.NDArray[np.float32]]]:
    """Outputs of `model` in float64 and in float32, by name, `[N, ...]` each. The model is left in float32.

    Raises:
        InputError: the model's own outputs are not finite.
    """
    model.eval()
    batch = max(1, MAX_BATCH_PIXELS // (x_NCHW.shape[2] * x_NCHW.shape[3]))
    chunks = torch.split(torch.from_numpy(x_NCHW), batch)
    outputs_fp32 = _compute(model, chunks, names)
    outputs_fp64 = _compute(model.double(), [chunk.double() for chunk in chunks], names)
    model.float()
    wild = [
        name for name in names if not (np.isfinite(outputs_fp64[name]).all() and np.isfinite(outputs_fp32[name]).all())
    ]
    if wild:
        raise InputError(
            f"the network's own outputs are NaN or infinite on real images ({', '.join(wild)})", fix="use other weights"
        )
    return outputs_fp64, outputs_fp32


def _compute(model: nn.Module, chunks: Sequence[Tensor], names: tuple[str, ...]) -> dict[str, npt.NDArray[Any]]:
    parts = [model(chunk) for chunk in chunks]
    outputs = [(part,) if isinstance(part, Tensor) else part for part in parts]
    return {name: torch.cat(same).numpy() for name, same in zip(names, zip(*outputs, strict=True), strict=True)}
