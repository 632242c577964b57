"""FP16 arithmetic on a machine that has none: every FP16 tensor of the graph is really rounded to FP16.

ONNX Runtime's CPU provider runs FP16 graphs in float32 from end to end, so it cannot show an overflow or a loss of
precision. Here the graph is first rewritten: each node computes in float32 on operands that are FP16 numbers and its
result goes through Cast to float16 and back. That is the arithmetic of GPU tensor cores and of most FP16 engines,
which multiply FP16 numbers, accumulate in float32 and store FP16: a result above 65504 becomes infinite, one below
6e-8 becomes zero. The engine's optimiser is off, for it would remove the casts.

Not covered: engines that also accumulate in FP16.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.core.onnx_file import check_external_data
from cspdeploy.runtimes.base import Runtime, SessionRequest
from cspdeploy.runtimes.ort import CPU, OrtSession

if TYPE_CHECKING:
    import onnx

__all__ = ["RUNTIMES", "round_every_node"]


def round_every_node(model_bytes: bytes) -> bytes:
    """An ONNX model with FP16 tensors, as a float32 model that rounds to FP16 after every node.

    Nodes that are float32 in the FP16 graph stay as they are, and so do the types of the inputs and outputs.

    Raises:
        ValueError: not an ONNX model.
    """
    import onnx
    from onnx import TensorProto, numpy_helper

    model = onnx.load_model_from_string(model_bytes)
    graph = model.graph
    half = _half_tensors(model)
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))
    half_inputs, half_outputs = _widen_interface(graph, half)
    nodes = [_cast(name, f"{name}/wide", TensorProto.FLOAT) for name in half_inputs]
    for node in graph.node:
        if node.op_type == "Constant":
            _widen_constant(node)
        elif node.op_type == "Cast" and node.output[0] in half:
            nodes += _rounded(node.input[0], node.output[0])
            continue
        rounded = [name for name in node.output if name in half and node.op_type != "Constant"]
        outputs = [f"{name}/exact" if name in rounded else name for name in node.output]
        del node.output[:]
        node.output.extend(outputs)
        nodes.append(node)
        for name in rounded:
            nodes += _rounded(f"{name}/exact", name)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.node.extend(_cast(f"{name}/wide", name, TensorProto.FLOAT16) for name in half_outputs)
    del graph.value_info[:]
    return bytes(model.SerializeToString())


def _half_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of all tensors that are FP16, by ONNX's own type inference."""
    from onnx import TensorProto, shape_inference

    graph = shape_inference.infer_shapes(model, strict_mode=True).graph
    typed = (*graph.input, *graph.output, *graph.value_info)
    half = {value.name for value in typed if value.type.tensor_type.elem_type == TensorProto.FLOAT16}
    return half | {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT16}


def _widen_interface(graph: onnx.GraphProto, half: set[str]) -> tuple[list[str], list[str]]:
    """Let the nodes read and write `NAME/wide` in place of the FP16 inputs and outputs, whose names are returned."""
    from onnx import TensorProto

    weights = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        if value.name in half & weights:  # as old files list them
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    inputs = [value.name for value in graph.input if value.name in half - weights]
    outputs = [value.name for value in graph.output if value.name in half]
    wide = {name: f"{name}/wide" for name in (*inputs, *outputs)}
    half.update(wide.values())
    for node in graph.node:
        for names in (node.input, node.output):
            renamed = [wide.get(name, name) for name in names]
            del names[:]
            names.extend(renamed)
    return inputs, outputs


def _widen_constant(node: onnx.NodeProto) -> None:
    """Turn an FP16 Constant node into float32 with the same values."""
    from onnx import TensorProto, numpy_helper

    for attribute in node.attribute:
        if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT16:
            attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype("float32")))


def _rounded(before: str, after: str) -> list[onnx.NodeProto]:
    """Nodes for before -> float16 -> float32 after."""
    from onnx import TensorProto

    return [
        _cast(before, f"{after}/half", TensorProto.FLOAT16),
        _cast(f"{after}/half", after, TensorProto.FLOAT),
    ]


def _cast(before: str, after: str, to: int) -> onnx.NodeProto:
    from onnx import helper

    return helper.make_node("Cast", [before], [after], name=f"{after}/cast", to=to)


def _read_whole(path: Path) -> bytes:
    """The model with the data that it keeps in files beside it."""
    import onnx

    return bytes(onnx.load(path).SerializeToString())


def _open(request: SessionRequest) -> OrtSession:
    check_external_data(request.path)
    try:
        return OrtSession(round_every_node(_read_whole(request.path)), provider=CPU, optimise=False,
                          num_threads=request.num_threads)  # fmt: skip
    except InputError:
        raise
    except Exception as error:  # protobuf's and ONNX Runtime's exceptions share no base class but this one
        reason = str(error).splitlines()[0][:200]
        message = f"{request.path}: cannot be run with FP16 rounding ({reason})"
        raise InputError(message, fix="export it again") from error


def _probe() -> None:
    import numpy as np
    import onnx

    text = """<ir_version: 8, opset_import: ["": 18]>
        probe (float[1] x) => (float[1] y) { h = Cast<to = 10>(x) y = Cast<to = 1>(h) }"""
    model = round_every_node(onnx.parser.parse_model(text).SerializeToString())
    session = OrtSession(model, provider=CPU, optimise=False)
    if not np.isinf(session.run({"x": np.array([1e5], np.float32)})["y"][0]):
        raise RuntimeUnavailableError("1e5 does not overflow: the engine removes casts", fix="cspdeploy doctor")


def _missing() -> tuple[str, str] | None:
    for package, extra in (("onnxruntime", "cpu"), ("onnx", "export")):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed", f"pip install 'cspdeploy[{extra}]'"
    return None


RUNTIMES = (
    Runtime(
        name="fp16-rounding", device="cpu", formats=frozenset({"onnx"}), precisions=frozenset({"fp16"}), timed=False,
        notes={"fp16": "every node's result rounded to FP16, sums inside a node in FP32"}, missing=_missing,
        probe=_probe, open=_open, modules=("onnxruntime", "onnx"),
    ),
)  # fmt: skip
