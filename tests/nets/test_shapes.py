from __future__ import annotations

import pytest
import torch
from torch import nn

from cspdeploy.nets import cost
from cspdeploy.nets.cost import measure_cost, measure_module
from cspdeploy.nets.registry import find_network, spec_of

FAMILIES = ("cspdarknet53", "cs3sedarknet_l", "csresnext50-omega", "resnet50", "densenet121", "csppeleenet")


def _peak(*layers: nn.Module) -> int:
    """Of an input of 3 channels of 9x8 px; the last layer is one that makes a tensor."""
    return measure_module(nn.Sequential(*layers).to("meta"), height_px=9, width_px=8).peak_activation_bytes


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_are_those_of_pytorch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = find_network(name)
    spec = spec_of(network, preprocess=network.preprocess.with_size(96, 64))
    found = measure_cost(spec)
    monkeypatch.setattr(cost, "SHAPES", {})
    assert measure_cost(spec) == found


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(2), nn.MaxPool2d(3, stride=2, padding=1), nn.MaxPool2d(3, stride=2), nn.MaxPool2d(5, 1, 2),
        nn.MaxPool2d(3, stride=2, ceil_mode=True), nn.MaxPool2d((1, 3), (1, 2), (0, 1)), nn.MaxPool2d(2, dilation=3),
        nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(3, stride=2, ceil_mode=True), nn.AvgPool2d((3, 2)),
        nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3), nn.Conv2d(3, 4, 2, dilation=3), nn.Conv2d(3, 4, (1, 5)),
        nn.ConvTranspose2d(3, 4, 2, stride=2), nn.Upsample(scale_factor=2), nn.Softmax(1), nn.Flatten(),
    ],
    ids=str,
)  # fmt: skip
def test_layer_that_makes_its_output(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _peak(layer, nn.ReLU())
    real = nn.Sequential(layer.to_empty(device="cpu"), nn.ReLU())(torch.zeros(1, 3, 9, 8))
    made = real.numel() * 4
    whole = 3 * 9 * 8 * 4
    assert found == (2 * made if isinstance(layer, nn.Flatten) else max(whole + made, 2 * made))
    monkeypatch.setattr(cost, "SHAPES", {})
    assert _peak(layer.to("meta"), nn.ReLU()) == found


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(4, 4, 1),), (nn.Conv2d(3, 4, 10),), (nn.MaxPool2d(10),), (nn.AvgPool2d(10),),
        (nn.Flatten(), nn.Linear(7, 2)),
    ],
    ids=str,
)  # fmt: skip
def test_layer_that_does_not_fit_is_refused_by_pytorch(layers: tuple[nn.Module, ...]) -> None:
    with pytest.raises(RuntimeError):
        _peak(*layers)


def test_concatenation_that_does_not_fit_is_refused_by_pytorch() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x[:, :, :4]], 1)

    with pytest.raises(RuntimeError, match=r"[Ss]izes"):
        _peak(Net())
