from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cspdeploy.core.errors import InputError, RuntimeUnavailableError, TamperedError
from cspdeploy.core.model_folder import read_spec, write_spec
from cspdeploy.core.spec import Accuracy, Provenance
from cspdeploy.nets.checkpoints import CHECKPOINTS
from cspdeploy.nets.cost import measure_cost
from cspdeploy.nets.network import PublishedAccuracy
from cspdeploy.nets.registry import NETWORKS, find_network, spec_of
from cspdeploy.pipeline.compare import CompareReport, CompareRequest
from cspdeploy.pipeline.pull import _with_origin
from cspdeploy.report.compare import render_comparison
from cspdeploy.train.detect_loop import DetectionRecipe, DetectionRecord
from cspdeploy.train.loop import EpochRecord, Recipe, write_curve
from tests.pipeline.conftest import quantities

CFG = Path(__file__).parents[2].parent / "shared" / "data" / "darknet" / "csdarknet53-omega.cfg"


def _edit(models: Path, name: str, **provenance: Any) -> None:
    spec = read_spec(models / name)
    write_spec(models / name, dataclasses.replace(spec, provenance=Provenance(**{"source": "trained", **provenance})))


# --- counts ---


def test_counts_of_two_networks_of_the_registry(compare: Callable[..., CompareReport]) -> None:
    """Published: 27.61 and 41.57 million weights, 6.534 and 9.285 GMAC, 16.81 and 12.39 million activations."""
    report = compare("cspdarknet53", "darknet53")
    found = quantities(report)
    assert found["parameters"] == (27_642_184, 41_609_928)
    assert [round(value / 1e6, 2) for value in found["conv weights"]] == [27.61, 41.57]
    assert [round(value / 1e9, 3) for value in found["MACs"]] == [6.534, 9.285]
    assert [round(value / 1e6, 2) for value in found["activations"]] == [16.81, 12.39]
    assert all(quantity.ratio == quantity.b / quantity.a for quantity in report.quantities)
    assert not any("file" in name for name in found)  # nothing was exported
    assert report.latency == ()
    assert (report.a.kind, report.a.weights, report.a.untrained) == ("network", "", False)
    assert (report.regime.size_px, report.regime.layout) == ((256, 256), "NCHW")


def test_model_folders_by_name_and_by_path(compare: Callable[..., CompareReport], models: Path) -> None:
    by_name, by_path = compare("tiny", "plain"), compare(str(models / "tiny"), str(models / "plain"))
    assert by_name.quantities == by_path.quantities
    cost = measure_cost(read_spec(models / "plain"))
    assert quantities(by_name)["peak activation memory"][1] == cost.peak_activation_bytes
    assert (by_name.a.kind, by_name.a.own_size_px, by_name.a.num_classes) == ("model", (32, 32), 10)


def test_same_model_twice(compare: Callable[..., CompareReport]) -> None:
    assert {quantity.ratio for quantity in compare("tiny", "tiny").quantities} == {1.0}


def test_name_of_a_network_is_the_registry_s_network(compare: Callable[..., CompareReport], models: Path) -> None:
    shutil.copytree(models / "tiny", models / "cspdarknet53")
    report = compare("cspdarknet53", "darknet53")
    assert report.a.num_classes == 1000
    assert any(str(models / "cspdarknet53") in note for note in report.notes)
    assert compare(str(models / "cspdarknet53"), "tiny").a.kind == "model"


def test_different_numbers_of_classes_are_said(compare: Callable[..., CompareReport]) -> None:
    assert any("tiny has 10 classes, darknet17 1000" in note for note in compare("tiny", "darknet17").notes)


def test_different_tasks_are_said(compare: Callable[..., CompareReport], models: Path) -> None:
    spec = read_spec(models / "plain")
    write_spec(models / "plain", dataclasses.replace(spec, task="features", outputs=("features_s4",)))
    notes = compare("tiny", "plain").notes
    assert any("plain for features" in note for note in notes)
    assert not any("last layers" in note for note in notes)


@pytest.mark.skipif(not CFG.is_file(), reason=f"{CFG} is not here")
def test_cfg_counts_as_the_network_that_was_made_after_it(compare: Callable[..., CompareReport]) -> None:
    found = quantities(compare(str(CFG), "csdarknet53-omega"))
    assert all(found[name][0] == found[name][1] for name in ("parameters", "conv weights", "MACs", "activations"))


# --- size ---


def test_both_are_counted_at_the_larger_of_their_own_sizes(compare: Callable[..., CompareReport], models: Path) -> None:
    spec = read_spec(models / "plain")
    write_spec(models / "plain", dataclasses.replace(spec, preprocess=spec.preprocess.with_size(64, 48)))
    report = compare("tiny", "plain")
    assert report.regime.size_px == (64, 48)
    assert "plain" in report.regime.size_from
    assert report.quantities == compare("tiny", "plain", size_px=(64, 48)).quantities
    assert report.quantities != compare("tiny", "plain", size_px=(32, 32)).quantities
    assert compare("tiny", "plain", size_px=(32, 32)).regime.size_from == "as asked"


def test_size_at_which_a_network_does_not_work(compare: Callable[..., CompareReport]) -> None:
    with pytest.raises(InputError, match="densenet121: does not work at 16x16 px") as caught:
        compare("densenet121", "tiny", size_px=(16, 16))
    assert "--size" in caught.value.fix


# --- what cannot be compared ---


def test_unknown_name_suggests_the_nearest(compare: Callable[..., CompareReport]) -> None:
    with pytest.raises(InputError, match="'cspdarknet35': neither a network") as caught:
        compare("cspdarknet35", "tiny")
    assert "did you mean 'cspdarknet53'?" in caught.value.fix
    with pytest.raises(InputError) as caught:
        compare("tiny", "plian")
    assert "did you mean 'plain'?" in caught.value.fix
    with pytest.raises(InputError) as caught:
        compare("tiny", "0")
    assert "did you mean" not in caught.value.fix


@pytest.mark.parametrize("batches", [(0,), (1, -8), (), (100_000,)])
def test_batch_that_cannot_be(batches: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="--batch"):
        CompareRequest(a="a", b="b", batches=batches)


def test_unknown_and_missing_runtime(compare: Callable[..., CompareReport], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--runtime ort-cpuu: unknown"):
        compare("tiny", "plain", runtimes=("ort-cpuu",), latency=True)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailableError, match="--runtime ort-cuda"):
        compare("tiny", "plain", runtimes=("ort-cuda",), latency=True)


def test_changed_bundle_is_refused(compare: Callable[..., CompareReport], bundle: Path) -> None:
    with (bundle / "tiny.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(TamperedError, match=r"tiny\.onnx"):
        compare(str(bundle), "tiny")


# --- accuracy ---


def _accuracy(dataset: str, top1: float, num_images: int = 100) -> Accuracy:
    return Accuracy(dataset=dataset, num_images=num_images, top1=top1, top5=1.0)


def test_recorded_accuracy_on_the_same_images(compare: Callable[..., CompareReport], models: Path) -> None:
    _edit(models, "tiny", accuracy=_accuracy("d/test", 0.9))
    _edit(models, "plain", accuracy=_accuracy("d/test", 0.8))
    found = compare("tiny", "plain").accuracy
    assert found.comparable
    assert found.reason == ""
    assert found.a is not None
    assert found.b is not None
    assert (found.a.top1, found.b.top1, found.a.dataset, found.a.size_px) == (0.9, 0.8, "d/test", (32, 32))


@pytest.mark.parametrize("other", [_accuracy("e/test", 0.8), _accuracy("d/test", 0.8, num_images=99)], ids=str)
def test_accuracy_on_other_images_is_not_compared(
    compare: Callable[..., CompareReport], models: Path, other: Accuracy
) -> None:
    _edit(models, "tiny", accuracy=_accuracy("d/test", 0.9))
    _edit(models, "plain", accuracy=other)
    found = compare("tiny", "plain").accuracy
    assert not found.comparable
    assert "not comparable" in found.reason
    assert found.a is not None
    assert found.b is not None


def test_published_accuracy_of_both_names_its_sources(
    compare: Callable[..., CompareReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, top1, size_px in (("cspdarknet53", 0.8, 256), ("darknet53", 0.79, 288)):
        published = PublishedAccuracy(top1=top1, top5=0.95, size_px=size_px, source=f"{name}.x")
        monkeypatch.setitem(NETWORKS, name, dataclasses.replace(NETWORKS[name], published=published))
    found = compare("cspdarknet53", "darknet53").accuracy
    assert found.comparable
    assert "256x256 and 288x288 px" in found.reason
    assert "different training" in found.reason
    assert found.b is not None
    assert (found.b.top1, found.b.source) == (0.79, "published: darknet53.x")


def test_recorded_and_published_accuracy_do_not_mix(compare: Callable[..., CompareReport], models: Path) -> None:
    _edit(models, "tiny", accuracy=_accuracy("fashion-mnist/test", 0.9))
    found = compare("tiny", "cspdarknet53").accuracy
    assert not found.comparable
    assert "fashion-mnist/test" in found.reason
    assert "ImageNet" in found.reason


def test_unknown_accuracy_is_said(compare: Callable[..., CompareReport]) -> None:
    found = compare("tiny", "cspdarknet53").accuracy
    assert (found.a, found.comparable) == (None, False)
    assert found.reason == "no accuracy of tiny is known"


def test_accuracy_is_not_that_of_the_network_for_a_folder_of_its_name(
    compare: Callable[..., CompareReport], models: Path
) -> None:
    """A model folder has weights of its own, which nobody published an accuracy of."""
    shutil.copytree(models / "tiny", models / "cspdarknet53")
    write_spec(models / "cspdarknet53", dataclasses.replace(read_spec(models / "tiny"), name="cspdarknet53"))
    assert compare(str(models / "cspdarknet53"), "tiny").accuracy.a is None


def test_pulled_model_against_what_is_published_of_a_network(
    compare: Callable[..., CompareReport], models: Path
) -> None:
    """`pull` writes the figure of the same 50,000 images as the registry has."""
    provenance = _with_origin(
        read_spec(models / "tiny"), CHECKPOINTS["cspdarknet53.ra_in1k"], Provenance(source="published", origin="hub")
    ).provenance
    assert provenance.accuracy is not None
    _edit(models, "tiny", source="published", origin="hub", accuracy=provenance.accuracy)
    found = compare("tiny", "darknet53").accuracy
    assert found.comparable
    assert found.a is not None
    assert (found.a.top1, found.a.source) == (0.80078, "published: hub")
    assert "different training" in found.reason


# --- training ---


def _curve(models: Path, name: str, *, epochs: int = 5, num_images: int = 640, **recipe: Any) -> None:
    _edit(models, name, dataset="d/train")
    records = [
        EpochRecord(
            epoch=i + 1, train_loss=2.0 - 0.1 * i, test_top1=0.5 + 0.05 * i, test_top5=1.0, learning_rate=0.1,
            seconds=60,
        )
        for i in range(epochs)
    ]  # fmt: skip
    write_curve(models / name / "train.json", Recipe(**{"epochs": epochs, **recipe}), records, num_images=num_images)


def test_equal_budget(compare: Callable[..., CompareReport], models: Path) -> None:
    _curve(models, "tiny", seed=0)
    _curve(models, "plain", seed=1)  # another start is no other budget
    found = compare("tiny", "plain").training
    assert found is not None
    assert (found.equal_budget, found.differences) == (True, ())
    assert (found.a.epochs, found.a.dataset, found.a.seconds, found.a.recipe["batch"]) == (5, "d/train", 300.0, 128)
    assert [point.epoch for point in found.a.last_epochs] == [3, 4, 5]
    assert found.a.last_epochs[-1].test_top1 == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("recipe", "difference"),
    [
        ({"num_images": 320}, "training images: 640 and 320"),
        ({"batch": 64}, "batch: 128 and 64"),
        ({"epochs": 6}, "epochs: 5 and 6"),
        ({"max_learning_rate": 0.2}, "0.1 and"),
    ],
)
def test_unequal_budget_is_named(
    compare: Callable[..., CompareReport], models: Path, recipe: dict[str, Any], difference: str
) -> None:
    _curve(models, "tiny")
    _curve(models, "plain", **recipe)
    found = compare("tiny", "plain").training
    assert found is not None
    assert not found.equal_budget
    assert any(difference in one for one in found.differences)


def test_other_data_or_size_is_another_budget(compare: Callable[..., CompareReport], models: Path) -> None:
    _curve(models, "tiny")
    _curve(models, "plain")
    _edit(models, "plain", dataset="e/train")
    spec = read_spec(models / "plain")
    write_spec(models / "plain", dataclasses.replace(spec, preprocess=spec.preprocess.with_size(64, 64)))
    found = compare("tiny", "plain").training
    assert found is not None
    assert found.differences == ("data set: d/train and e/train", "size: 32x32 and 64x64")


def test_no_training_where_one_was_not_trained_here(compare: Callable[..., CompareReport], models: Path) -> None:
    _curve(models, "tiny")
    assert compare("tiny", "plain").training is None


@pytest.mark.parametrize("content", ["{", "{}", '{"epochs": [1], "recipe": {}}', '{"epochs": [], "recipe": 3}'])
def test_broken_curve_is_named(compare: Callable[..., CompareReport], models: Path, content: str) -> None:
    _curve(models, "tiny")
    _curve(models, "plain")
    (models / "plain" / "train.json").write_text(content)
    with pytest.raises(InputError, match=r"plain/train\.json"):
        compare("tiny", "plain")


# --- detectors ---


def _detector(models: Path, name: str, *, map50: float, dataset: str = "d/val") -> None:
    """A model folder as training a detector leaves it, without weights, which comparing does not need."""
    spec = spec_of(find_network("yolov4-tiny"))
    accuracy = Accuracy(dataset=dataset, num_images=9, map50=map50, map=map50 / 2)
    spec = dataclasses.replace(spec, provenance=Provenance(source="trained", dataset="d/train", accuracy=accuracy))
    (models / name).mkdir()
    write_spec(models / name, spec)
    recipe = DetectionRecipe(epochs=1)
    record = DetectionRecord(epoch=1, train_loss=3.0, test_map50=map50, test_map=0.1, learning_rate=0.1, seconds=1.0)
    write_curve(models / name / "train.json", recipe, [record], num_images=8)


def test_trained_detectors(compare: Callable[..., CompareReport], models: Path) -> None:
    for name, map50 in (("a", 0.6), ("b", 0.7)):
        _detector(models, name, map50=map50)
    report = compare("a", "b")
    found = report.accuracy
    assert found.comparable
    assert found.a is not None
    assert found.b is not None
    assert (found.a.map50, found.b.map50, found.a.map, found.a.top1) == (0.6, 0.7, 0.3, None)
    assert report.training is not None
    assert report.training.equal_budget
    assert (report.training.a.last_epochs[-1].test_map50, report.training.a.last_epochs[-1].test_top1) == (0.6, None)
    shown = io.StringIO()
    Console(file=shown, width=160).print(render_comparison(report))
    text = " ".join(shown.getvalue().split())
    assert "mAP@0.5 60.00 % 70.00 % +10.00 points" in text
    assert "3.000, 70.00 %" in text
    assert "top-1" not in text


def test_a_detector_and_a_classifier_of_the_same_images(compare: Callable[..., CompareReport], models: Path) -> None:
    _detector(models, "a", map50=0.6)
    _edit(models, "tiny", accuracy=_accuracy("d/val", 0.9, num_images=9))
    assert not compare("a", "tiny", size_px=(64, 64)).accuracy.comparable
