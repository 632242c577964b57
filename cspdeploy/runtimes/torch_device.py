"""What the PyTorch runtimes share: moving arrays to a device, and knowing when it is done."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.core.types import PlacedNode
from cspdeploy.runtimes.base import DeviceCall, Feeds, Outputs, ProfiledNode, SessionRequest
from cspdeploy.runtimes.cuda_driver import find_driver_problem

if TYPE_CHECKING:
    from torch import Tensor

    from cspdeploy.runtimes.torch_cuda import TorchGpuCalls

__all__ = ["TorchSession", "missing_torch", "operator_nodes", "probe_torch"]

_IMAGE_RANK = 4
UNPROFILED_RUNS = 5
"""TorchScript records types in its first runs and specialises in the next ones, which takes longer than all others."""


class TorchSession:
    """A callable of tensors on a device. Float32 means float32 unless TF32 is asked for.

    TF32, cuDNN's search and threads are settings of the whole process, so that sessions that differ in them need one
    each. On a GPU a session that runs out of memory is closed with all that it holds there: later calls say so.

    Args:
        compute: tensors in the order of the inputs to one tensor, or to a tuple of them.
        request: names of the outputs, which PyTorch modules do not carry; TF32, threads, profile; how inputs are laid
            out and in which type (`cuda`).

    Raises:
        InputError: a CUDA graph on the CPU.
    """

    def __init__(self, compute: Callable[..., Any], *, device: str, request: SessionRequest) -> None:
        import torch

        if request.cuda_graph and device != "cuda":
            raise InputError(f"a CUDA graph was asked for on {device}", fix="--runtime torch-cuda")
        self.placement: dict[str, int] = {}
        self.nodes: tuple[PlacedNode, ...] = ()
        self.settings: dict[str, str] = {}
        self._num_runs = 0
        self._outputs, self._options = request.outputs, request.cuda
        self._device = f"cuda:{request.cuda.device}" if device == "cuda" else device
        self._calls: TorchGpuCalls | None = None
        if device == "cuda":
            self._calls = self._on_gpu(compute, request)
        else:
            self._compute = compute
        self.settings |= _variant_settings(request)
        if request.num_threads:
            torch.set_num_threads(request.num_threads)
        self._profiler = _make_profiler(device) if request.profile is not None else None

    def _on_gpu(self, compute: Callable[..., Any], request: SessionRequest) -> TorchGpuCalls:
        from cspdeploy.runtimes.torch_cuda import TorchGpuCalls
        from cspdeploy.runtimes.torch_process import set_process, settings_of

        set_process(request)
        self.settings = settings_of(request)
        return TorchGpuCalls(compute, place=self._placed, request=request, count_run=self._count_run)

    def run(self, feeds: Feeds) -> Outputs:
        """Host arrays in, host arrays out. With a CUDA graph: by replaying it.

        Raises:
            DeviceMemoryError: no room on the GPU.
        """
        import torch

        self._count_run()
        found: Any
        if self._calls is not None:
            found = self._calls.run(feeds)
        else:
            with torch.inference_mode():
                found = self._compute(*self._placed(feeds))
        found = (found,) if isinstance(found, torch.Tensor) else found
        return {name: value.numpy() for name, value in zip(self._outputs, found, strict=True)}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Inputs lie on the device already; on CUDA a `DeviceCall`, which waits for it. Raises as `run`."""
        import torch

        if self._calls is not None:
            return self._calls.bind_sets([feeds])
        tensors = self._placed(feeds)

        def compute() -> None:
            self._count_run()
            with torch.inference_mode():
                self._compute(*tensors)

        return compute

    def bind_sets(self, sets: Sequence[Feeds]) -> DeviceCall:
        """As `bind` on CUDA, but each run takes the next of several inputs. Raises as `run`.

        Raises:
            InputError: the session is on the CPU, or no set was given.
        """
        if self._calls is None:
            raise InputError(f"inputs in turn are bound on a GPU, this session is on {self._device}")
        return self._calls.bind_sets(sets)

    def _placed(self, feeds: Feeds) -> list[Tensor]:
        """Tensors on the device, in the order of the inputs, as the network takes them."""
        import torch

        tensors = [torch.from_numpy(array).to(self._device) for array in feeds.values()]
        if self._options.half:
            tensors = [tensor.half() if tensor.is_floating_point() else tensor for tensor in tensors]
        if self._options.channels_last:
            tensors = [
                tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == _IMAGE_RANK else tensor
                for tensor in tensors
            ]  # fmt: skip
        return tensors

    def _count_run(self) -> None:
        self._num_runs += 1
        if self._profiler is not None and self._num_runs == UNPROFILED_RUNS + 1:
            self._profiler.start()

    def end_profile(self) -> tuple[ProfiledNode, ...]:
        """Time of each operator, the longest first; there is no profile after that.

        Raises:
            InputError: the session was opened without a profile, or has run too little.
        """
        num_runs = self._num_runs - UNPROFILED_RUNS
        if self._profiler is None or num_runs < 1:
            raise InputError(
                "no profile: it was opened without one" if self._profiler is None else
                f"no profile: {self._num_runs} runs, expected more than {UNPROFILED_RUNS}"
            )  # fmt: skip
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        return operator_nodes(profiler.key_averages(), device=self._device.partition(":")[0], num_runs=num_runs)


def operator_nodes(events: Iterable[Any], *, device: str, num_runs: int) -> tuple[ProfiledNode, ...]:
    """Operators of one run by PyTorch's profiler, the longest first.

    On a GPU an operator's time of its own is that of the kernels that it launched, and each kernel is an entry too: so
    one of both is counted. Where no operator launches any, as when a captured graph is replayed, it is the kernels.
    """
    found = list(events)
    field = "self_cpu_time_total"
    if device == "cuda":
        field = "self_device_time_total"
        timed = [event for event in found if event.self_device_time_total > 0]
        operators = [event for event in timed if event.device_type.name == "CPU"]
        found = operators or timed
    nodes = [
        ProfiledNode(
            node=event.key, operator=event.key, provider=device, num_calls=event.count / num_runs,
            ms=getattr(event, field) / 1e3 / num_runs,
        )
        for event in found
    ]  # fmt: skip
    return tuple(sorted(nodes, key=lambda node: -node.ms))


def _variant_settings(request: SessionRequest) -> dict[str, str]:
    """What differs from the network as it is; empty where nothing does."""
    cuda = request.cuda
    found = {
        "memory_format": "channels_last" if cuda.channels_last else "", "dtype": "float16" if cuda.half else "",
        "compile": cuda.compile,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value}


def _make_profiler(device: str) -> Any:
    import torch

    kinds = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if device == "cuda" else [])])


def missing_torch(device: str) -> tuple[str, str] | None:
    """Why PyTorch cannot be used on `device` here, with the fix, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed", "pip install 'cspdeploy[export]'"
    if device == "cuda":
        try:
            import torch
        except (ImportError, OSError) as error:
            return f"torch cannot be imported ({str(error)[:120]})", "install torch again"
        if torch.version.cuda is None:
            return "this torch is built without CUDA", "pip uninstall -y torch && pip install torch"
        problem = find_driver_problem(torch.version.cuda)
        if problem is not None:
            return problem
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch about the driver, which the answer is of
            if not torch.cuda.is_available():
                return f"torch is built for CUDA {torch.version.cuda} and finds no device", "nvidia-smi"
    return None


def probe_torch(device: str) -> None:
    """Compute a small convolution on `device`.

    Raises:
        RuntimeUnavailableError: the result is wrong.
    """
    import torch

    ones = torch.ones(1, 1, 3, 3, device=device)
    if int(torch.nn.functional.conv2d(ones, ones)) != 9:
        raise RuntimeUnavailableError(f"torch on {device} adds nine ones wrongly", fix="install torch again")
