"""What is asked, and all that follows from it before anything is traced: artifact, reference, inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.check.blame.detector import (
    DetectorForm,
    bring_into,
    detection_of,
    form_of,
    in_golden_form,
    note_on,
    score_gains,
)
from cspdeploy.check.blame.inputs import output_errors, worst_inputs
from cspdeploy.check.blame.measure import exact_distance
from cspdeploy.check.blame.onnx_source import DEFAULT_BUDGET_BYTES
from cspdeploy.check.blame.open import (
    Named,
    as_calls,
    choose_runtime,
    name_candidate,
    name_file,
    open_origin,
    open_source,
)
from cspdeploy.check.blame.reference import Origin
from cspdeploy.check.blame.scaled import in_scale_of
from cspdeploy.check.loose_file import file_subject
from cspdeploy.check.subject import Candidate, Subject, bundle_subject
from cspdeploy.core.bundle import MANIFEST_FILE, read_manifest
from cspdeploy.core.catalog import ARTIFACT_KINDS, EAGER
from cspdeploy.core.errors import InputError
from cspdeploy.core.sizes import size_of, sized_kind, split_kind
from cspdeploy.core.tolerance import tolerance_for
from cspdeploy.core.trace import TraceSource
from cspdeploy.runtimes.base import Runtime

__all__ = ["GOLDEN", "BlameRequest", "Prepared", "prepare"]

Array = npt.NDArray[Any]

GOLDEN, ITSELF = "golden", "itself"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlameRequest:
    """What to look for.

    Attributes:
        artifact: an ONNX or TorchScript file, of a bundle or by itself.
        against: "golden": the original of the artifact's bundle; "itself": the artifact in FP64; or the path of another
            file; empty: golden inside a bundle, which a file by itself must be told.
        runtime: on which the artifact is run; None: the first choice for it.
        against_runtime: on which the reference is run; None: in FP64.
        images, contract: folder of real images for a file by itself, and how they are prepared.
        budget_bytes: of tensors that are kept at once.
        max_inputs: as many of the inputs are traced at most, the first ones; None: those that come out worst, as many
            as there is use for.
    """

    artifact: Path
    against: str = ""
    runtime: str | None = None
    against_runtime: str | None = None
    images: Path | None = None
    contract: str | None = None
    budget_bytes: int = DEFAULT_BUDGET_BYTES
    max_inputs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Ready to be traced. `calls` and `reference_calls` are the same inputs under each one's own names.

    `gains`: by how much the budget of an output is widened in INT8, by its place.
    """

    named: Named
    runtime: Runtime
    source: TraceSource
    origin: Origin
    calls: list[dict[str, Array]]
    reference_calls: list[dict[str, Array]]
    num_inputs: int
    notes: tuple[str, ...]
    gains: Mapping[int, float]


def prepare(request: BlameRequest, *, folder: Path) -> Prepared:
    """Open both sides and choose the inputs.

    Args:
        folder: for edited copies of files; must outlive what is returned.

    Raises:
        InputError: a file that cannot be read, no reference, or two files that do not take the same inputs.
        RuntimeUnavailableError: a runtime that is needed is missing.
        TamperedError: a file of a bundle is not that of its manifest.
    """
    subject = _subject_of(request.artifact)
    _require_floats(request.artifact, subject)
    asked = _candidate_in(subject, request.artifact)
    form = form_of(asked, detection_of(subject))
    named = _named(subject, asked, form, folder=folder / "ours") or name_file(request.artifact)
    runtime = choose_runtime(named, request.runtime)
    origin, theirs, notes = _origin(request, named, subject, form, folder=folder)
    if asked is not None and (told := note_on(asked, form)):
        notes.append(told)
    feeds, more = _feeds(request, named, theirs, subject)
    batch = _common_batch(named, theirs)
    if batch is None and subject is None:
        feeds = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
    source = open_source(named, runtime, folder=folder, budget_bytes=request.budget_bytes)
    if request.max_inputs is not None:
        count = max(batch or 1, request.max_inputs)
        feeds = {name: np.ascontiguousarray(array[:count]) for name, array in feeds.items()}
    calls = as_calls(feeds, batch)
    if subject is not None and request.max_inputs is None:
        feeds = worst_inputs(subject, feeds, output_errors(subject, source, named, calls, form=form), batch)
        calls = as_calls(feeds, batch)
    return Prepared(
        named=named, runtime=runtime, source=source, origin=origin,
        calls=[named.feeds(values) for values in calls], reference_calls=[theirs.feeds(values) for values in calls],
        num_inputs=sum(len(values[0]) if values[0].ndim else 1 for values in calls), notes=(*notes, *more),
        gains=score_gains(form),
    )  # fmt: skip


def _subject_of(path: Path) -> Subject | None:
    """The bundle that a file belongs to, if it does."""
    folder = path.parent
    if not (folder / MANIFEST_FILE).is_file():
        return None
    try:
        listed = {artifact.file: artifact.kind for artifact in read_manifest(folder).artifacts}
    except InputError:
        return None
    return bundle_subject(folder, size_px=size_of(listed[path.name])) if path.name in listed else None


def _require_floats(path: Path, subject: Subject | None) -> None:
    """A file with preprocessing in its graph has the nodes of the one without, and other inputs than the reference."""
    candidates = subject.candidates if subject else ()
    asked = next((made for made in candidates if made.path.name == path.name and made.frontend is not None), None)
    if asked is None:
        return
    base, size_px = split_kind(asked.artifact)
    kind = ARTIFACT_KINDS.get(base)
    wanted = sized_kind(kind.frontend_of, size_px) if kind else ""
    plain = next((made.path for made in candidates if made.artifact == wanted), None)
    raise InputError(
        f"{path}: has preprocessing in its graph" + (f", and behind it the nodes of {plain.name}" if plain else ""),
        fix=f"cspdeploy blame {plain or 'a file that takes floats'}",
    )


def _candidate_in(subject: Subject | None, path: Path) -> Candidate | None:
    return next((item for item in (subject.candidates if subject else ()) if item.path.name == path.name), None)


def _named(subject: Subject | None, made: Candidate | None, form: DetectorForm, *, folder: Path) -> Named | None:
    """A candidate of the subject in that form; its inputs are those of the whole file."""
    if made is None:
        return None
    own = bring_into(made, form, detection_of(subject), folder=folder)
    return dataclasses.replace(name_candidate(made), path=own.path, spec=own.spec, outputs=own.output_names)


def _origin(
    request: BlameRequest, named: Named, subject: Subject | None, form: DetectorForm, *, folder: Path
) -> tuple[Origin, Named, list[str]]:
    against = request.against or (GOLDEN if subject else "")
    if not against:
        raise InputError(
            f"{request.artifact}: not of a bundle, so that nothing says what it should compute",
            fix=f"--against FILE, or --against {ITSELF} for its own FP64",
        )
    place = folder / "theirs"
    if against == GOLDEN:
        if subject is None:
            raise InputError(f"--against {GOLDEN}: {request.artifact} is not of a bundle", fix="--against FILE")
        theirs, notes = _original(subject, named, form, folder=place)
    else:
        path, notes = request.artifact if against == ITSELF else Path(against), []
        other = _subject_of(path)
        theirs = _named(other, _candidate_in(other, path), form, folder=place) or name_file(path)
    origin = open_origin(theirs, folder=folder, runtime=request.against_runtime)
    if theirs.format == "onnx":
        origin = in_scale_of(named.factors, origin, own=theirs.factors)
    return origin, theirs, notes


def _original(subject: Subject, named: Named, form: DetectorForm, *, folder: Path) -> tuple[Named, list[str]]:
    """What stands for the golden outputs inside the network.

    For the first files of the ladder the network itself. For those made from the FP32 ONNX file that file, whose
    tensors have the same names, if its FP64 outputs are the golden ones; it is also taken where the weights that the
    network was made from are not here.
    """
    eager = next((item for item in subject.candidates if item.format == EAGER and not item.absent), None)
    plain = next((item for item in subject.candidates if item.format == "onnx" and item.precision == "fp32"), None)
    derived = named.format == "onnx" and plain is not None and plain.path.name != named.path.name
    network = _named(subject, eager, form, folder=folder)
    if network is not None and not derived:
        return network, []
    file = _named(subject, plain, form, folder=folder)
    if file is not None and plain is not None:
        reason = _disagrees(subject, file, form)
        if not reason:
            why = "" if network is not None else ", since the weights that the bundle was made from are not here"
            return file, [f"the reference is {plain.path.name} in FP64, whose outputs are the golden ones{why}"]
        if network is not None:
            return network, [f"{plain.path.name} is not the reference: {reason}"]
        raise InputError(
            f"{subject.name}: the weights are not here, and {plain.path.name} does not stand for them: {reason}",
            fix="put the weights back where they were at export, or --against FILE",
        )
    raise InputError(
        f"{subject.name}: the weights that the bundle was made from are not here",
        fix="put them back where they were at export, or --against FILE",
    )


def _disagrees(subject: Subject, file: Named, form: DetectorForm) -> str:
    """Why a file's FP64 outputs are not the golden ones, on the first images; empty where they are."""
    origin = open_origin(file, folder=file.path.parent)
    values = as_calls({name: array[: file.batch or 2] for name, array in subject.feeds.items()}, file.batch)[0]
    found: dict[str, list[Array]] = {name: [] for name in origin.exact.outputs}

    def keep(name: str, array: Array, _constant: bool) -> None:
        found[name].append(np.array(array))

    origin.exact.trace([file.feeds(values)], keep, wanted=frozenset(found))
    made = {name: arrays[0] for name, arrays in found.items()}
    for name, array in in_golden_form(made, subject, form).items():
        limit = tolerance_for("fp32", subject.floors[name]).rel_l2
        gap = exact_distance([array], [subject.outputs_fp64[name][: len(values[0])]])
        if not gap <= limit:
            return f"its output {name} is at relative L2 {gap:.1e} of the golden one, limit {limit:.1e}"
    return ""


def _feeds(
    request: BlameRequest, named: Named, theirs: Named, subject: Subject | None
) -> tuple[Mapping[str, Array], list[str]]:
    """Golden images of whichever side has some; else what the artifact's file asks for."""
    other = subject or _subject_of(Path(request.against))
    if other is not None and request.images is None:
        return other.feeds, []
    file = named if named.format == "onnx" else theirs
    if file.format != "onnx":
        raise InputError(f"{named.path}: neither file says what inputs it takes", fix="--against an .onnx file")
    found = file_subject(file.path, images=request.images, contract=request.contract, reference=False)
    notes = ["the inputs are random numbers: --images DIR --preprocess CONTRACT for real ones"]
    return found.feeds, notes if found.synthetic else []


def _common_batch(named: Named, theirs: Named) -> int | None:
    fixed = {item.batch for item in (named, theirs)} - {None}
    if len(fixed) > 1:
        raise InputError(
            f"{named.path}: takes a batch of {named.batch}, {theirs.path} one of {theirs.batch}",
            fix="--against a file with the same batch",
        )
    return next(iter(fixed), None)
