"""`train --qat`: a trained model folder to a plan of fine-tuned INT8 weights in the same folder.

The float weights, and with them every other file of an export, stay what they are. The INT8 file is written with the
fine-tuned weights on the grids that they were trained on, and its record says so.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from cspdeploy.core.bundle import file_sha256
from cspdeploy.core.catalog import INT8_MAX_IMAGES
from cspdeploy.core.codec import JsonObject, from_json, to_json
from cspdeploy.core.datasets import FASHION_MNIST, LabelledImages, open_dataset
from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import SPEC_FILE, WEIGHTS_FILE
from cspdeploy.core.targets import Target
from cspdeploy.export.rewrite import write_model
from cspdeploy.export.simplify import start_simplify
from cspdeploy.pipeline.graph_steps import rewrite_step
from cspdeploy.pipeline.images import images_seen, images_to_calibrate, prepare
from cspdeploy.pipeline.origin import TorchOrigin
from cspdeploy.pipeline.source import Source, resolve_source
from cspdeploy.pipeline.target import fit_options, open_target
from cspdeploy.quant.audit_images import audit_calibration
from cspdeploy.quant.int8 import Int8Settings, assemble
from cspdeploy.quant.observations_cache import ObservationsCache, default_cache_folder
from cspdeploy.quant.placements import Placement, find_placement
from cspdeploy.quant.plan import QuantPlan
from cspdeploy.quant.prepare import prepare_float
from cspdeploy.quant.qat import QatNetwork
from cspdeploy.quant.qat_file import QatOrigin, graph_fingerprint, load_qat, qat_path, write_qat
from cspdeploy.quant.qat_train import QatRecipe, QatScore, fine_tune, score
from cspdeploy.quant.select import select
from cspdeploy.quant.torch_graph import TorchGraph
from cspdeploy.train.data import BatchLoader
from cspdeploy.train.loop import EpochRecord

__all__ = ["QatReport", "QatRequest", "train_qat"]

Progress = Callable[[str, int, int], None]

CHECKPOINT_FILE, START_FILE, GRAPH_FILE = "checkpoint.pt", "start.safetensors", "float.onnx"
NUM_PROBES = 4
"""Images that simplification is compared on: as many as `export.simplify` looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QatRequest:
    """What to fine-tune, and how.

    Attributes:
        data: "fashion-mnist", or a folder of class folders; None: what the model was trained on, where that is known.
        calibration: folder of images that the grids are chosen on; None: the model's own.
        target: as of `cspdeploy export`; None: ONNX Runtime on this machine.
        command: the command line, for the record.
    """

    model: str
    models: Path = Path("models")
    data: str | None = None
    calibration: Path | None = None
    target: str | None = None
    recipe: QatRecipe = field(default_factory=QatRecipe)
    command: str = ""
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QatReport:
    """What training brought.

    Attributes:
        file: of the fine-tuned weights and their grids; it is there where `kept`.
        kept: on the test split the loss fell, and no more than one image of top-1 was lost. Top-1 alone would be
            decided by a handful of images, and the loss alone can fall while it does.
        before: INT8 as post-training quantisation leaves it; after: fine-tuned.
    """

    file: str
    placement: str
    dataset: str
    kept: bool
    before: QatScore
    after: QatScore
    curve: tuple[EpochRecord, ...]
    warnings: tuple[str, ...] = ()
    """Of the images that the grids were chosen on."""


def train_qat(request: QatRequest, *, progress: Progress = lambda what, done, total: None) -> QatReport:
    """Fine-tune the INT8 form of a trained model, and leave `qat-<placement>.safetensors` in its folder.

    Finished epochs lie in `.<name>.qat-<placement>.run/` beside the folder until the run is over.

    Raises:
        InputError: no trained model folder, no labels or other ones, a plan or an unfinished run already there, or a
            loss that is not finite.
    """
    progress("loading weights", 0, 0)
    target = open_target(request.target, int8=True)
    placement = find_placement(request.target)
    source = resolve_source(
        request.model, models=request.models, weights=None, images=request.calibration, size_px=None
    )
    folder = _folder_of(source)
    file = qat_path(folder, placement.name)
    run = folder.parent / f".{folder.name}.{file.stem}.run"
    _require_room(file, run, request)
    training, testing = _open_data(request.data, source)
    if not request.resume:
        shutil.rmtree(run, ignore_errors=True)
    whole = _Run(request, source, target=target, placement=placement, run=run, progress=progress)
    return whole.train(file, training, testing)


class _Run:
    """One run in its folder."""

    def __init__(
        self, request: QatRequest, source: Source, *, target: Target | None, placement: Placement, run: Path,
        progress: Progress,
    ) -> None:  # fmt: skip
        self._request, self._source, self._target, self._placement = request, source, target, placement
        self._run, self._progress = run, progress
        self._warnings: tuple[str, ...] = ()

    def train(self, file: Path, training: LabelledImages, testing: LabelledImages) -> QatReport:
        contract, recipe = self._source.spec.preprocess, self._request.recipe
        self._progress(f"reading {len(training)} + {len(testing)} images", 0, 0)
        loaders = [BatchLoader(data, contract, batch=recipe.batch) for data in (training, testing)]
        start = self._run / START_FILE
        if not self._request.resume:
            self._prepare(start, loaders[1])
        graph, started = TorchGraph(onnx.load(self._run / GRAPH_FILE)), load_qat(start)
        before = from_json(QatScore, started.record["before"])
        identity: JsonObject = {
            "start": file_sha256(start), "weights": started.origin.weights_sha256, "data": training.name,
            "num_images": [len(training), len(testing)],
        }  # fmt: skip
        network, curve = fine_tune(
            graph, started.plan, self._source.model, recipe, training=loaders[0], testing=loaders[1],
            checkpoint=self._run / CHECKPOINT_FILE, identity=identity, resume=self._request.resume,
            progress=self._progress,
        )  # fmt: skip
        after = self._score(network, loaders[1], "INT8 fine-tuned")
        report = QatReport(
            file=str(file), placement=self._placement.name, dataset=training.name, kept=_is_better(after, before),
            before=before, after=after, curve=tuple(curve), warnings=self._warnings,
        )  # fmt: skip
        if report.kept:
            write_qat(file, network.plan(), origin=started.origin, record=self._record(report, len(training)))
        shutil.rmtree(self._run)
        return report

    def _record(self, report: QatReport, num_images: int) -> JsonObject:
        return {
            "command": self._request.command, "dataset": report.dataset, "num_images": num_images,
            "recipe": to_json(self._request.recipe), "before": to_json(report.before), "after": to_json(report.after),
            "epochs": [to_json(record) for record in report.curve],
        }  # fmt: skip

    def _prepare(self, start: Path, testing: BatchLoader) -> None:
        """The float graph and the best plan without training, as an export would make them."""
        self._run.mkdir(parents=True)
        model = prepare_float(onnx.load(self._write_float()), placement=self._placement)
        for path in self._run.glob("*.onnx"):
            path.unlink()
        write_model(model, self._run / GRAPH_FILE)
        graph, plan = TorchGraph(model), self._choose_plan(model)
        plan = replace(plan, values={**{name: graph.weights[name].numpy() for name in plan.weights}, **plan.values})
        before = self._score(QatNetwork(graph, plan).eval(), testing, "INT8 before training")
        spec = self._source.spec
        origin = QatOrigin(
            weights_sha256=spec.provenance.weights_sha256, placement=self._placement.name,
            fingerprint=graph_fingerprint(model), height_px=spec.preprocess.height_px,
            width_px=spec.preprocess.width_px,
        )  # fmt: skip
        write_qat(start, plan, origin=origin, record={"before": to_json(before)})

    def _write_float(self) -> Path:
        """By the steps of `pipeline.recipe`, so that names and shapes are those of an exported file."""
        self._progress("ONNX", 0, 0)
        raw, simplified, rewritten = (self._run / f"{name}.onnx" for name in ("raw", "simplified", "rewritten"))
        opset = fit_options(self._target, opset=None, dynamic_batch=False)
        operators = self._target.decompose if self._target else frozenset[str]()
        origin = TorchOrigin(self._source, opset=opset, operators=operators)
        x_NCHW = prepare(self._source.images[:NUM_PROBES], self._source.spec)
        origin.write_onnx(raw, x_NCHW, dynamic_batch=False)
        job = start_simplify(raw, simplified)
        try:
            job.finish(x_NCHW, batch=1)
        finally:
            job.stop()
        rewrite_step(simplified, rewritten, x_NCHW, input_name=origin.input_name)
        return rewritten if rewritten.is_file() else simplified

    def _choose_plan(self, model: onnx.ModelProto) -> QuantPlan:
        images = images_to_calibrate(
            self._source.spec, stored=self._source.images, golden=np.empty(0, np.int64),
            origin=self._source.images_origin, folder=self._request.calibration, max_images=INT8_MAX_IMAGES,
        )  # fmt: skip
        folder = self._request.calibration
        seen = None if folder is None else images_seen(self._source.spec, self._source.weights)
        self._warnings = tuple(finding.text for finding in audit_calibration(images, seen=seen).findings)
        settings = Int8Settings()
        assembly = assemble(
            model, images, placement=self._placement, settings=settings,
            cache=ObservationsCache(default_cache_folder()), progress=self._progress,
        )  # fmt: skip
        return select(assembly, method=settings.method, progress=self._progress).plan

    def _score(self, network: QatNetwork, testing: BatchLoader, what: str) -> QatScore:
        total = len(testing.data)
        return score(
            network, self._source.model, testing.in_order(), self._request.recipe,
            progress=lambda done: self._progress(what, done, total),
        )  # fmt: skip


def _is_better(after: QatScore, before: QatScore) -> bool:
    lost = round((before.top1 - after.top1) * after.num_images)
    return after.loss < before.loss and lost <= 1


def _folder_of(source: Source) -> Path:
    """The model's folder, where the plan goes.

    Raises:
        InputError: it has none, or gives no classes.
    """
    name = source.spec.name
    if source.spec.task != "classify":
        raise InputError(f"--qat: '{name}' gives {source.spec.task}, expected classes to train on",
                         fix="cspdeploy export MODEL --int8, which needs no labels")  # fmt: skip
    weights = Path(source.weights)
    if weights.name != WEIGHTS_FILE or not (weights.parent / SPEC_FILE).is_file():
        raise InputError(
            f"--qat: '{name}' has no model folder, its weights are {weights}",
            fix=f"cspdeploy train {name} --data DIR, or cspdeploy pull {name}",
        )
    return weights.parent


def _require_room(file: Path, run: Path, request: QatRequest) -> None:
    if file.exists() and not (request.overwrite or request.resume):
        raise InputError(f"{file}: exists already", fix="give --overwrite to train it anew")
    unfinished = (run / CHECKPOINT_FILE).is_file()
    if unfinished and not (request.resume or request.overwrite):
        raise InputError(
            f"{run}: holds an unfinished run", fix="give --resume to go on with it, or --overwrite to start anew"
        )
    if request.resume and not unfinished:
        raise InputError(f"{run}: no finished epoch to go on from", fix="leave out --resume")


def _open_data(data: str | None, source: Source) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images of the model's own classes."""
    known = source.spec.provenance.dataset.partition("/")[0]
    name = data if data is not None else known if known == FASHION_MNIST else None
    if name is None:
        raise InputError(
            f"--qat: no labelled images of '{source.spec.name}'", fix=f"--data {FASHION_MNIST}, or --data DIR"
        )
    training, testing = (open_dataset(name, split=split) for split in ("train", "test"))
    for images in (training, testing):
        if images.labels != source.labels:
            raise InputError(
                f"--data {name}: its classes ({', '.join(images.labels[:5])}, ...) are not those of "
                f"'{source.spec.name}' ({', '.join(source.labels[:5])}, ...)",
                fix="give images of the classes that it was trained on, under the same names and in the same order",
            )
    return training, testing
