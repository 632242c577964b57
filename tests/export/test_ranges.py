from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from cspdeploy.export.ranges import TensorRange, measure_ranges

Array = npt.NDArray[np.float32]
Make = Callable[..., Path]
X_NCHW = np.random.default_rng(0).normal(-0.5, 1.0, (6, 3, 4, 4)).astype(np.float32)
TEXT = "(float[N, 3, 4, 4] input) => (float[N, 3, 1, 1] y) { h = Mul(input, w)  r = Relu(h)  y = GlobalAveragePool(r) }"


def _expected(values: npt.NDArray[np.float64], num_elements: int) -> TensorRange:
    return TensorRange(
        absmax=pytest.approx(np.abs(values).max(), rel=1e-6, abs=0),
        rms=pytest.approx(np.sqrt(np.mean(values**2)), rel=1e-5),
        num_elements=num_elements,
    )


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_ranges_are_those_of_numpy(make_onnx: Make, batch: int) -> None:
    model = onnx.load(make_onnx(TEXT, w=np.float32([3.0])))
    found = measure_ranges(model, ["h", "r", "y"], X_NCHW, batch=batch)
    h = 3.0 * X_NCHW.astype(np.float64)
    r = np.maximum(h, 0)
    assert -h.min() > h.max()  # so that a largest magnitude below zero is among the cases
    assert found == {"h": _expected(h, 48), "r": _expected(r, 48), "y": _expected(r.mean(axis=(2, 3)), 3)}


def test_the_model_is_not_changed(make_onnx: Make) -> None:
    model = onnx.load(make_onnx(TEXT, w=np.float32([3.0])))
    before = model.SerializeToString(deterministic=True)
    measure_ranges(model, ["h"], X_NCHW, batch=1)
    assert model.SerializeToString(deterministic=True) == before


def test_zeros(make_onnx: Make) -> None:
    model = onnx.load(make_onnx(TEXT, w=np.float32([0.0])))
    assert measure_ranges(model, ["h"], X_NCHW, batch=1)["h"] == TensorRange(absmax=0.0, rms=0.0, num_elements=48)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_neither_vanish_nor_overflow(make_onnx: Make, scale: float) -> None:
    """Float32 holds 1e-30 and 1e30, but not their squares; a root mean square of 0 would hide an underflow."""
    model = onnx.load(make_onnx(TEXT, w=np.float32([scale])))
    found = measure_ranges(model, ["h"], X_NCHW, batch=1)["h"]
    expected = scale * np.sqrt(np.mean(X_NCHW.astype(np.float64) ** 2))
    assert found.rms == pytest.approx(expected, rel=1e-5, abs=0)


def test_infinity_is_the_largest_magnitude(make_onnx: Make) -> None:
    text = "(float[N, 3, 4, 4] input) => (float[N, 3, 4, 4] y) { h = Exp(input)  y = Sigmoid(h) }"
    model = onnx.load(make_onnx(text))
    found = measure_ranges(model, ["h", "y"], 1000 * X_NCHW, batch=1)
    assert found["h"].absmax == float("inf")
    assert found["y"].absmax == 1.0


def test_nan_is_not_passed_over(make_onnx: Make) -> None:
    """A tensor that is NaN somewhere has no range, and must not look like one that fits."""
    text = "(float[N, 3, 4, 4] input) => (float[N, 3, 4, 4] y) { h = Sqrt(input)  y = Relu(h) }"
    found = measure_ranges(onnx.load(make_onnx(text)), ["h"], X_NCHW, batch=1)
    assert not np.isfinite(found["h"].absmax)
