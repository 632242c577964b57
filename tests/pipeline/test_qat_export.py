from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from cspdeploy.core.errors import InputError
from cspdeploy.export import simplify
from cspdeploy.pipeline.int8_step import Int8Request
from cspdeploy.pipeline.recipe import ExportReport, ExportRequest, export_bundle
from cspdeploy.pipeline.reproduce import reproduce_bundle
from cspdeploy.pipeline.source import resolve_source
from cspdeploy.quant.calibration import open_calibration
from cspdeploy.quant.int8 import Int8Settings, assemble
from cspdeploy.quant.observations_cache import ObservationsCache
from cspdeploy.quant.placements import find_placement
from cspdeploy.quant.prepare import prepare_float
from cspdeploy.quant.qat import QatNetwork
from cspdeploy.quant.qat_file import QatOrigin, graph_fingerprint, qat_path, write_qat
from cspdeploy.quant.scheme import Scheme


@pytest.fixture
def models(photo_models: Path, photos: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a plan in the model's folder whose first weight is 7 throughout, so that its use shows."""
    monkeypatch.setattr(simplify, "_CHILD", ["false"])
    models = Path(shutil.copytree(photo_models, tmp_path / "models"))
    plain = Path(export_bundle(ExportRequest(model="tiny", models=models, output=tmp_path / "plain")).folder)
    placement = find_placement(None)
    source = resolve_source("tiny", models=models, weights=None, images=None, size_px=None)
    contract = source.spec.preprocess
    model = prepare_float(onnx.load(plain / "tiny.onnx"), placement=placement)
    assembly = assemble(
        model, open_calibration(photos, contract), placement=placement, settings=Int8Settings(),
        cache=ObservationsCache(tmp_path / "cache"), progress=lambda what, done, total: None,
    )  # fmt: skip
    network = QatNetwork(assembly.graph, assembly.plan(Scheme(method="minmax", exponent=0.75)))
    with torch.no_grad():
        network.steps[network.names.index(next(iter(network.start.weights)))].fill_(7.0)
    origin = QatOrigin(
        weights_sha256=source.spec.provenance.weights_sha256, placement=placement.name,
        fingerprint=graph_fingerprint(model), height_px=contract.height_px, width_px=contract.width_px,
    )  # fmt: skip
    write_qat(qat_path(models / "tiny", placement.name), network.plan(), origin=origin, record={})
    return models


def _export(models: Path, **changes: object) -> ExportReport:
    request = ExportRequest(model="tiny", models=models, output=models.parent / "out", int8=Int8Request())
    return export_bundle(dataclasses.replace(request, **changes))  # type: ignore[arg-type]


def _has_sevens(report: ExportReport) -> bool:
    graph = onnx.load(Path(report.folder) / "tiny.int8.onnx").graph
    whole = [numpy_helper.to_array(one) for one in graph.initializer if one.data_type == onnx.TensorProto.INT8]
    return any(value.ndim == 4 and (value == 7).all() for value in whole)


@pytest.mark.usefixtures("int8_is_faster")
def test_export_takes_the_trained_plan_and_says_so(models: Path) -> None:
    report = _export(models)
    assert _has_sevens(report)
    step = report.manifest.artifacts[-1].steps[-1]
    assert (step.name, step.outcome, step.facts["scheme"]) == ("int8", "done", "quantisation-aware training")
    assert "speed" not in step.detail, "the same files give the same manifest"
    assert (step.facts["fell_back"], step.facts["num_judged"] > 0) == ([], True)


def test_latency_of_an_engine_that_is_not_here_is_no_budget(models: Path) -> None:
    with pytest.raises(InputError, match="--max-latency: tensorrt cannot be timed on this machine"):
        _export(models, target="tensorrt", int8=Int8Request(max_latency="0.5x"))


@pytest.mark.usefixtures("int8_is_faster")
def test_ranges_that_are_asked_for_are_chosen_anew(models: Path) -> None:
    assert not _has_sevens(_export(models, int8=Int8Request(calibration="minmax")))


def test_other_size_than_it_was_trained_at_is_refused(models: Path) -> None:
    with pytest.raises(InputError, match="48 px height"):
        _export(models, size_px=(48, 48))


@pytest.mark.usefixtures("int8_is_faster")
def test_bundle_is_only_made_again_from_the_plan_that_it_was_made_from(models: Path) -> None:
    bundle = Path(_export(models).folder)
    assert reproduce_bundle(bundle, models=models).verdict == "equal"
    path = qat_path(models / "tiny", find_placement(None).name)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(InputError, match=r"the fine-tuned weights .*qat-.*SHA-256"):
        reproduce_bundle(bundle, models=models)
