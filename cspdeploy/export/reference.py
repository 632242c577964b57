"""What the original computes: the outputs that every artifact is judged by. Shapes: N images, C classes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cspdeploy.core.errors import InputError

__all__ = ["compute_reference"]

MAX_BATCH_PIXELS = 1 << 18
"""FP64 convolutions gather patches; this keeps their memory in the tens of megabytes."""


@torch.inference_mode()
def compute_reference(
    model: nn.Module, x_NCHW: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32]]:
    """Outputs of `model` in float64 and in float32, `[N, C]` each. The model is left in float32.

    Raises:
        InputError: the model's own outputs are not finite.
    """
    model.eval()
    batch = max(1, MAX_BATCH_PIXELS // (x_NCHW.shape[2] * x_NCHW.shape[3]))
    chunks = torch.split(torch.from_numpy(x_NCHW), batch)
    output_fp32 = torch.cat([model(chunk) for chunk in chunks]).numpy()
    output_fp64 = torch.cat([model.double()(chunk.double()) for chunk in chunks]).numpy()
    model.float()
    if not (np.isfinite(output_fp64).all() and np.isfinite(output_fp32).all()):
        raise InputError("the network's own outputs are NaN or infinite on real images", fix="use other weights")
    return output_fp64, output_fp32
