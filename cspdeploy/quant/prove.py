"""What an engine made of a quantised file: which products it computes in integers, by its own account."""

from __future__ import annotations

import platform
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cspdeploy.core.errors import RuntimeUnavailableError
from cspdeploy.core.onnx_graph import Graph, Node, read_onnx
from cspdeploy.core.placed import FLOAT_PRODUCTS, INTEGER_PRODUCTS, PAIRS, count_integer_work
from cspdeploy.core.types import PlacedNode
from cspdeploy.quant.place import Layout
from cspdeploy.quant.placements import ARM64_MACHINES, Placement
from cspdeploy.runtimes import require_runtime
from cspdeploy.runtimes.base import SessionRequest
from cspdeploy.runtimes.ort_graph import write_optimised

__all__ = ["PlacementProof", "float_products", "is_for_another_cpu", "prove_placement"]

# As OpenVINO spells the precision of a node's operands.
_INTEGER_PRECISIONS = frozenset({"u8", "i8"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementProof:
    """What the engine runs.

    Attributes:
        runtime: that was asked; None where none could be, for the reason in `unproven`.
        operators: how many nodes of each the engine runs, most frequent first.
        num_integer: products that it computes in integers.
        float_nodes: products of the layout that it computes in float although they were meant to be INT8, by the name
            of the node or of its first output.
        num_pairs: QuantizeLinear and DequantizeLinear that are left to run by themselves.
    """

    runtime: str | None
    unproven: str = ""
    operators: Mapping[str, int]
    num_integer: int = 0
    float_nodes: tuple[str, ...] = ()
    num_pairs: int = 0

    @property
    def holds(self) -> bool:
        """Every product that was meant to be in integers is."""
        return self.runtime is not None and not self.float_nodes


def prove_placement(path: Path, layout: Layout, placement: Placement) -> PlacementProof:
    """Open the file with the placement's engine, at its full optimisation, and read what it would run.

    Args:
        path: what `write_qdq` made by this layout.

    Raises:
        InputError: the engine cannot open the file.
    """
    products = _products(read_onnx(path).graph, layout)
    if is_for_another_cpu(placement):
        unproven = f"made for another CPU than this {platform.machine()}"
        return PlacementProof(runtime=None, unproven=unproven, operators={})
    if placement.runtime == "ort-cpu":
        return _prove_ort(path, products)
    if placement.runtime == "openvino":
        return _prove_openvino(path, products)
    if placement.runtime == "ort-cuda":
        return _prove_cuda(path, products, placement)
    return _unproven(placement, f"nothing here runs {placement.name}")


def _unproven(placement: Placement, why: str) -> PlacementProof:
    """With the command that proves it where its engine is."""
    how = f"; where it is: cspdeploy verify BUNDLE --runtime {placement.verify_with}" if placement.verify_with else ""
    return PlacementProof(runtime=None, unproven=why + how, operators={})


def is_for_another_cpu(placement: Placement) -> bool:
    """ONNX Runtime rewrites a graph for the CPU that it is on, signed activations on ARM alone."""
    on_arm = platform.machine().lower() in ARM64_MACHINES
    return placement.runtime == "ort-cpu" and on_arm != (placement.activation == "int8")


def _products(graph: Graph, layout: Layout) -> dict[str, Node]:
    """Products that the layout wants in INT8, by the initializer that holds the integers of their weight.

    One whose weight is not stored in integers goes by its own name, which no engine takes for an integer weight.
    """
    makers = {name: node for node in graph.nodes for name in node.outputs}
    wanted = {f"{name}/float" for name in layout.nodes} | layout.nodes
    found = {}
    for node in graph.nodes:
        if node.operator in ("Conv", "Gemm", "MatMul") and node.outputs[0] in wanted:
            maker = makers.get(node.inputs[1])
            integers = maker.inputs[0] if maker is not None and maker.operator == "DequantizeLinear" else ""
            found[integers or _named(node)] = node
    return found


def _prove_ort(path: Path, products: Mapping[str, Node]) -> PlacementProof:
    """A product is in integers where an integer operator takes the very integers of its weight."""
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        write_optimised(path, optimised)
        graph = read_onnx(optimised).graph
    taken = {name for node in graph.nodes if node.operator in INTEGER_PRODUCTS for name in node.inputs}
    operators = Counter(node.operator for node in graph.nodes)
    return PlacementProof(
        runtime="ort-cpu", operators=dict(operators.most_common()),
        num_integer=sum(name in taken for name in products),
        float_nodes=tuple(_named(node) for name, node in products.items() if name not in taken),
        num_pairs=sum(operators[name] for name in PAIRS),
    )  # fmt: skip


def _prove_cuda(path: Path, products: Mapping[str, Node], placement: Placement) -> PlacementProof:
    """By the session's record: pairs are not rewritten on that provider, so that its nodes are those that run."""
    try:
        nodes = require_runtime("ort-cuda").open(SessionRequest(path=path)).nodes
    except RuntimeUnavailableError:
        return _unproven(placement, f"nothing here runs {placement.name}")
    work = count_integer_work(nodes)
    if work is None or not nodes:
        return _unproven(placement, "this onnxruntime does not tell which nodes it runs")
    # Where nothing is in integers, every product is a float one, whatever it is called.
    floats = float_products(products.values(), nodes) if work.num_integer else tuple(map(_named, products.values()))
    if floats is None:
        return _unproven(placement, "ONNX Runtime's record names its products otherwise than the file")
    operators = Counter(node.operator for node in nodes)
    return PlacementProof(
        runtime="ort-cuda", operators=dict(operators.most_common()), num_integer=work.num_integer, float_nodes=floats,
        num_pairs=work.num_pairs,
    )  # fmt: skip


def float_products(products: Iterable[Node], nodes: Iterable[PlacedNode]) -> tuple[str, ...] | None:
    """Names of the products that an engine's record has as float ones; None where it has some under no name of theirs.

    ONNX Runtime gives the node that it puts in place of a product the product's name.
    """
    recorded: dict[str, set[bool]] = {}
    for node in nodes:
        if node.operator in INTEGER_PRODUCTS or node.operator in FLOAT_PRODUCTS:
            recorded.setdefault(node.node, set()).add(node.operator in INTEGER_PRODUCTS)
    names = tuple(map(_named, products))
    if any(len(recorded.get(name, ())) != 1 for name in names):
        return None
    return tuple(name for name in names if recorded[name] == {False})


def _prove_openvino(path: Path, products: Mapping[str, Node]) -> PlacementProof:
    from cspdeploy.runtimes.openvino import RUNTIMES, OpenVinoSession

    missing = RUNTIMES[0].missing()
    if missing is not None:
        return PlacementProof(runtime=None, unproven=missing[0], operators={})
    session = OpenVinoSession(path)
    precisions = session.executed_precisions
    names = [_named(node) for node in products.values()]
    floats = tuple(name for name in names if precisions.get(name) not in _INTEGER_PRECISIONS)
    operators = Counter(node.operator for node in session.nodes)
    return PlacementProof(
        runtime="openvino", operators=dict(operators.most_common()), num_integer=len(names) - len(floats),
        float_nodes=floats, num_pairs=operators["FakeQuantize"],
    )  # fmt: skip


def _named(node: Node) -> str:
    return node.name or node.outputs[0]
