"""Commands that look: predict, inspect, list, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cspdeploy.cli.render import print_json, print_renderable
from cspdeploy.core.catalog import ARTIFACT_KINDS
from cspdeploy.core.errors import EXIT_CHECK_FAILED, EXIT_OK, InputError

if TYPE_CHECKING:
    from cspdeploy.edge.predictor import Predictor

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
    context: typer.Context,
    *,
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    artifact: Annotated[str, typer.Option("--artifact", help=f"One of {', '.join(ARTIFACT_KINDS)}.")] = "onnx",
    runtime: Annotated[str, typer.Option("--runtime", "-r", help="Runtime to use.")] = "ort-cpu",
    device: Annotated[
        int | None, typer.Option("--device", min=0, help="GPU to run on, with --runtime ort-cuda; else the first.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Classes to show for each image.")] = 3,
    score: Annotated[
        float | None, typer.Option("--score-threshold", help="Detector: boxes score more; else as exported.")
    ] = None,
    iou: Annotated[
        float | None, typer.Option("--iou-threshold", help="Detector: overlap at which a box goes; else as exported.")
    ] = None,
    max_detections: Annotated[
        int | None, typer.Option("--max-detections", help="Detector: boxes of an image, at most; else as exported.")
    ] = None,
    draw: Annotated[
        Path | None, typer.Option("--draw", help="Detector: folder for the pictures with their boxes drawn in.")
    ] = None,
    json_: Json = False,
) -> int:
    """Classify image files with an artifact of a bundle, or find the objects in them."""
    from cspdeploy.edge.predictor import Predictor

    options = {"score": score, "iou": iou, "max_detections": max_detections}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    with Predictor.open(bundle, artifact=artifact, runtime=runtime, device=device) as predictor:
        if predictor.task == "detect":
            asked = context.get_parameter_source("top")
            if asked is not None and asked.name == "COMMANDLINE":
                raise InputError(f"--top: {predictor.model} gives boxes, not classes of an image",
                                 fix=f"--max-detections {top}")  # fmt: skip
            return _detect(predictor, images, given, draw=draw, json_=json_)
        if draw is not None:
            raise InputError(f"--draw: {predictor.model} gives no boxes", fix="leave --draw away")
        return _classify(predictor, images, given, top=top, json_=json_)


def _classify(
    predictor: Predictor, images: list[Path], options: dict[str, Any], *, top: int, json_: bool
) -> int:  # fmt: skip
    from cspdeploy.edge.results import Result
    from cspdeploy.report.predictions import render_predictions

    answers = {str(path): predictor(path, top=top, **options) for path in images}
    found = {name: one.predictions for name, one in answers.items() if isinstance(one, Result)}
    if json_:
        print_json({"untrained": predictor.untrained, "predictions": found})
    else:
        print_renderable(render_predictions(found, untrained=predictor.untrained))
    return EXIT_OK


def _detect(
    predictor: Predictor, images: list[Path], options: dict[str, Any], *, draw: Path | None, json_: bool
) -> int:  # fmt: skip
    """Lines as those of the device: they can be cut and compared, and there may be hundreds."""
    from cspdeploy.edge.console import answer

    names = [str(path) for path in images]
    if draw is None:
        return answer(predictor, names, json_=json_, boxes=options)
    from cspdeploy.edge.drawing import draw_boxes, drawn_paths

    targets = drawn_paths(images, draw)
    return answer(
        predictor, names, json_=json_, boxes=options,
        use=lambda number, found: draw_boxes(images[number], found, targets[number]),
    )  # fmt: skip


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
