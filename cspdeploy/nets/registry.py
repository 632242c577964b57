"""The networks that have a name, and how a model description becomes a network.

A row in one of the `zoo_` files is all that a new network of a known family needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.errors import InputError, did_you_mean
from cspdeploy.core.spec import ModelSpec, NetworkSpec, Provenance
from cspdeploy.nets.darknet.network import DarknetNet
from cspdeploy.nets.darknet.sections import DarknetConfig
from cspdeploy.nets.families import CLASSIFIER_FAMILIES, Family
from cspdeploy.nets.network import Network, PublishedAccuracy
from cspdeploy.nets.segmentation import FpnConfig, FpnSegmenter
from cspdeploy.nets.yolov4 import YoloV4, YoloV4Config
from cspdeploy.nets.zoo_baselines import BASELINE_NETWORKS
from cspdeploy.nets.zoo_csp import CSP_NETWORKS
from cspdeploy.nets.zoo_dense import DENSE_CSP_NETWORKS
from cspdeploy.nets.zoo_detect import COMPOSED_HEAD, DETECTORS, compose_detector
from cspdeploy.nets.zoo_segment import SEGMENT_HEAD, compose_segmenter

__all__ = [
    "FAMILIES",
    "NETWORKS",
    "Family",
    "Network",
    "PublishedAccuracy",
    "build",
    "find_network",
    "is_network",
    "spec_of",
]


FAMILIES: dict[str, Family] = {
    **CLASSIFIER_FAMILIES,
    "darknet": Family(config=DarknetConfig, network=DarknetNet),
    "yolov4": Family(config=YoloV4Config, network=YoloV4),
    "fpn": Family(config=FpnConfig, network=FpnSegmenter),
}


COMPOSED: dict[str, Callable[[Network], Network]] = {
    COMPOSED_HEAD: compose_detector, SEGMENT_HEAD: compose_segmenter,
}  # fmt: skip
"""Heads that any classifier of the registry carries as a backbone."""

NETWORKS: dict[str, Network] = {
    network.name: network for network in (*CSP_NETWORKS, *DENSE_CSP_NETWORKS, *BASELINE_NETWORKS, *DETECTORS)
}


def find_network(name: str) -> Network:
    """The registry's row of that name, or the detector or segmenter that is composed of a head and a backbone.

    Args:
        name: a row's; or "yolov4:" or "fpn:" and the name of a classifier's row, or the name that such a network then
            has, which is the same with "-" in place of ":".

    Raises:
        InputError: unknown name, the message suggests the nearest one; or the backbone cannot carry the head.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    head, colon, backbone = name.partition(":")
    if colon:
        return _composed(name, head, backbone)
    for head in COMPOSED:
        composed = name.removeprefix(f"{head}-")
        if composed != name and composed in NETWORKS:
            return _composed(name, head, composed)
    raise InputError(
        f"model '{name}': unknown, none of the {len(NETWORKS)} networks",
        fix=f"{did_you_mean(name, NETWORKS)}see: cspdeploy list",
    )


def is_network(name: str) -> bool:
    """Whether `find_network` takes the name for one of its own: a row, or a head and a backbone, which may not be.

    A colon alone is not enough: paths have some, too.
    """
    head, colon, _ = name.partition(":")
    if name in NETWORKS or (colon and head in COMPOSED):
        return True
    return any(name.removeprefix(f"{head}-") in NETWORKS for head in COMPOSED)


def _composed(name: str, head: str, backbone: str) -> Network:
    if head not in COMPOSED:
        raise InputError(
            f"model '{name}': unknown head '{head}', expected one of {', '.join(COMPOSED)}",
            fix=f"{COMPOSED_HEAD}:{backbone}",
        )
    backbones = {row.name: row for row in NETWORKS.values() if row.detection is None}
    if backbone not in backbones:
        raise InputError(
            f"model '{name}': unknown backbone '{backbone}', none of the {len(backbones)} classifiers",
            fix=f"{did_you_mean(backbone, backbones)}see: cspdeploy list",
        )
    return COMPOSED[head](backbones[backbone])


def spec_of(network: Network, **changes: Any) -> ModelSpec:
    """The model description of a registry row, for weights of no known origin; `changes` replace its fields."""
    detects = network.detection
    spec = ModelSpec(
        name=network.name,
        network=NetworkSpec(family=network.family, config=to_json(network.config)),
        num_classes=network.num_classes,
        preprocess=network.preprocess,
        provenance=Provenance(source="user"),
        task="detect" if detects is not None else "segment" if network.family == SEGMENT_HEAD else "classify",
        outputs=("logits",) if detects is None else detects.network_outputs,
        detection=detects,
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
    _require_whole_cells(spec)
    try:
        return family.network(config, num_classes=spec.num_classes)
    except (ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"$.network.config: no such network can be built ({error})", fix="mend spec.json") from error


def _require_whole_cells(spec: ModelSpec) -> None:
    """A neck joins maps of which one is twice as large as the other: the sides must be so at every level.

    Of a Darknet cfg likewise: half a cell at the edge is a cell of its map, of which the decoding knows nothing.
    """
    if spec.detection is None:
        return
    step = max(head.stride_px for head in spec.detection.heads)
    size = (spec.preprocess.height_px, spec.preprocess.width_px)
    if any(side % step for side in size):
        near = "x".join(str(max(step, round(side / step) * step)) for side in size)
        raise InputError(
            f"'{spec.name}': input of {size[0]}x{size[1]} px, expected multiples of {step}", fix=f"--size {near}"
        )
