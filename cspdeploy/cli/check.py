"""Commands that judge bundles: verify, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cspdeploy.cli.render import print_json, print_renderable, progress_bar
from cspdeploy.core.errors import EXIT_CHECK_FAILED, EXIT_OK

__all__ = ["finish_verify", "register"]

Bundles = Annotated[
    list[Path] | None, typer.Argument(help="Bundle folders, or folders of bundles; all of exported/ by default.")
]
Runtimes = Annotated[
    list[str] | None,
    typer.Option("--runtime", "-r", help="Runtime to use; may be repeated. All that are here by default."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DEFAULT_FOLDER = Path("exported")


def register(app: typer.Typer) -> None:
    """Add the commands to the root."""
    app.command()(verify)
    app.command()(bench)


def verify(
    bundles: Bundles = None,
    runtime: Runtimes = None,
    accuracy: Annotated[
        str | None,
        typer.Option("--accuracy", help="Labelled images: fashion-mnist, or a folder with one folder per class."),
    ] = None,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Measure latency as well.")] = True,
    json_: Json = False,
) -> int:
    """Prove every artifact against the original on every runtime that is here, and time it. Exit 1 if one fails."""
    from cspdeploy.core.bundle import find_bundles

    folders = find_bundles(bundles or [], default=DEFAULT_FOLDER)
    return finish_verify(folders, runtimes=tuple(runtime or ()), accuracy=accuracy, latency=latency, json_=json_)


def finish_verify(
    folders: list[Path],
    *,
    runtimes: tuple[str, ...] = (),
    accuracy: str | None = None,
    latency: bool = True,
    json_: bool,
) -> int:
    """Verify, print, and give the exit code."""
    from cspdeploy.check.ladder import VerifySettings, verify_bundles
    from cspdeploy.check.latency import LatencySettings
    from cspdeploy.core.datasets import open_dataset
    from cspdeploy.report.tables import render_verify

    settings = VerifySettings(
        runtimes=runtimes, latency=LatencySettings() if latency else None,
        accuracy=open_dataset(accuracy, split="test") if accuracy else None,
    )  # fmt: skip
    with progress_bar("verify") as progress:
        report = verify_bundles(folders, settings, progress=progress)
    if json_:
        print_json(report)
    else:
        print_renderable(render_verify(report))
    return EXIT_CHECK_FAILED if report.verdict == "fail" else EXIT_OK


def bench(
    bundles: Bundles = None,
    runtime: Runtimes = None,
    min_runs: Annotated[int, typer.Option("--min-runs", min=5, help="Timed runs of each artifact, at least.")] = 50,
    min_seconds: Annotated[
        float, typer.Option("--min-seconds", min=0.1, help="Timed seconds of each artifact, at least.")
    ] = 3.0,
    json_: Json = False,
) -> int:
    """Time every artifact on every runtime that is here, interleaved. Parity is not checked; use verify for that."""
    from cspdeploy.check.ladder import VerifySettings, verify_bundles
    from cspdeploy.check.latency import LatencySettings
    from cspdeploy.core.bundle import find_bundles
    from cspdeploy.report.tables import render_bench

    folders = find_bundles(bundles or [], default=DEFAULT_FOLDER)
    settings = VerifySettings(
        runtimes=tuple(runtime or ()), parity=False,
        latency=LatencySettings(min_runs=min_runs, min_seconds=min_seconds),
    )  # fmt: skip
    with progress_bar("bench") as progress:
        report = verify_bundles(folders, settings, progress=progress)
    if json_:
        print_json(report)
    else:
        print_renderable(render_bench(report))
    return EXIT_CHECK_FAILED if report.verdict == "fail" else EXIT_OK
