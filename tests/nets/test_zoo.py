"""Every named network has the published counts, layout and pyramid, and goes through the exporters."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from cspdeploy.export.onnx import export_onnx
from cspdeploy.nets.checkpoints import CHECKPOINTS
from cspdeploy.nets.cspnet import CspNetConfig
from cspdeploy.nets.densenet import DenseNetConfig
from cspdeploy.nets.network import NetworkConfig
from cspdeploy.nets.registry import FAMILIES, NETWORKS, build, spec_of
from cspdeploy.nets.resnet import ResNetConfig
from cspdeploy.nets.zoo_csp import stages

STATE_DICTS = Path(__file__).parents[3] / "shared" / "data" / "state_dict"

# Parameters; GMAC of convolutions and classifier and million outputs of convolutions, both at 256 px. Published by
# timm, torchvision and the Darknet cfg files, but for those that OURS names.
COUNTS: dict[str, tuple[int, float, float]] = {
    "cspresnet50": (21_616_168, 4.517, 11.50),
    "cspresnet50d": (21_635_400, 4.830, 12.55),
    "cspresnet50w": (28_118_216, 5.020, 12.19),
    "cspresnext50": (20_569_896, 4.015, 15.86),
    "cspdarknet53": (27_642_184, 6.534, 16.81),
    "cspdarknet21": (17_265_224, 3.849, 13.53),
    "cs3darknet_s": (3_276_344, 0.712, 2.97),
    "cs3darknet_m": (9_310_240, 2.069, 5.28),
    "cs3darknet_l": (21_164_168, 4.847, 8.55),
    "cs3darknet_x": (35_046_320, 8.355, 11.35),
    "cs3darknet_focus_s": (3_274_728, 0.686, 2.70),
    "cs3darknet_focus_m": (9_304_360, 1.973, 4.89),
    "cs3darknet_focus_l": (21_151_720, 4.644, 8.03),
    "cs3darknet_focus_x": (35_025_000, 8.007, 10.69),
    "cs3sedarknet_l": (21_913_592, 4.848, 8.56),
    "cs3sedarknet_x": (35_397_904, 8.355, 11.35),
    "cs3sedarknet_xdw": (21_601_488, 5.934, 17.18),
    "cs3edgenet_x": (47_821_120, 11.501, 12.92),
    "cs3se_edgenet_x": (50_721_584, 11.504, 12.94),
    "csdarknet53": (27_642_184, 6.534, 16.81),
    "csdarknet53-omega": (27_642_184, 6.534, 16.81),
    "csresnet50": (21_607_848, 4.484, 11.24),
    "csresnet50-omega": (21_607_848, 4.484, 11.24),
    "csresnext50": (20_557_480, 3.965, 15.60),
    "csresnext50-omega": (20_557_480, 3.965, 15.60),
    "cspdensenet121": (7_149_576, 3.328, 9.13),
    "cspdensenet169": (12_511_496, 3.932, 9.66),
    "cspdensenet201": (17_921_800, 5.058, 10.40),
    "cspdensenet201_fusion_first": (17_226_728, 4.575, 9.49),
    "cspdensenet201_fusion_last": (16_842_280, 4.908, 10.03),
    "csppeleenet": (2_856_488, 0.582, 3.98),
    "csppeleenet_fusion_first": (2_456_648, 0.443, 3.19),
    "csppeleenet_fusion_last": (2_013_608, 0.500, 3.70),
    "csppeleenet_gamma25": (3_229_240, 0.660, 4.07),
    "csppeleenet_gamma25_fusion_first": (2_629_448, 0.477, 3.19),
    "csppeleenet_gamma25_fusion_last": (2_386_360, 0.578, 3.79),
    "darknet17": (14_304_840, 3.245, 7.18),
    "darknet21": (20_863_048, 3.916, 7.47),
    "sedarknet21": (20_950_432, 3.916, 7.47),
    "darknet53": (41_609_928, 9.285, 12.39),
    "darknetaa53": (36_022_984, 7.943, 12.39),
    "resnet50": (25_557_032, 5.340, 14.52),
    "resnext50_32x4d": (25_028_904, 5.525, 18.81),
    "densenet121": (7_978_856, 3.701, 9.01),
    "densenet169": (14_149_480, 4.388, 9.54),
    "densenet201": (20_013_928, 5.604, 10.26),
    "peleenet": (2_802_248, 0.663, 3.88),
}
CLASSIFIERS = [name for name, row in NETWORKS.items() if row.detection is None]
"""Detectors are counted in test_yolov4.py."""
OURS = ["cspdarknet21", *(name for name in COUNTS if name.startswith(("cspdensenet", "csppeleenet")))]

SMALL_PX = 64
STRIDE_1_STEMS = ("cspdarknet", "csdarknet", "darknet", "sedarknet")


@functools.cache
def _on_meta(name: str) -> nn.Module:
    with torch.device("meta"):  # shapes only: nothing is allocated, nothing computed
        return build(spec_of(NETWORKS[name])).eval()


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one image of 256 px."""

    conv_macs: int
    conv_outputs: int
    classifier_macs: int
    map_shapes: list[tuple[int, ...]]

    @property
    def macs(self) -> int:
        return self.conv_macs + self.classifier_macs

    @property
    def macs_at_224(self) -> float:
        """32 divides both sizes, so that every map shrinks by the same factor. Not so the gates of an SE network."""
        return self.conv_macs * (224 / 256) ** 2 + self.classifier_macs


@functools.cache
def _measure(name: str) -> Measured:
    model = _on_meta(name)
    macs = outputs = 0

    def count(module: nn.Module, _: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal macs, outputs
        weight = module.weight
        assert isinstance(weight, Tensor)
        macs += out.numel() * weight[0].numel()
        outputs += out.numel()

    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, nn.Conv2d)]
    (linear,) = (module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.inference_mode():
        maps = model.forward_features(torch.empty(1, 3, 256, 256, device="meta"))  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    return Measured(macs, outputs, linear.weight.numel(), [tuple(one.shape) for one in maps])


def test_no_network_is_left_uncounted() -> None:
    assert set(COUNTS) == set(CLASSIFIERS)


@pytest.mark.parametrize("name", list(COUNTS))
def test_counts(name: str) -> None:
    num_params, gmac, mact = COUNTS[name]
    found = _measure(name)
    assert sum(parameter.numel() for parameter in _on_meta(name).parameters()) == num_params
    assert round(found.macs / 1e9, 3) == gmac
    assert found.conv_outputs / 1e6 == pytest.approx(mact, abs=0.0101)  # published to two decimals, cut off or rounded


def test_parameters_of_cspdarknet21_by_hand() -> None:
    """Widths and paths of CSPDarknet53, blocks of Darknet21."""
    weights, norms = 3 * 32 * 9, 32
    in_chs = 32
    for chs, depth in ((64, 1), (128, 1), (256, 1), (512, 2), (1024, 2)):
        path, mid = (chs if chs == 64 else chs // 2), chs // 2
        weights += 9 * in_chs * chs + 2 * chs * path  # down, expansion
        weights += depth * (path * mid + 9 * mid * path) + path * path + 2 * path * chs  # blocks, transitions
        norms += 2 * chs + 3 * path + depth * (mid + path)
        in_chs = chs
    assert weights + 2 * norms + 1024 * 1000 + 1000 == COUNTS["cspdarknet21"][0]


@pytest.mark.parametrize(
    ("name", "bflops", "million_weights"),
    [("csdarknet53", 13.067, 27.61), ("csresnet50", 8.967, 21.57), ("csresnext50", 7.929, 20.50)],
)
def test_counts_in_the_units_of_the_darknet_tables(name: str, bflops: float, million_weights: float) -> None:
    """Two operations a MAC; weights of convolutions alone."""
    assert round(2 * _measure(name).macs / 1e9, 3) == pytest.approx(bflops, abs=0.0005)
    weights = sum(value.numel() for value in _on_meta(name).parameters() if value.ndim > 1)
    assert weights / 1e6 == pytest.approx(million_weights, abs=0.01)


@pytest.mark.parametrize(
    ("name", "gmac"),
    [("cspresnet50", 3.459), ("resnet50", 4.089), ("resnext50_32x4d", 4.230), ("densenet121", 2.834),
     ("densenet169", 3.360), ("densenet201", 4.291), ("peleenet", 0.508)],
)  # fmt: skip
def test_macs_published_at_224_px(name: str, gmac: float) -> None:
    assert _measure(name).macs_at_224 / 1e9 == pytest.approx(gmac, abs=0.0006)


@pytest.mark.parametrize(
    ("name", "percent"),
    [("csppeleenet", -12), ("csppeleenet_fusion_last", -25), ("csppeleenet_fusion_first", -33),
     ("csppeleenet_gamma25", 0), ("csppeleenet_gamma25_fusion_last", -13), ("cspdensenet201", -10),
     ("cspdensenet201_fusion_last", -12), ("cspdensenet201_fusion_first", -18)],
)  # fmt: skip
def test_dense_csp_networks_save_what_their_docstring_says(name: str, percent: int) -> None:
    assert name in OURS
    relative = _measure(name).macs_at_224 / _measure(NETWORKS[name].baseline).macs_at_224
    assert round(100 * (relative - 1)) == percent


def test_csppeleenet_is_near_the_papers_in_weights_and_operations() -> None:
    """2.83 million and 0.888 BFLOP there."""
    weights = sum(value.numel() for value in _on_meta("csppeleenet").parameters() if value.ndim > 1)
    assert round(weights / 1e6, 2) == 2.84
    assert round(2 * _measure("csppeleenet").macs_at_224 / 1e9, 3) == 0.892


@pytest.mark.skipif(not STATE_DICTS.is_dir(), reason=f"no published layouts in {STATE_DICTS}")
@pytest.mark.parametrize("name", ["cspdarknet53", "cspresnet50", "cspresnext50"])
def test_state_dict_has_the_published_layout(name: str) -> None:
    layout = [f"{key} {list(value.shape)}" for key, value in _on_meta(name).state_dict().items()]
    assert layout == (STATE_DICTS / f"{name}.txt").read_text().splitlines()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_pyramid(name: str) -> None:
    model = _on_meta(name)
    levels = model.feature_levels
    assert isinstance(levels, tuple)
    first = 1 if name.startswith(STRIDE_1_STEMS) else 2
    assert [level.stride for level in levels] == [stride for stride in (1, 2, 4, 8, 16, 32) if stride >= first]
    for level, shape in zip(levels, _measure(name).map_shapes, strict=True):
        assert shape == (1, level.num_chs, 256 // level.stride, 256 // level.stride)


def test_rows_agree_with_each_other_and_with_the_checkpoints() -> None:
    for name, network in NETWORKS.items():
        assert network.name == name
        assert network.kind == ("csp" if name.startswith("cs") or network.detection is not None else "baseline")
        assert not network.baseline or network.baseline in NETWORKS
        if network.checkpoint:
            checkpoint = CHECKPOINTS[network.checkpoint]
            assert checkpoint.network == name
            assert checkpoint.preprocess == network.preprocess
            assert network.published is not None
            assert (network.published.top1, network.published.top5) == (checkpoint.top1, checkpoint.top5)
            assert network.published.size_px == network.preprocess.height_px
    assert {row.network for row in CHECKPOINTS.values()} <= set(NETWORKS)
    assert all(NETWORKS[name].published is None for name in OURS)


@pytest.mark.parametrize(
    ("name", "activation", "linear"),
    [
        ("csresnet50", "leaky_relu", (False, True, True, False)),
        ("csresnext50-omega", "mish", (False, True, True, False)),
        ("csdarknet53", "leaky_relu", (False,) * 5),
        ("csdarknet53-omega", "mish", (False,) * 5),
    ],
)
def test_darknet_forms(name: str, activation: str, linear: tuple[bool, ...]) -> None:
    network = NETWORKS[name]
    config = network.config
    assert isinstance(config, CspNetConfig)
    assert (config.activation, config.leaky_slope) == (activation, 0.1 if activation == "leaky_relu" else 0.0)
    assert tuple(stage.cross_linear for stage in config.stages) == linear
    contract = network.preprocess
    assert (contract.mean, contract.std, contract.crop_pct) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 1.0)


@pytest.mark.parametrize(("name", "slope"), [("cspdarknet53", 0.01), ("cspresnext50", 0.01), ("darknet53", 0.01)])
def test_pytorch_checkpoints_have_their_own_slope(name: str, slope: float) -> None:
    acts = {module.negative_slope for module in _on_meta(name).modules() if isinstance(module, nn.LeakyReLU)}
    assert acts == {slope}


def test_short_tuples_go_on_with_their_last_value() -> None:
    rows = stages(
        depth=(1, 2, 3), out_chs=(8, 16, 32), stride=(1, 2), kind="csp", block="dark", groups=1, expand_ratio=1.0,
        block_ratio=0.5, bottle_ratio=(0.5, 1.0, 1.5), cross_linear=False, down_growth=False, avg_down=False,
        se_ratio=0.0,
    )  # fmt: skip
    assert [row.stride for row in rows] == [1, 2, 2]
    assert [row.bottle_ratio for row in rows] == [0.5, 1.0, 1.5]
    assert [row.depth for row in rows] == [1, 2, 3]


TINY_DENSE: dict[str, Any] = {
    "stem_chs": 8, "growth": 4, "depths": (2, 1), "bottleneck": (2, 2), "compression": 0.75, "gamma": 0.5,
}  # fmt: skip
PARTIAL = NETWORKS["csresnext50"].config
assert isinstance(PARTIAL, CspNetConfig)
TINY: dict[str, tuple[str, NetworkConfig]] = {
    "partial residual": (
        "cspnet", dataclasses.replace(
            PARTIAL,
            stages=tuple(dataclasses.replace(stage, depth=1, groups=1, out_chs=32, block_in_chs=block_in_chs)
                         for stage, block_in_chs in zip(PARTIAL.stages[:2], (8, None), strict=True)),
        ),
    ),
    "resnext": ("resnet", ResNetConfig(depths=(1, 1), groups=2, group_width=4)),
    "densenet": ("densenet", DenseNetConfig(style="densenet", fusion="both", **{**TINY_DENSE, "gamma": 0.0})),
    "cspdensenet": ("densenet", DenseNetConfig(style="densenet", fusion="both", **TINY_DENSE)),
    "csppeleenet": ("densenet", DenseNetConfig(style="peleenet", fusion="last", **TINY_DENSE)),
}  # fmt: skip


def _exports(model: nn.Module, folder: Path) -> None:
    """Eager, TorchScript and ONNX give the same logits for a batch of two."""
    for module in model.eval().modules():  # an identity would hide what a norm does
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    x_NCHW = torch.randn(2, 3, SMALL_PX, SMALL_PX)
    path = folder / "network.onnx"
    with torch.inference_mode():
        logits = model(x_NCHW)
        traced = torch.jit.trace(model, x_NCHW, check_trace=False)
        assert logits.shape == (2, 10)
        assert logits.isfinite().all()
        torch.testing.assert_close(traced(x_NCHW), logits, rtol=0, atol=1e-4 * float(logits.abs().max()))
    export_onnx(model, x_NCHW, path, names=("logits",), opset=17, dynamic_batch=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": x_NCHW.numpy()})
    np.testing.assert_allclose(found, logits.numpy(), rtol=0, atol=1e-4 * float(logits.abs().max()))


@pytest.mark.parametrize("name", list(TINY))
def test_structures_export(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    family, config = TINY[name]
    _exports(FAMILIES[family].network(config, num_classes=10), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(NETWORKS))
def test_networks_export(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    _exports(build(dataclasses.replace(spec_of(NETWORKS[name]), num_classes=10)), tmp_path)
