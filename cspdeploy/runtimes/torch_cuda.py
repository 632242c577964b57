"""Runs of PyTorch on a GPU: timed by its events, replayed as CUDA graphs, and its errors and memory in order."""

from __future__ import annotations

import contextlib
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from cspdeploy.core.errors import DeviceMemoryError, InputError, RuntimeUnavailableError
from cspdeploy.runtimes.base import Feeds, SessionRequest
from cspdeploy.runtimes.cuda_driver import find_driver_problem, open_device
from cspdeploy.runtimes.cuda_errors import error_of_run, told
from cspdeploy.runtimes.device_call import Array, CudaCall, batch_of, kind_of, require_alike
from cspdeploy.runtimes.torch_process import keep_process
from cspdeploy.runtimes.torch_variants import CAPTURING

__all__ = ["TorchGpuCalls", "TorchTimer", "opening"]

WARM_UP_RUNS = 6
"""Before a capture, on a stream of its own as PyTorch's notes on CUDA graphs ask for: one more than TorchScript takes
to record types and specialise, so that nothing is compiled or allocated while it is captured."""


@contextlib.contextmanager
def opening(device: str, request: SessionRequest) -> Iterator[str]:
    """The place to put a network on, "cpu" or "cuda:1"; what goes wrong on a GPU is told as one of ours.

    Raises:
        DeviceMemoryError: no room there; nothing is left allocated.
        InputError: no such GPU.
        RuntimeUnavailableError: no GPU that works.
    """
    if device != "cuda":
        yield device
        return
    index = request.cuda.device
    needs = torch.version.cuda or ""
    problem = find_driver_problem(needs)
    if problem is not None:
        raise RuntimeUnavailableError(f"asked for CUDA: {problem[0]}", fix=problem[1])
    open_device(index)
    try:
        torch.cuda.set_device(index)
        yield f"cuda:{index}"
    except Exception as error:
        found = told(error, doing=f"opening {request.path}", needs=needs, device=index)
        if found is None:
            raise
        # Its frames hold what was put on the device, and `with` holds them.
        traceback.clear_frames(error.__traceback__)
        torch.cuda.empty_cache()
        raise found from None


class TorchTimer:
    """Two events on PyTorch's current stream, as `cspdeploy.runtimes.cuda_driver.Timer`."""

    def __init__(self) -> None:
        self._first = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._last = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Queue the first event."""
        self._first.record()

    def end(self) -> None:
        """Queue the last event."""
        self._last.record()

    def ms(self) -> float:
        """Wait for the last event; milliseconds between both."""
        self._last.synchronize()
        return float(self._first.elapsed_time(self._last))


class TorchGpuCalls:
    """All runs of one session on one GPU.

    Args:
        compute: tensors on the device to one tensor, or to a tuple of them.
        place: host arrays to tensors on the device, in the order of the inputs.
        request: its `cuda_graph` and `path`.
    """

    def __init__(
        self,
        compute: Callable[..., Any],
        *,
        place: Callable[[Feeds], list[Tensor]],
        request: SessionRequest,
        count_run: Callable[[], None],
    ) -> None:
        self._compute: Callable[..., Any] | None = compute
        self._place, self._request, self._count_run = place, request, count_run
        self._closed: DeviceMemoryError | None = None
        self._captured: dict[tuple[object, ...], tuple[Any, list[Tensor], tuple[Tensor, ...]]] = {}
        self._own_inputs = request.cuda.compile in CAPTURING
        self._own: dict[tuple[object, ...], list[Tensor]] = {}
        self._bound: weakref.WeakSet[CudaCall] = weakref.WeakSet()

    def run(self, feeds: Feeds) -> tuple[Tensor, ...]:
        """Outputs on the host; with a CUDA graph by replaying it, of which there is one for each set of shapes.

        Raises:
            DeviceMemoryError: no room; the session is closed, and nothing of it is left on the device.
            InputError: it cannot be captured.
        """
        try:
            return self._run(feeds)
        except Exception as error:  # engines' exceptions share no base class but this one
            self._fail(error, batch=batch_of(feeds))

    def _run(self, feeds: Feeds) -> tuple[Tensor, ...]:
        """Apart from `run`, so that no frame holds a tensor when a failure gives the device's memory back."""
        keep_process(self._request)
        with torch.inference_mode():
            tensors, key = self._place(feeds), kind_of(feeds)
            if not self._request.cuda_graph:
                if self._own_inputs:
                    tensors = _filled(self._place_of(key, tensors), tensors)
                return tuple(value.cpu() for value in _as_tuple(self._alive()(*tensors)))
            if key not in self._captured:
                self._captured[key] = self._capture(tensors)
            graph, own, outputs = self._captured[key]
            _filled(own, tensors)
            graph.replay()
            return tuple(value.cpu() for value in outputs)

    def bind_sets(self, sets: Sequence[Feeds]) -> CudaCall:
        """Runs that take the next of the sets, all of them on the device. Raises as `run`."""
        if not sets:
            raise InputError("no inputs to bind", fix="give at least one set")
        batch = batch_of(sets[0])

        def fail(error: Exception) -> NoReturn:
            self._fail(error, batch=batch)

        try:
            return self._bind(sets, fail)
        except Exception as error:  # as above
            fail(error)

    def _bind(self, sets: Sequence[Feeds], fail: Callable[[Exception], NoReturn]) -> CudaCall:
        """Apart from `bind_sets` as `_run` from `run`."""
        keep_process(self._request)
        fill: Callable[[int], None] | None = None
        read: list[Callable[[], list[Array]]] = []
        with torch.inference_mode():
            placed = [self._place(feeds) for feeds in sets]
            if self._request.cuda_graph:
                require_alike(sets)
                launches, fill, read = self._graph_turns(placed)
            elif self._own_inputs:
                require_alike(sets)
                own = self._place_of(kind_of(sets[0]), placed[0])
                # Also of one set: another call, or a run, may have filled the place since.
                launches, fill = [self._launch(own)], _filler(own, placed)
            else:
                self._alive()
                launches = [self._launch(tensors) for tensors in placed]
        torch.cuda.synchronize()
        call = CudaCall(launches, timer=TorchTimer(), fail=fail, fill=fill, read=read)
        self._bound.add(call)
        return call

    def _place_of(self, key: tuple[object, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Inputs at an address that stays, for compiled code that captures CUDA graphs by itself.

        It copies every input of another address into its graph, in the call and so inside of what is timed; of one
        that is marked it takes the address.
        """
        if key not in self._own:
            own = [tensor.clone() for tensor in tensors]
            for tensor in own:
                torch._dynamo.mark_static_address(tensor)
            self._own[key] = own
        return self._own[key]

    def _launch(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        def launch() -> None:
            keep_process(self._request)
            self._count_run()
            with torch.inference_mode():
                self._alive()(*tensors)

        return launch

    def _graph_turns(
        self, placed: Sequence[Sequence[Tensor]]
    ) -> tuple[list[Callable[[], None]], Callable[[int], None] | None, list[Callable[[], list[Array]]]]:
        """The captured run, what copies the next set to its place, and what reads its outputs."""
        graph, own, outputs = self._capture([tensor.clone() for tensor in placed[0]])

        def launch() -> None:
            self._count_run()
            graph.replay()

        def read() -> list[Array]:
            return [value.cpu().numpy() for value in outputs]

        self._captured["bound", len(self._captured)] = graph, own, outputs  # the graph writes there as long as it lives
        return [launch], _filler(own, placed) if len(placed) > 1 else None, [read]

    def _capture(self, own: list[Tensor]) -> tuple[Any, list[Tensor], tuple[Tensor, ...]]:
        compute = self._alive()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                compute(*own)
        torch.cuda.current_stream().wait_stream(side)
        graph: Any = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                outputs = _as_tuple(compute(*own))
        except RuntimeError as error:
            if "captur" not in str(error):
                raise
            reason = str(error).splitlines()[0][:200]
            raise InputError(
                f"{self._request.path}: cannot be captured as a CUDA graph: {reason}", fix="run it without a CUDA graph"
            ) from error
        return graph, own, outputs

    def _alive(self) -> Callable[..., Any]:
        if self._compute is None:
            error = self._closed or DeviceMemoryError("out of GPU memory")
            raise DeviceMemoryError(f"{error.message}; the session was closed", fix=error.fix)
        return self._compute

    def _fail(self, error: Exception, *, batch: int | None) -> NoReturn:
        found = error_of_run(
            error, doing=f"running {self._request.path.name}", batch=batch, needs=torch.version.cuda or "",
            device=self._request.cuda.device,
        )  # fmt: skip
        if found is error:
            raise error
        if isinstance(found, DeviceMemoryError):
            self._closed, self._compute = found, None
            for call in tuple(self._bound):
                call.drop(found)
            self._captured.clear()
            self._own.clear()
            error.__traceback__ = None  # its frames hold tensors
            torch.cuda.empty_cache()
        raise found from None


def _filled(own: list[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies to where a graph reads."""
    for target, tensor in zip(own, tensors, strict=True):
        target.copy_(tensor)
    return own


def _filler(own: list[Tensor], placed: Sequence[Sequence[Tensor]]) -> Callable[[int], None]:
    """Queues the copies of the next set, by the number of the run."""

    def fill(turn: int) -> None:
        with torch.inference_mode():
            _filled(own, placed[turn % len(placed)])

    return fill


def _as_tuple(found: Any) -> tuple[Tensor, ...]:
    if isinstance(found, Tensor):
        return (found,)
    return tuple(found.values()) if isinstance(found, Mapping) else tuple(found)
