"""From what the user names (a network, a model folder, a cfg, weights, images) to a network with weights and images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from cspdeploy.core.bundle import file_sha256
from cspdeploy.core.detection.spec import Decode, SuppressionOptions
from cspdeploy.core.errors import InputError, did_you_mean
from cspdeploy.core.model_folder import LABELS_FILE, SPEC_FILE, WEIGHTS_FILE, read_spec
from cspdeploy.core.spec import ModelSpec
from cspdeploy.nets.checkpoints import published_for
from cspdeploy.nets.exported import as_exported, with_features
from cspdeploy.nets.registry import NETWORKS, find_network, is_network, spec_of
from cspdeploy.pipeline.darknet import DARKNET_FAMILY, is_cfg, resize_cfg, spec_of_cfg
from cspdeploy.pipeline.images import real_images
from cspdeploy.pipeline.labels import default_labels, read_names, with_classes_of
from cspdeploy.pipeline.weights import RANDOM_WEIGHTS, load_trained, locate_weights, make_untrained

__all__ = ["Source", "resized", "resolve_source", "with_decode"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """What an export starts from.

    Attributes:
        model: gives `spec.outputs`; in evaluation mode, float32.
        labels_origin: a file, or what was assumed of the classes.
        weights: as the manifest records them: a path as given, or "random".
        images: real images as stored, `[N, h, w]` or `[N, h, w, 3]` uint8.
        images_origin: where they come from, for the record.
    """

    spec: ModelSpec
    model: nn.Module
    labels: tuple[str, ...]
    labels_origin: str
    weights: str
    images: npt.NDArray[np.uint8]
    images_origin: str


def resolve_source(
    name: str,
    *,
    models: Path,
    weights: str | None,
    images: Path | None,
    size_px: tuple[int, int] | None,
    names: Path | None = None,
    strides: tuple[int, ...] | None = None,
    decode: Decode | None = None,
    suppression: SuppressionOptions | None = None,
) -> Source:
    """Find spec, weights, labels and real images.

    Weights in order: `weights` if given; `models/<name>/model.safetensors`; the published checkpoint of a zoo network,
    from the Hugging Face Hub. Untrained weights only where `weights` is "random".

    Args:
        name: a network of the registry, a folder below `models`, the path of such a folder, or a Darknet cfg.
        weights: a file, "random", or None.
        images: a folder of real images; None: the model folder's calibration images.
        size_px: height and width of the input, or None for the model's own.
        names: file of class names, one a line in the order of the weights; None: the model's own.
        strides: feature maps of these strides are wanted instead of classes; empty for the usual ones.
        decode: what the files of a detector give; None: what its description says.
        suppression: what is to be another one of a detector's; None: likewise.

    Raises:
        InputError: any of these is missing, unknown, or does not fit the others.
    """
    folder, spec = _describe(name, models)
    if folder is not None and weights is not None and _are_others(name, spec, folder, weights):
        spec, labels_file = spec_of(find_network(name)), None
    else:
        labels_file = folder / LABELS_FILE if folder is not None else None
    if size_px and size_px != (spec.preprocess.height_px, spec.preprocess.width_px):
        spec = resized(spec, size_px)
    pictures, origin = real_images(spec, folder, images)
    own_classes = spec.num_classes
    if weights == RANDOM_WEIGHTS:
        spec, model = make_untrained(spec if names is None else with_classes_of(names, spec))
    else:
        named = spec if names is None else with_classes_of(names, spec)
        weights, provenance = locate_weights(spec, folder, weights)
        spec, model = load_trained(
            dataclasses.replace(spec, provenance=provenance), Path(weights), size_px=size_px,
            num_names=None if named is spec else named.num_classes,
        )  # fmt: skip
    if names is None and labels_file is not None and spec.num_classes == own_classes and labels_file.is_file():
        names = labels_file
    labels, labels_origin = default_labels(spec) if names is None else (read_names(names, spec, weights), str(names))
    if strides is not None:
        spec = with_features(spec, model, strides=strides)
        spec = dataclasses.replace(spec, name=f"{spec.name}-features")
    spec = with_decode(spec, decode=decode, suppression=suppression)
    model = as_exported(model, spec).eval()
    return Source(
        spec=spec, model=model, labels=labels, labels_origin=labels_origin, weights=weights, images=pictures,
        images_origin=origin,
    )  # fmt: skip


def _are_others(name: str, spec: ModelSpec, folder: Path, weights: str) -> bool:
    """Whether a file of weights has nothing to do with the detector that was trained under a registry network's name.

    Its anchors, its size and the names of its classes are then not those of the file.
    """
    if weights == RANDOM_WEIGHTS or spec.detection is None or not is_network(name):
        return False
    given, own, known = Path(weights), folder / WEIGHTS_FILE, spec.provenance.weights_sha256
    known = known or (file_sha256(own) if own.is_file() else "")
    return not given.is_file() or file_sha256(given) != known


def with_decode(spec: ModelSpec, *, decode: Decode | None, suppression: SuppressionOptions | None) -> ModelSpec:
    """A detector with that contract of its files.

    Raises:
        InputError: it is no detector.
    """
    if decode is None and suppression is None:
        return spec
    detection = spec.detection
    if detection is None:
        asked = "--decode" if decode or suppression is None else suppression.first_option
        raise InputError(
            f"{asked}: '{spec.name}' gives {', '.join(spec.outputs)}, not boxes",
            fix="leave out --decode, --score-threshold, --iou-threshold and --max-detections",
        )
    rule = detection.suppression if suppression is None else suppression.applied(detection.suppression)
    detection = dataclasses.replace(detection, decode=decode or detection.decode, suppression=rule)
    return dataclasses.replace(spec, detection=detection, outputs=detection.network_outputs)


def _describe(name: str, models: Path) -> tuple[Path | None, ModelSpec]:
    """The model's folder, if it has one, and its description."""
    if is_cfg(name):
        return None, spec_of_cfg(Path(name))
    folder = _model_folder(name, models)
    if folder is None:
        return None, spec_of(find_network(name))
    try:  # a bundle is called as the folder its model came from
        return folder, dataclasses.replace(read_spec(folder), name=folder.resolve().name)
    except ValueError as error:
        raise InputError(f"model folder {error}", fix="rename the folder") from error


def resized(spec: ModelSpec, size_px: tuple[int, int]) -> ModelSpec:
    """For another input size. The recorded accuracy was that of the model's own.

    Raises:
        InputError: a layer of a Darknet cfg does not fit at that size.
    """
    network = spec.network
    if network.family == DARKNET_FAMILY:
        network = resize_cfg(network, size_px)
    return dataclasses.replace(
        spec, network=network, preprocess=spec.preprocess.with_size(*size_px),
        provenance=dataclasses.replace(spec.provenance, accuracy=None),
    )  # fmt: skip


def _model_folder(name: str, models: Path) -> Path | None:
    pulled = [models / row.tag for row in published_for(name)]
    for folder in (models / name, Path(name), *pulled):
        if (folder / SPEC_FILE).is_file():
            return folder
    if is_network(name):
        return None
    known = sorted({path.parent.name for path in models.glob(f"*/{SPEC_FILE}")})
    trained = f"; in {models}: {', '.join(known)}" if known else ""
    raise InputError(
        f"model '{name}': unknown, none of the {len(NETWORKS)} networks{trained}",
        fix=f"{did_you_mean(name, [*NETWORKS, *known])}see: cspdeploy list",
    )
