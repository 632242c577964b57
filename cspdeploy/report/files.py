"""inspect, list and doctor as tables. They take what their stages return and know it by its fields alone."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cspdeploy.report.tables import compact_table, format_bytes

__all__ = ["render_diagnosis", "render_inspection", "render_listing"]


def render_inspection(found: Any) -> RenderableType:
    """An `Inspection`."""
    table = compact_table(f"{found.file}  {format_bytes(found.num_bytes)}")
    table.show_header = False
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for what, tensors in (("input", found.inputs), ("output", found.outputs)):
        for value in tensors:
            table.add_row(what, f"{value.name}: {value.dtype} {list(value.shape)}")
    opsets = ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())
    table.add_row("opset", f"{opsets} (IR {found.ir_version}), by {found.producer}")
    table.add_row("operators", ", ".join(f"{name} {count}" for name, count in found.operators.items()))
    total = sum(weight.num_values for weight in found.weights) or 1
    for weight in found.weights:
        share = f"{100 * weight.num_values / total:.4g} %"
        values = f"{weight.num_values:,} values in {weight.num_tensors} tensors ({share})"
        table.add_row("weights", f"{weight.dtype}: {values}")
    table.add_row("external data", ", ".join(found.external_data) or "none")
    for key, value in found.metadata.items():
        table.add_row(f"metadata {key}", value)
    return table


def render_listing(found: Any) -> RenderableType:
    """A `Listing`."""
    tables: list[RenderableType] = []
    for title, models in (("networks", found.networks), ("models here", found.models)):
        table = compact_table(title)
        table.add_column("name", no_wrap=True)
        for name in ("size", "classes", "parameters", "GMAC", "top-1"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("checkpoint" if title == "networks" else "from")
        for model in models:
            top1 = f"{100 * model.accuracy.top1:.2f} %" if model.accuracy else ""
            size = "x".join(map(str, model.size_px))
            table.add_row(
                model.name, size, str(model.num_classes), f"{model.num_parameters:,}", f"{model.gmacs:.3f}", top1,
                model.checkpoint or model.summary,
            )  # fmt: skip
        if models:
            tables.append(table)
    return Group(*tables)


def render_diagnosis(found: Any) -> RenderableType:
    """A `Diagnosis`."""
    table = compact_table("")
    table.add_column("runtime", no_wrap=True)
    table.add_column("works")
    table.add_column("why not, and what to do")
    for state in found.runtimes:
        word = Text("yes", style="green") if state.works else Text("no", style="yellow")
        table.add_row(state.name, word, f"{state.reason}; {state.fix}" if state.reason else "")
    environment = Text("\n".join(f"{key}: {value}" for key, value in found.environment.items() if value), style="dim")
    return Group(environment, table, Text(found.advice, style="bold green" if found.healthy else "bold red"))
