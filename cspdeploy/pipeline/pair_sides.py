"""Two networks, made ready to be timed side by side: both exported at one size, or taken as they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cspdeploy.core.datasets import FASHION_MNIST, FASHION_MNIST_FOLDER, open_dataset
from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import CALIBRATION_FILE, WEIGHTS_FILE, read_calibration, write_calibration, write_spec
from cspdeploy.core.sizes import size_of
from cspdeploy.core.types import Artifact, Manifest
from cspdeploy.nets.weights import write_safetensors
from cspdeploy.pipeline.images import real_images
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.pipeline.sides import Side
from cspdeploy.pipeline.weights import make_untrained

__all__ = ["Prepared", "find_images", "prepare_side"]

Progress = Callable[[str, int, int], None]
NUM_IMAGES = 64  # the export takes half of them to prove itself on, and half to find the ranges of FP16


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A side, exported: its bundle, and the weights of the eager network."""

    manifest: Manifest
    folder: Path
    weights: Path

    def artifacts(self) -> dict[str, Artifact]:
        """By kind, of the bundle's first size."""
        return {artifact.kind: artifact for artifact in self.manifest.artifacts if size_of(artifact.kind) is None}


def find_images(sides: tuple[Side, Side], calibration: Path | None) -> npt.NDArray[np.uint8] | None:
    """Real images for sides that bring none: the folder given, a side's own, Fashion-MNIST. None where none is needed.

    Raises:
        InputError: they are needed, and there are none.
    """
    if all(side.kind == "bundle" or (_holds(side, WEIGHTS_FILE) and _holds(side, CALIBRATION_FILE)) for side in sides):
        return None
    if calibration is not None:
        return real_images(sides[0].spec, None, calibration)[0][:NUM_IMAGES]
    for side in sides:
        if side.folder is not None and _holds(side, CALIBRATION_FILE):
            return read_calibration(side.folder / CALIBRATION_FILE)[:NUM_IMAGES]
    if FASHION_MNIST_FOLDER.is_dir():
        stored = open_dataset(FASHION_MNIST, split="test").stored
        return None if stored is None else stored[:NUM_IMAGES]
    raise InputError(
        "no real images to export the networks with",
        fix=f"give --calib DIR, or --no-latency, or apt-get install dataset-{FASHION_MNIST}",
    )


def _holds(side: Side, file: str) -> bool:
    return side.kind == "model" and side.folder is not None and (side.folder / file).is_file()


def prepare_side(
    side: Side, *, size_px: tuple[int, int], images: npt.NDArray[np.uint8] | None, calibration: Path | None,
    work: Path, progress: Progress,
) -> Prepared:  # fmt: skip
    """Export a side at that size, with a free batch and with FP16. A bundle is taken as it is.

    Networks without weights here get random ones: in FP32 the time does not depend on the values, in FP16
    they decide which nodes stay in FP32.

    Args:
        images: of `find_images`, for a side that has none.
        calibration: folder of images that takes the place of a model's own.

    Raises:
        InputError: it cannot be exported, or it is a bundle of another size.
    """
    if side.manifest is not None and side.folder is not None:
        if side.size_px != size_px:
            own, asked = ("x".join(map(str, size)) for size in (side.size_px, size_px))
            raise InputError(
                f"{side.given}: is exported for {own} px, cannot be timed at {asked} px",
                fix=f"--size {own}, --no-latency, or name the network instead of the bundle",
            )
        weights = _whole_folder(side, work, None) / WEIGHTS_FILE
        return Prepared(manifest=side.manifest, folder=side.folder, weights=weights)
    folder = side.folder
    if folder is None or not (_holds(side, WEIGHTS_FILE) and _holds(side, CALIBRATION_FILE)):
        folder = _whole_folder(side, work, images)
    request = ExportRequest(
        model=str(folder.resolve()), models=work, output=work / "exported", calibration=calibration, size_px=size_px,
        fp16=True, dynamic_batch=True,
    )  # fmt: skip
    report = export_bundle(request, progress=lambda what, done, total: progress(f"{side.given}: {what}", done, total))
    return Prepared(manifest=report.manifest, folder=Path(report.folder), weights=folder / WEIGHTS_FILE)


def _whole_folder(side: Side, work: Path, images: npt.NDArray[np.uint8] | None) -> Path:
    """A model folder below `work` with the side's weights, or random ones, and with those images."""
    folder = work / "models" / side.spec.name
    folder.mkdir(parents=True)
    spec = side.spec
    if side.folder is not None and _holds(side, WEIGHTS_FILE):
        shutil.copy(side.folder / WEIGHTS_FILE, folder)
    else:
        spec, model = make_untrained(spec)
        write_safetensors(folder / WEIGHTS_FILE, model, dtype=torch.float32)
    write_spec(folder, spec)
    if images is not None:
        write_calibration(folder / CALIBRATION_FILE, images)
    return folder
