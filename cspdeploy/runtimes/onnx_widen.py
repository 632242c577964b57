"""Every floating-point constant and cast of an ONNX model in one type, so that all of it is computed in that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

__all__ = ["widen_model"]


def widen_model(model: onnx.ModelProto, real: type[np.floating[Any]]) -> None:
    """Change the model in place; the weights of its main graph, which are large, are left to who computes it.

    Args:
        real: np.float64 or np.float32.
    """
    onnx_type = _onnx_type(real)
    _widen_nodes(model.graph.node, onnx_type)
    for function in model.functions:
        _widen_nodes(function.node, onnx_type)


def _onnx_type(real: type[np.floating[Any]]) -> int:
    from onnx import TensorProto

    return int(TensorProto.DOUBLE if real is np.float64 else TensorProto.FLOAT)


def _widen_subgraph(graph: onnx.GraphProto, onnx_type: int) -> None:
    from onnx import TensorProto

    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    for tensor in graph.initializer:
        _widen_tensor(tensor, onnx_type)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in floats:
            value.type.tensor_type.elem_type = onnx_type
    _widen_nodes(graph.node, onnx_type)


def _widen_nodes(nodes: Iterable[onnx.NodeProto], onnx_type: int) -> None:
    from onnx import TensorProto

    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen_tensor(attribute.t, onnx_type)
            if attribute.name in ("to", "dtype") and attribute.i in floats:
                attribute.i = onnx_type
            for inner in (*attribute.graphs, *((attribute.g,) if attribute.HasField("g") else ())):
                _widen_subgraph(inner, onnx_type)


def _widen_tensor(tensor: onnx.TensorProto, onnx_type: int) -> None:
    from onnx import helper, numpy_helper

    values = numpy_helper.to_array(tensor)
    if values.dtype.kind == "f" or values.dtype.name == "bfloat16":
        dtype = helper.tensor_dtype_to_np_dtype(onnx_type)
        tensor.CopyFrom(numpy_helper.from_array(values.astype(dtype), tensor.name))
