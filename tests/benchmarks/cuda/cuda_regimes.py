"""The regimes that are timed: an engine, a precision, a layout, captured or not. Variants are those of `cspdeploy`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from cspdeploy.check.variants import variants_of
from cspdeploy.core.errors import InputError
from cspdeploy.pipeline.regimes import regime_name
from cspdeploy.runtimes.base import SessionRequest

__all__ = ["FIGURE_BATCHES", "NETWORK_PAIRS", "REGIMES", "Regime", "find_regimes"]

NETWORK_PAIRS = (("cspdarknet53", "darknet53"), ("cspresnet50", "resnet50"), ("cspresnext50", "resnext50_32x4d"))
"""Each with its baseline, in the order in which they are measured where time is short."""
FIGURE_BATCHES = (1, 32)
"""Batches that figures are of."""

FP32_LIMIT, FP16_LIMIT = 1e-5, 1e-2
"""Of the relative L2 distance from the network in FP64: aimed at for every network, TF32 off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """One way to run a network.

    Attributes:
        name: as tables and JSON spell it.
        source: what is opened: the network's weights, or one of the ONNX files.
        variant: of `cspdeploy.check.variants`.
        one_batch: a session holds for one batch: what is compiled or captured has its shapes in it.
        compiled: takes so long to open that it is opened ahead, side by side with others.
        tf32: as the engines have it in use; off for verdicts on numbers in FP32 alone.
        limit: of parity; None: the drift is shown without a verdict.
        extra: no figure needs its time, which is taken only where some is left over.
        with_copies: measured once more with the copies from and to the host in every run.
        optional: where its engine is not installed, that is no remark.
    """

    name: str
    title: str
    runtime: str
    source: Literal["eager", "onnx", "onnx-fp16", "onnx-int8"]
    variant: str = ""
    tf32: bool = False
    one_batch: bool = False
    compiled: bool = False
    limit: float | None = None
    with_copies: bool = False
    extra: bool = False
    optional: bool = False

    @property
    def compared_as(self) -> str:
        """The same regime in `cspdeploy compare --paper`, which has TF32 as in use; empty where it has none such."""
        return regime_name(self.runtime, self.source, self.variant) if self.tf32 or "cpu" in self.runtime else ""

    def request(self, base: SessionRequest) -> SessionRequest:
        """That of a session in this regime.

        Raises:
            InputError: the runtime has no such variant.
        """
        base = dataclasses.replace(base, tf32=self.tf32)
        for variant in variants_of(self.runtime):
            if variant.name == self.variant:
                return variant.apply(base)
        raise InputError(f"{self.runtime}: has no variant '{self.variant}'", fix="see cspdeploy/check/variants.py")


_CUDA = (
    Regime(name="eager-tf32", title="PyTorch eager FP32 NCHW, TF32 as in use", runtime="torch-cuda", source="eager",
           tf32=True, with_copies=True),
    Regime(name="eager-fp32", title="PyTorch eager FP32 NCHW, TF32 off", runtime="torch-cuda", source="eager",
           limit=FP32_LIMIT),
    Regime(name="eager-tf32-nhwc", title="PyTorch eager FP32 channels-last, TF32 as in use", runtime="torch-cuda",
           source="eager", variant="channels-last", tf32=True),
    Regime(name="eager-fp32-nhwc", title="PyTorch eager FP32 channels-last, TF32 off", runtime="torch-cuda",
           source="eager", variant="channels-last", limit=FP32_LIMIT, extra=True),
    Regime(name="eager-fp16", title="PyTorch eager FP16 NCHW", runtime="torch-cuda", source="eager", variant="fp16",
           tf32=True, limit=FP16_LIMIT),
    Regime(name="eager-fp16-nhwc", title="PyTorch eager FP16 channels-last", runtime="torch-cuda", source="eager",
           variant="fp16 channels-last", tf32=True, limit=FP16_LIMIT),
    Regime(name="compile-fp16-nhwc", title="torch.compile FP16 channels-last, max-autotune, CUDA graphs",
           runtime="torch-cuda", source="eager", variant="compile fp16 channels-last", tf32=True, one_batch=True,
           compiled=True, limit=FP16_LIMIT),
    Regime(name="ort-tf32", title="ONNX Runtime CUDA FP32, TF32 as in use", runtime="ort-cuda", source="onnx",
           tf32=True),
    Regime(name="ort-fp32", title="ONNX Runtime CUDA FP32, TF32 off", runtime="ort-cuda", source="onnx",
           limit=FP32_LIMIT, extra=True),
    Regime(name="ort-fp32-graph", title="ONNX Runtime CUDA FP32, TF32 off, CUDA graph", runtime="ort-cuda",
           source="onnx", variant="cuda-graph", one_batch=True, limit=FP32_LIMIT, extra=True),
    Regime(name="ort-fp16", title="ONNX Runtime CUDA FP16", runtime="ort-cuda", source="onnx-fp16", tf32=True,
           limit=FP16_LIMIT, with_copies=True),
    Regime(name="ort-fp16-graph", title="ONNX Runtime CUDA FP16, CUDA graph", runtime="ort-cuda", source="onnx-fp16",
           variant="cuda-graph", tf32=True, one_batch=True, limit=FP16_LIMIT),
    Regime(name="ort-fp16-nhwc", title="ONNX Runtime CUDA FP16 NHWC", runtime="ort-cuda", source="onnx-fp16",
           variant="nhwc", tf32=True, limit=FP16_LIMIT, extra=True),
    Regime(name="ort-fp16-nhwc-graph", title="ONNX Runtime CUDA FP16 NHWC, CUDA graph", runtime="ort-cuda",
           source="onnx-fp16", variant="nhwc cuda-graph", tf32=True, one_batch=True, limit=FP16_LIMIT),
    Regime(name="trt-fp16", title="ONNX Runtime TensorRT FP16", runtime="ort-tensorrt", source="onnx-fp16",
           tf32=True, one_batch=True, limit=FP16_LIMIT, extra=True, optional=True),
    Regime(name="ort-int8", title="ONNX Runtime CUDA INT8 (Q/DQ)", runtime="ort-cuda", source="onnx-int8", tf32=True),
)  # fmt: skip
_CPU = (
    Regime(name="eager-fp32", title="PyTorch eager FP32 NCHW", runtime="torch-cpu", source="eager",
           limit=FP32_LIMIT, with_copies=True),
    Regime(name="eager-fp32-nhwc", title="PyTorch eager FP32 channels-last", runtime="torch-cpu", source="eager",
           variant="channels-last", limit=FP32_LIMIT),
    Regime(name="ort-fp32", title="ONNX Runtime CPU FP32", runtime="ort-cpu", source="onnx", limit=FP32_LIMIT,
           with_copies=True),
    # On x86 computed in float32: no stand-in for FP16 arithmetic.
    Regime(name="ort-fp16", title="ONNX Runtime CPU, FP16 file", runtime="ort-cpu", source="onnx-fp16",
           limit=FP16_LIMIT),
)  # fmt: skip
REGIMES: dict[str, tuple[Regime, ...]] = {"cuda": _CUDA, "cpu": _CPU}
"""By kind of device; the first, as a user has it who sets nothing, is what every other is compared with. The
CPU's prove that the benchmark itself works where there is no GPU; its figures are none of CUDA's."""


def find_regimes(kind: str, names: tuple[str, ...]) -> tuple[Regime, ...]:
    """Those named, in the table's order, none of which is extra then; all where none is named.

    Raises:
        InputError: an unknown name.
    """
    known = {one.name: one for one in REGIMES[kind]}
    for name in names:
        if name not in known:
            raise InputError(f"--regime {name}: unknown, expected one of {', '.join(known)}")
    if not names:
        return tuple(known.values())
    return tuple(dataclasses.replace(one, extra=False) for name, one in known.items() if name in names)
