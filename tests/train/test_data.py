from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.spec import Preprocess
from cspdeploy.train import data as train_data
from cspdeploy.train.data import BatchLoader, measure_mean_std
from cspdeploy.train.share import Share

MakeStripes = Callable[..., LabelledImages]


def test_in_order_gives_every_image_once_through_the_contract(
    make_stripes: MakeStripes, tiny_contract: Preprocess
) -> None:
    images = make_stripes(10, seed=0)
    batches = list(BatchLoader(images, tiny_contract, batch=4).in_order())
    assert [len(classes) for _, classes in batches] == [4, 4, 2]
    assert torch.cat([classes for _, classes in batches]).tolist() == images.classes.tolist()
    x_NCHW = torch.cat([x for x, _ in batches]).numpy()
    assert np.array_equal(x_NCHW, preprocess([images.source(i) for i in range(10)], tiny_contract))
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)
    assert batches[0][1].dtype == torch.int64


def test_epoch_is_the_same_for_the_same_seed_only(make_stripes: MakeStripes, tiny_contract: Preprocess) -> None:
    loader = BatchLoader(make_stripes(12, seed=0), tiny_contract, batch=4)
    first, again, next_epoch = (list(loader.epoch(seed=seed)) for seed in ((0, 1), (0, 1), (0, 2)))
    for (x, classes), (x_again, classes_again) in zip(first, again, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(classes, classes_again)
    assert not torch.equal(first[0][0], next_epoch[0][0])


def test_epoch_shuffles_and_keeps_image_and_class_together(tiny_contract: Preprocess) -> None:
    """Flat images whose brightness is their class: still legible after flips and shifts."""
    classes = np.arange(12)
    stored = np.broadcast_to(classes[:, None, None] * 20, (12, 32, 32)).astype(np.uint8)
    images = LabelledImages(name="grey", labels=tuple("abcdefghijkl"), classes=classes, stored=stored)
    batches = list(BatchLoader(images, tiny_contract, batch=4).epoch(seed=(0, 0)))
    order = torch.cat([drawn for _, drawn in batches]).tolist()
    assert sorted(order) == list(range(12))
    assert order != list(range(12))
    centres = torch.cat([x[:, 0, 16, 16] for x, _ in batches]) * 0.25 + 0.5
    assert (centres * 255 / 20).round().int().tolist() == order


@pytest.mark.parametrize(("num", "batch", "training", "evaluation"), [(10, 4, 2, 3), (8, 4, 2, 2), (3, 4, 1, 1)])
def test_training_drops_the_partial_batch_unless_it_is_the_only_one(
    make_stripes: MakeStripes, tiny_contract: Preprocess, num: int, batch: int, training: int, evaluation: int
) -> None:
    loader = BatchLoader(make_stripes(num, seed=0), tiny_contract, batch=batch)
    assert loader.num_batches(training=True) == training == len(list(loader.epoch(seed=(0, 0))))
    assert loader.num_batches(training=False) == evaluation == len(list(loader.in_order()))


def test_set_too_large_for_the_cache_gives_the_same_batches(
    make_stripes: MakeStripes, tiny_contract: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_stripes(8, seed=0)
    cached = list(BatchLoader(images, tiny_contract, batch=4).epoch(seed=(0, 0)))
    monkeypatch.setattr(train_data, "MAX_CACHE_BYTES", 0)
    decoded = list(BatchLoader(images, tiny_contract, batch=4).epoch(seed=(0, 0)))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(cached, decoded, strict=True))


@pytest.mark.parametrize("num", [2, 4])
def test_shares_of_all_workers_are_the_batches_of_one(
    make_stripes: MakeStripes, tiny_contract: Preprocess, num: int
) -> None:
    loader = BatchLoader(make_stripes(18, seed=0), tiny_contract, batch=8)
    shares = [Share(rank, num) for rank in range(num)]
    parts = zip(*(loader.epoch(seed=(0, 1), share=share) for share in shares), strict=True)
    for (x, classes), part in zip(loader.epoch(seed=(0, 1)), parts, strict=True):
        assert torch.equal(torch.cat([own for own, _ in part]), x)
        assert torch.equal(torch.cat([own for _, own in part]), classes)
    in_order = [list(loader.in_order(share=share)) for share in shares]
    for i, (x, _) in enumerate(loader.in_order()):
        assert torch.equal(in_order[i % num][i // num][0], x)
    assert sum(len(batches) for batches in in_order) == 3  # whole batches: of four workers one has none


def test_unreadable_image_reaches_the_caller(tiny_contract: Preprocess) -> None:
    broken = LabelledImages(
        name="broken", labels=("a",), classes=np.zeros(2, np.int64), stored=np.zeros((2, 0, 0), np.uint8)
    )
    with pytest.raises(Exception, match="image array"):
        BatchLoader(broken, tiny_contract, batch=1)


def test_mean_and_std_are_those_of_the_pixels(make_stripes: MakeStripes, tiny_contract: Preprocess) -> None:
    images = make_stripes(16, seed=0)
    assert images.stored is not None
    mean, std = measure_mean_std(images, tiny_contract)
    assert mean == pytest.approx([images.stored.mean() / 255] * 3, abs=1e-4)
    assert std == pytest.approx([images.stored.std() / 255] * 3, abs=1e-4)


def test_flat_images_have_a_std_that_can_be_divided_by(tiny_contract: Preprocess) -> None:
    flat = LabelledImages(
        name="flat", labels=("a",), classes=np.zeros(2, np.int64), stored=np.full((2, 8, 8), 51, np.uint8)
    )
    assert measure_mean_std(flat, tiny_contract) == ((0.2, 0.2, 0.2), (0.001, 0.001, 0.001))
