"""What ONNX Runtime makes of a graph before it runs it: types of its tensors, and the graph after its own rewrites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cspdeploy.core.errors import InputError

__all__ = ["ORT_OPTIMISATION", "tensor_types", "write_optimised"]

ORT_OPTIMISATION = "extended"
"""The highest level whose result can be written for another session: the next one up lays tensors out for this CPU."""

_TYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(int8)": "int8",
    "tensor(uint8)": "uint8", "tensor(int32)": "int32", "tensor(int64)": "int64", "tensor(bool)": "bool",
    "tensor(int16)": "int16", "tensor(uint16)": "uint16",
}  # fmt: skip


def tensor_types(path: Path) -> dict[str, str]:
    """The dtype of each output of a file, also where it declares none, as numpy spells it; "" for any other kind.

    Raises:
        InputError: ONNX Runtime cannot open the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = _opened(path, options)
    return {value.name: _TYPES.get(value.type, "") for value in session.get_outputs()}


def write_optimised(source: Path, target: Path) -> None:
    """Write the graph that ONNX Runtime makes of `source` on the CPU, in ONNX with operators of its own.

    Raises:
        InputError: ONNX Runtime cannot open the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    _opened(source, options)


def _opened(path: Path, options: object) -> Any:
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"{path}: ONNX Runtime cannot open it ({reason})", fix="cspdeploy inspect, to look") from error
