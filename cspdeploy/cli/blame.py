"""The command blame."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cspdeploy.cli.render import print_json, print_renderable, progress_bar
from cspdeploy.core.errors import EXIT_CHECK_FAILED, EXIT_OK

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command()(blame)


def blame(
    *,
    artifact: Annotated[Path, typer.Argument(help="An .onnx or TorchScript file, of a bundle or by itself.")],
    against: Annotated[
        str,
        typer.Option(
            "--against",
            help="What it should equal: golden (the original of its bundle), itself (its own FP64), or another file. "
            "Golden by default in a bundle.",
        ),
    ] = "",
    runtime: Annotated[
        str | None, typer.Option("--runtime", "-r", help="Runtime that runs the artifact; by its precision by default.")
    ] = None,
    against_runtime: Annotated[
        str | None, typer.Option("--against-runtime", help="Runtime that runs the reference; in FP64 by default.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder of images, for a file by itself; random numbers by default.")
    ] = None,
    preprocess: Annotated[
        str | None,
        typer.Option("--preprocess", help="How --images are prepared: imagenet, unit, darknet, or a JSON file."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> int:
    """Name the first node whose output leaves the original by more than its budget. Exit 1 if there is one."""
    from cspdeploy.check.blame import BlameRequest
    from cspdeploy.check.blame import blame as find
    from cspdeploy.report.blame import render_blame

    request = BlameRequest(
        artifact=artifact, against=against, runtime=runtime, against_runtime=against_runtime, images=images,
        contract=preprocess,
    )  # fmt: skip
    with progress_bar("blame") as progress:
        report = find(request, progress=progress)
    if json_:
        print_json(report)
    else:
        print_renderable(render_blame(report))
    return EXIT_OK if report.verdict == "within" else EXIT_CHECK_FAILED
