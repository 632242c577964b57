"""One pass over images: what is exact, what is sampled, what may not be hidden."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cspdeploy.core.errors import InputError
from cspdeploy.quant import observe as observing
from cspdeploy.quant.observe import Observations, TensorObservation, check_finite, observe
from cspdeploy.quant.plan import Floats
from cspdeploy.quant.torch_graph import TorchGraph

GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
small (float[N, 3, H, W] images) => (float[N, 3, H, W] after, float[N, 3] means, int64[N, 1, H, W] places)
{
    after = LeakyRelu<alpha = 0.1>(images)
    pooled = GlobalAveragePool(after)
    means = Flatten(pooled)
    places = ArgMax<axis = 1>(after)
}
"""


@pytest.fixture(scope="module")
def graph() -> TorchGraph:
    return TorchGraph(onnx.parser.parse_model(GRAPH))


def _images(num: int, size: int = 8, seed: int = 0) -> Floats:
    scales = np.array([0.1, 1.0, 30.0], dtype=np.float32).reshape(1, 3, 1, 1)
    return np.random.default_rng(seed).standard_normal((num, 3, size, size), dtype=np.float32) * scales


def _same(a: TensorObservation, b: TensorObservation) -> None:
    for key in ("low", "high", "counts", "exponents"):
        np.testing.assert_array_equal(getattr(a, key), getattr(b, key), err_msg=key)
    for key in ("mean", "square_mean"):
        np.testing.assert_allclose(getattr(a, key), getattr(b, key), rtol=1e-5, atol=1e-6, err_msg=key)
    assert (a.num_values, a.num_nonfinite) == (b.num_values, b.num_nonfinite)


def test_statistics_of_every_channel_are_exact(graph: TorchGraph) -> None:
    x_NCHW = _images(10)
    done: list[int] = []
    seen = observe(graph, [x_NCHW[:4], x_NCHW[4:]], progress=done.append)
    assert done == [4, 10]
    assert seen.num_images == 10
    assert list(seen.tensors) == ["images", "after", "pooled", "means"]  # not the integers
    image = seen.tensors["images"]
    np.testing.assert_array_equal(image.low, x_NCHW.min((0, 2, 3)))
    np.testing.assert_array_equal(image.high, x_NCHW.max((0, 2, 3)))
    np.testing.assert_allclose(image.mean, x_NCHW.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(image.square_mean, (x_NCHW**2).mean((0, 2, 3)), rtol=1e-5)
    assert image.num_values == x_NCHW.size
    assert image.counts.sum() == x_NCHW.size
    assert seen.tensors["means"].low.shape == (3,)


def test_bins_hold_the_values_of_their_range(graph: TorchGraph) -> None:
    x_NCHW = _images(20)
    image = observe(graph, [x_NCHW]).tensors["images"]
    for channel in range(3):
        values = x_NCHW[:, channel]
        top = 2.0 ** image.exponents[channel]
        assert top / 2 < np.abs(values).max() <= top
        edges = np.arange(1, 129) * top / 128
        inner = np.concatenate([[0.0], edges[:-1]])
        exact = [((values > a) & (values <= b)).sum() for a, b in zip(inner, edges, strict=True)]
        np.testing.assert_array_equal(image.counts[channel, 129:], exact)
        exact = [((-values > a) & (-values <= b)).sum() for a, b in zip(inner, edges, strict=True)]
        np.testing.assert_array_equal(image.counts[channel, :128][::-1], exact)


@given(st.permutations(range(6)), st.integers(1, 6), st.integers(-40, 40))
@settings(max_examples=8)  # each runs a graph seven times
def test_order_and_batches_do_not_matter(order: list[int], batch: int, octaves: int) -> None:
    """Ranges that double on the way end where they would have begun, had the largest value come first."""
    graph = TorchGraph(onnx.parser.parse_model(GRAPH))
    x_NCHW = _images(6, size=4) * (2.0 ** (octaves * np.arange(6) / 6)).astype(np.float32).reshape(6, 1, 1, 1)
    whole = observe(graph, [x_NCHW])
    moved = x_NCHW[order]
    parts = observe(graph, [moved[i : i + batch] for i in range(0, 6, batch)])
    for name, seen in whole.tensors.items():
        _same(seen, parts.tensors[name])


def test_exact_zeros_are_counted_apart(graph: TorchGraph) -> None:
    x_NCHW = _images(2)
    x_NCHW[:, :, :4] = 0.0
    x_NCHW[:, 0] = 0.0
    image = observe(graph, [x_NCHW, 100 * x_NCHW]).tensors["images"]
    np.testing.assert_array_equal(image.counts[:, 128], 2 * (x_NCHW == 0).sum((0, 2, 3)))
    assert image.histogram().num_zeros == 2 * (x_NCHW == 0).sum()
    assert image.magnitudes(None)[0] == 0.0
    assert image.magnitudes(0.99)[0] == 0.0


def test_large_maps_are_sampled_evenly_and_their_ends_are_not() -> None:
    graph = TorchGraph(onnx.parser.parse_model(GRAPH))
    x_NCHW = _images(4, size=128)
    x_NCHW[2, 1, 77, 33] = 1000.0
    image = observe(graph, [x_NCHW]).tensors["images"]
    assert image.high[1] == 1000.0
    taken = image.counts.sum(axis=1) / len(x_NCHW)
    assert np.all(taken <= observing.MAX_POSITIONS)
    assert np.all(taken >= observing.MAX_POSITIONS / 2)
    for quantile in (0.9, 0.99):
        exact = np.quantile(x_NCHW[:, 2], quantile)
        assert image.magnitudes(quantile)[2] == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("size", [64, 65, 96, 128, 224, 256, 416])
def test_samples_fall_on_all_columns_and_phases(size: int) -> None:
    step = observing._spread(size * size, size)
    places = np.arange(0, size * size, step)
    assert len(places) <= observing.MAX_POSITIONS
    rows, columns = np.divmod(places, size)
    assert set(columns) == set(range(size))
    phases = np.bincount(2 * (rows % 2) + columns % 2, minlength=4)
    assert phases.min() > 0.2 * len(places)


def test_magnitudes_are_quantiles_of_the_side_that_counts(graph: TorchGraph) -> None:
    x_NCHW = _images(64)
    x_NCHW[:, 1] -= 2.0
    image = observe(graph, [x_NCHW]).tensors["images"]
    for quantile in (0.9, 0.99, 0.999):
        high = np.quantile(x_NCHW, quantile, axis=(0, 2, 3))
        low = -np.quantile(x_NCHW, 1 - quantile, axis=(0, 2, 3))
        width = 2.0**image.exponents / 128
        assert np.all(np.abs(image.magnitudes(quantile) - np.maximum(high, low)) <= width)
        shrunk = image.magnitudes(quantile, negative_share=0.01)
        assert np.all(np.abs(shrunk - np.maximum(high, 0.01 * low)) <= width)
    np.testing.assert_array_equal(image.magnitudes(None), np.abs(x_NCHW).max((0, 2, 3)))
    by_name = observe(graph, [x_NCHW]).magnitudes(None, slopes={"images": 0.0})
    np.testing.assert_array_equal(by_name["images"], np.maximum(x_NCHW.max((0, 2, 3)), 0))


def test_factors_scale_channels_without_another_pass(graph: TorchGraph) -> None:
    x_NCHW, factors = _images(16), np.array([100.0, 4.0, 0.25], dtype=np.float32)
    scaled = observe(graph, [x_NCHW * factors.reshape(1, 3, 1, 1)]).tensors["images"].histogram()
    found = observe(graph, [x_NCHW]).tensors["images"].histogram(factors)
    assert found.low == pytest.approx(scaled.low)
    assert found.high == pytest.approx(scaled.high)
    assert found.total == pytest.approx(scaled.total)
    for side, exact in ((found.positive, scaled.positive), (found.negative, scaled.negative)):
        assert np.abs(np.cumsum(side.counts) - np.cumsum(exact.counts)).max() < 0.01 * exact.total


def test_weights_say_what_a_channel_counts_for(graph: TorchGraph) -> None:
    image = observe(graph, [_images(4)]).tensors["images"]
    weighted = image.histogram(weights=np.array([0.0, 0.0, 2.0]))
    assert weighted.total == pytest.approx(2 * image.counts[2].sum())
    assert weighted.high == image.histogram().high


def test_values_that_are_no_numbers_are_counted_and_named(graph: TorchGraph) -> None:
    x_NCHW = _images(4)
    x_NCHW[1, 0, 0, :3] = [np.nan, np.inf, -np.inf]
    seen = observe(graph, [x_NCHW[:1], x_NCHW[1:]])
    assert seen.tensors["images"].num_nonfinite == 3
    assert np.isfinite(seen.tensors["images"].high).all()
    assert np.isfinite(seen.tensors["images"].square_mean).all()
    with pytest.raises(InputError, match=r"'images', the input: 3 of 768 values are NaN or infinite"):
        check_finite(seen, graph)
    check_finite(observe(graph, [x_NCHW[:1]]), graph)


def test_the_node_that_leaves_the_numbers_is_named() -> None:
    text = GRAPH.replace("LeakyRelu<alpha = 0.1>(images)", "Exp(images)")
    graph = TorchGraph(onnx.parser.parse_model(text))
    with pytest.raises(InputError, match="'after', made by Exp"):
        check_finite(observe(graph, [10 * _images(4)]), graph)


def test_no_image_is_an_error(graph: TorchGraph) -> None:
    with pytest.raises(InputError, match="none, expected at least one"):
        observe(graph, [])


def test_tensors_of_changing_size_are_left_out(graph: TorchGraph) -> None:
    """What a detector selects; here, the network's own input."""
    seen = observe(graph, [_images(2), _images(2)[:, :2]])
    assert list(seen.tensors) == []


def test_a_tensor_of_very_many_slices_is_one_channel() -> None:
    graph = TorchGraph(onnx.parser.parse_model(GRAPH.replace("float[N, 3, H, W] images", "float[N, C, H, W] images")))
    wide = np.ones((1, observing.MAX_CHANNELS + 1, 1, 1), dtype=np.float32)
    assert observe(graph, [wide]).tensors["images"].counts.shape[0] == 1


def test_extreme_magnitudes_do_not_overflow(graph: TorchGraph) -> None:
    x_NCHW = np.zeros((1, 3, 2, 2), dtype=np.float32)
    x_NCHW[0, 0] = 3e38
    x_NCHW[0, 1] = 1e-44
    image = observe(graph, [x_NCHW]).tensors["images"]
    assert np.isfinite(image.square_mean[1:]).all()
    assert image.counts[0, 129:].sum() == 4
    assert image.counts[1, 129:].sum() == 4
    assert image.histogram().high == pytest.approx(3e38)


def test_arrays_and_back(graph: TorchGraph) -> None:
    seen = observe(graph, [_images(3)])
    again = Observations.from_arrays(seen.to_arrays())
    assert again.num_images == 3
    assert list(again.tensors) == list(seen.tensors)
    for name, tensor in seen.tensors.items():
        _same(tensor, again.tensors[name])
    with pytest.raises(KeyError):
        Observations.from_arrays({key: value for key, value in seen.to_arrays().items() if key != "counts"})


def test_memory_does_not_grow_with_images(graph: TorchGraph) -> None:
    few, many = observe(graph, [_images(1)]), observe(graph, [_images(8, seed=i) for i in range(8)])
    assert {n: a.shape for n, a in few.to_arrays().items()} == {n: a.shape for n, a in many.to_arrays().items()}


def test_no_gradients_are_kept(graph: TorchGraph) -> None:
    observe(graph, [_images(1)])
    assert torch.is_grad_enabled()


def test_a_number_of_the_whole_image_is_observed() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> net (float[N, 3, 8, 8] x) => (float y)'
        " { y = ReduceMax <keepdims = 0> (x) }"
    )
    x_NCHW = _images(2)
    seen = observe(TorchGraph(model), [x_NCHW[:1], x_NCHW[1:]]).tensors["y"]
    assert (seen.num_values, float(seen.high[0])) == (2, float(x_NCHW.max()))
