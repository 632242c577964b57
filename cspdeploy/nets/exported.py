"""What of a network is exported: its logits, its boxes or the raw maps of its heads, or its pyramid of feature maps.

The weights are the same whatever is asked of the network, so a file is loaded into the whole of it, and the choice is
made around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import ModelSpec
from cspdeploy.nets.detection import DecodedDetector
from cspdeploy.nets.loading import load_file
from cspdeploy.nets.registry import build

__all__ = ["FEATURE_STRIDES", "FeaturePyramid", "as_exported", "load_exported", "with_features"]

FEATURE_STRIDES = (4, 8, 16, 32)
"""Of the pyramid that segmenters take; detectors take the last three of them."""


class FeaturePyramid(nn.Module):
    """`[N, 3, H, W]` to a tuple of feature maps `[N, C, H / stride, W / stride]`, finest first.

    Args:
        network: any network of `cspdeploy.nets`.
        levels: indices into its `feature_levels`.
    """

    def __init__(self, network: nn.Module, levels: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self._levels = tuple(levels)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        maps = self.network.forward_features(x_NCHW)  # type: ignore[operator]
        return tuple(maps[level] for level in self._levels)


def with_features(spec: ModelSpec, network: nn.Module, *, strides: Sequence[int] | None) -> ModelSpec:
    """The description of a network of which the feature maps of those strides are wanted.

    Args:
        strides: in pixels of the input; None: `FEATURE_STRIDES`, as far as the network has them.

    Raises:
        InputError: the network has no map of such a stride.
    """
    known = [level.stride for level in network.feature_levels]  # type: ignore[union-attr]
    wanted = sorted(set(strides)) if strides else [stride for stride in FEATURE_STRIDES if stride in known]
    missing = [stride for stride in wanted or FEATURE_STRIDES if stride not in known]
    if missing:
        raise InputError(
            f"model '{spec.name}': no feature map of stride {', '.join(map(str, missing))}, it has {known}",
            fix=f"--strides {','.join(map(str, known))}",
        )
    return dataclasses.replace(
        spec, task="features", detection=None, outputs=tuple(f"features_s{stride}" for stride in wanted)
    )


def as_exported(network: nn.Module, spec: ModelSpec) -> nn.Module:
    """The module whose outputs are `spec.outputs`, around `network`.

    Raises:
        InputError: the network does not have an output of such a name.
    """
    if spec.detection is not None:
        decodes = spec.detection.network_decode == "decoded"
        return DecodedDetector(network, spec.detection) if decodes else network
    if spec.task != "features":
        return network
    names = [f"features_s{level.stride}" for level in network.feature_levels]  # type: ignore[union-attr]
    unknown = [name for name in spec.outputs if name not in names]
    if unknown:
        raise InputError(f"$.outputs: got {unknown[0]}, expected of {', '.join(names)}", fix="mend spec.json")
    return FeaturePyramid(network, [names.index(name) for name in spec.outputs])


def load_exported(spec: ModelSpec, weights: Path) -> nn.Module:
    """Build the network of `spec`, load a weights file into it, and give what is exported of it.

    Raises:
        InputError: the file cannot be read or does not fit.
    """
    network = build(spec)
    load_file(network, weights)
    return as_exported(network, spec)
