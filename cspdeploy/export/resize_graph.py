"""`cspdeploy.core.preprocess.resize_image` as ONNX nodes: any picture to the contract's size.

Pillow shrinks with a filter as wide as the step between pixels (antialias) and rounds to bytes between its two passes.
ONNX Resize does both on uint8 from opset 18 on, with `antialias` and `exclude_outside` (weights beyond the edge are
dropped, not repeated). Measured with ONNX Runtime 1.31 against Pillow 13 on noisy pictures of 28 to 4000 px a side: a
pass an axis in Pillow's order differs by 1 step of 255, rarely 2, on 0 to 4 % of the values; in the other order by 3,
on a fifth of them; float32 passes without rounding by 3, on a seventh; without `exclude_outside` by 4 at the edges.
Layout: N, H, W, C; the sizes of a picture are free.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
from PIL import Image

from cspdeploy.core.preprocess import LETTERBOX_GREY
from cspdeploy.core.spec import Preprocess
from cspdeploy.export.graph_part import GraphPart

__all__ = ["ANTIALIAS_OPSET", "add_resize", "pillow_order"]

ANTIALIAS_OPSET = 18
"""The first whose Resize has `antialias`: without it every shrinking filter skips pixels that Pillow's does not."""
PILLOW_CUBIC_A = -0.5
"""Of the bicubic kernel; ONNX has -0.75 by default."""

Order = Literal["width-first", "by-size"]
_MODES = {"bilinear": "linear", "bicubic": "cubic"}


@functools.cache
def pillow_order() -> Order:
    """Which pass Pillow does first: that along the width always (to 12), or by the sizes (13).

    From 13 on the height comes first where it loses more than twice as many pixels as the width (pull request 9549 of
    python-pillow/Pillow; the rule was found by 3,000 random sizes, all of which keep to it). Asked of Pillow itself,
    since the difference shows: a fifth of all values is another byte in the other order.
    """
    tall = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 16), np.uint8))
    width_first = tall.resize((24, 64), Image.Resampling.BILINEAR).resize((24, 40), Image.Resampling.BILINEAR)
    same = np.array_equal(np.asarray(tall.resize((24, 40), Image.Resampling.BILINEAR)), np.asarray(width_first))
    return "width-first" if same else "by-size"


def add_resize(part: GraphPart, image: str, contract: Preprocess) -> str:
    """Add the nodes from `image`, uint8 `[N, H, W, 3]` of any H and W, to the contract's size.

    Returns:
        The tensor, uint8 `[N, height_px, width_px, 3]`.
    """
    shape = part.node("Shape", image, name="shape")
    one, three = part.integers(1, name="one"), part.integers(3, name="three")
    own = part.node("Slice", shape, one, three, name="own_size")
    wanted = part.integers(contract.height_px, contract.width_px, name="wanted_size")
    if contract.resize == "stretch":
        return _resample(part, image, own, wanted, contract)
    if contract.resize == "letterbox":
        return _letterbox(part, image, own, wanted, contract)
    return _crop(part, image, own, wanted, contract)


def _crop(part: GraphPart, image: str, own: str, wanted: str, contract: Preprocess) -> str:
    """Shorter side to size / crop_pct, then the centre. In float64 as in Python; Round goes to even there as here."""
    fit = [int(side / contract.crop_pct) for side in (contract.height_px, contract.width_px)]
    exact = part.node("Cast", own, name="own_float64", to=_FLOAT64)
    ratios = part.node("Div", part.constant(fit, np.float64, name="fit"), exact, name="ratios")
    first = part.node("Gather", ratios, part.integers(0, name="first"), name="ratio_of_height")
    second = part.node("Gather", ratios, part.integers(1, name="second"), name="ratio_of_width")
    scaled = part.node("Mul", exact, part.node("Max", first, second, name="scale"), name="scaled_float64")
    rounded = part.node("Cast", part.node("Round", scaled, name="scaled_round"), name="scaled_int64", to=_INT64)
    size = part.node("Max", rounded, wanted, name="scaled")
    resized = _resample(part, image, own, size, contract)
    spare = part.node("Cast", part.node("Sub", size, wanted, name="spare"), name="spare_float64", to=_FLOAT64)
    half = part.node("Mul", spare, part.constant(0.5, np.float64, name="half"), name="spare_half")
    start = part.node("Cast", part.node("Round", half, name="start_round"), name="start", to=_INT64)
    end = part.node("Add", start, wanted, name="end")
    return part.node("Slice", resized, start, end, part.integers(1, 2, name="spatial_axes"), name="centre")


def _letterbox(part: GraphPart, image: str, own: str, wanted: str, contract: Preprocess) -> str:
    """The longer side fits, the rest is grey; whole pixels throughout.

    The inner size is the smaller of the wanted one and of the one that the other side's ratio gives, which is the same
    as the comparison of the two ratios in `core.preprocess`.
    """
    swap = part.integers(1, 0, name="swap")
    products = part.node("Mul", own, part.node("Gather", wanted, swap, name="wanted_swapped"), name="products")
    ratio = part.node("Div", products, part.node("Gather", own, swap, name="own_swapped"), name="by_ratio")
    one = part.integers(1, 1, name="at_least")
    inner = part.node("Max", part.node("Min", ratio, wanted, name="fitting"), one, name="inner")
    resized = _resample(part, image, own, inner, contract)
    spare = part.node("Sub", wanted, inner, name="spare")
    before = part.node("Div", spare, part.integers(2, name="two"), name="before")
    after = part.node("Sub", spare, before, name="after")
    zero = part.integers(0, name="zero")
    pads = part.node("Concat", zero, before, zero, zero, after, zero, name="pads", axis=0)
    return part.node("Pad", resized, pads, part.constant(LETTERBOX_GREY, np.uint8, name="grey"), name="letterbox")


def _resample(part: GraphPart, image: str, own: str, size: str, contract: Preprocess) -> str:
    """`image` to `size`, an int64 tensor [height, width]."""
    height = part.node("Gather", size, part.integers(0, name="height_at"), name="new_height")
    width = part.node("Gather", size, part.integers(1, name="width_at"), name="new_width")
    if contract.interpolation == "nearest":
        image = _pick(part, image, _element(part, own, 0, name="old_height"), height, axis=1, name="rows")
        return _pick(part, image, _element(part, own, 1, name="old_width"), width, axis=2, name="columns")
    if pillow_order() == "width-first":
        image = _pass(part, image, width, axis=2, name="along_width", contract=contract)
        return _pass(part, image, height, axis=1, name="along_height", contract=contract)
    # Where the height comes first, the first pass is to the width that the picture has and copies it.
    old_width = _element(part, own, 1, name="old_width")
    off_width = part.node("Sub", old_width, width, name="off_width")
    off_height = part.node("Sub", _element(part, own, 0, name="old_height"), height, name="off_height")
    twice = part.node("Mul", off_width, part.integers(2, name="twice"), name="twice_off_width")
    least = part.node("Max", twice, part.integers(0, name="none"), name="off_height_at_least")
    height_first = part.node("Less", least, off_height, name="height_first")
    first = part.node("Where", height_first, old_width, width, name="first_width")
    image = _pass(part, image, first, axis=2, name="along_width", contract=contract)
    image = _pass(part, image, height, axis=1, name="along_height", contract=contract)
    return _pass(part, image, width, axis=2, name="along_width_last", contract=contract)


def _element(part: GraphPart, vector: str, index: int, *, name: str) -> str:
    return part.node("Gather", vector, part.integers(index, name=f"{name}_at"), name=name)


def _pass(part: GraphPart, image: str, size: str, *, axis: int, name: str, contract: Preprocess) -> str:
    """One axis through the filter, rounded to bytes."""
    cubic: dict[str, Any] = {"cubic_coeff_a": PILLOW_CUBIC_A} if contract.interpolation == "bicubic" else {}
    return part.node(
        "Resize", image, "", "", size, name=name, mode=_MODES[contract.interpolation], axes=[axis], antialias=1,
        exclude_outside=1, coordinate_transformation_mode="half_pixel", **cubic,
    )  # fmt: skip


def _pick(part: GraphPart, image: str, old: str, new: str, *, axis: int, name: str) -> str:
    """Every pixel from its nearest one. Pillow adds up the step from pixel to pixel in float64, and so does CumSum.

    Where the middle of a new pixel lies on the border of two old ones, the sum decides which one it is; Resize, which
    multiplies in float32, takes the other one: measured as up to 60 steps of 255 in one column of 341.
    """
    old64, new64 = (part.node("Cast", value, name=f"{name}_{what}_float64", to=_FLOAT64)
                    for what, value in (("old", old), ("new", new)))  # fmt: skip
    step = part.node("Div", old64, new64, name=f"{name}_step")
    first = part.node("Mul", step, part.constant([0.5], np.float64, name=f"{name}_half"), name=f"{name}_first")
    others = part.node("Sub", new, part.integers(1, name=f"{name}_one"), name=f"{name}_others")
    steps = part.node("Expand", step, others, name=f"{name}_steps")
    whole = part.node("Concat", first, steps, name=f"{name}_all", axis=0)
    at = part.node("CumSum", whole, part.constant(0, np.int64, name=f"{name}_axis"), name=f"{name}_middles")
    index = part.node("Cast", part.node("Floor", at, name=f"{name}_floor"), name=f"{name}_index", to=_INT64)
    return part.node("Gather", image, index, name=name, axis=axis)


_FLOAT64, _INT64 = 11, 7
"""TensorProto.DataType."""
