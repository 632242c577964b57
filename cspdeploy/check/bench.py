"""`bench`: latency alone. Every artifact on every runtime in a process of its own, timed in turns."""

from __future__ import annotations

from collections.abc import Sequence

from cspdeploy.check.bench_group import BenchGroup
from cspdeploy.check.bench_model import (
    BENCH_SCHEMA_VERSION,
    BenchReport,
    BenchRow,
    BenchSettings,
    feeds_of_batch,
    settings_record,
)
from cspdeploy.check.bench_parts import Parts, measure_parts
from cspdeploy.check.gpu_record import GpuRecord
from cspdeploy.check.latency import Progress
from cspdeploy.check.rungs import left_out, meant_runtimes
from cspdeploy.check.subject import Subject
from cspdeploy.check.variants import require_variants
from cspdeploy.core.env import describe_environment
from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.runtimes import require_runtime
from cspdeploy.runtimes.base import Runtime

__all__ = ["BENCH_SCHEMA_VERSION", "BenchReport", "BenchRow", "BenchSettings", "bench_subjects", "feeds_of_batch"]


def bench_subjects(
    groups: Sequence[tuple[str, Sequence[Subject]]],
    settings: BenchSettings,
    *,
    progress: Progress = lambda what, done, total: None,
) -> BenchReport:
    """Measure group after group; within one, everything is timed in turns against its first row.

    Args:
        groups: name and subjects; of a bundle one a size, of loose files all together.

    Raises:
        InputError: an unknown runtime or variant, a GPU that is not there, or nothing that could be timed.
        RuntimeUnavailableError: a runtime or a GPU that was asked for is missing, or did not take the work.
    """
    _require_sense(settings)
    environment = describe_environment()  # before this loads the machine
    rows: list[BenchRow] = []
    warnings: list[str] = []
    gpus: list[GpuRecord] = []
    parts = Parts()
    for name, subjects in groups:
        group = BenchGroup(name, settings, progress)
        rows += group.measure(subjects)
        warnings += group.warnings
        gpus += group.gpus
        parts = parts.joined(measure_parts(group.timed, settings, progress))
    if not any(row.verdict != "not-checkable" for row in rows):
        reasons = "; ".join(dict.fromkeys(row.reason for row in rows if row.reason))
        raise InputError(f"nothing could be timed ({reasons or 'no runtime here reads these artifacts'})",
                         fix="cspdeploy doctor")  # fmt: skip
    subjects_of_all = [subject for _, subjects in groups for subject in subjects]
    return BenchReport(
        verdict="fail" if any(row.failed for row in rows) else "done", rows=tuple(rows), sweep=parts.sweep,
        copies=parts.copies, profiles=parts.profiles, rooflines=parts.rooflines, peaks=parts.peaks, notes=parts.notes,
        warnings=tuple(warnings), gpus=tuple(gpus), environment=environment, settings=settings_record(settings),
        untrained=tuple(dict.fromkeys(subject.name for subject in subjects_of_all if subject.untrained)),
    )  # fmt: skip


def _require_sense(settings: BenchSettings) -> None:
    """What is asked of a GPU, before anything is opened: else the CPU's rows would stand there as if they were it."""
    named = [require_runtime(name) for name in settings.runtimes]
    usable = [
        one for one in named or meant_runtimes().values() if one.role == "engine" and (named or not one.missing())
    ]
    option = f"--device {settings.device}" if settings.device is not None else ""
    option = option or ("--cuda-graph" if settings.cuda_graph else "")
    if option and not any(one.device == "cuda" for one in usable):
        raise _no_gpu(option, named)
    if settings.device is not None:
        from cspdeploy.runtimes.cuda_driver import CudaDevice

        CudaDevice(settings.device)  # an index that no GPU has ends it here, with the number of them
    require_variants([one.name for one in usable], settings.variants)


def _no_gpu(option: str, named: Sequence[Runtime]) -> InputError | RuntimeUnavailableError:
    if named:
        names = ", ".join(one.name for one in named)
        return InputError(f"{option}: got {names}, expected a runtime that computes on a GPU", fix="--runtime ort-cuda")
    on_gpu = [one for one in meant_runtimes().values() if one.device == "cuda"]
    if not on_gpu:
        return left_out(option)
    missing = {one.name: one.missing() for one in on_gpu if not one.optional}
    told = {name: why for name, why in missing.items() if why}
    reasons = "; ".join(f"{name}: {why[0]}" for name, why in told.items())
    fix = told["ort-cuda"][1] if "ort-cuda" in told else "cspdeploy doctor"
    return RuntimeUnavailableError(f"{option}: no runtime here computes on a GPU ({reasons})", fix=fix)
