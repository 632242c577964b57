"""Commands that look: predict, inspect, list, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cspdeploy.cli.render import print_json, print_renderable
from cspdeploy.core.catalog import ARTIFACT_KINDS
from cspdeploy.core.errors import EXIT_CHECK_FAILED, EXIT_OK

__all__ = ["register"]

InspectPrecision = Literal["fp32", "fp16", "int8"]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the root."""
    app.command()(predict)
    app.command()(inspect)
    app.command("list")(list_)
    app.command()(doctor)


def predict(
    *,
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    artifact: Annotated[str, typer.Option("--artifact", help=f"One of {', '.join(ARTIFACT_KINDS)}.")] = "onnx",
    runtime: Annotated[str, typer.Option("--runtime", "-r", help="Runtime to use.")] = "ort-cpu",
    top: Annotated[int, typer.Option("--top", min=1, help="Classes to show for each image.")] = 3,
    json_: Json = False,
) -> int:
    """Classify image files with an artifact of a bundle."""
    from cspdeploy.edge.predictor import Predictor
    from cspdeploy.report.predictions import render_predictions

    predictor = Predictor.open(bundle, artifact=artifact, runtime=runtime)
    found = {str(path): predictor(path, top=top).predictions for path in images}
    if json_:
        print_json({"untrained": predictor.untrained, "predictions": found})
    else:
        print_renderable(render_predictions(found, untrained=predictor.untrained))
    return EXIT_OK


def inspect(
    file: Annotated[Path, typer.Argument(help="An ONNX file, of any origin.")],
    precision: Annotated[
        InspectPrecision | None,
        typer.Option("--precision", help="What the file is meant to be, if its name does not say it."),
    ] = None,
    json_: Json = False,
) -> int:
    """Show what an ONNX file holds and in which precision it computes. Fails if it is not what it is named."""
    from cspdeploy.check.inspect import inspect_onnx
    from cspdeploy.report.files import render_inspection

    found = inspect_onnx(file, precision=precision or "")
    if json_:
        print_json(found)
    else:
        print_renderable(render_inspection(found))
    return EXIT_CHECK_FAILED if found.audit.problem else EXIT_OK


def list_(
    models: Annotated[Path, typer.Option("--models", help="Folder of model folders.")] = Path("models"),
    json_: Json = False,
) -> int:
    """List the networks that have a name, and the models that are here."""
    from cspdeploy.pipeline.listing import list_models
    from cspdeploy.report.files import render_listing

    found = list_models(models)
    if json_:
        print_json(found)
    else:
        print_renderable(render_listing(found))
    return EXIT_OK


def doctor(json_: Json = False) -> int:
    """Show what this machine can run: every runtime and provider is really opened. Installs nothing."""
    from cspdeploy.check.doctor import diagnose
    from cspdeploy.report.files import render_diagnosis

    found = diagnose()
    if json_:
        print_json(found)
    else:
        print_renderable(render_diagnosis(found))
    return EXIT_OK if found.healthy else EXIT_CHECK_FAILED
