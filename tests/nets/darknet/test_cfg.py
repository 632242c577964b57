from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.errors import InputError
from cspdeploy.nets.darknet.cfg import LAYERS, MAX_CFG_BYTES, parse_cfg, read_cfg
from cspdeploy.nets.darknet.form import format_cfg
from cspdeploy.nets.darknet.sections import (
    MAX_LAYERS,
    AvgPool,
    Convolutional,
    DarknetConfig,
    MaxPool,
    NetSection,
    Route,
    Shortcut,
    Softmax,
    Upsample,
    Yolo,
)

NAMES = [
    "csdarknet53-omega", "csresnext50-panet-spp-original-optimal", "densenet201", "yolov4", "yolov4-csp",
    "yolov4-csp-swish", "yolov4-tiny", "yolov4-tiny-3l",
]  # fmt: skip

NET = "[net]\nheight=32\nwidth=64\nchannels=3\n"
CONV = "[convolutional]\nfilters=8\n"
HALF = "[convolutional]\nfilters=8\nstride=2\n"
TAIL = "[avgpool]\n[softmax]\n"


def _layers(text: str, *, tail: str = TAIL) -> tuple[object, ...]:
    return parse_cfg(f"{NET}{text}{tail}").layers


# --- grammar ---


def test_blanks_go_anywhere_and_only_whole_lines_are_comments() -> None:
    text = " [ net ]\r\n#x\n; y\nhei ght = 3 2\r\n\twidth=64\nchannels=3\n[conv olutional]\nfil\tters= 1 6\n" + TAIL
    config = parse_cfg(text)
    assert config.net == NetSection(height=32, width=64, channels=3, letter_box=False)
    assert config.layers[0] == Convolutional(
        filters=16, size=1, stride=1, padding=0, groups=1, batch_normalize=False, activation="logistic"
    )


def test_of_a_key_given_twice_the_first_counts() -> None:
    (conv, *_) = _layers(f"{CONV}filters=16\n")
    assert isinstance(conv, Convolutional)
    assert conv.filters == 8


def test_unknown_keys_and_those_of_training_are_ignored() -> None:
    assert _layers(f"{CONV}learning_rate_scale=4\nsomething=new\nstopbackward=800\n") == _layers(CONV)


@pytest.mark.parametrize(
    ("text", "padding"),
    [
        ("size=3\npad=1", 1),
        ("size=1\npad=1", 0),
        ("size=7\npad=1\npadding=9", 3),
        ("size=3\npadding=2", 2),
        ("size=3", 0),
    ],
)
def test_pad_stands_for_half_the_kernel(text: str, padding: int) -> None:
    conv = _layers(f"{CONV}{text}\n")[0]
    assert isinstance(conv, Convolutional)
    assert conv.padding == padding


@pytest.mark.parametrize("section", ["network", "net"])
@pytest.mark.parametrize(("alias", "full"), [("conv", "convolutional"), ("max", "maxpool"), ("avg", "avgpool")])
def test_short_names_of_sections(section: str, alias: str, full: str) -> None:
    text = f"[{section}]{NET.removeprefix('[net]')}[conv]\nfilters=4\n[{alias}]\nsize=1\n[avg]\n[soft]\n"
    assert parse_cfg(text) == parse_cfg(text.replace(f"[{alias}]", f"[{full}]").replace("[soft]", "[softmax]"))


def test_indices_become_absolute_and_defaults_are_darknets() -> None:
    text = (
        f"{CONV}[conv]\nfilters=8\nactivation=relu\n[shortcut]\nfrom=-2\n[route]\nlayers=-1, 0\ngroups=2\ngroup_id=1\n"
    )
    text += "[maxpool]\nstride=2\n[upsample]\n[dropout]\nprobability=.5\n"
    assert _layers(text)[2:7] == (
        Shortcut(sources=(0,), activation="linear"),
        Route(sources=(2, 0), groups=2, group_id=1),
        MaxPool(size=2, stride=2, padding=1),
        Upsample(stride=2),
        *_layers(f"{CONV}[dropout]\n")[1:2],
    )
    assert _layers(text)[-2:] == (AvgPool(), Softmax())


def test_yolo_is_kept_whole(published: Callable[[str], DarknetConfig]) -> None:
    tiny = published("yolov4-tiny")
    assert [layer for layer in tiny.layers if isinstance(layer, Yolo)][1] == Yolo(
        classes=80, anchors=((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319)), mask=(1, 2, 3),
        scale_x_y=1.05, new_coords=False, nms_kind="greedynms", beta_nms=0.6,
    )  # fmt: skip
    csp = published("yolov4-csp")
    last = csp.layers[-1]
    assert isinstance(last, Yolo)
    assert (last.new_coords, last.scale_x_y, last.nms_kind) == (True, 2.0, "diounms")
    assert csp.net.letter_box
    assert not tiny.net.letter_box


def test_yolo_without_mask_uses_all_anchors() -> None:
    yolo = _layers("[conv]\nfilters=12\n[yolo]\nclasses=1\nnum=2\nanchors=1,2,3,4.5\n", tail="")[1]
    assert isinstance(yolo, Yolo)
    assert (yolo.mask, yolo.anchors, yolo.num_chs) == ((0, 1), ((1.0, 2.0), (3.0, 4.5)), 12)


@pytest.mark.parametrize("name", NAMES)
def test_published_cfgs_survive_json_and_text(published: Callable[[str], DarknetConfig], name: str) -> None:
    config = published(name)
    assert from_json(DarknetConfig, json.loads(json.dumps(to_json(config)))) == config
    assert parse_cfg(format_cfg(config)) == config


def test_text_of_every_kind_of_layer_reads_back() -> None:
    config = parse_cfg(
        "[net]\nheight=40\nwidth=64\nchannels=3\nletter_box=1\n"
        "[conv]\nfilters=8\nsize=6\nstride=2\npadding=2\nbatch_normalize=1\nactivation=swish\n"
        "[conv]\nfilters=8\nsize=3\npad=1\ngroups=4\nactivation=relu\n[shortcut]\nfrom=-2,0\nactivation=mish\n"
        "[maxpool]\nsize=3\nstride=2\npadding=1\n[maxpool]\nsize=5\nstride=1\n[upsample]\nstride=2\n"
        "[route]\nlayers=-1,1\ngroups=2\ngroup_id=1\n[dropout]\n[conv]\nfilters=14\nactivation=logistic\n"
        "[yolo]\nclasses=2\nnum=3\nmask=2,0\nanchors=1.5,2,3,4,0.1,6\nscale_x_y=1.2\nnew_coords=1\nnms_kind=diounms\n"
    )
    assert parse_cfg(format_cfg(config)) == config
    classifier = parse_cfg(f"{NET}{CONV}[avgpool]\n[dropout]\n[softmax]\n[cost]\n")
    assert parse_cfg(format_cfg(classifier)) == classifier


# --- errors ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "{cfg}: no sections"),
        ("# nothing\n", "{cfg}: no sections"),
        ("hello\n", r"{cfg}:1: got 'hello', expected \[net\]"),
        (CONV, r"{cfg}:1: \[convolutional\]: expected \[net\] first"),
        (NET, r"{cfg}:1: \[net\]: no layers"),
        (f"{NET}[conv\n", r"{cfg}:5: got '\[conv', expected \[section\]"),
        (f"{NET}{CONV}size\n", "{cfg}:7: got 'size', expected key=value"),
        (f"{NET}{CONV}=3\n", "{cfg}:7: got '=3', expected key=value"),
        (f"{NET}{CONV}size=\n", r"{cfg}:7: layer 0 \[convolutional\] size: got '', expected an integer"),
        (f"{NET}{CONV}size=3#x\n", r"{cfg}:7: layer 0 \[convolutional\] size: got '3#x'"),
        (f"{NET}{CONV}size=1_0\n", "{cfg}:7: .* size: got '1_0', expected an integer"),
        (f"{NET}{CONV}size=0\n", r"{cfg}:7: layer 0 \[convolutional\] size: got 0, expected 1 to 255"),
        (f"{NET}{CONV}x=3\n[conv]\nfilters=-4\n", r"{cfg}:9: layer 1 \[conv\] filters: got -4"),
        (f"{NET}{CONV}activation=elu\n", "{cfg}:7: layer 0 .* activation: got 'elu', expected one of leaky"),
        (f"{NET}{CONV}stride_x=2\n", "{cfg}:7: layer 0 .* stride_x: got 2 beside stride_y=1"),
        (f"{NET}{CONV}groups=3\n", r"{cfg}:5: layer 0 \[convolutional\]: 3 to 8 channels.*groups=3"),
        (NET.replace("width=64", "") + CONV, r"{cfg}:1: \[net\] width: missing"),
        (NET.replace("=64", "=1000000000") + CONV, r"{cfg}:3: \[net\] width: got 1000000000, expected"),
        (NET.replace("=3\n", "=1\n") + CONV, r"{cfg}:4: \[net\] channels: got 1, expected 3"),
        (f"{NET}[conv]\nfilters=1000000000\n", r"{cfg}:6: layer 0 \[conv\] filters: got 1000000000, expected"),
        (f"{NET}[conv]\nfilters=99999999999999999999\n", "{cfg}:6: .* filters: got '9+', expected an integer"),
        (f"{NET}{CONV}[shortcut]\n", r"{cfg}:7: layer 1 \[shortcut\] from: missing"),
        (f"{NET}{CONV}[shortcut]\nfrom=-9999\n", "{cfg}:8: layer 1 .* from: got -9999, which is no layer before"),
        (f"{NET}{CONV}[route]\nlayers=1\n", r"{cfg}:8: layer 1 \[route\] layers: got 1, which is no layer"),
        (f"{NET}{CONV}[route]\nlayers=0,7\n", "{cfg}:8: .* layers: got 7, which is no layer"),
        (f"{NET}{CONV}[route]\nlayers=0,\n", "{cfg}:8: .* layers: got '0,', expected integers"),
        (f"{NET}{CONV}[route]\nlayers=0\ngroups=2\ngroup_id=2\n", "{cfg}:10: .* group_id: got 2, expected 0 to 1"),
        (f"{NET}{CONV}[route]\nlayers=0\ngroups=3\n", r"{cfg}:7: .*\[route\]: layer 0 has 8 channels.*groups=3"),
        (f"{NET}{CONV}{HALF}[route]\nlayers=-1,0\n", r"{cfg}:10: layer 2 \[route\]: layer 0 has a map of 32x64"),
        (f"{NET}{CONV}{HALF}[shortcut]\nfrom=0\n", r"{cfg}:10: layer 2 \[shortcut\]: layer 0 has a map of 32x64"),
        (f"{NET}{CONV}size=41\n", r"{cfg}:5: .*: a map of 32x64 is too small for a window of 41"),
        (f"{NET}{CONV}[maxpool]\nsize=3\npadding=3\n", "{cfg}:9: layer 1 .* padding: got 3, expected 0 to 2"),
        (f"{NET}{CONV}[upsample]\n", r"{cfg}:7: layer 1 \[upsample\]: a map of stride 1 times 2 is finer"),
        (f"{NET}{CONV}[softmax]\n[conv]\n", r"{cfg}:8: layer 2 \[conv\]: reads layer 1, a \[softmax\]"),
        (f"{NET}{CONV}[softmax]\n", "{cfg}:5: layer 0 .*: the network ends in a map of 8x32x64, expected"),
        (f"{NET}{CONV}[yolo]\nanchors=1,2\n", r"{cfg}:7: .* got 8 channels, expected 25: 1 anchors x \(5 \+ 20\)"),
        (f"{NET}{CONV}[yolo]\nnum=2\nanchors=1,2\n", "{cfg}:9: .* anchors: got 2 numbers, expected 4"),
        (f"{NET}{CONV}[yolo]\nmask=1\nanchors=1,2\n", r"{cfg}:8: .* mask: got \[1\], expected indices"),
        (f"{NET}{CONV}[yolo]\nanchors=1,-2\n", "{cfg}:8: .* anchors: got .* expected sizes above 0"),
        (f"{NET}{CONV}[yolo]\nanchors=1,nan\n", "{cfg}:8: .* anchors: got '1,nan', expected numbers"),
        (f"{NET}{CONV}[yolo]\nanchors=1,1e999\n", "{cfg}:8: .* anchors: got .* expected sizes above 0"),
        (f"{NET}{CONV}[yolo]\nanchors=1,2\nscale_x_y=0\n", "{cfg}:9: .* scale_x_y: got 0.0, expected a number"),
        (f"{NET}{CONV}[yolo]\nanchors=1,2\nnms_kind=soft\n", "{cfg}:9: .* nms_kind: got 'soft', expected one of"),
    ],
)  # fmt: skip
def test_errors_name_file_line_and_layer(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "net.cfg"
    path.write_text(text)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}{message.removeprefix('{cfg}')}") as error:
        read_cfg(path)
    assert error.value.fix
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    "key",
    ["dilation=2", "antialiasing=1", "share_index=0", "flipped=1", "binary=1", "xnor=1", "sway=1", "rotate=1",
     "stretch=1", "coordconv=1", "dontload=1", "dontloadscales=1"],
)  # fmt: skip
def test_what_would_change_a_convolution_is_refused(key: str) -> None:
    with pytest.raises(InputError, match=rf":7: layer 0 \[convolutional\] {key.partition('=')[0]}: got"):
        _layers(f"{CONV}{key}\n")


@pytest.mark.parametrize(
    ("section", "key"),
    [("shortcut]\nfrom=0", "weights_type=per_feature"), ("shortcut]\nfrom=0", "alpha=0.5"),
     ("maxpool]", "maxpool_depth=1"), ("maxpool]", "antialiasing=1"), ("upsample]", "scale=2"),
     ("softmax]", "groups=2"), ("softmax]", "temperature=.5"),
     ("softmax]", "tree=9k.tree")],
)  # fmt: skip
def test_what_would_change_another_layer_is_refused(section: str, key: str) -> None:
    with pytest.raises(InputError, match=rf"layer 1 \[{section.partition(']')[0]}\] {key.partition('=')[0]}: got"):
        _layers(f"{CONV}[{section}\n{key}\n")


def test_the_values_that_change_nothing_are_taken() -> None:
    plain = _layers(f"{CONV}[shortcut]\nfrom=0\n")
    spelled = _layers(
        f"{CONV}dilation=1\nantialiasing=0\nflipped=0\nxnor=0\nstride_x=1\nstride_y=1\n"
        "[shortcut]\nfrom=0\nweights_type=none\nalpha=1.0\n",
        tail="[avgpool]\n[softmax]\ngroups=1\ntemperature=1.0\n",
    )
    assert spelled == plain


@pytest.mark.parametrize("kind", ["connected", "crnn", "local", "region", "implicit", "Gaussian_yolo", "Yolo", "sam"])
def test_unsupported_sections_are_refused_by_name(kind: str) -> None:
    with pytest.raises(
        InputError, match=rf":7: layer 1 \[{kind}\]: not supported, expected one of convolutional"
    ) as error:
        _layers(f"{CONV}[{kind}]\n")
    assert all(name in error.value.message for name in LAYERS)


# --- hostile files ---


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x00\x01\x02[net]\n", "a binary file"),
        (b"", "no sections"),
        (b"#" * (MAX_CFG_BYTES + 1), "larger than"),
        (NET.encode() + b"[conv]\n" * (MAX_LAYERS + 1), f"more than {MAX_LAYERS} layers"),
        (NET.encode() + b"[conv]\nfilters=65536\nsize=255\npad=1\n[avgpool]\n", r"layer 0 \[conv\]: \d+ weights up to"),
        (b"[net]\nheight=8192\nwidth=8192\nchannels=3\n[conv]\nfilters=4096\n", "a map of 4096x8192x8192"),
        (NET.encode() + b"[conv]\nx=" + b"y" * 10**6 + b"\nsize=" + b"9" * 10**6 + b"\n", "size: got '9{40}...'"),
    ],
)  # fmt: skip
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "net.cfg"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        read_cfg(path)
    assert len(error.value.message) < 400


def test_growth_by_routes_is_bounded() -> None:
    doubling = "".join("[route]\nlayers=-1,-1\n" for _ in range(100))
    with pytest.raises(InputError, match=r"\[route\]: a map of"):
        _layers(f"{CONV}{doubling}")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        read_cfg(tmp_path / "net.cfg")
    with pytest.raises(InputError, match="not found"):
        read_cfg(tmp_path)


def test_comments_in_any_encoding(tmp_path: Path) -> None:
    path = tmp_path / "net.cfg"
    path.write_bytes(b"\xef\xbb\xbf" + NET.encode() + b"# \xe9\xff\n" + (CONV + TAIL).encode())
    assert read_cfg(path) == parse_cfg(NET + CONV + TAIL)


WORDS = st.sampled_from(
    ["[net]", "[conv]", "[route]", "[shortcut]", "[yolo]", "[maxpool]", "[avgpool]", "[upsample]", "[softmax]",
     "height=8", "width=8", "channels=3", "filters=4", "stride=2", "size=2", "layers=-1", "from=-2", "anchors=1,2",
     "mask=0", "#", "=", "classes=-1", "padding=1", "groups=2", "activation=leaky", "\x1c", "é=1"]
)  # fmt: skip


@given(st.lists(WORDS | st.text(max_size=8), max_size=30))
def test_any_text_gives_a_network_or_one_clear_error(words: list[str]) -> None:
    try:
        config = parse_cfg(NET + "\n".join(words))
    except InputError as error:
        message = error.message
    else:
        message = ""
        assert parse_cfg(format_cfg(config)) == config
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "layers: got 0"),
        ({"net": {"height": 0, "width": 8, "channels": 3, "letter_box": False}}, "height: got 0"),
        ({"layers": [{"type": "convolution"}]}, r"layers\[0\]"),
    ],
)  # fmt: skip
def test_json_is_checked_as_the_text_is(change: dict[str, object], message: str) -> None:
    data = {**to_json(parse_cfg(NET + CONV + TAIL)), **change}
    with pytest.raises(InputError, match=message):
        from_json(DarknetConfig, data)
