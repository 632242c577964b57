"""What is not packed: wrong input, too much of it, a full disk; one line, and nothing is written."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cspdeploy.core.errors import CspDeployError, InputError, TamperedError
from cspdeploy.pipeline import package_write
from cspdeploy.pipeline.package import PackageRequest, package_bundle
from cspdeploy.pipeline.package_write import Source
from tests.pipeline.conftest import Pack, names_in

# --- wrong input: one line, and nothing written ---


def _wrong_suffix(tmp_path: Path, bundle: Path) -> dict[str, object]:
    return {"output": tmp_path / "model.tar.gz"}


def _inside(tmp_path: Path, bundle: Path) -> dict[str, object]:
    return {"output": bundle / "model.zip"}


def _deep_inside(tmp_path: Path, bundle: Path) -> dict[str, object]:
    return {"output": bundle / "new" / "model.zip"}


def _package(tmp_path: Path, bundle: Path) -> dict[str, object]:
    package_bundle(PackageRequest(bundle=bundle, output=tmp_path / "first.zip"))
    return {"bundle": tmp_path / "first.zip"}


def _extension(tmp_path: Path, bundle: Path) -> dict[str, object]:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("manifest.json", '{"manifest_version": 3}')
        archive.writestr("background.js", "work()")
        archive.writestr("golden.npz", "numbers")
    return {}


def _manifest_alone(tmp_path: Path, bundle: Path) -> dict[str, object]:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.write(bundle / "manifest.json", "manifest.json")
    return {}


def _no_bundle(tmp_path: Path, bundle: Path) -> dict[str, object]:
    return {"bundle": tmp_path / "absent"}


def _no_artifact(tmp_path: Path, bundle: Path) -> dict[str, object]:
    return {"artifacts": ("onnx-int9",)}


def _changed(tmp_path: Path, bundle: Path) -> dict[str, object]:
    (bundle / "tiny.onnx").write_bytes(b"other")
    return {}


def _no_key(tmp_path: Path, bundle: Path) -> dict[str, object]:
    return {"sign": tmp_path / "absent.pem"}


def _folder(tmp_path: Path, bundle: Path) -> dict[str, object]:
    (tmp_path / "model.zip").mkdir()
    return {}


def _somebody_elses(tmp_path: Path, bundle: Path) -> dict[str, object]:
    (tmp_path / "model.zip").write_text("precious")
    return {}


def _file_for_a_folder(tmp_path: Path, bundle: Path) -> dict[str, object]:
    (tmp_path / "file").write_text("")
    return {"output": tmp_path / "file" / "model.zip"}


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (_wrong_suffix, "ends in .zip or .pyz"), (_inside, "lies in the bundle"),
        (_deep_inside, "lies in the bundle"), (_package, "is a package already, expected a bundle's folder"),
        (_extension, "exists and is not a package"), (_manifest_alone, "exists and is not a package"),
        (_no_bundle, "absent"),
        (_no_artifact, "no artifact 'onnx-int9'"), (_changed, "SHA-256 differs"), (_no_key, r"absent\.pem"),
        (_folder, "is a folder"), (_somebody_elses, "exists and is not a package"),
        (_file_for_a_folder, "cannot be written"),
    ],
)  # fmt: skip
def test_wrong_input(
    bundle: Path, tmp_path: Path, prepare: Callable[[Path, Path], dict[str, object]], said: str
) -> None:
    options = {"bundle": bundle, "output": tmp_path / "model.zip"} | prepare(tmp_path, bundle)
    before = {path: path.read_bytes() if path.is_file() else b"" for path in tmp_path.rglob("*")}
    with pytest.raises(CspDeployError, match=said) as found:
        package_bundle(PackageRequest(**options))  # type: ignore[arg-type]
    assert found.value.fix
    assert {path: path.read_bytes() if path.is_file() else b"" for path in tmp_path.rglob("*")} == before


def test_what_is_no_package_is_replaced_only_when_asked(pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_text("precious")
    pack("model.zip", overwrite=True)
    assert pack("model.zip").num_bytes > 1000  # and a package without being asked


def test_a_full_disk_leaves_the_old_package(pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack("model.zip")
    first = (tmp_path / "model.zip").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(package_write, "_add", fail)
    with pytest.raises(InputError, match="No space left on device") as found:
        pack("model.zip", licence="MIT")
    assert "free some space" in found.value.fix
    assert (tmp_path / "model.zip").read_bytes() == first
    assert [name for name in names_in(tmp_path) if name.startswith(".")] == []


def test_more_than_a_package_holds(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_write, "MAX_PACKED_BYTES", 1000)
    with pytest.raises(InputError, match="bytes to pack, expected at most 1000"):
        pack("model.zip")


def test_more_than_zipfile_writes_is_refused_before_it_is_packed(tmp_path: Path) -> None:
    """A hole on the disk, of as many bytes as zipfile says no to, and one less than that is its limit."""
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(package_write.MAX_PACKED_BYTES + 1)
    with pytest.raises(InputError, match="bytes to pack, expected at most 2045222520") as found:
        package_write.write_package(tmp_path / "model.zip", {"large": Source(path=large, saving=0.05)})
    assert "fewer artifacts" in found.value.fix
    for size, refused in ((package_write.MAX_PACKED_BYTES, False), (package_write.MAX_PACKED_BYTES + 1, True)):
        info = zipfile.ZipInfo("large")
        info.file_size = size
        with zipfile.ZipFile(io.BytesIO(), "w", allowZip64=False) as archive:
            if refused:
                with pytest.raises(zipfile.LargeZipFile):
                    archive.open(info, "w")
            else:
                archive.open(info, "w").close()


@pytest.mark.parametrize(
    ("given", "better"), [("model.tar.gz", "model.zip"), ("net1.5.rar", "net1.5.zip"), ("model", "model.zip")]
)
def test_a_suffix_that_is_none_of_ours_is_replaced_in_the_fix(
    tiny_bundle: Path, tmp_path: Path, given: str, better: str
) -> None:
    with pytest.raises(InputError, match=r"ends in \.zip or \.pyz") as found:
        package_bundle(PackageRequest(bundle=tiny_bundle, output=tmp_path / given))
    assert found.value.fix == f"-o {better}"


def test_what_is_packed_is_what_is_hashed_and_what_is_not_packed_is_not_read(bundle: Path, tmp_path: Path) -> None:
    """An artifact that stays behind may be as broken as it likes; a file that changes while it is packed may not."""
    (bundle / "tiny.fp16.onnx").write_bytes(b"broken")
    report = package_bundle(PackageRequest(bundle=bundle, output=tmp_path / "model.zip"))
    assert report.artifacts == ("onnx",)
    whole = (bundle / "tiny.onnx").read_bytes()

    def change(what: str, done: int, total: int) -> None:
        if what == "packing, tiny.onnx":
            (bundle / "tiny.onnx").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    with pytest.raises(TamperedError, match=r"tiny\.onnx: not the file of the manifest"):
        package_bundle(PackageRequest(bundle=bundle, output=tmp_path / "other.zip"), progress=change)
    assert not (tmp_path / "other.zip").exists()
