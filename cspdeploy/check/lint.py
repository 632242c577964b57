"""`check`: an ONNX file against what a target takes. Reads the file alone; no engine, no onnx package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cspdeploy.check.lint_qdq import broken_patterns
from cspdeploy.check.lint_qdq_graph import QdqGraph
from cspdeploy.check.lint_rules import breaks_rule
from cspdeploy.check.lint_scope import Scope, walk_scoped
from cspdeploy.core.onnx_graph import DEFAULT_DOMAIN, Graph, Node, OnnxModel, node_module, read_onnx
from cspdeploy.core.targets import COMPOSITES, OPERATOR_SINCE, Severity, Target

__all__ = ["Finding", "LintReport", "TargetReport", "lint_file", "lint_model"]

LINT_SCHEMA_VERSION = 1
"""Of what `check --json` prints; raised when a field goes or changes its meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something of the file that a target does not take, or takes with a loss.

    Attributes:
        rule: which sort of rule: "opset", "ir-version", "operator", "domain", "free-dimension", "dtype", or a kind of
            `cspdeploy.core.targets.Rule` or `PatternRule`.
        node: its name; the input's where it is about an input, empty where it is about the whole file.
        module: path of the torch module that the node came from, where its name tells.
        got: what the file has.
        takes: what the target takes.
        source: where that is written.
    """

    severity: Severity
    rule: str
    node: str
    operator: str
    module: str
    got: str
    takes: str
    fix: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetReport:
    """One target. fail: at least one violation. warn: it runs, with a loss.

    Attributes:
        num_nodes: of the file, those of subgraphs too.
        num_elsewhere: of an accelerator: those that stay on the CPU.
        num_pieces: of an accelerator: unbroken stretches of nodes, in graph order, that it can take. Each border costs
            a copy, so that fewer is better.
    """

    target: str
    summary: str
    verdict: Literal["pass", "warn", "fail"]
    findings: tuple[Finding, ...]
    num_nodes: int
    num_elsewhere: int = 0
    num_pieces: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LintReport:
    """A file against targets."""

    schema_version: int = LINT_SCHEMA_VERSION
    file: str
    opset: int
    ir_version: int
    targets: tuple[TargetReport, ...]

    @property
    def failed(self) -> bool:
        """Whether a target does not take the file."""
        return any(report.verdict == "fail" for report in self.targets)


def lint_file(path: Path, targets: Iterable[Target]) -> LintReport:
    """Check a file against targets.

    Raises:
        InputError: not an ONNX file, or one whose graph cannot be followed.
    """
    return lint_model(read_onnx(path), targets)


def lint_model(model: OnnxModel, targets: Iterable[Target]) -> LintReport:
    """Check a file that has been read against targets."""
    scoped = tuple(walk_scoped(model))
    return LintReport(
        file=str(model.path), opset=model.opsets.get(DEFAULT_DOMAIN, 0), ir_version=model.ir_version,
        targets=tuple(_lint(model, target, scoped) for target in targets),
    )  # fmt: skip


def _lint(model: OnnxModel, target: Target, scoped: tuple[tuple[Scope, Node], ...]) -> TargetReport:
    findings = [*_check_versions(model, target), *_check_inputs(model.graph, target)]
    elsewhere = []
    for scope, node in scoped:
        found = list(_check_node(scope, node, target))
        # What depends on constants alone is gone before an accelerator is asked.
        elsewhere.append(bool(found) and not _is_folded(scope, node))
        findings += found
    findings += _check_patterns(model.graph, target)
    report = {"target": target.name, "summary": target.summary, "num_nodes": len(scoped)}
    counts = {}
    if target.accelerator:
        counts = {"num_elsewhere": sum(elsewhere), "num_pieces": _count_pieces(elsewhere)}
        if scoped and all(elsewhere):
            findings.append(_finding(
                "violation", "operator", got=f"none of its {len(scoped)} nodes can run there",
                takes="the operators of its list", fix="cspdeploy check FILE, for a target that takes it",
                source=target.operators_source,
            ))  # fmt: skip
    severities = {finding.severity for finding in findings}
    verdict: Literal["pass", "warn", "fail"] = (
        "fail" if "violation" in severities else "warn" if severities else "pass"
    )  # fmt: skip
    return TargetReport(verdict=verdict, findings=tuple(findings), **report, **counts)  # type: ignore[arg-type]


def _is_folded(scope: Scope, node: Node) -> bool:
    if node.operator == "DequantizeLinear":  # left for the engines: ONNX Runtime's ConstantFolding steps over it
        return False
    return bool(node.outputs) and all(name in scope.constants for name in node.outputs if name)


def _count_pieces(elsewhere: list[bool]) -> int:
    return sum(not here and (index == 0 or elsewhere[index - 1]) for index, here in enumerate(elsewhere))


def _check_versions(model: OnnxModel, target: Target) -> Iterator[Finding]:
    opset = model.opsets.get(DEFAULT_DOMAIN)
    if opset is not None and not target.min_opset <= opset <= target.max_opset:
        wanted = target.max_opset if opset > target.max_opset else target.min_opset
        takes = f"opset {target.min_opset} to {target.max_opset}" if target.min_opset > 1 else f"opset {wanted} at most"
        yield _finding(
            "violation", "opset", got=f"opset {opset}", takes=takes, source=target.caps_source,
            fix=f"cspdeploy export MODEL --target {target.name} (writes opset {wanted} or older)",
        )  # fmt: skip
    if target.max_ir is not None and model.ir_version > target.max_ir:
        yield _finding(
            "violation", "ir-version", got=f"IR version {model.ir_version}", source=target.caps_source,
            takes=f"IR version {target.max_ir} at most", fix=f"cspdeploy export MODEL --target {target.name}",
        )  # fmt: skip


def _check_inputs(graph: Graph, target: Target) -> Iterator[Finding]:
    for value in graph.inputs:
        free = [] if value.shape is None else [i for i, size in enumerate(value.shape) if isinstance(size, str)]
        allowed = target.free_dims == "any" or (target.free_dims == "batch" and free in ([], [0]))
        if value.shape is None or (free and not allowed):
            shape = "no shape" if value.shape is None else f"shape {list(value.shape)}"
            if target.free_dims == "any":
                continue
            yield _finding(
                target.free_dims_severity, "free-dimension", node=value.name, got=f"an input of {shape}",
                takes="fixed shapes" if target.free_dims == "none" else "a free batch, all other dimensions fixed",
                fix="export with a fixed size" + (" and without --dynamic-batch" if target.free_dims == "none" else ""),
                source=target.free_dims_source,
            )  # fmt: skip
        for rule in target.dtypes:
            if value.dtype in rule.dtypes:
                yield _finding(
                    rule.severity, "dtype", node=value.name, got=f"an input of {value.dtype}", takes=rule.takes,
                    fix=rule.fix, source=rule.source,
                )  # fmt: skip


def _check_node(scope: Scope, node: Node, target: Target) -> Iterator[Finding]:
    operator = _check_operator(scope.model, node, target)
    if operator is not None:
        yield operator
    if node.domain == DEFAULT_DOMAIN:
        opset = scope.model.opsets.get(DEFAULT_DOMAIN, 0)
        for rule in target.rules:
            if node.operator in rule.operators and rule.opsets[0] <= opset <= rule.opsets[1]:
                got = breaks_rule(rule, node, scope)
                if got:
                    yield _of_node(
                        node, rule.severity, rule.kind, got=got, takes=rule.takes, fix=rule.fix, source=rule.source
                    )
    for dtype_rule in target.dtypes:
        if dtype_rule.where != "everywhere":
            continue
        values = [value for name in (*node.inputs, *node.outputs) if name and (value := scope.value(name)) is not None]
        found = sorted({value.dtype for value in values} & dtype_rule.dtypes)
        if found:
            yield _of_node(
                node, dtype_rule.severity, "dtype", got=f"tensors of {', '.join(found)}", takes=dtype_rule.takes,
                fix=dtype_rule.fix, source=dtype_rule.source,
            )  # fmt: skip


def _check_patterns(graph: Graph, target: Target) -> Iterator[Finding]:
    """Of a quantised graph. What only parts fusions or rounds leaves a node where it is: it is no node elsewhere."""
    view = QdqGraph.of(graph) if target.patterns else None
    if view is None:
        return
    for rule in target.patterns:
        for node, got in broken_patterns(rule, view):
            told = {"got": got, "takes": rule.takes, "fix": rule.fix, "source": rule.source}
            if node is None:
                yield _finding(rule.severity, rule.kind, **told)
            else:
                yield _of_node(node, rule.severity, rule.kind, **told)


def _check_operator(model: OnnxModel, node: Node, target: Target) -> Finding | None:
    """Whether the target knows the operator at all."""
    if f"{node.domain}.{node.operator}" in model.functions:
        if target.functions:
            return None
        return _of_node(
            node, "warning", "operator", got="a function that the file defines itself",
            takes="operators; functions are not known to be read", source=target.operators_source,
            fix="inline the functions (onnx.inliner.inline_local_functions)",
        )  # fmt: skip
    if node.domain != DEFAULT_DOMAIN:
        return _check_domain(node, target)
    since = OPERATOR_SINCE.get(node.operator)
    opset = model.opsets.get(DEFAULT_DOMAIN, 0)
    if since is None or since > opset:
        takes = "operators that ONNX defines" if since is None else f"{node.operator} from opset {since} on"
        return _of_node(
            node, "violation", "operator", takes=takes, source="onnx/onnx docs/Changelog.md",
            got=f"an operator that ONNX does not define at opset {opset}", fix="export it again with --opset "
            + (str(since) if since is not None and since <= target.max_opset else "and without custom operators"),
        )  # fmt: skip
    if target.operators is None or node.operator in target.operators:
        return None
    composite = COMPOSITES.get(node.operator)
    if composite is not None:
        fix = f"cspdeploy export MODEL --target {target.name} (writes it as {composite.made_of})"
    else:
        fix = "nothing, or another operator: it runs on the CPU" if target.accelerator else "use another operator"
    return _of_node(
        node, "warning" if target.accelerator else "violation", "operator", got=f"operator {node.operator}",
        takes=target.left if target.accelerator else "no such operator", fix=fix,
        source=target.operators_source,
    )  # fmt: skip


def _check_domain(node: Node, target: Target) -> Finding | None:
    known = target.domains.get(node.domain, frozenset())
    if known is None or node.operator in known:
        return None
    if node.domain in target.domains and target.accelerator:
        return _of_node(
            node, "warning", "domain", got=f"operator {node.domain}.{node.operator}", takes=target.left,
            fix="nothing, or export without the engine's own operators", source=target.operators_source,
        )  # fmt: skip
    return _of_node(
        node, "violation", "domain", got=f"operator {node.operator} of domain {node.domain}",
        takes="ONNX's own operators" + (f" and some of {', '.join(sorted(target.domains))}" if target.domains else ""),
        fix="export it without custom operators, or register the operator with the runtime",
        source=target.operators_source,
    )  # fmt: skip


def _of_node(node: Node, severity: Severity, rule: str, *, got: str, takes: str, fix: str, source: str) -> Finding:
    return _finding(
        severity, rule, node=node.name or f"{node.operator} {node.index}", operator=node.operator,
        module=node_module(node), got=got, takes=takes, fix=fix, source=source,
    )  # fmt: skip


def _finding(
    severity: Severity,
    rule: str,
    *,
    got: str,
    takes: str,
    fix: str,
    source: str,
    node: str = "",
    operator: str = "",
    module: str = "",
) -> Finding:
    return Finding(
        severity=severity, rule=rule, node=node, operator=operator, module=module, got=got, takes=takes, fix=fix,
        source=source,
    )  # fmt: skip
