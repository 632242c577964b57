"""How any classifier of the registry becomes the backbone of a segmenter: "fpn:cspresnet50"."""

from __future__ import annotations

import dataclasses

from cspdeploy.core.codec import to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import NetworkSpec
from cspdeploy.nets.network import Network
from cspdeploy.nets.segmentation import FpnConfig, FpnSegmenter

__all__ = ["SEGMENT_HEAD", "compose_segmenter"]

SEGMENT_HEAD = "fpn"
WIDTH = 128  # of the semantic head of panoptic feature pyramids, 1901.02446, table 1
SIZE_PX = 512
NUM_CLASSES = 21  # PASCAL VOC's; trained weights bring their own number


def compose_segmenter(backbone: Network) -> Network:
    """The row of a segmenter over a classifier's row, named "fpn-" and the backbone's name. It has no weights.

    Raises:
        InputError: the backbone's feature maps make no pyramid.
    """
    config = FpnConfig(backbone=NetworkSpec(family=backbone.family, config=to_json(backbone.config)), width=WIDTH)
    try:
        FpnSegmenter.check(config)
    except ValueError as error:
        raise InputError(
            f"model '{SEGMENT_HEAD}:{backbone.name}': {error}", fix=f"{SEGMENT_HEAD}:cspdarknet53"
        ) from error
    return Network(
        name=f"{SEGMENT_HEAD}-{backbone.name}", family=SEGMENT_HEAD, config=config, num_classes=NUM_CLASSES,
        preprocess=dataclasses.replace(
            backbone.preprocess.with_size(SIZE_PX, SIZE_PX), resize="stretch", crop_pct=1.0
        ),
        summary=f"{backbone.name} with a feature pyramid: the class of every pixel", kind=backbone.kind,
    )  # fmt: skip
