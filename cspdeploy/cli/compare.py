"""The command that sets two networks side by side: compare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from cspdeploy.cli.build import parse_size
from cspdeploy.cli.render import print_json, print_renderable, progress_bar
from cspdeploy.core.errors import EXIT_OK, InputError

if TYPE_CHECKING:
    from cspdeploy.check.latency import LatencySettings

__all__ = ["register"]

What = "a network of 'cspdeploy list', a .cfg file, a model folder or a bundle."


def register(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command()(compare)


def compare(
    *,
    a: Annotated[str | None, typer.Argument(metavar="A", help=f"The first: {What}")] = None,
    b: Annotated[str | None, typer.Argument(metavar="B", help=f"The second: {What}")] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Check the published claims instead: which hold, which do not.")
    ] = False,
    latency: Annotated[
        bool | None,
        typer.Option("--latency/--no-latency", help="Export and time both; by default not with --paper."),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option("--runtime", "-r", help="Runtime to time on; may be repeated. All that are here by default."),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", help="Images a call; may be repeated. 1 and 8 by default, on GPUs 1 and 32."),
    ] = None,
    regimes: Annotated[
        str | None,
        typer.Option(
            "--regimes",
            metavar="all|NAME,...",
            help="How the runtimes are set: plain, channels-last, compile, ... By default plain; all on GPUs with "
            "--paper.",
        ),
    ] = None,
    device: Annotated[int | None, typer.Option("--device", help="Index of the GPU; the first by default.")] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="Input size of both in pixels, H or HxW; the larger of their own.")
    ] = None,
    min_runs: Annotated[int, typer.Option("--min-runs", min=5, help="Timed runs of each, at least.")] = 20,
    min_seconds: Annotated[
        float, typer.Option("--min-seconds", min=0.1, help="Timed seconds of each, at least.")
    ] = 1.0,
    calib: Annotated[Path | None, typer.Option("--calib", help="Folder of real images to export with.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw it: a .svg, .png or .pdf file.")] = None,
    models: Annotated[Path, typer.Option("--models", help="Folder of model folders.")] = Path("models"),
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Set two networks side by side: parameters, MACs, memory, file sizes, latency, accuracy. A is the reference."""
    from cspdeploy.check.latency import LatencySettings

    settings = LatencySettings(min_runs=min_runs, min_seconds=min_seconds)
    timing = _Timing(
        batches=tuple(batch) if batch else None, runtimes=tuple(runtime or ()), regimes=_parse_regimes(regimes),
        device=device, calibration=calib, settings=settings,
    )  # fmt: skip
    timed_with = {"--runtime": runtime, "--batch": batch, "--regimes": regimes, "--device": device, "--calib": calib}
    if paper:
        _refuse_with_paper({"A": a, "B": b, "--size": size, "--plot": plot})
        if not latency:
            _refuse_without_latency(timed_with)
        return _check_paper(latency=bool(latency), timing=timing, json_=json_)
    if a is None or b is None:
        raise InputError(f"compare: got {'one name' if a else 'no name'}, expected two", fix="cspdeploy compare A B")
    if plot is not None:
        from cspdeploy.report.plot import check_plot

        check_plot(plot)
    from cspdeploy.pipeline.compare import CompareRequest, compare_models

    request = CompareRequest(a=a, b=b, models=models, size_px=parse_size(size), latency=latency is not False, **timing)
    with progress_bar("compare") as progress:
        report = compare_models(request, progress=progress)
    if json_:
        print_json(report)
    else:
        from cspdeploy.report.compare import render_comparison

        print_renderable(render_comparison(report))
    if plot is not None:  # last: what was measured for minutes is not lost for a full disk
        from cspdeploy.report.plot import write_plot

        write_plot(plot, report)
    return EXIT_OK


def _refuse_with_paper(options: dict[str, object]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise InputError(f"--paper: takes no {', '.join(given)}", fix="cspdeploy compare --paper")


def _refuse_without_latency(options: Mapping[str, object]) -> None:
    given = [name for name, value in options.items() if value is not None and value != []]
    if given:
        raise InputError(f"{given[0]}: only for --paper with --latency", fix="cspdeploy compare --paper --latency")


class _Timing(TypedDict):
    """What is measured of times, of two networks and of the claims alike."""

    batches: tuple[int, ...] | None
    runtimes: tuple[str, ...]
    regimes: tuple[str, ...]
    device: int | None
    calibration: Path | None
    settings: LatencySettings


def _parse_regimes(given: str | None) -> tuple[str, ...]:
    """Names apart by commas, each once; some of them have spaces."""
    if given is None:
        return ()
    names = tuple(dict.fromkeys(" ".join(name.split()) for name in given.split(",") if name.strip()))
    if not names:
        raise InputError("--regimes: got no name, expected all or names apart by commas", fix="--regimes all")
    return names


def _check_paper(*, latency: bool, timing: _Timing, json_: bool) -> int:
    """That a claim does not hold is a finding, not a failure of this command: exit 0."""
    from cspdeploy.pipeline.paper import PaperRequest, check_claims
    from cspdeploy.report.compare import render_paper

    request = PaperRequest(latency=latency, **timing)
    with progress_bar("compare") as progress:
        report = check_claims(request, progress=progress)
    if json_:
        print_json(report)
    else:
        print_renderable(render_paper(report))
    return EXIT_OK
