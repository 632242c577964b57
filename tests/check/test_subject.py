from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cspdeploy.check.subject import Candidate, Subject, bundle_subject, onnx_sha256
from cspdeploy.core.bundle import file_sha256
from cspdeploy.core.errors import InputError, TamperedError
from cspdeploy.core.golden import read_golden
from cspdeploy.core.types import TensorInfo


def _candidate(*, batch: int | None = None, inputs: tuple[TensorInfo, ...] = ()) -> Candidate:
    return Candidate(
        artifact="onnx", format="onnx", precision="fp32", path=Path("x.onnx"), num_bytes=0, output_names=("y",),
        batch=batch, inputs=inputs,
    )  # fmt: skip


def _subject(num: int, *, one_call: bool = False) -> Subject:
    feeds = {"a": np.arange(num, dtype=np.float32)[:, None], "b": np.arange(num, dtype=np.int64)[:, None]}
    return Subject(
        name="x", title="x", task="features", labels=(), feeds=feeds, outputs_fp64={}, floors={},
        candidates=(_candidate(),), one_call=one_call,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "sizes", "counts"),
    [(1, [1] * 5, [1] * 5), (2, [2, 2, 2], [2, 2, 1]), (None, [5], [5]), (8, [8], [5])],
)
def test_calls_cover_all_inputs_once(batch: int | None, sizes: list[int], counts: list[int]) -> None:
    calls = list(_subject(5).calls(_candidate(batch=batch)))
    assert [len(feeds["a"]) for feeds, _ in calls] == sizes
    assert [count for _, count in calls] == counts
    seen = [feeds["b"][:count, 0].tolist() for feeds, count in calls]
    assert sum(seen, []) == [0, 1, 2, 3, 4]  # noqa: RUF017


def test_inputs_of_one_call_are_not_cut() -> None:
    """Their first axes need not be a batch: a table of 40 rows stays one."""
    subject = _subject(40, one_call=True)
    ((feeds, count),) = subject.calls(_candidate(batch=1))
    assert (len(feeds["a"]), count, subject.num_inputs) == (40, None, 1)
    assert len(subject.first_call(_candidate(batch=1))["a"]) == 40


@pytest.mark.parametrize(("batch", "size"), [(None, 1), (1, 1), (3, 3), (7, 7)])
def test_call_to_be_timed(batch: int | None, size: int) -> None:
    assert len(_subject(5).first_call(_candidate(batch=batch))["a"]) == size


def test_inputs_go_by_position_in_the_candidates_own_type() -> None:
    inputs = (
        TensorInfo(name="image", dtype="float16", shape=(1, 1)),
        TensorInfo(name="index", dtype="int64", shape=(1, 1)),
    )
    feeds = _candidate(inputs=inputs).named(_subject(2).feeds)
    assert {name: array.dtype.name for name, array in feeds.items()} == {"image": "float16", "index": "int64"}


def test_other_number_of_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match="argument"):
        _candidate(inputs=(TensorInfo(name="a", dtype="float32", shape=(1,)),)).named(_subject(2).feeds)


def test_subject_of_a_bundle(tiny_bundle: Path) -> None:
    subject = bundle_subject(tiny_bundle)
    golden = read_golden(tiny_bundle / "golden.npz")
    assert [item.artifact for item in subject.candidates] == ["eager", "torchscript", "onnx", "onnx-fp16"]
    np.testing.assert_array_equal(subject.feeds["input"], golden.x_NCHW)
    assert subject.floors["logits"] > 0
    assert (subject.synthetic, subject.untrained, subject.one_call, subject.task) == (False, False, False, "classify")


def test_hashes_come_first(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    (folder / "tiny.onnx").write_bytes(b"another file")
    with pytest.raises(TamperedError, match=r"tiny\.onnx"):
        bundle_subject(folder)


def test_hash_of_an_onnx_file_covers_its_weights_elsewhere(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (float[4] x) => (float[4] y) { y = Add(x, w) }'
    )
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "w"))
    onnx.save(model, tmp_path / "one.onnx")
    assert onnx_sha256(tmp_path / "one.onnx") == file_sha256(tmp_path / "one.onnx")
    onnx.save(model, tmp_path / "two.onnx", save_as_external_data=True, location="two.data", size_threshold=0)
    before = onnx_sha256(tmp_path / "two.onnx")
    (tmp_path / "two.data").write_bytes(np.full(4, 2.0, np.float32).tobytes())
    assert onnx_sha256(tmp_path / "two.onnx") != before


def test_hash_of_what_is_no_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"never one")
    with pytest.raises(InputError, match="not an ONNX file"):
        onnx_sha256(tmp_path / "no.onnx")
