"""Labelled accuracy of a torch module."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["measure_accuracy"]


@torch.inference_mode()
def measure_accuracy(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in [0, 1], with `model` in evaluation mode.

    Args:
        model: `[N, 3, H, W]` to logits `[N, C]`.
        batches: pairs of images and class indices.
        dtype: float32, or bfloat16 to run under autocast.
    """
    model.eval()
    num_images = num_first = num_among_five = 0
    for x_NCHW, classes in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(x_NCHW).float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == classes[:, None]
        num_first += int(ranked[:, 0].sum())
        num_among_five += int(ranked.any(dim=1).sum())
        num_images += len(classes)
    return num_first / num_images, num_among_five / num_images
