"""Two workers against one: batches, gradients, figures, curves, resumed and failed runs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import cspdeploy
from cspdeploy.core.codec import to_json
from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.core.spec import ModelSpec
from cspdeploy.train.launch import _threads_each
from cspdeploy.train.share import Share
from cspdeploy.train.workers import NO_WORKERS, Workers, _own_gpu, environment_share, open_workers
from tests.train import workers_child as child

ROOT = Path(cspdeploy.__file__).parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CHILD = ["-m", "tests.train.workers_child"]
MAX_DIFFERENCE = 1e-4
"""Of losses and weights, relative to the largest: sums of float32 in another order. Measured on x86-64 with PyTorch
2.13: losses 1.7e-7 (classifier) and 1.2e-7 (detector), weights 1.3e-6 and 3.3e-6 after four steps, 1.1e-6 after the 16
of a resumed run. The slice of the first worker given to both makes 0.028 and 0.081 of the losses."""


@pytest.fixture(scope="module")
def folder(
    stripes_spec: ModelSpec, detector_spec: ModelSpec, boxes_folder: Path, make_stripes: Callable[..., LabelledImages],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """What the child processes read."""
    root = tmp_path_factory.mktemp("workers")
    for name, spec in (("classifier", stripes_spec), ("detector", detector_spec)):
        (root / f"{name}.json").write_text(json.dumps(to_json(spec)))
    arrays: dict[str, Any] = {}
    for seed, (split, num) in enumerate((("train", 64), ("test", 17))):  # batches of 5, 5, 5 and 2: ten and seven
        data = make_stripes(num, seed=seed)
        arrays |= {f"{split}_images": data.stored, f"{split}_classes": data.classes}
    np.savez(root / "stripes.npz", **arrays)
    shutil.copytree(boxes_folder, root / "boxes")
    return root


class Two(NamedTuple):
    found: dict[str, Any]
    code: int
    told: str


def _launch(folder: Path, what: str, *, torchrun: bool) -> Two:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *(TORCHRUN if torchrun else []), *CHILD, str(folder), what], env=environment,
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    answer = folder / f"{what}.pt"
    assert answer.is_file(), done.stderr
    return Two(dict(torch.load(answer, weights_only=True)), done.returncode, done.stderr)


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    """What two workers found. One start for all quick tests, and without torchrun: most of the time goes into that."""
    done = _launch(folder, "exact", torchrun=False)
    assert done.code == 0, done.told
    return done.found


@pytest.fixture(scope="module")
def killed(folder: Path) -> Two:
    """A curve that two workers found before the second one was killed, and how that ended."""
    return _launch(folder, "curve", torchrun=True)


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return child.compute(folder, NO_WORKERS)


def _difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest of all tensors, relative to the largest value of each."""
    assert found.keys() == expected.keys()
    return max(
        float((found[key] - value).abs().max() / value.abs().max().clamp(min=1e-3))
        for key, value in expected.items()
        if value.is_floating_point()
    )


@pytest.mark.parametrize("kind", ["", "box_"])
def test_gradients_of_two_workers_are_those_of_one(one: dict[str, Any], two: dict[str, Any], kind: str) -> None:
    """Batch norm by its running averages, float32: the same steps but for the order of sums."""
    assert two[f"{kind}losses"] == pytest.approx(one[f"{kind}losses"], rel=MAX_DIFFERENCE)
    assert _difference(two[f"{kind}weights"], one[f"{kind}weights"]) < MAX_DIFFERENCE


@pytest.mark.parametrize("kind", ["", "box_"])
def test_a_slice_given_twice_is_seen(one: dict[str, Any], two: dict[str, Any], kind: str) -> None:
    """By the limit of the test above, with room."""
    wrong = np.array(two["wrong"][f"{kind}losses"])
    assert np.abs(wrong / one[f"{kind}losses"] - 1).max() > 100 * MAX_DIFFERENCE


def test_figures_of_two_workers_are_exactly_those_of_one(two: dict[str, Any]) -> None:
    """Of the same weights: whole batches by turns, whole numbers added, boxes counted in one place."""
    together, alone = two["accuracy"]
    assert together == alone
    assert 0 < together[0] <= together[1] == 1.0
    together, alone = two["boxes"]
    assert together == alone
    assert together[0] > 0
    assert together[2] == 6


def test_a_run_of_two_goes_on_with_one(folder: Path, two: dict[str, Any], tmp_path: Path) -> None:
    """Interrupted after its first epoch; the end is that of one worker from the start."""
    straight = child.exact_run(folder, NO_WORKERS, checkpoint=tmp_path / "s.pt", resume=False, stop=False)
    assert two["exact"]["losses"] == pytest.approx(straight["losses"][:1], rel=MAX_DIFFERENCE)
    half = Path(shutil.copy(folder / "half.pt", tmp_path / "c.pt"))
    resumed = child.exact_run(folder, NO_WORKERS, checkpoint=half, resume=True, stop=False)
    assert resumed["losses"] == pytest.approx(straight["losses"], rel=MAX_DIFFERENCE)
    assert _difference(resumed["weights"], straight["weights"]) < MAX_DIFFERENCE
    assert [(place["from_epoch"], place["workers"]) for place in resumed["places"]] == [(1, 2), (2, 1)]
    assert straight["places"][0]["dtype"] == "float32"


@pytest.mark.slow
def test_curves_differ_by_less_than_those_of_two_seeds(folder: Path, killed: Two, tmp_path: Path) -> None:
    """As users train: batch norm has the statistics of a slice."""
    curve = killed.found["curve"]
    curves = np.array(
        [child.whole_run(folder, NO_WORKERS, checkpoint=tmp_path / f"{seed}.pt", seed=seed) for seed in (3, 4, 5)]
    )
    noise = curves.max(0) - curves.min(0)  # up to 0.13 in the fourth epoch; two workers differ by 0.07 there
    assert np.abs(np.array(curve) - curves[0]).max() <= noise.max()
    assert curve[-1] < 0.5 * curve[0]


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run(folder: Path, killed: Two) -> None:
    assert killed.code != 0
    assert "SIGKILL" in killed.told or "Signal 9" in killed.told
    assert not (folder / "died.pt").exists()


def test_shares_of_a_batch_make_it_up() -> None:
    shares = [Share(rank, 3) for rank in range(3)]
    assert [list(range(12))[share.of(12)] for share in shares] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [[index for index in range(7) if share.takes(index)] for share in shares] == [[0, 3, 6], [1, 4], [2, 5]]
    with pytest.raises(ValueError, match="10 images over 3 workers"):
        shares[0].of(10)
    with pytest.raises(ValueError, match="rank 3 of 3"):
        Share(3, 3)


@pytest.mark.parametrize(
    ("num", "batch", "num_images", "fix"),
    [(3, 128, 1000, "--batch 129"), (4, 6, 1000, "--batch 8"), (2, 3, 1000, "--batch 4"), (2, 2, 1000, "--batch 4"),
     (2, 64, 31, "--batch 30"), (4, 64, 7, "train on one worker")],
)  # fmt: skip
def test_a_batch_that_cannot_be_divided(num: int, batch: int, num_images: int, fix: str) -> None:
    workers = Workers(share=Share(0, num))
    with pytest.raises(InputError, match=f"over {num} workers") as caught:
        workers.require_batch(batch, num_images=num_images)
    assert caught.value.fix == fix
    if fix.startswith("--batch"):
        workers.require_batch(int(fix.split()[1]), num_images=num_images)


@pytest.mark.parametrize(("num", "batch", "num_images"), [(1, 7, 3), (2, 128, 60_000), (4, 8, 100), (2, 64, 32)])
def test_a_batch_that_can(num: int, batch: int, num_images: int) -> None:
    workers = Workers(share=Share(0, num))
    workers.require_batch(batch, num_images=num_images)
    assert workers.each(batch) * num == batch


def test_a_worker_has_an_image_at_a_time() -> None:
    assert Workers(share=Share(0, 4)).each(2) == 1


def test_the_environment_of_torchrun() -> None:
    whole = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert environment_share({}) is None
    assert environment_share({"WORLD_SIZE": "1"}) is None
    assert environment_share(whole) == Share(1, 2)
    alone = {**whole, "RANK": "0", "WORLD_SIZE": "1"}
    assert environment_share(alone) == Share(0, 1)
    del alone["LOCAL_RANK"]  # as a job of one replica on a cluster has it
    assert environment_share(alone) is None
    with pytest.raises(InputError, match="LOCAL_RANK is not set"):
        environment_share({**alone, "RANK": "1"})
    with pytest.raises(InputError, match="LOCAL_RANK, MASTER_PORT is not set") as caught:
        environment_share({**whole, "LOCAL_RANK": "", "MASTER_PORT": ""})
    assert "torchrun" in caught.value.fix
    with pytest.raises(InputError, match="RANK, LOCAL_RANK"):
        environment_share({"WORLD_SIZE": "2"})
    for wrong in ("2", "-1", "first"):
        with pytest.raises(InputError, match="expected 0 <= RANK < WORLD_SIZE"):
            environment_share({**whole, "RANK": wrong})


@pytest.mark.parametrize(
    ("given", "num_gpus", "index"),
    [({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 2, 1), ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, 8, 0),
     ({"LOCAL_RANK": "3"}, 4, 3), ({"LOCAL_RANK": "3"}, 1, 0)],
)  # fmt: skip
def test_each_worker_has_its_gpu(given: dict[str, str], num_gpus: int, index: int) -> None:
    """With torchrun; with srun, which tells no LOCAL_WORLD_SIZE and may show each its own alone."""
    assert _own_gpu({**given, "WORLD_SIZE": "16"}, num_gpus) == index


@pytest.mark.parametrize(
    ("given", "num_gpus", "message"),
    [({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, 1, "^2 workers on this machine, and 1 GPU: "),
     ({"LOCAL_RANK": "3"}, 2, "at least 4 workers on this machine, and 2 GPUs")],
)  # fmt: skip
def test_a_worker_without_a_gpu(given: dict[str, str], num_gpus: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        _own_gpu({**given, "WORLD_SIZE": "16"}, num_gpus)
    assert caught.value.fix.startswith(f"--workers {num_gpus},")


def test_the_threads_of_each_where_no_affinity_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS and Windows."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [_threads_each(num) for num in (2, 3, 16)] == ["4", "2", "1"]


def test_workers_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two, alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    with (
        pytest.raises(RuntimeUnavailableError, match=r"worker 0 of 2: joining at localhost:\d+") as caught,
        open_workers("cpu", rendezvous_s=0.2),
    ):
        pytest.fail("nobody else was there")
    assert "torchrun" in caught.value.fix


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(RuntimeUnavailableError, match="--device cuda: this PyTorch is built"), open_workers("cuda"):
        pytest.fail("there is no GPU")


def test_statistics_are_synchronised_on_gpus_with_small_slices() -> None:
    def on(device: str, num: int) -> Workers:
        return Workers(share=Share(0, num), device=torch.device(device))

    assert on("cuda:0", 2).synchronises_statistics(30)
    assert not on("cuda:0", 2).synchronises_statistics(32)
    assert not on("cuda:0", 1).synchronises_statistics(2)
    assert not on("cpu", 2).synchronises_statistics(2)
