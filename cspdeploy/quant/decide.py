"""From candidate files to the one that ships: judged on its engine, searched for where the first is not good enough."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx

from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.errors import RuntimeUnavailableError
from cspdeploy.core.types import StepRecord
from cspdeploy.export.rewrite import write_model
from cspdeploy.quant.assemble import Assembly
from cspdeploy.quant.budget import Budget, Judgement, earns_its_place
from cspdeploy.quant.describe import describe, list_facts
from cspdeploy.quant.islands import Forecast, float_cost, list_islands
from cspdeploy.quant.judge import Judge, Labelled
from cspdeploy.quant.outcome import SearchResult
from cspdeploy.quant.placements import Placement
from cspdeploy.quant.plan import QuantPlan
from cspdeploy.quant.prove import PlacementProof, prove_placement
from cspdeploy.quant.scheme import Scheme
from cspdeploy.quant.search import search
from cspdeploy.quant.select import Selection
from cspdeploy.quant.sensitivity import measure_sensitivity
from cspdeploy.quant.write import write_qdq
from cspdeploy.runtimes import require_runtime

__all__ = ["Candidates", "decide", "runs_here"]

Progress = Callable[[str, int, int], None]

UNASKED_SEARCH_S = 120.0
"""Of a search that no budget asks for, where the file is slower than FP32."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidates:
    """Makes the file of a scheme.

    Attributes:
        model: as `prepare_float` leaves it.
        work: folder for files that come and go.
    """

    model: onnx.ModelProto
    assembly: Assembly
    selection: Selection
    work: Path

    def plan(self, scheme: Scheme) -> QuantPlan:
        """That of the selection, or one made anew."""
        return self.selection.plan if scheme == self.selection.scheme else self.assembly.plan(scheme)

    def write(self, scheme: Scheme) -> Path:
        """The file, overwritten by the next."""
        path = self.work / "candidate.onnx"
        write_model(write_qdq(self.model, self.plan(scheme)), path)
        return path

    def prove(self, scheme: Scheme, path: Path) -> PlacementProof:
        """What the engine runs of it."""
        return prove_placement(path, self.assembly.layout(scheme), self.assembly.placement)


def decide(
    candidates: Candidates, source: Path, target: Path, *, budget: Budget, labelled: LabelledImages | None,
    time_limit_s: float, progress: Progress,
) -> StepRecord:  # fmt: skip
    """Judge the selected scheme on the engine; search where it falls short; ship what earns its place.

    Where the engine is not here, the simulation is judged, and the record says that nothing was proven.
    """
    assembly, scheme = candidates.assembly, candidates.selection.scheme
    found: SearchResult | None = None
    path = candidates.write(scheme)
    if not runs_here(assembly.placement):
        num_images = sum(len(batch) for batch in assembly.held_out_batches())
        judgement = Judgement(sqnr_db=candidates.selection.sqnr_db, num_images=num_images)
    else:
        marked = None if labelled is None else Labelled(images=labelled, contract=assembly.images.contract)
        with Judge(
            source, assembly.held_out_batches, runtime=assembly.placement.runtime or "", labelled=marked,
            progress=progress,
        ) as judge:  # fmt: skip
            judgement = judge.judge(path)
            if not judgement.meets(budget):
                limit_s = time_limit_s if str(budget) else min(time_limit_s, UNASKED_SEARCH_S)
                found = _Search(candidates, judge, progress).run(judgement, budget, limit_s)
    if found is not None and found.chosen is not None:
        scheme, judgement = found.chosen.scheme, found.chosen.judgement
        path = candidates.write(scheme)
    proof = candidates.prove(scheme, path)
    facts = list_facts(assembly, candidates.selection, scheme=scheme, judgement=judgement, proof=proof, found=found)
    earned, why = earns_its_place(judgement, budget)
    if found is not None:
        earned, why = found.chosen is not None, found.reason
    if not earned:
        return StepRecord(name="int8", outcome="kept", detail=f"no INT8 file: {why}", facts=facts)
    shutil.move(path, target)
    detail = describe(assembly, candidates.selection, scheme=scheme, judgement=judgement, proof=proof)
    return StepRecord(name="int8", outcome="done", detail=detail, facts=facts)


def runs_here(placement: Placement) -> bool:
    """Whether the placement's engine can be used on this machine."""
    if placement.runtime is None:
        return False
    try:
        require_runtime(placement.runtime)
    except RuntimeUnavailableError:
        return False
    return True


class _Search:
    def __init__(self, candidates: Candidates, judge: Judge, progress: Progress) -> None:
        self._candidates, self._judge, self._progress = candidates, judge, progress
        # A plan with islands is made anew, without the slow rounding.
        self._start = dataclasses.replace(candidates.selection.scheme, rounded=False)
        assembly = candidates.assembly
        self._sensitivity = measure_sensitivity(
            assembly.graph, candidates.selection.plan, assembly.held_out_batches(),
            groups=assembly.layout(self._start).groups,
            float_values=assembly.equalisation(self._start.exponent).values, progress=progress,
        )  # fmt: skip

    def run(self, first: Judgement, budget: Budget, limit_s: float) -> SearchResult:
        layers = self._sensitivity.layers
        known = {self._start: first} if self._start == self._candidates.selection.scheme else {}

        def evaluate(scheme: Scheme) -> Judgement:
            return known[scheme] if scheme in known else self._judge.judge(self._candidates.write(scheme))

        return search(
            [self._start], list_islands(layers), evaluate=evaluate,
            forecast=Forecast(noise=self._noise, cost=lambda floats: float_cost(layers, floats)),
            budget=budget, deadline_s=limit_s, progress=self._progress,
        )  # fmt: skip

    def _noise(self, floats: frozenset[str]) -> float:
        layout = self._candidates.assembly.layout(dataclasses.replace(self._start, floats=floats))
        return self._sensitivity.noise(tensors=layout.tensors, nodes=layout.nodes)
