from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import ModelSpec
from cspdeploy.nets.registry import build
from cspdeploy.nets.weights import load_weights, read_checkpoint, read_state_dict, write_safetensors

State = dict[str, Tensor]


def _model(spec: ModelSpec, seed: int) -> nn.Module:
    """Random weights and random batch norm statistics."""
    torch.manual_seed(seed)
    model = build(spec)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


@pytest.fixture
def model(tiny_spec: ModelSpec) -> nn.Module:
    return _model(tiny_spec, 1)


@pytest.fixture
def state(tiny_spec: ModelSpec) -> State:
    """Weights that are not those of `model`."""
    return {key: value.clone() for key, value in _model(tiny_spec, 2).state_dict().items()}


def _copy(model: nn.Module) -> State:
    return {key: value.clone() for key, value in model.state_dict().items()}


def _same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _save(path: Path, state: State) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


# --- files that fit ---


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt", "w.bin"])
def test_weights_give_the_same_outputs_in_another_model(tmp_path: Path, tiny_spec: ModelSpec, name: str) -> None:
    trained, fresh = _model(tiny_spec, 1), _model(tiny_spec, 2)
    x_NCHW = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(fresh(x_NCHW), trained(x_NCHW))
        load_weights(fresh, read_state_dict(_save(tmp_path / name, trained.state_dict())), source=name)
        assert torch.equal(fresh(x_NCHW), trained(x_NCHW))


@pytest.mark.parametrize("key", ["state_dict", "model", "ema"])
def test_training_checkpoint_is_opened_and_its_prefix_taken_off(
    tmp_path: Path, model: nn.Module, state: State, key: str
) -> None:
    wrapped = {key: {f"module.{name}": value for name, value in state.items()}, "epoch": 3, "arch": "tiny"}
    torch.save(wrapped, tmp_path / "w.pth")
    load_weights(model, read_state_dict(tmp_path / "w.pth"), source="w.pth")
    assert _same(model.state_dict(), state)


def test_written_in_fp16_it_loads_as_fp32(tmp_path: Path, model: nn.Module, tiny_spec: ModelSpec) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, model, dtype=torch.float16)
    stored = read_state_dict(path)
    assert {value.dtype for value in stored.values()} == {torch.float16, torch.int64}
    assert list(tmp_path.iterdir()) == [path]
    other = _model(tiny_spec, 2)
    load_weights(other, stored, source="w")
    assert {value.dtype for value in other.state_dict().values()} == {torch.float32, torch.int64}
    halved = {k: v.half().float() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    assert _same(other.state_dict(), halved)


def test_step_counters_may_be_absent(model: nn.Module, state: State) -> None:
    del state["stem.conv1.bn.num_batches_tracked"]
    load_weights(model, state, source="w")
    assert torch.equal(model.state_dict()["head.fc.weight"], state["head.fc.weight"])


# --- weights that do not fit ---


def test_all_that_differs_is_listed_and_nothing_is_loaded(model: nn.Module, state: State) -> None:
    before = _copy(model)
    del state["stages.0.conv_exp.conv.weight"]
    state["stages.9.extra"] = torch.zeros(2, 3)
    state["head.fc.weight"] = torch.zeros(1000, 48)
    with pytest.raises(InputError, match=r"^w\.pth") as caught:
        load_weights(model, state, source="w.pth")
    for part in (
        "missing stages.0.conv_exp.conv.weight [32, 16, 1, 1]",
        "unexpected stages.9.extra [2, 3]",
        "head.fc.weight is [1000, 48], expected [10, 48]",
    ):
        assert part in caught.value.message
    assert _same(model.state_dict(), before)


def test_a_long_list_is_cut_and_counted(model: nn.Module) -> None:
    with pytest.raises(InputError, match=r"; and \d+ more") as caught:
        load_weights(model, {}, source="w")
    assert caught.value.message.count("missing ") == 8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["head.fc.bias", "stages.1.conv_down.bn.running_var"])
def test_values_that_are_not_finite(model: nn.Module, state: State, key: str, value: float) -> None:
    before = _copy(model)
    state[key][3] = value
    with pytest.raises(InputError, match=f"NaN or infinite values in {key}"):
        load_weights(model, state, source="w")
    assert _same(model.state_dict(), before)


def test_value_beyond_the_range_of_the_model(model: nn.Module, state: State) -> None:
    """Finite in float64, infinite once it is loaded as float32."""
    state["head.fc.bias"] = torch.full((10,), 1e300, dtype=torch.float64)
    with pytest.raises(InputError, match=r"head\.fc\.bias"):
        load_weights(model, state, source="w")


# --- files that are not weights ---


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_missing_empty_folder_and_garbage(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(InputError, match="not found"):
        read_state_dict(path)
    path.touch()
    with pytest.raises(InputError, match="empty file"):
        read_state_dict(path)
    path.write_bytes(b"these are not the weights you are looking for")
    with pytest.raises(InputError):
        read_state_dict(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="not found"):
        read_state_dict(path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_truncated_file(tmp_path: Path, state: State, name: str) -> None:
    path = _save(tmp_path / name, state)
    whole = path.read_bytes()
    for share in (0.001, 0.3, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            read_state_dict(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "legacy.pth"])
def test_broken_bytes_never_crash_the_reader(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "legacy.pth":
        torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    else:
        _save(path, {"a": torch.ones(3)})
    whole = path.read_bytes()
    random = Random(0)
    for _ in range(150):
        changed = bytearray(whole[: random.randrange(1, len(whole) + 1)])
        changed[random.randrange(len(changed))] = random.randrange(256)
        path.write_bytes(changed)
        with contextlib.suppress(InputError):
            read_state_dict(path)


@pytest.mark.parametrize("content", [torch.ones(3), [1, 2], {"epoch": 3}, {}])
def test_no_state_dict_in_it(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"holds"):
        read_state_dict(tmp_path / "w.pth")


class _Bomb:
    """Makes a folder when it is unpickled the trusting way."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("writer", ["torch", "torch-legacy", "pickle"])
@pytest.mark.parametrize("reader", [read_state_dict, read_checkpoint])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, writer: str, reader: Any) -> None:
    path, trace = tmp_path / "w.pth", tmp_path / "trace"
    content = {"weight": torch.ones(2), "bomb": _Bomb(trace)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))  # torch warns of later ones
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(InputError, match="refused") as caught:
        reader(path)
    assert "torch.save" in caught.value.fix
    assert not trace.exists()
    if writer == "torch":  # the bomb is live: it goes off for those who trust it
        torch.load(path, weights_only=False)
        assert trace.is_dir()
