"""Darknet's network and the native one with its weights are the same function, on weights that hide nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cspdeploy.core.errors import InputError
from cspdeploy.nets.cspnet import CspNet, CspNetConfig, StageConfig, StemConfig
from cspdeploy.nets.darknet.cfg import parse_cfg
from cspdeploy.nets.darknet.convert import darknet_to_native, native_to_darknet, read_darknet_into_native
from cspdeploy.nets.darknet.form import format_cfg, native_to_cfg
from cspdeploy.nets.darknet.network import DarknetNet
from cspdeploy.nets.darknet.plan import plan_network
from cspdeploy.nets.darknet.sections import Convolutional, Cost, DarknetConfig
from cspdeploy.nets.darknet.weights import expected_bytes, write_darknet

Randomise = Callable[[nn.Module], Any]
NUM_CLASSES = 7
ORDER = (3, 0, 6, 1, 5, 2, 4)


def _stage(**fields: Any) -> StageConfig:
    defaults: dict[str, Any] = {
        "kind": "csp", "block": "dark", "depth": 2, "stride": 2, "groups": 1, "expand_ratio": 1.0, "block_ratio": 0.5,
        "bottle_ratio": 1.0, "cross_linear": False, "down_growth": True, "avg_down": False, "se_ratio": 0.0,
    }  # fmt: skip
    return StageConfig(**{**defaults, **fields})


def _config(stem: StemConfig, *stages: StageConfig, activation: Any = "leaky_relu") -> CspNetConfig:
    return CspNetConfig(stem=stem, stages=stages, activation=activation, leaky_slope=0.1)


def _csdarknet53(activation: str = "mish", *, share: int = 1) -> CspNetConfig:
    """`share`: of the channels, only one in so many."""
    first = _stage(depth=1, out_chs=64 // share, expand_ratio=2.0, block_ratio=1.0, bottle_ratio=0.5)
    later = [_stage(depth=depth, out_chs=chs // share) for depth, chs in ((2, 128), (8, 256), (8, 512), (4, 1024))]
    stem = StemConfig(out_chs=(32 // share,), kernel=3, stride=1, pool="none", padding=None)
    return _config(stem, first, *later, activation=activation)


def _csres(width: int, *, groups: int, activation: str = "leaky_relu", **ratios: float) -> CspNetConfig:
    """csresnet50 and csresnext50: cross and block-in linear in stages 2 and 3, and half a path into the first block."""
    stem = StemConfig(out_chs=(width // 2,), kernel=7, stride=4, pool="max2", padding=None)
    widths = (width, 2 * width, 4 * width, 8 * width)
    if groups > 1:
        widths = (2 * width, 4 * width, 8 * width, 16 * width)
    stages = [
        _stage(
            block="bottle", depth=depth, out_chs=out_chs, stride=1 if i == 0 else 2, groups=groups, down_growth=False,
            cross_linear=i in (1, 2), block_in_chs=width // 2 if i == 0 else None, **ratios,
        )
        for i, (depth, out_chs) in enumerate(zip((3, 3, 5, 2), widths, strict=True))
    ]  # fmt: skip
    return _config(stem, *stages, activation=activation)


def _csresnet50(width: int = 128, activation: str = "leaky_relu") -> CspNetConfig:
    return _csres(width, groups=1, activation=activation, expand_ratio=2.0, block_ratio=1.0, bottle_ratio=0.5)


def _csresnext50(width: int = 128, groups: int = 32, activation: str = "leaky_relu") -> CspNetConfig:
    return _csres(width, groups=groups, activation=activation)


STEM = StemConfig(out_chs=(8, 16), kernel=3, stride=2, pool="none", padding=None)
FOCUS = StemConfig(out_chs=(16,), kernel=6, stride=2, pool="none", padding=2)
MAX3 = StemConfig(out_chs=(8, 8, 16), kernel=3, stride=4, pool="max3", padding=None)
SMALL = {
    "csdarknet": _config(
        StemConfig(out_chs=(8,), kernel=3, stride=1, pool="none", padding=None),
        _stage(depth=1, out_chs=16, expand_ratio=2.0, block_ratio=1.0, bottle_ratio=0.5), _stage(out_chs=32),
    ),
    "csresnet": _csresnet50(16),
    "csresnet-omega": _csresnet50(16, activation="mish"),
    "csresnext": _csresnext50(16, groups=4),
    "csresnext-omega": _csresnext50(16, groups=4, activation="mish"),
    "cs3": _config(
        STEM, _stage(kind="cs3", out_chs=32), _stage(kind="cs3", out_chs=64, block="edge"), activation="silu"
    ),
    "focus": _config(FOCUS, _stage(kind="cs3", out_chs=32), activation="relu"),
    "dark": _config(MAX3, _stage(kind="dark", out_chs=32, block_ratio=1.0, bottle_ratio=0.5), activation="relu"),
}  # fmt: skip


def _networks(config: CspNetConfig, randomise: Randomise) -> tuple[DarknetNet, CspNet]:
    """The Darknet form with weights, and the native network without."""
    darknet = randomise(DarknetNet(native_to_cfg(config, num_classes=NUM_CLASSES, height_px=64, width_px=64)))
    return darknet, CspNet(config, num_classes=NUM_CLASSES).eval()


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- the same function ---


@pytest.mark.parametrize("share", [8, pytest.param(1, marks=pytest.mark.slow)])
@torch.no_grad()
def test_the_published_csdarknet53_is_the_native_one(
    published: Callable[[str], DarknetConfig], thinned: Callable[[str], DarknetConfig], randomise: Randomise, share: int
) -> None:
    """With an eighth of the channels, and whole."""
    name = "csdarknet53-omega"
    darknet = randomise(DarknetNet(thinned(name) if share > 1 else published(name)))
    config = _csdarknet53(share=share)
    native = CspNet(config, num_classes=1000).eval()
    order = torch.randperm(1000)
    native.load_state_dict(darknet_to_native(darknet, config, class_order=order.tolist()))
    image = torch.rand(2, 3, 64, 64)
    assert _distance(native(image), darknet(image)[:, order]) < 1e-5
    for got, want in zip(native.forward_features(image), darknet.forward_features(image), strict=True):
        assert _distance(got, want) < 1e-5


@pytest.mark.parametrize("name", list(SMALL))
@torch.no_grad()
def test_native_network_with_darknet_weights(randomise: Randomise, name: str) -> None:
    darknet, native = _networks(SMALL[name], randomise)
    native.load_state_dict(darknet_to_native(darknet, SMALL[name], class_order=ORDER))
    image = torch.rand(2, 3, 64, 64)
    assert _distance(native(image), darknet(image)[:, ORDER]) < 1e-5


@pytest.mark.parametrize("name", list(SMALL))
@torch.no_grad()
def test_darknet_network_with_native_weights(randomise: Randomise, name: str) -> None:
    darknet, native = _networks(SMALL[name], randomise)
    randomise(native)
    darknet.load_state_dict(native_to_darknet(native.state_dict(), SMALL[name], class_order=ORDER))
    image = torch.rand(2, 3, 64, 64)
    assert _distance(darknet(image)[:, ORDER], native(image)) < 1e-5


@pytest.mark.parametrize("name", ["csresnet", "csresnet-omega", "csresnext", "csresnext-omega"])
@torch.no_grad()
def test_a_padded_first_stage_is_the_same_function(randomise: Randomise, name: str) -> None:
    """As the PyTorch networks have it: the path as wide as a block's output, zeros in what Darknet does not have."""
    first, *later = SMALL[name].stages
    padded = dataclasses.replace(SMALL[name], stages=(dataclasses.replace(first, block_in_chs=None), *later))
    darknet, native = _networks(SMALL[name], randomise)[0], CspNet(padded, num_classes=NUM_CLASSES).eval()
    native.load_state_dict(darknet_to_native(darknet, padded))
    image = torch.rand(2, 3, 64, 64)
    assert _distance(native(image), darknet(image)) < 1e-5
    wide = native.stages[0].conv_exp
    assert wide.conv.weight.shape[0] == 32
    assert not wide.conv.weight[24:].any()
    # And on: what is written back is as wide as the native network, and still the same function.
    back = DarknetNet(native_to_cfg(padded, num_classes=NUM_CLASSES, height_px=64, width_px=64)).eval()
    back.load_state_dict(native_to_darknet(native.state_dict(), padded))
    assert _distance(back(image), darknet(image)) < 1e-5


@pytest.mark.parametrize("name", list(SMALL))
def test_native_to_cfg_and_weights_and_back_is_identical(randomise: Randomise, tmp_path: Path, name: str) -> None:
    config = SMALL[name]
    native = randomise(CspNet(config, num_classes=NUM_CLASSES))
    cfg = parse_cfg(format_cfg(native_to_cfg(config, num_classes=NUM_CLASSES, height_px=64, width_px=64)))
    darknet = DarknetNet(cfg)
    darknet.load_state_dict(native_to_darknet(native.state_dict(), config, class_order=ORDER))
    write_darknet(tmp_path / "net.weights", darknet)
    state = read_darknet_into_native(
        tmp_path / "net.weights", config, num_classes=NUM_CLASSES, class_order=ORDER, cfg=cfg
    )
    expected = native.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


# --- the published forms ---


def test_cfg_of_csdarknet53_is_the_published_one(published: Callable[[str], DarknetConfig]) -> None:
    config = published("csdarknet53-omega")
    assert native_to_cfg(_csdarknet53(), num_classes=1000) == config


@pytest.mark.parametrize(
    ("config", "num_layers", "num_convs", "num_parameters", "conv_bflops", "num_bytes"),
    [
        (_csresnet50(), 84, 60, 21_607_848, 8.967, 86_592_180),
        (_csresnext50(), 84, 60, 20_557_480, 7.929, 82_459_316),
        (_csdarknet53("leaky_relu"), 108, 73, 27_642_184, 13.067, 110_710_068),
    ],
    ids=["csresnet50", "csresnext50", "csdarknet53"],
)
def test_cfgs_that_are_written_have_the_published_counts(
    config: CspNetConfig, num_layers: int, num_convs: int, num_parameters: int, conv_bflops: float, num_bytes: int
) -> None:
    cfg = native_to_cfg(config, num_classes=1000)
    plan = plan_network(cfg)
    assert len(cfg.layers) == num_layers
    assert sum(isinstance(layer, Convolutional) for layer in cfg.layers) == num_convs
    assert plan.num_parameters == num_parameters
    assert round(2 * plan.num_macs / 1e9, 3) == conv_bflops
    assert expected_bytes(cfg) == num_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leaky_slope": 0.01}, r"leaky_slope: got 0.01, expected 0.1"),
        ({"stages": (_stage(out_chs=32, se_ratio=0.25),)}, r"stages\[0\]: squeeze-and-excitation"),
        ({"stages": (_stage(out_chs=32), _stage(out_chs=32, avg_down=True))}, r"stages\[1\]: down-sampling by mean"),
    ],
)
def test_what_darknet_cannot_say_is_refused(change: dict[str, Any], message: str) -> None:
    config = dataclasses.replace(SMALL["csdarknet"], **change)
    with pytest.raises(InputError, match=message):
        native_to_cfg(config, num_classes=2)


# --- weights that do not belong ---


def test_another_activation_is_refused_though_its_weights_fit(randomise: Randomise) -> None:
    darknet, _ = _networks(SMALL["csresnet"], randomise)
    with pytest.raises(InputError, match=r"layer 0 of the cfg: \[convolutional\] activation: got leaky, expected mish"):
        darknet_to_native(darknet, SMALL["csresnet-omega"])


def test_a_linear_cross_is_not_an_activated_one(randomise: Randomise) -> None:
    darknet, _ = _networks(SMALL["csresnet"], randomise)
    stages = tuple(dataclasses.replace(stage, cross_linear=True) for stage in SMALL["csresnet"].stages)
    with pytest.raises(InputError, match=r"layer 2 of the cfg: .* activation: got leaky, expected linear"):
        darknet_to_native(darknet, dataclasses.replace(SMALL["csresnet"], stages=stages))


def test_another_network_is_refused_with_the_layer(randomise: Randomise) -> None:
    darknet, _ = _networks(SMALL["csdarknet"], randomise)
    first, last = SMALL["csdarknet"].stages
    deeper = dataclasses.replace(SMALL["csdarknet"], stages=(first, dataclasses.replace(last, depth=3)))
    with pytest.raises(InputError, match=r"layer 22 of the cfg: got \[route\], expected \[convolutional\]"):
        darknet_to_native(darknet, deeper)
    with pytest.raises(InputError, match=r"layers\.28\.conv\.bias: missing"):
        darknet_to_native(darknet.state_dict(), deeper)
    pooled = dataclasses.replace(SMALL["csdarknet"], stem=dataclasses.replace(SMALL["csdarknet"].stem, kernel=5))
    with pytest.raises(InputError, match=r"layer 0 of the cfg: \[convolutional\] size: got 3, expected 5"):
        darknet_to_native(darknet, pooled)


def test_a_network_that_goes_on_is_refused(randomise: Randomise) -> None:
    darknet, _ = _networks(SMALL["csdarknet"], randomise)
    last = len(darknet.config.layers) - 1
    conv = Convolutional(
        filters=7, size=1, stride=1, padding=0, groups=1, batch_normalize=False, activation="linear"
    )  # fmt: skip
    longer = DarknetNet(dataclasses.replace(darknet.config, layers=(*darknet.config.layers[:last], conv)))
    with pytest.raises(InputError, match=f"the cfg has {last + 1} layers up to its classes, expected {last}"):
        darknet_to_native(longer, SMALL["csdarknet"])


def test_a_grouped_convolution_cannot_be_padded(randomise: Randomise) -> None:
    """Its channels would go to other groups. No published network has one there."""
    stage = _stage(block="edge", out_chs=32, groups=4, block_in_chs=8)
    config = _config(STEM, stage)
    darknet, _ = _networks(config, randomise)
    wide = dataclasses.replace(config, stages=(dataclasses.replace(stage, block_in_chs=None),))
    with pytest.raises(InputError, match=r"layers\.\d+: 8 channels in groups cannot be padded"):
        darknet_to_native(darknet, wide)


def test_the_tail_of_a_cfg_does_not_matter(randomise: Randomise) -> None:
    darknet, native = _networks(SMALL["csdarknet"], randomise)
    longer = DarknetNet(dataclasses.replace(darknet.config, layers=(*darknet.config.layers, Cost())))
    longer.load_state_dict(darknet.state_dict())
    state = darknet_to_native(longer, SMALL["csdarknet"])
    expected = darknet_to_native(darknet, SMALL["csdarknet"])
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert state.keys() == native.state_dict().keys()


@pytest.mark.parametrize("direction", ["to native", "to darknet"])
def test_a_state_dict_must_fit_key_for_key(randomise: Randomise, direction: str) -> None:
    config = SMALL["csdarknet"]
    darknet, native = _networks(config, randomise)
    convert, state, key = {
        "to native": (darknet_to_native, darknet.state_dict(), "layers.0.conv.weight"),
        "to darknet": (native_to_darknet, native.state_dict(), "stem.conv1.conv.weight"),
    }[direction]
    with pytest.raises(InputError, match=f"{key}: missing"):
        convert({name: value for name, value in state.items() if name != key}, config)
    with pytest.raises(InputError, match=rf"{key}: got \[8, 3, 1, 1\], expected \[8, 3, 3, 3\]"):
        convert({**state, key: torch.zeros(8, 3, 1, 1)}, config)
    with pytest.raises(InputError, match=r"extra\.weight: unexpected"):
        convert({**state, "extra.weight": torch.zeros(1)}, config)


def test_a_wider_block_in_than_the_native_path_is_refused(randomise: Randomise) -> None:
    first, *later = SMALL["csresnet"].stages
    narrow = dataclasses.replace(SMALL["csresnet"], stages=(dataclasses.replace(first, block_in_chs=4), *later))
    darknet, _ = _networks(SMALL["csresnet"], randomise)
    with pytest.raises(InputError, match=r"layers.4.bn.bias: got 8 channels, expected at most 4"):
        darknet_to_native(darknet, narrow)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 0, 1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 6, 7)])
def test_class_order_must_be_a_permutation(randomise: Randomise, order: tuple[int, ...]) -> None:
    darknet, native = _networks(SMALL["csdarknet"], randomise)
    with pytest.raises(InputError, match="class_order"):
        darknet_to_native(darknet, SMALL["csdarknet"], class_order=order)
    with pytest.raises(InputError, match="class_order"):
        native_to_darknet(native.state_dict(), SMALL["csdarknet"], class_order=order)
