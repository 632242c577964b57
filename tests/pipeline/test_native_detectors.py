"""Weights, classes and names of the detectors that have a name."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cspdeploy.cli.app import main
from cspdeploy.core.bundle import read_manifest
from cspdeploy.core.coco import COCO_LABELS
from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import read_spec, write_calibration, write_spec
from cspdeploy.core.spec import ModelSpec, NetworkSpec, Provenance
from cspdeploy.nets.darknet.convert import native_to_darknet
from cspdeploy.nets.darknet.detector_form import detector_form
from cspdeploy.nets.darknet.form import format_cfg
from cspdeploy.nets.darknet.network import DarknetNet
from cspdeploy.nets.darknet.weights import expected_bytes, write_darknet
from cspdeploy.nets.darknet_tiny import DarknetTinyConfig
from cspdeploy.nets.registry import NETWORKS, build, find_network, spec_of
from cspdeploy.nets.weights import write_safetensors
from cspdeploy.nets.yolov4 import YoloV4Config
from cspdeploy.pipeline.darknet import spec_of_cfg
from cspdeploy.pipeline.labels import default_labels, read_names, with_classes_of
from cspdeploy.pipeline.reproduce import reproduce_bundle
from cspdeploy.pipeline.source import Source, resolve_source
from cspdeploy.pipeline.weights import assumes_anchors, load_trained, make_untrained
from cspdeploy.train.anchors import with_anchors

NUM_CLASSES = 3


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch) -> YoloV4Config:
    """The registry's yolov4-tiny has an eighth of its channels."""
    row = find_network("yolov4-tiny")
    assert isinstance(row.config, YoloV4Config)
    backbone = dataclasses.replace(from_json(DarknetTinyConfig, row.config.backbone.config), stem_chs=4)
    config = dataclasses.replace(
        row.config, width=32, backbone=NetworkSpec(family="darknet_tiny", config=to_json(backbone))
    )
    monkeypatch.setitem(NETWORKS, "yolov4-tiny", dataclasses.replace(row, config=config))
    return config


def _spec(num_classes: int = 80) -> ModelSpec:
    return spec_of(find_network("yolov4-tiny"), num_classes=num_classes)


def _write_darknet(path: Path, network: nn.Module, config: YoloV4Config) -> Path:
    darknet = DarknetNet(detector_form(config, num_classes=NUM_CLASSES).config)
    darknet.load_state_dict(native_to_darknet(network.state_dict(), config))
    write_darknet(path, darknet)
    return path


@pytest.mark.parametrize("form", ["darknet", "safetensors"])
@torch.no_grad()
def test_weights_bring_their_own_classes(thin: YoloV4Config, tmp_path: Path, form: str) -> None:
    trained = make_untrained(_spec(NUM_CLASSES))[1].eval()
    if form == "darknet":
        path = _write_darknet(tmp_path / "mine.weights", trained, thin)
    else:
        path = tmp_path / "mine.safetensors"
        write_safetensors(path, trained, dtype=torch.float32)
    spec, model = load_trained(_spec(), path, size_px=(64, 96))
    assert spec.num_classes == NUM_CLASSES
    assert (spec.preprocess.height_px, spec.preprocess.width_px) == (64, 96)
    assert spec.detection == find_network("yolov4-tiny").detection
    image = torch.rand(1, 3, 64, 64)
    for got, want in zip(model.eval()(image), trained(image), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_truncated_weights_are_refused(thin: YoloV4Config, tmp_path: Path) -> None:
    path = _write_darknet(tmp_path / "mine.weights", build(_spec(NUM_CLASSES)), thin)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(InputError, match=r"mine\.weights: too short"):
        load_trained(_spec(), path, size_px=None)


@pytest.mark.parametrize("layout", ["classifier", "wrong bias"])
def test_weights_of_another_network_are_refused(thin: YoloV4Config, tmp_path: Path, layout: str) -> None:
    path = tmp_path / "other.pt"
    tensors = {"fc.bias": torch.zeros(10)} if layout == "classifier" else {"heads.0.pred.bias": torch.zeros(22)}
    torch.save(tensors, path)
    with pytest.raises(InputError, match="weights of another network"):
        load_trained(_spec(), path, size_px=None)


def test_darknet_weights_for_a_network_that_darknet_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "mine.weights"
    path.write_bytes(b"\0" * 400)
    with pytest.raises(InputError, match=r"none of Darknet's: backbone: a network of the family 'resnet'"):
        load_trained(spec_of(find_network("yolov4:resnet50")), path, size_px=None)


# --- names ---


@pytest.mark.parametrize(
    ("source", "num_classes", "origin"),
    [
        ("user", 80, "COCO, assumed: give --names FILE for other classes"),
        ("published", 80, "COCO"),
        ("random", 80, "numbered"),
        ("trained", 80, "numbered"),
        ("user", 3, "numbered"),
        ("user", 1000, "numbered"),
    ],
)
def test_names_of_the_classes(source: str, num_classes: int, origin: str) -> None:
    provenance = Provenance(source=source)  # type: ignore[arg-type]
    labels, found = default_labels(dataclasses.replace(_spec(num_classes), provenance=provenance))
    assert found == origin
    assert len(labels) == num_classes
    assert (labels == COCO_LABELS) == origin.startswith("COCO")


def test_a_cfg_detector_has_cocos_names_too_and_is_called_as_its_file(thin: YoloV4Config, tmp_path: Path) -> None:
    """A classifier's would get "-cfg", for its classes come in another order."""
    path = tmp_path / "yolov4-tiny.cfg"
    path.write_text(format_cfg(detector_form(thin, num_classes=80).config))
    spec = spec_of_cfg(path)
    assert spec.name == "yolov4-tiny"
    assert default_labels(spec)[0] == COCO_LABELS


def test_names_set_the_classes_of_a_detector_without_weights(tmp_path: Path) -> None:
    names = tmp_path / "my.names"
    names.write_text("apple\npear\n")
    spec = with_classes_of(names, _spec())
    assert spec.num_classes == 2
    assert read_names(names, spec, "random") == ("apple", "pear")
    classifier = spec_of(find_network("cspdarknet53"))
    assert with_classes_of(names, classifier) is classifier
    assert with_classes_of(tmp_path / "none.names", spec) is spec


def test_names_of_the_wrong_length_are_refused(tmp_path: Path) -> None:
    names = tmp_path / "my.names"
    names.write_text("apple\npear\n")
    with pytest.raises(InputError, match=r"my\.names: got 2 labels, expected 80"):
        read_names(names, _spec(), "yolov4.weights")
    names.write_text("")
    with pytest.raises(InputError, match=r"my\.names: got 0 labels, expected 1"):
        read_names(names, with_classes_of(names, _spec()), "random")


def test_a_thousand_classes_of_a_detector_are_not_reordered(tmp_path: Path) -> None:
    names = tmp_path / "my.names"
    given = tuple(f"thing {index}" for index in range(1000))
    names.write_text("\n".join(given))
    assert read_names(names, _spec(1000), "mine.weights") == given


# --- the folder of a trained one ---


@pytest.fixture
def trained_folder(thin: YoloV4Config, tmp_path: Path) -> Path:
    """`models/yolov4-tiny/`: two classes, other anchors, 64 px."""
    spec = dataclasses.replace(_spec(2), preprocess=_spec().preprocess.with_size(64, 64))
    assert spec.detection is not None
    spec = dataclasses.replace(
        spec, detection=with_anchors(spec.detection, tuple((4.0 + i, 5.0 + i) for i in range(6)))
    )
    folder = tmp_path / "models" / "yolov4-tiny"
    folder.mkdir(parents=True)
    spec, model = make_untrained(spec)
    write_safetensors(folder / "model.safetensors", model, dtype=torch.float32)
    write_spec(folder, dataclasses.replace(spec, provenance=Provenance(source="trained")))
    (folder / "labels.txt").write_text("ant\nbee\n")
    write_calibration(folder / "calibration.npz", np.zeros((8, 64, 64, 3), np.uint8))
    return folder


def _resolve(folder: Path, weights: Path | None) -> Source:
    given = None if weights is None else str(weights)
    return resolve_source("yolov4-tiny", models=folder.parent, weights=given, images=None, size_px=None)


def test_other_weights_of_a_registry_name_have_nothing_of_its_folder(trained_folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.safetensors"
    write_safetensors(mine, make_untrained(_spec(2))[1], dtype=torch.float16)
    found = _resolve(trained_folder, mine)
    assert found.spec.detection == find_network("yolov4-tiny").detection
    assert (found.spec.preprocess.height_px, found.labels) == (416, ("class 0", "class 1"))


@pytest.mark.parametrize("given", [False, True])
def test_its_own_weights_keep_all_of_the_folder(trained_folder: Path, tmp_path: Path, given: bool) -> None:
    copy = Path(shutil.copy(trained_folder / "model.safetensors", tmp_path / "copy.safetensors"))
    found = _resolve(trained_folder, copy if given else None)
    assert found.spec.detection == read_spec(trained_folder).detection
    assert (found.spec.preprocess.height_px, found.labels) == (64, ("ant", "bee"))


def test_anchors_of_a_darknet_file_are_assumed(thin: YoloV4Config, tmp_path: Path) -> None:
    assert assumes_anchors(_spec(), "mine.weights")
    assert not assumes_anchors(_spec(), "mine.safetensors")
    path = tmp_path / "own.cfg"
    path.write_text(format_cfg(detector_form(thin, num_classes=80).config))
    assert not assumes_anchors(spec_of_cfg(path), "own.weights")


@pytest.mark.slow  # two exports
def test_that_anchors_were_assumed_is_said_and_kept(
    thin: YoloV4Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the bundle can still be made again, whose class names were COCO's by assumption."""
    monkeypatch.setattr("cspdeploy.export.simplify._CHILD", ["false"])
    trained = make_untrained(_spec())[1]
    darknet = DarknetNet(detector_form(thin, num_classes=80).config)
    darknet.load_state_dict(native_to_darknet(trained.state_dict(), thin))
    write_darknet(tmp_path / "mine.weights", darknet)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "photos" / f"{index}.png")
    words = ["export", "yolov4-tiny", "--weights", tmp_path / "mine.weights", "--size", 64, "--calib",
             tmp_path / "photos", "-o", tmp_path / "out", "--models", tmp_path / "models", "--no-verify"]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    told = "assumed the published ones; give the .cfg if yours differ"
    assert f"warning: anchors and scale_x_y of the heads: {told}" in capsys.readouterr().err
    folder = tmp_path / "out" / "yolov4-tiny"
    assert read_manifest(folder).options["anchors"] == told
    assert reproduce_bundle(folder).verdict == "equal"


def test_names_tell_a_file_that_was_cut_off_at_fewer_classes(thin: YoloV4Config, tmp_path: Path) -> None:
    path = _write_darknet(tmp_path / "mine.weights", build(_spec(NUM_CLASSES)), thin)
    assert load_trained(_spec(), path, size_px=None, num_names=NUM_CLASSES)[0].num_classes == NUM_CLASSES
    whole, less = (
        expected_bytes(detector_form(thin, num_classes=num).config) for num in (NUM_CLASSES, NUM_CLASSES - 1)
    )
    path.write_bytes(path.read_bytes()[:less])
    with pytest.raises(InputError, match=rf"mine\.weights: got {less:,} bytes, expected {whole:,} for the 3 classes"):
        load_trained(_spec(), path, size_px=None, num_names=NUM_CLASSES)
