"""Rows of the registry: the YOLOv4 detectors, and how any other backbone gets the head of YOLOv4.

Anchors, sizes and decoding: the cfgs of AlexeyAB/darknet, whose weights load into these. Boxes of 80 COCO classes.
"""

from __future__ import annotations

import dataclasses

from cspdeploy.core.coco import NUM_COCO_CLASSES
from cspdeploy.core.codec import to_json
from cspdeploy.core.detection.spec import Detection, DetectionHead
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import NetworkSpec, Preprocess
from cspdeploy.nets.cspnet import CspNetConfig, level_strides
from cspdeploy.nets.darknet_tiny import DarknetTinyConfig
from cspdeploy.nets.network import Network, darknet_contract
from cspdeploy.nets.segmentation import FpnConfig
from cspdeploy.nets.yolov4 import NECK_STRIDES, YoloV4Config, head_name
from cspdeploy.nets.zoo_csp import CSDARKNET53_MISH, DARKNET_SLOPE, NO_SLOPE

__all__ = ["COMPOSED_HEAD", "DETECTORS", "compose_detector"]

COMPOSED_HEAD = "yolov4"
COMPOSED_SIZE_PX = 512  # of csresnext50-panet-spp-original-optimal, the published network of this kind

Anchors = tuple[tuple[float, float], ...]

ANCHORS: Anchors = (
    (12, 16), (19, 36), (40, 28), (36, 75), (76, 55), (72, 146), (142, 110), (192, 243), (459, 401),
)  # fmt: skip
TINY_ANCHORS: Anchors = ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319))
MASKS = ((0, 1, 2), (3, 4, 5), (6, 7, 8))
TINY_MASKS = ((3, 4, 5), (1, 2, 3))
"""As published: the smallest anchor is not used, and the fourth one twice."""
YOLOV4_SCALES = (1.2, 1.1, 1.05)


def _detection(
    config: YoloV4Config, anchors: Anchors, masks: tuple[tuple[int, ...], ...], scales_x_y: tuple[float, ...]
) -> Detection:
    rows = zip(NECK_STRIDES[config.neck], masks, scales_x_y, strict=True)
    return Detection(heads=tuple(
        DetectionHead(
            output=head_name(stride), stride_px=stride, anchors=tuple(anchors[index] for index in mask),
            scale_x_y=scale_x_y, new_coords=config.new_coords,
        )
        for stride, mask, scale_x_y in rows
    ))  # fmt: skip


def _contract(size_px: int, *, letterbox: bool = False) -> Preprocess:
    """Darknet's: the whole image in [0, 1], stretched or on grey borders."""
    return dataclasses.replace(darknet_contract(size_px), resize="letterbox" if letterbox else "stretch")


def _panet(backbone: NetworkSpec) -> YoloV4Config:
    """The neck of YOLOv4: leaky, whatever the activation of its backbone."""
    return YoloV4Config(
        backbone=backbone, neck="panet", width=512, activation="leaky_relu", leaky_slope=DARKNET_SLOPE, num_anchors=3,
        new_coords=False,
    )  # fmt: skip


def _row(name: str, config: YoloV4Config, contract: Preprocess, detection: Detection, summary: str) -> Network:
    return Network(
        name=name, family="yolov4", config=config, num_classes=NUM_COCO_CLASSES, preprocess=contract, summary=summary,
        kind="csp", detection=detection,
    )  # fmt: skip


def _yolov4() -> Network:
    config = _panet(NetworkSpec(family="cspnet", config=to_json(CSDARKNET53_MISH)))
    detection = _detection(config, ANCHORS, MASKS, YOLOV4_SCALES)
    return _row("yolov4", config, _contract(608), detection, "YOLOv4: CSPDarknet53 with Mish, SPP, PANet")


def _yolov4_csp() -> Network:
    """Scaled-YOLOv4. Its backbone begins with a plain residual stage, and Mish is everywhere."""
    first = dataclasses.replace(
        CSDARKNET53_MISH.stages[0], kind="dark", expand_ratio=1.0, block_ratio=1.0, bottle_ratio=0.5, down_growth=False
    )
    backbone = dataclasses.replace(CSDARKNET53_MISH, stages=(first, *CSDARKNET53_MISH.stages[1:]))
    config = YoloV4Config(
        backbone=NetworkSpec(family="cspnet", config=to_json(backbone)), neck="csp", width=512, activation="mish",
        leaky_slope=NO_SLOPE, num_anchors=3, new_coords=True,
    )  # fmt: skip
    detection = _detection(config, ANCHORS, MASKS, (2.0, 2.0, 2.0))
    contract = _contract(512, letterbox=True)
    return _row("yolov4-csp", config, contract, detection, "YOLOv4 with CSP blocks in its neck as well")


def _yolov4_tiny() -> Network:
    backbone = DarknetTinyConfig(stem_chs=32, num_blocks=3, activation="leaky_relu", leaky_slope=DARKNET_SLOPE)
    config = YoloV4Config(
        backbone=NetworkSpec(family="darknet_tiny", config=to_json(backbone)), neck="tiny", width=256,
        activation="leaky_relu", leaky_slope=DARKNET_SLOPE, num_anchors=3, new_coords=False,
    )  # fmt: skip
    detection = _detection(config, TINY_ANCHORS, TINY_MASKS, (1.05, 1.05))
    return _row("yolov4-tiny", config, _contract(416), detection, "YOLOv4-tiny: two heads, for small devices")


def compose_detector(backbone: Network) -> Network:
    """The head of YOLOv4 over a classifier's feature maps, called "yolov4-" and the classifier's name.

    It takes colours as the classifier does, and the whole image instead of its centre.

    Raises:
        InputError: the classifier has no map of stride 8, 16 or 32.
    """
    known = _strides(backbone)
    missing = [stride for stride in NECK_STRIDES["panet"] if stride not in known]
    if missing:
        raise InputError(
            f"model '{COMPOSED_HEAD}:{backbone.name}': the backbone has no feature map of stride "
            f"{', '.join(map(str, missing))}, it has {known}",
            fix="use a backbone of strides 8, 16 and 32, see: cspdeploy list",
        )
    config = _panet(NetworkSpec(family=backbone.family, config=to_json(backbone.config)))
    contract = dataclasses.replace(backbone.preprocess, resize="stretch", crop_pct=1.0, interpolation="bilinear")
    row = _row(
        f"{COMPOSED_HEAD}-{backbone.name}", config, contract.with_size(COMPOSED_SIZE_PX, COMPOSED_SIZE_PX),
        _detection(config, ANCHORS, MASKS, YOLOV4_SCALES), f"YOLOv4's head on {backbone.summary}",
    )  # fmt: skip
    return dataclasses.replace(row, kind=backbone.kind)


def _strides(backbone: Network) -> list[int]:
    """Strides of the feature maps, without building the network."""
    config = backbone.config
    if isinstance(config, CspNetConfig):
        return level_strides(config)
    if isinstance(config, YoloV4Config | FpnConfig):
        raise TypeError(f"{backbone.name} has a head of its own, expected a classifier")
    return [2, *(4 * 2**index for index in range(len(config.depths)))]


DETECTORS: tuple[Network, ...] = (_yolov4(), _yolov4_tiny(), _yolov4_csp())
