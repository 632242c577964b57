"""An artifact, opened: of a bundle, checked against its manifest, or one ONNX file with a card."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from cspdeploy.core.bundle import MANIFEST_FILE, check_hashes, read_manifest
from cspdeploy.core.detection.spec import Decode, Detection
from cspdeploy.core.errors import InputError, did_you_mean
from cspdeploy.core.integrity import held_unchanged
from cspdeploy.core.sizes import base_kind, contract_of
from cspdeploy.core.spec import Preprocess, Provenance, Task
from cspdeploy.core.types import Artifact, Frontend, Manifest
from cspdeploy.edge.engine_options import require_device, require_threads, session_request
from cspdeploy.runtimes import require_runtime
from cspdeploy.runtimes.base import Runtime, Session

if TYPE_CHECKING:
    from cspdeploy.core.card import ModelCard

__all__ = [
    "OpenedArtifact",
    "find_artifact",
    "find_card",
    "of_manifest",
    "open_artifact",
    "open_listed",
]

DEFAULT_ARTIFACT = "onnx"
SMALL_BYTES = 1 << 20
"""Files up to this size are hashed whenever their bundle is opened: a millisecond each."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenedArtifact:
    """A session with what an application must know of it.

    Attributes:
        model: its name.
        kind: of `cspdeploy.core.catalog.ARTIFACT_KINDS`; with a size, "onnx@320x320", where it is of a further one.
        path: the file.
        precision: "fp32", "fp16", "int8".
        contract: from an image to the network's input; with a `frontend`, what the graph does of it itself.
        outputs: the network's own, without those that a frontend adds.
        input_shape: as the file declares it; a free dimension is a name.
        note: what to know before it is used here: it was optimised for another machine; else empty.
        hash_checked: the file is the one of a manifest; False for a file without a bundle.
        detection: of a detector, how its outputs become boxes; `decode` is the contract of this file.
    """

    model: str
    kind: str
    path: Path
    precision: str
    task: Task
    labels: tuple[str, ...]
    contract: Preprocess
    frontend: Frontend | None
    provenance: Provenance
    outputs: tuple[str, ...]
    input_name: str
    input_shape: tuple[int | str, ...]
    runtime: Runtime
    session: Session
    hash_checked: bool
    note: str = ""
    detection: Detection | None = None
    decode: Decode | None = None

    @property
    def batch(self) -> int | None:
        """Images a call that it takes; None: any number."""
        size = self.input_shape[0]
        return size if isinstance(size, int) else None

    @property
    def provider(self) -> str:
        """Of the engine, as the session itself has it: "CPUExecutionProvider"."""
        own = getattr(self.session, "provider", "")
        most = max(self.session.placement.items(), key=lambda item: item[1], default=("", 0))[0]
        return str(own) or most or self.runtime.device


def open_artifact(
    place: Path, *, artifact: str, runtime: str, num_threads: int, key: Path | None = None, device: int | None = None
) -> OpenedArtifact:
    """Open an artifact of a bundle, or a single ONNX file.

    Of a bundle the artifact, its manifest and all small files are checked; the other artifacts and the golden images
    are `selftest`'s, for they take as long as opening the artifact does.

    Args:
        place: a bundle's folder, its manifest.json, or an ONNX file with a card, which is then the artifact.
        num_threads: as in `SessionRequest`.
        device: of a runtime on GPUs, as in `CudaOptions`; None: the first.
        key: public key that must have signed the manifest, or None.

    Raises:
        InputError: not one of these, no such artifact, or the runtime does not read it; a key that is none, or a key
            for a single file.
        TamperedError: a file is not the one of the manifest, or the manifest is not the one that was signed.
        RuntimeUnavailableError: the runtime is not here, or did not take the work.
    """
    require_threads(num_threads)
    if device is not None:
        require_device(device, require_runtime(runtime))
    try:
        if place.is_file() and place.name != MANIFEST_FILE:
            if key is not None:
                raise InputError(f"{place}: one file, expected a signed bundle: its signature is in the bundle",
                                 fix="name the bundle's folder")  # fmt: skip
            return _open_single(place, artifact=artifact, runtime=runtime, num_threads=num_threads, device=device)
        folder = place.parent if place.name == MANIFEST_FILE and place.is_file() else place
        manifest = _manifest(folder, key)
        small = {record.file for record in manifest.files if record.num_bytes <= SMALL_BYTES}
        check_hashes(folder, manifest, only=small)
    except OSError as error:
        raise InputError(f"{place}: {error.strerror or error}", fix="make it readable for this user") from error
    found = find_artifact(folder, manifest, artifact)
    return open_listed(
        folder, manifest, found, runtime=require_runtime(runtime), num_threads=num_threads, device=device
    )


def _manifest(folder: Path, key: Path | None) -> Manifest:
    if key is None:
        return read_manifest(folder)
    from cspdeploy.core.signature import verify_manifest

    return verify_manifest(folder, key)[0]


def find_artifact(folder: Path, manifest: Manifest, kind: str) -> Artifact:
    """The artifact of that kind.

    Raises:
        InputError: the bundle has none; names those that it has.
    """
    found = next((item for item in manifest.artifacts if item.kind == kind), None)
    if found is None:
        kinds = [item.kind for item in manifest.artifacts]
        raise InputError(
            f"{folder}: no artifact '{kind}', it has {', '.join(kinds)}", fix=f"--artifact {_nearest(kind, kinds)}"
        )
    return found


def _nearest(kind: str, kinds: list[str]) -> str:
    near = did_you_mean(kind, kinds)
    return next((one for one in kinds if f"'{one}'" in near), kinds[0])


def open_listed(
    folder: Path, manifest: Manifest, artifact: Artifact, *, runtime: Runtime, num_threads: int = 0,
    device: int | None = None,
) -> OpenedArtifact:  # fmt: skip
    """Open an artifact of a bundle whose hash is compared here and now.

    Raises:
        InputError: the runtime does not read it, or the engine cannot.
        TamperedError: it is not the file of the manifest.
        RuntimeUnavailableError: the device that was asked for did not take the work.
    """
    _require_reads(runtime, artifact.kind, format_=artifact.format, precision=artifact.precision)
    names = tuple(value.name for value in artifact.outputs)
    path = folder / artifact.file
    _import_meanwhile(runtime)
    with held_unchanged(folder, (artifact.file, artifact.sha256, artifact.num_bytes)):
        session = runtime.open(session_request(path, names, num_threads=num_threads, device=device))
    return of_manifest(manifest, artifact, path=path, runtime=runtime, session=session)


def _import_meanwhile(runtime: Runtime) -> None:
    """Begin to load the engine: hashing needs no interpreter, so that both go on at once where there are two cores."""
    missing = [name for name in runtime.modules if name not in sys.modules]
    if missing:
        # No daemon: a program that ends with an error now must not leave while a library is being loaded.
        Thread(target=_import_all, args=(missing,), name="cspdeploy-import").start()


def _import_all(names: list[str]) -> None:
    for name in names:
        with suppress(Exception):  # whoever imports it next hears of it
            importlib.import_module(name)


def of_manifest(
    manifest: Manifest, artifact: Artifact, *, path: Path, runtime: Runtime, session: Session
) -> OpenedArtifact:
    """A session whose file has been found to be that of the manifest."""
    spec, names = manifest.spec, tuple(value.name for value in artifact.outputs)
    return OpenedArtifact(
        model=spec.name, kind=artifact.kind, path=path, precision=artifact.precision, task=spec.task,
        labels=manifest.labels, contract=contract_of(manifest, artifact), frontend=artifact.frontend,
        provenance=spec.provenance,
        outputs=_own_outputs(names, artifact.frontend), input_name=artifact.inputs[0].name,
        input_shape=artifact.inputs[0].shape, runtime=runtime, session=session, hash_checked=True,
        note=_machine_note(artifact), detection=spec.detection, decode=artifact.decode,
    )  # fmt: skip


def find_card(path: Path) -> ModelCard | None:
    """The card of an ONNX file; None where it has none.

    Raises:
        InputError: not an ONNX file, or a card that is broken.
    """
    from cspdeploy.core.card import read_card
    from cspdeploy.core.onnx_wire import Message, read_message

    def metadata(model: Message) -> dict[str, str]:
        return {entry.text(1): entry.text(2) for entry in model.messages(14)}  # ModelProto.metadata_props

    return read_card(read_message(path, metadata), name=str(path))


def _open_single(path: Path, *, artifact: str, runtime: str, num_threads: int, device: int | None) -> OpenedArtifact:
    """One dropped file. Who made it, only a bundle can tell; what it takes, its card does."""
    from cspdeploy.core.catalog import ARTIFACT_KINDS

    card = find_card(path)
    if card is None:
        raise InputError(
            f"{path}: carries no card that says what it takes, expected a bundle or an ONNX file of cspdeploy export",
            fix="name the bundle's folder, or export it again",
        )
    if artifact not in (DEFAULT_ARTIFACT, card.artifact):
        raise InputError(
            f"{path}: is '{card.artifact}', asked for '{artifact}'",
            fix=f"leave out the artifact, give '{card.artifact}', or name a bundle",
        )
    kind = ARTIFACT_KINDS.get(base_kind(card.artifact))
    if kind is None:
        raise InputError(f"{path}: its card calls it '{card.artifact}', which is unknown here", fix="update cspdeploy")
    engine = require_runtime(runtime)
    _require_reads(engine, card.artifact, format_="onnx", precision=kind.precision)
    session = engine.open(session_request(path, card.outputs, num_threads=num_threads, device=device))
    inputs: dict[str, tuple[int | str, ...]] = getattr(session, "inputs", {})
    if len(inputs) != 1 or len(next(iter(inputs.values()))) != 4:
        raise InputError(f"{path}: takes {inputs or 'no inputs'}, expected one of 4 dimensions, images", fix="")
    name, shape = next(iter(inputs.items()))
    return OpenedArtifact(
        model=card.model, kind=card.artifact, path=path, precision=kind.precision, task=card.task, labels=card.labels,
        contract=card.preprocess, frontend=card.frontend, provenance=card.provenance,
        outputs=_own_outputs(card.outputs, card.frontend), input_name=name, input_shape=shape, runtime=engine,
        session=session, hash_checked=False, detection=card.detection, decode=card.decode,
    )  # fmt: skip


def _require_reads(runtime: Runtime, kind: str, *, format_: str, precision: str) -> None:
    if not runtime.reads(format_=format_, precision=precision):
        raise InputError(f"--runtime {runtime.name}: does not read '{kind}'", fix="cspdeploy doctor")


def _machine_note(artifact: Artifact) -> str:
    if not artifact.machine:
        return ""
    from cspdeploy.core.env import other_machine  # what most artifacts do not need is not loaded

    return other_machine(artifact.machine)


def _own_outputs(names: tuple[str, ...], frontend: Frontend | None) -> tuple[str, ...]:
    """Without "probabilities" and "classes", which a frontend with top-k puts last."""
    return names[:-2] if frontend is not None and frontend.top_k else names
