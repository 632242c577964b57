"""How near a latency is to what this machine can do: its peak is measured, not taken from a data sheet.

S. Williams, A. Waterman, D. Patterson, "Roofline: An Insightful Visual Performance Model", 2009. A run cannot be faster
than its multiply-accumulates at the peak of arithmetic, nor than reading its weights once at the bandwidth of memory.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cspdeploy.check.worker import Worker
from cspdeploy.core.env import available_bytes
from cspdeploy.core.errors import CspDeployError
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import CudaOptions, Feeds, SessionRequest

__all__ = ["Peak", "Roofline", "binary_model", "find_roofline", "measure_peak"]

# Two products of 2048 are 34 GFLOP: 0.2 s on two cores of a server, 2 s on a small board, and far above what starting
# them takes. A GPU does the same in less than a millisecond: of 8192 it is 1.1 TFLOP, some 1.5 ms of an H100.
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}
# Two inputs and one output of 64 MB each are more than nearly all caches hold together.
STREAM_VALUES = 16 << 20
GPU_STREAM_TIMES = 4
"""Of that on a GPU: the three are 800 MB then, and the largest caches on one chip hold some 130 MB."""
_SMALLEST_STREAM = 1 << 20
_MATMUL_OPSET_13 = 13
_FLOAT32, _FLOAT16 = 1, 10  # TensorProto.DataType of onnx.proto
_MEMORY_SHARE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """What an engine reaches here: a large matrix product, and adding two large arrays of float32.

    Attributes:
        gbytes_per_s: what the addition reads and writes.
        precision: of the product: "fp32", or "fp16" on a GPU, whose tensor cores have a peak of their own for it.
        tf32: the product of float32 was rounded to TF32, as in the rows that are compared with it.
    """

    runtime: str
    num_threads: int
    gflops: float
    gbytes_per_s: float
    precision: str = "fp32"
    tf32: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """A latency against the peak.

    Attributes:
        gflop: of one call: two for each multiply-accumulate.
        gflops: achieved, for each second.
        peak_share: of the measured peak in `precision`; INT8 arithmetic, and FP16 of a CPU, may go beyond 1.
        arithmetic_ms, weights_ms: the least time for the arithmetic, and for reading the weights once from memory.
        roof_share: the greater of these over the time that was measured.
        bound: which is the greater.
    """

    subject: str
    artifact: str
    runtime: str
    gflop: float
    gflops: float
    peak_share: float
    arithmetic_ms: float
    weights_ms: float
    roof_share: float
    bound: str
    variant: str = ""
    precision: str = "fp32"


def find_roofline(
    peak: Peak, *, subject: str, artifact: str, runtime: str, num_macs: int, num_bytes: int, p50_ms: float,
    variant: str = "",
) -> Roofline:  # fmt: skip
    """Of one latency.

    Args:
        p50_ms: between events on the device's stream where there are any, so without the host's wait for the end;
            gaps between kernels are in it.
        num_macs: of one call.
        num_bytes: of the weights, which a call reads at least once.
    """
    gflop = 2e-9 * num_macs
    arithmetic_ms, weights_ms = 1e3 * gflop / peak.gflops, 1e-6 * num_bytes / peak.gbytes_per_s
    return Roofline(
        subject=subject, artifact=artifact, runtime=runtime, gflop=gflop, gflops=1e3 * gflop / p50_ms,
        peak_share=arithmetic_ms / p50_ms, arithmetic_ms=arithmetic_ms, weights_ms=weights_ms,
        roof_share=max(arithmetic_ms, weights_ms) / p50_ms,
        bound="arithmetic" if arithmetic_ms >= weights_ms else "memory", variant=variant, precision=peak.precision,
    )  # fmt: skip


@functools.cache
def measure_peak(
    device: str, *, num_threads: int, time_limit_s: float, half: bool = False, tf32: bool = True, gpu: int = 0
) -> Peak | None:
    """With ONNX Runtime, in a process of its own; None where it is not here or cannot. Measured once a process.

    Args:
        half: the product in FP16, which only a GPU computes as such.
        tf32: as in the latencies that are compared with it; on a GPU alone.
        gpu: index of it.
    """
    runtime = all_runtimes().get(f"ort-{device}")
    if runtime is None or runtime.missing() is not None:
        return None
    side, on_gpu = PRODUCT_SIDE[device], device == "cuda"
    rng = np.random.default_rng(0)
    wanted = STREAM_VALUES * (GPU_STREAM_TIMES if on_gpu else 1)
    values = min(wanted, (available_bytes() or 4 * wanted) // (4 * _MEMORY_SHARE))
    matrix = rng.standard_normal((side, side), np.float32).astype(np.float16 if half else np.float32, copy=False)
    request = SessionRequest(
        path=Path(), num_threads=num_threads, outputs=("y",), tf32=tf32, cuda=CudaOptions(device=gpu)
    )
    array = np.ones((max(_SMALLEST_STREAM, values),), np.float32)
    try:
        product_ms = _best_ms(runtime.name, "MatMul", matrix, request, time_limit_s)
        stream_ms = _best_ms(runtime.name, "Add", array, request, time_limit_s)
    except CspDeployError:  # out of memory, most likely; the latencies stand without a roof
        return None
    return Peak(
        runtime=runtime.name, num_threads=num_threads, gflops=2e-6 * side**3 / product_ms,
        gbytes_per_s=1e-6 * 3 * array.nbytes / stream_ms, precision="fp16" if half else "fp32",
        tf32=on_gpu and tf32 and not half,
    )  # fmt: skip


def _best_ms(
    runtime_name: str, operator: str, array: npt.NDArray[np.generic], request: SessionRequest, time_limit_s: float
) -> float:
    """The shortest run, between events on its stream where there are any: a peak is the machine at its best."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{operator}.onnx"
        path.write_bytes(binary_model(operator, array.shape, half=array.dtype == np.float16))
        feeds: Feeds = {"a": array, "b": array}
        with Worker(runtime_name, dataclasses.replace(request, path=path), time_limit_s=time_limit_s) as worker:
            call = worker.bind(feeds)
            host_ms = call.burst(min_runs=5, min_seconds=0.5, max_runs=100, lead_in_seconds=0.2)
            return min(call.device_rounds_ms[-1] if call.device_rounds_ms else host_ms)


def binary_model(operator: str, shape: tuple[int, ...], *, half: bool = False) -> bytes:
    """An ONNX model `y = operator(a, b)` of float32 (float16) tensors of one shape, without the onnx package.

    Field numbers are those of onnx.proto; lengths and dimensions are varints.
    """
    dims = b"".join(_field(1, _number(1, size)) for size in shape)
    element = _FLOAT16 if half else _FLOAT32
    tensor = _field(2, _field(1, _number(1, element) + _field(2, dims)))
    values = {name: _field(1, name.encode()) + tensor for name in "aby"}
    node = _field(1, b"a") + _field(1, b"b") + _field(2, b"y") + _field(4, operator.encode())
    graph = _field(1, node) + _field(2, b"g") + _field(11, values["a"]) + _field(11, values["b"])
    return _number(1, 8) + _field(7, graph + _field(12, values["y"])) + _field(8, _number(2, _MATMUL_OPSET_13))


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
