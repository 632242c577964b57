"""The checks of a self-test: the same questions that `cspdeploy verify` asks, of the device alone.

Shapes: N images, C classes, k of a top-k output.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.core.catalog import FP16_LIMIT
from cspdeploy.core.compare import Comparison, compare_outputs
from cspdeploy.core.golden import Golden
from cspdeploy.core.metrics import max_abs_difference, softmax
from cspdeploy.core.quantised import count_quantised, recorded_quantised
from cspdeploy.core.sizes import Size, size_label
from cspdeploy.core.tolerance import allowed_flips, limits_for, noise_floors
from cspdeploy.core.types import Artifact, Limit, Manifest
from cspdeploy.edge.calls import Calls
from cspdeploy.edge.images import Feed
from cspdeploy.edge.opening import OpenedArtifact
from cspdeploy.edge.selftest_report import CheckRow

__all__ = ["check_golden", "check_preprocess", "check_provider", "measure_median"]

Array = npt.NDArray[Any]

# The arithmetic is two float32 roundings of the same numbers everywhere; a resized pixel that differs by one step of
# 255 moves the input by 0.004 / std, a thousand times this. As in `cspdeploy verify`.
PREPROCESS_LIMIT = 1e-5
# Softmax of float32 scores rounds to 6e-8 of each term; a thousand classes add up to far less than this.
PROBABILITY_LIMIT = 1e-5

# Enough for a median of a few percent; a self-test is no benchmark, and the slowest device gets away with 3 runs.
MIN_RUNS, MAX_RUNS, MIN_SECONDS, MAX_SECONDS = 3, 200, 0.5, 10.0
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
    elsewhere = tuple(node for node in opened.session.nodes if node.provider != opened.provider)
    reason = f"{len(elsewhere)} nodes elsewhere" if elsewhere else ""
    return CheckRow(
        check="provider", artifact=opened.kind, runtime=opened.runtime.name, verdict="pass", reason=reason,
        provider=opened.provider, placement=dict(opened.session.placement), nodes_elsewhere=elsewhere,
    )  # fmt: skip


def check_golden(opened: OpenedArtifact, artifact: Artifact, golden: Golden, manifest: Manifest) -> CheckRow:
    """The golden images through the artifact, judged as `cspdeploy verify` judges it. Engines may raise anything."""
    judge = _Judge(opened, artifact, golden, manifest)
    found = judge.compare(judge.inputs())
    reason = found.reason
    if found.verdict in ("numeric", "decision") and golden.images.ndim == 4 and judge.passes_swapped():
        reason += "; it passes with red and blue swapped: wrong channel order"
    return CheckRow(
        check="golden", artifact=opened.kind, runtime=opened.runtime.name,
        verdict="pass" if found.verdict == "pass" else "fail", finding=found.verdict,
        reason=reason or opened.runtime.notes.get(opened.precision, ""), rel_l2=found.rel_l2, limit=found.limit,
        max_abs=found.max_abs, top1_agreement=found.top1_agreement, num_images=len(golden.images),
    )  # fmt: skip


class _Judge:
    def __init__(self, opened: OpenedArtifact, artifact: Artifact, golden: Golden, manifest: Manifest) -> None:
        self._opened, self._golden, self._manifest = opened, golden, manifest
        self._dtypes = {value.name: value.dtype for value in artifact.outputs}
        self._feed = Feed(contract=opened.contract, frontend=opened.frontend)
        self._limits = _limits(opened, artifact, golden)

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
        reference = self._golden.outputs_fp64
        found = compare_outputs(
            outputs, names=self._opened.outputs, reference=reference, limits=self._limits,
            decisions=self._opened.task == "classify" and all(array.ndim == 2 for array in reference.values()),
            dtypes=self._dtypes,
            # An untrained network decides nothing: all of its images are near ties.
            num_flips=None if untrained else allowed_flips(self._opened.precision, len(self._golden.images)),
        )  # fmt: skip
        problem = _wrong_top(next(iter(outputs.values())), top) if top and found.verdict == "pass" else ""
        return dataclasses.replace(found, verdict="decision", reason=problem) if problem else found


def _limits(opened: OpenedArtifact, artifact: Artifact, golden: Golden) -> dict[str, Limit]:
    num_quantised = 0
    if opened.precision == "int8":
        num_quantised = count_quantised(opened.path) if artifact.format == "onnx" else recorded_quantised(artifact)
    limits = limits_for(opened.precision, noise_floors(golden), num_quantised=num_quantised)
    if opened.frontend is None or not opened.frontend.resize:
        return limits
    # A graph that resizes sees other pixels than Pillow's. What those do to the outputs was measured at export.
    change = _resize_change(artifact)
    return {
        name: dataclasses.replace(
            limit, rel_l2=limit.rel_l2 + change, why=f"{limit.why}, and {change:.1e} for the pixels of its own resize"
        )
        for name, limit in limits.items()
    }


def _resize_change(artifact: Artifact) -> float:
    """As the export's step records it; never more than FP16 is allowed, as in `cspdeploy verify`."""
    found = [step.facts.get("output_change") for step in artifact.steps if step.name == "frontend"]
    change = found[-1] if found else 0.0
    return min(change, FP16_LIMIT) if isinstance(change, float) and change > 0 else 0.0


def _wrong_top(logits_NC: Array, top: dict[str, Array]) -> str:
    """Why the graph's own top-k is not that of its scores, or empty."""
    probabilities_Nk, classes_Nk = top.values()
    if probabilities_Nk.dtype != np.float32 or classes_Nk.dtype != np.int64:
        return f"top-k: got {probabilities_Nk.dtype} and {classes_Nk.dtype}, expected float32 and int64"
    num = classes_Nk.shape[1]
    if probabilities_Nk.shape != classes_Nk.shape or classes_Nk.min() < 0 or classes_Nk.max() >= logits_NC.shape[1]:
        return f"top-k: classes {classes_Nk.min()} to {classes_Nk.max()} of {logits_NC.shape[1]}"
    # By their scores and not by their numbers: of equal scores either may be first.
    if any(len(set(row)) != num for row in classes_Nk.tolist()):
        return "top-k: a class twice"
    if not np.array_equal(np.take_along_axis(logits_NC, classes_Nk, 1), -np.sort(-logits_NC, axis=1)[:, :num]):
        return "top-k: other classes than the largest scores"
    expected = np.take_along_axis(softmax(logits_NC), classes_Nk, 1)
    distance = max_abs_difference(probabilities_Nk, expected)
    return "" if distance <= PROBABILITY_LIMIT else f"top-k: probabilities are {distance:.1e} from the softmax"


def measure_median(call: Callable[[], None], *, clock: Callable[[], float] = time.perf_counter) -> tuple[float, int]:
    """Median time of a call in ms, and of how many."""
    for _ in range(WARM_UP_RUNS):
        call()
    samples: list[float] = []
    started = clock()
    while len(samples) < MAX_RUNS:
        before = clock()
        call()
        after = clock()
        samples.append(1e3 * (after - before))
        spent = after - started
        if spent >= MAX_SECONDS or (spent >= MIN_SECONDS and len(samples) >= MIN_RUNS):
            break
    return float(np.median(samples)), len(samples)
