"""The ladder: which candidate is checked on which runtime, in order."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cspdeploy.check.subject import Candidate, Subject
from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.runtimes import all_runtimes, require_runtime
from cspdeploy.runtimes.base import CudaOptions, Runtime, SessionRequest
from cspdeploy.runtimes.cuda_driver import open_device

__all__ = ["RUNTIMES_VARIABLE", "Rung", "left_out", "list_rungs", "meant_runtimes"]

RUNTIMES_VARIABLE = "CSPDEPLOY_RUNTIMES"
"""Environment variable: what is checked where no runtime is named, for machines with an engine that is not meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One candidate on one runtime, on the GPU of that index where it runs on one.

    `not_checkable` says why it cannot be opened here, or is empty.
    """

    candidate: Candidate
    runtime: Runtime
    not_checkable: str = ""
    device: int = 0

    @property
    def request(self) -> SessionRequest:
        """What to open."""
        made = self.candidate
        cuda = CudaOptions(device=self.device) if self.runtime.device == "cuda" else CudaOptions()
        return SessionRequest(path=made.path, outputs=made.output_names, spec=made.spec, cuda=cuda)


def list_rungs(subject: Subject, *, runtimes: list[str], device: int | None = None) -> list[Rung]:
    """Eager first, then the artifacts in the order of the ladder, each on every runtime that reads it.

    Args:
        runtimes: names asked for; empty for those of CSPDEPLOY_RUNTIMES (names between commas), or all that are here.
            A CPU runtime that is not here gives rungs that say so; one for another device, and an optional one, is left
            out.
        device: index of the GPU for all runtimes on CUDA; None: the first one, where there is one.

    Raises:
        InputError: unknown runtime, or one that computes references and is no rung itself; a device with runtimes none
            of which runs on one, or an index that no GPU has.
        RuntimeUnavailableError: a runtime that was asked for is missing, or a device with no runtime that uses it.
    """
    wanted = [require_runtime(name) for name in runtimes] or [
        runtime for runtime in meant_runtimes().values() if _expected(runtime) or runtime.missing() is None
    ]
    references = [runtime.name for runtime in wanted if runtime.role == "reference"]
    if runtimes and references:
        raise InputError(
            f"--runtime {references[0]}: computes what others are judged by, and is not judged itself",
            fix="cspdeploy doctor",
        )
    if device is not None:
        _require_device(device, wanted, named=bool(runtimes))
    return [
        Rung(
            candidate=candidate,
            runtime=runtime,
            not_checkable=_missing(runtime) or candidate.absent,
            device=device or 0,
        )
        for candidate in subject.candidates
        for runtime in wanted
        if runtime.role == "engine" and runtime.reads(format_=candidate.format, precision=candidate.precision)
    ]


def _require_device(device: int, wanted: list[Runtime], *, named: bool) -> None:
    """A GPU that was asked for is there, and some runtime uses it: said before anything is opened."""
    if any(runtime.device == "cuda" for runtime in wanted):
        open_device(device)
        return
    if named:
        given = ", ".join(runtime.name for runtime in wanted)
        raise InputError(f"--device {device}: {given} runs on no GPU", fix="--runtime ort-cuda")
    found = {name: runtime.missing() for name, runtime in meant_runtimes().items() if runtime.device == "cuda"}
    if not found:
        raise left_out(f"--device {device}")
    reasons = "; ".join(f"{name}: {missing[0]}" for name, missing in found.items() if missing is not None)
    fix = next((missing[1] for missing in found.values() if missing is not None), "cspdeploy doctor")
    raise RuntimeUnavailableError(f"--device {device}: no runtime on CUDA can be used here ({reasons})", fix=fix)


def left_out(option: str) -> InputError:
    """Of an option for GPUs where CSPDEPLOY_RUNTIMES names no runtime on one."""
    names = os.environ.get(RUNTIMES_VARIABLE, "")
    return InputError(
        f"{option}: {RUNTIMES_VARIABLE}={names} leaves out every runtime on CUDA",
        fix=f"unset {RUNTIMES_VARIABLE}, or --runtime ort-cuda",
    )


def meant_runtimes() -> dict[str, Runtime]:
    """All, or those that the environment variable names."""
    names = [name.strip() for name in os.environ.get(RUNTIMES_VARIABLE, "").split(",") if name.strip()]
    runtimes = all_runtimes()
    unknown = [name for name in names if name not in runtimes]
    if unknown:
        raise InputError(
            f"{RUNTIMES_VARIABLE}={','.join(names)}: {unknown[0]} is unknown, expected some of {', '.join(runtimes)}",
            fix=f"unset {RUNTIMES_VARIABLE}",
        )
    return {name: runtime for name, runtime in runtimes.items() if not names or name in names}


def _expected(runtime: Runtime) -> bool:
    """Its absence is worth a word."""
    return runtime.device == "cpu" and not runtime.optional


def _missing(runtime: Runtime) -> str:
    missing = runtime.missing()
    return f"{missing[0]} ({missing[1]})" if missing else ""
