"""One fault in a graph: blame names that node and no other, however the rest of the graph was rewritten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from cspdeploy.check.blame import BlameReport, BlameRequest, blame
from tests.check.blame.conftest import Edit, make_detector

Pair = Callable[[Edit], tuple[Path, Path]]


def _node(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if output in node.output)


def _weight(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], None]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def _set(model: onnx.ModelProto, output: str, name: str, value: object) -> None:
    node = _node(model, output)
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def _one_weight(model: onnx.ModelProto) -> None:
    def change(values: np.ndarray) -> None:
        values[3, 2, 1, 1] += 0.1

    _weight(model, "w2", change)


def _scaled(model: onnx.ModelProto) -> None:
    def change(values: np.ndarray) -> None:
        values *= 1.001

    _weight(model, "w4", change)


def _alpha(model: onnx.ModelProto) -> None:
    _set(model, "a4", "alpha", 0.2)


def _lost_activation(model: onnx.ModelProto) -> None:
    _set(model, "a7", "alpha", 1.0)


def _resize(model: onnx.ModelProto) -> None:
    _set(model, "a8", "mode", "linear")


def _pad(model: onnx.ModelProto) -> None:
    _set(model, "a10", "pads", [0, 0, 2, 2])


def _swapped(model: onnx.ModelProto) -> None:
    _node(model, "a9").input[:] = ["a4", "a8"]


FAULTS = {
    "one weight": (_one_weight, "/a3/Conv"), "weights x 1.001": (_scaled, "/a10/Conv"),
    "alpha": (_alpha, "/a4/LeakyRelu"), "lost activation": (_lost_activation, "/a7/LeakyRelu"),
    "resize mode": (_resize, "/a8/Resize"), "pad": (_pad, "/a10/Conv"), "concat order": (_swapped, "/a9/Concat"),
}  # fmt: skip
FACTS = {"one weight": "most at [3, 2, 1, 1]", "weights x 1.001": "1.001 times", "alpha": "alpha: 0.2 here, 0.1",
         "resize mode": "mode: linear here, nearest", "pad": "pads: [0, 0, 2, 2] here, [1, 1, 1, 1]"}  # fmt: skip


def _blame(artifact: Path, reference: Path, **options: object) -> BlameReport:
    return blame(BlameRequest(artifact=artifact, against=str(reference), **options))  # type: ignore[arg-type]


def _rename(model: onnx.ModelProto) -> None:
    """Every tensor and node a number, shifted so that equal names never mean the same tensor."""
    graph = model.graph
    outer = {value.name for value in (*graph.input, *graph.output)}
    names = [name for node in graph.node for name in node.output] + [tensor.name for tensor in graph.initializer]
    new = {name: f"a{(index * 7 + 3) % 50}" for index, name in enumerate(names) if name not in outer}
    for node in graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = new[tensor.name]


@pytest.mark.parametrize("fault", FAULTS)
def test_names_the_planted_node(write_pair: Pair, fault: str) -> None:
    edit, node = FAULTS[fault]
    reference, faulty = write_pair(edit)
    report = _blame(faulty, reference)
    assert report.blamed is not None
    assert (report.verdict, report.blamed.node) == ("introduced", node)
    assert report.blamed.also == ()
    assert any(FACTS.get(fault, "") in fact for fact in report.blamed.facts) or fault not in FACTS
    # what comes in is right, what goes out is not, and the node makes all of it
    assert all(item.rel_l2 is not None and item.rel_l2 <= (item.budget or 0) for item in report.blamed.inputs)
    output = report.blamed.outputs[0]
    assert output.rel_l2 is not None
    assert output.budget is not None
    assert output.rel_l2 > output.budget
    assert report.blamed.introduced == pytest.approx(output.rel_l2, rel=0.01)


@pytest.mark.parametrize("fault", FAULTS)
def test_names_it_among_renamed_tensors(write_pair: Pair, fault: str) -> None:
    edit, node = FAULTS[fault]

    def both(model: onnx.ModelProto) -> None:
        edit(model)
        _rename(model)

    reference, faulty = write_pair(both)
    report = _blame(faulty, reference)
    assert report.blamed is not None
    assert report.blamed.node == node


def test_blames_nothing_without_a_fault(write_pair: Pair) -> None:
    reference, same = write_pair(lambda model: None)
    report = _blame(same, reference)
    assert (report.verdict, report.blamed, len(report.worst)) == ("within", None, 3)
    assert report.num_compared == report.num_tensors


def test_blames_nothing_among_renamed_tensors(write_pair: Pair) -> None:
    reference, same = write_pair(_rename)
    assert _blame(same, reference).verdict == "within"


@pytest.mark.parametrize("fault", ["one weight", "concat order"])
def test_a_tiny_budget_of_memory_gives_the_same_answer(write_pair: Pair, fault: str) -> None:
    edit, _ = FAULTS[fault]
    reference, faulty = write_pair(edit)
    assert _blame(faulty, reference, budget_bytes=1) == _blame(faulty, reference)


def test_an_fp16_overflow(write_pair: Pair, tmp_path: Path) -> None:
    def huge(model: onnx.ModelProto) -> None:
        def change(values: np.ndarray) -> None:
            values[5] *= 3e5

        _weight(model, "w3", change)

    reference, _ = write_pair(huge)
    model = make_detector()
    huge(model)
    onnx.save(model, reference)
    half = tmp_path / "half.onnx"
    onnx.save(_to_half(model), half)
    report = _blame(half, reference, runtime="fp16-rounding")
    assert report.blamed is not None
    assert (report.blamed.node, report.verdict) == ("/a6/Conv", "introduced")
    assert any("FP16 holds 65504" in fact for fact in report.blamed.facts)
    assert report.blamed.outputs[0].num_bad > 0


def _to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Everything in FP16 but inputs and outputs."""
    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    for tensor in graph.initializer:
        if tensor.name != "twice":
            with np.errstate(over="ignore"):
                values = np.clip(numpy_helper.to_array(tensor), -60000, 60000).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    outputs = [value.name for value in graph.output]
    for node in graph.node:
        node.input[:] = ["image/fp16" if name == "image" else name for name in node.input]
        node.output[:] = [f"{name}/fp16" if name in outputs else name for name in node.output]
    graph.node.insert(0, helper.make_node("Cast", ["image"], ["image/fp16"], name="in", to=10))
    graph.node.extend(helper.make_node("Cast", [f"{n}/fp16"], [n], name=f"out {n}", to=1) for n in outputs)
    return half


def test_a_file_against_its_own_fp64(write_pair: Pair) -> None:
    _, file = write_pair(_one_weight)
    assert blame(BlameRequest(artifact=file, against="itself")).verdict == "within"
