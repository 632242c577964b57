"""Every kind of layer against its definition written out in NumPy; every published cfg through both exporters."""

from __future__ import annotations

import io
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from cspdeploy.core.codec import from_json, to_json
from cspdeploy.nets.blocks import FeatureLevel
from cspdeploy.nets.darknet.cfg import parse_cfg
from cspdeploy.nets.darknet.network import DarknetNet
from cspdeploy.nets.darknet.sections import DarknetConfig

NAMES = [
    "csdarknet53-omega", "csresnext50-panet-spp-original-optimal", "densenet201", "yolov4", "yolov4-csp",
    "yolov4-csp-swish", "yolov4-tiny", "yolov4-tiny-3l",
]  # fmt: skip
Thinned = Callable[[str], DarknetConfig]
Randomise = Callable[[nn.Module], DarknetNet]
Array = np.ndarray[Any, np.dtype[np.float64]]

NET = "[net]\nheight={h}\nwidth={w}\nchannels=3\n"
CLASSES = "[avgpool]\n[conv]\nfilters=5\nactivation=linear\n[softmax]\n"


def _net(layers: str, *, height_px: int = 8, width_px: int = 8) -> DarknetNet:
    return DarknetNet(parse_cfg(NET.format(h=height_px, w=width_px) + layers + CLASSES)).double().eval()


@torch.no_grad()
def _map_of(network: DarknetNet, index: int, x_NCHW: Tensor) -> Array:
    """What layer `index` gives."""
    seen: list[Tensor] = []
    handle = network.layers[index].register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    network(x_NCHW)
    handle.remove()
    return seen[0].numpy()


def _image(height_px: int = 8, width_px: int = 8, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, height_px, width_px, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- layers ---


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("leaky", lambda x: np.where(x > 0, x, 0.1 * x)),
        ("mish", lambda x: x * np.tanh(np.log1p(np.exp(x)))),
        ("swish", lambda x: x / (1 + np.exp(-x))),
        ("logistic", lambda x: 1 / (1 + np.exp(-x))),
        ("linear", lambda x: x),
        ("relu", lambda x: np.maximum(x, 0)),
    ],
)
@pytest.mark.parametrize("batch_normalize", [0, 1])
def test_convolution_is_darknets(
    randomise: Randomise, activation: str, expected: Callable[[Array], Array], batch_normalize: int
) -> None:
    text = f"[conv]\nfilters=6\nsize=3\nstride=2\npad=1\ngroups=3\nbatch_normalize={batch_normalize}\n"
    network = randomise(_net(f"{text}activation={activation}\n"))
    state = {key: value.numpy() for key, value in network.layers[0].state_dict().items()}
    image = _image(7, 8)
    padded = np.pad(image.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    x = np.zeros((2, 6, 4, 4))
    for c, i, j in itertools.product(range(6), range(4), range(4)):
        window = padded[:, c // 2, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        x[:, c, i, j] = (window * state["conv.weight"][c, 0]).sum((1, 2))
    if batch_normalize:
        vectors = (state[f"bn.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias"))
        mean, var, scale, bias = vectors
        x = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    else:
        x = x + state["conv.bias"][:, None, None]
    np.testing.assert_allclose(_map_of(network, 0, image), expected(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("before", "source"), [(6, 6), (4, 6), (6, 4)])
@pytest.mark.parametrize("activation", ["linear", "mish"])
def test_shortcut_adds_the_channels_that_both_have(before: int, source: int, activation: str) -> None:
    conv = "[conv]\nfilters={}\nactivation=linear\n"
    network = _net(f"{conv.format(source)}{conv.format(before)}[shortcut]\nfrom=-2\nactivation={activation}\n")
    image = _image()
    first, second = (_map_of(network, index, image) for index in (0, 1))
    expected = second.copy()
    both = min(before, source)
    expected[:, :both] += first[:, :both]
    if activation == "mish":
        expected = expected * np.tanh(np.log1p(np.exp(expected)))
    np.testing.assert_allclose(_map_of(network, 2, image), expected, rtol=1e-12, atol=1e-12)


def test_shortcut_of_several_layers() -> None:
    conv = "[conv]\nfilters={}\nactivation=linear\n"
    network = _net("".join(map(conv.format, (2, 6, 4))) + "[shortcut]\nfrom=-2,0\n")
    a, b, c = (_map_of(network, index, _image()) for index in range(3))
    expected = c + b[:, :4]
    expected[:, :2] += a
    np.testing.assert_allclose(_map_of(network, 3, _image()), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ("layers=-1,0", [("b", 0, 4), ("a", 0, 8)]),
        ("layers=0", [("a", 0, 8)]),
        ("layers=0\ngroups=2\ngroup_id=1", [("a", 4, 8)]),
        ("layers=-2,-1\ngroups=4\ngroup_id=2", [("a", 4, 6), ("b", 2, 3)]),
    ],
)
def test_route_joins_in_the_order_of_the_cfg(options: str, channels: list[tuple[str, int, int]]) -> None:
    network = _net(f"[conv]\nfilters=8\n[conv]\nfilters=4\n[route]\n{options}\n")
    maps = {name: _map_of(network, "ab".index(name), _image()) for name, *_ in channels}
    expected = np.concatenate([maps[name][:, begin:end] for name, begin, end in channels], axis=1)
    np.testing.assert_array_equal(_map_of(network, 2, _image()), expected)


def _darknet_maxpool(x: Array, size: int, stride: int, padding: int) -> Array:
    """src/maxpool_layer.c, loop for loop."""
    side = [(length + padding - size) // stride + 1 for length in x.shape[2:]]
    out = np.full((*x.shape[:2], *side), -np.inf)
    for i, j, n, m in itertools.product(range(side[0]), range(side[1]), range(size), range(size)):
        row, column = i * stride + n - padding // 2, j * stride + m - padding // 2
        if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
            out[:, :, i, j] = np.maximum(out[:, :, i, j], x[:, :, row, column])
    return out


@pytest.mark.parametrize(("height_px", "width_px"), [(8, 8), (7, 9), (6, 7)])
@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [
        (2, 2, None),
        (2, 1, None),
        (3, 2, None),
        (3, 1, None),
        (5, 1, None),
        (4, 2, None),
        (4, 3, 1),
        (2, 2, 0),
        (3, 2, 1),
    ],
)
def test_maxpool_is_darknets(size: int, stride: int, padding: int | None, height_px: int, width_px: int) -> None:
    given = "" if padding is None else f"padding={padding}\n"
    text = f"[conv]\nfilters=4\nactivation=linear\n[maxpool]\nsize={size}\nstride={stride}\n{given}"
    network = _net(text, height_px=height_px, width_px=width_px)
    image = _image(height_px, width_px) - 2  # negative maps: a padding of zeros would win
    before = _map_of(network, 0, image)
    expected = _darknet_maxpool(before, size, stride, size - 1 if padding is None else padding)
    np.testing.assert_array_equal(_map_of(network, 1, image), expected)
    assert network.plan.layers[1].height, network.plan.layers[1].width == expected.shape[2:]


@pytest.mark.parametrize("side_px", [8, 6])
def test_maxpool_is_right_at_another_size_than_the_cfgs_also_traced(side_px: int) -> None:
    """A side of 4 needs no padding, a side of 3 does."""
    text = "[conv]\nfilters=4\nstride=2\n[maxpool]\nsize=2\nstride=2\n"
    network, image = _net(text, height_px=8, width_px=8), _image(side_px, side_px)
    expected = _darknet_maxpool(_map_of(network, 0, image), 2, 2, 1)
    np.testing.assert_array_equal(_map_of(network, 1, image), expected)
    traced = torch.jit.trace(network, image)
    assert torch.equal(traced(image), network(image))


def test_upsample_repeats_and_avgpool_is_the_mean() -> None:
    network = _net("[conv]\nfilters=4\nstride=2\n[upsample]\nstride=2\n")
    before = _map_of(network, 0, _image())
    np.testing.assert_array_equal(_map_of(network, 1, _image()), before.repeat(2, axis=2).repeat(2, axis=3))
    mean = before.mean((2, 3), keepdims=True)
    np.testing.assert_allclose(_map_of(network, 2, _image()), mean, rtol=1e-12)


def test_dropout_and_cost_do_nothing() -> None:
    plain = "[conv]\nfilters=4\n"
    network = _net(f"{plain}[dropout]\nprobability=.5\n")
    with_cost = parse_cfg(NET.format(h=8, w=8) + f"{plain}[dropout]\n{CLASSES}[cost]\ntype=sse\n")
    other = DarknetNet(with_cost).double().eval()
    other.load_state_dict(network.state_dict())
    assert torch.equal(network(_image()), other(_image()))
    np.testing.assert_array_equal(_map_of(network, 0, _image()), _map_of(network, 1, _image()))


# --- the whole network ---


@torch.no_grad()
def test_logits_come_without_the_softmax() -> None:
    network = _net("[conv]\nfilters=4\n")
    logits = network(_image())
    assert (network.task, network.output_names, network.num_classes) == ("classify", ("logits",), 5)
    assert logits.shape == (2, 5)
    np.testing.assert_array_equal(logits.numpy(), _map_of(network, 2, _image())[:, :, 0, 0])


@torch.no_grad()
def test_heads_are_the_raw_maps_before_yolo(detector_net: DarknetNet) -> None:
    (head,) = detector_net(torch.rand(2, 3, 32, 32))
    assert (detector_net.task, detector_net.output_names, detector_net.num_classes) == ("detect", ("head_s8",), 2)
    assert head.shape == (2, 14, 4, 4)
    assert head.min() < 0  # no sigmoid has been over it


def test_keys_speak_of_darknet_layers(detector_net: DarknetNet) -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = [f"layers.{i}.{key}" for i in (0, 1) for key in ("conv.weight", *(f"bn.{name}" for name in norm))]
    assert list(detector_net.state_dict()) == [*expected, "layers.3.conv.weight", "layers.3.conv.bias"]


@pytest.mark.parametrize("num_classes", [1, 80])
def test_another_number_of_classes_is_refused(detector: DarknetConfig, num_classes: int) -> None:
    with pytest.raises(ValueError, match=f"num_classes: got {num_classes}, expected 2"):
        DarknetNet(detector, num_classes=num_classes)
    assert DarknetNet(detector, num_classes=2).num_classes == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("csdarknet53-omega", [(1, 4), (2, 8), (4, 16), (8, 32), (16, 64), (32, 128)]),
        ("yolov4", [(8, 32), (16, 64), (32, 64)]),
        ("yolov4-tiny", [(16, 32), (32, 32)]),
    ],
)
@torch.no_grad()
def test_features(thinned: Thinned, name: str, expected: list[tuple[int, int]]) -> None:
    network = DarknetNet(thinned(name)).eval()
    assert network.feature_levels == tuple(FeatureLevel(*level) for level in expected)
    maps = network.forward_features(torch.rand(1, 3, 64, 64))
    assert [tuple(one.shape) for one in maps] == [(1, chs, 64 // stride, 64 // stride) for stride, chs in expected]


@torch.no_grad()
def test_features_are_the_maps_of_the_forward_pass(thinned: Thinned, randomise: Randomise) -> None:
    network = randomise(DarknetNet(thinned("yolov4"))).double()
    image = _image(64, 64, batch=1)
    expected = [_map_of(network, index, image) for index in (54, 85, 116)]
    for got, want in zip(network.forward_features(image), expected, strict=True):
        np.testing.assert_array_equal(got.numpy(), want)


@torch.no_grad()
def test_maps_are_let_go_after_their_last_reader() -> None:
    """Layer 0 is read by 1 and 3, layer 1 by 2: after layer 4 neither lives."""
    conv = "[conv]\nfilters=4\nactivation=linear\n"
    network = _net(f"{conv}{conv}{conv}[shortcut]\nfrom=0\n{conv}")
    maps: dict[int, weakref.ref[Tensor]] = {}
    alive: dict[int, set[int]] = {}

    def after(index: int) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, __: object, out: Tensor) -> None:
            alive[index] = {one for one, ref in maps.items() if ref() is not None}
            maps[index] = weakref.ref(out)

        return hook

    for index in range(5):
        network.layers[index].register_forward_hook(after(index))
    network(_image())
    assert alive == {0: set(), 1: {0}, 2: {0, 1}, 3: {0, 2}, 4: {3}}


def test_layers_that_no_output_needs_do_not_run() -> None:
    conv = "[conv]\nfilters=4\n"
    network = _net(f"{conv}{conv}[route]\nlayers=0\n")
    ran: list[int] = []
    for index, layer in enumerate(network.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    network(_image())
    assert ran == [0, 2, 3, 4]  # 1 is read by nobody; 5 is the softmax


def test_gradients_reach_every_weight(thinned: Thinned) -> None:
    network = DarknetNet(thinned("yolov4-tiny")).train()
    heads = network(torch.rand(2, 3, 64, 64))
    sum(head.square().mean() for head in heads).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


# --- exporters ---


def _outputs(network: DarknetNet, image: Tensor) -> list[Tensor]:
    out = network(image)
    return [out] if isinstance(out, Tensor) else list(out)


def _check_exports(network: DarknetNet, image: Tensor, *, opset: int) -> onnx.ModelProto:
    """TorchScript and ONNX give what the network gives, traced with one image and run with several."""
    scripted = torch.jit.trace(network, image[:1], check_trace=False)(image)
    buffer = io.BytesIO()
    names = list(network.output_names)
    torch.onnx.export(
        network, (image[:1],), buffer, dynamo=False, opset_version=opset, input_names=["input"], output_names=names,
        dynamic_axes={name: {0: "N"} for name in ("input", *names)},
    )  # fmt: skip
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_outputs()] == names
    from_onnx = [torch.from_numpy(out) for out in session.run(None, {"input": image.numpy()})]
    from_script = [scripted] if isinstance(scripted, Tensor) else list(scripted)
    for got in (from_onnx, from_script):
        for one, want in zip(got, _outputs(network, image), strict=True):
            assert (one - want).norm() / want.norm() < 1e-5
    return onnx.load_from_string(buffer.getvalue())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_published_networks_run(thinned: Thinned, randomise: Randomise, name: str) -> None:
    network = randomise(DarknetNet(thinned(name)))
    for out, index in zip(_outputs(network, torch.rand(2, 3, 64, 64)), network.plan.outputs, strict=True):
        plan = network.plan.layers[index]
        assert out.shape == ((2, plan.num_chs) if out.ndim == 2 else (2, plan.num_chs, plan.height, plan.width))
        assert out.isfinite().all()
        assert out.std() > 0


@pytest.mark.parametrize(
    "name", ["yolov4-tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "yolov4-tiny")]
)
@torch.no_grad()
def test_published_networks_export(thinned: Thinned, randomise: Randomise, name: str) -> None:
    network = randomise(DarknetNet(thinned(name)))
    graph = _check_exports(network, torch.rand(2, 3, 64, 64), opset=13).graph
    ops = {node.op_type for node in graph.node}
    assert not ops & {"Shape", "Gather", "Pad", "If", "Loop", "ScatterND", "Expand"}
    assert {attribute.i for node in graph.node for attribute in node.attribute if attribute.name == "ceil_mode"} <= {0}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_published_networks_export_at_their_full_width(
    published: Callable[[str], DarknetConfig], randomise: Randomise, name: str
) -> None:
    network = randomise(DarknetNet(published(name).with_size(96, 64)))
    _check_exports(network, torch.rand(2, 3, 96, 64), opset=17)


@pytest.mark.parametrize("opset", [13, 18, 20])
@torch.no_grad()
def test_every_kind_of_layer_exports(randomise: Randomise, opset: int) -> None:
    text = (
        "[conv]\nfilters=8\nsize=3\nstride=2\npad=1\nbatch_normalize=1\nactivation=mish\n"
        "[conv]\nfilters=12\nsize=3\npad=1\ngroups=4\nactivation=swish\n[shortcut]\nfrom=0\nactivation=relu\n"
        "[conv]\nfilters=6\nactivation=leaky\n[shortcut]\nfrom=-2\n[maxpool]\nsize=2\nstride=1\n[maxpool]\nsize=2\nstride=2\n"
        "[maxpool]\nsize=4\nstride=2\n[upsample]\nstride=2\n[route]\nlayers=-1\ngroups=2\ngroup_id=1\n"
        "[conv]\nfilters=6\nactivation=logistic\n"
    )
    network = randomise(_net(text, height_px=22, width_px=26).float())
    _check_exports(network, torch.rand(2, 3, 22, 26), opset=opset)


def test_manifest_builds_the_same_network(detector: DarknetConfig, detector_net: DarknetNet) -> None:
    again = DarknetNet(from_json(DarknetConfig, to_json(detector)), num_classes=2).eval()
    again.load_state_dict(detector_net.state_dict())
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(again(image)[0], detector_net(image)[0])
