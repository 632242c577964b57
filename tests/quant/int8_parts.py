"""What a test of the whole INT8 step is made of: a network of few weights, and images like photographs for it."""

from __future__ import annotations

from pathlib import Path

import onnx

from cspdeploy.core.spec import Preprocess
from cspdeploy.quant.calibration import CalibrationSet, open_calibration
from tests.pictures import pictures
from tests.quant.placed_graphs import chain

CONTRACT = Preprocess(
    height_px=8, width_px=8, resize="stretch", crop_pct=1.0, interpolation="bilinear", channel_order="rgb",
    mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
)  # fmt: skip


def quiet(what: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


def calibration(num: int = 48) -> CalibrationSet:
    return open_calibration(pictures(num), CONTRACT)


def write_source(folder: Path, model: onnx.ModelProto | None = None) -> Path:
    """The float32 file."""
    path = folder / "net.onnx"
    onnx.save(model or chain(), path)
    return path
