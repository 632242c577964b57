from __future__ import annotations

import pytest
import torch
from torch import nn

from cspdeploy.train.metrics import measure_accuracy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_and_first_five_of_every_image_count(dtype: torch.dtype) -> None:
    """The batch is the logits: class 9 is first, 8 second, 0 last. Batches of unequal size weigh by their images."""
    logits = torch.arange(10.0).repeat(6, 1)
    classes = torch.tensor([9, 9, 8, 5, 4, 0])
    batches = [(logits[:5], classes[:5]), (logits[5:], classes[5:])]
    assert measure_accuracy(nn.Identity(), batches, dtype=dtype) == (2 / 6, 4 / 6)


def test_fewer_than_five_classes() -> None:
    assert measure_accuracy(nn.Identity(), [(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))]) == (0.0, 1.0)


def test_model_is_evaluated_not_trained() -> None:
    norm = nn.BatchNorm1d(2)
    measure_accuracy(norm, [(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))])
    assert not norm.training
    assert norm.num_batches_tracked == 0
