"""`verify`: every artifact of a bundle on every runtime, against the golden outputs. Shapes: N images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.check.accuracy import measure_accuracy
from cspdeploy.check.compare import Comparison, compare_outputs
from cspdeploy.check.latency import LatencySettings, measure_latency, noise_warning
from cspdeploy.check.rungs import Rung, list_rungs
from cspdeploy.check.tolerance import noise_floors, tolerance_for
from cspdeploy.core.bundle import check_hashes, read_manifest
from cspdeploy.core.catalog import ACCURACY_BUDGET, INPUT_NAME
from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.env import describe_environment
from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.core.golden import GOLDEN_FILE, Golden, read_golden
from cspdeploy.core.metrics import max_abs_difference
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.types import Manifest, ParityRow, Timing, VerifyReport
from cspdeploy.runtimes.base import Session

__all__ = ["VerifySettings", "verify_bundles"]

Progress = Callable[[str, int, int], None]

PREPROCESS = "preprocess"
# The arithmetic is two float32 roundings of the same numbers everywhere; a resized pixel that differs by one step of
# 255 moves the input by 0.004 / std, a thousand times this.
PREPROCESS_LIMIT = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifySettings:
    """What to check. `latency` None: parity alone. `parity` False: latency alone."""

    runtimes: tuple[str, ...] = ()
    latency: LatencySettings | None = field(default_factory=LatencySettings)
    accuracy: LabelledImages | None = None
    parity: bool = True


def verify_bundles(
    folders: list[Path], settings: VerifySettings, *, progress: Progress = lambda what, done, total: None
) -> VerifyReport:
    """Verify bundles one after another.

    Raises:
        InputError: a bundle that cannot be read, an unknown runtime.
        TamperedError: a file is not the one of the manifest.
        RuntimeUnavailableError: a runtime that was asked for is missing, or did not take the work.
    """
    rows: list[ParityRow] = []
    floors: dict[str, float] = {}
    warnings: list[str] = []
    untrained: list[str] = []
    for folder in folders:
        manifest = read_manifest(folder)
        check_hashes(folder, manifest)
        _require_usable(folder, manifest, settings)
        golden = read_golden(folder / GOLDEN_FILE)
        floors[str(folder)] = max(noise_floors(golden).values())
        if manifest.spec.provenance.untrained:
            untrained.append(str(folder))
        check = _BundleCheck(folder, manifest, golden, settings, progress)
        rows += check.rows()
        warnings += check.warnings
    if not any(row.verdict != "not-checkable" and row.artifact != PREPROCESS for row in rows):
        raise InputError("nothing could be checked: no runtime here reads these artifacts", fix="cspdeploy doctor")
    broken = next((row for row in rows if row.failed), None)
    return VerifyReport(
        verdict="fail" if broken else "pass" if settings.parity else "not-checked",
        first_break=f"{broken.bundle}: {broken.artifact} on {broken.runtime}: {broken.reason}" if broken else "",
        noise_floor=floors, untrained=tuple(untrained), rows=tuple(rows), warnings=tuple(warnings),
        environment=describe_environment(),
    )  # fmt: skip


def _require_usable(folder: Path, manifest: Manifest, settings: VerifySettings) -> None:
    if all(record.file != GOLDEN_FILE for record in manifest.files):
        raise InputError(f"{folder}: the manifest names no {GOLDEN_FILE}", fix="export the bundle again")
    data = settings.accuracy
    if data is not None and manifest.spec.task != "classify":
        raise InputError(
            f"--accuracy {data.name}: {folder} gives {', '.join(manifest.spec.outputs)}, not classes",
            fix="verify it without --accuracy",
        )
    if data is not None and data.labels != manifest.labels:
        raise InputError(
            f"--accuracy {data.name}: its classes are not those of {folder} ({', '.join(manifest.labels[:5])}, ...)",
            fix="give images of the same classes, under the same names",
        )


class _BundleCheck:
    """One bundle. Sessions stay open until all have been timed together."""

    def __init__(
        self, folder: Path, manifest: Manifest, golden: Golden, settings: VerifySettings, progress: Progress
    ) -> None:
        self._folder, self._manifest, self._golden = folder, manifest, golden
        self._settings, self._progress = settings, progress
        self._floors = noise_floors(golden)
        self.warnings: list[str] = []

    def rows(self) -> list[ParityRow]:
        rungs = list_rungs(self._folder, self._manifest, runtimes=list(self._settings.runtimes))
        rows = [self._preprocess_row()] if self._settings.parity else []
        calls: dict[int, Callable[[], None]] = {}
        for i, rung in enumerate(rungs):
            self._progress(f"{self._manifest.spec.name}: {rung.artifact} on {rung.runtime.name}", i, len(rungs))
            row, call = self._check(rung)
            if call is not None:
                calls[len(rows)] = call
            rows.append(row)
        if calls and self._settings.latency is not None:
            timings = self._time(rows, calls, self._settings.latency)
            for index, timing in timings.items():
                rows[index] = dataclasses.replace(
                    rows[index], timing=timing, p50_ms=round(timing.p50_ms, 4), p95_ms=round(timing.p95_ms, 4)
                )
        return rows

    def _preprocess_row(self) -> ParityRow:
        """The stored images through the shared preprocessing of this machine, against the stored inputs."""
        made = preprocess(list(self._golden.images), self._manifest.spec.preprocess)
        base = ParityRow(bundle=str(self._folder), artifact=PREPROCESS, runtime="shared", verdict="pass",
                         num_images=len(made), limit=PREPROCESS_LIMIT)  # fmt: skip
        if made.shape != self._golden.x_NCHW.shape:
            reason = f"makes {list(made.shape)}, the golden inputs are {list(self._golden.x_NCHW.shape)}"
            return dataclasses.replace(base, verdict="shape", reason=reason)
        distance = max_abs_difference(made, self._golden.x_NCHW)
        if distance <= PREPROCESS_LIMIT:
            return dataclasses.replace(base, max_abs=distance)
        reason = f"the same images give other inputs here (by up to {distance:.1e}): another Pillow or contract"
        return dataclasses.replace(base, verdict="numeric", reason=reason, max_abs=distance)

    def _check(self, rung: Rung) -> tuple[ParityRow, Callable[[], None] | None]:
        """The row, and what to time: None where nothing is timed."""
        row = ParityRow(
            bundle=str(self._folder), artifact=rung.artifact, runtime=rung.runtime.name,
            verdict="pass" if self._settings.parity else "not-checked",
            num_bytes=rung.num_bytes, note=rung.runtime.notes.get(rung.precision, ""),
        )  # fmt: skip
        if rung.not_checkable:
            return dataclasses.replace(row, verdict="not-checkable", reason=rung.not_checkable), None
        try:
            session = rung.runtime.open(rung.request)
            row = dataclasses.replace(row, placement=session.placement)
            if self._settings.parity:
                row = self._compare(row, rung, session)
            if self._settings.accuracy is not None and not row.failed:
                row = self._measure_accuracy(row, rung, session, self._settings.accuracy)
            if self._settings.latency is None or not rung.runtime.timed:
                return row, None
            call = session.bind({INPUT_NAME: self._one_input(rung)})
            call()  # what cannot run fails here, in its own row
        except RuntimeUnavailableError as error:
            if self._settings.runtimes:
                raise
            return dataclasses.replace(row, verdict="not-checkable", reason=error.message), None
        except Exception as error:  # an engine may raise anything; the other rungs must still be checked
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return dataclasses.replace(row, verdict="error", reason=reason[:300]), None
        return row, call

    def _compare(self, row: ParityRow, rung: Rung, session: Session) -> ParityRow:
        outputs = _run_all(session, self._golden.x_NCHW, rung.batch)
        found: Comparison = compare_outputs(
            outputs, names=rung.output_names, reference=self._golden.outputs_fp64,
            tolerances={name: tolerance_for(rung.precision, floor) for name, floor in self._floors.items()},
            decisions=self._manifest.spec.task == "classify",
        )  # fmt: skip
        return dataclasses.replace(
            row, verdict=found.verdict, reason=found.reason, rel_l2=found.rel_l2, max_abs=found.max_abs,
            top1_agreement=found.top1_agreement, top5_agreement=found.top5_agreement,
            num_images=len(self._golden.x_NCHW), limit=found.limit,
        )  # fmt: skip

    def _measure_accuracy(self, row: ParityRow, rung: Rung, session: Session, data: LabelledImages) -> ParityRow:
        def compute(x_NCHW: npt.NDArray[np.float32]) -> npt.NDArray[np.generic]:
            logits: npt.NDArray[np.generic] = _run_all(session, x_NCHW, rung.batch)[rung.output_names[0]]
            return logits

        def progress(done: int, total: int) -> None:
            self._progress(f"accuracy of {rung.artifact} on {rung.runtime.name}", done, total)

        spec = self._manifest.spec
        found = measure_accuracy(compute, data, spec.preprocess, progress=progress)
        row = dataclasses.replace(row, top1=found.top1, top5=found.top5, accuracy_images=found.num_images)
        recorded = spec.provenance.accuracy
        if recorded is None or (recorded.dataset, recorded.num_images) != (found.dataset, found.num_images):
            return row
        budget = ACCURACY_BUDGET[rung.precision]
        gap = abs(found.top1 - recorded.top1)
        if gap < budget or math.isclose(gap, budget):  # 0.9305 - 0.93 is more than 0.0005 in binary
            return row
        reason = f"top-1 {100 * found.top1:.2f} %, recorded {100 * recorded.top1:.2f} %, budget {100 * budget:g} points"
        return dataclasses.replace(row, verdict="accuracy", reason=reason)

    def _one_input(self, rung: Rung) -> npt.NDArray[np.float32]:
        return self._golden.x_NCHW[: rung.batch or 1]

    def _time(
        self, rows: list[ParityRow], calls: Mapping[int, Callable[[], None]], settings: LatencySettings
    ) -> dict[int, Timing]:
        names = {f"{rows[index].artifact} on {rows[index].runtime}": index for index in calls}
        found = measure_latency(
            {name: calls[index] for name, index in names.items()}, settings,
            progress=lambda what, done, total: self._progress(f"{self._manifest.spec.name}: {what}", done, total),
        )  # fmt: skip
        if warning := noise_warning(found):
            self.warnings.append(warning)
        return {names[name]: timing for name, timing in found.items()}


def _run_all(session: Session, x_NCHW: npt.NDArray[np.float32], batch: int | None) -> dict[str, Any]:
    """All images, as many a call as the artifact takes; outputs joined along the batch."""
    size = batch or min(len(x_NCHW), 16)
    parts = []
    for start in range(0, len(x_NCHW), size):
        x = x_NCHW[start : start + size]
        short = size - len(x) if batch else 0
        if short:  # a fixed batch is filled up; what is made of the filling is dropped
            x = np.concatenate([x, np.repeat(x[-1:], short, axis=0)])
        outputs = session.run({INPUT_NAME: np.ascontiguousarray(x)})
        parts.append({name: array[: size - short] for name, array in outputs.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
