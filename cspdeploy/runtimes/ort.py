"""ONNX Runtime, on the CPU and on CUDA. Imports neither torch nor onnx."""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cspdeploy.core.errors import CspDeployError, InputError, RuntimeUnavailableError
from cspdeploy.core.onnx_file import check_external_data
from cspdeploy.runtimes.base import Feeds, Outputs, Runtime, SessionRequest

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["RUNTIMES", "OrtSession", "open_cpu_session"]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

# TF32 keeps 10 bits of mantissa and passes as float32; the verdict is on true float32. HEURISTIC chooses the same
# cuDNN algorithm in every session, where EXHAUSTIVE measures and so may not.
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}

_CPU_NOTES = {"fp16": "computed in FP32 on the CPU: says nothing of FP16 arithmetic, see the row of fp16-rounding"}


# y = x + x, opset 13: `float[1] x -> float[1] y`, as the onnx package writes it.
_PROBE_MODEL = bytes.fromhex(
    "080712003a350a0e0a01780a017812017922034164641201675a0f0a0178120a0"
    "a08080112040a020801620f0a0179120a0a08080112040a02080142040a00100d"
)


class OrtSession:
    """A session whose provider has been checked after opening, not before."""

    def __init__(self, model: Path | bytes, *, provider: str, optimise: bool = True) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if not optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        providers: list[Any] = [CPU] if provider == CPU else [(provider, CUDA_OPTIONS), CPU]
        source = model if isinstance(model, bytes) else str(model)
        self._session = onnxruntime.InferenceSession(source, options, providers=providers)
        taken = self._session.get_providers()
        if provider not in taken:
            raise RuntimeUnavailableError(
                f"asked for {provider}, the session runs on {', '.join(taken)}", fix="cspdeploy doctor"
            )
        self._provider = provider
        self.inputs: dict[str, tuple[int | str, ...]] = {
            value.name: tuple(value.shape) for value in self._session.get_inputs()
        }
        self.outputs = [value.name for value in self._session.get_outputs()]
        self.placement = _read_placement(self._session)
        if provider == CUDA and self.placement and not self.placement.get(CUDA):
            raise RuntimeUnavailableError(f"asked for {CUDA}, which took no node", fix="cspdeploy doctor")

    def run(self, feeds: Feeds) -> Outputs:
        """Host arrays in, host arrays out."""
        return dict(zip(self.outputs, self._session.run(None, dict(feeds)), strict=True))

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Inputs and outputs stay where the engine computes; on CUDA copies are not part of the call."""
        import onnxruntime

        device = "cuda" if self._provider == CUDA else "cpu"
        binding = self._session.io_binding()
        for name, array in feeds.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, device)

        def compute() -> None:
            self._session.run_with_iobinding(binding)
            if device != "cpu":
                binding.synchronize_outputs()

        return compute


def _read_placement(session: onnxruntime.InferenceSession) -> dict[str, int]:
    """Nodes on each provider, from the engine's own record (ONNX Runtime 1.23 and later; else empty)."""
    try:
        subgraphs = session.get_provider_graph_assignment_info()
    except (AttributeError, RuntimeError):
        return {}
    counts: Counter[str] = Counter()
    for subgraph in subgraphs:
        counts[subgraph.ep_name] += len(subgraph.get_nodes())
    return dict(sorted(counts.items()))


def _missing(provider: str) -> tuple[str, str] | None:
    if importlib.util.find_spec("onnxruntime") is None:
        extra = "cpu" if provider == CPU else "gpu"
        return "onnxruntime is not installed", f"pip install 'cspdeploy[{extra}]'"
    if provider == CPU:
        return None
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        return (
            f"this onnxruntime has no {provider} (it has {', '.join(onnxruntime.get_available_providers())})",
            "pip uninstall onnxruntime && pip install 'cspdeploy[gpu]'",
        )
    return None


def _open(provider: str, request: SessionRequest) -> OrtSession:
    check_external_data(request.path)
    if provider == CUDA:
        import onnxruntime

        if hasattr(onnxruntime, "preload_dlls"):  # 1.21 and later
            onnxruntime.preload_dlls()  # CUDA and cuDNN from the Python packages, where they are installed
    try:
        return OrtSession(request.path, provider=provider)
    except CspDeployError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"{request.path}: ONNX Runtime cannot open it ({reason})", fix="export it again") from error


def _probe(provider: str) -> None:
    session = OrtSession(_PROBE_MODEL, provider=provider)
    x = np.array([1.5], np.float32)
    if session.run({"x": x})["y"] != x + x:
        raise RuntimeUnavailableError(f"{provider} computes 1.5 + 1.5 wrongly", fix="cspdeploy doctor")


def open_cpu_session(path: Path) -> OrtSession:
    """A session on the CPU.

    Raises:
        InputError: the file cannot be read, or its data lies outside its folder.
    """
    return _open(CPU, SessionRequest(path=path))


RUNTIMES = tuple(
    Runtime(
        name=name, device=device, formats=frozenset({"onnx"}), precisions=frozenset({"fp32", "fp16"}), timed=True,
        notes=_CPU_NOTES if provider == CPU else {}, missing=functools.partial(_missing, provider),
        probe=functools.partial(_probe, provider),
        open=functools.partial(_open, provider),
    )
    for name, device, provider in (("ort-cpu", "cpu", CPU), ("ort-cuda", "cuda", CUDA))
)  # fmt: skip
