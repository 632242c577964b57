"""The further files of an export: .pt2 for what PyTorch keeps, .ort for mobile builds, and optimised ahead of time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from cspdeploy.core.bundle import file_record
from cspdeploy.core.env import describe_environment
from cspdeploy.core.errors import InputError, did_you_mean
from cspdeploy.core.quantised import count_quantised
from cspdeploy.core.types import Artifact, FileRecord, StepRecord
from cspdeploy.export.ort_format import OPERATORS_FILE, write_operators_config, write_optimised, write_ort_format

__all__ = ["ALSO", "extend_artifacts", "parse_also", "write_config"]

ALSO = ("pt2", "ort", "opt")
"""pt2: the program of `torch.export`. ort: ONNX Runtime's flat format, and what operators it needs. opt: ONNX Runtime's
own optimised graph, for this machine."""

OF_FLOAT, OF_INT8 = "onnx", "onnx-int8"
_KINDS = {"ort": {OF_FLOAT: "ort", OF_INT8: "ort-int8"}, "opt": {OF_FLOAT: "onnx-opt", OF_INT8: "onnx-int8-opt"}}
"""FP16 has none: ONNX Runtime computes it in float32 on every processor that these files are for."""

Describe = Callable[[str, tuple[StepRecord, ...]], Artifact]


def parse_also(given: Sequence[str]) -> tuple[str, ...]:
    """`--also pt2 --also ort` in the order of `ALSO`.

    Raises:
        InputError: an unknown one.
    """
    for name in given:
        if name not in ALSO:
            near = next((one for one in ALSO if f"'{one}'" in did_you_mean(name, ALSO)), ALSO[0])
            raise InputError(f"--also {name}: expected {', '.join(ALSO)}", fix=f"--also {near}")
    return tuple(name for name in ALSO if name in given)


def extend_artifacts(
    artifacts: Sequence[Artifact], also: Sequence[str], *, path: Callable[[str], Path], describe: Describe,
    write_pt2: Callable[[Path], StepRecord | None],
) -> list[Artifact]:  # fmt: skip
    """The artifacts, and after them those that are asked for.

    Args:
        path: of an artifact of that kind.
        describe: an artifact of that kind from its file and steps.
        write_pt2: writes the program of `torch.export`; None where there is no network to export.

    Raises:
        InputError: there is no network, or ONNX Runtime cannot write a file.
    """
    found = list(artifacts)
    if "pt2" in also:
        step = write_pt2(path("pt2"))
        if step is None:
            raise InputError("--also pt2: is made from a network, and this is an ONNX file", fix="leave out --also pt2")
        found.append(describe("pt2", (step,)))
    machine = describe_environment()["cpu"]
    for name in (name for name in also if name in _KINDS):
        for artifact in (artifact for artifact in artifacts if artifact.kind in _KINDS[name]):
            kind = _KINDS[name][artifact.kind]
            step = _convert(name, path(artifact.kind), path(kind), machine)
            # What an INT8 file's limit follows from, which cannot be read from these.
            count = {"num_quantised": count_quantised(path(artifact.kind))} if artifact.precision == "int8" else {}
            step = dataclasses.replace(step, facts={**step.facts, **count})
            made = describe(kind, (*artifact.steps, step))
            found.append(dataclasses.replace(made, opset=artifact.opset, machine=machine if name == "opt" else ""))
    return found


def write_config(folder: Path, artifacts: Sequence[Artifact]) -> tuple[FileRecord, ...]:
    """What ONNX Runtime must hold to run the .ort files; nothing where there are none."""
    files = [folder / artifact.file for artifact in artifacts if artifact.file.endswith(".ort")]
    if not files:
        return ()
    write_operators_config(files, folder / OPERATORS_FILE)
    return (file_record(folder / OPERATORS_FILE),)


def _convert(name: str, source: Path, target: Path, machine: str) -> StepRecord:
    try:
        if name == "ort":
            return write_ort_format(source, target)
        return write_optimised(source, target, machine=machine)
    except Exception as error:  # ONNX Runtime's errors share no base class but this one
        reason = " ".join(str(error).split())[-200:]
        raise InputError(
            f"--also {name}: ONNX Runtime cannot write {target.name} ({reason})", fix=f"leave out --also {name}"
        ) from error
