"""From what the user names to something that can be traced: the artifact, the reference, and the inputs of both."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.check.blame.exact_source import ExactSource
from cspdeploy.check.blame.onnx_source import DEFAULT_BUDGET_BYTES, OnnxSource
from cspdeploy.check.blame.reference import Origin
from cspdeploy.check.subject import Candidate
from cspdeploy.core.catalog import EAGER
from cspdeploy.core.channel_factors import FACTORS_KEY, unpack_factors
from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_graph import OnnxModel, read_onnx
from cspdeploy.core.spec import ModelSpec
from cspdeploy.core.trace import TraceSource
from cspdeploy.runtimes import all_runtimes, require_runtime
from cspdeploy.runtimes.base import Runtime, SessionRequest

__all__ = ["Named", "name_candidate", "name_file", "open_origin", "open_source", "precision_of"]

Array = npt.NDArray[Any]

_DEFAULT_RUNTIME = {"onnx": "ort-cpu", "torchscript": "torchscript-cpu", EAGER: "torch-cpu"}
_QUANTISED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A file to open.

    Attributes:
        title: for the reader.
        inputs: names of its inputs; empty where it has none, as PyTorch modules.
        outputs: names that PyTorch modules do not carry.
        batch: inputs a call that it takes; None: any number.
        spec: for the eager network alone.
        factors: what an equalised file says that its channels are multiplied by, by tensor, `[C]`.
    """

    path: Path
    title: str
    format: str
    precision: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batch: int | None
    spec: ModelSpec | None = None
    factors: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)

    def feeds(self, values: Sequence[Array]) -> dict[str, Array]:
        """Inputs by this file's names, from those of another one in the same order.

        Raises:
            InputError: another number of inputs.
        """
        names = self.inputs or tuple(f"input {index}" for index in range(len(values)))
        if len(names) != len(values):
            raise InputError(f"{self.path}: takes {len(names)} inputs, expected {len(values)}", fix="name another file")
        return dict(zip(names, values, strict=True))


def name_candidate(candidate: Candidate) -> Named:
    """One of a bundle's."""
    if candidate.format == "onnx":
        named = name_file(candidate.path)
        return Named(
            path=named.path, title=candidate.artifact, format="onnx", precision=candidate.precision,
            inputs=named.inputs, outputs=candidate.output_names, batch=named.batch, factors=named.factors,
        )  # fmt: skip
    return Named(
        path=candidate.path, title=candidate.artifact, format=candidate.format, precision=candidate.precision,
        inputs=(), outputs=candidate.output_names, batch=candidate.batch, spec=candidate.spec,
    )  # fmt: skip


def name_file(path: Path) -> Named:
    """Any ONNX or TorchScript file.

    Raises:
        InputError: missing, or neither.
    """
    if path.suffix in (".pt", ".ts", ".pth", ".torchscript"):
        if not path.is_file():
            raise InputError(f"{path}: not found", fix="name a file")
        return Named(path=path, title=path.name, format="torchscript", precision="fp32", inputs=(), outputs=("output",),
                     batch=None)  # fmt: skip
    model = read_onnx(path)
    shapes = [value.shape for value in model.graph.inputs]
    first = shapes[0][0] if shapes and shapes[0] else None
    return Named(
        path=path, title=path.name, format="onnx", precision=precision_of(model),
        inputs=tuple(value.name for value in model.graph.inputs),
        outputs=tuple(value.name for value in model.graph.outputs), batch=first if isinstance(first, int) else None,
        factors=_factors_of(model, path),
    )  # fmt: skip


def _factors_of(model: OnnxModel, path: Path) -> dict[str, npt.NDArray[np.float64]]:
    try:
        return unpack_factors(model.metadata.get(FACTORS_KEY, ""))
    except InputError as error:
        raise InputError(f"{path}: {error.message}", fix=error.fix) from error


def precision_of(model: OnnxModel) -> str:
    """The coarsest arithmetic in a file: what its error has to be judged by."""
    operators = {node.operator for node in model.graph.nodes}
    if operators.intersection(_QUANTISED) or any(name.startswith("QLinear") for name in operators):
        return "int8"
    half = any(tensor.dtype == "float16" for tensor in model.graph.initializers.values())
    half = half or any(node.operator == "Cast" and node.attributes.get("to") == 10 for node in model.graph.nodes)
    return "fp16" if half else "fp32"


def choose_runtime(named: Named, runtime: str | None) -> Runtime:
    """The one that was asked for, or the first choice for this file.

    An FP16 file is run with every node rounded, since the CPU would compute it in FP32 and hide what FP16 does.

    Raises:
        InputError: it does not read such a file.
        RuntimeUnavailableError: it is missing.
    """
    rounding = all_runtimes().get("fp16-rounding")
    if runtime is None and named.precision == "fp16" and rounding is not None and rounding.missing() is None:
        return rounding
    chosen = require_runtime(runtime or _DEFAULT_RUNTIME[named.format])
    if named.format not in chosen.formats or (chosen.device != "cpu" and named.format != "onnx"):
        readers = [
            item.name for item in all_runtimes().values()
            if named.format in item.formats and (item.device == "cpu" or named.format == "onnx")
        ]  # fmt: skip
        raise InputError(f"--runtime {chosen.name}: cannot be looked into with {named.path.name}",
                         fix=f"--runtime {' or '.join(readers)}")  # fmt: skip
    return chosen


def open_source(
    named: Named, runtime: Runtime, *, folder: Path, budget_bytes: int = DEFAULT_BUDGET_BYTES
) -> TraceSource:
    """A file on a runtime.

    Raises:
        InputError: it cannot be opened.
    """
    title = f"{named.title} on {runtime.name}"
    if named.format == "onnx" and runtime.role == "reference":
        return ExactSource(named.path, title=title)
    if named.format == "onnx":
        return OnnxSource(named.path, runtime, title=title, folder=folder, budget_bytes=budget_bytes)
    session = runtime.open(SessionRequest(path=named.path, outputs=named.outputs, spec=named.spec))
    trace = importlib.import_module("cspdeploy.runtimes.torch_trace")
    source: TraceSource = trace.TorchTrace(session, title=title)
    return source


def open_origin(named: Named, *, folder: Path, runtime: str | None = None) -> Origin:
    """A file as a reference: in FP64, or as `runtime` computes it.

    Raises:
        InputError: it cannot be opened, or has an operator that cannot be computed in FP64.
        RuntimeUnavailableError: torch, onnx or the runtime is missing.
    """
    title = f"{named.title} in FP64"
    model: OnnxModel | None = None
    exact: TraceSource
    rounded: TraceSource
    if named.format == "onnx":
        require_runtime("onnx-fp64")
        first = ExactSource(named.path, title=title)
        exact, model = first, first.model
        rounded = ExactSource(named.path, title=title, real=np.float32)
    else:
        opened = require_runtime(_DEFAULT_RUNTIME[named.format])
        session = opened.open(SessionRequest(path=named.path, outputs=named.outputs, spec=named.spec))
        trace = importlib.import_module("cspdeploy.runtimes.torch_trace")
        exact = trace.TorchTrace(session, title=title, real=np.float64)
        rounded = trace.TorchTrace(session, title=title)
    if runtime is None:
        return Origin(source=exact, exact=exact, rounded=rounded, precision="fp64", model=model)
    source = open_source(named, choose_runtime(named, runtime), folder=folder)
    return Origin(source=source, exact=exact, rounded=rounded, precision=named.precision, model=model)


def as_calls(values: Mapping[str, Array], batch: int | None) -> list[list[Array]]:
    """Inputs in their order, cut into calls of `batch` along their first axis; None: all in one.

    What is left over at the end is left out.
    """
    arrays = list(values.values())
    if batch is None:
        return [arrays]
    num_calls = max(1, len(arrays[0]) // batch)
    return [[array[index * batch : (index + 1) * batch] for array in arrays] for index in range(num_calls)]
