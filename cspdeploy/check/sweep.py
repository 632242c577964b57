"""Throughput over batch and threads, and compute against copies: several bindings of one artifact, interleaved."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cspdeploy.check.latency import LatencySettings, Progress, measure_latency
from cspdeploy.check.stats import percentile
from cspdeploy.check.worker import BoundCall, Worker
from cspdeploy.core.env import num_usable_cpus
from cspdeploy.core.errors import CspDeployError, DeviceMemoryError
from cspdeploy.core.results import Timing
from cspdeploy.runtimes.base import Feeds, SessionRequest

__all__ = [
    "GPU_BATCHES", "SWEPT_BATCHES", "Copies", "SweepCell", "error_words", "measure_copies", "measure_sweep",
    "swept_threads",
]  # fmt: skip

SWEPT_BATCHES = (1, 2, 4, 8, 16)
GPU_BATCHES = (1, 8, 32)
"""A camera, a few of them, and a queue: from 32 images on throughput hardly grows on any GPU, and at 1 most of it is
idle."""

# A cell is there to show where throughput stops to grow, not to tell 5 % apart: the fewest rounds, of one run each
# where a run takes long.
SWEEP_SETTINGS = LatencySettings(
    min_runs=6, min_seconds=0.2, burst=1, warmup_runs=2, warmup_seconds=0.05, max_warmup_seconds=1.0
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepCell:
    """One batch at one number of threads. Where it cannot run, `reason` says why and the numbers are None.

    `events_p50_ms`: between two events on the device's stream, gaps between kernels included; `images_per_s` is by the
    host's clock.
    """

    subject: str
    artifact: str
    runtime: str
    batch: int
    num_threads: int
    variant: str = ""
    p50_ms: float | None = None
    ci_low_ms: float | None = None
    ci_high_ms: float | None = None
    images_per_s: float | None = None
    events_p50_ms: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Medians of the same session with its inputs and outputs on the device, and with copies from and to the host.

    Attributes:
        compute_ms: inputs and outputs bound to the device.
        with_copies_ms: host arrays in, host arrays out.
        cuda_graph_ms: bound, and replayed as one CUDA graph; None where `graph_reason` says why not.
    """

    subject: str
    artifact: str
    runtime: str
    compute_ms: float
    with_copies_ms: float
    cuda_graph_ms: float | None = None
    graph_reason: str = ""


def swept_threads(num_cpus: int | None = None) -> tuple[int, ...]:
    """1, 2, 4, ... and as many as there are CPUs to run on."""
    most = num_cpus or num_usable_cpus()
    return tuple(sorted({1 << power for power in range(most.bit_length()) if 1 << power <= most} | {most}))


def measure_sweep(
    base: SweepCell,
    request: SessionRequest,
    *,
    runtime_name: str,
    feeds: Mapping[int, Feeds],
    threads: Sequence[int],
    time_limit_s: float,
    progress: Progress = lambda what, done, total: None,
    settings: LatencySettings = SWEEP_SETTINGS,
    apart: bool = False,
    rotate: bool = False,
) -> list[SweepCell]:
    """Every batch at every number of threads, all of them interleaved. What cannot run does not end it.

    Args:
        base: names of the cells.
        feeds: by batch.
        threads: 0 stands for the engine's default.
        apart: a session for each batch: what has been compiled or captured for one shape is not that for another.
        rotate: as in `Worker.bind`.
    """
    cells = {
        f"{batch} at {num_threads}": dataclasses.replace(base, batch=batch, num_threads=num_threads)
        for num_threads in threads
        for batch in feeds
    }
    failures: dict[str, CspDeployError] = {}
    with contextlib.ExitStack() as stack:
        calls: dict[str, BoundCall] = {}
        for num_threads in threads:
            asked = dataclasses.replace(request, num_threads=num_threads)
            workers: list[Worker] = []
            for batch, given in feeds.items():
                if apart or not workers:
                    workers.append(stack.enter_context(Worker(runtime_name, asked, time_limit_s=time_limit_s)))
                _bind(workers[-1], given, f"{batch} at {num_threads}", calls, failures, rotate=rotate)
        found = measure_latency(calls, settings, failures=failures, progress=progress) if calls else {}
    return [_fill(cell, found.get(name), failures.get(name), calls.get(name)) for name, cell in cells.items()]


def _bind(
    worker: Worker, feeds: Feeds, name: str, calls: dict[str, BoundCall], failures: dict[str, CspDeployError], *,
    rotate: bool = False,
) -> None:  # fmt: skip
    try:
        calls[name] = worker.bind(feeds, name=name, rotate=rotate)
    except CspDeployError as error:
        failures[name] = error


def _fill(
    cell: SweepCell, timing: Timing | None, error: CspDeployError | None, call: BoundCall | None
) -> SweepCell:  # fmt: skip
    if timing is None:
        return dataclasses.replace(cell, reason=error_words(error) if error else "not measured")
    device_ms = [ms for found in call.device_rounds_ms for ms in found] if call is not None else []
    return dataclasses.replace(
        cell, p50_ms=timing.p50_ms, ci_low_ms=timing.ci_low_ms, ci_high_ms=timing.ci_high_ms,
        images_per_s=1e3 * cell.batch / timing.p50_ms, events_p50_ms=percentile(device_ms, 50) if device_ms else None,
    )  # fmt: skip


def error_words(error: CspDeployError) -> str:
    """Why a row or a cell has no numbers; what does not fit into memory is told with what would fit."""
    return str(error) if isinstance(error, DeviceMemoryError) else error.message


def measure_copies(
    worker: Worker,
    feeds: Feeds,
    *,
    names: tuple[str, str, str],
    graph: tuple[str, SessionRequest] | None,
    time_limit_s: float,
    settings: LatencySettings = SWEEP_SETTINGS,
) -> Copies:
    """Compute against copies in an open session; a CUDA graph needs a session of its own. All are interleaved.

    Inputs are not rotated here: those that are copied lie in the device's cache when the computing begins, since the
    copy went through it, and the bound ones do so as well.

    Args:
        names: subject, artifact, runtime.
        graph: runtime and request of that session, or None: no graph.

    Raises:
        CspDeployError: as `Worker`.
    """
    calls = {
        "bound": worker.bind(feeds, name="bound"), "copied": worker.bind(feeds, name="copied", copies=True)
    }  # fmt: skip
    failures: dict[str, CspDeployError] = {}
    with contextlib.ExitStack() as stack:
        if graph is not None:
            runtime_name, request = graph
            request = dataclasses.replace(request, cuda_graph=True)
            captured = stack.enter_context(Worker(runtime_name, request, time_limit_s=time_limit_s))
            _bind(captured, feeds, "graph", calls, failures)
        found = measure_latency(calls, settings, failures=failures)
    for name in ("bound", "copied"):
        if name in failures:
            raise failures[name]
    subject, artifact, runtime = names
    return Copies(
        subject=subject, artifact=artifact, runtime=runtime, compute_ms=found["bound"].p50_ms,
        with_copies_ms=found["copied"].p50_ms,
        cuda_graph_ms=found["graph"].p50_ms if "graph" in found else None,
        graph_reason=error_words(failures["graph"]) if "graph" in failures else "",
    )  # fmt: skip
