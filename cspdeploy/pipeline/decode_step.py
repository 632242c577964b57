"""The step that puts decoding, and suppression where it is asked for, behind a detector's heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

from cspdeploy.core.codec import from_json
from cspdeploy.core.detection.spec import (
    BOXES_OUTPUT,
    COUNT_OUTPUT,
    DETECTIONS_OUTPUT,
    SCORES_OUTPUT,
    TRT_OUTPUTS,
    ULTRALYTICS_OUTPUT,
    Detection,
)
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import ModelSpec
from cspdeploy.core.targets import Target
from cspdeploy.core.types import Artifact, StepRecord, TensorInfo
from cspdeploy.export.decode import add_decode
from cspdeploy.export.decode_nms import NMS_OPSET
from cspdeploy.nets.darknet.sections import DarknetConfig, Yolo
from cspdeploy.pipeline.darknet import DARKNET_FAMILY

__all__ = ["STEP_NAME", "DecodeStep", "require_contract"]

STEP_NAME = "decode"
_NMS_OPERATOR = "NonMaxSuppression"
_ENGINE_FORMS = ("ort", "opt")


def require_contract(detection: Detection | None, *, opset: int, target: Target | None, also: Collection[str]) -> None:
    """Make sure, before anything is made, that the files can have such outputs.

    Args:
        opset: of the ONNX files.
        also: further forms of the files.

    Raises:
        InputError: another one asks for what this one does not give; names both.
    """
    decode = detection.decode if detection is not None else None
    forms = [name for name in _ENGINE_FORMS if name in also]
    if decode == "trt" and forms:
        raise InputError(
            f"--decode trt: ONNX Runtime, which writes --also {forms[0]}, has no such operator",
            fix=f"--decode nms, or leave out --also {forms[0]}",
        )
    if decode == "trt" and target is not None and not target.name.startswith("tensorrt"):
        raise InputError(f"--decode trt: is a plugin of TensorRT, which {target.name} has not", fix="--decode nms")
    if decode != "nms":
        return
    if opset < NMS_OPSET:
        raise InputError(f"--decode nms: takes opset {NMS_OPSET} at least, the files have {opset}",
                         fix=f"--opset {NMS_OPSET}, or --decode decoded")  # fmt: skip
    known = target.operators if target is not None and not target.accelerator else None
    if target is not None and known is not None and _NMS_OPERATOR not in known:
        raise InputError(f"--decode nms: {target.name} has no operator {_NMS_OPERATOR}", fix="--decode decoded")


class DecodeStep:
    """Of a detector: gives its ONNX files the outputs of its contract.

    Args:
        labels: of the classes.

    Raises:
        ValueError: the model gives no boxes.
    """

    def __init__(self, spec: ModelSpec, *, labels: Sequence[str] = ()) -> None:
        if spec.detection is None:
            raise ValueError(f"{spec.name}: gives no boxes")
        self._spec, self._detection, self._labels = spec, spec.detection, tuple(labels)

    def make(self, path: Path) -> StepRecord:
        """Write the ONNX file of raw heads anew, in its place."""
        self._write(path, path, self._detection)
        facts = {"decode": self._detection.decode, "candidates": self._num_candidates}
        return StepRecord(name=STEP_NAME, outcome="done", detail=self._detail(), facts=facts)

    def comparable(self, path: Path, *, work: Path) -> Path:
        """A file of which outputs can be subtracted from each other: the given one, or its copy that is only decoded.

        Args:
            path: with raw heads.
            work: folder for a file that nobody keeps.
        """
        if self._detection.decode == "raw":
            return path
        target = work / "decoded.onnx"
        self._write(path, target, dataclasses.replace(self._detection, decode="decoded"))
        return target

    def described(self, artifact: Artifact) -> Artifact:
        """With the outputs that the file has, and the contract that they follow."""
        if artifact.format in ("torchscript", "pt2"):
            return dataclasses.replace(artifact, decode=self._detection.network_decode)
        outputs = artifact.outputs if self._detection.decode == "raw" else self._outputs(artifact.inputs[0].shape[0])
        return dataclasses.replace(artifact, outputs=outputs, decode=self._detection.decode)

    @property
    def _num_candidates(self) -> int:
        contract = self._spec.preprocess
        return self._detection.num_candidates(contract.height_px, contract.width_px)

    def _write(self, source: Path, target: Path, detection: Detection) -> None:
        contract = self._spec.preprocess
        add_decode(
            source, target, detection=detection, num_classes=self._spec.num_classes, height_px=contract.height_px,
            width_px=contract.width_px, labels=self._labels,
        )  # fmt: skip

    def _outputs(self, batch: int | str) -> tuple[TensorInfo, ...]:
        num, classes, most = self._num_candidates, self._spec.num_classes, self._detection.suppression.max_detections
        shapes: dict[str, tuple[tuple[str, str, tuple[int, ...]], ...]] = {
            "decoded": ((BOXES_OUTPUT, "float32", (num, 4)), (SCORES_OUTPUT, "float32", (num, classes))),
            "nms": ((DETECTIONS_OUTPUT, "float32", (most, 6)), (COUNT_OUTPUT, "int64", ())),
            "ultralytics": ((ULTRALYTICS_OUTPUT, "float32", (4 + classes, num)),),
            "trt": tuple(
                zip(TRT_OUTPUTS, ("int32", "float32", "float32", "int32"), ((1,), (most, 4), (most,), (most,)),
                    strict=True)
            ),
        }  # fmt: skip
        return tuple(
            TensorInfo(name=name, dtype=dtype, shape=(batch, *shape))
            for name, dtype, shape in shapes[self._detection.decode]
        )

    @property
    def _other_rules(self) -> str:
        """How the network's own cfg would suppress boxes where that is not by plain overlap; empty otherwise."""
        if self._spec.network.family != DARKNET_FAMILY:
            return ""
        config = from_json(DarknetConfig, self._spec.network.config, where="$.network.config")
        layers = (layer for layer in config.layers if isinstance(layer, Yolo) and layer.nms_kind != "default")
        return " and ".join(dict.fromkeys(f"{one.nms_kind} (beta_nms {one.beta_nms:g})" for one in layers))

    def _detail(self) -> str:
        detection, rule = self._detection, self._detection.suppression
        heads = f"{len(detection.heads)} head{'s' if len(detection.heads) > 1 else ''}"
        if detection.decode == "raw":
            return f"none: the maps of {heads} come out as they are"
        detail = f"decoded in the graph in float32: {self._num_candidates:,} candidates of {heads}"
        if detection.decode in ("nms", "trt"):
            detail += (
                f"; the {rule.max_detections} best of those above {rule.score_threshold:g} stay, none that overlaps a "
                f"better one of its class by more than {rule.iou_threshold:g}"
            )
        if self._other_rules:
            detail += f"; suppression by plain overlap; the cfg asks for {self._other_rules}"
        if detection.decode == "ultralytics":
            detail += "; rows of centre, size and scores as ultralytics has them, with its metadata"
        if detection.decode == "trt":
            detail += ", by a plugin of TensorRT: ONNX Runtime cannot load the file, nothing could be run here"
        return detail
