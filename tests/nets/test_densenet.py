from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, max_pool2d, relu

from cspdeploy.nets.blocks import FeatureLevel
from cspdeploy.nets.densenet import DenseNet, DenseNetConfig, DenseTransition, stage_widths

DENSE = DenseNetConfig(
    style="densenet", stem_chs=8, growth=4, depths=(2, 3), bottleneck=(4, 4), compression=0.5, gamma=0.0, fusion="both"
)
PELEE = DenseNetConfig(
    style="peleenet", stem_chs=8, growth=4, depths=(2, 3), bottleneck=(1, 2), compression=1.0, gamma=0.0, fusion="both"
)
DENSENET121 = DenseNetConfig(
    style="densenet", stem_chs=64, growth=32, depths=(6, 12, 24, 16), bottleneck=(4,) * 4, compression=0.5, gamma=0.0,
    fusion="both",
)  # fmt: skip
PELEENET = DenseNetConfig(
    style="peleenet", stem_chs=32, growth=32, depths=(3, 4, 8, 6), bottleneck=(1, 2, 4, 4), compression=1.0, gamma=0.0,
    fusion="both",
)  # fmt: skip
FUSIONS = ("both", "first", "last")

Layout = Iterator[tuple[str, tuple[int, ...]]]


def _norm(key: str, chs: int) -> Layout:
    yield from ((f"{key}.{part}", (chs,)) for part in ("weight", "bias", "running_mean", "running_var"))
    yield f"{key}.num_batches_tracked", ()


def _densenet121() -> Layout:
    """Keys and shapes of torchvision's densenet121."""
    yield "features.conv0.weight", (64, 3, 7, 7)
    yield from _norm("features.norm0", 64)
    chs = 64
    for i, depth in enumerate((6, 12, 24, 16)):
        for j in range(depth):
            key = f"features.denseblock{i + 1}.denselayer{j + 1}"
            yield from _norm(f"{key}.norm1", chs)
            yield f"{key}.conv1.weight", (128, chs, 1, 1)
            yield from _norm(f"{key}.norm2", 128)
            yield f"{key}.conv2.weight", (32, 128, 3, 3)
            chs += 32
        if i < 3:
            yield from _norm(f"features.transition{i + 1}.norm", chs)
            yield f"features.transition{i + 1}.conv.weight", (chs // 2, chs, 1, 1)
            chs //= 2
    yield from _norm("features.norm5", chs)
    yield "classifier.weight", (1000, chs)
    yield "classifier.bias", (1000,)


def _peleenet() -> Layout:
    """Keys and shapes of the PeleeNet of its authors."""

    def unit(key: str, out_chs: int, in_chs: int, kernel: int) -> Layout:
        yield f"features.{key}.conv.weight", (out_chs, in_chs, kernel, kernel)
        yield from _norm(f"features.{key}.norm", out_chs)

    yield from unit("stemblock.stem1", 32, 3, 3)
    yield from unit("stemblock.stem2a", 16, 32, 1)
    yield from unit("stemblock.stem2b", 32, 16, 3)
    yield from unit("stemblock.stem3", 32, 64, 1)
    chs = 32
    for i, (depth, inner) in enumerate(((3, 16), (4, 32), (8, 64), (6, 64))):
        for j in range(depth):
            key = f"denseblock{i + 1}.denselayer{j + 1}"
            yield from unit(f"{key}.branch1a", inner, chs, 1)
            yield from unit(f"{key}.branch1b", 16, inner, 3)
            yield from unit(f"{key}.branch2a", inner, chs, 1)
            yield from unit(f"{key}.branch2b", 16, inner, 3)
            yield from unit(f"{key}.branch2c", 16, 16, 3)
            chs += 32
        yield from unit(f"transition{i + 1}", chs, chs, 1)
    yield "classifier.weight", (1000, chs)
    yield "classifier.bias", (1000,)


def _on_meta(config: DenseNetConfig) -> DenseNet:
    with torch.device("meta"):
        return DenseNet(config, num_classes=1000).eval()


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    ("config", "published", "num_tensors"), [(DENSENET121, _densenet121, 727), (PELEENET, _peleenet, 680)],
    ids=["densenet121", "peleenet"],
)  # fmt: skip
def test_plain_layout_is_the_published_one_whatever_the_fusion(
    config: DenseNetConfig, published: Callable[[], Layout], num_tensors: int, fusion: Any
) -> None:
    state = _on_meta(dataclasses.replace(config, fusion=fusion)).state_dict()
    layout = [(key, tuple(value.shape)) for key, value in state.items()]
    assert layout == list(published())
    assert len(layout) == num_tensors


class WrittenOut:
    """The networks again, from the state dict alone."""

    def __init__(self, model: DenseNet) -> None:
        self.state = model.state_dict()
        self.config = model.config

    def norm(self, x: Tensor, key: str) -> Tensor:
        return batch_norm(
            x, *(self.state[f"{key}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        )

    def conv(self, x: Tensor, key: str, stride: int = 1) -> Tensor:
        weight = self.state[f"{key}.weight"]
        return conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    def unit(self, x: Tensor, key: str, stride: int = 1) -> Tensor:
        return relu(self.norm(self.conv(x, f"{key}.conv", stride), f"{key}.norm"))

    def stem(self, x: Tensor) -> Tensor:
        if self.config.style == "densenet":
            x = relu(self.norm(self.conv(x, "features.conv0", 2), "features.norm0"))
            return max_pool2d(x, 3, stride=2, padding=1)
        x = self.unit(x, "features.stemblock.stem1", 2)
        y = self.unit(self.unit(x, "features.stemblock.stem2a"), "features.stemblock.stem2b", 2)
        return self.unit(torch.cat([max_pool2d(x, 2), y], 1), "features.stemblock.stem3")

    def layer(self, x: Tensor, key: str) -> Tensor:
        if self.config.style == "densenet":
            y = self.conv(relu(self.norm(x, f"{key}.norm1")), f"{key}.conv1")
            return torch.cat([x, self.conv(relu(self.norm(y, f"{key}.norm2")), f"{key}.conv2")], 1)
        first = self.unit(self.unit(x, f"{key}.branch1a"), f"{key}.branch1b")
        second = self.unit(self.unit(self.unit(x, f"{key}.branch2a"), f"{key}.branch2b"), f"{key}.branch2c")
        return torch.cat([x, first, second], 1)

    def transition(self, x: Tensor, key: str) -> Tensor:
        if self.config.style == "densenet":
            return self.conv(relu(self.norm(x, f"{key}.norm")), f"{key}.conv")
        return self.unit(x, key)

    def __call__(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number in (1, 2):
            around = x[:, : int(x.shape[1] * self.config.gamma)]
            dense = x[:, around.shape[1] :]
            for j in range(self.config.depths[number - 1]):
                dense = self.layer(dense, f"features.denseblock{number}.denselayer{j + 1}")
            x = self.end_of_stage(around, dense, number)
        return x.mean((2, 3)) @ self.state["classifier.weight"].T + self.state["classifier.bias"]

    def end_of_stage(self, around: Tensor, dense: Tensor, number: int) -> Tensor:
        key, dense_key = f"features.transition{number}", f"features.transition{number}_b"
        is_partial, is_last = around.shape[1] > 0, number == 2
        if self.config.style == "densenet" and is_last:
            return relu(self.norm(torch.cat([around, dense], 1), "features.norm3"))
        if is_partial and self.config.fusion in ("both", "last"):
            dense = self.transition(dense, dense_key)
        x = torch.cat([around, dense], 1)
        if not is_partial:
            x = self.transition(x, key)
            return x if is_last else avg_pool2d(x, 2)
        if self.config.style == "peleenet" and not is_last:
            x = avg_pool2d(x, 2)
        if self.config.fusion != "last":
            x = self.transition(x, key)
        # After the convolution: the same function of a densenet's transition as before it.
        return avg_pool2d(x, 2) if self.config.style == "densenet" else x


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("config", [DENSE, PELEE], ids=["densenet", "peleenet"])
@torch.no_grad()
def test_forward_is_the_network_written_out(
    config: DenseNetConfig, gamma: float, fusion: Any, randomise_norms: Callable[[nn.Module], None]
) -> None:
    torch.manual_seed(0)
    model = DenseNet(dataclasses.replace(config, gamma=gamma, fusion=fusion), num_classes=5).double().eval()
    randomise_norms(model)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(images), WrittenOut(model)(images), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_pooling_before_the_convolution_is_pooling_after_it(randomise_norms: Callable[[nn.Module], None]) -> None:
    before, after = (DenseTransition(6, 4, pool=where).double().eval() for where in ("before", "after"))  # type: ignore[arg-type]
    randomise_norms(before)
    after.load_state_dict(before.state_dict())
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(before(x), after(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("gamma", [0.25, 0.5])
@pytest.mark.parametrize("config", [DENSENET121, PELEENET], ids=["densenet121", "peleenet"])
def test_stages_end_as_wide_as_those_of_the_plain_network(config: DenseNetConfig, gamma: float, fusion: Any) -> None:
    partial = dataclasses.replace(config, gamma=gamma, fusion=fusion)
    chs = config.stem_chs
    for stage in range(4):
        plain, widths = stage_widths(config, stage, chs), stage_widths(partial, stage, chs)
        assert widths.out == plain.out
        assert (plain.around, widths.around) == (0, int(gamma * chs))
        assert widths.dense_in == chs - widths.around
        chs = plain.out


@pytest.mark.parametrize("config", [DENSE, PELEE], ids=["densenet", "peleenet"])
@torch.no_grad()
def test_the_share_gamma_goes_around_untouched(config: DenseNetConfig) -> None:
    model = DenseNet(dataclasses.replace(config, gamma=0.5, fusion="both"), num_classes=2).eval()
    inputs: list[Tensor] = []
    model.features["denseblock1"].register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    maps = model.forward_features(torch.randn(1, 3, 32, 32))
    stem_out = WrittenOut(model).stem  # the stage's input, again
    torch.manual_seed(1)
    x = torch.randn(1, 3, 32, 32)
    maps, stage_in = model.forward_features(x), stem_out(x)
    torch.testing.assert_close(inputs[-1], stage_in[:, 4:])
    torch.testing.assert_close(maps[1][:, :4], stage_in[:, :4])


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("config", [DENSE, PELEE], ids=["densenet", "peleenet"])
def test_feature_levels(config: DenseNetConfig, gamma: float, keeps_its_maps: Callable[[nn.Module], None]) -> None:
    model = DenseNet(dataclasses.replace(config, gamma=gamma), num_classes=2).eval()
    assert [level.stride for level in model.feature_levels] == [2, 4, 8]
    assert model.feature_levels[0] == FeatureLevel(2, 8)
    seen: dict[str, Tensor] = {}
    for name, module in model.features.items():
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        maps = model.forward_features(torch.randn(1, 3, 64, 64))
    for level, one in zip(model.feature_levels, maps, strict=True):
        assert one.shape == (1, level.num_chs, 64 // level.stride, 64 // level.stride)
    assert torch.equal(maps[-1], seen["relu3" if config.style == "densenet" else "transition2"])
    if not gamma:
        assert torch.equal(maps[1], seen["denseblock1"])
    keeps_its_maps(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": ()}, "stages: got 0"),
        ({"depths": (2, 0)}, "depth: got 0"),
        ({"depths": (2, 10**9)}, "depth: got 1000000000"),
        ({"bottleneck": (4,)}, "bottleneck: got 1 items"),
        ({"bottleneck": (4, 0)}, "bottleneck: got 0"),
        ({"growth": 0}, "growth: got 0"),
        ({"stem_chs": 1}, "stem_chs: got 1"),
        ({"compression": 1.5}, "compression: got 1.5"),
        ({"gamma": -0.1}, "gamma: got -0.1"),
        ({"gamma": float("nan")}, "gamma: got nan"),
        ({"style": "peleenet", "growth": 5}, "growth, stem_chs: got 5, 8, expected even"),
        ({"gamma": 1.0}, "channels in stage 1: got 0"),
        ({"compression": 0.01}, "channels in stage 1: got 0"),
        ({"gamma": 0.9, "compression": 0.2, "fusion": "last"}, "channels in stage 1: got -"),
    ],
    ids=str,
)
def test_configuration_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        DenseNet(dataclasses.replace(DENSE, **changes), num_classes=2)
