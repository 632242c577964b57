"""Training on a GPU. Never run where there is none: `pytest -m cuda`."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.errors import DeviceMemoryError, InputError
from cspdeploy.core.spec import ModelSpec
from cspdeploy.train import job
from cspdeploy.train.data import BatchLoader
from cspdeploy.train.detect_data import BoxLoader
from cspdeploy.train.detect_folder import open_boxes
from cspdeploy.train.detect_loop import DetectionRecipe, train_detector
from cspdeploy.train.feed import on_device
from cspdeploy.train.loop import Recipe, TrainedRun, train
from cspdeploy.train.metrics import measure_accuracy
from cspdeploy.train.workers import NO_WORKERS, Workers, open_workers

pytestmark = pytest.mark.cuda
RECIPE = Recipe(epochs=4, batch=16, max_learning_rate=0.1, seed=3)
MakeStripes = Callable[..., LabelledImages]


@pytest.fixture
def loaders(make_stripes: MakeStripes, stripes_spec: ModelSpec) -> dict[str, BatchLoader]:
    return {
        "training": BatchLoader(make_stripes(64, seed=0), stripes_spec.preprocess, batch=16),
        "testing": BatchLoader(make_stripes(32, seed=1), stripes_spec.preprocess, batch=16),
    }


def _train(spec: ModelSpec, loaders: dict[str, BatchLoader], checkpoint: Path, **options: Any) -> TrainedRun:
    with open_workers("cuda") as workers:
        return train(spec, RECIPE, **loaders, checkpoint=checkpoint, workers=workers, **options)


def test_a_gpu_learns_what_the_cpu_does(
    stripes_spec: ModelSpec, loaders: dict[str, BatchLoader], tmp_path: Path
) -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    run = _train(stripes_spec, loaders, tmp_path / "c.pt")
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
    assert run.curve[-1].train_loss < 0.75 * run.curve[0].train_loss
    assert run.curve[-1].test_top1 >= 0.9
    (place,) = run.places
    assert place["device"] == torch.cuda.get_device_name()
    assert place["dtype"] in ("bfloat16", "float16")


def test_the_figure_that_is_kept_is_of_float32(
    stripes_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch lets cuDNN's convolutions round to TF32 unless it is told."""
    flags = []

    def measure(*args: Any, **options: Any) -> tuple[float, float]:
        flags.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return measure_accuracy(*args, **options)

    monkeypatch.setattr(job, "measure_accuracy", measure)
    with open_workers("cuda") as workers:
        job.train_model(
            "cspdarknet21", data=str(stripes_folder), models=tmp_path, recipe=Recipe(epochs=1, batch=8), size_px=32,
            command="cspdeploy train cspdarknet21", resume=False, overwrite=False, workers=workers,
        )  # fmt: skip
    assert flags == [(False, False)]


def test_a_run_of_a_gpu_goes_on_on_the_cpu_and_back(
    stripes_spec: ModelSpec, loaders: dict[str, BatchLoader], tmp_path: Path
) -> None:
    def stop(epoch: int) -> Callable[[str, int, int], None]:
        def interrupt(what: str, done: int, total: int) -> None:
            if what.startswith(f"epoch {epoch}/"):
                raise KeyboardInterrupt

        return interrupt

    checkpoint = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        _train(stripes_spec, loaders, checkpoint, progress=stop(2))
    with pytest.raises(KeyboardInterrupt):
        train(stripes_spec, RECIPE, **loaders, checkpoint=checkpoint, resume=True, progress=stop(3))
    run = _train(stripes_spec, loaders, checkpoint, resume=True)
    assert [record.epoch for record in run.curve] == [1, 2, 3, 4]
    assert [(place["from_epoch"], place["device"] == "cpu") for place in run.places] == [
        (1, False),
        (2, True),
        (3, False),
    ]


def test_batches_arrive_as_they_were(loaders: dict[str, BatchLoader]) -> None:
    device = torch.device("cuda", 0)
    moved = on_device(loaders["training"].epoch(seed=(0, 0)), device)
    for (x, classes), (there, there_classes) in zip(loaders["training"].epoch(seed=(0, 0)), moved, strict=True):
        assert there.device == there_classes.device == device
        assert there.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(there.cpu(), x)
        assert torch.equal(there_classes.cpu(), classes)


def test_a_detector_has_the_same_first_loss(detector_spec: ModelSpec, boxes_folder: Path, tmp_path: Path) -> None:
    """One step, from the same weights on the same pictures; bfloat16 has three digits."""
    loaders = {
        name: BoxLoader(open_boxes(boxes_folder, split=split), detector_spec.preprocess, batch=16)
        for name, split in (("training", "train"), ("testing", "test"))
    }
    recipe = DetectionRecipe(epochs=1, batch=16, max_learning_rate=1e-3)

    def first_loss(workers: Workers) -> float:
        run = train_detector(detector_spec, recipe, **loaders, checkpoint=tmp_path / "c.pt", workers=workers)
        return float(run.curve[0].train_loss)

    with open_workers("cuda") as workers:
        assert first_loss(workers) == pytest.approx(first_loss(NO_WORKERS), rel=0.02)


def test_more_workers_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    num = torch.cuda.device_count() + 1
    given = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num, "MASTER_ADDR": "localhost",
             "MASTER_PORT": 1}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match=f"{num} workers on this machine, and {num - 1} GPU"), open_workers():
        pytest.fail("there are not so many")


def test_a_batch_that_does_not_fit_leaves_nothing_there(
    stripes_spec: ModelSpec, make_stripes: MakeStripes, tmp_path: Path
) -> None:
    """With a hundredth of the memory allowed."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        data = make_stripes(8192, seed=0)
        loader = BatchLoader(data, stripes_spec.preprocess.with_size(128, 128), batch=8192)
        with pytest.raises(DeviceMemoryError, match="no memory left on cuda:0") as caught:
            _big(stripes_spec, loader, tmp_path)
        assert caught.value.fix == "--batch 4096"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del caught
    gc.collect()  # what is asked is that nothing holds it, not when Python sees that
    assert torch.cuda.memory_allocated() == before


def _big(spec: ModelSpec, loader: BatchLoader, folder: Path) -> None:
    recipe = Recipe(epochs=1, batch=8192)
    with open_workers("cuda") as workers:
        train(spec, recipe, training=loader, testing=loader, checkpoint=folder / "c.pt", workers=workers)


def test_as_many_workers_as_gpus(stripes_folder: Path, tmp_path: Path) -> None:
    """With nccl where there are two or more."""
    num = torch.cuda.device_count()
    if num < 2:
        pytest.skip("one GPU")
    words = [
        sys.executable,
        "-m",
        "cspdeploy.cli.app",
        "train",
        "cspdarknet21",
        "--data",
        str(stripes_folder),
        "--size",
    ]
    options = ["32", "--epochs", "1", "--batch", str(8 * num), "--workers", str(num), "--models", str(tmp_path / "m")]
    done = subprocess.run([*words, *options], capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "m")
