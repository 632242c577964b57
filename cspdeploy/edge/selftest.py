"""Proves a bundle on the device that it is meant for. Needs no torch, no onnx, and no write access anywhere."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

import cspdeploy
from cspdeploy.core.bundle import MANIFEST_FILE, check_hashes, read_manifest
from cspdeploy.core.env import describe_environment, num_usable_cpus
from cspdeploy.core.errors import CspDeployError, InputError, RuntimeUnavailableError, TamperedError
from cspdeploy.core.golden import GOLDEN_FILE, Golden, read_golden
from cspdeploy.core.json_file import read_json_bytes
from cspdeploy.core.manifest import file_names, parse_manifest
from cspdeploy.core.sizes import at_size, golden_file, size_of, sizes_of
from cspdeploy.core.timings import Timings, read_timings
from cspdeploy.core.types import Manifest
from cspdeploy.edge.engine_options import require_device, require_threads
from cspdeploy.edge.images import Feed
from cspdeploy.edge.opening import OpenedArtifact, open_listed
from cspdeploy.edge.selftest_checks import check_golden, check_preprocess, check_provider, measure_median
from cspdeploy.edge.selftest_contract import check_contract
from cspdeploy.edge.selftest_plan import ONNX_RUNTIME, Planned, plan_artifacts
from cspdeploy.edge.selftest_repeats import check_repeats
from cspdeploy.edge.selftest_report import CheckRow, LatencyRow, SelftestReport
from cspdeploy.runtimes import require_runtime

__all__ = ["SelftestRequest", "run_selftest"]

MAX_REASON = 300
MAX_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SelftestRequest:
    """What to check.

    Attributes:
        artifacts: kinds; empty for all that an engine here reads.
        runtime: name; empty for ONNX Runtime on the CPU, and for other formats the engine that is here.
        latency: measure it, too.
        key: public key that must have signed the bundle, or None.
        num_threads: of the engine in one call; 0: as it chooses.
        device: GPU to run on, of those that CUDA shows to this process; None: the first. For a runtime on GPUs alone.
    """

    artifacts: tuple[str, ...] = ()
    runtime: str = ""
    latency: bool = True
    key: Path | None = None
    num_threads: int = 0
    device: int | None = None


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
    if asked.device is not None:
        require_device(asked.device, require_runtime(asked.runtime or ONNX_RUNTIME))
    folder = bundle.parent if bundle.name == MANIFEST_FILE else bundle
    if folder.is_file():
        raise InputError(
            f"{folder}: one file, expected a bundle: what its answers must be is in the bundle's {GOLDEN_FILE}",
            fix="name the bundle's folder",
        )
    try:
        checked = _Selftest(folder, asked)
        try:
            return checked.report()
        except CspDeployError as error:
            error.facts["manifest_sha256"] = checked.manifest_sha256
            raise
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror or error}", fix="make it readable for this user") from error


class _Selftest:
    def __init__(self, folder: Path, asked: SelftestRequest) -> None:
        self._folder, self._asked = folder, asked
        # One read: what is signed, what is checked, and what the report names are the same bytes.
        data = read_json_bytes(folder / MANIFEST_FILE)
        self.manifest_sha256 = hashlib.sha256(data).hexdigest()
        self._began = datetime.now(UTC)
        self._missing = _missing_files(folder, parse_manifest(data, name=str(folder / MANIFEST_FILE)))
        self._manifest, self._signature = _signed(folder, data, asked.key, missing=self._missing)
        self._timings, remark = read_timings(folder)
        self._remarks = [remark] if remark else []
        self._latency: list[LatencyRow] = []

    def report(self) -> SelftestReport:
        """All checks.

        Raises:
            CspDeployError: as `run_selftest`.
        """
        self._planned = plan_artifacts(
            self._folder, self._manifest, kinds=self._asked.artifacts, runtime=self._asked.runtime
        )
        checks = self._whole()
        if all(row.verdict != "fail" for row in checks):
            checks.append(check_contract(self._folder, self._manifest, [one.artifact for one in self._planned]))
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
            time_utc=self._began.isoformat(timespec="seconds"), host=platform.node(), requested={
                "artifacts": list(self._asked.artifacts), "runtime": self._asked.runtime,
                "threads": self._asked.num_threads, "device": self._asked.device,
            },
            manifest_sha256=self.manifest_sha256,
            untrained=self._manifest.spec.provenance.untrained, checks=tuple(checks), latency=tuple(self._latency),
            recorded_machine=self._timings.machine if self._timings and self._latency else "",
            remarks=tuple(self._remarks), environment=_environment(),
        )  # fmt: skip

    def _whole(self) -> list[CheckRow]:
        """Signature and hashes."""
        checks = list(self._signature)
        sizes = {one.file: one.num_bytes for one in self._manifest.artifacts}
        sizes |= {one.file: one.num_bytes for one in self._manifest.files}
        for name in map(golden_file, sizes_of(self._manifest.artifacts)):
            if name not in sizes:
                raise InputError(f"{self._folder}: the manifest names no {name}", fix="export the bundle again")
        megabytes = sum(sizes.values()) / 1e6
        if self._missing:
            more = f" and {len(self._missing) - MAX_NAMED} more" if len(self._missing) > MAX_NAMED else ""
            reason = f"{', '.join(self._missing[:MAX_NAMED])}{more}: missing, named in the manifest: copied in part?"
            return [*checks, CheckRow(check="files", verdict="fail", reason=reason)]
        try:
            check_hashes(self._folder, self._manifest)
            checks.append(CheckRow(check="files", verdict="pass", reason=f"{len(sizes)} files, {megabytes:.1f} MB"))
        except (InputError, TamperedError) as error:  # what is not of the bundle, or cannot be read, is one fault more
            checks.append(CheckRow(check="files", verdict="fail", reason=error.message))
        return checks

    def _artifact(self, planned: Planned, golden: Golden) -> list[CheckRow]:
        if planned.runtime is None:
            return [_skipped(planned, planned.absent)]
        try:
            opened = open_listed(
                self._folder, self._manifest, planned.artifact, runtime=planned.runtime,
                num_threads=self._asked.num_threads, device=self._asked.device,
            )  # fmt: skip
            recorded = self._timings.find(opened.kind, opened.runtime.name) if self._timings is not None else None
            found = check_golden(
                opened, planned.artifact, golden, self._manifest,
                recorded_rel_l2=recorded.rel_l2 if recorded is not None else None,
            )  # fmt: skip
            checks = [check_provider(opened), check_repeats(found, opened, golden)]
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


def _missing_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files that the manifest names and that are not there. What is there and no plain file is refused elsewhere."""
    return [name for name in file_names(manifest) if not os.path.lexists(folder / name)]


def _signed(
    folder: Path, data: bytes, key: Path | None, *, missing: Sequence[str]
) -> tuple[Manifest, tuple[CheckRow, ...]]:
    """The manifest, and what is to be said of its signature: nothing where no key is given."""
    if missing:
        skipped = CheckRow(check="signature", verdict="skip", reason="the bundle is not whole")
        return parse_manifest(data, name=str(folder / MANIFEST_FILE)), () if key is None else (skipped,)
    if key is None:
        return read_manifest(folder, data=data), ()
    from cspdeploy.core.signature import verify_manifest

    try:
        manifest, fingerprint = verify_manifest(folder, key, data=data)
    except TamperedError as error:
        row = CheckRow(check="signature", verdict="fail", reason=error.message)
        return read_manifest(folder, data=data), (row,)
    reason = f"{manifest.spec.name}, by {key} ({fingerprint[:16]})"
    return manifest, (CheckRow(check="signature", verdict="pass", reason=reason),)


def _against(timings: Timings | None, row: LatencyRow) -> LatencyRow:
    recorded = timings.find(row.artifact, row.runtime) if timings is not None else None
    if recorded is None or recorded.p50_ms is None or recorded.batch != row.batch:
        return row
    row = dataclasses.replace(row, recorded_ms=recorded.p50_ms, recorded_threads=recorded.threads)
    if recorded.threads != row.threads:
        return row
    return dataclasses.replace(row, ratio=round(row.p50_ms / recorded.p50_ms, 4))


def _skipped(planned: Planned, reason: str) -> CheckRow:
    return _row(planned, "skip", reason)


def _row(planned: Planned, verdict: str, reason: str) -> CheckRow:
    return CheckRow(
        check="golden", artifact=planned.artifact.kind, runtime=planned.runtime.name if planned.runtime else "",
        verdict="fail" if verdict == "fail" else "skip", finding="error" if verdict == "fail" else None, reason=reason,
    )  # fmt: skip


def _environment() -> dict[str, str]:
    return {**describe_environment(), "cspdeploy": cspdeploy.__version__}
