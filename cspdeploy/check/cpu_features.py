"""Instruction sets of the CPU that decide how fast networks run on it, in plain words."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["CpuFeature", "explain_cpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuFeature:
    """`meaning`: what it is good for where it is here, what its absence costs where it is not."""

    name: str
    present: bool
    meaning: str


class _Row(NamedTuple):
    name: str
    flags: tuple[str, ...]
    present: str
    absent: str


# Flags as Linux spells them. What uses them: MLAS, the kernels of ONNX Runtime's CPU provider
# (onnxruntime/core/mlas/lib/platform.cpp), and oneDNN, those of torch.
_X86 = (
    _Row("AVX2", ("avx2",), "FP32 eight at a time", "half the width and no fused multiply-add: a quarter of the peak"),
    _Row("AVX-512", ("avx512f",), "FP32 sixteen at a time", "FP32 eight at a time at most"),
    _Row("VNNI", ("avx512_vnni", "avx_vnni"), "INT8 products in one instruction: INT8 files can beat FP32 here",
         "INT8 takes three instructions and may saturate: measure before choosing an INT8 file"),
    _Row("AMX", ("amx_int8", "amx_bf16"), "INT8 and BF16 products in tiles: most for large batches",
         "no matrix tiles"),
    _Row("BF16", ("avx512_bf16", "amx_bf16"), "torch can compute in BF16; ONNX Runtime does not on x86",
         "BF16 would be emulated"),
    _Row("FP16 arithmetic", ("avx512_fp16",), "present, but ONNX Runtime computes FP16 files in FP32 on x86",
         "FP16 files are computed in FP32: smaller, not faster"),
)  # fmt: skip
_ARM = (
    _Row("NEON dot product", ("asimddp",), "INT8 products in one instruction: INT8 files can beat FP32 here",
         "INT8 takes several instructions: measure before choosing an INT8 file"),
    _Row("I8MM", ("i8mm",), "INT8 products of matrices: twice the dot product", "no INT8 matrix products"),
    _Row("BF16", ("bf16",), "ONNX Runtime can trade FP32 products for BF16, if told to", "BF16 would be emulated"),
    _Row("FP16 arithmetic", ("fphp",), "FP16 files can be computed in FP16: half the memory traffic",
         "FP16 files are computed in FP32: smaller, not faster"),
)  # fmt: skip


def explain_cpu(flags: tuple[str, ...], *, machine: str = "") -> tuple[CpuFeature, ...]:
    """What the flags of `cspdeploy.core.env.cpu_flags` mean.

    Args:
        machine: as `platform.machine` has it, which is the default.

    Returns:
        Nothing where the flags are not known, as outside of Linux, or for another kind of CPU.
    """
    kind = (machine or platform.machine()).lower()
    rows = _X86 if kind in ("x86_64", "amd64") else _ARM if kind in ("aarch64", "arm64") else ()
    if not flags:
        return ()
    found = []
    for row in rows:
        present = any(flag in flags for flag in row.flags)
        found.append(CpuFeature(name=row.name, present=present, meaning=row.present if present else row.absent))
    return tuple(found)
