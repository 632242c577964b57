"""golden.npz: real images, the network's input made from them, and the original's outputs in FP64 and FP32.

Shapes: N images, C classes.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import UNREADABLE

__all__ = ["Golden", "num_golden_images", "read_golden", "write_golden"]

GOLDEN_FILE = "golden.npz"
MAX_GOLDEN_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Golden:
    """The reference that every artifact is compared with."""

    images: npt.NDArray[np.uint8]
    """As stored, `[N, h, w]` or `[N, h, w, 3]`, before any preprocessing."""
    x_NCHW: npt.NDArray[np.float32]
    """The same images after the preprocessing contract."""
    output_fp64: npt.NDArray[np.float64]
    """Eager outputs `[N, C]`, weights and arithmetic in float64."""
    output_fp32: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        counts = {len(self.images), len(self.x_NCHW), len(self.output_fp64), len(self.output_fp32)}
        if counts == {0} or len(counts) != 1:
            raise ValueError(f"images, inputs and outputs: got {sorted(counts)} of them, expected one number above 0")
        if not (np.isfinite(self.output_fp64).all() and np.isfinite(self.output_fp32).all()):
            raise ValueError("the original's own outputs are not finite")


def num_golden_images(height_px: int, width_px: int) -> int:
    """64 small images, 8 at 256x256: bounded by the cost of the FP64 pass, about 0.5 megapixels in all."""
    return int(min(64, max(8, 2**19 // (height_px * width_px))))


def write_golden(path: Path, golden: Golden) -> None:
    """Write the file; the same arrays give the same bytes."""
    np.savez_compressed(
        path, images=golden.images, input=golden.x_NCHW, output_fp64=golden.output_fp64, output_fp32=golden.output_fp32
    )


def read_golden(path: Path) -> Golden:
    """Read the file.

    Raises:
        InputError: missing, corrupt, too large when unpacked, of other dtypes, or empty.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
        if total > MAX_GOLDEN_BYTES:
            raise InputError(f"{path}: unpacks to {total} bytes, expected at most {MAX_GOLDEN_BYTES}")
        with np.load(path, allow_pickle=False) as arrays:
            return Golden(
                images=_require(arrays["images"], np.uint8),
                x_NCHW=_require(arrays["input"], np.float32),
                output_fp64=_require(arrays["output_fp64"], np.float64),
                output_fp32=_require(arrays["output_fp32"], np.float32),
            )
    except UNREADABLE as error:
        raise InputError(f"{path}: not a golden file ({error})", fix="export the bundle again") from error


def _require(array: npt.NDArray[Any], dtype: type[np.generic]) -> npt.NDArray[Any]:
    if array.dtype != dtype:
        raise ValueError(f"got {array.dtype}, expected {np.dtype(dtype)}")
    return array
