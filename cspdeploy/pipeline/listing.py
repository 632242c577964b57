"""What there is: networks of the registry, and models in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cspdeploy.core.model_folder import SPEC_FILE, read_spec
from cspdeploy.core.spec import Accuracy, ModelSpec
from cspdeploy.nets.checkpoints import NUM_VALIDATION_IMAGES, PUBLISHED_DATASET
from cspdeploy.nets.cost import measure_cost
from cspdeploy.nets.registry import NETWORKS, spec_of
from cspdeploy.nets.zoo_costs import ZOO_COSTS

__all__ = ["ListedModel", "Listing", "list_models"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedModel:
    """A network of the registry, or a model folder. Cost is for one image of `size_px`."""

    name: str
    summary: str
    size_px: tuple[int, int]
    num_classes: int
    num_parameters: int
    gmacs: float
    checkpoint: str
    accuracy: Accuracy | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """`networks` have a name in the registry; `models` lie in a folder, ready to export."""

    networks: tuple[ListedModel, ...]
    models: tuple[ListedModel, ...]


def list_models(models: Path) -> Listing:
    """List the registry and the folders below `models` that hold a spec.json.

    Raises:
        InputError: a spec.json that cannot be read.
    """
    networks = []
    for network in NETWORKS.values():
        spec = spec_of(network)
        found = network.published
        published = None
        if found is not None:
            published = Accuracy(
                dataset=PUBLISHED_DATASET, num_images=NUM_VALIDATION_IMAGES, top1=found.top1, top5=found.top5
            )
        networks.append(_entry(network.name, network.summary, spec, checkpoint=network.checkpoint, accuracy=published))
    return Listing(networks=tuple(networks), models=tuple(_folders(models)))


def _folders(models: Path) -> list[ListedModel]:
    found = []
    for path in sorted(models.glob(f"*/{SPEC_FILE}")):
        if path.parent.name.startswith("."):
            continue
        spec = read_spec(path.parent)
        summary = spec.provenance.origin or spec.provenance.source
        found.append(_entry(path.parent.name, summary, spec, checkpoint="", accuracy=spec.provenance.accuracy))
    return found


def _entry(name: str, summary: str, spec: ModelSpec, *, checkpoint: str, accuracy: Accuracy | None) -> ListedModel:
    known = spec.name in ZOO_COSTS and spec == spec_of(NETWORKS[spec.name])
    num_parameters, num_macs = ZOO_COSTS[spec.name] if known else _measured(spec)
    return ListedModel(
        name=name, summary=summary, size_px=(spec.preprocess.height_px, spec.preprocess.width_px),
        num_classes=spec.num_classes, num_parameters=num_parameters, gmacs=round(num_macs / 1e9, 3),
        checkpoint=checkpoint, accuracy=accuracy,
    )  # fmt: skip


def _measured(spec: ModelSpec) -> tuple[int, int]:
    cost = measure_cost(spec)
    return cost.num_parameters, cost.num_macs
