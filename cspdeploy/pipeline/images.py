"""Real images: those that the export is proven on, and from them the network's input. Shapes: N images."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import CALIBRATION_FILE, WEIGHTS_FILE, read_calibration
from cspdeploy.core.preprocess import list_images, load_image, preprocess
from cspdeploy.core.spec import ModelSpec

if TYPE_CHECKING:
    from cspdeploy.quant.calibration import CalibrationSet

__all__ = ["images_seen", "images_to_calibrate", "prepare", "real_images"]

MAX_IMAGES = 512
MIN_LEFT = 64
"""Images to calibrate on that must be left where the golden ones are held out. With fewer, ranges suffer more than the
proof gains: of ranges from 32 images 2.6 % of all later pairs of image and tensor lie outside, of 64 half as many."""


def real_images(spec: ModelSpec, folder: Path | None, images: Path | None) -> tuple[npt.NDArray[np.uint8], str]:
    """Images as stored, `[N, h, w]` or `[N, h, w, 3]` uint8, and where they come from.

    Args:
        folder: the model's, whose calibration images are taken if `images` is None.
        images: a folder of image files; at most 512 of them, spread evenly.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    if images is not None:
        chosen = _spread(list_images(images))
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


def _spread(paths: list[Path]) -> list[Path]:
    step = max(1, len(paths) // MAX_IMAGES)
    return paths[::step][:MAX_IMAGES]


def images_to_calibrate(
    spec: ModelSpec,
    *,
    stored: npt.NDArray[np.uint8],
    golden: npt.NDArray[np.int64],
    origin: str,
    folder: Path | None,
    max_images: int,
) -> CalibrationSet:
    """Images that INT8 is calibrated on: others than the golden ones, which prove it, where there are enough.

    Args:
        stored, origin: what `real_images` gave.
        golden: indices into `stored`.
        folder: that `stored` was made from; its files are read as prediction would read them, all of them that
            `max_images` allows.

    Raises:
        InputError: there is no image.
    """
    from cspdeploy.quant.calibration import CalibrationSet, open_calibration

    contract = spec.preprocess
    if folder is None:
        left = np.delete(stored, golden, axis=0)
        pictures = left if len(left) >= MIN_LEFT else stored
        return open_calibration(pictures, contract, max_images=max_images, origin=origin)
    found = open_calibration(folder, contract)
    names = [found.name(i) for i in range(len(found))]
    proving = _spread(list_images(folder))
    held = {str(proving[i]) for i in golden}
    others = [name for name in names if name not in held]
    chosen = others if len(others) >= MIN_LEFT else names
    if len(chosen) > max_images:
        chosen = [chosen[i] for i in np.arange(max_images) * len(chosen) // max_images]
    told = f"{folder} ({len(chosen)} of {len(names)} images)"
    return CalibrationSet([Path(name) for name in chosen], contract=contract, origin=told, ignored=found.ignored)


def images_seen(spec: ModelSpec, weights: str) -> CalibrationSet | None:
    """Images that the model is known to have met: those of its folder. None where it has no folder, or that has none.

    Args:
        weights: file that the network's weights were read from.

    Raises:
        InputError: they cannot be read.
    """
    from cspdeploy.quant.calibration import open_calibration

    path = Path(weights).parent / CALIBRATION_FILE
    if Path(weights).name != WEIGHTS_FILE or not path.is_file():
        return None
    return open_calibration(path, spec.preprocess)


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
