"""FP32 ONNX on ONNX Runtime against PyTorch eager and against the plain torch.onnx -> onnxsim graph, in one run.

    python tests/benchmarks/fp32_engines.py [--size 256] [--min-runs 60]

Prints median, 95 % interval and the ratio to eager; and the ratio of the plain graph to cspdeploy's. Needs
models/cspdarknet53 and an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import onnx
import onnxsim
import torch

from cspdeploy.check.latency import LatencySettings, measure_latency, noise_warning
from cspdeploy.core.catalog import EAGER
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.pipeline.source import resolve_source
from cspdeploy.runtimes import require_runtime
from cspdeploy.runtimes.base import SessionRequest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--min-runs", type=int, default=60)
    arguments = parser.parse_args()
    size_px = (arguments.size, arguments.size)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        request = ExportRequest(model="cspdarknet53", output=output, size_px=size_px)
        bundle = Path(export_bundle(request).folder)
        source = resolve_source("cspdarknet53", models=Path("models"), weights=None, images=None, size_px=size_px)
        x_NCHW = torch.randn(1, 3, *size_px)
        plain = output / "plain.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.onnx.export(
                source.model, (x_NCHW,), str(plain), dynamo=False, opset_version=18, input_names=["input"]
            )
        onnx.save(onnxsim.simplify(str(plain))[0], plain)
        weights = SessionRequest(path=Path(source.weights), spec=source.spec)
        opened = {
            EAGER: require_runtime("torch-cpu").open(weights),
            "torch.onnx + onnxsim": require_runtime("ort-cpu").open(SessionRequest(path=plain)),
            "cspdeploy": require_runtime("ort-cpu").open(SessionRequest(path=bundle / "cspdarknet53.onnx")),
        }
        calls = {name: session.bind({"input": x_NCHW.numpy()}) for name, session in opened.items()}
        timings = measure_latency(calls, LatencySettings(min_runs=arguments.min_runs, min_seconds=5.0))
    for name, timing in timings.items():
        interval = f"{timing.ci_low_ms:.2f} to {timing.ci_high_ms:.2f}"
        sys.stdout.write(f"{name:22} p50 {timing.p50_ms:8.2f} ms ({interval}), {timing.ratio:.2f}x eager\n")
    ratio = timings["torch.onnx + onnxsim"].p50_ms / timings["cspdeploy"].p50_ms
    sys.stdout.write(f"cspdeploy is {ratio:.3f}x as fast as torch.onnx + onnxsim\n{noise_warning(timings)}\n")


if __name__ == "__main__":
    main()
