"""OpenVINO on the CPU, which reads ONNX files by itself. Imports neither torch nor onnx.

By default its CPU plugin computes FP32 networks in BF16 or FP16 where the CPU has them, and so it does with whatever
an INT8 file leaves in floating point. A verdict on FP32 needs FP32: it is asked for, and read back.

Two habits of the engine that would pass for results: an input that is not given keeps what its memory held, and an
array of another type is converted. Here both are errors.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from cspdeploy.core.errors import CspDeployError, InputError, RuntimeUnavailableError
from cspdeploy.core.onnx_graph import read_onnx
from cspdeploy.core.types import PlacedNode
from cspdeploy.runtimes.base import Feeds, Outputs, ProfiledNode, Runtime, SessionRequest
from cspdeploy.runtimes.openvino_graph import read_executed

if TYPE_CHECKING:
    import openvino

__all__ = ["RUNTIMES", "OpenVinoSession"]

T = TypeVar("T")

DEVICE, _FLOAT32 = "CPU", "f32"

# ACCURACY also keeps the engine from quantising activations by itself, which it does before weights of 8 or 4 bits.
_SETTINGS = {
    "INFERENCE_PRECISION_HINT": _FLOAT32, "EXECUTION_MODE_HINT": "ACCURACY", "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": 1,
}  # fmt: skip

# Not in the list of properties that the plugin publishes, yet read by it (src/plugins/intel_cpu/src/config.cpp of
# openvinotoolkit/openvino). The first is what computes quantised graphs in integers, the second what joins elementwise
# nodes. Nothing switches off what it folds and fuses beyond that.
_AS_WRITTEN = {"LP_TRANSFORMS_MODE": "NO", "SNIPPETS_MODE": "DISABLE"}

MAX_REASON = 240
"""Characters of the engine's own message that an error shows."""

# The engine tells at length where in its own source it failed; what is wrong stands on the other lines.
_WHERE_IN_SOURCE = re.compile(r"Exception from |Check '.*' failed at |FrontEnd API failed with |While validating node ")

_NOTE = "FP32 as asked for; without INFERENCE_PRECISION_HINT f32 OpenVINO takes BF16 or FP16 where the CPU has it"
_NOTES = {
    "fp32": f"computed in {_NOTE}",
    "fp16": f"says nothing of FP16 arithmetic, see the row of fp16-rounding: computed in {_NOTE}",
    "int8": f"what is not quantised is computed in {_NOTE}",
}

# y = x + x, opset 13: `float[1] x -> float[1] y`, as the onnx package writes it.
_PROBE_MODEL = bytes.fromhex(
    "080712003a350a0e0a01780a017812017922034164641201675a0f0a0178120a0"
    "a08080112040a020801620f0a0179120a0a08080112040a02080142040a00100d"
)


class OpenVinoSession:
    """A session whose device and floating-point precision have been read back from the engine.

    Args:
        path: an ONNX file; external data beside it.
        optimise, num_threads: as in `SessionRequest`; without `optimise` quantised graphs are computed in float32, as
            they are written, and elementwise nodes are not joined.
        profile: keep the time of every node, for `end_profile`.

    Raises:
        InputError: not an ONNX file, or external data outside its folder. What the engine itself cannot read it says
            in a `RuntimeError`.
        RuntimeUnavailableError: it does not run on the CPU, or not in float32.
    """

    def __init__(self, path: Path, *, optimise: bool = True, num_threads: int = 0, profile: bool = False) -> None:
        graph = read_onnx(path).graph  # where it names its external data is checked before the engine follows it
        import openvino

        settings: dict[str, Any] = dict(_SETTINGS) if optimise else _SETTINGS | _AS_WRITTEN
        if num_threads:
            settings["INFERENCE_NUM_THREADS"] = num_threads
        self._compiled = openvino.Core().compile_model(str(path), DEVICE, settings | {"PERF_COUNT": profile})
        _check_taken(self._compiled)
        self._profiled = profile
        self._last: openvino.InferRequest | None = None
        self._dtypes = {value.name: value.dtype for value in graph.inputs}
        self.inputs: dict[str, tuple[int | str, ...]] = {value.name: value.shape or () for value in graph.inputs}
        self.outputs = [value.name for value in graph.outputs]
        # A tensor that the engine has joined with others carries all their names. Unused inputs are left out.
        self._ports = {
            name: port
            for port, value in enumerate(self._compiled.inputs)
            for name in self.inputs
            if name in value.names
        }
        self._request = self._compiled.create_infer_request()
        self._executed = read_executed(self._compiled.get_runtime_model(), graph)
        self.placement = {DEVICE: len(self._executed)}

    @property
    def nodes(self) -> tuple[PlacedNode, ...]:
        """Every node of the graph that the engine runs, without what it computes once and for all at opening."""
        return tuple(PlacedNode(provider=DEVICE, node=node.name, operator=node.operator) for node in self._executed)

    @property
    def num_copies(self) -> int:
        """Copies between devices in one run: the host is the device."""
        return 0

    @property
    def executed_precisions(self) -> dict[str, str]:
        """In what precision each convolution and matrix product of the file is computed.

        Returns:
            "f32", "u8", "i8", ... by the node's name in the file, or by that of its first output where it has none.
            Nodes that the engine does not run, since it folded them, are not in it.
        """
        return {name: node.precision for node in self._executed for name in node.products}

    def run(self, feeds: Feeds) -> Outputs:
        """Host arrays in, host arrays out.

        Raises:
            InputError: an input that is missing, unknown or of another type, or a run that the engine gave up.
        """
        given = self._by_port(feeds)
        self._last = self._request
        found = _told(lambda: self._request.infer(given, share_inputs=True))
        return {name: found[index] for index, name in enumerate(self.outputs)}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """The engine reads the inputs where they lie and keeps the outputs: no copy is part of the call.

        Raises:
            InputError: as `run`.
        """
        import openvino

        request = self._compiled.create_infer_request()
        held = self._by_port(feeds)  # the engine does not keep them alive
        for port, array in held.items():
            _told(functools.partial(request.set_input_tensor, port, openvino.Tensor(array, shared_memory=True)))
        self._last = request

        def compute(_held: dict[int, Any] = held) -> None:
            _told(lambda: request.infer(share_outputs=True))

        return compute

    def end_profile(self) -> tuple[ProfiledNode, ...]:
        """Time of each node on average over the runs up to now, the first among them; the engine counts microseconds.

        Raises:
            InputError: the session was opened without a profile, or has not run.
        """
        if not self._profiled:
            raise InputError("the session was opened without a profile")
        if self._last is None:
            raise InputError("the session has not run", fix="run the session before its profile is read")
        request = self._last
        nodes = {node.engine_name: node for node in self._executed}
        return tuple(
            ProfiledNode(
                node=nodes[info.node_name].name, operator=info.node_type, provider=DEVICE, num_calls=1,
                ms=1e3 * info.real_time.total_seconds(),
            )
            for info in _told(lambda: request.profiling_info)
            if info.node_name in nodes
        )  # fmt: skip

    def _by_port(self, feeds: Feeds) -> dict[int, Any]:
        """Contiguous arrays by the engine's number of the input."""
        if feeds.keys() != self.inputs.keys():
            raise InputError(f"inputs: got {', '.join(feeds) or 'none'}, expected {', '.join(self.inputs)}")
        for name, array in feeds.items():
            if array.dtype.name != self._dtypes[name]:
                raise InputError(f"input {name}: got {array.dtype.name}, expected {self._dtypes[name]}")
        return {port: np.ascontiguousarray(feeds[name]) for name, port in self._ports.items()}


def _check_taken(compiled: openvino.CompiledModel) -> None:
    """What was asked for against what the engine says that it does.

    Raises:
        RuntimeUnavailableError: another device, or another precision than float32.
    """
    devices = list(compiled.get_property("EXECUTION_DEVICES"))
    if devices != [DEVICE]:
        raise RuntimeUnavailableError(
            f"asked for {DEVICE}, the session runs on {', '.join(devices)}", fix="cspdeploy doctor"
        )
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if precision != _FLOAT32:
        raise RuntimeUnavailableError(
            f"asked for {_FLOAT32}, OpenVINO computes in {precision}", fix="pip install --upgrade openvino"
        )


def _told(work: Callable[[], T]) -> T:
    """What the engine gives, or its own words of what is wrong, in one line."""
    try:
        return work()
    except RuntimeError as error:
        raise InputError(f"OpenVINO cannot run it ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and not _WHERE_IN_SOURCE.match(line)]
    told = " ".join(" ".join(lines).split()) or type(error).__name__
    return told if len(told) <= MAX_REASON else f"{told[:MAX_REASON]}..."


def _missing() -> tuple[str, str] | None:
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed", "pip install 'cspdeploy[openvino]'"
    return None


def _open(request: SessionRequest) -> OpenVinoSession:
    if request.cuda_graph:
        raise InputError(f"a CUDA graph was asked for on {DEVICE}", fix="--runtime ort-cuda")
    try:
        return OpenVinoSession(
            request.path, optimise=request.optimise, num_threads=request.num_threads,
            profile=request.profile is not None,
        )  # fmt: skip
    except CspDeployError:
        raise
    except Exception as error:  # OpenVINO's exceptions share no base class but this one
        raise InputError(
            f"{request.path}: OpenVINO cannot open it ({_reason(error)})",
            fix=f"cspdeploy check {request.path} --target openvino",
        ) from error


def _probe() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.onnx"
        path.write_bytes(_PROBE_MODEL)
        x = np.array([1.5], np.float32)
        if OpenVinoSession(path).run({"x": x})["y"] != x + x:
            raise RuntimeUnavailableError("OpenVINO computes 1.5 + 1.5 wrongly", fix="cspdeploy doctor")


RUNTIMES = (
    Runtime(
        name="openvino", device="cpu", formats=frozenset({"onnx"}), precisions=frozenset({"fp32", "fp16", "int8"}),
        timed=True, notes=_NOTES, missing=_missing, probe=_probe, open=_open, modules=("openvino",),
        optional=True,
    ),
)  # fmt: skip
