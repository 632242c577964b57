from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from cspdeploy.check import doctor_cuda, installation
from cspdeploy.check.ladder import VerifySettings, verify_bundles
from cspdeploy.core.bundle import file_record, write_manifest
from cspdeploy.core.catalog import artifact_file
from cspdeploy.core.golden import Golden, read_golden, write_golden
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.results import ParityRow, VerifyReport
from cspdeploy.core.spec import ModelSpec
from cspdeploy.core.types import Artifact, Manifest, TensorInfo


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Layers this small only wait for each other on several threads, all the more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "exported" / "tiny"))


@pytest.fixture
def make_mean_bundle(tiny_spec: ModelSpec, tmp_path: Path) -> Callable[[int], Path]:
    """`make(batch)`: a bundle of 10 images whose network gives each channel's mean, `batch` images a call."""

    def make(batch: int) -> Path:
        folder = tmp_path / f"mean{batch}"
        folder.mkdir()
        images = np.random.default_rng(1).integers(0, 256, (10, 32, 32, 3), np.uint8)
        x_NCHW = preprocess(list(images), tiny_spec.preprocess)
        logits = x_NCHW.astype(np.float64).mean(axis=(2, 3))
        golden = Golden(images=images, x_NCHW=x_NCHW, outputs_fp64={"logits": logits},
                        outputs_fp32={"logits": logits.astype(np.float32)})  # fmt: skip
        write_golden(folder / "golden.npz", golden)
        (folder / "labels.txt").write_text("red\ngreen\nblue\n")
        text = f"""
        <ir_version: 8, opset_import: ["" : 17]>
        mean (float[{batch},3,32,32] input) => (float[{batch},3] logits) {{
            logits = ReduceMean<axes = [2, 3], keepdims = 0>(input)
        }}"""
        path = folder / artifact_file("tiny", "onnx")
        path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
        record = file_record(path)
        artifact = Artifact(
            kind="onnx", file=record.file, format="onnx", precision="fp32", sha256=record.sha256,
            num_bytes=record.num_bytes, opset=17, steps=(),
            inputs=(TensorInfo(name="input", dtype="float32", shape=(batch, 3, 32, 32)),),
            outputs=(TensorInfo(name="logits", dtype="float32", shape=(batch, 3)),),
        )  # fmt: skip
        files = (file_record(folder / "golden.npz"), file_record(folder / "labels.txt"))
        manifest = Manifest(
            spec=dataclasses.replace(tiny_spec, num_classes=3),
            labels=("red", "green", "blue"),
            artifacts=(artifact,),
            files=files,
            options={},
            tools={},
        )
        write_manifest(folder, manifest)
        return folder

    return make


class Ladder:
    """What the tests of `verify` do over and over. Sessions run in this process unless a test says otherwise."""

    @staticmethod
    def verify(folder: Path, *runtimes: str, **settings: Any) -> VerifyReport:
        quick: dict[str, Any] = {"latency": None, "isolate": False, "audit": False}
        return verify_bundles([folder], VerifySettings(runtimes=runtimes, **(quick | settings)))

    @staticmethod
    def row(report: VerifyReport, artifact: str, runtime: str) -> ParityRow:
        rows = [row for row in report.rows if (row.artifact, row.runtime) == (artifact, runtime)]
        assert len(rows) == 1
        return rows[0]

    @staticmethod
    def verdicts(report: VerifyReport) -> dict[tuple[str, str], str]:
        return {(row.artifact, row.runtime): row.verdict for row in report.rows}

    @staticmethod
    def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
        path = folder / "manifest.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    @staticmethod
    def rehash(folder: Path) -> None:
        """What somebody does who changes a file and its hash with it."""

        def change(data: dict[str, Any]) -> None:
            for entry in [*data["artifacts"], *data["files"]]:
                record = file_record(folder / entry["file"])
                entry.update(sha256=record.sha256, num_bytes=record.num_bytes)

        Ladder.edit(folder, change)

    @staticmethod
    def edit_golden(folder: Path, **changes: Any) -> None:
        """`fp64`, `fp32`: other logits; the rest by the golden file's own names."""
        for name in ("fp64", "fp32"):
            if name in changes:
                changes[f"outputs_{name}"] = {"logits": changes.pop(name)}
        golden = read_golden(folder / "golden.npz")
        write_golden(folder / "golden.npz", dataclasses.replace(golden, **changes))
        Ladder.rehash(folder)

    @staticmethod
    def edit_convolution(path: Path, change: Callable[[np.ndarray[Any, Any]], None]) -> None:
        model = onnx.load(path)
        names = [node.input[1] for node in model.graph.node if node.op_type == "Conv"]
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == names[len(names) // 2])
        weights = numpy_helper.to_array(tensor).copy()
        change(weights)
        tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))
        onnx.save(model, path)

    @staticmethod
    def negate_largest(weights: np.ndarray[Any, Any]) -> None:
        weights.flat[np.abs(weights).argmax()] *= -1


@pytest.fixture
def ladder() -> type[Ladder]:
    return Ladder


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions of installed packages; the wheel for GPUs and nothing else."""
    versions = {"onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(installation, "package_version", versions.get)
    monkeypatch.setattr(doctor_cuda, "package_version", versions.get)
    return versions
