"""Where nodes run, from records as engines give them, and through the whole of `verify`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import cspdeploy.check.rungs
import cspdeploy.check.subject_check
from cspdeploy.check.latency import LatencySettings
from cspdeploy.check.placement import find_placement, strict_problem
from cspdeploy.check.placement_reasons import shape_nodes, why_elsewhere
from cspdeploy.core.onnx_graph import read_onnx
from cspdeploy.core.types import PlacedNode
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Feeds, Outputs, Runtime, SessionRequest

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
SHORT = LatencySettings(
    min_runs=5, min_seconds=0.0, min_rounds=1, warmup_runs=1, warmup_seconds=0.0, max_warmup_seconds=0.0,
    lead_in_seconds=0.0, burst=1,
)  # fmt: skip
CONV = PlacedNode(provider=CUDA, node="/stem/Conv", operator="Conv")
NMS = PlacedNode(provider=CPU, node="/head/NonMaxSuppression", operator="NonMaxSuppression")
COPY = PlacedNode(provider=CUDA, node="Memcpy_token_1", operator="MemcpyToHost")


class _CudaLike:
    """ONNX Runtime on the CPU, with the record of a session on CUDA. TF32 rounds its outputs."""

    def __init__(self, request: SessionRequest, nodes: tuple[PlacedNode, ...], num_copies: int | None) -> None:
        self._session = all_runtimes()["ort-cpu"].open(dataclasses.replace(request, tf32=False))
        self._tf32 = request.tf32
        self.nodes, self.num_copies = nodes, num_copies
        self.settings = {"tf32": "on" if request.tf32 else "off", "arena": "grows"}
        self.placement = {name: sum(node.provider == name for node in nodes) for name in (CPU, CUDA)}

    def run(self, feeds: Feeds) -> Outputs:
        outputs = self._session.run(feeds)
        if not self._tf32:
            return outputs
        return {name: np.multiply(array, 1.001, dtype=np.float32) for name, array in outputs.items()}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        return self._session.bind(feeds)


@pytest.fixture
def timed_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[LatencySettings]:
    """Settings that would have been changed for a GPU. No clock ramps up here, and what a GPU needs takes a minute."""
    asked: list[LatencySettings] = []

    def note(settings: LatencySettings) -> LatencySettings:
        asked.append(settings)
        return settings

    monkeypatch.setattr(cspdeploy.check.subject_check, "gpu_settings", note)
    return asked


@pytest.fixture
def cuda_like(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[SessionRequest]]:
    """`cuda_like(*nodes, num_copies=0)`: the one runtime "ort-cuda" has that record; gives the requests it got."""

    def install(*nodes: PlacedNode, num_copies: int | None = 0) -> list[SessionRequest]:
        requests: list[SessionRequest] = []

        def open_(request: SessionRequest) -> _CudaLike:
            requests.append(request)
            return _CudaLike(request, nodes, num_copies)

        runtime = dataclasses.replace(all_runtimes()["ort-cuda"], missing=lambda: None, open=open_)
        monkeypatch.setattr(cspdeploy.check.rungs, "require_runtime", lambda name: runtime)
        return requests

    return install


def _runtime(name: str) -> Runtime:
    return all_runtimes()[name]


def test_copies_are_not_nodes_elsewhere() -> None:
    found = find_placement(_runtime("ort-cuda"), counts={CUDA: 2, CPU: 1}, nodes=(CONV, NMS, COPY), num_copies=1)
    assert found.elsewhere == (NMS,)
    assert found.num_copies == 1
    problem = strict_problem(_runtime("ort-cuda"), found)
    assert problem == (
        f"1 of 3 nodes run elsewhere, the first /head/NonMaxSuppression (NonMaxSuppression) on {CPU}; "
        "1 copies between devices"
    )


def test_all_where_they_were_asked_to_be() -> None:
    found = find_placement(_runtime("ort-cuda"), counts={CUDA: 1}, nodes=(CONV,), num_copies=0)
    assert found.elsewhere == ()
    assert strict_problem(_runtime("ort-cuda"), found) == ""


@pytest.mark.parametrize(("name", "told"), [("ort-cuda", True), ("ort-cpu", False), ("torchscript-cuda", False)])
def test_engine_that_tells_nothing_is_believed_only_where_there_is_nothing_to_tell(name: str, told: bool) -> None:
    found = find_placement(_runtime(name), counts={}, nodes=(), num_copies=None)
    assert (found.num_copies, found.elsewhere) == (None, ())
    assert ("does not tell" in strict_problem(_runtime(name), found)) == told


# --- through verify ---


def test_nodes_elsewhere_are_in_the_row(tiny_bundle: Path, cuda_like: Any, ladder: Any) -> None:
    cuda_like(CONV, NMS, COPY, num_copies=1)
    report = ladder.verify(tiny_bundle, "ort-cuda")
    row = ladder.row(report, "onnx", "ort-cuda")
    assert row.verdict == "pass"
    assert row.nodes_elsewhere == (NMS,)
    assert row.num_copies == 1
    assert row.placement == {CPU: 1, CUDA: 2}


@pytest.mark.parametrize(
    ("nodes", "num_copies", "verdict"),
    [((CONV,), 0, "pass"), ((CONV, NMS), 0, "placement"), ((CONV, COPY), 1, "placement"), ((), None, "placement")],
)
def test_strict_placement_fails_on_any(
    tiny_bundle: Path, cuda_like: Any, nodes: Any, num_copies: int | None, verdict: str, ladder: Any
) -> None:
    cuda_like(*nodes, num_copies=num_copies)
    assert ladder.row(ladder.verify(tiny_bundle, "ort-cuda"), "onnx", "ort-cuda").verdict == "pass"
    report = ladder.verify(tiny_bundle, "ort-cuda", strict_placement=True)
    row = ladder.row(report, "onnx", "ort-cuda")
    assert row.verdict == verdict
    assert bool(row.reason) == (verdict == "placement")
    assert report.verdict == ("pass" if verdict == "pass" else "fail")


def test_everything_on_the_cpu_is_where_it_was_asked_to_be(tiny_bundle: Path, ladder: Any) -> None:
    report = ladder.verify(tiny_bundle, "ort-cpu", "torchscript-cpu", strict_placement=True)
    assert report.verdict == "pass"
    assert ladder.row(report, "onnx", "ort-cpu").num_copies == 0
    assert ladder.row(report, "torchscript", "torchscript-cpu").num_copies is None


# --- TF32 ---


def test_verdict_without_tf32_and_speed_with_it(
    tiny_bundle: Path, cuda_like: Any, ladder: Any, timed_as_a_gpu: list[LatencySettings]
) -> None:
    requests = cuda_like(CONV)
    row = ladder.row(ladder.verify(tiny_bundle, "ort-cuda", latency=SHORT), "onnx", "ort-cuda")
    assert [request.tf32 for request in requests if request.path.name == "tiny.onnx"] == [False, True]
    assert row.verdict == "pass"
    assert row.rel_l2 < 1e-5
    assert row.tf32_rel_l2 == pytest.approx(1e-3, rel=1e-2)
    assert row.timing is not None
    assert timed_as_a_gpu == [SHORT]


def test_no_tf32_where_nothing_is_timed_and_on_the_cpu(
    tiny_bundle: Path, cuda_like: Any, ladder: Any, timed_as_a_gpu: list[LatencySettings]
) -> None:
    assert ladder.row(ladder.verify(tiny_bundle, "ort-cpu", latency=SHORT), "onnx", "ort-cpu").tf32_rel_l2 is None
    assert timed_as_a_gpu == []
    requests = cuda_like(CONV)
    assert ladder.row(ladder.verify(tiny_bundle, "ort-cuda"), "onnx", "ort-cuda").tf32_rel_l2 is None
    assert not any(request.tf32 for request in requests)


@pytest.mark.usefixtures("timed_as_a_gpu")
def test_default_repeats_settings_and_the_gpu_that_was_asked_for(
    tiny_bundle: Path, cuda_like: Any, ladder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cspdeploy.check.rungs, "open_device", lambda index: None)  # as if it were there
    requests = cuda_like(CONV)
    row = ladder.row(ladder.verify(tiny_bundle, "ort-cuda", latency=SHORT, device=2), "onnx", "ort-cuda")
    assert {request.cuda.device for request in requests} == {2}
    assert row.settings == {"tf32": "off", "arena": "grows", "tf32 (timed)": "on"}
    assert row.repeats is not None
    assert (row.repeats.num_runs, row.repeats.num_different) == (10, 0)


# --- why nodes are elsewhere ---

TENSORRT = "TensorrtExecutionProvider"
SHAPES = """<ir_version: 8, opset_import: ["" : 17]>
shapes (float[N,3,8,8] input) => (float[N,192] flat, int64[N] best)
<int64[1] first = {0}, int64[1] last = {-1}, float[1] two = {2.0}> {
    [shape] s = Shape(input)
    [gather] n = Gather(s, first)
    [join] target = Concat<axis = 0>(n, last)
    [scale] x = Mul(input, two)
    [reshape] flat = Reshape(x, target)
    [best] best = ArgMax<axis = 1, keepdims = 0>(flat)
}"""


@pytest.fixture
def shapes_file(tmp_path: Path) -> Path:
    path = tmp_path / "shapes.onnx"
    path.write_bytes(onnx.parser.parse_model(SHAPES).SerializeToString())
    return path


def _placed(**providers: str) -> tuple[PlacedNode, ...]:
    operators = {"shape": "Shape", "gather": "Gather", "join": "Concat", "scale": "Mul", "reshape": "Reshape",
                 "best": "ArgMax"}  # fmt: skip
    return tuple(
        PlacedNode(provider=providers.get(name, CUDA), node=name, operator=operator)
        for name, operator in operators.items()
    )


def _why(name: str, nodes: tuple[PlacedNode, ...], path: Path) -> tuple[str, ...]:
    placed = find_placement(_runtime(name), counts={}, nodes=nodes, num_copies=0)
    return why_elsewhere(_runtime(name), placed, nodes=nodes, path=path)


def test_which_nodes_compute_shapes_alone(shapes_file: Path) -> None:
    assert shape_nodes(read_onnx(shapes_file).graph) == {"shape", "gather", "join"}


def test_shapes_are_on_the_cpu_on_purpose(shapes_file: Path) -> None:
    nodes = _placed(gather=CPU, join=CPU)
    assert find_placement(_runtime("ort-cuda"), counts={}, nodes=nodes, num_copies=0).elsewhere == nodes[1:3]
    assert _why("ort-cuda", nodes, shapes_file) == (
        "2 of the nodes elsewhere compute shapes alone (Gather 1, Concat 1): ONNX Runtime keeps those on the CPU on "
        "purpose",
    )


def test_an_operator_that_never_runs_there_has_no_kernel(shapes_file: Path) -> None:
    assert _why("ort-cuda", _placed(join=CPU, best=CPU), shapes_file)[1:] == (
        "no CUDA kernel for ArgMax of opset 17 as it is used here (1 node, the first best)",
    )
    # One that runs there in another place has a kernel, and nothing is said of why.
    more = (*_placed(best=CPU), PlacedNode(provider=CUDA, node="best2", operator="ArgMax"))
    assert _why("ort-cuda", more, shapes_file) == ()


def test_what_the_engine_made_itself_and_files_that_are_not_onnx_have_no_opset(tmp_path: Path) -> None:
    (tmp_path / "model.ort").write_bytes(b"no ONNX file")
    assert _why("ort-cuda", (NMS, CONV), tmp_path / "model.ort") == (
        "no CUDA kernel for NonMaxSuppression as it is used here (1 node, the first /head/NonMaxSuppression)",
    )


def test_where_all_is_as_asked_for_there_is_nothing_to_explain(shapes_file: Path) -> None:
    assert _why("ort-cuda", _placed(), shapes_file) == ()


@pytest.fixture
def tensorrt() -> Runtime:
    """By name and device, whether or not that runtime is part of this installation."""
    return dataclasses.replace(_runtime("ort-cuda"), name="ort-tensorrt")


def test_tensorrt_is_asked_for_and_cuda_is_elsewhere(tensorrt: Runtime, shapes_file: Path) -> None:
    nodes = _placed(shape=TENSORRT, gather=TENSORRT, join=CPU, scale=TENSORRT, reshape=TENSORRT, best=CUDA)
    placed = find_placement(tensorrt, counts={TENSORRT: 4, CUDA: 1, CPU: 1}, nodes=nodes, num_copies=1)
    assert [node.node for node in placed.elsewhere] == ["join", "best"]
    assert why_elsewhere(tensorrt, placed, nodes=nodes, path=shapes_file)[1] == (
        "no TensorRT kernel for ArgMax of opset 17 as it is used here (1 node, the first best)"
    )
    assert "2 of 6 nodes run elsewhere" in strict_problem(tensorrt, placed)


def test_tensorrt_alone_copies_nothing_and_elsewhere_is_not_counted(tensorrt: Runtime) -> None:
    """Its graph cannot be written, so that the engine's copies are not told."""
    own = PlacedNode(provider=TENSORRT, node="TRTKernel_0", operator="TRTKernel")
    alone = find_placement(tensorrt, counts={TENSORRT: 1}, nodes=(own,), num_copies=None)
    assert (alone.num_copies, strict_problem(tensorrt, alone)) == (0, "")
    mixed = find_placement(tensorrt, counts={TENSORRT: 1, CUDA: 1}, nodes=(own, CONV), num_copies=None)
    assert mixed.num_copies is None
    problem = strict_problem(tensorrt, mixed)
    assert "1 of 2 nodes run elsewhere" in problem
    assert "how often it copies for them is not known: ONNX Runtime writes no graph of TensorRT's engines" in problem
    assert "1.23" not in problem
    silent = find_placement(tensorrt, counts={}, nodes=(), num_copies=None)
    assert "does not tell where its nodes run" in strict_problem(tensorrt, silent)


def test_reasons_are_in_the_row(tiny_bundle: Path, cuda_like: Any, ladder: Any) -> None:
    cuda_like(CONV, NMS)
    row = ladder.row(ladder.verify(tiny_bundle, "ort-cuda"), "onnx", "ort-cuda")
    assert "no CUDA kernel for NonMaxSuppression" in row.note
    assert row.verdict == "pass"
