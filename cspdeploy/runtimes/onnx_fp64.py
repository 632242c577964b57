"""ONNX graphs in float64: what a file says, computed without an engine's rounding. A reference, not a rung.

Each floating-point weight is taken as stored and widened; every node then computes in float64, whatever its type in the
file, so that an FP16 graph shows what its rounded weights alone do. Casts between floating-point types do nothing.
Integers stay integers: a quantised graph rounds where its QuantizeLinear nodes round.

Convolutions, pools, matrix products and Resize are computed here by PyTorch and numpy; every other operator by the
reference implementation of the onnx package. A tensor is freed after its last use.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.core.onnx_file import check_external_data
from cspdeploy.core.types import PlacedNode
from cspdeploy.runtimes.base import Feeds, Outputs, Runtime, SessionRequest
from cspdeploy.runtimes.onnx_widen import widen_model

if TYPE_CHECKING:
    import onnx

__all__ = ["RUNTIMES", "OnnxFp64Session", "open_exact"]

Array = npt.NDArray[Any]
Visit = Callable[[str, Array, bool], None]


class OnnxFp64Session:
    """A graph and its weights, ready to be computed node by node.

    Args:
        path: an ONNX file.
        real: the type of all floating-point numbers. float32 gives the same computation with its rounding, of which
            the distance to float64 is the noise floor of every tensor.

    Raises:
        InputError: not a readable ONNX file, or an operator that the reference implementation does not have.
    """

    def __init__(self, path: Path, *, real: type[np.floating[Any]] = np.float64) -> None:
        self.placement: dict[str, int] = {}
        self.nodes: tuple[PlacedNode, ...] = ()
        self._path, self._real = path, real
        model = _load(path)
        graph = model.graph
        widen_model(model, real)
        self.weights = _weights(graph, real)
        self.outputs = [value.name for value in graph.output]
        self._inputs = [value.name for value in graph.input if value.name not in self.weights]
        self._nodes = _in_order(path, graph, {"", *self._inputs, *self.weights})
        self._taken = [[*node.input, *_captured(node)] for node in self._nodes]
        self._computes = [_operator(model, node) for node in self._nodes]
        self._uses = Counter(name for names in self._taken for name in names) + Counter(self.outputs)

    def run(self, feeds: Feeds) -> Outputs:
        """Host arrays in, host arrays out; floating-point ones in float64."""
        return self.visit(feeds, lambda name, values, constant: None)

    def visit(self, feeds: Feeds, visit: Visit) -> Outputs:
        """The same, and every tensor that a node makes is given to `visit(name, values, constant)` in graph order.

        `constant` is whether the values follow from weights alone.

        Raises:
            InputError: other inputs than the graph has, or a node that cannot be computed.
        """
        if set(feeds) != set(self._inputs):
            raise InputError(f"{self._path}: got inputs {sorted(feeds)}, expected {sorted(self._inputs)}")
        known: dict[str, Array] = {**self.weights, **{name: self._as_real(value) for name, value in feeds.items()}}
        fixed, left = set(self.weights), self._uses.copy()
        for node, taken, compute in zip(self._nodes, self._taken, self._computes, strict=True):
            results = self._computed(node, compute, {name: known[name] for name in taken if name})
            constant = all(name in fixed for name in taken if name) and not node.op_type.startswith("Random")
            for name, values in zip(node.output, results, strict=False):
                if name and isinstance(values, np.ndarray | np.generic):
                    known[name] = self._as_real(np.asarray(values))
                    visit(name, known[name], constant)
                elif name:  # a sequence or an optional
                    known[name] = values
                if constant:
                    fixed.add(name)
            for name in taken:
                left[name] -= 1
                if name and left[name] == 0 and name not in self.weights:
                    known.pop(name, None)
        return {name: known[name] for name in self.outputs}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """The same computation; this runtime is not timed."""

        def compute() -> None:
            self.run(feeds)

        return compute

    def _as_real(self, values: Array) -> Array:
        return values.astype(self._real) if values.dtype.kind == "f" and values.dtype != self._real else values

    def _computed(self, node: onnx.NodeProto, compute: Callable[..., Any], taken: Mapping[str, Array]) -> Sequence[Any]:
        from cspdeploy.core.errors import CspDeployError

        try:
            with np.errstate(all="ignore"):  # infinities are values here, and judged by who asked
                found: Sequence[Any] = compute(taken)
        except CspDeployError:
            raise
        except Exception as error:  # the reference implementation's exceptions share no base class but this one
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            what = f"node '{node.name or node.output[0]}' ({node.op_type})"
            fix = "see the shapes that reach this node: cspdeploy inspect"
            raise InputError(f"{self._path}: {what} cannot be computed ({reason})", fix=fix) from error
        return found


def open_exact(path: Path, *, real: type[np.floating[Any]] = np.float64) -> OnnxFp64Session:
    """A file's computation in float64, or in float32 by the same code.

    Raises:
        InputError: the file cannot be read, or has an operator that the reference implementation does not know.
    """
    check_external_data(path)
    return OnnxFp64Session(path, real=real)


def _load(path: Path) -> onnx.ModelProto:
    import onnx

    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's exceptions share no base class but this one
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not a readable ONNX file ({reason})", fix="copy it again") from error


def _weights(graph: onnx.GraphProto, real: type[np.floating[Any]]) -> dict[str, Array]:
    from onnx import numpy_helper

    found = {}
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        # bfloat16 is of a kind of its own, which numpy does not call floating-point
        floating = values.dtype.kind == "f" or values.dtype.name == "bfloat16"
        found[tensor.name] = values.astype(real) if floating else values
    return found


def _in_order(path: Path, graph: onnx.GraphProto, known: set[str]) -> list[onnx.NodeProto]:
    """Each node after those that it takes from; files mostly are so already.

    Raises:
        InputError: a cycle, or a tensor that nothing makes.
    """
    waiting, ordered = list(graph.node), []
    while waiting:
        ready = []
        for node in waiting:
            if known.issuperset(node.input) and known.issuperset(_captured(node)):
                known.update(node.output)
                ready.append(id(node))
                ordered.append(node)
        if not ready:
            name = waiting[0].name or waiting[0].output[0]
            raise InputError(f"{path}: node '{name}' takes a tensor that nothing makes", fix="export it again")
        done = set(ready)
        waiting = [node for node in waiting if id(node) not in done]
    return ordered


def _captured(node: onnx.NodeProto) -> list[str]:
    """Tensors of outer graphs that its subgraphs take."""
    found: list[str] = []
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *((attribute.g,) if attribute.HasField("g") else ())):
            own = {value.name for value in (*graph.input, *graph.initializer)}
            own |= {name for inner in graph.node for name in inner.output}
            taken = [name for inner in graph.node for name in (*inner.input, *_captured(inner))]
            taken += [value.name for value in graph.output]
            found += [name for name in taken if name and name not in own]
    return list(dict.fromkeys(found))


def _operator(model: onnx.ModelProto, node: onnx.NodeProto) -> Callable[[Mapping[str, Array]], Sequence[Any]]:
    """A function of the tensors that the node takes, by name."""
    from cspdeploy.runtimes.onnx_fp64_operators import OPERATORS

    plain = _by_reference(model, node)
    own = OPERATORS.get(node.op_type)
    if own is None or node.domain not in ("", "ai.onnx", "com.microsoft"):
        return plain

    def compute(taken: Mapping[str, Array]) -> Sequence[Any]:
        found = own(node, [taken.get(name) for name in node.input])
        return plain(taken) if found is None else found

    return compute


def _by_reference(model: onnx.ModelProto, node: onnx.NodeProto) -> Callable[[Mapping[str, Array]], Sequence[Any]]:
    """The onnx package's implementation of that one node, made at its first use."""

    @functools.cache
    def evaluator() -> Any:
        from onnx import helper
        from onnx.reference import ReferenceEvaluator

        names = [name for name in dict.fromkeys((*node.input, *_captured(node))) if name]
        outputs = [name for name in node.output if name]
        graph = helper.make_graph(
            [node], "node", [helper.make_empty_tensor_value_info(name) for name in names],
            [helper.make_empty_tensor_value_info(name) for name in outputs],
        )  # fmt: skip
        one = helper.make_model(graph, opset_imports=list(model.opset_import), functions=list(model.functions))
        one.ir_version = model.ir_version
        return ReferenceEvaluator(one)

    def compute(taken: Mapping[str, Array]) -> Sequence[Any]:
        found = dict(zip([name for name in node.output if name], evaluator().run(None, dict(taken)), strict=True))
        return [found.get(name) for name in node.output]

    return compute


def _missing() -> tuple[str, str] | None:
    for package in ("onnx", "torch"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed", "pip install 'cspdeploy[export]'"
    return None


def _open(request: SessionRequest) -> OnnxFp64Session:
    return open_exact(request.path)


def _probe() -> None:
    import onnx

    text = """<ir_version: 8, opset_import: ["": 18]>
        probe (float[1] x) => (float[1] y) { y = Add(x, x) }"""
    model = onnx.parser.parse_model(text)
    found = _operator(model, model.graph.node[0])({"x": np.array([2.0**-60 + 1.0])})
    if found[0][0] != 2.0 + 2.0**-59 or found[0].dtype != np.float64:
        raise RuntimeUnavailableError("onnx adds float64 numbers wrongly", fix="install onnx again")


RUNTIMES = (
    Runtime(
        name="onnx-fp64", device="cpu", formats=frozenset({"onnx"}), precisions=frozenset({"fp32", "fp16", "int8"}),
        timed=False, notes={}, missing=_missing, probe=_probe, open=_open, role="reference",
        modules=("onnx", "torch"),
    ),
)  # fmt: skip
