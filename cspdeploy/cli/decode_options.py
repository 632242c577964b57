"""The options of `export` that say what a detector's files give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cspdeploy.core.errors import InputError

if TYPE_CHECKING:
    from cspdeploy.core.detection.spec import Decode, SuppressionOptions

__all__ = ["DecodeContract", "IouThreshold", "MaxDetections", "ScoreThreshold", "parse_decode", "suppression_request"]

_PANEL = "Boxes of a detector"

DecodeContract = Annotated[
    str | None,
    typer.Option(
        "--decode", rich_help_panel=_PANEL,
        help="What the ONNX files give: raw (maps of the heads), decoded (boxes and scores; the default), nms (boxes "
        "that are left), ultralytics (one tensor, channels first), trt (TensorRT's plugin, not for ONNX Runtime).",
    ),
]  # fmt: skip
ScoreThreshold = Annotated[
    float | None,
    typer.Option("--score-threshold", rich_help_panel=_PANEL, help="A box's score must be above it. [default: 0.25]"),
]
IouThreshold = Annotated[
    float | None,
    typer.Option(
        "--iou-threshold", rich_help_panel=_PANEL,
        help="A box goes where a better one of its class overlaps it by more. [default: 0.45]",
    ),
]  # fmt: skip
MaxDetections = Annotated[
    int | None, typer.Option("--max-detections", rich_help_panel=_PANEL, help="Boxes of an image. [default: 300]")
]


def parse_decode(given: str | None) -> Decode | None:
    """The contract of that name.

    Raises:
        InputError: there is none.
    """
    if given is None:
        return None
    from cspdeploy.core.detection.spec import DECODES
    from cspdeploy.core.errors import did_you_mean

    if given not in DECODES:
        raise InputError(
            f"--decode {given}: expected one of {', '.join(DECODES)}", fix=f"{did_you_mean(given, DECODES)}--decode nms"
        )
    return given


def suppression_request(*, score: float | None, iou: float | None, detections: int | None) -> SuppressionOptions | None:
    """What was asked for, and nothing else: the rest stays as the model has it. None where nothing was.

    Raises:
        InputError: a number out of its range.
    """
    given: dict[str, Any] = {"score_threshold": score, "iou_threshold": iou, "max_detections": detections}
    asked = {name: value for name, value in given.items() if value is not None}
    if not asked:
        return None
    from cspdeploy.core.detection.spec import Suppression, SuppressionOptions

    options = SuppressionOptions(**asked)
    try:
        options.applied(Suppression())
    except ValueError as error:
        name = str(error).partition(":")[0]
        fix = f"--{name.replace('_', '-')} {getattr(Suppression(), name)}"
        raise InputError(f"--{str(error).replace('_', '-')}", fix=fix) from error
    return options
