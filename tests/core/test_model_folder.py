from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cspdeploy.core.errors import InputError
from cspdeploy.core.json_file import MAX_JSON_BYTES
from cspdeploy.core.model_folder import (
    read_calibration,
    read_json,
    read_labels,
    read_spec,
    write_calibration,
    write_spec,
    write_text,
)  # fmt: skip
from cspdeploy.core.spec import Accuracy, ModelSpec, Provenance


def test_spec_round_trip(tmp_path: Path, tiny_spec: ModelSpec) -> None:
    accuracy = Accuracy(dataset="d", num_images=3, top1=0.25, top5=1.0)
    spec = dataclasses.replace(tiny_spec, provenance=Provenance(source="trained", accuracy=accuracy))
    write_spec(tmp_path, spec)
    assert read_spec(tmp_path) == spec
    assert [path.name for path in tmp_path.iterdir()] == ["spec.json"]


def test_only_random_weights_are_untrained(tiny_spec: ModelSpec) -> None:
    assert tiny_spec.provenance.untrained
    assert not Provenance(source="user").untrained


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schema_version", 2, "schema_version 2"),
        ("colour", "red", r"\$\.colour: unknown key"),
        ("num_classes", "10", r"\$\.num_classes"),
        ("num_classes", 0, "num_classes: got 0"),
        ("preprocess", {}, r"\$\.preprocess\.height_px: missing"),
    ],
)
def test_bad_spec_names_the_file_and_the_field(
    tmp_path: Path, tiny_spec: ModelSpec, field: str, value: object, message: str
) -> None:
    write_spec(tmp_path, tiny_spec)
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(InputError, match=message) as caught:
        read_spec(tmp_path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("std", [0.0, 1.0, 1.0]),
        ("std", ["nan", 1.0, 1.0]),
        ("std", ["inf", 1.0, 1.0]),
        ("mean", ["nan", 0.0, 0.0]),
        ("crop_pct", 0.0),
        ("crop_pct", 1.5),
        ("crop_pct", "nan"),
        ("height_px", 0),
    ],
)
def test_impossible_preprocessing_is_refused(tmp_path: Path, tiny_spec: ModelSpec, field: str, value: object) -> None:
    write_spec(tmp_path, tiny_spec)
    path = tmp_path / "spec.json"
    data = json.loads(path.read_text())
    data["preprocess"][field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"\$\.preprocess"):
        read_spec(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_what_is_not_a_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json"):
        read_json(path)


def test_missing_and_oversized_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_json(tmp_path / "none.json")
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)  # sparse: takes no space
    with pytest.raises(InputError, match="expected at most"):
        read_json(tmp_path / "big.json")


def test_failed_write_keeps_the_old_text_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_labels(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("T-shirt/top\nAnkle boot\n")
    assert read_labels(path, num_classes=2) == ("T-shirt/top", "Ankle boot")
    with pytest.raises(InputError, match="got 2 labels, expected 3"):
        read_labels(path, num_classes=3)
    with pytest.raises(InputError):
        read_labels(tmp_path / "none.txt", num_classes=2)
    path.write_bytes(b"\xff\n\xfe\n")
    with pytest.raises(InputError):
        read_labels(path, num_classes=2)


@pytest.mark.parametrize("shape", [(5, 8, 6), (5, 8, 6, 3)])
def test_calibration_round_trip(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    write_calibration(tmp_path / "c.npz", images)
    assert np.array_equal(read_calibration(tmp_path / "c.npz"), images)


@pytest.mark.parametrize(
    "images",
    [np.zeros((0, 8, 8), np.uint8), np.zeros((2, 8, 8), np.float32), np.zeros((8, 8), np.uint8),
     np.zeros((2, 8, 8, 7), np.uint8), np.array([{}])],
    ids=["empty", "float", "one image", "seven channels", "pickle"],
)  # fmt: skip
def test_other_arrays_are_not_calibration_images(tmp_path: Path, images: np.ndarray) -> None:
    np.savez(tmp_path / "c.npz", images=images)
    with pytest.raises(InputError, match=r"c\.npz"):
        read_calibration(tmp_path / "c.npz")


def test_broken_calibration_file(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    with pytest.raises(InputError):
        read_calibration(path)
    write_calibration(path, np.random.default_rng(0).integers(0, 256, (4, 8, 8), np.uint8))
    whole = path.read_bytes()
    np.savez(path, other=np.zeros(3))
    with pytest.raises(InputError):
        read_calibration(path)
    for content in (b"", b"garbage", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(InputError):
            read_calibration(path)


def test_any_changed_byte_in_the_calibration_data_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    write_calibration(path, np.random.default_rng(0).integers(0, 256, (4, 8, 8), np.uint8))
    whole = path.read_bytes()
    for at in range(80, 280, 4):  # within the compressed stream
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with pytest.raises(InputError):
            read_calibration(path)


def test_bare_npy_under_the_name_of_a_calibration_file(tmp_path: Path) -> None:
    with (tmp_path / "c.npz").open("wb") as file:
        np.save(file, np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(InputError):
        read_calibration(tmp_path / "c.npz")
