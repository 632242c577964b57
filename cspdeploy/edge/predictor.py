"""From a bundle and an image to classes, through the preprocessing that the bundle was proven with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cspdeploy.core.bundle import check_hashes, read_manifest
from cspdeploy.core.errors import InputError
from cspdeploy.core.metrics import softmax, top_k
from cspdeploy.core.preprocess import ImageSource, preprocess
from cspdeploy.core.types import Manifest
from cspdeploy.runtimes import require_runtime
from cspdeploy.runtimes.base import Outputs, Session, SessionRequest

__all__ = ["Prediction", "Predictor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One class with its softmax probability in [0, 1]."""

    label: str
    index: int
    probability: float


class Predictor:
    """An artifact, ready. Open it with `Predictor.open`.

    Attributes:
        task: "classify", "features" or "detect".
        untrained: the weights have never seen data, and no answer means anything.
    """

    def __init__(self, manifest: Manifest, session: Session, *, input_name: str, batch: int | None) -> None:
        self._manifest, self._session = manifest, session
        self._input_name, self._batch = input_name, batch
        self.task = manifest.spec.task
        self.untrained = manifest.spec.provenance.untrained
        self.labels = manifest.labels

    @classmethod
    def open(cls, bundle: str | os.PathLike[str], *, artifact: str = "onnx", runtime: str = "ort-cpu") -> Predictor:
        """Open an artifact of a bundle.

        Args:
            bundle: the folder.
            artifact: kind of artifact: "onnx", "onnx-fp16", "onnx-int8", "onnx-int8-weights", "torchscript".
            runtime: "ort-cpu", "ort-cuda", "torchscript-cpu", ...

        Raises:
            InputError: not a bundle, no such artifact in it, or the runtime does not read it.
            TamperedError: a file is not the one of the manifest.
            RuntimeUnavailableError: the runtime is not here, or did not take the work.
        """
        folder = Path(bundle)
        manifest = read_manifest(folder)
        check_hashes(folder, manifest)
        found = next((item for item in manifest.artifacts if item.kind == artifact), None)
        if found is None:
            kinds = ", ".join(item.kind for item in manifest.artifacts)
            first = manifest.artifacts[0].kind if manifest.artifacts else "onnx"
            raise InputError(f"{folder}: no artifact '{artifact}', it has {kinds}", fix=f"--artifact {first}")
        engine = require_runtime(runtime)
        if not engine.reads(format_=found.format, precision=found.precision):
            raise InputError(f"--runtime {runtime}: does not read '{artifact}'", fix="cspdeploy doctor")
        taken = found.inputs[0]
        batch = taken.shape[0]
        outputs = tuple(value.name for value in found.outputs)
        session = engine.open(SessionRequest(path=folder / found.file, outputs=outputs))
        return cls(manifest, session, input_name=taken.name, batch=batch if isinstance(batch, int) else None)

    def outputs(self, *images: ImageSource) -> dict[str, npt.NDArray[np.float32]]:
        """All outputs by name, `[N, ...]` each, for paths, bytes of files, or arrays `[H, W(, 3)]` uint8 RGB."""
        x_NCHW = preprocess(images, self._manifest.spec.preprocess)
        step = self._batch or len(x_NCHW)
        parts: list[Outputs] = []
        for start in range(0, len(x_NCHW), step):
            part = x_NCHW[start : start + step]
            filled = np.concatenate([part, np.repeat(part[-1:], step - len(part), axis=0)])
            outputs = self._session.run({self._input_name: filled})
            parts.append({name: array[: len(part)] for name, array in outputs.items()})
        return {
            name: np.concatenate([part[name] for part in parts]).astype(np.float32, copy=False) for name in parts[0]
        }

    def logits(self, *images: ImageSource) -> npt.NDArray[np.float32]:
        """Raw class scores `[N, C]`.

        Raises:
            InputError: an image cannot be read, or the artifact gives no classes.
        """
        if self.task != "classify":
            names = ", ".join(self._manifest.spec.outputs)
            raise InputError(
                f"{self._manifest.spec.name}: gives {names}, not classes",
                fix="read them in Python: cspdeploy.edge.Predictor.open(BUNDLE).outputs(IMAGE)",
            )
        return next(iter(self.outputs(*images).values()))

    def __call__(self, image: ImageSource, *, top: int = 5) -> list[Prediction]:
        """The `top` likeliest classes of one image, likeliest first."""
        logits = self.logits(image)
        probabilities = softmax(logits)[0]
        return [
            Prediction(label=self.labels[index], index=int(index), probability=float(probabilities[index]))
            for index in top_k(logits, top)[0]
        ]
