from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cspdeploy.core.errors import InputError
from cspdeploy.nets.darknet.network import DarknetNet
from cspdeploy.nets.darknet.sections import DarknetConfig
from cspdeploy.nets.darknet.weights import expected_bytes, read_darknet, read_darknet_state, write_darknet

Randomise = Callable[[nn.Module], DarknetNet]
HEADER_BYTES = 20
# Of `detector`: layer 0 has 8 filters 3x3 on 3 channels, layer 1 has 12 on 2 (groups=4), layer 3 has 14 1x1 on 12.
FLOATS = {0: 4 * 8 + 8 * 27, 1: 4 * 12 + 12 * 18, 3: 14 + 14 * 12}
NUM_BYTES = HEADER_BYTES + 4 * sum(FLOATS.values())


@pytest.fixture
def file(tmp_path: Path, detector_net: DarknetNet) -> Path:
    path = tmp_path / "net.weights"
    write_darknet(path, detector_net, seen=5)
    return path


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _refused(path: Path, config: DarknetConfig, message: str, **options: int) -> None:
    """The file is refused, and the network keeps what it had."""
    network = DarknetNet(config)
    before = _state(network)
    with pytest.raises(InputError, match=message) as error:
        read_darknet(path, network, **options)
    assert str(path) in error.value.message
    assert error.value.fix
    assert _same(_state(network), before)


# --- sizes ---


@pytest.mark.parametrize(
    ("name", "up_to", "num_bytes"),
    [
        ("csdarknet53-omega", None, 110_710_068), ("csdarknet53-omega", 105, 106_610_068),
        ("yolov4", None, 257_717_640), ("yolov4", 137, 170_038_676), ("yolov4", 105, 106_610_068),
        ("yolov4-tiny", None, 24_251_276),
        ("yolov4-tiny", 29, 19_789_716), ("yolov4-csp", None, 211_944_840), ("yolov4-csp", 142, 146_548_116),
        ("yolov4-csp-swish", None, 211_944_840), ("csresnext50-panet-spp-original-optimal", None, 228_123_400),
        ("csresnext50-panet-spp-original-optimal", 112, 140_311_316),
    ],
)  # fmt: skip
def test_sizes_are_those_of_the_published_files(
    published: Callable[[str], DarknetConfig], name: str, up_to: int | None, num_bytes: int
) -> None:
    assert expected_bytes(published(name), up_to=up_to) == num_bytes


@pytest.mark.parametrize("name", ["densenet201", "yolov4-tiny-3l"])
def test_other_sizes_follow_from_the_network(published: Callable[[str], DarknetConfig], name: str) -> None:
    config = published(name)
    with torch.device("meta"):
        state = DarknetNet(config).state_dict()
    floats = sum(value.numel() for key, value in state.items() if not key.endswith("num_batches_tracked"))
    assert expected_bytes(config) == HEADER_BYTES + 4 * floats


@pytest.mark.parametrize("up_to", [0, -1, 6])
def test_no_such_layer(detector: DarknetConfig, file: Path, tmp_path: Path, up_to: int) -> None:
    for call in (
        lambda: expected_bytes(detector, up_to=up_to),
        lambda: read_darknet(file, DarknetNet(detector), up_to=up_to),
        lambda: write_darknet(tmp_path / "new", DarknetNet(detector), up_to=up_to),
    ):
        with pytest.raises(InputError, match=f"up_to: got {up_to}, expected 1 to 5"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


# --- what is in the file ---


def test_layout_is_that_of_the_format(file: Path, detector_net: DarknetNet) -> None:
    data = file.read_bytes()
    assert len(data) == NUM_BYTES == expected_bytes(detector_net)
    assert struct.unpack("<3iQ", data[:20]) == (0, 2, 5, 5)
    values = np.frombuffer(data, "<f4", offset=20)
    place = 0
    state = detector_net.state_dict()
    norm = ("bn.bias", "bn.weight", "bn.running_mean", "bn.running_var", "conv.weight")
    for layer, names in ((0, norm), (1, norm), (3, ("conv.bias", "conv.weight"))):
        for name in names:
            tensor = state[f"layers.{layer}.{name}"]
            assert np.array_equal(values[place : place + tensor.numel()], tensor.flatten().numpy())
            place += tensor.numel()
    assert place == len(values)


def test_round_trip_is_identical(file: Path, detector: DarknetConfig, detector_net: DarknetNet, tmp_path: Path) -> None:
    network = DarknetNet(detector)
    found = read_darknet(file, network)
    assert (found.version, found.seen, found.num_layers) == ((0, 2, 5), 5, 5)
    assert _same(_state(network), _state(detector_net))
    write_darknet(tmp_path / "again.weights", network, seen=5)
    assert (tmp_path / "again.weights").read_bytes() == file.read_bytes()
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(network.eval()(image)[0], detector_net(image)[0])


@pytest.mark.parametrize("name", ["csdarknet53-omega", "densenet201", "yolov4-csp", "yolov4-tiny"])
def test_round_trip_of_published_networks(
    thinned: Callable[[str], DarknetConfig], randomise: Randomise, tmp_path: Path, name: str
) -> None:
    network = randomise(DarknetNet(thinned(name)))
    path = tmp_path / "net.weights"
    write_darknet(path, network)
    assert path.stat().st_size == expected_bytes(network)
    _, tensors = read_darknet_state(path, network.config)
    expected = {key: value for key, value in _state(network).items() if not key.endswith("num_batches_tracked")}
    assert tensors.keys() == expected.keys()
    assert _same(tensors, {key: expected[key] for key in tensors})


@pytest.mark.parametrize(
    ("version", "seen", "header_bytes"),
    [((0, 1, 0), 2**32 - 1, 16), ((0, 0, 1), 7, 16), ((0, 2, 0), 2**33, 20), ((1, 0, 0), 9, 20), ((0, 2, 5), 0, 20)],
)
def test_both_forms_of_the_header(
    tmp_path: Path, detector: DarknetConfig, detector_net: DarknetNet, version: tuple[int, int, int], seen: int,
    header_bytes: int,
) -> None:  # fmt: skip
    path = tmp_path / "net.weights"
    write_darknet(path, detector_net, version=version, seen=seen)
    assert path.stat().st_size == NUM_BYTES - 20 + header_bytes
    network = DarknetNet(detector)
    found = read_darknet(path, network)
    assert (found.version, found.seen) == (version, seen)
    assert _same(_state(network), _state(detector_net))


@pytest.mark.parametrize(("version", "seen"), [((0, 1, 0), 2**32), ((0, 2, 5), -1), ((0, 1001, 0), 0), ((-1, 0, 0), 0)])
def test_a_header_that_cannot_be_written(
    tmp_path: Path, detector_net: DarknetNet, version: tuple[int, int, int], seen: int
) -> None:
    with pytest.raises(InputError, match="version, seen"):
        write_darknet(tmp_path / "net.weights", detector_net, version=version, seen=seen)
    assert not list(tmp_path.iterdir())


def test_double_precision_networks_keep_theirs(file: Path, detector: DarknetConfig, detector_net: DarknetNet) -> None:
    network = DarknetNet(detector).double()
    read_darknet(file, network)
    assert all(value.dtype == torch.float64 for value in network.parameters())
    again = file.with_name("again.weights")
    write_darknet(again, network, seen=5)
    assert again.read_bytes() == file.read_bytes()


def test_a_network_on_the_meta_device_becomes_real(
    file: Path, detector: DarknetConfig, detector_net: DarknetNet
) -> None:
    with torch.device("meta"):
        network = DarknetNet(detector)
    read_darknet(file, network)
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(network.eval()(image)[0], detector_net(image)[0])


# --- files that do not fit ---


@pytest.mark.parametrize(
    ("num_bytes", "message"),
    [
        (0, "0 bytes, expected a Darknet header"),
        (11, "11 bytes, expected a Darknet header"),
        (16, "ends in its header"),
        (
            20,
            rf"too short, 20 bytes, expected {NUM_BYTES}: layer 0 \[convolutional\] 8 filters 3x3 needs 992 bytes, 0",
        ),
        (20 + 992 + 400, r"too short, .*: layer 1 \[convolutional\] 12 filters 3x3 needs 1056 bytes, 400 are left"),
        (NUM_BYTES - 1, r"too short, .*: layer 3 \[convolutional\] 14 filters 1x1 needs 728 bytes, 727 are left"),
        (NUM_BYTES - 4, r"too short, .*\(or a header of 16 bytes, which its version does not go with\): layer 3"),
    ],
)
def test_short_files(file: Path, detector: DarknetConfig, num_bytes: int, message: str) -> None:
    file.write_bytes(file.read_bytes()[:num_bytes])
    _refused(file, detector, message)


@pytest.mark.parametrize("surplus", [1, 4, 400])
def test_long_files(file: Path, detector: DarknetConfig, surplus: int) -> None:
    file.write_bytes(file.read_bytes() + bytes(surplus))
    message = rf"too long, {NUM_BYTES + surplus} bytes, expected {NUM_BYTES}.*: {surplus} bytes are left after layer 3"
    _refused(file, detector, message)


def test_partial_files_are_named_and_refused(file: Path, detector: DarknetConfig, detector_net: DarknetNet) -> None:
    partial = file.with_name("net.conv.3")
    write_darknet(partial, detector_net, up_to=3)
    assert partial.stat().st_size == expected_bytes(detector, up_to=3) == 20 + 4 * (FLOATS[0] + FLOATS[1])
    _refused(partial, detector, r"a partial file, 2068 bytes, expected 2796: it holds layers 0 to 2 of 5, as '.conv.3'")
    renamed = partial.rename(file.with_name("backbone"))  # layers 0 and 1: a pool has no weights
    _refused(renamed, detector, r"layers 0 to 1 of 5, as '.conv.2'")


@pytest.mark.parametrize("up_to", [2, 3])
def test_partial_files_load_where_asked(
    tmp_path: Path, detector: DarknetConfig, detector_net: DarknetNet, up_to: int
) -> None:
    path = tmp_path / f"net.conv.{up_to}"
    write_darknet(path, detector_net, up_to=up_to)
    network = DarknetNet(detector)
    fresh = _state(network)
    assert read_darknet(path, network, up_to=up_to).num_layers == up_to
    trained = _state(detector_net)
    for key, value in _state(network).items():
        assert torch.equal(value, (fresh if key.startswith("layers.3") else trained)[key])
    _refused(path, detector, r"too long, 2068 bytes, expected 1012", up_to=1)
    _refused(path, detector, r"too short, .*: layer 3 .* needs 728 bytes, 0 are left|a partial file", up_to=4)


def test_weights_of_another_network_are_known_by_their_values(
    thinned: Callable[[str], DarknetConfig], randomise: Randomise, tmp_path: Path
) -> None:
    """The sizes differ too, but the layer at which the networks part says more."""
    path = tmp_path / "csp.weights"
    write_darknet(path, randomise(DarknetNet(thinned("yolov4-csp"))))
    config = thinned("yolov4")
    _refused(
        path, config, r"too short, \d+ bytes, expected \d+: .*; layer [2-9] \[convolutional\] 8 filters 1x1: a neg"
    )
    tiny = thinned("yolov4-tiny")
    _refused(path, tiny, r"too long, .*; layer \d \[convolutional\] 8 filters 3x3: a negative variance")


def test_a_network_of_the_same_size_is_known_by_its_variances(
    file: Path, detector: DarknetConfig, tmp_path: Path
) -> None:
    """Kernel before statistics: the same number of bytes, in the order of another framework."""
    data = np.frombuffer(file.read_bytes(), "<f4", offset=20)
    layer_0, rest = data[: FLOATS[0]], data[FLOATS[0] :]
    path = tmp_path / "shifted.weights"
    path.write_bytes(file.read_bytes()[:20] + np.concatenate([layer_0[32:], layer_0[:32], rest]).tobytes())
    _refused(path, detector, r"layer 0 \[convolutional\] 8 filters 3x3: a negative variance in bn.running_var")


@pytest.mark.parametrize(
    ("value", "place", "message"),
    [
        (
            float("nan"),
            FLOATS[0] + 50,
            r"layer 1 \[convolutional\] 12 filters 3x3: NaN or infinite values in conv.weight",
        ),
        (float("inf"), 3, r"layer 0 .*: NaN or infinite values in bn.bias"),
        (float("-inf"), 10, r"layer 0 .*: NaN or infinite values in bn.weight"),
        (2e10, FLOATS[0] + FLOATS[1] + 1, r"layer 3 .*: absurd values in conv.bias"),
        (-2e10, 20, r"layer 0 .*: absurd values in bn.running_mean"),
        (-1e-3, 24, r"layer 0 .*: a negative variance in bn.running_var \(-0.001\)"),
    ],
)
def test_values_that_no_training_gives(
    file: Path, detector: DarknetConfig, value: float, place: int, message: str
) -> None:
    data = bytearray(file.read_bytes())
    struct.pack_into("<f", data, 20 + 4 * place, value)
    file.write_bytes(data)
    _refused(file, detector, message)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<3iQ", 1001, 2, 0, 0), r"header version 1001\.2\.0.*transposed"),
        (struct.pack("<3iQ", 0, 1002, 0, 0), r"header version 0\.1002\.0.*transposed"),
        (struct.pack("<3iQ", -1, 2, 0, 0), r"header version -1\.2\.0"),
        (b"PK\x03\x04" + bytes(99), "a PyTorch or zip archive"),
        (pickle.dumps({"model": [1.0]}), "a pickle"),
        (struct.pack("<Q", 200) + b'{"a":{}}' + bytes(99), "a safetensors file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
        (b"<!DOCTYPE html><html>Quota exceeded</html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ],
)  # fmt: skip
def test_other_files(file: Path, detector: DarknetConfig, data: bytes, message: str) -> None:
    file.write_bytes(data)
    _refused(file, detector, message)


def test_a_file_that_shrinks_while_it_is_read(
    file: Path, detector: DarknetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    size_before = os.stat_result((0, 0, 0, 0, 0, 0, NUM_BYTES, 0, 0, 0))
    file.write_bytes(file.read_bytes()[:-4])
    monkeypatch.setattr(os, "fstat", lambda _: size_before)
    with pytest.raises(InputError, match=r"layer 3 \[convolutional\] 14 filters 1x1: the file was cut"):
        read_darknet_state(file, detector)


def test_no_such_file(tmp_path: Path, detector: DarknetConfig) -> None:
    _refused(tmp_path / "none.weights", detector, "not found")
    _refused(tmp_path, detector, "not found")


# --- writing ---


def test_an_older_file_survives_a_failed_write(file: Path, detector: DarknetConfig) -> None:
    before = file.read_bytes()
    with torch.device("meta"):
        network = DarknetNet(detector)  # has no values to write
    with pytest.raises(NotImplementedError):
        write_darknet(file, network)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_no_such_folder(tmp_path: Path, file: Path, detector_net: DarknetNet) -> None:
    for parent in (tmp_path / "none", file):
        with pytest.raises(InputError, match="cannot be written"):
            write_darknet(parent / "net.weights", detector_net)
