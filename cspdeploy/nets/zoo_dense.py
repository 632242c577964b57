"""Rows of the registry: CSPDenseNet and CSPPeleeNet, with the variants of the paper's ablation (1911.11929, 4.2).

The paper's layer lists are unpublished; `cspdeploy.nets.densenet` says which reading these are, so they carry no
published accuracy.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from cspdeploy.nets.densenet import DenseNetConfig
from cspdeploy.nets.network import Network, imagenet_network
from cspdeploy.nets.zoo_baselines import DENSENET_DEPTHS, PELEENET, TORCHVISION_CONTRACT, densenet

__all__ = ["DENSE_CSP_NETWORKS"]

Fusion = Literal["both", "first", "last"]

HALF = 0.5
QUARTER = 0.25

_HOW: dict[Fusion, str] = {"both": "both transitions", "first": "fusion first", "last": "fusion last"}


def _row(name: str, plain: DenseNetConfig, baseline: str, title: str, *, gamma: float, fusion: Fusion) -> Network:
    config = dataclasses.replace(plain, gamma=gamma, fusion=fusion)
    return imagenet_network(
        name, "densenet", config, kind="csp", summary=f"{title}, {_HOW[fusion]}, gamma {gamma}",
        contract=TORCHVISION_CONTRACT, baseline=baseline,
    )  # fmt: skip


def _densenet(size: str, suffix: str, fusion: Fusion) -> Network:
    plain = densenet(DENSENET_DEPTHS[size])
    return _row(
        f"cspdensenet{size}{suffix}", plain, f"densenet{size}", f"CSPDenseNet-{size}", gamma=HALF, fusion=fusion
    )


def _peleenet(suffix: str, gamma: float, fusion: Fusion) -> Network:
    return _row(f"csppeleenet{suffix}", PELEENET, "peleenet", "CSPPeleeNet", gamma=gamma, fusion=fusion)


DENSE_CSP_NETWORKS: tuple[Network, ...] = (
    *(_densenet(size, "", "both") for size in DENSENET_DEPTHS),
    _densenet("201", "_fusion_first", "first"),
    _densenet("201", "_fusion_last", "last"),
    _peleenet("", HALF, "both"),
    _peleenet("_fusion_first", HALF, "first"),
    _peleenet("_fusion_last", HALF, "last"),
    _peleenet("_gamma25", QUARTER, "both"),
    _peleenet("_gamma25_fusion_first", QUARTER, "first"),
    _peleenet("_gamma25_fusion_last", QUARTER, "last"),
)
