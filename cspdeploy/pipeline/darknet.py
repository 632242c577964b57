"""A Darknet cfg as the description of a model."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.detection.spec import Detection, DetectionHead
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import ModelSpec, NetworkSpec, Preprocess, Provenance
from cspdeploy.nets.darknet.cfg import read_cfg
from cspdeploy.nets.darknet.plan import LayerError, NetworkPlan, plan_network
from cspdeploy.nets.darknet.sections import DarknetConfig, NetSection, Yolo
from cspdeploy.nets.exported import FEATURE_STRIDES
from cspdeploy.nets.network import darknet_contract
from cspdeploy.nets.registry import NETWORKS

__all__ = ["DARKNET_FAMILY", "detection_of_cfg", "is_cfg", "resize_cfg", "spec_of_cfg"]

DARKNET_FAMILY = "darknet"


def is_cfg(given: str) -> bool:
    """Whether what the user named is a Darknet cfg, by its suffix."""
    return given.lower().endswith(".cfg")


def spec_of_cfg(path: Path) -> ModelSpec:
    """The description of the network of a cfg, called as the file is; with "-cfg" if a classifier is called so.

    Raises:
        InputError: the file cannot be read, or describes no network that can be built.
    """
    config = read_cfg(path)
    plan = plan_network(config)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-")
    if (
        name in NETWORKS and plan.task == "classify"
    ):  # whose bundle has the classes in another order, and must not be taken for this one
        name = f"{name}-cfg"
    detection = detection_of_cfg(config, plan)
    return ModelSpec(
        name=name or "darknet",
        network=NetworkSpec(family=DARKNET_FAMILY, config=to_json(config)),
        num_classes=plan.num_classes,
        preprocess=_contract(config.net, detects=plan.task == "detect"),
        provenance=Provenance(source="user"),
        task=plan.task,
        outputs=plan.output_names if detection is None else detection.network_outputs,
        detection=detection,
    )


def detection_of_cfg(config: DarknetConfig, plan: NetworkPlan) -> Detection | None:
    """How the heads of a cfg are decoded; None for a classifier."""
    if plan.task != "detect":
        return None
    heads = [(plan.layers[index].stride, layer) for index, layer in enumerate(config.layers) if isinstance(layer, Yolo)]
    return Detection(heads=tuple(
        DetectionHead(
            output=name, stride_px=stride, anchors=tuple(layer.anchors[index] for index in layer.mask),
            scale_x_y=layer.scale_x_y, new_coords=layer.new_coords,
        )
        for name, (stride, layer) in zip(plan.output_names, heads, strict=True)
    ))  # fmt: skip


def resize_cfg(network: NetworkSpec, size_px: tuple[int, int]) -> NetworkSpec:
    """The same layers for another input size, checked again.

    Raises:
        InputError: a layer does not fit at that size; names it.
    """
    config = from_json(DarknetConfig, network.config, where="$.network.config").with_size(*size_px)
    try:
        plan_network(config)
    except LayerError as error:
        raise InputError(
            f"--size {size_px[0]}x{size_px[1]}: {error}", fix=f"give a multiple of {max(FEATURE_STRIDES)} px a side"
        ) from error
    return dataclasses.replace(network, config=to_json(config))


def _contract(net: NetSection, *, detects: bool) -> Preprocess:
    """Darknet's own. A classifier gets the centre of the image; a detector all of it.

    Pillow's bilinear filter, which looks at all pixels when it shrinks; Darknet's looks at four.
    """
    contract = darknet_contract().with_size(net.height, net.width)
    if not detects:
        return contract
    return dataclasses.replace(contract, resize="letterbox" if net.letter_box else "stretch")
