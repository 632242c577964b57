from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, max_pool2d, relu

from cspdeploy.nets.blocks import FeatureLevel
from cspdeploy.nets.resnet import ResNet, ResNetConfig

TINY = ResNetConfig(depths=(2, 1), groups=2, group_width=4)


def _norm(key: str, chs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{key}.{part}", (chs,)) for part in ("weight", "bias", "running_mean", "running_var"))
    yield f"{key}.num_batches_tracked", ()


def _published_layout(depths: tuple[int, ...], groups: int, group_width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of torchvision's resnet50 and resnext50_32x4d."""
    yield "conv1.weight", (64, 3, 7, 7)
    yield from _norm("bn1", 64)
    in_chs = 64
    for i, depth in enumerate(depths):
        mid, out = groups * group_width << i, 256 << i
        for j in range(depth):
            key = f"layer{i + 1}.{j}"
            yield f"{key}.conv1.weight", (mid, in_chs, 1, 1)
            yield from _norm(f"{key}.bn1", mid)
            yield f"{key}.conv2.weight", (mid, mid // groups, 3, 3)
            yield from _norm(f"{key}.bn2", mid)
            yield f"{key}.conv3.weight", (out, mid, 1, 1)
            yield from _norm(f"{key}.bn3", out)
            if j == 0:
                yield f"{key}.downsample.0.weight", (out, in_chs, 1, 1)
                yield from _norm(f"{key}.downsample.1", out)
            in_chs = out
    yield "fc.weight", (1000, in_chs)
    yield "fc.bias", (1000,)


@pytest.mark.parametrize(("groups", "group_width"), [(1, 64), (32, 4)], ids=["resnet50", "resnext50_32x4d"])
def test_layout_is_that_of_the_published_checkpoints(groups: int, group_width: int) -> None:
    depths = (3, 4, 6, 3)
    with torch.device("meta"):
        model = ResNet(ResNetConfig(depths=depths, groups=groups, group_width=group_width), num_classes=1000)
    layout = [(key, tuple(value.shape)) for key, value in model.state_dict().items()]
    assert layout == list(_published_layout(depths, groups, group_width))
    assert len(layout) == 320


@torch.no_grad()
def test_forward_is_that_of_the_paper(randomise_norms: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    model = ResNet(TINY, num_classes=5).double().eval()
    randomise_norms(model)
    state = model.state_dict()

    def unit(x: Tensor, conv: str, bn: str, *, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        x = conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2, groups=groups)
        return batch_norm(x, *(state[f"{bn}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    x = max_pool2d(relu(unit(images, "conv1", "bn1", stride=2)), 3, stride=2, padding=1)
    for key, stride, projected in (("layer1.0", 1, True), ("layer1.1", 1, False), ("layer2.0", 2, True)):
        y = relu(unit(x, f"{key}.conv1", f"{key}.bn1"))
        y = relu(unit(y, f"{key}.conv2", f"{key}.bn2", stride=stride, groups=2))
        y = unit(y, f"{key}.conv3", f"{key}.bn3")
        shortcut = unit(x, f"{key}.downsample.0", f"{key}.downsample.1", stride=stride) if projected else x
        x = relu(y + shortcut)
    logits = x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(model(images), logits, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_zero_init_makes_residual_blocks_identities() -> None:
    model = ResNet(TINY, num_classes=2).eval()
    block = model.get_submodule("layer1.1")
    x = torch.rand(1, 256, 4, 4)  # not negative: the ReLU after the sum leaves it alone
    assert not torch.equal(block(x), x)
    model.zero_init_residual()
    assert torch.equal(block(x), x)


def test_feature_levels(keeps_its_maps: Callable[[nn.Module], None]) -> None:
    model = ResNet(TINY, num_classes=2).eval()
    assert model.feature_levels == (FeatureLevel(2, 64), FeatureLevel(4, 256), FeatureLevel(8, 512))
    seen: list[Tensor] = []
    for name in ("layer1", "layer2"):
        model.get_submodule(name).register_forward_hook(lambda *args: seen.append(args[2].clone()))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = model.forward_features(x)
        assert torch.equal(maps[0], model.relu(model.bn1(model.conv1(x))))
    assert all(torch.equal(one, other) for one, other in zip(maps[1:], seen, strict=True))
    for level, one in zip(model.feature_levels, maps, strict=True):
        assert one.shape == (1, level.num_chs, 64 // level.stride, 64 // level.stride)
    keeps_its_maps(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": ()}, "stages: got 0"),
        ({"depths": (3, 0)}, "depth: got 0"),
        ({"depths": (10**9,)}, "depth: got 1000000000"),
        ({"groups": 0}, "groups: got 0"),
        ({"group_width": -4}, "group_width: got -4"),
        ({"groups": 60_000, "group_width": 60_000}, "groups . group_width: got"),
    ],
    ids=str,
)
def test_configuration_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)
