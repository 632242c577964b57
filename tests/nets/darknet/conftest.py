"""Published cfgs, thinned so that they run in milliseconds, and weights under which every fault shows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cspdeploy.nets.darknet.cfg import parse_cfg, read_cfg
from cspdeploy.nets.darknet.network import DarknetNet
from cspdeploy.nets.darknet.sections import Convolutional, DarknetConfig, Yolo

CFGS = Path(__file__).parents[4] / "shared" / "data" / "darknet"


@pytest.fixture(scope="session")
def published() -> Callable[[str], DarknetConfig]:
    """`published("yolov4")`: that cfg of AlexeyAB/darknet."""

    @functools.cache
    def read(name: str) -> DarknetConfig:
        path = CFGS / f"{name}.cfg"
        if not path.is_file():
            pytest.skip(f"no published cfg {path}")
        return read_cfg(path)

    return read


@pytest.fixture(scope="session")
def thinned(published: Callable[[str], DarknetConfig]) -> Callable[[str], DarknetConfig]:
    """The same layers at 64 px with an eighth of the channels, but for those of the outputs."""

    @functools.cache
    def thin(name: str) -> DarknetConfig:
        config = published(name)
        layers = list(config.layers)
        for index, layer in enumerate(layers):
            into_head = index + 1 < len(layers) and isinstance(layers[index + 1], Yolo)
            if isinstance(layer, Convolutional) and not into_head and layer.batch_normalize:
                groups = max(1, layer.groups // 8)
                layers[index] = dataclasses.replace(layer, filters=layer.filters // 8, groups=groups)
        return dataclasses.replace(config, layers=tuple(layers)).with_size(64, 64)

    return thin


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module], nn.Module]:
    """Weights and statistics that all do something, in evaluation mode."""

    def fill(network: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    nn.init.uniform_(tensor, 0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    nn.init.normal_(tensor, std=0.2)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.2)
        return network.eval()

    return fill


DETECTOR = """
[net]
height=32
width=32
channels=3

[convolutional]
batch_normalize=1
filters=8
size=3
stride=2
pad=1
activation=leaky

[convolutional]
batch_normalize=1
filters=12
size=3
stride=2
pad=1
groups=4
activation=mish

[maxpool]
size=2
stride=2

[convolutional]
filters=14
size=1
activation=linear

[yolo]
mask=0,1
anchors=10,14, 23,27, 37,58
classes=2
num=3
"""


@pytest.fixture
def detector() -> DarknetConfig:
    """One head of 2 anchors and 2 classes; three convolutions: layers 0, 1 and 3."""
    return parse_cfg(DETECTOR)


@pytest.fixture
def detector_net(detector: DarknetConfig, randomise: Callable[[nn.Module], DarknetNet]) -> DarknetNet:
    return randomise(DarknetNet(detector))
