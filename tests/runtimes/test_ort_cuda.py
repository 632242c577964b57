from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import onnxruntime
import pytest

from cspdeploy.core.errors import DeviceMemoryError, InputError, RuntimeUnavailableError
from cspdeploy.runtimes import ort_cuda
from cspdeploy.runtimes.base import CudaOptions, SessionRequest
from cspdeploy.runtimes.device_call import CudaCall, batch_of, require_alike
from cspdeploy.runtimes.ort_cuda import (
    library_refusal,
    loaded_libraries,
    missing_library,
    open_quietly,
    preload_libraries,
    require_taken,
    why_not_taken,
)
from cspdeploy.runtimes.ort_gpu_calls import output_places, replay_is_queued
from cspdeploy.runtimes.ort_open import gpu_refusal
from cspdeploy.runtimes.ort_placement import read_copies
from cspdeploy.runtimes.ort_providers import (
    CPU,
    CUDA,
    TENSORRT,
    TensorrtFile,
    cuda_options,
    keep_pairs,
    provider_list,
    tensorrt_options,
)
from cspdeploy.runtimes.ort_tensorrt import find_tensorrt, read_file, set_tf32
from cspdeploy.runtimes.tf32 import TF32_VARIABLE

MAPS = """\
7f00-7f10 r-xp 00000000 08:01 11 /env/nvidia/cudnn/lib/libcudnn.so.9
7f10-7f20 r--p 00000000 08:01 11 /env/nvidia/cudnn/lib/libcudnn.so.9
7f20-7f30 r-xp 00000000 08:01 12 /env/nvidia/cu13/lib/libcublas.so.13
7f30-7f40 r-xp 00000000 08:01 13 /env/nvidia/cu13/lib/libcublasLt.so.13
7f40-7f50 r-xp 00000000 08:01 14 /usr/lib/libc.so.6
7f50-7f60 rw-p 00000000 00:00 0
"""


def test_every_option_is_set_on_purpose() -> None:
    assert cuda_options(CudaOptions()) == {
        "device_id": "0", "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "cudnn_conv_use_max_workspace": "1",
        "prefer_nhwc": "0", "enable_cuda_graph": "0", "arena_extend_strategy": "kSameAsRequested",
        "do_copy_in_default_stream": "1",
    }  # fmt: skip
    asked = CudaOptions(device=2, conv_search="exhaustive", channels_last=True, memory_limit_bytes=1 << 30)
    changed = cuda_options(asked, tf32=True, cuda_graph=True, stream=1 << 40)
    assert changed["device_id"] == "2"
    assert changed["use_tf32"] == changed["prefer_nhwc"] == changed["enable_cuda_graph"] == "1"
    assert changed["cudnn_conv_algo_search"] == "EXHAUSTIVE"
    assert changed["gpu_mem_limit"] == str(1 << 30)
    assert (changed["has_user_compute_stream"], changed["user_compute_stream"]) == ("1", str(1 << 40))


def test_tensorrt_is_let_into_the_precisions_of_the_file_alone(tmp_path: Path) -> None:
    plain = tensorrt_options(CudaOptions(), file=TensorrtFile())
    assert (plain["trt_fp16_enable"], plain["trt_int8_enable"], plain["trt_bf16_enable"]) == ("0", "0", "0")
    assert plain["trt_engine_cache_enable"] == "0"
    cached = CudaOptions(cache=tmp_path)
    with_tf32 = tensorrt_options(cached, file=TensorrtFile(half=True), tf32=True)
    without = tensorrt_options(cached, file=TensorrtFile(half=True))
    assert with_tf32["trt_fp16_enable"] == "1"
    assert with_tf32["trt_engine_cache_path"] == str(tmp_path)
    # An engine that was built with TF32 must not be what a verdict on FP32 finds.
    assert with_tf32["trt_engine_cache_prefix"] != without["trt_engine_cache_prefix"]


def test_providers_in_the_order_in_which_they_take_nodes() -> None:
    def names(found: Sequence[Any]) -> list[str]:
        return [one if isinstance(one, str) else one[0] for one in found]

    assert names(provider_list(CPU, cuda=CudaOptions())) == [CPU]
    assert names(provider_list(CUDA, cuda=CudaOptions())) == [CUDA, CPU]
    found = provider_list(TENSORRT, cuda=CudaOptions(), cuda_graph=True, file=TensorrtFile(quantised=True))
    assert names(found) == [TENSORRT, CUDA, CPU]
    assert found[0][1]["trt_int8_enable"] == found[0][1]["trt_cuda_graph_enable"] == "1"
    assert found[1][1]["enable_cuda_graph"] == "0"
    with pytest.raises(InputError, match=f"asked for on {CPU}"):
        provider_list(CPU, cuda=CudaOptions(), cuda_graph=True)


def test_precisions_of_a_file(tmp_path: Path) -> None:
    texts = {
        "fp32": "(float[2] x) => (float[2] y) { y = Neg(x) }",
        "fp16": "(float[2] x) => (float[2] y) { h = Cast<to = 10>(x) g = Neg(h) y = Cast<to = 1>(g) }",
        "int8": "(float[2] x, float s, int8 z) => (float[2] y) "
                "{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
    }  # fmt: skip
    found = {}
    for name, text in texts.items():
        path = tmp_path / f"{name}.onnx"
        model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}')
        path.write_bytes(onnx.shape_inference.infer_shapes(model).SerializeToString())
        found[name] = read_file(path)
    assert found["fp32"] == TensorrtFile()
    assert found["fp16"] == TensorrtFile(half=True)
    assert found["int8"] == TensorrtFile(quantised=True)


def test_tf32_of_a_process_that_has_begun_with_the_other_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TF32_VARIABLE, "")  # so that it is put back
    monkeypatch.delenv(TF32_VARIABLE)
    monkeypatch.setattr("cspdeploy.runtimes.ort_tensorrt.loaded_libraries", dict)
    set_tf32(allowed=False)
    assert os.environ[TF32_VARIABLE] == "0"
    with pytest.raises(RuntimeUnavailableError, match=f"TF32 is off by {TF32_VARIABLE}=0 of the environment") as caught:
        set_tf32(allowed=True)
    assert (os.environ[TF32_VARIABLE], caught.value.fix.partition(",")[0]) == ("0", f"unset {TF32_VARIABLE}")
    monkeypatch.setattr("cspdeploy.runtimes.ort_tensorrt.loaded_libraries", lambda: {"nvinfer": "libnvinfer.so.10"})
    set_tf32(allowed=False)
    with pytest.raises(RuntimeUnavailableError, match="TF32 is off in this process for nvinfer"):
        set_tf32(allowed=True)


def test_another_word_than_0_forbids_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TF32_VARIABLE, "1")
    set_tf32(allowed=True)
    assert os.environ[TF32_VARIABLE] == "1"


def test_variable_of_the_environment_is_among_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        def get_provider_options(self) -> dict[str, dict[str, str]]:
            return {CUDA: {"use_tf32": "1"}}

    monkeypatch.setenv(TF32_VARIABLE, "0")
    found = ort_cuda.read_settings(Engine(), CUDA)
    assert (found["use_tf32"], found[TF32_VARIABLE]) == ("1", "0")
    monkeypatch.delenv(TF32_VARIABLE)
    assert TF32_VARIABLE not in ort_cuda.read_settings(Engine(), CUDA)


@pytest.mark.parametrize(
    ("provider", "version", "queued"),
    [(CUDA, "1.26.2", False), (CUDA, "1.27.0", True), (CUDA, "2.0.0", True), (TENSORRT, "1.31.1", False),
     (CUDA, "unknown", False)],
)  # fmt: skip
def test_replays_that_are_waited_for_have_no_time_of_the_device(provider: str, version: str, queued: bool) -> None:
    assert replay_is_queued(provider, version) is queued
    call = CudaCall([lambda: None], timer=Clock([]), fail=_fail, clocked=queued)
    call()
    assert call.device_ms == (0.5 if queued else None)


def test_dimensions_without_a_name_are_not_of_one_size() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3,H,W] x) => (float[N,3,H,W] y) { y = Neg(x) }'
    model = onnx.parser.parse_model(text)
    feeds = {"x": np.ones((2, 3, 8, 9), np.float32)}

    def places() -> Any:
        engine = onnxruntime.InferenceSession(model.SerializeToString(), providers=[CPU])
        return output_places(engine, {"x": tuple(engine.get_inputs()[0].shape)}, feeds)

    assert places() == {"y": ((2, 3, 8, 9), np.float32)}
    for value in (model.graph.input[0], model.graph.output[0]):
        for dimension in value.type.tensor_type.shape.dim[2:]:
            dimension.Clear()
    with pytest.raises(InputError, match="a shape that is known before the run"):
        places()


def test_engines_of_tensorrt_are_not_built_again_to_count_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *given, **named: opened.append(given))
    assert read_copies("net.onnx", providers=[TENSORRT, CUDA, CPU], provider=TENSORRT, optimise=True) is None
    assert not opened


def test_libraries_of_a_process() -> None:
    assert loaded_libraries(MAPS.splitlines()) == {
        "cudnn": "/env/nvidia/cudnn/lib/libcudnn.so.9", "cublas": "/env/nvidia/cu13/lib/libcublas.so.13"
    }  # fmt: skip
    assert loaded_libraries([]) == {}


@pytest.mark.parametrize(
    ("text", "needed", "fix"),
    [
        ("libcublasLt.so.13: cannot open shared object file: No such file or directory", "libcublasLt.so.13",
         "pip install nvidia-cublas"),
        ("libcudnn.so.9: cannot open shared object file: No such file or directory", "libcudnn.so.9",
         "pip install nvidia-cudnn-cu13"),
        ("libnvinfer.so.10: cannot open shared object file: No such file or directory", "libnvinfer.so.10",
         "pip install tensorrt-cu13"),
        ("libstrange.so.1: cannot open shared object file: No such file or directory", "libstrange.so.1",
         "cspdeploy doctor"),
    ],
)  # fmt: skip
def test_missing_library_by_name(monkeypatch: pytest.MonkeyPatch, text: str, needed: str, fix: str) -> None:
    def refuse(name: str) -> None:
        raise OSError(text)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(ort_cuda, "built_for", lambda: "13.0")
    library = Path("libonnxruntime_providers_cuda.so")
    assert missing_library(library) == (f"{needed} is missing, which {library} needs", fix)


def test_library_of_cuda_12_has_its_version_in_the_name_of_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_cuda, "built_for", lambda: "12.8")
    assert ort_cuda._install("libcublasLt.so.12") == "pip install nvidia-cublas-cu12"


@pytest.mark.skipif(sys.platform != "linux", reason="the loader's words are those of Linux")
def test_missing_library_of_a_real_one(tmp_path: Path) -> None:
    """A file that is no library is another matter than one that is not there."""
    assert missing_library(tmp_path / "none.so")[0] == f"{tmp_path / 'none.so'} is missing, which none.so needs"
    (tmp_path / "text.so").write_text("no library")
    assert missing_library(tmp_path / "text.so") == ("", "")


def test_session_that_did_not_get_its_provider_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    require_taken(CUDA, [CUDA, CPU])
    monkeypatch.setattr(ort_cuda, "find_driver_problem", lambda needs: ("no NVIDIA driver", "nvidia-smi"))
    with pytest.raises(RuntimeUnavailableError, match=f"the session runs on {CPU}: no NVIDIA driver") as caught:
        require_taken(CUDA, [CPU])
    assert caught.value.fix == "nvidia-smi"
    monkeypatch.setattr(ort_cuda, "find_driver_problem", lambda needs: None)
    if CUDA not in onnxruntime.get_available_providers():
        assert why_not_taken(CUDA)[0] == "libonnxruntime_providers_cuda.so is not in this onnxruntime"
    assert why_not_taken("DmlExecutionProvider") == ("", "")


def test_library_that_the_engine_could_not_load_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_cuda, "why_not_taken", lambda provider: ("libnvinfer.so.10 is missing", "pip install it"))
    text = (
        "RegisterTensorRTPluginsAsCustomOps Please install TensorRT libraries as mentioned in the GPU requirements page"
    )
    found = library_refusal(RuntimeError(text), TENSORRT)
    assert found is not None
    assert (found.message, found.fix) == (f"asked for {TENSORRT}: libnvinfer.so.10 is missing", "pip install it")
    assert library_refusal(RuntimeError("not a graph"), TENSORRT) is None


def test_tensorrt_is_found_without_being_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libnvinfer.so.10").write_text("no library: to load it would fail")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}")
    assert find_tensorrt() == tmp_path / "libnvinfer.so.10"


def test_what_the_engine_prints_is_not_seen(capsys: pytest.CaptureFixture[str]) -> None:
    with open_quietly():
        sys.stdout.write("*************** EP Error ***************")
    preload_libraries()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[ONNXRuntimeError] : 1 : FAIL : This session cannot use the graph capture feature as requested by the user "
         "as all compute graph nodes have not been partitioned to the CUDAExecutionProvider", "all compute graph"),
        ("[ONNXRuntimeError] : 1 : FAIL : This session cannot use the CUDA Graph feature as requested by the user  as "
         "the model has control flow nodes which can't be supported by CUDA Graphs.", "the model has control flow"),
    ],
)  # fmt: skip
def test_graph_that_cannot_be_captured(text: str, reason: str) -> None:
    found = gpu_refusal(RuntimeError(text), SessionRequest(path=Path("net.onnx"), cuda_graph=True))
    assert isinstance(found, InputError)
    assert found.message.startswith(f"net.onnx: cannot be captured as a CUDA graph: {reason}")


def test_refusal_of_the_device_is_not_one_of_the_file() -> None:
    request = SessionRequest(path=Path("net.onnx"), cuda=CudaOptions(device=4))
    found = gpu_refusal(RuntimeError("CUDA failure 101: invalid device ordinal ; GPU=4"), request)
    assert isinstance(found, InputError)
    assert "no GPU 4" in found.message
    assert gpu_refusal(RuntimeError("Load model failed: not a graph"), request) is None


class Clock:
    """Counts where a real one would wait."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def begin(self) -> None:
        self._log.append("begin")

    def end(self) -> None:
        self._log.append("end")

    def ms(self) -> float:
        self._log.append("ms")
        return 0.5


def _fail(error: Exception) -> NoReturn:
    raise DeviceMemoryError(f"told: {error}")


def test_sets_take_turns_and_copies_are_outside_of_the_events() -> None:
    log: list[str] = []
    plain = CudaCall([lambda: log.append("a"), lambda: log.append("b")], timer=Clock(log), fail=_fail)
    assert plain.device_ms is None
    for _ in range(3):
        plain()
    assert "".join(word for word in log if len(word) == 1) == "aba"
    assert plain.device_ms == 0.5
    log.clear()
    graph = CudaCall(
        [lambda: log.append("run")], timer=Clock(log), fail=_fail, fill=lambda turn: log.append(f"copy {turn}")
    )
    graph()
    one = ["copy 0", "begin", "end", "ms", "begin", "run", "end", "ms"]
    assert log == one
    graph.prepare()
    graph.prepare()
    assert log == [*one, "copy 1", "begin", "end", "ms"]  # what a caller has done before its clock is not done again
    graph()
    assert log[-4:] == ["begin", "run", "end", "ms"]
    assert log.count("copy 1") == 1


def test_outputs_are_those_of_the_last_run() -> None:
    log: list[str] = []
    read = [lambda: [np.array([1.0])], lambda: [np.array([2.0])]]
    call = CudaCall([lambda: None, lambda: None], timer=Clock(log), fail=_fail, read=read)
    with pytest.raises(InputError, match="nothing was run yet"):
        call.outputs()
    for expected in (1.0, 2.0, 1.0):
        call()
        assert call.outputs()[0] == expected
    silent = CudaCall([lambda: None], timer=Clock(log), fail=_fail)
    silent()
    with pytest.raises(InputError, match="none are kept"):
        silent.outputs()


def test_call_of_a_closed_session_holds_nothing_and_says_so() -> None:
    held = np.ones(3)
    seen = weakref.ref(held)

    def holding(array: Any) -> Any:
        return lambda *given: [array]

    parts = holding(held)
    call = CudaCall([parts], timer=Clock([]), fail=_fail, fill=parts, read=[parts])
    call()
    del held, parts
    assert seen() is not None
    call.drop(DeviceMemoryError("out of GPU memory", fix="--batch 4"))
    assert seen() is None
    for use in (call, call.prepare, call.outputs):
        with pytest.raises(DeviceMemoryError, match="out of GPU memory; the session was closed") as caught:
            use()
        assert caught.value.fix == "--batch 4"


def test_engines_error_in_a_bound_run_is_told() -> None:
    def launch() -> None:
        raise RuntimeError("CUDA failure 2")

    with pytest.raises(DeviceMemoryError, match="told: CUDA failure 2"):
        CudaCall([launch], timer=Clock([]), fail=_fail)()


def test_sets_of_one_graph_are_alike() -> None:
    first = {"x": np.ones((4, 3), np.float32)}
    require_alike([first, {"x": np.zeros((4, 3), np.float32)}])
    for other in ({"x": np.ones((8, 3), np.float32)}, {"x": np.ones((4, 3), np.float16)}, {"y": first["x"]}):
        with pytest.raises(InputError, match="differ in shape or type"):
            require_alike([first, other])
    assert batch_of(first) == 4
    assert batch_of({"s": np.array(1.0)}) is None


PAIRS = """<ir_version: 8, opset_import: ["" : 17]> g (float[1,2,4,4] x) => (float[1,2,4,4] y)
<float s = {0.1}, int8 z = {0}, int8[2,2,1,1] w = {1, 2, 3, 4}, float[2] b = {0.5, 0.25}> {
  q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  v = DequantizeLinear(w, s, z)
  c = Conv(d, v, b)  r = Relu(c)  p = QuantizeLinear(r, s, z)  y = DequantizeLinear(p, s, z)
}"""


@pytest.mark.parametrize(
    ("provider", "int32_biases", "weights_in_float"), [(CPU, 1, False), (CUDA, 0, True), (TENSORRT, 0, False)]
)
def test_pairs_reach_a_gpu_as_they_are_in_the_file(
    tmp_path: Path, provider: str, int32_biases: int, weights_in_float: bool
) -> None:
    """What the engine makes of the graph before a provider sees it, on the CPU provider: the same for all of them."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "seen.onnx")
    switched_off = keep_pairs(provider, options)
    model = onnx.parser.parse_model(PAIRS).SerializeToString()
    onnxruntime.InferenceSession(model, options, providers=[CPU], disabled_optimizers=switched_off or None)
    graph = onnx.load(tmp_path / "seen.onnx").graph
    stored = {array.name: array.data_type for array in graph.initializer}
    biases = [node for node in graph.node if stored.get(node.input[0]) == onnx.TensorProto.INT32]
    assert len(biases) == int32_biases
    conv = next(node for node in graph.node if node.op_type == "Conv")
    assert (conv.input[1] in stored) is weights_in_float
