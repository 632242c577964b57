"""`docker/edge-node`: the same pixels in, the same answer out, in JavaScript.

Tests that are not `slow` need Node.js and none of its packages.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from PIL import Image

from cspdeploy.core.bundle import file_record, read_manifest, write_manifest
from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.golden import read_golden, write_golden
from cspdeploy.core.graph_images import pixel_change, with_pixel_change
from cspdeploy.core.metrics import softmax
from cspdeploy.core.preprocess import load_image, normalise, preprocess, resize_image
from cspdeploy.core.spec import Preprocess
from cspdeploy.core.tolerance import limits_for, noise_floors
from cspdeploy.core.types import Artifact
from cspdeploy.edge.selftest import SelftestRequest, run_selftest
from cspdeploy.edge.selftest_report import SELFTEST_SCHEMA_VERSION, CheckRow, LatencyRow, SelftestReport
from tests.docker.node import DOCKER, copy_sources, node, npm_install, run_module
from tests.pictures import pictures

# Reads cases and pixels, writes what the contract makes of them: bytes, then planes.
_RESIZE = """
import { readFileSync, writeFileSync } from "node:fs";
import { normalise, resizeImage } from "$LIB/preprocess.js";
const [folder] = process.argv.slice(1);
const cases = JSON.parse(readFileSync(`${folder}/cases.json`));
cases.forEach(({ width, height, contract }, i) => {
  const small = resizeImage({ width, height, data: readFileSync(`${folder}/${i}.rgb`) }, contract);
  writeFileSync(`${folder}/${i}.small`, small.data);
  writeFileSync(`${folder}/${i}.planes`, new Uint8Array(normalise(small, contract).buffer));
});
console.log(cases.length);
"""

_PROVE = """
import { readFileSync } from "node:fs";
import { inflateRawSync } from "node:zlib";
import { readNpz } from "$LIB/npz.js";
import { checkPreprocessing, judge, limitFor, openGolden, relativeL2 } from "$LIB/prove.js";
const [folder] = process.argv.slice(1);
const manifest = JSON.parse(readFileSync(`${folder}/manifest.json`));
const inflate = async (packed, size) => inflateRawSync(packed, { maxOutputLength: size });
const golden = openGolden(await readNpz(readFileSync(`${folder}/golden.npz`), "golden.npz", inflate), manifest);
const contract = manifest.spec.preprocess;
const exact = golden.arrays.get("output_fp32.logits").data, count = golden.images.length, size = exact.length / count;
const rows = Array.from({ length: count }, (_, i) => Array.from(exact.subarray(i * size, (i + 1) * size)));
const floor = relativeL2(exact, golden.arrays.get("output_fp64.logits").data);
const tried = (made) => judge(made.map((data) => ({ logits: { data } })), { precision: "fp32" }, golden, true).passed;
console.log(JSON.stringify({
  floor, fp32: limitFor({ precision: "fp32" }, floor), fp16: limitFor({ precision: "fp16" }, floor),
  preprocessing: checkPreprocessing(golden, contract).verdict,
  other_filter: checkPreprocessing(golden, { ...contract, interpolation: "bicubic" }).verdict,
  other_mean: checkPreprocessing(golden, { ...contract, mean: [0.4, 0.5, 0.6] }).verdict,
  same: tried(rows), scaled: tried(rows.map((row) => row.map((value) => value * 1.001))),
  swapped: tried([...rows].reverse()), nan: tried(rows.map((row, i) => i ? row : row.map(() => NaN))),
  short: tried(rows.map((row) => row.slice(1))),
  missing: judge(rows.map(() => ({})), { precision: "fp32" }, golden, true).passed,
}));
"""


def _contract(**changes: Any) -> Preprocess:
    plain = Preprocess(
        height_px=32, width_px=32, resize="crop", crop_pct=1.0, interpolation="bilinear", channel_order="rgb",
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def _cases() -> list[tuple[int, int, Preprocess]]:
    """Every mode with every filter on random sizes, and the corners: one pixel, nothing to do, one side only."""
    generator = np.random.default_rng(0)
    cases = [
        (1, 1, _contract(interpolation="bicubic")), (32, 32, _contract()), (32, 57, _contract(crop_pct=0.875)),
        (57, 32, _contract(resize="stretch")), (1, 90, _contract(resize="letterbox")), (33, 32, _contract()),
        (513, 3, _contract(resize="letterbox", interpolation="nearest")),
    ]  # fmt: skip
    for resize in ("crop", "stretch", "letterbox"):
        for interpolation in ("bilinear", "bicubic", "nearest"):
            for order in ("rgb", "bgr") * 3:
                width, height, to_width, to_height = (int(side) for side in generator.integers(2, 200, 4))
                contract = _contract(
                    resize=resize, interpolation=interpolation, channel_order=order, width_px=to_width,
                    height_px=to_height, crop_pct=float(generator.choice([1.0, 0.875, 0.95, 0.3])),
                )  # fmt: skip
                cases.append((width, height, contract))
    return cases


def test_preprocessing_is_pillows_to_the_last_bit(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    cases, images = _cases(), []
    for index, (width, height, _) in enumerate(cases):
        images.append(generator.integers(0, 256, (height, width, 3), np.uint8))
        (tmp_path / f"{index}.rgb").write_bytes(images[-1].tobytes())
    listed = [{"width": width, "height": height, "contract": to_json(contract)} for width, height, contract in cases]
    (tmp_path / "cases.json").write_text(json.dumps(listed))
    assert run_module(_RESIZE, tmp_path) == len(cases)
    for index, (width, height, contract) in enumerate(cases):
        expected = resize_image(Image.fromarray(images[index]), contract)
        small = np.frombuffer((tmp_path / f"{index}.small").read_bytes(), np.uint8).reshape(expected.shape)
        np.testing.assert_array_equal(small, expected, err_msg=f"{width}x{height} px, {contract}")
        planes = np.frombuffer((tmp_path / f"{index}.planes").read_bytes(), "<f4")
        np.testing.assert_array_equal(planes, normalise(expected[None], contract).ravel(), err_msg=f"{contract}")


_FRONTEND = """
import { networkInput } from "$LIB/preprocess.js";
const image = { width: 3, height: 2, data: Uint8Array.from({ length: 18 }, (_, i) => i) };
const contract = JSON.parse(process.argv[1]);
const made = (frontend) => {
  const { type, dims, data } = networkInput(image, contract, frontend);
  return [type, dims, Array.from(data)];
};
console.log(JSON.stringify([
  made({ channel_order: "rgb", resize: true }), made({ channel_order: "bgr", resize: true }),
  made({ channel_order: "rgb", resize: false }), made(null).slice(0, 2),
]));
"""


def test_a_graph_that_normalises_itself_is_given_bytes() -> None:
    image = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    contract = _contract(resize="stretch", width_px=5, height_px=4)
    raw, swapped, sized, plain = run_module(_FRONTEND, json.dumps(to_json(contract)))
    assert raw == ["uint8", [1, 2, 3, 3], image.ravel().tolist()]
    assert swapped == ["uint8", [1, 2, 3, 3], image[..., ::-1].ravel().tolist()]
    expected = resize_image(Image.fromarray(image), contract)
    assert sized == ["uint8", [1, 4, 5, 3], expected.ravel().tolist()]
    assert plain == ["float32", [1, 3, 4, 5]]


def test_golden_inputs_and_limits_are_those_of_python(tiny_bundle: Path) -> None:
    found = run_module(_PROVE, tiny_bundle)
    floors = noise_floors(read_golden(tiny_bundle / "golden.npz"))
    for precision in ("fp32", "fp16"):
        assert found[precision] == pytest.approx(limits_for(precision, floors)["logits"].rel_l2, rel=1e-12)
    assert [found[name] for name in ("preprocessing", "other_filter", "other_mean")] == ["pass", "fail", "fail"]
    assert found["same"]
    for fault in ("scaled", "swapped", "nan", "short", "missing"):
        assert not found[fault], fault


_LIMITS = """
import { readFileSync } from "node:fs";
import { limitFor } from "$LIB/prove.js";
const [path, floor] = process.argv.slice(1);
const { artifacts } = JSON.parse(readFileSync(path));
console.log(JSON.stringify(Object.fromEntries(artifacts.map((one) => [one.kind, limitFor(one, Number(floor))]))));
"""


def test_limits_are_those_of_python_for_every_artifact(tiny_u8_bundle: Path) -> None:
    """INT8 by the tensors in 8 bits that the export has counted; the C++ and Python sides count in the file."""
    floor = noise_floors(read_golden(tiny_u8_bundle / "golden.npz"))["logits"]
    found = run_module(_LIMITS, tiny_u8_bundle / "manifest.json", floor)
    report = run_selftest(tiny_u8_bundle, SelftestRequest(runtime="ort-cpu", latency=False))
    expected = {row.artifact: row.limit for row in report.checks if row.check == "golden" and row.limit is not None}
    assert {"onnx", "onnx-fp16", "onnx-int8", "onnx-u8", "onnx-fp16-u8", "onnx-int8-u8"} == set(expected)
    for kind, limit in expected.items():
        assert found[kind] == pytest.approx(limit, rel=1e-9), kind


@pytest.mark.parametrize("change", [0.0, 3e-3, 5.0, -1.0, True, "much", None])
def test_a_graph_that_resizes_is_given_what_its_pixels_cost(tiny_u8_bundle: Path, tmp_path: Path, change: Any) -> None:
    manifest = json.loads((tiny_u8_bundle / "manifest.json").read_text())
    entry = next(one for one in manifest["artifacts"] if one["kind"] == "onnx-u8")
    entry["frontend"]["resize"] = True
    entry["steps"][-1]["facts"] = {"output_change": change}
    (tmp_path / "manifest.json").write_text(json.dumps({"artifacts": [entry]}))
    floors = noise_floors(read_golden(tiny_u8_bundle / "golden.npz"))
    expected = with_pixel_change(limits_for("fp32", floors), pixel_change(from_json(Artifact, entry)))["logits"].rel_l2
    assert expected < 2e-2
    found = run_module(_LIMITS, tmp_path / "manifest.json", floors["logits"])
    assert found["onnx-u8"] == pytest.approx(expected, rel=1e-9)


_TOP = """
import { judge } from "$LIB/prove.js";
const logits = Float64Array.of(3, 1, 2, 2);
const arrays = new Map(["output_fp64.logits", "output_fp32.logits"].map((name) => [name, { data: logits }]));
const golden = { arrays, names: ["logits"], images: [0] };
const sum = logits.reduce((total, value) => total + Math.exp(value), 0);
const exact = logits.map((value) => Math.exp(value) / sum);
const tried = (classes, probabilities) => judge(
  [{ logits: { data: logits }, classes: { data: BigInt64Array.from(classes, BigInt) },
     probabilities: { data: probabilities ?? classes.map((one) => exact[one]) } }],
  { precision: "fp32", frontend: { top_k: 3 } }, golden, true).passed;
const scaled = (factor) => judge(
  [{ logits: { data: logits.map((value) => value * factor) } }],
  { precision: "fp32", frontend: { resize: true }, steps: [{ facts: { output_change: 0.003 } }] }, golden, true).passed;
console.log(JSON.stringify({
  right: [tried([0, 2, 3]), tried([0, 3, 2]), scaled(1), scaled(1.002)],
  wrong: [tried([0, 2]), tried([0, 2, 1]), tried([0, 2, 2]), tried([2, 0, 3]), tried([-1, 2, 3], [NaN, NaN, NaN]),
    tried([0, 2, 3], [0.9, 0.05, 0.05]), tried([0, 2, 3], [NaN, NaN, NaN]), scaled(1.01), scaled(50), scaled(NaN),
    judge([{ logits: { data: logits } }], { precision: "fp32", frontend: { top_k: 3 } }, golden, true).passed,
    judge([{ logits: { data: logits } }], { precision: "int8", steps: [] }, golden, true).passed],
}));
"""


def test_top_k_and_resizing_graphs_are_judged() -> None:
    found = run_module(_TOP)
    assert found["right"] == [True] * 4
    assert found["wrong"] == [False] * 12


def test_scores_that_do_not_fit_the_labels_are_refused() -> None:
    code = 'import { classes } from "$LIB/preprocess.js"; try { classes([1, 2, 3], ["a"], 1); console.log("[]"); }'
    code += "catch (error) { console.log(JSON.stringify([error.name, error.message])); }"
    assert run_module(code) == ["InputError", "3 class scores and 1 labels"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda _: b"PK"]
)
def test_a_broken_golden_file_is_refused(
    tiny_bundle: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:  # fmt: skip
    golden = bytearray((tiny_bundle / "golden.npz").read_bytes())
    golden[60] ^= 0xFF  # within the first member
    (tmp_path / "golden.npz").write_bytes(damage(bytes(golden)))
    shutil.copy(tiny_bundle / "manifest.json", tmp_path)
    done = node("--input-type=module", "-e", _PROVE.replace("$LIB", (DOCKER / "edge-web/lib").as_uri()), tmp_path)
    assert done.returncode != 0
    assert "golden.npz: not a golden file" in done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example without its packages."""
    return copy_sources(tmp_path_factory.mktemp("sources")) / "edge-node"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))


def _refused(sources: Path, *arguments: object) -> str:
    """The two lines of an error; there must be no more."""
    done = node(sources / "app.mjs", *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "fix"], done.stderr
    return done.stderr


def test_a_half_copied_bundle_is_refused(sources: Path, bundle: Path) -> None:
    whole = (bundle / "tiny.onnx").read_bytes()
    (bundle / "tiny.onnx").write_bytes(whole[:-100])
    assert "the manifest says" in _refused(sources, bundle, "any.png")
    assert "the manifest says" in _failed(sources, bundle)
    (bundle / "tiny.onnx").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "tiny.onnx: SHA-256 differs" in _failed(sources, bundle)
    assert "tiny.onnx: SHA-256 differs" in _refused(sources, bundle, "any.png")
    (bundle / "tiny.onnx").unlink()
    assert "tiny.onnx: missing" in _refused(sources, bundle, "any.png")
    assert "tiny.onnx: missing" in _failed(sources, bundle)


def _failed(sources: Path, bundle: Path) -> str:
    """Why the files are not those of the manifest, in a report of one JSON document."""
    done = node(sources / "app.mjs", "selftest", bundle, "--json")
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout)
    assert report["verdict"] == "fail"
    rows = {row["artifact"] or row["check"]: row for row in report["checks"]}
    assert {rows[name]["verdict"] for name in ("onnx", "onnx-fp16")} == {"skip"}
    assert rows["files"]["verdict"] == "fail"
    return str(rows["files"]["reason"])


def test_an_error_is_json_where_json_was_asked_for(sources: Path, tmp_path: Path) -> None:
    for arguments in (("selftest", tmp_path), (tmp_path, "any.png")):
        done = node(sources / "app.mjs", *arguments, "--json")
        assert done.returncode == 2
        told = json.loads(done.stdout)
        assert (told["schema_version"], told["verdict"]) == (SELFTEST_SCHEMA_VERSION, "error")
        assert "manifest.json: no such file" in told["error"]["message"]


def test_what_is_no_bundle_is_refused(sources: Path, bundle: Path, tmp_path: Path) -> None:
    assert "no such file, expected a bundle" in _refused(sources, tmp_path / "nothing", "any.png")
    (bundle / "weights.bin").touch()
    assert "weights.bin: in the folder, but not in its manifest.json" in _refused(sources, bundle, "any.png")
    (bundle / "weights.bin").unlink()
    manifest = json.loads((bundle / "manifest.json").read_text())
    for change, expected in (
        ({"schema_version": 99}, "schema_version 99"),
        ({"artifacts": None}, "artifacts or files missing"),
        ({"files": [{"file": "../x", "sha256": "0" * 64, "num_bytes": 1}]}, "'../x' leaves the folder"),
        ({"spec": manifest["spec"] | {"preprocess": {}}}, "preprocess.height_px"),
        ({"spec": manifest["spec"] | {"provenance": None}}, "spec.provenance"),
        ({"labels": manifest["labels"][:-1]}, "9 labels, expected 10"),
        ({"labels": [1] * 10}, "labels broken"),
        ({"files": [None]}, "'undefined' leaves the folder"),
        ({"artifacts": [manifest["artifacts"][0] | {"inputs": None}]}, "inputs or steps broken"),
        ({"spec": manifest["spec"] | {"task": "features"}}, "not classes"),
    ):
        (bundle / "manifest.json").write_text(json.dumps(manifest | change))
        assert expected in _refused(sources, bundle, "any.png")
    (bundle / "manifest.json").write_text("{")
    assert "not JSON" in _refused(sources, bundle, "any.png")


def test_wrong_use_is_refused(sources: Path, bundle: Path) -> None:
    assert "--artifact onnx" in _refused(sources, bundle, "any.png", "--artifact", "onnx-int7")
    assert "Unknown option '--tpo'" in _refused(sources, bundle, "any.png", "--tpo", "3")
    assert "--top 0" in _refused(sources, bundle, "any.png", "--top", "0")
    assert "at least one image" in _refused(sources, bundle)
    assert "expected one bundle" in _refused(sources, "selftest")


def test_a_file_of_a_further_size_is_refused(sources: Path, bundle: Path) -> None:
    """Its preprocessing is another one than that of the bundle's own size, which is what the application knows."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for artifact in manifest["artifacts"]:
        if artifact["kind"] == "onnx-fp16":
            artifact["kind"] = "onnx@48x40"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    refused = _refused(sources, bundle, "any.png", "--artifact", "onnx@48x40")
    assert "no artifact 'onnx@48x40' for ONNX Runtime, it has onnx" in refused
    assert "onnx@48x40, " not in refused


def test_missing_packages_are_named(sources: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    done = node(sources / "app.mjs", tiny_bundle, tmp_path / "a.png")
    assert done.returncode == 3
    assert "sharp" in done.stderr
    assert "fix: npm ci --ignore-scripts" in done.stderr


@pytest.mark.parametrize("name", ["edge-node", "edge-web"])
def test_packages_are_pinned_and_no_registry_is_named(name: str) -> None:
    package = json.loads((DOCKER / name / "package.json").read_text())
    lock = json.loads((DOCKER / name / "package-lock.json").read_text())
    pins = package["dependencies"]
    assert pins == {key: lock["packages"][f"node_modules/{key}"]["version"] for key in pins}
    for path, entry in lock["packages"].items():
        assert entry.get("resolved", "https://registry.npmjs.org/").startswith("https://registry.npmjs.org/"), path
        assert not path or entry["integrity"].startswith("sha512-"), path


# ------------------------------------------------------------------------------------------------ with its packages


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_sources(tmp_path_factory.mktemp("installed")) / "edge-node"
    npm_install(folder)
    return folder


def _selftest(installed: Path, bundle: Path) -> tuple[int, Any]:
    done = node(installed / "app.mjs", "selftest", bundle, "--json")
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
def test_selftest_passes_in_every_precision(installed: Path, tiny_int8_bundle: Path) -> None:
    status, report = _selftest(installed, tiny_int8_bundle)
    assert status == 0, report
    assert report["verdict"] == "pass"
    checks = {row["artifact"] or row["check"]: row for row in report["checks"]}
    assert list(checks)[:2] == ["files", "preprocess"]
    assert {row["artifact"] for row in report["latency"]} == set(checks) - {"files", "preprocess"}
    # A fleet reads one form, whichever language proved the bundle.
    for name, kind in (("checks", CheckRow), ("latency", LatencyRow)):
        known = {field.name for field in dataclasses.fields(kind)}
        assert all(set(row) <= known for row in report[name])
    assert set(report) <= {field.name for field in dataclasses.fields(SelftestReport)}
    assert report["schema_version"] == SELFTEST_SCHEMA_VERSION
    assert {"onnx", "onnx-fp16", "onnx-int8"} <= set(checks)
    assert checks["onnx"]["top1_agreement"] == 1.0
    assert 0 < checks["onnx-int8"]["rel_l2"] <= checks["onnx-int8"]["limit"]


@pytest.mark.slow
def test_selftest_passes_with_preprocessing_and_top_k_in_the_graph(installed: Path, tiny_u8_bundle: Path) -> None:
    status, report = _selftest(installed, tiny_u8_bundle)
    assert status == 0, report
    rows = {row["artifact"]: row for row in report["checks"] if row["check"] == "golden"}
    assert {"onnx-u8", "onnx-fp16-u8", "onnx-int8-u8"} <= set(rows)
    assert rows["onnx-u8"]["reason"].endswith(", top-k")
    assert report["requested"]["artifacts"] == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["scaled", "inputs"])
def test_selftest_fails_where_the_outputs_are_others(installed: Path, bundle: Path, fault: str) -> None:
    manifest, golden = read_manifest(bundle), read_golden(bundle / "golden.npz")
    if fault == "scaled":
        other = dataclasses.replace(
            golden, outputs_fp64={name: array * 1.01 for name, array in golden.outputs_fp64.items()},
            outputs_fp32={name: array * np.float32(1.01) for name, array in golden.outputs_fp32.items()},
        )  # fmt: skip
    else:
        other = dataclasses.replace(golden, x_NCHW=np.ascontiguousarray(golden.x_NCHW[:, :, ::-1]))
    write_golden(bundle / "golden.npz", other)
    files = tuple(file_record(bundle / record.file) for record in manifest.files)
    write_manifest(bundle, dataclasses.replace(manifest, files=files))
    status, report = _selftest(installed, bundle)
    assert status == 1
    assert report["verdict"] == "fail"
    failed = {row["artifact"] or row["check"] for row in report["checks"] if row["verdict"] == "fail"}
    assert "onnx" in failed
    assert ("preprocess" in failed) == (fault == "inputs")


def _python(bundle: Path, artifact: str, images: list[Path]) -> npt.NDArray[np.float64]:
    """Probabilities `[N, C]` of the same file by ONNX Runtime in Python."""
    manifest = read_manifest(bundle)
    found = next(item for item in manifest.artifacts if item.kind == artifact)
    session = onnxruntime.InferenceSession(bundle / found.file, providers=["CPUExecutionProvider"])
    x_NCHW = preprocess(images, manifest.spec.preprocess)
    return softmax(np.concatenate([session.run(None, {found.inputs[0].name: x[None]})[0] for x in x_NCHW]))


def _photographs(folder: Path) -> list[Path]:
    photo = Image.fromarray(pictures(1, height=203, width=301)[0])
    turned = Image.Exif()
    turned[0x0112] = 6
    options: dict[str, dict[str, Any]] = {
        "plain.png": {}, "sharp.jpg": {"quality": 92, "subsampling": 0}, "usual.jpg": {"quality": 75, "subsampling": 2},
        "progressive.jpg": {"quality": 85, "progressive": True}, "turned.jpg": {"exif": turned, "quality": 90},
        "lossy.webp": {"quality": 80}, "lossless.webp": {"lossless": True}, "plain.tif": {}, "palette.gif": {},
    }  # fmt: skip
    for name, arguments in options.items():
        photo.save(folder / name, **arguments)
    photo.convert("L").save(folder / "grey.jpg")
    photo.convert("LA").save(folder / "grey-alpha.png")
    glass = photo.convert("RGBA")
    glass.putalpha(photo.convert("L"))
    glass.save(folder / "glass.png")
    deep = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    return sorted(folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("artifact", ["onnx", "onnx-fp16", "onnx-int8"])
def test_predictions_are_pythons(installed: Path, tiny_int8_bundle: Path, tmp_path: Path, artifact: str) -> None:
    images = _photographs(tmp_path)
    done = node(installed / "app.mjs", tiny_int8_bundle, *images, "--artifact", artifact, "--json", "--top", 3)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    labels = read_manifest(tiny_int8_bundle).labels
    expected = _python(tiny_int8_bundle, artifact, images)
    assert [entry["image"] for entry in found] == [str(path) for path in images]
    for entry, row in zip(found, expected, strict=True):
        assert set(entry) == {"image", "untrained", "predictions"}
        assert len(entry["predictions"]) == 3
        assert entry["predictions"][0]["index"] == int(row.argmax())
        for one in entry["predictions"]:
            assert one["label"] == labels[one["index"]]
            # Two builds of one engine: 1e-5 is float32; an 8-bit step of INT8 moves a probability by more.
            assert one["probability"] == pytest.approx(row[one["index"]], abs=1e-2 if artifact == "onnx-int8" else 1e-5)


@pytest.mark.slow
def test_decoded_pixels_are_pillows_within_one_step(installed: Path, tmp_path: Path) -> None:
    images = _photographs(tmp_path)
    code = f"""
import {{ writeFileSync }} from "node:fs";
import {{ decodeImage }} from "{(installed / "decode.mjs").as_uri()}";
const sizes = [];
for (const path of process.argv.slice(1)) {{
  const image = await decodeImage(path);
  writeFileSync(path + ".rgb", image.data);
  sizes.push([image.height, image.width, 3]);
}}
console.log(JSON.stringify(sizes));
"""
    for path, shape in zip(images, run_module(code, *images), strict=True):
        expected = np.asarray(load_image(path)).astype(int)
        assert tuple(shape) == expected.shape, path.name
        found = np.frombuffer(Path(f"{path}.rgb").read_bytes(), np.uint8).reshape(expected.shape)
        # Measured: 0 in all. Two builds of libjpeg may round the colour conversion to either side.
        assert np.abs(found - expected).max() <= 1, path.name


@pytest.mark.slow
def test_bad_images_are_one_line(installed: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    photo = Image.fromarray(pictures(1, height=203, width=301)[0])
    photo.save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:3000])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "page.png").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    photo.convert("CMYK").save(tmp_path / "print.jpg")
    expected = {
        "none.png": "no such file", "empty.png": "0 bytes", "text.png": "not an image", "half.jpg": "broken image",
        "page.png": "a file of format svg", "print.jpg": "CMYK", "whole.jpg": "",
    }  # fmt: skip
    paths = [tmp_path / name for name in expected]
    done = node(installed / "app.mjs", tiny_bundle, *paths, "--json")
    assert done.returncode == 2
    entries = json.loads(done.stdout)
    assert [entry["image"] for entry in entries] == [str(path) for path in paths]
    for entry, told in zip(entries, expected.values(), strict=True):
        assert told in entry.get("error", "")
        assert len(entry["predictions"]) == (0 if told else 5)  # the others go on
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "fix"] * 6
    done = node(installed / "app.mjs", tiny_bundle, *paths)
    assert done.stdout.startswith(f"{paths[-1]}\n")


@pytest.mark.slow
def test_an_artifact_that_the_engine_cannot_open_names_both_versions(installed: Path, bundle: Path) -> None:
    manifest = read_manifest(bundle)
    (bundle / "tiny.onnx").write_bytes(b"\x08\x63" + (bundle / "tiny.onnx").read_bytes()[2:])  # IR version 99
    record = file_record(bundle / "tiny.onnx")
    artifacts = tuple(
        dataclasses.replace(one, sha256=record.sha256, num_bytes=record.num_bytes) if one.kind == "onnx" else one
        for one in manifest.artifacts
    )
    write_manifest(bundle, dataclasses.replace(manifest, artifacts=artifacts))
    version = json.loads((DOCKER / "edge-node/package.json").read_text())["dependencies"]["onnxruntime-node"]
    status, report = _selftest(installed, bundle)
    rows = {row["artifact"]: row for row in report["checks"]}
    assert (status, rows["onnx"]["verdict"], rows["onnx-fp16"]["verdict"]) == (1, "fail", "pass")
    assert f"tiny.onnx (opset 18): onnxruntime-node {version} does not open it" in rows["onnx"]["reason"]


@pytest.mark.slow
def test_untrained_weights_are_told(installed: Path, bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundle)
    spec = dataclasses.replace(
        manifest.spec, provenance=dataclasses.replace(manifest.spec.provenance, source="random", weights_sha256="")
    )
    write_manifest(bundle, dataclasses.replace(manifest, spec=spec))
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    for arguments in ((bundle, tmp_path / "a.png"), ("selftest", bundle)):
        done: subprocess.CompletedProcess[str] = node(installed / "app.mjs", *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("UNTRAINED")
