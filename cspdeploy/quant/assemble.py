"""From observations to a plan, and its error on images that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from cspdeploy.core.detection.match import BoxMatch
from cspdeploy.core.detection.spec import Detection
from cspdeploy.quant.bias import correct_biases
from cspdeploy.quant.box_agreement import count_boxes
from cspdeploy.quant.calibration import CalibrationSet
from cspdeploy.quant.equalise import Equalisation, equalise
from cspdeploy.quant.importance import measure_importance
from cspdeploy.quant.mixture import choose_mixture, tensor_groups
from cspdeploy.quant.observe import Observations
from cspdeploy.quant.place import Layout, lay_out
from cspdeploy.quant.place_rules import is_product
from cspdeploy.quant.placements import Placement
from cspdeploy.quant.plan import Floats, Grid, QuantPlan
from cspdeploy.quant.range_weights import joined_tensors
from cspdeploy.quant.ranges import METHODS, choose_grids
from cspdeploy.quant.scheme import Scheme
from cspdeploy.quant.simulate import RoundedWeights, run_batches, simulate
from cspdeploy.quant.torch_graph import TorchGraph
from cspdeploy.quant.view import view_arrays, view_of
from cspdeploy.quant.weight_grids import fit_weight_grids

__all__ = ["EQUALISED_QUANTILE", "Assembly", "batch_size", "output_sqnr_db", "spread"]

Indices = npt.NDArray[np.int64]

HEAD = "gives a detector's boxes and scores: in float unless that was measured to change nothing"
RELIEF = "takes more noise away in float than time: measured on held-out images"
FEW_IMAGES = 64
"""That biases are corrected on, and gradients taken: a mean over maps needs few. Measured: 41.4 dB with 64, 41.2 with
256."""
MIXED_IMAGES = 24
"""That ranges are chosen by tensor by tensor: candidates are compared on the same images and directions."""
MIXED_FACTORS = (0.6, 0.7, 0.84, 1.19)
"""Of the steps by the best method, tried besides the other methods. On a YOLOv4-tiny 0.7 left a sixth of the noise of
one group of tensors, where the best of the methods left a third."""
EXACT_SQNR_DB = 150.0
"""What is said of outputs that are equal: float32 itself ends there."""
_BATCH_PIXELS = 2**18
"""Of one batch: CSPDarknet53 then keeps some 300 MB of activations, at 32x32 as at 256x256."""


EQUALISED_QUANTILE = 0.9999
"""Of each channel's values, what equalisation gives room for. Measured on CSPDarknet53: 38.8 dB, against 37.3 with the
largest value, 38.0 with 99.997 % and 36.7 with 99.9 %."""


class Assembly:
    """Everything that plans are made from, observed once.

    Args:
        held_out: images to judge plans on; few of them, which are kept in memory.
        fit: images that biases are corrected on.
        judged: images that a file is judged on by its engine, which is fast; None: `held_out`.
        detection: of a detector, whose graph gives its raw maps.
        shared: there are too few images to hold any out: plans are judged on those that they are fitted to.
    """

    def __init__(
        self,
        graph: TorchGraph,
        observations: Observations,
        images: CalibrationSet,
        *,
        placement: Placement,
        fit: Indices,
        held_out: Indices,
        power_of_two: bool,
        shared: bool = False,
        judged: Indices | None = None,
        detection: Detection | None = None,
    ) -> None:
        self.graph, self.observations, self.placement = graph, observations, placement
        self.images, self._fit, self.shared = images, fit, shared
        self._held_out = tuple(images.batches(batch_size(images), held_out))
        self._judged = judged
        self.detection, self.view = detection, view_of(detection)
        self.float_heads = frozenset() if detection is None else _heads(graph)
        self._power_of_two = power_of_two
        self._slopes = _slopes(graph)
        self._importance = measure_importance(
            graph, self.fit_batches(FEW_IMAGES), tensors=list(observations.tensors), view=self.view
        )
        self._equalised: dict[float, Equalisation] = {}
        self.mixture: dict[str, tuple[str, float]] = {}
        """Method and factor of the ranges of `mixed` schemes, by tensor; those of the scheme for any other."""
        self._rounded = RoundedWeights()
        with torch.inference_mode():
            self._exact = run_batches(graph, self.held_out_batches())
            self.reference = view_arrays(self.view, self._exact, self._exact)

    def fit_batches(self, most: int | None = None) -> Iterator[Floats]:
        """Images that plans may be fitted to, at most so many of them, evenly over their order; decoded one by one."""
        return self.images.batches(batch_size(self.images), spread(self._fit, most or len(self._fit)))

    def held_out_batches(self) -> tuple[Floats, ...]:
        """Images that plans are judged on."""
        return self._held_out

    def judged_batches(self) -> Iterable[Floats]:
        """Images that files are judged on: those, and others that nothing was fitted to."""
        return self._held_out if self._judged is None else self.images.batches(batch_size(self.images), self._judged)

    @property
    def num_held_out(self) -> int:
        """Of these."""
        return sum(len(batch) for batch in self._held_out)

    def layout(self, scheme: Scheme) -> Layout:
        """Where its grids go."""
        layout = lay_out(self.graph, self.placement, exclude=scheme.floats)
        if self.detection is None:
            return layout
        asked = scheme.floats & layout.float_nodes.keys()
        why = {name: HEAD if name in self.float_heads else RELIEF for name in asked}
        return replace(layout, float_nodes={**layout.float_nodes, **why})

    def plan(self, scheme: Scheme) -> QuantPlan:
        """The plan of a scheme."""
        layout = self.layout(scheme)
        equalised = self.equalisation(scheme.exponent)
        grids = self._grids(layout, scheme)
        if scheme.mixed:
            grids = self._mixed(layout, scheme, grids)
        plan = QuantPlan(
            grids=grids,
            weights=fit_weight_grids(self.graph, layout, self.placement, grids=grids, values=equalised.values),
            values=equalised.values, biases=dict(layout.biases), factors=equalised.factors,
        )  # fmt: skip
        return self.with_biases(plan, layout) if scheme.bias else plan

    def _grids(self, layout: Layout, scheme: Scheme) -> dict[str, Grid]:
        """By its method alone."""
        return choose_grids(
            self.observations, layout, self.placement, method=scheme.method,
            factors=self.equalisation(scheme.exponent).factors, slopes=self._slopes,
            joined=joined_tensors(self.graph, layout), importance=self._importance, power_of_two=self._power_of_two,
        )  # fmt: skip

    def mix(self, scheme: Scheme, plan: QuantPlan) -> None:
        """Find which method each tensor's range is to be chosen by, on fitting images; `plan` takes `mixed` then.

        Args:
            scheme: not mixed itself, and `plan` is its.
        """
        layout = self.layout(scheme)
        factors = () if self._power_of_two else MIXED_FACTORS
        choices = [(scheme.method, 1.0), *((name, 1.0) for name in METHODS), *((scheme.method, one) for one in factors)]
        by_method = {name: self._grids(layout, replace(scheme, method=name)) for name in METHODS}
        candidates = [_scaled(by_method[name], factor) for name, factor in choices]
        batches = self.fit_batches(MIXED_IMAGES)
        chosen = choose_mixture(self.graph, plan, layout, candidates, batches, view=self.view)
        self.mixture = {name: choices[index] for name, index in chosen.items() if index}

    def _mixed(self, layout: Layout, scheme: Scheme, grids: Mapping[str, Grid]) -> dict[str, Grid]:
        """Those of a group of tensors that another layout has split or joined stay the scheme's own."""
        found = dict(grids)
        methods = {name for name, _ in self.mixture.values()}
        by_method = {name: self._grids(layout, replace(scheme, method=name)) for name in methods}
        for group in tensor_groups(layout):
            choices = {self.mixture.get(name) for name in group}
            if len(choices) == 1 and (choice := choices.pop()) is not None:
                method, factor = choice
                found |= _scaled({name: by_method[method][name] for name in group}, factor)
        return found

    def with_biases(self, plan: QuantPlan, layout: Layout) -> QuantPlan:
        """The same with biases corrected on the fitting images."""
        corrected = correct_biases(self.graph, plan, layout, self.fit_batches(FEW_IMAGES))
        return replace(plan, values={**plan.values, **corrected})

    def sqnr_db(self, plan: QuantPlan) -> float:
        """Of the worst output, on held-out images."""
        return output_sqnr_db(self.reference, view_arrays(self.view, self._simulated(plan), self._exact))

    def match_boxes(self, plan: QuantPlan) -> BoxMatch | None:
        """Of a detector, on held-out images."""
        if self.detection is None:
            return None
        return count_boxes(self._simulated(plan), self._exact, self.detection)

    def _simulated(self, plan: QuantPlan) -> dict[str, Floats]:
        with torch.inference_mode():
            return simulate(self.graph, plan, self.held_out_batches(), rounded=self._rounded)

    def equalisation(self, exponent: float) -> Equalisation:
        """Made once."""
        if exponent not in self._equalised:
            magnitudes = self.observations.magnitudes(EQUALISED_QUANTILE, slopes=self._slopes)
            self._equalised[exponent] = equalise(self.graph, magnitudes, exponent=exponent)
        return self._equalised[exponent]


def spread(indices: Indices, most: int) -> Indices:
    """At most that many, evenly over their order."""
    if len(indices) <= most:
        return indices
    picks = np.linspace(0, len(indices) - 1, most).round().astype(np.int64)
    return indices[picks]


def batch_size(images: CalibrationSet) -> int:
    """Images a batch, by their size alone, so that every machine sums in the same order."""
    height, width = images.contract.height_px, images.contract.width_px
    return max(1, min(64, _BATCH_PIXELS // (height * width)))


def output_sqnr_db(reference: Mapping[str, Floats], got: Mapping[str, Floats]) -> float:
    """Signal to quantisation noise, 10 log10(sum r^2 / sum (r - g)^2), of the worst output.

    Minus infinity where the noise is not finite, or where there is some and no signal.
    """
    found = []
    for name, exact in reference.items():
        wide = exact.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):  # inf - inf is NaN, which is judged below
            noise = float(np.sum(np.square(wide - got[name])))
        signal = float(np.sum(np.square(wide)))
        if not np.isfinite(noise) or (noise and not signal):
            return float("-inf")
        found.append(min(EXACT_SQNR_DB, 10 * np.log10(signal / noise)) if noise else EXACT_SQNR_DB)
    return float(min(found))


def _heads(graph: TorchGraph) -> frozenset[str]:
    """First outputs of the convolutions that give a detector's maps: those after which no product comes."""
    found = set()
    for name in graph.output_names:
        node = graph.producers.get(name)
        while node is not None and not is_product(node):
            node = graph.producers.get(node.inputs[0])
        if node is not None:
            found.add(node.outputs[0])
    return frozenset(found)


def _scaled(grids: Mapping[str, Grid], factor: float) -> dict[str, Grid]:
    """With both ends moved by that factor."""
    return {name: replace(grid, scale=float(np.float32(grid.scale * factor))) for name, grid in grids.items()}


def _slopes(graph: TorchGraph) -> dict[str, float]:
    """Of the negative side, by the tensor before the activation."""
    found = {node.inputs[0]: float(node.attributes.get("alpha", 0.01))
             for node in graph.nodes if node.operator == "LeakyRelu"}  # fmt: skip
    return found | {node.inputs[0]: 0.0 for node in graph.nodes if node.operator == "Relu"}
