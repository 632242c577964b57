"""`quantise`: a float32 ONNX file to an INT8 file that is worth shipping, or a reason why there is none."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch

from cspdeploy.core.catalog import INT8_TIME_LIMIT_S, Effort, Int8Mode, RangeMethod
from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.detection.spec import Detection
from cspdeploy.core.types import StepRecord
from cspdeploy.quant.assemble import Assembly, batch_size, spread
from cspdeploy.quant.budget import parse_budget
from cspdeploy.quant.calibration import CalibrationSet
from cspdeploy.quant.decide import Candidates, decide, require_measurable
from cspdeploy.quant.observations import Observations
from cspdeploy.quant.observations_cache import ObservationsCache, default_cache_folder, observation_key
from cspdeploy.quant.observe import MAX_POSITIONS, NUM_SIDE_BINS, check_finite, observe
from cspdeploy.quant.placements import Placement
from cspdeploy.quant.prepare import prepare_float
from cspdeploy.quant.relief import mix_ranges, relieve
from cspdeploy.quant.rounding import round_weights
from cspdeploy.quant.select import Selection, select, with_rounding
from cspdeploy.quant.torch_graph import TorchGraph
from cspdeploy.quant.without_images import quantise_without_images

__all__ = ["Int8Settings", "assemble", "quantise"]

Progress = Callable[[str, int, int], None]

OBSERVER = f"histograms 1: {NUM_SIDE_BINS} bins, {MAX_POSITIONS} positions, torch {torch.__version__}"
"""Its number is raised when the same graph and images would be observed otherwise."""
HELD_OUT_PIXELS = 2**20
MIN_HELD_OUT, MAX_HELD_OUT = 16, 128
"""Images that schemes are judged on: as many as have that many pixels, within these. A map of a larger image holds more
values to judge by, and takes longer."""
MAX_JUDGED = 64
"""Of a detector: images that the engine runs to count boxes on. Of 300 boxes one is a third of a percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Settings:
    """As `cspdeploy.pipeline.int8_step.Int8Request`, which checks them."""

    mode: Int8Mode = "static"
    method: RangeMethod = "auto"
    effort: Effort = "normal"
    power_of_two: bool = False
    max_drop: str | None = None
    max_latency: str | None = None
    time_limit_s: float = INT8_TIME_LIMIT_S


def quantise(
    source: Path, target: Path, images: CalibrationSet, *, placement: Placement, settings: Int8Settings,
    labelled: LabelledImages | None = None, detection: Detection | None = None, cache: ObservationsCache | None = None,
    progress: Progress = lambda what, done, total: None,
) -> StepRecord:  # fmt: skip
    """Write the best INT8 file that is found for the placement's engine, if it earns its place there.

    Args:
        source: float32 ONNX file with one image input.
        images: real ones. Ranges and repairs are fitted to some, judged on others.
        labelled: for a budget in points of top-1.
        detection: of a detector, whose `source` gives its raw maps: what is chosen, is chosen by its boxes and scores.
        cache: of observations; None: the user's.

    Returns:
        The outcome is "kept", without a `target`, where no file is fast and accurate enough; `detail` says why.
        Facts hold no timing, unless a latency was asked for or nothing is shipped.

    Raises:
        InputError: the graph or the images cannot be used, or the budget cannot be measured here.
    """
    budget = parse_budget(max_drop=settings.max_drop, max_latency=settings.max_latency)
    static = settings.mode == "static"
    require_measurable(budget, placement, points=static, decisions=static and detection is None)
    progress("preparing the graph", 0, 0)
    model = prepare_float(onnx.load(source), placement=placement)
    if settings.mode != "static":
        return quantise_without_images(
            model, source, target, mode=settings.mode, placement=placement, budget=budget, images=images,
            labelled=labelled, detection=detection, progress=progress,
        )  # fmt: skip
    kept = cache or ObservationsCache(default_cache_folder())
    assembly = assemble(
        model, images, placement=placement, settings=settings, detection=detection, cache=kept, progress=progress
    )
    selection = select(assembly, method=settings.method, progress=progress)
    if detection is not None:
        if settings.method == "auto":
            selection = mix_ranges(assembly, selection, progress=progress)
        selection = relieve(assembly, selection, progress=progress)
    if settings.effort == "high":
        selection = _rounded(assembly, selection, settings, progress)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".int8-") as folder:
        candidates = Candidates(model=model, assembly=assembly, selection=selection, work=Path(folder))
        return decide(
            candidates, source, target, budget=budget, labelled=labelled, time_limit_s=settings.time_limit_s,
            progress=progress,
        )  # fmt: skip


def _rounded(assembly: Assembly, selection: Selection, settings: Int8Settings, progress: Progress) -> Selection:
    """With weights rounded for the outputs' sake, where that helps on held-out images."""
    bare = dataclasses.replace(selection.scheme, bias=False)  # rounding corrects biases behind itself
    done = total = 0

    def tell(layers: int, of: int) -> None:
        nonlocal done, total
        done, total = layers, of
        progress("rounding weights", layers, of)

    try:
        changed = round_weights(
            assembly.graph, assembly.plan(bare), assembly.layout(bare), assembly.fit_batches(),
            progress=tell, deadline=settings.time_limit_s,
        )  # fmt: skip
    except KeyboardInterrupt:  # of a repair: what is already good goes on
        return selection
    unfinished = f" ({done} of {total} layers, then the time limit was reached)" if done < total else ""
    return with_rounding(assembly, selection, changed, unfinished=unfinished)


def assemble(
    model: onnx.ModelProto, images: CalibrationSet, *, placement: Placement, settings: Int8Settings,
    cache: ObservationsCache, progress: Progress, detection: Detection | None = None,
) -> Assembly:  # fmt: skip
    """Observe the graph on the images, or recall what was observed before.

    Args:
        model: as `prepare_float` leaves it.
    """
    graph = TorchGraph(model)
    split = images.split()
    fit, held_out = split.fit, split.held_out
    most = HELD_OUT_PIXELS // (images.contract.height_px * images.contract.width_px)
    judged = None if detection is None else spread(held_out, MAX_JUDGED)
    held_out = spread(held_out, max(MIN_HELD_OUT, min(MAX_HELD_OUT, most)))
    key = observation_key(
        model.SerializeToString(deterministic=True), content_hash=images.content_hash,
        observer=f"{OBSERVER}, images {_digest(images, fit)}",
    )  # fmt: skip
    known = cache.load(key)
    if known is not None:
        observations = Observations.from_arrays(known)
    else:
        size = batch_size(images)
        progress("observing", 0, len(fit))
        with torch.inference_mode():
            observations = observe(
                graph, images.batches(size, fit), progress=lambda done: progress("observing", done, len(fit))
            )
        cache.store(key, observations.to_arrays())
    check_finite(observations, graph)
    return Assembly(
        graph, observations, images, placement=placement, fit=fit, held_out=held_out,
        power_of_two=settings.power_of_two, shared=split.shared, judged=judged, detection=detection,
    )  # fmt: skip


def _digest(images: CalibrationSet, indices: npt.NDArray[np.int64]) -> str:
    """Of these images in this order: which of a set are observed hangs on the order of their names."""
    traits = images.traits().images
    return hashlib.sha256(b"".join(traits[i].pixel_digest for i in indices)).hexdigest()
