"""Factors on a network's inner channels: what an equalised file says of itself, and what they make of its weights.

A file whose inner tensors are multiplied channel by channel computes the same outputs as the one that it was made from,
and cannot be compared with it inside unless it says by what.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import InputError

__all__ = ["FACTORS_KEY", "fold_factors", "input_channels", "output_axis", "pack_factors", "unpack_factors"]

Factors = npt.NDArray[np.floating[Any]]
Doubles = npt.NDArray[np.float64]

FACTORS_KEY = "cspdeploy.channel_factors"
"""Of the metadata of an ONNX file."""
_STORED = np.dtype("<f2")
"""Rounding to FP16 is off by 2^-11 at most, 66 dB down: below anything that a file of 8 bits is judged by."""


class Weighted(Protocol):
    """A convolution or matrix product of whatever graph."""

    @property
    def operator(self) -> str:
        """As ONNX calls it."""
        ...

    @property
    def attributes(self) -> Mapping[str, Any]:
        """`group` and `transB` are looked at."""
        ...


def pack_factors(factors: Mapping[str, Factors]) -> str:
    """By tensor, what each channel is multiplied by, `[C]`; tensors that share their factors share the text.

    Returns:
        Empty where every factor is 1. The same factors give the same text.
    """
    rows: dict[str, int] = {}
    tensors: dict[str, int] = {}
    for name in sorted(factors):
        if (factors[name] != 1).any():
            text = base64.b64encode(factors[name].astype(_STORED).tobytes()).decode("ascii")
            tensors[name] = rows.setdefault(text, len(rows))
    return json.dumps({"tensors": tensors, "rows": list(rows)}, separators=(",", ":")) if tensors else ""


def unpack_factors(text: str) -> dict[str, Doubles]:
    """What `pack_factors` stored, up to its rounding; tensors whose factors are all 1 are left out.

    Raises:
        InputError: not such a text, or factors that are not positive and finite.
    """
    if not text:
        return {}
    try:
        stored = json.loads(text)
        rows = [np.frombuffer(base64.b64decode(row, validate=True), _STORED) for row in stored["rows"]]
        found = {str(name): rows[int(row)].astype(np.float64) for name, row in stored["tensors"].items()}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, binascii.Error) as error:
        raise InputError(f"{FACTORS_KEY}: cannot be read ({error})", fix="export the file again") from error
    for name, factors in found.items():
        if not (factors.size and np.isfinite(factors).all() and (factors > 0).all()):
            raise InputError(
                f"{FACTORS_KEY}: those of {name} are not all positive and finite", fix="export the file again"
            )
    return found


def output_axis(node: Weighted) -> int:
    """Axis of the output channels in the node's weight."""
    if node.operator == "ConvTranspose":
        return 1
    return 0 if node.operator == "Conv" or node.attributes.get("transB", 0) else 1


def input_channels(node: Weighted, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Which input channel each weight multiplies: indices that broadcast against the weight of that shape."""
    if node.operator in ("Gemm", "MatMul"):
        along = np.arange(shape[1 - output_axis(node)])
        return along[None, :] if output_axis(node) == 0 else along[:, None]
    rest, groups = (1,) * (len(shape) - 2), int(node.attributes.get("group", 1))
    if node.operator == "ConvTranspose":
        return np.arange(shape[0]).reshape(-1, 1, *rest)
    first = np.arange(groups).repeat(shape[0] // groups) * shape[1]
    indices: npt.NDArray[np.int64] = (first[:, None] + np.arange(shape[1])[None, :]).reshape(shape[0], shape[1], *rest)
    return indices


def fold_factors(node: Weighted, weight: npt.NDArray[Any], *, taken: Factors, made: Factors) -> Doubles:
    """The weight of a node whose input channels are multiplied by `taken`, and its output's shall be by `made`.

    Args:
        weight: of a Conv, ConvTranspose, Gemm or MatMul, as ONNX has it.
        taken, made: `[C]` of the input and of the output.
    """
    divided = weight.astype(np.float64) / taken[input_channels(node, weight.shape)]
    along = [1] * weight.ndim
    along[output_axis(node)] = -1
    groups = int(node.attributes.get("group", 1))
    per_output = made.reshape(along)
    if node.operator == "ConvTranspose" and groups > 1:
        # weight [C_in, C_out / groups, ...]: each group has output channels of its own
        rows = made.reshape(groups, -1).repeat(weight.shape[0] // groups, axis=0)
        per_output = rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))
    folded: Doubles = divided * per_output
    return folded
