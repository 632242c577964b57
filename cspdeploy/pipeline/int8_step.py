"""The INT8 step of an export: what it is to be made of, and whether what came of it is kept. Shapes: N images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import numpy.typing as npt

from cspdeploy.check.audit import audit_onnx
from cspdeploy.core.catalog import (
    INT8_KINDS,
    INT8_MAX_IMAGES,
    INT8_TIME_LIMIT_S,
    Effort,
    Int8Mode,
    RangeMethod,
)
from cspdeploy.core.codec import to_json
from cspdeploy.core.datasets import LabelledImages, open_dataset
from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import WEIGHTS_FILE
from cspdeploy.core.quantised import count_quantised
from cspdeploy.core.spec import ModelSpec
from cspdeploy.core.types import StepRecord
from cspdeploy.pipeline.images import images_seen, images_to_calibrate
from cspdeploy.quant.budget import Budget, parse_budget

if TYPE_CHECKING:  # what quantises is only loaded where something is quantised
    from cspdeploy.quant.int8 import Int8Settings
    from cspdeploy.quant.qat_file import TrainedPlan

__all__ = ["Int8Request", "Int8Step", "refusal"]

Progress = Callable[[str, int, int], None]
Pixels = npt.NDArray[np.uint8]

STEP = "int8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Request:
    """How the INT8 file is to be made, as the manifest records it.

    Attributes:
        calibration: how ranges are chosen; "auto" tries all and keeps the best on images held out.
        max_drop: "0.1", points of top-1 on `labelled`, "3%", of the decisions (a detector's boxes, else first classes)
            against FP32, or "36dB", the least signal to noise of the outputs.
        max_latency: "12.5" ms a call, or "0.5x" of FP32.
        labelled: "fashion-mnist", or a folder with one folder per class.
        time_limit_s: of the search for float islands, where a budget asks for one.

    Raises:
        InputError: a value out of range, or options that do not go together.
    """

    mode: Int8Mode = "static"
    calibration: RangeMethod = "auto"
    effort: Effort = "normal"
    power_of_two: bool = False
    max_images: int = INT8_MAX_IMAGES
    max_drop: str | None = None
    max_latency: str | None = None
    labelled: str | None = None
    time_limit_s: float = INT8_TIME_LIMIT_S

    def __post_init__(self) -> None:
        closed = {"--int8-mode": (self.mode, Int8Mode), "--calibration": (self.calibration, RangeMethod),
                  "--effort": (self.effort, Effort)}  # fmt: skip
        for option, (value, names) in closed.items():
            if value not in get_args(names):
                known = get_args(names)
                raise InputError(f"{option} {value}: expected {', '.join(known)}", fix=f"{option} {known[0]}")
        if self.max_images < 1:
            raise InputError(f"--calib-images {self.max_images}: expected 1 or more", fix="--calib-images 256")
        if not (math.isfinite(self.time_limit_s) and self.time_limit_s > 0):
            raise InputError(
                f"--int8-time-limit {self.time_limit_s}: expected a number of seconds above 0",
                fix="--int8-time-limit 600",
            )
        budget = parse_budget(max_drop=self.max_drop, max_latency=self.max_latency)
        if budget.max_drop_points is not None and self.labelled is None:
            raise InputError(
                f"--max-drop {self.max_drop}: points of top-1 need labelled images",
                fix="--labelled DATA, or an SQNR: --max-drop 36dB",
            )
        if self.mode != "static":
            self._require_static()

    def _require_static(self) -> None:
        """What chooses or repairs the ranges of activations has none to choose in the other modes."""
        given = {
            f"--calibration {self.calibration}": self.calibration != "auto",
            f"--effort {self.effort}": self.effort != "normal", "--power-of-two": self.power_of_two,
        }  # fmt: skip
        for option in (name for name, used in given.items() if used):
            raise InputError(
                f"{option}: is of static ranges, --int8-mode {self.mode} has none",
                fix=f"leave out {option}, or --int8-mode static",
            )

    @property
    def takes_trained(self) -> bool:
        """Whether a plan of `cspdeploy train --qat` is used where there is one: not where ranges are asked for."""
        return (self.mode, self.calibration, self.effort, self.power_of_two) == ("static", "auto", "normal", False)

    @property
    def kind(self) -> str:
        """Of the artifact that it makes."""
        return INT8_KINDS[self.mode]

    def settings(self) -> Int8Settings:
        """For the quantiser."""
        from cspdeploy.quant.int8 import Int8Settings

        return Int8Settings(
            mode=self.mode, method=self.calibration, effort=self.effort, power_of_two=self.power_of_two,
            max_drop=self.max_drop, max_latency=self.max_latency,
            time_limit_s=self.time_limit_s,
        )  # fmt: skip


class Int8Step:
    """Everything that the step needs, opened before the export begins, so that what is wrong shows at once.

    Args:
        stored: the model's own real images as stored, `[N, h, w]` or `[N, h, w, 3]` uint8.
        golden: which of `stored` prove the files; none of these is calibrated on where enough others are left.
        folder: images of the user's, or None; `stored` was then made of some of them.
        target: runtime that the file must be fit for; None: ONNX Runtime on this machine.
        weights: file that the network's weights were read from, as the manifest records it.
        take_trained: a plan of `cspdeploy train --qat` is used where there is one. It fits one input size.

    Raises:
        InputError: options, images, labels or target that will not do.
    """

    def __init__(
        self,
        request: Int8Request,
        spec: ModelSpec,
        *,
        labels: tuple[str, ...],
        stored: Pixels,
        golden: npt.NDArray[np.int64],
        origin: str,
        folder: Path | None,
        target: str | None,
        weights: str = "",
        take_trained: bool = True,
    ) -> None:
        from cspdeploy.quant.audit_images import audit_calibration
        from cspdeploy.quant.decide import require_measurable
        from cspdeploy.quant.placements import find_placement

        self._request, self.kind = request, request.kind
        self._placement = find_placement(target)
        budget = parse_budget(max_drop=request.max_drop, max_latency=request.max_latency)
        static = request.mode == "static"
        self._detection = spec.detection
        require_measurable(budget, self._placement, points=static, decisions=static and spec.detection is None)
        _require_decisions(budget, spec)
        self._settings = request.settings()
        self._weights_sha256 = spec.provenance.weights_sha256
        self._trained = _open_trained(request, spec, weights, self._placement.name) if take_trained else None
        self._labelled = _open_labelled(request, spec, labels)
        self._images = images_to_calibrate(
            spec, stored=stored, golden=golden, origin=origin, folder=folder, max_images=request.max_images
        )
        # Said now, and not after the export. What the images are like is kept with them.
        seen = None if folder is None else images_seen(spec, weights)
        self._findings = audit_calibration(self._images, seen=seen, refuse=request.mode == "static").findings

    def make(self, source: Path, target: Path, *, trusted: bool, progress: Progress) -> StepRecord:
        """Quantise. The outcome is "kept", and there is no `target`, where the file would not earn its place.

        Args:
            source: the float32 ONNX file.
            trusted: the graph is of our own making, so that whatever goes wrong is a fault to be told of.

        Raises:
            InputError: the images or the graph cannot be used; says which and why.
        """
        try:
            record = self._quantise(source, target, progress)
        except InputError:
            target.unlink(missing_ok=True)
            raise
        except Exception as error:  # a stranger's operators, the engine: they share no base class but this one
            target.unlink(missing_ok=True)
            if trusted:
                raise
            reason = " ".join((str(error) or type(error).__name__).split())[:200]
            return StepRecord(name=STEP, outcome="kept", detail=f"no INT8 file: it cannot be quantised ({reason})")
        return record

    def _quantise(self, source: Path, target: Path, progress: Progress) -> StepRecord:
        def tell(what: str, done: int, total: int) -> None:
            progress(f"INT8: {what}", done, total)

        record = self._write_trained(source, target, tell) or self._choose(source, target, tell)
        facts = {**record.facts, "images": self._images.origin, "findings": to_json(self._findings)}
        record = dataclasses.replace(record, facts=facts)
        if record.outcome == "kept":
            target.unlink(missing_ok=True)
            return record
        problem = "" if self._request.mode == "weights" else audit_onnx(target, declared="int8").problem
        if not problem:
            # What the file's limit follows from, for devices that read no graphs.
            return dataclasses.replace(record, facts={**facts, "num_quantised": count_quantised(target)})
        target.unlink()
        return dataclasses.replace(record, outcome="kept", detail=f"no INT8 file: {problem}; {record.detail}")

    def _choose(self, source: Path, target: Path, progress: Progress) -> StepRecord:
        from cspdeploy.quant.int8 import quantise

        return quantise(
            source, target, self._images, placement=self._placement, settings=self._settings,
            labelled=self._labelled, detection=self._detection, progress=progress,
        )  # fmt: skip

    def _write_trained(self, source: Path, target: Path, progress: Progress) -> StepRecord | None:
        """None where the model was not fine-tuned for INT8."""
        if self._trained is None:
            return None
        from cspdeploy.quant.qat_step import quantise_trained

        return quantise_trained(
            source, target, self._images, self._trained, placement=self._placement,
            weights_sha256=self._weights_sha256, max_drop=self._request.max_drop,
            max_latency=self._request.max_latency, labelled=self._labelled, progress=progress,
        )  # fmt: skip


def _open_trained(request: Int8Request, spec: ModelSpec, weights: str, placement: str) -> TrainedPlan | None:
    """What `cspdeploy train --qat` left beside the weights, for that placement."""
    from cspdeploy.quant.qat_file import find_qat, load_qat

    if not request.takes_trained or spec.task != "classify" or Path(weights).name != WEIGHTS_FILE:
        return None
    path = find_qat(Path(weights).parent, placement)
    return None if path is None else load_qat(path)


def _require_decisions(budget: Budget, spec: ModelSpec) -> None:
    """A share of decisions is asked for of a network that makes none."""
    if budget.max_changed_percent is not None and spec.detection is None and spec.task != "classify":
        raise InputError(
            f"--max-drop {budget.max_changed_percent:g}%: '{spec.name}' gives {spec.task}, neither classes nor boxes",
            fix="an SQNR: --max-drop 36dB",
        )


def _open_labelled(request: Int8Request, spec: ModelSpec, labels: tuple[str, ...]) -> LabelledImages | None:
    """Images that were kept from training: what is lost on them is what is lost in use."""
    if request.labelled is None:
        return None
    if spec.detection is not None:
        raise InputError(
            f"--labelled {request.labelled}: '{spec.name}' gives boxes, not classes of whole images",
            fix="leave it out; --max-drop 3% counts the boxes that are not FP32's, and needs no labels",
        )
    if spec.task != "classify":
        raise InputError(
            f"--labelled {request.labelled}: '{spec.name}' gives {spec.task}, not classes",
            fix="leave it out; --max-drop 36dB needs no labels",
        )
    data = open_dataset(request.labelled, split="test")
    if data.labels != labels:
        raise InputError(
            f"--labelled {request.labelled}: its classes ({', '.join(data.labels[:5])}, ...) are not those of "
            f"'{spec.name}' ({', '.join(labels[:5])}, ...)",
            fix="give images of the classes that it was trained on, under the same names and in the same order",
        )
    return data


def refusal(steps: tuple[StepRecord, ...]) -> str:
    """Why there is no INT8 file, in one sentence; empty where none was asked for, or there is one."""
    return next((step.detail for step in steps if step.name == STEP and step.outcome == "kept"), "")
