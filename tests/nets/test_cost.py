from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cspdeploy
from cspdeploy.nets.cost import Cost, measure_cost, measure_module
from cspdeploy.nets.registry import find_network, spec_of

FAMILIES = ("cspdarknet53", "cs3sedarknet_l", "csresnext50-omega", "resnet50", "densenet121", "csppeleenet")
X = 3 * 8 * 8 * 4
"""Bytes of the input of every network here: 3 channels of 8x8 px."""
CH4 = 4 * 8 * 8 * 4
"""Bytes of 4 channels at that size."""


def _measure(make: Callable[[], nn.Module]) -> Cost:
    with torch.device("meta"):
        model = make()
    return measure_module(model, height_px=8, width_px=8)


class _Net(nn.Module):
    """Convolutions of 4 channels that keep the size, and a forward pass that a test writes."""

    def __init__(self, forward: Callable[[_Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.a = nn.Conv2d(4, 4, 1, bias=False)
        self.b = nn.Conv2d(4, 4, 1, bias=False)
        self.small = nn.Conv2d(2, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def _peak(forward: Callable[[_Net, Tensor], Tensor]) -> int:
    return _measure(lambda: _Net(forward)).peak_activation_bytes


# --- counts ---


def test_three_layers_by_hand() -> None:
    found = _measure(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False),
            nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=2),
            nn.Flatten(),
            nn.Linear(8 * 4 * 4, 10),
        )
    )
    assert found == Cost(
        num_parameters=4 * 3 * 9 + (8 * 2 * 9 + 8) + (128 * 10 + 10),
        num_conv_weights=4 * 3 * 9 + 8 * 2 * 9 + 128 * 10,
        num_macs=4 * 64 * 27 + 8 * 16 * 18 + 10 * 128,
        num_activations=4 * 64 + 8 * 16 + 10,
        peak_activation_bytes=X + CH4,  # the first layer; the second needs 1024 + 512 bytes
    )
    assert found.bflops == 2 * found.num_macs / 1e9


@pytest.mark.parametrize(
    ("name", "conv_weights_m", "bflops", "activations_m"),
    [
        ("csdarknet53", 27.61, 13.07, 16.81), ("darknet53", 41.57, 18.57, 12.39), ("csresnet50", 21.57, 8.97, None),
        ("csresnext50", 20.50, 7.93, None), ("cspresnet50", None, None, 11.50), ("cspresnext50", None, None, 15.86),
    ],
)  # fmt: skip
def test_published_counts(
    name: str, conv_weights_m: float | None, bflops: float | None, activations_m: float | None
) -> None:
    """Weights and BFLOPs of the authors' README (256 px), activations of timm's table, to their last digit."""
    found = measure_cost(spec_of(find_network(name)))
    assert conv_weights_m in (None, round(found.num_conv_weights / 1e6, 2))
    assert bflops in (None, round(found.bflops, 2))
    assert activations_m in (None, round(found.num_activations / 1e6, 2))


# --- memory ---


def test_chain_holds_input_and_output_of_one_layer() -> None:
    assert _peak(lambda net, x: net.a(net.stem(x))) == 2 * CH4  # 768 + 1024 at the stem, 1024 + 1024 after it


def test_skip_connection_keeps_its_start() -> None:
    def forward(net: _Net, x: Tensor) -> Tensor:
        y = net.stem(x)
        return net.b(net.a(y)) + y

    assert _peak(forward) == 3 * CH4  # y, b(a(y)) and their sum; or y, a(y) and b(a(y))


def test_long_skip_holds_one_tensor_more_than_a_chain() -> None:
    def forward(net: _Net, x: Tensor) -> Tensor:
        y = net.stem(x)
        return torch.cat([net.b(net.a(net.a(y))), y], 1)

    assert _peak(forward) == 4 * CH4  # the two halves and their concatenation


def test_concatenation_needs_its_parts_and_itself() -> None:
    def forward(net: _Net, x: Tensor) -> Tensor:
        y = net.stem(x)
        return torch.cat([net.a(y), net.b(y), net.a(y)], 1)

    assert _peak(forward) == 6 * CH4


def test_work_in_place_makes_nothing() -> None:
    def forward(net: _Net, x: Tensor) -> Tensor:
        y = net.stem(x)
        z = net.a(y)
        z += y
        return nn.functional.leaky_relu(z, 0.1, inplace=True)

    assert _peak(forward) == 2 * CH4


def test_work_out_of_place_does() -> None:
    assert _peak(lambda net, x: nn.functional.relu(net.stem(x))) == 2 * CH4
    assert _peak(lambda net, x: nn.functional.relu(net.stem(x), inplace=True)) == X + CH4


def test_view_keeps_the_whole_tensor_and_makes_nothing() -> None:
    def forward(net: _Net, x: Tensor) -> Tensor:
        cross, block = net.stem(x).split(2, dim=1)
        return torch.cat([cross, net.small(block)], 1)

    assert _peak(forward) == CH4 + CH4 // 2 + CH4


def test_batch_norm_is_part_of_its_convolution() -> None:
    assert _peak(lambda net, x: net.bn(net.stem(x))) == X + CH4


def test_batch_norm_of_what_others_read_is_not() -> None:
    def forward(net: _Net, x: Tensor) -> Tensor:
        y = net.stem(x)
        return net.a(net.bn(y)) + y

    assert _peak(forward) == 3 * CH4  # y, its norm, and the convolution of the norm
    assert _peak(lambda net, x: net.bn(nn.functional.relu(net.stem(x), inplace=True))) == 2 * CH4


def test_result_that_nothing_reads_does_not_count() -> None:
    """The indices of a max pooling are 8 bytes each."""
    assert _peak(lambda net, x: nn.functional.max_pool2d(net.stem(x), 2)) == X + CH4


def test_output_lives_to_the_end() -> None:
    class Two(_Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            early = self.stem(x)
            return early, self.b(self.a(self.a(early)))

    with torch.device("meta"):
        two, chain = Two(lambda net, x: x), _Net(lambda net, x: net.b(net.a(net.a(net.stem(x)))))
    assert measure_module(two, height_px=8, width_px=8).peak_activation_bytes == 3 * CH4
    assert measure_module(chain, height_px=8, width_px=8).peak_activation_bytes == 2 * CH4


def test_cspdarknet53_peaks_where_its_first_stage_joins() -> None:
    """128 px maps of 128 channels (both paths), 64 (the block path) and 128 (their concatenation), 4 bytes each."""
    assert measure_cost(spec_of(find_network("cspdarknet53"))).peak_activation_bytes == (128 + 64 + 128) * 128 * 128 * 4


# --- the way it is measured ---


def test_measuring_twice_gives_the_same_and_leaves_no_hook() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1))
    first = measure_module(model, height_px=8, width_px=8)
    assert measure_module(model, height_px=8, width_px=8) == first
    assert not model[0]._forward_hooks


COUNT = """
import json, sys
from cspdeploy.nets.cost import measure_cost
from cspdeploy.nets.registry import find_network, spec_of
for name in sys.argv[1:]:
    measure_cost(spec_of(find_network(name)))
print(json.dumps([name for name in ("torch._dynamo", "sympy") if name in sys.modules]))
"""


def test_counting_does_not_load_the_compiler() -> None:
    """Which takes PyTorch seconds, for shapes alone."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cspdeploy.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, *FAMILIES], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []
