"""The command verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cspdeploy.cli.render import (
    is_onnx,
    print_error,
    print_json,
    print_renderable,
    progress_bar,
    require_finite,
)
from cspdeploy.core.errors import EXIT_CHECK_FAILED, EXIT_OK, EXIT_USAGE, CspDeployError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cspdeploy.check.latency import LatencySettings
    from cspdeploy.check.settings import Progress, VerifySettings
    from cspdeploy.check.subject import Subject
    from cspdeploy.core.datasets import LabelledImages
    from cspdeploy.core.detection.labelled import LabelledBoxes
    from cspdeploy.core.results import VerifyReport

__all__ = ["finish_verify", "register"]

DEFAULT_FOLDER = Path("exported")
EXIT_CODES = (
    "Exit codes: 0 all that could be checked holds; 1 a check failed, or a file is not the one of its manifest; "
    "2 wrong use or bad input; 3 a runtime that was asked for is not here."
)


def register(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command(epilog=EXIT_CODES)(verify)


def verify(
    *,
    places: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[BUNDLE|FILE.onnx]...",
            help="Bundle folders, folders of bundles, or ONNX files from anywhere; all of exported/ by default.",
        ),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option("--runtime", "-r", help="Runtime to use; may be repeated. All that are here by default."),
    ] = None,
    accuracy: Annotated[
        str | None,
        typer.Option(
            "--accuracy",
            help="Labelled images: fashion-mnist, or a folder for each class; boxes as COCO json, YOLO or VOC.",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="An older bundle to compare with; of FILE.onnx, the file it was made from."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Of FILE.onnx: folder of images in place of random inputs.")
    ] = None,
    preprocess: Annotated[
        str | None,
        typer.Option("--preprocess", help="How --images become inputs: imagenet, unit, darknet, or a JSON file."),
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            "--tolerance",
            metavar="[ARTIFACT=]REL_L2",
            help="A limit in place of the measured one; may be repeated. The report says so.",
        ),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print how each limit came about.")] = False,
    strict_placement: Annotated[
        bool,
        typer.Option("--strict-placement", help="Fail where any node is not on the device that was asked for."),
    ] = False,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Measure latency as well.")] = True,
    time_limit: Annotated[
        float, typer.Option("--time-limit", min=1.0, help="Seconds that an engine has for one answer.")
    ] = 120.0,
    repeats: Annotated[
        int | None,
        typer.Option(
            "--repeats",
            help="Runs of one input in each session, all held against the first: 0, or 2 to 1000. On a GPU 10 by "
            "default, on a CPU none.",
        ),
    ] = None,
    device: Annotated[
        int | None,
        typer.Option("--device", help="Index of the GPU to use, as CUDA counts those that it shows here."),
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write the rows as JUnit XML, for a CI server.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Prove every artifact against the original on every runtime that is here, and time it. Exit 1 if one fails."""
    from cspdeploy.check.settings import VerifySettings
    from cspdeploy.core.tolerance import parse_tolerances

    if junit is not None:
        _require_writable(junit)
    require_finite("--time-limit", time_limit)
    files = [place for place in places or [] if is_onnx(place)]
    folders = _folders([place for place in places or [] if not is_onnx(place)], any_file=bool(files))
    settings = VerifySettings(
        runtimes=tuple(runtime or ()), latency=_latency() if latency else None,
        accuracy=_labelled(accuracy, folders) if accuracy else None,
        tolerances=parse_tolerances(tolerance or []), strict_placement=strict_placement, time_limit_s=time_limit,
        repeats=repeats, device=device,
    )  # fmt: skip
    _require_sense(files, folders, against=against, images=images, preprocess=preprocess)
    old = _old_bundle(against, folders[0]) if against is not None and folders else None
    with progress_bar("verify") as progress:
        report = _verify(_subjects(files, folders, against, images, preprocess), settings, progress)
        if old is not None:
            report = _compare(report, old, folders[0], settings, progress)
    code = _print(report, explain=explain, json_=json_)
    if junit is not None:
        from cspdeploy.report.junit import junit_xml

        code = _write(lambda: junit.write_text(junit_xml(report), encoding="utf-8"), code)
    return code


def _labelled(name: str, folders: list[Path]) -> LabelledImages | LabelledBoxes:
    """Boxes for a detector, else a class for each image: captions beside a classifier's images are no boxes."""
    from cspdeploy.core.bundle import read_manifest
    from cspdeploy.core.datasets import FASHION_MNIST, open_dataset
    from cspdeploy.core.detection.labelled import find_labels, open_labelled

    detects = any(read_manifest(folder).spec.task == "detect" for folder in folders)
    # A json holds boxes, whoever asks for them, and a class for each image says more than that there are no boxes.
    boxes = bool(find_labels(name)) if detects else Path(name).is_file()
    return open_labelled(name, split="test") if name != FASHION_MNIST and boxes else open_dataset(name, split="test")


def _require_writable(junit: Path) -> None:
    """Said now, and not after minutes of work."""
    if not junit.parent.is_dir():
        raise InputError(f"--junit {junit}: no such folder", fix=f"mkdir -p {junit.parent}")
    if junit.is_dir():
        raise InputError(f"--junit {junit}: is a folder, expected a file", fix=f"--junit {junit / 'verify.xml'}")


def _write(write: Callable[[], object], code: int) -> int:
    """Write a file beside what was printed. Where that fails, the verdict stands, and its exit code if it is one."""
    try:
        write()
    except (CspDeployError, OSError) as error:
        told = error.message if isinstance(error, CspDeployError) else f"{error.filename}: {error.strerror}"
        fix = error.fix if isinstance(error, CspDeployError) else ""
        print_error(told, fix or "check the path and its permissions")
        return code or EXIT_USAGE
    return code


def finish_verify(folder: Path, *, json_: bool) -> int:
    """Verify one bundle with default settings, write its report.html, print, and give the exit code."""
    from cspdeploy.check.settings import VerifySettings
    from cspdeploy.pipeline.publish import publish_report

    with progress_bar("verify") as progress:
        report = _verify(_subjects([], [folder], None, None, None), VerifySettings(latency=_latency()), progress)
    code = _print(report, explain=False, json_=json_)
    with progress_bar("report") as progress:
        return _write(lambda: publish_report(folder, report, progress=progress), code)


def _latency() -> LatencySettings:
    from cspdeploy.check import latency
    from cspdeploy.check.settings import VERIFY_WALL_SECONDS

    return latency.LatencySettings(max_wall_seconds=VERIFY_WALL_SECONDS)


def _folders(places: list[Path], *, any_file: bool) -> list[Path]:
    from cspdeploy.core.bundle import find_bundles

    return [] if any_file and not places else find_bundles(places, default=DEFAULT_FOLDER)


def _require_sense(
    files: list[Path], folders: list[Path], *, against: Path | None, images: Path | None, preprocess: str | None
) -> None:
    for option, value in (("--images", images), ("--preprocess", preprocess)):
        if value is not None and folders:
            raise InputError(
                f"{option} {value}: a bundle has its own images and contract", fix="give it with FILE.onnx alone"
            )
    if against is None:
        return
    if len(files) + len(folders) != 1:
        raise InputError(
            f"--against {against}: got {len(files) + len(folders)} things to compare with it, expected one",
            fix="name one bundle or one FILE.onnx",
        )
    if files and not is_onnx(against):
        raise InputError(f"--against {against}: expected an ONNX file, as {files[0]} is one", fix="--against FILE.onnx")


def _subjects(
    files: list[Path], folders: list[Path], against: Path | None, images: Path | None, contract: str | None
) -> Iterator[Subject]:
    """One at a time, since each holds its images and outputs."""
    from cspdeploy.check.subject import bundle_subjects

    yield from (subject for folder in folders for subject in bundle_subjects(folder))
    if files:
        from cspdeploy.check.loose_file import file_subject

        yield from (file_subject(file, against=against, images=images, contract=contract) for file in files)


def _verify(subjects: Iterator[Subject], settings: VerifySettings, progress: Progress) -> VerifyReport:
    from cspdeploy.check.ladder import verify_subjects

    return verify_subjects(subjects, settings, progress=progress)


def _old_bundle(against: Path, folder: Path) -> Path:
    """The one bundle there, which must be fit to compare with: said before the new one is verified."""
    from cspdeploy.check.ladder import require_comparable
    from cspdeploy.core.bundle import find_bundles

    if is_onnx(against):
        raise InputError(f"--against {against}: expected a bundle, as {folder} is one", fix="--against BUNDLE")
    old = find_bundles([against], default=against)
    if len(old) != 1:
        raise InputError(f"--against {against}: holds {len(old)} bundles, expected one", fix=f"--against {old[0]}")
    require_comparable(old[0], folder)
    return old[0]


def _compare(
    report: VerifyReport, old: Path, folder: Path, settings: VerifySettings, progress: Progress
) -> VerifyReport:
    from cspdeploy.check.ladder import compare_with

    return compare_with(report, old, folder, settings, progress=progress)


def _print(report: VerifyReport, *, explain: bool, json_: bool) -> int:
    if json_:
        print_json(report)
    else:
        from cspdeploy.report.tables import render_verify

        if explain:
            from cspdeploy.report.explain import render_explain

            print_renderable(render_explain(report))
        print_renderable(render_verify(report))
    return EXIT_CHECK_FAILED if report.verdict == "fail" else EXIT_OK
