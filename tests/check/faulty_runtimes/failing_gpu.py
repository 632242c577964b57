"""Sessions that pass for ones on a GPU and fail as one does: ONNX Runtime on the CPU, and PyTorch's real runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from cspdeploy.core.errors import RuntimeUnavailableError
from cspdeploy.core.types import PlacedNode
from cspdeploy.runtimes.base import Feeds, Outputs, Runtime, SessionRequest
from cspdeploy.runtimes.ort import CPU, OrtSession

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"
CUDA = "CUDAExecutionProvider"
RECORD = tuple(
    PlacedNode(provider=CUDA, node=f"/{i}", operator=operator)
    for i, operator in enumerate(("QuantizeLinear", "DequantizeLinear", "Conv", "Relu", "Conv", "Gemm"))
)
"""As ONNX Runtime tells of an INT8 network on CUDA."""


class _Session:
    def __init__(self, request: SessionRequest, *, nodes: tuple[PlacedNode, ...] = ()) -> None:
        self._session = OrtSession(request.path, provider=CPU)
        self.placement: Mapping[str, int] = {CUDA: len(nodes)} if nodes else {}
        self.nodes = nodes
        self.num_copies = 0

    def run(self, feeds: Feeds) -> Outputs:
        return self._session.run(feeds)

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        return self._session.bind(feeds)


class _Illegal(_Session):
    """Its kernel crashes the GPU, in a run of PyTorch as it is on one."""

    def __init__(self, request: SessionRequest) -> None:
        from cspdeploy.runtimes.torch_cuda import TorchGpuCalls

        super().__init__(request)
        self._calls = TorchGpuCalls(_crash, place=lambda feeds: [], request=request, count_run=lambda: None)

    def run(self, feeds: Feeds) -> Outputs:
        self._calls.run(feeds)
        return {}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        return functools.partial(self.run, feeds)  # type: ignore[return-value]


def _crash(*tensors: Any) -> NoReturn:
    raise RuntimeError(ILLEGAL)


class _Halved(_Session):
    """Half of what it should be; with TF32, as it is timed, there is none."""

    def __init__(self, request: SessionRequest) -> None:
        if request.tf32:
            raise RuntimeUnavailableError("the GPU went away", fix="nvidia-smi")
        super().__init__(request)

    def run(self, feeds: Feeds) -> Outputs:
        return {name: np.multiply(array, 0.5, dtype=np.float32) for name, array in super().run(feeds).items()}


class _NotTimed(_Halved):
    def run(self, feeds: Feeds) -> Outputs:
        return self._session.run(feeds)


_OPENS: dict[str, Callable[[SessionRequest], _Session]] = {
    "illegal-access": _Illegal,
    "halved-then-away": _Halved,
    "right-then-away": _NotTimed,
    "float-pairs": functools.partial(_Session, nodes=RECORD),
}

RUNTIMES = tuple(
    Runtime(
        name=name, device="cuda", formats=frozenset({"onnx"}), precisions=frozenset({"fp32", "int8"}), timed=True,
        notes={}, missing=lambda: None, probe=lambda: None, open=open_, modules=("onnxruntime",),
    )
    for name, open_ in _OPENS.items()
)  # fmt: skip
