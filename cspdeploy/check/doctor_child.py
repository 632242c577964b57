"""Try every engine, runtime and execution provider in a process of its own: a broken wheel may crash its process."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cspdeploy.check.cuda_libraries import loaded_libraries, missing_libraries
from cspdeploy.core.catalog import MAX_IR_VERSION, MAX_OPSET
from cspdeploy.core.errors import CspDeployError
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Runtime

__all__ = ["ENGINES", "FORMAT", "main", "try_provider", "try_runtime"]

ENGINES = ("onnxruntime", "openvino", "torch", "onnx")
FORMAT = "format"
"""The task that opens a file of the newest format that exports write."""
_REMOTE = {"AzureExecutionProvider": "sends whole operators to a service elsewhere, computes nothing here"}
REINSTALL = "pip install --force-reinstall {}"

Answer = dict[str, Any]

# y = x + x with `float[1] x -> float[1] y`: ModelProto.graph, as the onnx package writes it.
_GRAPH = bytes.fromhex(
    "3a350a0e0a01780a017812017922034164641201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112040a020801"
)
LOADED = "loaded"
"""The task that tells in which order CUDA's libraries came into this process, and with which task."""


class _ProviderFile(NamedTuple):
    name: str
    also: tuple[str, ...] = ()

    def path(self) -> Path:
        """Beside onnxruntime's other libraries; it need not be there."""
        spec = importlib.util.find_spec("onnxruntime")
        folders = spec.submodule_search_locations if spec is not None else None
        return Path(next(iter(folders or ()), "")) / "capi" / self.name


_PROVIDERS = {
    # cuDNN 9 since ONNX Runtime 1.18.1; newer ones do not name it as needed, but open it for the first convolution.
    "CUDAExecutionProvider": _ProviderFile("libonnxruntime_providers_cuda.so", ("libcudnn.so.9",)),
    "TensorrtExecutionProvider": _ProviderFile("libonnxruntime_providers_tensorrt.so"),
}
_OLD_FORMAT = (7, 13)  # of IR and opset: providers that lag behind are not to fail for that


def try_runtime(runtime: Runtime) -> Answer:
    """Whether a runtime computes something here just now; if not, why, and what to do."""
    try:
        missing = runtime.missing()
        if missing is not None:
            return {"works": False, "reason": missing[0], "fix": missing[1]}
        runtime.probe()
    except CspDeployError as error:
        return {"works": False, "reason": error.message, "fix": error.fix}
    except Exception as error:  # a broken installation may raise anything, and that is what is being asked
        return {
            "works": False,
            "reason": _first_line(error),
            "fix": REINSTALL.format(next(iter(runtime.modules), "cspdeploy")),
        }
    return {"works": True}


def try_provider(name: str) -> Answer:
    """A session on one execution provider: whether it still is there after opening, and takes a node of its own."""
    session = _open(_model(*_OLD_FORMAT), provider=name)
    taken = session.get_providers()
    if name not in taken:
        file = _PROVIDERS.get(name)
        missing = missing_libraries(file.path(), also=file.also) if file is not None and file.path().is_file() else ()
        why = f": {', '.join(missing)} not found" if missing else ""
        return {"works": False, "reason": f"the session runs on {', '.join(taken)}{why}"}
    x = np.array([1.5], np.float32)
    if session.run(None, {"x": x})[0] != x + x:
        return {"works": False, "reason": "computes 1.5 + 1.5 wrongly"}
    if hasattr(session, "get_provider_graph_assignment_info"):  # ONNX Runtime 1.23 and later
        placed = [subgraph.ep_name for subgraph in session.get_provider_graph_assignment_info()]
        if placed and name not in placed:
            reason = _REMOTE.get(name, f"opens, but leaves an addition to {', '.join(placed)}")
            return {"works": False, "reason": reason}
    return {"works": True}


def _try_engine(name: str) -> Answer:
    module = importlib.import_module(name)
    answer: Answer = {"works": True, "version": str(module.__version__), "cuda": ""}
    if name == "torch":
        answer["cuda"] = module.version.cuda or ""
        answer |= _about_torch(module) if answer["cuda"] else {}
    if name == "onnxruntime":
        about = importlib.import_module("onnxruntime.capi.build_and_package_info")
        answer["cuda"] = str(getattr(about, "cuda_version", ""))
        answer["providers"] = module.get_available_providers()
    return answer


def _about_torch(torch: Any) -> Answer:
    """The architectures that it has kernels for, and what it says against the cuDNN that it finds."""
    # torch.cuda.get_arch_list() is empty where no device is, which is when it is asked for.
    answer: Answer = {"archs": str(torch._C._cuda_getArchFlags() or "").split()}
    try:
        torch.backends.cudnn.version()
    except RuntimeError as error:  # compiled against another cuDNN than the one that was loaded first
        answer["cudnn_problem"] = _first_line(error)
    return answer


def _try_libraries(provider: str) -> Answer:
    """Which CUDA libraries a provider does not find, after those of Python packages were loaded."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    return {"works": True, "missing": missing_libraries(_PROVIDERS[provider].path(), also=_PROVIDERS[provider].also)}


def _try_format() -> Answer:
    _open(_model(MAX_IR_VERSION, MAX_OPSET), provider="CPUExecutionProvider")
    return {"works": True}


def _model(ir_version: int, opset: int) -> bytes:
    return bytes([0x08, ir_version]) + _GRAPH + bytes([0x42, 0x04, 0x0A, 0x00, 0x10, opset])


def _open(model: bytes, *, provider: str) -> Any:
    import onnxruntime

    if provider.startswith(("CUDA", "Tensorrt", "NvTensorRT")) and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return onnxruntime.InferenceSession(model, options, providers=[provider])


def _first_line(error: BaseException) -> str:
    """The first line, cut; the kind of error where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _tasks(known: Mapping[str, Answer]) -> Iterator[tuple[str, Callable[[], Answer]]]:
    """Engines first: what needs a broken one is not tried."""
    for name in ENGINES:
        if importlib.util.find_spec(name) is not None:
            yield f"engine:{name}", functools.partial(_try_engine, name)
    for runtime in all_runtimes().values():
        engines = (f"engine:{name}" for name in runtime.modules)
        broken = next((known[key] for key in engines if _is_broken(known, key)), None)
        yield f"runtime:{runtime.name}", functools.partial(_try_or_repeat, runtime, broken)
    engine = known.get("engine:onnxruntime", {})
    if engine.get("works"):
        yield FORMAT, _try_format
        for name in engine["providers"]:
            yield f"provider:{name}", functools.partial(try_provider, name)
        for name, file in _PROVIDERS.items():
            if file.path().is_file():
                yield f"libraries:{name}", functools.partial(_try_libraries, name)


def _try_or_repeat(runtime: Runtime, broken: Answer | None) -> Answer:
    return try_runtime(runtime) if broken is None else dict(broken)


def _is_broken(known: Mapping[str, Answer], key: str) -> bool:
    return key in known and not known[key]["works"]


def main() -> None:
    """What is known already as JSON on stdin; then a line of JSON before and after each task that is not."""
    known: dict[str, Answer] = json.load(sys.stdin)
    loaded: dict[str, str] = {}
    for name, task in _tasks(known):
        if name in known:
            continue
        _say({"started": name})
        try:
            known[name] = task()
        except Exception as error:  # as above
            known[name] = {"works": False, "reason": _first_line(error), "fix": ""}
        _say({"ended": name, "answer": known[name]})
        if not name.startswith("libraries:"):  # which loads all that it finds, and so proves nothing of engines
            for path in loaded_libraries():
                loaded.setdefault(path, name.partition(":")[2] or name)
    if loaded and LOADED not in known:
        _say({"ended": LOADED, "answer": {"works": True, "files": list(loaded.items())}})


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()  # for if the next task crashes


if __name__ == "__main__":
    main()
