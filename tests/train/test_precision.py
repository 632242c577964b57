"""Settings of PyTorch that training changes; they can be set and read without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.spec import ModelSpec
from cspdeploy.train.data import BatchLoader
from cspdeploy.train.loop import Recipe, _NetworkTrainer
from cspdeploy.train.precision import fast_kernels, true_float32

GPU = torch.device("cuda", 0)


def _flags() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.usefixtures("process_settings")
def test_tf32_is_for_training_and_not_for_what_is_kept() -> None:
    before, benchmark = _flags(), torch.backends.cudnn.benchmark
    with fast_kernels(GPU):
        assert _flags() == (True, True)
        assert torch.backends.cudnn.benchmark
        with true_float32(GPU):
            assert _flags() == (False, False)
        assert _flags() == (True, True)
    with true_float32(GPU):
        assert _flags() == (False, False)
    assert (_flags(), torch.backends.cudnn.benchmark) == (before, benchmark)


@pytest.mark.parametrize("setting", [fast_kernels, true_float32])
def test_a_cpu_has_none_of_it(setting: Callable[[torch.device], object]) -> None:
    before = _flags(), torch.backends.cudnn.benchmark
    with setting(torch.device("cpu")):
        assert (_flags(), torch.backends.cudnn.benchmark) == before


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="before PyTorch 2.9")
@pytest.mark.usefixtures("process_settings")
def test_settings_by_their_other_name_are_no_hindrance() -> None:
    """To read a flag raises then."""
    whole: Any = torch.backends
    conv, rnn, matmul = whole.cudnn.conv, whole.cudnn.rnn, whole.cuda.matmul
    whole.fp32_precision = "tf32"
    conv.fp32_precision, matmul.fp32_precision = "ieee", "tf32"
    with pytest.raises(RuntimeError):
        _flags()
    for setting, word in ((fast_kernels, "tf32"), (true_float32, "ieee")):
        with setting(GPU):
            assert {each.fp32_precision for each in (conv, rnn, matmul)} == {word}
            assert _flags() == (word == "tf32", word == "tf32")
        assert (conv.fp32_precision, rnn.fp32_precision, matmul.fp32_precision) == ("ieee", "tf32", "tf32")


class Steep(_NetworkTrainer):
    """Whose gradients are no float32 when they are scaled by 2^127."""

    def loss(self, x_NCHW: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return 1e6 * super().loss(x_NCHW, classes)


@pytest.mark.parametrize("fits", [True, False])
def test_a_step_whose_gradients_are_infinite_counts_for_nothing(
    stripes_spec: ModelSpec, make_stripes: Callable[..., LabelledImages], fits: bool
) -> None:
    """The scaler leaves it out and halves its scale; schedule and average wait for the next one."""
    trainer = Steep(stripes_spec, Recipe(epochs=1, batch=8), 4)
    scale = 2.0**-20 if fits else 2.0**127
    trainer._scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    weights = [parameter.clone() for parameter in trainer.model.parameters()]
    average = [parameter.clone() for parameter in trainer.average.parameters()]
    loader = BatchLoader(make_stripes(8, seed=0), stripes_spec.preprocess, batch=8)
    trainer.step(*next(iter(loader.epoch(seed=(0, 0)))))
    assert trainer._scaler.get_scale() == (scale if fits else scale / 2)
    assert (trainer.num_steps, trainer.schedule.last_epoch) == ((1, 1) if fits else (0, 0))
    assert all(map(torch.equal, weights, trainer.model.parameters())) != fits
    assert all(map(torch.equal, average, trainer.average.parameters())) != fits
