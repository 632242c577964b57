from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import ModelSpec
from cspdeploy.nets.exported import FeaturePyramid, as_exported, load_exported, with_features
from cspdeploy.nets.registry import build
from cspdeploy.nets.weights import write_safetensors


def test_pyramid_gives_the_networks_own_maps_finest_first(tiny_spec: ModelSpec) -> None:
    network = build(tiny_spec).eval()
    spec = with_features(tiny_spec, network, strides=())
    assert (spec.task, spec.outputs) == ("features", ("features_s4", "features_s8"))
    x_NCHW = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        maps = as_exported(network, spec)(x_NCHW)
        whole = network.forward_features(x_NCHW)
    assert [tuple(value.shape) for value in maps] == [(2, 32, 8, 8), (2, 48, 4, 4)]
    assert torch.equal(maps[0], whole[-2])
    assert torch.equal(maps[1], whole[-1])


def test_strides_are_chosen_and_sorted(tiny_spec: ModelSpec) -> None:
    spec = with_features(tiny_spec, build(tiny_spec), strides=(8, 2, 8))
    assert spec.outputs == ("features_s2", "features_s8")


def test_stride_that_the_network_has_not(tiny_spec: ModelSpec) -> None:
    with pytest.raises(InputError, match=r"no feature map of stride 32, it has \[1, 2, 4, 8\]") as caught:
        with_features(tiny_spec, build(tiny_spec), strides=(8, 32))
    assert caught.value.fix == "--strides 1,2,4,8"


def test_network_with_none_of_the_usual_strides(tiny_spec: ModelSpec) -> None:
    network = build(tiny_spec)
    network.feature_levels = network.feature_levels[:2]
    with pytest.raises(InputError, match=r"no feature map of stride 4, 8, 16, 32, it has \[1, 2\]"):
        with_features(tiny_spec, network, strides=())


def test_output_of_no_such_name(tiny_spec: ModelSpec) -> None:
    spec = dataclasses.replace(tiny_spec, task="features", outputs=("features_s3",))
    with pytest.raises(InputError, match=r"\$\.outputs: got features_s3"):
        as_exported(build(tiny_spec), spec)


def test_classifier_is_exported_as_it_is(tiny_spec: ModelSpec) -> None:
    network = build(tiny_spec)
    assert as_exported(network, tiny_spec) is network


def test_pyramid_takes_the_weights_of_the_whole_network(tiny_spec: ModelSpec, tmp_path: Path) -> None:
    network = build(tiny_spec).eval()
    write_safetensors(tmp_path / "w.safetensors", network, dtype=torch.float32)
    spec = with_features(tiny_spec, network, strides=(8,))
    loaded = load_exported(spec, tmp_path / "w.safetensors").eval()
    assert isinstance(loaded, FeaturePyramid)
    x_NCHW = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(x_NCHW)[0], network.forward_features(x_NCHW)[-1])
