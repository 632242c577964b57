"""All rungs of one subject: sessions are opened, judged, and timed together. Shapes: N images."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cspdeploy.check.bound_call import BoundCall
from cspdeploy.check.burst import Burst
from cspdeploy.check.frontend_rows import frontend_row
from cspdeploy.check.gpu_record import unwatched
from cspdeploy.check.integer_note import integer_note
from cspdeploy.check.latency import gpu_settings, measure_latency, timing_warnings
from cspdeploy.check.machine import MachineWatch
from cspdeploy.check.opening import CheckedSession, start_session
from cspdeploy.check.phases import Phases
from cspdeploy.check.rounding import computes_half
from cspdeploy.check.rung_check import RungCheck, failed_row
from cspdeploy.check.rungs import Rung, list_rungs
from cspdeploy.check.settings import Progress, VerifySettings
from cspdeploy.check.stats import percentile
from cspdeploy.check.subject import Subject
from cspdeploy.check.without_plugin import PLUGIN_NOTE, without_plugins
from cspdeploy.core.env import other_machine
from cspdeploy.core.errors import CspDeployError, DeviceMemoryError, RuntimeUnavailableError
from cspdeploy.core.metrics import max_abs_difference
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.results import ParityRow, Timing
from cspdeploy.core.sizes import sized_kind
from cspdeploy.core.tolerance import PREPROCESS_LIMIT, require_known

__all__ = ["PREPROCESS", "SubjectCheck"]

PREPROCESS = "preprocess"
TIMED = "(timed)"
"""Behind the name of a setting that the timed session has otherwise than the judged one."""


class SubjectCheck:
    """One subject. Sessions stay open until all have been timed together; `warnings` is filled on the way."""

    def __init__(self, subject: Subject, settings: VerifySettings, phases: Phases, progress: Progress) -> None:
        self._subject, self._settings, self._phases, self._progress = subject, settings, phases, progress
        self._judge = RungCheck(subject, settings, phases, progress)
        self._sessions: dict[int, CheckedSession] = {}
        self.warnings: list[str] = []

    def rows(self) -> list[ParityRow]:
        """A row for the preprocessing, and one for each rung."""
        with tempfile.TemporaryDirectory(prefix="cspdeploy-") as copies:
            self._subject = self._judge.subject = without_plugins(self._subject, Path(copies))
            return self._rows()

    def _rows(self) -> list[ParityRow]:
        settings = self._settings
        rungs = list_rungs(self._subject, runtimes=list(settings.runtimes), device=settings.device)
        half = (rung.candidate.artifact for rung in rungs if computes_half(rung.runtime, rung.candidate))
        self._judge.rounding.wanted = frozenset(half)
        known = [made.artifact for made in self._subject.candidates]
        require_known(settings.tolerances, [*known, *self._subject.siblings])
        first = [*self._preprocess_rows(), *self._frontend_rows()]
        rows: list[ParityRow] = []
        timed: dict[int, Burst] = {}
        try:
            for i, rung in enumerate(rungs):
                self._progress(
                    f"{self._subject.title}: {rung.candidate.artifact} on {rung.runtime.name}", i, len(rungs)
                )
                self._start(rungs[i : i + 1 + self._lookahead()], i)
                row, call = self._check(rung, i)
                rows.append(row)
                if call is not None:
                    timed[i] = call
            rows = self._time(rows, timed, on_gpu=any(rungs[i].runtime.device == "cuda" for i in timed))
        finally:
            self._judge.close()
            for session in self._sessions.values():
                session.close()
        return first + rows

    def _lookahead(self) -> int:
        """Where nothing is timed, the next engine may load while this one computes; else each has the machine alone."""
        return 1 if self._settings.isolate and self._settings.latency is None else 0

    def _start(self, rungs: list[Rung], offset: int) -> None:
        for i, rung in enumerate(rungs, offset):
            if i not in self._sessions and not rung.not_checkable:
                self._sessions[i] = start_session(rung.runtime, rung.request, self._settings)

    def _preprocess_rows(self) -> list[ParityRow]:
        """The stored images through the shared preprocessing of this machine, against the stored inputs."""
        golden, manifest = self._subject.golden, self._subject.manifest
        if golden is None or manifest is None:
            return []
        with self._phases("preprocess"):
            made = preprocess(list(golden.images), manifest.spec.preprocess)
        base = ParityRow(
            bundle=self._subject.name, artifact=sized_kind(PREPROCESS, self._subject.size_px), runtime="shared",
            verdict="pass", num_images=len(made), limit=PREPROCESS_LIMIT,
        )  # fmt: skip
        if made.shape != golden.x_NCHW.shape:
            reason = f"makes {list(made.shape)}, the golden inputs are {list(golden.x_NCHW.shape)}"
            return [dataclasses.replace(base, verdict="shape", reason=reason)]
        distance = max_abs_difference(made, golden.x_NCHW)
        if distance <= PREPROCESS_LIMIT:
            return [dataclasses.replace(base, max_abs=distance)]
        reason = f"the same images give other inputs here (by up to {distance:.1e}): another Pillow or contract"
        return [dataclasses.replace(base, verdict="numeric", reason=reason, max_abs=distance)]

    def _frontend_rows(self) -> list[ParityRow]:
        """The preprocessing that files have in their graphs, against the shared one: a row a file."""
        rows = []
        for made in self._subject.candidates:
            if made.frontend is None:
                continue
            kind = sized_kind(PREPROCESS, self._subject.size_px)
            base = ParityRow(bundle=self._subject.name, artifact=kind, runtime=made.artifact, verdict="error")
            with self._phases("preprocess"):
                rows.append(frontend_row(base, self._subject, made, self._settings))
        return rows

    def _check(self, rung: Rung, index: int) -> tuple[ParityRow, Burst | None]:
        """The row, and what to time: None where nothing is timed."""
        made = rung.candidate
        row = ParityRow(
            bundle=self._subject.name, artifact=made.artifact, runtime=rung.runtime.name, verdict="not-checkable",
            reason=rung.not_checkable, num_bytes=made.num_bytes, note=_note(rung),
        )  # fmt: skip
        if rung.not_checkable:
            return row, None
        if problem := self._judge.wrong_inputs(made):
            return dataclasses.replace(row, verdict="inputs", reason=problem), None
        session = self._sessions[index]
        try:
            with self._phases("open"):
                session.wait()
            row = self._judge.check(row, rung, session)
            row = _noted(row, integer_note(rung.runtime, made.precision, session.nodes))
            if self._settings.latency is not None and rung.runtime.timed:
                return self._bind_or_tell(row, rung, index)
        except RuntimeUnavailableError as error:
            if self._settings.runtimes or (self._settings.device is not None and rung.runtime.device == "cuda"):
                raise  # it was asked for, by its name or by that of its device
            row = dataclasses.replace(row, verdict="not-checkable", reason=error.message)
        except Exception as error:  # an engine may raise anything; the other rungs must still be checked
            row = failed_row(row, error)
        self._sessions[index].close()  # the one that is open now: what it holds of a device goes with its process
        return row, None

    def _bind_or_tell(self, row: ParityRow, rung: Rung, index: int) -> tuple[ParityRow, Burst | None]:
        """As `_bind`. The row is judged by now: that it cannot be timed changes no verdict that fails.

        Raises:
            Exception: of the engine, where the verdict holds; not that it is not here, which it was a moment ago.
        """
        try:
            return self._bind(row, rung, index)
        except Exception as error:  # as in `_check`
            if not row.failed and not isinstance(error, RuntimeUnavailableError):
                raise
            told = error.message if isinstance(error, CspDeployError) else str(error) or type(error).__name__
            self._sessions[index].close()
            return _noted(row, f"not timed: {told.splitlines()[0]}"), None

    def _bind(self, row: ParityRow, rung: Rung, index: int) -> tuple[ParityRow, Burst]:
        """What to time. On CUDA that is another session, with TF32 on as in use; the verdict was without."""
        session = self._sessions[index]
        if rung.runtime.device == "cuda":
            session.close()
            request = dataclasses.replace(rung.request, tf32=True)
            session = self._sessions[index] = start_session(rung.runtime, request, self._settings)
            session.wait()
            distance = self._judge.tf32_distance(session, rung.candidate)
            row = dataclasses.replace(row, tf32_rel_l2=distance, settings=_both(row.settings, session.settings))
        return row, session.bind(self._subject.first_call(rung.candidate))

    def _time(self, rows: list[ParityRow], calls: Mapping[int, Burst], *, on_gpu: bool) -> list[ParityRow]:
        """Latency of all that can be run, interleaved. What fails on the way fails in its row; the rest goes on."""
        settings = self._settings.latency
        if settings is None or not calls:
            return rows
        names = {i: f"{rows[i].artifact} on {rows[i].runtime}" for i in calls}
        failures: dict[str, CspDeployError] = {}
        watch = MachineWatch(gpu=(self._settings.device or 0) if on_gpu else None)
        with self._phases("latency"):
            found = measure_latency(
                {names[i]: call for i, call in calls.items()}, gpu_settings(settings) if on_gpu else settings,
                failures=failures,
                progress=lambda what, done, total: self._progress(f"{self._subject.title}: {what}", done, total),
            )  # fmt: skip
        self.warnings += timing_warnings(found, watch.findings(), of_gpu=watch.gpu_findings)
        if watch.gpu_summary is not None and not watch.gpu_summary.num_samples:
            self.warnings.append(unwatched(self._settings.device or 0, group=self._subject.name)[1])
        timed = list(rows)
        for i, name in names.items():
            failed = failures.get(name)
            if isinstance(failed, DeviceMemoryError):
                self._sessions[i].close()
            timed[i] = (
                failed_row(rows[i], failed) if failed is not None else _with_timing(rows[i], found[name], calls[i])
            )
        return timed


def _with_timing(row: ParityRow, timing: Timing, call: Burst) -> ParityRow:
    """`call`: what was timed; one in a worker also knows what events on the device's stream said."""
    p95_ms = None if timing.p95_ms is None else round(timing.p95_ms, 4)
    device_ms = [ms for part in call.device_rounds_ms for ms in part] if isinstance(call, BoundCall) else []
    return dataclasses.replace(
        row, timing=timing, p50_ms=round(timing.p50_ms, 4), p95_ms=p95_ms,
        events_p50_ms=round(percentile(device_ms, 50), 4) if device_ms else None,
    )  # fmt: skip


def _noted(row: ParityRow, remark: str) -> ParityRow:
    return dataclasses.replace(row, note="; ".join(filter(None, (row.note, remark))))


def _both(judged: Mapping[str, str], timed: Mapping[str, str]) -> dict[str, str]:
    """How the session of the verdict was set, and what was set otherwise where it was timed."""
    other = {f"{name} {TIMED}": value for name, value in timed.items() if judged.get(name) != value}
    return {**judged, **other}


def _note(rung: Rung) -> str:
    """What to know of a row before it is read."""
    made = rung.candidate
    plugin = PLUGIN_NOTE if made.cut else ""
    return "; ".join(filter(None, (rung.runtime.notes.get(made.precision, ""), other_machine(made.machine), plugin)))
