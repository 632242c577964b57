"""Runs of an ONNX Runtime session on a GPU: bound there, timed by events on its stream, replayed as CUDA graphs."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import DeviceMemoryError, InputError
from cspdeploy.runtimes.base import Feeds
from cspdeploy.runtimes.cuda_driver import Timer, compute_stream, copy_on_device
from cspdeploy.runtimes.device_call import CudaCall, batch_of, kind_of, require_alike
from cspdeploy.runtimes.ort_providers import CUDA

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["CAPTURE_RUNS", "GpuBinding", "GpuCalls", "Owner", "output_places", "replay_is_queued"]

Array = npt.NDArray[np.generic]
Places = dict[str, tuple[tuple[int, ...], Any]]

CAPTURE_RUNS = 2
"""Before a captured graph is timed: ONNX Runtime allocates in a first run, captures in the next, and replays after."""
_QUEUES_REPLAYS = (1, 27)
"""The first release whose replay does not wait for the device where a run is asked not to (microsoft/onnxruntime#28686,
merged in May 2026): by its date, not by a run of each release. Others wait before the last event is queued."""

_DTYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(bool)": np.bool_,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8,
}  # fmt: skip


class Owner(Protocol):
    """The session that the runs are of."""

    engine: Any
    inputs: dict[str, tuple[int | str, ...]]

    def fail(self, error: Exception, *, batch: int | None) -> NoReturn:
        """As `OrtSession.fail`."""
        ...


class GpuCalls:
    """All runs of one session on one GPU. They share a stream, so that events on it are around them.

    Args:
        owner: gives the engine's session once it is open.
        device: index of the GPU.
        cuda_graph: the engine was opened to capture its runs.
        provider: that it was opened on.

    Raises:
        DeviceMemoryError, InputError, RuntimeUnavailableError: as `compute_stream`.
    """

    def __init__(self, owner: Owner, *, device: int, cuda_graph: bool, provider: str = CUDA) -> None:
        self.stream = compute_stream(device)
        self._owner, self._device, self._cuda_graph = owner, device, cuda_graph
        self._num_graphs = 0
        self._captured: dict[tuple[object, ...], GpuBinding] = {}
        self._bound: weakref.WeakSet[CudaCall] = weakref.WeakSet()
        self._clocked = not cuda_graph or replay_is_queued(provider)

    def run(self, feeds: Feeds) -> list[Array]:
        """Host arrays in, host arrays out. Raises as `OrtSession.run`.

        Under a CUDA graph a plain run would replay what was captured of other addresses, and never see its inputs: the
        arrays are brought to those of the graph instead, of which there is one for each combination of shapes.
        """
        try:
            return self._run(feeds)
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
            self._owner.fail(error, batch=batch_of(feeds))

    def _run(self, feeds: Feeds) -> list[Array]:
        """Apart from `run`, so that no frame holds a binding when a failure gives the device's memory back."""
        if not self._cuda_graph:
            return list(self._owner.engine.run(None, dict(feeds)))
        key = kind_of(feeds)
        if key not in self._captured:
            self._captured[key] = self._capture(feeds)
        binding = self._captured[key]
        for name, value in binding.inputs.items():
            value.update_inplace(np.ascontiguousarray(feeds[name]))
        self.stream.device.synchronize()  # those copies are on another stream
        binding.launch()
        self.stream.synchronize()
        return binding.outputs()

    def bind_sets(self, sets: Sequence[Feeds]) -> CudaCall:
        """Runs that take the next of the sets, all of them on the device. Raises as `OrtSession.bind`."""
        if not sets:
            raise InputError("no inputs to bind", fix="give at least one set")
        batch = batch_of(sets[0])

        def fail(error: Exception) -> NoReturn:
            self._owner.fail(error, batch=batch)

        try:
            return self._bind(sets, fail)
        except Exception as error:  # as above
            fail(error)

    def _bind(self, sets: Sequence[Feeds], fail: Callable[[Exception], NoReturn]) -> CudaCall:
        """Apart from `bind_sets` as `_run` from `run`."""
        timer = Timer(self.stream)
        fill: Callable[[int], None] | None = None
        if self._cuda_graph:
            bindings, fill = self._graph_turns(sets)
        else:
            bindings = [GpuBinding(self._owner.engine, feeds, device=self._device) for feeds in sets]
        self.stream.device.synchronize()
        call = CudaCall(
            [binding.launch for binding in bindings], timer=timer, fail=fail, fill=fill,
            read=[binding.outputs for binding in bindings], clocked=self._clocked,
        )  # fmt: skip
        self._bound.add(call)
        return call

    def forget(self, error: DeviceMemoryError) -> None:
        """Give back what captured graphs and bound inputs hold; bound calls raise `error` from then on."""
        self._captured.clear()
        for call in tuple(self._bound):
            call.drop(error)

    def _capture(self, feeds: Feeds) -> GpuBinding:
        self._num_graphs += 1
        binding = GpuBinding(
            self._owner.engine, feeds, device=self._device, graph=self._num_graphs,
            outputs=output_places(self._owner.engine, self._owner.inputs, feeds),
        )  # fmt: skip
        self.stream.device.synchronize()
        for _ in range(CAPTURE_RUNS):
            binding.launch()
            self.stream.synchronize()
        return binding

    def _graph_turns(self, sets: Sequence[Feeds]) -> tuple[list[GpuBinding], Callable[[int], None] | None]:
        """The binding of the captured run, and what copies the next set to its address on the device."""
        require_alike(sets)
        binding = self._capture(sets[0])
        if len(sets) == 1:
            return [binding], None
        waiting = [{name: _on_device(array, self._device) for name, array in feeds.items()} for feeds in sets]
        num_bytes = {name: array.nbytes for name, array in sets[0].items()}

        def fill(turn: int) -> None:
            for name, value in waiting[turn % len(waiting)].items():
                place = binding.inputs[name].data_ptr()
                copy_on_device(place, value.data_ptr(), num_bytes=num_bytes[name], stream=self.stream)

        return [binding], fill


class GpuBinding:
    """Inputs and outputs of a run, all of them on the device.

    Args:
        outputs: shape and numpy type of those that lie at an address of their own, as a captured graph needs it; the
            engine chooses where the others lie.
        graph: number of the captured graph that these addresses belong to; 0 where none is captured.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        feeds: Feeds,
        *,
        device: int,
        outputs: Mapping[str, tuple[tuple[int, ...], Any]] | None = None,
        graph: int = 0,
    ) -> None:
        import onnxruntime

        outputs = outputs or {}
        self._session = session
        self._binding = session.io_binding()
        self.inputs = {name: _on_device(array, device) for name, array in feeds.items()}
        for name, value in self.inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for value in session.get_outputs():
            if value.name in outputs:
                shape, dtype = outputs[value.name]
                place = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", device)
                self._binding.bind_ortvalue_output(value.name, place)
            else:
                self._binding.bind_output(value.name, "cuda", device)
        self._options = onnxruntime.RunOptions()
        # We wait for an event on the stream; the engine's own wait would come before it and so be in what is timed.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if graph:
            self._options.add_run_config_entry("gpu_graph_id", str(graph))

    def launch(self) -> None:
        """Queue one run on the session's stream."""
        self._session.run_with_iobinding(self._binding, self._options)

    def outputs(self) -> list[Array]:
        """Of the last run, on the host."""
        return list(self._binding.copy_outputs_to_cpu())


def replay_is_queued(provider: str, version: str = "") -> bool:
    """Whether an event after a captured run is queued behind it, and not after the engine's own wait for its end.

    TensorRT's provider always waits. Args: `version` of ONNX Runtime; empty: the one that is here.
    """
    if not version:
        import onnxruntime

        version = onnxruntime.__version__
    found = re.match(r"(\d+)\.(\d+)", version)
    return provider == CUDA and found is not None and (int(found[1]), int(found[2])) >= _QUEUES_REPLAYS


def _on_device(array: Array, device: int) -> onnxruntime.OrtValue:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cuda", device)


def output_places(
    engine: onnxruntime.InferenceSession, inputs: Mapping[str, Sequence[int | str]], feeds: Feeds
) -> Places:
    """Shape and numpy type of each output for these inputs, from the dimensions' names, without a run.

    Args:
        inputs: their shapes as the model declares them.

    Raises:
        InputError: a dimension that no input gives.
    """
    sizes: dict[int | str | None, int] = {}
    for name, declared in inputs.items():
        sizes |= dict(zip(declared, feeds[name].shape, strict=True))
    sizes.pop(None, None)  # dimensions without a name, which need not be of one size
    found: Places = {}
    for value in engine.get_outputs():
        shape = tuple(size if isinstance(size, int) else sizes.get(size, 0) for size in value.shape)
        if 0 in shape or value.type not in _DTYPES:
            raise InputError(
                f"output {value.name}: {value.type} {value.shape}, expected a tensor of a shape that is known before "
                "the run: a CUDA graph writes to a place of its own",
                fix="export it with a fixed batch, or run it without a CUDA graph",
            )
        found[value.name] = shape, _DTYPES[value.type]
    return found
