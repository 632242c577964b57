from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cspdeploy.core.results import ParityRow
from cspdeploy.core.timings import RecordedTiming, Timings, read_timings, timings_of, write_timings

TIMINGS = Timings(
    machine="An Abacus", rows=(RecordedTiming(artifact="onnx", runtime="ort-cpu", p50_ms=3.5, threads=2),)
)
ROW = ParityRow(bundle="b", artifact="onnx", runtime="ort-cpu", verdict="pass", p50_ms=3.5)


def test_round_trip(tmp_path: Path) -> None:
    write_timings(tmp_path, TIMINGS)
    assert read_timings(tmp_path) == (TIMINGS, "")
    assert TIMINGS.find("onnx", "ort-cpu") == TIMINGS.rows[0]
    assert TIMINGS.find("onnx", "openvino") is None
    assert json.loads((tmp_path / "timings.json").read_text()) == {
        "schema_version": 1, "machine": "An Abacus",
        "rows": [{"artifact": "onnx", "runtime": "ort-cpu", "p50_ms": 3.5, "batch": 1, "threads": 2, "rel_l2": None}],
    }  # fmt: skip


def test_no_timings_take_the_old_ones_away(tmp_path: Path) -> None:
    write_timings(tmp_path, TIMINGS)
    write_timings(tmp_path, None)
    write_timings(tmp_path, None)
    assert read_timings(tmp_path) == (None, "")


def test_what_verify_measured() -> None:
    untimed = dataclasses.replace(ROW, artifact="onnx-fp16", p50_ms=None)
    failed = dataclasses.replace(ROW, artifact="onnx-int8", verdict="numeric")
    environment = {"cpu": "An Abacus", "cpus": "2"}
    found = timings_of([ROW, untimed, failed], environment=environment, batches={"onnx": 4})
    assert found is not None
    assert found == dataclasses.replace(TIMINGS, rows=(dataclasses.replace(TIMINGS.rows[0], batch=4),))
    assert timings_of([untimed], environment=environment, batches={}) is None
    compared = dataclasses.replace(untimed, rel_l2=0.02)
    found = timings_of([compared], environment=environment, batches={})
    assert found is not None
    assert (found.rows[0].p50_ms, found.rows[0].rel_l2) == (None, 0.02)


def test_timings_without_errors_are_read(tmp_path: Path) -> None:
    """As an earlier version wrote them."""
    row = {"artifact": "onnx", "runtime": "ort-cpu", "p50_ms": 3.5, "batch": 1, "threads": 2}
    (tmp_path / "timings.json").write_text(json.dumps({"schema_version": 1, "machine": "An Abacus", "rows": [row]}))
    assert read_timings(tmp_path) == (TIMINGS, "")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"schema_version": 2, "machine": "", "rows": []}', "[" * 100_000, "\xff", " " * (1 << 21),
     '{"schema_version": 1, "machine": "", "rows": [{"artifact": "a", "runtime": "b", "p50_ms": 0, "threads": 1}]}',
     '{"schema_version": 1, "machine": "", "rows": [{"artifact": "a", "runtime": "b", "p50_ms": "nan", "threads": 1}]}',
     '{"schema_version": 1, "machine": "", "rows": [{"artifact": "a", "runtime": "b", "rel_l2": -1.0, "threads": 1}]}',
     '{"schema_version": 1, "machine": "", "rows": [], "more": 1}'],
)  # fmt: skip
def test_broken_file_is_a_remark_of_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "timings.json").write_text(text, encoding="latin-1")
    found, remark = read_timings(tmp_path)
    assert found is None
    assert remark.startswith("timings.json")
    assert "\n" not in remark


def test_link_and_folder(tmp_path: Path) -> None:
    (tmp_path / "timings.json").symlink_to("/etc/passwd")
    assert read_timings(tmp_path)[1] == "timings.json: is a link, expected a file"
    (tmp_path / "timings.json").unlink()
    (tmp_path / "timings.json").mkdir()
    assert read_timings(tmp_path)[0] is None


def test_name_of_a_machine_is_harmless(tmp_path: Path) -> None:
    write_timings(tmp_path, dataclasses.replace(TIMINGS, machine="\x1b[2J" + "a" * 999))
    found, _ = read_timings(tmp_path)
    assert found is not None
    assert found.machine.startswith("?[2J")
    assert len(found.machine) == 200
