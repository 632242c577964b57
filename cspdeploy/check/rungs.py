"""The ladder of a bundle: which artifact is checked on which runtime, in order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cspdeploy.core.bundle import file_sha256
from cspdeploy.core.catalog import EAGER
from cspdeploy.core.model_folder import WEIGHTS_FILE
from cspdeploy.core.types import Manifest
from cspdeploy.runtimes import all_runtimes, require_runtime
from cspdeploy.runtimes.base import Runtime, SessionRequest

__all__ = ["Rung", "list_rungs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One artifact on one runtime. `not_checkable` says why it cannot be opened here, or is empty."""

    artifact: str
    precision: str
    num_bytes: int
    output_names: tuple[str, ...]
    batch: int | None
    """Images a call that the artifact takes; None: any number."""
    runtime: Runtime
    request: SessionRequest
    not_checkable: str = ""


def list_rungs(folder: Path, manifest: Manifest, *, runtimes: list[str]) -> list[Rung]:
    """Eager first, then the artifacts in the order of the ladder, each on every runtime that reads it.

    Args:
        runtimes: names asked for; empty for all that are here. A CPU runtime that is not here gives rungs that say so;
            one for another device is left out.

    Raises:
        InputError: unknown runtime.
        RuntimeUnavailableError: a runtime that was asked for is missing.
    """
    wanted = [require_runtime(name) for name in runtimes] or [
        runtime for runtime in all_runtimes().values() if runtime.device == "cpu" or runtime.missing() is None
    ]
    rungs = _eager_rungs(folder, manifest, wanted)
    for artifact in manifest.artifacts:
        batch = artifact.inputs[0].shape[0]
        rungs += [
            Rung(
                artifact=artifact.kind, precision=artifact.precision, num_bytes=artifact.num_bytes,
                output_names=tuple(value.name for value in artifact.outputs),
                batch=batch if isinstance(batch, int) else None, runtime=runtime,
                request=SessionRequest(
                    path=folder / artifact.file, outputs=tuple(value.name for value in artifact.outputs)
                ),
                not_checkable=_missing(runtime),
            )
            for runtime in wanted
            if runtime.reads(format_=artifact.format, precision=artifact.precision)
        ]  # fmt: skip
    return rungs


def _missing(runtime: Runtime) -> str:
    missing = runtime.missing()
    return f"{missing[0]} ({missing[1]})" if missing else ""


def _eager_rungs(folder: Path, manifest: Manifest, wanted: list[Runtime]) -> list[Rung]:
    eager = [runtime for runtime in wanted if runtime.reads(format_=EAGER, precision="fp32")]
    if not eager:
        return []
    weights = _find_weights(folder, manifest)
    absent = "" if weights else "the weights that the bundle was made from are not here"
    return [
        Rung(
            artifact=EAGER, precision="fp32", num_bytes=weights.stat().st_size if weights else 0,
            output_names=manifest.spec.outputs, batch=None, runtime=runtime,
            request=SessionRequest(path=weights or folder, outputs=manifest.spec.outputs, spec=manifest.spec),
            not_checkable=_missing(runtime) or absent,
        )
        for runtime in eager
    ]  # fmt: skip


def _find_weights(folder: Path, manifest: Manifest) -> Path | None:
    """The file with the very bytes that the bundle was made from, where it lay at export or in models/."""
    sha256 = manifest.spec.provenance.weights_sha256
    names = dict.fromkeys((manifest.spec.name, Path(str(manifest.options.get("model", ""))).name))
    places = [
        Path(str(manifest.options.get("weights", ""))),
        *(
            models / name / WEIGHTS_FILE
            for name in names
            for models in (Path("models"), folder.parent.parent / "models")
        ),
    ]
    return next((path for path in places if sha256 and _may_be_weights(path) and file_sha256(path) == sha256), None)


def _may_be_weights(path: Path) -> bool:
    """The path may come from a manifest of unknown origin: nothing but a weights file is read."""
    return path.suffix in (".safetensors", ".pth", ".pt", ".bin", ".weights", ".backup") and path.is_file()
