from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cspdeploy.core.errors import InputError
from cspdeploy.quant.place import lay_out
from cspdeploy.quant.prepare import prepare_float
from cspdeploy.quant.simulate import simulate
from cspdeploy.quant.torch_graph import TorchGraph
from cspdeploy.quant.weight_grids import fit_weight_grids
from cspdeploy.quant.write import write_qdq
from tests.quant.placed_graphs import ROWS, chain, images, plan_by_extremes, run_ort

ORT = ROWS["ort-cpu"]


def test_empty_channel_with_a_bias_is_written_as_it_is() -> None:
    ready = prepare_float(chain())
    graph = TorchGraph(ready)
    layout = lay_out(graph, ORT)
    graph.weights["w1"][2] = 1e-20
    graph.weights["b1"][2] = 3.0
    plan = plan_by_extremes(graph, layout, ORT, images())
    values = {name: graph.weights[name].numpy() for name in ("w1", "b1")}
    plan = dataclasses.replace(plan, values=values)
    with pytest.raises(InputError, match="bias b1"):
        write_qdq(ready, plan)
    fitted = fit_weight_grids(graph, layout, ORT, grids=plan.grids, values=values)
    plan = dataclasses.replace(plan, weights=fitted)
    x = images()
    expected = simulate(graph, plan, [x])["y"]
    np.testing.assert_allclose(run_ort(write_qdq(ready, plan), x)["y"], expected, rtol=0.01, atol=0.05)


@pytest.mark.parametrize("per_channel", [True, False])
def test_other_weights_have_the_finest_grid_that_holds_them(per_channel: bool) -> None:
    ready = prepare_float(chain())
    graph = TorchGraph(ready)
    row = dataclasses.replace(ORT, per_channel=per_channel)
    layout = lay_out(graph, row)
    plan = plan_by_extremes(graph, layout, row, images())
    fitted = fit_weight_grids(graph, layout, row, grids=plan.grids)
    assert fitted.keys() == layout.weights.keys()
    largest = torch.amax(graph.weights["w1"].abs().flatten(1), 1).numpy()
    np.testing.assert_allclose(fitted["w1"].scales, (largest if per_channel else largest.max(keepdims=True)) / 127)
