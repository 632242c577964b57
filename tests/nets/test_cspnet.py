"""Counts and layouts are those of the published models; the forward pass is written out again from their layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d

from cspdeploy.nets.blocks import BLOCKS, make_activation
from cspdeploy.nets.cspnet import Cs3Stage, CspNet, CspNetConfig, CspStage, StageConfig, StemConfig
from cspdeploy.nets.registry import NETWORKS

STATE_DICTS = Path(__file__).parents[3] / "shared" / "data" / "state_dict"


def _stages(
    depths: tuple[int, ...], widths: tuple[int, ...], first_stride: Any = 2, **rest: Any
) -> tuple[StageConfig, ...]:
    defaults: dict[str, Any] = {
        "groups": 1, "expand_ratio": 1.0, "block_ratio": 1.0, "bottle_ratio": 1.0, "cross_linear": False,
        "down_growth": False, "avg_down": False, "se_ratio": 0.0,
    }  # fmt: skip
    return tuple(
        StageConfig(depth=depth, out_chs=width, stride=first_stride if i == 0 else 2, **{**defaults, **rest})
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True))
    )


def _cspres(widths: tuple[int, ...], **rest: Any) -> CspNetConfig:
    stem = StemConfig(out_chs=(64,), kernel=7, stride=4, pool="max3", padding=None)
    stages = _stages((3, 3, 5, 2), widths, first_stride=1, kind="csp", block="bottle", cross_linear=True, **rest)
    return CspNetConfig(stem=stem, stages=stages, activation="leaky_relu", leaky_slope=0.01)


def _darknet53(**rest: Any) -> CspNetConfig:
    stem = StemConfig(out_chs=(32,), kernel=3, stride=1, pool="none", padding=None)
    widths = (64, 128, 256, 512, 1024)
    stages = _stages((1, 2, 8, 8, 4), widths, kind="dark", block="dark", bottle_ratio=0.5, **rest)
    return CspNetConfig(stem=stem, stages=stages, activation="leaky_relu", leaky_slope=0.01)


def _cs3(stem: tuple[int, ...], depths: tuple[int, ...], width: int, **rest: Any) -> CspNetConfig:
    focus = len(stem) == 1
    widths = (width, 2 * width, 4 * width, 8 * width)
    return CspNetConfig(
        stem=StemConfig(out_chs=stem, kernel=6 if focus else 3, stride=2, pool="none", padding=2 if focus else None),
        stages=_stages(depths, widths, kind="cs3", block_ratio=0.5, **{"block": "dark", **rest}),
        activation="silu",
        leaky_slope=0.01,
    )


# Name, configuration, parameters, GMAC of convolutions and head at 256 px, million outputs of convolutions.
PUBLISHED = [
    ("cspdarknet53", NETWORKS["cspdarknet53"].config, 27_642_184, 6.534, 16.81),
    ("cspresnet50", _cspres((128, 256, 512, 1024), expand_ratio=2.0, bottle_ratio=0.5), 21_616_168, 4.517, 11.50),
    ("cspresnext50", _cspres((256, 512, 1024, 2048), block_ratio=0.5, groups=32), 20_569_896, 4.015, 15.86),
    ("darknet53", _darknet53(), 41_609_928, 9.285, 12.39),
    ("darknetaa53", _darknet53(avg_down=True), 36_022_984, 7.943, 12.39),
    ("cs3darknet_l", _cs3((32, 64), (3, 6, 9, 3), 128), 21_164_168, 4.847, 8.55),
    ("cs3darknet_focus_l", _cs3((64,), (3, 6, 9, 3), 128), 21_151_720, 4.644, None),
    ("cs3sedarknet_l", _cs3((32, 64), (3, 6, 9, 3), 128, se_ratio=0.25), 21_913_592, 4.848, 8.56),
    ("cs3edgenet_x", _cs3((40, 80), (3, 7, 11, 3), 160, block="edge", bottle_ratio=1.5), 47_821_120, 11.501, 12.92),
]


def _on_meta(config: CspNetConfig) -> CspNet:
    with torch.device("meta"):  # shapes only: nothing is allocated, nothing computed
        return CspNet(config, num_classes=1000).eval()


@pytest.mark.parametrize(("name", "config", "num_params", "gmac", "mact"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_counts_are_those_of_the_published_model(
    name: str, config: CspNetConfig, num_params: int, gmac: float, mact: float | None
) -> None:
    model = _on_meta(config)
    assert sum(p.numel() for p in model.parameters()) == num_params
    num_macs = num_outputs = 0

    def count(module: nn.Module, _: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal num_macs, num_outputs
        weight = module.weight
        assert isinstance(weight, Tensor)
        num_macs += out.numel() * weight[0].numel()
        num_outputs += out.numel() if isinstance(module, nn.Conv2d) else 0

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    assert model(torch.empty(1, 3, 256, 256, device="meta")).shape == (1, 1000)
    assert round(num_macs / 1e9, 3) == gmac
    if mact is not None:
        assert round(num_outputs / 1e6, 2) == pytest.approx(mact, abs=0.011)  # published to two decimals, either way


@pytest.mark.skipif(not STATE_DICTS.is_dir(), reason=f"no published layouts in {STATE_DICTS}")
@pytest.mark.parametrize("name", ["cspdarknet53", "cspresnet50", "cspresnext50"])
def test_state_dict_has_the_published_layout(name: str) -> None:
    config = next(row[1] for row in PUBLISHED if row[0] == name)
    layout = [f"{key} {list(value.shape)}" for key, value in _on_meta(config).state_dict().items()]
    assert layout == (STATE_DICTS / f"{name}.txt").read_text().splitlines()


# --- behaviour ---


def _randomise(model: nn.Module) -> None:
    """Batch norms that do something, so that a swapped or forgotten one shows."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.2)


def _unit(state: dict[str, Tensor], x: Tensor, name: str, *, stride: int = 1, slope: float | None = 0.01) -> Tensor:
    weight = state[f"{name}.conv.weight"]
    x = conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
    norm = [state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    x = batch_norm(x, *norm, eps=1e-5)
    return x if slope is None else torch.where(x > 0, x, slope * x)


@torch.no_grad()
def test_forward_is_that_of_the_paper(tiny_config: CspNetConfig) -> None:
    model = CspNet(tiny_config, num_classes=10).double().eval()
    _randomise(model)
    state = model.state_dict()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = _unit(state, images, "stem.conv1")
    for i in range(3):
        x = _unit(state, x, f"stages.{i}.conv_down", stride=2)
        x = _unit(state, x, f"stages.{i}.conv_exp")
        cross, block = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        inner = _unit(state, _unit(state, block, f"stages.{i}.blocks.0.conv1"), f"stages.{i}.blocks.0.conv2")
        block = _unit(state, block + inner, f"stages.{i}.conv_transition_b")
        x = _unit(state, torch.cat([cross, block], 1), f"stages.{i}.conv_transition")
    logits = x.mean((2, 3)) @ state["head.fc.weight"].T + state["head.fc.bias"]
    torch.testing.assert_close(model(images), logits, rtol=1e-12, atol=1e-12)


def _seen_by(module: nn.Module, run: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """Input and output of `module` while `run` runs."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0].clone(), out.clone())))
    run()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(("stage_class", "blocks_take"), [(CspStage, "second half"), (Cs3Stage, "first half")])
@torch.no_grad()
def test_csp_and_cs3_send_opposite_halves_through_the_blocks(stage_class: Any, blocks_take: str) -> None:
    (config,) = _stages((1,), (16,), kind="csp", block="dark", block_ratio=0.5)
    stage = stage_class(config, 8, make_activation("silu", 0.0)).eval()
    _randomise(stage)
    x = torch.randn(1, 8, 8, 8)
    _, expanded = _seen_by(stage.conv_exp, lambda: stage(x))
    blocks_in, blocks_out = _seen_by(stage.blocks, lambda: stage(x))
    joined, _ = _seen_by(stage.conv_transition, lambda: stage(x))
    first, second = expanded[:, :8], expanded[:, 8:]
    if blocks_take == "second half":
        assert torch.equal(blocks_in, second)
        assert torch.equal(joined, torch.cat([first, stage.conv_transition_b(blocks_out)], 1))
    else:
        assert torch.equal(blocks_in, first)
        assert torch.equal(joined, torch.cat([blocks_out, second], 1))


@pytest.mark.parametrize(
    ("name", "slope", "minus_one_becomes"),
    [("leaky_relu", 0.01, -0.01), ("leaky_relu", 0.1, -0.1), ("relu", 0.1, 0.0), ("silu", 0.1, -0.26894142),
     ("mish", 0.1, -0.30340147)],
)  # fmt: skip
def test_activation_and_slope_are_honoured(
    tiny_config: CspNetConfig, name: Any, slope: float, minus_one_becomes: float
) -> None:
    model = CspNet(dataclasses.replace(tiny_config, activation=name, leaky_slope=slope), num_classes=2)
    units = [model.stem.conv1.act, model.stages[2].blocks[0].conv2.act, model.stages[1].conv_transition_b.act]
    for act in units:
        assert act(torch.tensor([-1.0, 2.0]))[0].item() == pytest.approx(minus_one_becomes)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="leaky_relu"):
        make_activation("gelu", 0.1)


@torch.no_grad()
def test_linear_cross_has_no_activation() -> None:
    (config,) = _stages((1,), (16,), kind="csp", block="bottle", block_ratio=0.5, cross_linear=True)
    stage = CspStage(config, 8, make_activation("relu", 0.0))
    _, expanded = _seen_by(stage.conv_exp, lambda: stage(torch.randn(1, 8, 8, 8)))
    assert (expanded < 0).any()


@pytest.mark.parametrize("block", list(BLOCKS))
@torch.no_grad()
def test_zero_init_makes_residual_blocks_identities(tiny_config: CspNetConfig, block: Any) -> None:
    stages = tuple(dataclasses.replace(stage, block=block) for stage in tiny_config.stages)
    model = CspNet(dataclasses.replace(tiny_config, stages=stages), num_classes=2)
    residual = model.stages[1].blocks[0]
    x = torch.rand(1, 16, 4, 4)  # not negative: the activation after a bottle's sum leaves it alone
    assert not torch.equal(residual(x), x)
    model.zero_init_residual()
    assert torch.equal(residual(x), x)
    assert residual.conv1.bn.weight.all()  # only the last norm: an earlier one would stop the gradients


@pytest.mark.parametrize(
    ("stem", "side_px"),
    [
        (StemConfig(out_chs=(8,), kernel=3, stride=1, pool="none", padding=None), 32),
        (StemConfig(out_chs=(8, 16), kernel=3, stride=2, pool="none", padding=None), 16),
        (StemConfig(out_chs=(8,), kernel=6, stride=2, pool="none", padding=2), 16),
        (StemConfig(out_chs=(8, 8, 16), kernel=3, stride=4, pool="none", padding=None), 8),
        (StemConfig(out_chs=(8,), kernel=7, stride=4, pool="max3", padding=None), 8),
        (StemConfig(out_chs=(8,), kernel=7, stride=4, pool="max2", padding=None), 8),
    ],
)
def test_stem_strides(tiny_config: CspNetConfig, stem: StemConfig, side_px: int) -> None:
    model = _on_meta(dataclasses.replace(tiny_config, stem=stem))
    assert model.stem(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, stem.out_chs[-1], side_px, side_px)


def test_tiny_network_is_tiny(tiny_config: CspNetConfig) -> None:
    assert sum(p.numel() for p in CspNet(tiny_config, num_classes=10).parameters()) < 50_000
