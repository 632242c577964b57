"""The command that builds a bundle again and compares the bytes: reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cspdeploy.cli.render import print_json, print_renderable, progress_bar
from cspdeploy.core.errors import EXIT_CHECK_FAILED, EXIT_OK

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command()(reproduce)


def reproduce(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder; it is only read.")],
    models: Annotated[Path, typer.Option("--models", help="Folder of model folders.")] = Path("models"),
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Export a bundle again from its manifest and compare SHA-256. Exit 1 if a file differs."""
    from cspdeploy.pipeline.reproduce import reproduce_bundle
    from cspdeploy.report.reproduce import render_reproduction

    with progress_bar("reproduce") as progress:
        report = reproduce_bundle(bundle, models=models, progress=progress)
    if json_:
        print_json(report)
    else:
        print_renderable(render_reproduction(report))
    return EXIT_OK if report.verdict == "equal" else EXIT_CHECK_FAILED
