from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from cspdeploy.check.ladder import verify_bundles
from cspdeploy.check.settings import VerifySettings
from cspdeploy.core.bundle import file_sha256, read_manifest
from cspdeploy.core.errors import InputError
from cspdeploy.core.types import Manifest
from cspdeploy.export.ort_format import OPERATORS_FILE, write_ort_format
from cspdeploy.pipeline.also_step import parse_also
from cspdeploy.pipeline.recipe import ExportRequest
from cspdeploy.pipeline.reproduce import _alike, reproduce_bundle

FURTHER = {"pt2", "ort", "ort-int8", "onnx-opt", "onnx-int8-opt"}


def test_every_further_file_is_an_artifact_that_holds(tiny_also_bundle: Path) -> None:
    manifest = read_manifest(tiny_also_bundle)
    made = {artifact.kind: artifact for artifact in manifest.artifacts}
    assert set(made) >= FURTHER
    report = verify_bundles([tiny_also_bundle], VerifySettings(latency=None))
    rows = {row.artifact: row for row in report.rows if row.artifact in FURTHER}
    assert set(rows) == FURTHER
    assert {row.verdict for row in rows.values()} == {"pass"}, rows
    assert all(made[kind].machine for kind in FURTHER if kind.endswith("-opt"))
    assert not any(artifact.machine for kind, artifact in made.items() if not kind.endswith("-opt"))


def test_operators_that_a_mobile_build_needs_are_listed_and_hashed(tiny_also_bundle: Path) -> None:
    assert OPERATORS_FILE in {record.file for record in read_manifest(tiny_also_bundle).files}
    text = (tiny_also_bundle / OPERATORS_FILE).read_text()
    assert "FusedConv" in text or "Conv" in text
    assert str(tiny_also_bundle) not in text


def test_the_manifest_says_what_was_asked_for(tiny_also_bundle: Path) -> None:
    assert json.loads((tiny_also_bundle / "manifest.json").read_text())["options"]["also"] == ["pt2", "ort", "opt"]


def test_an_onnx_file_has_no_program_of_torch_export(tiny_also_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--also pt2: is of networks that are built here"):
        ExportRequest(model=str(tiny_also_bundle / "tiny.onnx"), output=tmp_path, also=("pt2",))


@pytest.mark.parametrize(("given", "found"), [([], ()), (["opt", "pt2", "opt"], ("pt2", "opt"))])
def test_names_come_once_and_in_order(given: list[str], found: tuple[str, ...]) -> None:
    assert parse_also(given) == found


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"--also otr: expected pt2, ort, opt") as caught:
        parse_also(["otr"])
    assert caught.value.fix in ("--also ort", "--also opt")


@pytest.mark.usefixtures("int8_is_faster")
def test_bundle_is_made_again_but_for_bytes_of_the_engine(tiny_also_bundle: Path, photo_models: Path) -> None:
    report = reproduce_bundle(tiny_also_bundle, models=photo_models)
    assert {file.file: file.verdict for file in report.files if file.verdict != "equal"} == {}
    assert report.verdict == "equal"


def test_an_ort_file_that_computes_something_else_is_another_file(tiny_also_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(tiny_also_bundle)
    other = Path(shutil.copytree(tiny_also_bundle, tmp_path / "other"))
    write_ort_format(tiny_also_bundle / "tiny.onnx", other / "tiny.ort")  # with the card, which that one has not
    changed = _with_hash(manifest, other)
    assert changed != manifest
    assert _alike(tiny_also_bundle, manifest, other, changed) == {"tiny.ort"}
    shutil.copyfile(tiny_also_bundle / "tiny.int8.ort", other / "tiny.ort")
    assert _alike(tiny_also_bundle, manifest, other, _with_hash(manifest, other)) == frozenset()


def _with_hash(manifest: Manifest, folder: Path) -> Manifest:
    artifacts = (
        dataclasses.replace(artifact, sha256=file_sha256(folder / artifact.file)) for artifact in manifest.artifacts
    )
    return dataclasses.replace(manifest, artifacts=tuple(artifacts))
