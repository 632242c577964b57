"""Quantise one ONNX file with one peer's tool, as its own process, so that its time and memory are its own.

    python tests/benchmarks/int8_peers.py METHOD MODEL.onnx CALIBRATION.npy OUT

Runs in the peers' virtual environment: of this project it imports nothing. CALIBRATION is `[N, 3, H, W]` float32 as the
network takes it; each tool gets the N images one at a time, since the graphs have a batch of 1. OUT ends in .onnx, for
`nncf-openvino*` in .xml (the weights lie beside it in .bin).

Settings are what the tool's documentation tells a user to take, nothing tuned:

- ort-*: `quant_pre_process`, then `quantize_static` in Q/DQ form. `ort-default`: all defaults (S8S8, per tensor,
  min-max); `ort-u8s8-*`: U8 activations, S8 weights per channel, with each calibration method at its own defaults.
- nncf-*: `nncf.quantize`, target CPU, all images; on the OpenVINO model (`-mixed`: the preset for asymmetric
  activations) or on the ONNX file.
- onnxsim: `onnxsim.quantize_static`, min-max.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Feeds = list[dict[str, Any]]


def input_name(model: Path) -> str:
    """Of the graph's one input."""
    import onnx

    return str(onnx.load(model, load_external_data=False).graph.input[0].name)


def with_onnxruntime(model: Path, feeds: Feeds, target: Path, **settings: Any) -> None:
    """`quant_pre_process` and `quantize_static`."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rest, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(model), str(prepared))
        quantize_static(str(prepared), str(target), Reader(), **settings)


def ort_default(model: Path, feeds: Feeds, target: Path) -> None:
    with_onnxruntime(model, feeds, target)


def ort_u8s8(method: str) -> Callable[[Path, Feeds, Path], None]:
    """U8S8, weights per channel, with that calibration method."""

    def quantise(model: Path, feeds: Feeds, target: Path) -> None:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType

        with_onnxruntime(
            model, feeds, target, quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, method),
        )  # fmt: skip

    return quantise


def nncf_openvino(*, mixed: bool) -> Callable[[Path, Feeds, Path], None]:
    """On the model as OpenVINO reads it."""

    def quantise(model: Path, feeds: Feeds, target: Path) -> None:
        import nncf
        import openvino as ov

        preset = nncf.QuantizationPreset.MIXED if mixed else None
        quantised = nncf.quantize(
            ov.Core().read_model(str(model)), nncf.Dataset(feeds), preset=preset,
            target_device=nncf.TargetDevice.CPU, subset_size=len(feeds),
        )  # fmt: skip
        ov.save_model(quantised, str(target), compress_to_fp16=False)

    return quantise


def nncf_onnx(model: Path, feeds: Feeds, target: Path) -> None:
    import nncf
    import onnx

    quantised = nncf.quantize(
        onnx.load(model), nncf.Dataset(feeds), target_device=nncf.TargetDevice.CPU, subset_size=len(feeds)
    )
    onnx.save(quantised, target)


def onnxsim_static(model: Path, feeds: Feeds, target: Path) -> None:
    import onnx
    import onnxsim

    onnx.save(onnxsim.quantize_static(onnx.load(model), feeds), target)


METHODS: dict[str, Callable[[Path, Feeds, Path], None]] = {
    "ort-default": ort_default,
    "ort-u8s8-minmax": ort_u8s8("MinMax"),
    "ort-u8s8-percentile": ort_u8s8("Percentile"),
    "ort-u8s8-entropy": ort_u8s8("Entropy"),
    "nncf-openvino": nncf_openvino(mixed=False),
    "nncf-openvino-mixed": nncf_openvino(mixed=True),
    "nncf-onnx": nncf_onnx,
    "onnxsim": onnxsim_static,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    for name in ("model", "calibration", "target"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    images = np.load(given.calibration)
    name = input_name(given.model)
    feeds = [{name: np.ascontiguousarray(images[index : index + 1])} for index in range(len(images))]
    METHODS[given.method](given.model, feeds, given.target)
    if not given.target.is_file():
        sys.exit(f"{given.method}: wrote no {given.target}")


if __name__ == "__main__":
    main()
