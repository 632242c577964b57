"""Where the time of a run goes, by the engine's own record of each node."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cspdeploy.check.latency_settings import GPU_STABLE_SECONDS
from cspdeploy.check.worker import Worker
from cspdeploy.core.onnx_graph import module_path
from cspdeploy.runtimes.base import Feeds, ProfiledNode, SessionRequest

__all__ = [
    "LAUNCH_BOUND_SHARE", "KernelTime", "NodeTime", "OperatorTime", "Profile", "add_kernels", "measure_kernels",
    "measure_profile", "summarise_profile",
]  # fmt: skip

MIN_RUNS, MAX_RUNS, MIN_SECONDS = 20, 200, 1.0
"""A profile is a list of all nodes of all runs: 200 runs of a network of 500 nodes are 100,000 entries."""
NUM_TOP_NODES = 10
NUM_KERNEL_RUNS = 20
"""Of which kernels are recorded: a network has hundreds a run, and they take the same time in each."""
NODE_NOTE = "on CUDA a node's time is that of starting its work, not of the work"
"""Of ONNX Runtime, which notes when the host has queued a node; PyTorch's profiler reads the device's clock."""
LAUNCH_BOUND_SHARE = 0.5
"""Of the wall time in which some kernel runs. Below a half, more is to be had from not waiting for the host (which is
all that a CUDA graph does) than from kernels of any speed: were they twice as fast, less than a quarter were gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorTime:
    """All nodes of one operator together; `ms` is of one run, `share` of all nodes' time."""

    operator: str
    num_calls: float
    ms: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTime:
    """One node as the engine runs it, which may be several of the file's in one.

    Attributes:
        module: path of the torch module that it came from, or empty.
        gbytes_per_s: inputs, weights and outputs over its time; None where the engine does not tell.
    """

    node: str
    module: str
    operator: str
    provider: str
    ms: float
    share: float
    gbytes_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """What the GPU ran under one name, in one run; `share` of the time of all kernels."""

    kernel: str
    num_calls: float
    ms: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Of one artifact on one runtime. Recording costs time of its own: shares are to be trusted more than times.

    Attributes:
        variant: of the runtime; empty: as in use.
        kernels: of a GPU, the `NUM_TOP_NODES` longest by name; empty elsewhere.
        busy_ms: of one run, in which at least one kernel ran; None where none was recorded.
        busy_share: of the wall time of runs that were not recorded.
        bound: "launch-bound" where that is below `LAUNCH_BOUND_SHARE`, else "kernel-bound"; empty where not known.
        nodes_ms: of all nodes in one run.
        run_ms: median of the same runs; the rest of it is the engine's, between nodes, and the recording's.
        nodes: the `NUM_TOP_NODES` longest.
    """

    subject: str
    artifact: str
    runtime: str
    nodes_ms: float
    run_ms: float
    operators: tuple[OperatorTime, ...]
    nodes: tuple[NodeTime, ...]
    variant: str = ""
    kernels: tuple[KernelTime, ...] = ()
    busy_ms: float | None = None
    busy_share: float | None = None
    bound: Literal["", "launch-bound", "kernel-bound"] = ""
    note: str = ""


def measure_profile(
    runtime_name: str, request: SessionRequest, feeds: Feeds, *, time_limit_s: float
) -> tuple[tuple[ProfiledNode, ...], list[float]]:
    """Nodes of a session in a process of its own, and the milliseconds of its runs.

    Raises:
        CspDeployError: as `Worker`.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = dataclasses.replace(request, profile=Path(folder))
        with Worker(runtime_name, request, time_limit_s=time_limit_s) as worker:
            call = worker.bind(feeds)
            samples_ms = call.burst(min_runs=MIN_RUNS, min_seconds=MIN_SECONDS, max_runs=MAX_RUNS, lead_in_seconds=0.1)
            return worker.profile(), samples_ms


def measure_kernels(
    runtime_name: str, request: SessionRequest, feeds: Feeds, *, time_limit_s: float
) -> tuple[Sequence[ProfiledNode], float, list[float]]:
    """Kernels of a run on a GPU, the milliseconds in which one of them ran, and those of runs that were not recorded.

    Raises:
        InputError: kernels cannot be recorded here.
        CspDeployError: as `Worker`.
    """
    with Worker(runtime_name, request, time_limit_s=time_limit_s) as worker:
        call = worker.bind(feeds)
        samples_ms = call.burst(
            min_runs=MIN_RUNS, min_seconds=MIN_SECONDS, max_runs=10 * MAX_RUNS, lead_in_seconds=GPU_STABLE_SECONDS
        )
        nodes, busy_ms = call.kernels(NUM_KERNEL_RUNS)
        return nodes, busy_ms, samples_ms


def add_kernels(profile: Profile, kernels: Sequence[ProfiledNode], *, busy_ms: float, run_ms: float) -> Profile:
    """The same profile with what the GPU ran.

    Args:
        busy_ms: of one run, in which at least one kernel ran.
        run_ms: of one run that was not recorded, on the host's clock.
    """
    by_name: dict[str, tuple[float, float]] = {}
    for kernel in kernels:
        calls, spent = by_name.get(kernel.node, (0.0, 0.0))
        by_name[kernel.node] = calls + kernel.num_calls, spent + kernel.ms
    total = sum(ms for _, ms in by_name.values()) or 1.0
    longest = sorted(by_name.items(), key=lambda item: -item[1][1])[:NUM_TOP_NODES]
    # The kernels are of other runs than the wall time, and these may have been a little slower.
    share = min(1.0, busy_ms / run_ms) if run_ms else 0.0
    return dataclasses.replace(
        profile, run_ms=run_ms, busy_ms=busy_ms, busy_share=share,
        bound="launch-bound" if share < LAUNCH_BOUND_SHARE else "kernel-bound",
        kernels=tuple(
            KernelTime(kernel=name, num_calls=calls, ms=ms, share=ms / total) for name, (calls, ms) in longest
        ),
    )  # fmt: skip


def summarise_profile(
    nodes: Sequence[ProfiledNode], *, subject: str, artifact: str, runtime: str, run_ms: float, device: str = "cpu",
    variant: str = "",
) -> Profile:  # fmt: skip
    """Add up by operator, and pick the longest nodes. An engine that knows operators alone gives no nodes."""
    total = sum(node.ms for node in nodes) or 1.0
    groups: dict[str, list[ProfiledNode]] = {}
    for node in nodes:
        groups.setdefault(node.operator, []).append(node)
    operators = [
        OperatorTime(
            operator=name, num_calls=sum(node.num_calls for node in group), ms=sum(node.ms for node in group),
            share=sum(node.ms for node in group) / total,
        )
        for name, group in groups.items()
    ]  # fmt: skip
    longest = sorted((node for node in nodes if node.node != node.operator), key=lambda node: -node.ms)
    return Profile(
        subject=subject, artifact=artifact, runtime=runtime, nodes_ms=sum(node.ms for node in nodes), run_ms=run_ms,
        operators=tuple(sorted(operators, key=lambda found: -found.ms)),
        nodes=tuple(_node_time(node, total) for node in longest[:NUM_TOP_NODES]),
        variant=variant, note=NODE_NOTE if device == "cuda" and runtime.startswith("ort-") and nodes else "",
    )  # fmt: skip


def _node_time(node: ProfiledNode, total_ms: float) -> NodeTime:
    moved = node.moved_bytes * node.num_calls
    # ONNX Runtime puts words such as "InsertedPrecisionFreeCast_" before the name that the exporter gave.
    exported = node.node[max(0, node.node.find("/")) :]
    return NodeTime(
        node=node.node, module=module_path(exported), operator=node.operator, provider=node.provider, ms=node.ms,
        share=node.ms / total_ms, gbytes_per_s=moved / (1e6 * node.ms) if moved and node.ms else None,
    )  # fmt: skip
