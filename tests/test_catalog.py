"""The closed tables are complete: whatever a bundle can hold has a recipe, a limit, a runtime, a budget and a word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import typer

import cspdeploy
from cspdeploy.cli.app import app
from cspdeploy.core.bundle import read_manifest
from cspdeploy.core.catalog import (
    ACCURACY_BUDGET,
    ARTIFACT_KINDS,
    EAGER,
    FP32_FLOOR,
    FRONTEND_KINDS,
    INT8_KINDS,
    ArtifactFormat,
    ArtifactKind,
    Int8Mode,
    Precision,
    artifact_file,
)
from cspdeploy.core.tolerance import tolerance_for
from cspdeploy.export import simplify
from cspdeploy.pipeline.also_step import ALSO
from cspdeploy.pipeline.int8_step import Int8Request
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.runtimes import all_runtimes

README = Path(cspdeploy.__file__).parents[1] / "README.md"

every_kind = pytest.mark.parametrize("kind", ARTIFACT_KINDS.values(), ids=list(ARTIFACT_KINDS))


@pytest.fixture(scope="module")
def weights_bundle(photo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of "tiny" with weights in 8 bits: a bundle holds one sort of INT8."""
    output = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simplify, "_CHILD", ["false"])
        request = ExportRequest(model="tiny", models=photo_models, output=output, int8=Int8Request(mode="weights"))
        return Path(export_bundle(request).folder)


@every_kind
def test_kind_is_made_by_an_export_with_every_precision(
    tiny_u8_bundle: Path, tiny_also_bundle: Path, weights_bundle: Path, kind: ArtifactKind
) -> None:
    folder = weights_bundle if kind.weights_only else tiny_also_bundle if kind.also else tiny_u8_bundle
    artifacts = {artifact.kind: artifact for artifact in read_manifest(folder).artifacts}
    artifact = artifacts[kind.name]
    assert (artifact.format, artifact.precision) == (kind.format, kind.precision)
    assert artifact.file == artifact_file("tiny", kind.name) == f"tiny{kind.suffix}"
    assert (folder / artifact.file).stat().st_size == artifact.num_bytes
    assert artifact.steps


def test_export_makes_nothing_else_and_keeps_the_order_of_the_ladder(
    tiny_int8_bundle: Path, tiny_u8_bundle: Path
) -> None:
    expected = [name for name, kind in ARTIFACT_KINDS.items() if not (kind.weights_only or kind.also)]
    assert [artifact.kind for artifact in read_manifest(tiny_u8_bundle).artifacts] == expected
    floats = [name for name in expected if not ARTIFACT_KINDS[name].frontend_of]
    assert [artifact.kind for artifact in read_manifest(tiny_int8_bundle).artifacts] == floats


def test_every_further_form_makes_a_kind() -> None:
    assert {kind.also for kind in ARTIFACT_KINDS.values()} == {"", *ALSO}


def test_kinds_with_preprocessing_in_the_graph_are_of_those_without() -> None:
    for name, kind in ARTIFACT_KINDS.items():
        if kind.frontend_of:
            without = ARTIFACT_KINDS[kind.frontend_of]
            assert (kind.format, kind.precision) == (without.format, without.precision)
            assert FRONTEND_KINDS[without.name] == name
            assert kind.suffix == without.suffix.removesuffix(".onnx") + ".u8.onnx"


def test_every_mode_of_int8_makes_a_kind() -> None:
    assert set(INT8_KINDS) == set(get_args(Int8Mode))
    assert set(INT8_KINDS.values()) == {
        kind.name
        for kind in ARTIFACT_KINDS.values()
        if kind.precision == "int8" and not (kind.frontend_of or kind.also)
    }


@every_kind
def test_kind_has_a_tolerance_and_a_budget(kind: ArtifactKind) -> None:
    tolerance = tolerance_for(kind.precision, FP32_FLOOR)
    assert 0 < tolerance.rel_l2 < 0.1
    assert tolerance.why
    assert 0 < ACCURACY_BUDGET[kind.precision] <= 0.01


@every_kind
def test_kind_is_read_and_timed_by_a_runtime_of_each_device(kind: ArtifactKind) -> None:
    readers = [
        runtime for runtime in all_runtimes().values() if runtime.reads(format_=kind.format, precision=kind.precision)
    ]
    assert {runtime.device for runtime in readers if runtime.timed} == {"cpu", "cuda"}


@every_kind
def test_kind_is_in_the_readme_with_its_file(kind: ArtifactKind) -> None:
    """One line that has the kind's name in backticks and a file name that ends in its suffix."""
    file_name = re.compile(rf"[\w>-]{re.escape(kind.suffix)}(?![\w.])")
    lines = README.read_text(encoding="utf-8").splitlines()
    assert any(f"`{kind.name}`" in line and file_name.search(line) for line in lines)


@every_kind
def test_kind_is_in_the_help_of_predict(kind: ArtifactKind) -> None:
    command = typer.main.get_command(app).commands["predict"]  # type: ignore[attr-defined]
    option = next(option for option in command.params if option.name == "artifact")
    assert re.search(rf"(?<![\w-]){re.escape(kind.name)}(?![\w-])", option.help)


@every_kind
def test_kind_has_a_summary(kind: ArtifactKind) -> None:
    assert kind.summary
    assert ARTIFACT_KINDS[kind.name] is kind


def test_tables_cover_the_types() -> None:
    kinds = ARTIFACT_KINDS.values()
    assert {kind.format for kind in kinds} == set(get_args(ArtifactFormat))
    assert {kind.precision for kind in kinds} == set(get_args(Precision)) == set(ACCURACY_BUDGET)
    assert len({kind.suffix for kind in kinds}) == len(kinds)


def test_eager_network_has_a_runtime_but_is_no_artifact() -> None:
    assert EAGER not in ARTIFACT_KINDS
    readers = [runtime for runtime in all_runtimes().values() if runtime.reads(format_=EAGER, precision="fp32")]
    assert {runtime.device for runtime in readers} == {"cpu", "cuda"}


def test_no_runtime_reads_what_no_bundle_holds() -> None:
    formats = {*get_args(ArtifactFormat), EAGER}
    for runtime in all_runtimes().values():
        assert runtime.formats <= formats
        assert runtime.precisions <= set(get_args(Precision))
        assert set(runtime.notes) <= runtime.precisions
