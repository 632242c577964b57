"""Rows of `bench` that are timed together: every session in a process of its own, timed in turns."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

from cspdeploy.check.bench_model import BenchRow, BenchSettings, Job, RowVerdict, feeds_of_batch
from cspdeploy.check.bound_call import BoundCall
from cspdeploy.check.gpu_record import GpuRecord, record_of, unwatched
from cspdeploy.check.integer_note import integer_note
from cspdeploy.check.latency import Measured, Progress, gpu_settings, measure_rounds, noise_warning, summarise
from cspdeploy.check.machine import MachineWatch
from cspdeploy.check.rungs import Rung, list_rungs
from cspdeploy.check.stats import event_time
from cspdeploy.check.subject import Subject
from cspdeploy.check.sweep import error_words
from cspdeploy.check.time_limits import time_limit_of
from cspdeploy.check.variants import PLAIN, Variant, select_variants
from cspdeploy.check.worker import EngineError, Worker, WorkerCrashedError, WorkerHungError
from cspdeploy.core.errors import CspDeployError, InputError, RuntimeUnavailableError
from cspdeploy.core.results import Timing
from cspdeploy.runtimes.base import SessionRequest
from cspdeploy.runtimes.tf32 import OFF_NOTE, is_off

__all__ = ["BenchGroup"]

TF32_NOTE = "TF32 on, as in use: float32 products keep 10 bits of mantissa; --no-tf32 turns it off"


class BenchGroup:
    """Rows that are timed together. `timed`, `warnings` and `gpus` are filled by `measure`."""

    def __init__(self, name: str, settings: BenchSettings, progress: Progress) -> None:
        self._name, self._settings, self._progress = name, settings, progress
        self.timed: list[tuple[Job, BenchRow]] = []
        self.warnings: list[str] = []
        self.gpus: list[GpuRecord] = []

    def measure(self, subjects: Sequence[Subject]) -> list[BenchRow]:
        """Open all, then time all.

        Raises:
            InputError: an unknown runtime.
            RuntimeUnavailableError: a runtime that was asked for is missing, or did not take the work.
        """
        ways = [way for subject in subjects for way in self._ways(subject)]
        jobs: dict[int, Job] = {}
        rows: list[BenchRow] = []
        calls: dict[str, BoundCall] = {}
        with contextlib.ExitStack() as stack:
            for i, (subject, rung, variant) in enumerate(ways):
                row = self._row(rung, variant)
                self._progress(f"{self._name}: {row.title}", i, len(ways))
                row, job, call = self._open(row, subject, rung, variant, stack)
                rows.append(row)
                if job is not None and call is not None:
                    jobs[i], calls[str(i)] = job, call
            if calls:
                rows = self._time(rows, jobs, calls)
        self.timed = [(jobs[i], row) for i, row in enumerate(rows) if i in jobs and row.timing is not None]
        return rows

    def _ways(self, subject: Subject) -> list[tuple[Subject, Rung, Variant]]:
        """Every rung in every variant that is asked for; of one that cannot be opened the plain one says so."""
        settings = self._settings
        found = []
        for rung in list_rungs(subject, runtimes=list(settings.runtimes), device=settings.device):
            variants = select_variants(
                rung.runtime.name, every=settings.every_variant, names=settings.variants, cuda_graph=settings.cuda_graph
            )
            found += [(subject, rung, one) for one in variants[: 1 if rung.not_checkable else None]]
        return [way for way in found if way[1].runtime.timed]

    def _row(self, rung: Rung, variant: Variant) -> BenchRow:
        made = rung.candidate
        return BenchRow(
            group=self._name, artifact=made.artifact, runtime=rung.runtime.name, variant=variant.name,
            verdict="not-checkable", reason=rung.not_checkable, num_bytes=made.num_bytes,
            note="; ".join(filter(None, (rung.runtime.notes.get(made.precision, ""), variant.note))),
        )  # fmt: skip

    def _request(self, rung: Rung, variant: Variant) -> SessionRequest:
        settings = self._settings
        return variant.apply(
            dataclasses.replace(
                rung.request, num_threads=settings.num_threads, tf32=settings.tf32, cuda=settings.cuda
            )
        )  # fmt: skip

    def _open(
        self, row: BenchRow, subject: Subject, rung: Rung, variant: Variant, stack: contextlib.ExitStack
    ) -> tuple[BenchRow, Job | None, BoundCall | None]:
        """One after another, so that each cold start has the machine to itself."""
        settings = self._settings
        if rung.not_checkable:
            return row, None, None
        try:
            feeds = feeds_of_batch(subject, rung.candidate, settings.batch)
        except InputError as error:
            return dataclasses.replace(row, reason=str(error)), None, None
        request = self._request(rung, variant)
        batch = 1 if subject.one_call and not settings.batch else len(next(iter(feeds.values())))
        job = Job(
            subject=subject, rung=rung, variant=variant, request=request, feeds=feeds, batch=batch,
            time_limit_s=time_limit_of(rung.runtime, request, settings.time_limit_s),
        )  # fmt: skip
        worker = stack.enter_context(Worker(rung.runtime.name, request, time_limit_s=job.time_limit_s))
        try:
            opened = worker.wait_opened()
            call = worker.bind(feeds, rotate=settings.rotate)
            call.burst(min_runs=1, min_seconds=0.0, max_runs=1, lead_in_seconds=0.0)
            cold, memory = worker.cold, worker.memory()
        except CspDeployError as error:
            worker.close()  # what it holds of a GPU's memory is missing to the others
            if not isinstance(error, RuntimeUnavailableError):
                return _failed(row, error), None, None
            asked = bool(settings.runtimes) or (settings.device is not None and job.on_gpu)
            if asked and variant.name == PLAIN:
                raise
            if asked or variant.name in settings.variants:  # the runtime is here, and this way to set it is not
                return _failed(row, error), None, None
            return dataclasses.replace(row, reason=error.message), None, None
        # Of an INT8 network whatever is computed around its pairs, or was left out of them, is in float32.
        tf32 = TF32_NOTE if job.on_gpu and settings.tf32 and job.precision in ("fp32", "int8") else ""
        tf32 = OFF_NOTE if tf32 and is_off(opened.settings) else tf32
        integers = integer_note(rung.runtime, job.precision, opened.nodes)
        row = dataclasses.replace(
            row, verdict="timed", batch=batch, cold=cold, memory=memory, placement=opened.placement,
            settings=opened.settings, inputs=call.inputs, note="; ".join(filter(None, (row.note, tf32, integers))),
        )  # fmt: skip
        return row, job, call

    @contextlib.contextmanager
    def _gpu_watch(self, on_gpu: bool) -> Iterator[None]:
        """Clocks, power and temperature beside what is timed; read, never set."""
        if not on_gpu:
            yield
            return
        from cspdeploy.core.gpu import GpuWatch

        with GpuWatch(self._settings.cuda.device) as watch:
            yield
        self.warnings += watch.findings()
        record = record_of(watch.summary(), group=self._name)
        if record is None:
            record, warning = unwatched(self._settings.cuda.device, group=self._name)
            self.warnings.append(warning)
        self.gpus += [] if record is None else [record]

    def _time(self, rows: list[BenchRow], jobs: dict[int, Job], calls: dict[str, BoundCall]) -> list[BenchRow]:
        failures: dict[str, CspDeployError] = {}
        settings, on_gpu = self._settings.latency, any(job.on_gpu for job in jobs.values())
        watch = MachineWatch(num_threads=self._settings.num_threads)
        with self._gpu_watch(on_gpu):
            measured = measure_rounds(
                calls, gpu_settings(settings) if on_gpu else settings, failures=failures,
                progress=lambda what, done, total: self._progress(
                    f"{self._name}: {what if what == 'latency' else 'warm-up'}", done, total
                ),
            )  # fmt: skip
        timings = summarise(measured)
        names = {str(i): row.title for i, row in enumerate(rows)}
        if warning := noise_warning({names[i]: timing for i, timing in timings.items()}, watch.findings()):
            self.warnings.append(warning)
        restless = [names[i] for i, found in measured.items() if not found.stable]
        if restless:
            self.warnings.append(f"had not settled when its warm-up ended: {', '.join(restless)}")
        return [
            _failed(row, failures[str(i)]) if str(i) in failures else _timed(row, timings, measured, str(i))
            for i, row in enumerate(rows)
        ]


def _timed(row: BenchRow, timings: dict[str, Timing], measured: dict[str, Measured], index: str) -> BenchRow:
    if index not in timings:
        return row
    found = measured[index]
    return dataclasses.replace(
        row, timing=timings[index], events=event_time(found.rounds_ms, found.device_rounds_ms),
        rounds_ms=found.rounds_ms, events_rounds_ms=found.device_rounds_ms, num_warmups=found.num_warmups,
        stable=found.stable,
    )  # fmt: skip


def _failed(row: BenchRow, error: CspDeployError) -> BenchRow:
    verdicts: dict[type[CspDeployError], RowVerdict] = {
        WorkerCrashedError: "crash", WorkerHungError: "hang", EngineError: "error"
    }  # fmt: skip
    return dataclasses.replace(row, verdict=verdicts.get(type(error), "error"), reason=error_words(error))
