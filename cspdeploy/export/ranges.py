"""The values that every tensor of a graph takes on real images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from cspdeploy.runtimes.ort import CPU, OrtSession

__all__ = ["TensorRange", "measure_ranges"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRange:
    """Of one tensor, over all images.

    Attributes:
        absmax: largest magnitude.
        rms: root of the mean square.
        num_elements: of the tensor, for one image.
    """

    absmax: float
    rms: float
    num_elements: int


def measure_ranges(
    model: onnx.ModelProto, names: list[str], x_NCHW: npt.NDArray[np.float32], *, batch: int
) -> dict[str, TensorRange]:
    """Run `model` with every tensor of `names` as an output, `batch` images at a time.

    Memory: the intermediates of one batch, not of all images.

    Args:
        model: a float32 graph with one input.
        names: float32 tensors of the graph.
        x_NCHW: real images; their number must be a multiple of `batch`.
        batch: images a call that the graph takes.
    """
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    present = {value.name for value in observed.graph.output}
    observed.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name not in present
    )
    session = OrtSession(observed.SerializeToString(), provider=CPU)
    absmax = dict.fromkeys(names, 0.0)
    square_sum = dict.fromkeys(names, 0.0)
    count = dict.fromkeys(names, 0)
    for start in range(0, len(x_NCHW) - batch + 1, batch):
        outputs = session.run({next(iter(session.inputs)): x_NCHW[start : start + batch]})
        for name in names:
            flat = outputs[name].ravel().astype(np.float32, copy=False)
            largest = max(float(flat.max()), -float(flat.min())) if flat.size else 0.0
            largest = largest if np.isfinite(largest) else float("inf")
            absmax[name] = max(absmax[name], largest)
            square_sum[name] += _square_sum(flat, largest)
            count[name] += flat.size
    num_runs = len(x_NCHW) // batch
    return {
        name: TensorRange(
            absmax=absmax[name],
            rms=float(np.sqrt(square_sum[name] / count[name])) if count[name] else 0.0,
            num_elements=count[name] // max(1, num_runs * batch),
        )
        for name in names
    }


def _square_sum(flat: npt.NDArray[np.float32], largest: float) -> float:
    """Sum of squares; scaled by the largest value, for squares of float32 numbers overflow and vanish."""
    if largest == 0 or not np.isfinite(largest):
        return largest
    scaled = flat / np.float32(largest)
    return float(np.dot(scaled, scaled)) * largest**2
