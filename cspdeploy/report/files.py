"""inspect, list and doctor as tables. They take what their stages return and know it by its fields alone."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cspdeploy.report.card import card_lines
from cspdeploy.report.tables import compact_table, format_bytes

__all__ = ["render_diagnosis", "render_inspection", "render_listing"]

MAX_METADATA = 400
"""Characters of a value that are shown: some are tables in base64, and --json has all."""
_TENTH_OF_A_MILLION = 100_000


def render_inspection(found: Any) -> RenderableType:
    """An `Inspection`, and in its last line whether the file is what it is named."""
    table = compact_table(f"{found.file}  {format_bytes(found.num_bytes)}")
    table.show_header = False
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for what, tensors in (("input", found.inputs), ("output", found.outputs)):
        for value in tensors or ():
            table.add_row(what, f"{value.name}: {value.dtype} {_shape_text(value.shape)}")
    opsets = ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())
    table.add_row("opset", f"{opsets} (IR {found.ir_version}), by {found.producer or 'an unnamed producer'}")
    table.add_row("operators", ", ".join(f"{name} {count}" for name, count in found.operators.items()))
    audit = found.audit
    if audit.custom_operators:
        table.add_row("custom operators", ", ".join(audit.custom_operators))
    if found.functions:
        table.add_row("own functions", ", ".join(found.functions))
    table.add_row("MACs", _describe_macs(audit))
    total = sum(weight.num_values for weight in found.weights) or 1
    for weight in found.weights:
        share = f"{100 * weight.num_values / total:.4g} %"
        tensors = f"{weight.num_tensors} tensor{'s' if weight.num_tensors > 1 else ''}"
        values = f"{weight.num_values:,} value{'s' if weight.num_values > 1 else ''} in {tensors} ({share})"
        table.add_row("weights", f"{weight.dtype}: {values}")
    table.add_row("external data", ", ".join(found.external_data) or "none")
    for name, text in [*card_lines(found.card), *([("card", found.card_problem)] if found.card_problem else [])]:
        table.add_row(name, text)
    for key, value in found.metadata.items():
        table.add_row(f"metadata {key}", value if len(value) <= MAX_METADATA else f"{value[:MAX_METADATA]} ...")
    if not audit.declared:
        return table
    verdict = (
        Text(audit.problem, style="bold red")
        if audit.problem
        else Text(f"{audit.declared.upper()}, as it is named", style="bold green")
    )
    return Group(table, verdict)


def _describe_macs(audit: Any) -> str:
    shares = ", ".join(
        f"{name.upper()} {100 * share:.4g} %" for name, share in sorted(audit.macs.items(), key=lambda item: -item[1])
    )
    if audit.num_macs == 0 and not audit.macs_unknown:
        return "none: no convolution and no matrix product in it"
    count = "" if audit.num_macs is None else f"{_count_text(audit.num_macs)} for one image"
    unknown = f"({audit.macs_unknown})" if audit.macs_unknown and shares else audit.macs_unknown
    return " ".join(filter(None, (": ".join(filter(None, (count, shares))), unknown)))


def _count_text(count: int) -> str:
    """In millions, as papers have it; what is below a tenth of that as it is."""
    return f"{count / 1e6:,.1f} M" if count >= _TENTH_OF_A_MILLION else f"{count:,}"


def _shape_text(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


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
    """A `Diagnosis`: the machine, what it can run, and in the last lines the verdict and the command that mends it."""
    environment = Text("\n".join(f"{key}: {value}" for key, value in found.environment.items() if value), style="dim")
    parts: list[RenderableType] = [environment, ""]
    if found.cpu:
        parts.append(_yes_no_table("CPU", "means", [(row.name, row.present, row.meaning) for row in found.cpu]))
        parts.append("")
    for title, states in (("runtime", found.runtimes), ("ONNX Runtime's provider", found.providers)):
        rows = [(state.name, state.works, "; ".join(filter(None, (state.reason, state.fix)))) for state in states]
        if rows:
            parts += [_yes_no_table(title, "why not, and what to do", rows), ""]
    parts += [Text(_with_command("note", item), style="yellow") for item in found.findings if item.severity == "note"]
    problems = [item for item in found.findings if item.severity == "problem"]
    parts += [Text(_with_command("also", item), style="red") for item in problems[1:]]
    parts.append(Text(found.advice, style="bold green" if found.healthy else "bold red"))
    if found.command:
        parts.append(Text(f"fix: {found.command}"))
    return Group(*parts)


def _with_command(word: str, finding: Any) -> str:
    """A finding, and under it the command that mends it."""
    command = f"\n      {finding.command}" if finding.command else ""
    return f"{word}: {finding.text}{command}"


def _yes_no_table(title: str, why: str, rows: list[tuple[str, bool, str]]) -> RenderableType:
    table = compact_table("")
    table.add_column(title, no_wrap=True)
    table.add_column("here" if title == "CPU" else "works")
    table.add_column(why)
    for name, yes, text in rows:
        table.add_row(name, Text("yes", style="green") if yes else Text("no", style="yellow"), text)
    return table
