"""Rules that hold for every Dockerfile, read from the files: they can be checked without building an image."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*/Dockerfile"))
EXAMPLES = [path.parent.name for path in DOCKERFILES]
MAX_README_LINES = 15


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Of a Dockerfile: ("RUN", "apt-get ..."), lines joined, comments left out."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    parts = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(part[0].upper(), part[1].strip() if len(part) > 1 else "") for part in parts]


def faults(dockerfile: str) -> list[str]:
    """What is wrong with it; empty where nothing is."""
    found = instructions(dockerfile)
    bases = [rest.split()[0] for name, rest in found if name == "FROM"]
    last = found[max(index for index, (name, _) in enumerate(found) if name == "FROM") :] if bases else []
    users = [rest for name, rest in last if name == "USER"]
    runs = [rest for name, rest in last if name == "RUN"]
    entries = [rest for name, rest in last if name == "ENTRYPOINT"]
    stages = {rest.split()[2] for name, rest in found if name == "FROM" and len(rest.split()) == 3}
    told = []
    if found[0][0] != "ARG" or not re.fullmatch(r"BASE=[\w./-]+:[\w.-]+(@sha256:[0-9a-f]{64})?", found[0][1]):
        told.append("does not begin with ARG BASE=image:tag")
    if any(base != "${BASE}" and base not in stages for base in bases) or not bases:
        told.append("a stage is not FROM ${BASE}")
    if re.search(r":latest\b|@latest\b", dockerfile):
        told.append("latest")
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        told.append("its last stage has no USER by a number above 0")
    if not entries or not isinstance(_list(entries[-1]), list):
        told.append("its last stage has no ENTRYPOINT as a list: a shell would keep SIGTERM to itself")
    if any("apt-get install" in run and "rm -rf /var/lib/apt/lists" not in run for run in runs):
        told.append("its last stage keeps apt's lists")
    everywhere = [rest for name, rest in found if name == "RUN"]
    if any("apt-get install" in run and "--no-install-recommends" not in run for run in everywhere):
        told.append("installs what Debian only recommends")
    if any(re.search(r"pip3? install(?!.*--no-cache-dir)", run) for run in everywhere):
        told.append("pip keeps its cache")
    if any(name == "ADD" for name, _ in found):
        told.append("ADD, which unpacks and downloads; COPY does not")
    return told


def _list(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_dockerfile_keeps_to_the_rules(example: str) -> None:
    assert faults((ROOT / "docker" / example / "Dockerfile").read_text()) == []


GOOD = """ARG BASE=debian:13-slim
FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends x && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir x
COPY a b
USER 1
ENTRYPOINT ["a"]
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ARG BASE=debian:13-slim\n", "ARG BASE=debian\n"),
        ("ARG BASE=debian:13-slim\n", "ARG X=1\nARG BASE=debian:13\n"),
        ("debian:13-slim", "debian:latest"),
        ("FROM ${BASE}", "FROM debian:13"),
        ("USER 1", "USER 0"),
        ("USER 1", "USER app"),
        ("USER 1\n", ""),
        ("USER 1\n", "USER 1\nFROM ${BASE}\n"),
        ('ENTRYPOINT ["a"]', "ENTRYPOINT a"),
        (" && rm -rf /var/lib/apt/lists/*", ""),
        (" --no-install-recommends", ""),
        (" --no-cache-dir", ""),
        ("COPY a b", "ADD a b"),
    ],
)
def test_each_fault_of_a_dockerfile_is_seen(old: str, new: str) -> None:
    assert faults(GOOD) == []
    assert faults(GOOD.replace(old, new)) != []


@pytest.mark.parametrize("example", EXAMPLES)
def test_what_is_sent_to_the_builder_is_listed(example: str) -> None:
    lines = (ROOT / "docker" / example / "Dockerfile.dockerignore").read_text().split()
    assert lines[0] == "*"  # all is left out but what is named: models and bundles are gigabytes


def test_the_device_has_the_versions_that_the_tests_ran_with() -> None:
    listed = pins((ROOT / "constraints.txt").read_text())
    needed = pins((ROOT / "docker/edge-python/requirements.txt").read_text())
    assert {"numpy", "onnxruntime", "pillow"} <= set(needed)
    assert needed == {name: listed[name] for name in needed}
    for dockerfile in DOCKERFILES:
        text = dockerfile.read_text()
        for install in re.findall(r"pip install.*", text.replace("\\\n", " ")):
            assert "constraint" in install.lower() or "PIP_CONSTRAINT" in text


def test_every_example_has_a_short_readme_and_a_test_that_is_about_it() -> None:
    assert {"edge-cpp", "edge-python", "export-cpu", "export-cuda"} <= set(EXAMPLES)
    tests = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__))
    for example in EXAMPLES:
        readme = (ROOT / "docker" / example / "README.md").read_text()
        assert len(readme.splitlines()) <= MAX_README_LINES, example
        assert f"docker/{example}/Dockerfile" in readme
        assert f'"{example}"' in tests or f"docker/{example}" in tests, example


CUDA_FOLDER = ROOT / "docker/export-cuda"
CUDA_RESULT = ROOT / "tests/benchmarks/cuda/cuda.json"
MIN_DRIVERS = {"13": 580, "12": 525}
"""Of each major version of CUDA, whose minor versions all run on it. Source: NVIDIA, CUDA compatibility guide."""
ORT_CUDA = {"1.31": ("13.0", "9")}
"""CUDA, as its wheel's build_and_package_info tells, and cuDNN, as its library loads it: libcudnn.so.9."""


def cuda_versions() -> dict[str, str]:
    """As the page of docker/export-cuda tells them: "CUDA", "cuDNN", "driver", and packages by name."""
    line = next(line for line in (CUDA_FOLDER / "README.md").read_text().splitlines() if line.startswith("Versions:"))
    return dict(re.findall(r"([A-Za-z][\w-]*) (\d[\d.]*\d|\d)", line))


def test_the_cuda_image_is_of_the_versions_that_are_pinned() -> None:
    listed = pins((ROOT / "constraints.txt").read_text())
    told = cuda_versions()
    assert {"CUDA", "cuDNN", "driver", "onnxruntime-gpu", "torch"} == set(told)
    assert listed["onnxruntime-gpu"] == listed["onnxruntime"]
    assert [told[name] for name in ("onnxruntime-gpu", "torch")] == [listed["onnxruntime-gpu"], listed["torch"]]
    assert (told["CUDA"], told["cuDNN"]) == ORT_CUDA[listed["onnxruntime-gpu"].rpartition(".")[0]]
    base = re.search(r"BASE=nvidia/cuda:([\d.]+)-", (CUDA_FOLDER / "Dockerfile").read_text())
    assert base is not None
    assert base[1].startswith(f"{told['CUDA']}.")
    assert int(told["driver"]) >= MIN_DRIVERS[told["CUDA"].partition(".")[0]]


def was_run(result: Path, told: dict[str, str]) -> bool:
    """Whether a result that is kept was measured with these versions."""
    if not result.is_file():
        return False
    facts = json.loads(result.read_text())["facts"]
    return all(facts.get(name) == told[name] for name in ("onnxruntime-gpu", "torch"))


def test_what_was_run_with_other_versions_was_not_run(tmp_path: Path) -> None:
    told = cuda_versions()
    kept = tmp_path / "cuda.json"
    assert not was_run(kept, told)
    for changed, expected in (({}, True), ({"torch": "2.11.0"}, False), ({"onnxruntime-gpu": "1.30.0"}, False)):
        kept.write_text(json.dumps({"facts": told | changed}))
        assert was_run(kept, told) is expected


def test_what_was_never_run_says_so() -> None:
    """docker/export-cuda needs a GPU and its driver: no test builds it, and it must not look as if one did."""
    never = not was_run(CUDA_RESULT, cuda_versions())
    assert ("NOT RUN" in (CUDA_FOLDER / "Dockerfile").read_text()) is never
    assert ("it was never run on a GPU" in (CUDA_FOLDER / "README.md").read_text()) is never
    kept = ("COPY", "ENV", "USER", "ENTRYPOINT", "CMD", "WORKDIR")
    installs = [
        [rest for name, rest in instructions((ROOT / "docker" / example / "Dockerfile").read_text()) if name in kept]
        for example in ("export-cpu", "export-cuda")
    ]
    assert installs[0] == installs[1]  # so that the one that is run tells of the other
