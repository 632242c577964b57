"""From candidate files to the one that ships: judged on its engine, searched for where the first is not good enough."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx

from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.errors import InputError, RuntimeUnavailableError
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
from cspdeploy.quant.prove import PlacementProof, is_for_another_cpu, prove_placement
from cspdeploy.quant.scheme import Scheme
from cspdeploy.quant.search import search
from cspdeploy.quant.select import Selection
from cspdeploy.quant.sensitivity import measure_sensitivity
from cspdeploy.quant.write import write_qdq
from cspdeploy.runtimes import require_runtime

__all__ = ["Candidates", "decide", "require_measurable", "runs_here"]

Progress = Callable[[str, int, int], None]
Evaluate = Callable[[Scheme], Judgement]

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

    def simulate(self, scheme: Scheme) -> Judgement:
        """What is known of it without its engine."""
        known = scheme == self.selection.scheme
        sqnr = self.selection.sqnr_db if known else self.assembly.sqnr_db(self.assembly.plan(scheme))
        boxes = None if self.assembly.detection is None else self.assembly.match_boxes(self.plan(scheme))
        return Judgement(sqnr_db=sqnr, num_images=self.assembly.num_held_out, boxes=boxes)

    def prove(self, scheme: Scheme, path: Path) -> PlacementProof:
        """What the engine runs of it."""
        return prove_placement(path, self.assembly.layout(scheme), self.assembly.placement)


def decide(
    candidates: Candidates, source: Path, target: Path, *, budget: Budget, labelled: LabelledImages | None,
    time_limit_s: float, progress: Progress,
) -> StepRecord:  # fmt: skip
    """Judge the selected scheme on the engine; search where it falls short; ship what earns its place.

    Where the engine is not here, simulations are judged, and the record says that nothing was proven.
    """
    assembly, scheme = candidates.assembly, candidates.selection.scheme
    found: SearchResult | None = None
    with _evaluation(candidates, source, labelled, budget, progress) as evaluate:
        judgement = evaluate(scheme)
        if not judgement.meets(budget):
            asked = budget.limits_accuracy or budget.limits_latency
            limit_s = time_limit_s if asked else min(time_limit_s, UNASKED_SEARCH_S)
            found = _Search(candidates, evaluate, progress).run(judgement, budget, limit_s)
    if found is not None and found.chosen is not None:
        scheme, judgement = found.chosen.scheme, found.chosen.judgement
    path = candidates.write(scheme)
    proof = candidates.prove(scheme, path)
    facts = list_facts(
        assembly, candidates.selection, scheme=scheme, judgement=judgement, proof=proof, found=found, budget=budget
    )
    earned, why = earns_its_place(judgement, budget)
    if found is not None and found.chosen is None:
        return StepRecord(name="int8", outcome="kept", detail=found.reason, facts=facts)
    if not earned:
        return StepRecord(name="int8", outcome="kept", detail=f"no INT8 file: {why}", facts=facts)
    shutil.move(path, target)
    detail = describe(assembly, candidates.selection, scheme=scheme, judgement=judgement, proof=proof)
    return StepRecord(name="int8", outcome="done", detail=detail, facts=facts)


@contextmanager
def _evaluation(
    candidates: Candidates, source: Path, labelled: LabelledImages | None, budget: Budget, progress: Progress
) -> Iterator[Evaluate]:
    """On the placement's engine, or simulated where it is not here."""
    assembly = candidates.assembly
    if not runs_here(assembly.placement):
        yield candidates.simulate
        return
    marked = None if labelled is None else Labelled(images=labelled, contract=assembly.images.contract)
    with Judge(
        source, assembly.judged_batches, runtime=assembly.placement.runtime or "", labelled=marked,
        detection=assembly.detection, exact_latency=budget.limits_latency, progress=progress,
    ) as judge:  # fmt: skip
        yield lambda scheme: judge.judge(candidates.write(scheme))


def require_measurable(budget: Budget, placement: Placement, *, points: bool = True, decisions: bool = True) -> None:
    """A budget that nothing here can measure would be met by whatever there is.

    Args:
        points: those of top-1 are counted on the placement's engine too.
        decisions: they as well; a detector's boxes can be simulated.

    Raises:
        InputError: a latency, points of top-1 or a share of decisions are asked for an engine that is not here or is
            not timed.
    """
    here = runs_here(placement)
    if budget.limits_latency and not (here and require_runtime(placement.runtime or "").timed):
        raise InputError(
            f"--max-latency: {placement.name} cannot be timed on this machine",
            fix="leave it out, or export where its engine is installed",
        )
    if points and budget.max_drop_points is not None and not here:
        raise InputError(
            f"--max-drop {budget.max_drop_points:g}: top-1 is counted on {placement.name}, which this machine has not",
            fix="an SQNR: --max-drop 36dB, or export where its engine is installed",
        )
    if decisions and budget.max_changed_percent is not None and not here:
        raise InputError(
            f"--max-drop {budget.max_changed_percent:g}%: first classes are counted on {placement.name}, which this "
            "machine has not", fix="an SQNR: --max-drop 36dB, or export where its engine is installed",
        )  # fmt: skip


def runs_here(placement: Placement) -> bool:
    """Whether the placement's engine can be used on this machine, on the CPU that it is meant for."""
    if placement.runtime is None or is_for_another_cpu(placement):
        return False
    try:
        require_runtime(placement.runtime)
    except RuntimeUnavailableError:
        return False
    return True


class _Search:
    def __init__(self, candidates: Candidates, evaluate: Evaluate, progress: Progress) -> None:
        self._candidates, self._evaluate, self._progress = candidates, evaluate, progress
        # A plan with islands is made anew, without the slow rounding.
        self._start = dataclasses.replace(candidates.selection.scheme, rounded=False)
        assembly = candidates.assembly
        self._sensitivity = measure_sensitivity(
            assembly.graph, candidates.selection.plan, assembly.held_out_batches(),
            groups=assembly.layout(self._start).groups,
            float_values=assembly.equalisation(self._start.exponent).values, view=assembly.view, progress=progress,
        )  # fmt: skip

    def run(self, first: Judgement, budget: Budget, limit_s: float) -> SearchResult:
        layers = self._sensitivity.layers
        known = {self._start: first} if self._start == self._candidates.selection.scheme else {}

        def evaluate(scheme: Scheme) -> Judgement:
            return known[scheme] if scheme in known else self._evaluate(scheme)

        return search(
            [self._start], list_islands(layers), evaluate=evaluate,
            forecast=Forecast(noise=self._noise, cost=lambda floats: float_cost(layers, floats)),
            budget=budget, deadline_s=limit_s, progress=self._progress,
        )  # fmt: skip

    def _noise(self, floats: frozenset[str]) -> float:
        layout = self._candidates.assembly.layout(dataclasses.replace(self._start, floats=floats))
        return self._sensitivity.noise(tensors=layout.tensors, nodes=layout.nodes)
