from __future__ import annotations

import dataclasses

import pytest

from cspdeploy.nets import hub
from cspdeploy.nets.checkpoints import CHECKPOINTS, Checkpoint, published_for
from cspdeploy.nets.registry import NETWORKS

every_checkpoint = pytest.mark.parametrize("row", CHECKPOINTS.values(), ids=CHECKPOINTS)

BY_TIMM = {tag for tag in CHECKPOINTS if not tag.endswith(".tv_in1k")}


@every_checkpoint
def test_row_is_whole(row: Checkpoint) -> None:
    assert CHECKPOINTS[row.tag] is row
    assert row.tag.startswith(f"{row.network}.")
    assert hub._TAG.fullmatch(row.tag), "the hub module would refuse it"
    assert 0.7 < row.top1 < row.top5 < 1
    assert row.licence in ("Apache-2.0", "BSD-3-Clause")
    assert row.origin.startswith("https://")
    assert row.preprocess.resize == "crop"
    assert row.preprocess.channel_order == "rgb"


@every_checkpoint
def test_test_setting_is_larger_and_more_accurate_and_otherwise_the_same(row: Checkpoint) -> None:
    if row.test_preprocess is None:
        assert row.test_top1 is None
        assert row.test_top5 is None
        return
    assert row.test_top1 is not None
    assert row.test_top5 is not None
    assert row.top1 < row.test_top1 < row.test_top5
    assert row.top5 < row.test_top5
    side_px = row.test_preprocess.height_px
    assert side_px > row.preprocess.height_px
    at_that_size = row.preprocess.with_size(side_px, side_px)
    assert row.test_preprocess == dataclasses.replace(at_that_size, crop_pct=row.test_preprocess.crop_pct)


@every_checkpoint
def test_every_checkpoint_is_of_a_network_that_can_be_built(row: Checkpoint) -> None:
    assert row.network in NETWORKS
    assert NETWORKS[row.network].num_classes == 1000


def test_registry_names_the_checkpoints_that_there_are() -> None:
    """Also its preprocessing and its published accuracy are the checkpoint's."""
    named = {network.name: network.checkpoint for network in NETWORKS.values() if network.checkpoint}
    assert set(named) == {row.network for row in CHECKPOINTS.values()}
    for name, tag in named.items():
        row, network = CHECKPOINTS[tag], NETWORKS[name]
        assert row in published_for(name)
        assert network.preprocess == row.preprocess, tag
        assert network.published is not None
        assert (network.published.top1, network.published.top5) == (row.top1, row.top5), tag


def test_settings_that_differ_from_the_others() -> None:
    """By timm: 256 px, crop 0.887, bicubic, ImageNet's mean and deviation. What else there is, is named here."""
    rows = [CHECKPOINTS[tag] for tag in BY_TIMM]
    assert {row.preprocess.height_px for row in rows} == {256}
    assert {row.network for row in rows if row.preprocess.crop_pct != 0.887} == {"cs3darknet_x", "cs3se_edgenet_x"}
    assert {row.network for row in rows if row.preprocess.interpolation != "bicubic"} == {
        "cspresnet50", "cspresnext50", "cspdarknet53", "darknetaa53",
    }  # fmt: skip
    half = CHECKPOINTS["cs3darknet_focus_s.ra4_e3600_r256_in1k"]
    assert half.preprocess.mean == half.preprocess.std == (0.5, 0.5, 0.5)
    assert [row.tag for row in CHECKPOINTS.values() if row.preprocess.mean != (0.485, 0.456, 0.406)] == [half.tag]
    assert [row.tag for row in CHECKPOINTS.values() if row.preprocess.std != (0.229, 0.224, 0.225)] == [half.tag]


@pytest.mark.parametrize(
    ("tag", "top1", "top5"),
    [
        ("cspresnet50.ra_in1k", 79.578, 94.698),
        ("cspresnext50.ra_in1k", 80.548, 95.330),
        ("cspdarknet53.ra_in1k", 80.078, 95.060),
        ("darknet53.c2ns_in1k", 80.008, 95.046),
        ("resnet50.tv_in1k", 76.130, 92.862),
        ("resnext50_32x4d.tv_in1k", 77.618, 93.698),
        ("densenet201.tv_in1k", 76.896, 93.370),
    ],
)
def test_published_accuracy(tag: str, top1: float, top5: float) -> None:
    assert (CHECKPOINTS[tag].top1, CHECKPOINTS[tag].top5) == pytest.approx((top1 / 100, top5 / 100), abs=1e-9)


def test_published_for() -> None:
    assert [row.tag for row in published_for("cspdarknet53")] == ["cspdarknet53.ra_in1k"]
    assert published_for("cspresnet50w") == ()
    assert published_for("nothing of that name") == ()
