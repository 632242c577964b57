"""The graph that OpenVINO really runs, by the engine's own record."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cspdeploy.core.onnx_graph import Graph, walk_nodes

if TYPE_CHECKING:
    import openvino

__all__ = ["ExecutedNode", "read_executed"]

_PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
"""Layer types of the engine in which a network's multiplications are."""

_PRODUCT_OPERATORS = re.compile("Conv|Gemm|MatMul")
"""The same in ONNX: ConvTranspose, QLinearConv, MatMulInteger and the like among them."""

_WITHOUT_BIAS = "/WithoutBiases"
"""What the engine appends to the name of a node of the file when it makes two of it: the product, and its bias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutedNode:
    """A node of the graph that the engine runs.

    Attributes:
        engine_name: the engine's name of it.
        name: of the first node of the file that it computes, else the engine's.
        operator: layer type of the engine: "Convolution", "Subgraph" (elementwise nodes joined), "Reorder", ...
        products: the file's nodes whose multiplications it computes, by name.
        precision: of its operands, as the engine spells it: "f32", "bf16", "u8", ...
    """

    engine_name: str
    name: str
    operator: str
    products: tuple[str, ...]
    precision: str


def read_executed(model: openvino.Model, graph: Graph) -> tuple[ExecutedNode, ...]:
    """The nodes that every run computes: neither inputs and outputs, nor constants and what follows from them alone.

    Args:
        model: what `CompiledModel.get_runtime_model()` gives.
        graph: of the file.
    """
    names, products = _file_names(graph)
    constant: set[str] = set()
    found: list[ExecutedNode] = []
    for node in model.get_ordered_ops():
        about = {key: str(value.value) for key, value in node.get_rt_info().items()}
        engine_name, operator = node.get_friendly_name(), about["layerType"]
        sources = [value.get_node().get_friendly_name() for value in node.input_values()]
        if operator == "Const" or (sources and constant.issuperset(sources)):
            constant.add(engine_name)
        elif operator not in ("Input", "Output"):
            parts = (part.removesuffix(_WITHOUT_BIAS) for part in about["originalLayersNames"].split(","))
            told = list(dict.fromkeys(names[part] for part in parts if part in names))
            multiplied = tuple(name for name in told if name in products) if operator in _PRODUCTS else ()
            found.append(
                ExecutedNode(
                    engine_name=engine_name, name=told[0] if told else engine_name, operator=operator,
                    products=multiplied, precision=about["runtimePrecision"],
                )
            )  # fmt: skip
    return tuple(found)


def _file_names(graph: Graph) -> tuple[dict[str, str], set[str]]:
    """The file's names of its nodes, Q and DQ left out, by the engine's; and those of the nodes that multiply.

    The engine names a node as the file does, but by its output where it has no name or gives an output of the graph.
    """
    nodes = [node for node in walk_nodes(graph) if node.operator not in ("QuantizeLinear", "DequantizeLinear")]
    named = [(node.name or node.outputs[0], node) for node in nodes]
    by_output = {output: name for name, node in named for output in node.outputs}
    products = {name for name, node in named if _PRODUCT_OPERATORS.search(node.operator)}
    return by_output | {name: name for name, _ in named}, products
