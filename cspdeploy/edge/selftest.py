"""Proves a bundle on the device that it is meant for. Needs no torch, no onnx, and no write access anywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import cspdeploy
from cspdeploy.core.bundle import MANIFEST_FILE, check_hashes, read_manifest
from cspdeploy.core.env import describe_environment, num_usable_cpus
from cspdeploy.core.errors import CspDeployError, InputError, RuntimeUnavailableError, TamperedError
from cspdeploy.core.golden import GOLDEN_FILE, Golden, read_golden
from cspdeploy.core.integrity import file_sha256
from cspdeploy.core.sizes import at_size, golden_file, size_of, sizes_of
from cspdeploy.core.timings import Timings, read_timings
from cspdeploy.core.types import Artifact, Manifest
from cspdeploy.edge.images import Feed
from cspdeploy.edge.opening import OpenedArtifact, find_artifact, open_listed, require_threads
from cspdeploy.edge.selftest_checks import check_golden, check_preprocess, check_provider, measure_median
from cspdeploy.edge.selftest_report import CheckRow, LatencyRow, SelftestReport
from cspdeploy.runtimes import all_runtimes, require_runtime
from cspdeploy.runtimes.base import Runtime

__all__ = ["SelftestRequest", "run_selftest"]

MAX_REASON = 300
ONNX_RUNTIME = "ort-cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelftestRequest:
    """What to check.

    Attributes:
        artifacts: kinds; empty for all that an engine here reads.
        runtime: name; empty for ONNX Runtime on the CPU, and for other formats the engine that is here.
        latency: measure it, too.
        key: public key that must have signed the bundle, or None.
        num_threads: of the engine in one call; 0: as it chooses.
    """

    artifacts: tuple[str, ...] = ()
    runtime: str = ""
    latency: bool = True
    key: Path | None = None
    num_threads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """An artifact and what opens it, or why nothing does."""

    artifact: Artifact
    runtime: Runtime | None
    absent: str = ""


def run_selftest(bundle: Path, request: SelftestRequest | None = None) -> SelftestReport:
    """Check a bundle on this device: signature, files, preprocessing, and every artifact against the golden images.

    Args:
        bundle: the folder, or its manifest.json.

    Raises:
        InputError: not a bundle, an artifact that it has not, a runtime that does not read it, a key that is none.
        RuntimeUnavailableError: an engine or device that was asked for is not here, or none that reads anything.
        MissingExtraError: a signature is to be checked without the package for it.
    """
    asked = request or SelftestRequest()
    require_threads(asked.num_threads)
    folder = bundle.parent if bundle.name == MANIFEST_FILE else bundle
    if folder.is_file():
        raise InputError(
            f"{folder}: one file, expected a bundle: what its answers must be is in the bundle's {GOLDEN_FILE}",
            fix="name the bundle's folder",
        )
    try:
        return _Selftest(folder, asked).report()
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror or error}", fix="make it readable for this user") from error


class _Selftest:
    def __init__(self, folder: Path, asked: SelftestRequest) -> None:
        self._folder, self._asked = folder, asked
        self._manifest = read_manifest(folder)
        self._planned = _plan(folder, self._manifest, asked)
        self._timings, remark = read_timings(folder)
        self._remarks = [remark] if remark else []
        self._latency: list[LatencyRow] = []

    def report(self) -> SelftestReport:
        checks = self._whole()
        if all(row.verdict != "fail" for row in checks):
            for size_px in sizes_of(planned.artifact for planned in self._planned):
                golden = read_golden(self._folder / golden_file(size_px))
                checks.append(check_preprocess(golden, at_size(self._manifest, size_px), size_px=size_px))
                for planned in self._planned:
                    if size_of(planned.artifact.kind) == size_px:
                        checks += self._artifact(planned, golden)
        else:
            checks += [_skipped(planned, "not opened: its bundle is not whole") for planned in self._planned]
        return SelftestReport(
            verdict="fail" if any(row.verdict == "fail" for row in checks) else "pass",
            bundle=str(self._folder), model=self._manifest.spec.name,
            manifest_sha256=file_sha256(self._folder / MANIFEST_FILE),
            untrained=self._manifest.spec.provenance.untrained, checks=tuple(checks), latency=tuple(self._latency),
            recorded_machine=self._timings.machine if self._timings and self._latency else "",
            remarks=tuple(self._remarks), environment=_environment(),
        )  # fmt: skip

    def _whole(self) -> list[CheckRow]:
        """Signature and hashes."""
        checks = []
        if self._asked.key is not None:
            from cspdeploy.core.signature import verify_folder

            try:
                verify_folder(self._folder, self._asked.key)
                checks.append(CheckRow(check="signature", verdict="pass", reason=f"by {self._asked.key}"))
            except TamperedError as error:
                checks.append(CheckRow(check="signature", verdict="fail", reason=error.message))
        sizes = {one.file: one.num_bytes for one in self._manifest.artifacts}
        sizes |= {one.file: one.num_bytes for one in self._manifest.files}
        for name in map(golden_file, sizes_of(self._manifest.artifacts)):
            if name not in sizes:
                raise InputError(f"{self._folder}: the manifest names no {name}", fix="export the bundle again")
        megabytes = sum(sizes.values()) / 1e6
        try:
            check_hashes(self._folder, self._manifest)
            checks.append(CheckRow(check="files", verdict="pass", reason=f"{len(sizes)} files, {megabytes:.1f} MB"))
        except TamperedError as error:
            checks.append(CheckRow(check="files", verdict="fail", reason=error.message))
        return checks

    def _artifact(self, planned: _Planned, golden: Golden) -> list[CheckRow]:
        if planned.runtime is None:
            return [_skipped(planned, planned.absent)]
        try:
            opened = open_listed(
                self._folder, self._manifest, planned.artifact, runtime=planned.runtime,
                num_threads=self._asked.num_threads,
            )  # fmt: skip
            checks = [check_provider(opened), check_golden(opened, planned.artifact, golden, self._manifest)]
            if self._asked.latency and planned.runtime.timed:
                self._latency.append(self._measure(opened, golden))
        except RuntimeUnavailableError:
            raise
        except Exception as error:  # an engine may raise anything; the other artifacts must still be checked
            told = error.message if isinstance(error, CspDeployError) else str(error) or type(error).__name__
            reason = " ".join(told.split())[:MAX_REASON]
            return [_row(planned, "fail", reason)]
        return checks

    def _measure(self, opened: OpenedArtifact, golden: Golden) -> LatencyRow:
        """One call as an application makes it, in a hot loop."""
        batch = opened.batch or 1
        if opened.frontend is None:
            x = golden.x_NCHW[:1]
        else:
            x = Feed(contract=opened.contract, frontend=opened.frontend).prepare(golden.images[0])
        call = opened.session.bind({opened.input_name: np.ascontiguousarray(np.repeat(x, batch, axis=0))})
        p50_ms, num_runs = measure_median(call)
        return _against(self._timings, LatencyRow(
            artifact=opened.kind, runtime=opened.runtime.name, p50_ms=round(p50_ms, 4), batch=batch, num_runs=num_runs,
            threads=self._asked.num_threads or num_usable_cpus(),
        ))  # fmt: skip


def _against(timings: Timings | None, row: LatencyRow) -> LatencyRow:
    recorded = timings.find(row.artifact, row.runtime) if timings is not None else None
    if recorded is None or recorded.batch != row.batch:
        return row
    return dataclasses.replace(
        row, recorded_ms=recorded.p50_ms, recorded_threads=recorded.threads,
        ratio=round(row.p50_ms / recorded.p50_ms, 4),
    )  # fmt: skip


def _plan(folder: Path, manifest: Manifest, asked: SelftestRequest) -> list[_Planned]:
    """What is checked on what.

    Raises:
        InputError: no such artifact, or a runtime that does not read what was asked for.
        RuntimeUnavailableError: what was asked for has no engine here, or nothing has.
    """
    wanted = [find_artifact(folder, manifest, kind) for kind in dict.fromkeys(asked.artifacts)]
    given = require_runtime(asked.runtime) if asked.runtime else None
    planned = [_choose(artifact, given) for artifact in wanted or manifest.artifacts]
    absent = [item for item in planned if item.runtime is None]
    if absent and (wanted or len(absent) == len(planned)):
        what = f"'{absent[0].artifact.kind}'" if wanted else "no artifact can be checked"
        if given is not None:
            raise InputError(f"--runtime {given.name}: {what}: {absent[0].absent}", fix="cspdeploy doctor")
        raise RuntimeUnavailableError(f"{folder}: {what}: {absent[0].absent}", fix="pip install 'cspdeploy[cpu]'")
    return planned


def _choose(artifact: Artifact, given: Runtime | None) -> _Planned:
    if given is not None:
        reads = given.reads(format_=artifact.format, precision=artifact.precision)
        return _Planned(
            artifact=artifact, runtime=given if reads else None,
            absent="" if reads else f"{given.name} does not read it",
        )  # fmt: skip
    absent = "no engine reads it"
    for runtime in _candidates(artifact):
        missing = runtime.missing()
        if missing is None:
            return _Planned(artifact=artifact, runtime=runtime)
        absent = f"{missing[0]} ({missing[1]})"
    return _Planned(artifact=artifact, runtime=None, absent=absent)


def _candidates(artifact: Artifact) -> Sequence[Runtime]:
    """CPU engines that read it, ONNX Runtime first."""
    found = [
        runtime
        for runtime in all_runtimes().values()
        if runtime.device == "cpu" and runtime.role == "engine" and not runtime.optional and runtime.timed
        and runtime.reads(format_=artifact.format, precision=artifact.precision)
    ]  # fmt: skip
    return sorted(found, key=lambda runtime: runtime.name != ONNX_RUNTIME)


def _skipped(planned: _Planned, reason: str) -> CheckRow:
    return _row(planned, "skip", reason)


def _row(planned: _Planned, verdict: str, reason: str) -> CheckRow:
    return CheckRow(
        check="golden", artifact=planned.artifact.kind, runtime=planned.runtime.name if planned.runtime else "",
        verdict="fail" if verdict == "fail" else "skip", finding="error" if verdict == "fail" else None, reason=reason,
    )  # fmt: skip


def _environment() -> dict[str, str]:
    return {**describe_environment(), "cspdeploy": cspdeploy.__version__}
