"""blame as text and tables. It takes what its stage returns and knows it by its fields alone."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cspdeploy.report.tables import compact_table

__all__ = ["render_blame"]


def render_blame(report: Any) -> RenderableType:
    """A `BlameReport`."""
    within = report.verdict == "within"
    parts: list[RenderableType] = [Text(report.summary, style="bold green" if within else "bold red")]
    inputs = "1 input" if report.num_inputs == 1 else f"{report.num_inputs} inputs"
    parts.append(Text(
        f"{report.artifact} on {report.runtime} ({report.precision.upper()}) against {report.against}, {inputs}; "
        f"{report.num_compared} of {report.num_tensors} tensors have a counterpart", style="dim",
    ))  # fmt: skip
    if report.blamed is not None:
        parts += ["", _node(report.blamed)]
    parts += ["", _worst(report)]
    parts += [Text(f"note: {note}", style="yellow") for note in report.notes]
    return Group(*parts)


def _node(node: Any) -> RenderableType:
    table = compact_table("")
    table.show_header = False
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("node", f"{node.node} ({node.operator})")
    if node.module:
        table.add_row("torch module", node.module)
    if node.reference_node:
        table.add_row("counterpart", f"{node.reference_node} ({node.reference_operator})")
    for what, tensors in (("input", node.inputs), ("output", node.outputs)):
        for tensor in tensors:
            table.add_row(what, _tensor(tensor))
    if node.introduced is not None:
        table.add_row("introduced", f"{_number(node.introduced)} when it is fed the reference's own inputs")
    for fact in node.facts:
        table.add_row("differs", fact)
    if node.also:
        table.add_row("or one of", ", ".join(node.also))
    return table


def _tensor(tensor: Any) -> str:
    if tensor.rel_l2 is None:
        return f"{tensor.tensor} {list(tensor.shape)}: has no counterpart in the reference"
    found = f"{tensor.tensor} {list(tensor.shape)}: relative L2 {_number(tensor.rel_l2)}, budget {tensor.budget:.1e}"
    if tensor.num_bad:
        found += f"; {tensor.num_bad:,} of {tensor.num_values:,} values NaN or infinite"
    return f"{found}; reaches {tensor.absmax:.4g}, the reference {tensor.reference_absmax:.4g}"


def _worst(report: Any) -> Table:
    title = (
        "largest introduced errors" if report.precision == "int8" else "nearest to, or furthest beyond their budgets"
    )
    table = compact_table(title)
    table.add_column("node", overflow="fold")
    table.add_column("operator", no_wrap=True)
    table.add_column("torch module", overflow="fold")
    for name in ("inputs", "output", "budget", "introduced"):
        table.add_column(name, justify="right", no_wrap=True)
    for node in report.worst:
        errors = [tensor.rel_l2 for tensor in node.inputs if tensor.rel_l2 is not None]
        output = next((tensor for tensor in node.outputs if tensor.rel_l2 is not None), None)
        table.add_row(
            node.node, node.operator, node.module, _number(max(errors)) if errors else "",
            _number(output.rel_l2) if output else "", f"{output.budget:.1e}" if output else "",
            "" if node.introduced is None else _number(node.introduced),
        )  # fmt: skip
    return table


def _number(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "infinite"
