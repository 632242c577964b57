"""An ONNX file in FP64, or in FP32 by the same code, seen from inside."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.check.blame.onnx_source import traced_node
from cspdeploy.check.blame.quantisation import find_quantisation
from cspdeploy.core.onnx_graph import read_onnx
from cspdeploy.core.trace import Sink, TracedNode, Values

__all__ = ["ExactSource"]

Array = npt.NDArray[Any]
Calls = Sequence[Mapping[str, Array]]


class ExactSource:
    """A `TraceSource` of an ONNX file, computed by `cspdeploy.runtimes.onnx_fp64`.

    Args:
        title: for the reader.
        real: np.float64, or np.float32 for its rounding.

    Raises:
        InputError: the file cannot be read, or has an operator that the reference does not know.
    """

    def __init__(self, path: Path, *, title: str, real: type[np.floating[Any]] = np.float64) -> None:
        # By name: a device has neither torch nor onnx, and what it imports must not need them.
        open_exact = importlib.import_module("cspdeploy.runtimes.onnx_fp64").open_exact
        self.title = title
        self.model = read_onnx(path)
        self.graph = self.model.graph
        self.quantised = find_quantisation(self.graph)
        self._session = open_exact(path, real=real)
        self._nodes = tuple(traced_node(index, node) for index, node in enumerate(self.graph.nodes))

    @property
    def nodes(self) -> Sequence[TracedNode]:
        """In graph order."""
        return self._nodes

    @property
    def outputs(self) -> Sequence[str]:
        """Of the graph."""
        return [value.name for value in self.graph.outputs]

    def trace(self, calls: Calls, sink: Sink, *, wanted: Collection[str] | None = None) -> None:
        """Run every call and give each floating-point tensor, or the wanted ones, to `sink` in graph order.

        Raises:
            InputError: a node that cannot be computed.
        """
        for name, values in self._session.weights.items():
            if values.dtype.kind == "f" and values.size and (wanted is None or name in wanted):
                sink(name, values, True)
        if wanted is not None and self._session.weights.keys() >= set(wanted):
            return
        for index, feeds in enumerate(calls):
            for name, values in feeds.items():
                if wanted is None or name in wanted:
                    sink(name, values, False)
            self._session.visit(feeds, self._given_to(sink, wanted, first=index == 0))

    def replay(self, calls: Calls, given: Values, targets: Sequence[str]) -> dict[str, list[Array]]:
        """Nothing: a reference introduces no error of its own."""
        return {}

    def _given_to(self, sink: Sink, wanted: Collection[str] | None, *, first: bool) -> Sink:
        def visit(name: str, values: Array, constant: bool) -> None:
            if (wanted is not None and name not in wanted) or not values.size or (constant and not first):
                return
            quantised = self.quantised.get(name)
            if quantised is not None and values.dtype.kind in "iu":
                sink(name, quantised.real(values), constant)
            elif values.dtype.kind == "f":
                sink(name, values, constant)

        return visit
