"""Files for ONNX Runtime alone: the .ort format of its mobile builds, and graphs that are optimised ahead of time.

Their bytes do not repeat: it numbers nodes and orders a table run by run. What they compute does.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cspdeploy.core.types import StepRecord

__all__ = ["OPERATORS_FILE", "write_operators_config", "write_optimised", "write_ort_format"]

OPERATORS_FILE = "required_operators_and_types.config"
"""For `build.py --include_ops_by_config FILE --enable_reduced_operator_type_support`."""

NOT_PORTABLE = ("NchwcTransformer",)
"""Blocks channels as wide as the registers of this processor: such a graph runs on no other. ONNX Runtime's own
converter leaves it out for every target but amd64."""


def write_ort_format(source: Path, target: Path) -> StepRecord:
    """An ONNX file, optimised as far as every processor takes it, in the flat format that needs no ONNX parser.

    Raises:
        Exception: whatever ONNX Runtime raises for a graph that it cannot open or write.
    """
    _save(source, target, {"session.save_model_format": "ORT"}, disabled=NOT_PORTABLE)
    return StepRecord(
        name="ort-format", outcome="done",
        detail="optimised for any processor; opens without an ONNX parser, in ONNX Runtime's mobile builds too",
        facts={"onnxruntime": _version(), "left_out": list(NOT_PORTABLE)},
    )  # fmt: skip


def write_optimised(source: Path, target: Path, *, machine: str) -> StepRecord:
    """An ONNX file after all of ONNX Runtime's optimisations on this machine, so that opening it costs less.

    Args:
        machine: processor that it is for, as `Artifact.machine` will say.

    Raises:
        Exception: whatever ONNX Runtime raises for a graph that it cannot open or write.
    """
    _save(source, target, {}, disabled=())
    return StepRecord(
        name="optimise-ahead", outcome="done",
        detail=f"ONNX Runtime {_version()}'s own optimised graph, for {machine} alone: it may not open, or be slow, on "
        "another processor or version",
        facts={"onnxruntime": _version(), "machine": machine},
    )  # fmt: skip


def write_operators_config(files: Iterable[Path], target: Path) -> None:
    """Operators and types that .ort files need, for a build of ONNX Runtime that holds no others.

    By ONNX Runtime's own reader; without the paths of this machine, which its header has.
    """
    from onnxruntime.tools.ort_format_model import create_config_from_models

    files = sorted(files)
    logger = logging.getLogger("ort_format_model.utils")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / OPERATORS_FILE
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # its reader leaves files to the garbage collector
                create_config_from_models(files, written, enable_type_reduction=True)
            lines = [line for line in written.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    finally:
        logger.setLevel(level)
    header = [f"# ONNX Runtime {_version()}: what these files need", *(f"# - {path.name}" for path in files)]
    target.write_text("\n".join([*header, *lines]) + "\n", encoding="utf-8")


def _save(source: Path, target: Path, entries: dict[str, str], *, disabled: Iterable[str]) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the graph is for this machine: the record says so
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(target)
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    extra: dict[str, Any] = {"disabled_optimizers": list(disabled)} if disabled else {}
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"], **extra)


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
