"""What a hostile .pt2 file would run is refused or left out: a bundle's hashes come from whoever made the bundle."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cspdeploy.core.errors import InputError
from cspdeploy.export.pt2 import export_pt2
from cspdeploy.nets.registry import NETWORKS, build, spec_of
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import SessionRequest

GRAPH, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
Entries = dict[str, bytes]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(1)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    torch.manual_seed(0)
    export_pt2(_Net(), torch.zeros(1, 3, 8, 8), path)
    return path


def _changed(good: Path, place: Path, change: Callable[[Entries], None]) -> Path:
    with zipfile.ZipFile(good) as archive:
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(entries)
    path = place / "changed.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(f"model/{name}", data)
    return path


def _open(path: Path) -> Any:
    return all_runtimes()["pt2-cpu"].open(SessionRequest(path=path))


def _in_json(name: str, change: Callable[[Any], None]) -> Callable[[Entries], None]:
    def edit(entries: Entries) -> None:
        data = json.loads(entries[name])
        change(data)
        entries[name] = json.dumps(data).encode()

    return edit


def _node(data: Any) -> Any:
    return data["graph_module"]["graph"]["nodes"][0]


def _every_size(value: Any, text: str) -> None:
    if isinstance(value, dict):
        if "expr_str" in value:
            value["expr_str"] = text
        for item in value.values():
            _every_size(item, text)
    elif isinstance(value, list):
        for item in value:
            _every_size(item, text)


def _pickled(data: Any) -> None:
    next(iter(data["config"].values()))["use_pickle"] = True


def _elsewhere(data: Any) -> None:
    next(iter(data["config"].values()))["path_name"] = "../constants/custom_obj_0"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_in_json(GRAPH, lambda data: _every_size(data, "__import__('os').system('false')")), "a size that is none"),
        (_in_json(GRAPH, lambda data: _every_size(data, "9**9**9")), "a size that is none"),
        (_in_json(GRAPH, lambda data: _node(data).update(target="torch.serialization.os.system")), "a call of"),
        (_in_json(GRAPH, lambda data: _node(data).update(target="torch.hub.load")), "a call of"),
        (_in_json(GRAPH, lambda data: _node(data).update(target="#x:y")), "a call of"),
        (_in_json(WEIGHTS, _pickled), "a pickle"),
        (_in_json(WEIGHTS, _elsewhere), "weights in"),
        (lambda entries: entries.update({"data/aotinductor/model/x.so": b""}), "data/aotinductor"),
        (lambda entries: entries.update({"data/constants/custom_obj_0": b""}), "custom_obj_0"),
        (lambda entries: entries.pop(GRAPH), "no models/model.json"),
        (lambda entries: entries.update({GRAPH: b"{"}), "not a .pt2 file"),
    ],
)
def test_what_would_run_is_refused(good: Path, tmp_path: Path, change: Callable[[Entries], None], reason: str) -> None:
    with pytest.raises(InputError, match=r"changed\.pt2: ") as caught:
        _open(_changed(good, tmp_path, change))
    assert reason in caught.value.message
    assert "\n" not in str(caught.value)


def test_guards_and_pickled_samples_are_left_out(good: Path, tmp_path: Path) -> None:
    """Torch would execute the one and unpickle the other."""
    bait = tmp_path / "bait"

    class _Bait:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (bait,))

    def spoil(entries: Entries) -> None:
        torch.save(_Bait(), tmp_path / "sample.pt")
        entries["data/sample_inputs/model.pt"] = (tmp_path / "sample.pt").read_bytes()
        guard = f"__import__('pathlib').Path({str(bait)!r}).touch() is None"
        _in_json(GRAPH, lambda data: data.update(guards_code=[guard]))(entries)

    path = _changed(good, tmp_path, spoil)
    outputs = _open(path).run({"input": np.zeros((3, 3, 8, 8), np.float32)})
    assert next(iter(outputs.values())).shape == (3, 144)
    assert not bait.exists()
    torch.load(tmp_path / "sample.pt", weights_only=False)
    assert bait.exists(), "the bait itself works"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(name for name, row in NETWORKS.items() if row.detection is None))
def test_every_network_has_a_program_that_opens(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(spec_of(NETWORKS[name])).eval()
    x_NCHW = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    export_pt2(model, x_NCHW, tmp_path / "net.pt2")
    with torch.inference_mode():
        expected = model(x_NCHW).numpy()
    outputs = _open(tmp_path / "net.pt2").run({"input": x_NCHW.numpy()})
    np.testing.assert_allclose(next(iter(outputs.values())), expected, rtol=1e-4, atol=1e-4)
