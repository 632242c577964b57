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
        "output_fp64": logits,
        "output_fp32": logits.astype(np.float32),
    }


def _golden(arrays: Arrays) -> Golden:
    return Golden(
        images=arrays["images"], x_NCHW=arrays["input"], output_fp64=arrays["output_fp64"],
        output_fp32=arrays["output_fp32"],
    )  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    arrays = _arrays()
    write_golden(tmp_path / "golden.npz", _golden(arrays))
    back = read_golden(tmp_path / "golden.npz")
    for got, name in ((back.images, "images"), (back.x_NCHW, "input"), (back.output_fp64, "output_fp64"),
                      (back.output_fp32, "output_fp32")):  # fmt: skip
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
        ("output_fp64", np.full((3, 5), np.nan)),
        ("output_fp32", np.full((3, 5), np.inf, np.float32)),
        ("output_fp64", np.ones((3, 5), np.float32)),
        ("input", np.ones((3, 3, 4, 4), np.float64)),
        ("images", np.ones((3, 8, 6), np.int16)),
        ("images", np.ones((2, 8, 6), np.uint8)),
        ("output_fp32", np.float32(1)),
        ("images", np.array([{}, {}, {}])),
    ],
    ids=["nan", "inf", "fp32 as fp64", "double input", "int16 images", "count", "scalar", "pickle"],
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
    del arrays["output_fp64"]
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
