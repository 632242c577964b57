"""What a user writes without cspdeploy: the same calls with the same libraries, no check of anything.

The yardstick of `export_cost.py`: build the network, load the weights, TorchScript, ONNX, onnxsim, FP16.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import onnx
import onnxsim
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16
from safetensors.torch import load_file

from cspdeploy.core.model_folder import read_spec
from cspdeploy.nets.registry import build


def main(folder: Path, output: Path) -> None:
    warnings.simplefilter("ignore", DeprecationWarning)
    spec = read_spec(folder)
    model = build(spec).eval()
    model.load_state_dict({key: value.float() for key, value in load_file(folder / "model.safetensors").items()})
    x_NCHW = torch.randn(1, 3, spec.preprocess.height_px, spec.preprocess.width_px)
    with torch.inference_mode():
        torch.jit.save(torch.jit.freeze(torch.jit.trace(model, x_NCHW, check_trace=False)), output / "model.pt")
    path = output / "model.onnx"
    torch.onnx.export(model, (x_NCHW,), str(path), dynamo=False, opset_version=18, input_names=["input"])
    simplified, _ = onnxsim.simplify(str(path))
    onnx.save(simplified, path)
    onnx.save(convert_float_to_float16(simplified, keep_io_types=True), output / "model.fp16.onnx")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
