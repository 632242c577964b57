"""Darknet's `.weights` files: read to the last byte, written back.

Little-endian. Three int32 version numbers and the count of images seen in training, then bare float32 in the order of
the cfg: of a convolution its biases, then (with batch norm) scales, running means, running variances, then the kernel
`[filters, in_chs / groups, size, size]`. Nothing in the file says which network it belongs to, so all that can be
checked is: the size, that values are finite, that none is absurd, and that no variance is negative. Values that shift
by one layer fail that at once.

Reference: AlexeyAB/darknet, src/parser.c, load_weights_upto and save_weights_upto.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cspdeploy.core.errors import InputError
from cspdeploy.nets.darknet.network import DarknetNet
from cspdeploy.nets.darknet.plan import plan_network
from cspdeploy.nets.darknet.sections import Convolutional, DarknetConfig

__all__ = ["WeightsFile", "expected_bytes", "read_darknet", "read_darknet_state", "write_darknet"]

MAX_VERSION = 1000  # above it: not a version, or the transposed matrices of before 2016
MAX_ABS = 1e10  # no trained network comes near; bytes that are no float32 of this place soon do
FLOAT = np.dtype("<f4")

OTHER_NETWORK = "name the weights that belong to this cfg, or get the file again"

_FOREIGN = {
    b"PK\x03\x04": "a PyTorch or zip archive",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x89HDF": "an HDF5 file (Keras)",
    b"<!DO": "an HTML page, so the download did not give the file",
    b"<!do": "an HTML page, so the download did not give the file",
    b"<htm": "an HTML page, so the download did not give the file",
    b"vers": "a Git LFS pointer, not the file itself",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFile:
    """What a `.weights` file says of itself."""

    version: tuple[int, int, int]
    seen: int
    """Images seen in training."""
    num_layers: int
    """Layers that it holds, from the first one; all of the cfg's, except in a partial file."""


class _LayerProblemError(Exception):
    """A layer's values cannot be those of its network."""


@dataclass(frozen=True, slots=True)
class _LayerValues:
    """One layer's tensors in the order of the file, by their keys in a `DarknetNet`."""

    index: int
    layer: Convolutional
    shapes: dict[str, tuple[int, ...]]
    num_bytes: int

    def __str__(self) -> str:
        layer = self.layer
        return f"layer {self.index} [{layer.type}] {layer.filters} filters {layer.size}x{layer.size}"


def expected_bytes(network: DarknetConfig | DarknetNet, *, up_to: int | None = None) -> int:
    """Size of the network's `.weights` file, with the header of 20 bytes that is written today.

    Args:
        up_to: only the layers before this index, as in `yolov4.conv.137`; None: all.

    Raises:
        InputError: `up_to` is no layer index.
    """
    return 20 + sum(one.num_bytes for one in _values(network, up_to))


def read_darknet(path: Path, network: DarknetNet, *, up_to: int | None = None) -> WeightsFile:
    """Load a `.weights` file into `network`; nothing is loaded unless everything fits.

    Args:
        up_to: take a partial file that holds the layers before this index; the others keep what they have.

    Raises:
        InputError: not a Darknet file, one of another network, or damaged; names the layer where it goes wrong.
    """
    found, tensors = read_darknet_state(path, network.config, up_to=up_to)
    for one in _values(network, up_to):  # by layer: load_state_dict() goes over all keys for each module
        module = network.layers[one.index]
        now = module.state_dict()
        fitting = {}
        for key in one.shapes:
            value, name = tensors[key], key.removeprefix(f"layers.{one.index}.")
            # On the meta device there is nothing to convert to; elsewhere the network keeps its dtype and its device.
            fitting[name] = value if now[name].is_meta else value.to(now[name])
        module.load_state_dict(fitting, strict=False, assign=True)
    return found


def read_darknet_state(
    path: Path, config: DarknetConfig, *, up_to: int | None = None
) -> tuple[WeightsFile, dict[str, Tensor]]:
    """The tensors of a `.weights` file, float32, under the keys of `DarknetNet(config)`.

    Raises:
        InputError: as `read_darknet`.
    """
    if not path.is_file():
        raise InputError(f"{path}: not found, expected a weights file", fix="give --weights FILE")
    layers = list(_values(config, up_to))
    tensors: dict[str, Tensor] = {}
    version, seen, problem, fix = (0, 0, 0), 0, "", OTHER_NETWORK
    try:
        with path.open("rb") as file:
            version, seen, header_bytes = _read_header(file, path)
            num_bytes = os.fstat(file.fileno()).st_size - header_bytes
            whole, problem, fix = _check_size(path, config, layers, num_bytes, header_bytes)
            # On a wrong size too: what can be read shows at which layer another network begins.
            for one in layers[:whole]:
                tensors.update(_read_layer(file, one))
    except _LayerProblemError as error:
        problem, fix = "; ".join(filter(None, (problem, str(error)))), OTHER_NETWORK
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if problem:
        raise InputError(f"{path}: {problem}", fix=fix)
    num_layers = len(config.layers) if up_to is None else up_to
    return WeightsFile(version=version, seen=seen, num_layers=num_layers), tensors


def write_darknet(
    path: Path,
    network: DarknetNet,
    *,
    seen: int = 0,
    version: tuple[int, int, int] = (0, 2, 5),
    up_to: int | None = None,
) -> None:
    """Write the weights of `network` as a `.weights` file, float32. The file is whole, or as it was before.

    Args:
        seen: images seen in training.
        version: of the header; below 0.2 `seen` has 32 bits instead of 64.
        up_to: only the layers before this index, which makes a partial file; None: all.

    Raises:
        InputError: `up_to` is no layer index, or the version is none.
    """
    if not all(0 <= part <= MAX_VERSION for part in version) or not 0 <= seen < 2 ** _seen_bits(version):
        raise InputError(f"version, seen: got {version}, {seen}, expected numbers that a header can hold")
    state = network.state_dict()
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("wb") as file:
            file.write(np.array(version, "<i4").tobytes())
            file.write(seen.to_bytes(_seen_bits(version) // 8, "little"))
            for one in _values(network, up_to):
                for key in one.shapes:
                    values = state[key].detach().to("cpu", torch.float32).contiguous().numpy()
                    file.write(values.astype(FLOAT, copy=False).data.cast("B"))
        beside.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})", fix="name another file") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _values(network: DarknetConfig | DarknetNet, up_to: int | None = None) -> Iterator[_LayerValues]:
    config, plan = (
        (network.config, network.plan) if isinstance(network, DarknetNet) else (network, plan_network(network))
    )
    if up_to is not None and not 1 <= up_to <= len(config.layers):
        raise InputError(f"up_to: got {up_to}, expected 1 to {len(config.layers)}, the number of layers")
    for index, layer in enumerate(config.layers[:up_to]):
        if isinstance(layer, Convolutional):
            (source,) = plan.layers[index].inputs
            in_chs = plan.layers[source].num_chs if source >= 0 else config.net.channels
            yield _layer_values(index, layer, in_chs)


def _layer_values(index: int, layer: Convolutional, in_chs: int) -> _LayerValues:
    vectors = ["bn.bias", "bn.weight", "bn.running_mean", "bn.running_var"] if layer.batch_normalize else ["conv.bias"]
    shapes: dict[str, tuple[int, ...]] = {f"layers.{index}.{name}": (layer.filters,) for name in vectors}
    kernel = (layer.filters, in_chs // layer.groups, layer.size, layer.size)
    shapes[f"layers.{index}.conv.weight"] = kernel
    num_values = sum(math.prod(shape) for shape in shapes.values())
    return _LayerValues(index, layer, shapes, num_values * FLOAT.itemsize)


# --- reading ---


def _seen_bits(version: Sequence[int]) -> int:
    major, minor, _ = version
    return 64 if major * 10 + minor >= 2 else 32


def _read_header(file: BufferedReader, path: Path) -> tuple[tuple[int, int, int], int, int]:
    """Version, images seen, and the header's size in bytes."""
    start = file.read(12)
    for magic, what in _FOREIGN.items():
        if start.startswith(magic):
            raise InputError(f"{path}: {what}, expected Darknet weights", fix="get the .weights file again")
    if start[8:10] == b'{"':
        raise InputError(f"{path}: a safetensors file, expected Darknet weights", fix="rename it to .safetensors")
    if len(start) < 12:
        raise InputError(f"{path}: {len(start)} bytes, expected a Darknet header", fix="get the .weights file again")
    major, minor, revision = (int(part) for part in np.frombuffer(start, "<i4"))
    if not (0 <= major <= MAX_VERSION and 0 <= minor <= MAX_VERSION and revision >= 0):
        raise InputError(
            f"{path}: header version {major}.{minor}.{revision}, expected such as 0.2.5: "
            "no Darknet weights, or a legacy file with transposed matrices",
            fix="get the .weights file again; a legacy file must be rewritten by Darknet first",
        )
    version = (major, minor, revision)
    seen = file.read(_seen_bits(version) // 8)
    if len(seen) < _seen_bits(version) // 8:
        raise InputError(f"{path}: ends in its header, expected Darknet weights", fix="get the .weights file again")
    return version, int.from_bytes(seen, "little"), 12 + len(seen)


def _check_size(
    path: Path, config: DarknetConfig, layers: Sequence[_LayerValues], num_bytes: int, header_bytes: int
) -> tuple[int, str, str]:
    """How many of `layers` the file holds as a whole; what is wrong with its size, or nothing; and what to do then."""
    ends = list(itertools.accumulate(one.num_bytes for one in layers))
    expected = ends[-1] if ends else 0
    whole = bisect.bisect_right(ends, num_bytes)
    if num_bytes == expected:
        return whole, "", ""
    sizes = f"{num_bytes + header_bytes} bytes, expected {expected + header_bytes}"
    if abs(num_bytes - expected) == 4:  # what the two forms of the header differ in
        sizes += f" (or a header of {header_bytes + num_bytes - expected} bytes, which its version does not go with)"
    if num_bytes > expected:
        after = f" after {layers[-1]}, the last that has any" if layers else ""
        return whole, f"too long, {sizes}: {num_bytes - expected} bytes are left{after}", OTHER_NETWORK
    left = num_bytes - (ends[whole - 1] if whole else 0)
    if left == 0 and whole > 0:
        return whole, *_partial(path, config, layers[whole - 1].index + 1, layers[whole].index, sizes)
    one = layers[whole]
    return whole, f"too short, {sizes}: {one} needs {one.num_bytes} bytes, {left} are left", OTHER_NETWORK


def _partial(path: Path, config: DarknetConfig, first: int, last: int, sizes: str) -> tuple[str, str]:
    """The file ends with a layer, as those do that start a training."""
    named = re.search(r"\.conv\.(\d{1,9})$", path.name)
    num_layers = int(named[1]) if named and first <= int(named[1]) <= last else first
    return (
        f"a partial file, {sizes}: it holds layers 0 to {num_layers - 1} of {len(config.layers)}, as "
        f"'.conv.{num_layers}' files do, and is the start of a training, not a trained network",
        f"give the full .weights file; from Python, read_darknet(..., up_to={num_layers}) leaves the rest as it is",
    )


def _read_layer(file: BufferedReader, one: _LayerValues) -> dict[str, Tensor]:
    """One layer's tensors, each in its own memory, so that they load without a copy."""
    tensors = {}
    for key, shape in one.shapes.items():
        values: npt.NDArray[np.float32] = np.empty(shape, FLOAT)
        if file.readinto(values.data.cast("B")) != values.nbytes:
            raise _LayerProblemError(f"{one}: the file was cut while it was read")
        problem = _problem(key.removeprefix(f"layers.{one.index}."), values)
        if problem:
            raise _LayerProblemError(f"{one}: {problem}: weights of another network, or a damaged file")
        tensors[key] = torch.from_numpy(values.astype(np.float32, copy=False))
    return tensors


def _problem(name: str, values: npt.NDArray[np.float32]) -> str:
    """What no trained network has, in words, or nothing."""
    low, high = float(values.min()), float(values.max())  # NaN where one value is
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"NaN or infinite values in {name}"
    if name == "bn.running_var" and low < 0:
        return f"a negative variance in {name} ({low:.3g})"
    if max(-low, high) > MAX_ABS:
        return f"absurd values in {name} ({low:.3g} to {high:.3g})"
    return ""
