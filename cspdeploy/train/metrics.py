"""Labelled accuracy of a torch module."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cspdeploy.train.feed import on_device
from cspdeploy.train.precision import autocast, device_of
from cspdeploy.train.workers import NO_WORKERS, Workers

__all__ = ["measure_accuracy"]


@torch.inference_mode()
def measure_accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    dtype: torch.dtype = torch.float32,
    workers: Workers = NO_WORKERS,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in [0, 1], with `model` in evaluation mode, on the device where it lies.

    Args:
        model: `[N, 3, H, W]` to logits `[N, C]`.
        batches: pairs of images and class indices; on several workers, those of this one.
        dtype: float32, or a half type to run under autocast.
        workers: that measure together. What they count is added, so that the figure is that of one worker.
    """
    model.eval()
    device = device_of(model)
    num_images = 0
    found = torch.zeros(2, dtype=torch.int64, device=device)  # read once: each reading waits for the device
    for x_NCHW, classes in on_device(batches, device):
        with autocast(device, dtype):
            logits = model(x_NCHW).float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == classes[:, None]
        found += torch.stack([ranked[:, 0].sum(), ranked.any(dim=1).sum()])
        num_images += len(classes)
    num_first, num_among_five = (int(count) for count in found.tolist())
    num_first, num_among_five, num_images = workers.sums(num_first, num_among_five, num_images)
    return num_first / num_images, num_among_five / num_images
