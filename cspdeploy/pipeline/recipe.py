"""`export`: a model -> TorchScript, ONNX -> simplified -> rewritten -> FP16, INT8, then the bundle around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cspdeploy.core.bundle import BUNDLE, disk_errors, file_record, staged_folder, write_manifest
from cspdeploy.core.catalog import DEFAULT_OPSET, MAX_OPSET, MIN_OPSET
from cspdeploy.core.codec import to_json
from cspdeploy.core.detection.spec import Decode, SuppressionOptions
from cspdeploy.core.env import tool_versions
from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import LABELS_FILE, write_text
from cspdeploy.core.sizes import Size, size_label, size_of, sizes_of
from cspdeploy.core.targets import Target
from cspdeploy.core.types import Artifact, FileRecord, Frontend, Manifest, StepRecord
from cspdeploy.pipeline.also_step import write_config
from cspdeploy.pipeline.cards import stamp_cards
from cspdeploy.pipeline.decode_step import require_contract
from cspdeploy.pipeline.foreign import OnnxOrigin, is_onnx
from cspdeploy.pipeline.frontend_step import frontend_refusal
from cspdeploy.pipeline.int8_step import Int8Request, refusal
from cspdeploy.pipeline.one_size import OneSize
from cspdeploy.pipeline.origin import Origin, TorchOrigin
from cspdeploy.pipeline.source import resolve_source
from cspdeploy.pipeline.target import fit_options, open_target, require_accepted
from cspdeploy.pipeline.weights import ASSUMED_ANCHORS, assumes_anchors

__all__ = ["ANCHORS", "ExportReport", "ExportRequest", "export_bundle"]

Progress = Callable[[str, int, int], None]

ANCHORS = "anchors"
"""Key of the manifest's options that says of which the anchors are, where that had to be assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What to export, and how. Paths are as the user gave them."""

    model: str
    models: Path = Path("models")
    output: Path = Path("exported")
    weights: str | None = None
    calibration: Path | None = None
    names: Path | None = None
    size_px: Size | None = None
    further_sizes_px: tuple[Size, ...] = ()
    """The ONNX files are made for these, too, each with golden images and INT8 ranges of its own."""
    preprocess: str | None = None
    """Contract of an ONNX file's images: a name of `cspdeploy.core.contracts`, or a JSON file."""
    features: bool = False
    strides: tuple[int, ...] = ()
    """Of the feature maps; empty: the usual ones. Only with `features`."""
    decode: Decode | None = None
    """What the ONNX files of a detector give; None: "decoded", or what the model's description says."""
    suppression: SuppressionOptions | None = None
    """What is to be another one than the model's description says; None: nothing."""
    fp16: bool = False
    int8: Int8Request | None = None
    """None: no INT8 file."""
    also: tuple[str, ...] = ()
    """Further forms, of `cspdeploy.pipeline.also_step.ALSO`."""
    frontend: Frontend | None = None
    """Preprocessing in the graph of further files, beside those without; None: no such files."""
    opset: int | None = None
    """None: the default, an ONNX file's own, or the highest that the target takes."""
    dynamic_batch: bool = False
    target: str | None = None
    """A runtime that the files must be fit for: a name of `cspdeploy.core.targets`."""
    slower_split: tuple[Size | None, ...] | None = None
    """Sizes (None: the first) at which splitting the expansion convolutions was measured slower, and is left out again:
    a decision by the clock would not repeat. None: it is measured. No option of the user's; `reproduce` fills it in."""

    def __post_init__(self) -> None:
        if self.opset is not None and self.target is None and not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise InputError(
                f"--opset {self.opset}: expected {MIN_OPSET} to {MAX_OPSET}", fix=f"--opset {DEFAULT_OPSET}"
            )
        if self.strides and not self.features:
            raise InputError("--strides: are of feature maps", fix="add --features")
        if self.features and (self.decode or self.suppression):
            asked = "--decode" if self.decode or self.suppression is None else self.suppression.first_option
            raise InputError(f"{asked}: is of boxes, --features gives none", fix=f"leave out --features or {asked}")
        if self.features and self.frontend is not None and self.frontend.top_k:
            raise InputError("--embed-topk: is of classes, --features gives none", fix="leave out --embed-topk")
        if not is_onnx(self.model):
            if self.preprocess is not None:
                raise InputError(
                    f"--preprocess {self.preprocess}: is for ONNX files; '{self.model}' has its own contract",
                    fix="leave it out",
                )
            return
        pt2 = True if "pt2" in self.also else None
        given = {
            "--weights": self.weights,
            "--decode": self.decode,
            self.suppression.first_option if self.suppression else "": self.suppression,
            "--features": self.features or None,
            "--also pt2": pt2,
        }
        for option in (name for name, value in given.items() if value is not None):
            raise InputError(f"{option}: is of networks that are built here, {self.model} is one already",
                             fix=f"leave out {option}")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """The bundle that was written."""

    folder: str
    manifest: Manifest

    @property
    def refused_int8(self) -> str:
        """Why there is no INT8 file although one was asked for, in one sentence; empty otherwise."""
        return self._refused(refusal)

    @property
    def refused_frontend(self) -> str:
        """The same of preprocessing in the graph."""
        return self._refused(frontend_refusal)

    @property
    def assumed_anchors(self) -> str:
        """A sentence where anchors had to be assumed; empty otherwise."""
        told = self.manifest.options.get(ANCHORS)
        return f"anchors and scale_x_y of the heads: {told}" if told else ""

    def _refused(self, find: Callable[[tuple[StepRecord, ...]], str]) -> str:
        """Of each size, those beyond the first by name."""
        artifacts = self.manifest.artifacts
        found = {
            size_px: find(tuple(step for made in artifacts if size_of(made.kind) == size_px for step in made.steps))
            for size_px in sizes_of(artifacts)
        }
        return "; ".join(f"{size_label(size)} {why}".strip() for size, why in found.items() if why)


def export_bundle(request: ExportRequest, *, progress: Progress = lambda what, done, total: None) -> ExportReport:
    """Export one model into `<output>/<model>/`, whole or not at all.

    Raises:
        InputError: the request does not fit together, the target would not take the files, or the bundle cannot be
            written.
    """
    progress("loading weights", 0, 6)
    target = open_target(request.target, int8=request.int8 is not None)
    origin = _find_origin(request, target)
    require_contract(origin.spec.detection, opset=origin.opset, target=target, also=request.also)
    _require_sizes(request, origin)
    folder = request.output / origin.spec.name
    with disk_errors(folder, kind=BUNDLE), staged_folder(folder) as staging:
        manifest = _write(request, origin, target, staging, progress)
    return ExportReport(folder=str(folder), manifest=manifest)


def _find_origin(request: ExportRequest, target: Target | None) -> Origin:
    opset = fit_options(target, opset=request.opset, dynamic_batch=request.dynamic_batch)
    operators = target.decompose if target else frozenset[str]()
    if is_onnx(request.model):
        return OnnxOrigin(
            Path(request.model), preprocess=request.preprocess, images=request.calibration, names=request.names,
            size_px=request.size_px, opset=request.opset, max_opset=target.max_opset if target else None,
            operators=operators, dynamic_batch=request.dynamic_batch,
        )  # fmt: skip
    source = resolve_source(
        request.model, models=request.models, weights=request.weights, names=request.names,
        images=request.calibration, size_px=request.size_px, strides=request.strides if request.features else None,
        decode=request.decode, suppression=request.suppression,
    )  # fmt: skip
    return TorchOrigin(source, opset=opset, operators=operators)


def _write(
    request: ExportRequest, origin: Origin, target: Target | None, staging: Path, progress: Progress
) -> Manifest:
    """All files of a bundle into its staging folder."""
    asked = request.target
    target_name = target.name if target else asked.strip().lower() if asked else None  # as it is in the tables
    spec, options = origin.spec, _options(request, origin, target_name)
    labels, artifacts, records = origin.labels, list[Artifact](), list[FileRecord]()
    for size_px in (None, *request.further_sizes_px):
        if size_px is not None:
            origin = _find_origin(dataclasses.replace(request, size_px=size_px), target)
        made, golden = OneSize(
            request, origin, target, staging, progress, target_name=target_name, size_px=size_px
        ).write()
        artifacts += made
        records.append(golden)
    if target is not None:
        require_accepted((staging / artifact.file for artifact in artifacts if artifact.format == "onnx"), target)
    write_text(staging / LABELS_FILE, "\n".join(labels) + "\n")
    records.insert(1, file_record(staging / LABELS_FILE))
    manifest = stamp_cards(staging, Manifest(
        spec=spec, labels=labels, artifacts=tuple(artifacts),
        files=(*records, *write_config(staging, artifacts)), options=options, tools=tool_versions(),
    ))  # fmt: skip
    write_manifest(staging, manifest)
    return manifest


def _options(request: ExportRequest, origin: Origin, target_name: str | None) -> dict[str, Any]:
    size = [origin.spec.preprocess.height_px, origin.spec.preprocess.width_px]
    assumed = {ANCHORS: ASSUMED_ANCHORS} if assumes_anchors(origin.spec, origin.weights) else {}
    return {
        "model": request.model, "weights": origin.weights, "images": origin.images_origin,
        "features": request.features, "strides": list(request.strides),
        "labels": origin.labels_origin, "size_px": size, "fp16": request.fp16,
        "opset": origin.opset, "dynamic_batch": request.dynamic_batch, "preprocess": request.preprocess,
        "target": target_name, "int8": to_json(request.int8), "frontend": to_json(request.frontend),
        "decode": request.decode, "suppression": to_json(request.suppression), "also": list(request.also),
        "further_sizes_px": [list(further) for further in request.further_sizes_px],
    } | assumed  # fmt: skip


def _require_sizes(request: ExportRequest, origin: Origin) -> None:
    """Said now, and not after the first one has been exported."""
    contract = origin.spec.preprocess
    sizes = [(contract.height_px, contract.width_px), *request.further_sizes_px]
    twice = next((size for i, size in enumerate(sizes) if size in sizes[:i]), None)
    if twice is not None:
        raise InputError(f"--size: {twice[0]}x{twice[1]} is there twice", fix="name each size once")
    for size_px in request.further_sizes_px:
        origin.require_size(size_px)
