"""All artifacts of a bundle at one input size: the network to TorchScript and ONNX, simplified, rewritten, smaller."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cspdeploy.check.subject import ONNX_FAMILY
from cspdeploy.core.bundle import file_record
from cspdeploy.core.catalog import ARTIFACT_KINDS, artifact_file
from cspdeploy.core.golden import Golden, num_golden_images, write_golden
from cspdeploy.core.onnx_graph import DEFAULT_DOMAIN, read_onnx
from cspdeploy.core.sizes import Size, golden_file, size_label, sized_kind
from cspdeploy.core.targets import Target
from cspdeploy.core.types import Artifact, FileRecord, StepRecord, TensorInfo
from cspdeploy.export.simplify import start_simplify
from cspdeploy.pipeline.also_step import extend_artifacts
from cspdeploy.pipeline.decode_step import DecodeStep
from cspdeploy.pipeline.frontend_step import FrontendStep
from cspdeploy.pipeline.graph_steps import cap_ir_version, half_step, rewrite_step
from cspdeploy.pipeline.images import prepare
from cspdeploy.pipeline.int8_step import Int8Step
from cspdeploy.pipeline.origin import Origin

if TYPE_CHECKING:
    from cspdeploy.pipeline.recipe import ExportRequest

__all__ = ["OneSize"]

Progress = Callable[[str, int, int], None]
ANY_SIZE = ("torchscript", "pt2")
"""Kinds that a bundle has once. A bundle of several sizes is for engines that want a file a size, as on devices;
PyTorch, which reads these, runs the network itself at any."""


class OneSize:
    """One size of an export in its staging folder.

    Args:
        origin: the model at that size.
        target_name: as it is spelled in the tables; None: no target.
        size_px: where it is not the bundle's first size; its artifacts are then named by it.
    """

    def __init__(
        self, request: ExportRequest, origin: Origin, target: Target | None, staging: Path, progress: Progress,
        *, target_name: str | None = None, size_px: Size | None = None,
    ) -> None:  # fmt: skip
        self._request, self._origin, self._target, self._staging = request, origin, target, staging
        self._target_name, self._size_px = target_name, size_px
        self._tell = progress
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
        self._decode = DecodeStep(self._spec, labels=origin.labels) if self._spec.detection is not None else None
        self._frontend = FrontendStep(asked, self._spec, opset=origin.opset) if asked is not None else None
        self._x_golden = prepare(self._golden_images, self._spec)
        self._x_probe = prepare(origin.images[picks[1::2]], self._spec) if len(picks) > 1 else self._x_golden

    def _open_int8(self, golden: npt.NDArray[np.int64]) -> Int8Step | None:
        """None where it is not asked for."""
        if self._request.int8 is None:
            return None
        return Int8Step(
            self._request.int8, self._spec, labels=self._origin.labels, stored=self._origin.images, golden=golden,
            origin=self._origin.images_origin, folder=self._request.calibration,
            target=self._target_name, weights=self._origin.weights, take_trained=self._size_px is None,
        )  # fmt: skip

    def write(self) -> tuple[list[Artifact], FileRecord]:
        """All files of this size: artifacts as the manifest names them, and the golden images.

        Raises:
            InputError: images that cannot be used, or a form that cannot be written.
        """
        named = [dataclasses.replace(made, kind=sized_kind(made.kind, self._size_px)) for made in self._artifacts()]
        return named, file_record(self._staging / golden_file(self._size_px))

    def _progress(self, what: str, done: int, total: int) -> None:
        self._tell(f"{what} {size_label(self._size_px)}".rstrip(), done, total)

    def _artifacts(self) -> list[Artifact]:
        """All steps. While onnxsim's child works, this process traces and computes the reference."""
        work = self._staging / "work"
        work.mkdir()
        raw, simplified, rewritten = (work / f"{name}.onnx" for name in ("raw", "simplified", "rewritten"))
        self._progress("ONNX", 1, 6)
        steps = self._origin.write_onnx(raw, self._x_golden, dynamic_batch=self._request.dynamic_batch)
        job = start_simplify(raw, simplified)
        try:
            traced = self._trace()
            self._progress("reference outputs in FP64", 3, 6)
            self._write_golden()
            self._progress("simplifying", 4, 6)
            steps += (job.finish(self._x_golden, batch=1),)
        finally:
            job.stop()
        slower = None if self._request.slower_split is None else self._size_px in self._request.slower_split
        steps += rewrite_step(simplified, rewritten, self._x_golden, input_name=self._origin.input_name, slower=slower)
        shutil.move(rewritten if rewritten.is_file() else simplified, self._path("onnx"))
        if self._target is not None and self._target.max_ir is not None:
            cap_ir_version(self._path("onnx"), self._target.max_ir)
        converted = {"onnx-fp16": self._convert_fp16(), **self._quantise()}
        decoded, floats = self._decode_files(converted, work)
        steps += decoded
        if self._frontend is not None:
            self._progress("preprocessing in the graph", 5, 6)
            self._frontend.measure(self._golden_images, self._x_golden, floats=floats, work=work)
        shutil.rmtree(work)
        made = {kind: step for kind, step in converted.items() if step is not None and step.outcome == "done"}
        refused = (step for step in converted.values() if step is not None and step.outcome == "kept")
        artifacts = [self._artifact("torchscript", (traced,))] if traced is not None else []
        artifacts.append(self._artifact("onnx", (*steps, *refused)))
        artifacts += [self._artifact(kind, (*steps, step)) for kind, step in made.items()]
        frontend = self._frontend
        if frontend is not None:
            artifacts = frontend.extend(artifacts, path=self._path, describe=self._artifact)
        also = tuple(name for name in self._request.also if self._size_px is None or name not in ANY_SIZE)
        if also:
            self._progress(f"{', '.join(also)} files", 5, 6)
        return extend_artifacts(
            artifacts, also, path=self._path, describe=self._artifact,
            write_pt2=lambda path: self._origin.write_pt2(path, self._x_golden),
        )  # fmt: skip

    def _decode_files(
        self, converted: Mapping[str, StepRecord | None], work: Path
    ) -> tuple[tuple[StepRecord, ...], Path]:
        """The step, of a detector; and a float file whose outputs can be subtracted from each other."""
        floats = self._path("onnx")
        if self._decode is None:
            return (), floats
        floats = self._decode.comparable(floats, work=work)
        kinds = [kind for kind, step in converted.items() if step is not None and step.outcome == "done"]
        return tuple(self._decode.make(self._path(kind)) for kind in ("onnx", *kinds))[:1], floats  # the same of each

    def _trace(self) -> StepRecord | None:
        """None where there is no TorchScript file."""
        wanted = self._size_px is None
        self._progress("TorchScript and onnxsim" if wanted and self._source_is_torch() else "onnxsim", 2, 6)
        return self._origin.write_torchscript(self._path("torchscript"), self._x_golden) if wanted else None

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
        write_golden(self._staging / golden_file(self._size_px), golden)

    def _path(self, kind: str) -> Path:
        return self._staging / artifact_file(self._spec.name, kind, size_px=self._size_px)

    def _artifact(self, kind: str, steps: tuple[StepRecord, ...]) -> Artifact:
        described, record = ARTIFACT_KINDS[kind], file_record(self._path(kind))
        # PyTorch's formats leave the batch free whatever they were traced with.
        free = self._request.dynamic_batch or described.format in ("torchscript", "pt2")
        batch: int | str = "N" if free else 1
        contract = self._spec.preprocess
        taken = TensorInfo(
            name=self._origin.input_name, dtype="float32", shape=(batch, 3, contract.height_px, contract.width_px)
        )
        found = Artifact(
            kind=kind, file=record.file, format=described.format, precision=described.precision, sha256=record.sha256,
            num_bytes=record.num_bytes, inputs=(taken,),
            outputs=tuple(
                TensorInfo(name=name, dtype="float32", shape=(batch, *shape))
                for name, shape in self._origin.output_shapes.items()
            ),
            opset=self._opset(kind), steps=steps,
        )  # fmt: skip
        return found if self._decode is None else self._decode.described(found)

    def _opset(self, kind: str) -> int | None:
        """Of the file itself: INT8 takes 13 at least, whatever the others have."""
        if ARTIFACT_KINDS[kind].format != "onnx":
            return None
        return read_onnx(self._path(kind)).opsets.get(DEFAULT_DOMAIN, self._origin.opset)
