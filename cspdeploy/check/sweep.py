"""Throughput over batch and threads, and compute against copies: several bindings of one artifact, interleaved."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cspdeploy.check.latency import LatencySettings, Progress, measure_latency
from cspdeploy.check.worker import BoundCall, Worker
from cspdeploy.core.env import num_usable_cpus
from cspdeploy.core.errors import CspDeployError
from cspdeploy.core.types import Timing
from cspdeploy.runtimes.base import Feeds, SessionRequest

__all__ = ["SWEPT_BATCHES", "Copies", "SweepCell", "measure_copies", "measure_sweep", "swept_threads"]

SWEPT_BATCHES = (1, 2, 4, 8, 16)

# A cell is there to show where throughput stops to grow, not to tell 5 % apart: the fewest rounds, of one run each
# where a run takes long.
SWEEP_SETTINGS = LatencySettings(
    min_runs=6, min_seconds=0.2, burst=1, warmup_runs=2, warmup_seconds=0.05, max_warmup_seconds=1.0
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepCell:
    """One batch at one number of threads. Where it cannot run, `reason` says why and the numbers are None."""

    subject: str
    artifact: str
    runtime: str
    batch: int
    num_threads: int
    p50_ms: float | None = None
    ci_low_ms: float | None = None
    ci_high_ms: float | None = None
    images_per_s: float | None = None
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
) -> list[SweepCell]:
    """Every batch at every number of threads, all of them interleaved.

    Args:
        base: names of the cells.
        feeds: by batch.
        threads: 0 stands for the engine's default.
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
            worker = stack.enter_context(
                Worker(runtime_name, dataclasses.replace(request, num_threads=num_threads), time_limit_s=time_limit_s)
            )
            for batch, given in feeds.items():
                name = f"{batch} at {num_threads}"
                _bind(worker, given, name, calls, failures)
        found = measure_latency(calls, settings, failures=failures, progress=progress) if calls else {}
    return [_fill(cell, found.get(name), failures.get(name)) for name, cell in cells.items()]


def _bind(
    worker: Worker, feeds: Feeds, name: str, calls: dict[str, BoundCall], failures: dict[str, CspDeployError]
) -> None:
    try:
        calls[name] = worker.bind(feeds, name=name)
    except CspDeployError as error:
        failures[name] = error


def _fill(cell: SweepCell, timing: Timing | None, error: CspDeployError | None) -> SweepCell:
    if timing is None:
        return dataclasses.replace(cell, reason=error.message if error else "not measured")
    return dataclasses.replace(
        cell, p50_ms=timing.p50_ms, ci_low_ms=timing.ci_low_ms, ci_high_ms=timing.ci_high_ms,
        images_per_s=1e3 * cell.batch / timing.p50_ms,
    )  # fmt: skip


def measure_copies(
    worker: Worker,
    feeds: Feeds,
    *,
    names: tuple[str, str, str],
    graph: tuple[str, SessionRequest] | None,
    time_limit_s: float,
    settings: LatencySettings = SWEEP_SETTINGS,
) -> Copies:
    """Compute against copies in an open session; a CUDA graph needs a session of its own.

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
        graph_reason=failures["graph"].message if "graph" in failures else "",
    )  # fmt: skip
