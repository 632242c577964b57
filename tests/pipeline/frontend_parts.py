"""What the tests of files with preprocessing in the graph share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from cspdeploy.check.ladder import VerifySettings, verify_bundles
from cspdeploy.core.results import ParityRow, VerifyReport
from cspdeploy.core.spec import Preprocess

U8_KINDS = ("onnx-u8", "onnx-fp16-u8", "onnx-int8-u8")


def quick_verify(folder: Path, *runtimes: str, **settings: Any) -> VerifyReport:
    quick: dict[str, Any] = {"latency": None, "isolate": False, "audit": True}
    return verify_bundles([folder], VerifySettings(runtimes=runtimes or ("ort-cpu",), **(quick | settings)))


def row_of(report: VerifyReport, artifact: str, runtime: str = "ort-cpu") -> ParityRow:
    (row,) = (row for row in report.rows if (row.artifact, row.runtime) == (artifact, runtime))
    return row


def edit(path: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)


def contract_of(resize: str, interpolation: str, size_px: tuple[int, int], crop_pct: float = 1.0) -> Preprocess:
    return Preprocess(
        height_px=size_px[0], width_px=size_px[1], resize=resize, crop_pct=crop_pct, interpolation=interpolation,  # type: ignore[arg-type]
        channel_order="rgb", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip
