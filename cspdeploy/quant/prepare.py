"""A float32 graph made ready to be quantised: the same function, in a form in which every product can be changed alone.

What follows may then scale, round or correct the weight and the bias of one node without another one noticing.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from cspdeploy.core.errors import InputError
from cspdeploy.export.rewrite import captured_names
from cspdeploy.quant.placements import Placement
from cspdeploy.quant.prepare_products import fold_batch_norms, own_weights

__all__ = ["prepare_float"]

MIN_OPSET = 13
"""DequantizeLinear of opset 13 takes a scale for each channel: with an older one the file is invalid."""
_MIN_IR = 7
"""Of opset 13, by the table in docs/Versioning.md of onnx/onnx. From 4 on weights need not be inputs as well."""
_QUANTISED = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger",
})  # fmt: skip
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_OTHER_FLOATS = {TensorProto.FLOAT16: "float16", TensorProto.DOUBLE: "float64", TensorProto.BFLOAT16: "bfloat16"}


def prepare_float(model: onnx.ModelProto, *, placement: Placement | None = None) -> onnx.ModelProto:
    """A copy that computes the same and that the other modules of this package can take.

    Constants are initializers, weights are not inputs, BatchNormalization is folded into the convolution before it,
    every Conv, Gemm and MatMul has weights of its own and every Conv and Gemm a bias (zeros where it had none), the
    opset is 13 at least. Subgraphs of If, Loop and Scan are left as they are.

    Args:
        placement: whose opsets the file must be of; None: any from 13 on.

    Raises:
        InputError: quantised already, nothing to quantise, not float32, or an opset that cannot be had.
    """
    _check_quantisable(model)
    ready = _at_opset(model, placement)
    ready.ir_version = max(ready.ir_version, _MIN_IR)
    graph = ready.graph
    _constants_to_initializers(graph)
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)
    fold_batch_norms(graph)
    own_weights(graph)
    _drop_unused(graph)
    return ready


def _check_quantisable(model: onnx.ModelProto) -> None:
    nodes = model.graph.node
    quantised = next((node for node in nodes if _is_quantised(node.op_type)), None)
    if quantised is not None:
        raise InputError(
            f"the network is quantised already: node {_named(quantised)} is a {quantised.op_type}, expected float32",
            fix="give the float32 file that it was made from",
        )
    if not any(node.op_type in _PRODUCTS for node in nodes):
        raise InputError(
            f"none of its {len(nodes)} nodes is a convolution or a matrix product: INT8 has nothing to speed up",
            fix="keep the float32 file",
        )
    tensors = [(tensor.name, tensor.data_type) for tensor in model.graph.initializer]
    tensors += [(value.name, value.type.tensor_type.elem_type) for value in model.graph.input]
    other = next(((name, _OTHER_FLOATS[kind]) for name, kind in tensors if kind in _OTHER_FLOATS), None)
    if other is not None:
        raise InputError(f"tensor {other[0]}: {other[1]}, expected float32", fix="give the float32 file")


def _is_quantised(operator: str) -> bool:
    return operator in _QUANTISED or operator.startswith(("QLinear", "QGemm", "MatMulIntegerToFloat"))


def _named(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


def _at_opset(model: onnx.ModelProto, placement: Placement | None) -> onnx.ModelProto:
    """A copy of an opset that the placement takes, raised where it is older."""
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    least = placement.min_opset if placement else MIN_OPSET
    if placement is not None and opset > placement.max_opset:
        raise InputError(
            f"opset {opset}: {placement.name} takes {placement.max_opset} at most",
            fix=f"export it with --opset {placement.max_opset}",
        )
    if opset >= least:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return copy
    try:
        raised: onnx.ModelProto = version_converter.convert_version(model, least)
    except Exception as error:  # its exceptions share no base class but this one
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"opset {opset} cannot be raised to {least}, which a scale for each channel needs ({reason})",
            fix=f"export the network anew with opset {least} or later",
        ) from error
    if not raised.metadata_props:  # the converter leaves them behind
        raised.metadata_props.extend(model.metadata_props)
    return raised


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Constant nodes, and Identity of an initializer: as torch's exporter shares equal biases."""
    nodes = []
    known = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        tensor = _constant(node)
        if node.op_type == "Identity" and node.input[0] in known and node.output[0] not in outputs:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(known[node.input[0]])
        if tensor is None:
            nodes.append(node)
        else:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
            known[tensor.name] = tensor
    del graph.node[:]
    graph.node.extend(nodes)


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The value of a Constant node; None for other nodes, and for texts and sparse constants."""
    if node.op_type != "Constant" or not node.attribute:
        return None
    attribute = node.attribute[0]
    if attribute.name == "value":
        value = onnx.TensorProto()
        value.CopyFrom(attribute.t)
        return value
    kinds = {"value_float": "float32", "value_floats": "float32", "value_int": "int64", "value_ints": "int64"}
    if attribute.name not in kinds:
        return None
    array = np.asarray(helper.get_attribute_value(attribute), kinds[attribute.name])
    return numpy_helper.from_array(array)


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in (*node.input, *captured_names(node))}
    used |= {value.name for value in graph.output}
    made = {name for node in graph.node for name in node.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    values = [value for value in graph.value_info if value.name in made]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(kept)
    graph.value_info.extend(values)
