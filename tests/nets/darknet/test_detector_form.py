from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import NetworkSpec
from cspdeploy.nets.cspnet import CspNetConfig
from cspdeploy.nets.darknet.cfg import parse_cfg
from cspdeploy.nets.darknet.convert import darknet_to_native, native_to_darknet
from cspdeploy.nets.darknet.detector_form import detector_form, num_classes_of_file
from cspdeploy.nets.darknet.form import format_cfg
from cspdeploy.nets.darknet.network import DarknetNet
from cspdeploy.nets.darknet.plan import plan_network
from cspdeploy.nets.darknet.sections import DarknetConfig, Yolo
from cspdeploy.nets.darknet.weights import write_darknet
from cspdeploy.nets.darknet_tiny import DarknetTinyConfig
from cspdeploy.nets.loading import load_file
from cspdeploy.nets.network import Network
from cspdeploy.nets.registry import find_network
from cspdeploy.nets.yolov4 import YoloV4, YoloV4Config
from cspdeploy.pipeline.darknet import detection_of_cfg

NATIVE = {
    "yolov4": "yolov4",
    "yolov4-tiny": "yolov4-tiny",
    "yolov4-csp": "yolov4-csp",
    "csresnext50-panet-spp-original-optimal": "yolov4:csresnext50",
}
"""The registry's network for each published cfg."""
NUM_CLASSES = 3

Published = Callable[[str], DarknetConfig]
Randomise = Callable[[nn.Module], DarknetNet]


def _config(row: Network) -> YoloV4Config:
    assert isinstance(row.config, YoloV4Config)
    return row.config


def _thin(name: str) -> YoloV4Config:
    """An eighth of the channels."""
    config = _config(find_network(name))
    family, backbone = config.backbone.family, config.backbone.config
    thin: CspNetConfig | DarknetTinyConfig
    if family == "darknet_tiny":
        thin = dataclasses.replace(from_json(DarknetTinyConfig, backbone), stem_chs=4)
    else:
        whole = from_json(CspNetConfig, backbone)
        stem = dataclasses.replace(whole.stem, out_chs=tuple(chs // 8 for chs in whole.stem.out_chs))
        stages = tuple(
            dataclasses.replace(
                stage, out_chs=stage.out_chs // 8, groups=max(1, stage.groups // 8),
                block_in_chs=stage.block_in_chs and stage.block_in_chs // 8,
            )
            for stage in whole.stages
        )  # fmt: skip
        thin = dataclasses.replace(whole, stem=stem, stages=stages)
    return dataclasses.replace(
        config, backbone=NetworkSpec(family=family, config=to_json(thin)), width=config.width // 8
    )


def _pair(config: YoloV4Config, randomise: Randomise) -> tuple[DarknetNet, YoloV4]:
    """The Darknet form with weights, and the native network without."""
    form = detector_form(config, num_classes=NUM_CLASSES, height_px=64, width_px=64)
    return randomise(DarknetNet(form.config)), YoloV4(config, num_classes=NUM_CLASSES).eval()


@torch.no_grad()
def _require_same(darknet: DarknetNet, native: YoloV4) -> None:
    image = torch.rand(2, 3, 64, 64)
    for got, want in zip(native(image), darknet(image), strict=True):
        assert got.shape == want.shape
        assert float((got - want).norm() / want.norm()) < 1e-5


# --- the same network ---


@pytest.mark.parametrize("cfg", NATIVE)
def test_layers_are_the_published_ones(published: Published, cfg: str) -> None:
    """Each layer with each of its sources, and how every head is decoded."""
    config, row = published(cfg), find_network(NATIVE[cfg])
    assert row.detection is not None
    form = detector_form(_config(row), num_classes=80, heads=row.detection.heads)
    assert len(form.config.layers) == len(config.layers)
    for index, (got, want) in enumerate(zip(form.config.layers, config.layers, strict=True)):
        assert type(got) is type(want), index
        assert isinstance(got, Yolo) or got == want, index
    assert detection_of_cfg(config, plan_network(config)) == row.detection
    assert detection_of_cfg(form.config, plan_network(form.config)) == row.detection


@pytest.mark.parametrize("name", NATIVE.values())
def test_native_and_cfg_built_networks_agree(randomise: Randomise, name: str) -> None:
    config = _thin(name)
    darknet, native = _pair(config, randomise)
    assert native.output_names == darknet.output_names
    native.load_state_dict(darknet_to_native(darknet, config))
    _require_same(darknet, native)
    back = native_to_darknet(native.state_dict(), config)
    assert all(torch.equal(back[key], value) for key, value in darknet.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("cfg", NATIVE)
def test_published_cfgs_agree_with_the_native_networks(published: Published, randomise: Randomise, cfg: str) -> None:
    darknet = randomise(DarknetNet(published(cfg).with_size(64, 64)))
    config = _config(find_network(NATIVE[cfg]))
    native = YoloV4(config, num_classes=80).eval()
    native.load_state_dict(darknet_to_native(darknet, config))
    _require_same(darknet, native)


def test_a_swapped_pair_of_convolutions_shows(randomise: Randomise) -> None:
    """The laterals of stride 16 and 8 have different shapes; the reduce and the lateral of one level have the same."""
    config = _thin("yolov4-csp")
    darknet, native = _pair(config, randomise)
    state = darknet_to_native(darknet, config)
    level = "neck.top_down8.block."
    for name in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):
        one, other = f"{level}conv2.{name}", f"{level}cross.{name}"
        state[one], state[other] = state[other], state[one]
    native.load_state_dict(state)
    with pytest.raises(AssertionError):
        _require_same(darknet, native)


def test_text_of_a_native_detector_reads_back() -> None:
    row = find_network("yolov4-csp")
    assert row.detection is not None
    config = detector_form(_config(row), num_classes=5, heads=row.detection.heads, letter_box=True).config
    assert parse_cfg(format_cfg(config)) == config


@pytest.mark.parametrize("name", ["yolov4:resnet50", "yolov4:cspdensenet121", "yolov4:cspresnext50"])
def test_networks_that_darknet_does_not_have(name: str) -> None:
    with pytest.raises(InputError, match=r"no form in a Darknet cfg|leaky_slope"):
        detector_form(_config(find_network(name)), num_classes=80)


# --- weights files ---


@pytest.fixture(params=["yolov4", "yolov4-tiny"])
def trained(request: pytest.FixtureRequest, randomise: Randomise, tmp_path: Path) -> tuple[YoloV4Config, Path]:
    """A thin native network and the `.weights` file of three classes that belongs to it."""
    config = _thin(request.param)
    path = tmp_path / "trained.weights"
    write_darknet(path, _pair(config, randomise)[0])
    return config, path


def test_a_weights_file_loads_into_the_native_network(
    trained: tuple[YoloV4Config, Path], randomise: Randomise
) -> None:  # fmt: skip
    config, path = trained
    darknet, native = _pair(config, randomise)
    load_file(native, path)
    _require_same(darknet, native)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-4], "too short"),
        (lambda data: data[: len(data) // 2], "too short"),
        (lambda data: data + b"\0" * 8, "too long"),
        (lambda data: data[:-4] + b"\0\0\xc0\x7f", "NaN or infinite values"),
    ],
    ids=["truncated", "half", "over-long", "nan"],
)
def test_damaged_files_are_refused_and_nothing_is_loaded(
    trained: tuple[YoloV4Config, Path], change: Callable[[bytes], bytes], message: str
) -> None:
    config, path = trained
    path.write_bytes(change(path.read_bytes()))
    native = YoloV4(config, num_classes=NUM_CLASSES)
    before = {key: value.clone() for key, value in native.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_file(native, path)
    assert all(torch.equal(value, before[key]) for key, value in native.state_dict().items())


def test_other_classes_than_the_files_are_refused(trained: tuple[YoloV4Config, Path]) -> None:
    config, path = trained
    with pytest.raises(InputError, match="too short"):
        load_file(YoloV4(config, num_classes=NUM_CLASSES + 1), path)


def test_the_size_of_a_file_tells_its_classes(trained: tuple[YoloV4Config, Path], tmp_path: Path) -> None:
    config, path = trained
    assert num_classes_of_file(path, config) == NUM_CLASSES
    old = tmp_path / "old.weights"
    old.write_bytes(path.read_bytes()[:-4])  # a header of 16 bytes
    assert num_classes_of_file(old, config) == NUM_CLASSES
    old.write_bytes(path.read_bytes()[:-8])
    assert num_classes_of_file(old, config) == 0
    assert num_classes_of_file(tmp_path / "none.weights", config) == 0
