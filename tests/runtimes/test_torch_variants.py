from __future__ import annotations

import dataclasses
import functools
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import nn

from cspdeploy.core.errors import DeviceMemoryError, InputError, RuntimeUnavailableError
from cspdeploy.core.model_folder import read_spec
from cspdeploy.runtimes import all_runtimes, torch_cuda, torch_process
from cspdeploy.runtimes.base import CudaOptions, Outputs, SessionRequest
from cspdeploy.runtimes.tf32 import TF32_VARIABLE
from cspdeploy.runtimes.torch_cuda import TorchGpuCalls
from cspdeploy.runtimes.torch_device import TorchSession, operator_nodes
from cspdeploy.runtimes.torch_process import set_process, settings_of
from cspdeploy.runtimes.torch_variants import compile_failure, prepared, refuse_variants

X_NCHW = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)

FP32_REL_L2 = 1e-5
"""The issue's bound for FP32; another order of sums in another layout gives some 1e-7."""
FP16_REL_L2 = 1e-2
"""Likewise for FP16."""


def _session(models: Path, **cuda: object) -> TorchSession:
    folder = models / "tiny"
    request = SessionRequest(
        path=folder / "model.safetensors", spec=read_spec(folder),
        cuda=dataclasses.replace(CudaOptions(), **cuda),  # type: ignore[arg-type]
    )  # fmt: skip
    session = all_runtimes()["torch-cpu"].open(request)
    assert isinstance(session, TorchSession)
    return session


def _rel_l2(actual: Outputs, desired: Outputs) -> float:
    assert list(actual) == list(desired)
    pairs = [(actual[name].astype(np.float64), desired[name].astype(np.float64)) for name in desired]
    return max(float(np.linalg.norm(a - d) / np.linalg.norm(d)) for a, d in pairs)


def test_channels_last_computes_the_same_and_in_that_layout(tiny_models: Path) -> None:
    expected = _session(tiny_models).run({"input": X_NCHW})
    session = _session(tiny_models, channels_last=True)
    assert session.settings == {"memory_format": "channels_last"}
    placed = session._placed({"input": X_NCHW})[0]
    assert placed.is_contiguous(memory_format=torch.channels_last)
    assert not placed.is_contiguous()
    outputs = session.run({"input": X_NCHW})
    assert _rel_l2(outputs, expected) < FP32_REL_L2
    session.bind({"input": X_NCHW})()


def test_weights_are_laid_out_as_well() -> None:
    model = nn.Conv2d(3, 8, 3)
    prepared(model, request=SessionRequest(path=Path("none"), cuda=CudaOptions(channels_last=True)))
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()


def test_half_computes_in_half_and_gives_float32(tiny_models: Path) -> None:
    expected = _session(tiny_models).run({"input": X_NCHW})
    session = _session(tiny_models, half=True)
    assert session.settings == {"dtype": "float16"}
    outputs = session.run({"input": X_NCHW})
    assert all(value.dtype == np.float32 for value in outputs.values())
    distance = _rel_l2(outputs, expected)
    assert 1e-6 < distance < FP16_REL_L2  # nearer would not have been computed in FP16


def _compiled(model: nn.Module, **cuda: object) -> TorchSession:
    options = dataclasses.replace(CudaOptions(compile="default"), **cuda)  # type: ignore[arg-type]
    request = SessionRequest(path=Path("none"), outputs=("y",), cuda=options)
    return TorchSession(prepared(model, request=request), device="cpu", request=request)


def _small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.1)).eval()


@pytest.mark.slow  # a C++ compiler runs
def test_compiled_network_computes_the_same() -> None:
    with torch.inference_mode():
        expected = {"y": _small()(torch.from_numpy(X_NCHW)).numpy()}
    session = _compiled(_small(), channels_last=True)
    assert session.settings == {"memory_format": "channels_last", "compile": "default"}
    assert _rel_l2(session.run({"input": X_NCHW}), expected) < FP32_REL_L2
    session.bind({"input": X_NCHW})()


@pytest.mark.slow  # PyTorch's compiler is imported
def test_no_compiler_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch._inductor.config as inductor

    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # what was compiled before needs none
    monkeypatch.setattr(inductor.cpp, "cxx", (None, "no-such-compiler"))
    with pytest.raises(RuntimeUnavailableError, match=r"torch\.compile in mode 'default' failed") as caught:
        _compiled(_small()).run({"input": X_NCHW})
    assert "g++" in caught.value.fix
    assert "\n" not in str(caught.value)


def test_failure_of_the_compiler_is_known_by_its_class() -> None:
    kind = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    found = compile_failure(
        kind("TritonMissing: Cannot find a working triton installation.\nMore"), mode="max-autotune"
    )
    assert isinstance(found, RuntimeUnavailableError)
    assert found.fix == "pip install triton"
    assert "\n" not in found.message
    assert compile_failure(kind("CUDA out of memory. Tried to allocate 2.00 GiB"), mode="default") is None
    assert compile_failure(RuntimeError("another matter"), mode="default") is None


def test_modes_that_cannot_be() -> None:
    def asked(mode: str, *, graph: bool = False) -> SessionRequest:
        return SessionRequest(path=Path("none"), cuda=CudaOptions(compile=mode), cuda_graph=graph)

    with pytest.raises(InputError, match="no mode 'fastest', expected one of default"):
        prepared(nn.Identity(), request=asked("fastest"))
    with pytest.raises(InputError, match="captures CUDA graphs by itself"):
        prepared(nn.Identity(), request=asked("max-autotune", graph=True))


@pytest.mark.parametrize(
    "cuda", [CudaOptions(half=True), CudaOptions(channels_last=True), CudaOptions(compile="default")]
)
def test_files_are_run_as_they_are(tiny_bundle: Path, cuda: CudaOptions) -> None:
    request = SessionRequest(path=tiny_bundle / "tiny.torchscript.pt", cuda=cuda)
    with pytest.raises(InputError, match="a TorchScript file is run as it is, asked for"):
        all_runtimes()["torchscript-cpu"].open(request)
    refuse_variants(SessionRequest(path=Path("x"), cuda=CudaOptions(device=3)), what="a file")


@pytest.mark.usefixtures("process_settings")
@pytest.mark.parametrize("outside", ["none", "tf32"])
@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_and_search_are_as_asked_and_read_back(tf32: bool, outside: str) -> None:
    backends: Any = torch.backends
    backends.fp32_precision = outside  # of the whole process, which the flags of old leave in force
    request = SessionRequest(path=Path("none"), tf32=tf32, cuda=CudaOptions(conv_search="exhaustive"))
    set_process(request)
    cudnn: Any = torch.backends.cudnn
    for part in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn):
        assert part.fp32_precision == ("tf32" if tf32 else "ieee")
    found = settings_of(request)
    names = ("use_tf32_matmul", "use_tf32_cudnn", "use_tf32_rnn", "cudnn_benchmark")
    assert [found[name] for name in names] == [*[str(int(tf32))] * 3, "1"]
    # The flags of old are read by torch.export and torch.compile, and raise where they do not agree.
    assert (cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (tf32, tf32)
    set_process(dataclasses.replace(request, cuda=CudaOptions()))
    assert torch.backends.cudnn.benchmark is False
    with pytest.raises(InputError, match="no convolution search 'default'"):
        set_process(dataclasses.replace(request, cuda=CudaOptions(conv_search="default")))


@pytest.mark.usefixtures("process_settings")
def test_each_run_has_the_settings_of_its_own_session_and_not_of_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions in turns in one process, as bench has them without isolation. The runs are real ones, on the CPU."""
    monkeypatch.setattr(torch_process, "_in_force", [])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch_cuda, "TorchTimer", _NoTimer)
    seen: list[tuple[str, str]] = []

    def calls_of(tf32: bool) -> TorchGpuCalls:
        request = SessionRequest(path=Path("none"), tf32=tf32)

        def compute(x: torch.Tensor) -> torch.Tensor:
            seen.append((str(int(tf32)), settings_of(request)["use_tf32_matmul"]))
            return x + x

        def place(feeds: Any) -> list[torch.Tensor]:
            return [torch.from_numpy(feeds["x"])]

        return TorchGpuCalls(compute, place=place, request=request, count_run=lambda: None)

    sessions = [calls_of(False), calls_of(True)]
    for _ in range(2):
        for session in sessions:
            session.run({"x": X_NCHW})
    bound = [session.bind_sets([{"x": X_NCHW}]) for session in sessions]
    for call in (bound[0], bound[1], bound[0]):
        call()
    assert len(seen) == 7
    assert all(wanted == used for wanted, used in seen)


class _NoTimer:
    def begin(self) -> None: ...

    def end(self) -> None: ...

    def ms(self) -> float:
        return 0.0


def test_other_settings_of_the_process_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    request = SessionRequest(path=Path("none"))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setenv(TF32_VARIABLE, "0")
    found = settings_of(request)
    assert (found["fp16_reduced_sums"], found["deterministic_algorithms"], found[TF32_VARIABLE]) == ("1", "1", "0")
    monkeypatch.delenv(TF32_VARIABLE)
    assert TF32_VARIABLE not in settings_of(request)


@dataclasses.dataclass
class Averaged:
    """An entry of PyTorch's profiler, as `key_averages` gives it; times in microseconds."""

    key: str
    device: str
    count: int
    self_device_time_total: float
    self_cpu_time_total: float = 7.0

    @property
    def device_type(self) -> Any:
        return SimpleNamespace(name=self.device)


def test_kernels_and_their_operators_are_counted_once() -> None:
    kernels = [Averaged("sm90_fprop", "CUDA", 20, 400.0), Averaged("nchwToNhwc", "CUDA", 10, 100.0)]
    operators = [Averaged("aten::conv2d", "CPU", 10, 0.0), Averaged("aten::cudnn_convolution", "CPU", 10, 500.0)]
    found = operator_nodes([*operators, *kernels], device="cuda", num_runs=10)
    assert [(node.node, node.num_calls, node.ms) for node in found] == [("aten::cudnn_convolution", 1.0, 0.05)]
    replayed = [Averaged("cudaGraphLaunch", "CPU", 10, 0.0), *reversed(kernels)]
    found = operator_nodes(replayed, device="cuda", num_runs=10)
    assert [node.node for node in found] == ["sm90_fprop", "nchwToNhwc"]
    assert sum(node.ms for node in operator_nodes(operators, device="cpu", num_runs=1)) == pytest.approx(0.014)


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"


@pytest.mark.usefixtures("process_settings")
def test_memory_is_given_back_when_nothing_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the inputs of the run that failed, nor what other calls of the session have bound."""
    placed: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def place(feeds: Any) -> list[torch.Tensor]:
        tensors = [torch.from_numpy(array) for array in feeds.values()]
        placed.extend(weakref.ref(tensor) for tensor in tensors)
        return tensors

    def compute(*tensors: torch.Tensor) -> NoReturn:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch_cuda, "TorchTimer", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.extend(one() is not None for one in placed))
    request = SessionRequest(path=Path("net"))
    calls = TorchGpuCalls(compute, place=place, request=request, count_run=lambda: None)
    bound = calls.bind_sets([{"input": X_NCHW}, {"input": X_NCHW}])
    assert all(one() is not None for one in placed)
    with pytest.raises(DeviceMemoryError, match="out of GPU memory"):
        calls.run({"input": X_NCHW})
    assert alive == [False] * 3
    with pytest.raises(DeviceMemoryError, match="the session was closed"):
        bound()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, to which the network would go")
def test_network_that_does_not_fit_is_let_go_of(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[nn.Module]] = []
    alive: list[bool] = []

    def load(spec: object, path: Path) -> nn.Module:
        model = nn.Linear(2, 2)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr("cspdeploy.nets.exported.load_exported", load)
    monkeypatch.setattr(torch_cuda, "find_driver_problem", lambda needs: None)
    monkeypatch.setattr(torch_cuda, "open_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(made[0]() is not None))
    folder = tiny_models / "tiny"
    with pytest.raises(RuntimeUnavailableError):
        all_runtimes()["torch-cuda"].open(SessionRequest(path=folder / "model.safetensors", spec=read_spec(folder)))
    assert alive == [False]


@pytest.mark.slow  # PyTorch's compiler is imported
def test_code_that_captures_by_itself_has_inputs_at_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled outside of what is timed, and marked, so that the compiler's graph does not copy them once more."""
    seen: list[tuple[int, float, object]] = []

    def compute(x: torch.Tensor) -> torch.Tensor:
        seen.append((x.data_ptr(), float(x.flatten()[0]), getattr(x, "_dynamo_static_input_type", None)))
        return x

    class Timer:
        def begin(self) -> None: ...
        def end(self) -> None: ...
        def ms(self) -> float:
            return 0.5

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch_cuda, "TorchTimer", Timer)

    def place(feeds: Any) -> list[torch.Tensor]:
        return [torch.from_numpy(array) for array in feeds.values()]

    def calls(mode: str) -> TorchGpuCalls:
        request = SessionRequest(path=Path("net"), cuda=CudaOptions(compile=mode))
        return TorchGpuCalls(compute, place=place, request=request, count_run=lambda: None)

    sets = [{"x": np.full((1, 3), value, np.float32)} for value in (1.0, 2.0, 3.0)]
    own = calls("max-autotune")
    call = own.bind_sets(sets)
    for _ in range(4):
        call()
    assert float(own.run(sets[2])[0][0, 0]) == 3.0
    call()
    assert [value for _, value, _ in seen] == [1.0, 2.0, 3.0, 1.0, 3.0, 2.0]
    assert {(address, mark) for address, _, mark in seen} == {(seen[0][0], "unguarded")}
    assert call.copies_in
    seen.clear()
    call = calls("max-autotune-no-cudagraphs").bind_sets(sets)
    for _ in range(3):
        call()
    assert len({address for address, _, _ in seen}) == 3
    assert not call.copies_in


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("runtime", ["torch-cuda", "torchscript-cuda"])
def test_no_gpu_is_one_line(tiny_models: Path, tiny_bundle: Path, runtime: str) -> None:
    folder = tiny_models / "tiny"
    paths = {
        "torch-cuda": folder / "model.safetensors", "torchscript-cuda": tiny_bundle / "tiny.torchscript.pt"
    }  # fmt: skip
    request = SessionRequest(path=paths[runtime], spec=read_spec(folder))
    with pytest.raises(RuntimeUnavailableError, match="asked for CUDA: ") as caught:
        all_runtimes()[runtime].open(request)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_inputs_in_turn_are_of_a_gpu(tiny_models: Path) -> None:
    call = functools.partial(_session(tiny_models).bind_sets, [{"input": X_NCHW}])
    with pytest.raises(InputError, match="bound on a GPU, this session is on cpu"):
        call()
