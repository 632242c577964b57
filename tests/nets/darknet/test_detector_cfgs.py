"""Forms of detectors that the published cfgs at hand do not have, and what users get wrong when they adapt one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cspdeploy.core.errors import InputError
from cspdeploy.nets.darknet.cfg import parse_cfg
from cspdeploy.nets.darknet.network import DarknetNet
from cspdeploy.nets.darknet.plan import plan_network
from cspdeploy.nets.darknet.weights import read_darknet, write_darknet
from cspdeploy.pipeline.darknet import detection_of_cfg

Randomise = Callable[[nn.Module], DarknetNet]

ANCHORS = "12,16, 19,36, 40,28, 36,75, 76,55, 72,146"
P5_ANCHORS = "13,17, 31,25, 24,51, 61,45, 48,102, 119,96, 97,189, 217,184, 171,384, 324,451, 616,618, 800,800"


def _conv(filters: int, size: int, *, stride: int = 1, act: str, norm: int = 1) -> str:
    return (
        f"[convolutional]\nbatch_normalize={norm}\nfilters={filters}\nsize={size}\nstride={stride}\npad=1\n"
        f"activation={act}\n"
    )


def _yolo(mask: str, *, classes: int, anchors: str, num: int, new_coords: int, scale: float) -> str:
    return (
        f"[yolo]\nmask={mask}\nanchors={anchors}\nclasses={classes}\nnum={num}\nscale_x_y={scale}\n"
        f"new_coords={new_coords}\nnms_kind=diounms\nbeta_nms=0.6\n"
    )


def _scaled(act: str, *, anchors: str, heads: int, per_head: int, residual: bool) -> str:
    """A Scaled-YOLOv4 in small: CSP stages (with shortcuts in the x forms), then a head at each of the last strides.

    The stages come down to stride 32 and the heads, which end in a sigmoid, read the last `heads` of them.
    """
    lines = ["[net]\nheight=64\nwidth=64\nchannels=3\nletter_box=1\n", _conv(4, 3, act=act)]
    taps = []
    index = 0
    for chs in (4, 8, 8, 8, 16):
        block = [_conv(chs, 3, stride=2, act=act), _conv(chs, 1, act=act), "[route]\nlayers=-2\n"]
        block += [_conv(chs, 1, act=act), _conv(chs, 1, act=act), _conv(chs, 3, act=act)]
        block += ["[shortcut]\nfrom=-3\nactivation=linear\n"] if residual else []
        block += [f"[route]\nlayers=-1,-{6 if residual else 5}\n", _conv(chs, 1, act=act)]
        lines += block
        index += len(block)
        taps.append(index)
    num = heads * per_head
    for place, tap in enumerate(taps[-heads:]):
        mask = ",".join(str(place * per_head + one) for one in range(per_head))
        yolo = _yolo(mask, classes=2, anchors=anchors, num=num, new_coords=1, scale=2.0)
        lines += [f"[route]\nlayers={tap}\n", _conv(per_head * 7, 1, act="logistic", norm=0), yolo]
    return "\n".join(lines)


FORMS = {
    "csp-swish": _scaled("swish", anchors=ANCHORS, heads=2, per_head=3, residual=False),
    "x-mish": _scaled("mish", anchors=ANCHORS, heads=2, per_head=3, residual=True),
    "p5": _scaled("mish", anchors=P5_ANCHORS, heads=3, per_head=4, residual=False),
}


@pytest.mark.parametrize(("form", "strides", "per_head"), [
    ("csp-swish", (16, 32), 3), ("x-mish", (16, 32), 3), ("p5", (8, 16, 32), 4),
])  # fmt: skip
@torch.no_grad()
def test_other_forms_of_scaled_yolov4(
    randomise: Randomise, tmp_path: Path, form: str, strides: tuple[int, ...], per_head: int
) -> None:
    config = parse_cfg(FORMS[form])
    plan = plan_network(config)
    detection = detection_of_cfg(config, plan)
    assert detection is not None
    assert [head.stride_px for head in detection.heads] == list(strides)
    assert plan.output_names == tuple(f"head_s{stride}" for stride in strides)
    assert all(head.new_coords and len(head.anchors) == per_head for head in detection.heads)
    network = randomise(DarknetNet(config))
    outputs = network(torch.rand(1, 3, 64, 64))
    assert [one.shape[1:] for one in outputs] == [(per_head * 7, 64 // stride, 64 // stride) for stride in strides]
    assert all(0 < one.min() < one.max() < 1 for one in outputs)
    write_darknet(tmp_path / "net.weights", network)
    again = DarknetNet(config).eval()
    read_darknet(tmp_path / "net.weights", again)
    assert all(torch.equal(*pair) for pair in zip(again(torch.ones(1, 3, 64, 64)), network(torch.ones(1, 3, 64, 64)),
                                                  strict=True))  # fmt: skip


def test_the_heads_of_p5_have_four_anchors_each() -> None:
    config = parse_cfg(FORMS["p5"])
    detection = detection_of_cfg(config, plan_network(config))
    assert detection is not None
    assert [head.anchors[0] for head in detection.heads] == [(13, 17), (48, 102), (171, 384)]
    assert [head.anchors[3] for head in detection.heads] == [(61, 45), (217, 184), (800, 800)]


LINES = FORMS["csp-swish"].splitlines()


def _line(text: str, *, last: bool = False) -> int:
    """Number of the first or the last line that begins so."""
    numbers = [number for number, line in enumerate(LINES, start=1) if line.startswith(text)]
    return numbers[-1 if last else 0]


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("[route]", "[reorg]", _line("[route]"), "[reorg]: not supported, expected one of convolutional"),
        ("activation=swish", "activation=gelu", _line("activation"), "activation: got 'gelu', expected one of leaky"),
        ("classes=2", "classes=3", _line("[yolo]"), "got 21 channels, expected 24: 3 anchors x (5 + 3)"),
        ("num=6", "num=9", _line("anchors"), "anchors: got 12 numbers, expected 18, two for each of num=9"),
        ("mask=0,1,2", "mask=0,1,6", _line("mask"), "mask: got [0, 1, 6], expected indices of the 6 anchors"),
        ("mask=0,1,2", "mask=0,1", _line("[yolo]"), "got 21 channels, expected 14: 2 anchors x (5 + 2)"),
    ],
)  # fmt: skip
def test_errors_name_the_line(old: str, new: str, line: int, message: str) -> None:
    text = "\n".join(LINES).replace(old, new, 1)
    with pytest.raises(InputError) as caught:
        parse_cfg(text, source="my.cfg")
    assert caught.value.message.startswith(f"my.cfg:{line}: ")
    assert message in caught.value.message


def test_classes_without_filters_get_the_number_that_is_needed() -> None:
    with pytest.raises(InputError) as caught:
        parse_cfg("\n".join(LINES).replace("classes=2", "classes=80"))
    assert caught.value.fix.startswith("filters=255 in the [convolutional] before it")
