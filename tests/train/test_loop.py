from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import ModelSpec, Preprocess
from cspdeploy.nets.weights import read_checkpoint
from cspdeploy.train.data import BatchLoader
from cspdeploy.train.loop import EpochRecord, Recipe, train, write_curve
from cspdeploy.train.metrics import measure_accuracy

RECIPE = Recipe(epochs=2, batch=8, max_learning_rate=0.1, seed=3)

Loaders = dict[str, BatchLoader]
MakeStripes = Callable[..., LabelledImages]


class Run(NamedTuple):
    model: nn.Module
    curve: list[EpochRecord]
    checkpoint: Path
    told: list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def loaders(make_stripes: MakeStripes, tiny_contract: Preprocess) -> Loaders:
    return {
        "training": BatchLoader(make_stripes(64, seed=0), tiny_contract, batch=8),
        "testing": BatchLoader(make_stripes(32, seed=1), tiny_contract, batch=16),
    }


@pytest.fixture(scope="module")
def straight(stripes_spec: ModelSpec, loaders: Loaders, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs without a break."""
    told: list[tuple[str, int, int]] = []
    checkpoint = tmp_path_factory.mktemp("run") / "c.pt"
    model, curve, _ = train(
        stripes_spec, RECIPE, **loaders, checkpoint=checkpoint, progress=lambda *args: told.append(args)
    )
    return Run(model, curve, checkpoint, told)


@pytest.fixture(scope="module")
def half_way(stripes_spec: ModelSpec, loaders: Loaders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that was interrupted in its second epoch."""

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("epoch 2/") and done == 2:
            raise KeyboardInterrupt

    checkpoint = tmp_path_factory.mktemp("run") / "deep" / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        train(stripes_spec, RECIPE, **loaders, checkpoint=checkpoint, progress=interrupt)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["c.pt"]
    return checkpoint


def _assert_same_run(model: nn.Module, curve: list[EpochRecord], expected: Run) -> None:
    """Bit for bit, but for the time that it took."""
    untimed, expected_untimed = (
        [dataclasses.replace(record, seconds=0.0) for record in records] for records in (curve, expected.curve)
    )
    assert untimed == expected_untimed
    weights = expected.model.state_dict()
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])] == []


def test_loss_falls_and_the_classes_are_learnt(loaders: Loaders, straight: Run) -> None:
    first, last = straight.curve
    assert (first.epoch, last.epoch) == (1, 2)
    assert last.train_loss < 0.75 * first.train_loss
    assert last.test_top1 >= 0.9
    assert last.test_top5 == 1.0
    assert not straight.model.training
    assert measure_accuracy(straight.model, loaders["testing"].in_order())[0] >= 0.9


def test_the_average_of_the_weights_is_kept(straight: Run) -> None:
    state = read_checkpoint(straight.checkpoint)
    assert torch.equal(straight.model.state_dict()["head.fc.weight"], state["average"]["head.fc.weight"])
    assert not torch.equal(state["model"]["head.fc.weight"], state["average"]["head.fc.weight"])


def test_progress_tells_every_step(straight: Run) -> None:
    epoch = [(step, 8) for step in range(1, 9)] + [(1, 1)]
    assert [(done, total) for _, done, total in straight.told] == 2 * epoch
    assert "top-1" in straight.told[-1][0]


def test_interrupted_and_resumed_run_equals_the_straight_one(
    stripes_spec: ModelSpec, loaders: Loaders, half_way: Path, straight: Run, tmp_path: Path
) -> None:
    checkpoint = shutil.copy(half_way, tmp_path / "c.pt")
    model, curve, _ = train(stripes_spec, RECIPE, **loaders, checkpoint=checkpoint, resume=True)
    _assert_same_run(model, curve, straight)


def test_finished_run_resumes_to_its_own_result(stripes_spec: ModelSpec, loaders: Loaders, straight: Run) -> None:
    model, curve, _ = train(stripes_spec, RECIPE, **loaders, checkpoint=straight.checkpoint, resume=True)
    _assert_same_run(model, curve, straight)


def test_resume_with_another_recipe_is_refused(stripes_spec: ModelSpec, loaders: Loaders, half_way: Path) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=3, max_learning_rate=0.01)
    with pytest.raises(InputError, match=r"another recipe \(epochs, max_learning_rate differ\)"):
        train(stripes_spec, recipe, **loaders, checkpoint=half_way, resume=True)


def test_resume_of_another_network_is_refused(tiny_spec: ModelSpec, loaders: Loaders, half_way: Path) -> None:
    with pytest.raises(InputError):
        train(tiny_spec, RECIPE, **loaders, checkpoint=half_way, resume=True)  # 10 classes, not 2


def test_resume_on_other_data_is_refused(
    stripes_spec: ModelSpec, loaders: Loaders, half_way: Path, tiny_contract: Preprocess,
    make_stripes: MakeStripes,
) -> None:  # fmt: skip
    """Else the learning rate would follow a schedule of another length."""
    fewer = BatchLoader(make_stripes(32, seed=0), tiny_contract, batch=8)
    with pytest.raises(InputError):
        train(stripes_spec, RECIPE, training=fewer, testing=loaders["testing"], checkpoint=half_way, resume=True)


@pytest.mark.parametrize("content", [None, b"", b"garbage", {"head.fc.weight": torch.zeros(2)}])
def test_resume_without_a_checkpoint(stripes_spec: ModelSpec, loaders: Loaders, tmp_path: Path, content: Any) -> None:
    path = tmp_path / "c.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=r"c\.pt"):
        train(stripes_spec, RECIPE, **loaders, checkpoint=path, resume=True)


def test_loss_that_is_not_finite_stops_the_run(stripes_spec: ModelSpec, loaders: Loaders, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, max_learning_rate=1e38)
    with pytest.raises(InputError, match=r"loss is \S+ in epoch 1, step \d+") as caught:
        train(stripes_spec, recipe, **loaders, checkpoint=tmp_path / "c.pt")
    assert "--learning-rate" in caught.value.fix
    assert list(tmp_path.iterdir()) == []  # no broken weights to resume from


@pytest.mark.parametrize("num_batches", [1, 2, 3, 4, 5])
def test_shortest_runs(
    stripes_spec: ModelSpec, tiny_contract: Preprocess, make_stripes: MakeStripes, tmp_path: Path,
    num_batches: int,
) -> None:  # fmt: skip
    """Where a quarter of the steps, the warm-up, is about one."""
    loader = BatchLoader(make_stripes(2 * num_batches, seed=0), tiny_contract, batch=2)
    recipe = dataclasses.replace(RECIPE, epochs=1, batch=2)
    _, curve, _ = train(stripes_spec, recipe, training=loader, testing=loader, checkpoint=tmp_path / "c.pt")
    assert len(curve) == 1


def test_curve_file_holds_recipe_and_epochs(tmp_path: Path, straight: Run) -> None:
    write_curve(tmp_path / "train.json", RECIPE, straight.curve, num_images=40)
    data = json.loads((tmp_path / "train.json").read_text())
    assert data["recipe"] == dataclasses.asdict(RECIPE)
    assert data["num_images"] == 40
    assert [row["epoch"] for row in data["epochs"]] == [1, 2]
    assert all(row["train_loss"] > 0 and 0 <= row["test_top1"] <= 1 for row in data["epochs"])
