"""An ONNX file on an engine, seen from inside: tensors are exposed as outputs, as many at a time as memory allows.

First the shape of every tensor is computed, which keeps no tensor; then as many sessions are opened, one after the
other, as the tensors need at `budget_bytes` each. The engine's optimiser is off, so that every tensor exists.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.check.blame.quantisation import Quantisation, find_quantisation
from cspdeploy.core.errors import CspDeployError, InputError
from cspdeploy.core.onnx_edit import SHAPE_SUFFIX, cut_part, needs, with_outputs, with_shapes
from cspdeploy.core.onnx_graph import Node, module_path, node_module, read_onnx
from cspdeploy.core.trace import Sink, TracedNode, Values
from cspdeploy.runtimes.base import Runtime, Session, SessionRequest
from cspdeploy.runtimes.ort_graph import tensor_types

__all__ = ["DEFAULT_BUDGET_BYTES", "OnnxSource", "traced_node"]

Array = npt.NDArray[Any]
Calls = Sequence[Mapping[str, Array]]

DEFAULT_BUDGET_BYTES = 1 << 29
"""Of tensors that are exposed at once: half a gigabyte beside the session itself."""
_FLOATS = ("float32", "float16", "float64")
_NO_TENSORS = ("Sequence", "SplitToSequence", "ConcatFromSequence", "Optional")


class OnnxSource:
    """A `TraceSource` of an ONNX file on an ONNX runtime.

    Args:
        title: what runs on what, for the reader.
        budget_bytes: of tensors that are kept at once, in one call.
        folder: for edited copies of the file; it must outlive the source.
    """

    def __init__(
        self, path: Path, runtime: Runtime, *, title: str, folder: Path, budget_bytes: int = DEFAULT_BUDGET_BYTES
    ) -> None:
        self.title = title
        self._path, self._runtime, self._folder, self._budget_bytes = path, runtime, folder, budget_bytes
        self.model = read_onnx(path)
        self.graph = self.model.graph
        self._nodes = tuple(traced_node(index, node) for index, node in enumerate(self.graph.nodes))
        self.quantised: Mapping[str, Quantisation] = find_quantisation(self.graph)
        self._types: dict[str, str] = {}
        self._num_bytes: dict[str, int] = {}
        self._seen_as: dict[str, np.dtype[Any]] = {}
        self._num_written = 0

    @property
    def nodes(self) -> Sequence[TracedNode]:
        """In graph order."""
        return self._nodes

    @property
    def outputs(self) -> Sequence[str]:
        """Of the graph."""
        return [value.name for value in self.graph.outputs]

    def trace(self, calls: Calls, sink: Sink, *, wanted: Collection[str] | None = None) -> None:
        """Run every call and give each floating-point tensor, or the wanted ones, to `sink` in graph order.

        Raises:
            InputError: the engine cannot open or run it.
        """
        self._give_weights(sink, wanted)
        if wanted is not None and self.graph.initializers.keys() >= set(wanted):
            return
        if not self._num_bytes:
            self._measure(calls[0])
        constant = self._constant_tensors()
        for name, array in ((name, call[name]) for call in calls for name in call):
            if wanted is None or name in wanted:
                sink(name, array, False)
        names = [name for name in self._num_bytes if wanted is None or name in wanted]
        for chunk in self._chunks(names):
            data = with_outputs(self._path.read_bytes(), [name for name in chunk if name not in self.outputs])
            with self._session(data) as session:
                for index, feeds in enumerate(calls):
                    found = self._run(session, feeds)
                    for name in chunk:
                        if index == 0 or name not in constant:
                            self._seen_as[name] = found[name].dtype
                            sink(name, self._real(name, found[name]), name in constant)

    def replay(self, calls: Calls, given: Values, targets: Sequence[str]) -> dict[str, list[Array]]:
        """The targets, where every consumer of a tensor of `given` takes the values given instead.

        Raises:
            InputError: the engine cannot open or run it.
        """
        dtypes = {name: self._types.get(name) or "float32" for name in given}
        inner = {value.name for value in self.graph.inputs}
        data, taken, outputs = cut_part(self._path.read_bytes(), self.graph, targets=targets, given=dtypes)
        found: dict[str, list[Array]] = {name: [] for name in targets}
        with self._session(data) as session:
            for index, feeds in enumerate(calls):
                parts = {
                    name: self._stored(name, given[name][index], like=feeds.get(name)) if name in given else feeds[name]
                    for name in taken
                    if name in given or name in inner
                }
                results = self._run(session, parts)
                for name in targets:
                    found[name].append(self._real(name, results[outputs[name]]))
        return found

    def final_outputs(self, calls: Calls, *, optimise: bool) -> list[dict[str, Array]]:
        """The outputs of each call by the file as it is.

        Raises:
            InputError: the engine cannot open or run it.
        """
        session = self._open(self._path, optimise=optimise)
        return [self._run(session, feeds) for feeds in calls]

    def _give_weights(self, sink: Sink, wanted: Collection[str] | None) -> None:
        """Floating-point initializers; an 8-bit one comes as what its DequantizeLinear makes of it."""
        for name, tensor in self.graph.initializers.items():
            if tensor.dtype in (*_FLOATS, "bfloat16") and (wanted is None or name in wanted) and tensor.num_values:
                with suppress(InputError):  # sparse: left out
                    sink(name, tensor.array(), True)

    def _measure(self, feeds: Mapping[str, Array]) -> None:
        """Types and sizes of all tensors that nodes make."""
        made = [
            name for node in self.graph.nodes for name in node.outputs
            if name and not node.operator.startswith(_NO_TENSORS)
        ]  # fmt: skip
        data = self._path.read_bytes()
        path = self._write(with_outputs(data, [name for name in made if name not in self.outputs]))
        self._types = tensor_types(path)
        path.unlink()
        traced = [name for name in made if self._types.get(name) in _FLOATS or name in self.quantised]
        with self._session(with_shapes(data, traced)) as session:
            shapes = self._run(session, feeds)
        # 4 bytes a value, whatever its type: engines compute FP16 in FP32 on the CPU, and 8-bit values are widened here
        sizes = {name: 4 * int(np.prod(shapes[f"{name}{SHAPE_SUFFIX}"], dtype=np.int64)) for name in traced}
        self._num_bytes = {name: num_bytes for name, num_bytes in sizes.items() if num_bytes}

    def _chunks(self, names: Sequence[str]) -> Iterator[list[str]]:
        chunk: list[str] = []
        total = 0
        for name in names:
            if chunk and total + self._num_bytes[name] > self._budget_bytes:
                yield chunk
                chunk, total = [], 0
            chunk.append(name)
            total += self._num_bytes[name]
        if chunk:
            yield chunk

    def _constant_tensors(self) -> set[str]:
        """Tensors that follow from weights alone."""
        fixed = set(self.graph.initializers)
        for node in self.graph.nodes:
            if fixed.issuperset(needs(node)) and not node.operator.startswith("Random"):
                fixed.update(node.outputs)
        return fixed

    def _real(self, name: str, values: Array) -> Array:
        quantised = self.quantised.get(name)
        return quantised.real(values) if quantised is not None and values.dtype.kind in "iu" else values

    def _stored(self, name: str, values: Array, *, like: Array | None) -> Array:
        """Values in the type of the tensor, as this runtime takes it."""
        quantised = self.quantised.get(name)
        dtype = self._types.get(name) or (str(like.dtype) if like is not None else "float32")
        if quantised is not None and dtype not in _FLOATS:
            return quantised.stored(values, dtype=dtype)
        with np.errstate(over="ignore"):
            rounded = np.asarray(values).astype(dtype)
        return rounded.astype(self._seen_as.get(name, rounded.dtype))

    @contextmanager
    def _session(self, data: bytes) -> Iterator[Session]:
        path = self._write(data)
        try:
            yield self._open(path, optimise=False)
        finally:
            path.unlink()

    def _write(self, data: bytes) -> Path:
        """An edited copy, beside links to the file's external data."""
        for location in self.model.external_data:
            _link(self._path.parent / location, self._folder / location)
        self._num_written += 1
        path = self._folder / f"edited{self._num_written}.onnx"
        path.write_bytes(data)
        return path

    def _open(self, path: Path, *, optimise: bool) -> Session:
        request = SessionRequest(path=path, outputs=tuple(self.outputs), optimise=optimise)
        with self._said_of_the_file():
            return self._runtime.open(request)

    def _run(self, session: Session, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with self._said_of_the_file():
            return session.run(feeds)

    @contextmanager
    def _said_of_the_file(self) -> Iterator[None]:
        """Errors name the user's file, not the copy, and are of one kind."""
        try:
            yield
        except CspDeployError as error:
            raise InputError(f"{self._path}: {error.message}", fix=error.fix) from error
        except Exception as error:  # engines' exceptions share no base class but this one
            reason = " ".join(str(error).split())[:200]
            fix = "cspdeploy verify, to see on which runtimes it runs"
            raise InputError(f"{self._path}: {self._runtime.name} cannot run it ({reason})", fix=fix) from error


def traced_node(index: int, node: Node) -> TracedNode:
    """A node of a file, as a trace has it. What its subgraphs capture it takes."""
    plain = (int, float, str)
    attributes = {
        name: value for name, value in node.attributes.items()
        if isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(v, plain) for v in value))
    }  # fmt: skip
    return TracedNode(
        index=index, name=node.name or f"{node.operator} {node.index}", operator=node.operator,
        module=node_module(node) or module_path(next(iter(node.outputs), "")), inputs=tuple(needs(node)),
        outputs=tuple(filter(None, node.outputs)), attributes=attributes,
    )  # fmt: skip


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the two lie on different file systems."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
