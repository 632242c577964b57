"""The schemas that are published with the package. To make them anew: pytest --update-golden."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import cspdeploy.report
from cspdeploy.check.bench import BenchReport, BenchSettings, bench_subjects
from cspdeploy.check.blame import BlameReport, BlameRequest, blame
from cspdeploy.check.ladder import VerifySettings, verify_bundles
from cspdeploy.check.latency import LatencySettings
from cspdeploy.check.lint import LintReport, lint_file
from cspdeploy.check.loose_file import file_subject
from cspdeploy.core.codec import to_json
from cspdeploy.core.results import Regression, VerifyReport
from cspdeploy.core.schema import json_schema
from cspdeploy.core.targets import TARGETS
from cspdeploy.pipeline.reproduce import ReproduceReport

FOLDER = Path(cspdeploy.report.__file__).parent

# One row for each command whose JSON has a published schema: what it prints.
SCHEMAS: dict[str, type] = {
    "verify": VerifyReport, "check": LintReport, "reproduce": ReproduceReport, "bench": BenchReport,
    "blame": BlameReport,
}  # fmt: skip


def _read(command: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((FOLDER / f"{command}.schema.json").read_text(encoding="utf-8"))
    return schema


@pytest.mark.parametrize("command", SCHEMAS)
def test_the_published_schema_is_that_of_the_code(command: str, pytestconfig: pytest.Config) -> None:
    made = json_schema(SCHEMAS[command], title=f"cspdeploy {command} --json")
    jsonschema.Draft202012Validator.check_schema(made)
    text = json.dumps(made, indent=2) + "\n"
    path = FOLDER / f"{command}.schema.json"
    if pytestconfig.getoption("--update-golden"):
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"no {path}; to make it: pytest --update-golden"
    assert path.read_text(encoding="utf-8") == text, "if this is meant: pytest --update-golden, and raise the version"


def test_every_schema_of_the_package_is_checked() -> None:
    assert {path.name for path in FOLDER.glob("*.schema.json")} == {f"{command}.schema.json" for command in SCHEMAS}


@pytest.fixture(scope="module")
def report(tiny_bundle: Path) -> dict[str, Any]:
    """A real one, with latency, as `verify --json` prints it."""
    quick = LatencySettings(min_runs=5, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.0)
    settings = VerifySettings(runtimes=("ort-cpu", "torchscript-cpu"), latency=quick, isolate=False)
    made: dict[str, Any] = json.loads(json.dumps(to_json(verify_bundles([tiny_bundle], settings)), allow_nan=False))
    return made


def test_a_real_report_is_valid(report: dict[str, Any]) -> None:
    assert any(row["timing"] for row in report["rows"])
    jsonschema.validate(report, _read("verify"))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda data: data.update(verdict="maybe"), lambda data: data.update(schema_version=99),
        lambda data: data["rows"][0].update(verdict="fine"), lambda data: data["rows"][0].pop("rel_l2"),
        lambda data: data["rows"][0].update(rel_l2="tiny"), lambda data: data["rows"][1].update(extra=1),
    ],
)  # fmt: skip
def test_a_report_of_another_form_is_not(report: dict[str, Any], break_it: Callable[[dict[str, Any]], object]) -> None:
    changed = json.loads(json.dumps(report))
    break_it(changed)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed, _read("verify"))


def test_figures_that_are_no_numbers_are_valid(report: dict[str, Any]) -> None:
    lost = Regression(artifact="onnx", runtime="ort-cpu", verdict="worse", rel_l2=float("inf"))
    changed = report | {"regressions": [to_json(lost)]}
    assert changed["regressions"][0]["rel_l2"] == "inf"
    jsonschema.validate(changed, _read("verify"))


def test_a_real_check_is_valid(tiny_bundle: Path) -> None:
    made = to_json(lint_file(tiny_bundle / "tiny.fp16.onnx", TARGETS.values()))
    assert any(target["findings"] for target in made["targets"])
    jsonschema.validate(json.loads(json.dumps(made)), _read("check"))


def test_a_real_bench_is_valid(tiny_bundle: Path) -> None:
    quick = LatencySettings(min_runs=5, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.0)
    settings = BenchSettings(runtimes=("ort-cpu",), latency=quick, profile=True)
    subject = file_subject(tiny_bundle / "tiny.onnx", reference=False)
    made = to_json(bench_subjects([("tiny", [subject])], settings))
    assert made["rows"][0]["rounds_ms"]
    assert made["profiles"]
    jsonschema.validate(json.loads(json.dumps(made, allow_nan=False)), _read("bench"))


def test_a_real_blame_is_valid(tiny_bundle: Path) -> None:
    made = to_json(blame(BlameRequest(artifact=tiny_bundle / "tiny.fp16.onnx")))
    jsonschema.validate(json.loads(json.dumps(made, allow_nan=False)), _read("blame"))
