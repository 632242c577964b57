"""Ways to set one runtime that a user would choose between: each is a row of its own in what is timed."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cspdeploy.core.errors import InputError
from cspdeploy.runtimes.base import CudaOptions, SessionRequest

__all__ = ["CUDA_GRAPH", "PLAIN", "Variant", "graph_variant", "require_variants", "select_variants", "variants_of"]

PLAIN, CUDA_GRAPH = "", "cuda-graph"
"""Names of the variant that sets nothing, and of the one that replays the run as a graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to set a runtime.

    Attributes:
        name: as tables, options and JSON spell it; empty for the runtime as it is in use.
        note: what it changes, for whoever reads the row; empty where the name is empty.
        apply: the request as it is for the runtime as in use, to that of the variant. What it does not set stays.
    """

    name: str
    note: str
    apply: Callable[[SessionRequest], SessionRequest]


def _variant(name: str, note: str, *, cuda_graph: bool = False, **options: object) -> Variant:
    def apply(request: SessionRequest) -> SessionRequest:
        changed: CudaOptions = dataclasses.replace(request.cuda, **options)  # type: ignore[arg-type]
        return dataclasses.replace(request, cuda=changed, cuda_graph=request.cuda_graph or cuda_graph)

    return Variant(name=name, note=note, apply=apply)


_PLAIN = _variant(PLAIN, "")
_GRAPH = _variant(CUDA_GRAPH, "the run is captured once and replayed as one CUDA graph", cuda_graph=True)
_CHANNELS_LAST = _variant("channels-last", "computes in NHWC", channels_last=True)

_VARIANTS: dict[str, tuple[Variant, ...]] = {
    "torch-cpu": (_CHANNELS_LAST, _variant("compile", "torch.compile, its default mode", compile="default")),
    "torch-cuda": (
        _CHANNELS_LAST,
        _variant("fp16", "weights and activations in FP16", half=True),
        _variant("fp16 channels-last", "FP16, computes in NHWC", half=True, channels_last=True),
        _variant(
            "compile fp16", "torch.compile max-autotune with its CUDA graphs, FP16", half=True, compile="max-autotune",
        ),
        _variant(
            "compile fp16 channels-last", "torch.compile max-autotune with its CUDA graphs, FP16, NHWC",
            half=True, channels_last=True, compile="max-autotune",
        ),
    ),
    "ort-cuda": (
        _GRAPH,
        _variant("nhwc", "prefer_nhwc: convolutions in NHWC", channels_last=True),
        _variant("nhwc cuda-graph", "prefer_nhwc, captured as one CUDA graph", channels_last=True, cuda_graph=True),
    ),
    "ort-tensorrt": (_GRAPH,),
}  # fmt: skip
_CAPTURING = ("torch-cuda", "torchscript-cuda", "ort-cuda", "ort-tensorrt")


def variants_of(runtime_name: str) -> tuple[Variant, ...]:
    """All of one runtime, the plain one first; a runtime without choices has that one alone."""
    return (_PLAIN, *_VARIANTS.get(runtime_name, ()))


def graph_variant(runtime_name: str) -> Variant | None:
    """The plain one captured as a CUDA graph; None of a runtime that captures nothing."""
    return _GRAPH if runtime_name in _CAPTURING else None


def select_variants(
    runtime_name: str, *, every: bool = False, names: Sequence[str] = (), cuda_graph: bool = False
) -> tuple[Variant, ...]:
    """The plain one, and those that were asked for: all, some by name, the CUDA graph. Each once."""
    found = [one for one in variants_of(runtime_name) if every or one.name in (PLAIN, *names)]
    graph = graph_variant(runtime_name)
    if graph is not None and (cuda_graph or CUDA_GRAPH in names):
        found.append(graph)
    return tuple({one.name: one for one in found}.values())


def require_variants(runtime_names: Sequence[str], names: Sequence[str]) -> None:
    """Whether some of the runtimes knows each name.

    Raises:
        InputError: none does.
    """
    known = {one.name for runtime in runtime_names for one in variants_of(runtime)}
    known |= {CUDA_GRAPH for runtime in runtime_names if graph_variant(runtime) is not None}
    known -= {PLAIN}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            expected = ", ".join(sorted(known)) or "none: the runtimes that are timed have no variants"
            raise InputError(f"--variant {name}: unknown, expected one of {expected}",
                             fix=f"--variant '{near[0]}'" if near else "leave out --variant")  # fmt: skip
