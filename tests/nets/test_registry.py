from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import ModelSpec, NetworkSpec
from cspdeploy.nets.cspnet import CspNet, CspNetConfig
from cspdeploy.nets.registry import FAMILIES, NETWORKS, PublishedAccuracy, build, find_network, spec_of


@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_row_is_filed_under_its_name_and_goes_through_json(name: str) -> None:
    network = find_network(name)
    assert network.name == name
    assert network.summary
    assert type(network.config) is FAMILIES[network.family].config
    spec = spec_of(network)
    assert from_json(FAMILIES[network.family].config, spec.network.config) == network.config


@pytest.mark.parametrize("name", ["cspdarknet35", "CSPDarknet53", "cspdarknet-53"])
def test_unknown_name_suggests_the_nearest(name: str) -> None:
    with pytest.raises(InputError, match=f"model '{name}': unknown") as caught:
        find_network(name)
    assert "did you mean 'cspdarknet53'?" in caught.value.fix


def test_name_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(InputError) as caught:
        find_network("vgg16")
    assert "did you mean" not in str(caught.value)


def test_spec_of_a_row_goes_through_json_and_takes_changes() -> None:
    network = find_network("cspdarknet53")
    spec = spec_of(network, num_classes=10)
    assert spec.num_classes == 10
    assert spec.provenance.source == "user"
    assert from_json(CspNetConfig, spec.network.config) == network.config


def test_build_makes_the_network_of_the_spec(tiny_spec: ModelSpec) -> None:
    model = build(tiny_spec)
    assert isinstance(model, CspNet)
    assert to_json(model.config) == tiny_spec.network.config
    assert model.head.fc.out_features == 10


def test_unknown_family(tiny_spec: ModelSpec) -> None:
    network = NetworkSpec(family="vgg", config=tiny_spec.network.config)
    with pytest.raises(InputError, match=r"\$\.network\.family: got 'vgg', expected one of cspnet"):
        build(dataclasses.replace(tiny_spec, network=network))


def _with_stage(spec: ModelSpec, **changes: Any) -> ModelSpec:
    config = copy.deepcopy(spec.network.config)
    config["stages"][1].update(changes)
    return dataclasses.replace(spec, network=NetworkSpec(family="cspnet", config=config))


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"depth": "two"}, r"\$\.network\.config\.stages\[1\]\.depth: got str, expected int"),
        ({"kind": "cs4"}, r"\$\.network\.config\.stages\[1\]\.kind"),
        ({"widen": 2}, r"\$\.network\.config\.stages\[1\]\.widen: unknown key"),
        ({"stride": True}, r"\$\.network\.config\.stages\[1\]\.stride"),
    ],
)
def test_bad_configuration_is_named_by_its_path(tiny_spec: ModelSpec, changes: dict[str, Any], path: str) -> None:
    with pytest.raises(InputError, match=path):
        build(_with_stage(tiny_spec, **changes))


@pytest.mark.parametrize(
    "changes", [{"groups": 7}, {"groups": 0}, {"out_chs": -8}, {"out_chs": 0}, {"depth": 0}, {"block_ratio": 1.0}],
    ids=str,
)  # fmt: skip
def test_configuration_that_no_network_can_have(tiny_spec: ModelSpec, changes: dict[str, Any]) -> None:
    """Depth 0 would feed the transition with the wrong width; so would a block that is not as wide as its input."""
    with pytest.raises(InputError):
        build(_with_stage(tiny_spec, **changes))


def test_network_without_a_stem(tiny_spec: ModelSpec) -> None:
    config = copy.deepcopy(tiny_spec.network.config)
    config["stem"]["out_chs"] = []
    with pytest.raises(InputError):
        build(dataclasses.replace(tiny_spec, network=NetworkSpec(family="cspnet", config=config)))


def test_description_of_before_block_in_chs_still_loads(tiny_spec: ModelSpec) -> None:
    config = copy.deepcopy(tiny_spec.network.config)
    for stage in config["stages"]:
        del stage["block_in_chs"]
    model = build(dataclasses.replace(tiny_spec, network=NetworkSpec(family="cspnet", config=config)))
    assert to_json(model.config) == tiny_spec.network.config


@pytest.mark.parametrize(
    ("name", "changes", "path"),
    [
        ("resnet50", {"depths": [3, 4, "six"]}, r"\$\.network\.config\.depths\[2\]: got str, expected int"),
        ("resnet50", {"groups": 0}, r"\$\.network\.config: groups: got 0"),
        ("resnet50", {"width": 64}, r"\$\.network\.config\.width: unknown key"),
        ("densenet121", {"fusion": "middle"}, r"\$\.network\.config\.fusion: got 'middle', expected one of 'both'"),
        ("peleenet", {"gamma": 1.0}, r"\$\.network\.config: no such network can be built \(channels in stage 1: got 0"),
        ("cspresnet50", {"leaky_slope": -1.0}, r"\$\.network\.config: leaky_slope: got -1.0"),
    ],
)
def test_bad_configuration_of_every_family(name: str, changes: dict[str, Any], path: str) -> None:
    spec = spec_of(find_network(name))
    network = NetworkSpec(family=spec.network.family, config={**spec.network.config, **changes})
    with pytest.raises(InputError, match=path):
        build(dataclasses.replace(spec, network=network))


def test_weights_are_drawn_once_and_by_their_fan(tiny_spec: ModelSpec) -> None:
    """He's standard deviation, sqrt(2 / fan out): what each layer needs to pass variance on through a rectifier."""
    torch.manual_seed(0)
    model = build(tiny_spec)
    assert isinstance(model, CspNet)
    weight = model.stages[2].conv_down.conv.weight
    assert weight.std().item() == pytest.approx((2 / (48 * 9)) ** 0.5, rel=0.05)
    assert model.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert not model.head.fc.bias.any()


@pytest.mark.parametrize(("top1", "top5"), [(0.9, 0.8), (-0.1, 0.5), (0.5, 1.1), (76.1, 92.9)])
def test_published_accuracy_is_a_share(top1: float, top5: float) -> None:
    with pytest.raises(ValueError, match="top1, top5"):
        PublishedAccuracy(top1=top1, top5=top5, size_px=224, source="test")
