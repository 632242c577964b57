"""The checks of a self-test: the same questions that `cspdeploy verify` asks, of the device alone.

Shapes: N images, C classes, k of a top-k output.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cspdeploy.core.compare import Comparison, compare_outputs
from cspdeploy.core.golden import Golden
from cspdeploy.core.graph_images import check_top_k, pixel_change, with_pixel_change
from cspdeploy.core.metrics import max_abs_difference
from cspdeploy.core.quantised import count_quantised, recorded_quantised
from cspdeploy.core.results import Limit
from cspdeploy.core.sizes import Size, size_label
from cspdeploy.core.tolerance import PREPROCESS_LIMIT, allowed_flips, limits_for, noise_floors
from cspdeploy.core.types import Artifact, Manifest
from cspdeploy.edge.calls import Calls
from cspdeploy.edge.images import Feed
from cspdeploy.edge.opening import OpenedArtifact
from cspdeploy.edge.selftest_report import CheckRow

if TYPE_CHECKING:
    from cspdeploy.core.detection.match import BoxMatch

__all__ = ["check_golden", "check_preprocess", "check_provider", "measure_median"]

Array = npt.NDArray[Any]

DRIFT_FACTOR = 2.0
"""How much worse than recorded an artifact may be here. Engines that round an INT8 network otherwise move its error by
a few per cent; kernels that saturate, or a scale that is off by a fifth, multiply it."""
MAX_ELSEWHERE = 0.5
"""Share of nodes that may run elsewhere than asked. An engine leaves shapes and a tail to the processor by design; with
more than half of the graph there it is the processor that computes the network."""
MAX_LISTED = 20
"""Nodes elsewhere that a report lists; their number is told."""

# Enough for a median of a few percent; a self-test is no benchmark, and the slowest device gets away with 3 runs.
MIN_RUNS, MAX_RUNS, MIN_S, MAX_S = 3, 200, 0.5, 10.0
WARM_UP_RUNS = 2


def check_preprocess(golden: Golden, manifest: Manifest, *, size_px: Size | None = None) -> CheckRow:
    """The stored images through this device's own preprocessing, against the stored inputs.

    Args:
        manifest: as if the bundle had the size of `golden` alone.
        size_px: that size, where it is not the bundle's first one; the row says so.
    """
    feed = Feed(contract=manifest.spec.preprocess)
    made = np.concatenate([feed.prepare(image) for image in golden.images])
    row = CheckRow(check="preprocess", artifact=size_label(size_px), verdict="pass", num_images=len(made))
    if made.shape != golden.x_NCHW.shape:
        reason = f"makes {list(made.shape)}, the golden inputs are {list(golden.x_NCHW.shape)}"
        return dataclasses.replace(row, verdict="fail", reason=reason)
    distance = max_abs_difference(made, golden.x_NCHW)
    if distance <= PREPROCESS_LIMIT:
        return dataclasses.replace(row, max_abs=distance)
    reason = (
        f"the same images give other inputs here, expected at most {PREPROCESS_LIMIT:g}: another Pillow or contract"
    )
    return dataclasses.replace(row, verdict="fail", reason=reason, max_abs=distance)


def check_provider(opened: OpenedArtifact) -> CheckRow:
    """Where the session runs, read back from the engine. One that did not take the work has not been opened at all."""
    nodes = opened.session.nodes
    elsewhere = tuple(node for node in nodes if node.provider != opened.provider)
    row = CheckRow(
        check="provider", artifact=opened.kind, runtime=opened.runtime.name, verdict="pass", provider=opened.provider,
        placement=dict(opened.session.placement), nodes_elsewhere=elsewhere[:MAX_LISTED],
    )  # fmt: skip
    if not nodes:
        return dataclasses.replace(row, verdict="skip", reason="the engine does not tell where its nodes are")
    if not elsewhere:
        return row
    reason = f"{len(elsewhere)} of {len(nodes)} nodes elsewhere"
    if len(elsewhere) <= MAX_ELSEWHERE * len(nodes):
        return dataclasses.replace(row, reason=reason)
    return dataclasses.replace(row, verdict="fail", reason=f"{reason}, expected at most {100 * MAX_ELSEWHERE:g} %")


def check_golden(
    opened: OpenedArtifact, artifact: Artifact, golden: Golden, manifest: Manifest, *,
    recorded_rel_l2: float | None = None,
) -> CheckRow:  # fmt: skip
    """The golden images through the artifact, judged as `cspdeploy verify` judges it. Engines may raise anything.

    Args:
        recorded_rel_l2: of the same artifact on the same engine where the bundle was verified; then it must not have
            grown far beyond that either.
    """
    judge = _Judge(opened, artifact, golden, manifest)
    found, boxes = judge.compare(judge.inputs()), judge.boxes
    reason = "; ".join(filter(None, (found.reason, opened.note)))
    if found.verdict in ("numeric", "decision") and golden.images.ndim == 4 and judge.passes_swapped():
        reason += "; it passes with red and blue swapped: wrong channel order"
    row = CheckRow(
        check="golden", artifact=opened.kind, runtime=opened.runtime.name,
        verdict="pass" if found.verdict == "pass" else "fail", finding=found.verdict,
        boxes={} if boxes is None else {"expected": boxes.expected, "found": boxes.found, "matched": boxes.matched},
        reason=reason or opened.runtime.notes.get(opened.precision, ""), rel_l2=found.rel_l2, limit=found.limit,
        recorded_rel_l2=recorded_rel_l2, max_abs=found.max_abs, top1_agreement=found.top1_agreement,
        num_images=len(golden.images),
    )  # fmt: skip
    return row if recorded_rel_l2 is None or row.verdict == "fail" else _judge_drift(row, golden, recorded_rel_l2)


def _judge_drift(row: CheckRow, golden: Golden, recorded_rel_l2: float) -> CheckRow:
    """The limit of INT8 is wide, for it holds for any network; of this one it is known what it gave."""
    # What FP16 is allowed is lost in the difference between two builds of an engine, whatever was recorded.
    floor = max(limit.rel_l2 for limit in limits_for("fp16", noise_floors(golden)).values())
    allowed = max(DRIFT_FACTOR * recorded_rel_l2, floor)
    if row.rel_l2 is None or row.rel_l2 <= allowed:
        return row
    reason = (
        f"relative L2 {row.rel_l2:.1e}, and {recorded_rel_l2:.1e} where it was verified: expected at most {allowed:.1e}"
    )
    return dataclasses.replace(row, verdict="fail", finding="numeric", reason=reason)


class _Judge:
    def __init__(self, opened: OpenedArtifact, artifact: Artifact, golden: Golden, manifest: Manifest) -> None:
        self._opened, self._golden, self._manifest = opened, golden, manifest
        self._dtypes = {value.name: value.dtype for value in artifact.outputs}
        self._feed = Feed(contract=opened.contract, frontend=opened.frontend)
        self._limits = _limits(opened, artifact, golden)
        self.boxes: BoxMatch | None = None
        """Of the last comparison, of a detector."""

    def inputs(self) -> Iterator[Array]:
        """The stored inputs themselves; for a graph with preprocessing, the images that they were made of."""
        if self._opened.frontend is None:
            return (x[None] for x in self._golden.x_NCHW)
        return (self._feed.prepare(image) for image in self._golden.images)

    def passes_swapped(self) -> bool:
        swapped = (self._feed.prepare(image[:, :, ::-1]) for image in self._golden.images)
        return self.compare(swapped).verdict == "pass"

    def compare(self, inputs: Iterator[Array]) -> Comparison:
        calls = list(Calls(self._opened).batched(inputs))
        outputs = {name: np.concatenate([call[name] for call in calls]) for name in calls[0]}
        frontend, untrained = self._opened.frontend, self._manifest.spec.provenance.untrained
        top = {name: outputs.pop(name) for name in list(outputs)[-2:]} if frontend and frontend.top_k else {}
        if self._opened.detection is not None and self._opened.decode is not None:
            from cspdeploy.edge.selftest_boxes import compare_detector

            found, self.boxes = compare_detector(
                outputs, detection=self._opened.detection, decode=self._opened.decode,
                precision=self._opened.precision, golden=self._golden, limits=self._limits, dtypes=self._dtypes,
                untrained=untrained,
            )  # fmt: skip
            return found
        reference = self._golden.outputs_fp64
        found = compare_outputs(
            outputs, names=self._opened.outputs, reference=reference, limits=self._limits,
            decisions=self._opened.task == "classify" and all(array.ndim == 2 for array in reference.values()),
            dtypes=self._dtypes,
            # An untrained network decides nothing: all of its images are near ties.
            num_flips=None if untrained else allowed_flips(self._opened.precision, len(self._golden.images)),
        )  # fmt: skip
        if found.verdict != "pass" or frontend is None or not frontend.top_k:
            return found
        verdict, problem = check_top_k(top, next(iter(outputs.values())), frontend)
        return found if verdict == "pass" else dataclasses.replace(found, verdict=verdict, reason=f"top-k: {problem}")


def _limits(opened: OpenedArtifact, artifact: Artifact, golden: Golden) -> dict[str, Limit]:
    num_quantised = 0
    if opened.precision == "int8":
        num_quantised = count_quantised(opened.path) if artifact.format == "onnx" else recorded_quantised(artifact)
    limits = limits_for(opened.precision, noise_floors(golden), num_quantised=num_quantised)
    # A graph that resizes sees other pixels than Pillow's. What those do to the outputs was measured at export.
    return with_pixel_change(limits, pixel_change(artifact))


def measure_median(call: Callable[[], None], *, clock: Callable[[], float] = time.perf_counter) -> tuple[float, int]:
    """Median time of a call in ms, and of how many."""
    for _ in range(WARM_UP_RUNS):
        call()
    samples_ms: list[float] = []
    started = clock()
    while len(samples_ms) < MAX_RUNS:
        before = clock()
        call()
        after = clock()
        samples_ms.append(1e3 * (after - before))
        spent_s = after - started
        if spent_s >= MAX_S or (spent_s >= MIN_S and len(samples_ms) >= MIN_RUNS):
            break
    return float(np.median(samples_ms)), len(samples_ms)
