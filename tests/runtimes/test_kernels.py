from __future__ import annotations

import pytest
import torch

from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.runtimes.kernels import busy_us, merge_kernels, profile_kernels

CONV = "void cudnn::ops::nchwToNhwcKernel<float, float, float, false, true>(cudnn::ops::nchw2nhwc_params_t<float>)"
EVENTS = [
    (CONV, 10.0), ("sm90_xmma_fprop_implicit_gemm_f16f16_tilesize128x64x64", 100.0), (CONV, 30.0),
    ("Memcpy DtoD (Device -> Device)", 4.0), (CONV, 20.0), (CONV, 20.0),
]  # fmt: skip


def test_kernels_of_one_run() -> None:
    nodes = merge_kernels(EVENTS, num_runs=2)
    assert [node.operator for node in nodes] == [
        "sm90_xmma_fprop_implicit_gemm_f16f16_tilesize128x64x64", "cudnn::ops::nchwToNhwcKernel", "Memcpy DtoD"
    ]  # fmt: skip
    assert [node.num_calls for node in nodes] == [0.5, 2.0, 0.5]
    assert [node.ms for node in nodes] == pytest.approx([0.05, 0.04, 0.002])
    assert {node.provider for node in nodes} == {"cuda"}
    assert nodes[1].node == CONV


@pytest.mark.parametrize(
    ("intervals", "busy"),
    [
        ([], 0.0),
        ([(0.0, 10.0), (12.0, 15.0)], 13.0),  # the gap is not busy
        ([(5.0, 15.0), (0.0, 10.0)], 15.0),  # two streams, in the order of their names
        ([(0.0, 20.0), (3.0, 5.0), (19.0, 21.0)], 21.0),  # one inside another
    ],
)
def test_time_that_is_covered_twice_counts_once(intervals: list[tuple[float, float]], busy: float) -> None:
    assert busy_us(intervals) == pytest.approx(busy)


def test_no_runs() -> None:
    with pytest.raises(InputError, match="expected 1 or more"):
        profile_kernels(lambda: None, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(RuntimeUnavailableError, match="finds no GPU"):
        profile_kernels(lambda: None, 1)
