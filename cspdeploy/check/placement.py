"""Where the nodes of a graph really run, judged by the engine's own record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cspdeploy.core.types import PlacedNode
from cspdeploy.runtimes.base import Runtime

__all__ = ["Placement", "asked_providers", "find_placement", "strict_problem"]

COPIES = ("MemcpyToHost", "MemcpyFromHost")
"""ONNX Runtime's own nodes between devices."""

_PROVIDERS = {"cpu": ("CPUExecutionProvider", "CPU"), "cuda": ("CUDAExecutionProvider",)}
"""What a session of that device is asked to run on, as each engine calls it."""
_OWN_PROVIDERS = {"ort-tensorrt": ("TensorrtExecutionProvider",)}
"""The same of runtimes that ask for one of several providers of their device: what TensorRT leaves to CUDA is elsewhere
too, for it is another engine with other kernels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Nodes by provider, those not where they were asked to be, and copies; None: the engine tells nothing of nodes."""

    counts: Mapping[str, int]
    elsewhere: tuple[PlacedNode, ...]
    num_copies: int | None


def asked_providers(runtime: Runtime) -> tuple[str, ...] | None:
    """The names of what its sessions are asked to run on; None where that is not known."""
    return _OWN_PROVIDERS.get(runtime.name, _PROVIDERS.get(runtime.device))


def find_placement(
    runtime: Runtime, *, counts: Mapping[str, int], nodes: tuple[PlacedNode, ...], num_copies: int | None
) -> Placement:
    """Judge the record of a session of `runtime`."""
    asked = asked_providers(runtime)
    if not nodes or asked is None:
        return Placement(counts=counts, elsewhere=(), num_copies=None)
    elsewhere = tuple(node for node in nodes if node.provider not in asked and node.operator not in COPIES)
    if not elsewhere and runtime.name in _OWN_PROVIDERS:
        num_copies = num_copies or 0  # of one provider alone, there is nowhere to copy to
    return Placement(counts=counts, elsewhere=elsewhere, num_copies=num_copies)


def strict_problem(runtime: Runtime, placement: Placement) -> str:
    """Why the placement is not wholly that which was asked for, or empty."""
    problems = []
    if placement.elsewhere:
        first = placement.elsewhere[0]
        problems.append(
            f"{len(placement.elsewhere)} of {sum(placement.counts.values())} nodes run elsewhere, the first "
            f"{first.node} ({first.operator}) on {first.provider}"
        )
    if placement.num_copies:
        problems.append(f"{placement.num_copies} copies between devices")
    # On the CPU there is nowhere else to go, and PyTorch runs a module on one device or not at all.
    if placement.num_copies is None and runtime.name in _OWN_PROVIDERS and placement.elsewhere:
        problems.append("how often it copies for them is not known: ONNX Runtime writes no graph of TensorRT's engines")
    elif placement.num_copies is None and runtime.device != "cpu" and "onnx" in runtime.formats:
        problems.append("the engine does not tell where its nodes run (ONNX Runtime does from 1.23 on)")
    return "; ".join(problems)
