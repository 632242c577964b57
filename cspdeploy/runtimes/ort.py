"""ONNX Runtime, on the CPU and on CUDA. Imports neither torch nor onnx."""

from __future__ import annotations

import functools
import importlib.util
import platform
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cspdeploy.core.errors import CspDeployError, InputError, RuntimeUnavailableError
from cspdeploy.core.types import PlacedNode
from cspdeploy.runtimes.base import Feeds, Outputs, ProfiledNode, Runtime, SessionRequest
from cspdeploy.runtimes.ort_open import refusal, require_openable, session_options

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["RUNTIMES", "OrtSession", "find_copies", "open_cpu_session"]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

# TF32 keeps 10 bits of mantissa and passes as float32; the verdict is on true float32. HEURISTIC chooses the same
# cuDNN algorithm in every session, where EXHAUSTIVE measures and so may not.
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}

_DTYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(bool)": np.bool_,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8,
}  # fmt: skip

_CPU_NOTES = {"fp16": "computed in FP32 on the CPU: says nothing of FP16 arithmetic, see the row of fp16-rounding"}
_HALF_MACHINES = ("aarch64", "arm64")
"""Where ONNX Runtime has FP16 kernels of its own: under emulation an FP16 network is 2.5 times as far from FP64 as on
x86, where it is computed in float32."""


# y = x + x, opset 13: `float[1] x -> float[1] y`, as the onnx package writes it.
_PROBE_MODEL = bytes.fromhex(
    "080712003a350a0e0a01780a017812017922034164641201675a0f0a0178120a0"
    "a08080112040a020801620f0a0179120a0a08080112040a02080142040a00100d"
)


class OrtSession:
    """A session whose provider has been checked after opening, not before.

    Args:
        model: a file, or a model in memory.
        optimise, tf32, num_threads, profile, cuda_graph: as in `SessionRequest`.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        provider: str,
        optimise: bool = True,
        tf32: bool = False,
        num_threads: int = 0,
        profile: Path | None = None,
        cuda_graph: bool = False,
    ) -> None:
        import onnxruntime

        if cuda_graph and provider != CUDA:
            raise InputError(f"a CUDA graph was asked for on {provider}", fix="--runtime ort-cuda")
        options = session_options(optimise=optimise, num_threads=num_threads, profile=profile)
        cuda = CUDA_OPTIONS | {"use_tf32": str(int(tf32)), "enable_cuda_graph": str(int(cuda_graph))}
        self._providers: list[Any] = [CPU] if provider == CPU else [(provider, cuda), CPU]
        self._source = model if isinstance(model, bytes) else str(model)
        self._session = onnxruntime.InferenceSession(self._source, options, providers=self._providers)
        taken = self._session.get_providers()
        if provider not in taken:
            raise RuntimeUnavailableError(
                f"asked for {provider}, the session runs on {', '.join(taken)}", fix="cspdeploy doctor"
            )
        self._provider, self._optimise, self._cuda_graph = provider, optimise, cuda_graph
        self.inputs: dict[str, tuple[int | str, ...]] = {
            value.name: tuple(value.shape) for value in self._session.get_inputs()
        }
        self.outputs = [value.name for value in self._session.get_outputs()]
        if provider == CUDA and self.placement and not self.placement.get(CUDA):
            raise RuntimeUnavailableError(f"asked for {CUDA}, which took no node", fix="cspdeploy doctor")

    @property
    def provider(self) -> str:
        """The one that was asked for, and that the session has."""
        return self._provider

    @functools.cached_property
    def _assigned(self) -> tuple[PlacedNode, ...]:
        return _read_assignment(self._session)

    @functools.cached_property
    def placement(self) -> dict[str, int]:
        """Nodes on each provider; empty where the engine does not tell."""
        return dict(sorted(Counter(node.provider for node in self._assigned).items()))

    @property
    def nodes(self) -> tuple[PlacedNode, ...]:
        """Every node with its provider, then the copies between devices, where the engine tells of them."""
        return self._assigned + (self._copies or ())

    @property
    def num_copies(self) -> int | None:
        """Copies between devices in one run; None where the engine does not tell."""
        return None if self._copies is None else len(self._copies)

    @functools.cached_property
    def _copies(self) -> tuple[PlacedNode, ...] | None:
        """They are inserted after the assignment that the engine records, so they are read from its finished graph."""
        if self._provider == CPU:
            return ()
        try:
            with tempfile.TemporaryDirectory() as folder:
                return self._read_copies(Path(folder) / "optimised.onnx")
        except Exception:  # nothing may be written, no memory for a second session, ...: not known
            return None

    def _read_copies(self, path: Path) -> tuple[PlacedNode, ...]:
        import onnxruntime

        options = session_options(optimise=self._optimise)
        options.optimized_model_filepath = str(path)
        # Weights beside it, so that a model of any size can be written.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
        onnxruntime.InferenceSession(self._source, options, providers=self._providers)
        return find_copies(path, provider=self._provider)

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
        # A captured graph writes to the addresses of its capture; otherwise the engine may choose them in each run.
        shapes = self.output_shapes(feeds) if self._cuda_graph else {}
        for value in self._session.get_outputs():
            if value.name in shapes:
                place = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                    shapes[value.name], _DTYPES[value.type], device, 0
                )
                binding.bind_ortvalue_output(value.name, place)
            else:
                binding.bind_output(value.name, device)

        def compute() -> None:
            self._session.run_with_iobinding(binding)
            if device != "cpu":
                binding.synchronize_outputs()

        return compute

    def output_shapes(self, feeds: Feeds) -> dict[str, tuple[int, ...]]:
        """Shape of each output for these inputs, from the dimensions' names, without a run.

        Raises:
            InputError: a dimension that no input gives.
        """
        sizes: dict[int | str, int] = {}
        for name, declared in self.inputs.items():
            sizes |= dict(zip(declared, feeds[name].shape, strict=True))
        found: dict[str, tuple[int, ...]] = {}
        for value in self._session.get_outputs():
            shape = tuple(size if isinstance(size, int) else sizes.get(size, 0) for size in value.shape)
            if 0 in shape or value.type not in _DTYPES:
                raise InputError(
                    f"output {value.name}: {value.type} {value.shape}, expected a tensor of a shape that is known",
                    fix="export it with a fixed batch",
                )
            found[value.name] = shape
        return found

    def end_profile(self) -> tuple[ProfiledNode, ...]:
        """Time of each node in the runs up to now; there is no profile after that.

        Raises:
            InputError: the session was opened without a profile, or has not run.
        """
        from cspdeploy.runtimes.ort_profile import read_profile

        name = self._session.end_profiling()
        if not name:
            raise InputError("the session was opened without a profile")
        path = Path(name)
        try:
            return read_profile(path)
        finally:
            path.unlink(missing_ok=True)


def _read_assignment(session: onnxruntime.InferenceSession) -> tuple[PlacedNode, ...]:
    """Nodes with their providers, from the engine's own record (ONNX Runtime 1.23 and later; else empty)."""
    try:
        subgraphs = session.get_provider_graph_assignment_info()
    except (AttributeError, RuntimeError):
        return ()
    return tuple(
        PlacedNode(provider=subgraph.ep_name, node=node.name, operator=node.op_type)
        for subgraph in subgraphs
        for node in subgraph.get_nodes()
    )


def find_copies(path: Path, *, provider: str) -> tuple[PlacedNode, ...]:
    """The copies to and from the host in a graph that the engine has written after placing it on `provider`.

    Raises:
        InputError: not an ONNX file.
    """
    from cspdeploy.core.onnx_graph import read_onnx, walk_nodes

    return tuple(
        PlacedNode(provider=provider, node=node.name, operator=node.operator)
        for node in walk_nodes(read_onnx(path).graph)
        if node.operator in ("MemcpyFromHost", "MemcpyToHost")
    )


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
    require_openable(request)
    if provider == CUDA:
        import onnxruntime

        if hasattr(onnxruntime, "preload_dlls"):  # 1.21 and later
            onnxruntime.preload_dlls()  # CUDA and cuDNN from the Python packages, where they are installed
    model = request.path if request.data is None else request.data
    try:
        return OrtSession(
            model, provider=provider, optimise=request.optimise, tf32=request.tf32,
            num_threads=request.num_threads, profile=request.profile, cuda_graph=request.cuda_graph,
        )  # fmt: skip
    except CspDeployError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
        raise refusal(error, request) from error


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
        name=name, device=device, formats=frozenset({"onnx", "ort"}), precisions=frozenset({"fp32", "fp16", "int8"}),
        timed=True,
        notes=_CPU_NOTES if provider == CPU and platform.machine() not in _HALF_MACHINES else {},
        missing=functools.partial(_missing, provider),
        probe=functools.partial(_probe, provider),
        open=functools.partial(_open, provider), modules=("onnxruntime",), takes_bytes=True, concurrent=True,
    )
    for name, device, provider in (("ort-cpu", "cpu", CPU), ("ort-cuda", "cuda", CUDA))
)  # fmt: skip
