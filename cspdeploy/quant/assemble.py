"""From observations to a plan, and its error on images that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from cspdeploy.quant.bias import correct_biases
from cspdeploy.quant.calibration import CalibrationSet
from cspdeploy.quant.equalise import Equalisation, equalise
from cspdeploy.quant.importance import measure_importance
from cspdeploy.quant.observe import Observations
from cspdeploy.quant.place import Layout, lay_out
from cspdeploy.quant.placements import Placement
from cspdeploy.quant.plan import Floats, QuantPlan
from cspdeploy.quant.range_weights import joined_tensors
from cspdeploy.quant.ranges import choose_grids
from cspdeploy.quant.scheme import Scheme
from cspdeploy.quant.simulate import RoundedWeights, run_batches, simulate
from cspdeploy.quant.torch_graph import TorchGraph
from cspdeploy.quant.weight_grids import fit_weight_grids

__all__ = ["EQUALISED_QUANTILE", "Assembly", "batch_size", "output_sqnr_db", "spread"]

Indices = npt.NDArray[np.int64]

FEW_IMAGES = 64
"""That biases are corrected on, and gradients taken: a mean over maps needs few. Measured: 41.4 dB with 64, 41.2 with
256."""
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
    ) -> None:
        self.graph, self.observations, self.placement = graph, observations, placement
        self.images, self._fit, self.shared = images, fit, shared
        self._held_out = tuple(images.batches(batch_size(images), held_out))
        self._power_of_two = power_of_two
        self._slopes = _slopes(graph)
        self._importance = measure_importance(graph, self.fit_batches(FEW_IMAGES), tensors=list(observations.tensors))
        self._equalised: dict[float, Equalisation] = {}
        self._rounded = RoundedWeights()
        with torch.inference_mode():
            self.reference = run_batches(graph, self.held_out_batches())

    def fit_batches(self, most: int | None = None) -> Iterator[Floats]:
        """Images that plans may be fitted to, at most so many of them, evenly over their order; decoded one by one."""
        return self.images.batches(batch_size(self.images), spread(self._fit, most or len(self._fit)))

    def held_out_batches(self) -> tuple[Floats, ...]:
        """Images that plans are judged on."""
        return self._held_out

    @property
    def num_held_out(self) -> int:
        """Of these."""
        return sum(len(batch) for batch in self._held_out)

    def layout(self, scheme: Scheme) -> Layout:
        """Where its grids go."""
        return lay_out(self.graph, self.placement, exclude=scheme.floats)

    def plan(self, scheme: Scheme) -> QuantPlan:
        """The plan of a scheme."""
        layout = self.layout(scheme)
        equalised = self.equalisation(scheme.exponent)
        grids = choose_grids(
            self.observations, layout, self.placement, method=scheme.method,
            factors=equalised.factors, slopes=self._slopes, joined=joined_tensors(self.graph, layout),
            importance=self._importance, power_of_two=self._power_of_two,
        )  # fmt: skip
        plan = QuantPlan(
            grids=grids,
            weights=fit_weight_grids(self.graph, layout, self.placement, grids=grids, values=equalised.values),
            values=equalised.values, biases=dict(layout.biases), factors=equalised.factors,
        )  # fmt: skip
        return self.with_biases(plan, layout) if scheme.bias else plan

    def with_biases(self, plan: QuantPlan, layout: Layout) -> QuantPlan:
        """The same with biases corrected on the fitting images."""
        corrected = correct_biases(self.graph, plan, layout, self.fit_batches(FEW_IMAGES))
        return replace(plan, values={**plan.values, **corrected})

    def sqnr_db(self, plan: QuantPlan) -> float:
        """Of the worst output, on held-out images."""
        with torch.inference_mode():
            got = simulate(self.graph, plan, self.held_out_batches(), rounded=self._rounded)
            return output_sqnr_db(self.reference, got)

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


def _slopes(graph: TorchGraph) -> dict[str, float]:
    """Of the negative side, by the tensor before the activation."""
    found = {node.inputs[0]: float(node.attributes.get("alpha", 0.01))
             for node in graph.nodes if node.operator == "LeakyRelu"}  # fmt: skip
    return found | {node.inputs[0]: 0.0 for node in graph.nodes if node.operator == "Relu"}
