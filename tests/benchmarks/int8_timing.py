"""One subject of the latency comparison in a process of its own: opened once, then timed whenever a line comes in.

    python tests/benchmarks/int8_timing.py ENGINE MODEL --size 256 --threads 2 [--models DIR]

ENGINE is ort, openvino or eager; MODEL a file, or for eager the network's name with --models. Prints a JSON list, then
for every line N on its stdin the milliseconds of N calls as a JSON list. The size is set in the file's inputs: these
networks are convolutions up to the global pool, and quantised nodes keep their scales.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Call = Callable[[npt.NDArray[np.float32]], object]


def at_size(path: Path, size_px: int) -> bytes:
    """An ONNX file with its input at that size, and without the shapes of what lies between."""
    import onnx

    model = onnx.load(path)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[2].dim_value = dims[3].dim_value = size_px
    del model.graph.value_info[:]
    return bytes(model.SerializeToString())


def ort_call(path: Path, size_px: int, threads: int) -> Call:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(at_size(path, size_px), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x_NCHW: session.run(None, {name: x_NCHW})


def openvino_call(path: Path, size_px: int, threads: int) -> Call:
    import openvino as ov

    core = ov.Core()
    if path.suffix == ".xml":
        model = core.read_model(str(path))
        model.reshape([1, 3, size_px, size_px])
    else:
        model = core.read_model(at_size(path, size_px))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda x_NCHW: request.infer([x_NCHW])


def eager_call(name: str, models: Path, size_px: int, threads: int) -> Call:
    import torch

    from cspdeploy.pipeline.source import resolve_source

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    source = resolve_source(name, models=models, weights=None, images=None, size_px=(size_px, size_px))
    network = source.model.eval()
    return lambda x_NCHW: network(torch.from_numpy(x_NCHW))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("ort", "openvino", "eager"))
    parser.add_argument("model")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    if given.engine == "eager":
        call = eager_call(given.model, given.models, given.size, given.threads)
    else:
        opener = ort_call if given.engine == "ort" else openvino_call
        call = opener(Path(given.model), given.size, given.threads)
    x_NCHW = np.random.default_rng(0).standard_normal((1, 3, given.size, given.size)).astype(np.float32)
    sys.stdout.write("[]\n")
    sys.stdout.flush()
    for line in sys.stdin:
        milliseconds = []
        for _ in range(int(line)):
            started = time.perf_counter()
            call(x_NCHW)
            milliseconds.append((time.perf_counter() - started) * 1e3)
        sys.stdout.write(json.dumps(milliseconds) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
