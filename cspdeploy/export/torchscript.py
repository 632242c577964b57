"""The network to TorchScript: traced, frozen, batch norms folded into convolutions."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from cspdeploy.core.types import StepRecord

__all__ = ["export_torchscript"]

_MANGLED = re.compile(rb"___torch_mangle_\d+")


def export_torchscript(model: nn.Module, example_NCHW: Tensor, path: Path) -> StepRecord:
    """Write `path`. The batch stays free in TorchScript whatever the example's is."""
    with warnings.catch_warnings(), torch.inference_mode():
        # PyTorch 2.11 and later deprecate TorchScript as a whole.
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model.eval(), example_NCHW, check_trace=False)  # type: ignore[no-untyped-call]
        frozen = torch.jit.freeze(traced)
        buffer = io.BytesIO()
        torch.jit.save(frozen, buffer)
    _write_canonical(buffer, path)
    return StepRecord(name="torchscript", outcome="done", detail="traced and frozen; batch norms folded")


def _write_canonical(saved: io.BytesIO, path: Path) -> None:
    """Write a TorchScript archive without what changes from one place or trace to the next.

    Left out: debug records, which hold source paths of this machine, and the serialization id, a hash over them.
    Renumbered by first appearance: ___torch_mangle_<n>, which PyTorch counts up from trace to trace in a process.
    """
    numbers: dict[bytes, bytes] = {}

    def renumber(found: re.Match[bytes]) -> bytes:
        return numbers.setdefault(found[0], b"___torch_mangle_%d" % len(numbers))

    # Python's own write, so that a full disk is an OSError.
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name in sorted(source.namelist()):
            if name.endswith((".debug_pkl", "/.data/serialization_id")):
                continue
            data = source.read(name)
            if name.endswith((".py", "/data.pkl")):  # text, and GLOBAL opcodes, which are text
                data = _MANGLED.sub(renumber, data)
            renamed = _MANGLED.sub(renumber, name.encode()).decode()
            target.writestr(zipfile.ZipInfo(renamed), data)  # ZipInfo's date is fixed: 1980
