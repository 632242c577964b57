"""What a target asks of an export: caps before anything is made, and a look at the files before they are kept."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cspdeploy.check.lint import Finding, lint_file
from cspdeploy.core.catalog import DEFAULT_OPSET
from cspdeploy.core.errors import InputError
from cspdeploy.core.targets import TARGETS, Target, find_target

__all__ = ["fit_options", "open_target", "require_accepted"]

NUM_SHOWN = 3
"""Findings in the error; `cspdeploy check` lists all."""


def open_target(name: str | None, *, int8: bool) -> Target | None:
    """What the target takes. None for none, and for an engine that only INT8 files are placed for, such as "arm64".

    Args:
        name: as of `--target`.
        int8: an INT8 file is asked for, for which such an engine can be named.

    Raises:
        InputError: an unknown name, or an engine of INT8 alone without an INT8 file.
    """
    from cspdeploy.quant.placements import PLACEMENTS

    spelled = (name or "").strip().lower()
    if name is None or (int8 and spelled in PLACEMENTS and spelled not in TARGETS):
        return None
    if spelled in PLACEMENTS and spelled not in TARGETS:
        raise InputError(
            f"target '{name}': INT8 files alone are placed for it, and none is asked for",
            fix="add --int8, or leave out --target",
        )
    return find_target(name)


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
