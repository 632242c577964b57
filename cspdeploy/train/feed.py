"""Batches onto the device, the next one while the step of the one before is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["on_device"]

Batch = tuple[Tensor, Tensor]


def on_device(batches: Iterable[Batch], device: torch.device, *, targets: bool = True) -> Iterator[Batch]:
    """The same batches on `device`; on the CPU as they are.

    On a GPU from pinned memory on a stream of its own, which the caller's stream waits for: the copy of a batch goes
    on beside the step that the caller has begun with the one before.

    Args:
        batches: images `[N, 3, H, W]` and what is to be learnt of them.
        device: where the images go.
        targets: whether what is to be learnt goes there as well.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    moving: _Copy | None = None
    for batch in batches:
        if moving is not None:
            yield moving.arrived()
        moving = _Copy(batch, stream, targets=targets)
    if moving is not None:
        yield moving.arrived()


class _Copy:
    """One batch on its way."""

    def __init__(self, batch: Batch, stream: torch.cuda.Stream, *, targets: bool) -> None:
        x_NCHW, wanted = batch
        with torch.cuda.stream(stream):
            self._x = x_NCHW.pin_memory().to(stream.device, non_blocking=True)
            self._targets = wanted.pin_memory().to(stream.device, non_blocking=True) if targets else wanted
            self._event = stream.record_event()

    def arrived(self) -> Batch:
        """The batch; what the current stream is given from now on comes after the copy."""
        current = torch.cuda.current_stream(self._x.device)
        current.wait_event(self._event)
        for tensor in (self._x, self._targets):
            if tensor.is_cuda:  # made on the other stream: the memory is not given away while this one reads it
                tensor.record_stream(current)
        return self._x, self._targets
