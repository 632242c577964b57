"""The networks that have a name, and how a model description becomes a network.

A row in one of the `zoo_` files is all that a new network of a known family needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.errors import InputError, did_you_mean
from cspdeploy.core.spec import ModelSpec, NetworkSpec, Provenance
from cspdeploy.nets.cspnet import CspNet, CspNetConfig
from cspdeploy.nets.darknet.network import DarknetNet
from cspdeploy.nets.darknet.sections import DarknetConfig
from cspdeploy.nets.densenet import DenseNet, DenseNetConfig
from cspdeploy.nets.network import Network, PublishedAccuracy
from cspdeploy.nets.resnet import ResNet, ResNetConfig
from cspdeploy.nets.zoo_baselines import BASELINE_NETWORKS
from cspdeploy.nets.zoo_csp import CSP_NETWORKS
from cspdeploy.nets.zoo_dense import DENSE_CSP_NETWORKS

__all__ = ["FAMILIES", "NETWORKS", "Family", "Network", "PublishedAccuracy", "build", "find_network", "spec_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A network class and the dataclass that configures it."""

    config: type
    network: Callable[..., nn.Module]


FAMILIES: dict[str, Family] = {
    "cspnet": Family(config=CspNetConfig, network=CspNet),
    "resnet": Family(config=ResNetConfig, network=ResNet),
    "densenet": Family(config=DenseNetConfig, network=DenseNet),
    "darknet": Family(config=DarknetConfig, network=DarknetNet),
}


NETWORKS: dict[str, Network] = {
    network.name: network for network in (*CSP_NETWORKS, *DENSE_CSP_NETWORKS, *BASELINE_NETWORKS)
}


def find_network(name: str) -> Network:
    """The registry's row of that name.

    Raises:
        InputError: unknown name; the message suggests the nearest one.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    raise InputError(
        f"model '{name}': unknown, none of the {len(NETWORKS)} networks",
        fix=f"{did_you_mean(name, NETWORKS)}see: cspdeploy list",
    )


def spec_of(network: Network, **changes: Any) -> ModelSpec:
    """The model description of a registry row, for weights of no known origin; `changes` replace its fields."""
    spec = ModelSpec(
        name=network.name,
        network=NetworkSpec(family=network.family, config=to_json(network.config)),
        num_classes=network.num_classes,
        preprocess=network.preprocess,
        provenance=Provenance(source="user"),
    )
    return dataclasses.replace(spec, **changes)


def build(spec: ModelSpec) -> nn.Module:
    """The network of a model description, with fresh weights, in training mode.

    Raises:
        InputError: unknown family, or a configuration that does not fit it.
    """
    family = FAMILIES.get(spec.network.family)
    if family is None:
        raise InputError(
            f"$.network.family: got '{spec.network.family}', expected one of {', '.join(FAMILIES)}",
            fix="mend spec.json, or update cspdeploy",
        )
    config: Any = from_json(family.config, spec.network.config, where="$.network.config")
    try:
        return family.network(config, num_classes=spec.num_classes)
    except (ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"$.network.config: no such network can be built ({error})", fix="mend spec.json") from error
