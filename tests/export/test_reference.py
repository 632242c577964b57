from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from cspdeploy.core.errors import InputError
from cspdeploy.core.metrics import relative_l2
from cspdeploy.export import reference
from cspdeploy.export.reference import compute_reference

Array = npt.NDArray[np.float32]
LOGITS = ("logits",)


def test_outputs_in_both_precisions(tiny_model: nn.Module, tiny_x_NCHW: Array) -> None:
    model = copy.deepcopy(tiny_model)
    outputs_fp64, outputs_fp32 = compute_reference(model, tiny_x_NCHW, names=LOGITS)
    output_fp64, output_fp32 = outputs_fp64["logits"], outputs_fp32["logits"]
    assert (output_fp64.dtype, output_fp32.dtype) == (np.float64, np.float32)
    assert output_fp64.shape == output_fp32.shape == (3, 10)
    assert 0 < relative_l2(output_fp32, output_fp64) < 1e-5  # truly computed in float64, not widened
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_images_keep_their_order_over_several_batches(
    tiny_model: nn.Module, tiny_x_NCHW: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, _ = compute_reference(copy.deepcopy(tiny_model), tiny_x_NCHW, names=LOGITS)
    monkeypatch.setattr(reference, "MAX_BATCH_PIXELS", 1)
    one_by_one, _ = compute_reference(copy.deepcopy(tiny_model), tiny_x_NCHW, names=LOGITS)
    assert relative_l2(one_by_one["logits"], at_once["logits"]) < 1e-12


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_outputs_that_are_not_finite_are_refused(tiny_model: nn.Module, tiny_x_NCHW: Array, value: float) -> None:
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    with pytest.raises(InputError, match="NaN or infinite"):
        compute_reference(model, tiny_x_NCHW, names=LOGITS)
