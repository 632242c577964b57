from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from cspdeploy.core.errors import InputError, TamperedError
from cspdeploy.core.integrity import Expected, held_unchanged, require_unchanged


@pytest.fixture
def expected(tmp_path: Path) -> Expected:
    (tmp_path / "a.onnx").write_bytes(b"content")
    return ("a.onnx", hashlib.sha256(b"content").hexdigest(), 7)


def test_right_file(tmp_path: Path, expected: Expected) -> None:
    require_unchanged(tmp_path, [expected])
    with held_unchanged(tmp_path, expected):
        pass


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"Content", "SHA-256 differs"), (b"cont", "4 of 7 bytes: copied in part"), (b"contents", "SHA-256 differs")],
)
def test_wrong_file(tmp_path: Path, expected: Expected, content: bytes, told: str) -> None:
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(TamperedError, match=told) as caught:
        require_unchanged(tmp_path, [expected])
    assert ("in part" in caught.value.message) is (len(content) < 7)


def test_all_wrong_files_are_named(tmp_path: Path, expected: Expected) -> None:
    (tmp_path / "b.onnx").write_bytes(b"")
    (tmp_path / "c.onnx").write_bytes(b"")
    with pytest.raises(TamperedError, match=r"b\.onnx, c\.onnx: .*2 copied in part"):
        require_unchanged(tmp_path, [expected, ("b.onnx", "0", 1), ("c.onnx", "0", 1)])


def test_file_that_is_gone(tmp_path: Path, expected: Expected) -> None:
    (tmp_path / "a.onnx").unlink()
    with pytest.raises(InputError, match=r"a\.onnx: No such file"):
        require_unchanged(tmp_path, [expected])
    with pytest.raises(InputError, match=r"a\.onnx: No such file"), held_unchanged(tmp_path, expected):
        pass


@pytest.mark.parametrize("how", ["written", "replaced", "touched back"])
def test_file_that_changes_while_it_is_held(tmp_path: Path, expected: Expected, how: str) -> None:
    path = tmp_path / "a.onnx"
    old = path.stat()
    os.utime(path, ns=(0, 0))  # long ago: the clock of a file system is coarse
    with pytest.raises(TamperedError, match="has changed while it was opened"), held_unchanged(tmp_path, expected):  # noqa: PT012
        if how == "replaced":
            (tmp_path / "b").write_bytes(b"content")
            (tmp_path / "b").replace(path)
        else:
            path.write_bytes(b"CONTENT")
        if how == "touched back":
            os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
