"""Which artifacts a self-test checks, on which engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cspdeploy.core.env import other_machine
from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.core.types import Artifact, Manifest
from cspdeploy.edge.opening import find_artifact
from cspdeploy.runtimes import all_runtimes, require_runtime
from cspdeploy.runtimes.base import Runtime

__all__ = ["ONNX_RUNTIME", "Planned", "plan_artifacts"]

ONNX_RUNTIME = "ort-cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """An artifact and what opens it, or why nothing does."""

    artifact: Artifact
    runtime: Runtime | None
    absent: str = ""


def plan_artifacts(folder: Path, manifest: Manifest, *, kinds: Sequence[str], runtime: str) -> list[Planned]:
    """What is checked on what.

    Args:
        kinds: of artifacts; empty for all that an engine here reads.
        runtime: name; empty for the engine that is here.

    Raises:
        InputError: no such artifact, or a runtime that does not read what was asked for.
        RuntimeUnavailableError: what was asked for has no engine here, or nothing has.
    """
    wanted = [find_artifact(folder, manifest, kind) for kind in dict.fromkeys(kinds)]
    given = require_runtime(runtime) if runtime else None
    planned = [_choose(artifact, given) for artifact in wanted] or [
        # Of another machine only where it is asked for: there it is a fault, and here it is none.
        Planned(artifact=artifact, runtime=None, absent=strange)
        if (strange := other_machine(artifact.machine))
        else _choose(artifact, given)
        for artifact in manifest.artifacts
    ]
    absent = [item for item in planned if item.runtime is None]
    if absent and (wanted or len(absent) == len(planned)):
        what = f"'{absent[0].artifact.kind}'" if wanted else "no artifact can be checked"
        if given is not None:
            raise InputError(f"--runtime {given.name}: {what}: {absent[0].absent}", fix="cspdeploy doctor")
        raise RuntimeUnavailableError(f"{folder}: {what}: {absent[0].absent}", fix="pip install 'cspdeploy[cpu]'")
    return planned


def _choose(artifact: Artifact, given: Runtime | None) -> Planned:
    if artifact.decode == "trt":
        absent = "its boxes are made by a plugin of TensorRT, and no engine here has it"
        return Planned(artifact=artifact, runtime=None, absent=absent)
    if given is not None:
        reads = given.reads(format_=artifact.format, precision=artifact.precision)
        return Planned(
            artifact=artifact, runtime=given if reads else None,
            absent="" if reads else f"{given.name} does not read it",
        )  # fmt: skip
    absent = "no engine reads it"
    for runtime in _candidates(artifact):
        missing = runtime.missing()
        if missing is None:
            return Planned(artifact=artifact, runtime=runtime)
        absent = f"{missing[0]} ({missing[1]})"
    return Planned(artifact=artifact, runtime=None, absent=absent)


def _candidates(artifact: Artifact) -> Sequence[Runtime]:
    """CPU engines that read it, ONNX Runtime first."""
    found = [
        runtime
        for runtime in all_runtimes().values()
        if runtime.device == "cpu" and runtime.role == "engine" and not runtime.optional and runtime.timed
        and runtime.reads(format_=artifact.format, precision=artifact.precision)
    ]  # fmt: skip
    return sorted(found, key=lambda runtime: runtime.name != ONNX_RUNTIME)
