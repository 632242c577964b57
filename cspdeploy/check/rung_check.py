"""One rung of the ladder: a session becomes a row. Shapes: N images or other inputs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.check.accuracy import measure_accuracy, measure_boxes
from cspdeploy.check.audit import INT8_WEIGHTS, audit_onnx
from cspdeploy.check.frontend_rows import network_outputs, pixels_of
from cspdeploy.check.judging import (
    detects,
    joint_distance,
    judge_outputs,
    limits_of,
    rows_of_first_call,
    subject_of_first_call,
)
from cspdeploy.check.opening import CheckedSession
from cspdeploy.check.phases import Phases
from cspdeploy.check.placement import find_placement, strict_problem
from cspdeploy.check.placement_reasons import why_elsewhere
from cspdeploy.check.repeats import Repeated, check_repeats, num_repeats
from cspdeploy.check.rounding import ROUNDING_RUNTIME, RoundingReference, computes_half
from cspdeploy.check.rungs import Rung
from cspdeploy.check.settings import Progress, VerifySettings
from cspdeploy.check.subject import Candidate, Subject
from cspdeploy.check.worker import WorkerCrashedError, WorkerHungError
from cspdeploy.core.catalog import ACCURACY_BUDGET, ARTIFACT_KINDS
from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.detection.labelled import LabelledBoxes
from cspdeploy.core.errors import CspDeployError, DeviceMemoryError, InputError
from cspdeploy.core.onnx_graph import read_onnx
from cspdeploy.core.results import ParityRow, PrecisionAudit, Verdict
from cspdeploy.core.sizes import base_kind
from cspdeploy.runtimes.base import Outputs

__all__ = ["RungCheck", "failed_row", "run_all"]

MAX_REASON = 300


def run_all(session: CheckedSession, subject: Subject, made: Candidate) -> Outputs:
    """All inputs of the subject, in as many calls as the candidate needs; outputs joined along the first axis."""
    parts = []
    for feeds, count in subject.calls(made):
        outputs = session.run(feeds)
        parts.append(outputs if count is None else {name: array[:count] for name, array in outputs.items()})
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def failed_row(row: ParityRow, error: Exception) -> ParityRow:
    """The row of a rung whose engine raised `error`: it crashed, it hung, or it cannot do it."""
    verdict: Verdict = "error"
    if isinstance(error, WorkerCrashedError):
        verdict = "crash"
    elif isinstance(error, WorkerHungError):
        verdict = "hang"
    text = error.message if isinstance(error, CspDeployError) else str(error)
    reason = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, DeviceMemoryError) and error.fix:
        reason += f" (fix: {error.fix})"  # the batch that may fit
    if verdict == "hang":
        reason += "; more time: --time-limit"
    return dataclasses.replace(row, verdict=verdict, reason=reason[:MAX_REASON])


@dataclass(slots=True)
class RungCheck:
    """Judges the sessions of one subject."""

    subject: Subject
    settings: VerifySettings
    phases: Phases
    progress: Progress
    rounding: RoundingReference = field(init=False)
    _audits: dict[str, Future[PrecisionAudit]] = field(default_factory=dict)
    _auditor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def __post_init__(self) -> None:
        self.rounding = RoundingReference(self.settings)

    def check(self, row: ParityRow, rung: Rung, session: CheckedSession) -> ParityRow:
        """Fill the row from an open session. Whatever the engine raises passes through."""
        made = rung.candidate
        placed = find_placement(
            rung.runtime, counts=session.placement, nodes=session.nodes, num_copies=session.num_copies
        )
        row = dataclasses.replace(
            row, placement=dict(placed.counts), nodes_elsewhere=placed.elsewhere, num_copies=placed.num_copies,
            settings=dict(session.settings),
        )  # fmt: skip
        row = _noted(row, *why_elsewhere(rung.runtime, placed, nodes=session.nodes, path=made.path))
        row, repeated = self._first_runs(row, rung, session)
        # While the golden images are computed, and not before: a cold start is timed with the machine to itself.
        if self.settings.audit and made.format == "onnx" and made.artifact not in self._audits:
            feeds = self.subject.first_call(made)
            self._audits[made.artifact] = self._auditor.submit(
                audit_onnx, made.path, declared=_declared(made), feeds=feeds
            )
        row = self._compare(row, rung, session)
        row = self._audit(_with_repeats(row, repeated), made)
        if self.settings.accuracy is not None and not row.failed:
            with self.phases("accuracy"):
                row = self._measure_accuracy(row, rung, session, self.settings.accuracy)
        if not row.failed and self.settings.strict_placement and (problem := strict_problem(rung.runtime, placed)):
            row = dataclasses.replace(row, verdict="placement", reason=problem)
        return row

    def _first_runs(self, row: ParityRow, rung: Rung, session: CheckedSession) -> tuple[ParityRow, Repeated | None]:
        """The very first runs of the session, on one input: cold start, memory, and whether they are all alike."""
        made, timed = rung.candidate, self.settings.latency is not None and rung.runtime.timed
        num_runs = num_repeats(rung.runtime, self.settings.repeats)
        if not timed and not num_runs:
            return row, None
        feeds = self.subject.first_call(made)
        with self.phases("run"):
            first, cold, memory = session.first_result(feeds)
        if timed:
            row = dataclasses.replace(row, cold=cold, memory=memory)
        if not num_runs:
            return row, None
        alone = subject_of_first_call(self.subject, made)
        limits = limits_of(made, alone, self.settings)

        def judge(outputs: Outputs) -> tuple[Verdict, str]:
            own = rows_of_first_call(outputs, subject=self.subject, made=made)
            found = judge_outputs(own, made=made, subject=alone, limits=limits)
            return found.verdict, found.reason

        def progress(done: int, total: int) -> None:
            self.progress(f"repeats of {made.artifact} on {rung.runtime.name}", done, total)

        with self.phases("repeats"):
            run = functools.partial(session.run, feeds)
            return row, check_repeats(run, first, num_runs=num_runs, judge=judge, progress=progress)

    def wrong_inputs(self, made: Candidate) -> str:
        """Why the file's inputs are not those that the manifest lists, or empty. Read from the file, not the engine."""
        if made.format != "onnx" or not made.inputs:
            return ""
        try:
            names = [value.name for value in read_onnx(made.path).graph.inputs]
        except (InputError, OSError):
            return ""  # the engine says what is wrong with it
        expected = [value.name for value in made.inputs]
        return "" if names == expected else f"inputs are {names}, expected {expected}"

    def _compare(self, row: ParityRow, rung: Rung, session: CheckedSession) -> ParityRow:
        subject, made = self.subject, rung.candidate
        with self.phases("run"):
            outputs = run_all(session, subject, made)
        with self.phases("compare"):
            limits = limits_of(made, subject, self.settings)
            found = judge_outputs(outputs, made=made, subject=subject, limits=limits)
        numbers = found.rel_l2 is not None or not detects(subject)  # of boxes that are wrong in form there are none
        row = dataclasses.replace(
            row, verdict=found.verdict, reason=found.reason, rel_l2=found.rel_l2, max_abs=found.max_abs,
            limit=found.limit, limits=tuple(limits.values()) if numbers else (), sqnr_db=found.sqnr_db,
            top1_agreement=found.top1_agreement, top5_agreement=found.top5_agreement,
            decisions=found.decisions, error_histogram=found.error_histogram, num_images=subject.num_inputs,
            box_recall=found.box_recall, box_precision=found.box_precision, num_boxes=found.num_boxes,
            boxes=found.boxes,
        )  # fmt: skip
        row = _noted(row, found.note)
        return self._compare_rounding(row, rung, network_outputs(outputs, made))

    def _compare_rounding(self, row: ParityRow, rung: Rung, outputs: Outputs) -> ParityRow:
        """Of an engine that computes in FP16: its distance to the arithmetic that rounds after every node."""
        made = rung.candidate
        if rung.runtime.name == ROUNDING_RUNTIME:
            self.rounding.keep(made, outputs)
        if row.rel_l2 is None or not computes_half(rung.runtime, made):
            return row
        with self.phases("rounding"):
            distance, problem = self.rounding.distance(made, outputs, self._network_outputs_of(made))
        row = dataclasses.replace(row, rounding_rel_l2=distance)
        return _noted(row, f"not compared with FP16 rounding after every node: {problem}" if problem else "")

    def _network_outputs_of(self, made: Candidate) -> Callable[[CheckedSession], Outputs]:
        return lambda session: network_outputs(run_all(session, self.subject, made), made)

    def _audit(self, row: ParityRow, made: Candidate) -> ParityRow:
        """What the file is; the same on every runtime, so looked at once."""
        if made.artifact not in self._audits:
            return row
        try:
            with self.phases("audit"):
                audit = self._audits[made.artifact].result()
        except InputError:
            return row  # the engine took the file, so that this is a matter of the reader
        row = dataclasses.replace(row, audit=audit)
        if not audit.problem:
            return row
        # A file that is not what it is called cannot be judged by the limits of what it is called.
        reason = f"{audit.problem}; besides: {row.reason}" if row.failed else audit.problem
        return dataclasses.replace(row, verdict="precision", reason=reason)

    def _measure_accuracy(
        self, row: ParityRow, rung: Rung, session: CheckedSession, data: LabelledImages | LabelledBoxes
    ) -> ParityRow:
        manifest = self.subject.manifest
        if manifest is None:
            return row
        made = rung.candidate
        if made.frontend is not None and made.frontend.resize:  # the data set gives pictures that are resized already
            return _noted(row, "labelled accuracy is not measured where the graph resizes")
        name = next(iter(self.subject.feeds))

        def outputs_of(inputs: npt.NDArray[Any]) -> Outputs:
            fed = made if made.frontend is None else dataclasses.replace(made, pixels=inputs)
            images = dataclasses.replace(self.subject, feeds={name: inputs})
            return network_outputs(run_all(session, images, fed), made)

        def compute(inputs: npt.NDArray[Any]) -> npt.NDArray[np.generic]:
            return outputs_of(inputs)[made.network_names[0]]

        def progress(done: int, total: int) -> None:
            self.progress(f"accuracy of {made.artifact} on {rung.runtime.name}", done, total)

        if isinstance(data, LabelledBoxes):
            return self._measure_boxes(row, made, outputs_of, data, progress)
        found = measure_accuracy(compute, data, manifest.spec.preprocess, prepare=pixels_of(made), progress=progress)
        row = dataclasses.replace(row, top1=found.top1, top5=found.top5, accuracy_images=found.num_images)
        recorded = manifest.spec.provenance.accuracy
        if recorded is None or (recorded.dataset, recorded.num_images) != (found.dataset, found.num_images):
            return row
        budget = ACCURACY_BUDGET[made.precision]
        gap = abs(found.top1 - recorded.top1)
        if gap < budget or math.isclose(gap, budget):  # 0.9305 - 0.93 is more than 0.0005 in binary
            return row
        reason = f"top-1 {100 * found.top1:.2f} %, recorded {100 * recorded.top1:.2f} %, budget {100 * budget:g} points"
        return dataclasses.replace(row, verdict="accuracy", reason=reason)

    def _measure_boxes(
        self, row: ParityRow, made: Candidate, compute: Callable[[npt.NDArray[Any]], Outputs], data: LabelledBoxes,
        progress: Callable[[int, int], None],
    ) -> ParityRow:  # fmt: skip
        manifest = self.subject.manifest
        if manifest is None or manifest.spec.detection is None:
            return row
        decode = made.decode or manifest.spec.detection.network_decode
        ordered = data.in_order_of(self.subject.labels)
        found = measure_boxes(compute, ordered, manifest, decode=decode, prepare=pixels_of(made), progress=progress)
        row = dataclasses.replace(row, map50=found.map50, map=found.map, accuracy_images=found.num_images)
        if decode == "nms":
            rule = manifest.spec.detection.suppression
            words = f"mAP with the thresholds of the graph: score {rule.score_threshold:g}, IoU {rule.iou_threshold:g}"
            row = _noted(row, words)
        recorded = manifest.spec.provenance.accuracy
        if recorded is None or recorded.map50 is None or found.map50 is None:
            return row
        if (recorded.dataset, recorded.num_images) != (found.dataset, found.num_images):
            return row
        budget, gap = ACCURACY_BUDGET[made.precision], abs(found.map50 - recorded.map50)
        if decode == "nms" or gap < budget or math.isclose(gap, budget):  # other thresholds give another curve
            return row
        figures = f"mAP50 {100 * found.map50:.2f} %, recorded {100 * recorded.map50:.2f} %"
        return dataclasses.replace(row, verdict="accuracy", reason=f"{figures}, budget {100 * budget:g} points")

    def close(self) -> None:
        """Wait for what still runs."""
        self._auditor.shutdown(cancel_futures=True)

    def tf32_distance(self, session: CheckedSession, made: Candidate) -> float:
        """Relative L2 of all outputs together, of a session with TF32 on; infinite where they cannot be compared."""
        outputs = run_all(session, self.subject, made)
        return joint_distance(network_outputs(outputs, made), self.subject.outputs_fp64)


def _noted(row: ParityRow, *remarks: str) -> ParityRow:
    """With more to know of it."""
    return dataclasses.replace(row, note="; ".join(filter(None, (row.note, *remarks))))


def _with_repeats(row: ParityRow, repeated: Repeated | None) -> ParityRow:
    """What later runs of one input say: they fail a row that holds, and tell why one has numbers that are none."""
    if repeated is None:
        return row
    row = _noted(dataclasses.replace(row, repeats=repeated.figures), repeated.remark)
    if repeated.verdict == "pass":
        return row
    reason = f"{repeated.reason}; on all inputs: {row.reason}" if row.failed else repeated.reason
    return dataclasses.replace(row, verdict=repeated.verdict, reason=reason)


def _declared(made: Candidate) -> str:
    """What its kind promises of a file: of one whose weights alone are in 8 bits, nothing of the arithmetic."""
    kind = ARTIFACT_KINDS.get(base_kind(made.artifact))
    return INT8_WEIGHTS if kind is not None and kind.weights_only else made.precision
