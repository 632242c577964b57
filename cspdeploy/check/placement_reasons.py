"""Why nodes run on another provider than the one asked for, as far as the file tells.

ONNX Runtime gives a provider every node that it has a kernel for, but keeps on the CPU what computes shapes alone: the
result of Shape lies in host memory, and a copy to the device and back for a sum of two numbers would cost more than the
sum (`onnxruntime/core/framework/fallback_cpu_capability.cc`).
"""

from __future__ import annotations

from pathlib import Path

from cspdeploy.check.placement import Placement, asked_providers
from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_graph import DEFAULT_DOMAIN, Graph, OnnxModel, read_onnx
from cspdeploy.core.types import PlacedNode
from cspdeploy.runtimes.base import Runtime

__all__ = ["shape_nodes", "why_elsewhere"]

MAX_OPERATORS = 6
"""Operators without a kernel that are named; a graph with more of them is not for this provider."""
_SHAPE_OPERATORS = ("Shape", "Size")
_ENGINES = {"CUDAExecutionProvider": "CUDA", "TensorrtExecutionProvider": "TensorRT"}


def why_elsewhere(
    runtime: Runtime, placement: Placement, *, nodes: tuple[PlacedNode, ...], path: Path
) -> tuple[str, ...]:
    """A line for the nodes that compute shapes, and one for each operator that the provider never runs.

    Args:
        placement: as judged; nothing is said where no node is elsewhere.
        nodes: all of the session, the engine's own record.
        path: of the file, which says what a node's inputs are, and of which opset.
    """
    asked = asked_providers(runtime)
    if not placement.elsewhere or asked is None:
        return ()
    model = _read(path)
    shapes = shape_nodes(model.graph) if model is not None else frozenset()
    on_purpose = [node for node in placement.elsewhere if _computes_shapes(node, shapes)]
    others = [node for node in placement.elsewhere if not _computes_shapes(node, shapes)]
    lines = []
    if on_purpose:
        lines.append(
            f"{len(on_purpose)} of the nodes elsewhere compute shapes alone ({_operators(on_purpose)}): ONNX Runtime "
            f"keeps those on the CPU on purpose"
        )
    there = {node.operator for node in nodes if node.provider in asked}
    lost = list(dict.fromkeys(node.operator for node in others if node.operator not in there))
    for operator in lost[:MAX_OPERATORS]:
        lines.append(_no_kernel(operator, others, engine=_ENGINES.get(asked[0], asked[0]), model=model))
    if len(lost) > MAX_OPERATORS:
        lines.append(f"and {len(lost) - MAX_OPERATORS} more operators that it never runs")
    return tuple(lines)


def shape_nodes(graph: Graph) -> frozenset[str]:
    """Names of the nodes that compute from shapes and constants alone, subgraphs left out."""
    constants, from_shapes = set(graph.initializers), set[str]()
    found = set()
    for node in graph.nodes:
        inputs = {name for name in node.inputs if name}
        if node.operator in _SHAPE_OPERATORS or (inputs & from_shapes and inputs <= from_shapes | constants):
            from_shapes.update(node.outputs)
            found.add(node.name)
        elif inputs <= constants and not node.subgraphs:
            constants.update(node.outputs)
    return frozenset(found - {""})


def _computes_shapes(node: PlacedNode, shapes: frozenset[str]) -> bool:
    return node.node in shapes or node.operator in _SHAPE_OPERATORS


def _operators(nodes: list[PlacedNode]) -> str:
    counts: dict[str, int] = {}
    for node in nodes:
        counts[node.operator] = counts.get(node.operator, 0) + 1
    return ", ".join(f"{operator} {count}" for operator, count in counts.items())


def _no_kernel(operator: str, nodes: list[PlacedNode], *, engine: str, model: OnnxModel | None) -> str:
    own = [node for node in nodes if node.operator == operator]
    count = "1 node" if len(own) == 1 else f"{len(own)} nodes"
    version = _opset(operator, {node.node for node in own}, model)
    # The same operator may have a kernel for other types or attributes, which the engine's record does not tell.
    return f"no {engine} kernel for {operator}{version} as it is used here ({count}, the first {own[0].node})"


def _opset(operator: str, names: set[str], model: OnnxModel | None) -> str:
    """Of the domain that the operator has in the file; empty where the engine made the node itself."""
    if model is None:
        return ""
    domains = [node.domain for node in model.graph.nodes if node.operator == operator]
    exact = [node.domain for node in model.graph.nodes if node.operator == operator and node.name in names]
    domain = next(iter([*exact, *domains]), "")
    version = model.opsets.get(domain)
    if version is None:
        return ""
    return f" of opset {version}" if domain == DEFAULT_DOMAIN else f" of {domain} {version}"


def _read(path: Path) -> OnnxModel | None:
    """The file, where it is ONNX; the engine has taken it, so that nothing is wrong with another form."""
    try:
        return read_onnx(path)
    except (InputError, OSError):
        return None
