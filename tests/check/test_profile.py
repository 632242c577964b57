from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from cspdeploy.check.profile import Profile, add_kernels, measure_profile, summarise_profile
from cspdeploy.runtimes.base import ProfiledNode, SessionRequest

BIG_AND_SMALL = """
<ir_version: 8, opset_import: ["" : 17]>
two (float[300, 300] x) => (float[300, 300] y) {
    product = MatMul(x, x)
    product2 = MatMul(product, x)
    y = Neg(product2)
}"""


def _node(name: str, operator: str, ms: float, **fields: float) -> ProfiledNode:
    values: dict[str, float] = {"num_calls": 1.0, "moved_bytes": 0, **fields}
    return ProfiledNode(node=name, operator=operator, provider="CPU", ms=ms, **values)  # type: ignore[arg-type]


def test_operators_add_up_and_the_longest_come_first() -> None:
    nodes = [
        _node("/stages/stages.0/conv/Conv", "Conv", 1.0, moved_bytes=2_000_000),
        _node("/head/Gemm", "Gemm", 0.5, num_calls=2.0),
        _node("InsertedPrecisionFreeCast_/stages/stages.1/conv/Conv_output_0_nchwc", "Conv", 2.5),
    ]
    found = summarise_profile(nodes, subject="s", artifact="onnx", runtime="ort-cpu", run_ms=5.0)
    assert (found.nodes_ms, found.run_ms) == (4.0, 5.0)
    assert [(row.operator, row.num_calls, row.ms, row.share) for row in found.operators] == [
        ("Conv", 2.0, 3.5, 0.875), ("Gemm", 2.0, 0.5, 0.125)
    ]  # fmt: skip
    assert [(node.module, node.ms, node.gbytes_per_s) for node in found.nodes] == [
        ("stages.1.conv", 2.5, None), ("stages.0.conv", 1.0, 2.0), ("head", 0.5, None)
    ]  # fmt: skip
    assert sum(row.share for row in found.operators) == pytest.approx(1)
    assert not found.note


def test_profile_on_cuda_says_what_its_times_are() -> None:
    found = summarise_profile([_node("a", "Conv", 1.0)], subject="s", artifact="onnx", runtime="ort-cuda", run_ms=1.0,
                              device="cuda")  # fmt: skip
    assert "starting its work" in found.note


def test_engine_that_knows_operators_alone_gives_no_nodes() -> None:
    found = summarise_profile(
        [_node("aten::add", "aten::add", 1.0)], subject="s", artifact="t", runtime="r", run_ms=1.0
    )
    assert found.nodes == ()
    assert len(found.operators) == 1


def test_profile_of_a_real_session_finds_where_the_work_is(tmp_path: Path) -> None:
    path = tmp_path / "two.onnx"
    path.write_bytes(onnx.parser.parse_model(BIG_AND_SMALL).SerializeToString())
    nodes, samples_ms = measure_profile(
        "ort-cpu", SessionRequest(path=path), {"x": np.ones((300, 300), np.float32)}, time_limit_s=60.0
    )
    found = summarise_profile(nodes, subject="s", artifact="a", runtime="r", run_ms=float(np.median(samples_ms)))
    assert {row.operator: row.num_calls for row in found.operators} == {"MatMul": 2, "Neg": 1}
    assert found.operators[0].operator == "MatMul"
    assert found.operators[0].share > 0.5  # 300 multiply-accumulates for each negation
    assert [path.name for path in tmp_path.iterdir()] == ["two.onnx"]


def _plain(run_ms: float = 9.0) -> Profile:
    return summarise_profile([], subject="s", artifact="onnx", runtime="ort-cuda", run_ms=run_ms, device="cuda",
                             variant="nhwc")  # fmt: skip


def test_kernels_of_one_name_are_one_and_the_longest_come_first() -> None:
    kernels = [_node("wgrad", "k", 0.25), _node("implicit_gemm", "k", 1.0, num_calls=10.0), _node("wgrad", "k", 0.5)]
    found = add_kernels(_plain(), kernels, busy_ms=1.75, run_ms=2.0)
    assert [(one.kernel, one.num_calls, one.ms) for one in found.kernels] == [
        ("implicit_gemm", 10.0, 1.0), ("wgrad", 2.0, 0.75)
    ]  # fmt: skip
    assert sum(one.share for one in found.kernels) == pytest.approx(1)
    assert (found.busy_ms, found.run_ms, found.busy_share) == (1.75, 2.0, 0.875)
    assert (found.variant, found.note) == ("nhwc", "")  # no nodes, no note on them


@pytest.mark.parametrize(("busy_ms", "bound"), [(0.2, "launch-bound"), (0.99, "launch-bound"), (1.0, "kernel-bound")])
def test_less_than_half_busy_is_launch_bound(busy_ms: float, bound: str) -> None:
    assert add_kernels(_plain(), [_node("k", "k", busy_ms)], busy_ms=busy_ms, run_ms=2.0).bound == bound


def test_gpu_is_never_busy_for_longer_than_the_run() -> None:
    """Kernels and wall time are of different runs."""
    assert add_kernels(_plain(), [_node("k", "k", 3.0)], busy_ms=3.0, run_ms=2.0).busy_share == 1.0


def test_profile_without_kernels_says_nothing_of_the_gpu() -> None:
    assert (_plain().bound, _plain().busy_ms, _plain().kernels) == ("", None, ())


def test_torch_on_cuda_reads_the_clock_of_the_device() -> None:
    found = summarise_profile([_node("a", "aten::conv", 1.0)], subject="s", artifact="eager", runtime="torch-cuda",
                              run_ms=1.0, device="cuda")  # fmt: skip
    assert not found.note
