"""Steps of an export that change an ONNX file and are only taken where they help."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from cspdeploy.check.audit import audit_onnx
from cspdeploy.check.latency import LatencySettings, measure_latency
from cspdeploy.core.metrics import relative_l2
from cspdeploy.core.sizes import Size, base_kind, size_of
from cspdeploy.core.types import Artifact, StepRecord
from cspdeploy.export.fp16 import convert_fp16
from cspdeploy.export.rewrite import count_operators_of, split_expansion_convolutions, write_model
from cspdeploy.export.simplify import LIMIT
from cspdeploy.runtimes.ort import open_cpu_session

__all__ = ["cap_ir_version", "half_step", "rewrite_step", "slower_splits"]

SPLIT_EXPANSION = "split-expansion"
MEASURED_SLOWER = "measured slower on this machine"


def slower_splits(artifacts: Iterable[Artifact]) -> tuple[Size | None, ...]:
    """Sizes whose graph `rewrite_step` left as it was for its time alone: what a clock says does not repeat."""
    return tuple(
        size_of(artifact.kind) for artifact in artifacts
        if base_kind(artifact.kind) == "onnx" and any(
            step.name == SPLIT_EXPANSION and step.detail.endswith(MEASURED_SLOWER) for step in artifact.steps
        )
    )  # fmt: skip


def rewrite_step(
    source: Path, target: Path, x_NCHW: npt.NDArray[np.float32], *, input_name: str, slower: bool | None = None
) -> tuple[StepRecord, ...]:
    """Split the expansion convolutions into `target`, unless that is not exact or measures slower here.

    `target` is left only where the step is taken.

    Args:
        slower: what was measured at another time, to be held to; None: it is measured now.
    """
    num_rewritten = split_expansion_convolutions(source, target)
    if not num_rewritten:
        return ()
    feeds = {input_name: x_NCHW[:1]}
    before, after = open_cpu_session(source), open_cpu_session(target)
    expected, got = before.run(feeds), after.run(feeds)
    difference = max(relative_l2(got[name], expected[name]) for name in expected)
    if slower is None:
        # Only a clear loss counts, which shows without a warm-up until the times have settled.
        settings = LatencySettings(min_runs=15, min_seconds=0.1, warmup_seconds=0.05, max_warmup_seconds=0.0)
        timings = measure_latency({"before": before.bind(feeds), "after": after.bind(feeds)}, settings)
        slower = timings["after"].verdict == "slower"
    facts = {
        "convolutions": num_rewritten, "limit": LIMIT,
        "operators_before": count_operators_of(source),
        "operators_after": count_operators_of(target),
    }  # fmt: skip
    if not difference <= LIMIT or slower:
        target.unlink()
        why = "outputs differ" if not difference <= LIMIT else MEASURED_SLOWER
        facts["operators_after"] = facts["operators_before"]
        return (StepRecord(name=SPLIT_EXPANSION, outcome="kept", detail=f"not rewritten: {why}", facts=facts),)
    detail = f"{num_rewritten} expansion convolutions in two, so that no Split is left; outputs equal"
    return (StepRecord(name=SPLIT_EXPANSION, outcome="done", detail=detail, facts=facts),)


def half_step(source: Path, target: Path, x_NCHW: npt.NDArray[np.float32], *, trusted: bool) -> StepRecord:
    """Convert to FP16. The outcome is "kept", and there is no `target`, where that cannot be or would be in name only.

    Args:
        x_NCHW: real images to measure ranges on.
        trusted: the graph is of our own making, so that whatever goes wrong is a fault to be told of. One from
            elsewhere may hold operators that have no FP16 form, and is then not converted.
    """
    if trusted:
        return _in_more_than_name(convert_fp16(source, target, x_NCHW, batch=1), target)
    try:
        record = _in_more_than_name(convert_fp16(source, target, x_NCHW, batch=1), target)
        if record.outcome == "done":
            open_cpu_session(target)
    except Exception as error:  # type inference, the engine: they share no base class but this one
        target.unlink(missing_ok=True)
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        return StepRecord(name="fp16", outcome="kept", detail=f"no FP16 file: it cannot be converted ({reason})")
    return record


def _in_more_than_name(record: StepRecord, target: Path) -> StepRecord:
    """Refuse a file that `verify` would call one that is not of the precision it is named for."""
    if record.outcome == "kept" or not record.facts["fp32_nodes"]:
        return record
    problem = audit_onnx(target, declared="fp16").problem
    if not problem:
        return record
    target.unlink()
    return dataclasses.replace(record, outcome="kept", detail=f"no FP16 file: {problem}; {record.detail}")


def cap_ir_version(path: Path, max_ir: int) -> None:
    """Lower the file's IR version to `max_ir`, if it is above."""
    model = onnx.load(path)
    if model.ir_version > max_ir:
        model.ir_version = max_ir
        write_model(model, path)
