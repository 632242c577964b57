"""The command bench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cspdeploy.cli.render import is_onnx, print_json, print_renderable, progress_bar, require_finite
from cspdeploy.core.errors import EXIT_CHECK_FAILED, EXIT_OK, InputError

if TYPE_CHECKING:
    from cspdeploy.check.subject import Subject

__all__ = ["register"]

ConvSearch = Literal["heuristic", "exhaustive", "default"]  # as in cspdeploy.runtimes.base, which loads numpy

DEFAULT_FOLDER = Path("exported")
MAX_THREADS_A_CPU = 8
"""Enough to see that more threads than CPUs do not help."""
EXIT_CODES = (
    "Exit codes: 0 all was timed; 1 an artifact crashed, hung or could not be run; 2 wrong use or bad input; "
    "3 a runtime that was asked for is not here."
)


def register(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command(epilog=EXIT_CODES)(bench)


def bench(
    *,
    places: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[BUNDLE|FILE.onnx]...",
            help="Bundle folders, folders of bundles, or ONNX files from anywhere, which are compared with each other; "
            "all of exported/ by default.",
        ),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option("--runtime", "-r", help="Runtime to use; may be repeated. All that are here by default."),
    ] = None,
    min_runs: Annotated[int, typer.Option("--min-runs", min=5, help="Timed runs of each artifact, at least.")] = 60,
    min_seconds: Annotated[
        float, typer.Option("--min-seconds", min=0.1, help="Timed seconds of each artifact, at least.")
    ] = 3.0,
    max_seconds: Annotated[
        float,
        typer.Option("--max-seconds", min=0.0, help="Timed seconds at most, where ratios are not yet known to 1 %."),
    ] = 10.0,
    batch: Annotated[
        int, typer.Option("--batch", min=0, help="Images a call; by default one, or what the artifact takes.")
    ] = 0,
    threads: Annotated[int, typer.Option("--threads", min=0, help="Threads of each engine; 0: its default.")] = 0,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also images a second over batch and threads.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Also where the time goes, by operator and node.")] = False,
    variants: Annotated[
        bool, typer.Option("--variants", help="Also every way to set a runtime: layouts, FP16, compiled, CUDA graph.")
    ] = False,
    variant: Annotated[
        list[str] | None, typer.Option("--variant", help="Also this way to set a runtime, such as nhwc; repeatable.")
    ] = None,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Also each runtime on a GPU with its run captured as a CUDA graph.")
    ] = False,
    device: Annotated[
        int | None, typer.Option("--device", min=0, help="Index of the GPU, as CUDA counts them.", show_default="0")
    ] = None,
    conv_search: Annotated[
        ConvSearch, typer.Option("--conv-search", help="On a GPU, how cuDNN's algorithms are found.")
    ] = "heuristic",
    tf32: Annotated[
        bool, typer.Option("--tf32/--no-tf32", help="On a GPU, round float32 products to TF32, as in use.")
    ] = True,
    rotate: Annotated[
        bool, typer.Option("--rotate/--no-rotate", help="On a GPU, take turns with inputs that its cache cannot hold.")
    ] = True,
    time_limit: Annotated[
        float, typer.Option("--time-limit", min=1.0, help="Seconds for opening a session, and for each run.")
    ] = 120.0,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON with the raw samples instead of tables.")] = False,
) -> int:
    """Time every artifact on every runtime that is here, each in a process of its own, in turns.

    Outputs are not compared: use verify for that.
    """
    from cspdeploy.check import latency
    from cspdeploy.check.bench import BenchSettings, bench_subjects
    from cspdeploy.report.bench import render_bench

    options = {"--min-seconds": min_seconds, "--max-seconds": max_seconds, "--time-limit": time_limit}
    for option, seconds in options.items():
        require_finite(option, seconds)
    _require_sane(threads)
    settings = BenchSettings(
        runtimes=tuple(runtime or ()), batch=batch, num_threads=threads, sweep=sweep, profile=profile,
        time_limit_s=time_limit, every_variant=variants, variants=tuple(variant or ()), cuda_graph=cuda_graph,
        device=device, conv_search=conv_search, tf32=tf32, rotate=rotate,
        latency=latency.LatencySettings(min_runs=min_runs, min_seconds=min_seconds, max_seconds=max_seconds),
    )  # fmt: skip
    groups = _groups(places or [])
    with progress_bar("bench") as progress:
        report = bench_subjects(groups, settings, progress=progress)
    if json_:
        print_json(report)
    else:
        print_renderable(render_bench(report))
    return EXIT_CHECK_FAILED if report.verdict == "fail" else EXIT_OK


def _require_sane(threads: int) -> None:
    """An engine with thousands of threads starves the machine for minutes before the time limit ends it."""
    from cspdeploy.core.env import num_usable_cpus

    most = MAX_THREADS_A_CPU * num_usable_cpus()
    if threads > most:
        raise InputError(f"--threads {threads}: expected at most {most}, {MAX_THREADS_A_CPU} a CPU here",
                         fix=f"--threads {num_usable_cpus()}")  # fmt: skip


def _groups(places: list[Path]) -> list[tuple[str, list[Subject]]]:
    """Each bundle by itself, all files together."""
    from cspdeploy.check.loose_file import file_subject
    from cspdeploy.check.subject import bundle_subjects
    from cspdeploy.core.bundle import find_bundles

    files = [place for place in places if is_onnx(place)]
    folders = [place for place in places if not is_onnx(place)]
    bundles = [] if files and not folders else find_bundles(folders, default=DEFAULT_FOLDER)
    groups = [(str(folder), list(bundle_subjects(folder))) for folder in bundles]
    if files:
        name = str(files[0]) if len(files) == 1 else "files"
        groups.append((name, [file_subject(path, reference=False) for path in files]))
    return groups
