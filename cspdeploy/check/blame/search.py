"""`cspdeploy blame`: trace both sides, pair their tensors, name the first node that is wrong, measure it exactly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cspdeploy.check.blame.counterparts import NEAR, Pair, Side, find_counterparts
from cspdeploy.check.blame.describe import Describer
from cspdeploy.check.blame.finding import BlamedNode, BlameReport
from cspdeploy.check.blame.judge import Suspect, find_outlier, find_suspect, sound_tensors
from cspdeploy.check.blame.measure import exact_distance, introduced_errors
from cspdeploy.check.blame.onnx_source import OnnxSource
from cspdeploy.check.blame.operators import hands_on
from cspdeploy.check.blame.prepare import BlameRequest, Prepared, prepare
from cspdeploy.check.blame.reference import Reference, trace_reference, trace_side
from cspdeploy.check.blame.sketch import distance
from cspdeploy.core.catalog import INT8_LIMIT
from cspdeploy.core.metrics import sqnr_db
from cspdeploy.core.quantised import count_quantised
from cspdeploy.core.results import LayerCurve, LayerError
from cspdeploy.core.trace import TraceSource
from cspdeploy.runtimes.ort_graph import write_optimised

__all__ = ["blame", "layer_curve"]

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]
NUM_WORST = 3
CURVE_INPUTS = 2
"""Of a curve: each of its points is made of thousands of values of one image, and two show whether images differ."""
_PRECISIONS = ("fp64", "fp32", "fp16", "int8")  # from the finest to the coarsest
_STEPS = 4

Verdict = Literal["within", "introduced", "accumulated"]


def _silent(_what: str, _done: int, _total: int) -> None:
    pass


def blame(request: BlameRequest, *, progress: Progress = _silent) -> BlameReport:
    """Find the first node, in graph order, whose output leaves the reference by more than its budget.

    Raises:
        InputError: a file that cannot be read or run, or no reference.
        RuntimeUnavailableError: a runtime that is needed is missing.
        TamperedError: a file of a bundle is not that of its manifest.
    """
    with TemporaryDirectory(prefix="cspdeploy-blame-") as folder:
        progress("open both sides", 0, _STEPS)
        prepared = prepare(request, folder=Path(folder))
        progress("trace the reference in FP64 and FP32", 1, _STEPS)
        reference = trace_reference(prepared.origin, prepared.reference_calls)
        return _Search(prepared, reference, Path(folder), request.budget_bytes, progress).report()


def layer_curve(request: BlameRequest, *, progress: Progress = _silent) -> LayerCurve:
    """Error of every node of an artifact that has a counterpart, in graph order, over a few of the inputs.

    Distances are estimated from sketches, within about 3 %, which is 0.3 dB.

    Raises:
        InputError, RuntimeUnavailableError, TamperedError: as `blame`.
    """
    with TemporaryDirectory(prefix="cspdeploy-blame-") as folder:
        progress("open both sides", 0, _STEPS)
        few = request if request.max_inputs is not None else dataclasses.replace(request, max_inputs=CURVE_INPUTS)
        prepared = prepare(few, folder=Path(folder))
        progress("trace the reference in FP64 and FP32", 1, _STEPS)
        reference = trace_reference(prepared.origin, prepared.reference_calls)
        search = _Search(prepared, reference, Path(folder), request.budget_bytes, progress)
        traced = search.trace(prepared.source)
        layers = []
        for node in traced.side.nodes:
            pair = traced.first_pair(node.outputs)
            if pair is not None and not hands_on(node.operator) and math.isfinite(pair.distance):
                layers.append(LayerError(
                    node=node.name, operator=node.operator, module=search.describer(traced).module(node),
                    rel_l2=pair.distance, sqnr_db=sqnr_db(pair.distance),
                ))  # fmt: skip
        return LayerCurve(
            artifact=prepared.named.title, runtime=prepared.runtime.name, against=prepared.origin.source.title,
            layers=tuple(layers),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Traced:
    """An artifact that has run, with its counterparts."""

    source: TraceSource
    side: Side
    pairs: Mapping[str, Pair]

    def first_pair(self, names: Iterable[str]) -> Pair | None:
        return next((self.pairs[name] for name in names if name in self.pairs and self.side.is_data(name)), None)


class _Search:
    def __init__(
        self, prepared: Prepared, reference: Reference, folder: Path, budget_bytes: int, progress: Progress
    ) -> None:
        self._prepared, self._reference, self._folder = prepared, reference, folder
        self._budget_bytes, self._progress = budget_bytes, progress
        self._precision = max(prepared.named.precision, prepared.origin.precision, key=_PRECISIONS.index)
        onnx = [item for item in (prepared.named.path,) if prepared.named.format == "onnx"]
        self._num_quantised = count_quantised(onnx[0]) if onnx and self._precision == "int8" else 0
        self._budgets = reference.budgets(self._precision, num_quantised=self._num_quantised)
        outputs = reference.origin.source.outputs
        for place, gain in prepared.gains.items() if self._precision == "int8" else ():
            if place < len(outputs) and outputs[place] in self._budgets:
                self._budgets[outputs[place]] = min(gain * self._budgets[outputs[place]], INT8_LIMIT)

    def describer(self, traced: _Traced) -> Describer:
        return Describer(
            source=traced.source, side=traced.side, pairs=traced.pairs, origin=self._prepared.origin,
            reference=self._reference.side, budgets=self._budgets, calls=self._prepared.calls,
            reference_calls=self._prepared.reference_calls, half=self._precision == "fp16",
        )  # fmt: skip

    def trace(self, source: TraceSource) -> _Traced:
        self._progress(f"trace {source.title}", 2, _STEPS)
        side = trace_side(source, self._prepared.calls)
        pairs = find_counterparts(side, self._reference.side, budgets=self._budgets)
        self._pair_outputs(source, side, pairs)
        # What is far from its counterpart while all that is computed from it is right was paired with the wrong one:
        # half of a tensor that was split with a whole of the same size, for one. Not so what has the same name and
        # is near: rounding to 8 bits puts a tensor beyond its budget that the next layer averages out.
        sound = sound_tensors(side, pairs, self._budgets)
        wrong = {
            name for name, pair in pairs.items()
            if name in sound and name not in source.outputs and pair.distance > self._budgets[pair.reference]
            and (pair.how != "name" or not pair.distance < NEAR)
        }  # fmt: skip
        return _Traced(source=source, side=side, pairs={name: pairs[name] for name in pairs if name not in wrong})

    def _pair_outputs(self, source: TraceSource, side: Side, pairs: dict[str, Pair]) -> None:
        """Outputs go by their place, whatever they are called and hold."""
        for ours, theirs in zip(source.outputs, self._reference.origin.source.outputs, strict=False):
            if ours in side.records and theirs in self._reference.side.records:
                gap = distance(side.records[ours], self._reference.side.records[theirs])
                pairs[ours] = Pair(tensor=ours, reference=theirs, distance=gap, how="name")

    def report(self) -> BlameReport:
        traced = self.trace(self._prepared.source)
        broken = self._broken_outputs(traced)
        optimised, notes = False, list(self._prepared.notes)
        if not broken and isinstance(traced.source, OnnxSource) and self._prepared.runtime.name.startswith("ort-"):
            gap = self._optimised_break(traced.source)
            if gap:
                optimised = True
                notes.append(f"only with the engine's own rewrites are the outputs wrong ({gap})")
                traced = self.trace(self._optimised_source())
                broken = self._broken_outputs(traced)
        introduced = self._introduced(traced) if self._precision == "int8" else {}
        suspect = self._suspect(traced, introduced) if broken else None
        outlier = find_outlier(traced.side, introduced) if introduced and not broken else None
        if outlier is not None:
            notes.append(f"{traced.side.made_by[outlier].name} introduces far more error than others of its kind")
        return self._written(traced, suspect, introduced, optimised=optimised, notes=notes)

    def _broken_outputs(self, traced: _Traced) -> list[str]:
        pairs = [traced.pairs[name] for name in traced.source.outputs if name in traced.pairs]
        return [pair.tensor for pair in pairs if not pair.distance <= self._budgets[pair.reference]]

    def _optimised_break(self, source: OnnxSource) -> str:
        """How far the engine's rewrites move outputs that are right without them; empty where within the budgets."""
        plain, rewritten = (source.final_outputs(self._prepared.calls, optimise=on) for on in (False, True))
        for ours, theirs in zip(source.outputs, self._reference.origin.source.outputs, strict=False):
            gap = exact_distance([call[ours] for call in rewritten], [call[ours] for call in plain])
            if not gap <= self._budgets[theirs]:
                return f"{ours}: moved by relative L2 {gap:.1e}, limit {self._budgets[theirs]:.1e}"
        return ""

    def _optimised_source(self) -> OnnxSource:
        path = self._folder / "optimised.onnx"
        write_optimised(self._prepared.named.path, path)
        title = f"{self._prepared.named.title} on {self._prepared.runtime.name}, optimised"
        return OnnxSource(
            path, self._prepared.runtime, title=title, folder=self._folder, budget_bytes=self._budget_bytes
        )

    def _suspect(self, traced: _Traced, introduced: Mapping[str, float]) -> Suspect | None:
        outlier = find_outlier(traced.side, introduced) if introduced else None
        if outlier is not None:
            return Suspect(traced.side.made_by[outlier])
        sound = sound_tensors(traced.side, traced.pairs, self._budgets)
        return find_suspect(traced.side, traced.pairs, sound, outputs=traced.source.outputs)

    def _introduced(self, traced: _Traced, names: Sequence[str] | None = None) -> dict[str, float]:
        """Of the tensors asked for, or of all that have a counterpart of their size."""
        wanted = list(traced.side.records if names is None else names)
        usable = [
            name for name in wanted if name in traced.pairs and name in traced.side.made_by
            and traced.side.records[name].size == self._reference.side.records[traced.pairs[name].reference].size
        ]  # fmt: skip
        constant = [name for name in usable if traced.side.records[name].constant]
        found = introduced_errors(
            traced.source, self._reference.origin.source, self._prepared.calls,
            reference_calls=self._prepared.reference_calls, sides=(traced.side, self._reference.side),
            pairs=traced.pairs, targets=[name for name in usable if name not in constant],
            progress=lambda done, total: self._progress("feed nodes with the reference's tensors", done, total),
        )  # fmt: skip
        found |= {name: traced.pairs[name].distance for name in constant}
        return {name: found[name] for name in usable if name in found}

    def _worst_nodes(self, traced: _Traced, introduced: Mapping[str, float]) -> list[Suspect]:
        """Of an INT8 file those that introduce most; else those whose outputs are furthest beyond their budgets."""
        ranks = []
        for node in traced.side.nodes:
            pair = traced.first_pair(node.outputs)
            made = [introduced[name] for name in node.outputs if name in introduced]
            if made:
                ranks.append((made[0], node))
            elif pair is not None and not introduced and not hands_on(node.operator):
                ranks.append((pair.distance / self._budgets[pair.reference], node))
        ranks.sort(key=lambda item: -item[0])
        return [Suspect(node) for _, node in ranks[:NUM_WORST]]

    def _written(
        self,
        traced: _Traced,
        suspect: Suspect | None,
        introduced: Mapping[str, float],
        *,
        optimised: bool,
        notes: Sequence[str],
    ) -> BlameReport:
        self._progress("measure exactly", 3, _STEPS)
        shown = [*([suspect] if suspect else []), *self._worst_nodes(traced, introduced)]
        names = [name for item in shown for node in (item.node, *item.also) for name in node.outputs[:1]]
        alone = introduced or self._introduced(traced, list(dict.fromkeys(names)))
        describer = self.describer(traced)
        described, outputs = describer.describe(shown, alone, outputs=traced.source.outputs)
        blamed = described[0] if suspect else None
        verdict: Verdict = "within" if blamed is None else "introduced" if _introduces(blamed) else "accumulated"
        return BlameReport(
            verdict=verdict, summary=_summary(verdict, blamed, traced.source.title, describer.nearest_output(outputs)),
            artifact=self._prepared.named.title, runtime=self._prepared.runtime.name,
            against=self._prepared.origin.source.title, precision=self._precision,
            num_inputs=self._prepared.num_inputs, outputs=outputs, blamed=blamed,
            worst=tuple(described[1 if suspect else 0 :]),
            num_compared=sum(traced.side.is_data(name) for name in traced.pairs),
            num_tensors=sum(traced.side.is_data(name) for name in traced.side.records),
            optimised=optimised, notes=tuple(notes),
        )  # fmt: skip


def _introduces(node: BlamedNode) -> bool:
    """Whether the node makes at least half of the error itself, or an error that is beyond its budget by itself."""
    errors = [item for item in node.outputs if item.rel_l2 is not None]
    if node.introduced is None or not errors:
        return all((item.rel_l2 or 0.0) <= (item.budget or math.inf) for item in node.inputs)
    own, made = errors[0].rel_l2 or 0.0, node.introduced
    return bool(made >= own / 2 or made > (errors[0].budget or math.inf) or not np.isfinite(made))


def _summary(verdict: Verdict, blamed: BlamedNode | None, title: str, output: str) -> str:
    if blamed is None:
        return f"nothing to blame: {title} is within its limits ({output})"
    where = f" of {blamed.module}" if blamed.module else ""
    name = f"{blamed.node} ({blamed.operator}{where})"
    if verdict == "accumulated":
        return f"{name} is the first node beyond its budget, by error that has accumulated before it"
    if blamed.also:
        return f"the error comes in at {name} or at the {len(blamed.also)} nodes after it that are named below"
    return f"{name} introduces the error"
