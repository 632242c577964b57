"""From a Darknet cfg and its weights to a verified bundle."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from cspdeploy.check.ladder import VerifySettings, verify_bundles
from cspdeploy.core.bundle import file_sha256, read_manifest
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import read_golden
from cspdeploy.core.imagenet import imagenet_labels, imagenet_wnids
from cspdeploy.core.spec import Provenance
from cspdeploy.edge import Predictor
from cspdeploy.export import simplify
from cspdeploy.nets.darknet.cfg import read_cfg
from cspdeploy.nets.darknet.network import DarknetNet
from cspdeploy.nets.darknet.weights import write_darknet
from cspdeploy.pipeline.darknet import spec_of_cfg
from cspdeploy.pipeline.labels import default_labels, read_names
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.report.steps import render_steps

NET = "[net]\nheight=32\nwidth=48\nchannels=3\n"
CONV = "[convolutional]\nbatch_normalize=1\nfilters={filters}\nsize=3\nstride=2\npad=1\nactivation={act}\n"
CLASSIFIER = (
    NET
    + CONV.format(filters=8, act="leaky")
    + CONV.format(filters=16, act="mish")
    + "[avgpool]\n[convolutional]\nfilters={classes}\nsize=1\nstride=1\npad=1\nactivation=linear\n[softmax]\n"
)
HEAD = (
    "[convolutional]\nfilters=14\nsize=1\nactivation=linear\n"
    "[yolo]\nmask={mask}\nanchors=4,6, 8,9, 20,22\nclasses=2\nnum=3\n"
)
DETECTOR = (
    NET
    + "letter_box=1\n"
    + CONV.format(filters=8, act="leaky")
    + CONV.format(filters=8, act="swish")
    + CONV.format(filters=16, act="mish")
    + HEAD.format(mask="1,2")
    + "[route]\nlayers=-4\n"
    + HEAD.format(mask="0,1")
)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(rng.integers(0, 256, (40 + index, 60, 3), np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """`make(text)`: a cfg and weights for it, trained nowhere but not UNTRAINED to the tool."""

    def write(text: str) -> tuple[Path, Path]:
        cfg, weights = tmp_path / "my net.cfg", tmp_path / "my-net.weights"
        cfg.write_text(text)
        torch.manual_seed(0)
        network = DarknetNet(read_cfg(cfg))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
        write_darknet(weights, network)
        return cfg, weights

    return write


@pytest.fixture
def without_simplifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplify, "_CHILD", ["false"])


def test_description_of_a_classifier(make: Callable[[str], tuple[Path, Path]]) -> None:
    cfg, _ = make(CLASSIFIER.format(classes=5))
    spec = spec_of_cfg(cfg)
    assert (spec.name, spec.task, spec.outputs, spec.num_classes) == ("my-net", "classify", ("logits",), 5)
    contract = spec.preprocess
    assert (contract.height_px, contract.width_px, contract.resize, contract.crop_pct) == (32, 48, "crop", 1.0)
    assert (contract.mean, contract.std, contract.channel_order) == ((0, 0, 0), (1, 1, 1), "rgb")


@pytest.mark.parametrize(("letter_box", "resize"), [(1, "letterbox"), (0, "stretch")])
def test_description_of_a_detector(make: Callable[[str], tuple[Path, Path]], letter_box: int, resize: str) -> None:
    cfg, _ = make(DETECTOR.replace("letter_box=1", f"letter_box={letter_box}"))
    spec = spec_of_cfg(cfg)
    assert (spec.task, spec.outputs, spec.num_classes) == ("detect", ("boxes", "scores"), 2)
    assert spec.detection is not None
    assert [(head.output, head.stride_px, head.anchors) for head in spec.detection.heads] == [
        ("head_s8", 8, ((8, 9), (20, 22))), ("head_s4", 4, ((4, 6), (8, 9))),
    ]  # fmt: skip
    assert spec.preprocess.resize == resize


def test_classifier_from_cfg_and_weights_to_a_verified_bundle(
    make: Callable[[str], tuple[Path, Path]], photos: Path, tmp_path: Path
) -> None:
    cfg, weights = make(CLASSIFIER.format(classes=5))
    names = tmp_path / "my.names"
    names.write_text("ant\nbee\ncat\ndog\nelk\n")
    report = export_bundle(
        ExportRequest(
            model=str(cfg), weights=str(weights), names=names, calibration=photos, output=tmp_path / "out", fp16=True
        )
    )
    folder = Path(report.folder)
    assert folder == tmp_path / "out" / "my-net"
    provenance = read_manifest(folder).spec.provenance
    assert (provenance.source, provenance.weights_sha256) == ("user", file_sha256(weights))
    found = verify_bundles([folder], VerifySettings(isolate=False, latency=None))
    assert {row.verdict for row in found.rows} == {"pass"}, found.first_break
    assert any(row.artifact == "eager" for row in found.rows)  # the network of the manifest, with the .weights file
    predictor = Predictor.open(folder)
    probabilities = predictor(read_golden(folder / "golden.npz").images[0], top=5)
    assert {found.label for found in probabilities} == {"ant", "bee", "cat", "dog", "elk"}
    assert sum(found.probability for found in probabilities) == pytest.approx(1)


@pytest.mark.usefixtures("without_simplifier")
def test_raw_heads_of_a_detector(make: Callable[[str], tuple[Path, Path]], photos: Path, tmp_path: Path) -> None:
    cfg, weights = make(DETECTOR)
    report = export_bundle(
        ExportRequest(
            model=str(cfg), weights=str(weights), calibration=photos, output=tmp_path / "out", fp16=True, decode="raw"
        )
    )
    folder = Path(report.folder)
    artifact = report.manifest.artifacts[1]
    assert [(value.name, value.shape) for value in artifact.outputs] == [
        ("head_s8", (1, 14, 4, 6)), ("head_s4", (1, 14, 8, 12)),
    ]  # fmt: skip
    found = verify_bundles([folder], VerifySettings(isolate=False, latency=None))
    assert {row.verdict for row in found.rows} == {"pass"}, found.first_break
    outputs = Predictor.open(folder).outputs(read_golden(folder / "golden.npz").images[0])
    assert list(outputs) == ["head_s8", "head_s4"]


@pytest.mark.usefixtures("without_simplifier")
def test_backbone_of_a_cfg(make: Callable[[str], tuple[Path, Path]], photos: Path, tmp_path: Path) -> None:
    cfg, weights = make(CLASSIFIER.format(classes=5))
    request = ExportRequest(
        model=str(cfg), weights=str(weights), calibration=photos, output=tmp_path / "out", features=True
    )
    artifact = export_bundle(request).manifest.artifacts[1]
    assert [(value.name, value.shape) for value in artifact.outputs] == [("features_s4", (1, 16, 8, 12))]


def test_without_weights_it_is_never_random(
    make: Callable[[str], tuple[Path, Path]], photos: Path, tmp_path: Path
) -> None:
    cfg, _ = make(CLASSIFIER.format(classes=5))
    with pytest.raises(InputError, match="model 'my-net': no weights") as caught:
        export_bundle(ExportRequest(model=str(cfg), calibration=photos, output=tmp_path / "out"))
    assert "--weights" in caught.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["short", "long", "other"])
def test_weights_that_do_not_belong_leave_nothing(
    make: Callable[[str], tuple[Path, Path]], photos: Path, tmp_path: Path, change: str
) -> None:
    cfg, weights = make(CLASSIFIER.format(classes=5))
    data = weights.read_bytes()
    if change == "other":
        cfg.write_text(CLASSIFIER.format(classes=6))
    else:
        weights.write_bytes(data[:-40] if change == "short" else data + bytes(4))
    with pytest.raises(InputError, match="layer"):
        export_bundle(ExportRequest(model=str(cfg), weights=str(weights), calibration=photos, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_weights_that_were_changed_are_not_the_bundles_original(
    make: Callable[[str], tuple[Path, Path]], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retrained since: the eager row says that the original is not here, and never passes with other weights."""
    monkeypatch.setattr(simplify, "_CHILD", ["false"])
    cfg, weights = make(CLASSIFIER.format(classes=5))
    request = ExportRequest(model=str(cfg), weights=str(weights), calibration=photos, output=tmp_path / "out")
    folder = Path(export_bundle(request).folder)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    rows = verify_bundles([folder], VerifySettings(isolate=False, latency=None)).rows
    assert {row.verdict for row in rows if row.artifact == "eager"} == {"not-checkable"}


@pytest.fixture
def called_as_a_network(make: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> Path:
    """A cfg with the file name of a network of the registry that has a published checkpoint."""
    cfg, _ = make(CLASSIFIER.format(classes=5))
    return cfg.rename(tmp_path / "densenet121.cfg")


def test_a_cfg_never_gets_the_checkpoint_of_a_network_of_its_name(
    called_as_a_network: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cspdeploy.pipeline import weights

    monkeypatch.setattr(weights, "fetch_checkpoint", lambda tag: pytest.fail(f"asked the hub for {tag}"))
    request = ExportRequest(model=str(called_as_a_network), calibration=photos, output=tmp_path / "out")
    with pytest.raises(InputError, match="no weights") as caught:
        export_bundle(request)
    assert caught.value.fix.startswith("give --weights FILE")


def test_a_cfg_is_never_exchanged_for_a_network_of_its_name(
    called_as_a_network: Path, photos: Path, tmp_path: Path
) -> None:
    """Weights of the native network of 7 classes fit that one, and not the cfg."""
    from cspdeploy.nets.registry import build, find_network, spec_of
    from cspdeploy.nets.weights import write_safetensors

    path = tmp_path / "native.safetensors"
    write_safetensors(path, build(spec_of(find_network("densenet121"), num_classes=7)), dtype=torch.float32)
    request = ExportRequest(
        model=str(called_as_a_network), weights=str(path), calibration=photos, output=tmp_path / "out"
    )
    with pytest.raises(InputError, match="weights of another network"):
        export_bundle(request)


# --- labels ---


def test_imagenet_classifier_of_a_cfg_has_darknets_order(make: Callable[[str], tuple[Path, Path]]) -> None:
    cfg, _ = make(CLASSIFIER.format(classes=1000))
    labels, origin = default_labels(spec_of_cfg(cfg))
    assert labels == imagenet_labels("devkit")
    assert "Darknet's order, assumed" in origin


def test_untrained_and_other_counts_are_numbered(make: Callable[[str], tuple[Path, Path]]) -> None:
    cfg, _ = make(CLASSIFIER.format(classes=5))
    spec = spec_of_cfg(cfg)
    assert default_labels(spec) == (tuple(f"class {i}" for i in range(5)), "numbered")


def test_names_must_be_as_many_as_classes(make: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    cfg, weights = make(CLASSIFIER.format(classes=5))
    (tmp_path / "few.names").write_text("ant\nbee\n")
    with pytest.raises(InputError, match="got 2 labels, expected 5"):
        read_names(tmp_path / "few.names", spec_of_cfg(cfg), str(weights))


def test_names_in_darknets_order_follow_their_reordered_classes(tmp_path: Path) -> None:
    from cspdeploy.nets.registry import find_network, spec_of

    spec = spec_of(find_network("csdarknet53"), provenance=Provenance(source="user"))
    (tmp_path / "devkit.names").write_text("\n".join(imagenet_wnids("devkit")))
    assert read_names(tmp_path / "devkit.names", spec, "net.weights") == imagenet_wnids("wnid")
    assert read_names(tmp_path / "devkit.names", spec, "net.safetensors") == imagenet_wnids("devkit")
    (tmp_path / "own.names").write_text("\n".join(f"my class {i}" for i in range(1000)))
    with pytest.raises(InputError, match="not ImageNet's"):
        read_names(tmp_path / "own.names", spec, "net.weights")
    assert default_labels(spec)[0] == imagenet_labels("wnid")
    published = dataclasses.replace(spec, provenance=Provenance(source="published"))
    assert default_labels(published) == (imagenet_labels("wnid"), "ImageNet in the order of WordNet ids")


def test_names_in_the_other_order_than_the_weights_are_refused(
    make: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    from cspdeploy.nets.registry import find_network, spec_of

    for order in ("wnid", "devkit"):
        (tmp_path / f"{order}.names").write_text("\n".join(imagenet_labels(order)))
    cfg, weights = make(CLASSIFIER.format(classes=1000))
    with pytest.raises(InputError, match="another order than the weights': Darknet's weights"):
        read_names(tmp_path / "wnid.names", spec_of_cfg(cfg), str(weights))
    assert read_names(tmp_path / "devkit.names", spec_of_cfg(cfg), str(weights)) == imagenet_labels("devkit")
    published = spec_of(find_network("cspdarknet53"), provenance=Provenance(source="published"))
    with pytest.raises(InputError, match="another order than the weights': the published checkpoint"):
        read_names(tmp_path / "devkit.names", published, "model.safetensors")
    assert read_names(tmp_path / "wnid.names", published, "model.safetensors") == imagenet_labels("wnid")


def test_labels_of_a_model_folder_follow_classes_that_were_reordered(photos: Path, tmp_path: Path) -> None:
    """Darknet weights in place of the folder's own: its 1000 labels are not ImageNet's, the reordering is."""
    from cspdeploy.core.model_folder import write_spec, write_text
    from cspdeploy.nets.darknet.form import native_to_cfg
    from cspdeploy.nets.registry import NETWORKS, spec_of
    from cspdeploy.pipeline.source import resolve_source

    network = NETWORKS["csdarknet53"]
    folder, weights = tmp_path / "models" / "mine", tmp_path / "mine.weights"
    folder.mkdir(parents=True)
    write_spec(folder, spec_of(network, name="mine"))
    write_text(folder / "labels.txt", "\n".join(f"bolt {i}" for i in range(1000)) + "\n")
    write_darknet(weights, DarknetNet(native_to_cfg(network.config, num_classes=1000)))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not ImageNet's"):
        resolve_source("mine", models=tmp_path / "models", weights=str(weights), images=photos, size_px=(32, 32))


def test_manifest_holds_the_whole_network(
    make: Callable[[str], tuple[Path, Path]], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cfg itself may go: the bundle is verified from its manifest and the weights."""
    monkeypatch.setattr(simplify, "_CHILD", ["false"])
    cfg, weights = make(CLASSIFIER.format(classes=5))
    request = ExportRequest(model=str(cfg), weights=str(weights), calibration=photos, output=tmp_path / "out")
    folder = Path(export_bundle(request).folder)
    cfg.unlink()
    shutil.rmtree(photos)
    network = json.loads((folder / "manifest.json").read_text())["spec"]["network"]
    assert network["family"] == "darknet"
    rows = verify_bundles([folder], VerifySettings(isolate=False, latency=None)).rows
    assert {row.verdict for row in rows} == {"pass"}


def test_cfg_called_as_a_registry_network_is_not_taken_for_it(
    make: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    cfg, _ = make(CLASSIFIER.format(classes=1000))
    assert spec_of_cfg(cfg.rename(tmp_path / "csdarknet53.cfg")).name == "csdarknet53-cfg"


@pytest.mark.usefixtures("without_simplifier")
def test_golden_images_of_a_detector_are_not_square(
    make: Callable[[str], tuple[Path, Path]], photos: Path, tmp_path: Path
) -> None:
    """The preprocess row would prove nothing of a letterbox on square images."""
    cfg, weights = make(DETECTOR.replace("width=48", "width=32"))
    request = ExportRequest(model=str(cfg), weights=str(weights), calibration=photos, output=tmp_path / "out")
    golden = read_golden(Path(export_bundle(request).folder) / "golden.npz")
    assert golden.images.shape[1:] == (64, 85, 3)
    borders = golden.x_NCHW[:, :, [0, 1, 2, -3, -2, -1]]
    assert np.allclose(borders, 128 / 255, atol=1e-6)


def test_assumed_labels_are_said(
    make: Callable[[str], tuple[Path, Path]], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simplify, "_CHILD", ["false"])
    cfg, weights = make(CLASSIFIER.format(classes=1000))
    request = ExportRequest(model=str(cfg), weights=str(weights), calibration=photos, output=tmp_path / "out")
    report = export_bundle(request)
    assert "assumed" in report.manifest.options["labels"]
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render_steps(report.folder, report.manifest))
    assert "labels: ImageNet in Darknet's order, assumed: give --names FILE" in console.export_text()
