"""What tests of several network families share."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn


def _randomise_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


@pytest.fixture
def randomise_norms() -> Callable[[nn.Module], None]:
    """Batch norms that do something, so that a swapped or forgotten one shows."""
    return _randomise_norms


@pytest.fixture
def keeps_its_maps() -> Callable[[nn.Module], None]:
    """Whether an activation in place writes over a feature map that was already given out."""

    @torch.no_grad()
    def check(model: nn.Module) -> None:
        _randomise_norms(model)
        apart = copy.deepcopy(model).eval()
        in_place = [module for module in apart.modules() if getattr(module, "inplace", False)]
        assert in_place
        for module in in_place:
            module.inplace = False  # type: ignore[assignment]
        x_NCHW = torch.randn(1, 3, 64, 64)
        maps, expected = model.eval().forward_features(x_NCHW), apart.forward_features(x_NCHW)  # type: ignore[operator]
        assert len(maps) == len(expected) == len(model.feature_levels)  # type: ignore[arg-type]
        for one, other in zip(maps, expected, strict=True):
            assert torch.equal(one, other)

    return check
