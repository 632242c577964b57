"""Where a model's weights are, and the network with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from cspdeploy.core.bundle import file_sha256
from cspdeploy.core.errors import CspDeployError, InputError
from cspdeploy.core.model_folder import SPEC_FILE, WEIGHTS_FILE
from cspdeploy.core.spec import ModelSpec, Provenance
from cspdeploy.nets.checkpoints import CHECKPOINTS
from cspdeploy.nets.hub import fetch_checkpoint
from cspdeploy.nets.loading import is_darknet_file, load_file
from cspdeploy.nets.registry import NETWORKS, build, find_network, spec_of
from cspdeploy.nets.weights import load_weights, read_state_dict

__all__ = ["RANDOM_WEIGHTS", "load_trained", "locate_weights", "make_untrained"]

RANDOM_WEIGHTS = "random"
RANDOM_SEED = 0
HEAD_BIASES = ("head.fc.bias", "fc.bias", "classifier.bias")
"""Of the published layouts: its length is the number of classes."""


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
    return spec.name in NETWORKS and spec.network.family == find_network(spec.name).family


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


def load_trained(spec: ModelSpec, path: Path, *, size_px: tuple[int, int] | None) -> tuple[ModelSpec, nn.Module]:
    """The network with the weights of `path`. A checkpoint of a named network brings its own number of classes.

    Raises:
        InputError: the file cannot be read, does not fit, or is not the one that spec.json describes.
    """
    if is_darknet_file(path):
        model = build(spec)
        load_file(model, path)
    else:
        tensors = read_state_dict(path)
        num_classes = next((len(tensors[key]) for key in HEAD_BIASES if key in tensors and tensors[key].ndim == 1), 0)
        if _is_named(spec) and num_classes not in (0, spec.num_classes):
            # Of other classes, so not the model folder's, but the network's own.
            network = spec_of(find_network(spec.name))
            contract = network.preprocess.with_size(*size_px) if size_px else network.preprocess
            spec = dataclasses.replace(
                network, num_classes=num_classes, preprocess=contract, provenance=spec.provenance
            )  # fmt: skip
        model = build(spec)
        load_weights(model, tensors, source=str(path))
    sha256, provenance = file_sha256(path), spec.provenance
    if provenance.weights_sha256 not in ("", sha256):
        raise InputError(
            f"{path}: not the weights that {SPEC_FILE} describes (SHA-256 differs)",
            fix=f"restore the file, or give --weights {path} to take it as it is, without the recorded accuracy",
        )
    return dataclasses.replace(spec, provenance=dataclasses.replace(provenance, weights_sha256=sha256)), model
