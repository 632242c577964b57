"""What an export starts from, behind one set of methods: a network in torch, or an ONNX file from elsewhere.

Shapes: N images.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import torch

from cspdeploy.core.catalog import INPUT_NAME
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import ModelSpec
from cspdeploy.core.types import StepRecord
from cspdeploy.export.decompose import decompose
from cspdeploy.export.onnx import export_onnx
from cspdeploy.export.pt2 import export_pt2
from cspdeploy.export.reference import compute_reference
from cspdeploy.export.rewrite import write_model
from cspdeploy.export.torchscript import export_torchscript
from cspdeploy.nets.detection import DecodedDetector
from cspdeploy.nets.exported import FEATURE_STRIDES
from cspdeploy.pipeline.source import Source, resized

__all__ = ["Origin", "TorchOrigin"]

Outputs64 = dict[str, npt.NDArray[np.float64]]
Outputs32 = dict[str, npt.NDArray[np.float32]]


class Origin(Protocol):
    """A model that can become a bundle.

    Attributes:
        labels_origin, images_origin: where they come from, for the record.
        weights: as the manifest records them: a path as given, "random", or empty where the model is the file itself.
        images: real images as stored, `[N, h, w]` or `[N, h, w, 3]` uint8.
        input_name: of the ONNX files.
        opset: of the ONNX files.
        output_shapes: by name, without the batch.
    """

    spec: ModelSpec
    labels: tuple[str, ...]
    labels_origin: str
    weights: str
    images: npt.NDArray[np.uint8]
    images_origin: str
    input_name: str
    opset: int
    output_shapes: Mapping[str, tuple[int, ...]]

    def write_onnx(self, path: Path, x_NCHW: npt.NDArray[np.float32], *, dynamic_batch: bool) -> tuple[StepRecord, ...]:
        """Write the float32 ONNX file that all others are made of; of a detector with the raw maps of its heads."""
        ...

    def write_torchscript(self, path: Path, x_NCHW: npt.NDArray[np.float32]) -> StepRecord | None:
        """Write a TorchScript file; None where the model has no such form."""
        ...

    def write_pt2(self, path: Path, x_NCHW: npt.NDArray[np.float32]) -> StepRecord | None:
        """Write the program of `torch.export`; None where the model has no such form."""
        ...

    def require_size(self, size_px: tuple[int, int]) -> None:
        """Make sure that it runs at another height and width, too.

        Raises:
            InputError: it does not.
        """
        ...

    def reference(self, x_NCHW: npt.NDArray[np.float32]) -> tuple[Outputs64, Outputs32]:
        """The model's own outputs in float64 and float32, by name, `[N, ...]` each."""
        ...


class TorchOrigin:
    """A network of `cspdeploy.nets` with its weights.

    Args:
        operators: to be written with older ones, for the target's sake.

    Raises:
        InputError: the network does not run at that size.
    """

    def __init__(self, source: Source, *, opset: int, operators: frozenset[str]) -> None:
        self.spec, self.labels, self.labels_origin = source.spec, source.labels, source.labels_origin
        self.weights, self.images, self.images_origin = source.weights, source.images, source.images_origin
        self.input_name, self.opset = INPUT_NAME, opset
        self.output_shapes: Mapping[str, tuple[int, ...]] = _output_shapes(source.model, source.spec)
        self._model, self._operators = source.model, operators
        # Decoding is put behind the heads in each file, when float16 and INT8 have been made without it.
        self._heads: torch.nn.Module = (
            source.model.network if isinstance(source.model, DecodedDetector) else source.model
        )

    def write_onnx(self, path: Path, x_NCHW: npt.NDArray[np.float32], *, dynamic_batch: bool) -> tuple[StepRecord, ...]:
        """Traced by PyTorch's exporter."""
        exported = export_onnx(
            self._heads, torch.from_numpy(x_NCHW[:1]), path, names=self._head_names, opset=self.opset,
            dynamic_batch=dynamic_batch,
        )  # fmt: skip
        if not self._operators:
            return (exported,)
        model = onnx.load(path)
        written = decompose(model, self._operators)
        if written:
            write_model(model, path)
        listed = ", ".join(f"{count} {name}" for name, count in written.items()) or "none"
        facts: dict[str, Any] = {"decomposed": written, "operators": sorted(self._operators)}
        record = StepRecord(name="decompose", outcome="done", detail=f"in older operators: {listed}", facts=facts)
        return (exported, record)

    @property
    def _head_names(self) -> tuple[str, ...]:
        detection = self.spec.detection
        return self.spec.outputs if detection is None else detection.raw_outputs

    def write_torchscript(self, path: Path, x_NCHW: npt.NDArray[np.float32]) -> StepRecord | None:
        """Traced and frozen."""
        return export_torchscript(self._model, torch.from_numpy(x_NCHW[:1]), path)

    def write_pt2(self, path: Path, x_NCHW: npt.NDArray[np.float32]) -> StepRecord | None:
        """By `torch.export`, the batch free."""
        return export_pt2(self._model, torch.from_numpy(x_NCHW[:1]), path)

    def require_size(self, size_px: tuple[int, int]) -> None:
        """By one run on an empty picture."""
        _output_shapes(self._model, resized(self.spec, size_px))

    def reference(self, x_NCHW: npt.NDArray[np.float32]) -> tuple[Outputs64, Outputs32]:
        """By PyTorch."""
        return compute_reference(self._model, x_NCHW, names=self.spec.outputs)


@torch.inference_mode()
def _output_shapes(model: torch.nn.Module, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs without their batch, by one run on an empty picture.

    Raises:
        InputError: the network does not run at that size.
    """
    size_px = (spec.preprocess.height_px, spec.preprocess.width_px)
    try:
        outputs = model(torch.zeros(1, 3, *size_px))
    except RuntimeError as error:  # maps that became empty, or that should meet and do not
        raise InputError(
            f"model '{spec.name}': does not run at {size_px[0]}x{size_px[1]} px ({str(error).splitlines()[0][:120]})",
            fix=f"--size with a multiple of {max(FEATURE_STRIDES)} px a side",
        ) from error
    values = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return {name: tuple(value.shape[1:]) for name, value in zip(spec.outputs, values, strict=True)}
