"""Where a model's weights are, and the network with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from cspdeploy.core.bundle import file_sha256
from cspdeploy.core.codec import from_json
from cspdeploy.core.errors import CspDeployError, InputError
from cspdeploy.core.model_folder import SPEC_FILE, WEIGHTS_FILE
from cspdeploy.core.spec import ModelSpec, Provenance
from cspdeploy.nets.checkpoints import CHECKPOINTS
from cspdeploy.nets.darknet.detector_form import detector_form, num_classes_of_file
from cspdeploy.nets.darknet.weights import expected_bytes
from cspdeploy.nets.hub import fetch_checkpoint
from cspdeploy.nets.loading import is_darknet_file, load_file
from cspdeploy.nets.registry import build, find_network, is_network, spec_of
from cspdeploy.nets.weights import load_weights, read_state_dict
from cspdeploy.nets.yolov4 import YoloV4Config

__all__ = ["ASSUMED_ANCHORS", "RANDOM_WEIGHTS", "assumes_anchors", "load_trained", "locate_weights", "make_untrained"]

ASSUMED_ANCHORS = "assumed the published ones; give the .cfg if yours differ"
"""Of anchors and scale_x_y, which a Darknet file of weights does not hold."""
RANDOM_WEIGHTS = "random"
RANDOM_SEED = 0
HEAD_BIASES = ("head.fc.bias", "fc.bias", "classifier.bias")
"""Of the published layouts: its length is the number of classes."""
DETECTOR_BIAS = "heads.0.pred.bias"
"""Its length is anchors times (5 + classes)."""


def make_untrained(spec: ModelSpec) -> tuple[ModelSpec, nn.Module]:
    """The network with seeded random weights, and its description, which says so."""
    torch.manual_seed(RANDOM_SEED)
    model = build(spec)
    _randomise_norms(model)
    return dataclasses.replace(spec, provenance=Provenance(source="random", origin=f"seed {RANDOM_SEED}")), model


def _randomise_norms(model: nn.Module) -> None:
    """Batch norms that do something: an identity would hide faults that a trained network shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]


def locate_weights(spec: ModelSpec, folder: Path | None, weights: str | None) -> tuple[str, Provenance]:
    """The file and what is known of it: `weights` if given, the model folder's, the published checkpoint.

    Raises:
        InputError: none of them is there.
    """
    if weights is not None:
        return weights, Provenance(source="user", origin=Path(weights).name)
    if folder is not None:
        return str(folder / WEIGHTS_FILE), spec.provenance
    if not _is_named(spec):
        raise InputError(
            f"model '{spec.name}': no weights", fix="give --weights FILE, or --weights random for an UNTRAINED file"
        )
    return _published(spec.name)


def _is_named(spec: ModelSpec) -> bool:
    """Whether it is a network of the registry, and not only called as one: a cfg may have any file name."""
    return is_network(spec.name) and spec.network.family == find_network(spec.name).family


def _published(name: str) -> tuple[str, Provenance]:
    network = find_network(name)
    train = f"cspdeploy train {name} --data DIR"
    if not network.checkpoint:
        raise InputError(
            f"model '{name}': no weights: models/{name}/ is not here, and no checkpoint of it is published",
            fix=f"{train}, or give --weights FILE, or --weights random for an UNTRAINED file",
        )
    try:
        fetched = fetch_checkpoint(network.checkpoint)
    except CspDeployError as error:
        raise InputError(
            f"model '{name}': no weights: models/{name}/ is not here, and {error.message}",
            fix=f"{train}, or give --weights FILE, or --weights random for an UNTRAINED file",
        ) from error
    known = CHECKPOINTS.get(network.checkpoint)
    licence = known.licence if known else ""
    provenance = Provenance(
        source="published", origin=fetched.origin, weights_sha256=fetched.sha256, licence=licence
    )  # fmt: skip
    return str(fetched.path), provenance


def load_trained(
    spec: ModelSpec, path: Path, *, size_px: tuple[int, int] | None, num_names: int | None = None
) -> tuple[ModelSpec, nn.Module]:
    """The network with the weights of `path`. A checkpoint of a named network brings its own number of classes.

    Args:
        num_names: of the classes, where the user gave names. A Darknet file must then be as long as that takes: one
            that was cut off is as long as one of fewer classes.

    Raises:
        InputError: the file cannot be read, does not fit, or is not the one that spec.json describes.
    """
    if is_darknet_file(path):
        spec = _with_classes(spec, _classes_of_darknet_file(path, spec, num_names), size_px)
        model = build(spec)
        load_file(model, path)
    else:
        tensors = read_state_dict(path)
        spec = _with_classes(spec, _classes_of_tensors(tensors, spec), size_px)
        model = build(spec)
        load_weights(model, tensors, source=str(path))
    sha256, provenance = file_sha256(path), spec.provenance
    if provenance.weights_sha256 not in ("", sha256):
        raise InputError(
            f"{path}: not the weights that {SPEC_FILE} describes (SHA-256 differs)",
            fix=f"restore the file, or give --weights {path} to take it as it is, without the recorded accuracy",
        )
    return dataclasses.replace(spec, provenance=dataclasses.replace(provenance, weights_sha256=sha256)), model


def _with_classes(spec: ModelSpec, num_classes: int, size_px: tuple[int, int] | None) -> ModelSpec:
    """A named network with as many classes as its weights have; 0 if that is not known."""
    if num_classes in (0, spec.num_classes) or not _is_named(spec):
        return spec
    # Of other classes, so not the model folder's, but the network's own.
    network = spec_of(find_network(spec.name))
    contract = network.preprocess.with_size(*size_px) if size_px else network.preprocess
    return dataclasses.replace(network, num_classes=num_classes, preprocess=contract, provenance=spec.provenance)


def _classes_of_tensors(tensors: dict[str, torch.Tensor], spec: ModelSpec) -> int:
    if spec.detection is None:
        return next((len(tensors[key]) for key in HEAD_BIASES if key in tensors and tensors[key].ndim == 1), 0)
    bias = tensors.get(DETECTOR_BIAS)
    num_anchors = len(spec.detection.heads[0].anchors)
    if bias is None or bias.ndim != 1 or len(bias) % num_anchors:
        return 0
    return max(0, len(bias) // num_anchors - 5)


def _classes_of_darknet_file(path: Path, spec: ModelSpec, num_names: int | None) -> int:
    """Of a native detector's; a cfg has its own number, and the classifiers' are ImageNet's.

    Raises:
        InputError: the file is not as long as so many classes take.
    """
    if spec.network.family != "yolov4":
        return 0
    config = from_json(YoloV4Config, spec.network.config, where="$.network.config")
    try:
        found = num_classes_of_file(path, config)
        wanted = None if num_names is None else expected_bytes(detector_form(config, num_classes=num_names).config)
    except InputError:  # of a network that Darknet does not have: said where the file is loaded
        return 0
    num_bytes = path.stat().st_size if path.is_file() else 0
    if num_bytes and wanted is not None and found != num_names:
        raise InputError(
            f"{path}: got {num_bytes:,} bytes, expected {wanted:,} for the {num_names} classes of --names",
            fix="get the file again, whole, or give the names of its own classes",
        )
    return found


def assumes_anchors(spec: ModelSpec, weights: str) -> bool:
    """Whether the file of weights says nothing of anchors and scale_x_y, so that the published ones are taken."""
    return spec.network.family == "yolov4" and is_darknet_file(Path(weights))
