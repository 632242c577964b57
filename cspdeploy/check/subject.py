"""What is verified: a bundle, or something that stands in for one. Shapes: N images or other inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cspdeploy.check.original import ONNX_FAMILY, find_weights, onnx_sha256, why_absent
from cspdeploy.core.bundle import check_hashes, read_manifest
from cspdeploy.core.catalog import CLASSES_OUTPUT, EAGER, PROBABILITIES_OUTPUT
from cspdeploy.core.detection.spec import Decode
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import Golden, read_golden
from cspdeploy.core.graph_images import pixel_change, pixels_for
from cspdeploy.core.quantised import recorded_quantised
from cspdeploy.core.sizes import Size, at_size, golden_file, size_label, sized_kind, sizes_of
from cspdeploy.core.spec import ModelSpec, Task
from cspdeploy.core.tolerance import noise_floors
from cspdeploy.core.types import Artifact, Frontend, Manifest, TensorInfo

__all__ = [
    "ONNX_FAMILY", "ORIGINAL", "Candidate", "Subject", "bundle_subject", "bundle_subjects", "find_weights",
    "onnx_sha256",
]  # fmt: skip

ORIGINAL = "original"
"""The first rung of such a bundle: that very file."""
MAX_BATCH = 16
"""Images a call where an artifact takes any number: enough to be quick, few enough for memory."""

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Something to open and compare: an artifact, or the original network.

    Attributes:
        artifact: as rows call it: "eager", "original", "onnx", "onnx-fp16", or a file's name.
        format: "eager", "torchscript" or "onnx".
        precision: of its arithmetic, as it is declared; of a loose file, as it is found.
        path: the artifact, or the weights of the eager network.
        batch: inputs a call that it takes; None: any number.
        inputs: in its own order, as they are declared; empty where it takes them by position.
        output_dtypes: of `output_names`, as they are declared; empty: all float32.
        spec: for the eager network alone.
        absent: why it cannot be opened on any runtime here, or empty.
        frontend: preprocessing that it has in its graph.
        pixels: its inputs in place of the subject's, uint8 `[N, H, W, 3]`; of one with a frontend.
        num_quantised: tensors in 8 bits, of a file that does not tell by itself.
        machine: that an engine has optimised the file for; empty: any.
        pixel_change: relative L2 that a resize of its own may move the outputs by, as measured at export.
        decode: of a detector, the contract of its outputs.
        cut: what lies in front of a plugin, boxes and scores under the names that they have in the file.
        plugin_fault: what is wrong with the plugin that was cut off, or empty.
    """

    artifact: str
    format: str
    precision: str
    path: Path
    num_bytes: int
    output_names: tuple[str, ...]
    batch: int | None
    inputs: tuple[TensorInfo, ...] = ()
    output_dtypes: tuple[str, ...] = ()
    spec: ModelSpec | None = None
    absent: str = ""
    frontend: Frontend | None = None
    pixels: npt.NDArray[np.uint8] | None = field(default=None, compare=False)
    num_quantised: int = 0
    pixel_change: float = 0.0
    machine: str = ""
    decode: Decode | None = None
    cut: bool = False
    plugin_fault: str = ""

    @property
    def network_names(self) -> tuple[str, ...]:
        """Outputs of the network itself, without those that top-k in the graph adds."""
        added = (PROBABILITIES_OUTPUT, CLASSES_OUTPUT) if self.frontend is not None and self.frontend.top_k else ()
        return tuple(name for name in self.output_names if name not in added)

    def named(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """`feeds` under the candidate's own names, by position, in its own floating-point type.

        Raises:
            ValueError: another number of inputs than the candidate has.
        """
        if not self.inputs:
            return dict(feeds)
        return {
            own.name: array.astype(own.dtype) if _is_float(array.dtype.name) and _is_float(own.dtype) else array
            for own, array in zip(self.inputs, feeds.values(), strict=True)
        }


def _is_float(dtype: str) -> bool:
    return dtype in ("float16", "float32", "float64")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """Inputs, the reference outputs for them, and the candidates that are judged by these, in the ladder's order.

    Attributes:
        name: as rows call it: the bundle's folder, or the file.
        title: short, for progress lines.
        feeds: inputs by name, `[N, ...]` each.
        outputs_fp64: the reference, `[N, ...]` by name; empty where only latency is asked for.
        floors: noise floor of each output: relative L2 between the original's FP32 and FP64 outputs.
        one_call: `feeds` are those of a single call, whose first axis need not be a batch.
        untrained: the weights have never seen data.
        synthetic: the inputs are random numbers, of which no decision means anything.
        notes: how the reference came about.
        warnings: why that reference proves less than it should.
        manifest, golden: of a bundle, as if it had this size alone; None for anything else.
        size_px: of a bundle of several sizes, where that is not its first one.
        siblings: artifacts of the same bundle that are of another size.
    """

    name: str
    title: str
    task: Task
    labels: tuple[str, ...]
    feeds: Mapping[str, Array]
    outputs_fp64: Mapping[str, npt.NDArray[np.float64]]
    floors: Mapping[str, float]
    candidates: tuple[Candidate, ...]
    one_call: bool = False
    untrained: bool = False
    synthetic: bool = False
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    manifest: Manifest | None = None
    golden: Golden | None = None
    size_px: Size | None = None
    siblings: tuple[str, ...] = ()

    @property
    def sized_name(self) -> str:
        """Its name, with the size where that is not the bundle's first one."""
        return f"{self.name}{size_label(self.size_px)}"

    @property
    def num_inputs(self) -> int:
        """N: how many images there are; 1 where a single call is all."""
        return 1 if self.one_call else len(next(iter(self.feeds.values())))

    def calls(self, candidate: Candidate) -> Iterator[tuple[dict[str, Array], int | None]]:
        """The feeds of every call that it takes to see all inputs once, under the candidate's own names.

        With each goes how many rows of its outputs count (a fixed batch is filled up at the end), or None: they are
        to be taken whole.
        """
        if self.one_call:
            yield candidate.named(self.feeds), None
            return
        step = candidate.batch or min(self.num_inputs, MAX_BATCH)
        feeds = self.feeds_of(candidate)
        for start in range(0, self.num_inputs, step):
            part = {name: array[start : start + step] for name, array in feeds.items()}
            count = len(next(iter(part.values())))
            if candidate.batch and count < step:
                part = {name: _filled(array, step) for name, array in part.items()}
            yield candidate.named({name: np.ascontiguousarray(array) for name, array in part.items()}), count

    def first_call(self, candidate: Candidate) -> dict[str, Array]:
        """Feeds to time a call with: one input, or as many as a fixed batch takes."""
        if self.one_call:
            return candidate.named(self.feeds)
        step = candidate.batch or 1
        feeds = self.feeds_of(candidate)
        return candidate.named({name: _filled(array[:step], step) for name, array in feeds.items()})

    def feeds_of(self, candidate: Candidate) -> Mapping[str, Array]:
        """All inputs for it: the subject's, or its own pixels, under the subject's names."""
        return self.feeds if candidate.pixels is None else dict.fromkeys(self.feeds, candidate.pixels)


def _filled(array: Array, count: int) -> Array:
    """`array` with its last row repeated up to `count`; what is made of the filling is dropped."""
    missing = count - len(array)
    whole = np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing > 0 else array
    return np.ascontiguousarray(whole)


def bundle_subject(folder: Path, *, size_px: Size | None = None) -> Subject:
    """A bundle, its hashes checked before anything is opened.

    Args:
        size_px: which of its sizes, as its artifacts are named by it; None: the first one.

    Raises:
        InputError: a bundle that cannot be read.
        TamperedError: a file is not the one of the manifest.
    """
    whole = read_manifest(folder)
    check_hashes(folder, whole)
    return _at_size(folder, whole, size_px or sizes_of(whole.artifacts)[0])


def bundle_subjects(folder: Path) -> Iterator[Subject]:
    """The same of each of its sizes, one after another, since each holds its images and outputs. Raises the same."""
    whole = read_manifest(folder)
    check_hashes(folder, whole)
    for size_px in sizes_of(whole.artifacts):
        yield _at_size(folder, whole, size_px)


def _at_size(folder: Path, whole: Manifest, size_px: Size | None) -> Subject:
    file = golden_file(size_px)
    if all(record.file != file for record in whole.files):
        raise InputError(f"{folder}: the manifest names no {file}", fix="export the bundle again")
    manifest, golden = at_size(whole, size_px), read_golden(folder / file)
    made = manifest.artifacts
    first = (_original if manifest.spec.network.family == ONNX_FAMILY else _eager)(folder, manifest)
    first = dataclasses.replace(first, artifact=sized_kind(first.artifact, size_px))
    return Subject(
        name=str(folder), title=manifest.spec.name, task=manifest.spec.task,
        labels=manifest.labels, feeds={made[0].inputs[0].name: golden.x_NCHW}, outputs_fp64=golden.outputs_fp64,
        floors=noise_floors(golden),
        candidates=(first, *(_fed(_candidate(folder, item), golden, manifest) for item in made)),
        untrained=manifest.spec.provenance.untrained, manifest=manifest, golden=golden, size_px=size_px,
        siblings=tuple(item.kind for item in whole.artifacts if item not in made),
    )  # fmt: skip


def _fed(candidate: Candidate, golden: Golden, manifest: Manifest) -> Candidate:
    if candidate.frontend is None:
        return candidate
    pixels = pixels_for(candidate.frontend, golden.images, manifest.spec.preprocess)
    return dataclasses.replace(candidate, pixels=pixels)


def _candidate(folder: Path, artifact: Artifact) -> Candidate:
    batch = artifact.inputs[0].shape[0]
    return Candidate(
        artifact=artifact.kind, format=artifact.format, precision=artifact.precision, path=folder / artifact.file,
        num_bytes=artifact.num_bytes, output_names=tuple(value.name for value in artifact.outputs),
        output_dtypes=tuple(value.dtype for value in artifact.outputs), inputs=artifact.inputs,
        batch=batch if isinstance(batch, int) else None, frontend=artifact.frontend,
        pixel_change=pixel_change(artifact), num_quantised=recorded_quantised(artifact),
        machine=artifact.machine, decode=artifact.decode,
    )  # fmt: skip


def _eager(folder: Path, manifest: Manifest) -> Candidate:
    weights = find_weights(folder, manifest)
    return Candidate(
        artifact=EAGER, format=EAGER, precision="fp32", path=weights or folder,
        num_bytes=weights.stat().st_size if weights else 0, output_names=manifest.spec.outputs, batch=None,
        spec=manifest.spec, decode=_network_decode(manifest.spec), absent="" if weights else why_absent(manifest),
    )  # fmt: skip


def _network_decode(spec: ModelSpec) -> Decode | None:
    return spec.detection.network_decode if spec.detection is not None else None


def _original(folder: Path, manifest: Manifest) -> Candidate:
    """The user's own file. One image a call, for it may have been written for one."""
    described = manifest.artifacts[0]
    path = find_weights(folder, manifest)
    own = dataclasses.replace(_candidate(folder, described), artifact=ORIGINAL, precision="fp32", batch=1)
    if path is None:
        absent = "the ONNX file that the bundle was made from is not here"
        return dataclasses.replace(own, path=folder, num_bytes=0, absent=absent)
    return dataclasses.replace(own, path=path, num_bytes=path.stat().st_size)
