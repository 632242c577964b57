"""Class names in the order of a network's outputs: that of its weights, never another."""

from __future__ import annotations

from pathlib import Path

from cspdeploy.core.errors import InputError
from cspdeploy.core.imagenet import NUM_IMAGENET_CLASSES, imagenet_labels, recognise_order, wnid_from_devkit
from cspdeploy.core.model_folder import read_labels
from cspdeploy.core.spec import ModelSpec
from cspdeploy.nets.loading import is_darknet_file
from cspdeploy.pipeline.darknet import DARKNET_FAMILY

__all__ = ["default_labels", "read_names"]


def default_labels(spec: ModelSpec) -> tuple[str, ...]:
    """ImageNet's names for 1000 classes that are known to be ImageNet's, else "class <index>".

    Networks of the registry have the classes in the order of sorted WordNet ids, as their checkpoints; one that was
    built from a Darknet cfg has them in the order of the ILSVRC development kit, as its weights.
    """
    if spec.num_classes == NUM_IMAGENET_CLASSES and spec.provenance.source in ("published", "user"):
        if spec.network.family == DARKNET_FAMILY:
            return imagenet_labels("devkit") if spec.task == "classify" else _numbered(spec)
        return imagenet_labels("wnid")
    return _numbered(spec)


def _numbered(spec: ModelSpec) -> tuple[str, ...]:
    return tuple(f"class {index}" for index in range(spec.num_classes))


def read_names(path: Path, spec: ModelSpec, weights: str) -> tuple[str, ...]:
    """The user's class names, one a line.

    Darknet weights that were read into a network of the registry had their 1000 classes reordered; names in Darknet's
    order are reordered with them.

    Raises:
        InputError: another number of names than classes, or 1000 names that are not ImageNet's where the classes were
            reordered as ImageNet's.
    """
    names = read_labels(path, num_classes=spec.num_classes)
    reordered = is_darknet_file(Path(weights)) and spec.network.family != DARKNET_FAMILY
    if not reordered or spec.num_classes != NUM_IMAGENET_CLASSES:
        return names
    order = recognise_order(names)
    if order is None:
        raise InputError(
            f"{path}: got {len(names)} names that are not ImageNet's, of which '{spec.name}' is a network",
            fix="give the .cfg instead of the network's name",
        )
    return tuple(names[index] for index in wnid_from_devkit()) if order == "devkit" else names
