"""`bench`: latency alone. Every artifact on every runtime in a process of its own, timed in turns."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from cspdeploy.check.bench_parts import Parts, measure_parts
from cspdeploy.check.latency import LatencySettings, Measured, Progress, measure_rounds, noise_warning, summarise
from cspdeploy.check.machine import MachineWatch
from cspdeploy.check.profile import Profile
from cspdeploy.check.roofline import Peak, Roofline
from cspdeploy.check.rungs import Rung, list_rungs
from cspdeploy.check.subject import Array, Candidate, Subject
from cspdeploy.check.sweep import Copies, SweepCell
from cspdeploy.check.worker import BoundCall, EngineError, Worker, WorkerCrashedError, WorkerHungError
from cspdeploy.core.env import describe_environment
from cspdeploy.core.errors import CspDeployError, InputError, RuntimeUnavailableError
from cspdeploy.core.types import ColdStart, MemoryUse, Timing
from cspdeploy.runtimes.base import SessionRequest

__all__ = ["BENCH_SCHEMA_VERSION", "BenchReport", "BenchRow", "BenchSettings", "bench_subjects", "feeds_of_batch"]

BENCH_SCHEMA_VERSION = 1
"""Of what `bench --json` prints; raised when a field goes or changes its meaning."""

RowVerdict = Literal["timed", "crash", "hang", "error", "not-checkable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What to measure.

    Attributes:
        runtimes: names; empty for all that are here.
        batch: images a call; 0: one, or what the artifact takes.
        num_threads: of each engine; 0: its default.
        sweep, profile: measure these parts as well.
        time_limit_s: for opening a session, and for each run.
    """

    runtimes: tuple[str, ...] = ()
    batch: int = 0
    num_threads: int = 0
    latency: LatencySettings = field(default_factory=LatencySettings)
    sweep: bool = False
    profile: bool = False
    time_limit_s: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One artifact on one runtime, against the first row of its group.

    Attributes:
        group: the bundle, or "files" for all loose files together.
        cold, memory: of the first run in a fresh process; None where the row failed before.
        rounds_ms: raw samples by round of the interleaved run, in the order of time.
        stable: its warm-up ended since its times had settled.
    """

    group: str
    artifact: str
    runtime: str
    verdict: RowVerdict
    reason: str = ""
    note: str = ""
    num_bytes: int = 0
    batch: int = 1
    placement: dict[str, int] = field(default_factory=dict)
    cold: ColdStart | None = None
    memory: MemoryUse | None = None
    timing: Timing | None = None
    rounds_ms: tuple[tuple[float, ...], ...] = ()
    num_warmups: int = 0
    stable: bool = True

    @property
    def failed(self) -> bool:
        """Whether this row makes the bench fail."""
        return self.verdict in ("crash", "hang", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """What `cspdeploy bench` found. `verdict`: "fail" where a row could not be measured that should have been."""

    schema_version: int = BENCH_SCHEMA_VERSION
    verdict: Literal["done", "fail"]
    rows: tuple[BenchRow, ...]
    sweep: tuple[SweepCell, ...] = ()
    copies: tuple[Copies, ...] = ()
    profiles: tuple[Profile, ...] = ()
    rooflines: tuple[Roofline, ...] = ()
    peaks: tuple[Peak, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """A rung of a subject, with what it is opened and called with."""

    subject: Subject
    rung: Rung
    request: SessionRequest
    feeds: dict[str, Array]
    batch: int


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
        InputError: an unknown runtime, or nothing that could be timed.
        RuntimeUnavailableError: a runtime that was asked for is missing, or did not take the work.
    """
    environment = describe_environment()  # before this loads the machine
    rows: list[BenchRow] = []
    warnings: list[str] = []
    parts = Parts()
    for name, subjects in groups:
        group = _Group(name, settings, progress)
        rows += group.measure(subjects)
        warnings += group.warnings
        parts = parts.joined(measure_parts(group.timed, settings, progress))
    if not any(row.verdict != "not-checkable" for row in rows):
        reasons = "; ".join(dict.fromkeys(row.reason for row in rows if row.reason))
        raise InputError(f"nothing could be timed ({reasons or 'no runtime here reads these artifacts'})",
                         fix="cspdeploy doctor")  # fmt: skip
    subjects_of_all = [subject for _, subjects in groups for subject in subjects]
    return BenchReport(
        verdict="fail" if any(row.failed for row in rows) else "done", rows=tuple(rows), sweep=parts.sweep,
        copies=parts.copies, profiles=parts.profiles, rooflines=parts.rooflines, peaks=parts.peaks, notes=parts.notes,
        warnings=tuple(warnings), environment=environment, settings=_as_record(settings),
        untrained=tuple(dict.fromkeys(subject.name for subject in subjects_of_all if subject.untrained)),
    )  # fmt: skip


def _as_record(settings: BenchSettings) -> dict[str, Any]:
    record: dict[str, Any] = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}
    return record | {"runtimes": list(settings.runtimes), "latency": dataclasses.asdict(settings.latency)}


def feeds_of_batch(subject: Subject, candidate: Candidate, batch: int) -> dict[str, Array]:
    """Inputs of one call with that many images; 0: one image, or as many as the artifact takes.

    Raises:
        InputError: the artifact does not take so many.
    """
    feeds = subject.first_call(candidate)
    num_images = 1 if subject.one_call and candidate.batch is None else len(next(iter(feeds.values())))
    if batch in (0, num_images):
        return feeds
    if candidate.batch is not None:
        raise InputError(f"takes {candidate.batch} images a call, not {batch}", fix="export --dynamic-batch")
    if subject.one_call:
        fixed = [value.name for value in candidate.inputs if not value.shape or isinstance(value.shape[0], int)]
        if fixed or not candidate.inputs:
            raise InputError(f"the first axis of its input {', '.join(fixed)} is fixed", fix="leave out --batch")
    # The same images over again: time does not depend on what they show.
    return {name: np.ascontiguousarray(np.resize(array, (batch, *array.shape[1:]))) for name, array in feeds.items()}


class _Group:
    """Rows that are timed together. `timed` and `warnings` are filled by `measure`."""

    def __init__(self, name: str, settings: BenchSettings, progress: Progress) -> None:
        self._name, self._settings, self._progress = name, settings, progress
        self.timed: list[tuple[Job, BenchRow]] = []
        self.warnings: list[str] = []

    def measure(self, subjects: Sequence[Subject]) -> list[BenchRow]:
        rungs = [
            (subject, rung)
            for subject in subjects
            for rung in list_rungs(subject, runtimes=list(self._settings.runtimes))
            if rung.runtime.timed
        ]
        jobs: dict[int, Job] = {}
        rows: list[BenchRow] = []
        calls: dict[str, BoundCall] = {}
        with contextlib.ExitStack() as stack:
            for i, (subject, rung) in enumerate(rungs):
                self._progress(f"{self._name}: {rung.candidate.artifact} on {rung.runtime.name}", i, len(rungs))
                row, job, call = self._open(subject, rung, stack)
                rows.append(row)
                if job is not None and call is not None:
                    jobs[i], calls[str(i)] = job, call
            if calls:
                rows = self._time(rows, calls)
        self.timed = [(jobs[i], row) for i, row in enumerate(rows) if i in jobs and row.timing is not None]
        return rows

    def _open(
        self, subject: Subject, rung: Rung, stack: contextlib.ExitStack
    ) -> tuple[BenchRow, Job | None, BoundCall | None]:
        """One after another, so that each cold start has the machine to itself."""
        made, settings = rung.candidate, self._settings
        row = BenchRow(
            group=self._name, artifact=made.artifact, runtime=rung.runtime.name, verdict="not-checkable",
            reason=rung.not_checkable, note=rung.runtime.notes.get(made.precision, ""), num_bytes=made.num_bytes,
        )  # fmt: skip
        if rung.not_checkable:
            return row, None, None
        try:
            feeds = feeds_of_batch(subject, made, settings.batch)
        except InputError as error:
            return dataclasses.replace(row, reason=str(error)), None, None
        # TF32 as in use; the verdict of verify is without.
        request = dataclasses.replace(rung.request, num_threads=settings.num_threads, tf32=True)
        worker = stack.enter_context(Worker(rung.runtime.name, request, time_limit_s=settings.time_limit_s))
        try:
            opened = worker.wait_opened()
            call = worker.bind(feeds)
            call.burst(min_runs=1, min_seconds=0.0, max_runs=1, lead_in_seconds=0.0)
            cold, memory = worker.cold, worker.memory()
        except RuntimeUnavailableError as error:
            if settings.runtimes:
                raise
            return dataclasses.replace(row, reason=error.message), None, None
        except CspDeployError as error:
            return _failed(row, error), None, None
        batch = 1 if subject.one_call and not settings.batch else len(next(iter(feeds.values())))
        row = dataclasses.replace(row, verdict="timed", batch=batch, cold=cold, memory=memory,
                                  placement=opened.placement)  # fmt: skip
        return row, Job(subject=subject, rung=rung, request=request, feeds=feeds, batch=batch), call

    def _time(self, rows: list[BenchRow], calls: dict[str, BoundCall]) -> list[BenchRow]:
        failures: dict[str, CspDeployError] = {}
        watch = MachineWatch(num_threads=self._settings.num_threads)
        measured = measure_rounds(
            calls, self._settings.latency, failures=failures,
            progress=lambda what, done, total: self._progress(
                f"{self._name}: {what if what == 'latency' else 'warm-up'}", done, total
            ),
        )  # fmt: skip
        timings = summarise(measured)
        names = {str(i): f"{row.artifact} on {row.runtime}" for i, row in enumerate(rows)}
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
        row, timing=timings[index], rounds_ms=found.rounds_ms, num_warmups=found.num_warmups, stable=found.stable
    )


def _failed(row: BenchRow, error: CspDeployError) -> BenchRow:
    verdicts: dict[type[CspDeployError], RowVerdict] = {
        WorkerCrashedError: "crash", WorkerHungError: "hang", EngineError: "error"
    }  # fmt: skip
    return dataclasses.replace(row, verdict=verdicts.get(type(error), "error"), reason=error.message)
