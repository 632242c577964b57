from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import Golden, num_golden_images, read_golden, write_golden

Arrays = dict[str, npt.NDArray[Any]]


def _arrays(num: int = 3) -> Arrays:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(num, 5))
    return {
        "images": rng.integers(0, 256, (num, 8, 6), np.uint8),
        "input": rng.normal(size=(num, 3, 4, 4)).astype(np.float32),
        "output_fp64.logits": logits,
        "output_fp32.logits": logits.astype(np.float32),
    }


def _golden(arrays: Arrays) -> Golden:
    return Golden(
        images=arrays["images"], x_NCHW=arrays["input"], outputs_fp64={"logits": arrays["output_fp64.logits"]},
        outputs_fp32={"logits": arrays["output_fp32.logits"]},
    )  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    arrays = _arrays()
    write_golden(tmp_path / "golden.npz", _golden(arrays))
    back = read_golden(tmp_path / "golden.npz")
    for got, name in (
        (back.images, "images"),
        (back.x_NCHW, "input"),
        (back.outputs_fp64["logits"], "output_fp64.logits"),
        (back.outputs_fp32["logits"], "output_fp32.logits"),
    ):
        assert got.dtype == arrays[name].dtype
        assert np.array_equal(got, arrays[name])


def test_same_arrays_give_the_same_bytes_without_a_date(tmp_path: Path) -> None:
    first, second = tmp_path / "a.npz", tmp_path / "b.npz"
    for path in (first, second):
        write_golden(path, _golden(_arrays()))
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("output_fp64.logits", np.full((3, 5), np.nan)),
        ("output_fp32.logits", np.full((3, 5), np.inf, np.float32)),
        ("output_fp64.logits", np.ones((3, 5), np.float32)),
        ("input", np.ones((3, 3, 4, 4), np.float64)),
        ("images", np.ones((3, 8, 6), np.int16)),
        ("images", np.ones((2, 8, 6), np.uint8)),
        ("output_fp32.logits", np.float32(1)),
        ("images", np.array([{}, {}, {}])),
        ("images", np.arange(24, dtype=np.uint8).reshape(3, 8)),
    ],
    ids=["nan", "inf", "fp32 as fp64", "double input", "int16 images", "count", "scalar", "pickle", "flat images"],
)
def test_wrong_array_is_refused(tmp_path: Path, name: str, array: npt.NDArray[Any]) -> None:
    np.savez(tmp_path / "golden.npz", **{**_arrays(), name: array})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not a golden file"):
        read_golden(tmp_path / "golden.npz")


def test_reference_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="above 0"):
        _golden({name: array[:0] for name, array in _arrays().items()})
    np.savez(tmp_path / "golden.npz", **{name: array[:0] for name, array in _arrays().items()})  # type: ignore[arg-type]
    with pytest.raises(InputError):
        read_golden(tmp_path / "golden.npz")


def test_missing_array_and_missing_file(tmp_path: Path) -> None:
    arrays = _arrays()
    del arrays["output_fp64.logits"]
    np.savez(tmp_path / "golden.npz", **arrays)  # type: ignore[arg-type]
    for name in ("golden.npz", "none.npz"):
        with pytest.raises(InputError, match="not a golden file"):
            read_golden(tmp_path / name)


def test_every_broken_file_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    write_golden(path, _golden(_arrays()))
    whole = path.read_bytes()
    truncated = [whole[:size] for size in range(0, len(whole), 97)]
    flipped = [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(80, 280, 4)]
    for content in (b"garbage", *truncated, *flipped):
        path.write_bytes(content)
        with pytest.raises(InputError):
            read_golden(path)


def test_archive_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    write_golden(path, _golden(_arrays()))
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, 1 << 31)  # uncompressed size in the central directory
    path.write_bytes(data)
    with pytest.raises(InputError, match="unpacks to"):
        read_golden(path)


def test_array_header_that_claims_petabytes_is_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**15,)})
    np.savez(tmp_path / "golden.npz", **_arrays())  # type: ignore[arg-type]
    with zipfile.ZipFile(tmp_path / "golden.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    with pytest.raises(InputError):
        read_golden(tmp_path / "golden.npz")


def test_number_of_images_follows_their_size() -> None:
    assert num_golden_images(32, 32) == 64
    assert num_golden_images(256, 256) == 8
    assert num_golden_images(160, 160) == 20
    assert num_golden_images(4000, 4000) == 8


def test_several_outputs_keep_names_order_and_shapes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    maps = {"features_s8": rng.normal(size=(3, 4, 2, 2)), "features_s16": rng.normal(size=(3, 8, 1, 1))}
    golden = Golden(
        images=rng.integers(0, 256, (3, 8, 6), np.uint8), x_NCHW=np.zeros((3, 3, 4, 4), np.float32), outputs_fp64=maps,
        outputs_fp32={name: array.astype(np.float32) for name, array in maps.items()},
    )  # fmt: skip
    write_golden(tmp_path / "golden.npz", golden)
    back = read_golden(tmp_path / "golden.npz")
    assert list(back.outputs_fp64) == list(back.outputs_fp32) == ["features_s8", "features_s16"]
    assert all(np.array_equal(back.outputs_fp64[name], maps[name]) for name in maps)


def test_outputs_that_only_one_precision_has_are_refused(tmp_path: Path) -> None:
    arrays = _arrays()
    arrays["output_fp64.more"] = arrays["output_fp64.logits"]
    np.savez(tmp_path / "golden.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected the same"):
        read_golden(tmp_path / "golden.npz")


def test_large_outputs_are_stored_for_fewer_images_but_never_one() -> None:
    assert num_golden_images(256, 256, num_output_values=1000) == 8
    assert num_golden_images(256, 256, num_output_values=2**20) == 4
    assert num_golden_images(608, 608, num_output_values=2**24) == 2


@pytest.mark.parametrize("shape", [(3, 8, 6), (3, 8, 6, 3)])
def test_blank_images_are_no_reference(tmp_path: Path, shape: tuple[int, ...]) -> None:
    arrays = _arrays()
    colours = np.arange(3, dtype=np.uint8).reshape(3, *[1] * (len(shape) - 1))
    if len(shape) == 4:
        colours = colours + np.array([0, 7, 9], np.uint8)
    images = np.broadcast_to(colours, shape).copy()
    write_golden(tmp_path / "golden.npz", _golden({**arrays, "images": images}))
    with pytest.raises(InputError, match="each of its 3 images is of one colour"):
        read_golden(tmp_path / "golden.npz")
    images[1, 2, 3] = 200
    write_golden(tmp_path / "golden.npz", _golden({**arrays, "images": images}))
    assert np.array_equal(read_golden(tmp_path / "golden.npz").images, images)


def test_no_images_at_all_has_its_own_line(tmp_path: Path) -> None:
    arrays = _arrays()
    del arrays["images"]
    np.savez(tmp_path / "golden.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds no images") as caught:
        read_golden(tmp_path / "golden.npz")
    assert "--calib" in caught.value.fix
