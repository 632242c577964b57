"""What a target asks of an export: caps before anything is made, and a look at the files before they are kept."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cspdeploy.check.lint import Finding, lint_file
from cspdeploy.core.catalog import DEFAULT_OPSET
from cspdeploy.core.errors import InputError
from cspdeploy.core.targets import Target

__all__ = ["fit_options", "require_accepted"]

NUM_SHOWN = 3
"""Findings in the error; `cspdeploy check` lists all."""


def fit_options(target: Target | None, *, opset: int | None, dynamic_batch: bool) -> int:
    """The opset that a network of ours is exported with.

    Raises:
        InputError: an opset, or a free batch, that the target does not take.
    """
    if target is None:
        return opset or DEFAULT_OPSET
    if opset is not None and not target.min_opset <= opset <= target.max_opset:
        raise InputError(
            f"--opset {opset}: {target.name} takes {target.min_opset} to {target.max_opset}",
            fix=f"--opset {min(target.max_opset, DEFAULT_OPSET)}, or leave it out",
        )
    if dynamic_batch and not target.dynamic_batch:
        raise InputError(f"--dynamic-batch: {target.name} takes fixed shapes alone", fix="leave out --dynamic-batch")
    return opset or min(DEFAULT_OPSET, target.max_opset)


def require_accepted(files: Iterable[Path], target: Target) -> None:
    """Check what was written against the target, as `cspdeploy check` does.

    Raises:
        InputError: the target does not take a file; names the first findings.
    """
    for path in files:
        report = lint_file(path, [target]).targets[0]
        found = [finding for finding in report.findings if finding.severity == "violation"]
        if found:
            listed = "; ".join(_line(finding) for finding in found[:NUM_SHOWN])
            more = f" and {len(found) - NUM_SHOWN} more" if len(found) > NUM_SHOWN else ""
            raise InputError(
                f"--target {target.name}: would not take {path.name}: {listed}{more}",
                fix=found[0].fix or f"leave out --target {target.name}",
            )


def _line(finding: Finding) -> str:
    where = " ".join(part for part in (finding.operator, finding.node) if part)
    return f"{where + ': ' if where else ''}{finding.got}, it takes {finding.takes}"
