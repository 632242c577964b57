"""Counts, costs, outputs and levels of the published networks, as their authors print them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cspdeploy.nets.darknet.cfg import parse_cfg
from cspdeploy.nets.darknet.plan import LayerError, plan_network
from cspdeploy.nets.darknet.sections import Convolutional, DarknetConfig, NetSection, Route

Published = Callable[[str], DarknetConfig]


@pytest.mark.parametrize(
    ("name", "num_layers", "num_convs", "num_parameters"),
    [
        ("yolov4", 162, 110, 64_363_101),
        ("yolov4-tiny", 38, 21, 6_056_606),
        ("yolov4-csp", 175, 115, 52_921_437),
        ("csdarknet53-omega", 108, 73, 27_642_184),
    ],
)
def test_layers_and_parameters(
    published: Published, name: str, num_layers: int, num_convs: int, num_parameters: int
) -> None:
    config = published(name)
    assert len(config.layers) == num_layers
    assert sum(isinstance(layer, Convolutional) for layer in config.layers) == num_convs
    assert plan_network(config).num_parameters == num_parameters


@pytest.mark.parametrize(
    ("name", "size_px", "bflops"),
    [
        ("yolov4", 608, 128.459), ("yolov4", 512, 91.095), ("yolov4", 416, 60.137), ("yolov4", 320, 35.584),
        ("yolov4-tiny", 416, 6.910), ("yolov4-csp", 512, 77.003), ("yolov4-csp", 640, 120.317),
    ],
)  # fmt: skip
def test_bflops_are_those_that_darknet_prints(published: Published, name: str, size_px: int, bflops: float) -> None:
    assert round(plan_network(published(name).with_size(size_px, size_px)).bflops, 3) == bflops


@pytest.mark.parametrize(("size_px", "conv_bflops"), [(256, 13.067), (224, 10.005)])
def test_macs_of_the_published_table(published: Published, size_px: int, conv_bflops: float) -> None:
    config = published("csdarknet53-omega").with_size(size_px, size_px)
    assert round(2 * plan_network(config).num_macs / 1e9, 3) == conv_bflops


@pytest.mark.parametrize(
    ("name", "outputs", "levels"),
    [
        ("yolov4", {"head_s8": 138, "head_s16": 149, "head_s32": 160}, {8: 54, 16: 85, 32: 116}),
        ("yolov4-tiny", {"head_s32": 29, "head_s16": 36}, {16: 23, 32: 27}),
        ("yolov4-tiny-3l", {"head_s32": 29, "head_s16": 36, "head_s8": 43}, {8: 15, 16: 23, 32: 27}),
        ("yolov4-csp", {"head_s8": 143, "head_s16": 158, "head_s32": 173}, {8: 48, 16: 79, 32: 113}),
        ("csdarknet53-omega", {"logits": 106}, {1: 0, 2: 10, 4: 23, 8: 54, 16: 85, 32: 104}),
        ("densenet201", {"logits": 303}, {2: 0, 4: 20, 8: 58, 16: 204, 32: 301}),
    ],
)
def test_outputs_and_levels(published: Published, name: str, outputs: dict[str, int], levels: dict[int, int]) -> None:
    plan = plan_network(published(name))
    assert dict(zip(plan.output_names, plan.outputs, strict=True)) == outputs
    assert {plan.layers[index].stride: index for index in plan.levels} == levels
    assert plan.num_classes == (1000 if plan.task == "classify" else 80)


HEAD = "[yolo]\nclasses={classes}\nanchors=1,2\n"
NET = "[net]\nheight=32\nwidth=32\nchannels=3\n[conv]\nfilters=7\nstride=4\n"


def test_two_heads_of_one_stride_have_two_names() -> None:
    text = f"{NET}{HEAD}[route]\nlayers=0\n[conv]\nfilters=7\n{HEAD}".format(classes=2)
    assert plan_network(parse_cfg(text)).output_names == ("head_s4_0", "head_s4_1")


def test_heads_must_agree_on_their_classes() -> None:
    text = f"{NET}{HEAD.format(classes=2)}[route]\nlayers=0\n[conv]\nfilters=8\n{HEAD.format(classes=3)}"
    with pytest.raises(Exception, match=r"layer 4 \[yolo\]: 3 classes, layer 1 has 2"):
        parse_cfg(text)


@pytest.mark.parametrize("source", [-2, 0, 1, 5])
def test_a_configuration_from_elsewhere_cannot_read_ahead(source: int) -> None:
    net = NetSection(height=32, width=32, channels=3, letter_box=False)
    config = DarknetConfig(net=net, layers=(Route(sources=(source,), groups=1, group_id=0),))
    with pytest.raises(LayerError, match=r"layer 0 \[route\]: reads layer"):
        plan_network(config)
