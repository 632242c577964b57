"""The graphs of a file with what is known of their tensors, those of the graphs around them too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cspdeploy.core.onnx_graph import Graph, Node, OnnxModel, Value

__all__ = ["Scope", "known_tensors", "walk_scoped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """A graph, with what is known of its tensors: those of the graphs around it too.

    Attributes:
        constants: tensors that are known before the graph runs.
    """

    graph: Graph
    model: OnnxModel
    constants: frozenset[str]
    outer: Scope | None = None

    def value(self, name: str) -> Value | None:
        """What the file says of a tensor; None where it says nothing."""
        tensor = self.graph.initializers.get(name)
        if tensor is not None:
            return Value(name=name, dtype=tensor.dtype, shape=tensor.shape)
        found = self.graph.values.get(name)
        return found if found is not None or self.outer is None else self.outer.value(name)


def walk_scoped(model: OnnxModel) -> Iterator[tuple[Scope, Node]]:
    """Every node in graph order, those of subgraphs after the node that holds them, with the scope that it is in."""
    yield from _walk(_scope(model.graph, model, None))


def known_tensors(graph: Graph, *, outer: frozenset[str] = frozenset()) -> frozenset[str]:
    """Names of the tensors of a graph that are known before it runs. `outer`: those of the graph around it."""
    constants = {*graph.initializers, *outer}
    for node in graph.nodes:
        # Engines fold what depends on constants alone. A node without inputs is a constant, or random.
        random = node.operator.startswith("Random") or node.operator in ("Bernoulli", "Multinomial")
        if not node.subgraphs and not random and all(name in constants for name in node.inputs if name):
            constants.update(node.outputs)
    return frozenset(constants)


def _scope(graph: Graph, model: OnnxModel, outer: Scope | None) -> Scope:
    constants = known_tensors(graph, outer=outer.constants if outer else frozenset())
    return Scope(graph=graph, model=model, constants=constants, outer=outer)


def _walk(scope: Scope) -> Iterator[tuple[Scope, Node]]:
    """Every node in graph order, with the scope that it is in."""
    for node in scope.graph.nodes:
        yield scope, node
        for subgraph in node.subgraphs:
            yield from _walk(_scope(subgraph, scope.model, scope))
