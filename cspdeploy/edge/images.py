"""From what an application has to what the artifact takes. Decoding and resizing are those of `core.preprocess`.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import InputError
from cspdeploy.core.graph_images import graph_pixels
from cspdeploy.core.preprocess import ImageSource, normalise, read_pixels, resize_pixels
from cspdeploy.core.spec import Preprocess
from cspdeploy.core.types import Frontend

__all__ = ["ChannelOrder", "Fed", "Feed", "check_pixels", "require_channel_order", "require_images"]

ChannelOrder = Literal["rgb", "bgr"]
Array = npt.NDArray[Any]

# A pixel is known to 1/255 before its float32 roundings; normalised values beyond the contract's range by more than
# that are no rounding, but another scale.
RANGE_MARGIN = 1.0 / 255.0


@dataclass(frozen=True, slots=True, eq=False)
class Fed:
    """An image as the artifact takes it, `[1, ...]`, and the width and height that it had."""

    x: Array
    size_px: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """How images become the input of one artifact.

    Attributes:
        contract: the preprocessing that the network was trained with.
        frontend: what of it the graph does itself; None: nothing.
        channel_order: of the arrays that the application gives. Files carry theirs.
    """

    contract: Preprocess
    frontend: Frontend | None = None
    channel_order: ChannelOrder = "rgb"

    def prepare(self, source: ImageSource) -> Array:
        """One image as the artifact takes it, `[1, ...]`: float32 `[1, 3, H, W]`, or uint8 `[1, H, W, 3]`.

        The caller's array may be filled again as soon as this returns: nothing of it is kept.

        Raises:
            InputError: not an image.
        """
        return self.fed(source).x

    def fed(self, source: ImageSource) -> Fed:
        """The same with the size that boxes are given in: of the upright picture.

        Raises:
            InputError: not an image.
        """
        pixels_HWC = self._pixels(source)
        size_px = (int(pixels_HWC.shape[1]), int(pixels_HWC.shape[0]))
        if self.frontend is None:
            return Fed(normalise(resize_pixels(pixels_HWC, self.contract)[None], self.contract), size_px)
        made_HWC = graph_pixels(pixels_HWC, self.frontend, self.contract)
        if isinstance(source, np.ndarray) and np.may_share_memory(made_HWC, source):
            made_HWC = made_HWC.copy()  # of a view the engine would see what a camera writes there next
        return Fed(made_HWC[None], size_px)

    def _pixels(self, source: object) -> Array:
        """`[H, W, 3]` uint8 RGB."""
        if isinstance(source, np.ndarray):
            check_pixels(source)
            pixels = read_pixels(source)
            return pixels[:, :, ::-1] if self.channel_order == "bgr" else pixels
        if not isinstance(source, (str, bytes, os.PathLike)):
            raise _wrong_type(source)
        return read_pixels(source)

    def check_raw(self, x: object, *, shape: Sequence[int | str]) -> None:
        """Refuse a tensor that is not the artifact's own input.

        Args:
            shape: that the artifact declares.

        Raises:
            InputError: another type, shape or range, or NaN.
        """
        dtype = "float32" if self.frontend is None else "uint8"
        if not isinstance(x, np.ndarray) or x.dtype != dtype:
            got = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
            raise InputError(f"raw input: got {got}, expected {dtype} {_spelt(shape)}", fix=f"x.astype('{dtype}')")
        fixed = [size for size in shape if isinstance(size, int)]
        matches = x.ndim == len(shape) and all(
            size == own for size, own in zip(shape[1:], x.shape[1:], strict=True) if isinstance(size, int)
        )
        if not matches or not x.size:
            raise InputError(f"raw input: got {list(x.shape)}, expected {_spelt(shape)}")
        if isinstance(shape[0], int) and len(x) != fixed[0]:
            raise InputError(
                f"raw input: got {len(x)} images, this artifact takes exactly {fixed[0]} a call",
                fix="predictor.predict(images) makes as many calls as it takes; or cspdeploy export --dynamic-batch",
            )
        if self.frontend is None:
            self._check_range(x)
        else:
            for image in x:
                _refuse_cast_floats(image, "raw input")

    def _check_range(self, x_NCHW: Array) -> None:
        mean, std = np.asarray(self.contract.mean), np.asarray(self.contract.std)
        low, high = (0 - mean - RANGE_MARGIN) / std, (1 - mean + RANGE_MARGIN) / std
        smallest, largest = x_NCHW.min(axis=(0, 2, 3)), x_NCHW.max(axis=(0, 2, 3))
        if (smallest >= low).all() and (largest <= high).all():  # NaN is neither
            return
        if not np.isfinite(x_NCHW).all():
            raise InputError("raw input: holds NaN or infinite values")
        raise InputError(
            f"raw input: values from {smallest.min():.4g} to {largest.max():.4g}, expected {low.min():.3g} to "
            f"{high.max():.3g}: pixels / 255, less the mean {self.contract.mean}, by std {self.contract.std}",
            fix="give uint8 pixels to predictor(image), which normalises them",
        )


def require_channel_order(value: str) -> ChannelOrder:
    """Of arrays that an application gives.

    Raises:
        InputError: neither of the two.
    """
    if value == "rgb":
        return "rgb"
    if value == "bgr":
        return "bgr"
    raise InputError(
        f"channel_order {value!r}: unknown, expected 'rgb' or 'bgr'",
        fix="'bgr' for arrays of OpenCV, 'rgb' for those of Pillow and most others",
    )


def check_pixels(array: Array) -> None:
    """Refuse an array that is no 8-bit image, saying what it seems to be.

    Raises:
        InputError: another type, range or shape than uint8 `[H, W]`, `[H, W, 1]` or `[H, W, 3]`, 0..255.
    """
    if array.dtype != np.uint8:
        raise _wrong_dtype(array)
    expected = "expected uint8 [H, W], [H, W, 1] or [H, W, 3]"
    got = f"image array: got uint8 {list(array.shape)}"
    if array.ndim in (2, 3) and 0 in array.shape:
        raise InputError(f"{got}, an image without pixels, {expected}")
    if array.ndim == 4:
        raise InputError(f"{got}, a batch, {expected}", fix="predictor.predict(list(images))")
    if array.ndim not in (2, 3):
        raise InputError(f"{got}, {expected}")
    if array.ndim == 3 and array.shape[2] not in (1, 3):
        if array.shape[2] == 4:
            raise InputError(f"{got}, with transparency, {expected}", fix="image[:, :, :3]")
        if array.shape[0] in (1, 3):
            raise InputError(f"{got}, channels first, {expected}", fix="image.transpose(1, 2, 0)")
        raise InputError(f"{got}, {expected}")
    _refuse_cast_floats(array, "image array")


def require_images(images: object, *, call: str) -> None:
    """Refuse one image where any number is expected: its rows, or the letters of its path, are no images.

    Args:
        call: the method, as the fix spells it: "predict", "stream".

    Raises:
        InputError: one image, images that are no sequence of images, or nothing that can be iterated.
    """
    if isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike)):
        got, fix = f"one image ({type(images).__name__})", f"predictor(image), or predictor.{call}([image])"
    elif isinstance(images, np.ndarray) and images.ndim < 4 and images.dtype != object:
        many = images.ndim == 3 and images.shape[2] not in (1, 3, 4)
        got = f"an array {images.dtype} {list(images.shape)}"
        fix = f"predictor.{call}(list(images)) for grey images [N, H, W], " if many else ""
        fix += f"predictor(image) or predictor.{call}([image]) for one image"
    elif not (hasattr(type(images), "__iter__") or hasattr(type(images), "__getitem__")):
        got, fix = f"a {type(images).__qualname__}", f"predictor(image), or predictor.{call}([image])"
    else:
        return
    raise InputError(f"images: got {got}, expected several: a list, an iterator or an array [N, H, W, 3]", fix=fix)


def _refuse_cast_floats(array: Array, name: str) -> None:
    """An image in 0..1 that was cast to uint8 holds 0, and 1 where it was white. Cameras see black frames."""
    if array[:1].max() <= 1 and array.max() == 1 and array.min() == 0:  # one row tells of nearly all images
        raise InputError(
            f"{name}: got uint8 that holds 0 and 1 alone, as of a float image in 0..1, expected uint8 0..255",
            fix="(image * 255).round().astype('uint8') of the float image",
        )


def _wrong_dtype(array: Array) -> InputError:
    """Which mistake it was shows in the range."""
    kind = array.dtype
    wanted = "expected uint8 0..255"
    if kind == np.bool_:
        return InputError(f"image array: got bool {list(array.shape)}, {wanted}", fix="image.astype('uint8') * 255")
    if not (np.issubdtype(kind, np.floating) or np.issubdtype(kind, np.integer)):
        return InputError(f"image array: got {kind} {list(array.shape)}, {wanted}")
    if not array.size or not np.isfinite(array).all():
        return InputError(f"image array: got {kind} with NaN or infinite values, or none at all, {wanted}")
    low, high = float(array.min()), float(array.max())
    if np.issubdtype(kind, np.floating) and low >= 0 and high <= 1:
        return InputError(f"image array: got {kind} in 0..1, {wanted}", fix="(image * 255).round().astype('uint8')")
    if low >= 0 and high <= np.iinfo(np.uint8).max:
        return InputError(f"image array: got {kind} in 0..255, {wanted}", fix="image.round().astype('uint8')")
    normalised = np.issubdtype(kind, np.floating) and low < 0
    return InputError(
        f"image array: got {kind} from {low:.4g} to {high:.4g}, {wanted}",
        fix="predictor.raw(x) takes pixels that are normalised already" if normalised else "scale it to 0..255",
    )


def _wrong_type(source: object) -> InputError:
    module, name = type(source).__module__.partition(".")[0], type(source).__qualname__
    fixes = {
        "PIL": "numpy.asarray(image.convert('RGB'))", "torch": "image.cpu().numpy(), uint8 [H, W, 3]",
        "builtins": "predictor.predict(images)" if isinstance(source, (list, tuple)) else "",
    }  # fmt: skip
    return InputError(
        f"image: got {module}.{name}, expected a path, the bytes of a file, or an array uint8 [H, W, 3]",
        fix=fixes.get(module, ""),
    )


def _spelt(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
