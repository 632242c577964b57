from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn import functional

from cspdeploy.core.coco import COCO_LABELS
from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import ModelSpec, NetworkSpec
from cspdeploy.nets.cost import measure_cost
from cspdeploy.nets.cspnet import CspNetConfig
from cspdeploy.nets.darknet_tiny import DarknetTiny, DarknetTinyConfig
from cspdeploy.nets.densenet import DenseNetConfig
from cspdeploy.nets.registry import NETWORKS, build, find_network, is_network, spec_of
from cspdeploy.nets.resnet import ResNetConfig
from cspdeploy.nets.yolov4 import SpatialPyramid, YoloV4, YoloV4Config

LARGE = ("yolov4", "yolov4-csp")

TINY = DarknetTinyConfig(stem_chs=4, num_blocks=3, activation="leaky_relu", leaky_slope=0.1)
RESNET = ResNetConfig(depths=(1, 1, 1, 1), groups=1, group_width=4)
DENSE = DenseNetConfig(
    style="densenet", stem_chs=8, growth=4, depths=(1, 1, 1, 1), bottleneck=(2, 2, 2, 2), compression=0.5, gamma=0.5,
    fusion="both",
)  # fmt: skip


def _config(
    backbone: NetworkSpec, neck: Literal["panet", "csp", "tiny"], *, new_coords: bool = False
) -> YoloV4Config:  # fmt: skip
    return YoloV4Config(
        backbone=backbone, neck=neck, width=16, activation="leaky_relu", leaky_slope=0.1, num_anchors=3,
        new_coords=new_coords,
    )  # fmt: skip


def _backbone(family: str, config: object) -> NetworkSpec:
    return NetworkSpec(family=family, config=to_json(config))


# --- the published ones ---


@pytest.mark.parametrize(
    ("name", "num_parameters", "bflops", "size_px", "resize", "num_candidates"),
    [
        ("yolov4", 64_363_101, 128.4, 608, "stretch", 22_743),
        ("yolov4-tiny", 6_056_606, 6.9, 416, "stretch", 2_535),
        ("yolov4-csp", 52_921_437, 77.0, 512, "letterbox", 16_128),
    ],
)
def test_published_detectors(
    name: str, num_parameters: int, bflops: float, size_px: int, resize: str, num_candidates: int
) -> None:
    """Parameters and candidates by the cfgs' arithmetic; BFLOPs as their authors publish them, one decimal."""
    spec = spec_of(find_network(name))
    cost = measure_cost(spec)
    assert cost.num_parameters == num_parameters
    assert round(cost.bflops, 1) == bflops
    contract = spec.preprocess
    assert (contract.height_px, contract.width_px, contract.resize) == (size_px, size_px, resize)
    assert (contract.mean, contract.std, contract.channel_order) == ((0.0,) * 3, (1.0,) * 3, "rgb")
    assert spec.detection is not None
    assert spec.detection.num_candidates(size_px, size_px) == num_candidates
    assert (spec.num_classes, spec.task, spec.outputs) == (80, "detect", ("boxes", "scores"))


@pytest.mark.parametrize(("size_px", "expected"), [(416, 10_647), (608, 22_743), (640, 25_200)])
def test_candidates_at_other_sizes(size_px: int, expected: int) -> None:
    detection = find_network("yolov4").detection
    assert detection is not None
    assert detection.num_candidates(size_px, size_px) == expected


def test_yolov4_tiny_has_the_published_masks() -> None:
    """The smallest anchor, 10x14, is used by no head; 81x82 by both."""
    detection = find_network("yolov4-tiny").detection
    assert detection is not None
    assert [(head.output, head.anchors) for head in detection.heads] == [
        ("head_s32", ((81, 82), (135, 169), (344, 319))), ("head_s16", ((23, 27), (37, 58), (81, 82))),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["yolov4-tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_shapes_names_and_json(name: str) -> None:
    row = find_network(name)
    spec = spec_of(row, num_classes=3)
    with torch.device("meta"):
        network = build(spec).eval()
    assert isinstance(network, YoloV4)
    assert row.detection is not None
    assert network.output_names == row.detection.raw_outputs
    outputs = network(torch.empty(2, 3, 64, 96, device="meta"))
    for found, head in zip(outputs, row.detection.heads, strict=True):
        assert found.shape == (2, 3 * 8, 64 // head.stride_px, 96 // head.stride_px)
    features = network.forward_features(torch.empty(1, 3, 64, 64, device="meta"))
    shapes = [(level.num_chs, 64 // level.stride) for level in network.feature_levels]
    assert [(one.shape[1], one.shape[2]) for one in features] == shapes
    assert from_json(YoloV4Config, spec.network.config) == row.config


# --- its parts ---


def test_pools_are_the_three_wide_ones_value_for_value() -> None:
    x_NCHW = torch.randn(2, 3, 19, 11) - 3  # below zero as well: a padding of 0 would win
    expected = [functional.max_pool2d(x_NCHW, size, 1, size // 2) for size in (13, 9, 5)]
    assert torch.equal(SpatialPyramid()(x_NCHW), torch.cat([*expected, x_NCHW], 1))


@torch.no_grad()
def test_new_coords_end_in_a_sigmoid_and_the_others_do_not() -> None:
    found = []
    for new_coords in (False, True):
        torch.manual_seed(0)
        network = YoloV4(_config(_backbone("darknet_tiny", TINY), "tiny", new_coords=new_coords), num_classes=2)
        found.append(network.eval()(torch.ones(1, 3, 64, 64)))
    for linear, sigmoid in zip(*found, strict=True):
        assert linear.min() < 0
        assert torch.equal(torch.sigmoid(linear), sigmoid)


@pytest.mark.parametrize("neck", ["panet", "csp", "tiny"])
@pytest.mark.parametrize(
    "backbone", [_backbone("darknet_tiny", TINY), _backbone("resnet", RESNET), _backbone("densenet", DENSE)],
    ids=["tiny", "resnet", "cspdensenet"],
)  # fmt: skip
def test_every_weight_learns_and_no_classifier_is_left(
    backbone: NetworkSpec, neck: Literal["panet", "csp", "tiny"]
) -> None:
    network = YoloV4(_config(backbone, neck), num_classes=2)
    sum(map_.square().mean() for map_ in network(torch.rand(2, 3, 64, 64))).backward()
    still = [name for name, one in network.named_parameters() if one.grad is None]
    assert still == []
    assert not [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]


def test_feature_maps_are_not_written_over(keeps_its_maps: Callable[[nn.Module], None]) -> None:
    keeps_its_maps(YoloV4(_config(_backbone("darknet_tiny", TINY), "tiny"), num_classes=2))


@torch.no_grad()
def test_darknet_tiny_is_a_classifier_as_well() -> None:
    network = DarknetTiny(TINY, num_classes=7).eval()
    assert network(torch.rand(2, 3, 64, 64)).shape == (2, 7)
    assert [level.stride for level in network.feature_levels] == [2, 4, 8, 16, 32]


# --- any backbone ---


@pytest.mark.parametrize(
    "name",
    [
        "cspresnext50",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("cspdensenet121", "resnet50", "csppeleenet")),
    ],
)
def test_backbones_of_every_family_carry_the_head(name: str) -> None:
    spec = spec_of(find_network(f"yolov4:{name}"))
    assert spec.name == f"yolov4-{name}"
    assert find_network(spec.name) == find_network(f"yolov4:{name}")
    assert (spec.preprocess.mean, spec.preprocess.resize) == (find_network(name).preprocess.mean, "stretch")
    with torch.device("meta"):
        network = build(spec).eval()
        shapes = [tuple(one.shape) for one in network(torch.empty(1, 3, 64, 64))]
    assert shapes == [(1, 255, 8, 8), (1, 255, 4, 4), (1, 255, 2, 2)]


def test_every_classifier_of_the_registry_is_a_backbone() -> None:
    for name, row in NETWORKS.items():
        if row.detection is None:
            assert find_network(f"yolov4:{name}").name == f"yolov4-{name}"


@pytest.mark.parametrize(
    ("name", "message", "fix"),
    [
        ("yolov4:cspresnext5", "unknown backbone 'cspresnext5', none of the", "did you mean 'cspresnext50'"),
        ("yolov4:yolov4-tiny", "unknown backbone 'yolov4-tiny'", "see: cspdeploy list"),
        ("yolov4:", "unknown backbone ''", "see: cspdeploy list"),
        ("yolov5:resnet50", "unknown head 'yolov5', expected one of yolov4, fpn", "yolov4:resnet50"),
        ("yolov4-resnet5", "model 'yolov4-resnet5': unknown", "see: cspdeploy list"),
    ],
)
def test_unknown_compositions(name: str, message: str, fix: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        find_network(name)
    assert fix in caught.value.fix


def test_names_that_the_registry_takes_for_its_own() -> None:
    for name in ("yolov4", "resnet50", "yolov4:resnet50", "yolov4-resnet50", "yolov4:nothing"):
        assert is_network(name)
    for name in ("my-model", "/data/run:3", "C:/models/own.cfg", "foo:bar", "resnet50:yolov4"):
        assert not is_network(name)


def _without_last_stage(name: str) -> object:
    config = find_network(name).config
    assert isinstance(config, CspNetConfig)
    return dataclasses.replace(config, stages=config.stages[:-1])


def test_backbone_without_the_coarsest_map(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(find_network("cspresnet50"), config=_without_last_stage("cspresnet50"))  # type: ignore[arg-type]
    monkeypatch.setitem(NETWORKS, "cspresnet50", row)
    with pytest.raises(InputError, match=r"no feature map of stride 32, it has \[2, 4, 8, 16\]"):
        find_network("yolov4:cspresnet50")


# --- bad descriptions ---


def _changed(**changes: object) -> ModelSpec:
    spec = spec_of(find_network("yolov4-tiny"))
    config = {**spec.network.config, **changes}
    return dataclasses.replace(spec, network=NetworkSpec(family="yolov4", config=config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neck": "fpn"}, r"\$\.network\.config\.neck: got 'fpn'"),
        ({"width": 30}, "width: got 30, expected a multiple of 4"),
        ({"width": 0}, "width: got 0"),
        ({"num_anchors": 0}, "num_anchors: got 0"),
        ({"backbone": {"family": "yolov4", "config": {}}}, "backbone.family: got 'yolov4', expected one of cspnet"),
        (
            {"backbone": to_json(_backbone("cspnet", _without_last_stage("cspresnet50")))},
            r"backbone: no map of stride \[32\], it has \[2, 4, 8, 16\]",
        ),
        ({"backbone": {"family": "resnet", "config": {"depths": [1]}}}, r"\$\.network\.config\.backbone\.config"),
    ],
)
def test_bad_configuration_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(_changed(**changes))


@pytest.mark.parametrize(("size_px", "near"), [((100, 416), "96x416"), ((416, 7), "416x32")])
def test_sides_that_are_no_multiple_of_the_coarsest_stride(size_px: tuple[int, int], near: str) -> None:
    spec = spec_of(find_network("yolov4-tiny"))
    with pytest.raises(InputError, match="expected multiples of 32") as caught:
        build(dataclasses.replace(spec, preprocess=spec.preprocess.with_size(*size_px)))
    assert caught.value.fix == f"--size {near}"


def test_coco_has_80_different_names() -> None:
    assert len(set(COCO_LABELS)) == len(COCO_LABELS) == 80
    assert (COCO_LABELS[0], COCO_LABELS[47], COCO_LABELS[79]) == ("person", "apple", "toothbrush")
