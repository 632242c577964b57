"""A piece of an ONNX graph while it is written: nodes and constants under one prefix."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

__all__ = ["GraphPart"]


class GraphPart:
    """Nodes in their order, and the constants that they take.

    Args:
        prefix: of the names of all nodes and tensors, so that they are told from those of the network.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._names: set[str] = set()

    def node(self, operator: str, *inputs: str, name: str, output: str = "", **attributes: Any) -> str:
        """Add a node with one output; gives that output's name, which is the node's own unless another is given."""
        full = self._unique(name)
        made = output or full
        self.nodes.append(helper.make_node(operator, list(inputs), [made], name=full, **attributes))
        return made

    def nodes_of(self, operator: str, *inputs: str, name: str, outputs: tuple[str, ...], **attributes: Any) -> None:
        """Add a node with several outputs, named as given."""
        self.nodes.append(
            helper.make_node(operator, list(inputs), list(outputs), name=self._unique(name), **attributes)
        )

    def constant(self, values: Any, dtype: npt.DTypeLike, *, name: str) -> str:
        """Add a constant; gives its name."""
        full = self._unique(name)
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), full))
        return full

    def integers(self, *values: int, name: str) -> str:
        """An int64 vector."""
        return self.constant(values, np.int64, name=name)

    def _unique(self, name: str) -> str:
        full = f"{self.prefix}/{name}"
        if full in self._names:
            raise ValueError(f"{full}: named twice")
        self._names.add(full)
        return full
