"""What was made and how: the steps with their graphs before and after, and what each file turned out to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from cspdeploy.core.results import ParityRow, PrecisionAudit, VerifyReport
from cspdeploy.core.types import Artifact, Manifest, StepRecord
from cspdeploy.report.html.markup import Column, Markup, bytes_text, join, percent_text, table, tag
from cspdeploy.report.html.rows import artifact_rows, mark, row_name
from cspdeploy.report.int8 import front_rows, int8_lines, tried_rows

__all__ = ["audit_table", "environment_lists", "file_table", "placement_table", "step_list"]

_NOTHING: tuple[Any, ...] = ("", None, [], {}, ())
"""Options that were not given."""

# --- steps ---


def step_list(manifest: Manifest) -> Markup:
    """Every step once, in the order of the export, with the files that came of it."""
    made: dict[str, tuple[StepRecord, list[Artifact]]] = {}
    for artifact in manifest.artifacts:
        for i, step in enumerate(artifact.steps):
            record = made.setdefault(step.name, (step, []))
            if i == len(artifact.steps) - 1:
                record[1].append(artifact)
    return tag("ol", *(_step(step, results) for step, results in made.values()), class_="steps")


def _step(step: StepRecord, results: Sequence[Artifact]) -> Markup:
    outcome = mark("pass", "done") if step.outcome == "done" else mark("warn", "refused, its input kept")
    parts = [tag("h3", step.name), outcome, tag("p", step.detail)]
    parts += [_counts(step.facts)]
    if step.name == "int8":
        parts += [_int8(step.facts)]
    for artifact in results:
        parts.append(tag("p", "makes ", tag("code", artifact.file), f", {bytes_text(artifact.num_bytes)}"))
    return tag("li", *parts)


def _int8(facts: Mapping[str, Any]) -> Markup:
    """How the 8-bit grids were chosen, and what else was tried."""
    items: list[Markup] = []
    for name, text in int8_lines(facts):
        items += [tag("dt", name), tag("dd", text)]
    parts = [tag("dl", *items)] if items else []
    tried = tried_rows(facts)
    if len(tried) > 1:
        columns = [Column(name="ranges and repairs"), Column(name="signal to noise, simulated", number=True)]
        parts.append(table(columns, tried, caption="What was tried, on images that nothing was fitted to."))
    front = front_rows(facts)
    if len(front) > 1:
        columns = [
            Column(name="on the engine"), Column(name="signal to noise", number=True),
            Column(name="latency of FP32's", number=True), Column(name="within the budget"),
        ]  # fmt: skip
        parts.append(table(columns, front, caption="What no other file beats in accuracy and latency together."))
    return join(*parts)


def _counts(facts: Mapping[str, Any]) -> Markup:
    """Bars for the number of nodes, and a table of the operators whose number changed, where the step recorded them."""
    before, after = facts.get("nodes_before"), facts.get("nodes_after")
    parts = []
    if isinstance(before, int) and isinstance(after, int) and before > 0:
        largest = max(before, after)
        for name, count in (("before", before), ("after", after)):
            bar = tag("span", "", class_="bar", style=f"width:{60 * count / largest:.1f}%", aria_hidden="true")
            parts.append(tag("div", tag("span", name), bar, tag("b", f"{count} nodes"), class_="nodes"))
    olds, news = facts.get("operators_before"), facts.get("operators_after")
    if isinstance(olds, dict) and isinstance(news, dict):
        parts.append(_operators(olds, news))
    return join(*parts)


def _operators(olds: Mapping[str, int], news: Mapping[str, int]) -> Markup:
    names = [name for name in sorted({*olds, *news}) if olds.get(name, 0) != news.get(name, 0)]
    if not names:
        return tag("p", "The same operators before and after.")
    lines = [(name, str(olds.get(name, 0)), str(news.get(name, 0))) for name in names]
    columns = [Column(name="operator"), Column(name="before", number=True), Column(name="after", number=True)]
    return table(columns, lines, caption="Operators whose number changed.")


# --- files ---


def file_table(manifest: Manifest) -> Markup:
    """Every file of the bundle with its size and hash."""
    lines: list[tuple[str, ...]] = [
        (
            tag("code", artifact.file), f"{artifact.kind}, {artifact.precision}", bytes_text(artifact.num_bytes),
            _tensors(artifact), tag("code", artifact.sha256, class_="hash"),
        )
        for artifact in manifest.artifacts
    ]  # fmt: skip
    lines += [
        (tag("code", record.file), "", bytes_text(record.num_bytes), "", tag("code", record.sha256, class_="hash"))
        for record in manifest.files
    ]
    columns = [
        Column(name="file"), Column(name="what"), Column(name="size", number=True),
        Column(name="inputs and outputs", wide=True), Column(name="SHA-256", wide=True),
    ]  # fmt: skip
    files = table(columns, lines, caption="The files, as the manifest describes them.")
    return tag("div", files, class_="scroll", tabindex="0")


def _tensors(artifact: Artifact) -> Markup:
    lines = [
        tag("span", f"{value.name}: {value.dtype} [{', '.join(map(str, value.shape))}]", class_="tensor")
        for value in (*artifact.inputs, *artifact.outputs)
    ]
    return join(*lines)


# --- what the files are ---


def audit_table(rows: Sequence[ParityRow]) -> Markup:
    """What each ONNX file really is, read from the file; nothing without an audit."""
    audits = {row.artifact: row.audit for row in rows if row.audit is not None}
    if not audits:
        return Markup("")
    lines = [
        (
            join(name, tag("small", audit.problem, class_="mark fail") if audit.problem else Markup("")),
            _shares(audit.macs, audit.macs_unknown), _shares(audit.weights, ""), _form(audit), _histogram(audit),
        )
        for name, audit in audits.items()
    ]  # fmt: skip
    columns = [
        Column(name="artifact"), Column(name="arithmetic"), Column(name="weights"), Column(name="form"),
        Column(name="operators", wide=True),
    ]  # fmt: skip
    return table(columns, lines, caption="Read from the files themselves, whatever they are called.")


def _shares(shares: Mapping[str, float], unknown: str) -> Markup:
    if not shares:
        return tag("small", f"unknown: {unknown}" if unknown else "none")
    bars = [
        tag("span", "", class_=f"share p-{name}", style=f"width:{100 * share:.2f}%")
        for name, share in shares.items()
        if share > 0
    ]
    words = ", ".join(f"{name.upper()} {percent_text(share, digits=1)}" for name, share in shares.items() if share > 0)
    return join(tag("span", *bars, class_="stack", aria_hidden="true"), tag("small", words))


def _form(audit: PrecisionAudit) -> Markup:
    opsets = ", ".join(f"{domain} {version}" for domain, version in audit.opsets.items())
    remarks = [f"opset {opsets}", f"IR {audit.ir_version}"]
    if audit.num_macs is not None:
        remarks.append(f"{audit.num_macs / 1e6:,.1f} million MACs an image")
    remarks.append(f"external data: {', '.join(audit.external_data)}" if audit.external_data else "no external data")
    return join(*(tag("span", remark, class_="tensor") for remark in remarks))


def _histogram(audit: PrecisionAudit) -> Markup:
    counts = sorted(audit.operators.items(), key=lambda item: (-item[1], item[0]))
    words = ", ".join(f"{name} {count}" for name, count in counts)
    if not audit.custom_operators:
        return join(words)
    return join(words, tag("small", f"custom: {', '.join(audit.custom_operators)}", class_="mark warn"))


def placement_table(rows: Sequence[ParityRow]) -> Markup:
    """Which provider runs the nodes, by the engine's own record; nothing where no engine tells."""
    told = [row for row in artifact_rows(rows) if row.placement]
    if not told:
        return Markup("")
    lines = []
    for row in told:
        elsewhere = "; ".join(f"{node.operator} {node.node} on {node.provider}" for node in row.nodes_elsewhere)
        copies = "" if row.num_copies is None else str(row.num_copies)
        placed = ", ".join(f"{provider} {count}" for provider, count in row.placement.items())
        lines.append((row_name(row), placed, copies, elsewhere))
    named = [
        Column(name="artifact on runtime"), Column(name="nodes by provider"), Column(name="copies", number=True),
        Column(name="nodes elsewhere", wide=True),
    ]  # fmt: skip
    kept = [i for i in range(len(named)) if any(cells[i] for cells in lines)]
    return table(
        [named[i] for i in kept], [[cells[i] for i in kept] for cells in lines],
        caption="Where the nodes run after the engine's own optimisation, by the engine's own record.",
    )  # fmt: skip


# --- where and with what ---


def environment_lists(manifest: Manifest, report: VerifyReport) -> Markup:
    """The machine that verified, the versions that made the files, the export's options, the weights."""
    provenance = manifest.spec.provenance
    weights = {
        "source": provenance.source, "origin": _file_name(provenance.origin), "data set": provenance.dataset,
        "command": provenance.command, "licence": provenance.licence, "SHA-256": provenance.weights_sha256,
    }  # fmt: skip
    known = provenance.accuracy
    if known is not None:
        images = f"of {known.num_images:,} images of {known.dataset}"
        weights["accuracy on record"] = f"top-1 {percent_text(known.top1)}, top-5 {percent_text(known.top5)} {images}"
    groups = [
        ("Machine", report.environment), ("Made with", manifest.tools), ("Export options", manifest.options),
        ("Measured with", report.settings), ("Weights", weights),
    ]  # fmt: skip
    return tag("div", *(_facts(title, facts) for title, facts in groups if any(facts.values())), class_="facts")


def _facts(title: str, facts: Mapping[str, Any]) -> Markup:
    items: list[Markup] = []
    for key, value in facts.items():
        if value not in _NOTHING:
            items += [tag("dt", key.replace("_", " ")), tag("dd", _value(value))]
    return tag("section", tag("h3", title), tag("dl", *items))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        given = {key: item for key, item in value.items() if item not in _NOTHING}
        return ", ".join(f"{key.replace('_', ' ')} {_value(item)}" for key, item in given.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return _file_name(str(value))


def _file_name(value: str) -> str:
    """An absolute path tells of somebody's machine, and nothing that a reader needs: its last part stays."""
    return PurePath(value).name if value.startswith("/") else value
