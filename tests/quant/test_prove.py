from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import onnx
import pytest

from cspdeploy.core.onnx_graph import read_onnx
from cspdeploy.quant.place import lay_out
from cspdeploy.quant.placements import Placement
from cspdeploy.quant.prepare import prepare_float
from cspdeploy.quant.prove import PlacementProof, float_products, prove_placement
from cspdeploy.quant.torch_graph import TorchGraph
from cspdeploy.quant.write import write_qdq
from cspdeploy.runtimes import require_runtime
from cspdeploy.runtimes.base import SessionRequest
from cspdeploy.runtimes.ort_graph import write_optimised
from tests.quant.placed_graphs import ROWS, chain, images, plan_by_extremes

ORT = ROWS["ort-cpu"]


def proof_of(tmp_path: Path, row: Placement, *, left_out: str = "") -> PlacementProof:
    """Of the chain's file, one tensor's grid left out of it."""
    ready = prepare_float(chain())
    graph = TorchGraph(ready)
    layout = lay_out(graph, row)
    plan = plan_by_extremes(graph, layout, row, images())
    grids = {name: grid for name, grid in plan.grids.items() if name != left_out}
    path = tmp_path / "net.int8.onnx"
    onnx.save(write_qdq(ready, dataclasses.replace(plan, grids=grids)), path)
    return prove_placement(path, layout, row)


@pytest.mark.parametrize("name", ["ort-cpu", "ort-cpu-avx2"])
def test_onnx_runtime_computes_every_convolution_in_integers(tmp_path: Path, name: str) -> None:
    proof = proof_of(tmp_path, ROWS[name])
    assert proof.holds
    assert (proof.runtime, proof.num_integer, proof.float_nodes) == ("ort-cpu", 3, ())
    assert proof.operators["QLinearConv"] == 3
    assert proof.operators["QLinearLeakyRelu"] == 2
    assert "Conv" not in proof.operators
    assert "Relu" not in proof.operators
    assert proof.num_pairs == 2  # the image in, the features out


def test_convolution_that_falls_back_to_float_is_named(tmp_path: Path) -> None:
    proof = proof_of(tmp_path, ORT, left_out="c2")
    assert not proof.holds
    assert (proof.num_integer, proof.float_nodes) == (2, ("node2",))


def test_weight_that_was_never_quantised_is_named(tmp_path: Path) -> None:
    ready = prepare_float(chain())
    layout = lay_out(TorchGraph(ready), ORT)
    path = tmp_path / "float.onnx"
    onnx.save(ready, path)
    assert prove_placement(path, layout, ORT).float_nodes == ("node0", "node2", "node6")


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_computes_every_convolution_in_integers(tmp_path: Path) -> None:
    proof = proof_of(tmp_path, ROWS["openvino"])
    assert proof.holds
    assert (proof.runtime, proof.num_integer, proof.num_pairs) == ("openvino", 3, 0)


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_names_what_it_computes_in_float(tmp_path: Path) -> None:
    assert proof_of(tmp_path, ROWS["openvino"], left_out="a1").float_nodes == ("node2",)


@pytest.mark.parametrize("name", ["tensorrt", "ort-cuda", "ort-web"])
def test_placement_without_an_engine_here_is_not_proven(tmp_path: Path, name: str) -> None:
    proof = proof_of(tmp_path, ROWS[name])
    assert proof.runtime is None
    assert name.removeprefix("ort-") in proof.unproven
    assert not proof.holds


def test_another_machines_placement_is_not_proven_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert "x86_64" in proof_of(tmp_path, ROWS["arm64"]).unproven
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "aarch64" in proof_of(tmp_path, ORT).unproven


@pytest.mark.parametrize(("left_out", "floats"), [("", ()), ("c2", ("node2",))])
def test_the_engines_record_is_read_by_name(tmp_path: Path, left_out: str, floats: tuple[str, ...]) -> None:
    """Of a graph in which some products are integer ones: the others are named, not passed over."""
    proof_of(tmp_path, ORT, left_out=left_out)
    optimised = tmp_path / "optimised.onnx"
    write_optimised(tmp_path / "net.int8.onnx", optimised)
    nodes = require_runtime("ort-cpu").open(SessionRequest(path=optimised)).nodes
    products = [node for node in read_onnx(tmp_path / "net.int8.onnx").graph.nodes if node.operator == "Conv"]
    assert float_products(products, nodes) == floats
    renamed = tuple(dataclasses.replace(node, node=f"{node.node}/fused") for node in nodes)
    assert float_products(products, renamed) is None
