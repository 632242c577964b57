"""A report as `verify` would give it, made by hand: a rung broken, one not checkable, accuracy, INT8."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cspdeploy.core.bundle import read_manifest
from cspdeploy.core.golden import Golden, read_golden
from cspdeploy.core.metrics import softmax
from cspdeploy.core.results import (
    ColdStart,
    ImageDecision,
    LayerCurve,
    LayerError,
    Limit,
    MemoryUse,
    ParityRow,
    PrecisionAudit,
    Timing,
    VerifyReport,
)
from cspdeploy.core.types import Manifest, PlacedNode

MakeReport = Callable[[Path, Manifest, Golden], VerifyReport]


def _timing(rng: np.random.Generator, median_ms: float, *, reference_ms: float, num: int = 160) -> Timing:
    samples = median_ms * (1 + np.abs(rng.normal(0, 0.03, num)) - 0.02 + (rng.random(num) > 0.97) * rng.random(num))
    p50, ratio = float(np.median(samples)), reference_ms / float(np.median(samples))
    return Timing(
        p50_ms=p50, p90_ms=float(np.quantile(samples, 0.9)), p95_ms=float(np.quantile(samples, 0.95)),
        ci_low_ms=p50 * 0.995, ci_high_ms=p50 * 1.006, num_runs=num,
        verdict="reference" if abs(ratio - 1) < 0.001 else "faster" if ratio > 1.02 else "slower" if ratio < 0.98
        else "indistinguishable",
        ratio=ratio, ratio_low=ratio * 0.98, ratio_high=ratio * 1.02, samples_ms=tuple(map(float, samples)),
    )  # fmt: skip


def _decisions(golden: Golden, *, noise: float, rng: np.random.Generator) -> tuple[ImageDecision, ...]:
    logits = next(iter(golden.outputs_fp64.values()))
    said = softmax(logits + rng.normal(0, noise, logits.shape))
    return tuple(ImageDecision(index=int(row.argmax()), probability=float(row.max())) for row in said)


def _histogram(centre: float, num: int = 640) -> tuple[int, ...]:
    """Counts of the decades below 1e-9 to above 1, around 10^centre."""
    shares = np.exp(-0.5 * ((np.arange(11) - 9.5 - centre) / 0.8) ** 2)
    return tuple(int(count) for count in np.round(num * shares / shares.sum()))


def _audit(precision: str, *, operators: dict[str, int], problem: str = "") -> PrecisionAudit:
    macs = {"int8": {"int8": 0.972, "fp32": 0.028}, "fp16": {"fp16": 1.0}}.get(precision, {"fp32": 1.0})
    return PrecisionAudit(
        declared=precision, found=precision, macs=macs, num_macs=102_090_000, macs_unknown="", weights=macs,
        opsets={"ai.onnx": 18}, ir_version=10, operators=operators, custom_operators=(), external_data=(),
        problem=problem,
    )  # fmt: skip


_OPERATORS = {"Conv": 72, "LeakyRelu": 71, "Add": 23, "Concat": 5, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
_FP16_NOTE = "computes FP16 files in FP32, so it proves nothing of FP16 arithmetic; fp16-rounding does"


def make_report(folder: Path, manifest: Manifest, golden: Golden) -> VerifyReport:
    """Rows of four artifacts on four runtimes; the INT8 one is broken."""
    rng = np.random.default_rng(3)
    sizes = {artifact.kind: artifact.num_bytes for artifact in manifest.artifacts}
    classify = manifest.spec.task == "classify"
    output = manifest.spec.outputs[0]

    def row(artifact: str, runtime: str, *, error: float, limit: float, centre: float, **more: object) -> ParityRow:
        why = f"{limit / 4.1e-7:.0f} x the noise floor 4.1e-07" if limit < 1e-3 else "roundings of 175 nodes, added up"
        noise = 0.02 if error < 0.05 else 2.2
        values: dict[str, object] = {
            "bundle": str(folder), "artifact": artifact, "runtime": runtime, "verdict": "pass",
            "num_bytes": sizes.get(artifact, 27_000_000), "rel_l2": error, "limit": limit, "max_abs": error * 9,
            "sqnr_db": -20 * float(np.log10(error)), "top1_agreement": 1.0, "top5_agreement": 1.0,
            "num_images": len(golden.images), "error_histogram": _histogram(centre),
            "decisions": _decisions(golden, noise=noise, rng=rng) if classify else (),
            "limits": (Limit(output=output, rel_l2=limit, why=why, terms={"noise_floor": 4.1e-7, "factor": 16.0}),),
            "placement": {"CPUExecutionProvider": 97} if runtime == "ort-cpu" else {},
            "memory": MemoryUse(opened_bytes=112_000_000, peak_bytes=131_400_000),
        }  # fmt: skip
        return ParityRow(**{**values, **more})  # type: ignore[arg-type]

    first = _timing(rng, 21.4, reference_ms=21.4)
    first = dataclasses.replace(first, verdict="reference", ratio=1.0)
    reference = first.p50_ms
    cold = ColdStart(import_ms=212.0, open_ms=98.0, first_run_ms=31.0)
    rows = (
        ParityRow(bundle=str(folder), artifact="preprocess", runtime="shared", verdict="pass", max_abs=0.0, limit=1e-5,
                  num_images=len(golden.images)),
        row("eager", "torch-cpu", error=4.1e-7, limit=6.6e-6, centre=-6.9),
        row("torchscript", "torchscript-cpu", error=4.4e-7, limit=6.6e-6, centre=-6.9, timing=first, cold=cold,
            top1=0.9341, top5=0.9994, accuracy_images=10_000),
        row("onnx", "ort-cpu", error=5.2e-7, limit=6.6e-6, centre=-6.8, cold=cold, top1=0.9341, top5=0.9994,
            accuracy_images=10_000, timing=_timing(rng, 9.1, reference_ms=reference),
            audit=_audit("fp32", operators=_OPERATORS)),
        ParityRow(bundle=str(folder), artifact="onnx", runtime="ort-cuda", verdict="not-checkable",
                  reason="onnxruntime has no CUDAExecutionProvider (pip install onnxruntime-gpu)"),
        row("onnx-fp16", "ort-cpu", error=8.1e-4, limit=1e-2, centre=-3.4, note=_FP16_NOTE, cold=cold, top1=0.9340,
            top5=0.9994, accuracy_images=10_000, timing=_timing(rng, 9.2, reference_ms=reference),
            audit=_audit("fp16", operators={**_OPERATORS, "Cast": 2})),
        row("onnx-fp16", "fp16-rounding", error=9.7e-4, limit=1e-2, centre=-3.3),
        row("onnx-int8", "ort-cpu", error=0.213, limit=6.4e-2, centre=-0.9, verdict="numeric", top1_agreement=0.8594,
            reason="relative L2 2.1e-01, limit 6.4e-02 (rounding of 8-bit weights and activations of 72 convolutions)",
            timing=_timing(rng, 6.2, reference_ms=reference), cold=cold, num_bytes=27_900_000,
            audit=_audit("int8", operators={"QLinearConv": 70, "LeakyRelu": 71, "QLinearAdd": 23, "Conv": 2}),
            nodes_elsewhere=(PlacedNode(provider="CPUExecutionProvider", node="/head/fc/Gemm", operator="Gemm"),)),
    )  # fmt: skip
    return VerifyReport(
        verdict="fail", first_break=f"{folder}: onnx-int8 on ort-cpu: relative L2 2.1e-01, limit 6.4e-02",
        noise_floor={str(folder): 4.1e-7}, untrained=(), rows=rows,
        warnings=("the machine is busy (load 3.1 on 2 CPUs): latencies are worth little; close other programs",),
        environment={"system": "Linux x86_64", "cpu": "A CPU at 2.10GHz", "cpus": "2", "cpu_flags": "avx2 avx512f",
                     "python": "3.11.7", "onnxruntime": "1.31.1", "numpy": "2.4.6"},
        settings={"min_runs": 50, "min_seconds": 3.0, "time_limit_s": 60.0, "seed": 0},
    )  # fmt: skip


def make_curves() -> tuple[LayerCurve, ...]:
    """FP32 flat, FP16 falling, INT8 with a cliff."""
    rng = np.random.default_rng(4)
    curves = []
    for artifact, start, fall, num in (
        ("onnx", 141.0, 11.0, 170),
        ("onnx-fp16", 74.0, 14.0, 175),
        ("onnx-int8", 46.0, 19.0, 172),
    ):
        values = start - fall * np.linspace(0, 1, num) ** 0.5 + rng.normal(0, 1.2, num)
        if artifact == "onnx-int8":
            values[118:] -= 14
        curves.append(LayerCurve(
            artifact=artifact, runtime="ort-cpu", against="golden", layers=tuple(
                LayerError(
                    node=f"/stages/stages.{i // 40}/blocks/blocks.{i % 8}/conv1/conv/Conv", operator="Conv",
                    module=f"stages.{i // 40}.blocks.{i % 8}.conv1.conv", rel_l2=float(10 ** (-value / 20)),
                    sqnr_db=float(value),
                )
                for i, value in enumerate(values)
            ),
        ))  # fmt: skip
    return tuple(curves)


@pytest.fixture(scope="session")
def tiny_manifest(tiny_bundle: Path) -> Manifest:
    return read_manifest(tiny_bundle)


@pytest.fixture(scope="session")
def tiny_golden(tiny_bundle: Path) -> Golden:
    return read_golden(tiny_bundle / "golden.npz")


@pytest.fixture(scope="session")
def tiny_report(tiny_bundle: Path, tiny_manifest: Manifest, tiny_golden: Golden) -> VerifyReport:
    return make_report(tiny_bundle, tiny_manifest, tiny_golden)


@pytest.fixture(scope="session")
def tiny_curves() -> tuple[LayerCurve, ...]:
    return make_curves()
