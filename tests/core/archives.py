"""Packages for the tests of those who read them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cspdeploy.core.archive import unpack
from cspdeploy.core.errors import InputError

GOOD = {"tiny/manifest.json": b"{}", "tiny/tiny.onnx": bytes(range(256)) * 40, "tiny/labels.txt": b"cat\ndog\n"}


def packed(files: dict[str, bytes], *, change: Callable[[zipfile.ZipInfo], None] | None = None) -> bytes:
    """A zip file; `change` may alter what its directory says of each entry."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as written:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o100644 << 16
            if change is not None:
                change(info)
            written.writestr(info, data)
    return buffer.getvalue()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(path: Path, said: str) -> None:
    """Unpacking it ends in one error, which says that, and leaves nothing."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(InputError, match=said) as found:
        unpack(path, path.parent / "out")
    assert found.value.fix
    assert sorted(path.parent.rglob("*")) == before
