from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from cspdeploy.core.calibration_audit import CalibrationAudit
from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.spec import Preprocess
from cspdeploy.quant.audit_images import audit_calibration
from cspdeploy.quant.calibration import CalibrationSet, open_calibration
from tests.pictures import pictures

Pixels = npt.NDArray[np.uint8]


def _noise(count: int, *, height: int = 40, width: int = 48, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def _texts(audit: CalibrationAudit, severity: Literal["error", "warning", "note"] | None = None) -> str:
    return "\n".join(item.text for item in audit.findings if severity in (None, item.severity))


@pytest.fixture
def seen(tiny_contract: Preprocess) -> CalibrationSet:
    return open_calibration(pictures(64, seed=5), tiny_contract)


def test_good_images_give_no_finding(tiny_contract: Preprocess, seen: CalibrationSet) -> None:
    images = open_calibration(pictures(64), tiny_contract)

    audit = audit_calibration(images, seen=seen)

    assert audit.findings == ()
    assert (audit.num_images, audit.num_distinct, audit.num_sizes) == (64, 64, 1)
    assert audit.contract == tiny_contract
    assert audit.content_sha256 == images.content_hash
    assert audit.seen_distance is not None
    assert audit.seen_distance < 0.3
    assert from_json(CalibrationAudit, to_json(audit)) == audit


def test_statistics_are_those_of_the_prepared_images(tiny_contract: Preprocess) -> None:
    contract = dataclasses.replace(tiny_contract, channel_order="bgr", mean=(0.1, 0.2, 0.3), std=(0.2, 0.3, 0.4))
    stored = pictures(40)
    x_NCHW = preprocess(list(stored), contract).astype(np.float64)

    audit = audit_calibration(open_calibration(stored, contract))

    np.testing.assert_allclose(audit.channels.mean, x_NCHW.mean(axis=(0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(audit.channels.std, x_NCHW.std(axis=(0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(audit.channels.low, x_NCHW.min(axis=(0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(audit.channels.high, x_NCHW.max(axis=(0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(audit.allowed_low, (-0.5, -2 / 3, -0.75))
    np.testing.assert_allclose(audit.allowed_high, (4.5, 8 / 3, 1.75))


def test_progress_is_told(tiny_contract: Preprocess) -> None:
    told: list[tuple[int, int]] = []
    audit_calibration(
        open_calibration(pictures(40), tiny_contract), progress=lambda what, done, total: told.append((done, total))
    )  # fmt: skip
    assert told == [(i, 40) for i in range(40)]


# --- count and copies ---


@pytest.mark.parametrize(("count", "warned"), [(31, True), (32, False)])
def test_few_images_are_a_warning_that_names_the_risk(count: int, warned: bool, tiny_contract: Preprocess) -> None:
    audit = audit_calibration(open_calibration(pictures(count), tiny_contract))
    assert ("too narrow, and later images are clipped" in _texts(audit, "warning")) == warned


def test_copies_do_not_count(tiny_contract: Preprocess) -> None:
    audit = audit_calibration(open_calibration(np.repeat(pictures(4), 16, axis=0), tiny_contract))
    assert audit.num_copies == 60
    assert "copies of other images: 60 of 64" in _texts(audit, "warning")
    assert "4 different (of 64) images, expected at least 32" in _texts(audit, "warning")
    assert "too few different images to hold any out" in _texts(audit, "note")


def test_one_picture_in_two_lossless_formats_is_a_copy(tmp_path: Path, tiny_contract: Preprocess) -> None:
    for i, image in enumerate(pictures(40)):
        Image.fromarray(image).save(tmp_path / f"{i:02d}.png")
    Image.open(tmp_path / "07.png").save(tmp_path / "again.bmp")
    audit = audit_calibration(open_calibration(tmp_path, tiny_contract))
    assert audit.num_copies == 1
    assert "copies of other images: 1 of 41" in _texts(audit, "note")


def test_pictures_encoded_again_are_near_copies(tmp_path: Path, tiny_contract: Preprocess) -> None:
    for i, image in enumerate(pictures(40, height=96, width=96)):
        Image.fromarray(image).save(tmp_path / f"{i:02d}.png")
        if i < 10:
            Image.fromarray(image).save(tmp_path / f"{i:02d}.jpg", quality=85)
    audit = audit_calibration(open_calibration(tmp_path, tiny_contract))
    assert (audit.num_copies, audit.num_near_copies) == (0, 10)
    assert "images that show what another shows: 10 of 50" in _texts(audit, "note")


def test_pictures_that_only_look_alike_are_not(tiny_contract: Preprocess) -> None:
    shifted = np.roll(pictures(20, height=96, width=96), 24, axis=2)
    audit = audit_calibration(
        open_calibration(np.concatenate([pictures(20, height=96, width=96), shifted]), tiny_contract)
    )
    assert audit.num_distinct == 40


# --- images that are none ---


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_blank_set_is_refused(level: int, tiny_contract: Preprocess) -> None:
    images = open_calibration(np.full((40, 20, 20, 3), level, np.uint8), tiny_contract)
    with pytest.raises(InputError, match="images of one colour: all 40") as caught:
        audit_calibration(images)
    assert "--calib DIR" in caught.value.fix


def test_images_scaled_to_one_before_they_were_stored_are_blank(tiny_contract: Preprocess) -> None:
    with pytest.raises(InputError, match="span more than 3 of 255"):
        audit_calibration(open_calibration(pictures(40) // 255, tiny_contract))


def test_blank_images_under_grey_bars_are_seen(tiny_contract: Preprocess) -> None:
    contract = dataclasses.replace(tiny_contract, resize="letterbox")
    with pytest.raises(InputError, match="images of one colour"):
        audit_calibration(open_calibration(np.zeros((40, 20, 40, 3), np.uint8), contract))


def test_blank_images_among_others_are_listed(tiny_contract: Preprocess) -> None:
    stored = pictures(40)
    stored[[3, 5, 8, 13]] = 0
    audit = audit_calibration(open_calibration(stored, tiny_contract))
    assert audit.num_constant == 4
    assert "images of one colour: 4 of 40 (image 3, image 5, image 8 and 1 others)" in _texts(audit, "warning")


def _jpeg(image: Pixels) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=50)
    return np.asarray(Image.open(buffer))


NOISE = {
    "uniform": _noise(40),
    "grey": _noise(40)[..., 0],
    "tiny": _noise(40, height=8, width=8),
    "large": _noise(40, height=200, width=320),
    "normal": np.random.default_rng(0).normal(128, 40, (40, 64, 64, 3)).clip(0, 255).astype(np.uint8),
    "jpeg": np.stack([_jpeg(image) for image in _noise(40, height=64, width=64)]),
    "shrunk": np.stack(
        [np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR))
         for image in _noise(40, height=128, width=128)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOISE)
def test_random_data_is_refused(kind: str, tiny_contract: Preprocess) -> None:
    images = open_calibration(NOISE[kind], tiny_contract)
    with pytest.raises(InputError, match="random data is refused for a shipped artifact") as caught:
        audit_calibration(images)
    assert "real images" in caught.value.fix
    audit = audit_calibration(images, refuse=False)
    assert len(audit.errors) == 1
    assert audit.num_noise == 40


def test_a_mostly_random_set_is_refused_and_a_few_noise_images_are_listed(tiny_contract: Preprocess) -> None:
    with pytest.raises(InputError, match="noise: 24 of 48 images"):
        audit_calibration(open_calibration(np.concatenate([pictures(24), _noise(24)]), tiny_contract))
    audit = audit_calibration(open_calibration(np.concatenate([_noise(2), pictures(38)]), tiny_contract))
    assert "noise: 2 of 40 images (image 0, image 1)" in _texts(audit, "warning")


def test_noise_does_not_hide_behind_blank_images(tiny_contract: Preprocess) -> None:
    blank = np.zeros((30, 40, 48, 3), np.uint8)
    with pytest.raises(InputError, match="random data"):
        audit_calibration(open_calibration(np.concatenate([blank, _noise(10)]), tiny_contract))


def test_enlarged_noise_is_a_warning_since_fine_texture_looks_the_same(tiny_contract: Preprocess) -> None:
    stored = np.stack(
        [np.asarray(Image.fromarray(image).resize((160, 160), Image.Resampling.BICUBIC))
         for image in _noise(40, height=64, width=64)]
    )  # fmt: skip
    audit = audit_calibration(open_calibration(stored, tiny_contract))
    assert "enlarged noise, or texture" in _texts(audit, "warning")


def test_dithered_pictures_are_pictures(tiny_contract: Preprocess) -> None:
    dithered = [
        np.asarray(Image.fromarray(image).convert("1").convert("L")) for image in pictures(40, height=128, width=128)
    ]
    audit = audit_calibration(open_calibration(np.stack(dithered), tiny_contract))
    assert audit.num_noise == 0


def test_stripes_are_no_noise(tiny_contract: Preprocess) -> None:
    columns = np.random.default_rng(0).integers(0, 256, (40, 1, 32), np.uint8)
    audit = audit_calibration(open_calibration(np.repeat(columns, 32, axis=1), tiny_contract))
    assert audit.num_noise == 0


# --- sizes and files ---


def test_sizes_ratios_and_other_files_are_counted(tmp_path: Path, tiny_contract: Preprocess) -> None:
    sizes = [(48, 40)] * 30 + [(40, 48)] * 8 + [(120, 40)] * 2
    for i, (width, height) in enumerate(sizes):
        Image.fromarray(pictures(1, height=height, width=width, seed=i)[0]).save(tmp_path / f"{i:02d}.png")
    for name in ("a.mp4", "b.mp4", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    audit = audit_calibration(open_calibration(tmp_path, tiny_contract))
    assert (audit.num_sizes, audit.num_reshaped, audit.num_ignored_files) == (3, 2, 3)
    assert "images of 3 sizes, all brought to 32x32" in _texts(audit, "note")
    assert "lose more than half to the crop, so far is their ratio from that of 32x32: 2 of 40" in _texts(audit, "note")
    assert "other files, ignored: 3 (2 .mp4, 1 .txt)" in _texts(audit, "note")


@pytest.mark.parametrize(("resize", "loss"), [("stretch", "squeezed"), ("letterbox", "grey")])
def test_what_a_ratio_costs_depends_on_the_contract(
    resize: Literal["stretch", "letterbox"], loss: str, tiny_contract: Preprocess
) -> None:
    contract = dataclasses.replace(tiny_contract, resize=resize)
    audit = audit_calibration(open_calibration(pictures(40, height=32, width=96), contract))
    assert loss in _texts(audit, "warning")


@pytest.mark.parametrize(("side", "told"), [(16, False), (15, True)])
def test_enlarged_images_are_told(side: int, told: bool, tiny_contract: Preprocess) -> None:
    audit = audit_calibration(open_calibration(pictures(40, height=side, width=side), tiny_contract))
    assert ("enlarged more than twofold to 32x32" in _texts(audit, "note")) == told


# --- against what the model saw ---


SHIFTS = {
    "bright": 255 - pictures(40) // 2,
    "dark": pictures(40) // 3,
    "without contrast": 110 + pictures(40) // 16,
}


@pytest.mark.parametrize("kind", SHIFTS)
def test_images_of_another_kind_are_told(kind: str, tiny_contract: Preprocess, seen: CalibrationSet) -> None:
    audit = audit_calibration(open_calibration(SHIFTS[kind], tiny_contract), seen=seen)
    assert "not such images as the model saw" in _texts(audit, "warning")


def test_swapped_channels_are_told(tiny_contract: Preprocess) -> None:
    warm = pictures(80)
    warm[..., 2] //= 2
    seen = open_calibration(warm[:40], tiny_contract)
    straight = audit_calibration(open_calibration(warm[40:], tiny_contract), seen=seen)
    swapped = audit_calibration(open_calibration(warm[40:, ..., ::-1], tiny_contract), seen=seen)
    assert "swapped" not in _texts(straight)
    assert "red and blue fit" in _texts(swapped, "warning")


def test_colour_for_a_model_that_saw_none_is_told_and_the_reverse(tiny_contract: Preprocess) -> None:
    colour = open_calibration(pictures(40), tiny_contract)
    grey = open_calibration(pictures(40, colour=False), tiny_contract)
    assert "most images are in colour, those" in _texts(audit_calibration(colour, seen=grey), "warning")
    assert "most images are without colour, those" in _texts(audit_calibration(grey, seen=colour), "warning")


def test_a_set_is_not_compared_with_itself(tiny_contract: Preprocess, seen: CalibrationSet) -> None:
    audit = audit_calibration(open_calibration(pictures(64, seed=5), tiny_contract), seen=seen)
    assert audit.seen is None


def test_blank_seen_images_give_no_distance(tiny_contract: Preprocess) -> None:
    blank = open_calibration(np.zeros((4, 8, 8), np.uint8), tiny_contract)
    assert audit_calibration(open_calibration(pictures(40), tiny_contract), seen=blank).seen_distance is None


def test_a_contract_beyond_float32_is_refused(tiny_contract: Preprocess) -> None:
    contract = dataclasses.replace(tiny_contract, std=(1e-40, 1.0, 1.0))
    with pytest.raises(InputError, match="expected float32 numbers"):
        audit_calibration(open_calibration(pictures(40), contract))
