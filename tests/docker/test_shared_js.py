"""What the JavaScript examples share: the same pixels in, the same proof out. Needs Node.js, none of its packages."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.golden import read_golden
from cspdeploy.core.graph_images import pixel_change, with_pixel_change
from cspdeploy.core.preprocess import normalise, resize_image
from cspdeploy.core.spec import Preprocess
from cspdeploy.core.tolerance import limits_for, noise_floors
from cspdeploy.core.types import Artifact
from cspdeploy.edge.selftest import SelftestRequest, run_selftest
from tests.docker.node import DOCKER, node, run_module

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
