"""Run an ONNX file once and tell the shapes of its inner tensors: a process of its own, for an engine may crash."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["expose_outputs", "main"]

_GRAPH, _OUTPUT, _NAME = 7, 12, 1  # ModelProto.graph, GraphProto.output, ValueInfoProto.name


def expose_outputs(model: bytes, *, names: list[str]) -> bytes:
    """The model with more outputs. Messages that follow each other are merged, so that nothing need be parsed."""
    outputs = b"".join(_field(_OUTPUT, _field(_NAME, name.encode())) for name in names)
    return model + _field(_GRAPH, outputs) if names else model


def _field(number: int, value: bytes) -> bytes:
    size, length = b"", len(value)
    while length > 0x7F:
        size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + value


def _measure(task: dict[str, Any]) -> dict[str, list[int]]:
    import onnxruntime

    path = Path(task["path"])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # A fused node has lost the tensors within it.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
    model = expose_outputs(path.read_bytes(), names=[name for name in task["names"] if name not in task["outputs"]])
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {name: np.zeros(shape, dtype) for name, (dtype, shape) in task["inputs"].items()}
    arrays = session.run(task["names"], feeds)
    return {name: list(np.shape(array)) for name, array in zip(task["names"], arrays, strict=True)}


def main() -> None:
    """A task as JSON on stdin, its answer as JSON on stdout."""
    task = json.load(sys.stdin)
    try:
        answer: dict[str, Any] = {"shapes": _measure(task)}
    except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
        answer = {"error": (str(error).splitlines() or [type(error).__name__])[0][:200]}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
