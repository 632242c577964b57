from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cspdeploy.check.accuracy import BATCH, measure_accuracy
from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.spec import Preprocess

NUM_CLASSES = 10


def _data(answers: list[int]) -> LabelledImages:
    """Plain images of class 0; the grey of each is the number of classes that `_rank` puts before it."""
    stored = np.stack([np.full((32, 32), answer, np.uint8) for answer in answers])
    return LabelledImages(
        name="greys/test", labels=tuple("abcdefghij"), classes=np.zeros(len(answers), np.int64), stored=stored
    )


def _grey(x_NCHW: npt.NDArray[np.float32], contract: Preprocess) -> npt.NDArray[np.int64]:
    grey = (x_NCHW.mean(axis=(1, 2, 3)) * contract.std[0] + contract.mean[0]) * 255
    return np.rint(grey).astype(np.int64)


def _rank(x_NCHW: npt.NDArray[np.float32], contract: Preprocess) -> npt.NDArray[np.float32]:
    """Logits that put as many classes before class 0 as the grey says."""
    logits = np.tile(-np.arange(1, NUM_CLASSES + 1, dtype=np.float32), (len(x_NCHW), 1))
    logits[:, 0] = -_grey(x_NCHW, contract) - 1.5
    return logits


def test_top1_and_top5_are_counted(tiny_contract: Preprocess) -> None:
    # Ranks of the true class: first three times, second to fifth four times, later three times.
    data = _data([0, 0, 0, 1, 2, 3, 4, 5, 7, 9])
    found = measure_accuracy(lambda x_NCHW: _rank(x_NCHW, tiny_contract), data, tiny_contract)
    assert found.dataset == "greys/test"
    assert found.num_images == 10
    assert found.top1 == 0.3
    assert found.top5 == 0.7


def test_every_image_is_seen_once_across_batches(tiny_contract: Preprocess) -> None:
    num = BATCH + 44
    sizes: list[int] = []
    seen: list[tuple[int, int]] = []

    def compute(x_NCHW: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        assert x_NCHW.dtype == np.float32
        assert x_NCHW.shape[1:] == (3, 32, 32)
        sizes.append(len(x_NCHW))
        return _rank(x_NCHW, tiny_contract)

    data = _data([0] * BATCH + [9] * 44)
    found = measure_accuracy(compute, data, tiny_contract, progress=lambda done, total: seen.append((done, total)))
    assert sizes == [BATCH, 44]
    assert seen == [(BATCH, num), (num, num)]
    assert found.num_images == num
    assert found.top1 == BATCH / num


def test_fewer_than_five_classes(tiny_contract: Preprocess) -> None:
    data = LabelledImages(
        name="two", labels=("a", "b"), classes=np.array([0, 1]), stored=np.zeros((2, 32, 32), np.uint8)
    )
    found = measure_accuracy(lambda x: np.tile(np.float32([2.0, 1.0]), (len(x), 1)), data, tiny_contract)
    assert (found.top1, found.top5) == (0.5, 1.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_hit_nothing(tiny_contract: Preprocess, value: float) -> None:
    """Sorted like any others, a row of NaN would name class 0 and the four after it."""
    found = measure_accuracy(
        lambda x_NCHW: np.full((len(x_NCHW), NUM_CLASSES), value, np.float32), _data([0] * 4), tiny_contract
    )
    assert (found.top1, found.top5) == (0.0, 0.0)
