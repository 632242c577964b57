"""report.html of a bundle: what was verified, with the error along the layers, as a page; timings.json beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from cspdeploy.core.bundle import BUNDLE, disk_errors, read_manifest
from cspdeploy.core.env import describe_environment
from cspdeploy.core.golden import read_golden
from cspdeploy.core.results import LayerCurve, VerifyReport
from cspdeploy.core.sizes import golden_file, sizes_of
from cspdeploy.core.timings import timings_of, write_timings
from cspdeploy.core.types import Artifact, Manifest
from cspdeploy.report.html import bundle_rows, write_report

__all__ = ["publish_report"]

Progress = Callable[[str, int, int], None]
# Tracing runs a file in this very process, which such a file would take down or hold up.
_NOT_TRACEABLE = ("crash", "hang", "error")


def publish_report(
    folder: Path,
    report: VerifyReport | None = None,
    *,
    layers: bool = True,
    progress: Progress = lambda what, done, total: None,
) -> Path:
    """Write `report.html` into a bundle, and `timings.json` with the latencies of the report, if it has any.

    Args:
        report: of `verify`; None for a bundle that nobody verified, of which the page says so.
        layers: trace the ONNX files for the error along their layers, which takes a run of each in FP64.

    Raises:
        InputError: a bundle that cannot be read, or a folder that cannot be written.
    """
    manifest = read_manifest(folder)
    golden = read_golden(folder / golden_file(sizes_of(manifest.artifacts)[0]))
    curves: tuple[LayerCurve, ...] = ()
    if report is None:
        found = VerifyReport(
            verdict="not-checked", first_break="", noise_floor={}, untrained=(), rows=(), warnings=(),
            environment=describe_environment(),
        )  # fmt: skip
    elif not layers:
        found = report
    else:
        curves, warnings = _curves(folder, manifest, report, progress)
        found = dataclasses.replace(report, warnings=(*report.warnings, *warnings))
    progress("report", len(manifest.artifacts), len(manifest.artifacts))
    with disk_errors(folder, kind=BUNDLE):
        if report is not None:
            rows = bundle_rows(report, folder)
            write_timings(folder, timings_of(rows, environment=report.environment, batches=_batches(manifest)))
        return write_report(folder, manifest=manifest, golden=golden, report=found, curves=curves)


def _batches(manifest: Manifest) -> dict[str, int]:
    """Images a call of those artifacts that take more than one, as `verify` times them."""
    sizes = {artifact.kind: artifact.inputs[0].shape[0] for artifact in manifest.artifacts}
    return {kind: size for kind, size in sizes.items() if isinstance(size, int)}


def _curves(
    folder: Path, manifest: Manifest, report: VerifyReport, progress: Progress
) -> tuple[tuple[LayerCurve, ...], list[str]]:
    """A curve of each ONNX file, and a line for each that has none."""
    untraceable = {row.artifact for row in bundle_rows(report, folder) if row.verdict in _NOT_TRACEABLE}
    curves, warnings = [], []
    for i, artifact in enumerate(manifest.artifacts):
        if artifact.format != "onnx" or artifact.frontend is not None or artifact.kind in untraceable:
            continue
        progress(f"error along the layers of {artifact.kind}", i, len(manifest.artifacts))
        try:
            curves.append(_curve(folder, artifact))
        except Exception as error:  # an engine may raise anything; the page must be written all the same
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.append(f"no error along the layers of {artifact.kind}: {reason[:300]}")
    return tuple(curves), warnings


def _curve(folder: Path, artifact: Artifact) -> LayerCurve:
    from cspdeploy.check.blame import BlameRequest, layer_curve

    found = layer_curve(BlameRequest(artifact=folder / artifact.file))
    # Called as in the rest of the page, where a path of this machine has no place.
    return dataclasses.replace(found, artifact=artifact.kind, against="the original in float64")
