"""What the PyTorch runtimes share: moving arrays to a device, and knowing when it is done."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.core.types import PlacedNode
from cspdeploy.runtimes.base import Feeds, Outputs, ProfiledNode, SessionRequest

__all__ = ["TorchSession", "missing_torch", "probe_torch"]

UNPROFILED_RUNS = 5
"""TorchScript records types in its first runs and specialises in the next ones, which takes longer than all others."""


class TorchSession:
    """A callable of tensors on a device. Float32 means float32 unless TF32 is asked for.

    TF32 and threads are settings of the whole process, so that sessions that differ in them need one each.

    Args:
        compute: tensors in the order of the inputs to one tensor, or to a tuple of them.
        request: names of the outputs, which PyTorch modules do not carry; TF32, threads, profile.
    """

    def __init__(self, compute: Callable[..., Any], *, device: str, request: SessionRequest) -> None:
        import torch

        if request.cuda_graph:
            raise InputError("CUDA graphs are captured by ONNX Runtime alone", fix="--runtime ort-cuda")
        self.placement: dict[str, int] = {}
        self.nodes: tuple[PlacedNode, ...] = ()
        self._num_runs = 0
        self._compute, self._device, self._outputs = compute, device, request.outputs
        if device == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = request.tf32
            torch.backends.cudnn.allow_tf32 = request.tf32
        if request.num_threads:
            torch.set_num_threads(request.num_threads)
        self._profiler = _make_profiler(device) if request.profile is not None else None

    def run(self, feeds: Feeds) -> Outputs:
        """Host arrays in, host arrays out."""
        import torch

        self._count_run()
        with torch.inference_mode():
            tensors = [torch.from_numpy(array).to(self._device) for array in feeds.values()]
            found = self._compute(*tensors)
            found = (found,) if isinstance(found, torch.Tensor) else found
            return {name: value.cpu().numpy() for name, value in zip(self._outputs, found, strict=True)}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Inputs lie on the device already; the callable waits for it."""
        import torch

        tensors = [torch.from_numpy(array).to(self._device) for array in feeds.values()]

        def compute() -> None:
            self._count_run()
            with torch.inference_mode():
                self._compute(*tensors)
                if self._device == "cuda":
                    torch.cuda.synchronize()

        return compute

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
        field = "self_device_time_total" if self._device == "cuda" else "self_cpu_time_total"
        found = [
            ProfiledNode(
                node=event.key, operator=event.key, provider=self._device, num_calls=event.count / num_runs,
                ms=getattr(event, field) / 1e3 / num_runs,
            )
            for event in profiler.key_averages()
        ]  # fmt: skip
        return tuple(sorted(found, key=lambda node: -node.ms))


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
        if not torch.cuda.is_available():
            if torch.version.cuda is None:
                return "this torch is built without CUDA", "install a CUDA build of torch"
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
