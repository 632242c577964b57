from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch

from cspdeploy.check.ladder import verify_bundles
from cspdeploy.check.settings import VerifySettings
from cspdeploy.core.codec import to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import NetworkSpec
from cspdeploy.nets import registry
from cspdeploy.nets.cspnet import CspNetConfig
from cspdeploy.nets.families import Family
from cspdeploy.nets.network import Network
from cspdeploy.nets.registry import NETWORKS
from cspdeploy.nets.segmentation import FpnConfig, FpnSegmenter
from cspdeploy.nets.zoo_segment import compose_segmenter
from cspdeploy.pipeline.int8_step import Int8Request
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def backbone(tiny_config: CspNetConfig) -> NetworkSpec:
    """Of strides 1, 2, 4 and 8: the last two make the pyramid."""
    return NetworkSpec(family="cspnet", config=to_json(tiny_config))


def _segmenter(backbone: NetworkSpec, num_classes: int = 5) -> FpnSegmenter:
    torch.manual_seed(0)
    return FpnSegmenter(FpnConfig(backbone=backbone, width=16), num_classes=num_classes).eval()


@pytest.mark.parametrize("size", [(32, 32), (64, 40)])
def test_every_pixel_gets_its_logits(backbone: NetworkSpec, size: tuple[int, int]) -> None:
    network = _segmenter(backbone)
    with torch.no_grad():
        assert network(torch.rand(2, 3, *size)).shape == (2, 5, *size)
    assert [level.stride for level in network.feature_levels] == [1, 2, 4, 8]
    assert [x.shape[2] for x in network.forward_features(torch.rand(1, 3, 32, 32))] == [32, 16, 8, 4]


def test_every_level_has_its_say_and_nothing_is_left_idle(backbone: NetworkSpec) -> None:
    network = _segmenter(backbone).train()
    network(torch.rand(2, 3, 32, 32)).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_what_moves_in_the_picture_moves_in_the_logits(backbone: NetworkSpec) -> None:
    """By a whole cell of the coarsest level, away from the edges: up and down are not exchanged, nor left and right."""
    network = _segmenter(backbone)
    x = torch.zeros(1, 3, 128, 128)
    x[:, :, 56:60, 48:56] = 1.0
    with torch.no_grad():
        plain, moved = network(x), network(x.roll((8, 16), (2, 3)))
    torch.testing.assert_close(plain.roll((8, 16), (2, 3))[..., 48:96, 48:96], moved[..., 48:96, 48:96])
    assert not torch.allclose(plain, moved)


def test_a_backbone_without_a_pyramid_is_refused(tiny_config: CspNetConfig) -> None:
    short = dataclasses.replace(tiny_config, stages=tiny_config.stages[:2])
    with pytest.raises(ValueError, match=r"strides \[4\]"):
        FpnSegmenter(FpnConfig(backbone=NetworkSpec(family="cspnet", config=to_json(short)), width=16), num_classes=2)


@pytest.mark.parametrize("name", ["cspresnet50", "csdarknet53", "resnet50"])
def test_rows_of_the_registry_carry_the_head(name: str) -> None:
    row = compose_segmenter(NETWORKS[name])
    assert (row.name, row.family) == (f"fpn-{name}", "fpn")
    with torch.device("meta"):
        network = FpnSegmenter(row.config, num_classes=4)  # type: ignore[arg-type]
        assert network(torch.empty(1, 3, 64, 96)).shape == (1, 4, 64, 96)


def test_a_row_without_a_pyramid_names_the_reason(tiny_config: CspNetConfig) -> None:
    row: Network = NETWORKS["cspresnet50"]
    short = dataclasses.replace(row, config=dataclasses.replace(tiny_config, stages=tiny_config.stages[:2]))
    with pytest.raises(InputError, match=r"fpn:cspresnet50.*strides \[4\]"):
        compose_segmenter(short)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_segmenter_is_trained_exported_and_verified(
    backbone: NetworkSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, int8_is_faster: None
) -> None:
    """On drawn shapes, through FP32, FP16 and INT8: the whole way of tests/benchmarks/train_segmenter.py."""
    monkeypatch.setitem(registry.FAMILIES, "fpn", Family(config=FpnConfig, network=FpnSegmenter))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    example = importlib.import_module("train_segmenter")
    spec = example.segmenter_spec(backbone, name="fpn-tiny", size_px=64)
    network = example.train(spec, steps=150, seed=0, photos=[])
    found = example.mean_iou(network, spec, seed=1, photos=[])
    assert sum(found) / len(found) > 0.25  # of a network that says "background" everywhere: 0.21
    example.write_model(tmp_path / "models" / "fpn-tiny", spec, network, photos=[])
    request = ExportRequest(
        model="fpn-tiny", models=tmp_path / "models", output=tmp_path / "out", fp16=True, int8=Int8Request()
    )
    bundle = Path(export_bundle(request).folder)
    report = verify_bundles([bundle], VerifySettings(isolate=False, latency=None))
    assert [(row.artifact, row.runtime, row.verdict) for row in report.rows if row.failed] == []
    kinds = {row.artifact for row in report.rows}
    assert {"torchscript", "onnx", "onnx-fp16", "onnx-int8"} <= kinds
