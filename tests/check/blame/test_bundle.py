"""blame in a bundle: against the network itself, across engines, and on the engine's own rewritten graph."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from cspdeploy.check.blame import BlameRequest, blame, layer_curve
from cspdeploy.core.errors import InputError, TamperedError
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Session, SessionRequest

KINDS = {"onnx": "tiny.onnx", "onnx-fp16": "tiny.fp16.onnx", "torchscript": "tiny.torchscript.pt"}


@pytest.mark.parametrize("kind", KINDS)
def test_blames_nothing_in_a_sound_bundle(tiny_bundle: Path, kind: str) -> None:
    report = blame(BlameRequest(artifact=tiny_bundle / KINDS[kind]))
    assert (report.verdict, report.artifact) == ("within", kind)


def _plant(bundle: Path, folder: Path) -> tuple[Path, str, str]:
    """A copy of the bundle's ONNX file, by itself, with one weight of its second convolution changed."""
    model = onnx.load(bundle / "tiny.onnx")
    node = [node for node in model.graph.node if node.op_type == "Conv"][1]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    values = numpy_helper.to_array(tensor).copy()
    values[1, 1, 0, 0] += 0.2
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path = folder / "faulty.onnx"
    onnx.save(model, path)
    return path, node.name, node.output[0]


def test_onnx_against_torchscript(tiny_bundle: Path, tmp_path: Path) -> None:
    path, node, _ = _plant(tiny_bundle, tmp_path)
    report = blame(BlameRequest(artifact=path, against=str(tiny_bundle / "tiny.torchscript.pt")))
    assert report.blamed is not None
    assert (report.blamed.node, report.verdict) == (node, "introduced")
    assert report.blamed.module
    assert "convolution" in report.blamed.reference_operator


def test_torchscript_against_onnx(tiny_bundle: Path, tmp_path: Path) -> None:
    """The fault is in the reference this time; the operator of the TorchScript file that differs is the same."""
    path, node, _ = _plant(tiny_bundle, tmp_path)
    artifact = tmp_path / "tiny.torchscript.pt"
    shutil.copyfile(tiny_bundle / "tiny.torchscript.pt", artifact)
    report = blame(BlameRequest(artifact=artifact, against=str(path)))
    assert report.blamed is not None
    assert report.blamed.reference_node == node
    assert report.blamed.introduced is not None


def test_onnx_against_the_network_itself(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norms are folded into the convolutions of one side alone."""
    path, node, _ = _plant(tiny_bundle, tmp_path)
    bundle = tmp_path / "bundle" / "tiny"
    shutil.copytree(tiny_bundle, bundle)
    shutil.copyfile(path, bundle / "tiny.onnx")
    with pytest.raises(TamperedError):
        blame(BlameRequest(artifact=bundle / "tiny.onnx"))
    monkeypatch.setattr("cspdeploy.check.subject.check_hashes", lambda folder, manifest: None)
    report = blame(BlameRequest(artifact=bundle / "tiny.onnx"))
    assert report.against == "eager in FP64"
    assert report.blamed is not None
    assert (report.blamed.node, report.verdict) == (node, "introduced")
    assert report.blamed.module == report.blamed.module.strip(".")


class _Unfolded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.1),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_batch_norms_that_one_file_has_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = _Unfolded()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    x = torch.randn(1, 3, 16, 16)
    whole, folded = tmp_path / "whole.onnx", tmp_path / "folded.onnx"
    net.eval()
    torch.onnx.export(
        net, (x,), whole, dynamo=False, input_names=["x"], output_names=["y"], do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,
    )  # fmt: skip
    torch.onnx.export(net, (x,), folded, dynamo=False, input_names=["x"], output_names=["y"])
    operators = [[node.op_type for node in onnx.load(path).graph.node] for path in (whole, folded)]
    assert ["BatchNormalization" in names for names in operators] == [True, False]
    assert blame(BlameRequest(artifact=folded, against=str(whole))).verdict == "within"
    assert blame(BlameRequest(artifact=whole, against=str(folded))).verdict == "within"
    model = onnx.load(folded)
    node = [node for node in model.graph.node if node.op_type == "Conv"][1]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.001), tensor.name))
    onnx.save(model, folded)
    report = blame(BlameRequest(artifact=folded, against=str(whole)))
    assert report.blamed is not None
    assert (report.blamed.node, report.blamed.also, report.verdict) == (node.name, (), "introduced")


def test_a_file_by_itself_must_be_told_what_it_should_equal(tiny_bundle: Path, tmp_path: Path) -> None:
    path, _, _ = _plant(tiny_bundle, tmp_path)
    with pytest.raises(InputError, match="nothing says what it should compute"):
        blame(BlameRequest(artifact=path))


def test_without_the_weights_the_onnx_file_stands_for_them(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cspdeploy.check.subject.find_weights", lambda folder, manifest: None)
    report = blame(BlameRequest(artifact=tiny_bundle / "tiny.onnx"))
    assert report.against == "onnx in FP64"
    assert any("weights" in note for note in report.notes)


def test_a_layer_curve_follows_the_graph(tiny_bundle: Path) -> None:
    curve = layer_curve(BlameRequest(artifact=tiny_bundle / "tiny.fp16.onnx", runtime="fp16-rounding"))
    names = [node.name for node in onnx.load(tiny_bundle / "tiny.fp16.onnx").graph.node]
    found = [names.index(layer.node) for layer in curve.layers]
    assert found == sorted(found)
    assert len(found) > 10
    assert all(30 < layer.sqnr_db < 100 for layer in curve.layers)  # 11 bits: 66 dB and less with depth


def test_a_fault_of_the_engines_own_rewrite(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's graph after its rewrites is broken on purpose: its node is the one that is named."""
    from cspdeploy.check.blame import open as opening
    from cspdeploy.check.blame import search
    from cspdeploy.runtimes.ort_graph import write_optimised

    source = tmp_path / "sound.onnx"
    shutil.copyfile(tiny_bundle / "tiny.onnx", source)
    broken: list[str] = []

    def write(path: Path, target: Path) -> None:
        write_optimised(path, target)
        model = onnx.load(target)
        node = [node for node in model.graph.node if node.op_type in ("Conv", "FusedConv")][2]
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
        broken.append(node.name)
        onnx.save(model, target)

    engine = all_runtimes()["ort-cpu"]

    def open_(request: SessionRequest) -> Session:
        if not request.optimise:
            return engine.open(request)
        rewritten = tmp_path / "rewritten.onnx"
        write(request.path, rewritten)
        return engine.open(dataclasses.replace(request, path=rewritten, optimise=False))

    monkeypatch.setattr(search, "write_optimised", write)
    rewriting = dataclasses.replace(engine, open=open_)
    monkeypatch.setattr(
        opening, "require_runtime", lambda name: rewriting if name == "ort-cpu" else all_runtimes()[name]
    )
    report = blame(BlameRequest(artifact=source, against="itself"))
    assert report.optimised
    assert report.blamed is not None
    assert report.blamed.node == broken[0]
