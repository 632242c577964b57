from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import read_spec, write_spec
from cspdeploy.core.spec import Accuracy, ModelSpec, Provenance
from cspdeploy.nets.cost import measure_cost
from cspdeploy.nets.registry import NETWORKS, build, spec_of
from cspdeploy.nets.zoo_costs import ZOO_COSTS
from cspdeploy.pipeline import listing
from cspdeploy.pipeline.listing import list_models


@pytest.fixture
def models(tiny_models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models, tmp_path / "models"))


def test_every_network_of_the_registry_is_listed(tmp_path: Path) -> None:
    found = list_models(tmp_path / "none")
    assert [network.name for network in found.networks] == list(NETWORKS)
    assert found.models == ()


def test_no_network_of_the_registry_is_built_to_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them take ten seconds of a CPU."""
    monkeypatch.setattr(listing, "measure_cost", lambda spec: pytest.fail(f"{spec.name} was measured"))
    assert len(list_models(tmp_path).networks) == len(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_listed_costs_are_those_that_are_measured(name: str) -> None:
    cost = measure_cost(spec_of(NETWORKS[name]))
    assert ZOO_COSTS[name] == (cost.num_parameters, cost.num_macs)


def test_cost_and_accuracy_of_cspdarknet53(tmp_path: Path) -> None:
    """REFERENCE: 27,642,184 parameters at 1000 classes, 6.534 GMAC at 256 px."""
    network = next(item for item in list_models(tmp_path).networks if item.name == "cspdarknet53")
    assert (network.num_parameters, network.gmacs) == (27_642_184, 6.534)
    assert (network.size_px, network.num_classes, network.checkpoint) == ((256, 256), 1000, "cspdarknet53.ra_in1k")
    assert network.accuracy == Accuracy(dataset="ImageNet-1k validation", num_images=50_000, top1=0.80078, top5=0.9506)


def test_model_folder(models: Path, tiny_spec: ModelSpec) -> None:
    accuracy = Accuracy(dataset="d/test", num_images=10, top1=0.9, top5=1.0)
    provenance = Provenance(source="trained", origin="tiny on d", accuracy=accuracy)
    write_spec(models / "tiny", dataclasses.replace(tiny_spec, provenance=provenance))
    (tiny,) = list_models(models).models
    assert (tiny.name, tiny.summary, tiny.accuracy) == ("tiny", "tiny on d", accuracy)
    assert (tiny.size_px, tiny.num_classes) == ((32, 32), 10)
    assert tiny.num_parameters == sum(parameter.numel() for parameter in build(tiny_spec).parameters())
    assert tiny.gmacs > 0


def test_folders_are_sorted_and_hidden_or_other_ones_left_out(models: Path) -> None:
    for name in ("b", "a", ".unfinished"):
        shutil.copytree(models / "tiny", models / name)
    (models / "no-model").mkdir()
    (models / "README.md").write_text("about")
    assert [model.name for model in list_models(models).models] == ["a", "b", "tiny"]


def test_model_is_listed_under_the_name_that_export_takes(models: Path) -> None:
    spec = read_spec(models / "tiny")
    write_spec(models / "tiny", dataclasses.replace(spec, name="other"))
    assert [model.name for model in list_models(models).models] == ["tiny"]


def test_broken_spec_is_named(models: Path) -> None:
    (models / "tiny" / "spec.json").write_text("{")
    with pytest.raises(InputError, match=r"tiny/spec\.json"):
        list_models(models)
