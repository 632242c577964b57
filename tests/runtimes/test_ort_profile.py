from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from cspdeploy.core.errors import InputError
from cspdeploy.runtimes.ort import CPU, OrtSession
from cspdeploy.runtimes.ort_profile import read_profile

TWICE = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[2] x) => (float[2] z) { y = Exp(x) z = Exp(y) }"""


def _run(ts: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": 9, "args": {}}


def _node(ts: int, dur: int, name: str = "conv", index: str = "0", **args: str) -> dict[str, Any]:
    args = {"op_name": "Conv", "provider": CPU, "node_index": index, **args}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": args}


def _write(path: Path, events: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(events))
    return path


def test_first_quarter_of_the_runs_does_not_count(tmp_path: Path) -> None:
    events = []
    for i, dur in enumerate([9000, 100, 200, 300]):
        events += [_node(1000 * i + 1, dur), _run(1000 * i)]
    (found,) = read_profile(_write(tmp_path / "p.json", events))
    assert (found.node, found.operator, found.provider) == ("conv", "Conv", CPU)
    assert (found.num_calls, found.ms) == (1, pytest.approx(0.2))


def test_nodes_without_a_name_are_told_apart_by_their_place(tmp_path: Path) -> None:
    events = [_run(0), _node(1, 10, name="", index="0"), _node(2, 30, name="", index="1")]
    assert [node.ms for node in read_profile(_write(tmp_path / "p.json", events))] == [0.01, 0.03]


def test_node_that_runs_twice_in_a_run(tmp_path: Path) -> None:
    events = [_run(0), _node(1, 10), _node(2, 30, activation_size="6", parameter_size="3", output_size="1")]
    (found,) = read_profile(_write(tmp_path / "p.json", events))
    assert (found.num_calls, found.ms) == (2, 0.04)


def test_moved_bytes_are_inputs_weights_and_outputs(tmp_path: Path) -> None:
    events = [_run(0), _node(1, 10, activation_size="6", parameter_size="3", output_size="1")]
    assert read_profile(_write(tmp_path / "p.json", events))[0].moved_bytes == 10


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", '[{"name": "model_run", "ts": 1}]', "\x00"])
def test_what_is_no_profile(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(InputError, match=r"p\.json"):
        read_profile(tmp_path / "p.json")


def test_real_profile_of_a_session(tmp_path: Path) -> None:
    session = OrtSession(onnx.parser.parse_model(TWICE).SerializeToString(), provider=CPU, profile=tmp_path)
    for _ in range(8):
        session.run({"x": np.ones(2, np.float32)})
    nodes = session.end_profile()
    assert [(node.operator, node.provider, node.num_calls) for node in nodes] == [("Exp", CPU, 1)] * 2
    assert all(node.ms > 0 and node.moved_bytes == 16 for node in nodes)
    assert list(tmp_path.iterdir()) == []


def test_session_without_a_profile() -> None:
    session = OrtSession(onnx.parser.parse_model(TWICE).SerializeToString(), provider=CPU)
    with pytest.raises(InputError, match="without a profile"):
        session.end_profile()
