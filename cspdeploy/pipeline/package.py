"""`cspdeploy package`: from a bundle to one file for a device: a zip, or a zip application that runs by itself.

What a device does not need stays behind: artifacts that were not chosen, the report. The manifest is cut down to what
is there, so that the package is a bundle in full: its hashes, its golden check and its selftest hold.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cspdeploy.core.archive import Entry
from cspdeploy.core.bundle import (
    MANIFEST_FILE,
    SIGNATURE_FILE,
    TIMINGS_FILE,
    check_hashes,
    disk_errors,
    file_record,
    file_sha256,
    read_manifest,
    write_manifest,
)
from cspdeploy.core.errors import InputError, did_you_mean
from cspdeploy.core.manifest import file_names
from cspdeploy.core.model_folder import LABELS_FILE, write_text
from cspdeploy.core.signature import FILE_SUFFIX, SIGNATURE_BYTES, check_private_key, sign_file, sign_folder
from cspdeploy.core.sizes import base_kind, full_kind, golden_file, sizes_of
from cspdeploy.core.types import Artifact, FileRecord, Manifest
from cspdeploy.pipeline.package_licence import LICENCE_FILE, licence_page, read_licence
from cspdeploy.pipeline.package_modules import compiled, needed_files, runtime_modules
from cspdeploy.pipeline.package_write import PACKAGE, PYZ_SAVING, ZIP_SAVING, Source, require_replaceable, write_package

__all__ = ["ALL", "PackageReport", "PackageRequest", "package_bundle"]

Progress = Callable[[str, int, int], None]

ALL = "all"
DEFAULT_KINDS = ("onnx", "onnx-int8")
"""FP32 runs everywhere, and INT8 is in a bundle only where it is smaller, faster and within its accuracy budget."""
DEVICE_FILES = (LABELS_FILE, LICENCE_FILE)
"""Of the files beside artifacts, with the golden images of their sizes. What an export may add for its own use stays
behind."""

_OTHER_ARCHIVES = re.compile(r"(\.(tar|tgz|gz|bz2|xz|zst|7z|rar|whl))+$", re.IGNORECASE)
ENTRY_MODULE = "cspdeploy.edge.zipapp_main"
BUNDLE_FOLDER = "bundle/"
"""In a zip application, where `ENTRY_MODULE` looks for it."""
PROLOGUE = b"#!/usr/bin/env python3\n"
MAIN = """\
import sys

if sys.version_info < (3, 11):
    sys.exit("error: Python %d.%d, expected 3.11 or later" % sys.version_info[:2])

try:
    from cspdeploy.edge.zipapp_main import main
except ModuleNotFoundError as error:
    if error.name != "numpy":
        raise
    sys.stderr.write("error: needs the package 'numpy', which is not installed\\nfix: pip install numpy onnxruntime\\n")
    sys.exit(3)

sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageRequest:
    """What to pack.

    Attributes:
        output: "model.zip" or "model.pyz"; its suffix says which of the two.
        artifacts: kinds, each with all of its sizes, or "onnx@224x224" of one; "all" for all of the bundle; none for
            `DEFAULT_KINDS`.
        sign: file of an Ed25519 private key, or None.
        licence: of the weights: a file with its text, or its name; empty: what the bundle says of it.
        overwrite: replace a file that is not a package.
    """

    bundle: Path
    output: Path
    artifacts: tuple[str, ...] = ()
    sign: Path | None = None
    licence: str = ""
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageReport:
    """The package that was written.

    Attributes:
        files: what is in it, as its reader sees it.
        num_bytes, sha256: of the package itself.
        key: fingerprint of the key that signed it (SHA-256 of the 32 bytes of its public half); empty: not signed.
        signature_file: of a signed program, over the whole of it, beside it: model.pyz.sig; else empty.
        untrained: its weights have never seen data.
        notes: what whoever passes it on should know.
    """

    schema_version: int = 1
    file: str
    kind: Literal["zip", "pyz"]
    model: str
    artifacts: tuple[str, ...]
    files: tuple[Entry, ...]
    num_bytes: int
    sha256: str
    key: str
    signature_file: str = ""
    untrained: bool
    notes: tuple[str, ...]


def package_bundle(request: PackageRequest, *, progress: Progress = lambda what, done, total: None) -> PackageReport:
    """Write a package. The same bundle, options and versions of Python and zlib give the same bytes.

    Raises:
        InputError: not a bundle, no such artifact in it, a key or licence that is none, an output that is neither .zip
            nor .pyz, lies in the bundle, is there and no package, or cannot be written.
        TamperedError: a file of the bundle is not the one of its manifest.
        MissingExtraError: `cryptography` is not installed, and a signature was asked for.
    """
    kind = _kind_of(request.output)
    _refuse_file(request.bundle)
    manifest = read_manifest(request.bundle)
    _refuse_inside(request)
    chosen = _choose(manifest, request)
    if request.sign is not None:
        check_private_key(request.sign)
    licence = read_licence(request.licence)
    require_replaceable(request.output, overwrite=request.overwrite)
    signature = _signature_place(request) if kind == "pyz" else None
    check_hashes(request.bundle, manifest, only=())  # that nothing else lies there; hashes are taken while packing
    with tempfile.TemporaryDirectory(prefix="cspdeploy-") as place:
        staging = Path(place)
        trimmed = _stage(staging, request, manifest, chosen, licence)
        key = sign_folder(staging, request.sign) if request.sign is not None else ""
        files = _bundle_files(request.bundle, staging, trimmed)
        entries = _write(request.output, kind, trimmed, files, staging, progress=progress)
    if signature is not None and request.sign is not None:
        with disk_errors(signature, kind=PACKAGE):
            sign_file(request.output, request.sign)
    return _report(request, kind, trimmed, entries, key=key, signature=str(signature or ""))


def _kind_of(output: Path) -> Literal["zip", "pyz"]:
    suffix = output.suffix.lower()
    if suffix not in (".zip", ".pyz"):
        better = _OTHER_ARCHIVES.sub("", output.name) or "model"
        raise InputError(f"-o {output}: expected a name that ends in .zip or .pyz", fix=f"-o {better}.zip")
    return "zip" if suffix == ".zip" else "pyz"


def _refuse_file(bundle: Path) -> None:
    if bundle.suffix.lower() in (".zip", ".pyz") and bundle.is_file():
        raise InputError(
            f"{bundle}: is a package already, expected a bundle's folder",
            fix=f"unpack it first: python -m zipfile -e {bundle} FOLDER",
        )


def _refuse_inside(request: PackageRequest) -> None:
    """A file that the manifest does not name, at whatever depth, makes the bundle itself be refused from then on."""
    if request.bundle.resolve() in request.output.resolve().parents:
        raise InputError(f"-o {request.output}: lies in the bundle", fix=f"-o {request.output.name}, in another folder")


def _signature_place(request: PackageRequest) -> Path | None:
    """Where the signature of a program will lie. Nothing but an older one is written over unasked."""
    if request.sign is None:
        return None
    place = request.output.with_name(request.output.name + FILE_SUFFIX)
    ours = place.is_file() and place.stat().st_size == SIGNATURE_BYTES
    if place.is_dir() or ((place.exists() or place.is_symlink()) and not ours and not request.overwrite):
        raise InputError(f"{place}: exists and is not a signature", fix="give --overwrite, or another file with -o")
    return place


def _choose(manifest: Manifest, request: PackageRequest) -> tuple[Artifact, ...]:
    """Artifacts to pack, in the bundle's order."""
    kinds = [artifact.kind for artifact in manifest.artifacts]
    wanted = set(request.artifacts)
    named = {artifact.kind: _names(manifest, artifact) for artifact in manifest.artifacts}
    for kind in request.artifacts:
        if kind != ALL and not any(kind in names for names in named.values()):
            raise InputError(
                f"{request.bundle}: no artifact '{kind}', it has {', '.join(kinds)}",
                fix=f"{did_you_mean(kind, kinds)}--artifact {kinds[0]}, or --artifact {ALL}",
            )
    if ALL in wanted:
        return manifest.artifacts
    wanted = wanted or set(DEFAULT_KINDS)
    chosen = tuple(artifact for artifact in manifest.artifacts if wanted & named[artifact.kind])
    if not chosen:
        raise InputError(
            f"{request.bundle}: has neither of {', '.join(DEFAULT_KINDS)}, which are packed by default",
            fix=f"--artifact {kinds[0]}",
        )
    return chosen


def _names(manifest: Manifest, artifact: Artifact) -> set[str]:
    """What it is chosen by: its kind, which takes all sizes along, or its kind at its size, "onnx@224x224"."""
    return {base_kind(artifact.kind), full_kind(manifest, artifact)}


def _stage(
    staging: Path, request: PackageRequest, manifest: Manifest, chosen: tuple[Artifact, ...], licence: str
) -> Manifest:
    """Write what differs from the bundle's own: manifest.json and the page on the weights."""
    needed = (*map(golden_file, sizes_of(chosen)), *DEVICE_FILES)
    records = {record.file: record for record in manifest.files if record.file in needed}
    if licence or LICENCE_FILE not in records:  # of a package that is packed again, the page that it came with stays
        write_text(staging / LICENCE_FILE, licence_page(manifest.spec, licence))
        records[LICENCE_FILE] = file_record(staging / LICENCE_FILE)
    files: tuple[FileRecord, ...] = tuple(records[name] for name in needed if name in records)
    trimmed = dataclasses.replace(manifest, artifacts=chosen, files=files)
    write_manifest(staging, trimmed)
    return trimmed


def _bundle_files(bundle: Path, staging: Path, manifest: Manifest) -> dict[str, Path]:
    """Name in the bundle: the file to pack. Timings have no hash, and are left behind where they are a link."""
    files = {name: bundle / name for name in file_names(manifest)}
    timings = bundle / TIMINGS_FILE
    if timings.is_file() and not timings.is_symlink():
        files[TIMINGS_FILE] = timings
    for name in (MANIFEST_FILE, LICENCE_FILE, SIGNATURE_FILE):
        if (staging / name).is_file():
            files[name] = staging / name
    return files


def _write(
    output: Path, kind: str, manifest: Manifest, files: dict[str, Path], staging: Path, *, progress: Progress
) -> tuple[Entry, ...]:
    hashes = {artifact.file: artifact.sha256 for artifact in manifest.artifacts}
    hashes |= {record.file: record.sha256 for record in manifest.files}
    folder, saving = (f"{manifest.spec.name}/", ZIP_SAVING) if kind == "zip" else (BUNDLE_FOLDER, PYZ_SAVING)
    packed = {
        f"{folder}{name}": Source(path=path, saving=saving, sha256=hashes.get(name, "")) for name, path in files.items()
    }
    if kind == "zip":
        return write_package(output, packed, progress=progress)
    formats = {artifact.format for artifact in manifest.artifacts}
    program = {file.name: file.source for file in needed_files((ENTRY_MODULE, *runtime_modules(formats)))}
    program |= compiled(program, staging / "compiled")
    program["__main__.py"] = staging / "__main__.py"
    write_text(program["__main__.py"], MAIN)
    packed |= {name: Source(path=path, saving=ZIP_SAVING) for name, path in program.items()}
    return write_package(output, packed, prologue=PROLOGUE, progress=progress)


def _report(
    request: PackageRequest, kind: Literal["zip", "pyz"], manifest: Manifest, entries: tuple[Entry, ...], *, key: str,
    signature: str,
) -> PackageReport:  # fmt: skip
    notes = []
    if not (request.licence or manifest.spec.provenance.licence):
        notes.append("the licence of the weights is not stated: --licence FILE, or its name")
    if signature:
        notes.append(
            f"--key of selftest checks the model, not the program around it; {Path(signature).name} is of both: "
            f"openssl pkeyutl -verify -pubin -inkey key.pub -rawin -in {request.output.name} "
            f"-sigfile {Path(signature).name}"
        )
    return PackageReport(
        file=str(request.output), kind=kind, model=manifest.spec.name,
        artifacts=tuple(artifact.kind for artifact in manifest.artifacts), files=entries,
        num_bytes=request.output.stat().st_size, sha256=file_sha256(request.output), key=key,
        signature_file=signature, untrained=manifest.spec.provenance.untrained, notes=tuple(notes),
    )  # fmt: skip
