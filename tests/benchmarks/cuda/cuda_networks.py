"""The networks of the benchmark, exported once: seeded random weights of the registry, or a bundle or model folder.

Every export is a child process of its own, as many side by side as there are CPUs for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cuda_budget import OUT_OF_TIME
from cuda_regimes import Regime

from cspdeploy.core.bundle import MANIFEST_FILE, read_manifest
from cspdeploy.core.env import num_usable_cpus
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import GOLDEN_FILE, Golden, read_golden
from cspdeploy.core.model_folder import WEIGHTS_FILE, read_spec
from cspdeploy.core.spec import ModelSpec
from cspdeploy.nets.registry import is_network
from cspdeploy.runtimes.base import SessionRequest

__all__ = ["ExportJob", "Network", "name_of", "start_export"]

CHILD = Path(__file__).with_name("cuda_export_child.py")
READY = "ready"
"""An empty file beside the model folder, once that is whole."""
_CPUS_AN_EXPORT = 2
"""An export waits for files and for its own children about half of its time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network ready to be opened.

    Attributes:
        files: path by kind, "eager" for the weights; a kind that is missing has its reason in `missing`.
        golden: real images with the network's outputs in FP64, or None where that is not wanted.
        batch: that the ONNX files take; 0: any.
    """

    name: str
    spec: ModelSpec
    files: dict[str, Path]
    golden: Golden | None
    batch: int = 0
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        """Whether its decisions mean anything."""
        return self.spec.provenance.source != "random"

    def request(self, regime: Regime) -> SessionRequest:
        """Of a session in that regime.

        Raises:
            InputError: there is no such file.
        """
        path = self.files.get(regime.source)
        if path is None:
            raise InputError(self.missing.get(regime.source, f"{self.name} has no {regime.source}"))
        spec = self.spec if regime.source == "eager" else None
        return regime.request(SessionRequest(path=path, outputs=self.spec.outputs, spec=spec))


class ExportJob:
    """A child that exports one network. `finish` waits for it."""

    def __init__(self, name: str, given: str, folder: Path, process: subprocess.Popen[str] | None) -> None:
        self.name, self._given, self._folder, self._process = name, given, folder, process

    def weights(self, size_px: int) -> Network | None:
        """What can be opened before the export is done: PyTorch with the weights, without files and images.

        None as long as they are not there; always of a bundle, which has none.
        """
        folder = self._folder / "models" / self.name
        if self._process is None or not (self._folder / READY).is_file():
            return None
        spec = read_spec(folder)
        spec = dataclasses.replace(spec, preprocess=spec.preprocess.with_size(size_px, size_px))
        return Network(name=self.name, spec=spec, files={"eager": folder / WEIGHTS_FILE}, golden=None)

    def finish(self, seconds: float) -> Network:
        """The network, `seconds` later at the latest.

        Raises:
            InputError: it cannot be exported, or not in time.
        """
        if self._process is None:
            return _open_bundle(self.name, Path(self._given), None)
        try:
            _, told = self._process.communicate(timeout=max(0.1, seconds))
        except subprocess.TimeoutExpired:
            self.stop()
            raise InputError(OUT_OF_TIME, fix="--budget, or --only with --merge") from None
        if self._process.returncode:
            last = (told.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"{self.name}: cannot be exported ({last[:200]})")
        return _open_bundle(self.name, self._folder / "exported" / self.name, self._folder / "models" / self.name)

    def stop(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(ValueError):
                self._process.communicate()


def name_of(given: str) -> str:
    """What the network will be called: the name in the registry or in the model folder, or that of the bundle.

    Raises:
        InputError: none of these.
    """
    place = Path(given)
    if (place / MANIFEST_FILE).is_file():
        return place.name
    if not is_network(given) and not (place / WEIGHTS_FILE).is_file():
        raise InputError(f"--only {given}: no network, model folder or bundle", fix="see: cspdeploy list")
    return given if is_network(given) else read_spec(place).name


def start_export(given: str, folder: Path, *, size_px: int, int8: bool = False) -> ExportJob:
    """Begin to export into `folder`.

    Args:
        given: a network of the registry, a model folder, or a bundle, which is taken as it is.
        int8: the INT8 file alone.

    Raises:
        InputError: none of these.
    """
    name = name_of(given)
    if (Path(given) / MANIFEST_FILE).is_file():
        return ExportJob(name, given, folder, None)
    command = [
        sys.executable, "-W", "ignore", str(CHILD), given, str(folder), str(size_px), "int8" if int8 else "float",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=child_paths())
    return ExportJob(name, given, folder, process)


def child_paths() -> dict[str, str]:
    """The environment of a child that imports what this process imports."""
    from cspdeploy.core.child import child_environment

    return child_environment()


def exports_at_once() -> int:
    """How many children may export side by side."""
    return max(1, num_usable_cpus() // _CPUS_AN_EXPORT)


def _open_bundle(name: str, bundle: Path, models: Path | None) -> Network:
    manifest = read_manifest(bundle)
    files = {artifact.kind: bundle / artifact.file for artifact in manifest.artifacts if artifact.format == "onnx"}
    missing = {
        "onnx-fp16": f"{name}: no FP16 file could be made", "onnx-int8": "no INT8 file was made of this network",
    }  # fmt: skip
    if models is not None:
        files["eager"] = models / WEIGHTS_FILE
    else:
        missing["eager"] = f"{name} is a bundle, which holds no weights for PyTorch"
    float_file = next((artifact for artifact in manifest.artifacts if artifact.kind == "onnx"), None)
    first = float_file.inputs[0].shape[0] if float_file is not None else 0
    golden = read_golden(bundle / GOLDEN_FILE)
    return Network(
        name=name, spec=manifest.spec, files=files, golden=golden, batch=first if isinstance(first, int) else 0,
        missing=missing,
    )  # fmt: skip
