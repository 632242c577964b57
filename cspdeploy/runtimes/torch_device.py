"""What the PyTorch runtimes share: moving arrays to a device, and knowing when it is done."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from cspdeploy.core.errors import RuntimeUnavailableError
from cspdeploy.runtimes.base import Feeds, Outputs

__all__ = ["TorchSession", "missing_torch", "probe_torch"]


class TorchSession:
    """A callable of tensors on a device. Float32 means float32: TF32 is off.

    Args:
        compute: tensors in the order of the inputs to one tensor, or to a tuple of them.
        outputs: names of the outputs, which PyTorch modules do not carry.
    """

    def __init__(self, compute: Callable[..., Any], *, device: str, outputs: tuple[str, ...]) -> None:
        import torch

        self.placement: dict[str, int] = {}
        self._compute, self._device, self._outputs = compute, device, outputs
        if device == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False

    def run(self, feeds: Feeds) -> Outputs:
        """Host arrays in, host arrays out."""
        import torch

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
            with torch.inference_mode():
                self._compute(*tensors)
                if self._device == "cuda":
                    torch.cuda.synchronize()

        return compute


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
