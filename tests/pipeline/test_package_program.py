"""The program for a device: its modules, and that it classifies, checks itself and refuses alone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
import zipimport
from pathlib import Path

import onnxruntime
import pytest

from cspdeploy.core import errors
from cspdeploy.core.archive import opened_bundle
from cspdeploy.core.signature import verify_folder
from cspdeploy.edge import Predictor
from cspdeploy.pipeline.package import PackageReport, PackageRequest, package_bundle
from cspdeploy.pipeline.package_modules import needed_files, runtime_modules
from tests.pipeline.conftest import Pack

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
