"""Real images: those that the export is proven on, and from them the network's input. Shapes: N images."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import CALIBRATION_FILE, read_calibration
from cspdeploy.core.preprocess import list_images, load_image, preprocess
from cspdeploy.core.spec import ModelSpec

__all__ = ["prepare", "real_images"]

MAX_IMAGES = 512


def real_images(spec: ModelSpec, folder: Path | None, images: Path | None) -> tuple[npt.NDArray[np.uint8], str]:
    """Images as stored, `[N, h, w]` or `[N, h, w, 3]` uint8, and where they come from.

    Args:
        folder: the model's, whose calibration images are taken if `images` is None.
        images: a folder of image files; at most 512 of them, spread evenly.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    if images is not None:
        paths = list_images(images)
        step = max(1, len(paths) // MAX_IMAGES)
        chosen = paths[::step][:MAX_IMAGES]
        side = 2 * max(spec.preprocess.height_px, spec.preprocess.width_px)
        # A contract that takes the whole image, whatever its ratio, is only proven on one that is not square.
        size = (side, side) if spec.preprocess.resize == "crop" else (side * 4 // 3, side)
        return np.stack([_thumbnail(path, size) for path in chosen]), f"{images} ({len(chosen)} images)"
    if folder is not None and (folder / CALIBRATION_FILE).is_file():
        path = folder / CALIBRATION_FILE
        return read_calibration(path), f"{path} ({hashlib.sha256(path.read_bytes()).hexdigest()[:12]})"
    raise InputError(
        f"model '{spec.name}': no real images to prove the export on", fix="give --calib DIR, a folder of images"
    )


def _thumbnail(path: Path, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The largest centred part of that ratio, at `size` (width, height), so that images of any size stack."""
    image = load_image(path)
    scale = min(image.width / size[0], image.height / size[1])
    half_width, half_height = scale * size[0] / 2, scale * size[1] / 2
    centre_x, centre_y = image.width / 2, image.height / 2
    box = (
        round(centre_x - half_width), round(centre_y - half_height),
        round(centre_x + half_width), round(centre_y + half_height),
    )  # fmt: skip
    if box[0] == box[2] or box[1] == box[3]:  # of an image of a pixel or two
        box = (0, 0, image.width, image.height)
    return np.asarray(image.resize(size, box=box))


def prepare(images: npt.NDArray[np.uint8], spec: ModelSpec) -> npt.NDArray[np.float32]:
    """Stored images to the network's input."""
    return preprocess(list(images), spec.preprocess)
