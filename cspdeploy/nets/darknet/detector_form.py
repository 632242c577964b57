"""The Darknet form of a native YOLOv4: its cfg, and which convolution of one is which of the other.

Reference: yolov4.cfg, yolov4-tiny.cfg, yolov4-csp.cfg of AlexeyAB/darknet, in whose order the layers are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cspdeploy.core.codec import from_json
from cspdeploy.core.detection.spec import DetectionHead
from cspdeploy.core.errors import InputError
from cspdeploy.nets.cspnet import CspNetConfig
from cspdeploy.nets.darknet.form import (
    ACTIVATIONS,
    CfgWriter,
    DarknetForm,
    require_expressible,
    require_slope,
    write_stage,
    write_stem,
)
from cspdeploy.nets.darknet.sections import DarknetConfig, MaxPool, NetSection, Route, Upsample, Yolo
from cspdeploy.nets.darknet.weights import expected_bytes
from cspdeploy.nets.darknet_tiny import DarknetTinyConfig
from cspdeploy.nets.families import CLASSIFIER_FAMILIES
from cspdeploy.nets.yolov4 import NECK_STRIDES, SPP_SIZES, YoloV4Config, head_name

__all__ = ["detector_form", "num_classes_of_file"]

BETA_NMS = 0.6  # of all published cfgs


def detector_form(
    config: YoloV4Config, *, num_classes: int, heads: Sequence[DetectionHead] | None = None, height_px: int = 416,
    width_px: int = 416, letter_box: bool = False,
) -> DarknetForm:  # fmt: skip
    """The cfg of a native detector, and which convolution is which.

    Args:
        heads: how each raw map is decoded, in the order of the network's outputs. None: anchors of one pixel, where
            only the weights matter, which know of no anchors.

    Raises:
        InputError: Darknet has no such network.
    """
    heads = heads or [
        DetectionHead(output=head_name(stride), stride_px=stride, anchors=((1.0, 1.0),) * config.num_anchors)
        for stride in NECK_STRIDES[config.neck]
    ]
    writer = _DetectorWriter(config, heads, num_classes)
    writer.backbone()
    writer.prefix = ""
    require_slope(config.activation, config.leaky_slope)
    writer.act = ACTIVATIONS[config.activation]
    if config.neck == "tiny":
        writer.tiny_neck()
    else:
        writer.path_aggregation()
    net = NetSection(height=height_px, width=width_px, channels=3, letter_box=letter_box)
    return DarknetForm(config=DarknetConfig(net=net, layers=tuple(writer.layers)), units=tuple(writer.units))


def num_classes_of_file(path: Path, config: YoloV4Config) -> int:
    """The classes of the `.weights` file of such a detector, by its size: each class adds as many bytes; 0 if none fit.

    Raises:
        InputError: Darknet has no such network.
    """
    one, two = (expected_bytes(detector_form(config, num_classes=num_classes).config) for num_classes in (1, 2))
    num_bytes = path.stat().st_size if path.is_file() else 0
    for header in (0, 4):  # old files count the images seen in 4 bytes less
        more, left = divmod(num_bytes + header - one, two - one)
        if left == 0 and more >= 0:
            return more + 1
    return 0


class _DetectorWriter(CfgWriter):
    """Layers of a detector in the order of its cfg. `taps`: the backbone's layers that the neck reads, by stride."""

    def __init__(self, config: YoloV4Config, heads: Sequence[DetectionHead], num_classes: int) -> None:
        super().__init__("linear")
        self.config = config
        self.heads = heads
        self.num_classes = num_classes
        self.taps: dict[int, int] = {}
        self.csp = config.neck == "csp"

    # --- backbone ---

    def backbone(self) -> None:
        spec = self.config.backbone
        family = CLASSIFIER_FAMILIES.get(spec.family)
        config: Any = None if family is None else from_json(family.config, spec.config, where="$.network.config")
        self.prefix = "backbone."
        if isinstance(config, CspNetConfig):
            self._csp_backbone(config)
        elif isinstance(config, DarknetTinyConfig):
            self._tiny_backbone(config)
        else:
            raise InputError(
                f"backbone: a network of the family '{spec.family}' has no form in a Darknet cfg",
                fix="use a backbone in Darknet's form, such as csdarknet53",
            )

    def _csp_backbone(self, config: CspNetConfig) -> None:
        require_expressible(config)
        self.act = ACTIVATIONS[config.activation]
        write_stem(self, config)
        stride: int = config.stem.stride
        for index, stage in enumerate(config.stages):
            write_stage(self, stage, f"stages.{index}")
            stride *= stage.stride
            self.taps[stride] = self.last

    def _tiny_backbone(self, config: DarknetTinyConfig) -> None:
        require_slope(config.activation, config.leaky_slope)
        self.act = ACTIVATIONS[config.activation]
        chs = 2 * config.stem_chs
        self.conv("conv1", config.stem_chs, 3, stride=2, padding=1)
        self.conv("conv2", chs, 3, stride=2, padding=1)
        stride = 4
        for index in range(config.num_blocks):
            block = f"blocks.{index}"
            whole = self.conv(f"{block}.conv1", chs, 3)
            self.layers.append(Route(sources=(whole,), groups=2, group_id=1))
            first = self.conv(f"{block}.conv2", chs // 2, 3)
            self.route(self.conv(f"{block}.conv3", chs // 2, 3), first)
            self.taps[stride] = self.conv(f"{block}.conv4", chs, 1)
            self.route(whole, self.last)
            self.layers.append(MaxPool(size=2, stride=2, padding=1))
            chs, stride = 2 * chs, 2 * stride
        self.taps[stride] = self.conv("conv3", chs, 3)

    # --- necks ---

    def path_aggregation(self) -> None:
        width = self.config.width
        p32 = self._csp_pyramid("neck.pyramid", width) if self.csp else self._pyramid("neck.pyramid", width)
        p16 = self._top_down("neck.top_down16", self.taps[16], width // 2)
        p8 = self._top_down("neck.top_down8", self.taps[8], width // 4)
        self._head(0, width // 2)
        self.route(p8)
        n16 = self._bottom_up("neck.bottom_up16", p16, width // 2)
        self._head(1, width)
        self.route(n16)
        self._bottom_up("neck.bottom_up32", p32, width)
        self._head(2, 2 * width)

    def tiny_neck(self) -> None:
        width = self.config.width
        coarse = self.conv("neck.conv1", width, 1)
        self._head(0, 2 * width)
        self.route(coarse)
        self.conv("neck.reduce", width // 2, 1)
        self.layers.append(Upsample(stride=2))
        self.route(self.last, self.taps[16])
        self._head(1, width)

    def _pools(self) -> None:
        """SPP: every pool reads the same map, and the widest comes first where they are joined."""
        source = self.last
        pools: list[int] = []
        for size in reversed(SPP_SIZES):
            if pools:
                self.route(source)
            self.layers.append(MaxPool(size=size, stride=1, padding=size - 1))
            pools.append(self.last)
        self.route(*reversed(pools), source)

    def _pyramid(self, name: str, chs: int) -> int:
        self._convs(name, 1, (chs, 1), (2 * chs, 3), (chs, 1))
        self._pools()
        return self._convs(name, 4, (chs, 1), (2 * chs, 3), (chs, 1))

    def _csp_pyramid(self, name: str, chs: int) -> int:
        cross = self.conv(f"{name}.cross", chs, 1)
        self.route(cross - 1)
        self._convs(name, 1, (chs, 1), (chs, 3), (chs, 1))
        self._pools()
        self.route(self._convs(name, 4, (chs, 1), (chs, 3)), cross)
        return self.conv(f"{name}.conv6", chs, 1)

    def _top_down(self, name: str, fine: int, chs: int) -> int:
        self.conv(f"{name}.reduce", chs, 1)
        self.layers.append(Upsample(stride=2))
        up = self.last
        self.route(fine)
        self.route(self.conv(f"{name}.lateral", chs, 1), up)
        return self._block(f"{name}.block", chs)

    def _bottom_up(self, name: str, coarse: int, chs: int) -> int:
        self.route(self.conv(f"{name}.shrink", chs, 3, stride=2, padding=1), coarse)
        return self._block(f"{name}.block", chs)

    def _block(self, name: str, chs: int) -> int:
        if not self.csp:
            return self._convs(name, 1, (chs, 1), (2 * chs, 3), (chs, 1), (2 * chs, 3), (chs, 1))
        source = self.conv(f"{name}.conv1", chs, 1)
        cross = self.conv(f"{name}.cross", chs, 1)
        self.route(source)
        self.route(self._convs(name, 2, (chs, 1), (chs, 3), (chs, 1), (chs, 3)), cross)
        return self.conv(f"{name}.conv6", chs, 1)

    def _convs(self, name: str, first: int, *widths_and_kernels: tuple[int, int]) -> int:
        for index, (chs, kernel) in enumerate(widths_and_kernels, start=first):
            self.conv(f"{name}.conv{index}", chs, kernel)
        return self.last

    def _head(self, index: int, mid_chs: int) -> None:
        head, config = self.heads[index], self.config
        self.conv(f"heads.{index}.conv", mid_chs, 3)
        self.conv(
            f"heads.{index}.pred", config.num_anchors * (5 + self.num_classes), 1,
            act="logistic" if config.new_coords else "linear", bias=True, part="head",
        )  # fmt: skip
        self.layers.append(Yolo(
            classes=self.num_classes, anchors=head.anchors, mask=tuple(range(len(head.anchors))),
            scale_x_y=head.scale_x_y, new_coords=config.new_coords, nms_kind="greedynms", beta_nms=BETA_NMS,
        ))  # fmt: skip
