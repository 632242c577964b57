"""ONNX operators over height and width in PyTorch: convolution, pooling, padding, resizing.

Semantics: https://onnx.ai/onnx/operators
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

__all__ = ["SPATIAL", "Attributes", "Inputs", "Outputs"]

Attributes = Mapping[str, Any]
Inputs = list[Any]
Outputs = list[torch.Tensor] | None

CONVOLUTIONS: dict[int, Callable[..., torch.Tensor]] = {
    3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d,
}  # fmt: skip
TRANSPOSED: dict[int, Callable[..., torch.Tensor]] = {
    3: functional.conv_transpose1d, 4: functional.conv_transpose2d, 5: functional.conv_transpose3d,
}  # fmt: skip


def _ints(attributes: Attributes, name: str, rank: int) -> tuple[int, ...]:
    return tuple(attributes.get(name, [1] * rank))


def _pads(attributes: Attributes, x: torch.Tensor, kernel: Sequence[int]) -> list[int] | None:
    """Starts of all spatial axes, then their ends; None for what no operator allows."""
    rank = len(kernel)
    given = attributes.get("auto_pad", b"NOTSET")
    if given == b"NOTSET":
        return list(attributes.get("pads", [0] * 2 * rank))
    if given == b"VALID":
        return [0] * 2 * rank
    strides, dilations = _ints(attributes, "strides", rank), _ints(attributes, "dilations", rank)
    total = [
        max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        for size, stride, width, dilation in zip(x.shape[2:], strides, kernel, dilations, strict=True)
    ]
    small, large = [pad // 2 for pad in total], [pad - pad // 2 for pad in total]
    return {b"SAME_UPPER": small + large, b"SAME_LOWER": large + small}.get(given)


def _padded(x: torch.Tensor, pads: Sequence[int], *, value: float = 0.0) -> torch.Tensor:
    """By starts and ends of the last axes, as ONNX has them; torch wants pairs, last axis first. Negative ones crop."""
    rank = len(pads) // 2
    pairs = [pad for axis in reversed(range(rank)) for pad in (pads[axis], pads[rank + axis])]
    return functional.pad(x, pairs, value=value) if any(pairs) else x


def _alike(pads: Sequence[int]) -> bool:
    rank = len(pads) // 2
    return list(pads[:rank]) == list(pads[rank:]) and min(pads, default=0) >= 0


def _conv(attributes: Attributes, inputs: Inputs) -> Outputs:
    x, weight, bias = (*inputs, None)[:3]
    pads, rank = _pads(attributes, x, weight.shape[2:]), x.dim() - 2
    if pads is None or x.dim() not in CONVOLUTIONS:
        return None
    if not _alike(pads):
        x, pads = _padded(x, pads), [0] * 2 * rank
    strides, dilations = _ints(attributes, "strides", rank), _ints(attributes, "dilations", rank)
    groups = attributes.get("group", 1)
    return [CONVOLUTIONS[x.dim()](x, weight, bias, strides, tuple(pads[:rank]), dilations, groups)]


def _conv_transpose(attributes: Attributes, inputs: Inputs) -> Outputs:
    x, weight, bias = (*inputs, None)[:3]
    rank = x.dim() - 2
    if x.dim() not in TRANSPOSED:
        return None
    strides, dilations = _ints(attributes, "strides", rank), _ints(attributes, "dilations", rank)
    # Unpadded, then cropped: torch has one number for both ends, and wants the extra rows smaller than a stride.
    whole = TRANSPOSED[x.dim()](x, weight, None, strides, 0, 0, attributes.get("group", 1), dilations)
    extra = attributes.get("output_padding", [0] * rank)
    whole = _padded(whole, [*[0] * rank, *extra])
    found = _padded(whole, [-pad for pad in _crops(attributes, x, whole)])
    return [found if bias is None else found + bias.reshape(-1, *[1] * rank)]


def _crops(attributes: Attributes, x: torch.Tensor, whole: torch.Tensor) -> list[int]:
    """Starts, then ends: as given, or such that the output has the size that is asked for."""
    rank = x.dim() - 2
    given = attributes.get("auto_pad", b"NOTSET")
    sizes = attributes.get("output_shape")
    if sizes is None and given in (b"SAME_UPPER", b"SAME_LOWER"):
        sizes = [size * stride for size, stride in zip(x.shape[2:], _ints(attributes, "strides", rank), strict=True)]
    if sizes is None:
        return list(attributes.get("pads", [0] * 2 * rank))
    total = [more - size for more, size in zip(whole.shape[2:], sizes[-rank:], strict=True)]
    small, large = [pad // 2 for pad in total], [pad - pad // 2 for pad in total]
    return small + large if given == b"SAME_UPPER" else large + small


def _max_pool(attributes: Attributes, inputs: Inputs) -> Outputs:
    x, kernel = inputs[0], tuple(attributes["kernel_shape"])
    pads, rounds_up = _pads(attributes, x, kernel), bool(attributes.get("ceil_mode", 0))
    if x.dim() != 4 or pads is None:
        return None
    if not _alike(pads) or any(2 * pad > size for pad, size in zip(pads, kernel, strict=False)):
        if rounds_up:
            return None
        x, pads = _padded(x, pads, value=-torch.inf), [0] * 4
    strides, dilations = _ints(attributes, "strides", 2), _ints(attributes, "dilations", 2)
    return [functional.max_pool2d(x, kernel, strides, tuple(pads[:2]), dilations, rounds_up)]


def _average_pool(attributes: Attributes, inputs: Inputs) -> Outputs:
    x, kernel = inputs[0], tuple(attributes["kernel_shape"])
    pads = _pads(attributes, x, kernel)
    if x.dim() != 4 or pads is None or attributes.get("ceil_mode", 0) or max(attributes.get("dilations", [1])) > 1:
        return None
    strides = _ints(attributes, "strides", 2)
    found = functional.avg_pool2d(_padded(x, pads), kernel, strides)
    if any(pads) and not attributes.get("count_include_pad", 0):
        inside = _padded(torch.ones_like(x[:1, :1]), pads)
        found = found / functional.avg_pool2d(inside, kernel, strides)
    return [found]


def _pad(attributes: Attributes, inputs: Inputs) -> Outputs:
    x, pads, value, axes = (*inputs, None, None, None)[:4]
    pads = list(attributes["pads"]) if pads is None else pads.tolist()
    value = attributes.get("value", 0.0) if value is None else float(value)
    if attributes.get("mode", b"constant") != b"constant" or axes is not None:
        return None
    return [_padded(x, pads, value=value)]


def _resize(attributes: Attributes, inputs: Inputs) -> Outputs:
    """Height and width, where torch takes its samples at the same places; everything else is the reference's."""
    x, sizes = inputs[0], _resized(inputs)
    unusual = any(attributes.get(name) for name in ("antialias", "exclude_outside", "axes"))
    if x.dim() != 4 or sizes is None or unusual or attributes.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        return None
    how = attributes.get("coordinate_transformation_mode", b"half_pixel")
    mode = attributes.get("mode", b"nearest")
    if mode == b"nearest":
        return [functional.interpolate(x, sizes, mode="nearest")] if _nearest_as_torch(attributes, x, sizes) else None
    if mode != b"linear" or how not in (b"half_pixel", b"pytorch_half_pixel", b"align_corners") or min(sizes) == 1:
        return None
    return [functional.interpolate(x, sizes, mode="bilinear", align_corners=how == b"align_corners")]


def _resized(inputs: Inputs) -> tuple[int, int] | None:
    """Height and width; None where the scales do not meet them exactly, or another axis is resized."""
    x = inputs[0]
    if len(inputs) > 3 and inputs[3] is not None:
        sizes = [float(size) for size in inputs[3].tolist()]
    else:
        scales = inputs[2] if len(inputs) > 2 else inputs[1]
        sizes = [size * float(scale) for size, scale in zip(x.shape, scales.tolist(), strict=False)]
    if len(sizes) != 4 or sizes[1] != x.shape[1] or any(not size.is_integer() for size in sizes[2:]):
        return None
    return int(sizes[2]), int(sizes[3])


def _nearest_as_torch(attributes: Attributes, x: torch.Tensor, sizes: tuple[int, int]) -> bool:
    """Torch takes the sample at floor(i * in / out)."""
    how = attributes.get("coordinate_transformation_mode", b"half_pixel")
    rounding = attributes.get("nearest_mode", b"round_prefer_floor")
    if how == b"asymmetric":
        return bool(rounding == b"floor")
    # Enlarged a whole number of times, the centre of a new pixel lies within the old one that torch takes.
    whole = all(new % old == 0 for new, old in zip(sizes, x.shape[2:], strict=True))
    return whole and how in (b"half_pixel", b"pytorch_half_pixel") and rounding.startswith(b"round_prefer")


def _upsample(attributes: Attributes, inputs: Inputs) -> Outputs:
    """Deprecated since opset 10."""
    sizes = _resized([inputs[0], inputs[1]]) if len(inputs) > 1 else None
    if sizes is None or inputs[0].dim() != 4 or attributes.get("mode", b"nearest") != b"nearest":
        return None
    return [functional.interpolate(inputs[0], sizes, mode="nearest")]


SPATIAL: dict[str, Callable[[Attributes, Inputs], Outputs]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "Pad": _pad,
    "Resize": _resize,
    "Upsample": _upsample,
}
