"""The families of networks that end in a classifier: any of them can carry a detector's neck and heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from cspdeploy.core.codec import from_json
from cspdeploy.core.spec import NetworkSpec
from cspdeploy.nets.cspnet import CspNet, CspNetConfig
from cspdeploy.nets.darknet_tiny import DarknetTiny, DarknetTinyConfig
from cspdeploy.nets.densenet import DenseNet, DenseNetConfig
from cspdeploy.nets.resnet import ResNet, ResNetConfig

__all__ = ["CLASSIFIER_FAMILIES", "Family", "make_backbone"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A network class and the dataclass that configures it."""

    config: type
    network: Callable[..., nn.Module]


CLASSIFIER_FAMILIES: dict[str, Family] = {
    "cspnet": Family(config=CspNetConfig, network=CspNet),
    "resnet": Family(config=ResNetConfig, network=ResNet),
    "densenet": Family(config=DenseNetConfig, network=DenseNet),
    "darknet_tiny": Family(config=DarknetTinyConfig, network=DarknetTiny),
}

CLASSIFIERS = ("head", "fc", "classifier")
"""Names of the modules that give the logits."""


def make_backbone(spec: NetworkSpec) -> nn.Module:
    """The network without its classifier: `forward_features` and `feature_levels` alone.

    Raises:
        ValueError: no such family, or a configuration that no network can have.
        InputError: a configuration that is not the family's.
    """
    family = CLASSIFIER_FAMILIES.get(spec.family)
    if family is None:
        raise ValueError(f"backbone.family: got {spec.family!r}, expected one of {', '.join(CLASSIFIER_FAMILIES)}")
    config: Any = from_json(family.config, spec.config, where="$.network.config.backbone.config")
    backbone = family.network(config, num_classes=1)
    for name in CLASSIFIERS:  # its weights would be no part of what the detector computes
        if hasattr(backbone, name):
            delattr(backbone, name)
    return backbone
