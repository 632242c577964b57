from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import ModelSpec, Preprocess
from cspdeploy.export.onnx import export_onnx
from cspdeploy.pipeline.weights import make_untrained
from cspdeploy.quant.calibration import open_calibration
from cspdeploy.quant.int8 import Int8Settings, assemble
from cspdeploy.quant.observations_cache import ObservationsCache
from cspdeploy.quant.placements import PLACEMENTS
from cspdeploy.quant.plan import Floats, Grid, QuantPlan, fit_weight_grid
from cspdeploy.quant.prepare import prepare_float
from cspdeploy.quant.qat import QatNetwork
from cspdeploy.quant.qat_train import QatRecipe, fine_tune, score
from cspdeploy.quant.scheme import Scheme
from cspdeploy.quant.simulate import fake_quantise, planned_weights, simulate
from cspdeploy.quant.torch_graph import TorchGraph
from cspdeploy.quant.write import write_qdq
from cspdeploy.train.data import BatchLoader


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A small CSP network, its prepared graph, and a plan of post-training quantisation for one placement."""

    network: torch.nn.Module
    model: onnx.ModelProto
    graph: TorchGraph
    plan: QuantPlan


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Layers this small only wait for each other on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def make(tiny_spec: ModelSpec, photos: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """`make("ort-cpu")`; the same is made once."""
    work = tmp_path_factory.mktemp("qat")
    _, network = make_untrained(tiny_spec)
    _spread_logits(network.eval(), open_calibration(photos, tiny_spec.preprocess).batches(48))
    export_onnx(
        network, torch.zeros(1, 3, 32, 32), work / "float.onnx", names=("logits",), opset=18,
        dynamic_batch=True,
    )  # fmt: skip
    known: dict[str, Made] = {}

    def one(name: str) -> Made:
        if name not in known:
            placement = PLACEMENTS[name]
            model = prepare_float(onnx.load(work / "float.onnx"), placement=placement)
            assembly = assemble(
                model, open_calibration(photos, tiny_spec.preprocess), placement=placement, settings=Int8Settings(),
                cache=ObservationsCache(work / "cache"), progress=lambda what, done, total: None,
            )  # fmt: skip
            plan = assembly.plan(Scheme(method="minmax", exponent=0.75))
            known[name] = Made(network=network, model=model, graph=assembly.graph, plan=plan)
        return known[name]

    return one


@torch.no_grad()
def _spread_logits(network: torch.nn.Module, batches: Iterator[Floats]) -> None:
    """Mean 0 and variance 1 over the images: those of random weights are the same for every image."""
    logits = torch.cat([network(torch.from_numpy(x)) for x in batches])
    head: Any = network.get_submodule("head.fc")
    head.weight /= logits.std(0)[:, None]
    head.bias.copy_((head.bias - logits.mean(0)) / logits.std(0))


@pytest.fixture(scope="module")
def made(make: Callable[[str], Made]) -> Made:
    return make("ort-cpu")


@pytest.fixture(scope="module")
def x_NCHW(tiny_spec: ModelSpec, photos: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(next(open_calibration(photos, tiny_spec.preprocess).batches(24)))


def _moved(made: Made) -> QatNetwork:
    """As after training: every parameter elsewhere, some beyond the ends of their grids."""
    network = QatNetwork(made.graph, made.plan).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for steps in network.steps.parameters():
            steps.add_(torch.randn(steps.shape, generator=generator) * 2)
    network.project()
    return network


def _run(network: torch.nn.Module, x_NCHW: torch.Tensor) -> Floats:
    with torch.inference_mode():
        found: Floats = network(x_NCHW).numpy()
    return found


# --- what the module computes ---


def test_start_is_post_training_quantisation_to_the_bit(made: Made, x_NCHW: torch.Tensor) -> None:
    network = QatNetwork(made.graph, made.plan).eval()
    expected = simulate(made.graph, made.plan, [x_NCHW.numpy()])["logits"]
    assert np.array_equal(_run(network, x_NCHW), expected)


@pytest.mark.parametrize("placement", ["ort-cpu", "ort-cpu-avx2", "openvino"])
def test_its_plan_computes_what_it_does_to_the_bit(
    make: Callable[[str], Made], x_NCHW: torch.Tensor, placement: str
) -> None:
    made = make(placement)
    network = _moved(made)
    plan = network.plan()
    got = simulate(made.graph, plan, [x_NCHW.numpy()])["logits"]
    assert np.array_equal(_run(network, x_NCHW), got)
    assert not np.array_equal(got, simulate(made.graph, made.plan, [x_NCHW.numpy()])["logits"])
    assert plan.grids is made.plan.grids
    limits = {name: np.abs(whole.astype(int)).max() for name, whole in plan.integers.items()}
    assert limits
    assert all(limit == made.plan.weights[name].limit for name, limit in limits.items())


@pytest.mark.parametrize("placement", ["ort-cpu", "arm64"])
def test_file_on_the_engine_agrees_to_one_step(
    make: Callable[[str], Made], x_NCHW: torch.Tensor, tmp_path: Path, placement: str
) -> None:
    """On every tensor with a grid, from the same inputs, with the engine's own fusions; and to the last bits in what
    comes out, where no step differs.

    The engine rounds sums of integers, PyTorch those of floats: a value half way between two steps may go either way,
    and an untrained network makes much of one step.
    """
    made = make(placement)
    network = _moved(made)
    found = _on_engine(made, network.plan(), x_NCHW, tmp_path / "int8.onnx")
    apart: list[Floats] = []

    def compare(name: str, grid: Grid, x: torch.Tensor) -> torch.Tensor:
        engine = torch.from_numpy(found[f"{name}/q"].astype(np.float32)) - grid.zero_point
        apart.append(np.abs((fake_quantise(x, grid) / grid.scale - engine).round().numpy()).reshape(len(x), -1))
        return engine * grid.scale  # so that no difference is met twice

    with torch.inference_mode():
        eager = network(x_NCHW).numpy()
        weights = planned_weights(made.graph, network.plan())
        changes = {name: partial(compare, name, grid) for name, grid in made.plan.grids.items()}
        made.graph.run(x_NCHW, weights=weights, changes=changes)
    steps_NV = np.concatenate(apart, axis=1)
    assert len(apart) == len(made.plan.grids)
    assert steps_NV.max() <= 1
    assert np.count_nonzero(steps_NV) <= 1e-4 * steps_NV.size  # measured: 3 of 2,749,440
    alike = ~steps_NV.any(axis=1)
    assert alike.mean() > 0.5
    assert np.abs(found["logits"] - eager)[alike].max() <= 1e-5 * np.ptp(eager)
    assert np.array_equal(found["logits"].argmax(1)[alike], eager.argmax(1)[alike])


def _on_engine(made: Made, plan: QuantPlan, x_NCHW: torch.Tensor, path: Path) -> dict[str, np.ndarray]:
    """Outputs of the file, and the integers of every tensor with a grid: `t/q` of tensor t."""
    model = write_qdq(made.model, plan)
    kinds = {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8}
    for name, grid in plan.grids.items():
        model.graph.output.append(helper.make_tensor_value_info(f"{name}/q", kinds[grid.dtype], None))
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {"input": x_NCHW.numpy()}), strict=True))


def test_file_with_one_weight_changed_does_not_agree(made: Made, x_NCHW: torch.Tensor) -> None:
    """So that the comparison above could fail."""
    network = _moved(made)
    plan = network.plan()
    name = next(iter(plan.integers))
    other = {**plan.integers, name: np.negative(plan.integers[name])}
    got = simulate(made.graph, dataclasses.replace(plan, integers=other), [x_NCHW.numpy()])["logits"]
    eager = _run(network, x_NCHW)
    assert np.abs(got - eager).max() > np.ptp(eager) / 255


# --- gradients ---


def test_gradient_passes_inside_the_grid_alone() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 18]>
        g (float[1, 1, 1, 4] x) => (float[1, 1, 1, 4] y)
        <float[1, 1, 1, 1] w = {1.0}, float[1] b = {0.0}> { y = Conv(x, w, b) }
    """)
    grid = Grid(scale=0.5, zero_point=128, dtype="uint8")
    weights = {"w": fit_weight_grid(np.ones((1, 1, 1, 1), np.float32))}
    network = QatNetwork(TorchGraph(model), QuantPlan(grids={"x": grid}, weights=weights))
    x_NCHW = torch.tensor([-70.0, -64.0, 0.3, 63.6]).reshape(1, 1, 1, 4).requires_grad_()
    y_NCHW = network(x_NCHW)
    assert y_NCHW.flatten().tolist() == pytest.approx([-64.0, -64.0, 0.5, 63.5])
    y_NCHW.sum().backward()
    assert x_NCHW.grad is not None
    assert x_NCHW.grad.flatten().tolist() == pytest.approx([0.0, 1.0, 1.0, 0.0])


@pytest.mark.parametrize("placement", ["ort-cpu", "openvino"])
def test_every_parameter_learns(make: Callable[[str], Made], x_NCHW: torch.Tensor, placement: str) -> None:
    made = make(placement)
    network = QatNetwork(made.graph, made.plan)
    network(x_NCHW).square().sum().backward()
    assert len(network.names) == 2 * sum(node.operator in ("Conv", "Gemm") for node in made.graph.nodes)
    for name, steps in zip(network.names, network.steps, strict=True):
        assert steps.grad is not None, name
        assert steps.grad.abs().max() > 0, name


def test_weights_that_were_rounded_otherwise_start_there(made: Made, x_NCHW: torch.Tensor) -> None:
    name = next(iter(made.plan.weights))
    grid, value = made.plan.weights[name], made.plan.values[name]
    up = np.clip(np.ceil(grid.quantise(value) + 0.4), -127, 127).astype(np.int8)
    plan = dataclasses.replace(made.plan, integers={name: up})
    network = QatNetwork(made.graph, plan).eval()
    assert np.array_equal(network.plan().integers[name], up)
    assert np.array_equal(_run(network, x_NCHW), simulate(made.graph, plan, [x_NCHW.numpy()])["logits"])


def test_project_brings_weights_back(made: Made) -> None:
    network = QatNetwork(made.graph, made.plan)
    parameters = dict(zip(network.names, network.steps, strict=True))
    with torch.no_grad():
        for steps in parameters.values():
            steps.add_(1000)
    before = {name: steps.detach().clone() for name, steps in parameters.items()}
    network.project()
    assert made.plan.weights.keys() < parameters.keys()
    for name, steps in parameters.items():
        if name in made.plan.weights:
            assert float(steps.detach().max()) == made.plan.weights[name].limit
        else:
            assert torch.equal(steps, before[name])


# --- training ---


@pytest.fixture(scope="module")
def loaders(photos: np.ndarray, tiny_contract: Preprocess) -> tuple[BatchLoader, BatchLoader]:
    """64 images to train on and 16 to test on."""
    labels = tuple(f"label {i}" for i in range(10))
    parts = (photos[:64], photos[64:80])
    sets = [LabelledImages(name="p", labels=labels, classes=np.arange(len(part)) % 10, stored=part) for part in parts]
    return BatchLoader(sets[0], tiny_contract, batch=8), BatchLoader(sets[1], tiny_contract, batch=8)


@pytest.fixture(scope="module")
def coarse(made: Made) -> Made:
    """With weights of 4 bits, so that there is much to repair."""
    weights = {
        name: fit_weight_grid(made.plan.values[name], axis=grid.axis, limit=7)
        for name, grid in made.plan.weights.items()
    }
    return dataclasses.replace(made, plan=dataclasses.replace(made.plan, weights=weights))


RECIPE = QatRecipe(epochs=2, batch=8, max_learning_rate=0.05, steps_per_epoch=5, ema_decay=0.5)
Trained = tuple[QatNetwork, list[float]]


def _train(
    coarse: Made, loaders: tuple[BatchLoader, BatchLoader], checkpoint: Path, *, resume: bool = False,
    recipe: QatRecipe = RECIPE, identity: str = "a", stop_after: int | None = None,
) -> Trained:  # fmt: skip
    def progress(what: str, done: int, total: int) -> None:
        if stop_after is not None and what.startswith(f"epoch {stop_after + 1}/"):
            raise KeyboardInterrupt

    network, curve = fine_tune(
        coarse.graph, coarse.plan, coarse.network, recipe, training=loaders[0], testing=loaders[1],
        checkpoint=checkpoint, identity={"data": identity}, resume=resume, progress=progress,
    )  # fmt: skip
    return network, [record.train_loss for record in curve]


@pytest.fixture(scope="module")
def straight(
    coarse: Made, loaders: tuple[BatchLoader, BatchLoader], tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    return _train(coarse, loaders, tmp_path_factory.mktemp("straight") / "c.pt")


def test_training_lowers_the_loss_on_images_it_never_saw(
    coarse: Made, loaders: tuple[BatchLoader, BatchLoader], straight: Trained
) -> None:
    recipe = dataclasses.replace(RECIPE, distillation=1.0)
    before = QatNetwork(coarse.graph, coarse.plan).eval()
    was, now = (score(one, coarse.network, loaders[1].in_order(), recipe) for one in (before, straight[0]))
    assert now.loss < 0.8 * was.loss
    assert (now.num_images, len(straight[1])) == (16, 2)


def test_score_of_the_teacher_itself_is_whole(coarse: Made, loaders: tuple[BatchLoader, BatchLoader]) -> None:
    recipe = dataclasses.replace(RECIPE, distillation=1.0)
    found = score(coarse.network, coarse.network, loaders[1].in_order(), recipe)
    assert (found.agreement, round(found.loss, 6)) == (1.0, 0.0)
    assert found.top5 >= found.top1


def test_interrupted_and_resumed_run_equals_the_straight_one(
    coarse: Made, loaders: tuple[BatchLoader, BatchLoader], straight: Trained, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        _train(coarse, loaders, tmp_path / "c.pt", stop_after=1)
    network, losses = _train(coarse, loaders, tmp_path / "c.pt", resume=True)
    assert losses == straight[1]
    assert all(torch.equal(a, b) for a, b in zip(network.steps, straight[0].steps, strict=True))
    for change in ({"recipe": dataclasses.replace(RECIPE, max_learning_rate=0.1)}, {"identity": "b"}):
        with pytest.raises(InputError, match=r"another recipe|other data"):
            _train(coarse, loaders, tmp_path / "c.pt", resume=True, **change)
