"""Batches for training: shuffled, augmented, normalised, one ahead of the step that uses them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.preprocess import normalise
from cspdeploy.core.spec import Preprocess
from cspdeploy.train.augment import augment
from cspdeploy.train.share import Share

__all__ = ["BatchLoader", "measure_mean_std"]

MAX_CACHE_BYTES = 2 << 30
"""Resized images are kept in memory up to this size; a larger set is decoded again each epoch."""

Batch = tuple[Tensor, Tensor]


class BatchLoader:
    """Batches `(x [N, 3, H, W] float32 channels_last, class [N] int64)` of a labelled set.

    Args:
        data: the images.
        contract: size and normalisation.
        batch: images a batch.
    """

    def __init__(self, data: LabelledImages, contract: Preprocess, *, batch: int) -> None:
        self.data = data
        self.contract = contract
        self.batch = batch
        size_bytes = len(data) * contract.height_px * contract.width_px * 3
        self._cache = data.resized(np.arange(len(data)), contract) if size_bytes <= MAX_CACHE_BYTES else None

    def num_batches(self, *, training: bool) -> int:
        """Training drops the last, partial batch, unless it is the only one."""
        full, rest = divmod(len(self.data), self.batch)
        return max(full, 1) if training else full + (rest > 0)

    def epoch(self, *, seed: tuple[int, int], share: Share = Share()) -> Iterator[Batch]:  # noqa: B008  # frozen
        """Shuffled and augmented, the same for the same seed (seed, epoch); of each batch the part of `share`.

        The parts of all workers together are the batch of one, to the bit.
        """
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self.data))
        chosen = [order[i * self.batch : (i + 1) * self.batch] for i in range(self.num_batches(training=True))]
        return self._ahead(chosen, rng, share)

    def in_order(self, *, share: Share = Share()) -> Iterator[Batch]:  # noqa: B008  # frozen
        """Every image once, as it is; of several workers each takes whole batches, by turns."""
        chosen = [indices for i, indices in enumerate(self.data.batches(self.batch)) if share.takes(i)]
        return self._ahead(chosen, None, Share())

    def _ahead(
        self, chosen: list[npt.NDArray[np.int64]], rng: np.random.Generator | None, share: Share
    ) -> Iterator[Batch]:
        if not chosen:
            return
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(self._make, chosen[0], rng, share)
            for indices in chosen[1:]:
                ready = pending.result()
                pending = pool.submit(self._make, indices, rng, share)
                yield ready
            yield pending.result()

    def _make(self, indices: npt.NDArray[np.int64], rng: np.random.Generator | None, share: Share) -> Batch:
        part = share.of(len(indices))
        own, cached = indices[part], self._cache
        images = cached[own] if cached is not None else self.data.resized(own, self.contract)
        if rng is not None:
            images = augment(images, rng, part=part, num=len(indices))
        x_NCHW = torch.from_numpy(normalise(images, self.contract))
        return x_NCHW.contiguous(memory_format=torch.channels_last), torch.from_numpy(self.data.classes[own])


Triple = tuple[float, float, float]


def measure_mean_std(data: LabelledImages, contract: Preprocess, *, num_images: int = 2048) -> tuple[Triple, Triple]:
    """Mean and standard deviation of each channel in [0, 1], over evenly spread images, rounded to 4 decimals."""
    indices = np.linspace(0, len(data) - 1, min(num_images, len(data))).astype(np.int64)
    pixels = data.resized(indices, contract).reshape(-1, 3) / 255.0
    mean, std = (np.round(values, 4).tolist() for values in (pixels.mean(0), pixels.std(0).clip(1e-3)))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
