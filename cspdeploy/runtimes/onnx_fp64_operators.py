"""ONNX operators that the onnx package's own implementation is too slow for, in the type that they are given.

Each takes the node and its inputs, an absent one as None, and gives its outputs; or None where it does not cover what
the node asks for, which then goes to that implementation. Semantics: https://onnx.ai/onnx/operators
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx
    import torch

__all__ = ["OPERATORS"]

Array = npt.NDArray[Any]
Inputs = Sequence[Array | None]
Computed = list[Array] | None

_RESIZE_OPSET = 19
"""What Resize means has not changed since opset 11; 13 to 19 only added to it."""


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _tensor(values: Array) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values) if values.flags.writeable else values.copy())


def _pads(attributes: dict[str, Any], x: Array, kernel: Sequence[int], strides: Sequence[int]) -> list[int] | None:
    """Begin and end of each spatial axis, as torch's `pad` takes them: last axis first."""
    rank = x.ndim - 2
    mode = attributes.get("auto_pad", b"NOTSET").decode()
    dilations = attributes.get("dilations", [1] * rank)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        begins, ends = [], []
        for size, k, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
            total = max(0, (-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size)
            small, large = total // 2, total - total // 2
            begins.append(small if mode == "SAME_UPPER" else large)
            ends.append(large if mode == "SAME_UPPER" else small)
    else:
        pads = attributes.get("pads", [0] * 2 * rank) if mode == "NOTSET" else [0] * 2 * rank
        begins, ends = list(pads[:rank]), list(pads[rank:])
    if min((*begins, *ends), default=0) < 0:
        return None
    return [side for axis in reversed(range(rank)) for side in (begins[axis], ends[axis])]


def _conv(node: onnx.NodeProto, inputs: Inputs) -> Computed:
    import torch

    attributes = _attributes(node)
    x, weight, bias = (*inputs, None, None)[:3]
    if x is None or weight is None or not 3 <= x.ndim <= 5:
        return None
    rank = x.ndim - 2
    strides = attributes.get("strides", [1] * rank)
    pads = _pads(attributes, x, weight.shape[2:], strides)
    if pads is None:
        return None
    compute = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[rank - 1]
    even = pads[::2] == pads[1::2]  # a convolution pads both ends alike by itself, without a copy
    padded = _tensor(x) if even else torch.nn.functional.pad(_tensor(x), pads)
    with torch.inference_mode():
        return [
            compute(
                padded, _tensor(weight), None if bias is None else _tensor(bias), stride=tuple(strides),
                padding=tuple(reversed(pads[::2])) if even else 0,
                dilation=tuple(attributes.get("dilations", [1] * rank)), groups=attributes.get("group", 1),
            ).numpy()
        ]  # fmt: skip


def _conv_transpose(node: onnx.NodeProto, inputs: Inputs) -> Computed:
    import torch

    attributes = _attributes(node)
    x, weight, bias = (*inputs, None, None)[:3]
    if x is None or weight is None or x.ndim != 4 or "output_shape" in attributes or "auto_pad" in attributes:
        return None
    top, left, bottom, right = attributes.get("pads", [0] * 4)
    if (top, left) != (bottom, right):
        return None
    found = torch.nn.functional.conv_transpose2d(
        _tensor(x), _tensor(weight), None if bias is None else _tensor(bias), groups=attributes.get("group", 1),
        stride=tuple(attributes.get("strides", [1, 1])), padding=(top, left),
        dilation=tuple(attributes.get("dilations", [1, 1])),
        output_padding=tuple(attributes.get("output_padding", [0, 0])),
    )  # fmt: skip
    return [found.numpy()]


def _max_pool(node: onnx.NodeProto, inputs: Inputs) -> Computed:
    import torch

    attributes = _attributes(node)
    x = inputs[0]
    if x is None or x.ndim != 4 or x.dtype.kind != "f" or len(node.output) > 1 or attributes.get("ceil_mode", 0):
        return None
    strides = attributes.get("strides", [1, 1])
    pads = _pads(attributes, x, attributes["kernel_shape"], strides)
    if pads is None:
        return None
    padded = torch.nn.functional.pad(_tensor(x), pads, value=-np.inf)
    dilation = tuple(attributes.get("dilations", [1, 1]))
    pooled = torch.nn.functional.max_pool2d(padded, tuple(attributes["kernel_shape"]), tuple(strides), 0, dilation)
    return [pooled.numpy()]


def _average_pool(node: onnx.NodeProto, inputs: Inputs) -> Computed:
    import torch

    attributes = _attributes(node)
    x = inputs[0]
    if x is None or x.ndim != 4 or attributes.get("ceil_mode", 0) or max(attributes.get("dilations", [1])) > 1:
        return None
    kernel, strides = tuple(attributes["kernel_shape"]), tuple(attributes.get("strides", [1, 1]))
    pads = _pads(attributes, x, kernel, strides)
    if pads is None:
        return None
    sums = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(_tensor(x), pads), kernel, strides)
    if not attributes.get("count_include_pad", 0) and any(pads):
        ones = torch.nn.functional.pad(torch.ones(1, 1, *x.shape[2:], dtype=sums.dtype), pads)
        sums = sums / torch.nn.functional.avg_pool2d(ones, kernel, strides)
    return [sums.numpy()]


def _mat_mul(node: onnx.NodeProto, inputs: Inputs) -> Computed:
    a, b = inputs
    return None if a is None or b is None or a.dtype.kind != "f" else [np.asarray(np.matmul(a, b))]


def _cast(node: onnx.NodeProto, inputs: Inputs) -> Computed:
    """Between floating-point types nothing happens; the graph's own are one type by now."""
    x = inputs[0]
    if x is None or x.dtype.kind != "f":
        return None
    from onnx import TensorProto

    kept = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    return [x] if _attributes(node)["to"] in kept else None


def _along(values: Array, axis: int, rank: int) -> Array:
    """One value a channel, in the shape that broadcasts against a tensor of that rank."""
    return values.reshape([-1 if axis % rank == at else 1 for at in range(rank)]) if values.ndim == 1 else values


def _quantize(node: onnx.NodeProto, inputs: Inputs) -> Computed:
    """round(x / scale) + zero point, halves to even, saturated."""
    x, scale, zero = (*inputs, None)[:3]
    attributes = _attributes(node)
    if x is None or scale is None or zero is None or zero.dtype not in (np.int8, np.uint8, np.int16, np.uint16):
        return None
    if attributes.get("block_size", 0) or (scale.ndim > 1 and scale.size > 1):
        return None
    axis = attributes.get("axis", 1)
    scaled = np.rint(x / _along(scale, axis, x.ndim)) + _along(zero.astype(x.dtype), axis, x.ndim)
    limits = np.iinfo(zero.dtype)
    return [np.clip(scaled, limits.min, limits.max).astype(zero.dtype)]


def _dequantize(node: onnx.NodeProto, inputs: Inputs) -> Computed:
    """(x - zero point) * scale, in the type of the scale."""
    x, scale, zero = (*inputs, None)[:3]
    attributes = _attributes(node)
    if x is None or scale is None or x.dtype.kind not in "iu" or attributes.get("block_size", 0) or scale.ndim > 1:
        return None
    axis = attributes.get("axis", 1)
    shifted = x.astype(scale.dtype)
    if zero is not None:
        shifted = shifted - _along(zero.astype(scale.dtype), axis, x.ndim)
    return [shifted * _along(scale, axis, x.ndim)]


def _resize(node: onnx.NodeProto, inputs: Inputs) -> Computed:
    """One matrix an axis: what the reference implementation makes of the unit vectors along it.

    All of nearest, linear and cubic interpolation are products of such matrices, and linear in the values.
    """
    attributes = _attributes(node)
    x, _, scales, sizes = (*inputs, None, None, None)[:4]
    mode = attributes.get("coordinate_transformation_mode", b"half_pixel")
    policy = attributes.get("keep_aspect_ratio_policy", b"stretch")
    if (
        x is None
        or mode == b"tf_crop_and_resize"
        or node.op_type != "Resize"
        or policy != b"stretch"
        or "axes" in attributes
    ):
        return None
    found = x
    for axis in range(x.ndim):
        if sizes is not None and sizes.size:
            scale, size = None, int(sizes[axis])
            changed = size != x.shape[axis]
        elif scales is not None and scales.size == x.ndim:
            scale, size = float(scales[axis]), None
            changed = scale != 1
        else:
            return None
        if changed:
            weights = _resize_matrix(_key(node), x.shape[axis], scale=scale, size=size).astype(x.dtype)
            found = np.moveaxis(np.tensordot(found, weights, axes=(axis, 0)), -1, axis)
    return [np.ascontiguousarray(found)]


def _key(node: onnx.NodeProto) -> bytes:
    """The node without its names: those that resize alike share their matrices."""
    from onnx import NodeProto

    named = ["x", "", "scales"] if len(node.input) < 4 else ["x", "", "", "sizes"]
    bare = NodeProto(op_type="Resize", input=named, output=["y"], attribute=node.attribute)
    return bytes(bare.SerializeToString(deterministic=True))


@functools.lru_cache(maxsize=64)
def _resize_matrix(key: bytes, length: int, *, scale: float | None, size: int | None) -> Array:
    """`[length, new length]`: row i is the unit vector i, resized by the reference implementation."""
    from onnx import NodeProto, helper
    from onnx.reference import ReferenceEvaluator

    node = NodeProto.FromString(key)
    inputs = [helper.make_empty_tensor_value_info(name) for name in node.input if name]
    graph = helper.make_graph([node], "resize", inputs, [helper.make_empty_tensor_value_info("y")])
    feeds: dict[str, Array] = {"x": np.eye(length)}
    if size is None:
        feeds["scales"] = np.array([1.0, scale], np.float32)
    else:
        feeds["sizes"] = np.array([length, size], np.int64)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _RESIZE_OPSET)])
    outputs: Any = ReferenceEvaluator(model).run(None, feeds)
    return np.asarray(outputs[0])


OPERATORS: dict[str, Callable[[onnx.NodeProto, Inputs], Computed]] = {
    "AveragePool": _average_pool,
    "Cast": _cast,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DequantizeLinear": _dequantize,
    "MatMul": _mat_mul,
    "MaxPool": _max_pool,
    "QuantizeLinear": _quantize,
    "Resize": _resize,
}
