"""Container images built for real and without a daemon: buildah in a chroot, on a Debian made by debootstrap.

Needs root, the Debian packages buildah and debootstrap, and access to Debian's mirror and to the package registries.
What debootstrap made is kept in the folder $CSPDEPLOY_TEST_CACHE, or in the system's folder for temporary files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cspdeploy.core.golden import read_golden

ROOT = Path(__file__).parents[2]
SUITE = "trixie"
# Wheels of this machine are for the Python of this machine: the base is the Debian that has the same one.
SUITES = {(3, 11): "bookworm", (3, 13): "trixie"}
CERTIFICATES = Path("etc/ssl/certs/ca-certificates.crt")


def call(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run it; where it fails, all that it said is in the error."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if check and done.returncode:
        said = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        raise RuntimeError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{said}")
    return done


@pytest.fixture
def tell(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """A line among pytest's own, for figures: they are measured, and change without a test failing."""
    reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")

    def write(line: str) -> None:
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(line)

    return write


def require_tools(*tools: str) -> None:
    """Skip the test where the machine cannot run it, and say why."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("a chroot needs root")


def cache_folder() -> Path:
    folder = Path(os.environ.get("CSPDEPLOY_TEST_CACHE") or Path(tempfile.gettempdir()) / "cspdeploy-test-cache")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def debootstrap(suite: str, *, arch: str = "amd64", include: Sequence[str] = (), foreign: bool = False) -> Path:
    """The root folder of a minimal Debian; made once, then kept.

    Args:
        foreign: of another processor: unpacked, but not configured, which would run programs of it.
    """
    root = cache_folder() / f"debian-{suite}-{arch}"
    if root.is_dir():
        return root
    part = root.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    options = ["--variant=minbase", f"--arch={arch}", *(["--foreign"] if foreign else [])]
    options += [f"--include={','.join(include)}"] if include else []
    call("debootstrap", *options, suite, part)  # of Debian's own mirror
    packages = part / "var/cache/apt/archives"
    if foreign:
        # Without the second stage, which would run programs of that processor: files are all that is needed here.
        for package in sorted(packages.glob("*.deb")):
            files = part / "package.tar"
            call("dpkg-deb", "--extract", package, part / "unpacked")
            call("tar", "-c", "-f", files, "-C", part / "unpacked", ".")
            call("tar", "-x", "--keep-directory-symlink", "-f", files, "-C", part)
            shutil.rmtree(part / "unpacked")
            files.unlink()
    for folder in (part / "var/cache/apt", part / "var/lib/apt/lists"):
        shutil.rmtree(folder, ignore_errors=True)
    part.rename(root)
    return root


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A working container of an image."""

    builder: Builder
    name: str
    folder: Path
    """Where its files lie on this machine."""

    def config(self) -> dict[str, object]:
        """User, Entrypoint, Cmd, Env, ... of the image."""
        shown = json.loads(self.builder.buildah("inspect", "--type", "container", self.name).stdout)
        return dict(shown["OCIv1"]["config"])

    def run(self, *command: str, volumes: Sequence[str] = (), check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command in it, by the user of the image."""
        places = [part for volume in volumes for part in ("--volume", volume)]
        return self.builder.buildah("run", "--isolation", "chroot", *places, self.name, "--", *command, check=check)

    def run_app(self, *args: str, volumes: Sequence[str] = (), check: bool = True) -> subprocess.CompletedProcess[str]:
        """What `docker run IMAGE args` would."""
        entry = self.config()["Entrypoint"]
        assert isinstance(entry, list)
        return self.run(*entry, *args, volumes=volumes, check=check)


@dataclass(frozen=True, slots=True, kw_only=True)
class Builder:
    """buildah with a storage of its own, so that nothing of the machine's is touched."""

    storage: Path
    containers: dict[str, Container] = field(default_factory=dict)

    def buildah(self, *args: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        # vfs: plain folders, where overlays may not be mounted.
        storage: list[str | Path] = [
            "--storage-driver",
            "vfs",
            "--root",
            self.storage / "root",
            "--runroot",
            self.storage / "run",
        ]
        return call("buildah", *storage, *args, check=check)

    def container(self, image: str) -> Container:
        """The one container of an image."""
        if image not in self.containers:
            name = self.buildah("from", "--pull-never", image).stdout.strip()
            folder = Path(self.buildah("mount", name).stdout.strip())
            self.containers[image] = Container(builder=self, name=name, folder=folder)
        return self.containers[image]

    def base(self, suite: str) -> str:
        """A Debian as an image, in the place of debian:13-slim."""
        image = f"localhost/debian-{suite}"
        if self.buildah("inspect", "--type", "image", image, check=False).returncode:
            root = debootstrap(suite, include=["ca-certificates"])
            name = self.buildah("from", "scratch").stdout.strip()
            self.buildah("add", "--quiet", name, root, "/")
            trusted = Path("/") / CERTIFICATES
            if trusted.is_file():  # those of this machine: it may sit behind a proxy of its own
                self.buildah("copy", "--quiet", name, trusted, f"/{CERTIFICATES}")
            self.buildah("commit", "--quiet", "--rm", name, image)
        return image

    def build(self, example: str) -> str:
        """The image of docker/`example`."""
        image = f"localhost/{example}"
        if self.buildah("inspect", "--type", "image", image, check=False).returncode == 0:
            return image
        folder = ROOT / "docker" / example
        suite, options = SUITE, list[str]()
        if example.startswith("export-"):
            suite = SUITES.get(sys.version_info[:2], SUITE)
            wheels = os.environ.get("PIP_FIND_LINKS", "")
            if wheels:
                options = ["--volume", f"{wheels}:/wheels:ro", "--build-arg", "WHEELS=/wheels"]
                options += ["--build-arg", "TORCH_INDEX="]
        self.buildah(
            "build", "--isolation", "chroot", "--layers=false", "--quiet", "--pull-never",
            "--build-arg", f"BASE={self.base(suite)}", *options, "--tag", image,
            "--ignorefile", folder / "Dockerfile.dockerignore", "--file", folder / "Dockerfile", ROOT,
        )  # fmt: skip
        return image


@pytest.fixture(scope="session")
def builder() -> Iterator[Builder]:
    """Its storage is emptied at the end: an image is a gigabyte."""
    require_tools("buildah", "debootstrap")
    storage = Path(tempfile.mkdtemp(prefix="cspdeploy-buildah-"))
    found = Builder(storage=storage)
    try:
        yield found
    finally:
        found.buildah("umount", "--all", check=False)
        found.buildah("rm", "--all", check=False)
        shutil.rmtree(storage, ignore_errors=True)


def write_golden_images(bundle: Path, folder: Path) -> list[str]:
    """The golden images of a bundle as PNG files that anyone may read; their names, in their order."""
    folder.mkdir(parents=True)
    names = []
    for index, image in enumerate(read_golden(bundle / "golden.npz").images):
        names.append(f"{index:03}.png")
        Image.fromarray(np.asarray(image)).save(folder / names[-1])
    return names


@pytest.fixture(scope="session")
def shared_bundle(tiny_int8_bundle: Path) -> Iterator[Path]:
    """FP32, FP16 and INT8 of "tiny", where a user that is not root may read them: pytest's own folders are closed."""
    with tempfile.TemporaryDirectory(prefix="cspdeploy-bundle-") as place:
        folder = Path(shutil.copytree(tiny_int8_bundle, Path(place) / "tiny"))
        write_golden_images(folder, Path(place) / "images")
        call("chmod", "-R", "a+rX", place)
        yield folder
