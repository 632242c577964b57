from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import cspdeploy
from cspdeploy.core.bundle import (
    BUNDLE,
    MODEL_FOLDER,
    SIGNATURE_FILE,
    TIMINGS_FILE,
    FolderKind,
    check_hashes,
    disk_errors,
    file_record,
    file_sha256,
    find_bundles,
    read_manifest,
    staged_folder,
    write_manifest,
)  # fmt: skip
from cspdeploy.core.errors import InputError, TamperedError
from cspdeploy.core.model_folder import SPEC_FILE
from cspdeploy.core.spec import ModelSpec
from cspdeploy.core.types import Artifact, Manifest, TensorInfo

LABELS = tuple(f"label {i}" for i in range(10))
FILES = {"tiny.onnx": b"a network", "golden.npz": b"a reference", "labels.txt": "\n".join(LABELS).encode()}


def _fill(folder: Path, spec: ModelSpec) -> Manifest:
    """A whole bundle with stand-ins for the big files."""
    folder.mkdir(exist_ok=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    record = file_record(folder / "tiny.onnx")
    artifact = Artifact(
        kind="onnx", file=record.file, format="onnx", precision="fp32", sha256=record.sha256,
        num_bytes=record.num_bytes, inputs=(TensorInfo(name="input", dtype="float32", shape=("N", 3, 32, 32)),),
        outputs=(TensorInfo(name="logits", dtype="float32", shape=("N", 10)),), opset=18, steps=(),
    )  # fmt: skip
    manifest = Manifest(
        spec=spec, labels=LABELS, artifacts=(artifact,), options={"size": [32, 32]}, tools={"python": "3"},
        files=(file_record(folder / "golden.npz"), file_record(folder / "labels.txt")),
    )  # fmt: skip
    write_manifest(folder, manifest)
    return manifest


@pytest.fixture
def bundle(tmp_path: Path, tiny_spec: ModelSpec) -> Path:
    _fill(tmp_path / "tiny", tiny_spec)
    return tmp_path / "tiny"


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _litter(parent: Path) -> list[str]:
    """Hidden leftovers; a lock file that nobody holds is harmless."""
    return [path.name for path in parent.iterdir() if path.name.startswith(".") and path.suffix != ".lock"]


# --- writing ---


def test_new_folder_appears_whole(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "tiny"
    with staged_folder(place) as staging:
        (staging / "manifest.json").write_text("{}")
        assert not place.exists()
        assert staging.parent == place.parent  # one file system, so that the rename is atomic
    assert _contents(place) == {"manifest.json": b"{}"}
    assert _litter(place.parent) == []


def test_old_bundle_is_replaced_as_a_whole(bundle: Path) -> None:
    with staged_folder(bundle) as staging:
        (staging / "manifest.json").write_text("{}")
        assert (bundle / "tiny.onnx").is_file()
    assert _contents(bundle) == {"manifest.json": b"{}"}
    assert _litter(bundle.parent) == []


def test_exception_keeps_the_old_bundle(bundle: Path) -> None:
    before = _contents(bundle)
    with pytest.raises(UnicodeEncodeError), staged_folder(bundle) as staging:
        (staging / "manifest.json").write_text("half way \ud800", encoding="utf-8")
    assert _contents(bundle) == before
    assert _litter(bundle.parent) == []
    with staged_folder(bundle) as staging:  # and the place is free again
        (staging / "manifest.json").write_text("{}")
    assert _contents(bundle) == {"manifest.json": b"{}"}


def test_exception_leaves_no_bundle_where_there_was_none(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "new"):
        raise KeyboardInterrupt
    assert not (tmp_path / "new").exists()
    assert _litter(tmp_path) == []


def test_killed_writer_keeps_the_old_bundle_and_the_next_one_clears_up(bundle: Path) -> None:
    before = _contents(bundle)
    code = """
import pathlib, sys, time
from cspdeploy.core.bundle import staged_folder
with staged_folder(pathlib.Path(sys.argv[1])) as staging:
    (staging / "manifest.json").write_text("{}")
    print("half way", flush=True)
    time.sleep(600)
"""
    root = Path(cspdeploy.__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", code, str(bundle)], cwd=root, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"half way\n"
        with pytest.raises(InputError, match="another export is writing"), staged_folder(bundle):
            pass
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert _contents(bundle) == before
    assert _litter(bundle.parent) != []
    with staged_folder(bundle) as staging:
        (staging / "manifest.json").write_text('{"second": 2}')
    assert _contents(bundle) == {"manifest.json": b'{"second": 2}'}
    assert _litter(bundle.parent) == []


def test_second_writer_in_the_same_process_is_refused(bundle: Path) -> None:
    with staged_folder(bundle) as staging:
        with pytest.raises(InputError, match="another export is writing"), staged_folder(bundle):
            pass
        assert staging.is_dir()  # and has not swept away the first one's work
        (staging / "manifest.json").write_text("{}")
    assert _contents(bundle) == {"manifest.json": b"{}"}


def test_neighbour_of_a_similar_name_is_left_alone(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "tiny") as staging:
        (staging / "manifest.json").write_text("{}")
        with staged_folder(tmp_path / "t*") as other:
            (other / "manifest.json").write_text("{}")
        assert staging.is_dir()


def test_folder_that_is_not_a_bundle_is_refused(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(InputError, match="not a bundle"), staged_folder(photos):
        pass
    assert _contents(photos) == {"holiday.jpg": b"precious"}


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with staged_folder(tmp_path / "new") as staging:
        (staging / "manifest.json").write_text("{}")
    assert _contents(tmp_path / "new") == {"manifest.json": b"{}"}


def test_link_to_a_bundle(bundle: Path) -> None:
    link = bundle.with_name("latest")
    link.symlink_to(bundle)
    with staged_folder(link) as staging:
        (staging / "manifest.json").write_text("{}")
    assert _contents(link) == {"manifest.json": b"{}"}
    assert _litter(bundle.parent) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    """Permission bits do not stop root; a file in the way and the kernel's own file system stop everybody."""
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "tiny", file / "deep" / "tiny", Path("/proc/tiny")):
        with pytest.raises(InputError), staged_folder(place):
            pass
    assert file.read_text() == "mine"


# --- reading ---


@pytest.mark.parametrize("table", ["artifacts", "files"])
def test_what_is_listed_twice_is_refused(bundle: Path, table: str) -> None:
    """Rows and figures go by the artifact's kind: two of one kind would overwrite each other."""
    rows = json.loads((bundle / "manifest.json").read_text())[table]
    _edit(bundle, **{table: [*rows, rows[0]]})
    with pytest.raises(InputError, match="is there twice"):
        read_manifest(bundle)


def test_manifest_round_trip(tmp_path: Path, tiny_spec: ModelSpec) -> None:
    manifest = _fill(tmp_path / "tiny", tiny_spec)
    back = read_manifest(tmp_path / "tiny")
    assert back == manifest
    check_hashes(tmp_path / "tiny", back)


def test_same_bundle_gives_the_same_bytes(tmp_path: Path, tiny_spec: ModelSpec) -> None:
    for name in ("a", "b"):
        _fill(tmp_path / name, tiny_spec)
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")


def _edit(bundle: Path, **changes: object) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, r"\$\.surprise: unknown key"),
        ({"labels": "cat"}, r"\$\.labels"),
        ({"labels": ["cat", "dog"]}, "labels: got 2"),
        ({"artifacts": []}, "artifacts: got none"),
        ({"schema_version": 99}, "update cspdeploy"),
        ({"schema_version": 0}, "export the bundle again"),
        ({"schema_version": "1"}, "export the bundle again"),
    ],
)
def test_bad_manifest(bundle: Path, changes: dict[str, object], message: str) -> None:
    _edit(bundle, **changes)
    with pytest.raises(InputError, match=message) as caught:
        read_manifest(bundle)
    assert "manifest.json" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../golden.npz", "/etc/hostname", "sub/golden.npz", "..", ".", "", "..\\golden.npz", "golden.npz/"]
)
@pytest.mark.parametrize("table", ["artifacts", "files"])
def test_name_that_leaves_the_folder(bundle: Path, table: str, name: str) -> None:
    rows = json.loads((bundle / "manifest.json").read_text())[table]
    rows[0]["file"] = name
    _edit(bundle, **{table: rows})
    with pytest.raises(InputError, match="leaves the bundle's folder"):
        read_manifest(bundle)


def test_missing_file_is_named(bundle: Path) -> None:
    (bundle / "golden.npz").unlink()
    with pytest.raises(InputError, match=r"golden\.npz: missing"):
        read_manifest(bundle)


def test_link_in_place_of_a_file(bundle: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (bundle / "tiny.onnx").rename(elsewhere)
    (bundle / "tiny.onnx").symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"tiny\.onnx: is a link"):
        read_manifest(bundle)


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("change", ["byte", "cut", "longer", "empty"])
def test_changed_file_is_named(bundle: Path, name: str, change: str) -> None:
    manifest = read_manifest(bundle)
    content = FILES[name]
    changed = {
        "byte": bytes([content[0] ^ 1]) + content[1:], "cut": content[:-1], "longer": content + b"\0", "empty": b"",
    }  # fmt: skip
    (bundle / name).write_bytes(changed[change])
    with pytest.raises(TamperedError) as caught:
        check_hashes(bundle, manifest)
    assert caught.value.exit_code == 1
    assert [file for file in FILES if file in caught.value.message] == [name]


@pytest.mark.parametrize("name", ["weights.bin", "tiny.int8.onnx", "notes.txt", "old"])
def test_what_the_manifest_does_not_name_is_refused(bundle: Path, name: str) -> None:
    manifest = read_manifest(bundle)
    if name == "old":
        (bundle / name).mkdir()
    else:
        (bundle / name).write_bytes(b"")
    with pytest.raises(InputError, match=f"{name}: in the folder, but not in its manifest") as caught:
        check_hashes(bundle, manifest)
    assert "move it out" in caught.value.fix


def test_many_strange_files_are_counted(bundle: Path) -> None:
    for index in range(5):
        (bundle / f"{index}.txt").touch()
    with pytest.raises(InputError, match=r"0.txt, 1.txt, 2.txt and 2 more: "):
        check_hashes(bundle, read_manifest(bundle))


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "folder"])
def test_report_is_whatever_it_is(bundle: Path, kind: str) -> None:
    """Nothing opens it, so that it cannot lead anywhere."""
    report = bundle / "report.html"
    if kind == "folder":
        report.mkdir()
    elif kind == "file":
        report.write_text("<p>")
    else:
        report.symlink_to("/etc/passwd" if kind == "link" else "/nowhere/at/all")
    check_hashes(bundle, read_manifest(bundle))


@pytest.mark.parametrize("name", [TIMINGS_FILE, SIGNATURE_FILE])
def test_timings_and_signature_lie_there_without_a_hash(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"whatever")
    check_hashes(bundle, read_manifest(bundle))


def test_chosen_files_alone_are_hashed(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    first, second = list(FILES)[:2]
    (bundle / first).write_bytes(b"changed")
    check_hashes(bundle, manifest, only={second})
    with pytest.raises(TamperedError, match=first.replace(".", r"\.")):
        check_hashes(bundle, manifest, only={first})
    (bundle / "strange.bin").touch()
    with pytest.raises(InputError, match=r"strange\.bin"):
        check_hashes(bundle, manifest, only={second})


def test_hidden_leftovers_are_no_harm(bundle: Path) -> None:
    (bundle / ".DS_Store").write_bytes(b"left by a desktop")
    (bundle / ".nfs0001").write_bytes(b"left by a file system")
    check_hashes(bundle, read_manifest(bundle))


def test_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert file_sha256(tmp_path / "abc") == digest
    assert file_record(tmp_path / "abc").num_bytes == 3


# --- finding ---


def test_bundles_are_found_by_folder_parent_and_manifest(bundle: Path) -> None:
    for place in (bundle, bundle.parent, bundle / "manifest.json"):
        assert find_bundles([place], default=Path("nowhere")) == [bundle]
    assert find_bundles([], default=bundle.parent) == [bundle]


def test_unfinished_bundle_is_not_found(bundle: Path, tiny_spec: ModelSpec) -> None:
    _fill(bundle.parent / ".tiny.new-1", tiny_spec)
    assert find_bundles([bundle.parent], default=Path("nowhere")) == [bundle]


def test_no_bundle_is_an_error_not_an_empty_list(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no bundle"):
        find_bundles([tmp_path], default=Path("nowhere"))
    with pytest.raises(InputError, match="no such folder"):
        find_bundles([], default=tmp_path / "none")


def test_bundle_that_a_killed_writer_had_moved_aside_is_put_back(tmp_path: Path) -> None:
    """Where folders cannot be swapped, a kill between the two renames leaves the old bundle beside its place."""
    aside = tmp_path / ".b.old-1"
    aside.mkdir()
    (aside / "manifest.json").write_text("old")
    with pytest.raises(RuntimeError, match="stop"), staged_folder(tmp_path / "b"):
        raise RuntimeError("stop")
    assert (tmp_path / "b" / "manifest.json").read_text() == "old"
    assert not aside.exists()


@pytest.mark.parametrize(
    ("number", "kind", "fix"),
    [
        (errno.ENOSPC, BUNDLE, "free some space, or give another folder with -o"),
        (errno.EACCES, MODEL_FOLDER, "give another folder with --models"),
    ],
)
def test_errors_of_a_disk_are_one_line(tmp_path: Path, number: int, kind: FolderKind, fix: str) -> None:
    with pytest.raises(InputError, match="cannot be written") as caught, disk_errors(tmp_path, kind=kind):
        raise OSError(number, "no")
    assert caught.value.fix == fix


def test_a_model_folder_is_known_by_its_description() -> None:
    """Spelt out in `core.bundle`, which devices import and which therefore does without `core.model_folder`."""
    assert MODEL_FOLDER.marker == SPEC_FILE


def test_a_system_without_file_locks_reads_bundles_and_says_why_it_writes_none(tiny_bundle: Path) -> None:
    """As on Windows, where there is no fcntl."""
    code = """
import sys
from pathlib import Path
sys.modules["fcntl"] = None
from cspdeploy.core.bundle import read_manifest, staged_folder
from cspdeploy.core.errors import InputError
print(read_manifest(Path(sys.argv[1])).spec.name)
try:
    with staged_folder(Path(sys.argv[1]) / "new"):
        pass
except InputError as error:
    print(error.fix)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(cspdeploy.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_bundle)], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("tiny\nwrite it on Linux or macOS\n", "")
