"""golden.npz: real images, the network's input made from them, and the original's outputs in FP64 and FP32.

Shapes: N images.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
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
MAX_OUTPUT_VALUES = 1 << 22
"""Of all golden images together: 48 MB in FP64 and FP32."""
_FP64, _FP32 = "output_fp64.", "output_fp32."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Golden:
    """The reference that every artifact is compared with."""

    images: npt.NDArray[np.uint8]
    """As stored, `[N, h, w]` or `[N, h, w, 3]`, before any preprocessing."""
    x_NCHW: npt.NDArray[np.float32]
    """The same images after the preprocessing contract."""
    outputs_fp64: Mapping[str, npt.NDArray[np.float64]]
    """Eager outputs by name, `[N, ...]` each, weights and arithmetic in float64."""
    outputs_fp32: Mapping[str, npt.NDArray[np.float32]]

    def __post_init__(self) -> None:
        outputs: list[npt.NDArray[Any]] = [*self.outputs_fp64.values(), *self.outputs_fp32.values()]
        if not outputs or tuple(self.outputs_fp64) != tuple(self.outputs_fp32):
            names = f"{list(self.outputs_fp64)} in FP64 and {list(self.outputs_fp32)} in FP32"
            raise ValueError(f"outputs: got {names}, expected the same")
        counts = {len(self.images), len(self.x_NCHW), *(len(array) for array in outputs)}
        if counts == {0} or len(counts) != 1:
            raise ValueError(f"images, inputs and outputs: got {sorted(counts)} of them, expected one number above 0")
        if self.images.ndim not in (3, 4):
            raise ValueError(f"images: got {list(self.images.shape)}, expected [N, h, w] or [N, h, w, 3]")
        if not all(np.isfinite(array).all() for array in outputs):
            raise ValueError("the original's own outputs are not finite")


def num_golden_images(height_px: int, width_px: int, *, num_output_values: int = 0) -> int:
    """64 small images, 8 at 256x256: bounded by the cost of the FP64 pass, about 0.5 megapixels in all.

    Args:
        num_output_values: of one image. Feature maps are stored with 12 bytes a value: fewer images then, at least 2.
    """
    num = min(64, max(8, 2**19 // (height_px * width_px)))
    return int(max(2, min(num, MAX_OUTPUT_VALUES // max(1, num_output_values))))


def write_golden(path: Path, golden: Golden) -> None:
    """Write the file; the same arrays give the same bytes."""
    outputs: dict[str, npt.NDArray[Any]] = {f"{_FP64}{name}": array for name, array in golden.outputs_fp64.items()}
    outputs |= {f"{_FP32}{name}": array for name, array in golden.outputs_fp32.items()}
    np.savez_compressed(path, images=golden.images, input=golden.x_NCHW, **outputs)  # type: ignore[arg-type]


def read_golden(path: Path) -> Golden:
    """Read the file.

    Raises:
        InputError: missing, corrupt, too large when unpacked, of other dtypes, empty, or without real images.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
        if total > MAX_GOLDEN_BYTES:
            raise InputError(f"{path}: unpacks to {total} bytes, expected at most {MAX_GOLDEN_BYTES}")
        with np.load(path, allow_pickle=False) as arrays:
            if "images" not in arrays.files and "input" in arrays.files:
                raise InputError(f"{path}: holds no images, expected the real ones that its inputs were made from",
                                 fix="export the bundle again with --calib DIR")  # fmt: skip
            golden = Golden(
                images=_require(arrays["images"], np.uint8),
                x_NCHW=_require(arrays["input"], np.float32),
                outputs_fp64=_outputs(arrays, _FP64, np.float64),
                outputs_fp32=_outputs(arrays, _FP32, np.float32),
            )
    except UNREADABLE as error:
        raise InputError(f"{path}: not a golden file ({error})", fix="export the bundle again") from error
    _require_real_images(path, golden)
    return golden


def _require_real_images(path: Path, golden: Golden) -> None:
    """Blank images bring a network to one point of its range: what overflows, saturates or flips shows on none."""
    flat = golden.images.reshape(len(golden.images), golden.images.shape[1] * golden.images.shape[2], -1)
    if (flat == flat[:, :1]).all():
        raise InputError(
            f"{path}: each of its {len(flat)} images is of one colour, expected real images",
            fix="export the bundle again with --calib DIR, a folder of real images",
        )


def _outputs(arrays: Any, prefix: str, dtype: type[np.generic]) -> dict[str, npt.NDArray[Any]]:
    names = [name for name in arrays.files if name.startswith(prefix)]
    return {name.removeprefix(prefix): _require(arrays[name], dtype) for name in names}


def _require(array: npt.NDArray[Any], dtype: type[np.generic]) -> npt.NDArray[Any]:
    if array.dtype != dtype:
        raise ValueError(f"got {array.dtype}, expected {np.dtype(dtype)}")
    return array
