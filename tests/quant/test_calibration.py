from __future__ import annotations

import dataclasses
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import write_calibration
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.spec import ModelSpec, Preprocess
from cspdeploy.pipeline.images import prepare
from cspdeploy.quant.calibration import CalibrationSet, CalibrationSplit, open_calibration
from tests.pictures import pictures

Pixels = npt.NDArray[np.uint8]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 pictures in two folders, in two formats and sizes."""
    photos = tmp_path / "photos"
    _save(photos / "a", pictures(10), suffix=".png")
    _save(photos / "b", pictures(10, height=64, width=33, seed=1), suffix=".jpg")
    return photos


def _save(folder: Path, images: Pixels, *, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}{suffix}")


# --- reading ---


def test_a_folder_gives_what_prediction_would_prepare(folder: Path, tiny_contract: Preprocess) -> None:
    images = open_calibration(folder, tiny_contract)

    batches = list(images.batches(8))

    assert [len(batch) for batch in batches] == [8, 8, 4]
    paths = sorted(folder.rglob("*.png")) + sorted(folder.rglob("*.jpg"))
    np.testing.assert_array_equal(np.concatenate(batches), preprocess(paths, tiny_contract))
    assert batches[0].dtype == np.float32
    assert images.origin == f"{folder} (20 images)"


def test_stored_images_give_what_the_export_prepares(tiny_spec: ModelSpec) -> None:
    stored = pictures(5, colour=False)

    found = np.concatenate(list(open_calibration(stored, tiny_spec.preprocess).batches(2)))

    np.testing.assert_array_equal(found, prepare(stored, tiny_spec))


def test_a_calibration_file_is_read(tmp_path: Path, tiny_contract: Preprocess) -> None:
    stored = pictures(5)
    write_calibration(tmp_path / "calibration.npz", stored)

    images = open_calibration(tmp_path / "calibration.npz", tiny_contract, origin="the model's own")

    assert len(images) == 5
    assert images.origin == "the model's own"
    assert images.content_hash == open_calibration(stored, tiny_contract).content_hash


def test_indices_choose_and_order(tiny_contract: Preprocess) -> None:
    images = open_calibration(pictures(6), tiny_contract)
    everything = next(images.batches(6))

    chosen = np.concatenate(list(images.batches(2, np.array([4, 0, 3]))))

    np.testing.assert_array_equal(chosen, everything[[4, 0, 3]])
    assert list(images.batches(2, [])) == []


def test_images_are_taken_evenly_over_their_order(folder: Path, tiny_contract: Preprocess) -> None:
    images = open_calibration(folder, tiny_contract, max_images=4)

    assert [Path(images.name(i)).relative_to(folder).as_posix() for i in range(len(images))] == [
        "a/000.png", "a/005.png", "b/000.jpg", "b/005.jpg",
    ]  # fmt: skip
    assert images.origin == f"{folder} (4 of 20 images)"
    stored = pictures(20)
    few = next(open_calibration(stored, tiny_contract, max_images=4).batches(4))
    np.testing.assert_array_equal(few, preprocess(list(stored[::5]), tiny_contract))


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, tiny_contract: Preprocess) -> None:
    _save(tmp_path, pictures(4, height=200, width=200))
    for i in range(4, 64):
        shutil.copy(tmp_path / f"{i % 4:03d}.png", tmp_path / f"{i:03d}.png")

    def peak(count: int) -> int:
        images = open_calibration(tmp_path, tiny_contract, max_images=count)
        tracemalloc.start()
        for _ in images.batches(4):
            pass
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(4)
    # 60 more images as float32 would be 720 KB, decoded 7 MB.
    assert peak(64) < peak(4) + 100_000


# --- bad input ---


def test_an_empty_folder_is_refused(tmp_path: Path, tiny_contract: Preprocess) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"x")
    with pytest.raises(InputError, match="holds no image") as caught:
        open_calibration(tmp_path, tiny_contract)
    assert caught.value.fix


def test_hidden_files_are_no_images(folder: Path, tiny_contract: Preprocess) -> None:
    (folder / "._000.png").write_bytes(b"resource fork")
    (folder / "clip.mp4").write_bytes(b"x")
    (folder / "notes").write_text("x")

    images = open_calibration(folder, tiny_contract)

    assert len(images) == 20
    assert dict(images.ignored) == {".png": 1, ".mp4": 1, "notes": 1}


def test_a_folder_of_hidden_images_alone_is_refused(tmp_path: Path, tiny_contract: Preprocess) -> None:
    _save(tmp_path / ".thumbs", pictures(2))
    with pytest.raises(InputError, match="hidden files"):
        open_calibration(tmp_path, tiny_contract)


def test_corrupt_files_are_named_and_counted(folder: Path, tiny_contract: Preprocess) -> None:
    whole = (folder / "b" / "003.jpg").read_bytes()
    (folder / "b" / "003.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "b" / "007.jpg").write_bytes(b"")
    images = open_calibration(folder, tiny_contract)

    with pytest.raises(InputError, match=r"003\.jpg: not an image.*; 2 of 20 images cannot be read") as caught:
        images.traits()

    assert caught.value.fix == "remove or replace what cannot be read"
    with pytest.raises(InputError, match=r"003\.jpg"):
        images.split()
    with pytest.raises(InputError, match=r"003\.jpg"):
        list(images.batches(32))


def test_a_file_that_went_away_is_an_input_error(folder: Path, tiny_contract: Preprocess) -> None:
    images = open_calibration(folder, tiny_contract)
    (folder / "a" / "000.png").unlink()
    with pytest.raises(InputError, match=r"000\.png: No such file"):
        _ = images.content_hash


@pytest.mark.parametrize(
    "stored",
    [np.zeros((4, 8, 8), np.float32), np.zeros((0, 8, 8), np.uint8), np.zeros((4, 3, 8, 8), np.uint8),
     np.zeros((8, 8), np.uint8)],
)  # fmt: skip
def test_arrays_of_another_kind_are_refused(stored: Pixels, tiny_contract: Preprocess) -> None:
    with pytest.raises(InputError, match="expected uint8"):
        open_calibration(stored, tiny_contract)


def test_counts_below_one_are_refused(tiny_contract: Preprocess) -> None:
    with pytest.raises(InputError, match="at most 0 images"):
        open_calibration(pictures(2), tiny_contract, max_images=0)
    with pytest.raises(ValueError, match="size"):
        next(open_calibration(pictures(2), tiny_contract).batches(0))
    with pytest.raises(ValueError, match="holdout"):
        open_calibration(pictures(2), tiny_contract).split(holdout=1.0)


# --- content hash ---


def test_the_hash_is_of_content_not_of_names(folder: Path, tmp_path: Path, tiny_contract: Preprocess) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for i, path in enumerate(sorted(folder.rglob("*.*"), reverse=True)):
        shutil.copy(path, moved / f"{i}{path.suffix}")

    before = open_calibration(folder, tiny_contract).content_hash
    scanned = open_calibration(folder, tiny_contract)
    scanned.traits()

    assert open_calibration(moved, tiny_contract).content_hash == before
    assert scanned.content_hash == before


def test_the_hash_changes_with_content_count_and_contract(folder: Path, tiny_contract: Preprocess) -> None:
    other_contract = dataclasses.replace(tiny_contract, interpolation="bicubic")
    hashes = [
        open_calibration(folder, tiny_contract).content_hash,
        open_calibration(folder, other_contract).content_hash,
        open_calibration(folder, tiny_contract, max_images=19).content_hash,
    ]
    Image.fromarray(pictures(1, seed=9)[0]).save(folder / "a" / "000.png")
    hashes.append(open_calibration(folder, tiny_contract).content_hash)
    assert len(set(hashes)) == 4


# --- split ---


def _sides(images: CalibrationSet, split: CalibrationSplit) -> tuple[set[int], set[int]]:
    assert sorted({*split.fit, *split.held_out}) == list(range(len(images)))
    return set(split.fit.tolist()), set(split.held_out.tolist())


def test_a_split_is_disjoint_even_and_the_same_each_time(tiny_contract: Preprocess) -> None:
    stored = pictures(64)
    images = open_calibration(stored, tiny_contract)

    split = images.split()

    fit, held_out = _sides(images, split)
    assert not fit & held_out
    assert len(held_out) == 16
    assert [sum(i // 16 == quarter for i in held_out) for quarter in range(4)] == [4, 4, 4, 4]
    assert not split.shared
    again = open_calibration(stored, tiny_contract).split()
    np.testing.assert_array_equal(again.held_out, split.held_out)
    assert images.split(seed=1).held_out.tolist() != split.held_out.tolist()


def test_a_split_does_not_fall_in_step_with_classes_that_take_turns(tiny_contract: Preprocess) -> None:
    held_out = open_calibration(pictures(64), tiny_contract).split().held_out
    assert len({int(i) % 4 for i in held_out}) > 1


def test_copies_exact_and_near_stay_on_one_side(tmp_path: Path, tiny_contract: Preprocess) -> None:
    originals = pictures(24, height=96, width=96)
    _save(tmp_path, originals)
    for i in range(0, 24, 2):
        shutil.copy(tmp_path / f"{i:03d}.png", tmp_path / f"{i:03d}-copy.png")
        Image.fromarray(originals[i + 1]).save(tmp_path / f"z{i + 1:03d}.jpg", quality=90)
    images = open_calibration(tmp_path, tiny_contract)

    for seed in range(8):
        split = images.split(holdout=0.4, seed=seed)
        sides = [{Path(images.name(int(i))).stem.strip("z")[:3] for i in side} for side in (split.fit, split.held_out)]
        assert sides[1]
        assert not sides[0] & sides[1]


def test_a_heap_of_copies_is_not_the_judge(tiny_contract: Preprocess) -> None:
    stored = pictures(20)
    images = open_calibration(np.concatenate([np.repeat(stored[:1], 60, axis=0), stored[1:]]), tiny_contract)
    for seed in range(8):
        assert len(images.split(seed=seed).held_out) == 5


@pytest.mark.parametrize("stored", [pictures(7), np.repeat(pictures(7), 9, axis=0)])
def test_few_different_images_are_used_on_both_sides(stored: Pixels, tiny_contract: Preprocess) -> None:
    split = open_calibration(stored, tiny_contract).split()
    assert split.shared
    np.testing.assert_array_equal(split.fit, np.arange(len(stored)))
    np.testing.assert_array_equal(split.held_out, split.fit)


SPLIT_SET = pictures(30, height=16, width=16)


@given(order=st.lists(st.integers(0, 29), min_size=1, max_size=40), holdout=st.floats(0.01, 0.99), seed=st.integers(0))
def test_no_copy_ever_crosses(order: list[int], holdout: float, seed: int) -> None:
    contract = Preprocess(
        height_px=8, width_px=8, resize="stretch", crop_pct=1.0, interpolation="nearest", channel_order="rgb",
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    images = open_calibration(SPLIT_SET[order], contract)

    split = images.split(holdout=holdout, seed=seed)

    fit, held_out = _sides(images, split)
    assert fit
    assert held_out
    if not split.shared:
        assert not {order[i] for i in fit} & {order[i] for i in held_out}
