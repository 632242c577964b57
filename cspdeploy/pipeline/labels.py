"""Class names in the order of a network's outputs: that of its weights, never another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cspdeploy.core.coco import COCO_LABELS, NUM_COCO_CLASSES
from cspdeploy.core.errors import InputError
from cspdeploy.core.imagenet import (
    NUM_IMAGENET_CLASSES,
    ClassOrder,
    imagenet_labels,
    recognise_order,
    wnid_from_devkit,
)
from cspdeploy.core.model_folder import read_labels
from cspdeploy.core.spec import ModelSpec
from cspdeploy.nets.loading import is_darknet_file
from cspdeploy.pipeline.darknet import DARKNET_FAMILY

__all__ = ["default_labels", "read_names", "with_classes_of"]

DETECTOR_FAMILY = "yolov4"


def default_labels(spec: ModelSpec) -> tuple[tuple[str, ...], str]:
    """Names where no file gives them, and where they come from.

    ImageNet's for a classifier of 1000 classes, COCO's for a detector of 80, else "class <index>".

    Networks of the registry have the classes in the order of sorted WordNet ids, as their checkpoints; one that was
    built from a Darknet cfg has them in the order of the ILSVRC development kit, as its weights. That the 1000 classes
    of a user's own weights are ImageNet's, or the 80 COCO's, is an assumption, and the origin says so.
    """
    provenance, from_cfg = spec.provenance, spec.network.family == DARKNET_FAMILY
    known = provenance.source in ("published", "user")
    assumed = "" if provenance.source == "published" else ", assumed: give --names FILE for other classes"
    if known and spec.task == "detect" and spec.num_classes == NUM_COCO_CLASSES:
        return COCO_LABELS, f"COCO{assumed}"
    if not known or spec.task in ("detect", "segment") or spec.num_classes != NUM_IMAGENET_CLASSES:
        return tuple(f"class {index}" for index in range(spec.num_classes)), "numbered"
    order: ClassOrder = "devkit" if from_cfg else "wnid"
    words = {"wnid": "in the order of WordNet ids", "devkit": "in Darknet's order"}[order]
    return imagenet_labels(order), f"ImageNet {words}{assumed}"


def read_names(path: Path, spec: ModelSpec, weights: str) -> tuple[str, ...]:
    """Class names of a file, one a line: the user's, or a model folder's.

    Darknet weights that were read into a network of the registry had their 1000 classes reordered; names in Darknet's
    order are reordered with them.

    Raises:
        InputError: another number of names than classes, 1000 names that are not ImageNet's where the classes were
            reordered as ImageNet's, or ImageNet's names in the order that the weights do not have.
    """
    names = read_labels(path, num_classes=spec.num_classes)
    order = recognise_order(names)
    if spec.task == "detect":
        return names
    if spec.num_classes == NUM_IMAGENET_CLASSES and is_darknet_file(Path(weights)):
        if spec.network.family != DARKNET_FAMILY:
            return _reordered(names, order, path, spec)
        _refuse(order, "wnid", path, "Darknet's weights have the ILSVRC devkit's order, 'kit fox' first")
    elif spec.provenance.source == "published":
        _refuse(order, "devkit", path, "the published checkpoint has that of sorted WordNet ids, 'tench' first")
    return names


def with_classes_of(names: Path, spec: ModelSpec) -> ModelSpec:
    """A detector of the registry for as many classes as a file has names: a user's own, where no weights say so yet.

    Any other model is given back as it is: its classes are its weights' or its cfg's. So is any for a file that cannot
    be read, which `read_names` then says.
    """
    if spec.network.family != DETECTOR_FAMILY:
        return spec
    try:
        num_names = len(names.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError):
        return spec
    return dataclasses.replace(spec, num_classes=max(1, num_names))


def _reordered(names: tuple[str, ...], order: ClassOrder | None, path: Path, spec: ModelSpec) -> tuple[str, ...]:
    if order is None:
        raise InputError(
            f"{path}: got {len(names)} names that are not ImageNet's, of which '{spec.name}' is a network",
            fix="give the .cfg instead of the network's name",
        )
    return tuple(names[index] for index in wnid_from_devkit()) if order == "devkit" else names


def _refuse(order: ClassOrder | None, wrong: ClassOrder, path: Path, why: str) -> None:
    """Names in the other order would be wrong for every image."""
    if order == wrong:
        raise InputError(f"{path}: ImageNet's names in another order than the weights': {why}", fix="leave out --names")
