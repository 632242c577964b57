"""A detector of few weights whose maps mean something: bright squares, found by brightness."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx

from cspdeploy.core.detection.spec import Detection, DetectionHead
from cspdeploy.core.spec import Preprocess
from cspdeploy.quant.assemble import Assembly
from cspdeploy.quant.calibration import CalibrationSet, open_calibration
from cspdeploy.quant.int8 import Int8Settings, assemble
from cspdeploy.quant.observations_cache import ObservationsCache
from cspdeploy.quant.prepare import prepare_float
from tests.quant.int8_parts import quiet
from tests.quant.placed_graphs import ROWS, make

SIDE_PX, STRIDE_PX = 64, 8
HEAD = DetectionHead(output="head", stride_px=STRIDE_PX, anchors=((12.0, 12.0), (20.0, 16.0)), scale_x_y=1.05)
DETECTION = Detection(heads=(HEAD,))
CONTRACT = Preprocess(
    height_px=SIDE_PX, width_px=SIDE_PX, resize="stretch", crop_pct=1.0, interpolation="bilinear",
    channel_order="rgb", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
)  # fmt: skip

BODY = """
    c1 = Conv <pads = [1, 1, 1, 1], strides = [2, 2], kernel_shape = [3, 3]> (x, w1, b1)
    a1 = LeakyRelu <alpha = 0.1> (c1)
    c2 = Conv <pads = [1, 1, 1, 1], strides = [2, 2], kernel_shape = [3, 3]> (a1, w2, b2)
    a2 = LeakyRelu <alpha = 0.1> (c2)
    c3 = Conv <pads = [1, 1, 1, 1], strides = [2, 2], kernel_shape = [3, 3]> (a2, w3, b3)
    a3 = LeakyRelu <alpha = 0.1> (c3)
    head = Conv (a3, w4, b4)
"""
WEIGHTS = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (12, 8, 3, 3), "b2": (12,), "w3": (16, 12, 3, 3), "b3": (16,)}
CHANNELS = 2 * (5 + 1)
"""Of the head: two anchors, one class."""


def detector() -> onnx.ModelProto:
    """Brightness makes objectness: a path of means runs through the random weights, and ends in the objectness."""
    rng = np.random.default_rng(3)
    values: dict[str, npt.NDArray[np.generic]] = {}
    for name, shape in WEIGHTS.items():
        array = rng.normal(size=shape).astype(np.float32) * np.float32(0.15)
        if name.startswith("w"):
            array[0] = 0.0
            array[0, 0 if name != "w1" else slice(None)] = 1.0 / (9.0 if name != "w1" else 27.0)
        else:
            array[0] = 0.0
        values[name] = array
    head = rng.normal(size=(CHANNELS, 16, 1, 1)).astype(np.float32) * np.float32(0.3)
    bias = np.zeros(CHANNELS, np.float32)
    for anchor in (0, 6):
        head[anchor + 4] = 0.0
        head[anchor + 4, 0] = 14.0
        head[anchor + 5] = 0.0
        bias[anchor + 4], bias[anchor + 5] = -7.0, 4.0
    return make(BODY, {}, outputs=("head",), x=f"float[1, 3, {SIDE_PX}, {SIDE_PX}]",
                values={**values, "w4": head, "b4": bias})  # fmt: skip


def squares(count: int = 40, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Dark, grainy pictures with one to four bright squares: `[count, 64, 64, 3]`."""
    rng = np.random.default_rng(seed)
    made = rng.integers(10, 90, (count, SIDE_PX, SIDE_PX, 3), np.uint8)
    for picture in made:
        for _ in range(int(rng.integers(1, 5))):
            side = int(rng.integers(10, 20))
            top, left = rng.integers(0, SIDE_PX - side, 2)
            picture[top : top + side, left : left + side] = rng.integers(170, 256, 3)
    return made


def calibration(count: int = 40) -> CalibrationSet:
    return open_calibration(squares(count), CONTRACT)


def assembled() -> Assembly:
    """The detector for ONNX Runtime on a CPU, with its calibration images."""
    row = ROWS["ort-cpu"]
    return assemble(
        prepare_float(detector(), placement=row), calibration(), placement=row, settings=Int8Settings(),
        cache=ObservationsCache(None), progress=quiet, detection=DETECTION,
    )  # fmt: skip
