from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cspdeploy.core.bundle import file_sha256
from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import read_spec, write_spec
from cspdeploy.core.spec import Accuracy, ModelSpec
from cspdeploy.nets.cspnet import CspNetConfig
from cspdeploy.nets.hub import FetchedCheckpoint
from cspdeploy.nets.registry import NETWORKS, Network, build
from cspdeploy.nets.weights import write_safetensors
from cspdeploy.pipeline import images as real
from cspdeploy.pipeline import weights as located
from cspdeploy.pipeline.source import Source, resolve_source

Resolve = Callable[..., Source]


@pytest.fixture
def models(tiny_models: Path, tmp_path: Path) -> Path:
    """A models folder that a test may change."""
    return Path(shutil.copytree(tiny_models, tmp_path / "models"))


@pytest.fixture
def resolve(models: Path) -> Resolve:
    def call(
        name: str = "tiny",
        *,
        weights: Path | str | None = None,
        images: Path | None = None,
        size_px: tuple[int, int] | None = None,
    ) -> Source:
        given = None if weights is None else str(weights)
        return resolve_source(name, models=models, weights=given, images=images, size_px=size_px)

    return call


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of every sort and size, one of them in a folder below."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, mode, size in (
        ("a.png", "RGB", (33, 57)), ("b.jpg", "L", (57, 33)), ("c.png", "RGBA", (40, 40)), ("d.png", "P", (31, 8)),
        ("e.png", "1", (5, 3)), ("f.png", "RGB", (1, 1)), ("g.png", "RGB", (4, 1)), ("below/h.bmp", "RGB", (100, 7)),
    ):  # fmt: skip
        pixels = rng.integers(0, 256, (size[1], size[0], 4), np.uint8)
        Image.fromarray(pixels, "RGBA").convert("RGB").convert(mode).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def _add_network(monkeypatch: pytest.MonkeyPatch, config: CspNetConfig, spec: ModelSpec, *, checkpoint: str) -> None:
    """A network of the registry that is as small as the tiny one."""
    network = Network(
        name="tinynet", family="cspnet", config=config, num_classes=10, preprocess=spec.preprocess,
        checkpoint=checkpoint, published=None, summary="for tests", kind="csp",
    )  # fmt: skip
    monkeypatch.setitem(NETWORKS, "tinynet", network)


def _save_seeded(path: Path, spec: ModelSpec, seed: int) -> Path:
    torch.manual_seed(seed)
    write_safetensors(path, build(spec), dtype=torch.float32)
    return path


def _first_weight(model: nn.Module) -> torch.Tensor:
    return next(iter(model.state_dict().values()))


# --- which weights ---


def test_weights_of_the_model_folder(resolve: Resolve, models: Path, tiny_spec: ModelSpec) -> None:
    found = resolve()
    path = models / "tiny" / "model.safetensors"
    assert found.weights == str(path)
    provenance = found.spec.provenance
    assert (provenance.source, provenance.origin, provenance.weights_sha256) == ("user", "test", file_sha256(path))
    assert found.spec.network == tiny_spec.network
    assert found.labels == tuple(f"label {i}" for i in range(10))
    assert not found.model.training
    torch.manual_seed(0)
    assert torch.equal(_first_weight(found.model), _first_weight(build(tiny_spec)))


def test_given_weights_come_before_those_of_the_folder(
    resolve: Resolve, models: Path, tmp_path: Path, tiny_spec: ModelSpec
) -> None:
    accuracy = Accuracy(dataset="d/test", num_images=10, top1=0.9, top5=1.0)
    spec = read_spec(models / "tiny")
    provenance = dataclasses.replace(spec.provenance, source="trained", accuracy=accuracy, weights_sha256="0" * 64)
    write_spec(models / "tiny", dataclasses.replace(spec, provenance=provenance))
    mine = _save_seeded(tmp_path / "mine.safetensors", tiny_spec, 5)
    found = resolve(weights=mine)
    assert (found.spec.provenance.source, found.spec.provenance.origin) == ("user", "mine.safetensors")
    assert found.spec.provenance.weights_sha256 == file_sha256(mine)
    assert found.spec.provenance.accuracy is None  # which is not theirs
    torch.manual_seed(5)
    assert torch.equal(_first_weight(found.model), _first_weight(build(tiny_spec)))


def test_random_weights_only_when_asked_and_then_said(resolve: Resolve) -> None:
    first, second = resolve(weights="random"), resolve(weights="random")
    assert first.weights == "random"
    assert first.spec.provenance.untrained
    assert (first.spec.provenance.weights_sha256, first.spec.provenance.accuracy) == ("", None)
    states = [found.model.state_dict() for found in (first, second)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_published_checkpoint_where_there_is_no_folder(
    resolve: Resolve,
    tmp_path: Path,
    photos: Path,
    tiny_config: CspNetConfig,
    tiny_spec: ModelSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _add_network(monkeypatch, tiny_config, tiny_spec, checkpoint="tinynet.tag")
    path = _save_seeded(tmp_path / "fetched.safetensors", tiny_spec, 6)
    fetched = FetchedCheckpoint(path=path, sha256=file_sha256(path), origin="hf://somebody/tinynet.tag")
    asked: list[str] = []

    def fetch(tag: str) -> FetchedCheckpoint:
        asked.append(tag)
        return fetched

    monkeypatch.setattr(located, "fetch_checkpoint", fetch)
    found = resolve("tinynet", images=photos)
    assert asked == ["tinynet.tag"]
    assert (found.spec.provenance.source, found.spec.provenance.origin) == ("published", fetched.origin)
    assert found.labels == tuple(f"class {i}" for i in range(10))
    # Given weights and a model folder of that name come before it: the hub is not asked again.
    assert resolve("tinynet", images=photos, weights=path).spec.provenance.source == "user"
    models = tmp_path / "models"
    (models / "tiny").rename(models / "tinynet")
    assert resolve("tinynet").weights == str(models / "tinynet" / "model.safetensors")
    assert asked == ["tinynet.tag"]


def test_hub_that_cannot_be_reached_is_an_error_with_the_ways_out(
    resolve: Resolve, photos: Path, tiny_config: CspNetConfig, tiny_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(tag: str) -> FetchedCheckpoint:
        raise InputError(f"checkpoint '{tag}': the hub cannot be reached")

    _add_network(monkeypatch, tiny_config, tiny_spec, checkpoint="tinynet.tag")
    monkeypatch.setattr(located, "fetch_checkpoint", fetch)
    with pytest.raises(InputError, match=r"models/tinynet/ is not here, and .* the hub cannot be reached") as caught:
        resolve("tinynet", images=photos)
    assert all(way in caught.value.fix for way in ("cspdeploy train tinynet", "--weights FILE", "--weights random"))


def test_network_without_a_checkpoint_is_never_random(
    resolve: Resolve, photos: Path, tiny_config: CspNetConfig, tiny_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add_network(monkeypatch, tiny_config, tiny_spec, checkpoint="")
    with pytest.raises(InputError, match="no checkpoint of it is published"):
        resolve("tinynet", images=photos)


def test_checkpoint_of_a_network_brings_its_number_of_classes(
    resolve: Resolve,
    tmp_path: Path,
    photos: Path,
    tiny_config: CspNetConfig,
    tiny_spec: ModelSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _add_network(monkeypatch, tiny_config, tiny_spec, checkpoint="")
    three = _save_seeded(tmp_path / "three.safetensors", dataclasses.replace(tiny_spec, num_classes=3), 0)
    found = resolve("tinynet", images=photos, weights=three)
    assert (found.spec.num_classes, len(found.labels)) == (3, 3)
    with pytest.raises(InputError, match=r"head\.fc\.weight is \[3, 48\], expected \[10, 48\]"):
        resolve("tiny", weights=three)  # the folder's spec says 10, and has their names


def test_weights_that_are_not_those_of_the_spec(resolve: Resolve, models: Path) -> None:
    spec = read_spec(models / "tiny")
    provenance = dataclasses.replace(spec.provenance, weights_sha256="0" * 64)
    write_spec(models / "tiny", dataclasses.replace(spec, provenance=provenance))
    with pytest.raises(InputError, match=r"not the weights that spec\.json describes") as caught:
        resolve()
    path = models / "tiny" / "model.safetensors"
    assert f"--weights {path}" in caught.value.fix
    assert resolve(weights=path).spec.provenance.source == "user"


def test_weights_of_another_architecture_are_listed_key_by_key(
    resolve: Resolve, tmp_path: Path, tiny_config: CspNetConfig, tiny_spec: ModelSpec
) -> None:
    config = json.loads(json.dumps(tiny_spec.network.config))
    config["stages"][1]["depth"] = 2
    config["stem"]["out_chs"] = [12]
    network = dataclasses.replace(tiny_spec.network, config=config)
    other = _save_seeded(tmp_path / "other.safetensors", dataclasses.replace(tiny_spec, network=network), 0)
    with pytest.raises(InputError, match="weights of another network") as caught:
        resolve(weights=other)
    assert str(other) in caught.value.message
    assert "unexpected stages.1.blocks.1." in caught.value.message
    assert "more" in caught.value.message


def test_model_folder_without_weights(resolve: Resolve, models: Path) -> None:
    (models / "tiny" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: not found"):
        resolve()


# --- which model ---


def test_model_named_by_its_path(resolve: Resolve, models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(models / "tiny", folder)
    found = resolve(str(folder))
    assert found.weights == str(folder / "model.safetensors")
    assert found.spec.name == "renamed"


@pytest.mark.parametrize("name", ["../evil", "/evil", "..", "", "a b"])
def test_name_in_the_spec_cannot_lead_elsewhere(resolve: Resolve, models: Path, name: str) -> None:
    path = models / "tiny" / "spec.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "name": name}))
    with pytest.raises(InputError, match=r"spec\.json.*name: got"):
        resolve()


def test_folder_whose_name_cannot_name_files(resolve: Resolve, models: Path) -> None:
    (models / "tiny").rename(models / "my model")
    with pytest.raises(InputError, match="my model") as caught:
        resolve("my model")
    assert caught.value.fix


def test_unknown_model_suggests_and_lists_what_there_is(resolve: Resolve) -> None:
    with pytest.raises(InputError, match=r"model 'cspdarknet35': unknown") as caught:
        resolve("cspdarknet35")
    assert "did you mean 'cspdarknet53'?" in caught.value.fix
    assert caught.value.message.endswith("models: tiny")


def test_unknown_model_suggests_a_folder_of_a_near_name(resolve: Resolve) -> None:
    with pytest.raises(InputError, match="unknown") as caught:
        resolve("tinny")
    assert "did you mean 'tiny'?" in caught.value.fix


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 1}', '{"schema_version": 7}'])
def test_broken_spec_is_named(resolve: Resolve, models: Path, content: str) -> None:
    (models / "tiny" / "spec.json").write_text(content)
    with pytest.raises(InputError, match=r"tiny/spec\.json"):
        resolve()


def test_labels_must_be_as_many_as_classes(resolve: Resolve, models: Path) -> None:
    (models / "tiny" / "labels.txt").write_text("one\ntwo\n")
    with pytest.raises(InputError, match=r"labels\.txt: got 2 labels, expected 10"):
        resolve()


def test_labels_may_be_missing(resolve: Resolve, models: Path) -> None:
    (models / "tiny" / "labels.txt").unlink()
    assert resolve().labels == tuple(f"class {i}" for i in range(10))


def test_size_is_changed_and_nothing_else(resolve: Resolve) -> None:
    before, after = resolve().spec, resolve(size_px=(48, 40)).spec
    assert (after.preprocess.height_px, after.preprocess.width_px) == (48, 40)
    contract = dataclasses.replace(after.preprocess, height_px=32, width_px=32)
    assert dataclasses.replace(after, preprocess=contract) == before


# --- which images ---


def test_calibration_images_of_the_folder(resolve: Resolve, models: Path) -> None:
    found = resolve()
    assert (found.images.shape, found.images.dtype) == ((40, 28, 28), np.uint8)
    digest = file_sha256(models / "tiny" / "calibration.npz")[:12]
    assert found.images_origin == f"{models / 'tiny' / 'calibration.npz'} ({digest})"


def test_no_images_is_an_error(resolve: Resolve, models: Path) -> None:
    (models / "tiny" / "calibration.npz").unlink()
    with pytest.raises(InputError, match="no real images") as caught:
        resolve()
    assert "--calib DIR" in caught.value.fix


def test_folder_of_images_of_every_sort_and_size(resolve: Resolve, photos: Path) -> None:
    found = resolve(images=photos)
    assert (found.images.shape, found.images.dtype) == ((8, 64, 64, 3), np.uint8)
    assert found.images_origin == f"{photos} (8 images)"
    grey = [bool((image == image[..., :1]).all()) for image in found.images]
    assert grey == [
        False,
        True,
        False,
        False,
        False,
        True,
        False,
        False,
    ]  # in sorted order, the folder below comes third


def test_centre_is_taken_and_the_ratio_kept(resolve: Resolve, tmp_path: Path) -> None:
    """A white square in the middle of a wide black image fills the thumbnail, but for what bleeds in at its edges."""
    folder = tmp_path / "wide"
    folder.mkdir()
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(folder / "wide.png")
    (thumbnail,) = resolve(images=folder).images
    assert (thumbnail[:, 4:-4] > 250).all()


def test_no_more_images_than_needed_and_from_all_over(
    resolve: Resolve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(11):
        Image.new("L", (8, 8), 20 * i).save(folder / f"{i:02}.png")
    monkeypatch.setattr(real, "MAX_IMAGES", 4)
    images = resolve(images=folder).images
    assert images[:, 0, 0, 0].tolist() == [0, 40, 80, 120]


@pytest.mark.parametrize("kind", ["empty", "missing", "file", "no images"])
def test_folder_without_images(resolve: Resolve, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "calib"
    if kind == "file":
        folder.write_bytes(b"")
    elif kind != "missing":
        folder.mkdir()
    if kind == "no images":
        (folder / "readme.txt").write_text("none here")
    with pytest.raises(InputError, match="calib") as caught:
        resolve(images=folder)
    assert caught.value.fix


def test_broken_image_is_named(resolve: Resolve, photos: Path) -> None:
    (photos / "c.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"c\.png: not an image"):
        resolve(images=photos)


def test_pulled_checkpoint_is_found_under_the_name_of_its_network(models: Path, resolve: Resolve) -> None:
    """`pull cspdarknet53.ra_in1k`, then `export cspdarknet53`."""
    (models / "tiny").rename(models / "cspdarknet53.ra_in1k")
    found = resolve("cspdarknet53")
    assert found.spec.name == "cspdarknet53.ra_in1k"
    assert found.labels_origin == str(models / "cspdarknet53.ra_in1k" / "labels.txt")
