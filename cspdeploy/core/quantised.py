"""How many tensors of an ONNX graph are stored in 8 bits: what the model of an INT8 artifact's error is made of."""

from __future__ import annotations

from pathlib import Path

from cspdeploy.core.onnx_graph import Graph, Node, read_onnx, walk_nodes
from cspdeploy.core.types import Artifact

__all__ = ["count_quantised", "recorded_quantised"]

_INT8 = ("int8", "uint8")


def count_quantised(path: Path) -> int:
    """Tensors of an ONNX graph that are stored in 8 bits: activations that are quantised, and weights.

    Raises:
        InputError: not a readable ONNX file.
    """
    graph = read_onnx(path).graph
    return sum(_adds_noise(node, graph) for node in walk_nodes(graph))


def recorded_quantised(artifact: Artifact) -> int:
    """The same of an artifact in an engine's own format, as it was counted in the ONNX file that it is made from."""
    counts = [step.facts.get("num_quantised", 0) for step in artifact.steps]
    return next((count for count in reversed(counts) if isinstance(count, int) and count > 0), 0)


def _adds_noise(node: Node, graph: Graph) -> int:
    """Roundings to 8 bits that a node brings with it: of its own output, and of weights that it holds."""
    weights = sum(name in graph.initializers and _is_weight(graph, name) for name in node.inputs)
    if node.operator in ("QuantizeLinear", "DynamicQuantizeLinear"):
        return 1
    if node.operator == "DequantizeLinear" or node.operator.endswith("Integer"):
        return weights
    return 1 + weights if node.operator.startswith("QLinear") or node.operator.startswith("QGemm") else 0


def _is_weight(graph: Graph, name: str) -> bool:
    """8 bits, and more than a zero point: those are scalars or have one value a channel."""
    tensor = graph.initializers[name]
    return tensor.dtype in _INT8 and len(tensor.shape) > 1
