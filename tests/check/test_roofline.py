from __future__ import annotations

import numpy as np
import onnx
import pytest

from cspdeploy.check import roofline
from cspdeploy.check.roofline import Peak, binary_model, find_roofline, measure_peak
from cspdeploy.runtimes.ort import CPU, OrtSession

PEAK = Peak(runtime="ort-cpu", num_threads=2, gflops=100.0, gbytes_per_s=10.0)
NAMES = {"subject": "s", "artifact": "onnx", "runtime": "ort-cpu"}


def test_bound_by_arithmetic() -> None:
    found = find_roofline(PEAK, **NAMES, num_macs=500_000_000, num_bytes=20_000_000, p50_ms=20.0)
    assert found.gflop == 1.0
    assert found.gflops == pytest.approx(50.0)
    assert found.peak_share == pytest.approx(0.5)
    assert (found.arithmetic_ms, found.weights_ms) == (pytest.approx(10.0), pytest.approx(2.0))
    assert (found.bound, found.roof_share) == ("arithmetic", pytest.approx(0.5))


def test_bound_by_memory() -> None:
    found = find_roofline(PEAK, **NAMES, num_macs=50_000_000, num_bytes=100_000_000, p50_ms=20.0)
    assert (found.bound, found.roof_share) == ("memory", pytest.approx(0.5))
    assert found.peak_share == pytest.approx(0.05)


@pytest.mark.parametrize("shape", [(3, 3), (200, 200)])
def test_model_is_one_that_onnx_accepts_and_an_engine_computes(shape: tuple[int, int]) -> None:
    data = binary_model("MatMul", shape)
    onnx.checker.check_model(onnx.load_model_from_string(data), full_check=True)
    a, b = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    assert np.allclose(OrtSession(data, provider=CPU).run({"a": a, "b": b})["y"], a @ b, rtol=1e-4, atol=1e-4)


def test_peak_of_this_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "PRODUCT_SIDE", {"cpu": 256})
    monkeypatch.setattr(roofline, "STREAM_VALUES", 1 << 20)
    measure_peak.cache_clear()
    try:
        peak = measure_peak("cpu", num_threads=1, time_limit_s=60.0)
        assert peak is not None
        assert peak.gflops > 0
        assert peak.gbytes_per_s > 0
        assert measure_peak("cpu", num_threads=1, time_limit_s=60.0) is peak
    finally:
        measure_peak.cache_clear()


def test_no_engine_no_peak() -> None:
    assert measure_peak("abacus", num_threads=0, time_limit_s=1.0) is None


def test_engine_that_fails_gives_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "PRODUCT_SIDE", {"cpu": 16})
    monkeypatch.setattr(roofline, "binary_model", lambda operator, shape, half: b"not an ONNX file at all")
    measure_peak.cache_clear()
    assert measure_peak("cpu", num_threads=0, time_limit_s=60.0) is None
    measure_peak.cache_clear()


def test_model_in_fp16_is_one_that_onnx_accepts_and_an_engine_computes() -> None:
    data = binary_model("MatMul", (32, 32), half=True)
    onnx.checker.check_model(onnx.load_model_from_string(data), full_check=True)
    a, b = np.random.default_rng(0).standard_normal((2, 32, 32), np.float32).astype(np.float16)
    found = OrtSession(data, provider=CPU).run({"a": a, "b": b})["y"]
    assert found.dtype == np.float16
    assert np.allclose(found.astype(np.float32), a.astype(np.float32) @ b.astype(np.float32), rtol=1e-2, atol=1e-2)


def test_peak_in_fp16_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "PRODUCT_SIDE", {"cpu": 32})
    monkeypatch.setattr(roofline, "STREAM_VALUES", 1 << 20)
    measure_peak.cache_clear()
    try:
        peak = measure_peak("cpu", num_threads=1, time_limit_s=60.0, half=True)
        assert peak is not None
        assert (peak.precision, peak.tf32) == ("fp16", False)
        assert peak.gflops > 0
        found = find_roofline(peak, **NAMES, variant="fp16", num_macs=1, num_bytes=1, p50_ms=1.0)
        assert (found.precision, found.variant) == ("fp16", "fp16")
    finally:
        measure_peak.cache_clear()
