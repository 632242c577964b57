from __future__ import annotations

import math

import numpy as np
import pytest

from cspdeploy.core.catalog import (
    ACCURACY_BUDGET,
    FP16_LIMIT,
    FP16_NOISE_FACTOR,
    FP16_NOISE_RATIO,
    FP32_FLOOR,
    FP32_NOISE_FACTOR,
    INT8_LIMIT,
)
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import Golden
from cspdeploy.core.tolerance import (
    allowed_flips,
    limits_for,
    noise_floors,
    override,
    parse_tolerances,
    require_known,
    tolerance_for,
)


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
    limit = tolerance_for("fp32", 3e-7, output="logits")
    assert limit.rel_l2 == FP32_NOISE_FACTOR * 3e-7
    assert limit.output == "logits"
    assert "3.0e-07" in limit.why
    assert limit.terms["noise_floor"] * limit.terms["factor"] == limit.rel_l2


def test_fp16_is_judged_by_the_floor_that_it_would_have() -> None:
    limit = tolerance_for("fp16", 2e-7)
    assert limit.rel_l2 == FP16_NOISE_FACTOR * FP16_NOISE_RATIO * 2e-7 < FP16_LIMIT
    assert limit.terms["expected"] == 2.0**13 * 2e-7
    assert limit.terms["factor"] * limit.terms["expected"] == limit.rel_l2
    assert "8192" in limit.why


def test_fp16_is_bounded_both_ways() -> None:
    assert tolerance_for("fp16", 1e-30).rel_l2 == tolerance_for("fp16", FP32_FLOOR).rel_l2 == 2.0**-8
    assert tolerance_for("fp16", 4e-7).rel_l2 == FP16_LIMIT
    assert "at most 0.01" in tolerance_for("fp16", 4e-7).why


def test_int8_grows_with_the_root_of_its_tensors() -> None:
    one, four, many = (tolerance_for("int8", FP32_FLOOR, num_quantised=count) for count in (1, 4, 100_000))
    assert four.rel_l2 == pytest.approx(2 * one.rel_l2)
    assert one.rel_l2 == pytest.approx(8 / (255 * math.sqrt(12)))
    assert many.rel_l2 == INT8_LIMIT
    assert "4 tensors in 8 bits" in four.why


@pytest.mark.parametrize("floor", [1e-3, 0.1, 1.0, 100.0])
def test_noisy_reference_does_not_make_the_check_vacuous(floor: float) -> None:
    """Whatever the golden file claims of its own noise: each precision is judged no more loosely than the next one."""
    fp32, fp16, int8 = (tolerance_for(name, floor, num_quantised=1).rel_l2 for name in ("fp32", "fp16", "int8"))
    assert fp32 <= fp16 <= int8 <= INT8_LIMIT


@pytest.mark.parametrize("precision", ["int4", "fp8", ""])
def test_precision_without_a_model_is_an_error(precision: str) -> None:
    with pytest.raises(ValueError, match="no tolerance"):
        tolerance_for(precision, 1e-7)


def test_every_precision_has_a_limit_and_a_reason() -> None:
    for precision in ACCURACY_BUDGET:
        limit = tolerance_for(precision, FP32_FLOOR)
        assert 0 < limit.rel_l2 <= INT8_LIMIT
        assert limit.why
        assert not limit.overridden


def test_each_output_has_its_own_limit() -> None:
    limits = limits_for("fp32", {"a": 1e-6, "b": 2e-6})
    assert [(limit.output, limit.rel_l2) for limit in limits.values()] == [("a", 16e-6), ("b", 32e-6)]


def test_override_keeps_what_the_model_says() -> None:
    limit = override(tolerance_for("fp16", 2e-7, output="logits"), 0.5)
    assert (limit.rel_l2, limit.overridden, limit.output) == (0.5, True, "logits")
    assert limit.terms["model"] == tolerance_for("fp16", 2e-7).rel_l2
    assert "--tolerance" in limit.why
    assert limits_for("fp16", {"logits": 2e-7}, tolerance=0.5) == {"logits": limit}


def test_int8_alone_is_asked_for_a_share_of_decisions() -> None:
    assert allowed_flips("fp32", 64) is allowed_flips("fp16", 64) is None
    assert [allowed_flips("int8", count) for count in (2, 8, 20, 40, 64, 100)] == [1, 1, 1, 2, 3, 5]


# --- --tolerance ---


def test_tolerances_with_and_without_a_name() -> None:
    assert parse_tolerances(["0.02", "onnx-fp16=1e-3", "a=b.onnx=0.5"]) == {
        "": 0.02,
        "onnx-fp16": 1e-3,
        "a=b.onnx": 0.5,
    }


@pytest.mark.parametrize("text", ["", "onnx=", "onnx", "onnx=x", "0", "-1", "nan", "inf", "onnx=1e-3x"])
def test_tolerance_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match="above 0"):
        parse_tolerances([text])


def test_tolerance_given_twice() -> None:
    with pytest.raises(InputError, match="twice"):
        parse_tolerances(["onnx=1", "onnx=2"])


def test_tolerance_for_an_artifact_that_is_not_there_asks_for_the_nearest() -> None:
    require_known({"": 1.0, "onnx": 1.0}, ["onnx", "onnx-fp16"])
    with pytest.raises(InputError, match="no such artifact") as caught:
        require_known({"onnx-fp61": 1.0}, ["onnx", "onnx-fp16"])
    assert "did you mean 'onnx-fp16'?" in caught.value.fix
