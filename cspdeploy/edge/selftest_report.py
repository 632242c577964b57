"""What a self-test found: for a person as a table of plain text, for a fleet as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cspdeploy.core.results import Verdict
from cspdeploy.core.text import one_line
from cspdeploy.core.types import PlacedNode

__all__ = ["SELFTEST_SCHEMA_VERSION", "CheckRow", "LatencyRow", "SelftestReport", "render_selftest", "told_of"]

SELFTEST_SCHEMA_VERSION = 1
"""Of what `selftest --json` prints; raised when a field goes or changes its meaning."""

CheckName = Literal["signature", "files", "contract", "preprocess", "golden", "provider"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRow:
    """One check.

    Attributes:
        artifact: kind, or empty where the check is of the whole bundle.
        verdict: "skip" is neither a pass nor a failure, and `reason` says why.
        finding: of the golden check, the verdict that `cspdeploy verify` gives for the same.
        rel_l2, limit, max_abs, top1_agreement, num_images: of the comparison; None where nothing was compared.
        boxes: of a detector, how many the original finds ("expected"), the artifact finds ("found"), and both do
            ("matched"), of those that score clearly above the threshold; else empty.
        num_runs: how often the same images were computed on the same session, and no output was NaN or infinite; None
            where they were not computed again.
        run_difference: largest absolute difference of a later run from the first; None where it is not known.
        recorded_rel_l2: of the same artifact and engine where the bundle was verified; None where none was recorded.
        provider, placement: where the session runs, and how many nodes are on which provider.
        nodes_elsewhere: the first nodes that are not on the provider that was asked for; `reason` tells how many.
    """

    check: CheckName
    artifact: str = ""
    runtime: str = ""
    verdict: Literal["pass", "fail", "skip"]
    finding: Verdict | None = None
    reason: str = ""
    rel_l2: float | None = None
    limit: float | None = None
    recorded_rel_l2: float | None = None
    max_abs: float | None = None
    top1_agreement: float | None = None
    num_images: int | None = None
    num_runs: int | None = None
    run_difference: float | None = None
    boxes: dict[str, int] = field(default_factory=dict)
    provider: str = ""
    placement: dict[str, int] = field(default_factory=dict)
    nodes_elsewhere: tuple[PlacedNode, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRow:
    """Latency here against the recorded one. A figure, never a verdict: the machines differ.

    Attributes:
        p50_ms: median of `num_runs` calls of `batch` images.
        recorded_ms: median where the bundle was verified; None where none was recorded.
        threads: CPUs that the engine may use; of the recorded one in `recorded_threads`.
        ratio: `p50_ms` / `recorded_ms`: above 1, this device is slower. None where the numbers of threads differ, for
            then it would say nothing of the device.
    """

    artifact: str
    runtime: str
    p50_ms: float
    batch: int
    num_runs: int
    threads: int
    recorded_ms: float | None = None
    recorded_threads: int | None = None
    ratio: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SelftestReport:
    """All that was found of one bundle on this device."""

    schema_version: int = SELFTEST_SCHEMA_VERSION
    verdict: Literal["pass", "fail"]
    bundle: str
    model: str
    time_utc: str = ""
    """When it began, by this device's clock: "2026-01-31T12:00:00+00:00"."""
    host: str = ""
    """The device's name, as the system has it."""
    requested: dict[str, Any] = field(default_factory=dict)
    """"artifacts" (empty: all), "runtime" (empty: what reads them), "threads" (0: as the engine chooses), "device" (a
    GPU's index, or None)."""
    manifest_sha256: str
    """Tells one version of a bundle from another, in a fleet."""
    untrained: bool
    checks: tuple[CheckRow, ...]
    latency: tuple[LatencyRow, ...] = ()
    recorded_machine: str = ""
    remarks: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def told_of(report: SelftestReport, *, folder: Path, given: Path, remark: str = "") -> SelftestReport:
    """The same report of what the user named: a package, and not the private folder in which it was unpacked.

    Args:
        remark: one more, or none.
    """
    return dataclasses.replace(
        report, bundle=report.bundle.replace(str(folder), str(given)),
        checks=tuple(
            dataclasses.replace(row, reason=row.reason.replace(str(folder), str(given))) for row in report.checks
        ),
        remarks=(*(text.replace(str(folder), str(given)) for text in report.remarks), *([remark] if remark else [])),
    )  # fmt: skip


def render_selftest(report: SelftestReport) -> str:
    """Plain text, as wide as it must be; ends with the verdict."""
    lines = [f"{report.model}  {report.bundle}", ""]
    lines += _table(
        ("check", "artifact", "runtime", "verdict", ""),
        [(row.check, row.artifact, row.runtime, row.verdict, one_line(_detail(row))) for row in report.checks],
    )
    if report.latency:
        recorded = f"recorded on {report.recorded_machine}" if report.recorded_machine else "recorded"
        head = ("latency", "runtime", "p50 ms", recorded, "ratio")
        lines += ["", *_table(head, [_latency(row) for row in report.latency])]
    shown = ("cpu", "cpus", "python", "onnxruntime", "numpy", "preprocessing")
    told = [f"{name} {report.environment[name]}" for name in shown if report.environment.get(name)]
    lines += ["", ", ".join(told), *report.remarks]
    if report.untrained:
        lines.append("UNTRAINED: random weights, no answer of this model means anything")
    failed = sum(row.verdict == "fail" for row in report.checks)
    skipped = sum(row.verdict == "skip" for row in report.checks)
    lines.append(f"{report.verdict}: {len(report.checks)} checks, {failed} failed, {skipped} skipped")
    return "\n".join(lines) + "\n"


def _detail(row: CheckRow) -> str:
    parts = [row.reason] if row.reason else []
    if row.rel_l2 is not None and row.limit is not None:
        recorded = "" if row.recorded_rel_l2 is None else f", recorded {row.recorded_rel_l2:.1e}"
        parts.append(f"relative L2 {row.rel_l2:.1e} of at most {row.limit:.1e}{recorded}")
    elif row.max_abs is not None:
        parts.append(f"largest difference {row.max_abs:.1e}")
    if row.top1_agreement is not None:
        parts.append(f"top-1 {100 * row.top1_agreement:.1f} %")
    if row.boxes:
        parts.append(f"{row.boxes['matched']} of {row.boxes['expected']} boxes, {row.boxes['found']} found")
    if row.num_images:
        parts.append(f"{row.num_images} images")
    if row.run_difference:
        parts.append(f"runs differ by {row.run_difference:.1e}")
    if row.placement:
        parts.append(", ".join(f"{count} nodes on {name}" for name, count in row.placement.items()))
    elif row.provider:
        parts.append(row.provider)
    return "; ".join(parts)


def _latency(row: LatencyRow) -> tuple[str, ...]:
    recorded = f"{row.recorded_ms:.2f}" if row.recorded_ms is not None else "none"
    ratio = f"{row.ratio:.2f}" if row.ratio is not None else ""
    return (row.artifact, row.runtime, f"{row.p50_ms:.2f}", recorded, ratio)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)]  # fmt: skip
