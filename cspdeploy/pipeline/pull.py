"""`cspdeploy pull`: a published checkpoint from the Hugging Face Hub into `models/<name>/`, whole or not at all."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cspdeploy.core.bundle import MODEL_FOLDER, disk_errors, file_sha256, staged_folder
from cspdeploy.core.errors import InputError, did_you_mean
from cspdeploy.core.imagenet import imagenet_labels
from cspdeploy.core.model_folder import LABELS_FILE, SPEC_FILE, WEIGHTS_FILE, write_spec, write_text
from cspdeploy.core.spec import Accuracy, ModelSpec, Provenance
from cspdeploy.nets.checkpoints import CHECKPOINTS, NUM_VALIDATION_IMAGES, PUBLISHED_DATASET, Checkpoint, published_for
from cspdeploy.nets.hub import FetchedCheckpoint, fetch_checkpoint
from cspdeploy.nets.registry import NETWORKS, build, find_network, spec_of
from cspdeploy.nets.weights import load_weights, read_state_dict, write_safetensors

__all__ = ["PullReport", "find_checkpoint", "pull_checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PullReport:
    """The model folder that was written.

    Attributes:
        num_bytes: of its weights file.
        spec: as it lies there. Its accuracy is the published one at the size of its preprocessing.
    """

    folder: str
    tag: str
    num_bytes: int
    spec: ModelSpec


def find_checkpoint(name: str) -> Checkpoint:
    """The published checkpoint that a tag names, or a network that has exactly one.

    Raises:
        InputError: no such tag or network; a network with no published checkpoint, or with several.
    """
    name = name.removeprefix("timm/")
    if name in CHECKPOINTS:
        return CHECKPOINTS[name]
    tags = [row.tag for row in published_for(name)]
    if len(tags) == 1:
        return CHECKPOINTS[tags[0]]
    if tags:
        raise InputError(f"model '{name}': has {len(tags)} checkpoints: {', '.join(tags)}", fix=f"name one: {tags[0]}")
    if name in NETWORKS:
        raise InputError(
            f"model '{name}': no checkpoint is published, there are {', '.join(CHECKPOINTS)}",
            fix=f"cspdeploy train {name} --data DIR, or name one of these",
        )
    raise InputError(
        f"checkpoint '{name}': unknown, known are {', '.join(CHECKPOINTS)}",
        fix=f"{did_you_mean(name, CHECKPOINTS)}see: cspdeploy list",
    )


def pull_checkpoint(
    name: str,
    *,
    models: Path,
    folder_name: str | None = None,
    overwrite: bool = False,
    command: str = "",
    progress: bool = False,
) -> PullReport:
    """Fetch a published checkpoint, prove that it fits its network, and write `models/<folder_name>/`.

    The folder has no calibration images: none are published with a checkpoint.

    Args:
        name: what `find_checkpoint` takes.
        models: where the model's folder goes.
        folder_name: None: the tag, so that checkpoints of one network lie side by side.
        overwrite: replace a model folder of that name.
        command: the command line, kept in spec.json.
        progress: show the hub library's progress bar on stderr.

    Raises:
        InputError: unknown name, a folder that is there already, a checkpoint that cannot be had, is damaged or is
            of another network, or a folder that cannot be written. Nothing is left behind, and nothing replaced.
        MissingExtraError: huggingface_hub is not installed.
    """
    checkpoint = find_checkpoint(name)
    spec = _describe(checkpoint, checkpoint.tag if folder_name is None else folder_name)
    folder = models / spec.name
    _refuse_existing(folder, overwrite=overwrite)
    fetched = fetch_checkpoint(checkpoint.tag, progress=progress)
    model = _load(spec, checkpoint, fetched)
    with disk_errors(folder, kind=MODEL_FOLDER), staged_folder(folder, kind=MODEL_FOLDER) as staging:
        _refuse_existing(folder, overwrite=overwrite)  # again, since fetching takes its time
        provenance = _write_weights(staging / WEIGHTS_FILE, model, fetched)
        spec = _with_origin(spec, checkpoint, dataclasses.replace(provenance, command=command))
        write_spec(staging, spec)
        write_text(staging / LABELS_FILE, "\n".join(imagenet_labels("wnid")) + "\n")
        num_bytes = (staging / WEIGHTS_FILE).stat().st_size
    return PullReport(folder=str(folder), tag=checkpoint.tag, num_bytes=num_bytes, spec=spec)


def _describe(checkpoint: Checkpoint, name: str) -> ModelSpec:
    network = find_network(checkpoint.network)
    try:
        return spec_of(network, name=name, preprocess=checkpoint.preprocess)
    except ValueError as error:
        raise InputError(f"--{error}", fix=f"--name {checkpoint.network}") from error


def _refuse_existing(folder: Path, *, overwrite: bool) -> None:
    if folder.exists() and not overwrite:
        raise InputError(f"{folder}: exists already", fix="give --overwrite, or another name with --name")
    if folder.is_dir() and not (folder / SPEC_FILE).is_file() and any(folder.iterdir()):
        raise InputError(f"{folder}: exists and is not a model folder (no {SPEC_FILE})", fix="give another --name")


def _load(spec: ModelSpec, checkpoint: Checkpoint, fetched: FetchedCheckpoint) -> nn.Module:
    """The network with the fetched tensors in it: every one of them, and no other."""
    model = build(spec)
    try:
        load_weights(model, read_state_dict(fetched.path), source=fetched.origin)
    except InputError as error:
        raise InputError(
            f"checkpoint '{checkpoint.tag}': not that of {checkpoint.network}: {error.message}",
            fix="update cspdeploy, or unset HF_ENDPOINT to ask the official hub",
        ) from error
    return model


def _write_weights(path: Path, model: nn.Module, fetched: FetchedCheckpoint) -> Provenance:
    if fetched.path.suffix != path.suffix:  # a pickle: its tensors, as safetensors
        write_safetensors(path, model, dtype=torch.float32)
        origin = f"{fetched.origin} (SHA-256 {fetched.sha256})"
        return Provenance(source="published", origin=origin, weights_sha256=file_sha256(path))
    # A copy, no link: whoever writes into the model's file must not change the cache that other programs read too.
    shutil.copyfile(fetched.path, path)
    sha256 = file_sha256(path)
    if sha256 != fetched.sha256:
        raise InputError(f"{fetched.path}: was changed while it was copied", fix="run this again")
    return Provenance(source="published", origin=fetched.origin, weights_sha256=sha256)


def _with_origin(spec: ModelSpec, checkpoint: Checkpoint, provenance: Provenance) -> ModelSpec:
    accuracy = Accuracy(
        dataset=PUBLISHED_DATASET, num_images=NUM_VALIDATION_IMAGES, top1=checkpoint.top1, top5=checkpoint.top5
    )
    provenance = dataclasses.replace(
        provenance, dataset=PUBLISHED_DATASET, licence=checkpoint.licence, accuracy=accuracy
    )
    return dataclasses.replace(spec, provenance=provenance)
