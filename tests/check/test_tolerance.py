from __future__ import annotations

import numpy as np
import pytest

from cspdeploy.check.tolerance import noise_floors, tolerance_for
from cspdeploy.core.catalog import ACCURACY_BUDGET, FP16_LIMIT, FP32_FLOOR, FP32_NOISE_FACTOR
from cspdeploy.core.golden import Golden


def _golden(error: float) -> Golden:
    """Two images whose float32 outputs are off by `error` of their size."""
    exact = np.array([[1.0, 2.0], [-4.0, 0.5]])
    return Golden(
        images=np.zeros((2, 4, 4), np.uint8), x_NCHW=np.zeros((2, 3, 4, 4), np.float32), outputs_fp64={"logits": exact},
        outputs_fp32={"logits": (exact * (1 + error)).astype(np.float32)},
    )  # fmt: skip


def test_floor_is_the_distance_of_the_two_eager_outputs() -> None:
    assert noise_floors(_golden(1e-3))["logits"] == pytest.approx(1e-3, rel=1e-3)


def test_floor_of_a_network_without_noise_is_one_unit_in_the_last_place() -> None:
    assert noise_floors(_golden(0.0))["logits"] == FP32_FLOOR == 2.0**-23


def test_fp32_is_judged_by_the_floor() -> None:
    tolerance = tolerance_for("fp32", 3e-7)
    assert tolerance.rel_l2 == FP32_NOISE_FACTOR * 3e-7
    assert "3.0e-07" in tolerance.why


def test_fp16_has_its_own_limit() -> None:
    assert tolerance_for("fp16", 3e-7).rel_l2 == FP16_LIMIT
    assert tolerance_for("fp16", 3e-7).why


@pytest.mark.parametrize("floor", [1e-3, 0.1, 1.0, 100.0])
def test_noisy_reference_does_not_make_the_check_vacuous(floor: float) -> None:
    """Whatever the golden file claims of its own noise: an FP32 file is never judged more loosely than an FP16 one."""
    assert tolerance_for("fp32", floor).rel_l2 <= tolerance_for("fp16", floor).rel_l2


@pytest.mark.parametrize("precision", ["int8", "fp8", ""])
def test_precision_without_a_limit_is_an_error(precision: str) -> None:
    with pytest.raises((KeyError, ValueError)):
        tolerance_for(precision, 1e-7)


def test_every_precision_has_a_limit_and_a_reason() -> None:
    for precision in ACCURACY_BUDGET:
        tolerance = tolerance_for(precision, FP32_FLOOR)
        assert 0 < tolerance.rel_l2 <= FP16_LIMIT
        assert tolerance.why
