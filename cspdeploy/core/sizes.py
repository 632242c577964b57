"""A bundle of several input sizes: which artifact is of which size, and the bundle as if it had that size alone.

The first size is the bundle's own: its artifacts are called as in any bundle, `onnx`. Those of a further one are called
`onnx@320x320` (height x width in pixels), and have golden images and outputs of their own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from cspdeploy.core.spec import ModelSpec, Preprocess
from cspdeploy.core.types import Artifact, Manifest

__all__ = [
    "Size", "at_size", "base_kind", "contract_of", "full_kind", "golden_file", "size_label", "size_of", "sized_kind",
    "sizes_of", "spec_at", "split_kind",
]  # fmt: skip

Size = tuple[int, int]
"""Height and width in pixels."""

_SIZED = re.compile(r"(?P<base>.+)@(?P<height>[1-9]\d{0,4})x(?P<width>[1-9]\d{0,4})", re.ASCII)


def split_kind(kind: str) -> tuple[str, Size | None]:
    """`onnx@320x320` to `onnx` and (320, 320); of the bundle's own size, and of any other name, the name and None."""
    match = _SIZED.fullmatch(kind)
    if match is None:
        return kind, None
    return match["base"], (int(match["height"]), int(match["width"]))


def base_kind(kind: str) -> str:
    """Without the size."""
    return split_kind(kind)[0]


def size_of(kind: str) -> Size | None:
    """The further size that it is of; None: the bundle's own."""
    return split_kind(kind)[1]


def size_label(size_px: Size | None) -> str:
    """What a further size adds to a name: `@320x320`; empty for the bundle's own."""
    return "" if size_px is None else f"@{size_px[0]}x{size_px[1]}"


def sized_kind(kind: str, size_px: Size | None) -> str:
    """`onnx` and (320, 320) to `onnx@320x320`."""
    return f"{kind}{size_label(size_px)}"


def full_kind(manifest: Manifest, artifact: Artifact) -> str:
    """With its size also where that is the bundle's own."""
    contract = contract_of(manifest, artifact)
    return sized_kind(base_kind(artifact.kind), (contract.height_px, contract.width_px))


def golden_file(size_px: Size | None) -> str:
    """Name of the golden images of that size."""
    return "golden.npz" if size_px is None else f"golden.{size_px[0]}x{size_px[1]}.npz"


def sizes_of(artifacts: Iterable[Artifact]) -> tuple[Size | None, ...]:
    """The sizes that there are artifacts of, in their order; None is the bundle's own."""
    return tuple(dict.fromkeys(size_of(artifact.kind) for artifact in artifacts))


def spec_at(spec: ModelSpec, size_px: Size | None) -> ModelSpec:
    """The model at a further size. The accuracy that is recorded is that of its own."""
    if size_px is None:
        return spec
    return dataclasses.replace(
        spec, preprocess=spec.preprocess.with_size(*size_px),
        provenance=dataclasses.replace(spec.provenance, accuracy=None),
    )  # fmt: skip


def contract_of(manifest: Manifest, artifact: Artifact) -> Preprocess:
    """From an image to the network's input, of that artifact."""
    return spec_at(manifest.spec, size_of(artifact.kind)).preprocess


def at_size(manifest: Manifest, size_px: Size | None) -> Manifest:
    """The manifest as if the bundle had that size alone, its artifacts called as they are.

    Raises:
        ValueError: it has no artifact of that size.
    """
    made = tuple(artifact for artifact in manifest.artifacts if size_of(artifact.kind) == size_px)
    return dataclasses.replace(manifest, spec=spec_at(manifest.spec, size_px), artifacts=made)
