"""`cspdeploy export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cspdeploy.cli import decode_options as box_options
from cspdeploy.cli import frontend_options as image_options
from cspdeploy.cli import int8_options as options
from cspdeploy.cli.check import finish_verify
from cspdeploy.cli.render import print_error, print_json, print_renderable, progress_bar
from cspdeploy.cli.sections import SectionedCommand
from cspdeploy.core.errors import EXIT_CHECK_FAILED, EXIT_OK, InputError

if TYPE_CHECKING:
    from cspdeploy.pipeline.recipe import ExportReport

__all__ = ["Json", "Models", "parse_size", "parse_sizes", "register"]

Models = Annotated[Path, typer.Option("--models", help="Folder of model folders.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def register(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command(cls=SectionedCommand)(export)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Parse "256" or "256x192" (height x width), in pixels.

    Raises:
        InputError: anything else, or a side outside 16 to 4096.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise InputError(f"--size {text}: expected H or HxW in pixels", fix="--size 256")
    height_px, width_px = int(parts[0]), int(parts[-1])
    if not (16 <= height_px <= 4096 and 16 <= width_px <= 4096):
        raise InputError(f"--size {text}: expected 16 to 4096 px a side", fix="--size 256")
    return height_px, width_px


def parse_sizes(text: str | None) -> tuple[tuple[int, int], ...]:
    """Parse "224,256,320x256": the bundle's own size first; none where no size is given.

    Raises:
        InputError: anything else, or a size twice.
    """
    if text is None:
        return ()
    sizes = [size for part in text.split(",") if (size := parse_size(part.strip())) is not None]
    twice = next((size for i, size in enumerate(sizes) if size in sizes[:i]), None)
    if twice is not None:
        once = ",".join("x".join(map(str, size)) for size in dict.fromkeys(sizes))
        raise InputError(f"--size {text}: {twice[0]}x{twice[1]} is there twice", fix=f"--size {once}")
    return tuple(sizes)


def parse_strides(text: str | None) -> tuple[int, ...]:
    """Parse "8,16,32".

    Raises:
        InputError: anything else.
    """
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"--strides {text}: expected numbers with commas between", fix="--strides 8,16,32")
    return tuple(int(part) for part in parts)


def export(
    *,
    model: Annotated[
        str,
        typer.Argument(
            help="A network of 'cspdeploy list', a folder below models/ or its path, a Darknet .cfg or an ONNX file."
        ),
    ],
    fp16: Annotated[bool, typer.Option("--fp16", help="Also write an FP16 ONNX file.")] = False,
    int8: options.Int8 = False,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Weights file, or 'random' for an UNTRAINED export.")
    ] = None,
    calib: Annotated[
        Path | None,
        typer.Option("--calib", help="Folder of real images to prove the export on, and to calibrate INT8."),
    ] = None,
    names: Annotated[
        Path | None, typer.Option("--names", help="File of class names, one a line, in the order of the weights.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            help="Input size in pixels, H or HxW; several with commas between for ONNX files of each: 224,256,320.",
        ),
    ] = None,
    preprocess: Annotated[
        str | None,
        typer.Option(
            "--preprocess",
            help="How the images of an .onnx file are prepared: imagenet, unit, darknet, or a JSON file such as a "
            "model's spec.json.",
        ),
    ] = None,
    features: Annotated[
        bool, typer.Option("--features", help="Export the backbone: its pyramid of feature maps instead of classes.")
    ] = False,
    strides: Annotated[
        str | None, typer.Option("--strides", help="Of the feature maps, such as 8,16,32; 4,8,16,32 by default.")
    ] = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Leave the batch of the ONNX files free.")
    ] = False,
    opset: Annotated[
        int | None,
        typer.Option(
            "--opset", help="ONNX opset, 13 to 20; by default 18, an .onnx file's own, or what the target takes."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="Runtime that the ONNX files must be fit for; see 'cspdeploy check --help'. With --int8 also "
            "tensorrt, ort-cuda, arm64.",
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            help="Also write pt2 (torch.export), ort (ONNX Runtime's mobile format) or opt (optimised for this "
            "machine). May be repeated.",
        ),
    ] = None,
    int8_mode: options.Mode = None,
    calibration: options.Calibration = None,
    calib_images: options.CalibrationImages = None,
    effort: options.EffortLevel = None,
    power_of_two: options.PowerOfTwo = False,
    max_drop: options.MaxDrop = None,
    max_latency: options.MaxLatency = None,
    labelled: options.Labelled = None,
    int8_time_limit: options.TimeLimit = None,
    require_int8: options.RequireInt8 = False,
    embed_preprocess: image_options.EmbedPreprocess = False,
    bgr: image_options.Bgr = False,
    embed_resize: image_options.EmbedResize = False,
    embed_topk: image_options.EmbedTopK = None,
    decode: box_options.DecodeContract = None,
    score_threshold: box_options.ScoreThreshold = None,
    iou_threshold: box_options.IouThreshold = None,
    max_detections: box_options.MaxDetections = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder that the bundle goes into.")] = Path(
        "exported"
    ),
    models: Models = Path("models"),
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Verify the bundle after writing it.")] = True,
    json_: Json = False,
) -> int:
    """Export a model to TorchScript, ONNX and, with --fp16 and --int8, smaller ONNX files, and verify all of them."""
    quantised = options.int8_request(
        int8=int8, mode=int8_mode, calibration=calibration, images=calib_images, effort=effort,
        power_of_two=power_of_two, max_drop=max_drop, max_latency=max_latency, labelled=labelled,
        time_limit_s=int8_time_limit, required=require_int8,
    )  # fmt: skip
    frontend = image_options.frontend_request(
        preprocess=embed_preprocess, bgr=bgr, resize=embed_resize, top_k=embed_topk
    )
    contract = box_options.parse_decode(decode)
    suppression = box_options.suppression_request(score=score_threshold, iou=iou_threshold, detections=max_detections)
    from cspdeploy.pipeline.also_step import parse_also
    from cspdeploy.pipeline.recipe import ExportRequest, export_bundle

    sizes = parse_sizes(size)
    request = ExportRequest(
        model=model, models=models, output=output, weights=weights, names=names, calibration=calib,
        size_px=sizes[0] if sizes else None, further_sizes_px=sizes[1:], preprocess=preprocess, features=features,
        strides=parse_strides(strides), decode=contract, suppression=suppression, fp16=fp16,
        int8=quantised, opset=opset, dynamic_batch=dynamic_batch, target=target, frontend=frontend,
        also=parse_also(also or ()),
    )  # fmt: skip
    with progress_bar("export") as progress:
        report = export_bundle(request, progress=progress)
    code = _finish_export(report, verify=verify, json_=json_)
    return _tell_refusal(report, required=require_int8) or code


def _finish_export(report: ExportReport, *, verify: bool, json_: bool) -> int:
    """Print what was done, and verify it; the exit code of that."""
    if not json_:
        from cspdeploy.report.steps import render_steps

        print_renderable(render_steps(report.folder, report.manifest))
    if verify:
        return finish_verify(Path(report.folder), json_=json_)
    from cspdeploy.pipeline.publish import publish_report

    publish_report(Path(report.folder))
    if json_:
        print_json(report)
    return EXIT_OK


def _tell_refusal(report: ExportReport, *, required: bool) -> int:
    """Say last of all what was assumed, and which files are not there; exit 1 where an INT8 file had to be."""
    if report.assumed_anchors:
        sys.stderr.write(f"warning: {report.assumed_anchors}\n")
    if report.refused_frontend:
        sys.stderr.write(f"warning: {report.refused_frontend}\n")
    if not report.refused_int8:
        return EXIT_OK
    if required:
        print_error(
            f"--require-int8: {report.refused_int8}",
            f"leave out --require-int8; {report.folder} is whole without it",
        )
        return EXIT_CHECK_FAILED
    sys.stderr.write(f"warning: {report.refused_int8}\n")
    return EXIT_OK
