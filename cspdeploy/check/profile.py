"""Where the time of a run goes, by the engine's own record of each node."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cspdeploy.check.worker import Worker
from cspdeploy.core.onnx_graph import module_path
from cspdeploy.runtimes.base import Feeds, ProfiledNode, SessionRequest

__all__ = ["NodeTime", "OperatorTime", "Profile", "measure_profile", "summarise_profile"]

MIN_RUNS, MAX_RUNS, MIN_SECONDS = 20, 200, 1.0
"""A profile is a list of all nodes of all runs: 200 runs of a network of 500 nodes are 100,000 entries."""
NUM_TOP_NODES = 10


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
class Profile:
    """Of one artifact on one runtime. Recording costs time of its own: shares are to be trusted more than times.

    Attributes:
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


def summarise_profile(
    nodes: Sequence[ProfiledNode], *, subject: str, artifact: str, runtime: str, run_ms: float, device: str = "cpu"
) -> Profile:
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
        note="on CUDA a node's time is that of starting its work, not of the work" if device == "cuda" else "",
    )  # fmt: skip


def _node_time(node: ProfiledNode, total_ms: float) -> NodeTime:
    moved = node.moved_bytes * node.num_calls
    # ONNX Runtime puts words such as "InsertedPrecisionFreeCast_" before the name that the exporter gave.
    exported = node.node[max(0, node.node.find("/")) :]
    return NodeTime(
        node=node.node, module=module_path(exported), operator=node.operator, provider=node.provider, ms=node.ms,
        share=node.ms / total_ms, gbytes_per_s=moved / (1e6 * node.ms) if moved and node.ms else None,
    )  # fmt: skip
