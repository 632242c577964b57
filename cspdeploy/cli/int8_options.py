"""The options of `export` that shape the INT8 file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cspdeploy.core.catalog import INT8_MAX_IMAGES, INT8_TIME_LIMIT_S, Effort, Int8Mode, RangeMethod
from cspdeploy.core.errors import InputError

if TYPE_CHECKING:
    from cspdeploy.pipeline.int8_step import Int8Request

__all__ = [
    "Calibration", "CalibrationImages", "EffortLevel", "Int8", "Labelled", "MaxDrop", "MaxLatency", "Mode",
    "PowerOfTwo", "RequireInt8", "TimeLimit", "int8_request",
]  # fmt: skip

_PANEL = "Options of the INT8 file"

Int8 = Annotated[bool, typer.Option("--int8", help="Also write an INT8 ONNX file, where it earns its place.")]
Mode = Annotated[
    Int8Mode | None,
    typer.Option(
        "--int8-mode",
        rich_help_panel=_PANEL,
        help="static: ranges from real images; dynamic: measured at run time; weights: weights alone. "
        "[default: static]",
    ),
]
Calibration = Annotated[
    RangeMethod | None,
    typer.Option(
        "--calibration", rich_help_panel=_PANEL,
        help="How ranges are chosen; auto keeps what is best on images held out. [default: auto]",
    ),
]  # fmt: skip
CalibrationImages = Annotated[
    int | None,
    typer.Option(
        "--calib-images", rich_help_panel=_PANEL, help=f"Images to calibrate on, at most. [default: {INT8_MAX_IMAGES}]"
    ),
]  # fmt: skip
EffortLevel = Annotated[
    Effort | None,
    typer.Option(
        "--effort", rich_help_panel=_PANEL, help="high: also learn how each weight is rounded. [default: normal]"
    ),
]  # fmt: skip
PowerOfTwo = Annotated[
    bool, typer.Option("--power-of-two", rich_help_panel=_PANEL, help="Steps that are powers of two.")
]
MaxDrop = Annotated[
    str | None,
    typer.Option(
        "--max-drop",
        metavar="POINTS|DB|SHARE",
        rich_help_panel=_PANEL,
        help="Budget: 0.1 (points of top-1 on --labelled), 36dB (signal to noise of the outputs) or 3% (of boxes or "
        "first classes that are not FP32's).",
    ),
]
MaxLatency = Annotated[
    str | None,
    typer.Option(
        "--max-latency", metavar="MS|RATIO", rich_help_panel=_PANEL, help="Budget: 12.5 (ms) or 0.5x (of FP32's)."
    ),
]  # fmt: skip
Labelled = Annotated[
    str | None,
    typer.Option(
        "--labelled", rich_help_panel=_PANEL, help="Labelled images: fashion-mnist, or a folder of class folders."
    ),
]  # fmt: skip
TimeLimit = Annotated[
    float | None,
    typer.Option(
        "--int8-time-limit", rich_help_panel=_PANEL,
        help=f"Seconds to search for what meets a budget. [default: {INT8_TIME_LIMIT_S:g}]",
    ),
]  # fmt: skip
RequireInt8 = Annotated[
    bool,
    typer.Option(
        "--require-int8", rich_help_panel=_PANEL, help="Exit 1 if no INT8 file is kept; the others are written still."
    ),
]  # fmt: skip


def int8_request(
    *,
    int8: bool,
    mode: Int8Mode | None,
    calibration: RangeMethod | None,
    images: int | None,
    effort: Effort | None,
    power_of_two: bool,
    max_drop: str | None,
    max_latency: str | None,
    labelled: str | None,
    time_limit_s: float | None,
    required: bool,
) -> Int8Request | None:
    """What was asked for; None without --int8.

    Raises:
        InputError: an option of INT8 without it, or values that do not go together.
    """
    given = {
        "--int8-mode": mode, "--calibration": calibration, "--calib-images": images, "--effort": effort,
        "--power-of-two": power_of_two or None, "--max-drop": max_drop, "--max-latency": max_latency,
        "--labelled": labelled, "--int8-time-limit": time_limit_s, "--require-int8": required or None,
    }  # fmt: skip
    if not int8:
        for option in (name for name, value in given.items() if value is not None):
            raise InputError(f"{option}: is of the INT8 file, and none is asked for", fix="add --int8")
        return None
    from cspdeploy.pipeline.int8_step import Int8Request

    values = {
        "mode": mode, "calibration": calibration, "effort": effort, "max_images": images, "max_drop": max_drop,
        "max_latency": max_latency, "labelled": labelled, "time_limit_s": time_limit_s,
    }  # fmt: skip
    chosen = {name: value for name, value in values.items() if value is not None}
    return Int8Request(power_of_two=power_of_two, **chosen)  # type: ignore[arg-type]
