"""How near a latency is to what this machine can do: its peak is measured, not taken from a data sheet.

S. Williams, A. Waterman, D. Patterson, "Roofline: An Insightful Visual Performance Model", 2009. A run cannot be faster
than its multiply-accumulates at the peak of arithmetic, nor than reading its weights once at the bandwidth of memory.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cspdeploy.check.worker import Worker
from cspdeploy.core.env import available_bytes
from cspdeploy.core.errors import CspDeployError
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Feeds, SessionRequest

__all__ = ["Peak", "Roofline", "binary_model", "find_roofline", "measure_peak"]

# Two products of 2048 are 34 GFLOP: 0.2 s on two cores of a server, 2 s on a small board, and far above what starting
# them takes. A GPU does the same in less than a millisecond, and takes 8 times that.
PRODUCT_SIDE = {"cpu": 2048, "cuda": 4096}
# Two inputs and one output of 64 MB each are more than nearly all caches hold together.
STREAM_VALUES = 16 << 20
_SMALLEST_STREAM = 1 << 20
_MATMUL_OPSET_13 = 13
_MEMORY_SHARE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """What an engine reaches here in float32: a large matrix product, and adding two large arrays.

    `gbytes_per_s` counts what the addition reads and writes.
    """

    runtime: str
    num_threads: int
    gflops: float
    gbytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """A latency against the peak.

    Attributes:
        gflop: of one call: two for each multiply-accumulate.
        gflops: achieved, for each second.
        peak_share: of the measured peak in float32; INT8 and FP16 arithmetic may go beyond 1.
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


def find_roofline(
    peak: Peak, *, subject: str, artifact: str, runtime: str, num_macs: int, num_bytes: int, p50_ms: float
) -> Roofline:
    """Of one latency.

    Args:
        num_macs: of one call.
        num_bytes: of the weights, which a call reads at least once.
    """
    gflop = 2e-9 * num_macs
    arithmetic_ms, weights_ms = 1e3 * gflop / peak.gflops, 1e-6 * num_bytes / peak.gbytes_per_s
    return Roofline(
        subject=subject, artifact=artifact, runtime=runtime, gflop=gflop, gflops=1e3 * gflop / p50_ms,
        peak_share=arithmetic_ms / p50_ms, arithmetic_ms=arithmetic_ms, weights_ms=weights_ms,
        roof_share=max(arithmetic_ms, weights_ms) / p50_ms,
        bound="arithmetic" if arithmetic_ms >= weights_ms else "memory",
    )  # fmt: skip


@functools.cache
def measure_peak(device: str, *, num_threads: int, time_limit_s: float) -> Peak | None:
    """With ONNX Runtime, in a process of its own; None where it is not here or cannot. Measured once a process."""
    runtime = all_runtimes().get(f"ort-{device}")
    if runtime is None or runtime.missing() is not None:
        return None
    side = PRODUCT_SIDE[device]
    rng = np.random.default_rng(0)
    values = min(STREAM_VALUES, (available_bytes() or 4 * STREAM_VALUES) // (4 * _MEMORY_SHARE))
    matrix = rng.standard_normal((side, side), np.float32)
    array = np.ones((max(_SMALLEST_STREAM, values),), np.float32)
    try:
        product_ms = _best_ms(runtime.name, "MatMul", matrix, num_threads, time_limit_s)
        stream_ms = _best_ms(runtime.name, "Add", array, num_threads, time_limit_s)
    except CspDeployError:  # out of memory, most likely; the latencies stand without a roof
        return None
    return Peak(
        runtime=runtime.name, num_threads=num_threads, gflops=2e-6 * side**3 / product_ms,
        gbytes_per_s=1e-6 * 3 * array.nbytes / stream_ms,
    )  # fmt: skip


def _best_ms(
    runtime_name: str, operator: str, array: np.ndarray[tuple[int, ...], np.dtype[np.float32]], num_threads: int,
    time_limit_s: float,
) -> float:  # fmt: skip
    """The shortest run: a peak is what the machine can do, not what it does on average."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{operator}.onnx"
        path.write_bytes(binary_model(operator, array.shape))
        # TF32 as in the latencies that are compared with it.
        request = SessionRequest(path=path, num_threads=num_threads, outputs=("y",), tf32=True)
        feeds: Feeds = {"a": array, "b": array}
        with Worker(runtime_name, request, time_limit_s=time_limit_s) as worker:
            call = worker.bind(feeds)
            return min(call.burst(min_runs=5, min_seconds=0.5, max_runs=100, lead_in_seconds=0.2))


def binary_model(operator: str, shape: tuple[int, ...]) -> bytes:
    """An ONNX model `y = operator(a, b)` of float32 tensors of one shape, without the onnx package.

    Field numbers are those of onnx.proto; lengths and dimensions are varints.
    """
    dims = b"".join(_field(1, _number(1, size)) for size in shape)
    tensor = _field(2, _field(1, _number(1, 1) + _field(2, dims)))  # elem_type 1: float32
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
