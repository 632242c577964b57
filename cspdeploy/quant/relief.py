"""What a detector's selection is refined by: ranges tensor by tensor, and a few layers that stay in float.

One layer of a detector may hold a third of the noise and a twentieth of the work, as an early one does whose maps
decide where anything is. Scores near a threshold then cross it: each is a box lost. What such a layer costs is known
beforehand, so that no timing enters the choice, and the same images give the same file on every machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from cspdeploy.quant.assemble import Assembly
from cspdeploy.quant.islands import float_cost, list_islands
from cspdeploy.quant.plan import QuantPlan
from cspdeploy.quant.scheme import Scheme
from cspdeploy.quant.select import MIN_GAIN_DB, Selection, Tried
from cspdeploy.quant.sensitivity import measure_sensitivity

__all__ = ["MIN_RELIEF_DB", "MOST_FLOAT", "find_relief", "mix_ranges", "relieve"]

Progress = Callable[[str, int, int], None]

MOST_FLOAT = 0.08
"""Share of the INT8 layers' work, conversions included. INT8 takes a third of float's time on a CPU with dot products,
so that a 12th of the work in float adds a sixth of the time at most. By the profile of a YOLOv4-tiny at 416 px (ONNX
Runtime, one thread) a layer of 6 % of the work takes 3.4 ms in float and 1.1 in INT8; the INT8 file takes 18.7 in all,
FP32 59.6."""
MIN_RELIEF_DB = 1.0
"""What a layer in float must give on held-out images: less is not worth its time."""
LEAST_SHARE = 0.1
"""Of the noise left that a layer must take away."""
NUM_IMAGES = 16
"""That noise is forecast on, two directions each; what it proposes is measured on others."""


def relieve(assembly: Assembly, selection: Selection, *, progress: Progress) -> Selection:
    """The same selection with such layers in float, where there are any and they help on held-out images."""
    progress("which layers lose most", 0, 0)
    added = find_relief(assembly, selection.scheme, selection.plan)
    if not added:
        return selection
    scheme = dataclasses.replace(selection.scheme, floats=selection.scheme.floats | added)
    if not scheme.mixed:
        return _tried(assembly, selection, scheme, least_gain_db=MIN_RELIEF_DB, progress=progress)
    # A layer in float parts tensors that shared a step, and ranges that were chosen for all of them fit none.
    before = assembly.mixture
    plain = dataclasses.replace(scheme, mixed=False)
    assembly.mix(plain, assembly.plan(plain))
    found = _tried(assembly, selection, scheme, least_gain_db=MIN_RELIEF_DB, progress=progress)
    if found.scheme != scheme:
        assembly.mixture = before
    return found


def mix_ranges(assembly: Assembly, selection: Selection, *, progress: Progress) -> Selection:
    """The same selection with each tensor's range chosen by what it moves, where that helps on held-out images."""
    progress("ranges tensor by tensor", 0, 0)
    assembly.mix(selection.scheme, selection.plan)
    scheme = dataclasses.replace(selection.scheme, mixed=True)
    return _tried(assembly, selection, scheme, least_gain_db=MIN_GAIN_DB, progress=progress)


def _tried(
    assembly: Assembly, selection: Selection, scheme: Scheme, *, least_gain_db: float, progress: Progress
) -> Selection:
    progress(f"trying {scheme}", len(selection.tried), 0)
    plan = assembly.plan(scheme)
    sqnr = assembly.sqnr_db(plan)
    tried = (*selection.tried, Tried(scheme=scheme, sqnr_db=sqnr))
    if not sqnr >= selection.sqnr_db + least_gain_db:
        return dataclasses.replace(selection, tried=tried)
    return dataclasses.replace(selection, scheme=scheme, plan=plan, sqnr_db=sqnr, tried=tried)


def find_relief(assembly: Assembly, scheme: Scheme, plan: QuantPlan) -> frozenset[str]:
    """Layers (first outputs) that take most noise away for what they cost, within `MOST_FLOAT`; empty for none.

    Args:
        plan: that of the scheme.
    """
    sensitivity = measure_sensitivity(
        assembly.graph, plan, assembly.fit_batches(NUM_IMAGES), groups=assembly.layout(scheme).groups,
        float_values=assembly.equalisation(scheme.exponent).values, view=assembly.view,
    )  # fmt: skip
    layers = sensitivity.layers
    affordable = MOST_FLOAT * sum(layer.macs for layer in layers)

    def noise(floats: frozenset[str]) -> float:
        layout = assembly.layout(dataclasses.replace(scheme, floats=scheme.floats | floats))
        return sensitivity.noise(tensors=layout.tensors, nodes=layout.nodes)

    islands = [island.nodes for island in list_islands(layers)]
    floats, left = frozenset[str](), noise(frozenset())
    while True:
        wider = {floats | nodes for nodes in islands} - {floats}
        found = {one: left - noise(one) for one in wider if float_cost(layers, one) <= affordable}
        worth = [one for one in found if found[one] >= LEAST_SHARE * left]
        if not worth or not left > 0:
            return floats
        spent = float_cost(layers, floats)
        # In one order on all machines, where two are alike.
        floats = max(worth, key=lambda one: (found[one] / max(1.0, float_cost(layers, one) - spent), sorted(one)))
        left = noise(floats)
