"""ONNX Runtime, on the CPU and on CUDA. Imports neither torch nor onnx.

What is of a GPU is imported where one is asked for: a device without pays for none of it when it starts.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from cspdeploy.core.errors import CspDeployError, DeviceMemoryError, InputError, RuntimeUnavailableError
from cspdeploy.core.types import PlacedNode
from cspdeploy.runtimes.base import CudaOptions, DeviceCall, Feeds, Outputs, ProfiledNode, Runtime, SessionRequest
from cspdeploy.runtimes.ort_open import CPU, CUDA, ON_GPU, Closed, refusal, require_openable, session_options

if TYPE_CHECKING:
    from cspdeploy.runtimes.ort_gpu_calls import GpuCalls
    from cspdeploy.runtimes.ort_providers import TensorrtFile

__all__ = ["CPU", "CUDA", "RUNTIMES", "OrtSession", "open_cpu_session", "open_on", "probe_provider"]

_AS_USUAL = CudaOptions()
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

    On a GPU one that runs out of memory is closed with all that it holds there: later calls say so.

    Args:
        model: a file, or a model in memory.
        optimise, tf32, num_threads, profile, cuda_graph, cuda: as in `SessionRequest`.
        file: for TensorRT, what the file holds.
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
        cuda: CudaOptions = _AS_USUAL,
        file: TensorrtFile | None = None,
    ) -> None:
        import onnxruntime

        self._source = model if isinstance(model, bytes) else str(model)
        self._title = "the model" if isinstance(model, bytes) else model.name
        self._providers: list[Any] = [CPU]
        self._calls: GpuCalls | None = None
        self.settings: dict[str, str] = {}
        options = session_options(optimise=optimise, num_threads=num_threads, profile=profile)
        if provider == CPU and not cuda_graph:
            self.engine: Any = onnxruntime.InferenceSession(self._source, options, providers=self._providers)
        else:
            from cspdeploy.runtimes.ort_gpu_open import open_engine

            self.engine, self._providers, self.settings, self._calls = open_engine(
                self, self._source, options, provider=provider, cuda=cuda, tf32=tf32, cuda_graph=cuda_graph, file=file
            )
        self._provider, self._optimise = provider, optimise
        self.inputs: dict[str, tuple[int | str, ...]] = {
            value.name: tuple(value.shape) for value in self.engine.get_inputs()
        }
        self.outputs = [value.name for value in self.engine.get_outputs()]
        self._require_node()

    def _require_node(self) -> None:
        """Refuse a session on a GPU that computes nothing there."""
        if self._provider in ON_GPU and self.placement and not any(self.placement.get(name) for name in ON_GPU):
            operators = ", ".join(sorted({node.operator for node in self._assigned})[:5])
            raise RuntimeUnavailableError(
                f"asked for {self._provider}, which took no node: it has no kernel for any of {operators}",
                fix="--runtime ort-cpu",
            )

    @property
    def provider(self) -> str:
        """The one that was asked for, and that the session has."""
        return self._provider

    @functools.cached_property
    def _assigned(self) -> tuple[PlacedNode, ...]:
        from cspdeploy.runtimes.ort_placement import read_assignment

        return read_assignment(self.engine)

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
        if self._provider == CPU:
            return ()
        from cspdeploy.runtimes.ort_placement import read_copies

        return read_copies(
            self._source, providers=self._providers, provider=self._provider, optimise=self._optimise
        )  # fmt: skip

    def run(self, feeds: Feeds) -> Outputs:
        """Host arrays in, host arrays out. With a CUDA graph: by replaying it.

        Raises:
            DeviceMemoryError: no room on the GPU.
        """
        if self._calls is None:
            return dict(zip(self.outputs, self.engine.run(None, dict(feeds)), strict=True))
        return dict(zip(self.outputs, self._calls.run(feeds), strict=True))

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Inputs and outputs stay where the engine computes. On CUDA a `DeviceCall`: copies are not part of the call.

        Raises:
            DeviceMemoryError: no room on the GPU.
            InputError: under a CUDA graph, an output whose shape is not known before a run.
        """
        if self._calls is not None:
            return self._calls.bind_sets([feeds])
        import onnxruntime

        binding = self.engine.io_binding()
        for name, array in feeds.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cpu", 0)
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        return functools.partial(self.engine.run_with_iobinding, binding)

    def bind_sets(self, sets: Sequence[Feeds]) -> DeviceCall:
        """As `bind` on CUDA, but each run takes the next of several inputs. Raises as `bind`.

        Raises:
            InputError: the session is on the CPU, or no set was given.
        """
        if self._calls is None:
            raise InputError(f"inputs in turn are bound on a GPU, this session is on {self._provider}")
        return self._calls.bind_sets(sets)

    def fail(self, error: Exception, *, batch: int | None) -> NoReturn:
        """Raise what went wrong in a run on the GPU; out of memory, give back first what the session holds there."""
        from cspdeploy.runtimes.cuda_errors import error_of_run
        from cspdeploy.runtimes.ort_cuda import built_for

        found = error_of_run(error, doing=f"running {self._title}", batch=batch, needs=built_for())
        if found is error:
            raise error
        if isinstance(found, DeviceMemoryError):
            error.__traceback__ = None  # its frames hold the inputs that are on the device
            if self._calls is not None:
                self._calls.forget(found)
            self.engine = Closed(found)
        raise found from None

    def end_profile(self) -> tuple[ProfiledNode, ...]:
        """Time of each node in the runs up to now; there is no profile after that.

        Raises:
            InputError: the session was opened without a profile, or has not run.
        """
        from cspdeploy.runtimes.ort_profile import read_profile

        name = self.engine.end_profiling()
        if not name:
            raise InputError("the session was opened without a profile")
        path = Path(name)
        try:
            return read_profile(path)
        finally:
            path.unlink(missing_ok=True)


def open_on(provider: str, request: SessionRequest, *, file: TensorrtFile | None = None) -> OrtSession:
    """A session for a request. Raises as `Runtime.open`."""
    require_openable(request)
    _prepare(provider)
    model = request.path if request.data is None else request.data
    try:
        return OrtSession(
            model, provider=provider, optimise=request.optimise, tf32=request.tf32,
            num_threads=request.num_threads, profile=request.profile, cuda_graph=request.cuda_graph,
            cuda=request.cuda, file=file,
        )  # fmt: skip
    except CspDeployError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
        raise _on_gpu(error, provider, request) or refusal(error, request) from error


def _on_gpu(error: Exception, provider: str, request: SessionRequest) -> CspDeployError | None:
    """Why it was not opened, where the reason is the GPU, its libraries or its graphs; else None."""
    if provider not in ON_GPU:
        return None
    from cspdeploy.runtimes.ort_cuda import built_for, library_refusal
    from cspdeploy.runtimes.ort_open import gpu_refusal

    return library_refusal(error, provider) or gpu_refusal(error, request, needs=built_for())


def _prepare(provider: str) -> None:
    """Look at the GPU's driver and load its libraries, where the provider is one of a GPU."""
    if provider not in ON_GPU:
        return
    import onnxruntime

    from cspdeploy.runtimes.cuda_driver import find_driver_problem
    from cspdeploy.runtimes.ort_cuda import built_for, preload_libraries

    if provider in onnxruntime.get_available_providers():
        problem = find_driver_problem(built_for())
        if problem is not None:
            raise RuntimeUnavailableError(f"asked for {provider}: {problem[0]}", fix=problem[1])
        preload_libraries()


def _missing(provider: str) -> tuple[str, str] | None:
    """As `missing_provider`, without importing what is of GPUs where the CPU is asked for and there."""
    if provider == CPU and importlib.util.find_spec("onnxruntime") is not None:
        return None
    from cspdeploy.runtimes.ort_cuda import missing_provider

    return missing_provider(provider)


def probe_provider(provider: str) -> None:
    """Compute 1.5 + 1.5.

    Raises:
        RuntimeUnavailableError: the provider is not to be had, or computes it wrongly.
    """
    _prepare(provider)
    try:
        session = OrtSession(_PROBE_MODEL, provider=provider)
    except CspDeployError:
        raise
    except Exception as error:  # as above
        request = SessionRequest(path=Path("the probe's model"))
        raise _on_gpu(error, provider, request) or error from error
    x = np.array([1.5], np.float32)
    if session.run({"x": x})["y"] != x + x:
        raise RuntimeUnavailableError(f"{provider} computes 1.5 + 1.5 wrongly", fix="cspdeploy doctor")


def open_cpu_session(path: Path) -> OrtSession:
    """A session on the CPU.

    Raises:
        InputError: the file cannot be read, or its data lies outside its folder.
    """
    return open_on(CPU, SessionRequest(path=path))


RUNTIMES = tuple(
    Runtime(
        name=name, device=device, formats=frozenset({"onnx", "ort"}), precisions=frozenset({"fp32", "fp16", "int8"}),
        timed=True,
        notes=_CPU_NOTES if provider == CPU and platform.machine() not in _HALF_MACHINES else {},
        missing=functools.partial(_missing, provider),
        probe=functools.partial(probe_provider, provider),
        open=functools.partial(open_on, provider), modules=("onnxruntime",), takes_bytes=True,
        # On CUDA all runs of a session share one stream, and its captured graph one set of addresses.
        concurrent=provider == CPU,
    )
    for name, device, provider in (("ort-cpu", "cpu", CPU), ("ort-cuda", "cuda", CUDA))
)  # fmt: skip
