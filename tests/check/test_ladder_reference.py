"""`verify` on bundles whose reference or contract was changed: all that hangs on it breaks, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cspdeploy.core.golden import read_golden
from cspdeploy.core.spec import ModelSpec
from cspdeploy.export.reference import compute_reference
from cspdeploy.nets.registry import build


@pytest.mark.parametrize("factor", [0.5, 100.0, 1.05, -1.0])
def test_scaled_reference_breaks_every_row(bundle: Path, factor: float, ladder: Any) -> None:
    golden = read_golden(bundle / "golden.npz")
    ladder.edit_golden(
        bundle, fp64=golden.outputs_fp64["logits"] * factor, fp32=golden.outputs_fp32["logits"] * np.float32(factor)
    )
    report = ladder.verify(bundle)
    assert report.verdict == "fail"
    assert f"{bundle}: eager on torch-cpu" in report.first_break
    assert {row.verdict for row in report.rows if row.artifact != "preprocess"} == {"numeric"}


def test_reference_of_other_weights_breaks_every_row(bundle: Path, tiny_spec: ModelSpec, ladder: Any) -> None:
    """A golden file that stayed behind when the model was trained again."""
    torch.manual_seed(1)
    x_NCHW = read_golden(bundle / "golden.npz").x_NCHW
    outputs_fp64, outputs_fp32 = compute_reference(build(tiny_spec), x_NCHW, names=("logits",))
    ladder.edit_golden(bundle, fp64=outputs_fp64["logits"], fp32=outputs_fp32["logits"])
    report = ladder.verify(bundle)
    assert {row.verdict for row in report.rows if row.artifact != "preprocess"} == {"numeric"}


def test_reference_in_another_order_is_told_as_such(bundle: Path, ladder: Any) -> None:
    golden = read_golden(bundle / "golden.npz")
    ladder.edit_golden(bundle, fp64=golden.outputs_fp64["logits"][::-1], fp32=golden.outputs_fp32["logits"][::-1])
    assert ladder.row(ladder.verify(bundle, "ort-cpu"), "onnx", "ort-cpu").verdict == "order"


def test_reference_of_other_classes(bundle: Path, ladder: Any) -> None:
    golden = read_golden(bundle / "golden.npz")
    ladder.edit_golden(bundle, fp64=golden.outputs_fp64["logits"][:, :7], fp32=golden.outputs_fp32["logits"][:, :7])
    assert ladder.row(ladder.verify(bundle, "ort-cpu"), "onnx", "ort-cpu").verdict == "shape"


def test_reference_that_claims_to_be_noise_excuses_nothing(bundle: Path, ladder: Any) -> None:
    """The limit is a multiple of the distance between the two eager outputs; that distance is in the same file."""
    golden = read_golden(bundle / "golden.npz")
    ladder.edit_golden(bundle, fp64=golden.outputs_fp64["logits"] * 0.5)
    assert ladder.row(ladder.verify(bundle, "ort-cpu"), "onnx", "ort-cpu").verdict == "numeric"


@pytest.mark.parametrize(
    "change", [{"mean": [0.5, 0.4, 0.5]}, {"std": [0.25, 0.25, 0.26]}, {"interpolation": "nearest"}, {"crop_pct": 0.9}]
)
def test_wrong_preprocessing_breaks_its_own_row(bundle: Path, change: dict[str, Any], ladder: Any) -> None:
    ladder.edit(bundle, lambda data: data["spec"]["preprocess"].update(change))
    report = ladder.verify(bundle, "ort-cpu")
    row = ladder.row(report, "preprocess", "shared")
    assert row.verdict == "numeric"
    assert row.max_abs is not None
    assert row.max_abs > 1e-3
    assert "preprocess on shared" in report.first_break
    assert ladder.row(report, "onnx", "ort-cpu").verdict == "pass"


def test_wrong_size_breaks_the_preprocess_row(bundle: Path, ladder: Any) -> None:
    ladder.edit(bundle, lambda data: data["spec"]["preprocess"].update(height_px=48))
    row = ladder.row(ladder.verify(bundle, "ort-cpu"), "preprocess", "shared")
    assert row.verdict == "shape"
    assert "48" in row.reason
