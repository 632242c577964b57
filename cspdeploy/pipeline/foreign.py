"""An ONNX file that cspdeploy did not make, as the origin of a bundle. Shapes: N images, C classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from cspdeploy.check.audit import audit_onnx, declared_precision
from cspdeploy.check.loose_file import describe, image_input, image_size
from cspdeploy.check.reference import reference_of, run_contained
from cspdeploy.check.subject import ONNX_FAMILY, Candidate, Subject, onnx_sha256
from cspdeploy.core.card import ModelCard, read_card
from cspdeploy.core.catalog import MAX_OPSET
from cspdeploy.core.contracts import CHOICES, find_contract
from cspdeploy.core.errors import InputError
from cspdeploy.core.imagenet import NUM_IMAGENET_CLASSES
from cspdeploy.core.metrics import relative_l2
from cspdeploy.core.model_folder import read_labels
from cspdeploy.core.onnx_graph import DEFAULT_DOMAIN, OnnxModel, Value, read_onnx
from cspdeploy.core.spec import ModelSpec, NetworkSpec, Preprocess, Provenance, Task
from cspdeploy.core.types import StepRecord
from cspdeploy.export.adopt import adopt_onnx
from cspdeploy.export.simplify import LIMIT
from cspdeploy.nets.registry import NETWORKS
from cspdeploy.pipeline.images import real_images
from cspdeploy.pipeline.labels import default_labels
from cspdeploy.pipeline.origin import Outputs32, Outputs64
from cspdeploy.runtimes.base import Feeds, SessionRequest

__all__ = ["OnnxOrigin", "is_onnx"]

ENGINE = "ort-cpu"
FREE_BATCH = "N"
CARD_LABELS = "none: those that the file says itself"
"""Where class names come from; "none: " since there is no file of them."""
NUM_COMPARED = 2
"""Images on which the copy is compared with the file: a wrong conversion shows on the first."""


def is_onnx(given: str) -> bool:
    """Whether what the user named is an ONNX file, by its suffix."""
    return given.lower().endswith(".onnx")


class OnnxOrigin:
    """A float32 ONNX file with one image input `[N or 1, 3, H, W]`. Its input and outputs keep their names.

    Args:
        preprocess: the contract of its images: a name of `cspdeploy.core.contracts`, or a JSON file; None: as the card
            in the file says, if it has one.
        images: folder of real images.
        names: file of class names, one a line in the order of its one output `[N, C]`.
        size_px: height and width, of a file that leaves them free.
        opset: to convert it to; None: its own.
        max_opset: it is converted down to this if its own is higher.
        operators: to be written with older ones.

    Raises:
        InputError: a file that cannot be read or run, or is no such network; no contract; no images; class names that
            do not fit; an opset beyond our range.
    """

    def __init__(
        self,
        path: Path,
        *,
        preprocess: str | None,
        images: Path | None,
        names: Path | None,
        size_px: tuple[int, int] | None,
        opset: int | None,
        max_opset: int | None,
        operators: frozenset[str],
        dynamic_batch: bool,
    ) -> None:
        model = read_onnx(path)
        value = _require_network(model, dynamic_batch=dynamic_batch)
        self._path, self._operators, self._sha256 = path, operators, onnx_sha256(path)
        self.input_name, self.opset = value.name, _opset(model, opset, max_opset)
        self._card = read_card(model.metadata, name=path.name)
        self._value, self._dynamic_batch = value, dynamic_batch
        contract = _contract(path, value, preprocess, size_px, self._card)
        size = (contract.height_px, contract.width_px)
        self._names = tuple(output.name for output in model.graph.outputs)
        self.output_shapes: Mapping[str, tuple[int, ...]] = self._probe(size, dynamic_batch=dynamic_batch)
        _require_fp32(path, {self.input_name: np.zeros((1, 3, *size), np.float32)})
        self.spec = self._describe(contract, names)
        self.labels, self.labels_origin = _labels(self.spec, names, self._card)
        self.weights = ""
        self.images, self.images_origin = real_images(self.spec, None, images)

    def _request(self, path: Path) -> SessionRequest:
        return SessionRequest(path=path, outputs=self._names, optimise=False)

    def _probe(self, size_px: tuple[int, int], *, dynamic_batch: bool) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs without their batch, by runs on empty pictures."""
        batches = (1, 2) if dynamic_batch else (1,)
        empty = [{self.input_name: np.zeros((batch, 3, *size_px), np.float32)} for batch in batches]
        found = run_contained(ENGINE, self._request(self._path), empty)
        for name in self._names:
            for batch, outputs in zip(batches, found, strict=True):
                array = outputs[name]
                if array.dtype != np.float32 or array.shape[:1] != (batch,) or not array.size:
                    raise InputError(
                        f"{self._path}: output '{name}' is {array.dtype} {list(array.shape)} for a batch of {batch}, "
                        f"expected float32 [{batch}, ...]",
                        fix=f"cut it off, or judge the file by itself: cspdeploy verify {self._path}",
                    )
                if not np.isfinite(array).all():
                    raise InputError(
                        f"{self._path}: output '{name}' is NaN or infinite on an empty picture", fix="use other weights"
                    )
        return {name: tuple(found[0][name].shape[1:]) for name in self._names}

    def _describe(self, contract: Preprocess, names: Path | None) -> ModelSpec:
        shapes = list(self.output_shapes.values())
        one_row = len(shapes) == 1 and len(shapes[0]) == 1
        if names is not None and not one_row:
            listed = ", ".join(f"'{name}' {list(shape)}" for name, shape in self.output_shapes.items())
            raise InputError(
                f"--names {names}: its outputs {listed} are not one list of class scores", fix="leave out --names"
            )
        told = one_row and self._card is not None and self._card.task == "classify" and _fits(self._card, shapes[0])
        known = names or told or (one_row and shapes[0] == (NUM_IMAGENET_CLASSES,))
        task: Task = "classify" if one_row and known else "features"
        stem, promised = self._path.stem, declared_precision(self._path)
        if promised:  # each artifact has its own: the FP32 one of "x.int8.onnx" would be called what it is not
            stem = stem[: -len(promised) - 1]
        name = re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("._-") or ONNX_FAMILY
        if name in NETWORKS:  # whose bundle must not be taken for this one
            name = f"{name}-{ONNX_FAMILY}"
        return ModelSpec(
            name=name, network=NetworkSpec(family=ONNX_FAMILY, config={}), preprocess=contract, task=task,
            num_classes=shapes[0][0] if task == "classify" else 1, outputs=self._names,
            provenance=Provenance(
                source="random" if self._card is not None and self._card.provenance.untrained else "user",
                origin=self._path.name, weights_sha256=self._sha256,
            ),
        )  # fmt: skip

    def write_onnx(self, path: Path, x_NCHW: npt.NDArray[np.float32], *, dynamic_batch: bool) -> tuple[StepRecord, ...]:
        """The file in the form that the later steps take, and compared with it."""
        batch: int | str = FREE_BATCH if dynamic_batch else 1
        shapes = {name: (batch, *shape) for name, shape in self.output_shapes.items()}
        record = adopt_onnx(
            self._path, path, sha256=self._sha256, shapes={self.input_name: (batch, *x_NCHW.shape[1:]), **shapes},
            opset=self.opset, operators=self._operators,
        )  # fmt: skip
        calls = [{self.input_name: x_NCHW[i : i + 1]} for i in range(min(NUM_COMPARED, len(x_NCHW)))]
        expected, got = (run_contained(ENGINE, self._request(file), calls) for file in (self._path, path))
        for before, after in zip(expected, got, strict=True):
            for name in self._names:
                distance = relative_l2(after[name], before[name])
                if not distance <= LIMIT:
                    raise InputError(
                        f"{self._path}: output '{name}' of its copy ({record.detail}) is another one: relative L2 "
                        f"{distance:.1e}, limit {LIMIT:.1e}",
                        fix="leave out --opset and --target",
                    )
        return (record,)

    def write_torchscript(self, path: Path, x_NCHW: npt.NDArray[np.float32]) -> StepRecord | None:
        """There is no network to trace."""
        return None

    def write_pt2(self, path: Path, x_NCHW: npt.NDArray[np.float32]) -> StepRecord | None:
        """There is no network to export."""
        return None

    def require_size(self, size_px: tuple[int, int]) -> None:
        """By what its input declares, and by runs on empty pictures."""
        _require_size(self._value, size_px)
        self._probe(size_px, dynamic_batch=self._dynamic_batch)

    def reference(self, x_NCHW: npt.NDArray[np.float32]) -> tuple[Outputs64, Outputs32]:
        """By the file itself, not by its copy: in FP64, and as it is on an engine that optimises nothing."""
        original = Candidate(
            artifact=self._path.name, format="onnx", precision="fp32", path=self._path, num_bytes=0,
            output_names=self._names, batch=1,
        )  # fmt: skip
        subject = Subject(
            name=str(self._path), title=self.spec.name, task=self.spec.task, labels=self.labels,
            feeds={self.input_name: x_NCHW}, outputs_fp64={}, floors={}, candidates=(original,),
        )  # fmt: skip
        made = reference_of(subject, need_fp64=True)
        plain = {name: array.astype(np.float32, copy=False) for name, array in made.outputs_plain.items()}
        return dict(made.outputs_fp64), plain


def _require_network(model: OnnxModel, *, dynamic_batch: bool) -> Value:
    if model.ir_version > onnx.IR_VERSION:
        raise InputError(
            f"{model.path}: IR version {model.ir_version}, this onnx reads {onnx.IR_VERSION} at most",
            fix="export it again with an older onnx, or: pip install --upgrade onnx onnxruntime",
        )
    value = image_input(model)
    if value.dtype != "float32":
        raise InputError(f"{model.path}: input {describe(value)}, expected float32 [N, 3, H, W]",
                         fix="export it in float32 where it was made")  # fmt: skip
    batch = (value.shape or (1,))[0]
    if isinstance(batch, int) and batch != 1:
        raise InputError(f"{model.path}: input {describe(value)} takes {batch} images a call, expected 1 or any number",
                         fix="export it with a free batch where it was made")  # fmt: skip
    if isinstance(batch, int) and dynamic_batch:
        raise InputError(
            f"--dynamic-batch: {model.path} has a batch of 1 built in",
            fix="leave it out, or export it with a free batch",
        )
    others = [output for output in model.graph.outputs if output.dtype not in ("float32", "undefined")]
    if others or not model.graph.outputs:
        listed = ", ".join(describe(output) for output in others) or "none"
        raise InputError(
            f"{model.path}: outputs that are not float32: {listed}",
            fix=f"cut them off, or judge the file by itself: cspdeploy verify {model.path}",
        )
    return value


def _require_fp32(path: Path, feeds: Feeds) -> None:
    """A file that is FP16 or INT8 inside is the end of this road, not its beginning."""
    audit = audit_onnx(path, declared="fp32", feeds=feeds)
    if audit.found != "fp32":
        raise InputError(
            f"{path}: computes in {audit.found.upper()}, expected float32 to begin with",
            fix=f"export the float32 file; to judge this one: cspdeploy verify {path} --against FILE",
        )


def _opset(model: OnnxModel, wanted: int | None, cap: int | None) -> int:
    own = model.opsets.get(DEFAULT_DOMAIN, 1)
    if wanted is not None:
        return wanted
    if cap is not None and own > cap:
        return cap
    if own > MAX_OPSET:
        raise InputError(f"{model.path}: opset {own}, expected at most {MAX_OPSET}", fix=f"--opset {MAX_OPSET}")
    return own


def _fits(card: ModelCard, shape: tuple[int, ...]) -> bool:
    return shape == (len(card.labels),)


def _contract(
    path: Path, value: Value, given: str | None, size_px: tuple[int, int] | None, card: ModelCard | None
) -> Preprocess:
    if given is None and card is None:
        raise InputError(
            f"{path}: how its images are prepared is never guessed, expected --preprocess",
            fix=f"--preprocess {CHOICES} with its contract",
        )
    own = image_size(value)
    if size_px is not None:
        _require_size(value, size_px)
    if given is None and card is not None:
        contract = card.preprocess
        return contract.with_size(*(size_px or own or (contract.height_px, contract.width_px)))
    return find_contract(given or "", size_px=size_px or own)


def _require_size(value: Value, size_px: tuple[int, int]) -> None:
    height, width = (value.shape or ())[2:]
    fits = (isinstance(height, str) or height == size_px[0]) and (isinstance(width, str) or width == size_px[1])
    if not fits:
        asked = f"{size_px[0]}x{size_px[1]}"
        raise InputError(f"--size {asked}: input {describe(value)} has its size built in", fix="leave out --size")


def _labels(spec: ModelSpec, names: Path | None, card: ModelCard | None) -> tuple[tuple[str, ...], str]:
    if names is not None:
        return read_labels(names, num_classes=spec.num_classes), str(names)
    if spec.task == "classify" and card is not None and _fits(card, (spec.num_classes,)):
        return card.labels, CARD_LABELS
    return default_labels(spec) if spec.task == "classify" else (("class 0",), "none: its outputs are not classes")
