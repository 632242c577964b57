"""The forward pass is written out again from the published layout; counts of the named networks are in test_zoo.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d

from cspdeploy.nets.blocks import BLOCKS, FeatureLevel, make_activation
from cspdeploy.nets.cspnet import Cs3Stage, CspNet, CspNetConfig, CspStage, StageConfig, StemConfig


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


def _on_meta(config: CspNetConfig) -> CspNet:
    with torch.device("meta"):  # shapes only: nothing is allocated, nothing computed
        return CspNet(config, num_classes=1000).eval()


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


# --- partial residual: fewer channels into the blocks than out of them ---


def _partial(block: Any, *, act: str = "leaky_relu") -> tuple[CspStage, CspStage]:
    """Stages whose blocks take 8 of 16 channels, and all 16."""
    (config,) = _stages((2,), (32,), kind="csp", block=block, block_ratio=0.5)
    stages = [
        CspStage(one, 8, make_activation(act, 0.1)).double().eval()
        for one in (dataclasses.replace(config, block_in_chs=8), config)
    ]
    return stages[0], stages[1]


@pytest.mark.parametrize("block", list(BLOCKS))
@torch.no_grad()
def test_partial_residual_is_a_full_one_with_zeros(block: Any) -> None:
    """Rows of zeros after the block's own rows of conv_exp, and whatever reads them, change nothing."""
    torch.manual_seed(0)
    partial, full = _partial(block)
    _randomise(partial)
    state = {}
    for key, value in full.state_dict().items():
        given = partial.state_dict()[key]
        padded = torch.full(value.shape, 0.0 if key.startswith("conv_exp") else 0.7, dtype=value.dtype)
        padded[tuple(slice(size) for size in given.shape)] = given
        state[key] = padded
    state["conv_exp.bn.running_var"][24:] = 1.0
    full.load_state_dict(state)
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(partial(x), full(x), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_partial_residual_adds_to_the_first_channels() -> None:
    partial, _ = _partial("dark")
    first = partial.blocks[0]
    nn.init.zeros_(first.last_norm.weight)
    nn.init.zeros_(first.last_norm.bias)
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    assert torch.equal(first(x), torch.cat([x, torch.zeros_like(x)], 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "cs3", "block_in_chs": 8},
        {"kind": "dark", "block_in_chs": 8},
        {"block_in_chs": 0},
        {"block_in_chs": 64},
        {"block_ratio": 1.0},
        {"expand_ratio": 0.01},
        {"expand_ratio": float("nan")},
        {"bottle_ratio": 0.0},
        {"bottle_ratio": -1.0},
        {"se_ratio": -0.5},
        {"depth": 10**9},
        {"out_chs": 10**9},
        {"groups": 3},
    ],
    ids=str,
)
def test_stage_that_cannot_be(changes: dict[str, Any]) -> None:
    (config,) = _stages((1,), (32,), kind="csp", block="dark", block_ratio=0.5)
    with torch.device("meta"), pytest.raises(ValueError, match=r"got|expected|divisible|NaN"):
        CspStage(dataclasses.replace(config, **changes), 8, make_activation("silu", 0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_chs": ()}, "convolutions of the stem: got 0"),
        ({"out_chs": (8, 0)}, "stem.out_chs: got 0"),
        ({"kernel": 0}, "stem.kernel: got 0"),
        ({"padding": -1}, "stem.padding: got -1"),
        ({"pool": "max2"}, "stem.stride: got 2 with a pool, expected 4"),
        ({"stride": 4}, "stem.stride: got 4 with one convolution"),
    ],
    ids=str,
)
def test_stem_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    stem = {"out_chs": (8,), "kernel": 3, "stride": 2, "pool": "none", "padding": None}
    with pytest.raises(ValueError, match=message):
        StemConfig(**{**stem, **changes})  # type: ignore[arg-type]


def test_uneven_conv_exp_gives_both_paths_the_same(tiny_config: CspNetConfig) -> None:
    (config,) = _stages((1,), (32,), kind="csp", block="dark", expand_ratio=33 / 32, block_ratio=0.5)
    with torch.device("meta"):
        stage = CspStage(config, 8, make_activation("silu", 0.0))
        assert stage(torch.empty(1, 8, 8, 8)).shape == (1, 32, 4, 4)


# --- feature maps ---


@pytest.mark.parametrize("pool", ["none", "max3", "max2"])
@torch.no_grad()
def test_features_are_the_stem_before_its_pool_and_the_stages(
    tiny_config: CspNetConfig, pool: Any, keeps_its_maps: Callable[[nn.Module], None]
) -> None:
    stem = StemConfig(out_chs=(8,), kernel=3, stride=1 if pool == "none" else 4, pool=pool, padding=None)
    model = CspNet(dataclasses.replace(tiny_config, stem=stem), num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = [_seen_by(part, lambda: model(x))[1] for part in (model.stem.conv1, *model.stages)]
    maps = model.forward_features(x)
    assert all(torch.equal(one, other) for one, other in zip(maps, expected, strict=True))
    stride = 1 if pool == "none" else 2
    after = stride if pool == "none" else 4
    assert model.feature_levels == (
        FeatureLevel(stride, 8), FeatureLevel(2 * after, 16), FeatureLevel(4 * after, 32), FeatureLevel(8 * after, 48),
    )  # fmt: skip
    for level, one in zip(model.feature_levels, maps, strict=True):
        assert one.shape == (1, level.num_chs, 64 // level.stride, 64 // level.stride)
    keeps_its_maps(model)


@torch.no_grad()
def test_of_two_maps_of_one_stride_the_later_one_is_the_level(tiny_config: CspNetConfig) -> None:
    first = dataclasses.replace(tiny_config.stages[0], stride=1)
    model = CspNet(dataclasses.replace(tiny_config, stages=(first, *tiny_config.stages[1:])), num_classes=3).eval()
    assert model.feature_levels == (FeatureLevel(1, 16), FeatureLevel(2, 32), FeatureLevel(4, 48))
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(model.forward_features(x)[0], model.stages[0](model.stem(x)))
