"""Weights from files: safetensors, or PyTorch files that hold tensors and nothing that runs.

A pickle that needs code is refused. Keys and shapes must match the network exactly; what differs is listed.
"""

from __future__ import annotations

import pickle
import struct
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cspdeploy.core.codec import JsonObject
from cspdeploy.core.errors import InputError

__all__ = ["load_weights", "read_checkpoint", "read_state_dict", "write_safetensors"]

MAX_LISTED = 8


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from `.safetensors`, or from a `.pth`, `.pt`, `.bin` file.

    Training checkpoints that keep their weights under "state_dict", "model" or "ema" are opened; a "module." prefix
    is taken off.

    Raises:
        InputError: missing, empty, corrupt, or a pickle with code in it.
    """
    _require_file(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: not a safetensors file ({error})", fix="get the weights again") from error
    state = read_checkpoint(path)
    for key in ("state_dict", "model", "ema"):
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    tensors = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path}: holds no tensors", fix="name a file with a state dict")
    return tensors


def read_checkpoint(path: Path) -> JsonObject:
    """A dictionary written by `torch.save`, read without running any code that is in the file.

    Raises:
        InputError: missing, empty, corrupt, not a dictionary, or a pickle with code in it.
    """
    _require_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickles by other tools, which the error below explains
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        lines = str(error).splitlines() or [type(error).__name__]
        why = next((line for line in lines if "nsupported" in line), lines[0]).strip()
        raise InputError(
            f"{path}: refused, this pickle needs code to be run, or is corrupt ({why[:160]})",
            fix="save the state dict alone: torch.save(model.state_dict(), FILE), or use safetensors",
        ) from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        AssertionError,
        TypeError,
        AttributeError,
        struct.error,
    ) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not a PyTorch file ({first[:120]})", fix="fetch the weights again") from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds a {type(state).__name__}, expected a dictionary of tensors")
    return state


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: not found, expected a weights file", fix="give --weights FILE")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: empty file (0 bytes), expected weights", fix="fetch or train the weights again")


def load_weights(model: nn.Module, tensors: dict[str, Tensor], *, source: str) -> None:
    """Load `tensors` into `model`, in the model's own dtype. Nothing is loaded unless everything fits.

    `num_batches_tracked` may be absent: it only counts training steps.

    Raises:
        InputError: missing, unexpected or wrong-shaped keys, all named; NaN or infinite values.
    """
    expected = model.state_dict()
    problems = [f"missing {key} {list(value.shape)}" for key, value in expected.items()
                if key not in tensors and not key.endswith("num_batches_tracked")]  # fmt: skip
    problems += [f"unexpected {key} {list(value.shape)}" for key, value in tensors.items() if key not in expected]
    problems += [
        f"{key} is {list(tensors[key].shape)}, expected {list(value.shape)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if problems:
        more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise InputError(
            f"{source}: weights of another network: {'; '.join(sorted(problems)[:MAX_LISTED])}{more}",
            fix="name the model that these weights were made for",
        )
    fitting = {key: value.to(expected[key].dtype) for key, value in tensors.items()}
    broken = sorted(key for key, value in fitting.items() if not value.isfinite().all())
    if broken:
        named = ", ".join(broken[:MAX_LISTED])
        raise InputError(f"{source}: NaN or infinite values in {named}", fix="use other weights")
    model.load_state_dict({**expected, **fitting})


def write_safetensors(path: Path, model: nn.Module, *, dtype: torch.dtype) -> None:
    """Write the state dict, floats as `dtype`, in the model's own order of keys."""
    tensors = {
        key: (value.to(dtype) if value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(save(tensors))
    beside.replace(path)
