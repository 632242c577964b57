"""What `bench` measures beyond latency: sweep, copies, profile, roofline. Each has the machine to itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cspdeploy.check.audit import audit_onnx
from cspdeploy.check.latency import Progress
from cspdeploy.check.profile import Profile, measure_profile, summarise_profile
from cspdeploy.check.roofline import Peak, Roofline, find_roofline, measure_peak
from cspdeploy.check.sweep import SWEPT_BATCHES, Copies, SweepCell, measure_copies, measure_sweep, swept_threads
from cspdeploy.check.worker import Worker
from cspdeploy.core.errors import CspDeployError, InputError
from cspdeploy.runtimes.base import Feeds

if TYPE_CHECKING:
    from cspdeploy.check.bench import BenchRow, BenchSettings, Job

__all__ = ["Parts", "measure_parts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What was measured; `notes` say what could not be, and why."""

    sweep: tuple[SweepCell, ...] = ()
    copies: tuple[Copies, ...] = ()
    profiles: tuple[Profile, ...] = ()
    rooflines: tuple[Roofline, ...] = ()
    peaks: tuple[Peak, ...] = ()
    notes: tuple[str, ...] = ()

    def joined(self, other: Parts) -> Parts:
        """Both, each thing once."""
        fields = (field.name for field in dataclasses.fields(self))
        return Parts(**{name: tuple(dict.fromkeys((*getattr(self, name), *getattr(other, name)))) for name in fields})


def measure_parts(timed: Sequence[tuple[Job, BenchRow]], settings: BenchSettings, progress: Progress) -> Parts:
    """The parts that were asked for, of every timed row; copies only where there is a device to copy to."""
    parts = _rooflines(timed, settings, progress)
    for i, (job, row) in enumerate(timed):
        what = f"{row.artifact} on {row.runtime}"
        if job.rung.runtime.device != "cpu":
            progress(f"copies of {what}", i, len(timed))
            parts = parts.joined(_copies(job, row, settings))
        if settings.profile:
            progress(f"profile of {what}", i, len(timed))
            parts = parts.joined(_profile(job, row, settings))
        if settings.sweep:
            progress(f"sweep of {what}", i, len(timed))
            parts = parts.joined(_sweep(job, row, settings, progress))
    return parts


def _rooflines(timed: Sequence[tuple[Job, BenchRow]], settings: BenchSettings, progress: Progress) -> Parts:
    macs = _macs(timed)
    if not macs:
        return Parts()
    found: list[Roofline] = []
    peaks: dict[str, Peak | None] = {}
    for job, row in timed:
        device = job.rung.runtime.device
        num_macs = macs.get(job.subject.sized_name)
        if num_macs is None or row.timing is None:
            continue
        if device not in peaks:
            progress(f"peak of this machine ({device})", 0, 1)
            peaks[device] = measure_peak(
                device, num_threads=settings.num_threads, time_limit_s=settings.time_limit_s
            )  # fmt: skip
        peak = peaks[device]
        if peak is not None:
            found.append(find_roofline(
                peak, subject=job.subject.name, artifact=row.artifact, runtime=row.runtime,
                num_macs=num_macs * row.batch, num_bytes=row.num_bytes, p50_ms=row.timing.p50_ms,
            ))  # fmt: skip
    notes = tuple(f"no roofline on {device}: its peak is measured with onnxruntime" for device in peaks
                  if peaks[device] is None)  # fmt: skip
    return Parts(rooflines=tuple(found), peaks=tuple(peak for peak in peaks.values() if peak), notes=notes)


def _macs(timed: Sequence[tuple[Job, BenchRow]]) -> dict[str, int]:
    """For one image, by subject: all its artifacts compute the same, and its ONNX files tell how much that is."""
    found: dict[str, int] = {}
    for job, _ in timed:
        if job.subject.sized_name in found or job.rung.candidate.format != "onnx":
            continue
        try:
            audit = audit_onnx(job.rung.candidate.path, declared="", feeds=job.feeds)
        except InputError:
            continue
        if audit.num_macs:
            found[job.subject.sized_name] = audit.num_macs
    return found


def _copies(job: Job, row: BenchRow, settings: BenchSettings) -> Parts:
    names = (job.subject.name, row.artifact, row.runtime)
    graph = (row.runtime, job.request) if row.runtime.startswith("ort-") else None
    try:
        with Worker(row.runtime, job.request, time_limit_s=settings.time_limit_s) as worker:
            copies = measure_copies(worker, job.feeds, names=names, graph=graph, time_limit_s=settings.time_limit_s)
            return Parts(copies=(copies,))
    except CspDeployError as error:
        return Parts(notes=(f"copies of {row.artifact} on {row.runtime}: {error.message}",))


def _profile(job: Job, row: BenchRow, settings: BenchSettings) -> Parts:
    try:
        nodes, samples_ms = measure_profile(row.runtime, job.request, job.feeds, time_limit_s=settings.time_limit_s)
    except CspDeployError as error:
        return Parts(notes=(f"profile of {row.artifact} on {row.runtime}: {error.message}",))
    profile = summarise_profile(
        nodes, subject=job.subject.name, artifact=row.artifact, runtime=row.runtime,
        run_ms=float(np.median(samples_ms)), device=job.rung.runtime.device,
    )  # fmt: skip
    return Parts(profiles=(profile,))


def _sweep(job: Job, row: BenchRow, settings: BenchSettings, progress: Progress) -> Parts:
    from cspdeploy.check.bench import feeds_of_batch

    feeds: dict[int, Feeds] = {}
    notes: tuple[str, ...] = ()
    for batch in SWEPT_BATCHES:
        try:
            feeds[batch] = feeds_of_batch(job.subject, job.rung.candidate, batch)
        except InputError as error:
            notes = (f"no sweep over the batch of {row.artifact} on {row.runtime}: {error.message}",)
    feeds = feeds or {row.batch: job.feeds}
    threads = (settings.num_threads,) if settings.num_threads else swept_threads()
    if job.rung.runtime.device != "cpu":
        threads = (settings.num_threads,)  # those of the host do not compute
    base = SweepCell(subject=job.subject.name, artifact=row.artifact, runtime=row.runtime, batch=1, num_threads=0)
    cells = measure_sweep(
        base, job.request, runtime_name=row.runtime, feeds=feeds, threads=threads, time_limit_s=settings.time_limit_s,
        progress=lambda what, done, total: progress(f"sweep of {row.artifact} on {row.runtime}", done, total),
    )  # fmt: skip
    return Parts(sweep=tuple(cells), notes=notes)
