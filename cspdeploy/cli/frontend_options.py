"""The options of `export` that put preprocessing into the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cspdeploy.core.errors import InputError

if TYPE_CHECKING:
    from cspdeploy.core.types import Frontend

__all__ = ["Bgr", "EmbedPreprocess", "EmbedResize", "EmbedTopK", "frontend_request"]

_PANEL = "Image in the graph"

EmbedPreprocess = Annotated[
    bool,
    typer.Option(
        "--embed-preprocess", rich_help_panel=_PANEL,
        help="Also write ONNX files that take bytes, uint8 [N, H, W, 3] RGB, and scale and normalise them.",
    ),
]  # fmt: skip
Bgr = Annotated[bool, typer.Option("--bgr", rich_help_panel=_PANEL, help="Their bytes are BGR, as OpenCV has them.")]
EmbedResize = Annotated[
    bool,
    typer.Option(
        "--embed-resize", rich_help_panel=_PANEL, help="They take any H and W, and resize and crop; from opset 18 on."
    ),
]  # fmt: skip
EmbedTopK = Annotated[
    int | None,
    typer.Option(
        "--embed-topk", metavar="K", min=1, rich_help_panel=_PANEL,
        help="They also give the K likeliest classes with their probabilities.",
    ),
]  # fmt: skip


def frontend_request(*, preprocess: bool, bgr: bool, resize: bool, top_k: int | None) -> Frontend | None:
    """What was asked for; None without --embed-preprocess.

    Raises:
        InputError: an option of it without it.
    """
    if not preprocess:
        given = {"--bgr": bgr, "--embed-resize": resize, f"--embed-topk {top_k}": top_k is not None}
        for option in (name for name, value in given.items() if value):
            raise InputError(
                f"{option}: is of files with preprocessing in the graph, and none is asked for",
                fix="add --embed-preprocess",
            )
        return None
    from cspdeploy.core.types import Frontend

    return Frontend(channel_order="bgr" if bgr else "rgb", resize=resize, top_k=top_k or 0)
