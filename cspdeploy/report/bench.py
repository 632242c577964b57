"""`bench` as tables. It takes a `BenchReport` and knows it by its fields alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cspdeploy.report.tables import UNTRAINED, compact_table, format_bytes

__all__ = ["render_bench"]

NUM_NODES = 5
"""The longest nodes in the table; JSON has more."""
NUM_OPERATORS = 8
KERNEL_NAME = 80
"""Characters of a kernel's name: templates of C++ have hundreds, and JSON has them all."""
GPU_FACTS = ("gpu", "gpu_driver", "gpu_memory", "gpu_power_limit", "gpu_modes")
"""Of the environment, where something was timed on a GPU."""


def render_bench(report: Any) -> RenderableType:
    """A table for each group, then what else was measured, warnings, and what the numbers hold for."""
    parts: list[RenderableType] = []
    for group in dict.fromkeys(row.group for row in report.rows):
        parts += _group([row for row in report.rows if row.group == group], group)
    parts += _rooflines(report)
    parts += _copies(report.copies)
    for profile in report.profiles:
        parts += _profile(profile)
    parts += _sweep(report.sweep)
    parts += [Text(_gpu(record), style="dim") for record in report.gpus]
    parts += [Text(f"{name} is {UNTRAINED}", style="bold yellow") for name in report.untrained]
    parts += [Text(note, style="dim") for note in report.notes]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    parts.append(_conditions(report))
    return Group(*parts)


def _group(rows: list[Any], title: str) -> list[RenderableType]:
    timed = [row for row in rows if row.timing]
    first = timed[0].title if timed else "nothing"
    on_device = any(row.events for row in rows)
    table = compact_table("")
    for name in ("artifact", "runtime"):
        table.add_column(name, no_wrap=True)
    tails = [percent for percent in (90, 95, 99) if any(getattr(row.timing, f"p{percent}_ms") for row in timed)]
    device = ("between events", "host's wait") if on_device else ()
    for name in ("host p50 ms" if on_device else "p50 ms", "95 % interval", *device, *(f"p{n}" for n in tails)):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("speed", no_wrap=True)
    for name in ("cold start ms", "memory", "file"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.artifact, row.runtime_name, *_timing_cells(row, tails, on_device=on_device), *_start_cells(row)
        )
    return [_title(f"{title} (speed against {first})"), table, *_remarks(rows), *_sessions(rows)]


def _title(text: str) -> Text:
    """Not the table's own title, which would be folded to the width of a narrow table."""
    return Text(text, style="bold")


def _timing_cells(row: Any, tails: Sequence[int], *, on_device: bool) -> list[str | Text]:
    timing = row.timing
    if timing is None:
        style = "bold red" if row.failed else "yellow"
        return [Text(row.verdict, style=style), *[""] * (len(tails) + 2 + 2 * on_device)]
    device = [f"{row.events.p50_ms:.3f}", f"{row.events.wait_ms:.3f}"] if row.events else ["", ""]
    form = ".3f" if on_device else ".2f"  # a run on a GPU may take a tenth of a millisecond
    values = (getattr(timing, f"p{percent}_ms") for percent in tails)
    return [
        f"{timing.p50_ms:{form}}", f"{timing.ci_low_ms:{form}} to {timing.ci_high_ms:{form}}",
        *(device if on_device else []), *("" if value is None else f"{value:{form}}" for value in values),
        _speed(timing),
    ]  # fmt: skip


def _speed(timing: Any) -> Text:
    if timing.verdict == "reference":
        return Text("1.00x", style="dim")
    style = {"faster": "green", "slower": "red"}.get(timing.verdict, "dim")
    interval = f"({timing.ratio_low:.2f} to {timing.ratio_high:.2f})"
    return Text(f"{timing.ratio:.2f}x {interval} {timing.verdict}", style=style)


def _start_cells(row: Any) -> list[str]:
    memory = f"{row.memory.opened_bytes / 1e6:.0f} MB" if row.memory else ""
    return [f"{row.cold.total_ms:.0f}" if row.cold else "", memory, format_bytes(row.num_bytes)]


def _remarks(rows: list[Any]) -> list[Text]:
    reasons = [
        Text(f"{row.title}: {row.verdict}: {row.reason}", style="red" if row.failed else "yellow")
        for row in rows
        if row.reason
    ]
    notes = [Text(f"{row.title}: {row.note}", style="dim") for row in rows if row.note]
    return reasons + notes


def _sessions(rows: list[Any]) -> list[Text]:
    """How each runtime was set, as it says itself, and what its inputs were: one line where all its rows agree."""
    told: dict[str, list[str]] = {}
    for row in rows:
        settings = ", ".join(f"{name} {value}" for name, value in row.settings.items())
        words = "; ".join(filter(None, (f"inputs {row.inputs}" if row.inputs else "", settings)))
        if words:
            told.setdefault(f"{row.runtime_name}: {words}", []).append(row.artifact)
    return [Text(f"{', '.join(dict.fromkeys(artifacts))} on {words}", style="dim") for words, artifacts in told.items()]


def _rooflines(report: Any) -> list[RenderableType]:
    if not report.rooflines:
        return []
    peaks = "; ".join(
        f"{peak.runtime}: {peak.gflops:.0f} GFLOP/s in {_precision(peak)}, {peak.gbytes_per_s:.1f} GB/s"
        for peak in report.peaks
    )
    table = compact_table("")
    for name in ("artifact", "runtime"):
        table.add_column(name, no_wrap=True)
    for name in ("GFLOP", "GFLOP/s", "of peak", "least ms: arithmetic", "reading weights"):
        table.add_column(name, justify="right", no_wrap=True)
    for found in report.rooflines:
        table.add_row(
            found.artifact, _named(found), f"{found.gflop:.3g}", f"{found.gflops:.1f}",
            f"{100 * found.peak_share:.0f} %", f"{found.arithmetic_ms:.2f}", f"{found.weights_ms:.2f}",
        )  # fmt: skip
    return [_title(f"against this machine's measured peak ({peaks})"), table]


def _precision(peak: Any) -> str:
    if peak.precision == "fp16":
        return "float16"
    return "float32, rounded to TF32" if peak.tf32 else "float32"


def _named(found: Any) -> str:
    """The runtime of a part, with its variant."""
    return f"{found.runtime} [{found.variant}]" if found.variant else str(found.runtime)


def _copies(copies: Iterable[Any]) -> list[RenderableType]:
    found = list(copies)
    if not found:
        return []
    table = compact_table("")
    for name in ("artifact", "runtime"):
        table.add_column(name, no_wrap=True)
    for name in ("bound to the device ms", "with copies ms", "copies ms", "CUDA graph ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found:
        graph = f"{row.cuda_graph_ms:.3f}" if row.cuda_graph_ms is not None else row.graph_reason
        table.add_row(
            row.artifact, row.runtime, f"{row.compute_ms:.3f}", f"{row.with_copies_ms:.3f}",
            f"{row.with_copies_ms - row.compute_ms:.3f}", graph,
        )  # fmt: skip
    return [_title("compute against copies"), table]


def _profile(profile: Any) -> list[RenderableType]:
    title = f"{profile.artifact} on {_named(profile)}"
    if not profile.operators:
        return [_title(title), *_kernels(profile)]
    spent = "" if profile.kernels else f" of {profile.run_ms:.2f} ms a run"
    operators = compact_table("")
    operators.add_column("operator", no_wrap=True)
    for name in ("calls", "ms", "share"):
        operators.add_column(name, justify="right", no_wrap=True)
    for found in profile.operators[:NUM_OPERATORS]:
        operators.add_row(found.operator, f"{found.num_calls:g}", f"{found.ms:.3f}", f"{100 * found.share:.1f} %")
    parts: list[RenderableType] = [_title(f"{title}: {profile.nodes_ms:.2f} ms in nodes{spent}"), operators]
    if profile.nodes:
        parts.append(_longest(profile.nodes[:NUM_NODES]))
    if profile.note:
        parts.append(Text(profile.note, style="dim"))
    return parts + _kernels(profile)


def _kernels(profile: Any) -> list[RenderableType]:
    """What the GPU ran, and whether it waited for the host."""
    if profile.busy_ms is None:
        return []
    table = compact_table("")
    table.add_column("longest kernels")
    for name in ("calls", "ms", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for found in profile.kernels[:NUM_NODES]:
        name = found.kernel if len(found.kernel) <= KERNEL_NAME else f"{found.kernel[: KERNEL_NAME - 3]}..."
        table.add_row(name, f"{found.num_calls:g}", f"{found.ms:.4f}", f"{100 * found.share:.1f} %")
    busy = f"the GPU was busy for {profile.busy_ms:.3f} ms of {profile.run_ms:.3f} ms a run"
    advice = {
        "launch-bound": "launch-bound: it waits for the host more than it computes; a CUDA graph or a larger batch "
        "gains more than faster kernels",
        "kernel-bound": "kernel-bound: its own work is most of the run",
    }[profile.bound]
    return [table, Text(f"{busy} ({100 * profile.busy_share:.0f} %): {advice}", style="bold")]


def _gpu(record: Any) -> str:
    """In one line: how fast, how hot, and what held it back while rows were timed."""
    if not record.num_samples:
        return f"{record.gpu} while {record.group} was timed; its clocks were not read"
    figures = (
        ("SM clock", record.sm_clock_mhz, "MHz"), ("memory clock", record.memory_clock_mhz, "MHz"),
        ("power", record.power_w, "W"), ("temperature", record.temperature_c, "C"),
    )  # fmt: skip
    told = [
        f"{name} {values[1]:.0f} {unit} ({values[0]:.0f} to {values[2]:.0f})"
        for name, values, unit in figures
        if values
    ]
    limits = [f"held by {', '.join(record.limits)}"] if record.limits else []
    return f"{record.gpu} while {record.group} was timed: {', '.join([*told, *limits])}; read, not set"


def _longest(nodes: Iterable[Any]) -> Table:
    table = compact_table("")
    table.add_column("longest nodes: module")
    table.add_column("operator", no_wrap=True)
    for name in ("ms", "share", "GB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for node in nodes:
        speed = "" if node.gbytes_per_s is None else f"{node.gbytes_per_s:.1f}"
        table.add_row(node.module or node.node, node.operator, f"{node.ms:.3f}", f"{100 * node.share:.1f} %", speed)
    return table


def _sweep(cells: Iterable[Any]) -> list[RenderableType]:
    """Images a second: a row for each number of threads, a column for each batch; the highest in bold."""
    parts: list[RenderableType] = []
    for name, group in groupby(cells, key=lambda cell: f"{cell.artifact} on {_named(cell)}"):
        found = list(group)
        table = compact_table("")
        table.add_column("threads", justify="right", no_wrap=True)
        batches = list(dict.fromkeys(cell.batch for cell in found))
        for batch in batches:
            table.add_column(f"batch {batch}", justify="right", no_wrap=True)
        best = max((cell.images_per_s or 0.0 for cell in found), default=0.0)
        for num_threads in dict.fromkeys(cell.num_threads for cell in found):
            row = [_sweep_cell(cell, best) for cell in found if cell.num_threads == num_threads]
            table.add_row(str(num_threads or "default"), *row)
        parts += [_title(f"{name}: images/s (and p50 ms)"), table]
        parts += [
            Text(reason, style="yellow") for reason in dict.fromkeys(cell.reason for cell in found if cell.reason)
        ]
    return parts


def _sweep_cell(cell: Any, best: float) -> Text:
    if cell.images_per_s is None:
        return Text("-", style="yellow")
    device = f", between events {cell.events_p50_ms:.3f}" if cell.events_p50_ms is not None else ""
    text = f"{cell.images_per_s:.4g} ({cell.p50_ms:.2f}{device})"
    return Text(text, style="bold green" if cell.images_per_s == best else "")


def _conditions(report: Any) -> Text:
    """What the numbers hold for, in one line."""
    known, settings = report.environment, report.settings
    threads = settings["num_threads"] or "default"
    facts = [
        known.get("cpu", ""), f"{known.get('cpus')} CPUs", f"{threads} threads",
        f"governor {known.get('cpu_governor')}",
        f"clock {known.get('clock_mhz')} MHz", f"load {known.get('load_1min')} before",
    ]  # fmt: skip
    if report.gpus or any(row.events for row in report.rows):
        facts += [known[key] for key in GPU_FACTS if known.get(key)]
    if known.get("virtual_machine") == "yes":
        facts.append("virtual machine")
    batches = sorted({row.batch for row in report.rows if row.timing})
    if batches:
        facts.append(f"batch {', '.join(map(str, batches))}")
    return Text(f"{', '.join(facts)}; outputs were not compared: cspdeploy verify does that", style="dim")
