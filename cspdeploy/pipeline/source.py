"""From what the user names (a network, a model folder, weights, images) to a network with weights and real images."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cspdeploy.core.bundle import file_sha256
from cspdeploy.core.errors import CspDeployError, InputError
from cspdeploy.core.model_folder import (
    CALIBRATION_FILE,
    LABELS_FILE,
    SPEC_FILE,
    WEIGHTS_FILE,
    read_calibration,
    read_labels,
    read_spec,
)  # fmt: skip
from cspdeploy.core.preprocess import list_images, load_image, preprocess
from cspdeploy.core.spec import ModelSpec, Provenance
from cspdeploy.nets.hub import fetch_checkpoint
from cspdeploy.nets.registry import NETWORKS, build, find_network, spec_of
from cspdeploy.nets.weights import load_weights, read_state_dict

__all__ = ["RANDOM_WEIGHTS", "Source", "resolve_source"]

RANDOM_WEIGHTS = "random"
RANDOM_SEED = 0
MAX_IMAGES = 512
HEAD_BIAS = "head.fc.bias"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """What an export starts from.

    Attributes:
        model: in evaluation mode, float32.
        weights: as the manifest records them: a path as given, or "random".
        images: real images as stored, `[N, h, w]` or `[N, h, w, 3]` uint8.
        images_origin: where they come from, for the record.
    """

    spec: ModelSpec
    model: nn.Module
    labels: tuple[str, ...]
    weights: str
    images: npt.NDArray[np.uint8]
    images_origin: str


def resolve_source(
    name: str, *, models: Path, weights: str | None, images: Path | None, size_px: tuple[int, int] | None
) -> Source:
    """Find spec, weights, labels and real images.

    Weights in order: `weights` if given; `models/<name>/model.safetensors`; the published checkpoint of a zoo network,
    from the Hugging Face Hub. Untrained weights only where `weights` is "random".

    Args:
        name: a network of the registry, a folder below `models`, or the path of such a folder.
        weights: a file, "random", or None.
        images: a folder of real images; None: the model folder's calibration images.
        size_px: height and width of the input, or None for the model's own.

    Raises:
        InputError: any of these is missing, unknown, or does not fit the others.
    """
    folder = _model_folder(name, models)
    spec = read_spec(folder) if folder else spec_of(find_network(name))
    if folder:
        spec = _renamed(spec, folder.resolve().name)
    if size_px and size_px != (spec.preprocess.height_px, spec.preprocess.width_px):
        # The recorded accuracy is that of the model's own size.
        provenance = dataclasses.replace(spec.provenance, accuracy=None)
        spec = dataclasses.replace(spec, preprocess=spec.preprocess.with_size(*size_px), provenance=provenance)
    pictures, origin = _real_images(spec, folder, images)
    if weights == RANDOM_WEIGHTS:
        spec, model = _untrained(spec)
    else:
        weights, provenance = _locate_weights(spec, folder, weights)
        spec, model = _load(dataclasses.replace(spec, provenance=provenance), Path(weights), size_px=size_px)
    labels = _labels(spec, folder)
    return Source(spec=spec, model=model.eval(), labels=labels, weights=weights, images=pictures, images_origin=origin)


def _renamed(spec: ModelSpec, name: str) -> ModelSpec:
    """A bundle is called as the folder its model came from."""
    try:
        return dataclasses.replace(spec, name=name)
    except ValueError as error:
        raise InputError(f"model folder {error}", fix="rename the folder") from error


def _model_folder(name: str, models: Path) -> Path | None:
    for folder in (models / name, Path(name)):
        if (folder / SPEC_FILE).is_file():
            return folder
    if name in NETWORKS:
        return None
    known = sorted({path.parent.name for path in models.glob(f"*/{SPEC_FILE}")})
    near = difflib.get_close_matches(name, [*NETWORKS, *known], n=1, cutoff=0.4)
    trained = f"; in {models}: {', '.join(known)}" if known else ""
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise InputError(
        f"model '{name}': unknown, networks are {', '.join(NETWORKS)}{trained}", fix=f"{hint}see: cspdeploy list"
    )


def _untrained(spec: ModelSpec) -> tuple[ModelSpec, nn.Module]:
    torch.manual_seed(RANDOM_SEED)
    model = build(spec)
    _randomise_norms(model)
    return dataclasses.replace(spec, provenance=Provenance(source="random", origin=f"seed {RANDOM_SEED}")), model


def _locate_weights(spec: ModelSpec, folder: Path | None, weights: str | None) -> tuple[str, Provenance]:
    if weights is not None:
        return weights, Provenance(source="user", origin=Path(weights).name)
    if folder is not None:
        return str(folder / WEIGHTS_FILE), spec.provenance
    return _published(spec.name)


def _load(spec: ModelSpec, path: Path, *, size_px: tuple[int, int] | None) -> tuple[ModelSpec, nn.Module]:
    """The network with its weights. A checkpoint of a named network brings its own number of classes."""
    tensors = read_state_dict(path)
    head = tensors.get(HEAD_BIAS)
    if spec.name in NETWORKS and head is not None and head.ndim == 1 and len(head) not in (0, spec.num_classes):
        network = spec_of(find_network(spec.name))  # of other classes, so not the model folder's, but the network's own
        contract = network.preprocess.with_size(*size_px) if size_px else network.preprocess
        spec = dataclasses.replace(network, num_classes=len(head), preprocess=contract, provenance=spec.provenance)
    model = build(spec)
    load_weights(model, tensors, source=str(path))
    sha256, provenance = file_sha256(path), spec.provenance
    if provenance.weights_sha256 not in ("", sha256):
        raise InputError(
            f"{path}: not the weights that {SPEC_FILE} describes (SHA-256 differs)",
            fix=f"restore the file, or give --weights {path} to take it as it is, without the recorded accuracy",
        )
    return dataclasses.replace(spec, provenance=dataclasses.replace(provenance, weights_sha256=sha256)), model


def _published(name: str) -> tuple[str, Provenance]:
    network = find_network(name)
    if not network.checkpoint:
        raise InputError(f"model '{name}': no checkpoint is published", fix="give --weights FILE, or train it")
    try:
        fetched = fetch_checkpoint(network.checkpoint)
    except CspDeployError as error:
        raise InputError(
            f"model '{name}': no weights: models/{name}/ is not here, and {error.message}",
            fix=f"cspdeploy train {name} --data DIR, or give --weights FILE, or --weights random for an UNTRAINED file",
        ) from error
    provenance = Provenance(source="published", origin=fetched.origin, weights_sha256=fetched.sha256)
    return str(fetched.path), provenance


def _randomise_norms(model: nn.Module) -> None:
    """Batch norms that do something: an identity would hide faults that a trained network shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]


def _labels(spec: ModelSpec, folder: Path | None) -> tuple[str, ...]:
    if folder is not None and (folder / LABELS_FILE).is_file() and read_spec(folder).num_classes == spec.num_classes:
        return read_labels(folder / LABELS_FILE, num_classes=spec.num_classes)
    return tuple(f"class {index}" for index in range(spec.num_classes))


def _real_images(spec: ModelSpec, folder: Path | None, images: Path | None) -> tuple[npt.NDArray[np.uint8], str]:
    if images is not None:
        paths = list_images(images)
        step = max(1, len(paths) // MAX_IMAGES)
        chosen = paths[::step][:MAX_IMAGES]
        side = 2 * max(spec.preprocess.height_px, spec.preprocess.width_px)
        return np.stack([_thumbnail(path, side) for path in chosen]), f"{images} ({len(chosen)} images)"
    if folder is not None and (folder / CALIBRATION_FILE).is_file():
        path = folder / CALIBRATION_FILE
        return read_calibration(path), f"{path} ({hashlib.sha256(path.read_bytes()).hexdigest()[:12]})"
    raise InputError(
        f"model '{spec.name}': no real images to prove the export on", fix="give --calib DIR, a folder of images"
    )


def _thumbnail(path: Path, side_px: int) -> npt.NDArray[np.uint8]:
    """The centre square at twice the input's side, so that images of any size stack into one array."""
    image = load_image(path)
    half = min(image.size) / 2
    centre_x, centre_y = image.width / 2, image.height / 2
    box = (round(centre_x - half), round(centre_y - half), round(centre_x + half), round(centre_y + half))
    return np.asarray(image.resize((side_px, side_px), box=box))


def prepare(images: npt.NDArray[np.uint8], spec: ModelSpec) -> npt.NDArray[np.float32]:
    """Stored images to the network's input."""
    return preprocess(list(images), spec.preprocess)
