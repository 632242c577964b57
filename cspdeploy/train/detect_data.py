"""Batches for training detectors: pictures with boxes, augmented, one batch ahead of the step that uses it.

Shapes: N images of H x W px; targets `[M, 6]` float32 of all images together: index of the image in the batch, class,
left, top, right, bottom in pixels of the network's input. Class `IGNORED` is of boxes that need not be found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cspdeploy.core.detection.average_precision import TrueBoxes
from cspdeploy.core.detection.labelled import LabelledBoxes
from cspdeploy.core.pixels.fit import fit_image
from cspdeploy.core.preprocess import load_image, normalise, resize_image
from cspdeploy.core.spec import Preprocess
from cspdeploy.train.detect_augment import BoxedImage, augment_one, make_mosaic
from cspdeploy.train.detect_loss import IGNORED
from cspdeploy.train.share import Share

__all__ = ["BoxLoader", "to_input"]

MAX_CACHE_BYTES = 2 << 30
"""Resized pictures are kept in memory up to this size; those of a larger set are decoded again each time."""
MOSAIC_SHARE = 0.5
"""Of the pictures of an epoch; the others are whole, as those of the application will be."""

T = TypeVar("T")

Batch = tuple[Tensor, Tensor]
UInt8Array = npt.NDArray[np.uint8]


def to_input(
    boxes_M4: npt.NDArray[np.float64], contract: Preprocess, *, width: int, height: int
) -> npt.NDArray[np.float64]:
    """Boxes in a picture of `width` x `height` px, in pixels of the network's input, cut at its edges.

    The other way round it is `cspdeploy.core.detection.boxes.to_picture`.
    """
    fit = fit_image(contract, width=width, height=height)
    factors = np.array([fit.scaled_px[0] / width, fit.scaled_px[1] / height] * 2)
    moved = boxes_M4 * factors - np.array([fit.left_px, fit.top_px] * 2)
    return np.asarray(np.clip(moved, 0.0, np.array([contract.width_px, contract.height_px] * 2)), np.float64)


class BoxLoader:
    """Batches `(x [N, 3, H, W] float32 channels_last, targets [M, 6])` of a labelled set.

    Args:
        data: the pictures and their boxes.
        contract: size and normalisation.
        batch: pictures a batch.
        mosaic_epochs: in which half of the pictures are mosaics; none after that, so that the run ends on pictures
            as they are.
    """

    def __init__(self, data: LabelledBoxes, contract: Preprocess, *, batch: int, mosaic_epochs: int = 0) -> None:
        self.data, self.contract, self.batch, self.mosaic_epochs = data, contract, batch, mosaic_epochs
        size_bytes = len(data) * contract.height_px * contract.width_px * 3
        self._cache: dict[int, BoxedImage] | None = {} if size_bytes <= MAX_CACHE_BYTES else None
        self._sizes_px: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self.data)

    def num_batches(self, *, training: bool) -> int:
        """Training drops the last, partial batch, unless it is the only one."""
        full, rest = divmod(len(self.data), self.batch)
        return max(full, 1) if training else full + (rest > 0)

    def epoch(self, *, seed: tuple[int, int], share: Share = Share()) -> Iterator[Batch]:  # noqa: B008  # frozen
        """Shuffled and augmented, the same for the same seed (seed, epoch); of each batch the part of `share`.

        Each picture of the epoch has random numbers of its own, by its place in it: a worker prepares its part and
        nothing else, and the parts of all workers together are the batch of one, to the bit.
        """
        mosaics = MOSAIC_SHARE if seed[1] < self.mosaic_epochs else 0.0
        order = np.random.default_rng(seed).permutation(len(self.data)).tolist()
        starts = [i * self.batch for i in range(self.num_batches(training=True))]

        def make(start: int) -> Batch:
            part = share.of(len(order[start : start + self.batch]))
            places = range(start + part.start, start + part.stop)
            # From 1 on: a trailing zero seeds as if it were not there, with the numbers that the order is drawn from.
            generators = (np.random.default_rng((*seed, at + 1)) for at in places)
            return self._batch(
                [self._augmented(order[at], rng, mosaics) for at, rng in zip(places, generators, strict=True)]
            )

        return _ahead(make, starts)

    def in_order(self, *, share: Share = Share()) -> Iterator[Batch]:  # noqa: B008  # frozen
        """Every picture once, as it is; of several workers each takes whole batches, by turns."""
        return _ahead(lambda indices: self._batch([self.boxed(index) for index in indices]), self._in_order(share))

    def indices_in_order(self, *, share: Share = Share()) -> list[int]:  # noqa: B008  # frozen
        """Which pictures `in_order` gives."""
        return [index for indices in self._in_order(share) for index in indices]

    def _in_order(self, share: Share) -> list[range]:
        num = len(self.data)
        starts = range(0, num, self.batch)
        return [range(start, min(start + self.batch, num)) for i, start in enumerate(starts) if share.takes(i)]

    def boxed(self, index: int) -> BoxedImage:
        """Picture `index` at the contract's size; boxes that do not count have the class `IGNORED`."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        image = load_image(self.data.paths[index])
        self._sizes_px[index] = (image.width, image.height)
        truth = self.data.truth(index, width=image.width, height=image.height)
        boxes = to_input(np.asarray(truth.boxes_M4, np.float64), self.contract, width=image.width, height=image.height)
        classes = np.where(truth.uncounted, IGNORED, truth.classes_M).astype(np.int64)
        keep = (boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf) > 0
        made = BoxedImage(pixels_HWC=resize_image(image, self.contract), boxes_M4=boxes[keep], classes_M=classes[keep])
        if self._cache is not None:
            self._cache[index] = made
        return made

    def in_picture(self, index: int) -> tuple[TrueBoxes, int, int]:
        """All that is labelled in picture `index`, in its own pixels, and its width and height."""
        if index not in self._sizes_px:
            self.boxed(index)
        width, height = self._sizes_px[index]
        return self.data.truth(index, width=width, height=height), width, height

    def sizes(self) -> npt.NDArray[np.float64]:
        """Width and height `[M, 2]` of each box that counts, in pixels of the network's input: for anchors."""
        every = [self.boxed(index) for index in range(len(self.data))]
        boxes = np.concatenate([image.boxes_M4[image.classes_M != IGNORED] for image in every])
        return np.asarray(boxes[:, 2:] - boxes[:, :2], np.float64)

    def _augmented(self, index: int, rng: np.random.Generator, share: float) -> BoxedImage:
        if rng.random() >= share:
            return augment_one(self.boxed(index), rng)
        others = rng.integers(len(self.data), size=3).tolist()
        return make_mosaic([self.boxed(one) for one in (index, *others)], rng)

    def _batch(self, images: Sequence[BoxedImage]) -> Batch:
        pixels = np.stack([image.pixels_HWC for image in images])
        rows = [
            np.column_stack([np.full(len(image.classes_M), i), image.classes_M, image.boxes_M4])
            for i, image in enumerate(images)
        ]
        x_NCHW = torch.from_numpy(normalise(pixels, self.contract)).contiguous(memory_format=torch.channels_last)
        return x_NCHW, torch.from_numpy(np.concatenate(rows).astype(np.float32))


def _ahead(make: Callable[[T], Batch], chosen: Sequence[T]) -> Iterator[Batch]:
    """One batch is made while the one before is used."""
    if not chosen:
        return
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(make, chosen[0])
        for one in chosen[1:]:
            ready = pending.result()
            pending = pool.submit(make, one)
            yield ready
        yield pending.result()
