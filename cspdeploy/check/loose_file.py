"""An ONNX file by itself as something to verify or time: its inputs, and what its outputs are judged by.

Shapes: N images, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cspdeploy.check.audit import INT8_WEIGHTS, audit_onnx, declared_precision
from cspdeploy.check.reference import reference_of
from cspdeploy.check.subject import Candidate, Subject, bundle_subject
from cspdeploy.core.bundle import MANIFEST_FILE, read_manifest
from cspdeploy.core.card import read_card
from cspdeploy.core.contracts import CHOICES, find_contract
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import num_golden_images
from cspdeploy.core.imagenet import NUM_IMAGENET_CLASSES
from cspdeploy.core.onnx_graph import OnnxModel, Value, read_onnx
from cspdeploy.core.preprocess import list_images, preprocess
from cspdeploy.core.sizes import size_of
from cspdeploy.core.spec import Task
from cspdeploy.core.types import TensorInfo

__all__ = ["describe", "file_subject", "image_input", "image_size", "random_feeds"]

Array = npt.NDArray[np.generic]

SEED = 0
MAX_FEED_VALUES = 1 << 28
"""1 GiB in float32: a shape beyond it is a mistake in the file."""
SMALL_INTEGERS = 4
"""Integers are drawn below this: as indices they lie in nearly every table, as lengths in nearly every axis."""
_INTEGERS = frozenset({"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"})
_FLOATS = frozenset({"float16", "float32", "float64"})


def file_subject(
    path: Path,
    *,
    against: Path | None = None,
    images: Path | None = None,
    contract: str | None = None,
    reference: bool = True,
) -> Subject:
    """What to verify or time of one ONNX file, with any number of inputs and outputs.

    A file of a bundle is judged as such: by the golden outputs, on the golden images. Any other one is judged by
    itself (or by `against`) in FP64, and where this machine has no FP64 reference by itself in its own precision,
    not optimised; `Subject.notes` or `.warnings` says which.

    Args:
        against: another ONNX file with the same inputs and outputs, such as the one that `path` was made from.
        images: folder of real images; without it the inputs are seeded random numbers.
        contract: how images are prepared: "imagenet", "unit", "darknet", or a JSON file; None: as the card in the file
            says, if it has one.
        reference: False where only latency is wanted: nothing is computed then.

    Raises:
        InputError: a file that cannot be read or run, without inputs, with free dimensions that nothing fixes, with
            inputs of other kinds than numbers; `images` without `contract`, or where there is no image input; two
            files that do not have the same inputs and outputs.
    """
    if contract is not None and images is None:
        raise InputError(f"--preprocess {contract}: says how images are prepared", fix="add --images DIR")
    model = read_onnx(path)
    notes: tuple[str, ...] = ()
    if against is None and images is None:
        found, note = _in_bundle(path)
        if found is not None:
            return found
        notes = (note,) if note else ()
    feeds = random_feeds(model) if images is None else _image_feeds(model, images, contract)
    files = [path] if against is None else [against, path]
    if against is not None:
        _require_alike(read_onnx(against), model)
    batch = None if images is None else _batch(image_input(model))
    subject = Subject(
        name=str(path), title=path.name, task="features", labels=(), feeds=feeds, outputs_fp64={}, floors={},
        candidates=tuple(_candidates(files, batch=batch)), one_call=images is None, synthetic=images is None,
        notes=notes,
    )  # fmt: skip
    return _judged(subject) if reference else subject


def _judged(subject: Subject) -> Subject:
    """With the outputs of its first candidate's file in FP64."""
    made = reference_of(subject)
    task: Task = "features"
    shapes = [array.shape for array in made.outputs_fp64.values()]
    if not subject.one_call and len(shapes) == 1 and shapes[0][1:] == (NUM_IMAGENET_CLASSES,):
        task = "classify"
    return dataclasses.replace(
        subject, outputs_fp64=made.outputs_fp64, floors=made.floors, task=task,
        notes=(*subject.notes, made.note) if made.in_fp64 else subject.notes,
        warnings=subject.warnings if made.in_fp64 else (*subject.warnings, made.note),
        labels=tuple(f"class {index}" for index in range(NUM_IMAGENET_CLASSES)) if task == "classify" else (),
    )  # fmt: skip


def _in_bundle(path: Path) -> tuple[Subject | None, str]:
    """The bundle that `path` is a file of, with that artifact alone; or None, and what to say of it."""
    folder = path.parent
    if not (folder / MANIFEST_FILE).is_file():
        return None, ""
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        return None, f"judged by itself: the manifest.json beside it is no bundle's ({error.message})"
    artifact = next((item for item in manifest.artifacts if item.file == path.name), None)
    if artifact is None:
        return None, f"judged by itself: {folder} does not list it"
    subject = bundle_subject(folder, size_px=size_of(artifact.kind))
    chosen = tuple(item for item in subject.candidates if item.artifact == artifact.kind)
    note = f"judged by the golden outputs of its bundle; the whole ladder: cspdeploy verify {folder}"
    return dataclasses.replace(subject, name=str(path), title=path.name, candidates=chosen, notes=(note,)), ""


def _candidates(files: Iterable[Path], *, batch: int | None) -> list[Candidate]:
    paths = list(files)
    names = [path.name for path in paths] if len({path.name for path in paths}) == len(paths) else map(str, paths)
    found = []
    for name, path in zip(names, paths, strict=True):
        model = read_onnx(path)
        found.append(Candidate(
            artifact=name, format="onnx", precision=_precision(path), path=path,
            num_bytes=model.num_bytes, output_names=tuple(value.name for value in model.graph.outputs), batch=batch,
            output_dtypes=tuple(value.dtype for value in model.graph.outputs), inputs=_inputs(model),
        ))  # fmt: skip
    return found


def _precision(path: Path) -> str:
    """What it computes in; of one that says of itself that its weights are in 8 bits, that: its error is theirs."""
    if declared_precision(path) == INT8_WEIGHTS:
        return "int8"
    return audit_onnx(path, declared="").found


def _inputs(model: OnnxModel) -> tuple[TensorInfo, ...]:
    values = model.graph.inputs
    return tuple(TensorInfo(name=value.name, dtype=value.dtype, shape=value.shape or ()) for value in values)


def _require_alike(reference: OnnxModel, model: OnnxModel) -> None:
    """Outputs go by their names; inputs by their order, since a converter may rename them."""
    names = [value.name for value in reference.graph.outputs]
    own = [value.name for value in model.graph.outputs]
    if names != own:
        raise InputError(
            f"{model.path}: its outputs are {', '.join(own)}, those of {reference.path} are {', '.join(names)}",
            fix="--against a file with the same outputs",
        )
    shapes, own_shapes = ([value.shape for value in item.graph.inputs] for item in (reference, model))
    if len(shapes) != len(own_shapes) or not all(map(_compatible, shapes, own_shapes)):
        raise InputError(
            f"{model.path}: its inputs are {_listed(model)}, those of {reference.path} are {_listed(reference)}",
            fix="--against a file with the same inputs",
        )


def _compatible(a: tuple[int | str, ...] | None, b: tuple[int | str, ...] | None) -> bool:
    if a is None or b is None:
        return True
    if len(a) != len(b):
        return False
    return all(x == y or isinstance(x, str) or isinstance(y, str) for x, y in zip(a, b, strict=True))


def _listed(model: OnnxModel) -> str:
    return ", ".join(describe(value) for value in model.graph.inputs) or "none"


def describe(value: Value) -> str:
    """For messages: `'input' float32 [N, 3, 224, 224]`."""
    shape = "of unknown rank" if value.shape is None else f"[{', '.join(map(str, value.shape))}]"
    return f"'{value.name}' {value.dtype} {shape}"


def random_feeds(model: OnnxModel) -> dict[str, Array]:
    """Seeded inputs of one call: floats from a standard normal distribution, integers small, bytes `[N, ., ., .]` any.

    A free first axis is taken as a batch of 1.

    Raises:
        InputError: no inputs, or one of unknown rank, with another free dimension, of no number type, or too large.
    """
    if not model.graph.inputs:
        raise InputError(f"{model.path}: has no inputs, so there is nothing to compute", fix="name another file")
    rng = np.random.default_rng(SEED)
    return {value.name: _random(rng, value, model.path) for value in model.graph.inputs}


def _random(rng: np.random.Generator, value: Value, path: Path) -> Array:
    shape = _resolved(value, path)
    if value.dtype in _FLOATS:
        return np.asarray(rng.standard_normal(shape)).astype(value.dtype)
    if value.dtype in _INTEGERS:
        high = 256 if value.dtype == "uint8" and len(shape) == 4 else SMALL_INTEGERS  # four axes of bytes: an image
        return np.asarray(rng.integers(0, high, shape)).astype(value.dtype)
    if value.dtype == "bool":
        return np.asarray(rng.integers(0, 2, shape)).astype(np.bool_)
    raise InputError(f"{path}: input {describe(value)} takes no numbers", fix="name a file with inputs of numbers")


def _resolved(value: Value, path: Path) -> tuple[int, ...]:
    if value.shape is None:
        raise InputError(f"{path}: input {describe(value)}", fix="write its shape into the file")
    free = [str(dim) for dim in value.shape[1:] if not _is_fixed(dim)]
    if free:
        raise InputError(
            f"{path}: input {describe(value)} leaves {', '.join(free)} free, expected sizes",
            fix="write them into the file; for an image: cspdeploy export FILE --size HxW, or --images DIR with a JSON "
            "file as --preprocess",
        )
    shape = tuple(dim if isinstance(dim, int) and dim >= 0 else 1 for dim in value.shape)
    if 0 in shape:
        raise InputError(f"{path}: input {describe(value)} is empty", fix="write its real size into the file")
    if int(np.prod(shape, dtype=object)) > MAX_FEED_VALUES:
        raise InputError(f"{path}: input {describe(value)} is larger than 1 GiB", fix="make it smaller")
    return shape


def _is_fixed(dim: int | str) -> bool:
    """Some exporters write -1 for a dimension that is free, and ONNX Runtime takes it so."""
    return isinstance(dim, int) and dim >= 0


def image_input(model: OnnxModel) -> Value:
    """The one input, `[N or a number, 3, H, W]` float.

    Raises:
        InputError: no inputs, several, or another type or shape.
    """
    values = model.graph.inputs
    fix = "name a network of one image, its channels first"
    if len(values) != 1:
        raise InputError(f"{model.path}: has {len(values)} inputs ({_listed(model)}), expected one image", fix=fix)
    value = values[0]
    shape = value.shape or ()
    if value.dtype not in _FLOATS or len(shape) != 4 or shape[1] != 3:
        expected = "expected float32 [N, 3, H, W]"
        raise InputError(f"{model.path}: input {describe(value)}, {expected}", fix=fix)
    return value


def image_size(value: Value) -> tuple[int, int] | None:
    """Height and width of an image input; None where both or one of them are free."""
    height, width = (value.shape or ())[2:]
    if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
        return height, width
    return None


def _batch(value: Value) -> int:
    """Images a call. A free batch is taken as 1: not every graph that leaves it free can take more."""
    first = (value.shape or (1,))[0]
    return first if isinstance(first, int) and first > 0 else 1


def _image_feeds(model: OnnxModel, images: Path, contract: str | None) -> Mapping[str, Array]:
    card = read_card(model.metadata, name=model.path.name)
    value, own = image_input(model), image_size(image_input(model))
    if contract is not None:
        chosen = find_contract(contract, size_px=own)
    elif card is not None:
        chosen = card.preprocess.with_size(*own) if own else card.preprocess
    else:
        raise InputError(f"--images {images}: how they are prepared is never guessed", fix=f"--preprocess {CHOICES}")
    paths = list_images(images)
    num = num_golden_images(chosen.height_px, chosen.width_px)
    step = max(1, len(paths) // num)
    return {value.name: preprocess([str(path) for path in paths[::step][:num]], chosen)}
