"""The networks that have a name. A row here is all that a new network of a known family needs."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import ModelSpec, NetworkSpec, Preprocess, Provenance
from cspdeploy.nets.cspnet import CspNet, CspNetConfig, StageConfig, StemConfig

__all__ = ["FAMILIES", "NETWORKS", "Family", "Network", "build", "find_network", "spec_of"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A network class and the dataclass that configures it."""

    config: type
    network: Callable[..., nn.Module]


FAMILIES: dict[str, Family] = {"cspnet": Family(config=CspNetConfig, network=CspNet)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A named network: its configuration, how its published checkpoint wants its images, and the checkpoint."""

    name: str
    family: str
    config: CspNetConfig
    num_classes: int
    preprocess: Preprocess
    checkpoint: str
    """Tag of the published checkpoint, or empty."""
    published_top1: float | None
    published_top5: float | None
    """ImageNet accuracy in [0, 1] of that checkpoint at the size of `preprocess`."""
    summary: str


def _imagenet(size_px: int, *, crop_pct: float) -> Preprocess:
    return Preprocess(
        height_px=size_px, width_px=size_px, resize="crop", crop_pct=crop_pct, interpolation="bilinear",
        channel_order="rgb", mean=IMAGENET_MEAN, std=IMAGENET_STD,
    )  # fmt: skip


_DARK_CSP_STAGE = StageConfig(
    kind="csp", block="dark", depth=1, out_chs=64, stride=2, groups=1, expand_ratio=2.0, block_ratio=1.0,
    bottle_ratio=0.5, cross_linear=False, down_growth=True, avg_down=False, se_ratio=0.0,
)  # fmt: skip


def _cspdarknet53() -> CspNetConfig:
    # The first stage is the exception: its paths are not halved and its block has a bottleneck.
    later = [
        dataclasses.replace(
            _DARK_CSP_STAGE, depth=depth, out_chs=out_chs, expand_ratio=1.0, block_ratio=0.5, bottle_ratio=1.0
        )
        for depth, out_chs in ((2, 128), (8, 256), (8, 512), (4, 1024))
    ]
    return CspNetConfig(
        stem=StemConfig(out_chs=(32,), kernel=3, stride=1, pool="none", padding=None),
        stages=(_DARK_CSP_STAGE, *later),
        activation="leaky_relu",
        leaky_slope=0.01,
    )


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network(
            name="cspdarknet53",
            family="cspnet",
            config=_cspdarknet53(),
            num_classes=1000,
            preprocess=_imagenet(256, crop_pct=0.887),
            checkpoint="cspdarknet53.ra_in1k",
            published_top1=0.80078,
            published_top5=0.95060,
            summary="CSPDarknet53, the backbone of YOLOv4",
        ),
    )
}


def find_network(name: str) -> Network:
    """The registry's row of that name.

    Raises:
        InputError: unknown name; the message suggests the nearest one.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    near = difflib.get_close_matches(name, NETWORKS, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise InputError(f"model '{name}': unknown, known are {', '.join(NETWORKS)}", fix=f"{hint}see: cspdeploy list")


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
