"""`export`: a model -> TorchScript, ONNX -> simplified -> rewritten -> FP16, INT8, then the bundle around them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.check.subject import ONNX_FAMILY
from cspdeploy.core.bundle import BUNDLE, disk_errors, file_record, staged_folder, write_manifest
from cspdeploy.core.catalog import ARTIFACT_KINDS, DEFAULT_OPSET, MAX_OPSET, MIN_OPSET, artifact_file
from cspdeploy.core.codec import to_json
from cspdeploy.core.env import tool_versions
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import GOLDEN_FILE, Golden, num_golden_images, write_golden
from cspdeploy.core.model_folder import LABELS_FILE, write_text
from cspdeploy.core.onnx_graph import DEFAULT_DOMAIN, read_onnx
from cspdeploy.core.targets import Target
from cspdeploy.core.types import Artifact, Frontend, Manifest, StepRecord, TensorInfo
from cspdeploy.export.simplify import start_simplify
from cspdeploy.pipeline.also_step import extend_artifacts, write_config
from cspdeploy.pipeline.cards import stamp_cards
from cspdeploy.pipeline.foreign import OnnxOrigin, is_onnx
from cspdeploy.pipeline.frontend_step import FrontendStep, frontend_refusal
from cspdeploy.pipeline.graph_steps import cap_ir_version, half_step, rewrite_step
from cspdeploy.pipeline.images import prepare
from cspdeploy.pipeline.int8_step import Int8Request, Int8Step, refusal
from cspdeploy.pipeline.origin import Origin, TorchOrigin
from cspdeploy.pipeline.source import resolve_source
from cspdeploy.pipeline.target import fit_options, open_target, require_accepted

__all__ = ["ExportReport", "ExportRequest", "export_bundle"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What to export, and how. Paths are as the user gave them."""

    model: str
    models: Path = Path("models")
    output: Path = Path("exported")
    weights: str | None = None
    calibration: Path | None = None
    names: Path | None = None
    size_px: tuple[int, int] | None = None
    preprocess: str | None = None
    """Contract of an ONNX file's images: a name of `cspdeploy.core.contracts`, or a JSON file."""
    features: bool = False
    strides: tuple[int, ...] = ()
    """Of the feature maps; empty: the usual ones. Only with `features`."""
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

    def __post_init__(self) -> None:
        if self.opset is not None and self.target is None and not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise InputError(
                f"--opset {self.opset}: expected {MIN_OPSET} to {MAX_OPSET}", fix=f"--opset {DEFAULT_OPSET}"
            )
        if self.strides and not self.features:
            raise InputError("--strides: are of feature maps", fix="add --features")
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
        given = {"--weights": self.weights, "--features": self.features or None, "--also pt2": pt2}
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
        return refusal(tuple(step for artifact in self.manifest.artifacts for step in artifact.steps))

    @property
    def refused_frontend(self) -> str:
        """The same of preprocessing in the graph."""
        return frontend_refusal(tuple(step for artifact in self.manifest.artifacts for step in artifact.steps))


def export_bundle(request: ExportRequest, *, progress: Progress = lambda what, done, total: None) -> ExportReport:
    """Export one model into `<output>/<model>/`, whole or not at all.

    Raises:
        InputError: the request does not fit together, the target would not take the files, or the bundle cannot be
            written.
    """
    progress("loading weights", 0, 6)
    target = open_target(request.target, int8=request.int8 is not None)
    origin = _find_origin(request, target)
    folder = request.output / origin.spec.name
    with disk_errors(folder, kind=BUNDLE), staged_folder(folder) as staging:
        manifest = _Export(request, origin, target, staging, progress).write()
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
    )  # fmt: skip
    return TorchOrigin(source, opset=opset, operators=operators)


class _Export:
    """One export in its staging folder."""

    def __init__(
        self, request: ExportRequest, origin: Origin, target: Target | None, staging: Path, progress: Progress
    ) -> None:
        self._request, self._origin, self._target = request, origin, target
        self._staging, self._progress = staging, progress
        self._spec = origin.spec
        num = num_golden_images(
            self._spec.preprocess.height_px, self._spec.preprocess.width_px,
            num_output_values=sum(math.prod(shape) for shape in origin.output_shapes.values()),
        )  # fmt: skip
        # Golden and probe images are different ones where there are enough: every second one.
        picks = np.unique(np.linspace(0, len(origin.images) - 1, 2 * num).astype(np.int64))
        self._golden_images = origin.images[picks[::2]]
        self._int8 = self._open_int8(picks[::2])
        asked = request.frontend
        self._frontend = FrontendStep(asked, self._spec, opset=origin.opset) if asked is not None else None
        self._x_golden = prepare(self._golden_images, self._spec)
        self._x_probe = prepare(origin.images[picks[1::2]], self._spec) if len(picks) > 1 else self._x_golden

    @property
    def _target_name(self) -> str | None:
        """As it is spelled in the tables."""
        asked = self._request.target
        return self._target.name if self._target else asked.strip().lower() if asked else None

    def _open_int8(self, golden: npt.NDArray[np.int64]) -> Int8Step | None:
        """None where it is not asked for."""
        if self._request.int8 is None:
            return None
        return Int8Step(
            self._request.int8, self._spec, labels=self._origin.labels, stored=self._origin.images, golden=golden,
            origin=self._origin.images_origin, folder=self._request.calibration,
            target=self._target_name, weights=self._origin.weights,
        )  # fmt: skip

    def write(self) -> Manifest:
        artifacts = self._artifacts()
        if self._target is not None:
            files = (self._staging / artifact.file for artifact in artifacts if artifact.format == "onnx")
            require_accepted(files, self._target)
        write_text(self._staging / LABELS_FILE, "\n".join(self._origin.labels) + "\n")
        records = tuple(file_record(self._staging / name) for name in (GOLDEN_FILE, LABELS_FILE))
        records += write_config(self._staging, artifacts)
        manifest = stamp_cards(self._staging, Manifest(
            spec=self._spec, labels=self._origin.labels, artifacts=tuple(artifacts), files=records,
            options=self._options(), tools=tool_versions(),
        ))  # fmt: skip
        write_manifest(self._staging, manifest)
        return manifest

    def _options(self) -> dict[str, Any]:
        request = self._request
        size = [self._spec.preprocess.height_px, self._spec.preprocess.width_px]
        return {
            "model": request.model, "weights": self._origin.weights, "images": self._origin.images_origin,
            "features": request.features, "strides": list(request.strides),
            "labels": self._origin.labels_origin, "size_px": size, "fp16": request.fp16,
            "opset": self._origin.opset, "dynamic_batch": request.dynamic_batch, "preprocess": request.preprocess,
            "target": self._target_name, "int8": to_json(request.int8), "frontend": to_json(request.frontend),
            "also": list(request.also),
        }  # fmt: skip

    def _artifacts(self) -> list[Artifact]:
        """All steps. While onnxsim's child works, this process traces and computes the reference."""
        work = self._staging / "work"
        work.mkdir()
        raw, simplified, rewritten = (work / f"{name}.onnx" for name in ("raw", "simplified", "rewritten"))
        self._progress("ONNX", 1, 6)
        steps = self._origin.write_onnx(raw, self._x_golden, dynamic_batch=self._request.dynamic_batch)
        job = start_simplify(raw, simplified)
        try:
            self._progress("TorchScript and onnxsim" if self._source_is_torch() else "onnxsim", 2, 6)
            traced = self._origin.write_torchscript(self._path("torchscript"), self._x_golden)
            self._progress("reference outputs in FP64", 3, 6)
            self._write_golden()
            self._progress("simplifying", 4, 6)
            steps += (job.finish(self._x_golden, batch=1),)
        finally:
            job.stop()
        steps += rewrite_step(simplified, rewritten, self._x_golden, input_name=self._origin.input_name)
        shutil.move(rewritten if rewritten.is_file() else simplified, self._path("onnx"))
        if self._target is not None and self._target.max_ir is not None:
            cap_ir_version(self._path("onnx"), self._target.max_ir)
        converted = {"onnx-fp16": self._convert_fp16(), **self._quantise()}
        if self._frontend is not None:
            self._progress("preprocessing in the graph", 5, 6)
            self._frontend.measure(self._golden_images, self._x_golden, floats=self._path("onnx"), work=work)
        shutil.rmtree(work)
        made = {kind: step for kind, step in converted.items() if step is not None and step.outcome == "done"}
        refused = (step for step in converted.values() if step is not None and step.outcome == "kept")
        artifacts = [self._artifact("torchscript", (traced,))] if traced is not None else []
        artifacts.append(self._artifact("onnx", (*steps, *refused)))
        artifacts += [self._artifact(kind, (*steps, step)) for kind, step in made.items()]
        frontend = self._frontend
        if frontend is not None:
            artifacts = frontend.extend(artifacts, path=self._path, describe=self._artifact)
        if self._request.also:
            self._progress(f"{', '.join(self._request.also)} files", 5, 6)
        return extend_artifacts(
            artifacts, self._request.also, path=self._path, describe=self._artifact,
            write_pt2=lambda path: self._origin.write_pt2(path, self._x_golden),
        )  # fmt: skip

    def _convert_fp16(self) -> StepRecord | None:
        """None where it is not asked for."""
        if not self._request.fp16:
            return None
        self._progress("FP16", 5, 6)
        paths = self._path("onnx"), self._path("onnx-fp16")
        return half_step(*paths, self._x_probe, trusted=self._source_is_torch())

    def _quantise(self) -> dict[str, StepRecord]:
        """By the kind of artifact; empty where it is not asked for."""
        if self._int8 is None:
            return {}
        path = self._path(self._int8.kind)
        step = self._int8.make(self._path("onnx"), path, trusted=self._source_is_torch(), progress=self._progress)
        if step.outcome == "done" and self._target is not None and self._target.max_ir is not None:
            cap_ir_version(path, self._target.max_ir)
        return {self._int8.kind: step}

    def _source_is_torch(self) -> bool:
        return self._spec.network.family != ONNX_FAMILY

    def _write_golden(self) -> None:
        outputs_fp64, outputs_fp32 = self._origin.reference(self._x_golden)
        golden = Golden(
            images=self._golden_images, x_NCHW=self._x_golden, outputs_fp64=outputs_fp64, outputs_fp32=outputs_fp32
        )
        write_golden(self._staging / GOLDEN_FILE, golden)

    def _path(self, kind: str) -> Path:
        return self._staging / artifact_file(self._spec.name, kind)

    def _artifact(self, kind: str, steps: tuple[StepRecord, ...]) -> Artifact:
        described, record = ARTIFACT_KINDS[kind], file_record(self._path(kind))
        # PyTorch's formats leave the batch free whatever they were traced with.
        free = self._request.dynamic_batch or described.format in ("torchscript", "pt2")
        batch: int | str = "N" if free else 1
        contract = self._spec.preprocess
        taken = TensorInfo(
            name=self._origin.input_name, dtype="float32", shape=(batch, 3, contract.height_px, contract.width_px)
        )
        return Artifact(
            kind=kind, file=record.file, format=described.format, precision=described.precision, sha256=record.sha256,
            num_bytes=record.num_bytes, inputs=(taken,),
            outputs=tuple(
                TensorInfo(name=name, dtype="float32", shape=(batch, *shape))
                for name, shape in self._origin.output_shapes.items()
            ),
            opset=self._opset(kind), steps=steps,
        )  # fmt: skip

    def _opset(self, kind: str) -> int | None:
        """Of the file itself: INT8 takes 13 at least, whatever the others have."""
        if ARTIFACT_KINDS[kind].format != "onnx":
            return None
        return read_onnx(self._path(kind)).opsets.get(DEFAULT_DOMAIN, self._origin.opset)
