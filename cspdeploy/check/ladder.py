"""`verify`: every artifact of a bundle, or a file, on every runtime, against the reference outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cspdeploy.check.phases import Phases
from cspdeploy.check.regression import compare_bundles, require_comparable
from cspdeploy.check.settings import DEFAULT_TIME_LIMIT_S, Progress, VerifySettings
from cspdeploy.check.subject import Subject, bundle_subjects
from cspdeploy.check.subject_check import PREPROCESS, SubjectCheck
from cspdeploy.core.detection.labelled import LabelledBoxes
from cspdeploy.core.env import describe_environment
from cspdeploy.core.errors import InputError
from cspdeploy.core.results import ParityRow, VerifyReport
from cspdeploy.core.sizes import base_kind
from cspdeploy.core.tolerance import ALL_ARTIFACTS

__all__ = [
    "DEFAULT_TIME_LIMIT_S", "VerifySettings", "compare_with", "require_comparable", "verify_bundles", "verify_subjects",
]  # fmt: skip

_BLAMABLE = ("numeric", "nan", "decision", "accuracy")
"""Verdicts whose cause is a node of the graph."""


def verify_bundles(
    folders: list[Path], settings: VerifySettings, *, progress: Progress = lambda what, done, total: None
) -> VerifyReport:
    """Verify bundles one after another. Raises as `verify_subjects`, and for a bundle that cannot be read.

    Raises:
        InputError: a bundle that cannot be read.
        TamperedError: a file is not the one of the manifest.
    """
    subjects = (subject for folder in folders for subject in bundle_subjects(folder))
    return verify_subjects(subjects, settings, progress=progress)


def verify_subjects(
    subjects: Iterable[Subject], settings: VerifySettings, *, progress: Progress = lambda what, done, total: None
) -> VerifyReport:
    """Verify subjects one after another; each is let go before the next one is made.

    Raises:
        InputError: labelled images that do not fit, an unknown runtime, a tolerance for an unknown artifact, or
            nothing that could be checked.
        RuntimeUnavailableError: a runtime that was asked for is missing, or did not take the work.
    """
    rows: list[ParityRow] = []
    floors: dict[str, float] = {}
    warnings: list[str] = []
    notes: list[str] = []
    untrained: list[str] = []
    files: dict[tuple[str, str], Path] = {}
    origins: dict[str, Path] = {}
    phases = Phases()
    environment = describe_environment()  # before this loads the machine
    for subject in subjects:
        _require_usable(subject, settings)
        floors[subject.sized_name] = max(subject.floors.values())
        if subject.untrained and subject.name not in untrained:
            untrained.append(subject.name)
        if subject.synthetic:
            warnings.append(f"{subject.name}: judged on random numbers, not on images; --images DIR gives it real ones")
        warnings += [f"{subject.sized_name}: {warning}" for warning in subject.warnings]
        notes += [f"{subject.sized_name}: {note}" for note in subject.notes]
        files |= {(subject.name, made.artifact): made.path for made in subject.candidates}
        if subject.manifest is None:  # of a file by itself, blame must be told what it is judged by
            origins[subject.name] = subject.candidates[0].path
        check = SubjectCheck(subject, settings, phases, progress)
        rows += check.rows()
        warnings += check.warnings
    if not any(row.verdict != "not-checkable" and base_kind(row.artifact) != PREPROCESS for row in rows):
        raise InputError("nothing could be checked: no runtime here reads these artifacts", fix="cspdeploy doctor")
    failed = [row for row in rows if row.failed]
    return VerifyReport(
        verdict="fail" if failed else "pass", first_break=_first_break(failed), noise_floor=floors,
        untrained=tuple(untrained), rows=tuple(rows), warnings=tuple(warnings), notes=tuple(notes),
        environment=environment,
        settings={**_describe(settings), **phases.seconds(), "next_step": _next_step(failed, files, origins)},
    )  # fmt: skip


def compare_with(
    report: VerifyReport,
    old: Path,
    new: Path,
    settings: VerifySettings,
    *,
    progress: Progress = lambda what, done, total: None,
) -> VerifyReport:
    """The report of the bundle `new` with a comparison against an older one.

    What became worse, or is gone, fails the whole: who depends on the file that is gone is no better off. Whether the
    two can be compared at all is told by `require_comparable`, in less time than it takes to verify the new one.

    Raises:
        InputError: bundles of other classes or outputs, or one that cannot be read.
        TamperedError: a file is not the one of its manifest.
    """
    subjects = list(bundle_subjects(old))
    known = {ALL_ARTIFACTS, *(made.artifact for subject in subjects for made in subject.candidates)}
    given = {name: limit for name, limit in settings.tolerances.items() if name in known}
    before = verify_subjects(subjects, dataclasses.replace(settings, latency=None, tolerances=given), progress=progress)
    found = compare_bundles(old, new, old_rows=before.rows, new_rows=report.rows, settings=settings, progress=progress)
    lost = [one for one in found if one.verdict in ("worse", "gone")]
    first = report.first_break
    if lost and not first:
        first = f"against {old}: {lost[0].artifact} on {lost[0].runtime} is {lost[0].verdict}: {lost[0].reason}"
    return dataclasses.replace(
        report, against=str(old), regressions=found, first_break=first, verdict="fail" if lost else report.verdict
    )


def _require_usable(subject: Subject, settings: VerifySettings) -> None:
    data = settings.accuracy
    if data is None:
        return
    if subject.manifest is None:
        raise InputError(
            f"--accuracy {data.name}: {subject.name} is no bundle, so that nothing says how its inputs are made",
            fix="cspdeploy export FILE.onnx --preprocess ...",
        )
    if isinstance(data, LabelledBoxes):
        if subject.task != "detect":
            raise InputError(
                f"--accuracy {data.name}: has boxes, and {subject.name} gives none", fix="give a folder for each class"
            )
        data.in_order_of(subject.labels)
        return
    if subject.task == "detect":
        raise InputError(f"--accuracy {data.name}: has a class for each image, expected boxes",
                         fix="give COCO json, YOLO txt or VOC xml")  # fmt: skip
    if subject.task != "classify":
        raise InputError(
            f"--accuracy {data.name}: {subject.name} gives {', '.join(subject.outputs_fp64)}, not classes",
            fix="verify it without --accuracy",
        )
    if data.labels != subject.labels:
        raise InputError(
            f"--accuracy {data.name}: its classes are not those of {subject.name} "
            f"({', '.join(subject.labels[:5])}, ...)",
            fix="give images of the same classes, under the same names",
        )


def _first_break(failed: list[ParityRow]) -> str:
    """The first rung that broke, the other runtimes on which the same artifact broke, and how much more did."""
    if not failed:
        return ""
    first = failed[0]
    same = [row.runtime for row in failed[1:] if (row.bundle, row.artifact) == (first.bundle, first.artifact)]
    others = len(failed) - 1 - len(same)
    also = f"; it breaks on {', '.join(same)} too" if same else ""
    more = f"; {others} further {'row fails' if others == 1 else 'rows fail'}" if others else ""
    return f"{first.bundle}: {first.artifact} on {first.runtime}: {first.reason}{also}{more}"


def _next_step(failed: list[ParityRow], files: Mapping[tuple[str, str], Path], origins: Mapping[str, Path]) -> str:
    """The command that finds the node, for the first break that a node can have caused; or empty."""
    for row in failed:
        path = files.get((row.bundle, row.artifact))
        if path is not None and path.suffix == ".onnx" and row.verdict in _BLAMABLE:
            origin = origins.get(row.bundle)
            against = "" if origin is None else f" --against {'itself' if origin == path else origin}"
            return f"cspdeploy blame {path}{against} --runtime {row.runtime}"
    return ""


def _describe(settings: VerifySettings) -> dict[str, Any]:
    """As the report keeps it: how everything was measured."""
    return {
        "runtimes": list(settings.runtimes),
        "latency": dataclasses.asdict(settings.latency) if settings.latency else None,
        "accuracy": settings.accuracy.name if settings.accuracy else "",
        "tolerances": {name or "*": value for name, value in settings.tolerances.items()},
        "strict_placement": settings.strict_placement,
        "audit": settings.audit,
        "isolate": settings.isolate,
        "time_limit_s": settings.time_limit_s,
        "repeats": settings.repeats,
        "device": settings.device,
    }
