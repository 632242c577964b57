from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cspdeploy.core.detection.boxes import Boxes, to_picture
from cspdeploy.core.spec import Preprocess
from cspdeploy.nets.network import darknet_contract
from cspdeploy.train.detect_data import BoxLoader, to_input
from cspdeploy.train.detect_folder import open_boxes
from cspdeploy.train.share import Share

CONTRACT = darknet_contract().with_size(64, 96)


@pytest.fixture(scope="module")
def loader(boxes_folder: Path) -> BoxLoader:
    contract = dataclasses.replace(CONTRACT, resize="letterbox")
    return BoxLoader(open_boxes(boxes_folder, split="train"), contract, batch=6, mosaic_epochs=1)


@pytest.mark.parametrize("resize", ["stretch", "letterbox", "crop"])
def test_to_the_input_and_back_again(resize: str) -> None:
    contract: Preprocess = dataclasses.replace(CONTRACT, resize=resize)
    boxes = np.array([[60.0, 50.0, 120.0, 90.0], [100.0, 30.0, 130.0, 100.0]])
    there = to_input(boxes, contract, width=200, height=140)
    found = Boxes(boxes_M4=there.astype(np.float32), scores_M=np.ones(2, np.float32), classes_M=np.zeros(2, np.int64))
    assert to_picture(found, contract, width=200, height=140).boxes_M4 == pytest.approx(boxes, abs=1e-3)


def test_what_lies_outside_the_crop_is_cut_off() -> None:
    contract = dataclasses.replace(CONTRACT.with_size(64, 64), resize="crop", crop_pct=1.0)
    assert to_input(np.array([[0.0, 0.0, 200.0, 100.0]]), contract, width=200, height=100).tolist() == [[0, 0, 64, 64]]


def test_batches_in_order(loader: BoxLoader) -> None:
    batches = list(loader.in_order())
    assert [tuple(x.shape) for x, _ in batches] == [(6, 3, 64, 96), (6, 3, 64, 96), (4, 3, 64, 96)]
    assert loader.num_batches(training=False) == 3
    truths = [loader.boxed(index) for index in range(len(loader))]
    rows = torch.cat([targets for _, targets in batches]).numpy()
    assert rows[:, 2:] == pytest.approx(np.concatenate([truth.boxes_M4 for truth in truths]), abs=1e-4)
    assert rows[:, 1].tolist() == np.concatenate([truth.classes_M for truth in truths]).tolist()
    assert set(rows[:, 0]) <= set(range(6))


def test_pixels_under_a_box_have_the_colour_of_its_class(loader: BoxLoader) -> None:
    """The last one drawn, which no other covers."""
    for index in range(len(loader)):
        image = loader.boxed(index)
        left, top, right, bottom = image.boxes_M4[-1]
        centre = image.pixels_HWC[int((top + bottom) / 2), int((left + right) / 2)]
        assert centre.argmax() == image.classes_M[-1]


def test_an_epoch_is_augmented_and_the_same_for_its_seed(loader: BoxLoader) -> None:
    one, two, other = (list(loader.epoch(seed=seed)) for seed in ((1, 0), (1, 0), (1, 1)))
    assert len(one) == loader.num_batches(training=True) == 2
    assert all(torch.equal(a, b) for pair in zip(one, two, strict=True) for a, b in zip(*pair, strict=True))
    assert not torch.equal(one[0][0], other[0][0])
    for x, targets in (*one, *other):
        assert x.shape == (6, 3, 64, 96)
        assert (targets[:, 4:] > targets[:, 2:4]).all()
        assert targets[:, 2:].min() >= 0
        assert (targets[:, 4:] <= torch.tensor([96.0, 64.0])).all()


@pytest.mark.parametrize("epoch", [0, 1])
def test_shares_of_all_workers_are_the_batches_of_one(loader: BoxLoader, epoch: int) -> None:
    """With mosaics and without: pixels and boxes to the bit, the boxes' pictures numbered within the slice."""
    shares = [Share(rank, 3) for rank in range(3)]
    parts = zip(*(loader.epoch(seed=(4, epoch), share=share) for share in shares), strict=True)
    for (x, targets), part in zip(loader.epoch(seed=(4, epoch)), parts, strict=True):
        assert torch.equal(torch.cat([own for own, _ in part]), x)
        moved = [rows + torch.tensor([2.0 * rank, 0, 0, 0, 0, 0]) for rank, (_, rows) in enumerate(part)]
        assert torch.equal(torch.cat(moved), targets)
    assert [loader.indices_in_order(share=share) for share in shares] == [
        list(range(6)), list(range(6, 12)), list(range(12, 16)),
    ]  # fmt: skip


def test_mosaics_end_before_the_run_does(loader: BoxLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    import cspdeploy.train.detect_data as module

    made: list[int] = []
    whole = module.make_mosaic
    monkeypatch.setattr(module, "make_mosaic", lambda images, rng: made.append(1) or whole(images, rng))
    list(loader.epoch(seed=(0, 0)))
    assert 0 < len(made) < 12
    made.clear()
    list(loader.epoch(seed=(0, 1)))
    assert made == []


def test_a_set_too_large_for_the_memory_gives_the_same(loader: BoxLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cspdeploy.train.detect_data.MAX_CACHE_BYTES", 0)
    uncached = BoxLoader(loader.data, loader.contract, batch=6, mosaic_epochs=1)
    for (x, targets), (y, others) in zip(loader.epoch(seed=(1, 0)), uncached.epoch(seed=(1, 0)), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(targets, others)


def test_sizes_are_those_of_all_boxes(loader: BoxLoader) -> None:
    assert len(loader.sizes()) == sum(len(loader.boxed(index).classes_M) for index in range(len(loader)))
    assert (loader.sizes() > 0).all()


def test_a_picture_without_a_box_is_a_picture_too(make_boxes_folder: Callable[..., Path]) -> None:
    folder = make_boxes_folder(3, 1)
    (folder / "labels" / "train" / "001.txt").unlink()
    data = open_boxes(folder, split="train")
    assert [len(truth) > 0 for truth in data.stored] == [True, False, True]
    (batch,) = BoxLoader(data, CONTRACT, batch=3).in_order()
    assert 1.0 not in batch[1][:, 0]
