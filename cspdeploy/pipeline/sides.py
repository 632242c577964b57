"""What `compare` can name (a network of the registry, a Darknet cfg, a model folder, a bundle), and what is known."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cspdeploy.check.subject import ONNX_FAMILY
from cspdeploy.core.bundle import MANIFEST_FILE, check_hashes, read_manifest
from cspdeploy.core.codec import from_json
from cspdeploy.core.errors import InputError, did_you_mean
from cspdeploy.core.model_folder import CURVE_FILE, SPEC_FILE, read_json, read_spec
from cspdeploy.core.spec import ModelSpec
from cspdeploy.core.types import Manifest
from cspdeploy.nets.checkpoints import NUM_VALIDATION_IMAGES, PUBLISHED_DATASET
from cspdeploy.nets.registry import NETWORKS, find_network, is_network, spec_of
from cspdeploy.pipeline.darknet import is_cfg, spec_of_cfg

__all__ = [
    "AccuracyPair", "CurvePoint", "KnownAccuracy", "Side", "TrainingPair", "TrainingRun", "find_side", "pair_accuracy",
    "pair_training",
]  # fmt: skip

LAST_EPOCHS = 3
"""Shown of a curve: whether it still rises at the end."""
SAME_RECIPE_BUT = "seed"
"""Two runs may start from different random numbers and still have had the same budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two that are compared. `folder` is that of the model or the bundle."""

    given: str
    kind: Literal["network", "cfg", "model", "bundle"]
    spec: ModelSpec
    folder: Path | None = None
    manifest: Manifest | None = None

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width of its own input."""
        return self.spec.preprocess.height_px, self.spec.preprocess.width_px


def find_side(given: str, *, models: Path) -> Side:
    """What the user names. A network's name means the registry's network, also where a model folder has that name.

    Raises:
        InputError: there is no such thing, or it cannot be read.
        TamperedError: a file of the bundle is not the one of its manifest.
    """
    if is_network(given) and not (":" in given and Path(given).exists()):
        return Side(given=given, kind="network", spec=spec_of(find_network(given)))
    if is_cfg(given):
        return Side(given=given, kind="cfg", spec=spec_of_cfg(Path(given)))
    if (Path(given) / MANIFEST_FILE).is_file():
        manifest = read_manifest(Path(given))
        check_hashes(Path(given), manifest)
        if manifest.spec.network.family == ONNX_FAMILY:
            raise InputError(
                f"'{given}': was made from an ONNX file, of which no network can be built",
                fix=f"cspdeploy bench {given} and the other one",
            )
        return Side(given=given, kind="bundle", spec=manifest.spec, folder=Path(given), manifest=manifest)
    for folder in (Path(given), models / given):
        if (folder / SPEC_FILE).is_file():
            return Side(given=given, kind="model", spec=read_spec(folder), folder=folder)
    known = sorted(path.parent.name for path in models.glob(f"*/{SPEC_FILE}"))
    raise InputError(
        f"'{given}': neither a network of the registry nor a model folder, a bundle or a .cfg file",
        fix=f"{did_you_mean(given, [*NETWORKS, *known])}see: cspdeploy list",
    )


# --- accuracy ---


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownAccuracy:
    """Accuracy in [0, 1] and where it comes from. `num_images` is 0 where it is not recorded.

    A detector has `map50` and `map`, a classifier `top1` and `top5`; the others are None.
    """

    dataset: str
    num_images: int
    size_px: tuple[int, int]
    source: str
    top1: float | None = None
    top5: float | None = None
    map50: float | None = None
    map: float | None = None

    def is_like(self, other: KnownAccuracy) -> bool:
        """Whether it is the same measure, of the same images."""
        mine, theirs = ((one.dataset, one.num_images, one.map50 is None) for one in (self, other))
        return mine == theirs


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyPair:
    """Both accuracies. `comparable` only on the same images; `reason` says why not, or what else differs."""

    a: KnownAccuracy | None
    b: KnownAccuracy | None
    comparable: bool
    reason: str


def pair_accuracy(a: Side, b: Side) -> AccuracyPair:
    """Recorded accuracy where both have it on the same images, else published accuracy where both have that."""
    recorded = (_recorded(a), _recorded(b))
    published = (_published(a), _published(b))
    shown = tuple(one or two for one, two in zip(recorded, published, strict=True))
    for first, second in (recorded, published, shown):
        if first and second and first.is_like(second):
            return AccuracyPair(a=first, b=second, comparable=True, reason=_other_differences(first, second))
    missing = " and ".join(side.given for side, accuracy in zip((a, b), shown, strict=True) if accuracy is None)
    if missing:
        reason = f"no accuracy of {missing} is known"
    else:
        reason = "not comparable: " + " and ".join(accuracy.dataset for accuracy in shown if accuracy)
    return AccuracyPair(a=shown[0], b=shown[1], comparable=False, reason=reason)


def _recorded(side: Side) -> KnownAccuracy | None:
    """Of the weights in the folder or the bundle."""
    found = side.spec.provenance.accuracy
    if found is None or side.kind in ("network", "cfg"):
        return None
    published = side.spec.provenance.source == "published"  # by others, and not measured here
    detects = found.map50 is not None
    return KnownAccuracy(
        top1=None if detects else found.top1, top5=None if detects else found.top5, map50=found.map50, map=found.map,
        dataset=found.dataset, num_images=found.num_images, size_px=side.size_px,
        source=f"published: {side.spec.provenance.origin}" if published else "recorded with the weights",
    )  # fmt: skip


def _published(side: Side) -> KnownAccuracy | None:
    """Of a network's published weights; a folder's own weights are others."""
    network = find_network(side.spec.name) if side.kind == "network" else None
    if network is None or network.published is None:
        return None
    found = network.published
    return KnownAccuracy(
        top1=found.top1, top5=found.top5, dataset=PUBLISHED_DATASET, num_images=NUM_VALIDATION_IMAGES,
        size_px=(found.size_px, found.size_px), source=f"published: {found.source}",
    )  # fmt: skip


def _other_differences(a: KnownAccuracy, b: KnownAccuracy) -> str:
    parts = []
    if a.size_px != b.size_px:
        parts.append(f"at different sizes ({_size(a.size_px)} and {_size(b.size_px)} px)")
    if a.source != b.source:
        parts.append("by different training, so that the difference is not the networks' alone")
    return "; ".join(parts)


def _size(size_px: tuple[int, int]) -> str:
    return "x".join(map(str, size_px))


# --- training ---


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One epoch: mean training loss, and on the test split top-1 accuracy, or a detector's mAP@0.5, in [0, 1]."""

    epoch: int
    train_loss: float
    test_top1: float | None = None
    test_map50: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """What train.json and spec.json keep of a run."""

    dataset: str
    size_px: tuple[int, int]
    num_images: int | None
    """Of the training split; None where the file does not say."""
    epochs: int
    recipe: dict[str, Any]
    seconds: float
    last_epochs: tuple[CurvePoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPair:
    """Both runs. The budget was equal where `differences` is empty: only the random start may differ."""

    a: TrainingRun
    b: TrainingRun
    equal_budget: bool
    differences: tuple[str, ...]


def pair_training(a: Side, b: Side) -> TrainingPair | None:
    """The runs of two trained model folders, or None where one of them is no such folder.

    Raises:
        InputError: a train.json that cannot be read.
    """
    first, second = _read_run(a), _read_run(b)
    if first is None or second is None:
        return None
    differences = [
        f"{what}: {one} and {two}"
        for what, one, two in (
            ("data set", first.dataset, second.dataset),
            ("training images", first.num_images, second.num_images),
            ("size", _size(first.size_px), _size(second.size_px)),
            ("epochs run", first.epochs, second.epochs),
        )
        if one != two
    ]
    for key in sorted(first.recipe.keys() | second.recipe.keys()):
        one, two = first.recipe.get(key), second.recipe.get(key)
        if one != two and key != SAME_RECIPE_BUT:
            differences.append(f"{key}: {one} and {two}")
    return TrainingPair(a=first, b=second, equal_budget=not differences, differences=tuple(differences))


def _read_run(side: Side) -> TrainingRun | None:
    path = side.folder / CURVE_FILE if side.folder and side.kind == "model" else None
    if path is None or not path.is_file():
        return None
    data = read_json(path)
    try:
        kind: type[_Epoch] | type[_DetectorEpoch] = _DetectorEpoch if side.spec.task == "detect" else _Epoch
        names = [field.name for field in dataclasses.fields(kind)]
        curve: list[_Epoch | _DetectorEpoch] = [
            from_json(kind, {name: epoch[name] for name in names}) for epoch in data["epochs"]
        ]
        recipe = dict(data["recipe"])
    except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
        raise InputError(f"{path}: not the record of a training run ({error})", fix="train the model again") from error
    num_images = data.get("num_images")
    return TrainingRun(
        dataset=side.spec.provenance.dataset, size_px=side.size_px,
        num_images=num_images if isinstance(num_images, int) else None, epochs=len(curve), recipe=recipe,
        seconds=round(sum(point.seconds for point in curve), 1),
        last_epochs=tuple(
            CurvePoint(
                epoch=point.epoch, train_loss=point.train_loss, test_top1=getattr(point, "test_top1", None),
                test_map50=getattr(point, "test_map50", None),
            )
            for point in curve[-LAST_EPOCHS:]
        ),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Epoch:
    """What is read of an epoch in train.json."""

    epoch: int
    train_loss: float
    test_top1: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _DetectorEpoch:
    """The same of a detector's."""

    epoch: int
    train_loss: float
    test_map50: float
    seconds: float
