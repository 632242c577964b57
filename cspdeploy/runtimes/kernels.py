"""Kernels that really ran on the GPU, of whichever library of this process: by CUPTI, through PyTorch's profiler.

Engines tell of nodes, and of those by the host's clock; what the device was busy with, and for how long, tells whether
a run waits for its launches.
"""

from __future__ import annotations

import importlib.util
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.runtimes.base import ProfiledNode

__all__ = ["Kernels", "busy_us", "merge_kernels", "profile_kernels"]

WARM_UP_RUNS = 5
"""As `torch_device.UNPROFILED_RUNS`: before them TorchScript and allocators are not at rest."""

_SHORT = re.compile(r"^(?:void )?([\w:~ ]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What the GPU ran in one run: kernels, copies and fills by name, the longest first.

    `busy_ms`: in which at least one of them ran; less than their sum where streams overlap.
    """

    nodes: tuple[ProfiledNode, ...]
    busy_ms: float


def profile_kernels(call: Callable[[], None], num_runs: int) -> Kernels:
    """Time of each kernel, copy and fill on the GPU, averaged over some runs.

    Args:
        call: computes once and waits; of any engine, ONNX Runtime among them.
        num_runs: that are recorded, after a warm-up.

    Raises:
        InputError: no run is to be recorded.
        RuntimeUnavailableError: there is no PyTorch with CUDA, which records; or nothing ran on the GPU.
    """
    if num_runs < 1:
        raise InputError(f"{num_runs} runs to profile, expected 1 or more")
    if importlib.util.find_spec("torch") is None:
        raise RuntimeUnavailableError("kernels are recorded by torch, which is not installed",
                                      fix="pip install 'cspdeploy[export]'")  # fmt: skip
    import torch

    if not torch.cuda.is_available():
        raise RuntimeUnavailableError("kernels are recorded by torch, and this torch finds no GPU",
                                      fix="cspdeploy doctor")  # fmt: skip
    for _ in range(WARM_UP_RUNS):
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_runs):
            call()
        torch.cuda.synchronize()
    events = [
        (str(event.name), float(event.time_range.start), float(event.time_range.end))
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA"
    ]  # fmt: skip
    if not events:
        raise RuntimeUnavailableError("nothing that ran on the GPU was recorded", fix="cspdeploy doctor")
    return Kernels(
        nodes=merge_kernels(((name, end - start) for name, start, end in events), num_runs=num_runs),
        busy_ms=busy_us((start, end) for _, start, end in events) / 1e3 / num_runs,
    )


def merge_kernels(events: Iterable[tuple[str, float]], *, num_runs: int) -> tuple[ProfiledNode, ...]:
    """Kernels by name with their microseconds, one entry for each launch, as nodes of one run; the longest first."""
    groups: dict[str, list[float]] = defaultdict(list)
    for name, microseconds in events:
        groups[name].append(microseconds)
    nodes = [
        ProfiledNode(
            node=name, operator=_operator(name), provider="cuda", num_calls=len(times) / num_runs,
            ms=sum(times) / 1e3 / num_runs,
        )
        for name, times in groups.items()
    ]  # fmt: skip
    return tuple(sorted(nodes, key=lambda node: -node.ms))


def busy_us(intervals: Iterable[tuple[float, float]]) -> float:
    """Time that at least one of the intervals covers, given as beginning and end, both in microseconds."""
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy


def _operator(kernel: str) -> str:
    """Without template arguments and parameters: "cudnn::ops::nchwToNhwcKernel"."""
    found = _SHORT.match(kernel)
    return found[1].strip() if found else kernel
