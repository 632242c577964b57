"""What the tensors of an artifact are judged by, and how far each may be from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from cspdeploy.check.blame.counterparts import Side
from cspdeploy.check.blame.sketch import Recorder, distance
from cspdeploy.core.catalog import FP32_FLOOR
from cspdeploy.core.onnx_graph import OnnxModel
from cspdeploy.core.tolerance import tolerance_for
from cspdeploy.core.trace import TraceSource

__all__ = ["Origin", "Reference", "trace_reference", "trace_side"]

Array = npt.NDArray[Any]
Calls = Sequence[Mapping[str, Array]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A reference before it has run.

    Attributes:
        source: what is compared with.
        exact, rounded: the same in FP64 and in FP32, whose distance is the noise floor of each tensor. Their tensors
            have the names of those of `source`.
        precision: of `source`: "fp64" where it is the exact one itself.
        model: its file, where it is an ONNX file.
    """

    source: TraceSource
    exact: TraceSource
    rounded: TraceSource
    precision: str
    model: OnnxModel | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A reference that has run. `floors`: relative L2 between FP32 and FP64, by tensor."""

    origin: Origin
    side: Side
    floors: Mapping[str, float]

    def budgets(self, precision: str, *, num_quantised: int) -> dict[str, float]:
        """How far an artifact of `precision` may be from each tensor, by the model that its outputs are judged by."""
        return {
            name: tolerance_for(precision, floor, num_quantised=num_quantised).rel_l2
            for name, floor in self.floors.items()
        }


def trace_side(source: TraceSource, calls: Calls) -> Side:
    """Run it and record every tensor."""
    recorder = Recorder()
    source.trace(calls, recorder)
    return Side(source.nodes, recorder.records)


def trace_reference(origin: Origin, calls: Calls) -> Reference:
    """Run a reference in FP64 and in FP32, and itself where it is neither.

    The floor of a tensor is the largest up to it in the order of the run, and no less than a unit in the last place:
    rounding errors are passed on, so that a tensor that came out well by luck has no smaller budget than its inputs.
    """
    exact, rounded = trace_side(origin.exact, calls), trace_side(origin.rounded, calls)
    side = exact if origin.source is origin.exact else trace_side(origin.source, calls)
    floors, largest = {}, FP32_FLOOR
    for name, record in exact.records.items():
        if name not in rounded.records or record.constant:
            floors[name] = FP32_FLOOR
            continue
        gap = distance(rounded.records[name], record)
        if gap < 1:  # beyond it is no rounding: not finite, or a difference of nearly equal numbers
            largest = max(largest, gap)
        floors[name] = largest
    return Reference(origin=origin, side=side, floors={name: floors.get(name, largest) for name in side.records})
