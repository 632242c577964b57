"""The command that holds an ONNX file against what runtimes take: check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cspdeploy.cli.render import print_json, print_renderable
from cspdeploy.core.errors import EXIT_CHECK_FAILED, EXIT_OK

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command()(check)


def check(
    file: Annotated[Path, typer.Argument(help="An ONNX file, made by whatever tool.")],
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="Runtime it is meant for; may be repeated. All of them by default."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Hold an ONNX file against what a runtime takes: opset, IR, operators, shapes, types. Exit 1 if it does not.

    Targets: ort-1.10, ort-1.12, ort-1.14, ort-1.16, ort-cuda, opencv-4, opencv-4.11, tensorrt-8.6, tensorrt-10,
    openvino, ort-web, ort-mobile, coreml-via-ort and nnapi-via-ort
    """
    from cspdeploy.check.lint import lint_file
    from cspdeploy.core.targets import TARGETS, find_target
    from cspdeploy.report.lint import render_lint

    targets = [find_target(name) for name in target or TARGETS]
    report = lint_file(file, targets)
    if json_:
        print_json(report)
    else:
        print_renderable(render_lint(report))
    return EXIT_CHECK_FAILED if report.failed else EXIT_OK
