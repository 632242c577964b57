"""What `bench` measures beyond latency: sweep, copies, profile, roofline. Each has the machine to itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cspdeploy.check.audit import audit_onnx
from cspdeploy.check.bench_model import BenchRow, BenchSettings, Job, feeds_of_batch
from cspdeploy.check.latency import Progress, gpu_settings
from cspdeploy.check.profile import Profile, add_kernels, measure_kernels, measure_profile, summarise_profile
from cspdeploy.check.roofline import Peak, Roofline, find_roofline, measure_peak
from cspdeploy.check.sweep import (
    GPU_BATCHES,
    SWEEP_SETTINGS,
    SWEPT_BATCHES,
    Copies,
    SweepCell,
    error_words,
    measure_copies,
    measure_sweep,
    swept_threads,
)
from cspdeploy.check.variants import PLAIN, graph_variant
from cspdeploy.check.worker import Worker
from cspdeploy.core.errors import CspDeployError, InputError
from cspdeploy.runtimes.base import Feeds, ProfiledNode

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
        if job.on_gpu and job.variant.name == PLAIN:  # what is copied is the same in every variant
            progress(f"copies of {row.title}", i, len(timed))
            parts = parts.joined(_copies(job, row))
        if settings.profile:
            progress(f"profile of {row.title}", i, len(timed))
            parts = parts.joined(_profile(job, row))
        if settings.sweep:
            progress(f"sweep of {row.title}", i, len(timed))
            parts = parts.joined(_sweep(job, row, settings, progress))
    return parts


def _rooflines(timed: Sequence[tuple[Job, BenchRow]], settings: BenchSettings, progress: Progress) -> Parts:
    macs = _macs(timed)
    if not macs:
        return Parts()
    peaks: dict[tuple[str, bool], Peak | None] = {}
    found: list[Roofline] = []
    for job, row in timed:
        num_macs, device = macs.get(job.subject.sized_name), job.rung.runtime.device
        if num_macs is None or row.timing is None:
            continue
        half = job.on_gpu and job.precision == "fp16"
        if (device, half) not in peaks:
            progress(f"peak of this machine ({device})", 0, 1)
            peaks[device, half] = measure_peak(
                device, num_threads=settings.num_threads, time_limit_s=settings.time_limit_s, half=half,
                tf32=settings.tf32, gpu=settings.cuda.device,
            )  # fmt: skip
        peak = peaks[device, half]
        if peak is not None:
            found.append(_roofline(job, row, peak, num_macs * row.batch))
    notes = tuple(f"no roofline on {device}{' in FP16' if half else ''}: its peak is measured with onnxruntime"
                  for (device, half), peak in peaks.items() if peak is None)  # fmt: skip
    return Parts(rooflines=tuple(found), peaks=tuple(peak for peak in peaks.values() if peak), notes=notes)


def _roofline(job: Job, row: BenchRow, peak: Peak, num_macs: int) -> Roofline:
    host_ms = row.timing.p50_ms if row.timing else 0.0
    halved = job.precision == "fp16" and job.rung.candidate.precision != "fp16"  # weights that the variant converts
    return find_roofline(
        peak, subject=job.subject.name, artifact=row.artifact, runtime=row.runtime, variant=row.variant,
        num_macs=num_macs, num_bytes=row.num_bytes // (2 if halved else 1),
        p50_ms=row.events.p50_ms if row.events else host_ms,
    )  # fmt: skip


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


def _copies(job: Job, row: BenchRow) -> Parts:
    names = (job.subject.name, row.artifact, row.runtime)
    graph = (row.runtime, job.request) if graph_variant(row.runtime) is not None else None
    try:
        with Worker(row.runtime, job.request, time_limit_s=job.time_limit_s) as worker:
            copies = measure_copies(worker, job.feeds, names=names, graph=graph, time_limit_s=job.time_limit_s,
                                    settings=gpu_settings(SWEEP_SETTINGS))  # fmt: skip
            return Parts(copies=(copies,))
    except CspDeployError as error:
        return Parts(notes=(f"copies of {row.title}: {error_words(error)}",))


def _profile(job: Job, row: BenchRow) -> Parts:
    """The engine's own record, and on a GPU the kernels beside it; of either a note where it cannot be had."""
    notes: list[str] = []
    nodes: Sequence[ProfiledNode] = ()
    samples_ms = list(row.timing.samples_ms) if row.timing else []
    try:
        nodes, samples_ms = measure_profile(row.runtime, job.request, job.feeds, time_limit_s=job.time_limit_s)
    except CspDeployError as error:
        notes.append(f"profile of {row.title}: {error_words(error)}")
    profile = summarise_profile(
        nodes, subject=job.subject.name, artifact=row.artifact, runtime=row.runtime, variant=row.variant,
        run_ms=float(np.median(samples_ms)), device=job.rung.runtime.device,
    )  # fmt: skip
    if job.on_gpu:
        try:
            kernels, busy_ms, host_ms = measure_kernels(
                row.runtime, job.request, job.feeds, time_limit_s=job.time_limit_s
            )
            profile = add_kernels(profile, kernels, busy_ms=busy_ms, run_ms=float(np.median(host_ms)))
        except CspDeployError as error:
            notes.append(f"kernels of {row.title}: {error_words(error)}")
    return Parts(profiles=(profile,) if profile.operators or profile.kernels else (), notes=tuple(notes))


def _sweep(job: Job, row: BenchRow, settings: BenchSettings, progress: Progress) -> Parts:
    feeds: dict[int, Feeds] = {}
    notes: tuple[str, ...] = ()
    for batch in GPU_BATCHES if job.on_gpu else SWEPT_BATCHES:
        try:
            feeds[batch] = feeds_of_batch(job.subject, job.rung.candidate, batch)
        except InputError as error:
            notes = (f"no sweep over the batch of {row.title}: {error.message}",)
    feeds = feeds or {row.batch: job.feeds}
    threads = (settings.num_threads,) if settings.num_threads else swept_threads()
    if job.on_gpu:
        threads = (settings.num_threads,)  # those of the host do not compute
    base = SweepCell(
        subject=job.subject.name, artifact=row.artifact, runtime=row.runtime, variant=row.variant, batch=1,
        num_threads=0,
    )  # fmt: skip
    cells = measure_sweep(
        base, job.request, runtime_name=row.runtime, feeds=feeds, threads=threads, time_limit_s=job.time_limit_s,
        progress=lambda what, done, total: progress(f"sweep of {row.title}", done, total),
        settings=gpu_settings(SWEEP_SETTINGS) if job.on_gpu else SWEEP_SETTINGS, rotate=settings.rotate,
        # On a GPU a batch that finds no memory ends its process, and the others must go on.
        apart=job.on_gpu or job.request.cuda_graph or bool(job.request.cuda.compile),
    )  # fmt: skip
    return Parts(sweep=tuple(cells), notes=notes)
