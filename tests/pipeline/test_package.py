"""One file for a device: what is in it, that it is a bundle, that its bytes are the same again, that it runs alone."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
import zipimport
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from PIL import Image

import cspdeploy
from cspdeploy.core import errors
from cspdeploy.core.archive import opened_bundle, unpack
from cspdeploy.core.bundle import TIMINGS_FILE, check_hashes, read_manifest
from cspdeploy.core.errors import CspDeployError, InputError, TamperedError
from cspdeploy.core.signature import verify_folder
from cspdeploy.edge import Predictor
from cspdeploy.pipeline import package_write
from cspdeploy.pipeline.package import PackageReport, PackageRequest, package_bundle
from cspdeploy.pipeline.package_modules import needed_files, runtime_modules
from cspdeploy.pipeline.package_write import Source

Pack = Callable[..., PackageReport]


@pytest.fixture
def pack(tiny_bundle: Path, tmp_path: Path) -> Pack:
    """`pack("model.zip", artifacts=("onnx",))`: of the tiny bundle, into the test's folder."""

    def call(name: str, *, bundle: Path = tiny_bundle, **options: object) -> PackageReport:
        return package_bundle(PackageRequest(bundle=bundle, output=tmp_path / name, **options))  # type: ignore[arg-type]

    return call


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "exported" / "tiny"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(3).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    pem = serialization.Encoding.PEM
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )  # fmt: skip
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is in it ---


def test_a_zip_holds_what_a_device_needs_and_is_a_bundle(pack: Pack, tiny_bundle: Path, tmp_path: Path) -> None:
    report = pack("model.zip")
    unpack(tmp_path / "model.zip", tmp_path / "out")
    folder = tmp_path / "out" / "tiny"
    assert names_in(tmp_path / "out") == ["tiny"]
    assert names_in(folder) == ["LICENCE.txt", "golden.npz", "labels.txt", "manifest.json", "tiny.onnx"]
    manifest = read_manifest(folder)
    check_hashes(folder, manifest)
    assert [artifact.kind for artifact in manifest.artifacts] == ["onnx"] == list(report.artifacts)
    assert [record.file for record in manifest.files] == ["golden.npz", "labels.txt", "LICENCE.txt"]
    assert manifest.spec == read_manifest(tiny_bundle).spec
    assert (report.kind, report.key, report.untrained) == ("zip", "", False)
    assert report.num_bytes == (tmp_path / "model.zip").stat().st_size


def test_its_answers_are_those_of_the_bundle(pack: Pack, tiny_bundle: Path, photo: Path, tmp_path: Path) -> None:
    pack("model.zip")
    with opened_bundle(tmp_path / "model.zip") as folder:
        found = Predictor.open(folder)(photo)
    assert list(found) == list(Predictor.open(tiny_bundle)(photo))


@pytest.mark.parametrize(
    ("asked", "kinds"),
    [
        (("onnx-fp16",), ["onnx-fp16"]),
        (("onnx-fp16", "onnx"), ["onnx", "onnx-fp16"]),
        (("all",), ["torchscript", "onnx", "onnx-fp16"]),
    ],
)
def test_the_artifacts_that_were_asked_for(pack: Pack, asked: tuple[str, ...], kinds: list[str]) -> None:
    assert list(pack("model.zip", artifacts=asked).artifacts) == kinds


@pytest.mark.slow
def test_int8_is_packed_by_default_where_there_is_one(pack: Pack, tiny_int8_bundle: Path) -> None:
    assert pack("model.zip", bundle=tiny_int8_bundle).artifacts == ("onnx", "onnx-int8")


def test_a_bundle_with_none_of_the_defaults(pack: Pack, tmp_path: Path) -> None:
    pack("fp16.zip", artifacts=("onnx-fp16",))
    unpack(tmp_path / "fp16.zip", tmp_path / "out")
    with pytest.raises(InputError, match="has neither of onnx, onnx-int8") as found:
        pack("model.zip", bundle=tmp_path / "out" / "tiny")
    assert found.value.fix == "--artifact onnx-fp16"


def test_timings_travel_and_the_report_does_not(pack: Pack, bundle: Path, tmp_path: Path) -> None:
    (bundle / "report.html").write_text("<html>")
    (bundle / TIMINGS_FILE).write_text("{}")
    names = {file.name for file in pack("model.zip", bundle=bundle).files}
    assert "tiny/timings.json" in names
    assert "tiny/report.html" not in names
    (bundle / TIMINGS_FILE).unlink()
    (bundle / TIMINGS_FILE).symlink_to("/etc/hostname")
    assert "tiny/timings.json" not in {file.name for file in pack("model.zip", bundle=bundle).files}


def test_packed_where_that_pays_and_stored_where_not(pack: Pack, tmp_path: Path) -> None:
    rows = {file.name: file for file in pack("model.zip").files}
    assert rows["tiny/manifest.json"].packed_bytes < rows["tiny/manifest.json"].num_bytes / 2
    golden = rows["tiny/golden.npz"]  # random images, which nothing makes smaller
    assert golden.packed_bytes == golden.num_bytes


def test_what_a_reader_would_take_for_a_bomb_is_stored(tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(3 << 20))
    sources = {"zeros": Source(path=tmp_path / "zeros", saving=0.05)}
    entries = package_write.write_package(tmp_path / "model.zip", sources)
    assert entries[0].packed_bytes == entries[0].num_bytes == 3 << 20


def test_what_looks_fair_in_samples_and_is_a_bomb_as_a_whole_is_stored(tmp_path: Path) -> None:
    """Random bytes where the samples are taken, zeros in between."""
    size, draw = 16 << 20, np.random.default_rng(0)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(size)
        for start in range(0, size, size // 8):
            file.seek(start)
            file.write(draw.bytes(20_000))
    (tmp_path / "text").write_text("words " * 100)
    sources = {name: Source(path=tmp_path / name, saving=0.05) for name in ("sparse", "text")}
    entries = {entry.name: entry for entry in package_write.write_package(tmp_path / "model.zip", sources)}
    assert entries["sparse"].packed_bytes == size
    assert entries["text"].packed_bytes < entries["text"].num_bytes


# --- the same bytes again ---


@pytest.mark.parametrize("name", ["model.zip", "model.pyz"])
def test_the_same_bytes_on_every_run_whatever_umask_date_and_order(
    pack: Pack, tiny_bundle: Path, tmp_path: Path, keys: tuple[Path, Path], name: str
) -> None:
    with umask(0o077):
        pack(name, sign=keys[0], licence="Apache-2.0")
    first = (tmp_path / name).read_bytes()
    other = tmp_path / "copy"
    other.mkdir()
    for path in sorted(tiny_bundle.iterdir(), reverse=True):
        shutil.copyfile(path, other / path.name)
        os.utime(other / path.name, (1e9, 1e9))
        (other / path.name).chmod(0o640)
    with umask(0o002):
        report = pack(name, bundle=other, sign=keys[0], licence="Apache-2.0")
    assert (tmp_path / name).read_bytes() == first
    with zipfile.ZipFile(tmp_path / name) as archive:
        infos = archive.infolist()
    assert [info.filename for info in infos] == sorted(file.name for file in report.files)
    assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}
    assert {info.external_attr >> 16 for info in infos} == {0o100644}
    mode = stat.S_IMODE((tmp_path / name).stat().st_mode)
    assert mode == (0o600 if name == "model.zip" else 0o700) or mode in (0o664, 0o775)


@pytest.mark.slow
def test_the_same_bytes_from_another_process(tiny_bundle: Path, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from cspdeploy.pipeline.package import PackageRequest, package_bundle
package_bundle(PackageRequest(bundle=Path(sys.argv[1]), output=Path(sys.argv[2])))
"""
    for seed in ("1", "2"):
        words = [sys.executable, "-c", code, str(tiny_bundle), str(tmp_path / f"{seed}.pyz")]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(cspdeploy.__file__).parents[1])}
        subprocess.run(words, env=environment, check=True)
    assert (tmp_path / "1.pyz").read_bytes() == (tmp_path / "2.pyz").read_bytes()


def test_a_package_packed_again_is_the_same_package(pack: Pack, tmp_path: Path) -> None:
    pack("model.zip", licence="MIT")
    unpack(tmp_path / "model.zip", tmp_path / "out")
    pack("again.zip", bundle=tmp_path / "out" / "tiny")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "model.zip").read_bytes()


# --- licence and origin ---


def test_the_page_on_the_weights(pack: Pack, tmp_path: Path) -> None:
    report = pack("model.zip")
    assert any("licence of the weights is not stated" in note for note in report.notes)
    with opened_bundle(tmp_path / "model.zip") as folder:
        page = (folder / "LICENCE.txt").read_text(encoding="utf-8")
    assert "model:     tiny\nlicence:   not stated\nweights:   user\norigin:    test\n" in page


def test_a_licence_by_its_name_and_as_a_text(pack: Pack, tmp_path: Path) -> None:
    assert pack("model.zip", licence="CC-BY-4.0").notes == ()
    with opened_bundle(tmp_path / "model.zip") as folder:
        assert "licence:   CC-BY-4.0\n" in (folder / "LICENCE.txt").read_text()
    (tmp_path / "MIT").write_text("MIT License\r\n\r\nPermission is hereby granted\r\n")
    pack("model.zip", licence=str(tmp_path / "MIT"))
    with opened_bundle(tmp_path / "model.zip") as folder:
        page = (folder / "LICENCE.txt").read_text()
    assert "licence:   see below" in page
    assert page.endswith("\nMIT License\n\nPermission is hereby granted\n")


@pytest.mark.parametrize(
    "given",
    ["absent.txt", "some/where", "LICENSE.md", "LICENSE", "licence", "COPYING.lesser", "NOTICE", "LICENSE-MIT"],
)
def test_a_licence_that_is_meant_to_be_a_file(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        pack("model.zip", licence=given)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"text\0", b"x" * ((1 << 20) + 1)])
def test_a_licence_that_is_no_text(pack: Pack, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "licence").write_bytes(data)
    with pytest.raises(InputError, match="--licence"):
        pack("model.zip", licence=str(tmp_path / "licence"))
    assert not (tmp_path / "model.zip").exists()


# --- signed ---


def test_a_signed_package(pack: Pack, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    report = pack("model.zip", sign=keys[0])
    with opened_bundle(tmp_path / "model.zip") as folder:
        assert verify_folder(folder, keys[1]) == report.key
        (folder / "labels.txt").write_text("no\n" * 10)
        with pytest.raises(TamperedError):
            verify_folder(folder, keys[1])


def test_an_older_signature_does_not_travel_with_a_new_manifest(
    pack: Pack, bundle: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    (bundle / "manifest.sig").write_bytes(bytes(64))
    pack("model.zip", bundle=bundle)
    with opened_bundle(tmp_path / "model.zip") as folder:
        assert not (folder / "manifest.sig").exists()


def test_a_signed_program_has_a_signature_of_the_whole_file(
    pack: Pack, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    report = pack("model.pyz", sign=keys[0])
    place = tmp_path / "model.pyz.sig"
    assert report.signature_file == str(place)
    assert any("-rawin -in model.pyz -sigfile model.pyz.sig" in note for note in report.notes)
    public = serialization.load_pem_public_key(keys[1].read_bytes())
    assert isinstance(public, Ed25519PublicKey)
    public.verify(place.read_bytes(), (tmp_path / "model.pyz").read_bytes())
    assert pack("model.pyz", sign=keys[0]).key == report.key  # over its own older one
    assert pack("model.zip", sign=keys[0]).signature_file == ""
    assert not (tmp_path / "model.zip.sig").exists()
    before = (tmp_path / "model.pyz").read_bytes()
    place.write_text("precious")
    with pytest.raises(InputError, match="exists and is not a signature"):
        pack("model.pyz", sign=keys[0], licence="MIT")
    assert (tmp_path / "model.pyz").read_bytes() == before


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


# --- the program ---


@pytest.fixture(scope="module")
def program_report(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> PackageReport:
    output = tmp_path_factory.mktemp("device") / "model.pyz"
    return package_bundle(PackageRequest(bundle=tiny_bundle, output=output))


@pytest.fixture(scope="module")
def program(program_report: PackageReport) -> Path:
    return Path(program_report.file)


def test_the_modules_of_the_program_are_those_of_the_edge(program_report: PackageReport) -> None:
    names = {file.name for file in program_report.files}
    assert {"__main__.py", "cspdeploy/edge/zipapp_main.py", "cspdeploy/runtimes/ort.py"} <= names
    rooms = {name.split("/")[1] for name in names if name.startswith("cspdeploy/") and name.count("/") > 1}
    assert rooms == {"core", "edge", "runtimes"}
    assert not any("torch" in name for name in names)
    assert "bundle/report.html" not in names


def test_the_model_is_stored_as_it_is_and_need_not_be_unpacked(program_report: PackageReport) -> None:
    model = {file.name: file for file in program_report.files}["bundle/tiny.onnx"]
    assert model.packed_bytes == model.num_bytes


def test_bytecode_lies_beside_each_source_and_is_what_python_loads(program_report: PackageReport) -> None:
    names = {file.name for file in program_report.files}
    sources = {name for name in names if name.startswith("cspdeploy/") and name.endswith(".py")}
    assert {name for name in names if name.endswith(".pyc")} == {f"{name}c" for name in sources}
    importer = zipimport.zipimporter(program_report.file)
    header = importer.get_data("cspdeploy/core/errors.pyc")[:16]
    assert header[:4] == importlib.util.MAGIC_NUMBER
    assert header[8:] == importlib.util.source_hash(Path(errors.__file__).read_bytes())


def test_a_torchscript_artifact_brings_its_engine() -> None:
    assert runtime_modules({"torchscript"}) == ("cspdeploy.runtimes.torchscript",)
    assert "cspdeploy.runtimes.ort" in runtime_modules({"onnx"})


def test_a_data_file_comes_with_the_module_that_names_it() -> None:
    assert "cspdeploy/core/imagenet.tsv" in {file.name for file in needed_files(("cspdeploy.core.imagenet",))}
    assert "cspdeploy/core/imagenet.tsv" not in {file.name for file in needed_files(("cspdeploy.core.golden",))}


def test_imports_inside_functions_count_and_those_for_type_checkers_do_not() -> None:
    found = {file.name for file in needed_files(("cspdeploy.runtimes.ort",))}
    assert "cspdeploy/runtimes/ort_profile.py" in found  # imported when a profile is asked for
    found = {file.name for file in needed_files(("cspdeploy.cli.package",))}
    assert "cspdeploy/pipeline/package.py" in found  # in the command
    with pytest.raises(ModuleNotFoundError):
        needed_files(("cspdeploy.no_such_module",))


def run_alone(program: Path, *arguments: object, blocked: str = "") -> subprocess.CompletedProcess[str]:
    """In a process that knows nothing but the program, numpy, onnxruntime and Pillow.

    cspdeploy, torch, onnx, typer and rich are linked to nowhere; no environment, another folder, and none of site's
    hooks for editable installs.
    """
    (home := program.parent / "elsewhere").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-S", "-B", str(program), *map(str, arguments)], cwd=home, capture_output=True, text=True,
        env=device_environment(program, blocked), check=False,
    )  # fmt: skip


def device_environment(program: Path, blocked: str = "") -> dict[str, str]:
    """That of `run_alone`: a folder of links to the few packages, beside the program."""
    packages = program.parent / f"packages{blocked}"
    if not packages.exists():
        packages.mkdir()
        place = Path(onnxruntime.__file__).parents[1]
        for path in place.iterdir():
            name = path.name.partition("-")[0].partition(".")[0].lower()
            if name in {"numpy", "onnxruntime", "onnxruntime_gpu", "flatbuffers", "protobuf", "google", "pil", "pillow",
                        "packaging", "coloredlogs", "sympy", "mpmath"} - {blocked}:  # fmt: skip
                (packages / path.name).symlink_to(path)
    return {"PYTHONPATH": str(packages), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


def test_the_program_classifies_a_photo(program: Path, tiny_bundle: Path, photo: Path) -> None:
    done = run_alone(program, photo, photo, "--top", "3", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    expected = Predictor.open(tiny_bundle)(photo, top=3)
    assert [row["image"] for row in rows] == [str(photo)] * 2
    assert [row["untrained"] for row in rows] == [False, False]
    assert [one["label"] for one in rows[0]["predictions"]] == [one.label for one in expected]
    assert rows[0]["predictions"][0]["probability"] == pytest.approx(expected[0].probability, rel=1e-5)
    text = run_alone(program, photo, "--top", "1").stdout.splitlines()
    assert text[0] == str(photo)
    assert expected[0].label in text[1]


def test_the_program_checks_itself(program: Path) -> None:
    done = run_alone(program, "selftest", "--json", "--no-latency")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["verdict"], report["bundle"]) == ("pass", str(program))  # and no private folder


def test_the_check_of_the_program_is_called_by_its_name(program: Path) -> None:
    done = run_alone(program, "selftest", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: model.pyz selftest [")
    assert "BUNDLE" not in done.stdout
    assert "model.pyz.sig" in done.stdout
    done = run_alone(program, "selftest", "somewhere")
    assert (done.returncode, done.stderr) == (
        2, "error: unrecognized arguments: somewhere\nfix: model.pyz selftest --help\n",
    )  # fmt: skip


def test_an_error_of_the_program_is_json_where_that_was_asked_for(program: Path, photo: Path) -> None:
    for words, code, said in (
        ([photo, "--runtime", "ort-abacus"], 2, "unknown"),
        (["selftest", "--artifact", "onnx-int8"], 2, "no artifact 'onnx-int8'"),
        ([photo, "--no-such-option"], 2, "unrecognized"),
    ):
        done = run_alone(program, *words, "--json")
        found = json.loads(done.stdout)
        assert (done.returncode, found["verdict"], found["error"]["exit_code"]) == (code, "error", code)
        assert said in found["error"]["message"]
        assert "cspdeploy" not in found["error"]["fix"]


def test_a_changed_program_is_told_of_by_its_own_name(program: Path, tmp_path: Path) -> None:
    changed = _changed_model(program, tmp_path / "model.pyz")
    done = run_alone(changed, "selftest", "--no-latency", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["verdict"]) == (1, "fail")
    reason = next(row["reason"] for row in report["checks"] if row["check"] == "files")
    assert reason.startswith(f"{changed}: tiny.onnx: not the file of the manifest")


def test_every_module_of_the_program_can_be_imported_from_it_alone(program: Path) -> None:
    """None is missing, in any of them, at whatever depth: each is imported, and each import in each is carried out."""
    code = """
import ast, importlib, sys, zipfile
names = [name for name in zipfile.ZipFile(sys.argv[1]).namelist() if name[:10] == "cspdeploy/" and name[-3:] == ".py"]
for name in names:
    module = importlib.import_module(name[:-3].replace("/", ".").removesuffix(".__init__"))
    assert module.__file__.startswith(sys.argv[1]), module.__file__
    tree = ast.parse(module.__loader__.get_source(module.__name__))
    typing_only = [node for branch in ast.walk(tree) if isinstance(branch, ast.If)
                   and ast.unparse(branch.test) == "TYPE_CHECKING" for node in ast.walk(branch)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in typing_only and (node.module or "").startswith("cspdeploy"):
            exec(ast.unparse(node), {})
print(len(names))
"""
    script = program.parent / "imports.py"
    script.write_text(code)
    environment = device_environment(program)
    environment["PYTHONPATH"] = f"{program}{os.pathsep}{environment['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "-S", "-B", str(script), str(program)], capture_output=True, text=True, check=False,
        env=environment, cwd=program.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


@pytest.mark.slow
def test_the_program_helps_and_refuses_in_one_line(program: Path, photo: Path) -> None:
    done = run_alone(program, "--help")
    assert (done.returncode, "usage: model.pyz" in done.stdout, "selftest" in done.stdout) == (0, True, True)
    assert run_alone(program).returncode == 2
    for words, code, said in (
        (["absent.jpg"], 2, "absent.jpg"),
        ([photo, "--artifact", "onnx-int8"], 2, "no artifact 'onnx-int8', it has onnx"),
        ([photo, "--runtime", "ort-cuda"], 3, "--runtime ort-cuda"),
        ([photo, "--runtime", "ort-abacus"], 2, "unknown"),
        ([photo, "--top", "0"], 2, "--top 0"),
        ([photo, "--threads", "-1"], 2, "--threads -1"),
    ):
        done = run_alone(program, *words)
        assert done.returncode == code, done.stderr
        assert done.stdout == ""
        lines = done.stderr.splitlines()
        assert [line.partition(" ")[0] for line in lines] == ["error:", "fix:"], done.stderr
        assert said in lines[0]


@pytest.mark.slow
def test_the_program_without_its_engine(program: Path, photo: Path) -> None:
    done = run_alone(program, photo, blocked="onnxruntime")
    assert (done.returncode, "onnxruntime" in done.stderr, "Traceback" in done.stderr) == (3, True, False), done.stderr
    done = run_alone(program, photo, blocked="numpy")
    assert (done.returncode, done.stderr.splitlines()) == (
        3,
        ["error: needs the package 'numpy', which is not installed", "fix: pip install numpy onnxruntime"],
    )


@pytest.mark.slow
def test_the_program_without_pillow_gives_the_same(program: Path, photo: Path) -> None:
    with_pillow, without = run_alone(program, photo, "--json"), run_alone(program, photo, "--json", blocked="pil")
    assert without.returncode == 0, without.stderr
    assert without.stdout == with_pillow.stdout


@pytest.mark.slow
def test_the_program_writes_nothing_to_predict(program: Path, photo: Path) -> None:
    """Files may be opened for reading alone: an audit hook in the process refuses all else."""
    hook = """
import os, runpy, sys

def refuse(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise SystemExit(f"opened for writing: {arguments[0]}")
    if event in ("os.mkdir", "os.rename", "os.remove", "tempfile.mkdtemp", "tempfile.mkstemp"):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(refuse)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    script = program.parent / "hook.py"
    script.write_text(hook)
    environment = device_environment(program)
    words = [sys.executable, "-S", "-B", str(script), str(program)]
    done = subprocess.run([*words, str(photo)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "label " in done.stdout
    done = subprocess.run([*words, "selftest"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "opened for writing" in done.stderr) == (1, True)  # the hook bites: selftest unpacks


def _changed_model(program: Path, path: Path) -> Path:
    with zipfile.ZipFile(program) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            target.writestr(info, data[:-1] + bytes([data[-1] ^ 1]) if info.filename.endswith(".onnx") else data)
    return path


def test_a_program_whose_model_was_changed_does_not_run(program: Path, photo: Path, tmp_path: Path) -> None:
    done = run_alone(_changed_model(program, tmp_path / "model.pyz"), photo)
    assert (done.returncode, done.stdout) == (1, "")
    assert "tiny.onnx: not the file of the manifest" in done.stderr


@pytest.mark.slow
def test_a_signed_program_checks_its_signature(
    pack: Pack, tmp_path: Path, program: Path, keys: tuple[Path, Path]
) -> None:
    """`cryptography` is there to check it; on a device without, the error names the extra."""
    report = pack("model.pyz", sign=keys[0])
    assert any("checks the model, not the program" in note for note in report.notes)
    with opened_bundle(tmp_path / "model.pyz") as folder:
        assert verify_folder(folder, keys[1]) == report.key
    done = run_alone(tmp_path / "model.pyz", "selftest", "--no-latency", "--key", keys[1])
    assert (done.returncode, "pip install cryptography" in done.stderr) == (3, True), done.stdout + done.stderr
