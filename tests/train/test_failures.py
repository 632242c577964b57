from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.errors import DeviceMemoryError, RuntimeUnavailableError
from cspdeploy.core.spec import ModelSpec
from cspdeploy.train.data import BatchLoader
from cspdeploy.train.failures import explained, told
from cspdeploy.train.loop import Recipe, _NetworkTrainer, run_epochs
from cspdeploy.train.share import Share
from cspdeploy.train.workers import NO_WORKERS, Workers

TWO = Workers(share=Share(0, 2))
GPU_FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB.\n"
    "See documentation for Memory Management"
)


class Hungry(_NetworkTrainer):
    """From its second epoch on a step asks for more memory than there is."""

    def loss(self, x_NCHW: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        if self.curve:
            torch.empty(1 << 60)
        return super().loss(x_NCHW, classes)


def test_no_memory_left_is_one_line_and_the_checkpoint_is_kept(
    stripes_spec: ModelSpec, make_stripes: Callable[..., LabelledImages], tmp_path: Path
) -> None:
    """PyTorch's own error, of the CPU's allocator."""
    loader = BatchLoader(make_stripes(8, seed=0), stripes_spec.preprocess, batch=8)
    recipe = Recipe(epochs=2, batch=8)
    with pytest.raises(
        DeviceMemoryError, match="no memory left on cpu for a step of 8 images; finished epochs"
    ) as caught:
        run_epochs(
            Hungry(stripes_spec, recipe, 1), training=loader, testing=loader, checkpoint=tmp_path / "c.pt",
            resume=False, progress=lambda what, done, total: None,
        )  # fmt: skip
    assert "\n" not in caught.value.message
    assert caught.value.fix.startswith("--batch 4 ")
    cause = caught.value.__context__
    assert cause is not None
    assert cause.__traceback__ is None  # it would hold the tensors of the step
    resumed = _NetworkTrainer(stripes_spec, recipe, 1)
    run_epochs(
        resumed, training=loader, testing=loader, checkpoint=tmp_path / "c.pt", resume=True,
        progress=lambda what, done, total: None,
    )  # fmt: skip
    assert [record.epoch for record in resumed.curve] == [1, 2]


def test_nothing_holds_the_run_that_found_no_memory(
    stripes_spec: ModelSpec, make_stripes: Callable[..., LabelledImages], tmp_path: Path
) -> None:
    """Once the failure was told, without waiting for the garbage collector: the next run needs the memory."""
    loader = BatchLoader(make_stripes(8, seed=0), stripes_spec.preprocess, batch=8)

    def fail() -> weakref.ref[object]:
        trainer = Hungry(stripes_spec, Recipe(epochs=2, batch=8), 1)
        with pytest.raises(DeviceMemoryError):
            run_epochs(
                trainer, training=loader, testing=loader, checkpoint=tmp_path / "c.pt", resume=False,
                progress=lambda what, done, total: None,
            )  # fmt: skip
        return weakref.ref(trainer)

    gc.collect()
    gc.disable()
    try:
        assert fail()() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("num", "batch", "kept", "fix"),
    [(1, 128, False, "--batch 64"), (4, 20, False, "--batch 8"), (2, 4, False, "a smaller --size"),
     (2, 128, True, "--batch 64 --overwrite starts anew; with the same batch on more workers, --resume goes on")],
)  # fmt: skip
def test_the_batch_that_is_suggested(num: int, batch: int, kept: bool, fix: str) -> None:
    failure = told(GPU_FULL, workers=Workers(share=Share(0, num)), batch=batch, kept=kept)
    assert isinstance(failure, DeviceMemoryError)
    assert failure.fix == fix
    assert "CUDA out of memory. Tried to allocate 2.00 GiB" in failure.message
    assert "documentation" not in failure.message


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv",
        "NCCL communicator was aborted on rank 0.",
    ],
)
def test_a_worker_that_is_gone_is_one_line(text: str) -> None:
    failure = told(RuntimeError(f"{text}\nmore"), workers=TWO, batch=8, kept=True)
    assert isinstance(failure, RuntimeUnavailableError)
    assert "worker 0 of 2: training: another worker ended" in failure.message
    assert "more" not in failure.message
    assert "--resume" in failure.fix
    assert told(RuntimeError(text), workers=NO_WORKERS, batch=8, kept=True) is None


def test_a_fault_of_the_program_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"), explained(TWO, batch=8, kept=False):
        raise RuntimeError("size mismatch")
