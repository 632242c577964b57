"""The program inside model.pyz: `python model.pyz photo.jpg`, `python model.pyz selftest`. Its bundle lies beside it.

Prediction reads the artifact out of the zip into memory, checks its hash there and hands those bytes to the engine: no
file is written, so that it runs from a read-only system, and nothing can be changed between the check and the use.
`selftest` is about the files of a bundle, and unpacks them to a private folder that vanishes afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import zipimport
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cspdeploy.core.errors import EXIT_USAGE, InputError

if TYPE_CHECKING:
    from cspdeploy.core.types import Artifact, Manifest
    from cspdeploy.edge.predictor import Predictor
    from cspdeploy.runtimes.base import Runtime

__all__ = ["main"]

FOLDER = "bundle/"
"""Of the bundle in the zip application."""


def main(arguments: list[str]) -> int:
    """Run the program.

    Args:
        arguments: of the command line, without the program's name.

    Returns:
        0 done and passed, 1 a check failed, 2 wrong use or bad input, 3 an engine is missing, 130 interrupted.
    """
    from cspdeploy.edge.console import guarded

    command = _selftest if arguments[:1] == ["selftest"] else _predict
    return guarded(lambda: command(arguments), json_="--json" in arguments, alone=True)


def _archive() -> Path:
    """The .pyz that this module was loaded from."""
    loader = globals().get("__loader__")
    if not isinstance(loader, zipimport.zipimporter):
        raise InputError("runs only from within a zip application", fix="cspdeploy package BUNDLE -o model.pyz")
    return Path(loader.archive)


def _selftest(arguments: list[str]) -> int:
    from cspdeploy.edge.__main__ import SELFTEST, add_selftest_options, selftest
    from cspdeploy.edge.console import Parser

    name = Path(sys.argv[0]).name
    parser = Parser(
        prog=f"{name} selftest", allow_abbrev=False, description=SELFTEST,
        epilog="--key checks who made the model. It says nothing of the program in this file, which could say "
        f"anything: check {name} from an installed cspdeploy, or {name}.sig with openssl.",
    )  # fmt: skip
    add_selftest_options(parser)
    given = parser.parse_args(arguments[1:])
    given.bundle = _archive()
    return selftest(given)


def _parser() -> argparse.ArgumentParser:
    from cspdeploy.edge.console import Parser, add_box_options

    name = Path(sys.argv[0]).name
    parser = Parser(
        prog=name, usage=f"{name} [options] IMAGE...\n       {name} selftest [options]", allow_abbrev=False,
        description="Classes of images, or boxes in them, by the model inside this file; or check it: its hashes, "
        "its answers on the images that it was proven with, the engine, the latency.",
        epilog=f"{name} selftest --help shows the options of the check. An image called selftest: ./selftest",
    )  # fmt: skip
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes to show for each image (5)")
    add_box_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--artifact", default="", metavar="KIND", help="onnx if it is in here, else the first one")
    parser.add_argument("--runtime", default="ort-cpu", metavar="NAME", help="engine and device (ort-cpu)")
    parser.add_argument("--device", type=int, metavar="N", help="GPU to run on, with --runtime ort-cuda (0)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the engine; 0: as it chooses (0)")
    return parser


def _predict(arguments: list[str]) -> int:
    from cspdeploy.edge.console import answer, box_options

    parser = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    options = parser.parse_args(arguments)
    if options.top < 1:
        raise InputError(f"--top {options.top}: expected at least 1", fix="--top 5")
    if options.threads < 0:
        raise InputError(f"--threads {options.threads}: expected 0 (the engine chooses) or more", fix="--threads 0")
    engine = {"runtime": options.runtime, "threads": options.threads, "device": options.device}
    with _opened(_archive(), kind=options.artifact, **engine) as predictor:
        return answer(
            predictor, options.images, top=options.top, json_=options.json, boxes=box_options(options)
        )  # fmt: skip


@contextlib.contextmanager
def _opened(
    archive: Path, *, kind: str, runtime: str, threads: int, device: int | None
) -> Iterator[Predictor]:  # fmt: skip
    from cspdeploy.core.archive import opened_bundle, packed_manifest
    from cspdeploy.edge.engine_options import require_device
    from cspdeploy.edge.opening import find_artifact
    from cspdeploy.edge.predictor import Predictor
    from cspdeploy.runtimes import require_runtime

    manifest = packed_manifest(archive, FOLDER)
    kinds = [artifact.kind for artifact in manifest.artifacts]
    artifact = find_artifact(archive, manifest, kind or ("onnx" if "onnx" in kinds else kinds[0]))
    engine = require_runtime(runtime)
    require_device(device, engine)
    if engine.takes_bytes:
        with _from_memory(
            archive, manifest, artifact, runtime=engine, threads=threads, device=device
        ) as predictor:  # fmt: skip
            yield predictor
        return
    with opened_bundle(archive) as folder:
        opened = Predictor.open(folder, artifact=artifact.kind, runtime=runtime, num_threads=threads, device=device)
        with opened as predictor:
            yield predictor


def _from_memory(
    archive: Path, manifest: Manifest, artifact: Artifact, *, runtime: Runtime, threads: int, device: int | None
) -> Predictor:
    import hashlib

    from cspdeploy.core.archive import read_entry
    from cspdeploy.core.errors import TamperedError
    from cspdeploy.edge.opening import of_manifest
    from cspdeploy.edge.predictor import Predictor
    from cspdeploy.runtimes.base import CudaOptions, SessionRequest

    if not runtime.reads(format_=artifact.format, precision=artifact.precision):
        raise InputError(f"--runtime {runtime.name}: does not read '{artifact.kind}'", fix="--runtime ort-cpu")
    data = read_entry(archive, FOLDER + artifact.file, at_most=artifact.num_bytes)
    if hashlib.sha256(data).hexdigest() != artifact.sha256:
        raise TamperedError(
            f"{archive}: {artifact.file}: not the file of the manifest (SHA-256 differs)", fix="copy the file again"
        )
    path, names = archive / FOLDER / artifact.file, tuple(value.name for value in artifact.outputs)
    cuda = CudaOptions(device=device or 0)
    session = runtime.open(SessionRequest(path=path, data=data, outputs=names, num_threads=threads, cuda=cuda))
    return Predictor(of_manifest(manifest, artifact, path=path, runtime=runtime, session=session))
