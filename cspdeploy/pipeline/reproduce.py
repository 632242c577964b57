"""`reproduce`: build a bundle again from what its manifest says, and compare the bytes."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import typing
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from cspdeploy.check.subject import find_weights, onnx_sha256
from cspdeploy.core.bundle import check_hashes, file_sha256, read_manifest
from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.datasets import FASHION_MNIST
from cspdeploy.core.detection.spec import SuppressionOptions
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import GOLDEN_FILE, read_golden
from cspdeploy.core.model_folder import WEIGHTS_FILE
from cspdeploy.core.preprocess import list_images
from cspdeploy.core.types import Artifact, Frontend, Manifest
from cspdeploy.pipeline.graph_steps import slower_splits
from cspdeploy.pipeline.int8_step import Int8Request
from cspdeploy.pipeline.recipe import ANCHORS, ExportRequest, export_bundle
from cspdeploy.pipeline.weights import RANDOM_WEIGHTS
from cspdeploy.runtimes import require_runtime
from cspdeploy.runtimes.base import SessionRequest

__all__ = ["ReproduceReport", "ReproducedFile", "ToolChange", "reproduce_bundle"]

T = TypeVar("T")
REPRODUCE_SCHEMA_VERSION = 1
ENGINE, NUM_COMPARED = "ort-cpu", 4
ALIKE = "other bytes, the same outputs to the bit: ONNX Runtime numbers and orders what it writes run by run"
"""Of .ort and .opt.onnx files; seen with 1.31 even for a graph that it does not touch."""

# As `cspdeploy.pipeline.images` records where images come from: "DIR (12 images)", or a file and the start of its hash.
_IMAGES = re.compile(r"(?P<path>.+) \((?:(?P<count>\d+) images|(?P<sha256>[0-9a-f]{12}))\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproducedFile:
    """One file of the bundle. `rebuilt_sha256` is empty where the export made no such file."""

    file: str
    verdict: Literal["equal", "differs", "not-made", "new"]
    recorded_sha256: str
    rebuilt_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChange:
    """A program that decides the bytes, in another version than then. Empty: not there."""

    name: str
    recorded: str
    here: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproduceReport:
    """A bundle and its rebuilt twin.

    Attributes:
        tools: what may explain a difference, first of all.
        remarks: what else is not as it was: a step that took another way, the model's description.
    """

    schema_version: int = REPRODUCE_SCHEMA_VERSION
    bundle: str
    verdict: Literal["equal", "differs"]
    files: tuple[ReproducedFile, ...]
    tools: tuple[ToolChange, ...]
    remarks: tuple[str, ...]


def reproduce_bundle(
    folder: Path,
    *,
    models: Path = Path("models"),
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> ReproduceReport:
    """Export again, into a temporary folder, and compare the SHA-256 of every artifact and file.

    Args:
        folder: the bundle; it is only read.
        models: folder of model folders, where the export looked for the model.

    Raises:
        InputError: no bundle, or what it was made from is not here or is not what it was; all of it is named.
        TamperedError: a file of the bundle is not the one of its manifest, so that there is nothing to reproduce.
    """
    manifest = read_manifest(folder)
    check_hashes(folder, manifest)
    request = _request(folder, manifest, models)
    with tempfile.TemporaryDirectory(prefix="cspdeploy-reproduce-") as place:
        report = export_bundle(dataclasses.replace(request, output=Path(place)), progress=progress)
        rebuilt = report.manifest
        alike = _alike(folder, manifest, Path(report.folder), rebuilt)
    files = _compare_files(manifest, rebuilt, alike)
    return ReproduceReport(
        bundle=str(folder), verdict="equal" if all(file.verdict == "equal" for file in files) else "differs",
        files=files, tools=_compare_tools(manifest.tools, rebuilt.tools),
        remarks=(*_remarks(manifest, rebuilt), *(f"{name}: {ALIKE}" for name in sorted(alike))),
    )  # fmt: skip


def _request(folder: Path, manifest: Manifest, models: Path) -> ExportRequest:
    """The export that made the bundle. Options that it does not know are not silently left out."""
    options = dict(manifest.options)
    if "model" not in options:
        raise InputError(f"{folder}: its manifest does not say what it was made from", fix="export it again")
    missing: list[str] = []
    values: dict[str, Any] = {
        "model": _model(options, manifest, missing), "models": models,
        "weights": _weights(options, folder, manifest, models, missing),
        "calibration": _images(options, folder, missing), "names": _names(options, manifest, missing),
        "int8": _int8(options, missing), "frontend": _read(options, "frontend", Frontend),
        "suppression": _read(options, "suppression", SuppressionOptions),
    }  # fmt: skip
    _require_trained_plan(manifest, models, missing)
    if missing:
        raise InputError(
            f"{folder}: what it was made from is not here: {'; '.join(missing)}",
            fix="put it back where it was, or run this where the bundle was exported",
        )
    hints = typing.get_type_hints(ExportRequest)
    for name, value in options.items():
        if name in ("images", "labels", ANCHORS) or name in values:
            continue
        if name not in hints:
            raise InputError(
                f"{folder}: made with the option '{name}', which export does not know", fix="update cspdeploy"
            )
        values[name] = _restored(hints[name], value)
    return ExportRequest(**values, slower_split=slower_splits(manifest.artifacts))


def _restored(hint: Any, value: object) -> object:
    """What JSON made of an option back to what it was: lists were tuples, some strings were paths."""
    if isinstance(value, list):
        return tuple(_restored(None, item) for item in value)
    return Path(value) if isinstance(value, str) and Path in (hint, *typing.get_args(hint)) else value


def _model(options: dict[str, Any], manifest: Manifest, missing: list[str]) -> str:
    """A name, a folder or a file. A file that is the model itself must be the one that it was."""
    model = str(options["model"])
    path, sha256 = Path(model), manifest.spec.provenance.weights_sha256
    if path.suffix.lower() == ".onnx" and not (path.is_file() and onnx_sha256(path) == sha256):
        missing.append(f"{model} (SHA-256 {sha256})")
    elif path.suffix.lower() == ".cfg" and not path.is_file():
        missing.append(model)
    return model


def _weights(options: dict[str, Any], folder: Path, manifest: Manifest, models: Path, missing: list[str]) -> str | None:
    recorded, provenance = options.get("weights"), manifest.spec.provenance
    if not recorded or recorded == RANDOM_WEIGHTS:
        return recorded or None  # of an ONNX file from elsewhere there are none: they are in it
    own = models / str(options["model"]) / WEIGHTS_FILE
    if own.is_file() and file_sha256(own) == provenance.weights_sha256:
        return None  # as the export found them; what else the model folder says of them goes along
    found = find_weights(folder, manifest)
    if found is not None:
        return str(found)
    if provenance.source != "published":  # those are fetched again, and checked by the hash that they are pinned to
        missing.append(f"the weights {recorded} (SHA-256 {provenance.weights_sha256})")
    return None


def _images(options: dict[str, Any], folder: Path, missing: list[str]) -> Path | None:
    recorded = str(options.get("images", ""))
    match = _IMAGES.fullmatch(recorded)
    if match is None:
        raise InputError(f"{folder}: its manifest does not say which images it was made with", fix="export it again")
    path = Path(match["path"])
    if match["sha256"]:
        if not path.is_file() or not file_sha256(path).startswith(match["sha256"]):
            missing.append(f"the images {path} (SHA-256 {match['sha256']}...)")
        return None  # the model folder's own, which export finds by itself
    if not path.is_dir():
        missing.append(f"the images {recorded}")
    elif len(list_images(path)) < int(match["count"]):
        missing.append(f"the images {recorded}: {len(list_images(path))} are there")
    return path


def _names(options: dict[str, Any], manifest: Manifest, missing: list[str]) -> Path | None:
    """The file of class names, where there was one: the other origins are sentences."""
    recorded = str(options.get("labels", ""))
    if recorded in ("", "numbered") or recorded.startswith(("COCO", "ImageNet in ", "none: ")):
        return None
    if not Path(recorded).is_file():
        missing.append(f"the class names {recorded} ({len(manifest.labels)} of them)")
    return Path(recorded)


def _int8(options: dict[str, Any], missing: list[str]) -> Int8Request | None:
    """None in bundles without, and in those of versions that did not know it."""
    recorded = options.get("int8")
    if recorded is None:
        return None
    request = from_json(Int8Request, recorded, where="$.options.int8")
    if request.labelled not in (None, FASHION_MNIST) and not Path(request.labelled).is_dir():
        missing.append(f"the labelled images {request.labelled}")
    return request


def _read(options: dict[str, Any], name: str, kind: type[T]) -> T | None:
    """None in bundles without, and in those of versions that did not know it."""
    recorded = options.get(name)
    return None if recorded is None else from_json(kind, recorded, where=f"$.options.{name}")


def _require_trained_plan(manifest: Manifest, models: Path, missing: list[str]) -> None:
    """The weights that were fine-tuned for INT8 lie in the model's folder: a later run of training writes others."""
    for step in (step for artifact in manifest.artifacts for step in artifact.steps if "qat_sha256" in step.facts):
        path = models / manifest.spec.name / str(step.facts.get("qat_file", ""))
        sha256 = str(step.facts["qat_sha256"])
        entry = f"the fine-tuned weights {path} (SHA-256 {sha256})"
        if entry not in missing and not (path.is_file() and file_sha256(path) == sha256):
            missing.append(entry)


def _alike(folder: Path, manifest: Manifest, place: Path, rebuilt: Manifest) -> frozenset[str]:
    """Files in the engine's own form that differ, but give the same outputs of the golden images to the bit."""
    made = {artifact.file: artifact for artifact in rebuilt.artifacts}
    x_NCHW = read_golden(folder / GOLDEN_FILE).x_NCHW[:NUM_COMPARED]

    def outputs(path: Path, artifact: Artifact) -> list[bytes]:
        request = SessionRequest(path=path, outputs=tuple(value.name for value in artifact.outputs))
        session, name = require_runtime(ENGINE).open(request), artifact.inputs[0].name
        found = (session.run({name: x_NCHW[i : i + 1]}) for i in range(len(x_NCHW)))
        return [value.tobytes() for one in found for value in one.values()]

    return frozenset(
        name
        for name, artifact in ((one.file, one) for one in manifest.artifacts if one.format == "ort")
        if name in made and made[name].sha256 != artifact.sha256
        and outputs(folder / name, artifact) == outputs(place / name, made[name])
    )  # fmt: skip


def _compare_files(manifest: Manifest, rebuilt: Manifest, alike: Container[str] = ()) -> tuple[ReproducedFile, ...]:
    recorded, made = _hashes(manifest), _hashes(rebuilt)
    found = []
    for name in dict.fromkeys([*recorded, *made]):
        then, now = recorded.get(name, ""), made.get(name, "")
        verdict: Literal["equal", "differs", "not-made", "new"] = "equal" if then == now or name in alike else "differs"
        if not then or not now:
            verdict = "new" if now else "not-made"
        found.append(ReproducedFile(file=name, verdict=verdict, recorded_sha256=then, rebuilt_sha256=now))
    return tuple(found)


def _hashes(manifest: Manifest) -> dict[str, str]:
    hashes = {artifact.file: artifact.sha256 for artifact in manifest.artifacts}
    return hashes | {record.file: record.sha256 for record in manifest.files}


def _compare_tools(recorded: dict[str, str], here: dict[str, str]) -> tuple[ToolChange, ...]:
    return tuple(
        ToolChange(name=name, recorded=recorded.get(name, ""), here=here.get(name, ""))
        for name in dict.fromkeys([*recorded, *here])
        if recorded.get(name) != here.get(name)
    )


def _remarks(manifest: Manifest, rebuilt: Manifest) -> list[str]:
    """What the manifests tell of a difference: the model's description, options, and steps that went another way."""
    remarks = []
    then, now = to_json(manifest.spec), to_json(rebuilt.spec)
    changed = [name for name in then if then[name] != now[name]]
    if changed:
        remarks.append(f"the model's description is another one: {', '.join(changed)}")
    if manifest.labels != rebuilt.labels:
        remarks.append("the class names are other ones")
    changed = [
        name for name, value in rebuilt.options.items() if name in manifest.options and manifest.options[name] != value
    ]
    remarks += [f"{name}: {rebuilt.options[name]} here, {manifest.options[name]} then" for name in changed]
    made = {artifact.kind: artifact for artifact in rebuilt.artifacts}
    for artifact in manifest.artifacts:
        if artifact.kind in made:
            remarks += [text for text in _changed_steps(artifact, made[artifact.kind]) if text not in remarks]
    return remarks


def _changed_steps(artifact: Artifact, rebuilt: Artifact) -> list[str]:
    """Some steps are decided by what this machine measures, such as whether a rewrite is faster."""
    here = {step.name: step for step in rebuilt.steps}
    found = []
    for step in artifact.steps:
        now = here.get(step.name)
        if now is None or (now.outcome, now.detail) != (step.outcome, step.detail):
            found.append(f"step {step.name}: {now.detail if now else 'not taken'} here, {step.detail} then")
    return found
